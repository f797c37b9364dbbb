"""Tell what became of every exposure and CCD, and which products of tracts are missing."""

import argparse

from coaddflow.cli.arguments import add_config, add_json, read_settings

HELP = "exposures x CCDs: done, failed with reason, missing"

EXAMPLE = """\
examples:
  coaddflow status
  coaddflow status --config configs/hatp32.yaml --all
  coaddflow status --json | python -m json.tool

exit codes: 0 all is done, 1 all has been tried and some CCDs failed, 2 wrong usage or unusable
settings, 3 a CCD or another product is missing (not run yet, the job crashed, or the exposure
stopped the run) or was made with other settings, 4 more exposures are left out than
calexp.max_left_out_fraction allows
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--results", default="results", help="folder of the products")
    parser.add_argument("--logs", default="logs", help="folder of the job logs")
    parser.add_argument(
        "--all", action="store_true", help="list every exposure and every failure, not the first"
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.workflow.plan import make_plan
    from coaddflow.workflow.status import survey_status
    from coaddflow.workflow.status_text import status_json, status_table

    plan = make_plan(read_settings(arguments.config))
    status = survey_status(plan, arguments.results, arguments.logs)
    print(status_json(status) if arguments.json else status_table(status, arguments.all))
    return status.exit_code
