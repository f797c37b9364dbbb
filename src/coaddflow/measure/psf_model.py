"""The PSF of one CCD: a pixel basis whose coefficients are polynomials over the CCD [1]_.

The PSF at a position is an image sampled in steps of a fraction of its FWHM, whatever the pixels
are; values at any offset from its centre are interpolated with a Lanczos-4 kernel. Each sample is
a polynomial in the position on the CCD.

References
----------
.. [1] Bertin 2011, ASP Conf. Ser. 442, 435 (PSFEx: pixel basis, super-resolution, variation).
.. [2] Duchon 1979, J. Appl. Meteorol. 18, 1016 (Lanczos kernel).
.. [3] Bernstein & Jarvis 2002, AJ 123, 583, section 3 (adaptive moments).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from coaddflow.compiled import njit
from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix, term_powers
from coaddflow.image.statistics import RAYLEIGH_MEDIAN

_KERNEL_ORDER = 4
_TAPS = 2 * _KERNEL_ORDER
LEAST_REACH = _KERNEL_ORDER
"""Fewest samples on each side of the centre of a model: the kernel lies within the samples."""
_STEPS = np.pi * np.arange(1 - _KERNEL_ORDER, _KERNEL_ORDER + 1) / _KERNEL_ORDER
_SINE, _COSINE = np.sin(_STEPS), np.cos(_STEPS)
_MOMENT_ITERATIONS = 15

_TABLE = "PSF_DATA"
"""Name of the extension of a PSF, that of PSFEx."""


@dataclass(frozen=True)
class PsfModel:
    """The PSF anywhere on a CCD.

    Attributes
    ----------
    basis : ndarray of float64, shape (n terms, k, k)
        Samples of the coefficient of each term of the polynomial, k odd.
    order : int
        Order of the polynomial; its terms are 1, u, v, u^2, uv, v^2, ... (see `terms`).
    step : float
        Distance of samples in pixels of the CCD.
    half : int
        Images have 2 half + 1 pixels on a side.
    center, scale : tuple of float
        u = (x - center[0]) / scale[0], v = (y - center[1]) / scale[1].
    """

    basis: NDArray[np.float64]
    order: int
    step: float
    half: int
    center: tuple[float, float]
    scale: tuple[float, float]

    def terms(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Return the terms of the polynomial at positions, shape (n, n terms)."""
        u = (np.atleast_1d(np.asarray(x, dtype=float)) - self.center[0]) / self.scale[0]
        v = (np.atleast_1d(np.asarray(y, dtype=float)) - self.center[1]) / self.scale[1]
        return design_matrix(u, v, self.order)

    def samples_at(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Return the centred samples at positions, shape (n, k, k), not normalised."""
        return np.tensordot(self.terms(x, y), self.basis, axes=1)

    def images_at(self, x: ArrayLike, y: ArrayLike, sub_pixel: bool = True) -> NDArray[np.float32]:
        """Return images of the PSF, shape (n, 2 half + 1, 2 half + 1), each of sum 1.

        Parameters
        ----------
        x, y : array_like, shape (n,)
            Positions in pixels, 0-based.
        sub_pixel : bool
            If true the central pixel of an image is the pixel (round(x), round(y)) of the CCD
            and the PSF is off its centre as the position is. Otherwise it is exactly centred.
        """
        x, y = np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float))
        dx, dy = (x - np.rint(x), y - np.rint(y)) if sub_pixel else (0.0 * x, 0.0 * y)
        images = render(self, self.samples_at(x, y), dx, dy)
        return (images / images.sum(axis=(1, 2), keepdims=True)).astype(np.float32)

    def image_at(self, x: float, y: float, sub_pixel: bool = False) -> NDArray[np.float32]:
        """Return one image of the PSF, shape (2 half + 1, 2 half + 1); see `images_at`."""
        return self.images_at(x, y, sub_pixel)[0]

    def fwhm_at(self, x: float, y: float) -> float:
        """Return the FWHM in pixels of the azimuthally averaged PSF, pixel included."""
        samples = self.samples_at(x, y)[0]
        middle = samples.shape[0] // 2
        radius = np.arange(0.0, middle, 0.05)
        angle = np.linspace(0.0, 2.0 * np.pi, 48, endpoint=False)[:, None]
        place = [middle + radius * np.sin(angle), middle + radius * np.cos(angle)]
        profile = ndimage.map_coordinates(samples, place, order=5).mean(axis=0)
        outside = int(np.argmax(profile < 0.5 * profile[0]))
        if outside == 0:
            return 2.0 * self.step * float(radius[-1])
        inside = outside - 1
        part = (profile[inside] - 0.5 * profile[0]) / (profile[inside] - profile[outside])
        return 2.0 * self.step * float(radius[inside] + part * (radius[1] - radius[0]))

    def shape_at(self, x: float, y: float) -> tuple[float, float]:
        """Return the ellipticity (e1, e2) along the axes and the diagonals of the CCD.

        Distortions, (a^2 - b^2) / (a^2 + b^2), from adaptive moments [3]_.
        """
        mxx, myy, mxy = adaptive_moments(self.samples_at(x, y))[0]
        return float((mxx - myy) / (mxx + myy)), float(2.0 * mxy / (mxx + myy))


def psf_hdu(model: PsfModel) -> fits.BinTableHDU:
    """Return the PSF extension, in the format of PSFEx [1]_ that source-extractor and galsim read.

    A table ``PSF_DATA`` with one row and one column, PSF_MASK: a cube of float32 with one plane for
    each term of the polynomial. The samples at (x, y) are sum_t plane_t u^p v^q, with
    u = (x - POLZERO1) / POLSCAL1 and v likewise, x and y in FITS pixels (the first is 1), and the
    terms in the order 1, u, u^2, ..., v, u v, ..., v^2, ...; the middle sample is the centre of the
    PSF, samples are PSF_SAMP pixels apart, and values between them are interpolated with a
    Lanczos-4 kernel. ``PSFHALF``, the half width of images of the PSF in pixels, is no keyword of
    PSFEx.
    """
    side = model.basis.shape[-1]
    order = [term_powers(model.order).index(powers) for powers in _psfex_powers(model.order)]
    # a star of flux 1 in the sum over pixels, as source-extractor takes it
    total = model.basis[0].sum() * model.step**2
    cube = np.asarray(model.basis[order] / total, np.float32)
    column = fits.Column(
        "PSF_MASK", f"{cube.size}E", dim=f"({side},{side},{len(cube)})", array=cube[None]
    )
    hdu = fits.BinTableHDU.from_columns([column], name=_TABLE)
    header = hdu.header
    header["POLNAXIS"] = (2, "variables of the polynomial")
    for axis, name in ((1, "X_IMAGE"), (2, "Y_IMAGE")):
        header[f"POLGRP{axis}"] = (1, "group of the variable")
        header[f"POLNAME{axis}"] = (name, "name of the variable")
        header[f"POLZERO{axis}"] = (model.center[axis - 1] + 1.0, "[pixel] its origin, first is 1")
        header[f"POLSCAL{axis}"] = (model.scale[axis - 1], "[pixel] its unit")
    header["POLNGRP"] = (1, "groups of variables")
    header["POLDEG1"] = (model.order, "order of the polynomial")
    header["PSF_FWHM"] = (model.fwhm_at(*model.center), "[pixel] FWHM, pixel included")
    header["PSF_SAMP"] = (model.step, "[pixel] distance of samples")
    header["PSFNAXIS"] = (3, "axes of PSF_MASK")
    for axis, size in ((1, side), (2, side), (3, len(cube))):
        header[f"PSFAXIS{axis}"] = size
    header["PSFHALF"] = (model.half, "[pixel] half width of images of the PSF")
    return hdu


def psf_from_hdu(hdu: fits.BinTableHDU) -> PsfModel:
    """Return the PsfModel of an extension made by `psf_hdu`; raise InputError if it is none."""
    header = hdu.header
    try:
        (cube,), order = np.asarray(hdu.data["PSF_MASK"], np.float64), int(header["POLDEG1"])
        return PsfModel(
            basis=_checked_basis(cube, order)[
                [_psfex_powers(order).index(powers) for powers in term_powers(order)]
            ],
            order=order,
            step=float(header["PSF_SAMP"]),
            half=int(header["PSFHALF"]),
            center=(header["POLZERO1"] - 1.0, header["POLZERO2"] - 1.0),
            scale=(header["POLSCAL1"], header["POLSCAL2"]),
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{_TABLE} is not a model of coaddflow ({error})") from error


def stored_psf(hdus: fits.HDUList) -> PsfModel | None:
    """Return the PSF in the file of a calexp; None if it has none.

    Raises
    ------
    InputError
        If it is no model of coaddflow, or has the form of version 0.3 and before.
    """
    if "PSF" in hdus and _TABLE not in hdus:
        raise InputError(f"its PSF has the form of an older version, without {_TABLE}")
    return psf_from_hdu(hdus[_TABLE]) if _TABLE in hdus else None


def _checked_basis(cube: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Return a cube of samples; ValueError if it is not one of a polynomial of this order."""
    side = cube.shape[-1]
    is_odd_square = cube.shape[1:] == (side, side) and side % 2 == 1
    n_terms = (order + 1) * (order + 2) // 2
    if not is_odd_square or side <= 2 * LEAST_REACH or order < 0 or len(cube) != n_terms:
        raise ValueError(f"planes of shape {cube.shape} for order {order}")
    return cube


def _psfex_powers(order: int) -> list[tuple[int, int]]:
    """Return the powers (p, q) of the terms in the order of PSFEx: 1, u, u^2, v, u v, v^2."""
    return [(p, q) for q in range(order + 1) for p in range(order + 1 - q)]


def adaptive_moments(images: NDArray) -> NDArray[np.float64]:
    """Return second moments under the elliptical Gaussian that matches each image [3]_.

    The images, shape (n, k, k), have one source near their middle. The moments, shape (n, 3), are
    Mxx, Myy, Mxy in pixels squared: for a Gaussian, those of the Gaussian itself. They are NaN
    where the iteration leaves the image.
    """
    images = np.asarray(images, dtype=float)
    n, size = images.shape[:2]
    grid = np.arange(size) - size // 2
    x, y = np.zeros(n), np.zeros(n)
    half_light = np.sqrt(
        np.count_nonzero(images > 0.5 * images.max(axis=(1, 2))[:, None, None], axis=(1, 2)) / np.pi
    )
    mxx = myy = np.maximum(half_light / RAYLEIGH_MEDIAN, 0.5) ** 2
    mxy = np.zeros(n)
    for _ in range(_MOMENT_ITERATIONS):
        dx = grid[None, None, :] - x[:, None, None]
        dy = grid[None, :, None] - y[:, None, None]
        determinant = mxx * myy - mxy**2
        a, b, c = ((m / determinant)[:, None, None] for m in (myy, mxx, mxy))
        weight = images * np.exp(-0.5 * (a * dx**2 + b * dy**2 - 2.0 * c * dx * dy))
        total = weight.sum(axis=(1, 2))
        total = np.where(total > 0, total, np.nan)
        shift_x, shift_y = ((weight * d).sum(axis=(1, 2)) / total for d in (dx, dy))
        x, y = x + 2.0 * shift_x, y + 2.0 * shift_y
        mxx, myy, mxy = (
            2.0 * ((weight * p).sum(axis=(1, 2)) / total - q)
            for p, q in ((dx * dx, shift_x**2), (dy * dy, shift_y**2), (dx * dy, shift_x * shift_y))
        )
        sane = (mxx > 0.01) & (myy > 0.01) & (mxx * myy - mxy**2 > 1e-4) & (mxx + myy < size**2)
        mxx, myy, mxy = (np.where(sane, m, np.nan) for m in (mxx, myy, mxy))
    return np.stack([mxx, myy, mxy], axis=-1)


class Kernels(NamedTuple):
    """Weights of samples in pixels along one axis [2]_.

    Attributes
    ----------
    first : ndarray of int64, shape (n, 2 half + 1)
        First sample that counts for a pixel.
    weight : ndarray of float64, shape (n, 2 half + 1, 8)
        Weights of this and the following samples; their sum is 1.
    """

    first: NDArray[np.int64]
    weight: NDArray[np.float64]


def kernels(model: PsfModel, offset: NDArray) -> Kernels:
    """Return the weights from samples to pixels along one axis.

    ``offset``, shape (n,), is the position of the PSF's centre relative to the central pixel.
    """
    offset = np.asarray(offset, dtype=np.float64)
    shape = offset.size, 2 * model.half + 1
    first, weight = np.empty(shape, np.int64), np.zeros((*shape, _TAPS))
    n_samples = model.basis.shape[-1]
    _lanczos(offset, model.step, n_samples, first, weight)
    return Kernels(first, weight)


def render(model: PsfModel, samples: NDArray, dx: NDArray, dy: NDArray) -> NDArray[np.float64]:
    """Return images, shape (n, s, s), of samples, shape (n, k, k), centred at (dx, dy)."""
    rows, columns = kernels(model, dy), kernels(model, dx)
    images = np.empty((len(samples), *rows.weight.shape[1:2] * 2))
    _render_all(np.ascontiguousarray(samples), rows, columns, images)
    return images


@njit(nogil=True, error_model="numpy")
def _lanczos(offset, step, n_samples, first, weight):
    n, size = first.shape
    for i in range(n):
        for pixel in range(size):
            place = (pixel - size // 2 - offset[i]) / step + n_samples // 2
            below = math.floor(place)
            start = min(max(below - _KERNEL_ORDER + 1, 0), n_samples - _TAPS)
            first[i, pixel] = start
            fraction = math.pi * (place - below)
            sine, slow = math.sin(fraction), fraction / _KERNEL_ORDER
            slow_sine, slow_cosine = math.sin(slow), math.cos(slow)
            total = 0.0
            for t in range(max(start, below + 1 - _KERNEL_ORDER), start + _TAPS):
                step_away = t - below
                if step_away > _KERNEL_ORDER:
                    break  # beyond the samples there is no light
                distance = fraction - math.pi * step_away
                if abs(distance) < 1e-9:
                    value = 1.0
                else:
                    # the sine of a difference, times that of a quarter of it
                    sign = -sine if step_away % 2 else sine
                    away = step_away + _KERNEL_ORDER - 1
                    value = slow_sine * _COSINE[away] - slow_cosine * _SINE[away]
                    value *= sign * _KERNEL_ORDER / (distance * distance)
                weight[i, pixel, t - start] = value
                total += value
            for t in range(_TAPS):
                weight[i, pixel, t] /= total


@njit(nogil=True)
def _render_all(samples, rows, columns, images):
    room = make_room(samples.shape[1], images.shape[1])
    for i in range(len(samples)):
        to_pixels(
            samples[i],
            rows.first[i],
            rows.weight[i],
            columns.first[i],
            columns.weight[i],
            room,
            images[i],
        )


@njit(nogil=True)
def to_pixels(samples, first_row, row_weight, first_column, column_weight, room, image):
    """Write the image of samples; ``room`` is from `make_room`."""
    half_way, line, pixels = room
    for j in range(len(image)):
        _blend(samples, first_row[j], row_weight[j], line)
        for c in range(len(line)):
            half_way[c, j] = line[c]
    for i in range(len(image)):
        _blend(half_way, first_column[i], column_weight[i], pixels)
        for j in range(len(image)):
            image[j, i] = pixels[j]


@njit(nogil=True)
def add_samples(image, first_row, row_weight, first_column, column_weight, room, samples):
    """Add to samples what their pixels weigh: the transpose of `to_pixels`."""
    half_way, line, pixels = room
    half_way[:] = 0.0
    for i in range(len(image)):
        for j in range(len(image)):
            pixels[j] = image[j, i]
        _unblend(pixels, first_column[i], column_weight[i], half_way)
    for j in range(len(image)):
        for c in range(len(line)):
            line[c] = half_way[c, j]
        _unblend(line, first_row[j], row_weight[j], samples)


@njit(nogil=True)
def make_room(n_samples, n_pixels):
    """Return the arrays in which `to_pixels` and `add_samples` work."""
    return np.empty((n_samples, n_pixels)), np.empty(n_samples), np.empty(n_pixels)


@njit(nogil=True)
def _blend(lines, first, weight, blended):
    """Write the weighted sum of eight lines."""
    a, b, c, d = lines[first], lines[first + 1], lines[first + 2], lines[first + 3]
    e, f, g, h = lines[first + 4], lines[first + 5], lines[first + 6], lines[first + 7]
    for i in range(len(blended)):
        blended[i] = (
            (weight[0] * a[i] + weight[1] * b[i]) + (weight[2] * c[i] + weight[3] * d[i])
        ) + ((weight[4] * e[i] + weight[5] * f[i]) + (weight[6] * g[i] + weight[7] * h[i]))


@njit(nogil=True)
def _unblend(line, first, weight, lines):
    """Add a line to eight lines, with weights."""
    for t in range(_TAPS):
        to, factor = lines[first + t], weight[t]
        for i in range(len(line)):
            to[i] += factor * line[i]
