"""Artifacts by comparison: what is found of faint trails, and what is lost of stars.

    python benchmarks/artifacts.py --epochs 2 3 6

Exposures of a field of stars, of different seeing, ellipticity and noise, are matched to a common
PSF and compared. One of them has a trail, straight and as wide as its PSF, with 3 sigma of the
noise of a pixel of the exposure as it was. Printed are, for each number of epochs, over all fields:
the part of the pixels with 3 sigma of trail that is rejected or flagged in its exposure, the part
of the cores of stars (within half of the FWHM) that is rejected where no trail is near, and of all
pixels there; the width of matched stars relative to the target; CPU seconds an epoch and Mpixel.
"""

import argparse
import os
import time
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray

from coaddflow.coadd.artifact_regions import compare_epochs, difference_of_epoch, static_sky
from coaddflow.image.masked_image import MaskedImage
from coaddflow.measure.psf_model import adaptive_moments
from coaddflow.settings.artifacts import ArtifactSettings, PsfMatchingSettings
from coaddflow.warp.psf_matching import (
    PsfStamps,
    TargetPsf,
    choose_target,
    fit_kernels,
    largest_width,
    match_psf,
)

HALF = 30
GAIN = 50.0
"""Light of a pixel, in units of the variance of the sky, that doubles its variance."""


class Exposure(NamedTuple):
    """One exposure of a field."""

    pixels: MaskedImage
    psf: PsfStamps
    trail: NDArray[np.float64]
    """Light of its trail in units of the noise of the sky."""


class Field(NamedTuple):
    """Stars."""

    size: int
    """Pixels on a side."""
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[2, 3, 6])
    parser.add_argument("--fields", type=int, default=4, help="for each number of epochs")
    parser.add_argument("--size", type=int, default=1024, help="pixels on a side")
    parser.add_argument("--stars", type=int, default=1000, help="of each field")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    measure(make_field(arguments, np.random.default_rng(0)), 2, np.random.default_rng(0))  # compile
    print("| epochs | trail found | cores lost | all lost | width | match, s | compare, s |")
    print("|---|---|---|---|---|---|---|")
    for n in arguments.epochs:
        rng = np.random.default_rng([arguments.seed, n])
        rows = [measure(make_field(arguments, rng), n, rng) for _ in range(arguments.fields)]
        found, core, lost, width, match, compare = np.mean(rows, axis=0)
        times = f"{match:.2f} | {compare:.2f}"
        print(f"| {n} | {found:.4%} | {core:.4%} | {lost:.4%} | {width:+.3%} | {times} |")


def make_field(arguments: argparse.Namespace, rng: np.random.Generator) -> Field:
    """Return stars of many magnitudes, on a field with its size in pixels."""
    x, y = rng.uniform(0, arguments.size - 1, (2, arguments.stars))
    # the first is alone in a corner, and bright, to measure its width
    away = np.hypot(x - 120, y - 120) > 70
    flux = 10 ** rng.uniform(1.5, 5.0, arguments.stars)
    return Field(
        arguments.size, np.append(120, x[away]), np.append(120, y[away]), np.append(1e5, flux[away])
    )


def moffat(dx: NDArray, dy: NDArray, fwhm: float, shape: tuple[float, float]) -> NDArray:
    """Return a Moffat star of flux 1 and ellipticity ``shape``."""
    alpha, (e1, e2) = fwhm / 2.0 / np.sqrt(2.0 ** (1.0 / 3.2) - 1.0), shape
    norm = np.sqrt(1.0 - e1**2 - e2**2)
    r2 = ((1.0 - e1) * dx**2 + (1.0 + e1) * dy**2 - 2.0 * e2 * dx * dy) / norm / alpha**2
    return 2.2 / (np.pi * alpha**2) * (1.0 + r2) ** -3.2


def make_exposure(field: Field, rng: np.random.Generator, has_trail: bool) -> Exposure:
    """Return an exposure; its stars are up to 0.05 pixels off, and 1 % of its PSF is not known."""
    size = field.size
    fwhm, shape, noise = rng.uniform(3.3, 5.2), rng.normal(0.0, 0.03, 2), rng.uniform(0.8, 1.3)
    light = np.zeros((size + 2 * HALF, size + 2 * HALF))
    offset = np.arange(-HALF, HALF + 1)
    for x, y, flux in zip(field.x, field.y, field.flux, strict=True):
        dx, dy = np.array([x - round(x), y - round(y)]) + rng.normal(0.0, 0.02, 2)
        star = moffat(offset - dx, offset[:, None] - dy, fwhm, shape)
        light[round(y) : round(y) + 2 * HALF + 1, round(x) : round(x) + 2 * HALF + 1] += flux * star
    light = light[HALF:-HALF, HALF:-HALF]
    trail = np.zeros_like(light)
    if has_trail:
        angle, (x, y) = rng.uniform(0.0, np.pi), rng.uniform(0.25, 0.75, 2) * size
        columns, rows = np.arange(size) - x, np.arange(size)[:, None] - y
        distance = columns * np.cos(angle) + rows * np.sin(angle)
        trail = 3.3 * np.exp(-0.5 * (2.3548 * distance / fwhm) ** 2)
    variance = noise**2 + np.maximum(light, 0.0) / GAIN
    image = light + noise * trail + rng.normal(0.0, np.sqrt(variance))
    known = moffat(offset, offset[:, None], fwhm * rng.normal(1.0, 0.003), shape)
    psf = PsfStamps(np.array([0.0]), np.array([0.0]), known[None])
    return Exposure(MaskedImage(image, variance, np.zeros(image.shape, int)), psf, trail)


def relative_width(image: NDArray, target: TargetPsf) -> float:
    """Return the width of the star at (120, 120) relative to that of the target, minus 1."""
    stars = image[96:145, 96:145], target.image(24)
    (xx, yy, xy), wanted = (adaptive_moments(np.asarray(star)[None])[0] for star in stars)
    return float(((xx * yy - xy**2) / (wanted[0] * wanted[1])) ** 0.25 - 1.0)


def measure(field: Field, n: int, rng: np.random.Generator) -> list[float]:
    """Return what a field of n epochs tells: the columns of the table."""
    matching, settings = PsfMatchingSettings(), ArtifactSettings()
    exposures = [make_exposure(field, rng, number == 0) for number in range(n)]
    began = time.process_time()
    widths = [largest_width(one.psf.images) for one in exposures]
    target, _ = choose_target(widths, matching)
    matched = [
        match_psf(one.pixels, (0, 0), fit_kernels(one.psf, target, matching), matching)
        for one in exposures
    ]
    at_match, began = time.process_time() - began, time.process_time()
    usable = np.array([np.isfinite(one.image) for one in matched])
    image, variance = (
        np.array([getattr(one, p) for one in matched]) for p in ("image", "variance")
    )
    sky = static_sky(image, variance, usable)
    differences = (
        difference_of_epoch(*epoch, sky, settings)
        for epoch in zip(image, variance, usable, strict=True)
    )
    results = list(compare_epochs(differences, sky.n_epochs, target.fwhm, settings))
    at_compare = time.process_time() - began
    return [
        *score(results, exposures[0].trail, usable, field, target.fwhm),
        float(np.mean([relative_width(one, target) for one in image])),
        *(seconds / n / image[0].size * 1e6 for seconds in (at_match, at_compare)),
    ]


def score(
    results: list, trail: NDArray, usable: NDArray, field: Field, fwhm: float
) -> tuple[float, float, float]:
    """Return the parts of the trail that are found, and of cores and of all that are lost."""
    on_trail = (trail > 3.0) & usable[0]
    found = (results[0].rejected | results[0].flagged)[on_trail].mean()
    rejected = np.array([one.rejected for one in results])
    y, x = np.indices(trail.shape)
    core = np.zeros(trail.shape, bool)
    for a, b in zip(field.x, field.y, strict=True):
        part = tuple(slice(max(round(p) - 5, 0), round(p) + 6) for p in (b, a))
        core[part] |= np.hypot(x[part] - a, y[part] - b) <= 0.5 * fwhm
    counted = usable.copy()
    counted[0] &= trail < 1e-12  # about three times its width away
    return found, rejected[counted & core].mean(), rejected[counted].mean()


if __name__ == "__main__":
    main()
