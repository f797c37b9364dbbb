"""The astrometric solution of a whole exposure, from the stars of all its CCDs.

The exposure is found on the sky by the pattern of the brightest stars of all CCDs, or of one CCD.
That tells where each CCD is, so that its stars are matched near predicted places, and a few are
enough. Then one model of the focal plane (`focal_plane.FieldModel`) is fitted to all stars. A CCD
that does not fit in is solved by itself, as `astrometry.solve_ccd` does, and so are all if the
exposure gives no solution.

References
----------
.. [1] Bertin 2006, ADASS XV, ASP Conf. 351, 112 (mosaics matched as one field).
.. [2] Bernstein et al. 2017, PASP 129, 074503 (one map for the exposure, one for each CCD).
.. [3] Bosch et al. 2018, PASJ 70, S5 (matches of CCDs, then a fit of the mosaic).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.astrometry.ccd import (
    AstrometrySolution,
    describe_solution,
    residuals,
    solve_ccd,
    supported_order,
)
from coaddflow.astrometry.refcat import stars_in_cone
from coaddflow.errors import CcdFailure, Reason
from coaddflow.exposure.field import CcdData, CcdStars, Field
from coaddflow.exposure.focal_plane import (
    CcdPairs,
    FieldFit,
    FieldModel,
    Priors,
    fit_field_clipped,
)
from coaddflow.exposure.matching import (
    NoExposureFit,
    find_exposure,
    match_again,
    match_placed,
    predicted_ccd,
)
from coaddflow.geometry.sphere import separation
from coaddflow.geometry.wcs import fit_tan_sip
from coaddflow.image.statistics import RAYLEIGH_MEDIAN
from coaddflow.instrument.camera import Camera
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.intp]


_FIRST_ORDER = 3

_MAX_ITERATIONS = 15


@dataclass(frozen=True)
class CcdTerms:
    """How a CCD fits into the solution of its exposure.

    Attributes
    ----------
    offset : tuple of float
        Where the CCD stands against the camera file, along its own x and y, pixels.
    rotation : float
        How it is turned against the camera file, degrees, from +x to +y of the focal plane.
    n_stars : int
        Its stars in the fit.
    rms_pixel : float
        Root of their mean squared distance from the catalogue, both axes together.
    formal_error : float
        Largest error of its WCS at its edge that follows from the errors of the stars, pixels.
    """

    offset: tuple[float, float]
    rotation: float
    n_stars: int
    rms_pixel: float
    formal_error: float


@dataclass(frozen=True)
class ExposureFit:
    """The figures of the fit to a whole exposure.

    Attributes
    ----------
    ra, dec, rotation : float
        Pointing (place of the focal plane's origin) and rotation, degrees.
    pointing_error : float
        Distance of the pointing from the predicted one, arcminutes.
    scale : float
        Scale over that of the camera file.
    order : int
        Order of the common polynomial.
    n_stars, n_clipped : int
        Stars in the fit, and matched stars left out as outliers.
    rms_pixel, rms_arcsec : float
        Root of the mean squared distance between stars and catalogue, both axes together.
    error_scale : float
        By how much residuals are larger than the errors of the stars say; at least 1.
    offset_sigma, rotation_sigma, shape_sigma : float
        What the exposure says about the settings of these names, pixels.
    chance : float
        Expected number of chance matches as good as that of the CCD that was found first.
    ccds : dict of int to CcdTerms
        The CCDs that are solved by the fit.
    """

    ra: float
    dec: float
    rotation: float
    pointing_error: float
    scale: float
    order: int
    n_stars: int
    n_clipped: int
    rms_pixel: float
    rms_arcsec: float
    error_scale: float
    offset_sigma: float
    rotation_sigma: float
    shape_sigma: float
    chance: float
    ccds: dict[int, CcdTerms]


@dataclass(frozen=True)
class ExposureAstrometry:
    """The solutions of all CCDs of an exposure.

    Attributes
    ----------
    solutions : dict of int to AstrometrySolution
        Solved CCDs. ``reference_index`` counts in the reference catalogue of the exposure, also
        for CCDs that are solved by themselves. For the others ``n_matched`` are the stars of the
        CCD in the fit of the exposure, ``order`` is that of the common polynomial.
    failures : dict of int to CcdFailure
        CCDs without a solution.
    fallbacks : dict of int to str
        Why a CCD is not solved with its exposure; it is in `solutions` or in `failures`.
    fit : ExposureFit or None
        None if the exposure gives no solution.
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
        The measured CCDs by their number. CCDs that have failed before are not in it.
    camera : Camera
        The camera.
    ra, dec, rotation : float
        Pointing and rotation from the exposure table, degrees; they may be as wrong as
        ``settings`` allow.
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
        Each CCD is in ``solutions`` or in ``failures``. A CCD that is not solved with the
        exposure gets the solution (or failure) that it would have by itself, with a warning in
        the log.
    """
    field_stars = Field.of(stars, camera, ra, dec, rotation, refcat, settings)
    solutions: dict[int, AstrometrySolution] = {}
    failures: dict[int, CcdFailure] = {}
    fit = None
    try:
        outcome = _fit_exposure(field_stars, settings, exposure_settings)
    except (NoExposureFit, np.linalg.LinAlgError) as reason:
        log.warning("the exposure is not solved as a whole: %s; each CCD by itself", reason)
        fallbacks = dict.fromkeys(sorted(stars), str(reason))
    else:
        fallbacks = outcome.excluded
        for number in sorted(outcome.pairs):
            solutions[number] = _ccd_solution(field_stars.ccds[number], outcome, field_stars)
        fit = _figures(field_stars, outcome)
        log.info(
            "%d stars of %d CCDs, rms %.3f pixels, pointing off by %.2f arcmin, "
            "CCDs off by %.2f pixels rms",
            fit.n_stars,
            len(fit.ccds),
            fit.rms_pixel,
            fit.pointing_error,
            np.sqrt(np.mean([np.square(terms.offset).mean() for terms in fit.ccds.values()])),
        )
        for number, reason in fallbacks.items():
            log.warning("CCD %d is solved by itself: %s", number, reason)
    for number in fallbacks:
        try:
            solutions[number] = _solve_alone(field_stars.ccds[number], field_stars, settings)
        except CcdFailure as failure:
            failures[number] = failure
    return ExposureAstrometry(dict(sorted(solutions.items())), failures, fallbacks, fit)


@dataclass
class _Outcome:
    """A fit in the making: matched CCDs, and those that do not fit in with the reason."""

    fit: FieldFit
    pairs: dict[int, CcdPairs]
    chance: float
    excluded: dict[int, str] = field(default_factory=dict)


def _fit_exposure(
    field_stars: Field,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> _Outcome:
    """Find the exposure on the sky and fit its model; raise NoExposureFit."""
    if len(field_stars.ccds) < exposure_settings.min_ccds:
        raise NoExposureFit(f"it has only {len(field_stars.ccds)} CCDs with sources")
    field_stars, start, pairs, chance = find_exposure(field_stars, settings, exposure_settings)
    outcome = _fit_agreeing(
        field_stars, start, pairs, chance, _FIRST_ORDER, settings, exposure_settings
    )
    for number, ccd in field_stars.ccds.items():
        if number in outcome.pairs or number in outcome.excluded:
            continue
        found = match_placed(ccd, outcome.fit, field_stars, settings, exposure_settings)
        if found is None:
            outcome.excluded[number] = (
                f"its {ccd.sources.size} sources are not where the exposure says"
            )
        else:
            outcome.pairs[number] = found
    outcome = _iterate(field_stars, outcome, settings, exposure_settings)
    _exclude_uncertain(outcome, exposure_settings)
    _check_exposure(outcome, settings, exposure_settings)
    return replace(outcome, excluded=dict(sorted(outcome.excluded.items())))


def _check_exposure(
    outcome: _Outcome,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> None:
    if len(outcome.pairs) < exposure_settings.min_ccds:
        raise NoExposureFit(f"only {len(outcome.pairs)} of its CCDs agree")
    rms = _rms(np.concatenate([_residual(outcome, n) for n in outcome.pairs], axis=1))
    if rms > settings.max_rms_pixels:
        raise NoExposureFit(
            f"the rms distance of its stars from the catalogue is {rms:.2f} pixels, above "
            f"astrometry.max_rms_pixels = {settings.max_rms_pixels:g}"
        )


def _residual(outcome: _Outcome, number: int) -> FloatArray:
    """Return the residuals of the stars of a CCD that are in the fit, field pixels."""
    stars = outcome.pairs[number]
    return stars.residual(outcome.fit.model)[:, stars.kept]


def _rms(residual: FloatArray) -> float:
    return float(np.sqrt(np.mean(np.sum(residual**2, axis=0))))


# Where the exposure is


# Which stars are which, once it is known where the exposure is


# The fit


def _fit_agreeing(
    field_stars: Field,
    start: FieldModel,
    pairs: dict[int, CcdPairs],
    chance: float,
    order: int,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
    priors: Priors | None = None,
) -> _Outcome:
    """Fit, leave out the CCD that fits in worst, and fit again, until all fit in."""
    excluded: dict[int, str] = {}
    limits = Priors.of(exposure_settings)
    while True:
        if len(pairs) < exposure_settings.min_ccds:
            raise NoExposureFit(f"only {len(pairs)} of its CCDs agree")
        chosen = _choose_order(pairs, field_stars, order, settings)
        fit, pairs = fit_field_clipped(pairs, start, chosen, limits, settings.clip_sigma, priors)
        start, priors = fit.model, fit.priors
        outcome = _Outcome(fit, pairs, chance, excluded)
        worst = _worst_ccd(outcome, exposure_settings)
        if worst is None:
            return outcome
        number, reason = worst
        excluded = {**excluded, number: reason}
        pairs = {n: stars for n, stars in pairs.items() if n != number}


def _choose_order(
    pairs: dict[int, CcdPairs], field_stars: Field, highest: int, settings: AstrometrySettings
) -> int:
    places = [stars.place[:, stars.kept] for stars in pairs.values()]
    edges = [ccd.where.edge for ccd in field_stars.ccds.values() if ccd.sources.size]
    radius = field_stars.radius
    stars, edge = (np.concatenate(parts, axis=1) / radius for parts in (places, edges))
    return max(1, supported_order(stars, edge, highest, settings))


def _worst_ccd(
    outcome: _Outcome, exposure_settings: ExposureAstrometrySettings
) -> tuple[int, str] | None:
    """Return the CCD that fits in worst, with the reason, or None if all are good."""
    fit = outcome.fit
    worst, reason, most = None, "", 1.0
    for number, stars in outcome.pairs.items():
        offset = float(np.hypot(*fit.model.ccd_terms[number][:2]))
        # of all matched stars: clipping would hide that those of this CCD scatter
        distance = np.hypot(*stars.residual(fit.model)) / stars.error
        ratio = float(np.median(distance)) / RAYLEIGH_MEDIAN / fit.error_scale
        for excess, text in (
            (
                offset / exposure_settings.max_offset,
                f"it stands {offset:.1f} pixels from where the camera file says, more than "
                f"exposure.astrometry.max_offset = {exposure_settings.max_offset:g}",
            ),
            (
                ratio / exposure_settings.max_rms_ratio,
                f"its residuals are {ratio:.1f} times those of the exposure",
            ),
        ):
            if excess > most:
                worst, reason, most = number, text, excess
    return None if worst is None else (worst, reason)


def _iterate(
    field_stars: Field,
    outcome: _Outcome,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> _Outcome:
    """Fit at full order and match again within smaller radii, until the same stars stay."""
    radius = 2.0 * settings.match_tolerance
    previous: list = []
    excluded = dict(outcome.excluded)
    pairs = outcome.pairs
    for _ in range(_MAX_ITERATIONS):
        outcome = _fit_agreeing(
            field_stars,
            outcome.fit.model,
            pairs,
            outcome.chance,
            exposure_settings.order,
            settings,
            exposure_settings,
            outcome.fit.priors,
        )
        excluded |= outcome.excluded
        now = [
            (number, stars.source_index.tobytes(), stars.kept.tobytes())
            for number, stars in outcome.pairs.items()
        ]
        distance = [np.hypot(*_residual(outcome, number)) for number in outcome.pairs]
        sigma = float(np.median(np.concatenate(distance))) / RAYLEIGH_MEDIAN
        limit = max(1.5 * settings.clip_sigma * sigma, 0.25 * settings.match_tolerance)
        if now == previous and radius <= limit:
            break
        radius, previous = min(radius, limit), now
        pairs = {}
        for number in outcome.pairs:
            again = match_again(field_stars.ccds[number], outcome.fit.model, field_stars, radius)
            if again is None:
                excluded[number] = "none of its sources is where the exposure says"
            else:
                pairs[number] = again
    # a CCD may lose its last stars when the iterations end
    pairs = {n: stars for n, stars in outcome.pairs.items() if n not in excluded}
    return replace(outcome, pairs=pairs, excluded=excluded)


def _exclude_uncertain(outcome: _Outcome, exposure_settings: ExposureAstrometrySettings) -> None:
    """Take out the CCDs that the fit does not tell well enough."""
    for number in list(outcome.pairs):
        n_stars = int(outcome.pairs[number].kept.sum())
        error = outcome.fit.formal_error(outcome.pairs[number].ccd)
        if error > exposure_settings.max_formal_error or n_stars == 0:
            outcome.excluded[number] = (
                f"{n_stars} stars tell its place to {error:.2f} pixels only "
                f"(exposure.astrometry.max_formal_error = {exposure_settings.max_formal_error:g})"
            )
            del outcome.pairs[number]


# What comes out


def _ccd_solution(ccd: CcdData, outcome: _Outcome, field_stars: Field) -> AstrometrySolution:
    """Write the model of a CCD as its own TAN-SIP WCS."""
    stars, shape = outcome.pairs[ccd.number], ccd.stars.shape
    model, where = outcome.fit.model, ccd.where
    wcs = fit_tan_sip(lambda x, y: model.to_sky(where, x, y), shape)
    centre = (ccd.where.detector.size[0] - 1) / 2.0, (ccd.where.detector.size[1] - 1) / 2.0
    predicted = field_stars.camera.pixel_to_sky(
        ccd.where.detector, *centre, field_stars.ra, field_stars.dec, field_stars.rotation
    )
    kept = stars.kept
    i, k = stars.source_index[kept], stars.reference_index[kept]
    return describe_solution(
        wcs,
        i,
        k,
        residuals(wcs, ccd.stars.x[i], ccd.stars.y[i], stars.sky[:, kept]),
        int(np.sum(~kept)),
        model.order,
        pointing_error=float(separation(*predicted, *wcs.wcs.crval)) * 60.0,
        chance=outcome.chance,
    )


def _figures(field_stars: Field, outcome: _Outcome) -> ExposureFit:
    """Return what the fit says about the exposure."""
    model, camera, priors = outcome.fit.model, field_stars.camera, outcome.fit.priors
    at_origin = model.recentred()
    # where +y of the focal plane points
    angle = np.radians(field_stars.rotation + camera.rotation_offset)
    xi, eta = at_origin.matrix @ [np.sin(angle), np.cos(angle)]
    residual = np.concatenate([_residual(outcome, n) for n in outcome.pairs], axis=1)
    scale = float(np.sqrt(abs(np.linalg.det(at_origin.matrix))))
    ra, dec = (float(value) for value in at_origin.crval)
    return ExposureFit(
        ra=ra,
        dec=dec,
        rotation=float((np.degrees(np.arctan2(xi, eta)) - camera.rotation_offset) % 360.0),
        pointing_error=float(separation(field_stars.ra, field_stars.dec, ra, dec)) * 60.0,
        scale=scale / (camera.pixel_scale / 3600.0),
        order=model.order,
        n_stars=residual.shape[1],
        n_clipped=sum(int(np.sum(~stars.kept)) for stars in outcome.pairs.values()),
        rms_pixel=_rms(residual),
        rms_arcsec=_rms(residual) * scale * 3600.0,
        error_scale=outcome.fit.error_scale,
        offset_sigma=priors.offset,
        rotation_sigma=priors.rotation,
        shape_sigma=priors.shape,
        chance=outcome.chance,
        ccds={number: _terms(number, outcome) for number in sorted(outcome.pairs)},
    )


def _terms(number: int, outcome: _Outcome) -> CcdTerms:
    stars, terms = outcome.pairs[number], outcome.fit.model.ccd_terms[number]
    jacobian = stars.ccd.jacobian
    offset = np.linalg.solve(jacobian, terms[:2])
    # the field may be a mirror image of the focal plane, of which CCDs are none
    turn = np.sign(np.linalg.det(jacobian)) * terms[2] / stars.ccd.half
    return CcdTerms(
        offset=(float(offset[0]), float(offset[1])),
        rotation=float(np.degrees(turn)),
        n_stars=int(stars.kept.sum()),
        rms_pixel=_rms(_residual(outcome, number)),
        formal_error=outcome.fit.formal_error(stars.ccd),
    )


def _solve_alone(
    ccd: CcdData, field_stars: Field, settings: AstrometrySettings
) -> AstrometrySolution:
    """Solve a CCD by itself, with the stars of its own cone; raise CcdFailure."""
    references = stars_in_cone(field_stars.refcat, *ccd.cone)
    if references.size == 0:
        raise CcdFailure(Reason.REFCAT_MISSES_FIELD, "no star of the reference catalogue is near")
    stars = ccd.stars
    solution = solve_ccd(
        stars.x,
        stars.y,
        stars.flux,
        field_stars.refcat[references],
        predicted_ccd(ccd, field_stars),
        stars.shape,
        settings,
        centroid_error=stars.centroid_error,
    )
    return replace(solution, reference_index=references[solution.reference_index])
