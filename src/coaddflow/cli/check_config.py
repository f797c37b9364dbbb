"""Check a settings file, and all files that it names, before anything runs."""

import argparse
import sys
from typing import TYPE_CHECKING

from coaddflow.cli.arguments import DEFAULT_CONFIG, read_settings
from coaddflow.errors import InputError

if TYPE_CHECKING:
    from coaddflow.settings import Settings

HELP = "check a settings file and the files that it names"

EXAMPLE = """\
examples:
  coaddflow check-config
  coaddflow check-config configs/hatp32.yaml

exit codes: 0 the run can begin, 2 it cannot; every problem is told on a line of its own
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument(
        "config", metavar="FILE", nargs="?", default=DEFAULT_CONFIG, help="settings to check"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    settings = read_settings(arguments.config)
    problems = _problems(settings)
    for problem in problems:
        sys.stderr.write(f"coaddflow: error: {' '.join(problem.split())}\n")
    if problems:
        return 2
    print(f"{arguments.config}: settings and files are good")
    return 0


def _problems(settings: "Settings") -> list[str]:
    """Return all that would keep a run from beginning, each once."""
    from coaddflow.image.masked_image import planes_from_names
    from coaddflow.instrument.camera import load_camera
    from coaddflow.tables.exposures import read_exposures, read_images
    from coaddflow.workflow.plan import make_plan
    from coaddflow.workflow.report import start_text

    checks = []
    if settings.camera is not None:
        checks.append(lambda: load_camera(settings.camera))
    if settings.exposures is not None:
        checks.append(lambda: read_exposures(settings.exposures))
        checks.append(settings.refcat.files)
    if settings.calibrated.table is not None:
        checks.append(lambda: read_images(settings.calibrated.table))
    for names in (
        settings.interpolation.planes,
        settings.coadd.bad_planes,
        settings.calibrated.weight.zero_planes,
        settings.calibrated.mask.unlisted,
        *settings.calibrated.mask.planes.values(),
    ):
        checks.append(lambda names=names: planes_from_names(names))
    found = []
    for check in checks:
        try:
            check()
        except InputError as error:
            found.append(str(error))
    if not found:
        try:
            print(start_text(make_plan(settings)))
        except InputError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))
