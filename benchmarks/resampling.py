"""What a pixel of a warp costs, with its variance and mask, by how a CCD lies on the tract.

    python benchmarks/resampling.py [--kernels lanczos3 lanczos5 bilinear] [--repeat 5]

A CCD of 2048 x 2048 pixels without flags is resampled to a tract on which it is turned by some
angle, or whose pixels have another size; 32 rows at a time, one thread. Printed is the least CPU
time of some repetitions, ns for each pixel of the warp, with the mapping given. To turn the pixels
of the CCD, where that pays, is in it; to look for its flags is not.
"""

import argparse
import time

import numpy as np

from coaddflow.image.masked_image import MaskedImage
from coaddflow.warp.kernels import make_kernel, stretch_of
from coaddflow.warp.mapping import PixelGrid
from coaddflow.warp.resample import Rules, prepare_source, resample
from coaddflow.warp.turning import turn

SIDE, STEP, ROWS = 2048, 32, 32
PLACINGS = tuple((angle, 1.0) for angle in (0.0, 3.0, 10.0, 45.0, 90.0, 180.0))
PLACINGS += ((0.0, 0.76), (0.0, 1.3))
"""Angle of the CCD, degrees, and CCD pixels for each pixel of the tract."""


def mapping(angle: float, scale: float) -> PixelGrid:
    """Return the mapping of a CCD about whose middle the tract is turned and scaled."""
    nodes = np.arange(-5, SIDE // STEP + 6) * float(STEP)
    u, v = np.meshgrid(nodes - SIDE / 2, nodes - SIDE / 2)
    cosine, sine = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    x = scale * (cosine * u - sine * v) + SIDE / 2
    y = scale * (sine * u + cosine * v) + SIDE / 2
    area = np.full(x.shape, scale**2)
    return PixelGrid(int(nodes[0]), int(nodes[0]), STEP, x, y, area)


def measure(ccd: MaskedImage, kernel: str, placing: tuple[float, float], repeat: int) -> float:
    """Return ns of CPU time for each pixel of the warp."""
    grid, made = mapping(*placing), make_kernel(kernel, stretch_of(placing[1] ** 2))
    rules, times = Rules(1.1, 0.1, 0.1), []
    for _ in range(repeat + 1):
        target = MaskedImage.empty((SIDE, SIDE))
        began, n_pixels = time.process_time(), 0
        pixels, turned = turn(ccd, grid)
        turning = time.process_time() - began
        source = prepare_source(pixels, made)
        began = time.process_time()
        for first in range(0, SIDE, ROWS):
            rows = (first, first + ROWS)
            n_pixels += resample(source, turned, made, target, (0, 0), rows, rules)
        times.append((turning + time.process_time() - began) / n_pixels)
    return 1e9 * min(times[1:])  # the first one compiles


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kernels = ("lanczos3", "lanczos5", "bilinear")
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    shape = (SIDE, SIDE)
    image = np.random.default_rng(1).normal(0.0, 5.0, shape)
    ccd = MaskedImage(image, np.full(shape, 25.0), np.zeros(shape, np.int32))
    print("| ns for each pixel |", *(f"{a:g} deg, scale {s:g} |" for a, s in PLACINGS))
    print("|---" * (1 + len(PLACINGS)) + "|", flush=True)
    for kernel in arguments.kernels:
        cells = [measure(ccd, kernel, placing, arguments.repeat) for placing in PLACINGS]
        print(f"| {kernel} |", *(f"{cell:.1f} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
