"""Background matching against Montage on the same tiles: the steps that are left in the overlaps.

Tiles of a sky with structure at all scales (amplitudes go with k^-1.5), stars under different
seeing, and noise; each has an offset, and with ``plane`` a gradient. Montage's mDiffExec,
mFitExec, mBgModel and mBgExec (Debian: montage) and `coadd.background_matching` get the same
pixels. A step is the median difference in one of eight parts of an overlap, measured on the
corrected pixels; printed is their rms, in units of the noise of a pixel.

    python benchmarks/background_matching.py [--seed N] [--size PIXELS] [--scenes two mosaic]
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from coaddflow.coadd.background_matching import bin_sky, match_backgrounds
from coaddflow.geometry.box import Box, common_box
from coaddflow.image.masked_image import MaskedImage
from coaddflow.settings.coadd import BackgroundMatchingSettings, CoaddSettings
from coaddflow.warp.files import Warp

Tiles = dict[str, tuple[Box, NDArray[np.float32]]]


def sky_of(side: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return structure at all scales with an rms of 40."""
    ky, kx = np.meshgrid(np.fft.fftfreq(side), np.fft.rfftfreq(side), indexing="ij")
    k = np.hypot(kx, ky)
    k[0, 0] = np.inf
    plane = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(side, side))) * k**-1.5, (side, side))
    return 40.0 * plane / plane.std()


def boxes_of(scene: str, size: int, rng: np.random.Generator) -> list[Box]:
    """Return where the tiles of a scene are."""
    if scene == "two":
        corners = [(0, 0), (size - 60, 0)]
    elif scene == "mosaic":
        corners = [(i * (size - 60), j * (size - 40)) for i in range(4) for j in range(4)]
    elif scene == "strip":
        corners = [(i * (size - 40), 0) for i in range(10)]
    else:
        corners = [tuple(rng.integers(0, size, 2).tolist()) for _ in range(12)]
    return [(x, y, x + size, y + size) for x, y in corners]


def make_tiles(scene: str, model: str, size: int, seed: int) -> Tiles:
    """Draw the tiles of a scene; noise of 1 in each pixel."""
    rng = np.random.default_rng(seed)
    boxes = boxes_of(scene, size, rng)
    width = max(max(box[2:]) for box in boxes)
    sky = sky_of(width, rng)
    stars = rng.uniform(0, width, (width**2 // 4000, 2)), 30.0 * rng.pareto(1.2, width**2 // 4000)
    tiles = {}
    for number, box in enumerate(boxes):
        x0, y0, x1, y1 = box
        y, x = np.mgrid[:size, :size] / (size / 2.0) - 1.0
        image = sky[y0:y1, x0:x1] + rng.normal(0.0, 1.0, (size, size)) + rng.uniform(-5, 5)
        if model == "plane":
            image += rng.uniform(-4, 4) * x + rng.uniform(-4, 4) * y
        add_stars(image, box, stars, rng.uniform(1.2, 2.0))
        tiles[f"t{number:02d}"] = box, image.astype(np.float32)
    return tiles


def add_stars(image: NDArray, box: Box, stars: tuple[NDArray, NDArray], sigma: float) -> None:
    """Add Gaussian stars (places, fluxes) to a tile."""
    for (u, v), flux in zip(*stars, strict=True):
        x, y = u - box[0], v - box[1]
        i, j = round(x), round(y)
        rows, columns = slice(max(j - 10, 0), max(j + 11, 0)), slice(max(i - 10, 0), max(i + 11, 0))
        if image[rows, columns].size:
            yy, xx = np.ogrid[rows, columns]
            yy, xx = yy[: image[rows, columns].shape[0]], xx[:, : image[rows, columns].shape[1]]
            profile = np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2))
            image[rows, columns] += min(flux, 3e4) / (2 * np.pi * sigma**2) * profile


def ours(tiles: Tiles, model: str) -> Tiles:
    """Return the tiles with their backgrounds matched by coaddflow."""
    settings = BackgroundMatchingSettings(enabled=True, model=model)
    bad = CoaddSettings().bad_planes
    skies = {}
    for name, (box, image) in tiles.items():
        masked = MaskedImage(image, np.ones_like(image), np.zeros(image.shape, np.int32))
        skies[name] = bin_sky(Warp(box, masked), bad, settings)
    found = match_backgrounds(skies, settings)
    return {name: (box, image - found[name].on_box(box)) for name, (box, image) in tiles.items()}


def montage(tiles: Tiles, model: str, folder: Path) -> Tiles:
    """Return the tiles with their backgrounds matched by Montage."""
    for name in ("in", "diff", "out"):
        (folder / name).mkdir()
    width = max(box[2] for box, _ in tiles.values())
    height = max(box[3] for box, _ in tiles.values())
    whole = header((0, 0, width, height))
    lines = [card.image.rstrip() for card in whole.cards]
    (folder / "whole.hdr").write_text("\n".join([*lines, "END", ""]))
    for name, (box, image) in tiles.items():
        fits.PrimaryHDU(image, header(box)).writeto(folder / "in" / f"{name}.fits")
    level = ["-l"] if model == "constant" else []
    for command in (
        ["mImgtbl", "in", "images.tbl"],
        ["mOverlaps", "images.tbl", "diffs.tbl"],
        ["mDiffExec", "-n", "-p", "in", "diffs.tbl", "whole.hdr", "diff"],
        ["mFitExec", *level, "diffs.tbl", "fits.tbl", "diff"],
        ["mBgModel", *level, "images.tbl", "fits.tbl", "corrections.tbl"],
        ["mBgExec", "-n", "-p", "in", "images.tbl", "corrections.tbl", "out"],
    ):
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        if '"ERROR"' in ended.stdout or re.search(r"(failed|missing)=[1-9]", ended.stdout):
            raise SystemExit(f"{command[0]}: {ended.stdout}")
    return {
        name: (box, fits.getdata(folder / "out" / f"{name}.fits").astype(np.float32))
        for name, (box, _) in tiles.items()
    }


def header(box: Box) -> fits.Header:
    """Return the WCS of a part of the sky plane."""
    cards = fits.Header()
    cards["SIMPLE"], cards["BITPIX"], cards["NAXIS"] = True, -32, 2
    cards["NAXIS1"], cards["NAXIS2"] = box[2] - box[0], box[3] - box[1]
    for axis, (name, value) in enumerate((("RA---TAN", 150.0), ("DEC--TAN", 2.0)), 1):
        cards[f"CTYPE{axis}"], cards[f"CRVAL{axis}"] = name, value
        cards[f"CRPIX{axis}"] = 500.5 - box[axis - 1]
        cards[f"CDELT{axis}"] = (-1.0, 1.0)[axis - 1] / 3600.0
    return cards


def steps(tiles: Tiles) -> float:
    """Return the rms of the steps between tiles."""
    found, weights = [], []
    for (a, image_a), (b, image_b) in itertools.combinations(tiles.values(), 2):
        common = common_box(a, b)
        if common is None or min(common[2] - common[0], common[3] - common[1]) < 20:
            continue
        part = [
            image[common[1] - box[1] : common[3] - box[1], common[0] - box[0] : common[2] - box[0]]
            for box, image in ((a, image_a), (b, image_b))
        ]
        difference = part[0] - part[1]
        for piece in np.array_split(difference, 8, axis=int(np.argmax(difference.shape))):
            found.append(np.median(piece))
            weights.append(piece.size)
    return float(np.sqrt(np.average(np.square(found), weights=weights)))


def main() -> None:
    """Print the steps of all scenes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=500, help="side of a tile, pixels")
    parser.add_argument("--scenes", nargs="+", default=["two", "strip", "mosaic", "dithers"])
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    has_montage = shutil.which("mBgModel") is not None
    print(f"{'scene':<10} {'model':<9} {'none':>8} {'ours':>8} {'Montage':>8}   s ours, Montage")
    for scene, model in itertools.product(options.scenes, ("constant", "plane")):
        tiles = make_tiles(scene, model, options.size, options.seed)
        times, left = [], [steps(tiles)]
        for method in ("ours", "montage")[: 1 + has_montage]:
            begun = time.monotonic()
            if method == "ours":
                left.append(steps(ours(tiles, model)))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    left.append(steps(montage(tiles, model, Path(folder))))
            times.append(time.monotonic() - begun)
        figures = " ".join(f"{one:8.4f}" for one in left)
        print(f"{scene:<10} {model:<9} {figures}   {', '.join(f'{t:.1f}' for t in times)}")


if __name__ == "__main__":
    main()
