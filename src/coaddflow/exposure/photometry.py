"""One zero-point for a whole exposure, with its variation over the focal plane.

A CCD with few stars has a poor zero-point, one without stars has none. The exposure has many:

    magnitude + 2.5 log10(electrons) of a star = Z + P(x, y) + c_k

Z is the zero-point of the exposure, P a polynomial over the focal plane (thin clouds, extinction
over a wide field, scattered light in the flat field [1]_ [2]_), and c_k a constant of CCD k, needed
because each CCD has its own normalisation of the flat field. The prior of the constants is as wide
as their scatter (`exposure.group_scatter`): a CCD with many stars has its own constant, one with
three stars is weighted by their errors, one without stars has zero with the error of the scatter.
Stars are weighted by their errors; outliers have little weight in the first fits (Huber's loss
[3]_) and are excluded from the last ones.

Within a CCD the polynomial can be removed from the pixels (`flatten`), so that the zero-point in
the header holds for every pixel, as every reader of a calexp assumes.

References
----------
.. [1] Manfroid 1995, A&AS 113, 587 (zero-point over the field from stars).
.. [2] Regnault et al. 2009, A&A 506, 999, section 5 (the same for a mosaic).
.. [3] Huber 1964, Ann. Math. Stat. 35, 73.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from numpy.polynomial import polynomial
from numpy.typing import ArrayLike, NDArray

from coaddflow.calexp.model import MeasuredCcd
from coaddflow.exposure.group_scatter import group_scatter, prior_variance
from coaddflow.geometry.polynomial import design_matrix, term_powers
from coaddflow.image.masked_image import MaskedImage
from coaddflow.image.statistics import mad_sigma
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.measure.photometry import MatchedStars, ZeroPoint, magnitude_offsets
from coaddflow.settings.exposure_photometry import ExposurePhotometrySettings
from coaddflow.settings.photometry import PhotometrySettings

_LOG = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_MAP_SIGMA = 0.3
"""Expected size of the terms of the polynomial, mag: constrains it where there are no stars."""

_LEAST_CCD_SIGMA = 1e-4
_BOUND = 1.5
_BOUNDED_FITS, _CLIPPED_FITS = 15, 20

_FLUX_COLUMNS = ("flux_psf", "flux_aperture", "flux_isophotal")


@dataclass(frozen=True)
class ZeroPointMap:
    """Variation of the zero-point within a CCD, relative to its centre.

    Attributes
    ----------
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    coefficients : ndarray of float64, shape (order + 1, order + 1)
        mag; element (q, p) belongs to u^p v^q, where u and v are the distances in pixels from
        the centre of the CCD over half its longer side. Zero above the total order.
    """

    shape: tuple[int, int]
    coefficients: FloatArray

    def magnitude(self, x: ArrayLike, y: ArrayLike) -> FloatArray:
        """Return the zero-point at pixels (0-based) minus that at the centre, mag."""
        ny, nx = self.shape
        u, v = (np.asarray(x, float) - (nx - 1) / 2.0), (np.asarray(y, float) - (ny - 1) / 2.0)
        return polynomial.polyval2d(v / self._half, u / self._half, self.coefficients)

    def flux_factor(self) -> NDArray[np.float32]:
        """Return the factor of every pixel to the zero-point of the centre, shape (ny, nx)."""
        ny, nx = self.shape
        u, v = ((np.arange(n) - (n - 1) / 2.0) / self._half for n in (nx, ny))
        magnitude = polynomial.polygrid2d(v, u, self.coefficients)
        return np.exp((-0.4 * np.log(10.0)) * magnitude.astype(np.float32))

    @property
    def _half(self) -> float:
        return max(self.shape) / 2.0


@dataclass(frozen=True)
class ExposureZeroPoint:
    """The zero-point of an exposure.

    Attributes
    ----------
    origin : tuple of float
        Focal-plane position, mm, where u and v are 0.
    radius : float
        Their unit, mm.
    order : int
        Order of the polynomial.
    coefficients : ndarray of float64, shape (n terms,)
        Of 1, u, v, u^2, u v, v^2 ..., mag.
    constants : dict of int to float
        Constant of each CCD in the fit, mag.
    ccd_sigma : float
        Scatter of the constants, mag: the error of a CCD without stars.
    covariance : ndarray of float64, shape (n terms + n CCDs, n terms + n CCDs)
        Covariance of coefficients and constants, mag^2.
    used : dict of int to ndarray of bool, shape (n stars of the CCD,)
        The stars used in the fit.
    scatter : float
        Standard deviation of these stars, mag.
    ccd_scatter : dict of int to float
        The same for each CCD with at least two of them.
    """

    origin: tuple[float, float]
    radius: float
    order: int
    coefficients: FloatArray
    constants: dict[int, float]
    ccd_sigma: float
    covariance: FloatArray
    used: dict[int, BoolArray]
    scatter: float
    ccd_scatter: dict[int, float]

    def value(self, x_mm: ArrayLike, y_mm: ArrayLike) -> FloatArray:
        """Return the zero-point at focal-plane positions, without the constants of the CCDs."""
        return self._terms(x_mm, y_mm) @ self.coefficients

    def of_ccd(self, camera: Camera, detector: Detector) -> tuple[ZeroPoint, ZeroPointMap]:
        """Return the zero-point at the centre of a CCD, also of one without stars, and its map.

        ``n_stars``, ``used`` (flags of its `MatchedStars`) and ``scatter`` are of its own stars;
        the scatter of fewer than two is that of the exposure.
        """
        ccd = detector.id
        x, y = detector.center
        value = float(self.value(x, y)) + self.constants.get(ccd, 0.0)
        row = np.zeros(len(self.covariance))
        row[: self.coefficients.size] = self._terms(x, y)
        own = 0.0
        if ccd in self.constants:
            row[self.coefficients.size + list(self.constants).index(ccd)] = 1.0
        else:
            own = self.ccd_sigma
        error = float(np.sqrt(row @ self.covariance @ row + own**2))
        used = self.used.get(ccd, np.zeros(0, dtype=bool))
        scatter = self.ccd_scatter.get(ccd, self.scatter)
        zero = ZeroPoint(value, error, scatter, int(np.count_nonzero(used)), used)
        return zero, self._map(camera, detector)

    def _map(self, camera: Camera, detector: Detector) -> ZeroPointMap:
        """Convert the polynomial of focal-plane positions to one of pixels, without loss."""
        order, (nx, ny) = self.order, detector.size
        nodes = np.cos(np.pi * (np.arange(order + 1) + 0.5) / (order + 1))
        u, v = (c.ravel() for c in np.meshgrid(nodes, nodes))
        half = max(nx, ny) / 2.0
        x, y = u * half + (nx - 1) / 2.0, v * half + (ny - 1) / 2.0
        value = self.value(*camera.pixel_to_focal(detector, x, y))
        found = np.linalg.lstsq(design_matrix(u, v, order), value, rcond=None)[0]
        coefficients = np.zeros((order + 1, order + 1))
        for (p, q), coefficient in zip(term_powers(order), found, strict=True):
            coefficients[q, p] = coefficient
        coefficients[0, 0] = 0.0
        return ZeroPointMap(detector.shape, coefficients)

    def _terms(self, x_mm: ArrayLike, y_mm: ArrayLike) -> FloatArray:
        u = (np.asarray(x_mm, float) - self.origin[0]) / self.radius
        v = (np.asarray(y_mm, float) - self.origin[1]) / self.radius
        return design_matrix(u, v, self.order)


def solve_zero_point(
    stars: Mapping[int, MatchedStars],
    camera: Camera,
    settings: ExposurePhotometrySettings,
    photometry: PhotometrySettings,
) -> ExposureZeroPoint | None:
    """Solve for the zero-point of an exposure.

    Parameters
    ----------
    stars : mapping of int to MatchedStars
        The stars of each CCD (`zero_point.matched_stars`), possibly none.
    camera : Camera
        For the place of the CCDs in the focal plane.
    settings : ExposurePhotometrySettings
        Order, clipping, constants of CCDs.
    photometry : PhotometrySettings
        `error_floor`.

    Returns
    -------
    ExposureZeroPoint or None
        None, with a warning in the log, if there are fewer than ``settings.min_stars`` stars:
        each CCD then has a zero-point of its own.
    """
    sample = _sample(stars, camera, photometry.error_floor)
    n_known = np.count_nonzero(sample.known)
    if n_known < settings.min_stars:
        _LOG.warning(
            "%d stars of the exposure have a flux and a reference magnitude, %d are needed; "
            "each CCD has a zero-point of its own",
            *(n_known, settings.min_stars),
        )
        return None
    order = settings.order
    while order > 0 and n_known < settings.stars_per_term * len(term_powers(order)):
        order -= 1
    try:
        fit = _fit(sample, order, settings)
    except np.linalg.LinAlgError as error:
        _LOG.warning(
            "no zero-point of the exposure (%s); each CCD has a zero-point by itself", error
        )
        return None
    residual = sample.offset - fit.design @ fit.solution
    scatter, ccd_scatter = _scatter(residual, fit.used, sample)
    n_terms = len(term_powers(order))
    constants = dict(zip(sample.ccds, fit.solution[n_terms:].tolist(), strict=False))
    _LOG.info(
        "zero-point of the exposure %.4f: order %d, %d of %d stars, scatter %.4f mag, constants "
        "of CCDs %.4f mag",
        *(fit.solution[0], order, np.count_nonzero(fit.used), n_known, scatter, fit.ccd_sigma),
    )
    return ExposureZeroPoint(
        origin=sample.origin,
        radius=sample.radius,
        order=order,
        coefficients=fit.solution[:n_terms],
        constants=constants,
        ccd_sigma=fit.ccd_sigma,
        covariance=fit.covariance,
        used={ccd: fit.used[sample.index == k] for k, ccd in enumerate(sample.ccds)},
        scatter=scatter,
        ccd_scatter=ccd_scatter,
    )


def flatten(measured: MeasuredCcd, zero_map: ZeroPointMap) -> MeasuredCcd:
    """Scale all pixels and fluxes of a CCD to the zero-point of its centre.

    The image (without its sky) and the fluxes are multiplied by 10^(-0.4 dm), the variance by the
    square of it, where dm is `ZeroPointMap.magnitude`: signal to noise is kept, and the noise of
    the sky varies over the CCD as the depth does. At the centre nothing changes: noise, depth and
    sky of the manifest, which are medians over the CCD, still hold, and so does the gain of 1 in
    the header, to the size of the map. The subtracted sky remains in electrons as they were
    counted: image / factor + background.model() is the detrended image.

    Parameters
    ----------
    measured : MeasuredCcd
        The CCD, its sky subtracted; it is not changed.
    zero_map : ZeroPointMap
        From `ExposureZeroPoint.of_ccd`.
    """
    before, factor = measured.masked_image, zero_map.flux_factor()
    image = MaskedImage(before.image * factor, before.variance * factor**2, before.mask)
    sources = measured.sources.copy()
    of_source = 10.0 ** (-0.4 * zero_map.magnitude(sources["x"], sources["y"]))
    for name in (*_FLUX_COLUMNS, *(f"{name}_error" for name in _FLUX_COLUMNS), "peak"):
        column = sources[name]
        column[:] = column * of_source.reshape((-1,) + (1,) * (column.ndim - 1))
    return replace(measured, masked_image=image, sources=sources)


def map_cards(zero_map: ZeroPointMap | None) -> fits.Header:
    """Return the cards that describe what `flatten` did; without a map, nothing.

    ``ZPMAP`` is true if pixels were multiplied: by 10^(-0.4 dm) with dm = sum of ``ZPMpq`` u^p v^q
    (mag), u = (x - ``ZPMX``) / ``ZPMHALF`` and v = (y - ``ZPMY``) / ``ZPMHALF`` in FITS pixels.
    """
    header = fits.Header()
    header["ZPMAP"] = (zero_map is not None, "zero-point made flat over the CCD")
    if zero_map is None:
        return header
    ny, nx = zero_map.shape
    header["ZPMX"] = ((nx + 1) / 2.0, "[pixel] u = (x - ZPMX) / ZPMHALF")
    header["ZPMY"] = ((ny + 1) / 2.0, "[pixel] v = (y - ZPMY) / ZPMHALF")
    header["ZPMHALF"] = (max(nx, ny) / 2.0, "[pixel] unit of u and v")
    for p, q in term_powers(len(zero_map.coefficients) - 1)[1:]:
        header[f"ZPM{p}{q}"] = (zero_map.coefficients[q, p], f"[mag] of u^{p} v^{q}")
    return header


class _Sample(NamedTuple):
    """The stars of all CCDs."""

    known: BoolArray
    offset: FloatArray
    variance: FloatArray
    u: FloatArray
    v: FloatArray
    index: NDArray[np.intp]
    ccds: tuple[int, ...]
    origin: tuple[float, float]
    radius: float


class _Solution(NamedTuple):
    design: FloatArray
    solution: FloatArray
    covariance: FloatArray
    used: BoolArray
    ccd_sigma: float


def _sample(stars: Mapping[int, MatchedStars], camera: Camera, error_floor: float) -> _Sample:
    """Join the stars of all CCDs, in the order of the CCDs."""
    centres = np.array([detector.center for detector in camera.detectors])
    origin = 0.5 * (centres.min(axis=0) + centres.max(axis=0))
    reach = [np.hypot(*d.size) / 2.0 * camera.pixel_size for d in camera.detectors]
    radius = float((np.hypot(*(centres - origin).T) + reach).max())
    columns = []
    ccds = tuple(sorted(stars))
    for number, ccd in enumerate(ccds):
        own = stars[ccd]
        x, y = camera.pixel_to_focal(camera.detector(ccd), own.x, own.y)
        measured = magnitude_offsets(own, error_floor)
        place = (x - origin[0]) / radius, (y - origin[1]) / radius
        columns.append((*measured, *place, np.full(len(own.x), number)))
    if not columns:
        columns = [(np.zeros(0, bool), *[np.zeros(0)] * 4, np.zeros(0, int))]
    joined = (np.concatenate(c) for c in zip(*columns, strict=True))
    return _Sample(*joined, ccds, tuple(origin.tolist()), radius)


def _fit(sample: _Sample, order: int, settings: ExposurePhotometrySettings) -> _Solution:
    """Fit polynomial and constants; outliers are first given less weight, then excluded."""
    n_ccds = len(sample.ccds) if settings.ccd_sigma > 0 else 0
    terms = design_matrix(sample.u, sample.v, order)
    design = np.hstack([terms, (sample.index[:, None] == np.arange(n_ccds)).astype(float)])
    middle = float(np.median(sample.offset[sample.known]))
    n_terms, width = terms.shape[1], settings.ccd_sigma
    prior = np.full(design.shape[1], _MAP_SIGMA**2)
    # the zero-point itself is free
    prior[0] = 1e6
    solution, used = np.zeros(prior.size), sample.known
    for step in range(_BOUNDED_FITS + _CLIPPED_FITS):
        deviation = np.abs(sample.offset - middle - design @ solution) / np.sqrt(sample.variance)
        scatter = max(1.0, mad_sigma(deviation[used], 0.0))
        if step < _BOUNDED_FITS:
            kept = sample.known
            part = np.minimum(1.0, _BOUND * scatter / np.maximum(deviation, 1e-9))
        else:
            kept, part = sample.known & (deviation <= settings.clip_sigma * scatter), 1.0
            if step > _BOUNDED_FITS and np.array_equal(kept, used):
                break
        used = kept
        weight = np.where(used, part / sample.variance, 0.0)
        prior[n_terms:] = prior_variance(solution[n_terms:], width)
        covariance = np.linalg.inv((design.T * weight) @ design + np.diag(1.0 / prior))
        solution = covariance @ (design.T @ (weight * (sample.offset - middle)))
        if n_ccds > 1:
            width = group_scatter(
                solution[n_terms:],
                np.diag(covariance)[n_terms:],
                prior[n_terms:],
                (min(_LEAST_CCD_SIGMA, settings.ccd_sigma), settings.ccd_sigma),
            )
    residual = sample.offset - middle - design @ solution
    if not np.isfinite(solution).all():
        raise np.linalg.LinAlgError("the fit diverged")
    chi2 = float((residual**2 * weight).sum() / max(np.count_nonzero(used) - n_terms, 1))
    solution[0] += middle
    return _Solution(design, solution, covariance * max(1.0, chi2), used, width if n_ccds else 0.0)


def _scatter(
    residual: FloatArray, used: BoolArray, sample: _Sample
) -> tuple[float, dict[int, float]]:
    """Return the standard deviation of the stars of the exposure, and of CCDs with two or more."""
    total = float(np.sqrt(np.mean(residual[used] ** 2)))
    by_ccd = {}
    for number, ccd in enumerate(sample.ccds):
        own = residual[used & (sample.index == number)]
        if own.size > 1:
            by_ccd[ccd] = float(np.sqrt((own**2).sum() / (own.size - 1)))
    return total, by_ccd
