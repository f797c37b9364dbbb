"""What each step from the raw frame to the calexp costs, for one full-size CCD in one process.

    python benchmarks/ccd_stages.py --repeat 5

Simulates one CCD of DECam (2048 x 4096 pixels) as `raw_to_calexp.py` does (needs the extra
`simulate`), makes its calexp over and over in this process, as a worker that does many CCDs, and
prints the median CPU and wall seconds of each step. The first time, which compiles kernels and
imports modules, is left out. With ``--threads 1 2`` the CCD is made with one thread and with two in
turn. With ``--folder`` the simulation is kept there and used again.
"""

import argparse
import functools
import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from raw_to_calexp import CCD, finished_ccd
from threadpoolctl import threadpool_limits

from coaddflow.runtime.allocator import keep_freed_memory

STEPS = {
    "coaddflow.calexp.job": (
        "read_raw_ccd",
        "read_calibs",
        "detrend_ccd",
        "remove_cosmic_rays",
        "reference_stars",
        "predicted_wcs",
        "write_calexp",
        "done_row",
    ),
    "coaddflow.calexp.ccd": (
        "estimate_background",
        "measure_seeing",
        "detect_sources",
        "set_detected",
        "select_stars",
        "fit_psf",
        "_add_fluxes",
        "repair_saturated",
        "solve_ccd",
        "measure_zero_point",
        "apply_calibration",
    ),
}
"""Functions that are timed, where they are called: all of a CCD's steps, none inside another."""


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5, help="times that the CCD is made")
    parser.add_argument("--folder", type=Path, help="where the simulation is kept")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1], help="threads that share the CCD"
    )
    arguments = parser.parse_args()
    keep_freed_memory()  # as jobs and workers do
    with threadpool_limits(1), finished_ccd(arguments.folder) as folder:
        os.chdir(folder)
        for threads, seconds in measure(arguments.repeat, arguments.threads).items():
            print(f"\n{threads} {'thread' if threads == 1 else 'threads'}")
            report(seconds)


def measure(repeat: int, threads: list[int]) -> dict[int, dict[str, list[tuple[float, float]]]]:
    """Return CPU and wall seconds of each step, and of all, for each time but the first.

    By number of threads; the working folder is that of the survey.
    """
    from coaddflow.calexp.job import CcdFiles, make_calexp
    from coaddflow.tables.exposures import ExposureRow
    from coaddflow.tables.paths import MANIFEST
    from coaddflow.workflow.stage import Job, stage

    exposure = sorted(path.name for path in Path("results/calexp").iterdir())[0]
    job = Job(stage.mock("calexp", exposure=exposure, ccd=CCD))
    row = ExposureRow(**job.params.table_row)
    manifest = MANIFEST.format(exposure=exposure)
    files = CcdFiles(row.path, job.calibs, job.output.row, f"{manifest}.none")
    settings, camera = job.settings(), job.camera
    seconds: dict[str, list[tuple[float, float]]] = {}
    for module, names in STEPS.items():
        place = importlib.import_module(module)
        for name in names:
            setattr(place, name, timed(name, getattr(place, name), seconds))
    whole = timed("all", make_calexp, seconds)
    by_threads: dict[int, dict[str, list[tuple[float, float]]]] = {n: {} for n in threads}
    for number in range(repeat + 1):
        for n in threads:
            seconds.clear()
            whole(row, CCD, files, camera, settings, n)
            for name, pairs in seconds.items() if number else ():
                # a step may be done several times
                total = tuple(map(sum, zip(*pairs, strict=True)))
                by_threads[n].setdefault(name, []).append(total)
    return by_threads


def timed(name: str, function: Callable, seconds: dict[str, list[tuple[float, float]]]) -> Callable:
    """Return a function that notes the CPU and wall seconds of each of its calls."""

    @functools.wraps(function)
    def call(*arguments, **options):
        cpu, wall = time.process_time(), time.perf_counter()
        result = function(*arguments, **options)
        spent = time.process_time() - cpu, time.perf_counter() - wall
        seconds.setdefault(name, []).append(spent)
        return result

    return call


def report(seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Print the medians."""
    table = {name: np.array(pairs) for name, pairs in seconds.items()}
    whole = table.pop("all")
    table["the rest"] = whole - sum(table.values())
    print(f"{'step':22s} {'CPU s':>8s} {'wall s':>8s}")
    for name, values in {**table, "all": whole}.items():
        cpu, wall = np.median(values, axis=0)
        print(f"{name:22s} {cpu:8.3f} {wall:8.3f}")


if __name__ == "__main__":
    main()
