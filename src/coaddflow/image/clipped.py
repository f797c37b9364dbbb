"""Mean and variance of values after clipping, of one sample and of all cells of a mesh; compiled.

References
----------
.. [1] Floyd & Rivest 1975, Comm. ACM 18, 165 (selection from a bracket that a sample gives).
"""

import math

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.image.row_blocks import over_rows
from coaddflow.image.statistics import MAD_TO_SIGMA

_ITERATIONS = 4
"""Number of clippings."""

_CORE = 0.8
"""Values within this part of the first limit are summed once, others in each clipping."""

_FEW = 600
_SAMPLE, _BRACKET = 256, 24
"""Of more values than a few a bracket is found first: ranks of a sample around its middle."""

_FEW_TO_SORT = 16

_LANES = 16


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
    threads: int = 1,
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
    threads : int
        Number of threads that share the rows of cells.

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
    tail = _tail(clip_sigma)

    def work(first: int, last: int) -> None:
        edges, scratch = y_edges[first : last + 1], np.empty((3, size), np.float32)
        found = (plane[first:last] for plane in (mean, variance, count))
        _mesh(image, use, edges, x_edges, clip_sigma, tail, scratch, *found)

    over_rows(work, shape[0], threads, least=1)
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
            n, columns = np.uint64(0), slice(x_edges[i], x_edges[i + 1])
            for y in range(y_edges[j], y_edges[j + 1]):
                row, used = image[y, columns], use[y, columns]
                for x in range(len(row)):
                    values[n] = row[x]
                    n += np.uint64(used[x])
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

    Each has partial sums that a processor can add at once.
    """
    rows = len(values) // _LANES
    block, start = values[: rows * _LANES].reshape(rows, _LANES), np.float64(origin)
    number, total, square = np.zeros(_LANES), np.zeros(_LANES), np.zeros(_LANES)
    for row in range(rows):
        for i in range(_LANES):
            near = abs(block[row, i] - centre) <= limit
            value = block[row, i] - start if near else 0.0
            number[i] += near
            total[i] += value
            square[i] += value * value
    for i in range(len(values) - rows * _LANES):
        value = values[rows * _LANES + i]
        if abs(value - centre) <= limit:
            number[i] += 1.0
            total[i] += value - start
            square[i] += (value - start) ** 2
    return int(number.sum()), total.sum(), square.sum()


@njit(nogil=True)
def _median(values, left):
    """Return the median, float32; ``left`` is room for as many values."""
    n = len(values)
    low, high, before = (n - 1) // 2, n // 2, 0
    if n > _FEW:
        # of many values only those count that are between two ranks of a sample
        step = n // _SAMPLE
        sample, few = left[:_SAMPLE], left[_SAMPLE : 2 * _SAMPLE]
        for i in range(_SAMPLE):
            sample[i] = values[i * step]
        floor = _ranked(sample, _SAMPLE // 2 - _BRACKET, few)
        roof = _ranked(sample, _SAMPLE // 2 + _BRACKET, few)
        before = _count(values, floor)
        if before <= low and high < _count(values, roof):
            values = left[: _take(values, floor, roof, left)]
        else:
            before = 0  # the sample is not like the rest
    few = np.empty(len(values), np.float32)
    first = _ranked(values, low - before, few)
    second = first if high == low else _ranked(values, high - before, few)
    return np.float32(np.float32(first + second) * np.float32(0.5))


@njit(nogil=True)
def _ranked(values, rank, few):
    """Return the value of a rank; ``few`` is room for as many values.

    The interval of values that holds it is halved until it holds few: to count is faster than to
    sort.
    """
    least, most = values[0], values[0]
    for i in range(len(values)):
        least, most = min(least, values[i]), max(most, values[i])
    floor, roof = np.float32(-np.inf), most
    before, n = 0, len(values)
    while n - before > _FEW_TO_SORT:
        middle = np.float32(least + (roof - least) * np.float32(0.5))
        if not least < middle < roof:
            break  # most values are equal
        count = _count(values, middle)
        if count > rank:
            roof, n = middle, count
        else:
            floor = least = middle
            before = count
    n = _take(values, floor, roof, few)
    if rank - before >= n:
        return np.float32(np.nan)  # there are NaN
    return np.sort(few[:n])[rank - before]


@njit(nogil=True)
def _count(values, roof):
    """Return how many values are not larger."""
    n = 0
    for i in range(len(values)):
        n += values[i] <= roof
    return n


@njit(nogil=True)
def _take(values, floor, roof, taken):
    """Write the values that are larger than the floor and not than the roof; return how many."""
    n = 0
    for i in range(len(values)):
        taken[n] = values[i]
        n += (values[i] > floor) & (values[i] <= roof)
    return n
