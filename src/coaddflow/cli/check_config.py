"""Check a settings file, and open all files that it names, before anything runs.

Tables, camera, reference catalogue and given calibration files are read; exposures, bands and CCDs
that the settings name are looked for. The number of reference stars in the field of each exposure
is shown.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from coaddflow.cli.arguments import DEFAULT_CONFIG, read_settings
from coaddflow.errors import InputError

if TYPE_CHECKING:
    from coaddflow.astrometry.refcat import FieldStars
    from coaddflow.settings import Settings
    from coaddflow.workflow.plan import Plan

HELP = "check a settings file and the files that it names"

EXAMPLE = """\
examples:
  coaddflow check-config
  coaddflow check-config configs/hatp32.yaml

exit codes: 0 the run can start, 2 it cannot; each problem has a line of its own
"""

_LISTED = 20


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
    from coaddflow.workflow.report import set_lines, start_text
    from coaddflow.workflow.survey_record import check_survey

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
    plans: list[Plan] = []
    if not found:
        found += filter(None, [_error_of(lambda: plans.append(make_plan(settings)))])
    for plan in plans:
        print("\n".join([start_text(plan), *_of_sets(set_lines(plan))]))
        found += filter(None, [_error_of(plan.check), _error_of(lambda p=plan: check_survey(p))])
        found += _problems_of_catalogue(plan)
        found += _problems_of_given_frames(plan)
    return list(dict.fromkeys(found))


def _of_sets(lines: list[str]) -> list[str]:
    """Return the first of the lines on sets of calibration frames, with a heading."""
    hidden = len(lines) - _LISTED
    more = [f"  ... and {hidden} more sets"] if hidden > 0 else []
    heading = ["sets of calibration frames:"] if lines else []
    return [*heading, *(f"  {line}" for line in lines[:_LISTED]), *more]


def _error_of(check: Callable[[], object]) -> str:
    """Return the message of a check that fails."""
    try:
        check()
    except InputError as error:
        return str(error)
    return ""


def _problems_of_catalogue(plan: "Plan") -> list[str]:
    """Return what is wrong with the reference catalogue; print how many stars it has."""
    if not plan.science:
        return []
    from coaddflow.astrometry.refcat import check_catalogue, count_stars, exposure_cone
    from coaddflow.instrument.camera import load_camera

    refcat = plan.settings.refcat
    bands = {row.band for row in plan.science.values()}
    camera = load_camera(plan.settings.camera)
    detectors = [camera.detector(ccd) for ccd in plan.ccds]
    fields = [
        (*exposure_cone(camera, detectors, row.ra, row.dec, row.rotation, 0.0), row.band)
        for row in plan.science.values()
    ]
    try:
        check_catalogue(refcat, sorted(bands))
        counts = dict(zip(plan.science, count_stars(refcat, fields), strict=True))
    except InputError as error:
        return [str(error)]
    print("\n".join(_star_lines(counts)))
    if not any(count.stars for count in counts.values()):
        return [
            f"{', '.join(map(str, refcat.files()[:3]))}: no star of the reference catalogue is in "
            "the field of any exposure. Give the catalogue of this part of the sky (refcat.path), "
            "or check refcat.ra, refcat.dec, refcat.position_unit and the pointings in the table"
        ]
    problems = []
    for band in sorted(bands):
        of_band = [counts[row.exposure] for row in plan.science.values() if row.band == band]
        if any(c.stars for c in of_band) and not any(c.with_magnitude for c in of_band):
            column = refcat.magnitude_column(band).magnitude
            problems.append(
                f"setting 'refcat': no star in the fields of band {band!r} has a magnitude in "
                f"column {column!r}. Name another column in refcat.bands.{band}.magnitude, or "
                "widen refcat.plausible_magnitudes"
            )
    return problems


def _star_lines(counts: "dict[str, FieldStars]") -> Iterator[str]:
    """Yield how many reference stars there are for the exposures, those with fewest first."""
    fewest = sorted(counts, key=lambda exposure: counts[exposure].stars)
    yield (
        f"reference stars in the field of an exposure: {counts[fewest[0]].stars} to "
        f"{counts[fewest[-1]].stars}"
    )
    for exposure in fewest[:_LISTED]:
        count = counts[exposure]
        line = f"  {exposure}  {count.stars} stars, {count.with_magnitude} with a magnitude"
        if count.without_motion:
            line += f", {count.without_motion} without proper motion (at their catalogue position)"
        yield line
    if len(fewest) > _LISTED:
        yield f"  ... and {len(fewest) - _LISTED} exposures with more"
    without = [exposure for exposure in fewest if not counts[exposure].stars]
    if without:
        yield (
            f"coaddflow: note: no reference star in the field of {len(without)} of {len(counts)} "
            f"exposures, which will fail: {', '.join(without[:_LISTED])}"
            + (", ..." if len(without) > _LISTED else "")
        )


def _problems_of_given_frames(plan: "Plan") -> list[str]:
    """Return which calibration files that the settings name are not whole FITS files."""
    import zlib
    from pathlib import Path

    from coaddflow.image.fits_hdus import NotFitsError, open_fits, walk_hdus
    from coaddflow.tables.paths import CALIB_KINDS

    problems = []
    given = {
        file: kind
        for kind in CALIB_KINDS
        for band in plan.raw_bands
        for file in plan.given_files(kind, band)
    }
    for name, kind in given.items():
        if not Path(name).is_file():
            continue  # said by Plan.check
        try:
            with open_fits(Path(name)) as stream:
                for _ in walk_hdus(stream):
                    pass
        except (NotFitsError, EOFError, OSError, zlib.error) as error:
            problems.append(
                f"{name}: is not a whole FITS file ({error}). Give another file in "
                f"calibs.{kind}.path, or get this one again"
            )
    return problems
