"""The scatter of constants of CCDs, estimated from the CCDs themselves.

Constants of single CCDs (response to the sky, zero-point) are fitted together with a surface over
the focal plane, with a prior of mean zero. If the prior is too wide, a galaxy or three bad stars
determine the constant of a CCD; if it is too narrow, steps remain. Its width is therefore
estimated from the constants of all CCDs between two fits [1]_ [2]_, with a median, so that one odd
CCD does not widen it. Its tails are those of Student's distribution: a very significant constant
is accepted however similar the other CCDs are [3]_.

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
"""Degrees of freedom of Student's distribution: it holds constants below about 4.5 sigma."""

_MEDIAN_CHI2 = 0.455
"""Median of chi^2 with one degree of freedom."""

_LEAST_KNOWN = 0.1
"""Where the data hardly constrain the constants, the width shrinks in steps."""


def prior_variance(constants: FloatArray, sigma: float) -> FloatArray:
    """Return the variance of the normal prior that replaces Student's in the next fit.

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
    """Return an improved estimate of the width of the prior of the constants.

    Parameters
    ----------
    constants, variance : ndarray of float64, shape (n,)
        Constants of all CCDs in the last fit, and their variances.
    prior : ndarray of float64, shape (n,)
        The `prior_variance` of this fit.
    limits : tuple of float
        Smallest and largest width.
    """
    known = np.clip(1.0 - variance / prior, 0.0, 1.0).mean()
    scatter2 = np.median(constants**2) / _MEDIAN_CHI2 / max(known, _LEAST_KNOWN)
    return float(np.clip(np.sqrt(scatter2), *limits))
