"""Detection and PSF of one CCD, beside source-extractor and PSFEx on the same calexp.

    python benchmarks/detection_psf.py --pairs 5

Simulates one CCD of DECam and makes its calexp as `ccd_stages.py` does (needs the extra
`simulate`, and the programs source-extractor and psfex), then finds its sources and models its PSF
in turn with coaddflow and with the two programs, and prints the medians of CPU and wall seconds.
Both get the image without its sky, its variance and what is wrong with its pixels, look for sources
of 5 sigma in an image that is filtered with a Gaussian of the width of the seeing, deblend with the
same settings, and fit a PSF of second order to all good stars. Ours is warm, as in a worker that
does many CCDs: start-up, and reading the calexp, are not counted; those of the programs are. With
``--folder`` the simulation is kept there and used again.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from astropy.io import fits
from raw_to_calexp import CCD, finished_ccd
from threadpoolctl import threadpool_limits

from coaddflow.calexp.product import read_calexp
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.detection import detect_sources, measure_seeing
from coaddflow.measure.psf_fit import fit_psf
from coaddflow.measure.stars import select_stars
from coaddflow.runtime.allocator import keep_freed_memory
from coaddflow.settings.detection import DetectionSettings
from coaddflow.settings.psf import PsfSettings

SOURCE_EXTRACTOR = {
    "CATALOG_TYPE": "FITS_LDAC",
    "CATALOG_NAME": "sources.ldac",
    "PARAMETERS_NAME": "columns",
    "DETECT_MINAREA": 3,
    "FILTER_NAME": "filter",
    "DEBLEND_NTHRESH": 32,
    "DEBLEND_MINCONT": 0.005,
    "WEIGHT_TYPE": "MAP_VAR",
    "WEIGHT_IMAGE": "variance.fits",
    "FLAG_IMAGE": "flags.fits",
    "BACK_TYPE": "MANUAL",
    "BACK_VALUE": 0,
    "SATUR_LEVEL": 60000,
    "MASK_TYPE": "NONE",
    "VERBOSE_TYPE": "QUIET",
}
COLUMNS = """NUMBER X_IMAGE Y_IMAGE XWIN_IMAGE YWIN_IMAGE FLUX_ISO FLUXERR_ISO FLUX_RADIUS
A_IMAGE B_IMAGE THETA_IMAGE FLAGS IMAFLAGS_ISO FLUX_APER(1) FLUXERR_APER(1) SNR_WIN ELONGATION
VIGNET(33,33)"""
PSFEX = {
    "PSFVAR_DEGREES": 2,
    "PSF_SIZE": "33,33",
    "SAMPLE_MINSN": 50,
    "CHECKIMAGE_TYPE": "NONE",
    "CHECKPLOT_DEV": "NULL",
    "WRITE_XML": "N",
    "NTHREADS": 1,
    "VERBOSE_TYPE": "QUIET",
}


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="how often each is timed")
    parser.add_argument("--folder", type=Path, help="where the simulation is kept")
    arguments = parser.parse_args()
    programs = shutil.which("source-extractor") or shutil.which("sex"), shutil.which("psfex")
    if not all(programs):
        sys.exit("source-extractor and psfex are needed")
    keep_freed_memory()  # as jobs do
    with (
        threadpool_limits(1),
        finished_ccd(arguments.folder) as folder,
        tempfile.TemporaryDirectory() as temporary,
    ):
        calexp = min(folder.glob(f"results/calexp/*/{CCD}.fits"))
        image = read_calexp(calexp).masked_image
        sources, stars, fwhm = ours(image)
        write_input(Path(temporary), image, fwhm)
        os.chdir(temporary)
        rows = {"coaddflow": [], "source-extractor": [], "psfex": []}
        for _ in range(arguments.pairs):
            rows["coaddflow"].append(timed(lambda: ours(image)))
            rows["source-extractor"].append(timed(lambda: program(programs[0], "image.fits")))
            rows["psfex"].append(timed(lambda: program(programs[1], "sources.ldac")))
        with fits.open("sources.ldac") as catalogue, fits.open("sources.psf") as psf:
            theirs = len(catalogue["LDAC_OBJECTS"].data), psf[1].header["ACCEPTED"]
    print(f"sources and stars: coaddflow {sources}, {stars}; the programs {theirs[0]}, {theirs[1]}")
    print(f"{'':18s} {'CPU s':>8s} {'wall s':>8s}")
    rows["both programs"] = np.add(rows["source-extractor"], rows["psfex"])
    for name, values in rows.items():
        cpu, wall = np.median(values, axis=0)
        print(f"{name:18s} {cpu:8.3f} {wall:8.3f}")


def ours(image: MaskedImage) -> tuple[int, int, float]:
    """Find sources and model the PSF; return their numbers, and the seeing in pixels."""
    detection_settings, psf_settings = DetectionSettings(), PsfSettings()
    seeing = measure_seeing(image, detection_settings)
    detection = detect_sources(image, seeing, detection_settings)
    stars = select_stars(detection.sources, psf_settings)
    _, quality, _ = fit_psf(image, detection, stars, psf_settings)
    return len(detection.sources), quality.n_stars, seeing


def write_input(folder: Path, image: MaskedImage, fwhm: float) -> None:
    """Write the image, its variance and flags, and the configuration of the programs."""
    bad = image.has_any(MaskPlane.SAT | MaskPlane.BAD | MaskPlane.CR | MaskPlane.NO_DATA)
    planes = {"image": image.image, "variance": image.variance, "flags": bad.astype(np.int16)}
    for name, pixels in planes.items():
        fits.PrimaryHDU(pixels).writeto(folder / f"{name}.fits")
    reach = np.arange(-3, 4)
    kernel = np.exp(-0.5 * (reach[:, None] ** 2 + reach**2) * (2.3548 / fwhm) ** 2)
    lines = "\n".join(" ".join(f"{value:.6f}" for value in row) for row in kernel)
    (folder / "filter").write_text(f"CONV NORM\n{lines}\n")
    (folder / "columns").write_text("\n".join(COLUMNS.split()))
    # source-extractor compares filtered pixels with the noise of unfiltered ones
    threshold = 5.0 * np.sqrt((kernel**2).sum()) / kernel.sum()
    extractor = SOURCE_EXTRACTOR | {"DETECT_THRESH": threshold}
    for name, settings in (("source-extractor", extractor), ("psfex", PSFEX)):
        text = "".join(f"{key} {value}\n" for key, value in settings.items())
        (folder / f"{name}.conf").write_text(text)


def program(path: str, file: str) -> None:
    """Run one of the programs on a file; show what it said if it fails."""
    name = "psfex" if path.endswith("psfex") else "source-extractor"
    command = [path, file, "-c", f"{name}.conf"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode != 0:
        sys.exit(ended.stdout + ended.stderr)


def timed(function) -> tuple[float, float]:
    """Return CPU seconds, those of programs that it runs included, and wall seconds."""
    before, wall = cpu_seconds(), time.perf_counter()
    function()
    return cpu_seconds() - before, time.perf_counter() - wall


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the programs that it has run."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main()
