"""Memory of a coadd against what its job asks for (coaddflow.runtime.resources.coadd_memory).

    python benchmarks/coadd_memory.py

Each case is a process of its own, as in the workflow: patch side (pixels), exposures, and the
setting coadd.memory_mb. The warps are noise that is made as it is read, so they cost no memory;
the coadd is written. Prints the peak, what is asked for, and the ratio; above 1 a job would die.
"""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from coaddflow.coadd.mean import CoaddInput, coadd_patch
from coaddflow.coadd.product import write_coadd
from coaddflow.geometry.box import Box
from coaddflow.image.masked_image import MaskedImage
from coaddflow.runtime.resources import coadd_memory
from coaddflow.settings.coadd import CoaddSettings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap

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

    def __init__(self, side: int, seed: int):
        self.box = (0, 0, side, side)
        self._rng = np.random.default_rng(seed)

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """Put a part of the warp into an image (`coaddflow.warp.files.WarpReader`)."""
        shape = (box[3] - box[1], box[2] - box[0])
        image = self._rng.standard_normal(shape, np.float32)
        pixels = MaskedImage(image, np.ones(shape, np.float32), np.zeros(shape, np.int32))
        target.put(pixels, corner)


def coadd(side: int, n_inputs: int, memory_mb: int) -> None:
    """Make one coadd and print the peak memory of this process, MB."""
    inputs = [CoaddInput(f"{k:04d}", Noise(side, k), 1.0, seeing=0.7) for k in range(n_inputs)]
    settings = CoaddSettings(memory_mb=memory_mb)
    result = coadd_patch(inputs, (0, 0, side, side), settings, pixel_scale=0.2)
    place = {"ra": 150.0, "dec": 2.0, "width": 0.1, "height": 0.1}
    tract = make_skymap(SkymapSettings(kind="tangent", tangent=place)).tract(0)
    with tempfile.TemporaryDirectory() as folder:
        write_coadd(Path(folder) / "coadd.fits", result, tract)
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
