"""A model of the whole focal plane on the sky, fitted by least squares to the stars of all CCDs.

The camera file gives each pixel a position in the field. The model adds one polynomial over the
field (pointing, rotation, scale and distortion of the exposure) and a small polynomial for each
CCD (its true position, rotation and shape). The terms of the CCDs have Gaussian priors [1]_: a CCD
with many stars follows its stars, one with few follows the exposure. The widths of the priors
maximise the evidence of the exposure [2]_, up to the limits of the settings.

Positions are in field pixels: the tangent plane of the camera file at the predicted rotation, in
units of its pixel scale. Its axes point east and north, and a CCD pixel is about one field pixel.

References
----------
.. [1] Bernstein et al. 2017, PASP 129, 074503 (maps of exposure and detectors in series).
.. [2] MacKay 1992, Neural Computation 4, 415 (widths of priors from the data).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from coaddflow.geometry.polynomial import design_matrix, term_powers
from coaddflow.geometry.sphere import tan_deproject, tan_project
from coaddflow.image.statistics import RAYLEIGH_MEDIAN
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings

FloatArray = NDArray[np.float64]

_NARROWEST_PRIOR = 0.01
"""Smallest width of a prior, as a fraction of its limit."""

_ENOUGH_CCDS = 5
"""With fewer CCDs the priors keep the widths of the settings."""

_FEW_ERRORS = 1.5
"""Expected error over the rms of very few errors."""


@dataclass(frozen=True)
class CcdPlace:
    """The position of a CCD in the camera file.

    Attributes
    ----------
    camera, detector : Camera, Detector
        The camera and its CCD.
    rotation : float
        Predicted rotation of the exposure, degrees.
    """

    camera: Camera
    detector: Detector
    rotation: float

    def field(self, x: FloatArray, y: FloatArray) -> FloatArray:
        """Return the positions in field pixels, shape (2, n), of pixels (n,)."""
        focal = self.camera.pixel_to_focal(self.detector, x, y)
        plane = np.stack(self.camera.focal_to_tangent(*focal, self.rotation))
        return plane / (self.camera.pixel_scale / 3600.0)

    @property
    def centre(self) -> FloatArray:
        """Position of the CCD's centre, field pixels, shape (2, 1)."""
        nx, ny = self.detector.size
        return self.field(np.array([(nx - 1) / 2.0]), np.array([(ny - 1) / 2.0]))

    @property
    def half(self) -> float:
        """Half of the CCD's longer side, pixels."""
        return max(self.detector.size) / 2.0

    @property
    def edge(self) -> FloatArray:
        """Positions of the corners and of the middles of the sides, field pixels, shape (2, 8)."""
        nx, ny = self.detector.size
        x = np.array([0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0, 0.0]) * nx - 0.5
        y = np.array([0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.5]) * ny - 0.5
        return self.field(x, y)

    @property
    def jacobian(self) -> FloatArray:
        """Field pixels per pixel at the centre, shape (2, 2)."""
        nx, ny = self.detector.size
        x = (nx - 1) / 2.0 + np.array([-0.5, 0.5, 0.0, 0.0])
        y = (ny - 1) / 2.0 + np.array([0.0, 0.0, -0.5, 0.5])
        place = self.field(x, y)
        return place[:, 1::2] - place[:, ::2]

    def basis(self, place: FloatArray, order: int) -> FloatArray:
        """Return the displacement by each term of the CCD at positions (2, n), (2, n, terms).

        The terms are: offset along both axes; rotation; scale; both shears; then, for the powers
        of second and higher order, one for each axis. Each is 1 at half of the longer side.
        """
        u, v = (place - self.centre) / self.half
        zero, one = np.zeros_like(u), np.ones_like(u)
        columns = [(one, zero), (zero, one), (-v, u), (u, v), (u, -v), (v, u)]
        for p, q in term_powers(order)[3:]:
            term = u**p * v**q
            columns += [(term, zero), (zero, term)]
        return np.moveaxis(np.array(columns), 0, -1)


@dataclass(frozen=True)
class Priors:
    """Standard deviations of the terms of the CCDs, pixels (see `CcdPlace.basis`)."""

    offset: float
    rotation: float
    shape: float
    ccd_order: int

    @classmethod
    def of(cls, settings: ExposureAstrometrySettings) -> "Priors":
        """Take the limits from the settings."""
        return cls(
            settings.offset_sigma, settings.rotation_sigma, settings.shape_sigma, settings.ccd_order
        )

    @property
    def sigmas(self) -> FloatArray:
        """The standard deviation of each term, shape (terms,)."""
        n_bent = 2 * len(term_powers(self.ccd_order)[3:])
        return np.array([self.offset] * 2 + [self.rotation] + [self.shape] * (3 + n_bent))


@dataclass(frozen=True)
class FieldModel:
    """The focal plane on the sky.

    Attributes
    ----------
    crval : ndarray, shape (2,)
        Tangent point: ICRS degrees.
    matrix : ndarray, shape (2, 2)
        Degrees on the tangent plane per field pixel.
    radius : float
        Field pixels; polynomials over the field are in units of it.
    common : ndarray, shape (2, n terms)
        Coefficients of the common polynomial, field pixels.
    ccd_terms : dict of int to ndarray, shape (terms,)
        Terms of the CCDs in the fit, field pixels.
    ccd_order : int
        Their order.
    """

    crval: FloatArray
    matrix: FloatArray
    radius: float
    common: FloatArray = field(default_factory=lambda: np.zeros((2, 3)))
    ccd_terms: Mapping[int, FloatArray] = field(default_factory=dict)
    ccd_order: int = 1

    @property
    def order(self) -> int:
        """Order of the common polynomial."""
        return int(np.sqrt(2 * self.common.shape[1])) - 1

    def catalogue(self, sky: FloatArray) -> FloatArray:
        """Return the field pixels (2, n) of sky positions (2, n) in degrees."""
        return np.linalg.solve(self.matrix, np.stack(tan_project(*sky, *self.crval)))

    def expected(self, ccd: CcdPlace, place: FloatArray) -> FloatArray:
        """Return the true field pixels (2, n) of positions (2, n) on a CCD."""
        moved = place + self.common @ design_matrix(*place / self.radius, self.order).T
        terms = self.ccd_terms.get(ccd.detector.id)
        return moved if terms is None else moved + ccd.basis(place, self.ccd_order) @ terms

    def to_sky(self, ccd: CcdPlace, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return ICRS positions in degrees of pixels (n,) of a CCD."""
        place = self.matrix @ self.expected(ccd, ccd.field(np.asarray(x), np.asarray(y)))
        return tan_deproject(*place, *self.crval)

    def recentred(self) -> "FieldModel":
        """Return the model without its polynomials, tangent to the sky where its origin is."""
        crval = np.array(tan_deproject(*(self.matrix @ self.common[:, 0]), *self.crval))
        linear = np.eye(2) + self.common[:, 1:3] / self.radius
        return FieldModel(crval, self.matrix @ linear, self.radius)


@dataclass(frozen=True)
class CcdPairs:
    """Stars of a CCD that are matched with the catalogue.

    Attributes
    ----------
    ccd : CcdPlace
        Where the CCD is in the focal plane.
    place : ndarray, shape (2, n)
        Measured positions, field pixels.
    sky : ndarray, shape (2, n)
        Positions in the catalogue, degrees.
    error : ndarray, shape (n,)
        Errors of these, one axis, pixels.
    source_index, reference_index : ndarray of int, shape (n,)
        Rows of the sources and of the reference catalogue.
    kept : ndarray of bool, shape (n,)
        False for outliers.
    """

    ccd: CcdPlace
    place: FloatArray
    sky: FloatArray
    error: FloatArray
    source_index: NDArray[np.intp]
    reference_index: NDArray[np.intp]
    kept: NDArray[np.bool_]

    def residual(self, model: FieldModel) -> FloatArray:
        """Return measured minus catalogue position, field pixels, shape (2, n)."""
        return model.expected(self.ccd, self.place) - model.catalogue(self.sky)


@dataclass(frozen=True)
class FieldFit:
    """A fitted model.

    Attributes
    ----------
    model : FieldModel
        The fitted mapping of the focal plane to the sky.
    priors : Priors
        The priors that were used.
    error_scale : float
        Ratio of the residuals to the errors of the stars; at least 1.
    common_covariance : ndarray, shape (2 T, 2 T)
        Covariance of the coefficients of the common polynomial.
    ccd_covariance : dict of int to ndarray, shape (terms, terms)
        Covariance of the terms of a CCD for a given common polynomial.
    response : dict of int to ndarray, shape (terms, 2 T)
        Minus the derivative of the terms of a CCD by the coefficients of the common polynomial.
    """

    model: FieldModel
    priors: Priors
    error_scale: float
    common_covariance: FloatArray
    ccd_covariance: dict[int, FloatArray]
    response: dict[int, FloatArray]

    def formal_error(self, ccd: CcdPlace) -> float:
        """Return the largest formal error on the edge of a CCD, both axes together, pixels.

        Of a CCD that is not in the fit: its terms may differ from 0 as much as the priors say.
        """
        place, number = ccd.edge, ccd.detector.id
        design = design_matrix(*place / self.model.radius, self.model.order)
        own = ccd.basis(place, self.model.ccd_order)
        response = self.response.get(number, np.zeros((own.shape[-1], self.model.common.size)))
        covariance = self.ccd_covariance.get(number)
        if covariance is None:
            covariance = np.diag(self.priors.sigmas**2)
        total = np.zeros(place.shape[1])
        for axis, rows in enumerate(np.split(np.kron(np.eye(2), design), 2)):
            common = rows - own[axis] @ response
            total += np.einsum("ni,ij,nj->n", common, self.common_covariance, common)
            total += np.einsum("ni,ij,nj->n", own[axis], covariance, own[axis])
        return float(np.sqrt(total.max()))

    def variance(self, number: int) -> FloatArray:
        """Return the variances of the terms of a CCD, shape (terms,)."""
        response = self.response[number]
        common = np.einsum("ki,ij,kj->k", response, self.common_covariance, response)
        return np.diag(self.ccd_covariance[number]) + common

    def degrees_used(self) -> float:
        """Return the effective number of parameters, which priors reduce."""
        held = 1.0 / self.priors.sigmas**2
        own = [held.size - np.sum(np.diag(c) * held) for c in self.ccd_covariance.values()]
        return self.model.common.size + float(np.sum(own))


def fit_field(
    pairs: dict[int, CcdPairs],
    start: FieldModel,
    order: int,
    limits: Priors,
    clip_sigma: float,
    priors: Priors | None = None,
) -> tuple[FieldFit, dict[int, CcdPairs]]:
    """Fit the common polynomial and the terms of all CCDs together.

    Outliers are rejected, the errors and priors are measured, and the fit is repeated until it
    keeps the same stars.

    Parameters
    ----------
    pairs : mapping of int to CcdPairs
        Matched stars of each CCD; the first fit uses those that are ``kept``.
    start : FieldModel
        Gives the tangent plane; the equations are linear near its pointing.
    order : int
        Order of the common polynomial.
    limits : Priors
        The widest priors of the CCDs' terms.
    clip_sigma : float
        Limit of outliers in units of the scatter of all stars.
    priors : Priors, optional
        Those of an earlier fit.

    Returns
    -------
    fit : FieldFit
        Model, its errors and the priors that were used.
    pairs : dict of int to CcdPairs
        The stars, with ``kept`` set.
    """
    priors, scale, model = priors or limits, 1.0, start
    for _ in range(12):
        fit = _fit_kept(pairs, model, order, priors, scale)
        model = fit.model
        distance = {
            number: np.hypot(*stars.residual(model)) / stars.error
            for number, stars in pairs.items()
        }
        used = np.concatenate([distance[number][stars.kept] for number, stars in pairs.items()])
        freedom = max(1.0 - fit.degrees_used() / (2.0 * used.size), 0.1)
        scale = max(1.0, float(np.median(used) / np.sqrt(freedom)) / RAYLEIGH_MEDIAN)
        clipped = {
            number: replace(stars, kept=distance[number] <= clip_sigma * scale)
            for number, stars in pairs.items()
        }
        new_priors = _measured_priors(fit, limits)
        same = all(np.array_equal(clipped[n].kept, pairs[n].kept) for n in pairs)
        settled = np.allclose(new_priors.sigmas, priors.sigmas, rtol=0.03)
        pairs, priors = clipped, new_priors
        if same and settled and abs(scale / fit.error_scale - 1.0) < 0.01:
            break
    return fit, pairs


def model_of_missing_ccd(
    fit: FieldFit, pairs: Mapping[int, CcdPairs], ccd: CcdPlace
) -> tuple[FieldModel, float]:
    """Return the model for a CCD that is not in the fit, and its expected error there, pixels.

    With few CCDs the priors are not measured, and a polynomial of high order is not defined beyond
    them. Each CCD is then predicted from the others, at each order, and the order is taken at which
    that is best.

    Parameters
    ----------
    fit : FieldFit
        The fit to the other CCDs.
    pairs : mapping of int to CcdPairs
        Their stars.
    ccd : CcdPlace
        The CCD.
    """
    if len(pairs) >= _ENOUGH_CCDS:
        return fit.model, fit.formal_error(ccd)
    best = fit.model, np.inf
    for order in range(1, fit.model.order + 1):
        try:
            errors = [
                _difference(stars.ccd, _without(number, pairs, fit, order), fit.model)
                for number, stars in pairs.items()
            ]
            model = _without(None, pairs, fit, order)
        except np.linalg.LinAlgError:
            continue
        error = _FEW_ERRORS * float(np.sqrt(np.mean(np.square(errors))))
        if error < best[1]:
            best = model, error
    return best


def _without(
    number: int | None, pairs: Mapping[int, CcdPairs], fit: FieldFit, order: int
) -> FieldModel:
    """Return the model without one of the CCDs."""
    others = {other: stars for other, stars in pairs.items() if other != number}
    return _fit_kept(others, fit.model, order, fit.priors, fit.error_scale).model


def _difference(ccd: CcdPlace, model: FieldModel, truth: FieldModel) -> float:
    """Return the largest distance on the edge of a CCD between two models, pixels."""
    place = ccd.edge
    sky = tan_deproject(*(model.matrix @ model.expected(ccd, place)), *model.crval)
    return float(np.hypot(*(truth.catalogue(np.stack(sky)) - truth.expected(ccd, place))).max())


def _fit_kept(
    pairs: Mapping[int, CcdPairs], start: FieldModel, order: int, priors: Priors, error_scale: float
) -> FieldFit:
    """Fit to the stars that are kept.

    The normal equations are solved CCD by CCD: its terms are eliminated, and follow once the
    common polynomial is known. Raises LinAlgError if the stars do not determine the model.
    """
    frame = start.recentred()
    held = np.diag(1.0 / priors.sigmas**2)
    n_common = 2 * len(term_powers(order))
    matrix, right = np.zeros((n_common, n_common)), np.zeros(n_common)
    covariance, response, alone = {}, {}, {}
    for number, stars in pairs.items():
        place, target = stars.place[:, stars.kept], frame.catalogue(stars.sky[:, stars.kept])
        weight = 1.0 / (stars.error[stars.kept] * error_scale)
        design = design_matrix(*place / frame.radius, order) * weight[:, None]
        common = np.kron(np.eye(2), design)
        own = (stars.ccd.basis(place, priors.ccd_order) * weight[:, None]).reshape(
            -1, priors.sigmas.size
        )
        difference = ((target - place) * weight).ravel()
        covariance[number] = np.linalg.inv(own.T @ own + held)
        response[number] = covariance[number] @ (own.T @ common)
        alone[number] = covariance[number] @ (own.T @ difference)
        matrix += common.T @ common - common.T @ own @ response[number]
        right += common.T @ difference - common.T @ own @ alone[number]
    common_covariance = np.linalg.inv(matrix)
    solution = common_covariance @ right
    if not np.isfinite(solution).all():
        raise np.linalg.LinAlgError("the fit of the focal plane diverged")
    model = replace(
        frame,
        common=solution.reshape(2, -1),
        ccd_terms={n: alone[n] - response[n] @ solution for n in pairs},
        ccd_order=priors.ccd_order,
    )
    return FieldFit(model, priors, error_scale, common_covariance, covariance, response)


def _measured_priors(fit: FieldFit, limits: Priors) -> Priors:
    """Return the widths that follow from this fit.

    The sum of squares of the terms of a kind is divided by the number of them that the stars, not
    the priors, determine [2]_.
    """
    if len(fit.ccd_covariance) < _ENOUGH_CCDS:
        return limits
    numbers = list(fit.ccd_covariance)
    squares = np.sum([fit.model.ccd_terms[number] ** 2 for number in numbers], axis=0)
    variance = np.sum([fit.variance(number) for number in numbers], axis=0)
    determined = len(numbers) - variance / fit.priors.sigmas**2
    kinds = (slice(0, 2), slice(2, 3), slice(3, None))
    most = np.array([limits.offset, limits.rotation, limits.shape])
    widths = [np.sqrt(squares[k].sum() / max(determined[k].sum(), 1e-3)) for k in kinds]
    widths = np.clip(widths, _NARROWEST_PRIOR * most, most)
    return Priors(*(float(width) for width in widths), limits.ccd_order)
