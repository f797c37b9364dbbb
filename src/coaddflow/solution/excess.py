"""How much measurements scatter beyond their errors."""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_MEDIAN_CHI2 = 0.455
"""Median of chi^2 with one degree of freedom."""

_HALVINGS = 25
"""Of an interval, to find a variance."""


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
