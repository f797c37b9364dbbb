"""Medians of whole frames, by counting instead of sorting.

Single-precision numbers are in the order of their bits (those of negative numbers turned round), so
the value of a rank is found by counting how often each upper half of the bits occurs, and then each
lower half of those that share the upper one: two passes, and no copy of the frame.
"""

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit

_HALF = 1 << 16
_SIGN = np.uint32(1 << 31)


def masked_median(values: NDArray[np.float32], left_out: NDArray[np.bool_]) -> np.float32:
    """Return ``np.median(values[~left_out])``, the same bits; NaN if all are left out.

    Parameters
    ----------
    values : ndarray of float32
        Of any shape; no NaN among those that count.
    left_out : ndarray of bool
        The values that do not count; of the same shape.
    """
    lower, upper = middle_values(values, left_out)
    return np.mean(np.array([lower, upper], np.float32))


def middle_values(
    values: NDArray[np.float32], left_out: NDArray[np.bool_]
) -> tuple[np.float32, np.float32]:
    """Return the lower and the upper of the middle values, the same if their number is odd.

    Parameters are those of `masked_median`.
    """
    flat = np.ascontiguousarray(values, np.float32).ravel().view(np.uint32)
    out = np.ascontiguousarray(left_out, bool).ravel()
    number = _count_halves(flat, out)
    n = int(number.sum())
    if n == 0:
        return np.float32(np.nan), np.float32(np.nan)
    total = np.cumsum(number)
    middle = []
    half, lower_number = -1, np.empty(0)
    for rank in ((n - 1) // 2, n // 2):
        upper = int(np.searchsorted(total, rank, side="right"))
        if upper != half:
            half, lower_number = upper, np.cumsum(_count_lower_halves(flat, out, upper))
        rest = rank - (total[upper] - number[upper])
        middle.append(upper * _HALF + int(np.searchsorted(lower_number, rest, side="right")))
    lower, upper = _from_order(np.array(middle, np.uint32))
    return lower, upper


def _from_order(order: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Return the numbers of these places in the order."""
    return np.where(order & _SIGN, order ^ _SIGN, ~order).view(np.float32)


@njit(nogil=True)
def _place(bits):
    """Return the place of a number in the order, from its bits."""
    return bits ^ _SIGN if bits < _SIGN else ~bits


@njit(nogil=True)
def _count_halves(bits, left_out):
    number = np.zeros(_HALF, np.int64)
    for i in range(len(bits)):
        if not left_out[i]:
            number[_place(bits[i]) >> np.uint32(16)] += 1
    return number


@njit(nogil=True)
def _count_lower_halves(bits, left_out, upper):
    number = np.zeros(_HALF, np.int64)
    for i in range(len(bits)):
        place = _place(bits[i])
        if place >> np.uint32(16) == upper and not left_out[i]:
            number[place & np.uint32(0xFFFF)] += 1
    return number
