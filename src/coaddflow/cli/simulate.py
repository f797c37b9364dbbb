"""Make a simulated survey: raw frames, calibration frames, truth and reference catalogue."""

import argparse
import os

HELP = "make a simulated survey"

EXAMPLE = """\
examples:
  coaddflow simulate configs/demo-survey.yaml data/demo
  coaddflow simulate my_survey.yaml data/mine --processes 8

A folder that already holds the survey of exactly these settings is left as it is.

exit codes: 0 done, 2 wrong usage or unusable settings
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", metavar="SETTINGS", help="YAML file of the simulation")
    parser.add_argument("output", metavar="FOLDER", help="folder to fill")
    parser.add_argument(
        "--processes",
        metavar="N",
        type=int,
        default=os.cpu_count() or 1,
        help="parallel processes (default: one per CPU); the pixels do not depend on it",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from coaddflow.simulate.settings import load_simulation_settings
    from coaddflow.simulate.survey import run_simulation

    settings = load_simulation_settings(arguments.settings)
    # without a terminal (disable=None) nothing is shown
    with tqdm(desc="simulating", unit=" pieces", leave=False, disable=None) as bar:

        def show(done: int, total: int, last: str) -> None:
            bar.total = total
            bar.set_postfix_str(last, refresh=False)
            bar.update(done - bar.n)

        made = run_simulation(settings, arguments.output, max(arguments.processes, 1), show)
    what = f"{made.n_files} raw files written" if made.n_files else "was there already"
    print(f"{made.folder}: {len(made.observations)} exposures, {what}")
    return 0
