"""Memory and time that the plan of a finished survey asks for, beside what its steps have taken.

    cd SURVEY && python .../benchmarks/asked_and_used.py [--config FILE] [--cores N]

One line a kind of step: the largest memory of one step as Snakemake has sampled it, what the plan
asks for, and their ratio; likewise the longest time, and the time limit that `coaddflow plan`
proposes after the run. Ratios above 2 are marked, and those below 1: such a job is killed.
"""

import argparse
import math

from coaddflow.cli.arguments import add_config, read_settings
from coaddflow.workflow.cost import asked_memory
from coaddflow.workflow.measured import TIME_ROOM, measured
from coaddflow.workflow.plan import make_plan


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config(parser)
    parser.add_argument("--cores", type=int, default=2, help="cores of one job (2)")
    parser.add_argument("--results", default="results", help="folder of the products")
    arguments = parser.parse_args()
    asked = asked_memory(make_plan(read_settings(arguments.config)), arguments.cores)
    print("                steps     used    asked  ratio      used    limit")
    for step in measured(f"{arguments.results}/benchmarks", asked):
        ratio = step.asked / step.memory if step.memory else math.nan
        mark = "" if 1 <= ratio <= 2 else "  <--"
        limit = max(math.ceil(TIME_ROOM * step.seconds / 60), 2)
        print(
            f"{step.rule:<14}{step.n_steps:7d}{step.memory:6.0f} MB{step.asked:6d} MB{ratio:7.2f}"
            f"{step.seconds:8.0f} s{limit:5d} min{mark}"
        )


if __name__ == "__main__":
    main()
