"""Robust statistics of values of which some are outliers.

The functions take what they are given: values that are not finite are left out before.

References
----------
.. [1] Huber & Ronchetti 2009, Robust Statistics, 2nd ed., section 5 (median absolute deviation).
"""

import numpy as np
from numpy.typing import NDArray

MAD_TO_SIGMA = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations [1]_."""

IQR_TO_SIGMA = 1.34898
"""Distance of the quartiles of a normal distribution, in standard deviations."""

RAYLEIGH_MEDIAN = 1.1774
"""Median distance of a two-dimensional Gaussian, in standard deviations of one axis."""


def mad_sigma(values: NDArray, centre: float | None = None) -> float:
    """Return the standard deviation that belongs to the median absolute deviation.

    Parameters
    ----------
    values : ndarray
        At least one value.
    centre : float, optional
        Where deviations count from, by default the median; 0 for values that are residuals or
        absolute deviations already.
    """
    if centre is None:
        centre = np.median(values)
    return MAD_TO_SIGMA * float(np.median(np.abs(values - centre)))


def iqr_sigma(values: NDArray) -> float:
    """Return the standard deviation that belongs to the quartiles of at least one value."""
    low, high = np.percentile(values, [25, 75])
    return float(high - low) / IQR_TO_SIGMA


def weighted_median(values: NDArray, weights: NDArray) -> float:
    """Return the first of the sorted values at which half of the weight is reached.

    It is the value v with the least sum of w_i |v_i - v|.

    Parameters
    ----------
    values, weights : ndarray, shape (n,)
        At least one value; no weight is negative.
    """
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulated, 0.5 * cumulated[-1])])
