"""Mean and variance of values after clipping, of one sample and of all cells of a mesh; compiled.

References
----------
.. [1] Floyd & Rivest 1975, Comm. ACM 18, 165 (selection from a bracket that a sample gives).
"""

import math

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.image.statistics import MAD_TO_SIGMA

_ITERATIONS = 4
"""Number of clippings."""

_CORE = 0.8
"""Values within this part of the first limit are summed once, others in each clipping."""

_FEW = 400
_SAMPLE, _BRACKET = 256, 24
"""Of more values than a few a bracket is found first: ranks of a sample around its middle."""


def clipped_statistics(values: NDArray[np.float32], clip_sigma: float) -> tuple[float, float, int]:
    """Return mean, variance and number of values after symmetric clipping.

    Clipping starts from median and median absolute deviation; the variance is corrected for the
    tails that the clipping takes from a normal distribution.

    Parameters
    ----------
    values : ndarray, shape (n,)
        At least one finite value.
    clip_sigma : float
        Half-width of the interval that is kept, in standard deviations.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    scratch = np.empty((2, values.size), np.float32)
    return _clipped(values, clip_sigma, _tail(clip_sigma), scratch)


def clipped_mesh(
    image: NDArray[np.float32],
    use: NDArray[np.bool_],
    y_edges: NDArray[np.int64],
    x_edges: NDArray[np.int64],
    clip_sigma: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return the `clipped_statistics` of all cells of a mesh.

    Parameters
    ----------
    image : ndarray of float32, shape (ny, nx)
        The values.
    use : ndarray of bool, shape (ny, nx)
        Which of them count; these are finite.
    y_edges, x_edges : ndarray of int, shape (my + 1,), (mx + 1,)
        Rows and columns at which cells begin, and end.
    clip_sigma : float
        See `clipped_statistics`.

    Returns
    -------
    mean, variance : ndarray of float64, shape (my, mx)
        NaN where a cell has fewer than two values.
    count : ndarray of int64, shape (my, mx)
        Numbers of values that were kept; 0 where there are fewer than two.
    """
    shape = len(y_edges) - 1, len(x_edges) - 1
    mean, variance = np.full(shape, np.nan), np.full(shape, np.nan)
    count = np.zeros(shape, dtype=np.int64)
    size = int(np.diff(y_edges).max() * np.diff(x_edges).max())
    scratch = np.empty((3, size), np.float32)
    tail = _tail(clip_sigma)
    _mesh(image, use, y_edges, x_edges, clip_sigma, tail, scratch, mean, variance, count)
    return mean, variance, count


def _tail(clip_sigma: float) -> float:
    """Return the part of the variance of a normal distribution that clipping takes."""
    density = math.exp(-0.5 * clip_sigma**2) / math.sqrt(2.0 * math.pi)
    return 2.0 * clip_sigma * density / math.erf(clip_sigma / math.sqrt(2.0))


@njit(nogil=True)
def _mesh(image, use, y_edges, x_edges, clip_sigma, tail, scratch, mean, variance, count):
    values = scratch[2]
    for j in range(len(y_edges) - 1):
        for i in range(len(x_edges) - 1):
            n = 0
            for y in range(y_edges[j], y_edges[j + 1]):
                for x in range(x_edges[i], x_edges[i + 1]):
                    values[n] = image[y, x]
                    n += use[y, x]
            if n > 1:
                mean[j, i], variance[j, i], count[j, i] = _clipped(
                    values[:n], clip_sigma, tail, scratch[:2]
                )


@njit(nogil=True)
def _clipped(values, clip_sigma, tail, scratch):
    """Return mean, variance and number; ``scratch`` has two rows as long as the values."""
    n = len(values)
    middle = _median(values, scratch[0])
    deviation = scratch[1]
    for i in range(n):
        deviation[i] = abs(values[i] - middle)
    sigma = MAD_TO_SIGMA * _median(deviation[:n], scratch[0])
    centre, variance, kept = np.float64(middle), sigma**2, n
    # the core of the sample is inside of all limits, usually
    reach = _CORE * clip_sigma * sigma
    core = _sums(values, middle, reach, middle)
    outer = scratch[0]
    n_outer = 0
    for i in range(n):
        outer[n_outer] = values[i]
        n_outer += deviation[i] > reach
    for _ in range(_ITERATIONS):
        limit = clip_sigma * sigma
        if abs(centre - middle) + reach < 0.999999 * limit:
            inside, first, second = _sums(outer[:n_outer], np.float32(centre), limit, middle)
            inside, first, second = inside + core[0], first + core[1], second + core[2]
        else:
            inside, first, second = _sums(values, np.float32(centre), limit, middle)
        if inside < 2 or sigma == 0.0:
            break
        unchanged = inside == kept
        kept = inside
        centre = middle + first / inside
        variance = max(second - first * first / inside, 0.0) / inside / (1.0 - tail)
        sigma = math.sqrt(variance)
        if unchanged:
            break
    return centre, variance, kept


@njit(nogil=True)
def _sums(values, centre, limit, origin):
    """Return number, sum, and sum of squares, from an origin, of values near a centre.

    Each has four partial sums, for speed.
    """
    n, whole = len(values), len(values) // 4 * 4
    number = 0
    a = b = c = d = 0.0
    aa = bb = cc = dd = 0.0
    start = np.float64(origin)
    for i in range(0, whole, 4):
        value = values[i] - start if abs(values[i] - centre) <= limit else 0.0
        a += value
        aa += value * value
        value = values[i + 1] - start if abs(values[i + 1] - centre) <= limit else 0.0
        b += value
        bb += value * value
        value = values[i + 2] - start if abs(values[i + 2] - centre) <= limit else 0.0
        c += value
        cc += value * value
        value = values[i + 3] - start if abs(values[i + 3] - centre) <= limit else 0.0
        d += value
        dd += value * value
    for i in range(whole, n):
        value = values[i] - start if abs(values[i] - centre) <= limit else 0.0
        a += value
        aa += value * value
    for i in range(n):
        number += abs(values[i] - centre) <= limit
    return number, (a + b) + (c + d), (aa + bb) + (cc + dd)


@njit(nogil=True)
def _median(values, left):
    """Return the median, float32; ``left`` is room for as many values."""
    n = len(values)
    low, high = (n - 1) // 2, n // 2
    for i in range(n):
        left[i] = values[i]
    sample = np.empty(_SAMPLE, np.float32)
    while n > _FEW:
        step = n // _SAMPLE
        for i in range(_SAMPLE):
            sample[i] = left[i * step]
        floor = _ranked(sample, _SAMPLE // 2 - _BRACKET)
        roof = _ranked(sample, _SAMPLE // 2 + _BRACKET)
        below = inside = 0
        for i in range(n):
            below += left[i] < floor
            inside += (left[i] >= floor) & (left[i] <= roof)
        if not below <= low <= high < below + inside or inside == n:
            break  # the sample is not like the rest, or most values are equal
        inside = 0
        for i in range(n):
            value = left[i]
            left[inside] = value
            inside += (value >= floor) & (value <= roof)
        n, low, high = inside, low - below, high - below
    first = _ranked(left[:n], low)
    second = first if high == low else _ranked(left[:n], high)
    return np.float32(np.float32(first + second) * np.float32(0.5))


@njit(nogil=True)
def _ranked(values, rank):
    """Return the value of a rank; the values change their places."""
    start, end = 0, len(values) - 1
    while start < end:
        pivot = values[(start + end) // 2]
        i, j = start, end
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if rank <= j:
            end = j
        elif rank >= i:
            start = i
        else:
            break
    return values[rank]
