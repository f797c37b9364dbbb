"""What the coadds of a tract cost as exposures are added: a table and a picture.

    python benchmarks/coadd_growth.py [--exposures 10 20 50 100] [--runs 3] [--picture FILE.svg]

The job of a tract (`benchmarks/tract_job.py`) is run with more and more exposures of its survey,
each of which covers it; medians of wall time and CPU time, that of the programs and that of the
system for them, are printed, also for each pixel that goes in, and the memory of the largest
worker. The picture needs matplotlib (``pip install 'coaddflow[science]'``).
"""

import argparse
import os
import re
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import tract_job
from child_time import cost_of

from coaddflow.skymap.maps import make_skymap

HERE = Path(__file__).resolve().parent


def measure(number: int, arguments: argparse.Namespace) -> list[float]:
    """Return Mpixel, wall s, CPU s of programs and system, and MB of a job."""
    arguments.exposures = number
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        tract = make_skymap(tract_job.skymap_settings(arguments)).tract(0)
        tract_job.make_survey(tract, arguments)
        job = partial(tract_job.run_steps, [["tract"]], arguments, 1)
        times = [cost_of(job) for _ in range(arguments.runs)]
        n_pixels = tract_job.megapixels(list(Path("calexp").glob("*/*.fits")))
        (largest,) = re.findall(r"of a worker (\d+) MB", Path("logs/tract.log").read_text())[-1:]
        os.chdir(HERE)
    return [
        n_pixels,
        *(statistics.median(values) for values in zip(*times, strict=True)),
        float(largest),
    ]


def draw(numbers: list[int], rows: list[list[float]], path: str) -> None:
    """Draw CPU time, in all and for each pixel, against exposures."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "coaddflow", "svg.fonttype": "none"})
    pixels, _, programs, system, _ = np.transpose(rows)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, share, name in zip(
        axes, (1.0, 1e3 / pixels), ("CPU time, s", "CPU time, ms for each Mpixel"), strict=True
    ):
        axis.plot(numbers, share * (programs + system), "o-", label="in all")
        axis.plot(numbers, share * programs, "o--", label="without the system's")
        axis.set(xlabel="exposures", ylabel=name, xlim=(0, None), ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--exposures", type=int, nargs="+", default=[10, 20, 50, 100])
    parser.add_argument("--ccds", type=int, default=4, help="of each exposure")
    parser.add_argument("--patches", type=int, default=2, help="along each side of the tract")
    parser.add_argument("--patch-size", type=int, default=1000, help="pixels")
    parser.add_argument("--ccd-size", type=int, nargs=2, metavar=("NX", "NY"), help="pixels")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--picture", type=os.path.abspath, help="where it is written, .svg")
    arguments = parser.parse_args()
    print("| exposures | Mpixel in | wall, s | CPU, s | of it the system | each Mpixel, ms | MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    tract_job.compile_ahead()
    numbers, rows = sorted(arguments.exposures), []
    for number in numbers:
        rows.append(measure(number, arguments))
        n_pixels, wall, programs, system, memory = rows[-1]
        cpu = programs + system
        times = f"{wall:.1f} | {cpu:.1f} | {system:.1f} | {1e3 * cpu / n_pixels:.0f}"
        print(f"| {number} | {n_pixels:.0f} | {times} | {memory:.0f} |", flush=True)
    if arguments.picture:
        draw(numbers, rows, arguments.picture)


if __name__ == "__main__":
    main()
