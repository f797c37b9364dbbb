"""How often a run opens the files of its survey, and what that costs on a slow shared disk.

    python benchmarks/file_opens.py [--exposures 4] [--ccds 6] [--camera demo] [--workers 2]

Simulates a survey (needs the extra `simulate`) and runs it under strace with both granularities: a
job for each CCD and patch, and a job for each exposure and tract. Calibration frames are made
before. Prints for each kind of file the openings for each CCD, in the jobs up to the manifests and
in those after them, with the bytes, what Snakemake itself opens, and how long the jobs wait for
each CCD, and each exposure or tract, if each opening and each read takes 5 or 20 ms. This is
calculated: the files are on a disk as fast as it is. Only files in the folder of the survey count.
Reads are of 256 kB at most; a client of a network file system that reads ahead waits for fewer.
"""

import argparse
import os
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

import yaml
from exposure_job import REPOSITORY, call
from traced import count_processes, traced

from coaddflow.instrument.camera import load_camera

KINDS = {
    "raw": r"data/raw/",
    "calibration frames": r"results/calibs/",
    "reference catalogue": r"data/refcat",
    "calexps": r"results/calexp/[^/]*/\.?[^/]*\.fits(?<!sources\.fits)$",
    "sources": r"results/calexp/.*sources",
    "rows of CCDs": r"results/calexp/.*\.json",
    "manifests": r"results/summary/",
    "corner databases": r"results/corners",
    "warps": r"results/warp/",
    "coadds": r"results/coadd/",
    "depth": r"results/depth/",
    "tokens": r"\.snakemake/coaddflow/tokens/",
    "logs, benchmarks, scripts": r"logs/|results/benchmarks/|\.snakemake/scripts/",
    "plan": r"\.snakemake/coaddflow/",
    "Snakemake's own": r"\.snakemake/",
    "settings and tables": r"",
}
"""Kinds of files by what their path, relative to the survey, begins or ends with; the first one
that matches counts."""

MODES = {"fine": ("ccd", "patch"), "coarse": ("exposure", "tract")}
"""Granularities: `parallel.calexp` and `parallel.coadd`."""


def simulate(arguments: argparse.Namespace) -> None:
    """Make the survey in this folder, with one settings file for each granularity."""
    every = [detector.id for detector in load_camera(arguments.camera).detectors]
    chosen = every[: arguments.ccds]
    simulation = {
        "camera": arguments.camera,
        "ccds": chosen,
        "bands": {"r": {"exposures": arguments.exposures, "zero_point": 26.0, "sky": 21.0}},
        "stars": {"density": 25.0, "brightest": 12.5, "faintest": 24.0},
        "galaxies": {"density": 10.0},
        "calibration": {"bias": 3, "dark": 3, "flat": 3},
    }
    Path("simulation.yaml").write_text(yaml.safe_dump(simulation))
    for mode, (calexp, coadd) in MODES.items():
        settings = {
            "camera": arguments.camera,
            "exposures": "exposures.ecsv",
            "exclude_ccds": [ccd for ccd in every if ccd not in chosen],
            "refcat": {"path": "data/refcat.fits", "fallback": {"magnitude": "mag_r"}},
            "skymap": {"kind": "tangent", "patch_inner_size": 1000, "patch_border": 50},
            "parallel": {"calexp": calexp, "coadd": coadd, "workers": arguments.workers},
        }
        Path(f"{mode}.yaml").write_text(yaml.safe_dump(settings))
    coaddflow = [sys.executable, "-m", "coaddflow"]
    call([*coaddflow, "simulate", "simulation.yaml", "data"])
    call([*coaddflow, "ingest", "--config", "fine.yaml", "data/raw"])


def snakemake(mode: str, workers: int, *options: str) -> list[str]:
    """Return the command line of a run."""
    program = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    return [*program, "--configfile", f"{mode}.yaml", "--cores", str(workers), *options]


def kind_of(path: str, survey: str) -> str | None:
    """Return which kind of file a path is; None if it is not of the survey."""
    if path.startswith("/") and not path.startswith(f"{survey}/"):
        return None
    name = path.removeprefix(f"{survey}/")
    return next(kind for kind, pattern in KINDS.items() if re.match(f"(.*/)?{pattern}", name))


def run_traced(mode: str, workers: int, *options: str) -> dict[str, dict[str, Counter]]:
    """Run a part of the survey; return what "jobs" and "Snakemake" opened, read and wrote."""
    survey = str(Path.cwd())
    call(traced(snakemake(mode, workers, *options), f"{survey}/../trace"))
    totals: dict[str, dict[str, Counter]] = {"jobs": {}, "Snakemake": {}}
    for seen in count_processes(f"{survey}/../trace", lambda path: kind_of(path, survey)):
        who = totals["Snakemake" if seen["opened"]["Snakemake's own"] else "jobs"]
        for what, counter in seen.items():
            who[what] = who.get(what, Counter()) + counter
    return totals


def report(
    title: str, seen: dict[str, dict[str, dict[str, Counter]]], n_ccds: int, units: tuple[str, int]
) -> None:
    """Print the table of a part of the survey; ``units``: what a coarse job is, and how many."""
    jobs = [one["jobs"] for one in seen.values()]
    print_row(f"{title}, for each CCD", [f"`{mode}`" for mode in seen])
    print("|---" * (1 + len(seen)) + "|")
    for kind in KINDS:
        opened = [one["opened"][kind] / n_ccds for one in jobs]
        moved = [(one["read"][kind] + one["written"][kind]) / n_ccds for one in jobs]
        if any(opened):
            pairs = zip(opened, moved, strict=True)
            print_row(kind, [f"{n:.1f}, {1e-6 * size:.2f} MB" for n, size in pairs])
    totals = [one["opened"].total() / n_ccds for one in jobs]
    frames = [one["opened"]["calibration frames"] / n_ccds for one in jobs]
    reads = [one["reads"].total() / n_ccds for one in jobs]
    print_row("all", [f"{total:.1f}" for total in totals])
    pairs = zip(totals, frames, strict=True)
    print_row("without calibration frames", [f"{total - part:.1f}" for total, part in pairs])
    print_row("reads", [f"{n:.0f}" for n in reads])
    for delay in (5, 20):
        waits = [delay * (n + more) / 1e3 for n, more in zip(totals, reads, strict=True)]
        print_row(f"waiting, {delay} ms each, s", [f"{wait:.2f}" for wait in waits])
        each = [f"{wait * n_ccds / units[1]:.1f}" for wait in waits]
        print_row(f"for each {units[0]}", each)
    whole = [one["Snakemake"]["opened"].total() for one in seen.values()]
    print_row("Snakemake itself, in the whole run", [str(n) for n in whole])


def print_row(name: str, cells: list[str]) -> None:
    """Print a row of a table."""
    print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run the benchmark and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exposures", type=int, default=4)
    parser.add_argument("--ccds", type=int, default=6, help="of each exposure")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--camera", default="demo")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        survey = Path(folder) / "survey"
        survey.mkdir()
        os.chdir(survey)
        simulate(arguments)
        call(snakemake("fine", arguments.workers, "--until", "defects"))
        up_to_manifests, after_them = {}, {}
        for mode in MODES:
            for name in ("calexp", "summary", "corners", "warp", "coadd", "depth"):
                call(["rm", "-rf", f"results/{name}", "results/corners.sqlite"])
            last = {"fine": "manifest", "coarse": "exposure"}[mode]
            up_to_manifests[mode] = run_traced(mode, arguments.workers, "--until", last)
            after_them[mode] = run_traced(mode, arguments.workers)
        n_ccds = arguments.exposures * arguments.ccds
        report("up to the manifests", up_to_manifests, n_ccds, ("exposure", arguments.exposures))
        report("after them", after_them, n_ccds, ("tract", 1))
        os.chdir(REPOSITORY)


if __name__ == "__main__":
    main()
