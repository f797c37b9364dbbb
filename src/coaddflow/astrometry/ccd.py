"""The astrometric solution of one CCD: match with the catalogue, then fit a TAN-SIP WCS.

The prediction of the camera file gives the distortion, and a pointing that may be far off. Match
(`match_ccd`) and fit (`fit_ccd`) are separate, so that one CCD can show where the exposure points.

References
----------
.. [1] Shupe et al. 2005, ADASS XIV, ASP Conf. 347, 491 (SIP).
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS, WcsError
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from coaddflow.astrometry.matching import SearchWindow, match_nearest, match_pattern
from coaddflow.errors import CcdFailure, Reason, failing_ccd
from coaddflow.geometry.polynomial import design_matrix, evaluate, term_powers
from coaddflow.geometry.sphere import separation, tan_deproject, tan_project
from coaddflow.geometry.wcs import fit_tan_sip, pixel_to_sky, plane_to_tan_sip
from coaddflow.image.statistics import RAYLEIGH_MEDIAN
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.solution import TractAstrometrySettings

log = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

_NEAR_SHIFT = 1.0 / 60.0  # degrees; the pointing of most telescopes is better than this
_NEAR_ROTATION = 1.5
_NEAR_SCALE = 0.005
_MAX_ITERATIONS = 15

_NO_FIT = "a WCS cannot be fitted to the matched stars"
_NO_SIP = "the mapping to the sky cannot be expressed as a TAN-SIP WCS"


@dataclass(frozen=True)
class CcdStars:
    """What astrometry needs of the sources of a CCD.

    Attributes
    ----------
    x, y : ndarray of float64, shape (n,)
        Positions, 0-based pixels.
    flux : ndarray of float64, shape (n,)
        Fluxes in any unit common to all CCDs; only the order matters.
    centroid_error : ndarray of float64, shape (n,)
        Errors of the positions, one axis, pixels.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    """

    x: FloatArray
    y: FloatArray
    flux: FloatArray
    centroid_error: FloatArray
    shape: tuple[int, int]

    @classmethod
    def of(cls, sources: Table, shape: tuple[int, int]) -> "CcdStars":
        """Take the columns from the sources of a measured CCD."""
        # saturated stars, the best known ones, have an isophotal flux but may have no PSF flux
        names = ("x", "y", "flux_isophotal", "x_error")
        return cls(*(np.array(sources[name], dtype=float) for name in names), shape)

    def brightest_first(self, n_max: int) -> NDArray[np.intp]:
        """Return the rows of the brightest sources with finite positions, brightest first."""
        finite = np.isfinite(self.x) & np.isfinite(self.y)
        order = np.argsort(-self.flux, kind="stable")
        return order[finite[order]][:n_max]


@dataclass(frozen=True)
class AstrometrySolution:
    """The fitted WCS of a CCD.

    Attributes
    ----------
    wcs : astropy.wcs.WCS
        TAN-SIP, tangent point at the centre of the CCD.
    source_index, reference_index : ndarray of int, shape (n_matched,)
        Stars in the fit, as rows of the sources and of the reference catalogue.
    residual_x, residual_y : ndarray of float64, shape (n_matched,)
        Measured minus catalogue position, pixels.
    rms_arcsec, rms_pixel : float
        Root of the mean squared distance, both axes together.
    n_matched, n_clipped : int
        Stars in the fit, and matched stars left out as outliers.
    order : int
        Order of the fitted polynomial; 0 if only shift, rotation and scale were fitted.
    pixel_scale : float
        Arcseconds per pixel at the centre.
    rotation : float
        Position angle of +y at the centre, from north through east, degrees, -180 to 180.
    pointing_error : float
        Distance of the CCD's centre from its predicted place, arcminutes.
    is_predicted : bool
        It has no fit of its own: the WCS is that of its exposure, and the rms its expected error.
    """

    wcs: WCS
    source_index: NDArray[np.intp]
    reference_index: NDArray[np.intp]
    residual_x: FloatArray
    residual_y: FloatArray
    rms_arcsec: float
    rms_pixel: float
    n_matched: int
    n_clipped: int
    order: int
    pixel_scale: float
    rotation: float
    pointing_error: float = 0.0
    is_predicted: bool = False


def solve_ccd(
    stars: CcdStars, refcat: Table, initial_wcs: WCS, settings: AstrometrySettings
) -> AstrometrySolution:
    """Match the sources of a CCD with the reference catalogue and fit its WCS.

    Parameters
    ----------
    stars : CcdStars
        The sources; the errors of their positions weight the fit.
    refcat : astropy.table.Table
        Columns ra, dec (ICRS degrees at the epoch of the exposure) and mag; should cover the
        CCD wherever it may point (see `refcat.ccd_cone`).
    initial_wcs : astropy.wcs.WCS
        The predicted WCS, with the approximate distortion.
    settings : AstrometrySettings
        Limits of the search and of the fit.

    Raises
    ------
    CcdFailure
        With the reason too_few_stars, no_astrometric_match, astrometric_fit_failed or
        astrometry_rms.
    """
    matched = match_ccd(stars, refcat, initial_wcs, settings)
    fit = fit_ccd(stars, refcat, matched, settings)
    if fit.rms_pixel > settings.max_rms_pixels:
        raise CcdFailure(
            Reason.ASTROMETRY_RMS,
            f"{fit.n_matched} stars matched, but their rms distance from the catalogue is "
            f"{fit.rms_pixel:.2f} pixels, above astrometry.max_rms_pixels = "
            f"{settings.max_rms_pixels:g}",
        )
    ny, nx = stars.shape
    before, after = (
        pixel_to_sky(wcs, (nx - 1) / 2.0, (ny - 1) / 2.0) for wcs in (initial_wcs, fit.wcs)
    )
    return replace(fit, pointing_error=float(separation(*before, *after)) * 60.0)


def match_ccd(
    stars: CcdStars, refcat: Table, initial_wcs: WCS, settings: AstrometrySettings
) -> WCS:
    """Return the predicted WCS, moved, turned and scaled as a match with the catalogue says.

    Positions are compared on an undistorted CCD: the sources with the predicted distortion taken
    out, the reference stars projected onto the tangent plane of the predicted centre and divided
    by the predicted pixel matrix. See `solve_ccd` for the parameters.

    Raises
    ------
    CcdFailure
        With the reason too_few_stars, no_astrometric_match or astrometric_fit_failed.
    """
    prior = _TanSip.approximating(initial_wcs, stars.shape)
    sources = stars.brightest_first(settings.max_sources)
    sky = np.stack([np.asarray(refcat[name], float) for name in ("ra", "dec")])
    references = np.argsort(np.asarray(refcat["mag"], float), kind="stable")
    if min(sources.size, references.size) < settings.min_matches:
        raise CcdFailure(
            Reason.TOO_FEW_STARS,
            f"{sources.size} sources and {references.size} reference stars: at least "
            f"{settings.min_matches} of each are needed (astrometry.min_matches)",
        )
    expected = prior.undistort(stars.x[sources], stars.y[sources])
    catalogue = prior.project(sky[:, references])
    in_front = np.isfinite(catalogue[0])
    references, catalogue = references[in_front], catalogue[:, in_front]
    match = match_pattern(
        expected.T,
        catalogue.T,
        *search_windows(np.sqrt(abs(np.linalg.det(prior.cd))), settings),
        _tolerance(stars.shape, settings),
        settings.max_chance,
        settings.min_matches,
    )
    if match is None:
        raise CcdFailure(
            Reason.NO_ASTROMETRIC_MATCH,
            f"{sources.size} sources do not fit {references.size} reference stars within "
            f"{settings.max_pointing_error:g} arcmin of RA {prior.crval[0]:.4f} Dec "
            f"{prior.crval[1]:.4f}: check the pointing, the pixel scale of the camera file and "
            "the reference catalogue",
        )

    def to_sky(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        expected = prior.undistort(x, y)
        moved = match.similarity(expected[0] + 1j * expected[1])
        return tan_deproject(*(prior.cd @ np.stack([moved.real, moved.imag])), *prior.crval)

    return _tan_sip(to_sky, stars.shape)


def fit_ccd(
    stars: CcdStars, refcat: Table, start_wcs: WCS, settings: AstrometrySettings
) -> AstrometrySolution:
    """Fit a TAN-SIP WCS [1]_, beginning with one that is good to a few pixels.

    Stars are matched, the polynomial is fitted with clipping, and both are repeated with a
    smaller radius until nothing changes. The polynomial of order ``settings.sip_order``, or lower
    where stars are few or leave a corner empty, is added to the distortion of ``start_wcs``: at
    order 1 only the linear part is fitted, and at order 0 only shift, rotation and scale. See
    `solve_ccd` for the parameters.

    Raises
    ------
    CcdFailure
        With the reason too_few_stars or astrometric_fit_failed.
    """
    xy = np.stack([stars.x, stars.y])
    sources = stars.brightest_first(settings.max_sources)
    sky = np.stack([np.asarray(refcat[name], float) for name in ("ra", "dec")])
    known = np.isfinite(stars.centroid_error)
    error = np.hypot(np.where(known, stars.centroid_error, np.inf), settings.centroid_floor)
    prior = state = _TanSip.approximating(start_wcs, stars.shape)
    radius = 2.0 * _tolerance(stars.shape, settings)
    previous: tuple = ()
    for _ in range(_MAX_ITERATIONS):
        i, k = _match_near(state, xy[:, sources], sky, radius)
        i = sources[i]
        order = _choose_order(xy[:, i], stars.shape, settings)
        if order is None:
            raise CcdFailure(
                Reason.TOO_FEW_STARS,
                f"only {i.size} sources lie near a reference star: at least "
                f"{settings.min_matches} are needed (astrometry.min_matches)",
            )
        state, residual, kept = _fit_clipped(
            state, prior, (xy[:, i], sky[:, k], error[i]), order, settings.clip_sigma
        )
        now = (order, i.tobytes(), k.tobytes(), kept.tobytes())
        sigma = np.median(np.hypot(*residual[:, kept])) / RAYLEIGH_MEDIAN
        limit = max(1.5 * settings.clip_sigma * sigma, 0.25 * settings.match_tolerance)
        if now == previous and radius <= limit:
            break
        radius, previous = min(radius, limit), now
    if kept.sum() < settings.min_matches:
        raise CcdFailure(
            Reason.TOO_FEW_STARS,
            f"only {kept.sum()} sources agree with a reference star: at least "
            f"{settings.min_matches} are needed (astrometry.min_matches)",
        )
    wcs = _fitted_wcs(state, stars.shape)
    log.debug("%d stars, order %d", kept.sum(), order)
    return describe_solution(wcs, i[kept], k[kept], residual[:, kept], int(np.sum(~kept)), order)


def supported_order(
    stars: FloatArray,
    edge: FloatArray,
    highest: int,
    settings: AstrometrySettings | TractAstrometrySettings,
) -> int:
    """Return the highest order of a polynomial that stars support, 0 if not even the first.

    A polynomial is supported if there are enough stars for its terms, and if its formal error
    is small everywhere: the error at a point is that of one star times the root of the point's
    leverage. Limits are ``stars_per_term`` and ``max_corner_error`` of the settings.

    Parameters
    ----------
    stars, edge : ndarray, shapes (2, n) and (2, m)
        Positions of the stars, about -1 to 1, and points in the same unit where the error is
        computed.
    highest : int
        Order to begin with.
    """
    for order in range(highest, 0, -1):
        n_terms = len(term_powers(order))
        if stars.shape[1] < settings.stars_per_term * n_terms:
            continue
        r = np.linalg.qr(design_matrix(*stars, order), mode="r")
        if np.abs(np.diag(r)).min() < 1e-8 * np.abs(np.diag(r)).max():
            continue
        at_edge = np.linalg.solve(r.T, design_matrix(*edge, order).T)
        if np.linalg.norm(at_edge, axis=0).max() <= settings.max_corner_error:
            return order
    return 0


def describe_solution(
    wcs: WCS,
    source_index: NDArray[np.intp],
    reference_index: NDArray[np.intp],
    residual: FloatArray,
    n_clipped: int,
    order: int,
    pointing_error: float = 0.0,
) -> AstrometrySolution:
    """Return a solution with the figures that follow from its WCS and its residuals.

    Residuals are measured minus catalogue positions in pixels, shape (2, n); all other parameters
    are attributes of `AstrometrySolution`. The tangent point must be the centre of the CCD.
    """
    cd = np.array(wcs.pixel_scale_matrix)
    on_sky = cd @ residual * 3600.0
    north = np.linalg.solve(cd, [0.0, 1.0])
    parity = -np.sign(np.linalg.det(cd))
    return AstrometrySolution(
        wcs=wcs,
        source_index=source_index,
        reference_index=reference_index,
        residual_x=residual[0],
        residual_y=residual[1],
        rms_arcsec=float(np.sqrt(np.mean(np.sum(on_sky**2, axis=0)))),
        rms_pixel=float(np.sqrt(np.mean(np.sum(residual**2, axis=0)))),
        n_matched=int(source_index.size),
        n_clipped=n_clipped,
        order=order,
        pixel_scale=float(np.sqrt(abs(np.linalg.det(cd))) * 3600.0),
        rotation=float(parity * np.degrees(np.arctan2(north[0], north[1]))),
        pointing_error=pointing_error,
    )


def residuals(wcs: WCS, x: FloatArray, y: FloatArray, sky: FloatArray) -> FloatArray:
    """Return measured minus catalogue position in undistorted pixels, shape (2, n).

    The WCS is TAN-SIP with its tangent point at the centre of the CCD; ``sky``, shape (2, n), are
    the ICRS positions of the stars in the catalogue, degrees.
    """
    return _TanSip.of(wcs).residual(x, y, sky)


@dataclass(frozen=True)
class _TanSip:
    """The numbers of a TAN-SIP WCS whose reference pixel is the centre of the CCD, 0-based."""

    crval: FloatArray
    crpix: FloatArray
    cd: FloatArray
    a: FloatArray
    b: FloatArray

    @classmethod
    def approximating(cls, wcs: WCS, shape: tuple[int, int]) -> "_TanSip":
        """Return that of a WCS of any kind, by a fit that is good to 1e-4 pixel."""
        return cls.of(_tan_sip(lambda x, y: pixel_to_sky(wcs, x, y), shape))

    @classmethod
    def of(cls, wcs: WCS) -> "_TanSip":
        """Return that of a TAN-SIP WCS whose reference pixel is the centre of the CCD."""
        zero = np.zeros((2, 2))
        return cls(
            np.array(wcs.wcs.crval),
            np.array(wcs.wcs.crpix) - 1.0,
            np.array(wcs.pixel_scale_matrix),
            np.array(wcs.sip.a) if wcs.sip is not None else zero,
            np.array(wcs.sip.b) if wcs.sip is not None else zero,
        )

    def undistort(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return undistorted pixels, counted from the reference pixel, shape (2, n)."""
        u, v = x - self.crpix[0], y - self.crpix[1]
        return np.stack([u + evaluate(self.a, u, v), v + evaluate(self.b, u, v)])

    def project(self, sky: FloatArray) -> FloatArray:
        """Return where positions (2, n) in degrees fall on the undistorted CCD, shape (2, n)."""
        return np.linalg.solve(self.cd, np.stack(tan_project(*sky, *self.crval)))

    def residual(self, x: FloatArray, y: FloatArray, sky: FloatArray) -> FloatArray:
        """Return measured minus catalogue position in undistorted pixels, shape (2, n)."""
        return self.undistort(x, y) - self.project(sky)


def _tolerance(shape: tuple[int, int], settings: AstrometrySettings) -> float:
    """Return the distance of matching stars from a prediction, pixels."""
    return max(settings.match_tolerance, 1e-3 * float(np.hypot(*shape)))


def search_windows(pixel: float, settings: AstrometrySettings) -> tuple[SearchWindow, SearchWindow]:
    """Return the near and the wide search window in pixels, each of ``pixel`` degrees."""
    wide = SearchWindow(
        settings.max_pointing_error / 60.0 / pixel,
        settings.max_rotation_error,
        settings.max_scale_error,
        settings.either_parity,
    )
    near = SearchWindow(
        min(_NEAR_SHIFT / pixel, wide.shift),
        min(_NEAR_ROTATION, wide.rotation),
        min(_NEAR_SCALE, wide.scale),
        False,
    )
    return near, wide


def _match_near(
    state: _TanSip, xy: FloatArray, sky: FloatArray, radius: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Match sources with the nearest reference stars, each star once."""
    catalogue = state.project(sky)
    usable = np.flatnonzero(np.isfinite(catalogue[0]))
    measured = state.undistort(*xy)
    if not np.isfinite(measured).all():
        raise CcdFailure(Reason.ASTROMETRIC_FIT_FAILED, "the fit of the WCS diverged")
    tree = cKDTree(catalogue[:, usable].T)
    i, k, _ = match_nearest(tree, measured[0] + 1j * measured[1], radius)
    return i, usable[k]


def _choose_order(
    xy: FloatArray, shape: tuple[int, int], settings: AstrometrySettings
) -> int | None:
    """Return the highest order that these stars support, 0 for a similarity, None for nothing."""
    if xy.shape[1] < settings.min_matches:
        return None
    scale = max(shape) / 2.0
    ny, nx = shape
    edge = np.array([(cx, cy) for cx in (-nx, 0, nx) for cy in (-ny, 0, ny)]).T / 2.0 / scale
    u, v = ((c - (n - 1) / 2.0) / scale for c, n in zip(xy, (nx, ny), strict=True))
    return supported_order(np.stack([u, v]), edge, settings.sip_order, settings)


def _tan_sip(
    to_sky: Callable[[FloatArray, FloatArray], tuple[FloatArray, FloatArray]],
    shape: tuple[int, int],
) -> WCS:
    """Return the TAN-SIP WCS of a mapping from pixels to the sky; see `fit_tan_sip`."""
    with failing_ccd(Reason.ASTROMETRIC_FIT_FAILED, _NO_SIP, np.linalg.LinAlgError, WcsError):
        return fit_tan_sip(to_sky, shape)


def _fit_clipped(
    state: _TanSip,
    prior: _TanSip,
    pairs: tuple[FloatArray, FloatArray, FloatArray],
    order: int,
    clip_sigma: float,
) -> tuple[_TanSip, FloatArray, NDArray[np.bool_]]:
    """Fit, leave out outliers, fit again, until the same stars stay.

    ``pairs`` are pixels and sky positions, each (2, n), and errors (n,). Returned are the fit, the
    residuals of all stars, shape (2, n), and which stars are in the fit.
    """
    xy, sky, error = pairs
    kept = np.isfinite(error)
    if not kept.any():
        raise CcdFailure(Reason.ASTROMETRIC_FIT_FAILED, "no matched source has a finite error")
    n_terms = len(term_powers(order)) if order else 2
    for _ in range(10):
        # twice, since the first fit moves the tangent point
        for _ in range(2):
            with failing_ccd(Reason.ASTROMETRIC_FIT_FAILED, _NO_FIT, np.linalg.LinAlgError):
                state = _fit_once(state, prior, xy[:, kept], sky[:, kept], error[kept], order)
        residual = state.residual(*xy, sky)
        distance = np.hypot(*residual) / error
        freedom = max(1.0 - n_terms / kept.sum(), 0.1)
        sigma = np.median(distance[kept]) / RAYLEIGH_MEDIAN / np.sqrt(freedom)
        good = np.isfinite(error) & (distance <= clip_sigma * max(sigma, 1e-6))
        if np.array_equal(good, kept) or good.sum() < n_terms + 2:
            break
        kept = good
    return state, residual, kept


def _fit_once(
    state: _TanSip, prior: _TanSip, xy: FloatArray, sky: FloatArray, error: FloatArray, order: int
) -> _TanSip:
    """Fit by weighted least squares on the tangent plane, in units of undistorted pixels."""
    u, v = xy[0] - prior.crpix[0], xy[1] - prior.crpix[1]
    target, expected = state.project(sky), prior.undistort(*xy)
    size = max(order + 1, prior.a.shape[0], prior.b.shape[0], 2)
    distortion = np.zeros((2, size, size))
    if order == 0:
        shift, linear = _weighted_similarity(expected, target, error)
    else:
        scale = max(np.abs(u).max(), np.abs(v).max())
        design = design_matrix(u / scale, v / scale, order)
        design[:, 1:3] = expected.T / scale
        solution, *_ = np.linalg.lstsq(design / error[:, None], (target / error).T, rcond=None)
        shift, linear = solution[0], solution[1:3].T / scale
        for (p, q), value in zip(term_powers(order)[3:], solution[3:], strict=True):
            distortion[:, p, q] = np.linalg.solve(linear, value) / scale ** (p + q)
    for total, known in zip(distortion, (prior.a, prior.b), strict=True):
        total[: known.shape[0], : known.shape[1]] += known
    crval = np.array(tan_deproject(*(state.cd @ shift), *state.crval))
    return _TanSip(crval, prior.crpix, state.cd @ linear, *distortion)


def _weighted_similarity(
    source: FloatArray, target: FloatArray, error: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the shift and the matrix of the best shift, rotation and scale."""
    weight = 1.0 / error**2
    weight = weight / weight.sum()
    z, w = source[0] + 1j * source[1], target[0] + 1j * target[1]
    z_mean, w_mean = np.sum(weight * z), np.sum(weight * w)
    z = z - z_mean
    a = np.sum(weight * (w - w_mean) * np.conj(z)) / np.sum(weight * np.abs(z) ** 2)
    b = w_mean - a * z_mean
    return np.array([b.real, b.imag]), np.array([[a.real, -a.imag], [a.imag, a.real]])


def _fitted_wcs(state: _TanSip, shape: tuple[int, int]) -> WCS:
    """Return the WCS of a fit, with the tangent point at the centre of the CCD."""
    plane = [row[0] * state.a + row[1] * state.b for row in state.cd]
    for row, polynomial in zip(state.cd, plane, strict=True):
        polynomial[1, 0], polynomial[0, 1] = row
    with failing_ccd(Reason.ASTROMETRIC_FIT_FAILED, _NO_SIP, np.linalg.LinAlgError, WcsError):
        return plane_to_tan_sip(state.crval, state.crpix, *plane, shape)
