"""Matching the stars of all CCDs of an exposure with the reference catalogue."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from coaddflow.astrometry.ccd import (
    CcdMatch,
    match_ccd,
)
from coaddflow.astrometry.matching import SearchWindow, fit_similarity, match_nearest, match_pattern
from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.astrometry.refcat import stars_in_cone
from coaddflow.errors import CcdFailure
from coaddflow.exposure.field import CcdData, Field
from coaddflow.exposure.focal_plane import (
    CcdPairs,
    FieldFit,
    FieldModel,
)
from coaddflow.geometry.sphere import tan_deproject, tan_project
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings

log = logging.getLogger(__name__)
FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.intp]


_MAX_ANCHORS = 5
"""CCDs that are tried as the first to be found on the sky."""


_AGREEING = 0.3
"""Part of the CCDs that must be where the first one says."""


_FIELD_SHIFT = 0.01
"""How far, in units of the field's radius, the distortion may move a CCD at first."""


_FEW_STARS_CHANCE = 1e-2
"""Chance matches that are allowed for the few stars of a CCD whose place is known."""


class NoExposureFit(Exception):  # noqa: N818 - a result that travels as an exception
    """The CCDs of an exposure do not give a common solution; the text says why."""


def find_exposure(
    field_stars: Field,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> tuple[Field, FieldModel, dict[int, CcdPairs], float]:
    """Return the field where it points, a first model, the matched CCDs, and their chance."""
    tried = sum(ccd.sources.size >= _FEWEST_AT_FIRST for ccd in field_stars.ccds.values())
    shift = max(3.0 * exposure_settings.max_offset, _FIELD_SHIFT * field_stars.radius)
    most = None
    for start, chance in _candidates(field_stars, settings, exposure_settings):
        pointed, pairs = field_stars.pointed(start, 2.0 * shift), {}
        for number, ccd in pointed.ccds.items():
            found = _match_near(ccd, start, pointed, shift, settings)
            if found is not None:
                pairs[number] = found
        if len(pairs) >= max(exposure_settings.min_ccds, _AGREEING * tried):
            return pointed, start, pairs, chance
        most = max(most or 0, len(pairs))
    raise NoExposureFit(
        "it was not found on the sky"
        if most is None
        else f"only {most} of its CCDs agree on where it points"
    )


def _candidates(
    field_stars: Field,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> Iterator[tuple[FieldModel, float]]:
    """Yield where the exposure may be, with the chance: from all stars, then from one CCD."""
    together = _match_all_together(field_stars, settings, exposure_settings)
    if together is not None:
        yield together
    rich_first = sorted(field_stars.ccds.values(), key=lambda ccd: (-ccd.sources.size, ccd.number))
    for ccd in rich_first[:_MAX_ANCHORS]:
        try:
            match = _match_anchor(ccd, field_stars, settings)
        except CcdFailure as failure:
            log.debug("CCD %d does not tell where the exposure is: %s", ccd.number, failure)
        else:
            yield _model_from_ccd(ccd, match, field_stars), match.chance


def _match_anchor(ccd: CcdData, field_stars: Field, settings: AstrometrySettings) -> CcdMatch:
    """Find a CCD by itself, wherever the exposure points; raise CcdFailure."""
    stars = ccd.stars
    return match_ccd(
        stars.x,
        stars.y,
        stars.flux,
        field_stars.refcat[stars_in_cone(field_stars.refcat, *ccd.cone)],
        predicted_ccd(ccd, field_stars),
        stars.shape,
        settings,
    )


def _model_from_ccd(ccd: CcdData, match: CcdMatch, field_stars: Field) -> FieldModel:
    """Return the pointing, rotation and scale that put a CCD where its match says."""
    ny, nx = ccd.stars.shape
    y, x = (grid.ravel() for grid in np.mgrid[0 : ny - 1 : 5j, 0 : nx - 1 : 5j])
    matched, predicted = match.wcs.pixel_scale_matrix, ccd.where.jacobian
    flipped = bool(np.linalg.det(matched) * np.linalg.det(predicted) < 0)
    sky = np.stack(pixel_to_sky(match.wcs, x, y))
    return _rigid_model(ccd.where.field(x, y), sky, flipped, field_stars)


def _rigid_model(
    place: FloatArray, sky: FloatArray, flipped: bool, field_stars: Field
) -> FieldModel:
    """Return the model of shift, rotation and scale that puts places (2, n) to the sky (2, n)."""
    crval = np.array([field_stars.ra, field_stars.dec])
    z = place[0] + 1j * place[1]
    for _ in range(8):
        xi, eta = tan_project(*sky, *crval)
        similarity = fit_similarity(z, xi + 1j * eta, flipped)
        crval = np.array(tan_deproject(similarity.b.real, similarity.b.imag, *crval))
    a = similarity.a
    matrix = np.array([[a.real, -a.imag], [a.imag, a.real]])
    if flipped:
        matrix = matrix @ np.diag([1.0, -1.0])
    return FieldModel(crval, matrix, field_stars.radius)


def _match_all_together(
    field_stars: Field,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> tuple[FieldModel, float] | None:
    """Find the pattern of the brightest stars of all CCDs: no CCD needs to have many."""
    place = np.concatenate([ccd.place for ccd in field_stars.ccds.values()], axis=1)
    flux = np.concatenate([ccd.stars.flux[ccd.sources] for ccd in field_stars.ccds.values()])
    place = place[:, np.argsort(-flux, kind="stable")[: settings.max_sources]]
    if place.shape[1] < settings.min_matches:
        return None
    pixel = field_stars.camera.pixel_scale / 3600.0
    references = field_stars.by_magnitude
    catalogue = np.stack(
        tan_project(*field_stars.sky[:, references], field_stars.ra, field_stars.dec)
    )
    usable = np.isfinite(catalogue[0])
    references, catalogue = references[usable], catalogue[:, usable] / pixel
    wide = SearchWindow(
        settings.max_pointing_error / 60.0 / pixel,
        settings.max_rotation_error,
        settings.max_scale_error,
        settings.either_parity,
    )
    near = replace(wide, shift=min(wide.shift, 1.0 / 60.0 / pixel), either_parity=False)
    near = replace(near, rotation=min(1.5, wide.rotation), scale=min(0.005, wide.scale))
    match = match_pattern(
        place.T,
        catalogue.T,
        near,
        wide,
        settings.match_tolerance + exposure_settings.offset_sigma,
        settings.max_chance,
        settings.min_matches,
    )
    if match is None:
        return None
    sky = field_stars.sky[:, references[match.reference_index]]
    place = place[:, match.source_index]
    return _rigid_model(place, sky, match.similarity.flipped, field_stars), match.chance


def _match_window(
    ccd: CcdData,
    model: FieldModel,
    field_stars: Field,
    window: SearchWindow,
    tolerance: float,
    max_chance: float,
    min_matches: int,
) -> CcdPairs | None:
    """Match the pattern of a CCD's stars in a small window around its predicted place."""
    if min(ccd.near.size, ccd.sources.size) < min_matches:
        return None
    centre = model.expected(ccd.where, ccd.where.centre)
    catalogue = model.catalogue(field_stars.sky[:, ccd.near])
    expected = model.expected(ccd.where, ccd.place)
    match = match_pattern(
        (expected - centre).T,
        (catalogue - centre).T,
        window,
        window,
        tolerance,
        max_chance,
        min_matches,
    )
    if match is None:
        return None
    return _pairs(ccd, field_stars, match.source_index, ccd.near[match.reference_index])


def _pairs(ccd: CcdData, field_stars: Field, i: IndexArray, references: IndexArray) -> CcdPairs:
    return CcdPairs(
        ccd.where,
        ccd.place[:, i],
        field_stars.sky[:, references],
        ccd.error[i],
        ccd.sources[i],
        references,
        np.ones(i.size, bool),
    )


def _tolerance(ccd: CcdData, settings: AstrometrySettings) -> float:
    return max(settings.match_tolerance, 2e-3 * ccd.reach)


def _match_near(
    ccd: CcdData,
    model: FieldModel,
    field_stars: Field,
    shift: float,
    settings: AstrometrySettings,
) -> CcdPairs | None:
    """Match a CCD with a model that is exact to the distortion that nobody knows."""
    return _match_window(
        ccd,
        model,
        field_stars,
        SearchWindow(shift, _NEAR_ROTATION, _NEAR_SCALE, False),
        _tolerance(ccd, settings),
        settings.max_chance,
        _FEWEST_AT_FIRST,
    )


def match_placed(
    ccd: CcdData,
    fit: FieldFit,
    field_stars: Field,
    settings: AstrometrySettings,
    exposure_settings: ExposureAstrometrySettings,
) -> CcdPairs | None:
    """Match a CCD of few stars with a model of which only the CCD's own place is not known."""
    shift = 4.0 * fit.priors.offset + settings.match_tolerance
    rotation = float(np.degrees(4.0 * fit.priors.rotation / ccd.where.half))
    return _match_window(
        ccd,
        fit.model,
        field_stars,
        SearchWindow(shift, rotation, _NEAR_SCALE / 2.0, False),
        settings.match_tolerance,
        _FEW_STARS_CHANCE,
        _FEWEST,
    )


def match_again(
    ccd: CcdData, model: FieldModel, field_stars: Field, radius: float
) -> CcdPairs | None:
    """Match each star with the nearest one of the catalogue."""
    if ccd.near.size == 0:
        return None
    catalogue = model.catalogue(field_stars.sky[:, ccd.near])
    expected = model.expected(ccd.where, ccd.place)
    i, k, _ = match_nearest(cKDTree(catalogue.T), expected[0] + 1j * expected[1], radius)
    return _pairs(ccd, field_stars, i, ccd.near[k]) if i.size else None


def predicted_ccd(ccd: CcdData, field_stars: Field) -> WCS:
    """Return the WCS that a CCD would have if the pointing were right."""
    return predicted_wcs(
        field_stars.camera,
        ccd.where.detector,
        field_stars.ra,
        field_stars.dec,
        field_stars.rotation,
    )


_NEAR_ROTATION, _NEAR_SCALE = 0.5, 0.005


_FEWEST_AT_FIRST, _FEWEST = 3, 2
"""Fewest stars that can match a CCD before and after the others tell the distortion."""
