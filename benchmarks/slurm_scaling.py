"""What the scheduler costs on Slurm, and the wall time on 1, 2 and 4 nodes.

    python benchmarks/slurm_scaling.py                     # nodes of one CPU
    python benchmarks/slurm_scaling.py --nodes 1 2 --exposures 8
    python benchmarks/slurm_scaling.py --granularity coarse

Brings up the Slurm of the tests on this machine (Debian packages as in cluster.mk), runs the survey
of the tests (exposures of 6 small CCDs, raw frames to coadds) once for each number of nodes, and
prints what Slurm's accounting says. The nodes are simulated: on a machine of N cores, more than N
nodes of one CPU cannot be faster than N. CCDs of real size take longer by the factor that
`coaddflow plan` tells, and the share of the scheduler is smaller by the same factor.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "on_cluster"))

from slurm_cluster import SlurmCluster, missing_programs, which
from survey import SIMULATION, Survey, coarse_granularity, make_survey

EXPOSURE = re.compile(r"rule_exposure_")


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cpus", type=int, default=1, help="CPUs of a node, and of a job")
    parser.add_argument("--exposures", type=int, default=4)
    parser.add_argument("--granularity", choices=["fine", "coarse"], default="fine")
    options = parser.parse_args()
    if missing_programs():
        sys.exit(f"not installed: {', '.join(missing_programs())}")
    SIMULATION["bands"]["r"]["exposures"] = options.exposures
    with tempfile.TemporaryDirectory(prefix="cf-", dir="/tmp") as folder:
        raw = Path(folder) / "raw"
        raw.mkdir()
        make_survey(raw)
        print("nodes  wall s  ratio  submissions  polls/min  exposure: CPU s  of it scheduler s")
        first = None
        for nodes in options.nodes:
            wall, text = run(Path(folder), raw, nodes, options)
            first = first or wall
            print(f"{nodes:5d}{wall:8.0f}{first / wall:7.2f}{text}", flush=True)


def run(folder: Path, raw: Path, nodes: int, options: argparse.Namespace) -> tuple[float, str]:
    """Run the survey on a cluster; return its wall time, and the rest of its line."""
    cluster = SlurmCluster(folder / f"slurm{nodes}", nodes=nodes, cpus=options.cpus)
    survey = Survey(folder / f"survey{nodes}", cluster, soon=False)
    survey.copy_raw(raw)
    if options.granularity == "coarse":
        survey.configure(**coarse_granularity())
    try:
        cluster.start()
        polls = count_calls(cluster, "squeue")
        began = time.monotonic()
        run = survey.run(cores=options.cpus)
        wall = time.monotonic() - began
        run.check()
        time.sleep(3)
        jobs = cluster.cpu_seconds()
    finally:
        cluster.stop()
    whole = statistics.median(seconds for comment, seconds in jobs if EXPOSURE.match(comment))
    steps = cpu_of_steps(survey.folder) / options.exposures
    n_polls = len(polls.read_text().splitlines()) if polls.exists() else 0
    minute = 60 * n_polls / wall
    return wall, f"{len(jobs):13d}{minute:11.1f}{whole:17.1f}{whole - steps:20.1f}"


def count_calls(cluster: SlurmCluster, name: str) -> Path:
    """Make a program of the cluster leave a line at each call; return the file of the lines."""
    calls = cluster.folder / f"{name}.calls"
    program = cluster.folder / "bin" / name
    program.write_text(f'#!/bin/sh\necho >>{calls}\nexec {which(name)} "$@"\n')
    program.chmod(0o755)
    return calls


def cpu_of_steps(folder: Path) -> float:
    """Return the CPU time that the steps of all exposures say they took."""
    total = 0.0
    for log in [*folder.glob("logs/calexp/*/*.log"), *folder.glob("logs/manifest/*.log")]:
        total += float(re.search(r"\((\d+\.\d) s CPU", log.read_text())[1])
    return total


if __name__ == "__main__":
    main()
