"""The astrometric solution of a whole exposure, from the stars of all its CCDs.

The exposure is located on the sky (`matching.locate_exposure`), the stars of each CCD are matched
near their predicted positions, and one model of the focal plane (`focal_plane.FieldModel`) is
fitted to all stars. A CCD that does not agree with it is solved by itself (`solve_ccd`), and so
are all CCDs if the exposure has no solution.

References
----------
.. [1] Bertin 2006, ADASS XV, ASP Conf. 351, 112 (mosaics matched as one field).
.. [2] Bernstein et al. 2017, PASP 129, 074503 (one map for the exposure, one for each CCD).
.. [3] Bosch et al. 2018, PASJ 70, S5 (matches of CCDs, then a fit of the mosaic).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS, WcsError
from numpy.typing import NDArray

from coaddflow.astrometry.ccd import (
    AstrometrySolution,
    CcdStars,
    describe_solution,
    residuals,
    solve_ccd,
    supported_order,
)
from coaddflow.errors import CcdFailure, Reason, failing_ccd
from coaddflow.exposure.field import ExposureField, FieldCcd
from coaddflow.exposure.focal_plane import (
    CcdPairs,
    FieldFit,
    FieldModel,
    Priors,
    fit_field,
    model_of_missing_ccd,
)
from coaddflow.exposure.matching import (
    ExposureNotSolved,
    locate_exposure,
    match_nearest_stars,
    match_sparse_ccd,
    references_on,
)
from coaddflow.geometry.sphere import separation
from coaddflow.geometry.wcs import fit_tan_sip
from coaddflow.image.statistics import RAYLEIGH_MEDIAN
from coaddflow.instrument.camera import Camera
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings

_LOG = logging.getLogger(__name__)

_FIRST_ORDER = 3
"""Order of the common polynomial before CCDs with few stars are matched."""

_MAX_ITERATIONS = 15


@dataclass(frozen=True)
class CcdTerms:
    """Position and rotation of a CCD in the solution of its exposure.

    Attributes
    ----------
    offset : tuple of float
        Offset of the CCD from its position in the camera file, along its own x and y, pixels.
    rotation : float
        Its rotation relative to the camera file, degrees, from +x to +y of the focal plane.
    formal_error : float
        Largest formal error of its WCS along its edge, pixels.
    """

    offset: tuple[float, float]
    rotation: float
    formal_error: float


@dataclass(frozen=True)
class ExposureFit:
    """Results of the fit to a whole exposure.

    Attributes
    ----------
    rotation : float
        Rotation, degrees.
    pointing_error : float
        Distance of the pointing (position of the focal plane's origin) from the predicted one,
        arcminutes.
    n_stars, n_clipped : int
        Stars in the fit, and matched stars rejected as outliers.
    rms_pixel : float
        Rms distance between stars and catalogue, both axes together.
    offset_sigma : float
        Measured value of the setting of this name, pixels.
    ccds : dict of int to CcdTerms
        The CCDs solved by the fit.
    """

    rotation: float
    pointing_error: float
    n_stars: int
    n_clipped: int
    rms_pixel: float
    offset_sigma: float
    ccds: dict[int, CcdTerms]


@dataclass(frozen=True)
class ExposureAstrometry:
    """The solutions of all CCDs of an exposure.

    Attributes
    ----------
    solutions : dict of int to AstrometrySolution
        Solved CCDs. ``reference_index`` refers to the reference catalogue of the exposure, also
        for CCDs solved by themselves. For the others, ``n_matched`` counts the stars of the CCD in
        the fit of the exposure, and ``order`` is that of the common polynomial.
    failures : dict of int to CcdFailure
        CCDs without a solution.
    fallbacks : dict of int to str
        Why a CCD is not solved with its exposure; it is in `solutions` or in `failures`.
    fit : ExposureFit or None
        None if the exposure has no solution.
    """

    solutions: dict[int, AstrometrySolution]
    failures: dict[int, CcdFailure]
    fallbacks: dict[int, str]
    fit: ExposureFit | None


def solve_exposure(
    stars: Mapping[int, CcdStars],
    camera: Camera,
    ra: float,
    dec: float,
    rotation: float,
    refcat: Table,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> ExposureAstrometry:
    """Solve the astrometry of an exposure as a whole [1]_ [2]_ [3]_.

    Parameters
    ----------
    stars : mapping of int to CcdStars
        The measured CCDs by number, without those that failed before.
    camera : Camera
        For the place of the CCDs in the focal plane.
    ra, dec, rotation : float
        Pointing and rotation from the exposure table, degrees; ``settings`` limit their errors.
    refcat : astropy.table.Table
        Columns ra, dec (ICRS degrees at the epoch of the exposure) and mag; should cover
        `refcat.exposure_cone` of the CCDs.
    settings : AstrometrySettings
        Limits of search, match and clipping, for CCD and exposure.
    exposure_settings : ExposureAstrometrySettings
        The model of the focal plane.

    Returns
    -------
    ExposureAstrometry
        Each CCD is in ``solutions`` or in ``failures``. A CCD not solved with the exposure has
        the solution that it would have by itself, or else that of the exposure if it is certain
        enough (``is_predicted``), with a warning in the log.
    """
    pointing = ra, dec, rotation
    field = ExposureField.of(stars, camera, pointing, refcat, settings, exposure_settings)
    solutions: dict[int, AstrometrySolution] = {}
    failures: dict[int, CcdFailure] = {}
    outcome = fit = None
    try:
        outcome = _fit_exposure(field)
    except (ExposureNotSolved, np.linalg.LinAlgError) as reason:
        _LOG.warning("the exposure is not solved as a whole: %s; each CCD by itself", reason)
        fallbacks = dict.fromkeys(sorted(stars), str(reason))
    else:
        fallbacks = outcome.excluded
        for number in sorted(outcome.pairs):
            try:
                solutions[number] = _ccd_solution(field.ccds[number], outcome, field)
            except CcdFailure as failure:
                failures[number] = failure
        fit = _figures(field, outcome)
        _LOG.info(
            "%d stars on %d CCDs, rms %.3f pixels, pointing off by %.2f arcmin, "
            "CCDs off by %.2f pixels rms",
            fit.n_stars,
            len(fit.ccds),
            fit.rms_pixel,
            fit.pointing_error,
            np.sqrt(np.mean([np.square(terms.offset).mean() for terms in fit.ccds.values()])),
        )
        for number, reason in fallbacks.items():
            _LOG.warning("CCD %d is solved by itself: %s", number, reason)
    for number in fallbacks:
        try:
            solutions[number] = _solve_excluded(field.ccds[number], outcome, field)
        except CcdFailure as failure:
            failures[number] = failure
    return ExposureAstrometry(dict(sorted(solutions.items())), failures, fallbacks, fit)


@dataclass
class _Outcome:
    """The state of the fit: the matched CCDs, and those excluded with the reason."""

    fit: FieldFit
    pairs: dict[int, CcdPairs]
    excluded: dict[int, str]
    few: frozenset[int] = frozenset()
    """CCDs in the fit that are excluded because their few stars leave them too uncertain."""

    @property
    def residual(self) -> NDArray[np.float64]:
        """Measured minus catalogue position of the stars in the fit, field pixels, (2, n)."""
        pairs = self.pairs.values()
        return np.concatenate([p.residual(self.fit.model)[:, p.kept] for p in pairs], axis=1)

    @property
    def rms(self) -> float:
        """Rms distance of these stars from the catalogue, both axes together, field pixels."""
        return float(np.sqrt(np.mean(np.sum(self.residual**2, axis=0))))


def _fit_exposure(field: ExposureField) -> _Outcome:
    """Locate the exposure and fit its model; raise ExposureNotSolved."""
    limits = field.model_settings
    if len(field.ccds) < limits.min_ccds:
        raise ExposureNotSolved(f"it has only {len(field.ccds)} CCDs with sources")
    field, start, pairs = locate_exposure(field)
    outcome = _fit_agreeing(field, start, pairs, _FIRST_ORDER)
    agreeing = dict(outcome.pairs)
    for number, ccd in field.ccds.items():
        if number in outcome.pairs or number in outcome.excluded:
            continue
        model, error = model_of_missing_ccd(outcome.fit, agreeing, ccd.where)
        found = match_sparse_ccd(ccd, model, error, outcome.fit.priors, field)
        if found is None:
            outcome.excluded[number] = (
                f"its {ccd.sources.size} sources do not match the solution of the exposure"
            )
        else:
            outcome.pairs[number] = found
    outcome = _iterate(field, outcome)
    _exclude_uncertain(outcome, limits.max_formal_error)
    if len(outcome.pairs) < limits.min_ccds:
        raise ExposureNotSolved(f"only {len(outcome.pairs)} of its CCDs agree")
    if outcome.rms > field.settings.max_rms_pixels:
        raise ExposureNotSolved(
            f"the rms distance of its stars from the catalogue is {outcome.rms:.2f} pixels, above "
            f"astrometry.max_rms_pixels = {field.settings.max_rms_pixels:g}"
        )
    return replace(outcome, excluded=dict(sorted(outcome.excluded.items())))


def _fit_agreeing(
    field: ExposureField,
    start: FieldModel,
    pairs: dict[int, CcdPairs],
    order: int,
    priors: Priors | None = None,
) -> _Outcome:
    """Fit, exclude the CCD that agrees least, and fit again, until all agree."""
    excluded: dict[int, str] = {}
    limits, clip_sigma = Priors.of(field.model_settings), field.settings.clip_sigma
    while True:
        if len(pairs) < field.model_settings.min_ccds:
            raise ExposureNotSolved(f"only {len(pairs)} of its CCDs agree")
        chosen = _choose_order(pairs, field, order)
        fit, pairs = fit_field(pairs, start, chosen, limits, clip_sigma, priors)
        start, priors = fit.model, fit.priors
        outcome = _Outcome(fit, pairs, excluded)
        worst = _worst_ccd(outcome, field.model_settings)
        if worst is None:
            return outcome
        number, reason = worst
        excluded = {**excluded, number: reason}
        pairs = {n: stars for n, stars in pairs.items() if n != number}


def _choose_order(pairs: dict[int, CcdPairs], field: ExposureField, highest: int) -> int:
    """Return the highest order of the common polynomial that the stars support, at least 1."""
    places = [stars.place[:, stars.kept] for stars in pairs.values()]
    edges = [ccd.where.edge for ccd in field.ccds.values() if ccd.sources.size]
    radius = field.radius
    stars, edge = (np.concatenate(parts, axis=1) / radius for parts in (places, edges))
    return max(1, supported_order(stars, edge, highest, field.settings))


def _worst_ccd(outcome: _Outcome, limits: ExposureAstrometrySettings) -> tuple[int, str] | None:
    """Return the CCD that agrees least and the reason, or None if all agree."""
    fit = outcome.fit
    worst, most = None, 1.0
    for number, stars in outcome.pairs.items():
        offset = float(np.hypot(*fit.model.ccd_terms[number][:2]))
        # of all matched stars: clipping would hide that those of this CCD scatter
        distance = np.hypot(*stars.residual(fit.model)) / stars.error
        ratio = float(np.median(distance)) / RAYLEIGH_MEDIAN / fit.error_scale
        for excess, reason in (
            (
                offset / limits.max_offset,
                f"it is {offset:.1f} pixels from its position in the camera file, more than "
                f"exposure.astrometry.max_offset = {limits.max_offset:g}",
            ),
            (
                ratio / limits.max_rms_ratio,
                f"its residuals are {ratio:.1f} times those of the exposure",
            ),
        ):
            if excess > most:
                worst, most = (number, reason), excess
    return worst


def _iterate(field: ExposureField, outcome: _Outcome) -> _Outcome:
    """Fit at full order and match again within smaller radii, until the matches are stable."""
    settings, order = field.settings, field.model_settings.order
    radius = 2.0 * settings.match_tolerance
    previous: list = []
    excluded, pairs = dict(outcome.excluded), outcome.pairs
    for _ in range(_MAX_ITERATIONS):
        model, priors = outcome.fit.model, outcome.fit.priors
        outcome = _fit_agreeing(field, model, pairs, order, priors)
        excluded |= outcome.excluded
        now = [
            (number, stars.source_index.tobytes(), stars.kept.tobytes())
            for number, stars in outcome.pairs.items()
        ]
        sigma = float(np.median(np.hypot(*outcome.residual))) / RAYLEIGH_MEDIAN
        limit = max(1.5 * settings.clip_sigma * sigma, 0.25 * settings.match_tolerance)
        if now == previous and radius <= limit:
            break
        radius, previous = min(radius, limit), now
        pairs = {}
        for number in outcome.pairs:
            again = match_nearest_stars(field.ccds[number], outcome.fit.model, field, radius)
            if again is None:
                excluded[number] = "none of its sources matches the solution of the exposure"
            else:
                pairs[number] = again
    # a CCD may lose its last stars when the iterations end
    pairs = {n: stars for n, stars in outcome.pairs.items() if n not in excluded}
    return replace(outcome, pairs=pairs, excluded=excluded)


def _exclude_uncertain(outcome: _Outcome, max_formal_error: float) -> None:
    """Exclude CCDs whose formal error is too large."""
    for number, stars in list(outcome.pairs.items()):
        n_stars, error = int(stars.kept.sum()), outcome.fit.formal_error(stars.ccd)
        if error > max_formal_error or n_stars == 0:
            outcome.excluded[number] = (
                f"{n_stars} stars constrain its position only to {error:.2f} pixels "
                f"(exposure.astrometry.max_formal_error = {max_formal_error:g})"
            )
            del outcome.pairs[number]
            outcome.few |= {number}


def _solve_excluded(
    ccd: FieldCcd, outcome: _Outcome | None, field: ExposureField
) -> AstrometrySolution:
    """Solve a CCD that is not in the fit: by itself, or else with the solution of the exposure."""
    try:
        return _solve_alone(ccd, field)
    except CcdFailure as failure:
        if outcome is None:
            raise
        try:
            solution = _predicted_solution(ccd, outcome, field)
        except CcdFailure as unusable:
            why = f"{failure.message}; {unusable.message}"
            raise CcdFailure(failure.reason, why) from None
        _LOG.warning("CCD %d (%s) has the WCS of its exposure", ccd.number, failure.message)
        return solution


def _predicted_solution(
    ccd: FieldCcd, outcome: _Outcome, field: ExposureField
) -> AstrometrySolution:
    """Return the solution of the exposure for a CCD with too few stars for a solution of its own.

    Raise CcdFailure if it is too uncertain, or if the CCD has stars enough to contradict it.
    """
    model, error = model_of_missing_ccd(outcome.fit, outcome.pairs, ccd.where)
    # what was fitted to a few stars is not contradicted by others
    is_fitted = ccd.number in outcome.few
    if is_fitted and (formal_error := outcome.fit.formal_error(ccd.where)) < error:
        model, error = outcome.fit.model, formal_error
    limit = field.model_settings.max_predicted_error
    matches = min(references_on(ccd, model, field).size, ccd.sources.size)
    what = "the solution of the exposure cannot be used for the CCD"
    reason = Reason.NO_ASTROMETRIC_MATCH
    if matches >= field.settings.min_matches and not is_fitted:
        raise CcdFailure(reason, f"{what}: it has {matches} stars that should match")
    if error > limit:
        raise CcdFailure(
            reason,
            f"{what}: it tells where the CCD is to {error:.2f} pixels "
            f"(exposure.astrometry.max_predicted_error = {limit:g})",
        )
    with failing_ccd(Reason.ASTROMETRIC_FIT_FAILED, what, np.linalg.LinAlgError, WcsError):
        wcs = fit_tan_sip(lambda x, y: model.to_sky(ccd.where, x, y), ccd.stars.shape)
    none = np.zeros(0, np.intp)
    # one distance of the size of the error, so that all figures have a value
    expected = np.array([[error], [0.0]])
    described = describe_solution(
        wcs, none, none, expected, 0, model.order, pointing_error=_pointing_error(ccd, wcs, field)
    )
    nothing = np.zeros(0)
    return replace(described, residual_x=nothing, residual_y=nothing, is_predicted=True)


def _pointing_error(ccd: FieldCcd, wcs: WCS, field: ExposureField) -> float:
    """Return the distance of the centre of a CCD from its predicted position, arcminutes."""
    nx, ny = ccd.where.detector.size
    predicted = field.camera.pixel_to_sky(
        ccd.where.detector, (nx - 1) / 2.0, (ny - 1) / 2.0, field.ra, field.dec, field.rotation
    )
    return float(separation(*predicted, *wcs.wcs.crval)) * 60.0


def _ccd_solution(ccd: FieldCcd, outcome: _Outcome, field: ExposureField) -> AstrometrySolution:
    """Convert the model of a CCD to its own TAN-SIP WCS."""
    stars, model, where = outcome.pairs[ccd.number], outcome.fit.model, ccd.where
    what = "the solution of the exposure cannot be expressed as a TAN-SIP WCS of the CCD"
    with failing_ccd(Reason.ASTROMETRIC_FIT_FAILED, what, np.linalg.LinAlgError, WcsError):
        wcs = fit_tan_sip(lambda x, y: model.to_sky(where, x, y), ccd.stars.shape)
    kept = stars.kept
    i, k = stars.source_index[kept], stars.reference_index[kept]
    return describe_solution(
        wcs,
        i,
        k,
        residuals(wcs, ccd.stars.x[i], ccd.stars.y[i], stars.sky[:, kept]),
        int(np.sum(~kept)),
        model.order,
        pointing_error=_pointing_error(ccd, wcs, field),
    )


def _figures(field: ExposureField, outcome: _Outcome) -> ExposureFit:
    at_origin, offset = outcome.fit.model.recentred(), field.camera.rotation_offset
    # where +y of the focal plane points
    angle = np.radians(field.rotation + offset)
    xi, eta = at_origin.matrix @ [np.sin(angle), np.cos(angle)]
    n_kept = [int(stars.kept.sum()) for stars in outcome.pairs.values()]
    return ExposureFit(
        rotation=float((np.degrees(np.arctan2(xi, eta)) - offset) % 360.0),
        pointing_error=float(separation(field.ra, field.dec, *at_origin.crval)) * 60.0,
        n_stars=sum(n_kept),
        n_clipped=sum(stars.kept.size for stars in outcome.pairs.values()) - sum(n_kept),
        rms_pixel=outcome.rms,
        offset_sigma=outcome.fit.priors.offset,
        ccds={number: _terms(number, outcome) for number in sorted(outcome.pairs)},
    )


def _terms(number: int, outcome: _Outcome) -> CcdTerms:
    """Return the terms of a CCD in its own pixels."""
    stars, terms = outcome.pairs[number], outcome.fit.model.ccd_terms[number]
    jacobian = stars.ccd.jacobian
    offset = np.linalg.solve(jacobian, terms[:2])
    # the field may be a mirror image of the focal plane, but a CCD is not
    turn = np.sign(np.linalg.det(jacobian)) * terms[2] / stars.ccd.half
    return CcdTerms(
        offset=(float(offset[0]), float(offset[1])),
        rotation=float(np.degrees(turn)),
        formal_error=outcome.fit.formal_error(stars.ccd),
    )


def _solve_alone(ccd: FieldCcd, field: ExposureField) -> AstrometrySolution:
    """Solve a CCD by itself, with the stars of its own cone; raise CcdFailure."""
    references = field.references_of(ccd)
    if references.size == 0:
        raise CcdFailure(Reason.REFCAT_MISSES_FIELD, "no star of the reference catalogue is near")
    solution = solve_ccd(
        ccd.stars, field.refcat[references], field.predicted_wcs(ccd), field.settings
    )
    return replace(solution, reference_index=references[solution.reference_index])
