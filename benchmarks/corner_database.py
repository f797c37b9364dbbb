"""What the corner database takes: a CCD to go in, a patch to ask for, an exposure to be added.

    python benchmarks/corner_database.py
    python benchmarks/corner_database.py --ccds 1000000 --folder /scratch

Exposures of 104 CCDs of 0.2 x 0.1 degrees point at random into 900 square degrees. A database of
the survey with the given number of CCDs is built (2.6 kB a CCD on disk; the manifests are made in
memory and have empty files), asked for patches, positions and, with SQL alone, the same patches,
and brought up to date with exposures that are added one by one, redone and dropped. Prints
microseconds of CPU for each CCD and milliseconds, medians of all repetitions. The folder is
removed.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from coaddflow.corners import survey
from coaddflow.corners.build import Manifest, build_tract_database, read_manifests
from coaddflow.corners.database import CornerDatabase
from coaddflow.geometry import sphere
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables.manifest import CcdRow, write_manifest

N_CCDS = 104
_COPIED_BYTES = 1e9
"""Larger files are not copied."""

FIELD = ((135.0, 225.0), (-5.0, 5.0))
"""Where exposures point, RA and Dec in degrees."""


def rows_of(number: int) -> list[CcdRow]:
    """Return the CCDs of an exposure, from its number."""
    rng = np.random.default_rng(number)
    ra, dec = (rng.uniform(*limits) for limits in FIELD)
    t = np.arange(8) / 8
    one = np.ones(8)
    x = 0.1 * np.concatenate([2 * t - 1, one, 1 - 2 * t, -one])
    y = 0.05 * np.concatenate([-one, 2 * t - 1, one, 1 - 2 * t])
    column, row = (part.ravel()[:, None] for part in np.mgrid[-3.5:4.5, -6:7])
    sky = sphere.tan_deproject(0.202 * column + x, 0.106 * row + y, ra, dec)
    exposure, sums = f"{number:07d}", rng.bytes(32).hex()
    values = rng.uniform(0.5, 1.5, (N_CCDS, 10)).tolist()
    return [
        CcdRow.model_construct(
            exposure=exposure,
            ccd=ccd,
            band="grizy"[number % 5],
            mjd=58000.0 + number / 300,
            exposure_time=200.0,
            state="done",
            path=f"results/calexp/{exposure}/{ccd}.fits",
            sha256=sums,
            nx=2048,
            ny=4176,
            footprint_ra=sky[0][ccd].tolist(),
            footprint_dec=sky[1][ccd].tolist(),
            n_sources=2000 + ccd,
            n_psf_stars=60,
            n_matched=100,
            n_zero_point=80,
            **dict(
                zip(
                    (
                        "astrometry_rms",
                        "pointing_offset",
                        "zero_point",
                        "zero_point_error",
                        "zero_point_scatter",
                        "seeing",
                        "ellipticity",
                        "sky_level",
                        "sky_noise",
                        "depth",
                    ),
                    values[ccd],
                    strict=True,
                )
            ),
            aperture_correction=1.01,
            pixel_scale=0.168,
            lost_fraction=0.01,
        )
        for ccd in range(N_CCDS)
    ]


def manifest_in(folder: Path, number: int) -> Path:
    """Return the path of the manifest of an exposure."""
    return folder / f"{number:07d}.ecsv"


def synthetic_manifests(folder: Path, n_exposures: int) -> Iterator[Manifest]:
    """Yield manifests whose files are empty."""
    for number in range(n_exposures):
        path = manifest_in(folder, number)
        path.touch()
        status, sha256 = path.stat(), hashlib.sha256(str(number).encode()).hexdigest()
        yield Manifest(str(path), sha256, 0, status.st_mtime_ns, tuple(rows_of(number)))


def milliseconds(function: Callable[[], Any], n: int) -> float:
    """Return the median wall time of n calls."""
    taken = []
    for _ in range(n):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return 1e3 * statistics.median(taken)


def report(what: str, value: float, unit: str) -> None:
    """Print a figure."""
    print(f"{what:<62} {value:10.2f} {unit}", flush=True)


def measure_tract(folder: Path, skymap: Any) -> None:
    """Print what a CCD costs in the database of a tract, from real manifests."""
    numbers = range(10_000_000, 10_000_020)
    for number in numbers:
        write_manifest(manifest_in(folder, number), rows_of(number))
    manifests = [manifest_in(folder, number) for number in numbers]
    tract = skymap.tract(skymap.find_tract(rows_of(numbers[0])[50].footprint_ra[0], 0.0))
    reading, building = [], []
    for _ in range(5):
        began = time.process_time()
        list(read_manifests(manifests))
        read = time.process_time()
        build_tract_database(folder / "tract.sqlite", manifests, tract)
        reading.append(read - began)
        building.append(time.process_time() - read)
    per_ccd = 1e6 / (len(manifests) * N_CCDS)
    report("manifests read, CPU", per_ccd * statistics.median(reading), "us / CCD")
    into = statistics.median(a - b for a, b in zip(building, reading, strict=True))
    report("database of a tract made of them, CPU", per_ccd * into, "us / CCD")


def build_survey(folder: Path, n_exposures: int, skymap: Any) -> Path:
    """Build the database of a survey; print its size and what a CCD costs."""
    path = folder / "corners.sqlite"
    making = [0.0, 0.0]

    def made(_: object) -> Iterator[Manifest]:
        manifests = synthetic_manifests(folder, n_exposures)
        while True:
            cpu, wall = time.process_time(), time.perf_counter()
            one = next(manifests, None)
            making[0] += time.process_time() - cpu
            making[1] += time.perf_counter() - wall
            if one is None:
                return
            yield one

    original, survey.read_manifests = survey.read_manifests, made
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        survey.build_survey_database(path, [], skymap)
        cpu, wall = time.process_time() - cpu - making[0], time.perf_counter() - wall - making[1]
    finally:
        survey.read_manifests = original
    n_ccds = n_exposures * N_CCDS
    report(f"database of a survey of {n_ccds} CCDs: size", path.stat().st_size / 1e6, "MB")
    report("    a CCD on disk", path.stat().st_size / n_ccds, "bytes")
    report("    built, wall", wall, "s")
    report("    built, CPU", 1e6 * cpu / n_ccds, "us / CCD")
    return path


def measure_queries(path: Path) -> None:
    """Print what queries take that open the database, and that have it open."""
    with CornerDatabase(path) as database:
        sample = database.query(
            "SELECT tract, patch, count(*) AS n FROM ccd_patches"
            " WHERE tract IN (SELECT tract FROM tracts LIMIT 50) GROUP BY tract, patch"
            " ORDER BY abs(n - 14), tract, patch LIMIT 50"
        )
        patches = [(row["tract"], row["patch"]) for row in sample]
        n_rows = statistics.mean(row["n"] for row in sample)
        sql = (
            "SELECT ccds.*, patch_fraction FROM ccd_patches JOIN ccds USING (ccd_key)"
            " WHERE tract = ? AND patch = ? ORDER BY exposure, ccd"
        )
        turn = iter(patches * 40)
        report(
            f"    a patch, SQL alone ({n_rows:.1f} rows)",
            milliseconds(lambda: database.query(sql, next(turn)), 500),
            "ms",
        )
        turn = iter(patches * 40)
        report(
            "    a patch, as objects",
            milliseconds(lambda: database.query_patch(*next(turn)), 500),
            "ms",
        )
        rng = np.random.default_rng(1)
        report(
            "    a position, as objects",
            milliseconds(
                lambda: database.query_point(*(rng.uniform(*limits) for limits in FIELD)), 500
            ),
            "ms",
        )


def measure_updates(folder: Path, path: Path, n_exposures: int, skymap: Any, n: int) -> None:
    """Print what it takes to add, redo and drop single exposures."""
    manifests = [str(manifest_in(folder, number)) for number in range(n_exposures)]
    steps: dict[str, list[float]] = {}

    def update(what: str) -> None:
        began = time.perf_counter()
        survey.update_survey_database(path, manifests, skymap)
        steps.setdefault(what, []).append(time.perf_counter() - began)

    update("nothing changed")
    for number in range(n_exposures, n_exposures + n):
        manifests.append(str(manifest_in(folder, number)))
        write_manifest(manifests[-1], rows_of(number))
        update("one exposure added")
        began = time.perf_counter()
        list(read_manifests(manifests[-1:]))
        steps.setdefault("of which its manifest is read", []).append(time.perf_counter() - began)
        again = [row.model_copy(update={"seeing": 2.0}) for row in rows_of(number)]
        write_manifest(manifests[-1], again)
        update("one exposure redone")
        update("nothing changed")
    for _ in range(n):
        manifests.pop()
        update("one exposure dropped")
    for what, taken in steps.items():
        report(f"    {what}", 1e3 * statistics.median(taken), "ms")


def measure_copy(path: Path) -> None:
    """Print what it takes to copy and to check the file, as each update did up to version 0.3."""
    began = time.perf_counter()
    copy = Path(shutil.copyfile(path, f"{path}.copy"))
    with copy.open("rb+") as stream:
        os.fsync(stream.fileno())
    copied = time.perf_counter()
    copy.unlink()
    checked = time.perf_counter()
    with CornerDatabase(path) as database:
        database.query("PRAGMA quick_check")
    report("    a copy of the file", 1e3 * (copied - began), "ms")
    report("    a check of the whole file", 1e3 * (time.perf_counter() - checked), "ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ccds", type=int, default=[10_400, 104_000], nargs="+")
    parser.add_argument("--folder", help="where a folder for the data is made")
    parser.add_argument("--updates", type=int, default=9, help="exposures that are added")
    options = parser.parse_args()
    skymap = make_skymap(SkymapSettings())
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure_tract(Path(name), skymap)
    for n_ccds in options.ccds:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            n_exposures = -(-n_ccds // N_CCDS)
            path = build_survey(Path(name), n_exposures, skymap)
            measure_queries(path)
            measure_updates(Path(name), path, n_exposures, skymap, options.updates)
            if path.stat().st_size < _COPIED_BYTES:
                measure_copy(path)


if __name__ == "__main__":
    main()
