"""Tell what a run will cost before it is submitted; after it, what it did cost.

Cluster jobs, core-hours, memory and time limit of the largest job, and disk, counted from
exposures, CCDs and patches; what is done already is counted too. Where a run has left benchmark
files, its figures stand beside the plan, and below is what to ask for next time.

With `parallel.backend: mpi` jobs are counted as on Slurm, where each worker is a task.
"""

import argparse
import json
from dataclasses import asdict

from coaddflow.cli.arguments import add_config, add_json, read_settings

HELP = "what a run will cost: jobs, core-hours, memory, time limits, disk; and what it did cost"

EXAMPLE = """\
examples:
  coaddflow plan
  coaddflow plan --cores 16 --config configs/hatp32.yaml
  coaddflow plan --json

exit codes: 0 done, 2 wrong usage or unusable settings
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument(
        "--cores", type=int, default=8, help="cores of one cluster job, as in the profile (8)"
    )
    parser.add_argument("--results", default="results", help="folder of the products")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.errors import InputError
    from coaddflow.workflow.cost import asked_memory, forecast, widths
    from coaddflow.workflow.measured import disk_used, measured, suggestion
    from coaddflow.workflow.plan import make_plan

    if arguments.cores < 1:
        raise InputError("--cores must be 1 or more")
    plan = make_plan(read_settings(arguments.config))
    costs = forecast(plan, arguments.cores)
    steps = measured(f"{arguments.results}/benchmarks", asked_memory(plan, arguments.cores))
    used = disk_used(arguments.results) if steps else None
    if arguments.json:
        plain = {
            "plan": [asdict(cost) for cost in costs],
            "measured": [asdict(step) for step in steps],
            "disk_used": used,
        }
        print(json.dumps(plain, indent=1))
    else:
        print(report(costs, steps, used, suggestion(steps, arguments.cores, widths(plan))))
    return 0


def report(costs: list, steps: list, used: float | None, next_time: list[str]) -> str:
    """Return plan and measurement as a table for people."""
    from coaddflow.workflow.cost import total
    from coaddflow.workflow.measured import core_hours_of

    lines = [
        "                jobs   steps   core-hours   measured     memory  time limit       disk",
        "                                                      of the largest job",
    ]
    for cost in [*costs, total(costs)]:
        hours = core_hours_of(cost.name, steps)
        lines.append(
            f"{cost.name:<13}{cost.n_jobs:7d}{cost.n_steps:8d}{cost.core_hours:13.2f} "
            + (f"{hours:10.2f}" if hours is not None else f"{'-':>10}")
            + f"{cost.memory / 1000:8.1f} GB{cost.runtime // 60:7d}:{cost.runtime % 60:02d} h"
            f"{cost.disk:8.1f} GB"
        )
    lines.append(
        "Memory and time limit are of the first attempt; later ones ask for more of what was "
        "short, but not\nfor more than a node has or the partition allows."
    )
    if steps:
        lines += [
            "",
            f"Measured, with {used:.1f} GB on disk; the largest of each step, of what it asks for:",
            *(
                f"  {step.rule:<13}{step.n_steps:7d} steps{step.memory:8.0f} MB"
                + (f" of {step.asked:6d} MB" if step.asked else "")
                + f"{step.seconds:9.0f} s"
                for step in steps
            ),
            "",
            "Core-hours are measured of the steps alone; those of the plan count Snakemake too.",
            "",
            "For the next run of this camera:",
            "  --set-resources " + " ".join(f"'{words}'" for words in next_time),
        ]
    return "\n".join(lines)
