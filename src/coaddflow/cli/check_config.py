"""Check a settings file, and all files that it names, before anything runs."""

import argparse
import functools
import sys
from collections.abc import Callable
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

exit codes: 0 the run can start, 2 it cannot; each problem has a line of its own
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="FILE", nargs="?", default=DEFAULT_CONFIG, help="settings to check"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments.config)
    problems = _problems(settings)
    for problem in problems:
        sys.stderr.write(f"coaddflow: error: {' '.join(problem.split())}\n")
    if problems:
        return 2
    print(f"{arguments.config}: settings and files are good")
    return 0


def _problems(settings: "Settings") -> list[str]:
    """Return everything that would keep a run from starting, each once."""
    from coaddflow.image.masked_image import planes_from_names
    from coaddflow.instrument.camera import load_camera
    from coaddflow.tables.exposures import read_exposures, read_images
    from coaddflow.workflow.plan import make_plan
    from coaddflow.workflow.report import start_text

    calibrated = settings.calibrated
    planes = (
        settings.interpolation.planes,
        settings.coadd.bad_planes,
        calibrated.weight.zero_planes,
        calibrated.mask.unlisted,
        *calibrated.mask.planes.values(),
    )
    checks = [functools.partial(planes_from_names, names) for names in planes]
    if calibrated.table is not None:
        checks.insert(0, lambda: read_images(calibrated.table))
    if settings.exposures is not None:
        checks[:0] = [lambda: read_exposures(settings.exposures), settings.refcat.files]
    if settings.camera is not None:
        checks.insert(0, lambda: load_camera(settings.camera))
    found = [error for check in checks if (error := _error_of(check))]
    if not found:
        found += filter(None, [_error_of(lambda: print(start_text(make_plan(settings))))])
    return list(dict.fromkeys(found))


def _error_of(check: Callable[[], object]) -> str:
    """Return the message of a check that fails."""
    try:
        check()
    except InputError as error:
        return str(error)
    return ""
