"""Which sources are stars: the narrow locus of equal size on the size-magnitude plane.

References
----------
.. [1] Kaiser, Squires & Broadhurst 1995, ApJ 449, 460, section 2 (half-light radius against
   magnitude).
.. [2] Bertin 2011, ASP Conf. Ser. 442, 435 (automatic selection by size).
"""

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from coaddflow.errors import CcdFailure, Reason, failing_ccd
from coaddflow.geometry.polynomial import design_matrix
from coaddflow.image.statistics import mad_sigma
from coaddflow.measure.detection import SourceFlag, common_size
from coaddflow.settings.psf import PsfSettings

_NOT_CLEAN = (
    SourceFlag.EDGE
    | SourceFlag.SATURATED
    | SourceFlag.BAD_PIXELS
    | SourceFlag.SUSPECT
    | SourceFlag.NO_CENTROID
)

_ENOUGH_STARS = 20
_ENOUGH_FOR_SCATTER = 5
"""Of fewer stars the scatter is not known, and any of `size_tolerance` is allowed."""

_SMALLEST_TOLERANCE = 0.02
_ISOLATION_RADIUS = 3.0
_NEIGHBOUR_FRACTION = 0.05

_NO_DRIFT = "the size of stars cannot be fitted over the CCD"


def select_stars(sources: Table, settings: PsfSettings) -> NDArray[np.bool_]:
    """Select the stars that a PSF can be made from [1]_ [2]_.

    Stars are bright, whole, isolated, and have the same half-light radius, up to a polynomial
    over the CCD of second order (fewer stars: lower).

    Parameters
    ----------
    sources : astropy.table.Table
        From `detection.detect_sources`.
    settings : PsfSettings
        Limits of brightness and size; fewest and most stars.

    Returns
    -------
    ndarray of bool, shape (n sources,)
        True for stars; at most ``settings.max_stars``, the brightest.

    Raises
    ------
    CcdFailure
        ``no_psf_stars`` if fewer than ``settings.min_stars`` are found.
    """
    clean = (np.asarray(sources["flags"]) & int(_NOT_CLEAN)) == 0
    clean &= np.asarray(sources["half_light_radius"]) > 0
    radius = _ISOLATION_RADIUS * float(np.median(sources["fwhm"]))
    isolated = clean & is_isolated(sources, radius, _NEIGHBOUR_FRACTION)
    signal_to_noise = np.asarray(sources["signal_to_noise"])
    single = (np.asarray(sources["flags"]) & int(SourceFlag.BLENDED)) == 0
    best = np.zeros(len(sources), dtype=bool)
    for fraction, candidates in (
        (1.0, isolated & single),
        (1.0, isolated),
        (0.4, isolated),
        (0.2, isolated),
        (0.2, clean & single),
        (0.2, clean),
    ):
        bright = candidates & (signal_to_noise > fraction * settings.min_signal_to_noise)
        stars = _of_one_size(sources, bright, settings)
        if np.count_nonzero(stars) > np.count_nonzero(best):
            best = stars
        if np.count_nonzero(best) >= _ENOUGH_STARS:
            break
    if np.count_nonzero(best) < settings.min_stars:
        raise CcdFailure(
            Reason.NO_PSF_STARS,
            f"{np.count_nonzero(best)} clean stars among {len(sources)} sources, "
            f"{settings.min_stars} are needed",
        )
    brightest = np.flatnonzero(best)
    brightest = brightest[np.argsort(-np.asarray(sources["flux_isophotal"])[brightest])]
    best[brightest[settings.max_stars :]] = False
    return best


def is_isolated(sources: Table, radius: float, fraction: float) -> NDArray[np.bool_]:
    """Return which sources of a table from `detection.detect_sources` have no neighbour.

    Neighbours count within ``radius`` pixels if they have this ``fraction`` of the source's flux.
    """
    xy = np.column_stack([sources["x"], sources["y"]])
    flux = np.asarray(sources["flux_isophotal"])
    pairs = cKDTree(xy).query_pairs(radius, output_type="ndarray")
    isolated = np.ones(len(sources), dtype=bool)
    for one, other in (pairs.T, pairs.T[::-1]):
        isolated[one[flux[other] > fraction * flux[one]]] = False
    return isolated


def _of_one_size(
    sources: Table, candidates: NDArray[np.bool_], settings: PsfSettings
) -> NDArray[np.bool_]:
    """Return the candidates on the stellar locus, which may drift over the CCD."""
    stars = np.zeros(len(sources), dtype=bool)
    index = np.flatnonzero(candidates)
    if index.size < 2:
        stars[index] = True
        return stars
    size = np.log(np.asarray(sources["half_light_radius"])[index])
    terms = _drift_terms(np.asarray(sources["x"])[index], np.asarray(sources["y"])[index])
    deviation = size - np.log(common_size(np.exp(size)))
    tolerance = 2.0 * settings.size_tolerance
    for _ in range(5):
        on_locus = np.abs(deviation) < tolerance
        n = np.count_nonzero(on_locus)
        used = terms[:, : 6 if n >= 40 else 3 if n >= 15 else 1]
        with failing_ccd(Reason.NO_PSF_STARS, _NO_DRIFT, np.linalg.LinAlgError):
            drift = used @ np.linalg.lstsq(used[on_locus], size[on_locus], rcond=None)[0]
        deviation = size - drift
        deviation -= np.median(deviation[on_locus])
        scatter = mad_sigma(deviation[on_locus], 0.0)
        if n < _ENOUGH_FOR_SCATTER:
            scatter = np.inf
        tolerance = np.clip(3.0 * scatter, _SMALLEST_TOLERANCE, settings.size_tolerance)
    stars[index[np.abs(deviation) < tolerance]] = True
    return stars


def _drift_terms(x: NDArray, y: NDArray) -> NDArray[np.float64]:
    """Return the terms of second order, shape (n, 6), of positions scaled to order unity."""
    scale = max(float(np.ptp(x)), float(np.ptp(y)), 1.0) / 2.0
    u, v = (x - x.mean()) / scale, (y - y.mean()) / scale
    return design_matrix(u, v, 2)
