"""What is solved for a whole exposure, from the tables that its CCDs have sent.

The section `exposure` of the settings says which parts (astrometry, sky, zero-point) are solved for
the exposure, and which by each CCD for itself. Here the parts are put into their order; each has a
module of its own.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.astrometry.ccd import AstrometrySolution, CcdStars
from coaddflow.astrometry.prediction import reference_stars_of_exposure
from coaddflow.calexp.ccd import apply_calibration
from coaddflow.calexp.model import Calexp, CcdId, MeasuredCcd
from coaddflow.calexp.zero_point import matched_stars, measure_zero_point
from coaddflow.errors import CcdFailure
from coaddflow.exposure.astrometry import solve_exposure
from coaddflow.exposure.photometry import ZeroPointMap, flatten, map_cards, solve_zero_point
from coaddflow.exposure.sky import (
    FocalPlaneSky,
    apply_focal_plane_sky,
    fit_focal_plane_sky,
    sky_cards,
)
from coaddflow.image.statistics import mad_sigma
from coaddflow.instrument.camera import Camera
from coaddflow.measure.background import Background
from coaddflow.measure.photometry import ZeroPoint
from coaddflow.settings import Settings
from coaddflow.settings.exposure import ExposureSettings
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.manifest import Flag

_LOG = logging.getLogger(__name__)

_ENOUGH_ZERO_POINTS = 3
"""CCDs that tell the zero-point of another one."""


class CcdAstrometry(NamedTuple):
    """The astrometric solution of a CCD, and the catalogue that it counts in."""

    solution: AstrometrySolution
    refcat: Table


@dataclass(frozen=True)
class CcdSummary:
    """What the master must know of a measured CCD: all but its pixels.

    Attributes
    ----------
    shape : tuple of int
        Shape (ny, nx).
    sources : astropy.table.Table
        See `calexp.ccd.measure_ccd`.
    background : Background
        Its own sky.
    aperture_correction : float
        Total flux of a star over its flux in the standard aperture.
    astrometry : CcdAstrometry or None
        Its own solution, where the exposure is not solved as a whole.
    """

    shape: tuple[int, int]
    sources: Table
    background: Background
    aperture_correction: float
    astrometry: CcdAstrometry | None


@dataclass(frozen=True)
class CcdSolution:
    """The part of the solution of an exposure that one CCD needs.

    Attributes
    ----------
    astrometry : AstrometrySolution
        Its WCS.
    photometric : ndarray of bool, shape (n sources,)
        The stars that the zero-point rests on.
    zero_point : ZeroPoint
        Its zero-point.
    zero_map : ZeroPointMap or None
        How that varies inside the CCD, which is then taken out of its pixels; None: not at all,
        or not known.
    flags : tuple of Flag
        What it lacks.
    """

    astrometry: AstrometrySolution
    photometric: NDArray[np.bool_]
    zero_point: ZeroPoint
    zero_map: ZeroPointMap | None
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class ExposureSolution:
    """The solution of an exposure.

    Attributes
    ----------
    ccds : dict of int to CcdSolution
        What each CCD gets that is solved.
    failures : dict of int to CcdFailure
        Why each of the other CCDs fails.
    sky : FocalPlaneSky or None
        The sky of the focal plane; None: each CCD keeps its own.
    """

    ccds: dict[int, CcdSolution]
    failures: dict[int, CcdFailure]
    sky: FocalPlaneSky | None


def solve_ccds(
    exposure: ExposureRow, camera: Camera, summaries: Mapping[int, CcdSummary], settings: Settings
) -> ExposureSolution:
    """Solve an exposure.

    Parameters
    ----------
    exposure : ExposureRow
        What the table says about it.
    camera : Camera
        For the place of the CCDs in the focal plane.
    summaries : mapping of int to CcdSummary
        The CCDs that were measured.
    settings : Settings
        Sections exposure, astrometry, photometry and refcat.

    Returns
    -------
    ExposureSolution
        Each CCD is in ``ccds`` or in ``failures``.

    Raises
    ------
    InputError
        If the reference catalogue is not usable.
    """
    astrometry, failures = _solve_astrometry(exposure, camera, summaries, settings)
    solved, without = _solve_photometry(camera, summaries, astrometry, settings)
    failures |= without
    sky = None
    if settings.exposure.sky.enabled:
        backgrounds = {ccd: summaries[ccd].background for ccd in solved}
        sky = fit_focal_plane_sky(backgrounds, camera, settings.exposure.sky)
    return ExposureSolution(solved, failures, sky)


def _solve_astrometry(
    exposure: ExposureRow, camera: Camera, summaries: Mapping[int, CcdSummary], settings: Settings
) -> tuple[dict[int, CcdAstrometry], dict[int, CcdFailure]]:
    """Return solution and catalogue of each CCD, and the failures."""
    if not settings.exposure.astrometry.enabled:
        return {ccd: summary.astrometry for ccd, summary in summaries.items()}, {}
    try:
        refcat = reference_stars_of_exposure(exposure, camera, summaries, settings)
    except CcdFailure as failure:
        return {}, dict.fromkeys(summaries, failure)
    stars = {ccd: CcdStars.of(summary.sources, summary.shape) for ccd, summary in summaries.items()}
    solved = solve_exposure(
        stars,
        camera,
        exposure.ra,
        exposure.dec,
        exposure.rotation,
        refcat,
        settings.astrometry,
        settings.exposure.astrometry,
    )
    solutions = {ccd: CcdAstrometry(one, refcat) for ccd, one in solved.solutions.items()}
    return solutions, dict(solved.failures)


def _solve_photometry(
    camera: Camera,
    summaries: Mapping[int, CcdSummary],
    astrometry: Mapping[int, CcdAstrometry],
    settings: Settings,
) -> tuple[dict[int, CcdSolution], dict[int, CcdFailure]]:
    """Return the solution of each CCD with its zero-point, and the failures."""
    own, whole = settings.photometry, settings.exposure.photometry
    zero_point_of_exposure = None
    if whole.enabled:
        stars = {
            ccd: matched_stars(summaries[ccd], solution, refcat, own)
            for ccd, (solution, refcat) in astrometry.items()
        }
        zero_point_of_exposure = solve_zero_point(stars, camera, whole, own)
    solved, failures = {}, {}
    for ccd, (solution, refcat) in astrometry.items():
        if zero_point_of_exposure is not None:
            zero, zero_map = zero_point_of_exposure.of_ccd(camera, camera.detector(ccd))
            photometric = np.zeros(len(summaries[ccd].sources), dtype=bool)
            photometric[stars[ccd].source_index[zero.used]] = True
            zero_map = zero_map if whole.flatten else None
            solved[ccd] = CcdSolution(solution, photometric, zero, zero_map)
            continue
        try:
            photometric, zero = measure_zero_point(summaries[ccd], solution, refcat, own)
        except CcdFailure as failure:
            failures[ccd] = failure
        else:
            solved[ccd] = CcdSolution(solution, photometric, zero, None)
    if failures and (whole.enabled or settings.exposure.astrometry.enabled):
        typical = _typical_zero_point([ccd.zero_point for ccd in solved.values()])
        for ccd in list(failures) if typical is not None else ():
            _LOG.warning("CCD %d (%s) has the zero-point of its exposure", ccd, failures.pop(ccd))
            none = np.zeros(len(summaries[ccd].sources), dtype=bool)
            solved[ccd] = CcdSolution(astrometry[ccd].solution, none, typical, None)
    return {ccd: _flagged(solved[ccd]) for ccd in sorted(solved)}, failures


def _typical_zero_point(zero_points: Sequence[ZeroPoint]) -> ZeroPoint | None:
    """Return the zero-point of a CCD without stars, from the CCDs of its exposure.

    Its error is the scatter of these. None if there are fewer than three.
    """
    if len(zero_points) < _ENOUGH_ZERO_POINTS:
        return None
    values = np.array([zero.value for zero in zero_points])
    value, scatter = float(np.median(values)), mad_sigma(values)
    error = float(np.hypot(scatter, np.median([zero.error for zero in zero_points])))
    spread = float(np.median([zero.scatter for zero in zero_points]))
    return ZeroPoint(value, error, spread, 0, np.zeros(0, dtype=bool))


def _flagged(solution: CcdSolution) -> CcdSolution:
    """Return the solution of a CCD with what it lacks."""
    flags = (Flag.PREDICTED_WCS,) * solution.astrometry.is_predicted
    flags += (Flag.EXPOSURE_ZERO_POINT,) * (solution.zero_point.n_stars == 0)
    return replace(solution, flags=flags)


def apply_solution(
    measured: MeasuredCcd,
    ccd: CcdId,
    solution: CcdSolution,
    sky: FocalPlaneSky | None,
    camera: Camera,
    settings: ExposureSettings,
) -> Calexp:
    """Apply the solution of an exposure to the CCD whose pixels are here.

    Parameters
    ----------
    measured : MeasuredCcd
        The CCD; it is not changed, but for columns that its sources get.
    ccd : CcdId
        Which CCD it is.
    solution : CcdSolution
        Its part of the solution.
    sky : FocalPlaneSky or None
        The sky of the exposure.
    camera : Camera
        For the place of the CCDs in the focal plane.
    settings : ExposureSettings
        Which parts are switched on, for the header.
    """
    measured = apply_focal_plane_sky(measured, camera, camera.detector(ccd.ccd), sky)
    if solution.zero_map is not None:
        measured = flatten(measured, solution.zero_map)
    calexp = apply_calibration(
        measured, ccd, solution.astrometry, solution.photometric, solution.zero_point
    )
    calexp.flags = solution.flags
    if settings.sky.enabled:
        calexp.header.update(sky_cards(sky, ccd.ccd))
        calexp.flags += (Flag.OWN_SKY,) * (sky is None or ccd.ccd in sky.own)
    if calexp.flags:
        calexp.header["CCDFLAGS"] = (",".join(calexp.flags), "what this CCD lacks")
    if settings.photometry.enabled:
        calexp.header.update(map_cards(solution.zero_map))
    return calexp
