"""Noise of sums over pixels of warps and coadds, which are correlated with their neighbours.

References
----------
.. [1] Fruchter & Hook 2002, PASP 114, 144, section 7 (correlated noise of resampled images).
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from coaddflow.warp.kernels import KernelName, kernel_weights

_PHASES = 512


def noise_correlation(kernel: KernelName = "lanczos3", area_ratio: float = 1.0) -> NDArray:
    """Return the correlation of the noise of tract pixels along one axis [1]_.

    Of white noise on the CCDs, in the mean over the phases of the kernel. That of two pixels is the
    product of those along the two axes.

    Parameters
    ----------
    kernel : {"lanczos3", "lanczos5", "bilinear"}
        The kernel of the warps (`warp.kernel`).
    area_ratio : float
        CCD pixels that a tract pixel covers.

    Returns
    -------
    ndarray of float64, shape (2 n + 1,)
        Correlations at distances of -n to n tract pixels; 1 in the middle.
    """
    step = math.sqrt(area_ratio)
    phase = (np.arange(_PHASES) + 0.5) / _PHASES
    weights = kernel_weights(kernel, phase)
    taps = weights.shape[1]
    reach = math.ceil(taps / step)
    covariance = np.zeros(reach + 1)
    for distance in range(reach + 1):
        place = phase + distance * step
        shift = np.floor(place).astype(int)
        other = kernel_weights(kernel, place - shift)
        for tap in range(taps):
            own = tap + shift  # the same CCD pixel in the window of the first
            there = own < taps
            products = weights[np.arange(_PHASES), np.where(there, own, 0)] * other[:, tap]
            covariance[distance] += np.mean(np.where(there, products, 0.0))
    one_side = covariance / covariance[0]
    return np.concatenate([one_side[:0:-1], one_side])


def aperture_error(
    variance: ArrayLike,
    weights: ArrayLike,
    kernel: KernelName = "lanczos3",
    area_ratio: float = 1.0,
) -> float:
    """Return the error of a weighted sum over pixels of a warp or coadd.

    The sum of VARIANCE alone is too small, since neighbouring pixels are correlated. Divided by
    `kernels.covariance_factor` it is right for large, smooth apertures only, and too large for
    small ones. This is the sum over all pairs of pixels, and right for any weights.

    Parameters
    ----------
    variance : array_like, shape (ny, nx)
        Cut-out of the VARIANCE plane that contains the aperture. Pixels without weight may have any
        value.
    weights : array_like, shape (ny, nx)
        Weight of each pixel in the sum: for an aperture the fraction of each pixel inside it, for a
        PSF flux the weights of the pixels.
    kernel : {"lanczos3", "lanczos5", "bilinear"}
        The kernel of the warps (`warp.kernel`).
    area_ratio : float
        CCD pixels that a tract pixel covers: (pixel scale of the sky map / that of the CCDs)^2.

    Returns
    -------
    float
        Standard deviation of sum(weights * image), in the unit of the image. Infinite if a pixel
        with weight has no finite variance.
    """
    weights, variance = np.broadcast_arrays(np.asarray(weights, float), np.asarray(variance, float))
    inside = weights != 0
    if not np.isfinite(variance[inside]).all():
        return math.inf
    amplitude = np.where(inside, weights * np.sqrt(np.where(inside, variance, 0.0)), 0.0)
    correlation = noise_correlation(kernel, area_ratio)
    both = amplitude
    for axis in (0, 1):
        both = ndimage.convolve1d(both, correlation, axis=axis, mode="constant")
    return math.sqrt(max(float((amplitude * both).sum()), 0.0))
