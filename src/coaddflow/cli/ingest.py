"""Make or extend the table of exposures (or of images calibrated elsewhere).

Headers are read, pixels are not. Exposures already in the table stay as they are. Files that cannot
be used are skipped and listed with the reason.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coaddflow.cli.arguments import add_config, add_json, read_settings
from coaddflow.errors import InputError

if TYPE_CHECKING:
    from coaddflow.ingest.raw_exposures import IngestReport, Skip

HELP = "make the table of exposures from raw files or calibrated images"

EXAMPLE = """\
examples:
  coaddflow ingest raw/                          camera and table from config.yaml
  coaddflow ingest --camera demo --table exposures.ecsv raw/night1 raw/night2
  coaddflow ingest --calibrated --config configs/decam-calibrated.yaml images/
  coaddflow ingest --fitted results              correct pointings by those of fitted CCDs
  coaddflow ingest --sets                        show the sets of calibration frames of now

exit codes: 0 the table is up to date (skipped files are listed), 1 with --strict if a raw file
was skipped or an exposure not corrected, 2 wrong usage, or no file could be used
"""

_LISTED = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources", metavar="FOLDER", nargs="*", help="folders (searched recursively) or files"
    )
    add_config(parser)
    parser.add_argument("--camera", help="camera, instead of that of the settings")
    parser.add_argument("--table", help="table to make or extend, instead of that of the settings")
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="the files are images calibrated elsewhere (settings: calibrated)",
    )
    parser.add_argument(
        "--fitted",
        metavar="RESULTS",
        help="correct pointings and rotations in the table by those fitted to CCDs in this folder "
        "of results, for exposures that failed because of wrong ones",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="with --fitted: also for exposures that passed (they are then processed again)",
    )
    parser.add_argument(
        "--sets",
        action="store_true",
        help="write into the table which sets of calibration frames each exposure takes by these "
        "settings; also done whenever exposures are added to the table of the settings",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="overwrite exposures already in the table with what their headers say",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a file was skipped")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _check_sets_wanted(arguments)
    if arguments.fitted is not None:
        return _run_fitted(arguments)
    if arguments.sets and not arguments.sources:
        changed, table = _show_sets(arguments)
        print(json.dumps({"changed": changed}) if arguments.json else _sets_text(changed, table))
        return 0
    if not arguments.sources:
        raise InputError("no folder is given", remedy="coaddflow ingest FOLDER")
    report = _ingest_calibrated(arguments) if arguments.calibrated else _ingest_raw(arguments)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report), indent=1))
    else:
        print(_report_text(report))
    if not arguments.calibrated:
        _show_sets_after(arguments)
    missed = [skip for skip in report.skipped if skip.reason != "other_name"]
    return 1 if arguments.strict and missed else 0


def _check_sets_wanted(arguments: argparse.Namespace) -> None:
    """Raise InputError if --sets stands beside an option with which nothing has sets."""
    options = {"--calibrated": arguments.calibrated, "--fitted": arguments.fitted is not None}
    for option, is_given in options.items():
        if arguments.sets and is_given:
            raise InputError(
                f"--sets has no effect with {option}",
                remedy=f"run `coaddflow ingest --sets` by itself, without {option}",
            )


def _ingest_raw(arguments: argparse.Namespace) -> "IngestReport":
    from coaddflow.ingest.raw_exposures import ingest
    from coaddflow.instrument.camera import load_camera

    camera, table = _camera_and_table(arguments)
    return ingest(arguments.sources, load_camera(camera), table, arguments.replace)


def _show_sets(arguments: argparse.Namespace) -> tuple[list[str], str]:
    """Write the sets into the table; return exposures that show others now, and the table."""
    from coaddflow.workflow.sets_shown import show_sets

    _, table = _camera_and_table(arguments)
    return show_sets(read_settings(arguments.config), table), table


def _show_sets_after(arguments: argparse.Namespace) -> None:
    """Write the sets of exposures that were added; what hinders it is an error only if asked for.

    The table has the exposures in any case.
    """
    if arguments.sets:
        _show_sets(arguments)
    elif arguments.table is None:
        try:
            _show_sets(arguments)
        except InputError as error:
            told = " ".join(str(error).split())
            sys.stderr.write(f"coaddflow: note: the column `sets` is not written: {told}\n")


def _sets_text(changed: list[str], table: str) -> str:
    return f"{len(changed)} exposures of {table} now show other sets of calibration frames"


def _ingest_calibrated(arguments: argparse.Namespace) -> "IngestReport":
    from coaddflow.ingest.calibrated_images import ingest_calibrated

    settings = read_settings(arguments.config).calibrated
    table = arguments.table or settings.table
    if table is None:
        remedy = "set calibrated.table, or --table"
        raise InputError("no table is given", path=arguments.config, remedy=remedy)
    return ingest_calibrated(arguments.sources, settings, table, arguments.replace)


def _run_fitted(arguments: argparse.Namespace) -> int:
    from coaddflow.ingest.raw_exposures import repoint
    from coaddflow.instrument.camera import load_camera

    camera, table = _camera_and_table(arguments)
    pointings, skipped = repoint(
        table, arguments.fitted, load_camera(camera), also_passed=arguments.all
    )
    if arguments.json:
        content = {
            "corrected": {name: dataclasses.asdict(p) for name, p in pointings.items()},
            "skipped": [dataclasses.asdict(skip) for skip in skipped],
        }
        print(json.dumps(content, indent=1))
    else:
        for name, pointing in pointings.items():
            print(
                f"{name}: moved by {pointing.shift:.1f} arcsec, rotation {pointing.rotation:.3f} "
                f"(CCDs fit within {pointing.rms:.2f} arcsec)"
            )
        print("\n".join([*_skip_lines(skipped), f"{len(pointings)} pointings put into {table}"]))
    return 1 if arguments.strict and skipped else 0


def _camera_and_table(arguments: argparse.Namespace) -> tuple[str, str]:
    """Return camera and table from the arguments, or else from the settings."""
    camera, table = arguments.camera, arguments.table
    if camera is None or table is None:
        settings = read_settings(arguments.config)
        camera, table = camera or settings.camera, table or settings.exposures
    for name, value, option in (("camera", camera, "camera"), ("exposures", table, "table")):
        if value is None:
            remedy = f"set it, or give --{option}"
            raise InputError(f"setting {name!r} is missing", path=arguments.config, remedy=remedy)
    return camera, table


def _report_text(report: "IngestReport") -> str:
    lines = _skip_lines(report.skipped) + _skip_lines(report.doubtful, "used, but ")
    if report.kept:
        more = ", ..." if len(report.kept) > _LISTED else ""
        lines.append(
            f"{len(report.kept)} differ from their headers and were kept (--replace takes the "
            f"headers): {', '.join(report.kept[:_LISTED])}{more}"
        )
    counts = [f"{len(report.added)} added"]
    counts += [f"{len(report.replaced)} replaced"] if report.replaced else []
    unchanged = len(report.unchanged) + len(report.kept)
    counts += [f"{unchanged} unchanged"] if unchanged else []
    counts.append(f"{len(report.skipped)} files skipped")
    return "\n".join([*lines, f"{', '.join(counts)}; the table has {report.n_rows} rows"])


def _skip_lines(skipped: Sequence["Skip"], what: str = "skipped, ") -> list[str]:
    """Return what was skipped (or doubted), by reason, the first few of each with messages."""
    by_reason: dict[str, list[Skip]] = {}
    for skip in skipped:
        by_reason.setdefault(skip.reason, []).append(skip)
    lines = []
    for reason, skips in by_reason.items():
        lines.append(f"{what}{reason}: {len(skips)}")
        lines += [f"  {skip.file}: {skip.message}" for skip in skips[:_LISTED]]
        if len(skips) > _LISTED:
            lines.append(f"  ... and {len(skips) - _LISTED} more (--json lists all)")
    return lines
