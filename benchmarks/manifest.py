"""Milliseconds (CPU) to write and read the manifest of an exposure.

    python benchmarks/manifest.py
    python benchmarks/manifest.py --ccds 200

The first time in a process, which is what a job pays, and the median of 20 more.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coaddflow.tables.manifest import CcdRow, ccd_states, read_manifest, write_manifest


def rows_of_exposure(n_ccds: int) -> list[CcdRow]:
    """Return rows with all that a CCD that went well has."""
    rng = np.random.default_rng(1)
    measured = [
        *("astrometry_rms", "pointing_offset", "zero_point", "zero_point_error"),
        *("zero_point_scatter", "seeing", "ellipticity", "sky_level", "sky_noise"),
        *("aperture_correction", "depth", "pixel_scale", "lost_fraction"),
    ]
    return [
        CcdRow(
            exposure="1001",
            ccd=ccd,
            band="r",
            mjd=60000.123456,
            exposure_time=200.0,
            state="done",
            path=f"results/calexp/1001/{ccd}.fits",
            sha256="a" * 64,
            nx=2048,
            ny=4176,
            footprint_ra=list(150.0 + rng.uniform(size=32)),
            footprint_dec=list(2.0 + rng.uniform(size=32)),
            n_sources=1000,
            n_psf_stars=50,
            n_matched=60,
            n_zero_point=40,
            **dict(zip(measured, rng.uniform(size=len(measured)).tolist(), strict=True)),
        )
        for ccd in range(n_ccds)
    ]


def milliseconds(action: Callable[[], object], repeats: int = 20) -> tuple[float, float]:
    """Return the CPU time of the first call, and the median of more."""
    taken = []
    for _ in range(1 + repeats):
        started = time.process_time()
        action()
        taken.append(1000 * (time.process_time() - started))
    return taken[0], statistics.median(taken[1:])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ccds", type=int, default=104)
    options = parser.parse_args()
    rows = rows_of_exposure(options.ccds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "1001.ecsv"
        for name, action in (
            ("write", lambda: write_manifest(path, rows)),
            ("read", lambda: read_manifest(path)),
            ("states for planning", lambda: ccd_states(path)),
        ):
            first, later = milliseconds(action)
            print(f"{name}: {first:.1f} ms the first time, {later:.1f} ms then")


if __name__ == "__main__":
    main()
