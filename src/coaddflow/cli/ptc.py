"""Measure gain, read noise, linearity and full well of amplifiers on pairs of flats.

Photon transfer curves: flats of the exposure table, two of each band and exposure time, at some 20
levels (four at least) from little light to beyond the full well. Bias exposures of the table are
used where there are some. docs/calibration.md describes the method.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from coaddflow.cli.arguments import (
    add_config,
    add_json,
    add_workers,
    chosen_ccds,
    chosen_workers,
    read_raw_settings,
)
from coaddflow.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coaddflow.calib.flat_pairs import AmplifierId
    from coaddflow.calib.photon_transfer import PhotonTransfer
    from coaddflow.instrument.camera import Amplifier
    from coaddflow.settings import Settings
    from coaddflow.tables.exposures import ExposureRow

HELP = "measure gain, read noise, linearity and full well on pairs of flats"

EXAMPLE = """\
examples:
  coaddflow ptc                                  all CCDs, all pairs of flats of the table
  coaddflow ptc --band r --ccds 0 1
  coaddflow ptc --write mycamera.yaml            a camera file with the measured values

exit codes: 0 all amplifiers have a curve, 1 some have none, 2 wrong usage or unusable input
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--band", help="only flats of this band")
    parser.add_argument("--ccds", nargs="+", type=int, metavar="CCD", help="only these CCDs")
    add_workers(parser, "share the CCDs")
    parser.add_argument(
        "--write",
        type=_new_file,
        metavar="FILE",
        help="write a camera file with the measured values; it must not be there yet",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.calib.flat_pairs import find_flats, measure_pairs
    from coaddflow.calib.photon_transfer import camera_with, fit_photon_transfer
    from coaddflow.instrument.camera import load_camera, write_camera

    settings = read_raw_settings(arguments.config)
    workers = chosen_workers(arguments)
    camera = load_camera(settings.camera)
    flats = find_flats(_rows(settings, arguments.band), settings.exposures)
    if not flats.groups:
        which = f"of band {arguments.band}" if arguments.band else "of one band"
        raise InputError(
            f"there are no two flats {which} with the same exposure time (within 1 %) in one night",
            path=settings.exposures,
            remedy="take two of each exposure time",
        )
    pairs = measure_pairs(
        flats,
        camera,
        chosen_ccds(camera, settings, arguments.ccds),
        settings.detrend,
        workers,
        lambda done, total, name: print(f"{name}: {done} of {total} CCDs", file=sys.stderr),
    )
    stated = {(one.id, a.name): a for one in camera.detectors for a in one.amplifiers}
    curves = {
        amplifier: fit_photon_transfer(of_it, stated[amplifier].linearity)
        for amplifier, of_it in pairs.items()
    }
    found = {name: one for name, one in curves.items() if not isinstance(one, str)}
    if arguments.json:
        print(json.dumps([_plain(*item) for item in curves.items()], indent=1))
    else:
        print("\n".join(_table(curves, stated)))
        n_pairs = max(map(len, pairs.values()), default=0)
        print(f"{len(found)} of {len(curves)} amplifiers have a curve, of {n_pairs} pairs")
    if arguments.write and not found:
        raise InputError("nothing was measured that a camera file could have")
    if arguments.write:
        write_camera(arguments.write, camera_with(camera, found), "measured by coaddflow ptc")
    return 0 if len(found) == len(curves) else 1


def _new_file(text: str) -> Path:
    """Refuse a file that is there: it may have comments."""
    if Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text} is there already: give the name of a new file")
    return Path(text)


def _rows(settings: "Settings", band: str | None) -> "list[ExposureRow]":
    """Return the exposures that are not excluded, flats of one band if that is given."""
    from coaddflow.tables.exposures import read_exposures

    rows = [
        row for row in read_exposures(settings.exposures) if row.exposure not in settings.exclude
    ]
    return [row for row in rows if row.kind != "flat" or band in (None, row.band)]


def _plain(amplifier: "AmplifierId", curve: "PhotonTransfer | str") -> dict[str, object]:
    """Return a curve, or why there is none, for JSON, which knows no NaN."""
    found: dict[str, object] = {"ccd": amplifier[0], "amplifier": amplifier[1]}
    if isinstance(curve, str):
        return {**found, "reason": curve}
    values = {**vars(curve), **curve.linearity._asdict()}
    del values["linearity"]
    found |= {"is_full_well_known": curve.is_full_well_known}
    return found | {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def _table(
    curves: "Mapping[AmplifierId, PhotonTransfer | str]", stated: "Mapping[AmplifierId, Amplifier]"
) -> "Sequence[str]":
    """Return a line for each amplifier, gain and read noise of the camera file in brackets."""
    lines = [
        "CCD amplifier    gain, e/adu         read noise, e   full well, adu  non-linear  "
        "a00, 1/e   pairs"
    ]
    for (ccd, name), curve in curves.items():
        if isinstance(curve, str):
            lines.append(f"{ccd:3d} {name:<9} no curve: {curve}")
            continue
        before = stated[ccd, name]
        full = f"{'' if curve.is_full_well_known else '>'}{curve.full_well:.0f}"
        is_known = math.isfinite(curve.linearity.deviation)
        bent = f"{100 * curve.linearity.deviation:.2f} %" if is_known else "-"
        lines.append(
            f"{ccd:3d} {name:<9} {curve.gain:7.4f} +- {curve.gain_error:.4f} ({before.gain:g})  "
            f"{curve.read_noise:6.2f} ({before.read_noise:g}) {full:>10} {bent:>10} "
            f"{curve.brighter_fatter:10.1e} {curve.n_pairs:5d}"
        )
    return lines
