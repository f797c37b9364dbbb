"""Fitting the PSF model to the stars of an image [1]_.

All samples of all terms are fitted together to the pixels of all stars, each pixel with its own
weight, as they stand: no star is resampled.

References
----------
.. [1] Bertin 2011, ASP Conf. Ser. 442, 435 (PSFEx: pixel basis, super-resolution, variation).
.. [2] Hestenes & Stiefel 1952, J. Res. NBS 49, 409 (conjugate gradients).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from coaddflow.compiled import njit
from coaddflow.errors import CcdFailure, Reason, failing_ccd
from coaddflow.geometry.polynomial import term_powers
from coaddflow.image.masked_image import MaskedImage
from coaddflow.image.row_blocks import over_rows
from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import mad_sigma
from coaddflow.measure.background import NOT_MEASURED
from coaddflow.measure.detection import Detection
from coaddflow.measure.psf_model import (
    LEAST_REACH,
    Kernels,
    PsfModel,
    add_samples,
    kernels,
    make_room,
    render,
    to_pixels,
)
from coaddflow.settings.psf import PsfSettings

_ROUNDS = 3
"""Rounds of fitting fluxes, centres and weights of the stars, then the model."""

_FIRST_STARS = 50
_ENOUGH_FOR_SCATTER = 5

_GROW = 0.5
"""Growth of the pixels of neighbours, in FWHM."""

_PIXEL_CLIP = 5.0

_MISFIT_SCATTER = 0.15
"""Least scatter of the stars' misfits, relative to their median: they differ in brightness."""

_CORE, _WHOLE = 0.02, 0.7
"""The core of a star is where it is brighter than 2 % of its peak; 70 % of it must be usable."""

_PRIOR_OF_MEAN, _PRIOR_OF_CHANGE, _PRIOR_FLOOR = 0.1, 1.0, 2e-3
_MAX_ITERATIONS = 60

_LEAST_STARS, _LEAST_SAMPLES = 8, 4
"""Stars, and rows of samples, that are worth a block of their own."""

_NO_FIT = "the PSF model cannot be fitted to the stars"
_NO_FLUXES = "the fluxes and centres of the PSF stars cannot be fitted"

_TOLERANCE, _FIRST_TOLERANCE = 1e-11, 1e-7
"""Conjugate gradients stop when the squared residual is this part of the right side; the models of
the first rounds only serve to fit the stars."""


@dataclass(frozen=True)
class PsfQuality:
    """What a PSF model rests on, and its figures at the centre of the CCD.

    Attributes
    ----------
    n_stars : int
        Stars of the model, outliers left out.
    fwhm : float
        FWHM, pixels.
    e1, e2 : float
        Ellipticity, see `PsfModel.shape_at`.
    """

    n_stars: int
    fwhm: float
    e1: float
    e2: float


@dataclass
class _Stars:
    """Pixels around the stars; arrays of shape (n, s, s) or (n,)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    pixels: NDArray[np.float64]
    usable: NDArray[np.bool_]
    sky_variance: NDArray[np.float64]
    flux: NDArray[np.float64]
    dx: NDArray[np.float64]
    dy: NDArray[np.float64]

    def subset(self, keep: NDArray[np.bool_]) -> "_Stars":
        return _Stars(**{name: value[keep] for name, value in vars(self).items()})


def fit_psf(
    masked_image: MaskedImage,
    detection: Detection,
    is_star: NDArray[np.bool_],
    settings: PsfSettings,
    threads: int = 1,
) -> tuple[PsfModel, PsfQuality, NDArray[np.bool_]]:
    """Fit the PSF of a CCD to its stars.

    Parameters
    ----------
    masked_image : MaskedImage
        Image without its sky, electrons.
    detection : Detection
        Its sources, and the pixels that belong to them: those of neighbours have no weight.
    is_star : ndarray of bool, shape (n sources,)
        From `measure.stars.select_stars`.
    settings : PsfSettings
        Size, sampling, order, clipping.
    threads : int
        Number of threads that share the stars.

    Returns
    -------
    model : PsfModel
        The model, which varies over the CCD.
    quality : PsfQuality
        Its figures.
    used : ndarray of bool, shape (n sources,)
        The stars of `is_star` that were not clipped.

    Raises
    ------
    CcdFailure
        ``no_psf_stars`` if fewer than ``settings.min_stars`` are left; ``psf_fit_failed`` if no
        model fits the pixels of the stars.
    """
    index = np.flatnonzero(is_star)
    fwhm = float(np.median(np.asarray(detection.sources["fwhm"])[index]))
    stars = _cut_out(masked_image, detection, index, fwhm, settings)
    model = _first_model(stars, masked_image.shape, fwhm, settings)
    prior = model
    for round_number in range(_ROUNDS):
        _fit_fluxes_and_centres(stars, model)
        weight, good = _weights(stars, model, settings, first=round_number == 0)
        stars, weight, index = stars.subset(good), weight[good], index[good]
        if index.size < settings.min_stars:
            raise CcdFailure(
                Reason.NO_PSF_STARS,
                f"{index.size} stars agree on a PSF, {settings.min_stars} are needed",
            )
        order = settings.order
        while order > 0 and len(term_powers(order)) * settings.stars_per_term > index.size:
            order -= 1
        prior = _with_order(prior, order)
        tolerance = _TOLERANCE if round_number == _ROUNDS - 1 else _FIRST_TOLERANCE
        model = _solve(stars, weight, _with_order(model, order), prior, tolerance, threads)
    used = np.zeros(is_star.size, dtype=bool)
    used[index] = True
    e1, e2 = model.shape_at(*model.center)
    return model, PsfQuality(index.size, model.fwhm_at(*model.center), e1, e2), used


def _cut_out(masked_image, detection, index, fwhm, settings) -> _Stars:
    """Return the stars with the weights of neighbours and unmeasured pixels at zero."""
    sources = detection.sources[index]
    x, y = np.asarray(sources["x"]), np.asarray(sources["y"])
    half = max(4, int(np.ceil(settings.radius * fwhm)))
    pixels, inside = cut_stamps(masked_image.image, x, y, half)
    variance, _ = cut_stamps(masked_image.variance, x, y, half)
    mask, _ = cut_stamps(masked_image.mask, x, y, half)
    segments, _ = cut_stamps(detection.segments, x, y, half)
    own = np.asarray(sources["id"])[:, None, None]
    reach = np.arange(-half, half + 1)
    round_stamp = np.hypot(reach[:, None], reach) < half + 0.5
    others = (segments != 0) & (segments != own)
    growth = max(1, round(_GROW * fwhm))
    others = ndimage.binary_dilation(others, np.ones((1, 3, 3), bool), growth)
    usable = inside & round_stamp & (~others | (segments == own))
    usable &= np.isfinite(pixels) & np.isfinite(variance) & (variance > 0)
    usable &= (mask & np.int32(NOT_MEASURED)) == 0
    sky = usable & (segments == 0)
    return _Stars(
        x=x,
        y=y,
        pixels=np.where(usable, pixels, 0.0).astype(float),
        usable=usable,
        sky_variance=_sky_variance(variance, sky),
        flux=np.asarray(sources["flux_isophotal"], dtype=float),
        dx=x - np.rint(x),
        dy=y - np.rint(y),
    )


def _sky_variance(variance: NDArray, sky: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the median variance of the sky in each stamp, or in all of them if it has none."""
    result = np.full(variance.shape[0], np.nan)
    for i in np.flatnonzero(sky.any(axis=(1, 2))):
        result[i] = np.median(variance[i][sky[i]])
    finite = np.isfinite(result)
    if finite.any():
        return np.where(finite, result, np.median(result[finite]))
    # stars everywhere: the darkest pixels are the nearest thing to sky
    return np.full(variance.shape[0], np.min(variance[np.isfinite(variance) & (variance > 0)]))


def _first_model(stars: _Stars, shape, fwhm: float, settings: PsfSettings) -> PsfModel:
    """Return an elliptical Moffat profile fitted to the brightest stars together."""
    half = stars.pixels.shape[1] // 2
    reach = np.arange(-half, half + 1)
    bright = np.argsort(-stars.flux)[:_FIRST_STARS]
    dx = reach[None, None, :] - stars.dx[bright, None, None]
    dy = reach[None, :, None] - stars.dy[bright, None, None]
    flux = stars.flux[bright, None, None]
    near = stars.usable[bright] & (np.hypot(dx, dy) < 2.5 * fwhm)
    value = (stars.pixels[bright] / flux)[near]
    weight = np.broadcast_to(flux / np.sqrt(stars.sky_variance[bright, None, None]), near.shape)
    dx, dy = (np.broadcast_to(d, near.shape)[near] for d in (dx, dy))

    def misfit(parameters):
        return weight[near] * (value - _moffat(dx, dy, *parameters))

    with failing_ccd(Reason.PSF_FIT_FAILED, _NO_FIT, ValueError, np.linalg.LinAlgError):
        fitted = optimize.least_squares(
            misfit,
            (1.0 / fwhm**2, 0.8 * fwhm, 3.0, 0.0, 0.0),
            bounds=((0.0, 0.1 * fwhm, 1.5, -0.7, -0.7), (10.0, 10.0 * fwhm, 30.0, 0.7, 0.7)),
            x_scale=(1.0 / fwhm**2, fwhm, 1.0, 0.1, 0.1),
            loss="soft_l1",
            f_scale=3.0,
        )
    _, alpha, beta, *_ = fitted.x
    true_fwhm = 2.0 * alpha * np.sqrt(2.0 ** (1.0 / beta) - 1.0)
    step = float(true_fwhm / settings.samples_per_fwhm)
    n_steps = max(int(np.ceil((half + 0.5) / step)), LEAST_REACH)
    reach = np.arange(-n_steps, n_steps + 1) * step
    samples = _moffat(reach[None, :], reach[:, None], *fitted.x)
    ny, nx = shape
    return PsfModel(
        basis=(samples / samples.sum() / step**2)[None],
        order=0,
        step=step,
        half=half,
        center=((nx - 1) / 2.0, (ny - 1) / 2.0),
        scale=(nx / 2.0, ny / 2.0),
    )


def _moffat(dx, dy, amplitude, alpha, beta, e1, e2):
    """Return an elliptical Moffat profile; (e1, e2) as in `PsfModel.shape_at`."""
    radius2 = (1.0 - e1) * dx**2 + (1.0 + e1) * dy**2 - 2.0 * e2 * dx * dy
    radius2 = radius2 / np.sqrt(1.0 - e1**2 - e2**2)
    return amplitude * (1.0 + radius2 / alpha**2) ** -beta


def _with_order(model: PsfModel, order: int) -> PsfModel:
    """Return the same PSF as a polynomial of another order (terms added are zero)."""
    n = len(term_powers(order))
    basis = np.zeros((n, *model.basis.shape[1:]))
    basis[: model.basis.shape[0]] = model.basis[:n]
    return replace(model, basis=basis, order=order)


def _fit_fluxes_and_centres(stars: _Stars, model: PsfModel) -> None:
    """Fit flux and position of every star, in place; the mean shift of all stays zero."""
    delta = 0.01
    samples = model.samples_at(stars.x, stars.y)
    for _ in range(2):
        image = render(model, samples, stars.dx, stars.dy)
        norm = image.sum(axis=(1, 2), keepdims=True)
        right = render(model, samples, stars.dx + delta, stars.dy)
        up = render(model, samples, stars.dx, stars.dy + delta)
        design = np.stack([image, (right - image) / delta, (up - image) / delta], axis=-1)
        design = design / norm[..., None]
        light = np.maximum(stars.flux[:, None, None] * image, 0.0)
        weight = stars.usable / (stars.sky_variance[:, None, None] + light)
        normal = np.einsum("nija,nij,nijb->nab", design, weight, design, optimize=True)
        right_side = np.einsum("nija,nij,nij->na", design, weight, stars.pixels, optimize=True)
        with failing_ccd(Reason.PSF_FIT_FAILED, _NO_FLUXES, np.linalg.LinAlgError):
            solution = np.linalg.solve(normal, right_side[..., None])[..., 0]
        flux = np.where(solution[:, 0] > 0, solution[:, 0], stars.flux)
        shift = np.clip(solution[:, 1:] / flux[:, None], -0.2, 0.2)
        shift -= np.average(shift, axis=0, weights=flux / np.sqrt(stars.sky_variance))
        stars.flux = flux
        stars.dx, stars.dy = stars.dx + shift[:, 0], stars.dy + shift[:, 1]


def _weights(stars: _Stars, model: PsfModel, settings: PsfSettings, first: bool):
    """Return the weights of pixels, shape (n, s, s), and which stars are not outliers.

    The first model does not vary over the CCD: it can identify coarse outliers only, and no pixels.
    So does the scatter of few stars.
    """
    expected = _expected_pixels(stars, model)
    light = np.maximum(expected, 0.0)
    variance = stars.sky_variance[:, None, None] + light + (settings.accuracy * light) ** 2
    residual2 = (stars.pixels - expected) ** 2 / variance
    usable = stars.usable if first else stars.usable & (residual2 < _PIXEL_CLIP**2)
    core = light > _CORE * light.max(axis=(1, 2), keepdims=True)
    n_core = (core & usable).sum(axis=(1, 2))
    misfit = np.sqrt((residual2 * (core & usable)).sum(axis=(1, 2)) / np.maximum(n_core, 1))
    middle = float(np.median(misfit))
    limit = settings.clip_sigma * max(_robust_scatter(misfit), _MISFIT_SCATTER * middle)
    coarse = first or misfit.size < _ENOUGH_FOR_SCATTER
    good = misfit < middle + (3.0 if coarse else 1.0) * limit
    good &= n_core > _WHOLE * core.sum(axis=(1, 2))
    return np.where(usable, 1.0 / variance, 0.0), good


def _expected_pixels(stars: _Stars, model: PsfModel) -> NDArray[np.float64]:
    """Return what the model predicts for the pixels of the stars, shape (n, s, s)."""
    image = render(model, model.samples_at(stars.x, stars.y), stars.dx, stars.dy)
    return stars.flux[:, None, None] * image / image.sum(axis=(1, 2), keepdims=True)


def _solve(
    stars: _Stars,
    weight: NDArray,
    model: PsfModel,
    prior: PsfModel,
    tolerance: float,
    threads: int,
) -> PsfModel:
    """Solve for all samples of all terms by preconditioned conjugate gradients [2]_.

    The equations are those of least squares, with a prior: samples keep near the first model
    where the stars say nothing about them.
    """
    rows, columns = kernels(model, stars.dy), kernels(model, stars.dx)
    terms = model.terms(stars.x, stars.y)
    weight = weight * stars.flux[:, None, None] ** 2
    target = stars.pixels / stars.flux[:, None, None]
    tightness = _prior_tightness(prior)

    def gather(images):
        samples = np.zeros((len(images), *model.basis.shape[1:]))
        _scatter(images, rows, columns, samples)
        return np.tensordot(terms, samples, axes=(0, 0))

    def apply(basis):
        product = _shared_product(basis, terms, rows, columns, weight, threads)
        return product + tightness * basis

    squares = (kernel._replace(weight=kernel.weight**2) for kernel in (rows, columns))
    hessian = np.zeros((len(weight), *model.basis.shape[1:]))
    _scatter(weight, *squares, hessian)
    blocks = np.einsum("np,nq,nij->ijpq", terms, terms, hessian, optimize=True)
    diagonal = np.arange(terms.shape[1])
    blocks[:, :, diagonal, diagonal] += tightness.transpose(1, 2, 0)
    with failing_ccd(Reason.PSF_FIT_FAILED, _NO_FIT, np.linalg.LinAlgError):
        inverse = np.linalg.inv(blocks)

    def precondition(basis):
        return np.einsum("ijpq,qij->pij", inverse, basis)

    basis = model.basis.copy()
    right_side = gather(weight * target) + tightness * prior.basis
    small = tolerance * float((right_side * precondition(right_side)).sum())
    residual = right_side - apply(basis)
    direction = conditioned = precondition(residual)
    energy = float((residual * conditioned).sum())
    for _ in range(_MAX_ITERATIONS):
        if energy <= small:
            break
        applied = apply(direction)
        length = energy / float((direction * applied).sum())
        basis += length * direction
        residual = residual - length * applied
        conditioned = precondition(residual)
        energy, before = float((residual * conditioned).sum()), energy
        direction = conditioned + (energy / before) * direction
    return replace(model, basis=basis)


@njit(nogil=True)
def _scatter(images, rows, columns, samples):
    """Add to the samples of each star what its pixels weigh."""
    room = make_room(samples.shape[1], images.shape[1])
    for n in range(len(images)):
        of_rows, of_columns = (rows.first[n], rows.weight[n]), (columns.first[n], columns.weight[n])
        add_samples(images[n], *of_rows, *of_columns, room, samples[n])


def _shared_product(
    basis: NDArray[np.float64],
    terms: NDArray[np.float64],
    rows: Kernels,
    columns: Kernels,
    weight: NDArray[np.float64],
    threads: int,
) -> NDArray[np.float64]:
    """Return the product of the normal equations with a basis, without the prior.

    Several threads share the stars, and then the samples: each sum is over the stars in their
    order, as in `_normal_product`, which needs less memory.
    """
    basis, product = np.ascontiguousarray(basis), np.zeros(basis.shape)
    if threads == 1:
        _normal_product(basis, terms, rows, columns, weight, product)
        return product
    samples = np.empty((len(weight), *basis.shape[1:]))

    def weigh(first: int, last: int) -> None:
        _weigh(basis, terms, rows, columns, weight, samples, first, last)

    def add(first: int, last: int) -> None:
        _add_stars(samples, terms, product, first, last)

    over_rows(weigh, len(weight), threads, least=_LEAST_STARS)
    over_rows(add, basis.shape[1], threads, least=_LEAST_SAMPLES)
    return product


@njit(nogil=True)
def _normal_product(basis, terms, rows, columns, weight, product):
    """Add to a product that of the normal equations with a basis, without the prior."""
    room = make_room(basis.shape[1], weight.shape[1])
    samples, image = np.empty(basis.shape[1:]), np.empty(weight.shape[1:])
    for n in range(len(weight)):
        _weigh_star(n, basis, terms, rows, columns, weight, room, image, samples)
        for p in range(len(basis)):
            _add_scaled(samples, terms[n, p], product[p])


@njit(nogil=True)
def _weigh(basis, terms, rows, columns, weight, samples, first, last):
    """Write to the samples of some stars what their pixels weigh in a basis."""
    room, image = make_room(basis.shape[1], weight.shape[1]), np.empty(weight.shape[1:])
    for n in range(first, last):
        _weigh_star(n, basis, terms, rows, columns, weight, room, image, samples[n])


@njit(nogil=True)
def _weigh_star(n, basis, terms, rows, columns, weight, room, image, samples):
    """Write to samples what the pixels of a star weigh in a basis."""
    of_rows, of_columns = (rows.first[n], rows.weight[n]), (columns.first[n], columns.weight[n])
    samples[:] = 0.0
    for p in range(len(basis)):
        _add_scaled(basis[p], terms[n, p], samples)
    to_pixels(samples, *of_rows, *of_columns, room, image)
    for j in range(len(image)):
        for i in range(len(image)):
            image[j, i] *= weight[n, j, i]
    samples[:] = 0.0
    add_samples(image, *of_rows, *of_columns, room, samples)


@njit(nogil=True)
def _add_stars(samples, terms, product, first, last):
    """Add the samples of stars, times their terms, to some rows of a product."""
    for n in range(len(samples)):
        for p in range(len(product)):
            _add_scaled(samples[n, first:last], terms[n, p], product[p, first:last])


@njit(nogil=True)
def _add_scaled(plane, factor, total):
    """Add a plane times a factor to another."""
    for j in range(len(plane)):
        one, other = plane[j], total[j]
        for i in range(len(one)):
            other[i] += factor * one[i]


def _prior_tightness(prior: PsfModel) -> NDArray[np.float64]:
    """Return 1 / variance of the prior of every sample, shape (n terms, k, k).

    The standard deviation is 10 % of the first model and 0.2 % of its peak; that of the change
    over the CCD is as large as the model itself. This matters where the stars say little: far
    out, where noise would make the sum of the samples uncertain, and with it all fluxes, and for
    the finest structure, if there are few stars.
    """
    first = prior.basis[0]
    fraction = np.full((prior.basis.shape[0], 1, 1), _PRIOR_OF_CHANGE)
    fraction[0] = _PRIOR_OF_MEAN
    return 1.0 / ((fraction * first) ** 2 + (_PRIOR_FLOOR * first.max()) ** 2)


def _robust_scatter(values: NDArray[np.float64]) -> float:
    values = values[np.isfinite(values)]
    return mad_sigma(values) if values.size else 0.0
