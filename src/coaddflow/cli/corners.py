"""Find the CCDs that cover a position or a patch, from the corner database.

It has the CCDs that were calibrated, where their fitted WCS puts them.
"""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coaddflow.cli.arguments import add_json, add_position
from coaddflow.tables.paths import SURVEY_CORNERS

if TYPE_CHECKING:
    from coaddflow.tables.manifest import CcdRow

HELP = "which CCDs cover a position or a patch"

EXAMPLE = """\
examples:
  coaddflow corners query 150.2479 2.2314
  coaddflow corners query 10:00:59.5 -02:13:53 --band r
  coaddflow corners patch 9813 4_4 --json

exit codes: 0 some CCDs do, 1 none does, 2 wrong usage, or no database
"""

_COLUMNS = ("exposure", "ccd", "band", "zero_point", "seeing", "sky_noise", "path")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="query|patch", required=True)
    query = commands.add_parser("query", help="CCDs that cover a position", epilog=EXAMPLE)
    add_position(query)
    patch = commands.add_parser("patch", help="CCDs that overlap a patch", epilog=EXAMPLE)
    patch.add_argument("tract", metavar="TRACT", type=int, help="number of the tract")
    patch.add_argument("patch", metavar="PATCH", help="patch, as x_y")
    for command, run in ((query, run_query), (patch, run_patch)):
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.add_argument("--band", help="only this band")
        command.add_argument(
            "--database",
            default=SURVEY_CORNERS,
            help=f"database of the survey, or of a tract (default: {SURVEY_CORNERS})",
        )
        add_json(command)
        command.set_defaults(run=run)


def run_query(arguments: argparse.Namespace) -> int:
    from coaddflow.corners.database import CornerDatabase

    with CornerDatabase(arguments.database) as database:
        rows = database.query_point(arguments.ra, arguments.dec, arguments.band)
    found = [_figures(row) for row in rows]
    where = f"RA {arguments.ra:.6f}, Dec {arguments.dec:+.6f}"
    return _show(found, arguments.json, f"no CCD covers {where}")


def run_patch(arguments: argparse.Namespace) -> int:
    from coaddflow.corners.database import CornerDatabase

    with CornerDatabase(arguments.database) as database:
        overlaps = database.query_patch(arguments.tract, arguments.patch, arguments.band)
    found = [
        _figures(overlap.ccd) | {"patch_fraction": round(overlap.patch_fraction, 5)}
        for overlap in overlaps
    ]
    where = f"tract {arguments.tract}, patch {arguments.patch}"
    return _show(found, arguments.json, f"no CCD overlaps {where}")


def _figures(row: "CcdRow") -> dict[str, object]:
    return {name: getattr(row, name) for name in _COLUMNS}


def _show(found: Sequence[dict[str, object]], as_json: bool, nothing: str) -> int:
    """Print rows as a table or as JSON; return the exit code."""
    if as_json:
        print(json.dumps(found, indent=1))
    elif found:
        names = list(found[0])
        cells = [names] + [[_cell(row[name]) for name in names] for row in found]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        for line in cells:
            print("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip())
    else:
        print(nothing)
    return 0 if found else 1


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1 else f"{value:.3f}"
    return str(value)
