"""Cosmic rays on one CCD of DECam (2048 x 4096 pixels): our candidates beside astroscrappy's.

    python benchmarks/cosmic_rays.py --iterations 1 2 4

An image of stars, sky and tracks is searched by both in turn (A B A B), with the options that the
workflow uses; printed are medians of CPU and wall seconds, and how many pixels differ. The last row
is all that the workflow does for cosmic rays: holes, candidates, sharpness of the stars, growth.
Needs the extra `test`, for astroscrappy.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import astroscrappy
import numpy as np

from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.isr.cosmic_rays import find_cosmic_rays
from coaddflow.isr.lacosmic import laplacian_outliers
from coaddflow.settings.detrend import CosmicsSettings

SKY, READ_NOISE, SIGMA = 300.0, 5.0, 1.3


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, nargs="+", default=[1])
    parser.add_argument("--pairs", type=int, default=5, help="runs of each")
    parser.add_argument("--tracks", type=int, default=1500)
    parser.add_argument("--stars", type=int, default=6000)
    parser.add_argument("--shape", type=int, nargs=2, default=(4096, 2048), help="ny nx")
    arguments = parser.parse_args()
    image = scene(tuple(arguments.shape), arguments.stars, arguments.tracks)
    print(f"{'iterations':>10s} {'':20s} {'CPU s':>7s} {'wall s':>7s} {'pixels':>8s}")
    for iterations in arguments.iterations:
        compare(image, CosmicsSettings(iterations=iterations), arguments.pairs)


def scene(shape: tuple[int, int], n_stars: int, n_tracks: int) -> MaskedImage:
    """Return stars of many magnitudes, tracks of many lengths, bad and saturated pixels."""
    rng = np.random.default_rng(1)
    light, charge = np.full(shape, SKY), np.zeros(shape)
    dy, dx = np.mgrid[-8:9, -8:9]
    for y, x in rng.integers(10, np.array(shape) - 10, (n_stars, 2)):
        off_y, off_x = rng.uniform(-0.5, 0.5, 2)
        profile = np.exp(-((dy - off_y) ** 2 + (dx - off_x) ** 2) / 2 / SIGMA**2)
        flux = 10 ** rng.uniform(3.0, 5.8) / (2 * np.pi * SIGMA**2)
        light[y - 8 : y + 9, x - 8 : x + 9] += flux * profile
    for y, x in rng.integers(40, np.array(shape) - 40, (n_tracks, 2)):
        way = np.arange(0, min(30, 2 + rng.exponential(5)), 0.3)
        angle = rng.uniform(0, 2 * np.pi)
        place = (y + way * np.sin(angle)).astype(int), (x + way * np.cos(angle)).astype(int)
        np.add.at(charge, place, rng.uniform(100, 1000))
    counts = rng.poisson(light) + charge + rng.normal(0, READ_NOISE, shape)
    mask = np.where(counts > 30000, int(MaskPlane.SAT), 0)
    mask[rng.random(shape) < 4e-4] = MaskPlane.BAD
    mask[:, shape[1] // 3] = MaskPlane.BAD
    return MaskedImage(counts, np.maximum(counts, 0) + READ_NOISE**2, mask)


def compare(masked_image: MaskedImage, settings: CosmicsSettings, n_pairs: int) -> None:
    """Search the image with both, in turn, and print what it takes."""
    ignored = masked_image.mask != 0
    options = settings.sigma, settings.neighbour_fraction, settings.contrast, settings.iterations

    def ours():
        return laplacian_outliers(masked_image.image, masked_image.variance, ignored, *options)

    def theirs():
        return astroscrappy.detect_cosmics(
            masked_image.image,
            inmask=ignored,
            invar=masked_image.variance,
            sigclip=settings.sigma,
            sigfrac=settings.neighbour_fraction,
            objlim=settings.contrast,
            readnoise=0.0,
            satlevel=1e30,
            niter=settings.iterations,
            sepmed=True,
            cleantype="medmask",
        )[0]

    def whole():
        return find_cosmic_rays(masked_image, settings)

    works = {"ours": ours, "astroscrappy": theirs, "find_cosmic_rays": whole}
    found = {name: work() for name, work in works.items()}  # compiles
    seconds = {name: [] for name in works}
    for _ in range(n_pairs):
        for name, work in works.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    for name, taken in seconds.items():
        cpu, wall = (statistics.median(times) for times in zip(*taken, strict=True))
        number = int(found[name].sum())
        print(f"{settings.iterations:10d} {name:20s} {cpu:7.3f} {wall:7.3f} {number:8d}")
    differ = int((found["ours"] != found["astroscrappy"]).sum())
    print(f"{settings.iterations:10d} {'pixels that differ':20s} {differ:24d}")


if __name__ == "__main__":
    main()
