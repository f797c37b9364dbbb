"""Straight trails of satellites and aeroplanes in the difference of an exposure.

The difference, in units of its noise, is averaged in bins of 8 x 8 pixels and summed along all
lines that cross the image, a Radon transform [1]_: a trail that is invisible in one pixel stands
out in the sum. Bins are limited to some times their noise, so that no star or galaxy makes a line,
and means of the bins around are subtracted, so that no sky does.

A line is a trail if it is seen along most of its way through the image, in data with data on both
sides: spikes of stars fade, bleed columns have no data in their middle, and edges of CCDs have none
beside them. The position is then refined from the cross-profiles of pieces of it, and the width
measured where their median ends. A trail is flagged from edge to edge, gaps included. One that
begins or ends far within the image, so that it is seen on less than ``min_coverage`` of the line,
is not found here.

A trail belongs to the exposure in whose difference it is positive, also if there are only two.

References
----------
.. [1] Radon 1917; Nir, Zackay & Ofek 2018, AJ 156, 229 (streaks by a Radon transform); Bektesevic
   & Vinkovic 2017, MNRAS 471, 2626 (satellite trails).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from coaddflow.compiled import njit
from coaddflow.image.statistics import mad_sigma
from coaddflow.settings.artifacts import TrailSettings

_BIN = 8
"""Side of the bins, pixels."""

_LIMIT = 4.0
"""Largest absolute value of a bin, in units of its noise."""

_BACKGROUND = 21
"""Bins on a side whose mean is subtracted."""

_PIECE = 64.0
"""Length of the pieces of a line, pixels."""

_LEAST_DATA = 0.25
"""Part of a piece that must have data."""

_SEEN = 2.0
"""Significance of a piece in which the trail is seen."""

_CORE = 12
"""Distance from a line within which a narrow trail is before the line is refined, pixels."""

_SURROUNDED = 0.5
"""Part of the pieces that must have data in the middle and on each side."""

_LEAST_OF_BRIGHT = 0.1
"""Part of the significance of the brightest tenth of a trail that its pieces have at least."""

_SMOOTHING = 9
"""Pixels over which cross-profiles are averaged to find their maximum."""

_FAINTEST = 0.1
"""Value of the profile, in units of the noise of a pixel, at which a trail ends."""

_MARGIN = 2.0
"""Pixels that are added to the half width."""


class Trail(NamedTuple):
    """A straight trail: the pixels whose distance from a line is at most ``half_width``.

    The line is x cos(angle) + y sin(angle) = offset, in pixels, 0-based.
    """

    angle: float
    """Direction of the normal, radians."""
    offset: float
    """Distance from the centre of the first pixel."""
    half_width: float
    """Pixels."""
    significance: float
    """Sum along the line, in units of its noise."""


def find_trails(significance: NDArray[np.float32], settings: TrailSettings) -> list[Trail]:
    """Return the trails in a difference.

    Parameters
    ----------
    significance : ndarray of float32, shape (ny, nx)
        Difference of an exposure and the static sky over its noise, not smoothed; NaN where
        there is nothing to compare. It is a whole patch: blocks of it would have other lines.
    settings : TrailSettings
        Thresholds and largest width.

    Returns
    -------
    list of Trail
        The most significant first.
    """
    bins, known = bin_significance(significance, _BIN)
    bins = _without_background(bins, known)
    trails: list[Trail] = []
    for _ in range(2 * settings.max_trails):
        score, line = _best_line(bins, known, settings.min_length / _BIN)
        if score < settings.sigma or len(trails) == settings.max_trails:
            break
        trail = _examine(significance, line, score, settings)
        if trail is not None:
            trails.append(trail)
        reach = _BIN if trail is None else trail.half_width
        _erase(bins, known, line, reach / _BIN + 1.5)
    return trails


def trail_mask(trails: list[Trail], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels of some trails, shape (ny, nx)."""
    mask = np.zeros(shape, bool)
    for trail in trails:
        _mark_near(mask, trail.angle, trail.offset, trail.half_width)
    return mask


@njit(nogil=True)
def _mark_near(mask, angle, offset, half_width):
    """Set the pixels near a line."""
    c, s = np.cos(angle), np.sin(angle)
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            mask[y, x] |= abs(x * c + y * s - offset) <= half_width


# Lines ------------------------------------------------------------------------------------------


@njit(nogil=True)
def bin_significance(significance, side):
    """Return sums over bins in units of the noise, 0 where unknown, and which bins are known.

    ``significance`` is a float32 plane with NaN where nothing is known; a bin is known if half of
    its pixels are. Both results have the shape of the bins.
    """
    ny, nx = significance.shape
    shape = (-(-ny // side), -(-nx // side))
    sums, counts = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for y in range(ny):
        for x in range(nx):
            value = significance[y, x]
            if not np.isnan(value):
                sums[y // side, x // side] += value
                counts[y // side, x // side] += 1
    known = counts >= side * side // 2
    for y in range(shape[0]):
        for x in range(shape[1]):
            norm = np.sqrt(np.float32(max(counts[y, x], 1)))
            sums[y, x] = sums[y, x] / norm if known[y, x] else np.float32(0)
    return sums, known


def _without_background(bins: NDArray, known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return bins of unit noise, limited, without the mean of those around."""
    if not known.any():
        return bins
    noise = max(1.0, mad_sigma(bins[known], 0.0))
    limited = np.clip(bins / noise, -_LIMIT, _LIMIT)
    total, count = (
        ndimage.uniform_filter(p, _BACKGROUND, mode="constant")
        for p in (limited, known.astype(np.float32))
    )
    around = total / np.maximum(count, np.float32(1e-6))
    return np.where(known, limited - around, 0.0).astype(np.float32)


def _best_line(
    bins: NDArray[np.float32], known: NDArray[np.bool_], min_length: float
) -> tuple[float, tuple[float, float]]:
    """Return the significance of the best line, and its angle and offset in pixels."""
    best, found = -np.inf, (0.0, 0.0)
    weight = known.astype(np.float32)
    for transposed in (False, True):
        values, there = (p.T.copy() if transposed else p for p in (bins, weight))
        score, run, start = _best_steep_line(values, there, np.float32(min_length))
        if score > best:
            # x = start + run y / (ny - 1): the normal is (1, -run / (ny - 1))
            slope = run / max(len(values) - 1, 1)
            normal = (1.0, -slope) if not transposed else (-slope, 1.0)
            best, found = score, _line_of(*normal, start)
    return float(best), (found[0], _to_pixels(*found))


def _line_of(a: float, b: float, c: float) -> tuple[float, float]:
    """Return angle and offset of the line a x + b y = c."""
    return float(np.arctan2(b, a)), float(c / np.hypot(a, b))


def _to_pixels(angle: float, offset: float) -> float:
    """Return the offset in pixels of a line in bins, whose centres are (_BIN - 1) / 2 off."""
    return _BIN * offset + 0.5 * (_BIN - 1) * (np.cos(angle) + np.sin(angle))


@njit(nogil=True)
def _best_steep_line(bins, weight, min_length):
    """Return score, run and start of the best of the lines x = start + run y / (ny - 1).

    All runs from -ny to ny: lines at 45 degrees or less from the columns.
    """
    ny, nx = bins.shape
    pad = ny
    sums, counts = np.empty(nx + 2 * pad, np.float32), np.empty(nx + 2 * pad, np.float32)
    best, best_run, best_start = np.float32(-np.inf), 0, 0
    for run in range(-ny, ny + 1):
        sums[:], counts[:] = 0, 0
        stretch = np.sqrt(np.float32(1.0) + (np.float32(run) / ny) ** 2)
        for y in range(ny):
            shift = int(np.floor(run * y / max(ny - 1, 1) + 0.5))
            first = pad - shift
            values, there = bins[y], weight[y]
            for x in range(nx):
                sums[first + x] += values[x]
                counts[first + x] += there[x]
        for x in range(nx + 2 * pad):
            if counts[x] * stretch >= min_length:
                score = sums[x] / np.sqrt(counts[x])
                if score > best:
                    best, best_run, best_start = score, run, x - pad
    return best, best_run, best_start


def _erase(bins: NDArray, known: NDArray, line: tuple[float, float], reach: float) -> None:
    """Forget the bins near a line, in place."""
    angle, offset = line
    offset = (offset - 0.5 * (_BIN - 1) * (np.cos(angle) + np.sin(angle))) / _BIN
    near = np.zeros(bins.shape, bool)
    _mark_near(near, angle, offset, reach)
    bins[near], known[near] = 0, False


# What a line is ---------------------------------------------------------------------------------


def _examine(
    significance: NDArray[np.float32],
    line: tuple[float, float],
    score: float,
    settings: TrailSettings,
) -> Trail | None:
    """Return the trail that a line is; None if it is something else."""
    reach = settings.max_width
    for _ in range(2):
        sums, counts = _cross_profiles(significance, *line, 2 * reach, _PIECE)
        if not _is_crossing(sums, counts, settings.min_coverage):
            return None
        line = _refine(line, sums, counts, significance.shape)
    sums, counts = _cross_profiles(significance, *line, 2 * reach, _PIECE)
    if not _is_crossing(sums, counts, settings.min_coverage):
        return None
    return Trail(*line, _half_width(sums, counts, reach), score)


@njit(nogil=True)
def _cross_profiles(significance, angle, offset, reach, piece):
    """Return sums and counts of the pixels beside a line, shape (n pieces, 2 reach + 1).

    Row and column are the place along the line, in pieces, and the distance from it, in pixels.
    """
    ny, nx = significance.shape
    c, s = np.cos(angle), np.sin(angle)
    start = min(0.0, -nx * s) + min(0.0, ny * c)
    n = int((nx * abs(s) + ny * abs(c)) / piece) + 1
    sums, counts = np.zeros((n, 2 * reach + 1)), np.zeros((n, 2 * reach + 1), np.int64)
    for y in range(ny):
        for x in range(nx):
            distance = x * c + y * s - offset
            if abs(distance) <= reach and not np.isnan(significance[y, x]):
                row = int((y * c - x * s - start) / piece)
                column = int(np.floor(distance + 0.5)) + reach
                sums[row, column] += significance[y, x]
                counts[row, column] += 1
    return sums, counts


def _significances(sums: NDArray, counts: NDArray) -> tuple[NDArray, NDArray[np.bool_]]:
    """Return how significant the line is in each piece, and which pieces have data for it."""
    distance = np.abs(np.arange(sums.shape[1]) - sums.shape[1] // 2)
    inside, outside = distance <= _CORE, distance > 2 * _CORE
    n_inside, n_outside = (counts[:, part].sum(axis=1) for part in (inside, outside))
    sky = sums[:, outside].sum(axis=1) / np.maximum(n_outside, 1)
    excess = sums[:, inside].sum(axis=1) - sky * n_inside
    there = n_inside >= _LEAST_DATA * _PIECE * inside.sum()
    return excess / np.sqrt(np.maximum(n_inside, 1)), there


def _is_crossing(sums: NDArray, counts: NDArray, min_coverage: float) -> bool:
    """Return whether a line is seen along most of its way, in the midst of data."""
    significances, there = _significances(sums, counts)
    if not there.any():
        return False
    middle = sums.shape[1] // 2
    parts = (
        slice(middle - 3 * _CORE, middle - _CORE),
        slice(middle - 1, middle + 2),
        slice(middle + _CORE + 1, middle + 3 * _CORE + 1),
    )
    # an edge has no data on one side, a bleed column none in its middle
    for part in parts:
        has_data = counts[there, part].mean(axis=1) >= _LEAST_DATA * _PIECE
        if has_data.mean() < _SURROUNDED:
            return False
    # a spike of a star fades along its way
    least = max(_SEEN, _LEAST_OF_BRIGHT * np.percentile(significances[there], 90))
    return bool((significances[there] > least).mean() >= min_coverage)


def _refine(
    line: tuple[float, float], sums: NDArray, counts: NDArray, shape: tuple[int, int]
) -> tuple[float, float]:
    """Return the line through the maxima of the cross-profiles of the pieces."""
    significances, there = _significances(sums, counts)
    used = there & (significances > _SEEN)
    middle = sums.shape[1] // 2
    means = sums[used] / np.maximum(counts[used], 1)
    smooth = ndimage.uniform_filter1d(means, _SMOOTHING, axis=1)
    near = slice(middle - 2 * _CORE, middle + 2 * _CORE + 1)
    away = np.argmax(smooth[:, near], axis=1) - 2.0 * _CORE
    along = (np.flatnonzero(used) + 0.5) * _PIECE
    if len(away) < 2:
        return line
    shift, slope = _robust_line(along, away)
    angle, offset = line
    c, s = np.cos(angle), np.sin(angle)
    shift -= slope * (min(0.0, -shape[1] * s) + min(0.0, shape[0] * c))
    return _line_of(c + slope * s, s - slope * c, offset + shift)


def _robust_line(x: NDArray, y: NDArray) -> tuple[float, float]:
    """Return constant and slope of the line with the least absolute deviations, roughly."""
    keep = np.ones(x.size, bool)
    for _ in range(3):
        slope, constant = np.polyfit(x[keep], y[keep], 1)
        residuals = np.abs(y - constant - slope * x)
        keep = residuals <= 3.0 * max(mad_sigma(residuals, 0.0), 0.5)
        if keep.sum() < 2:
            break
    return float(constant), float(slope)


def _half_width(sums: NDArray, counts: NDArray, reach: int) -> float:
    """Return the distance at which the median profile of the pieces ends, pixels."""
    significances, there = _significances(sums, counts)
    used = there & (significances > _SEEN)
    means = np.where(counts[used] > 0, sums[used] / np.maximum(counts[used], 1), 0.0)
    profile = ndimage.uniform_filter1d(np.median(means, axis=0), 3)
    middle = profile.size // 2
    outside = np.abs(np.arange(profile.size) - middle) > reach
    profile = profile - np.median(profile[outside])
    end = max(3.0 * mad_sigma(profile[outside]), _FAINTEST)
    ends = []
    for side in (profile[middle:], profile[middle::-1]):
        below = side[: reach + 1] < end
        # not at a single pixel
        ended = np.flatnonzero(below[:-1] & below[1:])
        ends.append(ended[0] if ended.size else reach)
    return float(max(ends)) + _MARGIN
