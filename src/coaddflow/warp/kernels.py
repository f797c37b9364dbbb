"""Kernels of the resampling: their weights, and what they do to noise.

The weights of the separable kernels [1]_ are polynomials of the phase, the position within a pixel:
no sine is computed per pixel, and they are right to 5e-7.

On a grid coarser than the CCD the kernel is stretched to the pixels of the grid (`stretch_of`), so
that all photons are used. Else pixels between the taps would be left out, and the noise of the
others would be aliased: with pixels four times larger at ten times the variance.

References
----------
.. [1] Duchon 1979, J. Appl. Meteor. 18, 1016 (Lanczos filtering); Bertin et al. 2002, ASP Conf.
   Ser. 281, 228 (its use for astronomical images in SWarp).
"""

import itertools
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import ArrayLike, NDArray

KernelName = Literal["lanczos3", "lanczos5", "bilinear"]

_TAPS = {"bilinear": 2, "lanczos3": 6, "lanczos5": 10}
_PHASES = 2048

_DEGREE = 9
"""Of the polynomials of a kernel that is not stretched."""

_PIECES = 64
"""A stretched kernel has kinks, at multiples of 1/8 of a pixel: it is made of cubic pieces."""

_STRETCH_STEPS = 8
"""Kernels are stretched by multiples of 1/8: few tables, and none for scales that are alike."""

MAX_UNROLLED = 16
"""Taps up to which the loops over them are unrolled."""


class Kernel(NamedTuple):
    """An interpolation kernel: polynomials of the phase, for each tap."""

    coefficients: NDArray[np.float32]
    """If the kernel is not stretched, of the polynomials in phase - 1/2 of the taps at and before
    the position, the lowest power first, shape (1, taps / 2, 10): the other taps mirror them. Else
    of the cubics in the phase after the beginning of a piece, shape (pieces, taps, 4)."""
    taps: tuple[int, ...] | NDArray[np.int64]
    """Offset of each tap from the pixel at or before the position, such as (-2, ... 3). (The
    compiler knows the length of a tuple.) An array for long kernels."""
    stretch: float
    """CCD pixels per unit of the kernel, at least 1 (`stretch_of`)."""


def stretch_of(area: float) -> float:
    """Return by how much a kernel is stretched for output pixels that cover ``area`` CCD pixels.

    The square root of the area in steps of 1/8, at least 1: a grid that is finer than the CCD, or
    coarser by less than 6 %, has the kernel of the CCD's pixels.
    """
    return max(1.0, round(_STRETCH_STEPS * area**0.5) / _STRETCH_STEPS)


def kernel_weights(name: KernelName, phase: ArrayLike, stretch: float = 1.0) -> NDArray[np.float64]:
    """Return the weights of the taps of a kernel, which sum to 1.

    Parameters
    ----------
    name : {"lanczos3", "lanczos5", "bilinear"}
        The kernel.
    phase : array_like, shape (n,)
        Position after the pixel before it, 0 to 1.
    stretch : float
        CCD pixels per unit of the kernel.

    Returns
    -------
    ndarray of float64, shape (n, taps)
        Weights. Lanczos weights alone sum to 1 only within 1 %: without the normalisation a
        constant would ripple with the phase. Nor do they preserve centroids: a slope is shifted by
        up to 0.02 pixel, a star of 6 pixels FWHM by 0.013, one of 3 pixels by 0.003 the other way.
        Half of the first moment is therefore removed, by weights proportional to the window of the
        kernel times the distance, which leaves less than 0.005 pixel for stars of 2.5 to 6 pixels
        FWHM at any phase.
    """
    half = _TAPS[name] // 2
    reach = int(np.ceil(half * stretch))
    distance = np.arange(1 - reach, reach + 1) - np.asarray(phase, float)[:, None]
    distance /= stretch
    if name == "bilinear":
        weights = np.maximum(1.0 - np.abs(distance), 0.0)
        return weights / weights.sum(axis=1, keepdims=True)
    window = np.where(np.abs(distance) <= half, np.sinc(distance / half), 0.0)
    weights = np.sinc(distance) * window
    weights /= weights.sum(axis=1, keepdims=True)
    lever = window * (distance - np.average(distance, axis=1, weights=window, keepdims=True))
    moment = np.sum(weights * distance, axis=1, keepdims=True)
    return weights - 0.5 * moment * lever / np.sum(lever * distance, axis=1, keepdims=True)


@cache
def make_kernel(name: KernelName, stretch: float = 1.0) -> Kernel:
    """Return a kernel; its weights differ from `kernel_weights` by less than 1e-6."""
    half = _TAPS[name] // 2
    reach = int(np.ceil(half * stretch))
    offsets = np.arange(1 - reach, reach + 1)
    kept = tuple(offsets.tolist()) if offsets.size <= MAX_UNROLLED else offsets
    if stretch == 1.0:
        polynomials = _fit(name, stretch, (0.0, 1.0), _DEGREE, 0.5)[None, :half]
    else:
        edges = np.arange(_PIECES + 1) / _PIECES
        pieces = itertools.pairwise(edges)
        polynomials = np.stack([_fit(name, stretch, piece, 3, piece[0]) for piece in pieces])
    return Kernel(np.ascontiguousarray(polynomials, np.float32), kept, stretch)


def _fit(
    name: KernelName, stretch: float, domain: tuple[float, float], degree: int, origin: float
) -> NDArray[np.float64]:
    """Return polynomials in (phase - origin) for each tap, by interpolation at Chebyshev nodes."""
    nodes = (np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) + 1.0) / 2.0
    phases = domain[0] + nodes * (domain[1] - domain[0])
    weights = kernel_weights(name, phases, stretch)
    fits = [Chebyshev.fit(phases - origin, one, degree) for one in weights.T]
    found = np.zeros((len(fits), degree + 1))
    for row, fit in zip(found, fits, strict=True):
        coefficients = fit.convert(kind=Polynomial).coef
        row[: coefficients.size] = coefficients
    return found


def covariance_factor(name: KernelName, area_ratio: float = 1.0) -> float:
    """Return the variance of single pixels of a warp relative to that of white noise.

    Resampling makes neighbours correlate: the mean over many pixels is as noisy as before, while
    a single pixel, whose variance the VARIANCE plane states, is less so. For white noise of
    variance s^2 per input pixel, the sum over an aperture of n pixels has the variance
    n * area_ratio * s^2, and each pixel area_ratio^2 * s^2 * sum(w^2), where the sum over the
    squared weights is taken in the mean over all phases. Their ratio per pixel is returned:
    divide a sum over the VARIANCE plane by it to get the variance of a flux in an aperture that
    is large against the kernel. Coadds have the factor of their warps.

    Parameters
    ----------
    name : {"lanczos3", "lanczos5", "bilinear"}
        The kernel.
    area_ratio : float
        Input pixels that an output pixel covers; the kernel is that for this ratio.

    Returns
    -------
    float
        area_ratio * mean(sum w^2); 0.798 for lanczos3 at equal scales.
    """
    phases = (np.arange(_PHASES) + 0.5) / _PHASES
    weights = kernel_weights(name, phases, stretch_of(area_ratio))
    return area_ratio * float(np.mean(np.sum(weights**2, axis=1))) ** 2
