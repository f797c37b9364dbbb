"""Medians of whole frames, of neighbourhoods and of pieces of columns, exact and fast.

Single-precision numbers are in the order of their bits (those of negative numbers turned round), so
the value of a rank in a frame is found by counting how often each upper half of the bits occurs,
and then each lower half of those that share the upper one: two passes, and no copy of the frame.
Medians of few values are taken for many pixels at a time, by a sorting network [1]_: exchanges of
values in an order that does not depend on them.

References
----------
.. [1] Batcher 1968, AFIPS Spring Joint Computer Conference 32, 307 (odd-even merge sort).
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.image.row_blocks import over_rows

_HALF = 1 << 16
_SIGN = np.uint32(1 << 31)

_AT_A_TIME = 128
"""Pixels of a row that are sorted together."""


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


def running_median(
    image: NDArray[np.float32], size: int, axis: int, threads: int = 1
) -> NDArray[np.float32]:
    """Return running medians along an axis; beyond the borders the outermost pixels go on.

    The same as `scipy.ndimage.median_filter` with the mode "nearest".

    Parameters
    ----------
    image : ndarray of float32, shape (ny, nx)
        Without NaN.
    size : int
        Number of pixels, odd.
    axis : int
        0 along columns, 1 along rows.
    threads : int
        Number of threads that share the rows.
    """
    image, medians = np.ascontiguousarray(image), np.empty(image.shape, image.dtype)
    network = sorting_network(size)

    def work(first: int, last: int) -> None:
        _running_medians(image, size, axis == 0, network, medians, first, last)

    over_rows(work, len(image), threads)
    return medians


def medians_of_pieces(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Return the medians of pieces of columns, shape (number of pieces, nx).

    Parameters
    ----------
    image : ndarray of float32, shape (ny, nx)
        Without NaN.
    size : int
        Rows of a piece; the last one may have fewer.
    """
    medians = np.empty((-(-len(image) // size), image.shape[1]), np.float32)
    _medians_of_pieces(np.ascontiguousarray(image), size, sorting_network(size), medians)
    return medians


@cache
def sorting_network(n: int) -> NDArray[np.intp]:
    """Return pairs of places which, exchanged in turn, sort n values and infinities after them.

    With them the number of values is a power of 2.
    """
    total = 1 << (n - 1).bit_length()
    pairs = []
    for p in (2**i for i in range(total.bit_length() - 1)):
        for k in (p >> i for i in range(p.bit_length())):
            for j in range(k % p, total - k, 2 * k):
                places = range(j, min(j + k, total - k))
                pairs += [(i, i + k) for i in places if i // (2 * p) == (i + k) // (2 * p)]
    # infinities stay where they are
    return np.array([pair for pair in pairs if pair[1] < n], np.intp).reshape(-1, 2)


@njit(nogil=True)
def sort_together(values, network):
    """Sort float32 values of shape (n, number of pixels) along the first axis, in place.

    Infinities stand for values that are missing. ``network`` is `sorting_network` of n; with some
    hundred pixels at a time all values stay in the fastest cache.
    """
    for i, j in network:
        first, second = values[i], values[j]
        for x in range(len(first)):
            a, b = first[x], second[x]
            first[x] = a if a < b else b
            second[x] = b if a < b else a


@njit(nogil=True)
def _running_medians(image, size, along_y, network, medians, first, last):
    ny, nx = image.shape
    half = size // 2
    values = np.empty((size, _AT_A_TIME), np.float32)
    padded = np.empty(nx + 2 * half, np.float32)
    for y in range(first, last):
        if not along_y:
            padded[:half], padded[half : half + nx], padded[half + nx :] = (
                image[y, 0],
                image[y],
                image[y, nx - 1],
            )
        for start in range(0, nx, _AT_A_TIME):
            n = min(_AT_A_TIME, nx - start)
            for k in range(size):
                if along_y:
                    row = image[min(max(y + k - half, 0), ny - 1)]
                    values[k, :n] = row[start : start + n]
                else:
                    values[k, :n] = padded[start + k : start + k + n]
            sort_together(values, network)
            medians[y, start : start + n] = values[half, :n]


@njit()
def _medians_of_pieces(image, size, network, medians):
    ny, nx = image.shape
    values = np.empty((size, _AT_A_TIME), np.float32)
    for top in range(0, ny, size):
        n = min(size, ny - top)
        out = medians[top // size]
        for start in range(0, nx, _AT_A_TIME):
            end = min(start + _AT_A_TIME, nx)
            values[n:] = np.inf
            values[:n, : end - start] = image[top : top + n, start:end]
            sort_together(values, network)
            for x in range(start, end):
                lower, upper = values[(n - 1) // 2, x - start], values[n // 2, x - start]
                out[x] = (lower + upper) / np.float32(2)
