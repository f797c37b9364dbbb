"""Arguments that several commands share."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coaddflow.errors import InputError
from coaddflow.geometry.angles import parse_declination, parse_right_ascension

if TYPE_CHECKING:
    from coaddflow.instrument.camera import Camera
    from coaddflow.settings import Settings

DEFAULT_CONFIG = "config.yaml"


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=DEFAULT_CONFIG,
        help=f"settings of the run (default: {DEFAULT_CONFIG})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="print JSON, for scripts")


def add_position(parser: argparse.ArgumentParser) -> None:
    """Add the positional arguments RA and DEC."""
    parser.add_argument(
        "ra",
        metavar="RA",
        type=_angle(parse_right_ascension),
        help="ICRS right ascension: degrees, or hours as 10:00:28.6 or 10h00m28.6s",
    )
    parser.add_argument(
        "dec",
        metavar="DEC",
        type=_angle(parse_declination),
        help="ICRS declination: degrees, or -02:12:21 or -2d12m21s",
    )


def _angle(parse: Callable[[str], float]) -> Callable[[str], float]:
    def checked(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def chosen_ccds(camera: "Camera", settings: "Settings", wanted: Sequence[int] | None) -> list[int]:
    """Return the CCDs that ``--ccds`` names, by default those of the run, in the camera's order."""
    for ccd in wanted or ():
        camera.detector(ccd)
    return [
        one.id
        for one in camera.detectors
        if (one.id in wanted if wanted else one.id not in settings.exclude_ccds)
    ]


def add_workers(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--workers``; `chosen_workers` reads it."""
    parser.add_argument("--workers", type=int, help=f"processes that {what} (default: all cores)")


def chosen_workers(arguments: argparse.Namespace) -> int:
    """Return how many processes ``--workers`` asks for; raise InputError if that is none."""
    from coaddflow.pool.backend import available_cores

    workers = available_cores() if arguments.workers is None else arguments.workers
    if workers < 1:
        raise InputError("--workers must be 1 or more")
    return workers


def read_raw_settings(path: str | Path) -> "Settings":
    """Read the settings of a run of raw exposures; raise InputError if a file has none."""
    settings = read_settings(path)
    if settings.camera is None or settings.exposures is None:
        raise InputError("needs the settings `camera` and `exposures`", path=path)
    return settings


def read_settings(path: str | Path) -> "Settings":
    """Read a settings file; raise InputError if it is not one."""
    from coaddflow.settings import load_settings
    from coaddflow.settings.keys import read_file

    return load_settings(read_file(path), path)
