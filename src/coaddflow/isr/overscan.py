"""The bias level of an amplifier, from the overscan: pixels read after the last real one of a row.

References
----------
.. [1] Howell 2006, "Handbook of CCD Astronomy", 2nd edition, section 3.3.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.geometry.box import Box
from coaddflow.image.statistics import mad_sigma
from coaddflow.instrument.camera import Amplifier
from coaddflow.settings.detrend import DetrendSettings

_CLIP = 4.0
_ROUNDING = 0.5
"""Counts are integers: no deviation smaller than this is an outlier."""


def overscan_level(
    array: NDArray, amplifier: Amplifier, settings: DetrendSettings
) -> tuple[NDArray[np.float32], float, float]:
    """Return the bias level for each row of an amplifier's data [1]_.

    Parameters
    ----------
    array : ndarray, shape (ny, nx)
        The raw array that contains the overscan.
    amplifier : Amplifier
        Its sections.
    settings : DetrendSettings
        Method; columns next to the data are left out, since trailing charge reaches them.

    Returns
    -------
    level : ndarray of float32, shape (rows of the data section,)
        Bias level of each row, counts.
    noise : float
        Standard deviation of single overscan pixels, counts.
    error : float
        Error of the level of a row, counts.

    Raises
    ------
    InputError
        If levels of rows are asked for and the overscan does not cover all rows.
    CcdFailure
        ``bad_overscan`` if a polynomial is asked for and rows have no finite level.
    """
    x0, y0, x1, y1 = _without_trail(amplifier, settings.overscan_skip)
    first, last = amplifier.data[1], amplifier.data[3]
    pixels = array[y0:y1, x0:x1].astype(np.float64)
    if settings.overscan == "constant":
        level, noise = _clipped_means(pixels.reshape(1, -1))
        return np.full(last - first, level[0], np.float32), noise, noise / np.sqrt(pixels.size)
    if y0 > first or y1 < last:
        raise InputError(
            f"the overscan of amplifier {amplifier.name} does not cover all rows of its data",
            remedy="set detrend.overscan to `constant`",
        )
    level, noise = _clipped_means(pixels[first - y0 : last - y0])
    error = noise / np.sqrt(x1 - x0)
    if settings.overscan == "polynomial":
        level = _fit_polynomial(level, settings.overscan_order, error)
        n_independent = len(level) / (settings.overscan_order + 1)
    else:
        n_independent = min(settings.overscan_smoothing, len(level))
        level = _smooth(level, n_independent, error)
    return level.astype(np.float32), noise, error / np.sqrt(n_independent)


def _without_trail(amplifier: Amplifier, skip: int) -> Box:
    """Return the overscan without the columns next to the data (at most half of them)."""
    x0, y0, x1, y1 = amplifier.overscan
    skip = min(skip, (x1 - x0) // 2)
    if x0 >= amplifier.data[2]:
        return x0 + skip, y0, x1, y1
    if x1 <= amplifier.data[0]:
        return x0, y0, x1 - skip, y1
    return x0, y0, x1, y1


def _clipped_means(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the mean of each row without outliers, and the scatter of single pixels."""
    residual = rows - np.median(rows, axis=1, keepdims=True)
    spread = mad_sigma(residual, 0.0)
    good = np.abs(residual) <= _CLIP * spread + 2 * _ROUNDING
    level = (rows * good).sum(axis=1) / good.sum(axis=1)
    squares = (((rows - level[:, None]) * good) ** 2).sum()
    return level, float(np.sqrt(squares / max(good.sum() - len(rows), 1)))


def _smooth(level: NDArray[np.float64], width: int, error: float) -> NDArray[np.float64]:
    """Average levels over rows, without rows whose overscan bleeding has reached."""
    if width <= 1:
        return level
    typical = ndimage.median_filter(level, size=2 * width + 1, mode="nearest")
    level = np.where(np.abs(level - typical) > 6 * error + _ROUNDING, typical, level)
    return ndimage.uniform_filter1d(level, width, mode="nearest")


def _fit_polynomial(level: NDArray[np.float64], order: int, error: float) -> NDArray[np.float64]:
    """Fit the levels of the rows by a polynomial, with clipping."""
    if not np.isfinite(level).all():
        raise CcdFailure(Reason.BAD_OVERSCAN, "rows of the overscan have no finite level")
    row = np.linspace(-1, 1, len(level))
    keep = np.ones(len(level), bool)
    fitted = np.full(len(level), np.median(level))
    for _ in range(5):
        coefficients = np.polynomial.legendre.legfit(row[keep], level[keep], order)
        fitted = np.polynomial.legendre.legval(row, coefficients)
        residual = np.abs(level - fitted)
        typical = max(mad_sigma(residual, 0.0), error)
        keep = residual < _CLIP * typical + _ROUNDING
    return fitted
