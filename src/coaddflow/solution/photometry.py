"""Photometry of all exposures of a tract: every star has one magnitude in each band.

The magnitude of a star in the band of the camera is, for every detection i of it,

    M = m_i + F_e(u) + I_bk(p) + k_b (X_e - X_b) q

m_i is instrumental; F_e a polynomial of the exposure over the field, which begins with its
zero-point (grey extinction, thin clouds); I_bk the static illumination correction of CCD k in band
b, which all exposures share [1]_ [2]_; k_b the extinction by colour q (relative to the median) and
airmass X. In the catalogue's band the star has M - c_b q: colour terms c_b are given or fitted, and
the catalogue, with its errors, fixes the zero-points to its AB system. The extinction of an
exposure itself is in F_e, so that nights need not be photometric [3]_. All is solved by `blocks`,
robustly and with the scatter of each exposure in its weights; what clouds leave on small scales is
a field of waves (`waves`). Some stars are withheld and judge the solution [4]_.

Gauge freedoms, and what fixes them: the zero-point of each band, by the catalogue; what CCDs and
exposures have in common, see `blocks`; colour and airmass count from their means in a band.

References
----------
.. [1] Padmanabhan et al. 2008, ApJ 674, 1217 (ubercal).
.. [2] Regnault et al. 2009, A&A 506, 999, section 5 (illumination correction of a mosaic).
.. [3] Schlafly et al. 2012, ApJ 756, 158 (one zero-point an exposure).
.. [4] Burke et al. 2018, AJ 155, 41, section 6 (FGCM: reserved stars).
"""

import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix, term_powers
from coaddflow.settings.solution import TractPhotometrySettings, WaveSettings
from coaddflow.solution.blocks import (
    BlockSystem,
    Cells,
    Parameters,
    evaluate_polynomials,
    gauge_conditions,
    solve_step,
)
from coaddflow.solution.detections import (
    Detections,
    Exposures,
    ReferenceStars,
    relative_colors,
    rows_between,
)
from coaddflow.solution.detector_maps import DetectorMaps, order_of
from coaddflow.solution.excess import MOST_LEVERAGE, excess_variance, judge_residuals
from coaddflow.solution.linking import Links
from coaddflow.solution.waves import WaveField, fit_residuals

_LOG = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_TOLERANCE, _MOST_STEPS = 1e-3, 200
"""Of the conjugate gradients of one fit, which need not be exact."""

_SETTLED = 0.02
"""The solution is settled when detections move by less than this part of their errors, rms."""

_SLOPE_FITS, _SLOPE_CLIP, _LEAST_STARS = 4, 4.0, 10
"""Of colour terms: fits, limit of outliers in median deviations, and fewest stars."""

_JUDGED_FITS = 6
"""Means of withheld stars, without the outliers of the one before."""

_HELD = 1e12
"""Inverse variance of the constants of epochs, which photometry does not have, mag^-2."""


@dataclass(frozen=True)
class ExposureCalibration:
    """Zero-points of one exposure: all that its warps need.

    Attributes
    ----------
    name : str
        Id of the exposure.
    detectors : DetectorMaps
        Pixels to the field.
    radius : float
        Unit of the field, degrees.
    coefficients : ndarray of float64, shape (n terms,)
        Over the field, mag.
    illumination : ndarray of float64, shape (n CCDs, n terms)
        Of the CCDs, mag.
    field : WaveField or None
        Over the field in degrees, mag.
    excess : float
        Scatter of magnitudes beyond the errors of the detections, mag.
    """

    name: str
    detectors: DetectorMaps
    radius: float
    coefficients: FloatArray
    illumination: FloatArray
    field: WaveField | None
    excess: float

    def zero_point(self, ccd: int, x: ArrayLike, y: ArrayLike) -> FloatArray:
        """Return the magnitude of one electron per second at pixels (n,) of a CCD.

        Parameters
        ----------
        ccd : int
            Number of the CCD in the camera.
        x, y : array_like, shape (n,)
            Pixels, 0-based.

        Raises
        ------
        InputError
            If the solution does not have the CCD.
        """
        index, unit, field = self.detectors.locate(ccd, x, y, self.name)
        order = order_of(len(self.coefficients))
        value = design_matrix(*field.T / self.radius, order) @ self.coefficients
        own = self.illumination[index]
        value = value + design_matrix(*unit, order_of(len(own))) @ own
        return value if self.field is None else value + self.field.value(field)[:, 0]


@dataclass(frozen=True)
class TractPhotometry:
    """The photometric solution of a tract.

    Attributes
    ----------
    exposures : Exposures
        What was solved.
    detectors : DetectorMaps
        Pixels to the field.
    radius : float
        Unit of the field, degrees.
    coefficients : ndarray of float64, shape (n exposures, n terms)
        F, mag.
    n_terms : ndarray of int64, shape (n exposures,)
        Terms that each exposure has.
    illumination : ndarray of float64, shape (n bands, n CCDs, n terms)
        I, mag.
    color_extinction : ndarray of float64, shape (n bands,)
        k, mag per mag of colour and airmass.
    color_terms : ndarray of float64, shape (n bands,)
        c, mag per mag of colour.
    median_color : float
        Colour from which colours count.
    magnitude, magnitude_error : ndarray of float64, shape (n stars, n bands)
        AB magnitudes in the bands of the camera; NaN where a star has no detection that was used.
    excess : ndarray of float64, shape (n exposures,)
        Scatter beyond the errors of the detections, mag.
    fields : tuple of WaveField or None
        Of each exposure, mag.
    kept : ndarray of bool, shape (n,)
        Detections that were used.
    withheld : ndarray of bool, shape (n stars,)
        Stars that were not.
    withheld_excess : ndarray of float64, shape (n bands,)
        Scatter of the magnitudes of these stars between exposures beyond their errors, mag; NaN
        without such stars.
    """

    exposures: Exposures
    detectors: DetectorMaps
    radius: float
    coefficients: FloatArray
    n_terms: NDArray[np.int64]
    illumination: FloatArray
    color_extinction: FloatArray
    color_terms: FloatArray
    median_color: float
    magnitude: FloatArray
    magnitude_error: FloatArray
    excess: FloatArray
    fields: tuple[WaveField | None, ...]
    kept: BoolArray
    withheld: BoolArray
    withheld_excess: FloatArray

    def of_exposure(self, number: int) -> ExposureCalibration:
        """Return the part of one exposure, by its number."""
        return ExposureCalibration(
            name=self.exposures.name[number],
            detectors=self.detectors,
            radius=self.radius,
            coefficients=self.coefficients[number, : self.n_terms[number]],
            illumination=self.illumination[self.exposures.band[number]],
            field=self.fields[number],
            excess=float(self.excess[number]),
        )


def solve_photometry(
    detections: Detections,
    links: Links,
    exposures: Exposures,
    references: ReferenceStars,
    color: FloatArray,
    maps: DetectorMaps,
    settings: TractPhotometrySettings,
    clouds: WaveSettings,
) -> TractPhotometry:
    """Solve zero-points, illumination correction and magnitudes of all exposures together.

    Parameters
    ----------
    detections : Detections
        Those with a star: ``detections.take(links.rows)``.
    links : Links
        Their stars.
    exposures : Exposures
        What they belong to.
    references : ReferenceStars
        The reference catalogue, whose magnitudes are those of ``exposures.bands``.
    color : ndarray of float64, shape (n stars,)
        Colours, mag; NaN where not known, which counts as the median.
    maps : DetectorMaps
        Pixels to the field.
    settings : TractPhotometrySettings
        Orders, clipping, colour terms.
    clouds : WaveSettings
        What clouds leave.

    Raises
    ------
    InputError
        If a band has no star with a reference magnitude.
    """
    data = _prepare(detections, links, exposures, references, color, maps, settings)
    solution = _first_solution(data, maps, settings)
    for _ in range(settings.max_iterations):
        solution, moved = _improved(data, solution, settings)
        if moved < _SETTLED:
            break
    for _ in range(clouds.rounds if clouds.enabled else 0):
        solution, system, residual, field = _with_stars(data, solution, settings)
        fields = tuple(
            fit_residuals(
                *(field[rows], residual[rows], system.weight[rows], system.leverage[rows]),
                *(float(solution.excess[number]), solution.fields[number], clouds),
            )
            for number, rows in enumerate(rows_between(data.ends))
        )
        solution, _ = _improved(data, replace(solution, fields=fields), settings)
    solution, *_ = _with_stars(data, solution, settings)
    return _judged(data, solution, settings.clip_sigma)


class _Data(NamedTuple):
    """What stays the same during the iterations; a star counts once for each of m bands."""

    star: NDArray[np.int32]
    """Star times bands plus band, (n,)."""
    cells: Cells
    ends: NDArray[np.int64]
    """First detections of the exposures, and the number of all."""
    s: FloatArray
    t: FloatArray
    magnitude: FloatArray
    variance: FloatArray
    """Of the magnitudes, (n,)."""
    usable: BoolArray
    withheld: BoolArray
    """Stars, (n stars,)."""
    color: NDArray[np.float32]
    """Relative to the median, (n stars times m,)."""
    median_color: float
    reference: FloatArray
    """Magnitudes of the catalogue, NaN where there is none, (n stars times m,)."""
    prior: FloatArray
    """Inverse variances of these, (n stars times m,)."""
    exposures: Exposures


def _prepare(
    detections: Detections,
    links: Links,
    exposures: Exposures,
    references: ReferenceStars,
    color: FloatArray,
    maps: DetectorMaps,
    settings: TractPhotometrySettings,
) -> _Data:
    n_bands = len(exposures.bands)
    relative, median = relative_colors(color)
    withheld = np.random.default_rng(0).random(len(links)) < settings.withheld
    variance = detections.magnitude_error.astype(float) ** 2 + settings.error_floor**2
    usable = np.isfinite(variance) & np.isfinite(detections.magnitude) & ~withheld[links.star]
    reference = np.full((len(links), n_bands), np.nan)
    prior = np.zeros((len(links), n_bands))
    rows = np.flatnonzero((links.reference >= 0) & ~withheld)
    reference[rows] = references.magnitude[links.reference[rows]]
    error = references.magnitude_error[links.reference[rows]] ** 2 + settings.reference_floor**2
    prior[rows] = np.where(np.isfinite(reference[rows] + error), 1.0 / error, 0.0)
    used = np.unique(exposures.band)
    for band in used[~(prior[:, used] > 0).any(axis=0)]:
        raise InputError(
            f"no star has a reference magnitude in band {exposures.bands[band]}",
            remedy="check refcat.bands, or leave the band out of the solution",
        )
    s, t = maps.unit(detections.ccd, detections.x, detections.y)
    band = exposures.band.astype(np.int32)
    return _Data(
        star=links.star * np.int32(n_bands) + band[detections.exposure],
        cells=Cells.of(detections.exposure, detections.ccd, band, band, len(maps)),
        ends=detections.ends(len(exposures)),
        s=s,
        t=t,
        magnitude=detections.magnitude.astype(float),
        variance=variance,
        usable=usable,
        withheld=withheld,
        color=np.repeat(relative.astype(np.float32), n_bands),
        median_color=median,
        reference=reference.ravel(),
        prior=prior.ravel(),
        exposures=exposures,
    )


def _first_solution(
    data: _Data, maps: DetectorMaps, settings: TractPhotometrySettings
) -> TractPhotometry:
    """Take the zero-points from the catalogue, or where an exposure has none of it, a mean one."""
    exposures, n_bands = data.exposures, len(data.exposures.bands)
    n_terms = np.ones(len(exposures), np.int64)
    zero = np.full(len(exposures), np.nan)
    for number, rows in enumerate(rows_between(data.ends)):
        n_stars = np.count_nonzero(data.usable[rows])
        n_terms[number] = len(term_powers(supported_zero_point_order(n_stars, settings)))
        offset = data.reference[data.star[rows]] - data.magnitude[rows]
        if (known := np.isfinite(offset) & data.usable[rows]).any():
            zero[number] = np.median(offset[known])
    coefficients = np.zeros((len(exposures), len(term_powers(settings.order))))
    coefficients[:, 0] = np.where(np.isfinite(zero), zero, np.nanmedian(zero))
    n_own = len(term_powers(settings.illumination_order))
    given = [settings.color_terms.get(band, 0.0) for band in exposures.bands]
    shape = len(data.withheld), n_bands
    return TractPhotometry(
        *(exposures, maps, maps.radius, coefficients, n_terms),
        illumination=np.zeros((n_bands, len(maps), n_own)),
        color_extinction=np.zeros(n_bands),
        color_terms=np.array(given),
        median_color=data.median_color,
        magnitude=np.where(data.prior > 0, data.reference, np.nan).reshape(shape),
        magnitude_error=np.full(shape, np.nan),
        excess=np.zeros(len(exposures)),
        fields=(None,) * len(exposures),
        kept=data.usable,
        withheld=data.withheld,
        withheld_excess=np.full(n_bands, np.nan),
    )


def supported_zero_point_order(n_stars: int, settings: TractPhotometrySettings) -> int:
    """Return the order of an exposure's polynomial that this number of stars supports."""
    order = settings.order
    while order > 0 and n_stars < settings.stars_per_term * len(term_powers(order)):
        order -= 1
    return order


def _calibrated(data: _Data, solution: TractPhotometry) -> tuple[FloatArray, FloatArray]:
    """Return calibrated magnitudes (n,), and field positions in degrees (n, 2)."""
    cells, maps, n = data.cells, solution.detectors, len(data.star)
    field = np.zeros((n, 2))
    ccd = (cells.detector % len(maps)).astype(np.int32)
    evaluate_polynomials(cells.start, ccd, data.s, data.t, maps.coefficients, field)
    value = data.magnitude[:, None].copy()
    every = np.arange(len(data.exposures), dtype=np.int32)
    evaluate_polynomials(
        data.ends, every, *field.T / solution.radius, solution.coefficients[:, None], value
    )
    own = solution.illumination.reshape(-1, 1, solution.illumination.shape[-1])
    evaluate_polynomials(cells.start, cells.detector, data.s, data.t, own, value)
    of_color = solution.color_extinction[data.exposures.band] * _airmass(data.exposures)
    for number, rows in enumerate(rows_between(data.ends)):
        value[rows, 0] += of_color[number] * data.color[data.star[rows]]
        if (waves := solution.fields[number]) is not None:
            value[rows] += waves.value(field[rows])
    return value[:, 0], field


def _airmass(exposures: Exposures) -> FloatArray:
    """Return the airmass of each exposure relative to the mean of its band."""
    airmass, n_bands = exposures.airmass, len(exposures.bands)
    sums = np.bincount(exposures.band, airmass, n_bands)
    mean = sums / np.maximum(np.bincount(exposures.band, minlength=n_bands), 1)
    return airmass - mean[exposures.band]


def _system(
    data: _Data, solution: TractPhotometry, field: FloatArray, settings: TractPhotometrySettings
) -> BlockSystem:
    """Return the equations with the weights of a solution."""
    exposures, maps = data.exposures, solution.detectors
    n_exposures, n_bands = len(exposures), len(exposures.bands)
    variance = data.variance + np.repeat(solution.excess**2, np.diff(data.ends))
    weight = np.divide(1.0, variance, out=np.zeros_like(variance), where=solution.kept)
    order = min(order_of(int(solution.n_terms.min())), settings.illumination_order)
    airmass = _airmass(exposures)[:, None] * settings.extinction_by_color
    u, v = (field / solution.radius).astype(np.float32).T
    return BlockSystem(
        cells=data.cells,
        u=np.ascontiguousarray(u),
        v=np.ascontiguousarray(v),
        s=data.s.astype(np.float32),
        t=data.t.astype(np.float32),
        star=data.star,
        weight=weight.astype(np.float32),
        color=data.color,
        turn=np.ones((len(data.cells.exposure), 1, 1), np.float32),
        color_vector=airmass,
        color_index=exposures.band,
        star_design=np.ones((n_exposures, 1, 1)),
        star_prior=data.prior[:, None],
        n_terms=solution.n_terms,
        shape=Parameters(
            solution.coefficients[:, None],
            solution.illumination.reshape(-1, 1, solution.illumination.shape[-1]),
            np.zeros((n_bands * len(maps), 1)),
            solution.color_extinction,
        ),
        n_ccds=len(maps),
        detector_prior=settings.illumination_sigma**-2,
        constant_prior=_HELD,
        fixed=gauge_conditions(maps, order, settings.illumination_order),
    )


def _with_stars(
    data: _Data, solution: TractPhotometry, settings: TractPhotometrySettings
) -> tuple[TractPhotometry, BlockSystem, FloatArray, FloatArray]:
    """Solve the stars for given zero-points, fit colour terms, reject outliers, and weigh.

    Returned are also the equations with the new weights, residuals (n, 1) and field positions.
    """
    calibrated, field = _calibrated(data, solution)
    for is_last in (False, True):
        system = _system(data, solution, field, settings)
        mean, solution = _mean_magnitudes(data, solution, system, calibrated, settings)
        residual = calibrated - mean[data.star]
        if not is_last:
            solution = _weighed(data, solution, system, residual, settings)
    return solution, system, residual[:, None], field


def _mean_magnitudes(
    data: _Data,
    solution: TractPhotometry,
    system: BlockSystem,
    calibrated: FloatArray,
    settings: TractPhotometrySettings,
) -> tuple[FloatArray, TractPhotometry]:
    """Return magnitudes of the stars, (n stars times bands,), with new colour terms."""
    n_bands = len(data.exposures.bands)
    n_stars = len(data.prior)
    weights = np.bincount(data.star, system.weight, n_stars)
    sums = np.bincount(data.star, system.weight * calibrated, n_stars)
    own = np.divide(sums, weights, out=np.full(n_stars, np.nan), where=weights > 0)
    terms = solution.color_terms.copy()
    color = data.color.astype(float)
    for band, name in enumerate(data.exposures.bands):
        if name not in settings.color_terms:
            stars = slice(band, None, n_bands)
            terms[band] = _slope(color[stars], (own - data.reference)[stars])
    wanted = np.nan_to_num(data.reference) + np.tile(terms, n_stars // n_bands) * color
    total = weights + data.prior
    mean = np.divide(
        sums + data.prior * wanted, total, out=np.full(n_stars, np.nan), where=total > 0
    )
    error = np.divide(1.0, total, out=np.full(n_stars, np.nan), where=weights > 0) ** 0.5
    shape = solution.magnitude.shape
    solution = replace(
        solution,
        color_terms=terms,
        magnitude=np.where(weights > 0, mean, np.nan).reshape(shape),
        magnitude_error=error.reshape(shape),
    )
    return np.nan_to_num(mean), solution


def _slope(color: FloatArray, difference: FloatArray) -> float:
    """Return the slope of differences with colour, outliers being clipped."""
    known = np.isfinite(difference)
    slope = 0.0
    for _ in range(_SLOPE_FITS):
        if np.count_nonzero(known) < _LEAST_STARS or np.ptp(color[known]) == 0.0:
            return 0.0
        slope, constant = np.polyfit(color[known], difference[known], 1)
        residual = np.abs(difference - slope * color - constant)
        known = residual <= _SLOPE_CLIP * np.nanmedian(residual)
    return float(slope)


def _weighed(
    data: _Data,
    solution: TractPhotometry,
    system: BlockSystem,
    residual: FloatArray,
    settings: TractPhotometrySettings,
) -> TractPhotometry:
    """Measure the scatter of each exposure and reject outliers, from residuals of all stars."""
    kept, excess = solution.kept.copy(), solution.excess.copy()
    for number, rows in enumerate(rows_between(data.ends)):
        extra, kept[rows] = judge_residuals(
            *(residual[rows, None], data.variance[rows], system.leverage[rows]),
            *(kept[rows], data.usable[rows], settings.clip_sigma),
        )
        excess[number] = np.sqrt(extra)
    return replace(solution, kept=kept, excess=excess)


def _improved(
    data: _Data, solution: TractPhotometry, settings: TractPhotometrySettings
) -> tuple[TractPhotometry, float]:
    """Return an improved solution, and by how many sigma detections have moved, rms."""
    solution, system, residual, _ = _with_stars(data, solution, settings)
    shape = system.shape
    start = shape.detectors, np.zeros_like(shape.constants)
    change, steps = solve_step(system, residual, start, _TOLERANCE, _MOST_STEPS)
    size = system.size_of(change)
    _LOG.info(
        "%d of %d detections, scatter beyond errors %.4f mag; moved by %.3f sigma (%d steps)",
        *(system.n_used, len(data.star), np.median(solution.excess), size, steps),
    )
    solution = replace(
        solution,
        coefficients=solution.coefficients + change.exposures[:, 0],
        illumination=solution.illumination + change.detectors.reshape(solution.illumination.shape),
        color_extinction=solution.color_extinction + change.colors,
    )
    return solution, size


def _judged(data: _Data, solution: TractPhotometry, clip_sigma: float) -> TractPhotometry:
    """Return the solution with the scatter of the stars that were withheld."""
    calibrated, _ = _calibrated(data, solution)
    n_bands = len(data.exposures.bands)
    chosen = solution.withheld[data.star // n_bands] & np.isfinite(calibrated + data.variance)
    star, value, variance = data.star[chosen], calibrated[chosen], data.variance[chosen]
    kept = np.ones(len(star), dtype=bool)
    for _ in range(_JUDGED_FITS):
        weight = kept / variance
        weights = np.bincount(star, weight, len(data.prior))
        sums = np.bincount(star, weight * value, len(data.prior))
        mean = np.divide(sums, weights, out=np.zeros_like(sums), where=weights > 0)
        kept = (value - mean[star]) ** 2 <= clip_sigma**2 * variance
    own = 1.0 - weight / np.maximum(weights[star], 1e-300)
    often = (weight > 0) & (own > 1.0 - MOST_LEVERAGE)
    square = (value - mean[star])[often] ** 2 / own[often]
    found = np.full(n_bands, np.nan)
    for band in range(n_bands):
        here = star[often] % n_bands == band
        if here.any():
            found[band] = np.sqrt(excess_variance(square[here, None], variance[often][here]))
    return replace(solution, withheld_excess=found)
