"""Make a simulated survey: raw frames, calibration frames, truth and reference catalogue."""

import argparse

HELP = "make a simulated survey"

EXAMPLE = """\
example:
  coaddflow simulate simulation.yaml data/simulated

exit codes: 0 done, 2 wrong usage or unusable settings
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("settings", metavar="SETTINGS", help="YAML file of the simulation")
    parser.add_argument("output", metavar="FOLDER", help="folder to fill")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from coaddflow.simulate import run_simulation

    run_simulation(arguments.settings, arguments.output)
    return 0
