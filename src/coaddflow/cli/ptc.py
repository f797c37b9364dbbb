"""Measure gain, read noise, linearity and full well of amplifiers on pairs of flats.

Photon transfer curves: flats of the exposure table, two of each band and exposure time, at eight
levels or more from little light to beyond the full well. Bias exposures of the table are used where
there are some. docs/calibration.md describes the method.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from coaddflow.cli.arguments import add_config, add_json, chosen_ccds, read_settings
from coaddflow.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coaddflow.calib.flat_pairs import AmplifierId
    from coaddflow.calib.photon_transfer import PhotonTransfer
    from coaddflow.instrument.camera import Camera
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
    parser.add_argument("--workers", type=int, help="processes that share the CCDs (default: all)")
    parser.add_argument(
        "--write",
        type=_new_file,
        metavar="FILE",
        help="write a camera file with the measured values; it must not be there yet",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from coaddflow.calib.flat_pairs import find_pairs, measure_pairs
    from coaddflow.calib.photon_transfer import camera_with, fit_photon_transfer
    from coaddflow.instrument.camera import load_camera, write_camera
    from coaddflow.pool.backend import available_cores

    settings = read_settings(arguments.config)
    if settings.camera is None or settings.exposures is None:
        raise InputError("needs the settings `camera` and `exposures`", path=arguments.config)
    workers = available_cores() if arguments.workers is None else arguments.workers
    if workers < 1:
        raise InputError("--workers must be 1 or more")
    camera = load_camera(settings.camera)
    flats = find_pairs(_rows(settings, arguments.band), settings.exposures)
    if not flats.pairs:
        raise InputError(
            "there are no two flats of the same band and exposure time",
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
    curves = {amplifier: fit_photon_transfer(of_it) for amplifier, of_it in pairs.items()}
    found = {amplifier: curve for amplifier, curve in curves.items() if curve is not None}
    if arguments.json:
        print(json.dumps([_plain(*item) for item in curves.items()], indent=1))
    else:
        print("\n".join(_table(curves, camera)))
        print(f"{len(found)} of {len(curves)} amplifiers have a curve, of {len(flats.pairs)} pairs")
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


def _plain(amplifier: "AmplifierId", curve: "PhotonTransfer | None") -> dict[str, object]:
    """Return a curve for JSON, which knows no NaN."""
    values = {} if curve is None else vars(curve)
    plain = {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }
    return {"ccd": amplifier[0], "amplifier": amplifier[1], **plain}


def _table(
    curves: "Mapping[AmplifierId, PhotonTransfer | None]", camera: "Camera"
) -> "Sequence[str]":
    """Return a line for each amplifier, the values of the camera file in brackets."""
    lines = [
        "CCD amplifier    gain, e/adu         read noise, e   full well, adu  non-linear  "
        "a00, 1/e   pairs"
    ]
    for (ccd, name), curve in curves.items():
        if curve is None:
            lines.append(f"{ccd:3d} {name:<9} no curve: four levels that differ are needed")
            continue
        stated = next(one for one in camera.detector(ccd).amplifiers if one.name == name)
        full = f"{'' if curve.is_full else '>'}{curve.full_well:.0f}"
        bent = "-" if math.isnan(curve.nonlinearity) else f"{100 * curve.nonlinearity:.2f} %"
        lines.append(
            f"{ccd:3d} {name:<9} {curve.gain:7.4f} +- {curve.gain_error:.4f} ({stated.gain:g})  "
            f"{curve.read_noise:6.2f} ({stated.read_noise:g}) {full:>10} {bent:>10} "
            f"{curve.brighter_fatter:10.1e} {curve.n_pairs:5d}"
        )
    return lines
