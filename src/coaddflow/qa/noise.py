"""Whether images have the noise that they state, and how deep they are for point sources.

The residual of an image is what is left after all light of the true sky is taken away.

References
----------
.. [1] Fruchter & Hook 2002, PASP 114, 144, section 7 (correlated noise of resampled images).
.. [2] King 1983, PASP 95, 163 (noise-equivalent area); Zackay & Ofek 2017, ApJ 836, 187 (the
   signal-to-noise that all exposures have together).
"""

from typing import NamedTuple

import numpy as np
import sep
from numpy.typing import NDArray
from scipy import ndimage, signal

from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import mad_sigma

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_FILTER_RADIUS = 3.0
"""Radius of matched filters, in FWHM."""


class Ratio(NamedTuple):
    """A ratio with its statistical error; NaN if there was too little to measure it."""

    value: float
    error: float
    n: int
    """Independent values behind it."""


def _ratio_of_variances(chi: FloatArray) -> Ratio:
    """Return the robust variance of deviations in units of their stated errors."""
    if chi.size < 30:
        return Ratio(np.nan, np.nan, chi.size)
    value = mad_sigma(chi) ** 2
    # the error of a squared median absolute deviation of Gaussian values
    return Ratio(value, value * 2.0 * 1.17 / np.sqrt(chi.size), chi.size)


def pixel_noise_ratio(residual: NDArray, variance: NDArray, empty: BoolArray) -> Ratio:
    """Return the variance of single pixels of empty sky over what is stated.

    Parameters
    ----------
    residual, variance : ndarray, shape (ny, nx)
        Image without the light of the sky's sources, and the stated variance of its pixels.
    empty : ndarray of bool, shape (ny, nx)
        Pixels that are compared.
    """
    return _ratio_of_variances((residual[empty] / np.sqrt(variance[empty])).astype(float))


def aperture_noise_ratio(
    residual: NDArray, variance: NDArray, empty: BoolArray, radius: float
) -> Ratio:
    """Return the variance of the fluxes of empty apertures over the sum of the stated variances.

    Without correlations between pixels it is 1 for a right variance plane, and the inverse of the
    covariance factor for large apertures on resampled images [1]_. The apertures do not overlap;
    their pixels count as a whole or not at all, so that the variances add up.

    Parameters
    ----------
    radius : float
        Of the circles, pixels.
    """
    step = 2 * int(np.ceil(radius)) + 2
    whole = ndimage.minimum_filter(empty, step + 1, mode="constant")
    y, x = np.nonzero(whole[step // 2 :: step, step // 2 :: step])
    x, y = (step // 2 + step * index.astype(float) for index in (x, y))
    if x.size == 0:
        return Ratio(np.nan, np.nan, 0)
    flux, error, _ = sep.sum_circle(
        np.where(empty, residual, 0.0), x, y, radius, var=np.where(empty, variance, 0.0), subpix=1
    )
    return _ratio_of_variances(flux / error)


def moffat_filter(fwhm: float, beta: float) -> FloatArray:
    """Return a round Moffat profile of sum 1, shape (2 h + 1, 2 h + 1); FWHM in pixels."""
    half = int(np.ceil(_FILTER_RADIUS * fwhm))
    reach = np.arange(-half, half + 1)
    alpha = 0.5 * fwhm / np.sqrt(2.0 ** (1.0 / beta) - 1.0)
    profile = (1.0 + np.hypot(reach[:, None], reach) ** 2 / alpha**2) ** -beta
    return profile / profile.sum()


def best_filter(image: NDArray, x: FloatArray, y: FloatArray, fwhm: float, beta: float):
    """Return the Moffat profile with the largest signal-to-noise for the stars of an image.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
        Without noise, or with stars far above it.
    x, y : ndarray of float64, shape (n,)
        Positions of isolated stars.
    fwhm, beta : float
        A first guess of the FWHM, pixels; the shape of the profile.
    """
    best, best_quality = moffat_filter(fwhm, beta), -np.inf
    for factor in np.linspace(0.85, 1.35, 11):
        profile = moffat_filter(factor * fwhm, beta)
        half = profile.shape[0] // 2
        stamps, _ = cut_stamps(image, x, y, half)
        signals = (stamps * profile).sum(axis=(1, 2)) / stamps.sum(axis=(1, 2))
        quality = float(np.median(signals)) / np.sqrt((profile**2).sum())
        if quality > best_quality:
            best, best_quality = profile, quality
    return best


def depth_ratio(
    residual: NDArray,
    usable: BoolArray,
    profile: FloatArray,
    response: float,
    information: NDArray,
) -> Ratio:
    """Return the signal-to-noise of faint point sources over the largest that is possible.

    Parameters
    ----------
    residual : ndarray, shape (ny, nx)
        Image without the light of the sky's sources.
    usable : ndarray of bool, shape (ny, nx)
        Empty pixels; the filter must lie on such pixels as a whole.
    profile : ndarray of float64, shape (k, k)
        Filter of sum 1, symmetric.
    response : float
        What it gives at the place of a star, over the flux of the star.
    information : ndarray, shape (ny, nx)
        Squared signal-to-noise of a point source of flux 1 in all inputs together, with a matched
        filter in each: the sum over exposures of sum(P^2) / variance [2]_.
    """
    filtered = signal.fftconvolve(np.where(usable, residual, 0.0), profile, mode="same")
    core = int(profile.shape[0] // 3)
    whole = ndimage.minimum_filter(usable, 2 * core + 1, mode="constant") & (information > 0)
    unit = (filtered * np.sqrt(np.where(whole, information, 0.0)))[whole]
    area = 1.0 / (profile**2).sum()
    n = int(unit.size / area)
    if n < 30:
        return Ratio(np.nan, np.nan, n)
    value = response / mad_sigma(unit)
    return Ratio(value, value * 1.17 / np.sqrt(n), n)
