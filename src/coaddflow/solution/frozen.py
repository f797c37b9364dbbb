"""Later exposures of a tract, each fitted by itself to the stars of a solution.

A solution that warps were made from is kept: an exposure that comes later takes its detectors and
its stars as they are, and only gets a map and zero-points of its own.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix
from coaddflow.geometry.sphere import tan_project
from coaddflow.settings.solution import SolutionSettings, TractAstrometrySettings, WaveSettings
from coaddflow.solution.astrometry import supported_map_order
from coaddflow.solution.detections import MAS, Detections, Exposures
from coaddflow.solution.detector_maps import DetectorMaps, order_of
from coaddflow.solution.excess import excess_variance
from coaddflow.solution.linking import mutual_nearest
from coaddflow.solution.photometry import (
    ExposureCalibration,
    TractPhotometry,
    supported_zero_point_order,
)
from coaddflow.solution.positions import ExposureMap, TractAstrometry
from coaddflow.solution.waves import WaveField, fit_residuals

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_MOST_FITS = 12


def fit_exposure(
    detections: Detections,
    exposure: Exposures,
    solution: TractAstrometry,
    color: FloatArray,
    settings: SolutionSettings,
) -> tuple[ExposureMap, NDArray[np.int32]]:
    """Fit the map of an exposure to the stars of a solution, which stays as it is.

    Parameters
    ----------
    detections : Detections
        All those of this exposure.
    exposure : Exposures
        This exposure alone. In an epoch that the solution does not have, its CCDs are where they
        are in the mean.
    solution : TractAstrometry
        The solution.
    color : ndarray of float64, shape (n stars,)
        Colours of the stars of the solution, mag; NaN where not known.
    settings : SolutionSettings
        Those of the solution.

    Returns
    -------
    exposure_map : ExposureMap
        As `TractAstrometry.of_exposure` gives it.
    star : ndarray of int32, shape (n,)
        Star of each detection; -1 if it has none, or was rejected.

    Raises
    ------
    InputError
        If it has too few stars of the solution.
    """
    limits, frame = settings.astrometry, solution.frame
    alone = replace(solution, exposures=exposure, fields=(None,))
    star = _stars_of(detections, alone, settings.linking.radius / 3600.0)
    rows = np.flatnonzero(star >= 0)
    constants = np.zeros_like(solution.constants[0])
    if exposure.epoch[0] < len(solution.constants):
        constants = solution.constants[exposure.epoch[0]]
    maps = solution.detectors.moved(constants[..., None])
    field, variance = _field_of(detections.take(rows), maps, limits)
    order = supported_map_order(
        field / solution.radius, detections.ccd[rows], maps, exposure.name[0], limits
    )
    plane, star_variance = _true_planes(alone, star[rows])
    color_vector = solution.dispersion[exposure.band[0]] * alone.zenith[0]
    relative = np.nan_to_num(color[star[rows]] - solution.median_color)
    target = plane + np.multiply.outer(relative, color_vector)
    fit = _fit_map(
        design_matrix(*field.T / solution.radius, order),
        *(target, variance + star_variance, limits.clip_sigma, settings.turbulence, MAS),
    )
    star[rows[~fit.kept]] = -1
    found = ExposureMap(
        *(exposure.name[0], frame, alone.pointings[0], maps, solution.radius, fit.coefficients),
        *(color_vector, fit.field, float(fit.excess * MAS)),
    )
    return found, star


def calibrate_exposure(
    detections: Detections,
    star: NDArray[np.int32],
    exposure: Exposures,
    solution: TractPhotometry,
    color: FloatArray,
    settings: SolutionSettings,
) -> ExposureCalibration:
    """Fit the zero-points of an exposure to the stars of a solution, which stays as it is.

    Parameters
    ----------
    detections : Detections
        All those of this exposure.
    star : ndarray of int32, shape (n,)
        Star of each, -1 if it has none: from `fit_exposure`.
    exposure : Exposures
        This exposure alone.
    solution : TractPhotometry
        The solution.
    color : ndarray of float64, shape (n stars,)
        Colours of the stars of the solution, mag; NaN where not known.
    settings : SolutionSettings
        Those of the solution.

    Raises
    ------
    InputError
        If none of its stars has a magnitude in its band.
    """
    limits, band, maps = settings.photometry, int(exposure.band[0]), solution.detectors
    true = np.where(star >= 0, solution.magnitude[star, band], np.nan)
    rows = np.flatnonzero(np.isfinite(true + detections.magnitude + detections.magnitude_error))
    if len(rows) == 0:
        raise InputError(
            f"exposure {exposure.name[0]} has no star with a magnitude in the solution",
            remedy="solve its tract again with it",
        )
    detections, star, true = detections.take(rows), star[rows], true[rows]
    unit = maps.unit(detections.ccd, detections.x, detections.y)
    own = solution.illumination[band][detections.ccd]
    static = np.sum(design_matrix(*unit, order_of(own.shape[1])) * own, axis=1)
    of_band = solution.exposures.band == band
    airmass = exposure.airmass[0] - solution.exposures.airmass[of_band].mean()
    relative = np.nan_to_num(color[star] - solution.median_color)
    static += solution.color_extinction[band] * airmass * relative
    field = maps.place(detections.ccd, *unit)
    variance = detections.magnitude_error.astype(float) ** 2 + limits.error_floor**2
    variance += solution.magnitude_error[star, band] ** 2
    order = supported_zero_point_order(len(rows), limits)
    fit = _fit_map(
        design_matrix(*field.T / solution.radius, order),
        *((true - detections.magnitude - static)[:, None], variance, limits.clip_sigma),
        *(settings.clouds, 1.0, field),
    )
    return ExposureCalibration(
        *(exposure.name[0], maps, solution.radius, fit.coefficients[0]),
        *(solution.illumination[band], fit.field, fit.excess),
    )


class _Fit(NamedTuple):
    coefficients: FloatArray
    field: WaveField | None
    kept: BoolArray
    excess: float


def _stars_of(detections: Detections, alone: TractAstrometry, radius: float) -> NDArray[np.int32]:
    """Return the star of each detection, -1 if it has none."""
    years, factors = alone.times
    every = np.arange(len(alone.stars.longitude))
    known = np.flatnonzero(alone.stars.covariance[:, 0, 0] > 0)
    place = np.stack(alone.stars.at(every, years[0], factors[0]), axis=1)[known]
    here = np.stack(alone.frame.of_sky(detections.ra, detections.dec), axis=1)
    found, _ = mutual_nearest(place, here, radius)
    if not (found >= 0).any():
        raise InputError(
            f"exposure {alone.exposures.name[0]} has no star of the solution",
            remedy="solve its tract again with it",
        )
    return np.where(found >= 0, known[found], -1).astype(np.int32)


def _field_of(
    detections: Detections, maps: DetectorMaps, settings: TractAstrometrySettings
) -> tuple[FloatArray, FloatArray]:
    """Return field positions in degrees (n, 2), and variances of the centroids, degrees^2."""
    ccd = detections.ccd
    field = maps.place(ccd, *maps.unit(ccd, detections.x, detections.y))
    error = np.hypot(detections.error, settings.error_floor) * maps.pixel_scale[ccd]
    return field, error**2


def _true_planes(alone: TractAstrometry, star: NDArray[np.int32]) -> tuple[FloatArray, FloatArray]:
    """Return positions of stars on the tangent plane (n, 2), and their variances in one axis."""
    years, factors = (values[0] for values in alone.times)
    sky = alone.stars.at(star, years, factors)
    plane = np.stack(tan_project(*sky, *alone.pointings[0]), axis=1)
    design = np.array([[1.0, 0.0, years, 0.0, factors[0]], [0.0, 1.0, 0.0, years, factors[1]]])
    variance = np.einsum("ai,nij,aj->n", design, alone.stars.covariance[star], design) / 2.0
    return plane, variance


def _fit_map(
    design: FloatArray,
    target: FloatArray,
    variance: FloatArray,
    clip_sigma: float,
    waves: WaveSettings,
    unit: float,
    points: FloatArray | None = None,
) -> _Fit:
    """Fit a polynomial, clipped and weighted by the scatter, and then a field of waves.

    The field is in the unit of the target over ``unit``, at ``points`` or else where the polynomial
    is.
    """
    kept, excess, field = np.ones(len(target), dtype=bool), 0.0, None
    rounds = waves.rounds if waves.enabled else 0
    moved = np.zeros_like(target)
    for attempt in range(_MOST_FITS + rounds):
        weight = kept / (variance + excess**2)
        root = np.sqrt(weight)[:, None]
        coefficients = np.linalg.lstsq(root * design, root * (target - moved), rcond=None)[0]
        plane = design @ coefficients
        residual = plane + moved - target
        leverage = np.zeros(len(target), np.float32)
        if attempt >= _MOST_FITS:
            inputs = residual * unit, weight / unit**2, leverage, excess * unit
            where = plane if points is None else points
            field = fit_residuals(where, *inputs, field, waves)
            moved = field.value(where) / unit if field is not None else moved
            residual = plane + moved - target
        extra = excess_variance(residual[kept] ** 2, variance[kept])
        excess = float(np.sqrt(extra))
        kept = np.max(residual**2, axis=1) <= clip_sigma**2 * (variance + extra)
    return _Fit(coefficients.T, field, kept, excess)
