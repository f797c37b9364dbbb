"""How much measurements scatter beyond their errors, and which are outliers."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_MEDIAN_CHI2 = 0.455
"""Median of chi^2 with one degree of freedom."""

_HALVINGS = 25
"""Of an interval, to find a variance."""

MOST_LEVERAGE = 0.9
"""A detection that alone determines its star says nothing about its exposure."""


def judge_residuals(
    residual: FloatArray,
    variance: FloatArray,
    leverage: FloatArray,
    kept: BoolArray,
    usable: BoolArray,
    clip_sigma: float,
) -> tuple[float, BoolArray]:
    """Return the variance of an exposure beyond errors, and which of its detections are kept.

    A residual is compared with its error after the star has taken its part (leverage).

    Parameters
    ----------
    residual : ndarray of float64, shape (n, axes)
        Detections minus their stars.
    variance, leverage : ndarray, shape (n,)
        Errors of the detections in one axis, squared; their part in their stars.
    kept, usable : ndarray of bool, shape (n,)
        Those that are used now, and those that may be.
    clip_sigma : float
        Limit of outliers.
    """
    own = np.maximum(1.0 - leverage, 1.0 - MOST_LEVERAGE)
    square = residual**2 / own[:, None]
    told = kept & (leverage < MOST_LEVERAGE)
    extra = excess_variance(square[told], variance[told])
    return extra, usable & (square.max(axis=1) <= clip_sigma**2 * (variance + extra))


def excess_variance(square: FloatArray, variance: FloatArray) -> float:
    """Return the variance that squared residuals have beyond that of their errors.

    The median of chi^2 of the better half of the values is what it is for normal errors.

    Parameters
    ----------
    square : ndarray of float64, shape (n, axes)
        Squared residuals.
    variance : ndarray of float64, shape (n,)
        Of one axis.
    """
    if len(variance) == 0:
        return 0.0
    better = variance <= np.median(variance)
    square, variance = square[better], variance[better, None]
    low, high = 0.0, float(np.median(square)) / _MEDIAN_CHI2
    if np.median(square / variance) <= _MEDIAN_CHI2:
        return 0.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        if np.median(square / (variance + middle)) > _MEDIAN_CHI2:
            low = middle
        else:
            high = middle
    return high
