"""How much the CCDs of a camera differ: learned from the CCDs themselves.

Constants of single CCDs (the response to the sky, a zero-point) are fitted together with a surface
over the focal plane, with a prior of mean zero. A prior that is too wide lets a galaxy or three
bad stars decide the constant of a CCD, one that is too narrow leaves steps. So its width is
estimated from the constants of all CCDs between two fits [1]_ [2]_, with a median, so that one odd
CCD does not widen it for all. And its tails are those of Student's distribution: what a CCD says
of itself with great significance is believed, however alike the others are [3]_.

References
----------
.. [1] MacKay 1992, Neural Computation 4, 415, section 4 (effective number of parameters).
.. [2] Gelman et al. 2013, Bayesian Data Analysis, 3rd edition, chapter 5 (hierarchical models).
.. [3] Lange, Little & Taylor 1989, JASA 84, 881 (Student's distribution by repeated weights).
"""

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_FREEDOM = 4.0
"""Degrees of freedom of Student's distribution: constants below about 4.5 sigma are held."""

_MEDIAN_CHI2 = 0.455
"""Median of chi^2 of one degree of freedom."""

_LEAST_KNOWN = 0.1
"""Where the data say next to nothing, the width shrinks in steps, not at once."""


def prior_variance(constants: FloatArray, sigma: float) -> FloatArray:
    """Return the variance of the normal prior that stands for Student's in the next fit.

    Parameters
    ----------
    constants : ndarray of float64, shape (n,)
        Constants of the CCDs in the last fit; zeros before the first.
    sigma : float
        Width of the prior.
    """
    return (_FREEDOM * sigma**2 + constants**2) / (_FREEDOM + 1.0)


def group_scatter(
    constants: FloatArray, variance: FloatArray, prior: FloatArray, limits: tuple[float, float]
) -> float:
    """Return a better estimate of the width of the prior of the constants.

    Parameters
    ----------
    constants, variance : ndarray of float64, shape (n,)
        Constants of all CCDs in the last fit, and their variances.
    prior : ndarray of float64, shape (n,)
        The `prior_variance` that this fit was made with.
    limits : tuple of float
        Smallest and largest value that is returned.
    """
    known = np.clip(1.0 - variance / prior, 0.0, 1.0).mean()
    scatter2 = np.median(constants**2) / _MEDIAN_CHI2 / max(known, _LEAST_KNOWN)
    return float(np.clip(np.sqrt(scatter2), *limits))
