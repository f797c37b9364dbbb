"""Measure the crosstalk between amplifiers on raw science exposures.

For every ordered pair of amplifiers: what the victim shows where the aggressor, read at the same
moment, has bright pixels. Coefficients of a few 1e-4 need ten exposures or more, of several fields
if possible. docs/calibration.md describes the method.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coaddflow.cli.arguments import add_config, add_json, chosen_ccds, read_raw_settings
from coaddflow.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from coaddflow.calib.crosstalk_fit import MeasuredCrosstalk
    from coaddflow.instrument.camera import Camera
    from coaddflow.settings import Settings

HELP = "measure the crosstalk between amplifiers on raw exposures"

EXAMPLE = """\
examples:
  coaddflow crosstalk                            all CCDs on all science exposures of the table
  coaddflow crosstalk --within                   only between amplifiers of the same CCD
  coaddflow crosstalk --exposures 1001 1002 --ccds 0 1 2
  coaddflow crosstalk --yaml > crosstalk.yaml    the keys for the camera file

exit codes: 0 some pairs are significant, 1 none is, 2 wrong usage or unusable input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--exposures", nargs="+", metavar="ID", help="only these exposures")
    parser.add_argument("--ccds", nargs="+", type=int, metavar="CCD", help="only these CCDs")
    parser.add_argument(
        "--within", action="store_true", help="only pairs of amplifiers of the same CCD"
    )
    parser.add_argument(
        "--min-counts",
        type=_positive,
        default=2000.0,
        metavar="ADU",
        help="counts above the sky from which a pixel counts as bright (2000)",
    )
    parser.add_argument(
        "--max-coefficient",
        type=_positive,
        default=5e-3,
        metavar="C",
        help="largest plausible coefficient; larger signals are sources on the victim (0.005)",
    )
    parser.add_argument(
        "--sigma",
        type=_positive,
        default=5.0,
        help="coefficients larger than this many errors are significant (5)",
    )
    parser.add_argument(
        "--all", action="store_true", help="list all pairs, not only significant ones"
    )
    shape = parser.add_mutually_exclusive_group()
    add_json(shape)
    shape.add_argument("--yaml", action="store_true", help="print the keys for the camera file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.calib.crosstalk_fit import MeasurementSettings, measure_crosstalk
    from coaddflow.instrument.camera import load_camera

    settings = read_raw_settings(arguments.config)
    camera = load_camera(settings.camera)
    files = _raw_files(settings, arguments.exposures)
    how = MeasurementSettings(
        arguments.min_counts, arguments.max_coefficient, within=arguments.within
    )
    measured = measure_crosstalk(
        files,
        camera,
        chosen_ccds(camera, settings, arguments.ccds),
        settings.detrend,
        how,
        lambda path: print(path, file=sys.stderr),
    )
    significant = [one for one in measured if one.is_significant(arguments.sigma)]
    if arguments.json:
        print(json.dumps([_plain(one) for one in measured], indent=1))
    elif arguments.yaml:
        print(_yaml(measured, camera, arguments.sigma, len(files)))
    else:
        print("\n".join(_table(measured if arguments.all else significant, camera)))
        unknown = sum(math.isnan(one.coefficient) for one in measured)
        print(
            f"{len(significant)} of {len(measured)} pairs are significant "
            f"(more than {arguments.sigma:g} errors), {unknown} have too few bright pixels"
        )
    return 0 if significant else 1


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _raw_files(settings: "Settings", wanted: Sequence[str] | None) -> "list[Path]":
    """Return the raw files of the requested science exposures."""
    from coaddflow.tables.exposures import file_of, read_exposures

    rows = [row for row in read_exposures(settings.exposures) if row.kind == "science"]
    rows = [row for row in rows if row.exposure not in settings.exclude]
    known = {row.exposure for row in rows}
    for exposure in wanted or ():
        if exposure not in known:
            raise InputError(f"there is no science exposure {exposure!r}", path=settings.exposures)
    if not rows:
        raise InputError("there is no science exposure in the table", path=settings.exposures)
    rows = [row for row in rows if wanted is None or row.exposure in wanted]
    return [file_of(row.path, settings.exposures) for row in rows]


def _plain(one: "MeasuredCrosstalk") -> dict[str, object]:
    """Return a coefficient for JSON, which knows no NaN."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in one._asdict().items()
    }


def _table(measured: "Sequence[MeasuredCrosstalk]", camera: "Camera") -> list[str]:
    if not measured:
        return []
    known = _camera_file(camera)
    lines = ["aggressor  victim     coefficient      error  groups   pixels  camera file"]
    for one in measured:
        names = [f"{ccd} {amplifier}" for ccd, amplifier in (one.aggressor, one.victim)]
        stated = known.get((one.aggressor, one.victim), 0.0)
        lines.append(
            f"{names[0]:<10} {names[1]:<10} {one.coefficient:+11.2e} {one.error:10.1e} "
            f"{one.n_groups:7d} {one.n_pixels:8d} {stated:+12.2e}"
        )
    return lines


def _camera_file(camera: "Camera") -> dict[tuple, float]:
    """Return the coefficients of the camera file by aggressor and victim."""
    known = {(link.aggressor, link.victim): link.coefficient for link in camera.crosstalk}
    for one in camera.detectors:
        names = [(one.id, amplifier.name) for amplifier in one.amplifiers]
        for victim, row in zip(names, one.crosstalk or (), strict=False):
            known.update({(names[i], victim): value for i, value in enumerate(row)})
    return known


def _yaml(
    measured: "Sequence[MeasuredCrosstalk]", camera: "Camera", sigma: float, n_exposures: int
) -> str:
    """Return the keys for the camera file: matrices of CCDs, and the list between CCDs."""
    from coaddflow.calib.crosstalk_fit import camera_keys

    keys = camera_keys(measured, camera, sigma)
    lines = [
        f"# Measured by coaddflow crosstalk on {n_exposures} exposures: coefficients of more than "
        f"{sigma:g} errors."
    ]
    if keys["detectors"]:
        lines += ["# The key `crosstalk` belongs into the entry of each CCD.", "detectors:"]
        lines += [
            f"  - {{id: {one['id']}, crosstalk: {_numbers(one['crosstalk'])}}}"
            for one in keys["detectors"]
        ]
    if keys["crosstalk"]:
        lines += ["crosstalk:"]
        lines += [
            f"  - {{aggressor: {json.dumps(link['aggressor'])}, "
            f"victim: {json.dumps(link['victim'])}, coefficient: {link['coefficient']:.2e}}}"
            for link in keys["crosstalk"]
        ]
    return "\n".join(lines)


def _numbers(matrix: list[list[float]]) -> str:
    rows = (", ".join(f"{value:.2e}" if value else "0.0" for value in row) for row in matrix)
    return "[" + ", ".join(f"[{row}]" for row in rows) + "]"
