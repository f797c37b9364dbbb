"""Memory of a coadd against what its job asks for (coaddflow.runtime.resources.coadd_memory).

    python benchmarks/coadd_memory.py

Each case is a process of its own, as in the workflow: patch side (pixels), exposures, and the
setting coadd.memory_mb. The warps are noise that is made as it is read, so they cost no memory;
spots of 3 x 3 pixels are flagged, 0.5 % of all. The coadd is written with its PSF. Prints the peak,
what is asked for, and the ratio; above 1 a job would die.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from coaddflow.coadd.mean import CoaddInput, coadd_patch
from coaddflow.coadd.product import coadd_figures, write_coadd
from coaddflow.coadd.psf import CoaddPsf, PsfInput
from coaddflow.geometry.box import Box
from coaddflow.geometry.polynomial import term_powers
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.psf_model import PsfModel
from coaddflow.runtime.resources import coadd_memory
from coaddflow.settings.coadd import CoaddSettings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.skymap.tract import Tract
from coaddflow.warp.ccd_psf import CcdPsf, describe_psf
from coaddflow.warp.mapping import map_ccd

_PIXELS_PER_SPOT = 1800

CASES = (
    (760, 3, 512),
    (760, 100, 512),
    (2000, 10, 512),
    (4200, 4, 512),
    (4200, 40, 512),
    (4200, 40, 2000),
    (4200, 300, 512),
)


class Noise:
    """A warp of noise that covers a whole patch."""

    def __init__(self, side: int, seed: int, psf: CcdPsf):
        self.box = (0, 0, side, side)
        self._rng = np.random.default_rng(seed)
        self._psf = psf

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """Put a part of the warp into an image (`coaddflow.warp.files.WarpReader`)."""
        shape = (box[3] - box[1], box[2] - box[0])
        image = self._rng.standard_normal(shape, np.float32)
        mask = np.zeros(shape, np.int32)
        spots = [self._rng.integers(n, size=image.size // _PIXELS_PER_SPOT) for n in shape]
        for dy, dx in np.ndindex(3, 3):
            at = tuple(
                np.minimum(p + d, n - 1) for p, d, n in zip(spots, (dy, dx), shape, strict=True)
            )
            mask[at] = MaskPlane.BAD
        target.put(MaskedImage(image, np.ones(shape, np.float32), mask), corner)

    def read_psfs(self) -> tuple[CcdPsf, ...]:
        """Return the PSF of the exposure, which is one CCD."""
        return (self._psf,)


def make_psf(side: int, tract: Tract) -> CcdPsf:
    """Return a PSF that varies over a CCD that lies as the tract does."""
    y, x = np.mgrid[-20:21, -20:21]
    star = np.exp(-0.5 * (x**2 + y**2) / 4.0)
    basis = np.stack([star, *(0.01 * star * x**p * y**q for p, q in term_powers(2)[1:])])
    middle = (side / 2.0, side / 2.0)
    model = PsfModel(basis, 2, 0.8, 16, middle, middle)
    wcs = tract.wcs()
    wcs.array_shape = (side, side)
    grid = map_ccd(wcs, (side, side), tract)
    box = (0, 0, side, side)
    return describe_psf(0, model, wcs, (side, side), box, grid, ("lanczos3", 1.0))


def coadd(side: int, n_inputs: int, memory_mb: int) -> None:
    """Make one coadd and print the peak memory of this process, MB."""
    place = {"ra": 150.0, "dec": 2.0, "width": 0.3, "height": 0.3}
    tract = make_skymap(SkymapSettings(kind="tangent", tangent=place)).tract(0)
    one = make_psf(side, tract)
    inputs = [CoaddInput(f"{k:04d}", Noise(side, k, one), 1.0, seeing=0.7) for k in range(n_inputs)]
    settings, box = CoaddSettings(memory_mb=memory_mb), (0, 0, side, side)
    result = coadd_patch(inputs, box, settings, pixel_scale=0.2)
    parts = [PsfInput(one.exposure, one.weight, one.reader.read_psfs()) for one in inputs]
    psf = CoaddPsf(tract, box, result.sets, parts)
    with tempfile.TemporaryDirectory() as folder:
        figures = coadd_figures(result, psf, 0.2, 0.8)
        write_coadd(Path(folder) / "coadd.fits", result, tract, psf=psf, figures=figures)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def main() -> None:
    """Run all cases, or the one that is named."""
    if len(sys.argv) > 1:
        coadd(*map(int, sys.argv[1:]))
        return
    print("patch  exposures  memory_mb   peak MB  asked MB  ratio")
    for case in CASES:
        command = [sys.executable, __file__, *map(str, case)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, asked = float(done.stdout), coadd_memory(case[0] ** 2, case[1], case[2])
        side, n_inputs, memory_mb = case
        print(
            f"{side:5d} {n_inputs:10d} {memory_mb:10d} {peak:9.0f} {asked:9d} {peak / asked:6.2f}"
        )


if __name__ == "__main__":
    main()
