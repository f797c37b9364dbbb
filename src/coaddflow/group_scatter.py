"""How much the CCDs of a camera differ: learned from the CCDs themselves.

Constants of single CCDs (the response to the sky, a zero-point) are fitted together with a surface
over the focal plane, each with the same normal prior of mean zero. A prior that is too wide lets a
galaxy or three bad stars decide the constant of a CCD, one that is too narrow leaves steps. So its
width is estimated from the constants of all CCDs between two fits [1]_ [2]_, with a median, so
that one odd CCD does not widen it for all.

References
----------
.. [1] MacKay 1992, Neural Computation 4, 415, section 4 (effective number of parameters).
.. [2] Gelman et al. 2013, Bayesian Data Analysis, 3rd edition, chapter 5 (hierarchical models).
"""

import numpy as np
from numpy.typing import NDArray

_MEDIAN_CHI2 = 0.455
"""Median of chi^2 of one degree of freedom."""

_LEAST_KNOWN = 0.1
"""Where the data say next to nothing, the width shrinks in steps, not at once."""


def group_scatter(
    constants: NDArray[np.float64],
    variance: NDArray[np.float64],
    sigma: float,
    limits: tuple[float, float],
) -> float:
    """Return a better estimate of the standard deviation of the constants of all CCDs.

    Parameters
    ----------
    constants : ndarray of float64, shape (n,)
        Constants fitted with a prior of mean 0 and standard deviation ``sigma``.
    variance : ndarray of float64, shape (n,)
        Their variances, the prior included.
    sigma : float
        The standard deviation that the fit was made with, above 0.
    limits : tuple of float
        Smallest and largest value that is returned.
    """
    known = np.clip(1.0 - variance / sigma**2, 0.0, 1.0).mean()
    scatter2 = np.median(constants**2) / _MEDIAN_CHI2 / max(known, _LEAST_KNOWN)
    return float(np.clip(np.sqrt(scatter2), *limits))
