"""Many frames of one CCD into one: a clipped mean of every pixel, with its variance.

Frames come one after the other and are needed all at once, pixel by pixel. The stack is held in
memory if it fits the limit of the settings, otherwise in a scratch file, and is combined in
blocks of rows; the result does not depend on where it was held.

References
----------
.. [1] Croux & Rousseeuw 1992, "Time-efficient algorithms for two highly robust estimators of
   scale", Computational Statistics 1, 411.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.errors import InputError
from coaddflow.image.statistics import MAD_TO_SIGMA

_SAMPLE_STEP = 7
"""Every so many pixels along x and y are looked at for the typical scatter of a pixel."""

_ROWS = 64
"""Rows after which the memory of a stack in a scratch file is given back."""

_CERTAIN = 1 - 1e-12
"""Of a limit: what is below this part of it is so whatever the order of the arithmetic."""


@contextmanager
def stacked(
    frames: Iterable[NDArray], n_frames: int, memory: float
) -> Iterator[NDArray[np.float32]]:
    """Stack frames, each of shape (ny, nx), in memory or in a scratch file that is removed.

    Each frame is asked for once and may be forgotten by its maker. ``memory`` is the largest
    stack that is held in memory, GB. What is yielded has the shape (n_frames, ny, nx), and may be
    changed.
    """
    frames = iter(frames)
    first = next(frames)
    shape = (n_frames, *first.shape)
    size = 4 * n_frames * first.size
    with tempfile.TemporaryFile() as file:
        if size <= memory * 1e9:
            stack = np.empty(shape, np.float32)
        else:
            _reserve(file, size)
            stack = np.memmap(file, np.float32, "r+", shape=shape)
        stack[0] = first
        del first
        for i in range(1, n_frames):
            stack[i] = next(frames)  # no name holds it while the next one is made
            _let_go(stack)
        yield stack


def _let_go(stack: NDArray[np.float32]) -> None:
    """Give back the memory of a stack that is in a scratch file, where it stays."""
    if isinstance(stack, np.memmap):
        stack.base.madvise(mmap.MADV_DONTNEED)


def _reserve(file: BinaryIO, size: int) -> None:
    """Take the space on the disk now: a mapped file on a full disk would kill the process."""
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise InputError(
            f"a scratch file of {size / 1e9:.1f} GB cannot be written ({error.strerror})",
            remedy="free some space, set TMPDIR to a larger disk, or raise calibs.memory",
        ) from error


def clipped_mean(
    stack: NDArray[np.float32],
    weights: NDArray[np.float64] | None,
    clip_sigma: float,
    iterations: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int16]]:
    """Return the clipped mean over the first axis, its variance, and the numbers used.

    Values farther than ``clip_sigma`` from the median of their pixel are left out, then those
    farther from the mean of the rest, until nothing changes. The scatter that this is measured
    in is that of the pixel itself (median of absolute deviations), but at least the typical
    scatter of the CCD: with ten frames the median of deviations is often far too small.

    Parameters
    ----------
    stack : ndarray of float32, shape (n, ny, nx)
        Frames; values that are not finite are left out.
    weights : ndarray of float64, shape (n,), optional
        Relative inverse variances of the frames.
    clip_sigma : float
        Limit in sigma.
    iterations : int
        Rounds of clipping.

    Returns
    -------
    mean, variance : ndarray of float32, shape (ny, nx)
        Weighted mean and variance of the mean, from the scatter of the values that were used;
        NaN and infinity where there are none, infinite variance also where there is one only.
    number : ndarray of int16, shape (ny, nx)
        Values used.
    """
    n, *shape = stack.shape
    weights = np.ones(n) if weights is None else np.asarray(weights, float) / np.mean(weights)
    limit = clip_sigma * _typical_scatter(stack, weights)
    mean, variance = np.empty(shape, np.float32), np.empty(shape, np.float32)
    number = np.empty(shape, np.int16)
    for y in range(shape[0]):
        if y % _ROWS == 0:
            _let_go(stack)
        planes = mean[y], variance[y], number[y]
        _combine_row(stack[:, y], weights, limit, clip_sigma, iterations, *planes)
    return mean, variance, number


def median(stack: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the median over the first axis of an (n, ny, nx) stack, NaN where there is none."""
    result = np.empty(stack.shape[1:], np.float32)
    for rows, block in _blocks(stack):
        _median_block(block, result[rows])
    return result


def _blocks(stack: NDArray[np.float32]) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield rows of pixels and their values, of shape (rows, nx, n)."""
    n, ny, nx = stack.shape
    size = max(1, int(2e6 / (n * nx)))
    for y in range(0, ny, size):
        rows = slice(y, y + size)
        yield rows, np.ascontiguousarray(np.moveaxis(stack[:, rows], 0, -1))
        _let_go(stack)


@njit()
def _median_block(block, result):
    ny, nx, n = block.shape
    values = np.empty(n)
    for y in range(ny):
        for x in range(nx):
            k = 0
            for i in range(n):
                if np.isfinite(block[y, x, i]):
                    values[k] = block[y, x, i]
                    k += 1
            result[y, x] = np.median(values[:k]) if k > 0 else np.nan


def _typical_scatter(stack: NDArray[np.float32], weights: NDArray[np.float64]) -> float:
    """Return the median over pixels of the scatter of a frame of mean weight.

    From the median of absolute deviations, whose bias in samples of n is n / (n - 0.8) [1]_;
    parameters are those of `clipped_mean`, with weights of mean 1.
    """
    samples = []
    for frame in stack:
        samples.append(frame[::_SAMPLE_STEP, ::_SAMPLE_STEP].astype(np.float64).ravel())
        _let_go(stack)
    sample = np.stack(samples)
    number = np.isfinite(sample).sum(axis=0)
    sample, number = sample[:, number >= 2], number[number >= 2]
    if not len(number):
        return 0.0
    deviation = np.abs(sample - np.nanmedian(sample, axis=0)) * np.sqrt(weights)[:, None]
    scatter = MAD_TO_SIGMA * np.nanmedian(deviation, axis=0) * number / (number - 0.8)
    return float(np.median(scatter))


@njit(error_model="numpy")
def _combine_row(rows, weights, limit, clip_sigma, iterations, mean, variance, number):
    """Combine a row of pixels of all frames, of shape (n, nx).

    Nearly all pixels have no value to leave out: these are found, and combined, many at a time.
    """
    n, nx = rows.shape
    least, greatest = np.empty(nx, np.float32), np.empty(nx, np.float32)
    whole = np.empty(nx, np.bool_)
    _range_of_pixels(rows, least, greatest, whole)
    if n > 2:
        _without_outliers(rows, _CERTAIN * limit / np.sqrt(weights.max()), least, greatest, whole)
    total, squares, weight = np.zeros(nx), np.zeros(nx), 0.0
    for i in range(n):
        row, one = rows[i], weights[i]
        weight += one
        for x in range(nx):
            total[x] += row[x] * one
    for x in range(nx):
        total[x] /= weight
    for i in range(n):
        row, one = rows[i], weights[i]
        for x in range(nx):
            difference = row[x] - total[x]
            squares[x] += one * (difference * difference)
    for x in range(nx):
        mean[x] = total[x]
        variance[x] = squares[x] / (n - 1) / weight if n > 1 else np.inf
        number[x] = n
    for x in range(nx):
        if not whole[x]:
            values = rows[:, x]
            pixel = _combine_pixel(values, weights, limit, clip_sigma, iterations)
            mean[x], variance[x], number[x] = pixel


@njit()
def _range_of_pixels(rows, least, greatest, whole):
    """Find least and greatest value of each pixel, and whether all are finite."""
    n, nx = rows.shape
    least[:], greatest[:], whole[:] = rows[0], rows[0], True
    largest = np.float32(np.finfo(np.float32).max)
    for i in range(n):
        row = rows[i]
        for x in range(nx):
            value = row[x]
            least[x] = value if value < least[x] else least[x]
            greatest[x] = value if value > greatest[x] else greatest[x]
            whole[x] &= abs(value) <= largest


@njit()
def _without_outliers(rows, limit, least, greatest, whole):
    """Find the pixels whose extremes are no farther than this from their median.

    Which is so if at least half of the values are no farther from the greatest, and as many from
    the least: the middle ones are among them.
    """
    n, nx = rows.shape
    near_greatest, near_least = np.zeros(nx, np.int32), np.zeros(nx, np.int32)
    for i in range(n):
        row = rows[i]
        for x in range(nx):
            value = np.float64(row[x])
            near_greatest[x] += np.float64(greatest[x]) - value <= limit
            near_least[x] += value - np.float64(least[x]) <= limit
    enough = n // 2 + 1
    for x in range(nx):
        whole[x] &= (near_greatest[x] >= enough) & (near_least[x] >= enough)


@njit()
def _combine_pixel(pixel, weights, limit, clip_sigma, iterations):
    """Return mean, its variance and the number of values used, of one pixel of all frames."""
    values = np.empty(len(pixel))
    weight = np.empty(len(pixel))
    k = 0
    for i in range(len(pixel)):
        if np.isfinite(pixel[i]):
            values[k] = pixel[i]
            weight[k] = weights[i]
            k += 1
    if k > 2:
        k = _clip(values[:k], weight[:k], limit, clip_sigma, iterations)
    center, scatter = _mean_and_variance(values[:k], weight[:k])
    return center, scatter, k


@njit()
def _clip(values, weight, limit, clip_sigma, iterations):
    """Move the values that are kept to the front, and return their number."""
    root = np.sqrt(weight)
    center = np.median(values)
    deviation = np.abs(values - center) * root
    if deviation.max() <= limit:
        return len(values)
    limit = max(limit, clip_sigma * MAD_TO_SIGMA * np.median(deviation))
    kept = np.ones(len(values), np.bool_)
    for _ in range(iterations):
        keep = np.abs(values - center) * root <= limit
        if not keep.any() or (keep == kept).all():
            break
        kept = keep
        center = (values[kept] * weight[kept]).sum() / weight[kept].sum()
    n_kept = 0
    for i in range(len(values)):
        if kept[i]:
            values[n_kept] = values[i]
            weight[n_kept] = weight[i]
            n_kept += 1
    return n_kept


@njit()
def _mean_and_variance(values, weight):
    if len(values) == 0:
        return np.nan, np.inf
    mean = (values * weight).sum() / weight.sum()
    if len(values) == 1:
        return mean, np.inf
    squares = (weight * (values - mean) ** 2).sum()
    return mean, squares / (len(values) - 1) / weight.sum()
