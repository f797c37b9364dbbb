"""A quick look at the speed of the main steps (`make bench-quick`, below 3 minutes).

    python benchmarks/quick.py [--update] [--only sky]

Each step is timed (CPU seconds of this process, one thread, the best of several turns) beside work
of another library on pixels of the same number, done in turn with it. Only the ratio counts: how
many times the CPU time of the step the reference takes. It hardly depends on the machine, and is
compared with the table of docs/performance.md: what is 40 % below it is reported, and the exit code
is 1. With --update the table is written anew.

The references are: for cosmic rays one iteration of astroscrappy; for the sky `sep.Background`; for
detection and PSF `sep.extract` with a filter; for the calibration frames `numpy.median`; for the
warp a spline of scipy; for the coadd `numpy.median` of the same stack; for database and
manifest the standard library's JSON of the same rows.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import astroscrappy
import numpy as np
import sep
from scipy import ndimage
from threadpoolctl import threadpool_limits

from coaddflow.calib.combine import clipped_mean
from coaddflow.coadd.mean import CoaddInput, coadd_patch
from coaddflow.coadd.readers import LayeredWarp
from coaddflow.corners.build import build_tract_database
from coaddflow.corners.database import CornerDatabase
from coaddflow.image.masked_image import MaskedImage
from coaddflow.isr.cosmic_rays import find_cosmic_rays
from coaddflow.measure.background import estimate_background
from coaddflow.measure.detection import detect_sources, measure_seeing
from coaddflow.measure.psf_fit import fit_psf
from coaddflow.measure.stars import select_stars
from coaddflow.settings import Settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables.manifest import CcdRow, read_manifest, write_manifest
from coaddflow.warp.ccds import CcdImage, warp_whole_ccd
from coaddflow.warp.files import Warp

DOCS = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- bench-quick -->", "<!-- bench-quick end -->"
SHAPE = (1024, 1536)
SCALE, RA, DEC = 0.2, 150.0, 2.2
TURNS = 5
WORSE = 0.6
SETTINGS = Settings()


class Step(NamedTuple):
    """A step and its reference; both are functions without arguments."""

    ours: Callable[[], object]
    reference: Callable[[], object]


def make_image(rng: np.random.Generator) -> MaskedImage:
    """Return stars on a sky, in electrons, with some cosmic rays and a bad column."""
    ny, nx = SHAPE
    expected = np.full(SHAPE, 400.0)
    sigma = 1.7
    for _ in range(300):
        x, y = rng.uniform(20, nx - 20), rng.uniform(20, ny - 20)
        flux = 10.0 ** rng.uniform(3.0, 5.3)
        column, row = int(x), int(y)
        part = np.s_[max(row - 15, 0) : row + 16, max(column - 15, 0) : column + 16]
        yy, xx = np.mgrid[part]
        profile = np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * sigma**2))
        expected[part] += flux / (2 * np.pi * sigma**2) * profile
    image = rng.poisson(expected) + rng.normal(0.0, 5.0, SHAPE)
    y, x = rng.integers(5, ny - 5, 400), rng.integers(5, nx - 9, 400)
    for step in range(4):
        image[y, x + step] += 2000.0
    mask = np.zeros(SHAPE, np.int32)
    mask[:, 500] = 1
    return MaskedImage(image, expected + 25.0, mask)


def steps_of_ccd(image: MaskedImage) -> dict[str, Step]:
    """Return the steps from cosmic rays to the PSF."""
    cosmics = SETTINGS.cosmics
    pixels = np.ascontiguousarray(image.image)
    background = estimate_background(image, SETTINGS.background)
    above = MaskedImage(image.image - background.model(), image.variance, image.mask)
    noise = np.sqrt(image.variance)
    kernel = np.outer([1, 2, 1], [1, 2, 1])

    def detect_and_fit() -> None:
        seeing = measure_seeing(above, SETTINGS.detection)
        detection = detect_sources(above, seeing, SETTINGS.detection)
        stars = select_stars(detection.sources, SETTINGS.psf)
        fit_psf(above, detection, stars, SETTINGS.psf)

    return {
        "cosmic rays": Step(
            lambda: find_cosmic_rays(image, cosmics),
            lambda: astroscrappy.detect_cosmics(
                pixels, invar=image.variance, sigclip=5.0, sigfrac=0.3, objlim=3.0, niter=1
            ),
        ),
        "sky": Step(
            lambda: estimate_background(image, SETTINGS.background).model(),
            lambda: sep.Background(pixels, bw=128, bh=128).back(),
        ),
        "detection and PSF": Step(
            detect_and_fit,
            lambda: sep.extract(above.image, 1.5, err=noise, filter_kernel=kernel),
        ),
    }


def steps_of_stacks(rng: np.random.Generator) -> dict[str, Step]:
    """Return the steps on many images: calibration frames, warp, coadd."""
    skymap = make_skymap(
        SkymapSettings(
            kind="tangent",
            pixel_scale=SCALE,
            patch_inner_size=SHAPE[1],
            patch_border=0,
            tangent={"ra": RA, "dec": DEC, "width": 0.085, "height": 0.085},
        )
    )
    tract = skymap.tract(0)
    stack = rng.normal(100.0, 5.0, (5, *SHAPE)).astype(np.float32)
    images = [
        MaskedImage(plane, np.full(SHAPE, 25.0), np.zeros(SHAPE, np.int32)) for plane in stack
    ]
    wcs = tract.wcs()
    wcs.wcs.crpix += 0.37
    wcs.pixel_shape = SHAPE[::-1]
    ccd = CcdImage(images[0], wcs, scale=1.0)
    box = (0, 0, SHAPE[1], SHAPE[0])
    inputs = [
        CoaddInput(f"e{number}", LayeredWarp([Warp(box, image, {0: 1})], box), 1 / 25.0, seeing=0.8)
        for number, image in enumerate(images)
    ]
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.37
    return {
        "calibration frames": Step(
            lambda: clipped_mean(stack, np.ones(5), 4.0, 3), lambda: np.median(stack, axis=0)
        ),
        "warp": Step(
            lambda: warp_whole_ccd(0, ccd, tract, box, SETTINGS.warp),
            lambda: ndimage.map_coordinates(images[0].image, (y, x), order=5),
        ),
        "coadd": Step(
            lambda: coadd_patch(inputs, box, SETTINGS.coadd, pixel_scale=SCALE, threads=1),
            lambda: np.median(stack, axis=0),
        ),
    }


def steps_of_tables(folder: Path) -> dict[str, Step]:
    """Return the steps on tables: manifest and corner database."""
    tract = make_skymap(
        SkymapSettings(
            kind="tangent",
            pixel_scale=SCALE,
            tangent={"ra": RA, "dec": DEC, "width": 1.5, "height": 1.5},
        )
    ).tract(0)
    manifests = []
    for number in range(5):
        rows = [ccd_row(f"e{number}", ccd) for ccd in range(60)]
        manifests.append(str(folder / f"e{number}.ecsv"))
        write_manifest(manifests[-1], rows)
    plain = [row.model_dump() for row in rows]
    database = folder / "corners.sqlite"
    build_tract_database(database, manifests, tract)
    patches = [f"{i}_{j}" for i in range(3) for j in range(2)]

    def query() -> None:
        with CornerDatabase(database) as corners:
            for patch in patches:
                corners.query_patch(tract.id, patch, "r")

    def text() -> None:
        for _ in range(20):
            json.loads(json.dumps(plain))

    return {
        "manifest": Step(
            lambda: (write_manifest(folder / "m.ecsv", rows), read_manifest(manifests[0])), text
        ),
        "corners in": Step(lambda: build_tract_database(database, manifests, tract), text),
        "corners out": Step(query, text),
    }


def ccd_row(exposure: str, ccd: int) -> CcdRow:
    """Return a CCD somewhere on the tract, with an outline of 32 points."""
    x, y = RA + 0.15 * (ccd % 8 - 4), DEC + 0.15 * (ccd // 8 - 4)
    t = np.linspace(0.0, 2 * np.pi, 32, endpoint=False)
    return CcdRow(
        exposure=exposure,
        ccd=ccd,
        band="r",
        mjd=60000.0,
        exposure_time=30.0,
        state="done",
        path=f"results/calexp/{exposure}/{ccd}.fits",
        nx=2048,
        ny=4096,
        footprint_ra=(x + 0.07 * np.cos(t)).tolist(),
        footprint_dec=(y + 0.07 * np.sin(t)).tolist(),
        zero_point=31.0,
        sky_noise=5.0,
        seeing=0.8,
    )


def ratio(step: Step) -> float:
    """Return the CPU time of the reference over that of the step: the best of each, in turn."""
    best = [np.inf, np.inf]
    step.ours()  # what is compiled or read once
    for _ in range(TURNS):
        for number, work in enumerate(step):
            began = time.process_time()
            work()
            best[number] = min(best[number], time.process_time() - began)
    return best[1] / best[0]


def main() -> None:
    """Measure, print beside the table, warn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help="write the table of the docs anew")
    parser.add_argument("--only", help="steps whose name has this text")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    known = table()
    found: dict[str, float] = {}
    with threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        steps = steps_of_ccd(make_image(rng)) | steps_of_stacks(rng)
        steps |= steps_of_tables(Path(folder))
        print(f"{'step':20s} {'reference / ours':>17s} {'docs':>7s}")
        for name, step in steps.items():
            if options.only and options.only not in name:
                continue
            found[name] = ratio(step)
            before = f"{known[name]:7.2f}" if name in known else f"{'-':>7s}"
            slow = name in known and found[name] < WORSE * known[name]
            print(f"{name:20s} {found[name]:17.2f} {before}{'  SLOWER' * slow}", flush=True)
    if options.update:
        write_table(known | found)
    elif found.keys() - known.keys():
        sys.exit(
            f"not in the table: {', '.join(sorted(found.keys() - known.keys()))}; use --update"
        )
    elif any(found[name] < WORSE * known[name] for name in found):
        sys.exit(1)


def table() -> dict[str, float]:
    """Return the table of the docs."""
    text = DOCS.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    return {
        name: float(value)
        for name, value in re.findall(r"^\| (\w[\w ]*) \| ([\d.]+) \|", text, re.M)
    }


def write_table(ratios: dict[str, float]) -> None:
    """Replace the table of the docs."""
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    rows = [f"| {name} | {value:.2f} |" for name, value in ratios.items()]
    lines = [BEGIN, "| step | reference / ours |", "|---|---|", *rows, END]
    DOCS.write_text(before + "\n".join(lines) + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
