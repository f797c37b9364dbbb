"""Warping and coadding 8 full CCDs: coaddflow against SWarp, on the same files and threads.

Four dithered exposures of two CCDs of 2048 x 4096 pixels with a distorted WCS (TPV) become one
coadd of 4200 x 4200 pixels, Lanczos-3, weighted by the variance. Both programs read the same FITS
files, run as processes of their own (start and imports included), in turn, several times; the
medians are printed. coaddflow runs as its workflow does (``disk``: warps with variance and mask
are written, then read again for the coadd, with outliers clipped) and without files in between
(``memory``). SWarp writes its resampled images too; it has no masks and does not clip.

Then the stars of both coadds are compared with each other and with what was put in.

    python benchmarks/warp_coadd_vs_swarp.py --runs 5 --threads 1 2
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from child_time import cost_of

from coaddflow.coadd.mean import CoaddInput, coadd_patch
from coaddflow.coadd.product import write_coadd
from coaddflow.geometry.wcs_header import read_wcs, wcs_to_header
from coaddflow.image.masked_image import (
    MaskedImage,
    MaskPlane,
    masked_image_hdus,
    read_masked_image,
    write_fits,
)
from coaddflow.runtime.allocator import keep_freed_memory
from coaddflow.settings.coadd import CoaddSettings
from coaddflow.settings.warp import WarpSettings
from coaddflow.skymap.tract import Tract
from coaddflow.tables.warps import read_warp_table
from coaddflow.warp.ccds import CcdImage, warp_patches
from coaddflow.warp.files import WarpFile, write_warps

RA, DEC, PIXEL_SCALE = 150.0, 2.2, 0.2
SKY_NOISE = 20.0
EXPOSURES = {"e1": (0, 0), "e2": (31.3, -14.7), "e3": (-22.6, 40.2), "e4": (12.1, 25.9)}
SWARP = shutil.which("SWarp") or shutil.which("swarp")


def make_tract(side: int) -> Tract:
    """Return a tract of one patch."""
    middle = (side - 1) / 2.0
    return Tract(0, RA, DEC, (middle, middle), (1, 1), (side, side), 0, PIXEL_SCALE)


def make_wcs(shape: tuple[int, int], ccd: int, dither: tuple[float, float], turn: float) -> WCS:
    """Return the TPV of a CCD left (0) or right (1) of the centre, with radial distortion."""
    header = fits.Header()
    angle = np.radians(turn)
    scale = PIXEL_SCALE / 3600.0
    header["CTYPE1"], header["CTYPE2"] = "RA---TPV", "DEC--TPV"
    header["CRVAL1"], header["CRVAL2"] = RA, DEC
    header["CRPIX1"] = shape[1] * (1.01 - 1.02 * ccd) + dither[0]
    header["CRPIX2"] = shape[0] / 2.0 + dither[1]
    header["CD1_1"], header["CD1_2"] = -scale * np.cos(angle), scale * np.sin(angle)
    header["CD2_1"], header["CD2_2"] = scale * np.sin(angle), scale * np.cos(angle)
    header["PV1_1"], header["PV2_1"] = 1.0, 1.0
    header["PV1_7"], header["PV1_9"] = 0.5, 0.5
    header["PV2_7"], header["PV2_9"] = 0.5, 0.5
    return read_wcs(header)


def make_files(folder: Path, shape: tuple[int, int], n_stars: int) -> np.ndarray:
    """Write the CCDs; return the stars: ra, dec, flux."""
    rng = np.random.default_rng(1)
    extent = 0.47 * shape[0] * PIXEL_SCALE / 3600.0
    ra = RA + rng.uniform(-extent, extent, n_stars) / np.cos(np.radians(DEC))
    dec = DEC + rng.uniform(-extent, extent, n_stars)
    flux = 10.0 ** rng.uniform(5.0, 6.0, n_stars)
    for k, (exposure, dither) in enumerate(EXPOSURES.items()):
        for ccd in (0, 1):
            wcs = make_wcs(shape, ccd, dither, turn=0.4 * k)
            image = rng.normal(0.0, SKY_NOISE, shape).astype(np.float32)
            x, y = wcs.all_world2pix(ra, dec, 0)
            add_stars(image, x, y, flux, sigma=1.7)
            mask = np.zeros(shape, np.int32)
            flag_bad_column_and_stars(image, mask, x, y)
            variance = np.full(shape, SKY_NOISE**2, np.float32)
            hdus = masked_image_hdus(MaskedImage(image, variance, mask), wcs_to_header(wcs))
            write_fits(folder / f"{exposure}-{ccd}.fits", hdus)
    return np.stack([ra, dec, flux])


def add_stars(image: np.ndarray, x: np.ndarray, y: np.ndarray, flux: np.ndarray, sigma: float):
    """Draw round Gaussians."""
    for star_x, star_y, star_flux in zip(x, y, flux, strict=True):
        column, row = round(float(star_x)), round(float(star_y))
        if not (0 <= column < image.shape[1] and 0 <= row < image.shape[0]):
            continue
        columns = np.arange(max(column - 14, 0), min(column + 15, image.shape[1]))
        rows = np.arange(max(row - 14, 0), min(row + 15, image.shape[0]))
        profile = np.outer(
            np.exp(-0.5 * ((rows - star_y) / sigma) ** 2),
            np.exp(-0.5 * ((columns - star_x) / sigma) ** 2),
        )
        image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += (
            star_flux / (2.0 * np.pi * sigma**2) * profile
        )


def flag_bad_column_and_stars(image: np.ndarray, mask: np.ndarray, x: np.ndarray, y: np.ndarray):
    """Set the flags that an ordinary calexp has: they are on the slow path of the resampling."""
    column = image.shape[1] // 3
    image[:, column] = 0.5 * (image[:, column - 1] + image[:, column + 1])
    mask[:, column] |= MaskPlane.BAD | MaskPlane.INTRP
    for i, j in zip(x.round().astype(int), y.round().astype(int), strict=True):
        if 0 <= i < image.shape[1] and 0 <= j < image.shape[0]:
            mask[max(j - 8, 0) : j + 9, max(i - 8, 0) : i + 9] |= MaskPlane.DETECTED


def run_coaddflow(folder: Path, side: int, mode: str, threads: int) -> None:
    """Warp and coadd as the workflow does: so many jobs at a time, each with one thread."""
    keep_freed_memory()  # as every job does
    tract = make_tract(side)
    output = folder / f"coaddflow-{mode}"

    def load(exposure: str, ccd: int) -> CcdImage:
        masked_image, header = read_masked_image(folder / f"{exposure}-{ccd}.fits")
        return CcdImage(masked_image, read_wcs(header), scale=1.0)

    def warp(exposure: str) -> object:
        settings = WarpSettings()
        warps = warp_patches(tract, {"0_0": (0, 1)}, lambda ccd: load(exposure, ccd), settings)
        if mode == "memory":
            return dict(warps)["0_0"]
        table_path = output / "0" / f"{exposure}.ecsv"
        write_warps(table_path, exposure, tract, warps, settings)
        return WarpFile(table_path.parent / read_warp_table(table_path).warps[0].path)

    with ThreadPoolExecutor(threads) as pool:
        readers = list(pool.map(warp, EXPOSURES))
    inputs = [
        CoaddInput(exposure, reader, SKY_NOISE**-2.0, seeing=1.7 * 2.355 * PIXEL_SCALE)
        for exposure, reader in zip(EXPOSURES, readers, strict=True)
    ]
    box = (0, 0, side, side)
    coadd = coadd_patch(inputs, box, CoaddSettings(), pixel_scale=PIXEL_SCALE, threads=threads)
    write_coadd(output / "coadd.fits", coadd, tract)


def run_swarp(folder: Path, side: int, threads: int) -> list[str]:
    """Return the command of SWarp for the same coadd, and write its header file."""
    files = [folder / f"{exposure}-{ccd}.fits" for exposure in EXPOSURES for ccd in (0, 1)]
    return swarp_command(make_tract(side), files, folder / "swarp", threads)


def swarp_command(tract: Tract, files: list[Path], output: Path, threads: int) -> list[str]:
    """Return the command of SWarp for a coadd of products on a tract; write its header file."""
    output.mkdir(exist_ok=True)
    header = tract.wcs().to_header()
    header["NAXIS"], header["NAXIS1"], header["NAXIS2"] = 2, tract.width, tract.height
    (output / "coadd.head").write_text(header.tostring(sep="\n", endcard=True) + "\n")
    options = {
        "IMAGEOUT_NAME": output / "coadd.fits",
        "WEIGHTOUT_NAME": output / "coadd.weight.fits",
        "WEIGHT_TYPE": "MAP_VARIANCE",
        "WEIGHT_IMAGE": ",".join(f"{file}[3]" for file in files),
        "RESCALE_WEIGHTS": "N",
        "COMBINE_TYPE": "WEIGHTED",
        "RESAMPLING_TYPE": "LANCZOS3",
        "RESAMPLE_DIR": output,
        "SUBTRACT_BACK": "N",
        "FSCALASTRO_TYPE": "VARIABLE",
        "PROJECTION_ERR": "0.001",
        "NTHREADS": threads,
        "VERBOSE_TYPE": "QUIET",
        "WRITE_XML": "N",
    }
    command = [SWARP, *(f"{file}[1]" for file in files), "-c", os.devnull]
    for name, value in options.items():
        command += [f"-{name}", str(value)]
    return command


def timed(command: list[str], threads: int) -> tuple[float, float]:
    """Run a command; return its wall time and CPU time in seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    cost = cost_of(lambda: subprocess.run(command, check=True, env=environment))
    return cost.wall, cost.cpu


def measure(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return flux in an aperture of 8 pixels radius and centre by weighted moments, (n, 3)."""
    results = np.full((len(x), 3), np.nan)
    for k, (star_x, star_y) in enumerate(zip(x, y, strict=True)):
        column, row = round(float(star_x)), round(float(star_y))
        if min(column, row) < 12 or max(column, row) >= image.shape[0] - 12:
            continue
        part = image[row - 11 : row + 12, column - 11 : column + 12].astype(float)
        j, i = np.mgrid[-11:12, -11:12]
        i, j = i + column - star_x, j + row - star_y
        dx = dy = 0.0
        for _ in range(20):
            weighted = part * np.exp(-((i - dx) ** 2 + (j - dy) ** 2) / (2.0 * 1.7**2))
            dx += 2.0 * np.sum(weighted * (i - dx)) / weighted.sum()
            dy += 2.0 * np.sum(weighted * (j - dy)) / weighted.sum()
        results[k] = part[np.hypot(i, j) < 8.0].sum(), dx, dy
    return results


def compare(folder: Path, side: int, stars: np.ndarray) -> None:
    """Print how the stars of the coadds compare."""
    x, y = make_tract(side).sky_to_pixel(stars[0], stars[1])
    ours = measure(fits.getdata(folder / "coaddflow-disk" / "coadd.fits", "IMAGE"), x, y)
    print("\nstars: median and robust scatter of the flux ratio, rms of positions (pixels)")
    report("coaddflow / truth", ours[:, 0] / stars[2], ours[:, 1:])
    if SWARP is None:
        return
    theirs = measure(fits.getdata(folder / "swarp" / "coadd.fits"), x, y)
    report("SWarp / truth", theirs[:, 0] / stars[2], theirs[:, 1:])
    report("coaddflow / SWarp", ours[:, 0] / theirs[:, 0], ours[:, 1:] - theirs[:, 1:])


def report(name: str, ratio: np.ndarray, offset: np.ndarray) -> None:
    """Print one line, over the stars that are alone."""
    good = np.abs(ratio - np.nanmedian(ratio)) < 0.02
    scatter = 1.4826 * np.median(np.abs(ratio[good] - np.median(ratio[good])))
    rms = np.sqrt(np.mean(offset[good] ** 2))
    print(
        f"{name:20s} {np.median(ratio[good]):9.5f} +- {scatter:.5f}   {rms:.4f}"
        f"   largest offset {np.abs(offset[good]).max():.4f}   ({good.sum()} stars)"
    )


def drive(options: argparse.Namespace, folder: Path) -> None:
    """Make the files, run all in turn, print."""
    shape, side = (options.size * 2, options.size), options.size * 2 + 104
    stars = make_files(folder, shape, n_stars=max(40, options.size // 5))
    this = [sys.executable, __file__, "--folder", str(folder), "--size", str(options.size)]
    timed([*this, "--inner", "memory", "--inner-threads", "1"], 1)  # compiles, reads files once
    for threads in options.threads:
        commands = {
            mode: [*this, "--inner", mode, "--inner-threads", str(threads)]
            for mode in ("disk", "memory")
        }
        if SWARP is not None:
            commands["SWarp"] = run_swarp(folder, side, threads)
        times: dict[str, list] = {name: [] for name in commands}
        for _ in range(options.runs):
            for name, command in commands.items():
                times[name].append(timed(command, threads))
        print(f"\n{threads} thread(s), median of {options.runs} runs: wall s, CPU s")
        medians = {
            n: [statistics.median(v) for v in zip(*t, strict=True)] for n, t in times.items()
        }
        for name, (wall, cpu) in medians.items():
            line = f"{name:8s} {wall:7.2f} {cpu:7.2f}"
            if SWARP is not None and name != "SWarp":
                line += f"   SWarp takes {medians['SWarp'][0] / wall:.1f} times the wall time,"
                line += f" {medians['SWarp'][1] / cpu:.1f} times the CPU time"
            print(line)
    compare(folder, side, stars)


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=2048, help="columns of a CCD")
    parser.add_argument("--folder", type=Path, help="where the files are (default: temporary)")
    parser.add_argument("--inner", choices=["disk", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--inner-threads", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inner:
        run_coaddflow(options.folder, options.size * 2 + 104, options.inner, options.inner_threads)
        return
    if SWARP is None:
        print("SWarp is not installed: only coaddflow is measured")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        drive(options, folder)


if __name__ == "__main__":
    main()
