"""Pixels of a file that hold no measurement: undefined ones (BLANK), and areas that were filled.

A read-out that stopped, a lost packet or a dead column leave one value in many pixels beside each
other. Pixels that were read have noise: how long a run of equal values can be by chance follows
from how often two neighbours are equal.

References
----------
.. [1] Pence et al. 2010, A&A 524, A42 (FITS 3.0: BLANK, ZBLANK, BZERO, BSCALE).
"""

import math
from collections.abc import Sequence

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from coaddflow.image.statistics import mad_sigma
from coaddflow.instrument.camera import Amplifier

_SHORTEST = 12
"""A run of fewer equal pixels is never taken for a filled area."""

_CHANCE = 1e-6
"""Probability that an amplifier has a run of equal pixels that is taken for a filled area."""

_BRIGHT = 50.0
"""Standard deviations of the sky above which equal pixels may be saturated."""

_BLOCKS = 8
"""Blocks along rows and columns of an amplifier without overscan, to tell its noise from."""


def without_undefined(pixels: NDArray, header: fits.Header) -> NDArray:
    """Return the pixels of an image of integers, NaN where they have the value BLANK [1]_.

    Parameters
    ----------
    pixels : ndarray
        As astropy reads them: it knows BLANK in signed integers, but not in unsigned ones.
    header : astropy.io.fits.Header
        That of the HDU, as it is in the file.

    Returns
    -------
    ndarray
        ``pixels`` themselves if none is undefined, otherwise floating-point numbers.
    """
    if pixels.dtype.kind not in "ui":
        return pixels  # BLANK means nothing there
    blank = header.get("ZBLANK", header.get("BLANK"))
    if not isinstance(blank, int):
        return pixels
    value = blank * header.get("BSCALE", 1) + header.get("BZERO", 0)
    return with_nan(pixels, pixels == value)


def with_nan(pixels: NDArray, where: NDArray[np.bool_]) -> NDArray:
    """Return pixels with NaN in some places, as floating-point numbers if they must be."""
    if not where.any():
        return pixels
    exact = np.float32 if pixels.dtype.itemsize <= 2 else np.float64
    return np.where(where, exact(np.nan), pixels.astype(np.result_type(pixels, exact), copy=False))


def filled_with_constant(image: NDArray) -> NDArray[np.bool_] | None:
    """Return where an image that was calibrated elsewhere was filled with a constant.

    Runs of equal pixels along rows, shape (ny, nx), or None if there are none. What is far brighter
    than the sky is not taken for such: it may be saturated.
    """
    found = _runs(image, _run_beyond_chance(_chances_in_blocks(image, axis=1), image.size))
    if found is None:
        return None
    rest = image[~found & np.isfinite(image)]
    if rest.size:
        sky = np.median(rest)
        found &= ~(image > sky + _BRIGHT * mad_sigma(rest))
    return found if found.any() else None


def filled_areas(array: NDArray, amplifiers: Sequence[Amplifier]) -> NDArray[np.bool_] | None:
    """Return where the amplifiers in a raw array were filled with a constant, not read.

    Parameters
    ----------
    array : ndarray, shape (ny, nx)
        Raw pixels.
    amplifiers : sequence of Amplifier
        Those whose sections are in this array.

    Returns
    -------
    ndarray of bool, shape (ny, nx), or None
        In data sections, runs of equal pixels along rows, and columns that are the same from end to
        end; in the overscan of such rows pixels of the same value. Full pixels (at or above
        saturation) count only where their row is full from end to end, overscan included. None if
        there are none.
    """
    found = None
    for amplifier in amplifiers:
        x0, y0, x1, y1 = amplifier.data
        pixels = array[y0:y1, x0:x1]
        filled = _runs(pixels, _least_run(pixels, array, amplifier, axis=1))
        if len(pixels) >= _least_run(pixels, array, amplifier, axis=0):
            columns = np.flatnonzero(
                (pixels[:: max(len(pixels) // 16, 1)] == pixels[0]).all(axis=0)
            )
            same = columns[(pixels[:, columns] == pixels[0, columns]).all(axis=0)]
            if len(same):
                filled = np.zeros(pixels.shape, bool) if filled is None else filled
                filled[:, same] = True
        if filled is None:
            continue
        _spare_full_pixels(filled, pixels, array[y0:y1], amplifier)
        found = np.zeros(array.shape, bool) if found is None else found
        found[y0:y1, x0:x1] |= filled
        _add_overscan(found, filled, array, amplifier)
    return found if found is not None and found.any() else None


def _least_run(pixels: NDArray, array: NDArray, amplifier: Amplifier, axis: int) -> float:
    """Return how many equal pixels along an axis cannot be chance.

    The chance that two neighbours are equal is largest where the noise is least: in the overscan,
    or without one in the darkest parts of the amplifier.
    """
    chances = []
    if amplifier.overscan is not None:
        x0, y0, x1, y1 = amplifier.overscan
        own = array[y0:y1, x0:x1]
        alive = (own != own[:, :1]).any(axis=1)
        if alive.any():
            chances = [_equal_neighbours(own[alive], axis)]
    return _run_beyond_chance(chances or _chances_in_blocks(pixels, axis), pixels.size)


def _chances_in_blocks(pixels: NDArray, axis: int) -> list[float]:
    """Return how often neighbours are equal in parts of an image that are not constant."""
    chances = []
    height, width = (max(size // _BLOCKS, 2) for size in pixels.shape)
    for y in range(0, pixels.shape[0] - height + 1, height):
        for x in range(0, pixels.shape[1] - width + 1, width):
            chances.append(_equal_neighbours(pixels[y : y + height, x : x + width], axis))
    return [chance for chance in chances if chance < 0.98] or [1.0]


def _run_beyond_chance(chances: list[float], n_pixels: int) -> float:
    """Return the length of a run of equal pixels that cannot be chance."""
    # of values that two pixels share with chance p none is more frequent than the root of p
    most_frequent = math.sqrt(float(np.percentile(chances, 80)))
    if most_frequent >= 1.0:
        return math.inf
    if most_frequent == 0.0:
        return _SHORTEST
    return max(_SHORTEST, math.log(_CHANCE / n_pixels) / math.log(most_frequent))


def _equal_neighbours(pixels: NDArray, axis: int) -> float:
    """Return the fraction of pixels that equal the next one along an axis."""
    return float(np.mean(np.diff(pixels, axis=axis) == 0)) if pixels.shape[axis] > 1 else 1.0


def _runs(pixels: NDArray, length: float) -> NDArray[np.bool_] | None:
    """Return where rows have runs of at least so many equal pixels; None if nowhere."""
    if pixels.shape[1] < length:
        return None
    # each such run has equal pixels at two neighbouring multiples of half its length, and between
    half = max(math.ceil(length) // 2, 1)
    coarse = pixels[:, ::half]
    y, k = np.nonzero(coarse[:, 1:] == coarse[:, :-1])
    between = pixels[y[:, None], (k * half)[:, None] + np.arange(half + 1)]
    rows = np.unique(y[(between == between[:, :1]).all(axis=1)])
    if not len(rows):
        return None
    found = np.zeros(pixels.shape, bool)
    for row in rows:
        edges = np.flatnonzero(np.diff(pixels[row]) != 0) + 1
        begins = np.concatenate([[0], edges])
        ends = np.concatenate([edges, [pixels.shape[1]]])
        for begin, end in zip(begins, ends, strict=True):
            if end - begin >= length:
                found[row, begin:end] = True
    return found if found.any() else None


def _spare_full_pixels(
    filled: NDArray[np.bool_], pixels: NDArray, rows: NDArray, amplifier: Amplifier
) -> None:
    """Take full pixels back from what is filled, in place: they are saturated by light.

    Light does not fill the overscan: rows that are full from end to end stay.
    """
    full = filled & (pixels >= amplifier.saturation)
    if full.any():
        whole = (rows == rows[:, :1]).all(axis=1) & (amplifier.overscan is not None)
        filled &= ~full | whole[:, None]


def _add_overscan(
    found: NDArray[np.bool_], filled: NDArray[np.bool_], array: NDArray, amplifier: Amplifier
) -> None:
    """Add the overscan of filled rows where it has the value of the last filled pixel."""
    if amplifier.overscan is None:
        return
    x0, y0, x1, y1 = amplifier.overscan
    first = amplifier.data[1]
    for row in np.flatnonzero(filled.mean(axis=1) > 0.5) + first:
        if y0 <= row < y1:
            last = amplifier.data[0] + np.flatnonzero(filled[row - first])[-1]
            found[row, x0:x1] |= array[row, x0:x1] == array[row, last]
