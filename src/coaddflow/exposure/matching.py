"""Matching the stars of all CCDs of an exposure with the reference catalogue.

First the exposure is located from the pattern of the brightest stars of all CCDs, or of one CCD.
Then each CCD is matched near its predicted position, for which a few stars suffice.
"""

import logging
from collections.abc import Iterator

import numpy as np
from astropy.wcs import WCS
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import bdtrc

from coaddflow.astrometry.ccd import match_ccd, search_windows
from coaddflow.astrometry.matching import SearchWindow, fit_similarity, match_nearest, match_pattern
from coaddflow.errors import CcdFailure
from coaddflow.exposure.field import ExposureField, FieldCcd
from coaddflow.exposure.focal_plane import CcdPairs, FieldModel, Priors
from coaddflow.geometry.sphere import tan_deproject, tan_project
from coaddflow.geometry.wcs import pixel_to_sky

_LOG = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

_MAX_ANCHORS = 5
"""Number of CCDs from which it is tried to locate the exposure."""

_AGREEING = 0.3
"""Fraction of the CCDs that must agree on the pointing."""

_FIELD_SHIFT = 0.01
"""Largest shift of a CCD by unknown distortion, in units of the field's radius."""

_NEAR_ROTATION, _NEAR_SCALE = 0.5, 0.005
"""Largest rotation (degrees) and change of scale of a CCD by unknown distortion."""

_FEWEST_AT_FIRST, _FEWEST = 3, 2
"""Fewest matched stars of a CCD, before and after the distortion is known."""

_FEW_STARS_CHANCE = 1e-2
"""Expected chance matches that are allowed for the few stars of a CCD of known position."""


class ExposureNotSolved(Exception):  # noqa: N818 - a result that travels as an exception
    """The CCDs of an exposure have no common solution; the text says why."""


def locate_exposure(field: ExposureField) -> tuple[ExposureField, FieldModel, dict[int, CcdPairs]]:
    """Find where an exposure points; raise ExposureNotSolved.

    Returns the field with the reference stars near each CCD; a model of pointing, rotation and
    scale; and the matched stars of the CCDs that agree with it.
    """
    tried = sum(ccd.sources.size >= _FEWEST_AT_FIRST for ccd in field.ccds.values())
    shift = max(3.0 * field.model_settings.max_offset, _FIELD_SHIFT * field.radius)
    most = None
    for start in _candidates(field):
        pointed, pairs = field.pointed(start, 2.0 * shift), {}
        for number, ccd in pointed.ccds.items():
            found = _match_undistorted(ccd, start, pointed, shift)
            if found is not None:
                pairs[number] = found
        if len(pairs) >= max(field.model_settings.min_ccds, _AGREEING * tried):
            return pointed, start, pairs
        most = max(most or 0, len(pairs))
    raise ExposureNotSolved(
        "it was not found on the sky"
        if most is None
        else f"only {most} of its CCDs agree on where it points"
    )


def _candidates(field: ExposureField) -> Iterator[FieldModel]:
    """Yield possible pointings: from all CCDs together, then from single CCDs."""
    together = _match_all_together(field)
    if together is not None:
        yield together
    rich_first = sorted(field.ccds.values(), key=lambda ccd: (-ccd.sources.size, ccd.number))
    for ccd in rich_first[:_MAX_ANCHORS]:
        references, predicted = field.refcat[field.references_of(ccd)], field.predicted_wcs(ccd)
        try:
            wcs = match_ccd(ccd.stars, references, predicted, field.settings)
        except CcdFailure as failure:
            _LOG.debug("CCD %d does not locate the exposure: %s", ccd.number, failure)
        else:
            yield _model_from_ccd(ccd, wcs, field)


def _match_all_together(field: ExposureField) -> FieldModel | None:
    """Match the pattern of the brightest stars of all CCDs: no single CCD needs many."""
    settings = field.settings
    place = np.concatenate([ccd.place for ccd in field.ccds.values()], axis=1)
    flux = np.concatenate([ccd.stars.flux[ccd.sources] for ccd in field.ccds.values()])
    place = place[:, np.argsort(-flux, kind="stable")[: settings.max_sources]]
    if place.shape[1] < settings.min_matches:
        return None
    pixel = field.camera.pixel_scale / 3600.0
    references = field.by_magnitude
    catalogue = np.stack(tan_project(*field.sky[:, references], field.ra, field.dec))
    usable = np.isfinite(catalogue[0])
    references, catalogue = references[usable], catalogue[:, usable] / pixel
    match = match_pattern(
        place.T,
        catalogue.T,
        *search_windows(pixel, settings),
        settings.match_tolerance + field.model_settings.offset_sigma,
        settings.max_chance,
        settings.min_matches,
    )
    if match is None:
        return None
    sky = field.sky[:, references[match.reference_index]]
    place = place[:, match.source_index]
    return _rigid_model(place, sky, match.similarity.flipped, field)


def _model_from_ccd(ccd: FieldCcd, wcs: WCS, field: ExposureField) -> FieldModel:
    """Return the pointing, rotation and scale that follow from the matched WCS of a CCD."""
    ny, nx = ccd.stars.shape
    y, x = (grid.ravel() for grid in np.mgrid[0 : ny - 1 : 5j, 0 : nx - 1 : 5j])
    matched, predicted = wcs.pixel_scale_matrix, ccd.where.jacobian
    flipped = bool(np.linalg.det(matched) * np.linalg.det(predicted) < 0)
    sky = np.stack(pixel_to_sky(wcs, x, y))
    return _rigid_model(ccd.where.field(x, y), sky, flipped, field)


def _rigid_model(
    place: FloatArray, sky: FloatArray, flipped: bool, field: ExposureField
) -> FieldModel:
    """Return the shift, rotation and scale that take positions (2, n) to the sky (2, n)."""
    crval = np.array([field.ra, field.dec])
    z = place[0] + 1j * place[1]
    for _ in range(8):
        xi, eta = tan_project(*sky, *crval)
        similarity = fit_similarity(z, xi + 1j * eta, flipped)
        crval = np.array(tan_deproject(similarity.b.real, similarity.b.imag, *crval))
    a = similarity.a
    matrix = np.array([[a.real, -a.imag], [a.imag, a.real]])
    if flipped:
        matrix = matrix @ np.diag([1.0, -1.0])
    return FieldModel(crval, matrix, field.radius)


def _match_undistorted(
    ccd: FieldCcd, model: FieldModel, field: ExposureField, shift: float
) -> CcdPairs | None:
    """Match a CCD with a model that lacks only the unknown part of the distortion."""
    window = SearchWindow(shift, _NEAR_ROTATION, _NEAR_SCALE, False)
    tolerance = max(field.settings.match_tolerance, 2e-3 * ccd.reach)
    chance = field.settings.max_chance
    return _match_window(ccd, model, field, window, tolerance, chance, _FEWEST_AT_FIRST)


def match_sparse_ccd(
    ccd: FieldCcd, model: FieldModel, error: float, priors: Priors, field: ExposureField
) -> CcdPairs | None:
    """Match a CCD of few stars with a fitted model that lacks only the terms of the CCD.

    Parameters
    ----------
    ccd : FieldCcd
        The CCD.
    model : FieldModel
        The model, fitted to other CCDs.
    error : float
        Expected error of the model on this CCD, field pixels.
    priors : Priors
        Widths of the terms of CCDs.
    field : ExposureField
        The exposure.
    """
    tolerance = field.settings.match_tolerance
    rotation = float(np.degrees(4.0 * priors.rotation / ccd.where.half))
    window = SearchWindow(4.0 * priors.offset + tolerance, rotation, _NEAR_SCALE / 2.0, False)
    found = _match_window(ccd, model, field, window, tolerance, _FEW_STARS_CHANCE, _FEWEST)
    return found or _match_shifted(ccd, model, error, field)


def _match_shifted(
    ccd: FieldCcd, model: FieldModel, error: float, field: ExposureField
) -> CcdPairs | None:
    """Match a CCD whose place is known so well that two stars with the same shift are no chance.

    Chance is the number of reference stars that would have a source within the error, and as many
    others with the same shift, if the sources lay anywhere on the CCD.
    """
    tolerance = field.settings.match_tolerance
    radius = 2.0 * error + tolerance
    near = references_on(ccd, model, field)
    if not np.isfinite(radius) or min(near.size, ccd.sources.size) < _FEWEST:
        return None
    catalogue = model.catalogue(field.sky[:, near])
    expected = model.expected(ccd.where, ccd.place)
    z = expected[0] + 1j * expected[1]
    i, k, _ = match_nearest(cKDTree(catalogue.T), z, radius)
    if i.size < _FEWEST:
        return None
    shift = catalogue[0, k] + 1j * catalogue[1, k] - z[i]
    alike = np.abs(shift[:, None] - shift) <= tolerance
    kept = alike[np.argmax(alike.sum(axis=0))]
    density = ccd.sources.size / np.prod(ccd.where.detector.size)
    by_chance, same = (1.0 - np.exp(-np.pi * reach**2 * density) for reach in (radius, tolerance))
    others = int(kept.sum()) - 1
    if near.size * by_chance * bdtrc(others - 1, near.size - 1, same) > _FEW_STARS_CHANCE:
        return None
    return field.pairs(ccd, i[kept], near[k[kept]])


def _match_window(
    ccd: FieldCcd,
    model: FieldModel,
    field: ExposureField,
    window: SearchWindow,
    tolerance: float,
    max_chance: float,
    min_matches: int,
) -> CcdPairs | None:
    """Match the pattern of a CCD's stars in a small window around its predicted position."""
    if min(ccd.near.size, ccd.sources.size) < min_matches:
        return None
    centre = model.expected(ccd.where, ccd.where.centre)
    catalogue = model.catalogue(field.sky[:, ccd.near]) - centre
    expected = model.expected(ccd.where, ccd.place) - centre
    match = match_pattern(
        expected.T, catalogue.T, window, window, tolerance, max_chance, min_matches
    )
    if match is None:
        return None
    return field.pairs(ccd, match.source_index, ccd.near[match.reference_index])


def references_on(ccd: FieldCcd, model: FieldModel, field: ExposureField) -> NDArray[np.intp]:
    """Return the rows of the reference stars on a CCD, as a model has it."""
    catalogue = model.catalogue(field.sky)
    centre = model.expected(ccd.where, ccd.where.centre)
    x, y = np.linalg.solve(ccd.where.jacobian, catalogue - centre)
    nx, ny = ccd.where.detector.size
    # NaN compares as false
    return np.flatnonzero((np.abs(x) < nx / 2.0) & (np.abs(y) < ny / 2.0))


def match_nearest_stars(
    ccd: FieldCcd, model: FieldModel, field: ExposureField, radius: float
) -> CcdPairs | None:
    """Match each star with the nearest reference star within a radius, field pixels."""
    if ccd.near.size == 0:
        return None
    catalogue = model.catalogue(field.sky[:, ccd.near])
    expected = model.expected(ccd.where, ccd.place)
    i, k, _ = match_nearest(cKDTree(catalogue.T), expected[0] + 1j * expected[1], radius)
    return field.pairs(ccd, i, ccd.near[k]) if i.size else None
