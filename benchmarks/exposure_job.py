"""One job an exposure against one job a CCD: time, CPU, overhead, opened files, bytes.

    python benchmarks/exposure_job.py [--exposures 2] [--ccds 6] [--workers 2] [--camera decam]
                                      [--modes ccd exposure] [--pairs 1]

Simulates exposures of some CCDs of a camera (needs the extra `simulate`) and calibrates them in
three ways: by Snakemake with `parallel.calexp: ccd`, by Snakemake with `parallel.calexp: exposure`,
and CCD after CCD in as many warm processes as there are workers, which is the useful work; what the
others take more of CPU, the interpreters, imports and schedulers, is overhead. (The processes run
side by side as the workers do: cores that share a cache, or are threads of one core, slow each
other down.) The ways alternate, `--pairs` times; the overhead is the median of those of the pairs.
The first two are done once more under strace, which counts what is opened, read and written. The
calexps of both are compared.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import yaml
from child_time import cost_of
from threadpoolctl import threadpool_limits
from traced import count, traced

from coaddflow.calexp.job import CcdFiles, make_calexp
from coaddflow.files import sha256_of
from coaddflow.instrument.camera import load_camera
from coaddflow.runtime.allocator import keep_freed_memory
from coaddflow.settings import Settings, load_settings
from coaddflow.tables.exposures import read_exposures
from coaddflow.workflow.plan import CALIB_KINDS, make_plan

REPOSITORY = Path(__file__).resolve().parents[1]
BAND = "r"
PARTS = ("raw", "calexp", "row", "manifest")
MODES = ("ccd", "exposure")


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exposures", type=int, default=2)
    parser.add_argument("--ccds", type=int, default=6, help="of each exposure")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--camera", default="decam")
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--pairs", type=int, default=1, help="how often all are done in turn")
    parser.add_argument("--no-trace", action="store_true", help="do not count with strace")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        settings = simulate(arguments)
        found: dict[str, list[tuple[float, float, float]]] = {mode: [] for mode in arguments.modes}
        sums, useful = {}, []
        for pair in range(arguments.pairs):
            seconds, n_ccds = useful_work(settings, arguments.workers)
            useful.append(seconds)
            for mode in arguments.modes:
                cost = cost_of(partial(call, calexps_anew(mode, arguments.workers)))
                found[mode].append((cost.wall, cost.cpu, cost.cpu - seconds))
                one = f"{seconds:.1f} s useful, {cost.cpu:.1f} s CPU, {cost.wall:.1f} s wall"
                print(f"pair {pair + 1}, {mode}: {one}", file=sys.stderr)
                sums[mode] = {p.parent.name + p.name: sha256_of(p) for p in calexps()}
        each = median(useful) / n_ccds
        print(f"{n_ccds} CCDs, useful work {each:.2f} s of CPU each\n")
        print("| `parallel.calexp` | wall, s | CPU, s | overhead a CCD, s | of the useful work |")
        print("|---|---|---|---|---|")
        for mode, runs in found.items():
            wall, cpu, over = (median(column) for column in zip(*runs, strict=True))
            parts = [100 * one[2] / all_of_it for one, all_of_it in zip(runs, useful, strict=True)]
            line = f"| `{mode}` | {wall:.1f} | {cpu:.1f} | {over / n_ccds:.2f} |"
            print(f"{line} {median(parts):.1f} % ({min(parts):.1f} to {max(parts):.1f}) |")
        if len({tuple(sorted(one.items())) for one in sums.values()}) > 1:
            sys.exit("the calexps differ")
        for log in sorted(Path("logs/exposure").glob("*.log")):
            print(*(line for line in log.read_text().splitlines() if "workers busy" in line))
        if not arguments.no_trace:
            report_files(arguments)
        os.chdir(REPOSITORY)


def calexps() -> list[Path]:
    """Return the calexps of the survey."""
    return sorted(p for p in Path("results/calexp").rglob("*.fits") if "sources" not in p.name)


def simulate(arguments: argparse.Namespace) -> Settings:
    """Make the survey in this folder, with one settings file for each mode."""
    camera = load_camera(arguments.camera)
    every = [detector.id for detector in camera.detectors]
    # in the middle of the mosaic, which some cameras begin with their edge
    first = (len(every) - arguments.ccds) // 2
    chosen = every[first : first + arguments.ccds]
    simulation = {
        "camera": arguments.camera,
        "ccds": chosen,
        "bands": {BAND: {"exposures": arguments.exposures, "zero_point": 26.0, "sky": 21.0}},
        # of a camera that does not turn, and says nothing of it in its headers
        "survey": {"rotation": float(camera.header.rotation.default or 0.0)},
        "stars": {"density": 25.0, "brightest": 12.5, "faintest": 24.0},
        "galaxies": {"density": 10.0},
        "calibration": {"bias": 3, "dark": 3, "flat": 3},
    }
    settings = {
        "camera": arguments.camera,
        "exposures": "exposures.ecsv",
        "exclude_ccds": [ccd for ccd in every if ccd not in chosen],
        "refcat": {"path": "data/refcat.fits", "fallback": {"magnitude": f"mag_{BAND}"}},
        "astrometry": {"max_pointing_error": 3.0},
        "skymap": {"kind": "tangent", "pixel_scale": 0.27},
    }
    Path("simulation.yaml").write_text(yaml.safe_dump(simulation))
    for mode in ("ccd", "exposure"):
        parallel = {"calexp": mode, "workers": arguments.workers}
        Path(f"{mode}.yaml").write_text(yaml.safe_dump({**settings, "parallel": parallel}))
    coaddflow = [sys.executable, "-m", "coaddflow"]
    call([*coaddflow, "simulate", "simulation.yaml", "data"])
    call([*coaddflow, "ingest", "--config", "ccd.yaml", "data/raw"])
    call(snakemake("ccd", arguments.workers, "defects"))
    call(snakemake("exposure", arguments.workers, "calib_table"))  # once for all exposures
    return load_settings(yaml.safe_load(Path("ccd.yaml").read_text()))


def call(command: list[str]) -> None:
    """Run a command; show what it said if it fails."""
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    if ended.returncode != 0:
        sys.exit(ended.stdout + ended.stderr)


def useful_work(settings: Settings, workers: int) -> tuple[float, int]:
    """Return the CPU time of all CCDs, in warm processes side by side, and their number."""
    camera = load_camera(settings.camera)
    ccds = [d.id for d in camera.detectors if d.id not in settings.exclude_ccds]
    exposures = [
        row.exposure for row in read_exposures(settings.exposures) if row.kind == "science"
    ]
    todo = [(exposure, ccd) for exposure in exposures for ccd in ccds]
    workers = min(workers, len(todo))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        shares = [pool.submit(work_of, settings, todo[k::workers]) for k in range(workers)]
        return sum(share.result() for share in shares), len(todo)


def work_of(settings: Settings, todo: list[tuple[str, int]]) -> float:
    """Return the CPU time of some CCDs, done one after the other here."""
    keep_freed_memory()  # as a worker does
    camera, plan, begin = load_camera(settings.camera), make_plan(settings, None), 0.0
    rows = {row.exposure: row for row in read_exposures(settings.exposures)}
    with threadpool_limits(1):  # as in a worker
        for exposure, ccd in [todo[0], *todo]:  # the first one compiles
            calibs = {kind: plan.calib_product(kind, ccd, BAND) for kind in CALIB_KINDS}
            name = f"results/calexp/{exposure}/{ccd}.json"
            files = CcdFiles(plan.raw_file(exposure, ccd), calibs, name, "none")
            make_calexp(rows[exposure], ccd, files, camera, settings)
            begin = begin or time.process_time()
    return time.process_time() - begin


def snakemake(mode: str, workers: int, until: str) -> list[str]:
    """Return the command line that makes all products of a rule."""
    program = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    configfile = ["--configfile", f"{mode}.yaml"]
    return [*program, *configfile, "--cores", str(workers), "--until", until]


def calexps_anew(mode: str, workers: int) -> list[str]:
    """Remove all calexps, and return the command line that makes them."""
    for name in ("calexp", "summary"):
        shutil.rmtree(f"results/{name}", ignore_errors=True)
    return snakemake(mode, workers, {"ccd": "manifest", "exposure": "exposure"}[mode])


def report_files(arguments: argparse.Namespace) -> None:
    """Print what each mode opens, reads and writes for an exposure."""
    print("\n| for each exposure |", *(f" {p}: opens / MB read / MB written |" for p in PARTS))
    print("|---" * (1 + len(PARTS)) + "|")
    for mode in arguments.modes:
        call(traced(calexps_anew(mode, arguments.workers), "trace"))
        seen = count("trace", part_of)
        line = f"| `{mode}` |"
        for part in PARTS:
            opened, read, written = (
                seen[kind][part] / arguments.exposures for kind in ("opened", "read", "written")
            )
            line += f" {opened:.1f} / {read / 1e6:.1f} / {written / 1e6:.1f} |"
        print(line)


def part_of(path: str) -> str | None:
    """Return which of the files of an exposure a path is."""
    if re.search(r"data/raw/[^/]*\.fits", path):
        return "raw"
    if "results/calexp/" in path:
        return "row" if ".json" in path else "calexp"
    return "manifest" if "results/summary/" in path else None


if __name__ == "__main__":
    main()
