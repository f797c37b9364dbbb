"""Outliers among the epochs of a pixel: cosmic rays, trails, moving objects.

A value y_i of exposure i with noise sigma_i is an outlier with respect to the median m of all
epochs of its pixel if

    |y_i - m| > n sigma_i + a_i |m| + b e

The first two terms are the rule of [1]_: the noise, and a part of the median that allows for PSFs
that differ moderately. Real seeing differs by a factor of two, so the second term is enlarged by
what the stated seeing predicts for the core of a star, whose peak goes with FWHM^-2, and the
third allows for its wings. There the profiles of a star under different seeing differ by less
than 8 % of the peak, and farther out by less than half of the profile under the worst seeing, for
which a Moffat function is taken [3]_: b e is the peak of the stars around in the median, times the
smaller of b and half of that function at their distance. A source cannot be fainter than nothing:
where the seeing differs, a value below the median is an outlier only if it is negative by more
than noise and wings explain.

The rule is applied to single pixels and then, for trails too faint to see in one pixel, to means
of 4 x 4 pixels. Neighbours of an outlier are held to a lower threshold. If more epochs are outliers
at a pixel than artifacts can explain, the source varies and nothing is clipped there or next to
it; how many may be follows the temporal rule of [2]_.

References
----------
.. [1] Gruen, Seitz & Bernstein 2014, PASP 126, 158, section 2.
.. [2] LSST Science Pipelines, ``CompareWarpAssembleCoadd`` (maxNumEpochs, maxFractionEpochs);
   AlSayyad 2019, DMTN-080.
.. [3] Trujillo et al. 2001, MNRAS 328, 977 (Moffat functions for seeing; beta from 2.5 to 4.8).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.compiled import njit
from coaddflow.image.medians import sort_together, sorting_network
from coaddflow.settings.coadd import ClipSettings

MISSING, FILLABLE, USABLE, OUTLIER, GROWN = 0, 1, 2, 3, 4
"""States of a value: not to be used; only where nothing else is; good; clipped, for two reasons."""

BIN = 4
"""Side of the means, pixels; bins begin at multiples of it on the tract."""

_AT_A_TIME = 512
"""Pixels of a row that are worked on together."""

_SEEING_DIFFERS = 1.1
_MOFFAT_BETA = 2.5
_WING_PART = 0.5
_REACH_IN_FWHM = 3.0
_MAX_REACH = 12
USUAL_FWHM = 6.0
"""Pixels, where neither seeing nor pixel scale is known."""

_SMALLEST_FWHM = 3.0
"""Pixels: stars that are sharper are widened by the resampling."""


class Epochs(NamedTuple):
    """What is expected of each exposure."""

    sharpness: NDArray[np.float32]
    """FWHM^-2, in any unit: the peak of a star of given flux, shape (n,)."""
    leeway: NDArray[np.float32]
    """Factor by which an exposure may be sharper than that (1 if its seeing is known), (n,)."""
    below: np.float32
    """Part of the median by which a value may fall below it."""
    wings: NDArray[np.float32]
    """Part of the peak of a star by which the exposures may differ, so many bins away along y and
    x, shape (reach + 1, reach + 1)."""
    halo: int
    """Rows that the rule needs above and below, a multiple of `BIN`."""


class _Limits(NamedTuple):
    sigma: np.float32
    relative: np.float32
    below: np.float32
    max_fraction: np.float32


def describe_epochs(
    seeing: ArrayLike, settings: ClipSettings, pixel_scale: float | None = None
) -> Epochs:
    """Translate the seeing of the exposures into tolerances.

    Parameters
    ----------
    seeing : array_like, shape (n,)
        FWHM in arcsec; NaN where it is not known.
    settings : ClipSettings
        For ``relative`` and ``unknown_seeing_ratio``.
    pixel_scale : float, optional
        Arcsec per pixel; without it a FWHM of 6 pixels is assumed for the wings.
    """
    seeing = np.asarray(seeing, float)
    known = np.isfinite(seeing) & (seeing > 0)
    typical = np.median(seeing[known]) if known.any() else 1.0
    sharpness = np.where(known, seeing, typical) ** -2.0
    leeway = np.where(known, 1.0, settings.unknown_seeing_ratio**2)
    ratio = np.sqrt(np.max(sharpness * leeway, initial=1e-9) / np.min(sharpness, initial=1e9))
    below = max(1.0, settings.relative) if ratio > _SEEING_DIFFERS else settings.relative
    fwhm = USUAL_FWHM
    if pixel_scale is not None and known.any():
        fwhm = max(seeing[known].max() / pixel_scale, _SMALLEST_FWHM)
    wings = _wing_differences(fwhm, settings.wings)
    # a value may be marked by an outlier within the radius, which is in a bin beside one that is
    # crowded, or spared by a variable pixel within the radius plus one; their thresholds depend on
    # the peaks within reach of the wings
    marked = max(-(-(2 * settings.grow_radius + 1) // BIN), -(-settings.grow_radius // BIN) + 1)
    return Epochs(
        sharpness.astype(np.float32),
        leeway.astype(np.float32),
        np.float32(below),
        wings,
        BIN * (len(wings) + marked),
    )


def _wing_differences(fwhm: float, largest: float) -> NDArray[np.float32]:
    """Return the difference of profiles relative to the peak, by distance in bins."""
    reach = int(np.clip(np.ceil(_REACH_IN_FWHM * fwhm / BIN), 2, _MAX_REACH))
    bins = np.arange(reach + 1)
    # between the nearest pixels of two bins
    gap = np.where(bins > 0, BIN * (bins - 1) + 1, 0)
    alpha = fwhm / (2.0 * np.sqrt(2.0 ** (1.0 / _MOFFAT_BETA) - 1.0))
    distance = np.hypot(gap[:, None], gap[None, :])
    profile = (1.0 + (distance / alpha) ** 2) ** -_MOFFAT_BETA
    return np.minimum(_WING_PART * profile, largest).astype(np.float32)


@njit(nogil=True)
def max_outliers(n_epochs, max_fraction=0.03):
    """Return how many epochs of a pixel may be outliers before it counts as variable [2]_.

    min(0.4 n, 2 + ``max_fraction`` n), rounded down: none of 2 epochs, 1 of 3 or 4, 2 of 5.
    """
    return int(min(0.4 * n_epochs, 2.0 + max_fraction * n_epochs))


def find_outliers(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    state: NDArray[np.uint8],
    epochs: Epochs,
    settings: ClipSettings,
    covariance: float,
    x_offset: int = 0,
) -> None:
    """Mark the outliers in a stack of aligned exposures.

    Parameters
    ----------
    image, variance : ndarray of float32, shape (n, ny, nx)
        Values on a common flux scale and their variances; ny is a multiple of `BIN` and the
        first row begins a bin.
    state : ndarray of uint8, shape (n, ny, nx)
        `USABLE` where a value takes part; `OUTLIER` and `GROWN` are set in place.
    epochs : Epochs
        From `describe_epochs`, for the same exposures.
    settings : ClipSettings
        Thresholds of outliers and of their neighbours, and how many epochs may be outliers.
    covariance : float
        Variance of single pixels relative to white noise
        (`coaddflow.warp.kernels.covariance_factor`), for the noise of means of pixels.
    x_offset : int
        Columns between the beginning of a bin and the first column.
    """
    if image.shape[0] < 3:
        return
    limits = _Limits(
        np.float32(settings.sigma),
        np.float32(settings.relative),
        epochs.below,
        np.float32(settings.max_fraction),
    )
    network = sorting_network(image.shape[0])
    maxima = _bin_maxima(image, state, x_offset)
    wings = _spread_peaks(_median_plane(maxima, network), epochs.wings)
    peaks = (epochs.sharpness, epochs.leeway)
    varies, medians = _mark_outliers(
        image, variance, state, wings, peaks, limits, x_offset, network
    )
    _spare_variables(state, varies, settings.grow_radius + 1)
    if settings.smooth_sigma is not None:
        smooth = limits._replace(sigma=np.float32(settings.smooth_sigma))
        means, noises = _bin_means(image, variance, state, np.float32(covariance), x_offset)
        flagged = _flag_bins(means, noises, _median_plane(means, network), wings, peaks, smooth)
        _mark_bins(state, flagged, ~np.isnan(means), limits.max_fraction, x_offset)
    grow = limits._replace(sigma=np.float32(settings.grow_sigma))
    stack = (image, variance, state)
    _grow_outliers(*stack, medians, wings, peaks, grow, x_offset, settings.grow_radius)


@njit(nogil=True)
def _median(values, n):
    """Return the median of the first n values, which are reordered (quickselect)."""
    k = n // 2
    low, high = 0, n - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    upper = values[k]
    if n % 2 == 1:
        return upper
    lower = values[0]
    for i in range(1, k):
        lower = max(lower, values[i])
    return np.float32(0.5) * (lower + upper)


@njit(nogil=True)
def _bin_maxima(image, state, x_offset):
    """Return the largest usable value of each bin; NaN where there is none."""
    n, ny, nx = image.shape
    maxima = np.empty((n, ny // BIN, (nx + x_offset + BIN - 1) // BIN), np.float32)
    highest = np.empty(nx, np.float32)
    for k in range(n):
        for row in range(maxima.shape[1]):
            highest[:] = -np.inf
            for y in range(row * BIN, (row + 1) * BIN):
                for x in range(nx):
                    usable = state[k, y, x] == USABLE
                    value = image[k, y, x] if usable else np.float32(-np.inf)
                    highest[x] = max(highest[x], value)
            for column in range(maxima.shape[2]):
                found = np.float32(-np.inf)
                for x in range(max(column * BIN - x_offset, 0), _end(column, nx, x_offset)):
                    found = max(found, highest[x])
                maxima[k, row, column] = found if found > -np.inf else np.float32(np.nan)
    return maxima


@njit(nogil=True)
def _end(column, nx, x_offset):
    """Return the first pixel behind a bin."""
    return min((column + 1) * BIN - x_offset, nx)


@njit(nogil=True)
def _bin_means(image, variance, state, covariance, x_offset):
    """Return means of bins and their noise; NaN where less than half of a bin is usable."""
    n, ny, nx = image.shape
    shape = (n, ny // BIN, (nx + x_offset + BIN - 1) // BIN)
    means, noises = np.empty(shape, np.float32), np.empty(shape, np.float32)
    sums, squares = np.empty(nx, np.float32), np.empty(nx, np.float32)
    counts = np.empty(nx, np.int32)
    for k in range(n):
        for row in range(shape[1]):
            sums[:], squares[:], counts[:] = 0, 0, 0
            for y in range(row * BIN, (row + 1) * BIN):
                for x in range(nx):
                    usable = state[k, y, x] == USABLE
                    sums[x] += image[k, y, x] if usable else np.float32(0)
                    squares[x] += variance[k, y, x] if usable else np.float32(0)
                    counts[x] += np.int32(1) if usable else np.int32(0)
            for column in range(shape[2]):
                total, square, count = np.float32(0), np.float32(0), 0
                for x in range(max(column * BIN - x_offset, 0), _end(column, nx, x_offset)):
                    total += sums[x]
                    square += squares[x]
                    count += counts[x]
                number = np.float32(max(count, 1))
                enough = count >= BIN * BIN // 2
                noise = np.sqrt(square / covariance) / number
                means[k, row, column] = total / number if enough else np.float32(np.nan)
                noises[k, row, column] = noise if enough else np.float32(np.inf)
    return means, noises


@njit(nogil=True)
def _median_plane(means, network):
    """Return the median over the epochs that are not NaN; 0 where there are none."""
    n, ny, nx = means.shape
    medians = np.empty((ny, nx), np.float32)
    values, counts = np.empty((n, _AT_A_TIME), np.float32), np.empty(_AT_A_TIME, np.int32)
    for y in range(ny):
        for start in range(0, nx, _AT_A_TIME):
            end = min(start + _AT_A_TIME, nx)
            counts[:] = 0
            for k in range(n):
                _take_known(means[k, y, start:end], values[k], counts)
            sort_together(values, network)
            _write_medians(values, counts, medians[y, start:end])
    return medians


@njit(nogil=True)
def _take_known(row, values, counts):
    """Copy a row with infinity where it is NaN, and count where it is not."""
    for x in range(row.size):
        known = row[x] == row[x]
        values[x] = row[x] if known else np.float32(np.inf)
        counts[x] += np.int32(1) if known else np.int32(0)


@njit(nogil=True)
def _write_medians(values, counts, medians):
    """Write the medians of sorted values, of which the first so many are known; 0 if none is."""
    for x in range(medians.size):
        lower = values[max(counts[x] - 1, 0) // 2, x]
        upper = values[min(counts[x] // 2, values.shape[0] - 1), x]
        middle = upper if counts[x] % 2 == 1 else np.float32(0.5) * (lower + upper)
        medians[x] = middle if counts[x] > 0 else np.float32(0)


@njit(nogil=True)
def _spread_peaks(peaks, wings):
    """Return the largest of the surrounding peaks, each times its wing at that distance."""
    ny, nx = peaks.shape
    reach = wings.shape[0] - 1
    largest = np.zeros((ny, nx), np.float32)
    for y in range(ny):
        for j in range(max(y - reach, 0), min(y + reach + 1, ny)):
            for shift in range(-reach, reach + 1):
                wing = wings[abs(j - y), abs(shift)]
                for x in range(max(-shift, 0), min(nx - shift, nx)):
                    largest[y, x] = max(largest[y, x], wing * peaks[j, x + shift])
    return largest


@njit(nogil=True)
def _is_outlier(value, noise, median, k, typical, peaks, wing, limits):
    """Return whether a value of epoch k deviates too much (False if it is NaN)."""
    difference = value - median
    part = limits.below
    if difference > 0:
        # the core of a star may be above the median by what the seeing predicts
        sharper = peaks[0][k] * peaks[1][k] / typical - np.float32(1.0)
        part = limits.relative + max(sharper, np.float32(0.0))
    return abs(difference) > limits.sigma * noise + part * abs(median) + wing


@njit(nogil=True)
def _flag_bins(means, noises, medians, wings, peaks, limits):
    """Return which means are outliers, shape (n, rows, columns)."""
    n, ny, nx = means.shape
    flagged = np.zeros((n, ny, nx), np.bool_)
    values = np.empty(n, np.float32)
    for y in range(ny):
        for x in range(nx):
            # of the epochs that are here: which others are in the stack depends on its size
            count = 0
            low, high, quiet = np.float32(np.inf), np.float32(-np.inf), np.float32(np.inf)
            for k in range(n):
                value = means[k, y, x]
                if not np.isnan(value):
                    values[count] = peaks[0][k]
                    low, high, quiet = (
                        min(low, value),
                        max(high, value),
                        min(quiet, noises[k, y, x]),
                    )
                    count += 1
            # the median is between the extremes
            if count == 0 or high - low <= limits.sigma * quiet:
                continue
            typical = _median(values, count)
            for k in range(n):
                value, noise = means[k, y, x], noises[k, y, x]
                flagged[k, y, x] = _is_outlier(
                    value, noise, medians[y, x], k, typical, peaks, wings[y, x], limits
                )
    return flagged


@njit(nogil=True)
def _find_crowded(flagged, known, max_fraction):
    """Return the bins in which more epochs are flagged than artifacts can explain."""
    n, ny, nx = flagged.shape
    crowded = np.zeros((ny, nx), np.bool_)
    for y in range(ny):
        for x in range(nx):
            found, count = 0, 0
            for k in range(n):
                found += flagged[k, y, x]
                count += known[k, y, x]
            crowded[y, x] = found > max_outliers(count, max_fraction)
    return crowded


@njit(nogil=True)
def _mark_bins(state, flagged, known, max_fraction, x_offset):
    """Mark the values in flagged bins, unless too many epochs are flagged there or beside."""
    n, rows, columns = flagged.shape
    crowded = _find_crowded(flagged, known, max_fraction)
    for k in range(n):
        for row in range(rows):
            for column in range(columns):
                beside = (slice(max(row - 1, 0), row + 2), slice(max(column - 1, 0), column + 2))
                if not flagged[k, row, column] or crowded[beside].any():
                    continue
                first = column * BIN - x_offset
                for y in range(row * BIN, (row + 1) * BIN):
                    for x in range(max(first, 0), min(first + BIN, state.shape[2])):
                        _mark_if_allowed(state, k, y, x, max_fraction)


@njit(nogil=True)
def _mark_if_allowed(state, k, y, x, max_fraction):
    """Mark a value if its pixel does not get too many outliers by it."""
    found, count = 1, 0
    for i in range(state.shape[0]):
        found += state[i, y, x] == OUTLIER
        count += state[i, y, x] >= USABLE
    if state[k, y, x] == USABLE and found <= max_outliers(count, max_fraction):
        state[k, y, x] = OUTLIER


@njit(nogil=True)
def _typical_sharpness(state, sharpness, y, x, values):
    """Return the median of the sharpness of a pixel's epochs."""
    count = 0
    for k in range(sharpness.size):
        if state[k, y, x] >= USABLE:
            values[count] = sharpness[k]
            count += 1
    return _median(values, count)


@njit(nogil=True)
def _take_usable(row, state, values, counts):
    """Copy a row with infinity where it is not usable, and count where it is."""
    for x in range(row.size):
        usable = state[x] == USABLE
        values[x] = row[x] if usable else np.float32(np.inf)
        counts[x] += np.int32(1) if usable else np.int32(0)


@njit(nogil=True)
def _note_deviations(row, variance, state, medians, sigma, deviates):
    """Note where a usable value is farther from the median than its noise explains."""
    for x in range(row.size):
        far = abs(row[x] - medians[x]) > sigma * np.sqrt(variance[x])
        deviates[x] |= far & (state[x] == USABLE)


@njit(nogil=True)
def _mark_outliers(image, variance, state, wings, peaks, limits, x_offset, network):
    """Mark the outliers at each pixel.

    Returns where there are too many for an artifact, and the medians of the usable values.
    """
    n, ny, nx = image.shape
    varies, medians = np.zeros((ny, nx), np.bool_), np.empty((ny, nx), np.float32)
    values, counts = np.empty((n, _AT_A_TIME), np.float32), np.empty(_AT_A_TIME, np.int32)
    deviates, sharpness = np.empty(_AT_A_TIME, np.bool_), np.empty(n, np.float32)
    outliers = np.empty(n, np.int64)
    for y in range(ny):
        for start in range(0, nx, _AT_A_TIME):
            part = slice(start, min(start + _AT_A_TIME, nx))
            counts[:], deviates[:] = 0, False
            for k in range(n):
                _take_usable(image[k, y, part], state[k, y, part], values[k], counts)
            sort_together(values, network)
            _write_medians(values, counts, medians[y, part])
            for k in range(n):
                _note_deviations(
                    *(image[k, y, part], variance[k, y, part], state[k, y, part]),
                    *(medians[y, part], limits.sigma, deviates),
                )
            for x in range(start, part.stop):
                if deviates[x - start] and counts[x - start] >= 3:
                    varies[y, x] = _mark_pixel(
                        *(image, variance, state, medians[y, x], peaks, limits, y, x),
                        *(wings[y // BIN, (x + x_offset) // BIN], sharpness, outliers),
                    )
    return varies, medians


@njit(nogil=True)
def _mark_pixel(  # noqa: PLR0913, PLR0917 - each is of another kind
    image, variance, state, median, peaks, limits, y, x, wing, sharpness, outliers
):
    """Mark the outliers at a pixel; return whether there are too many for an artifact."""
    typical = _typical_sharpness(state, peaks[0], y, x, sharpness)
    found, count = 0, 0
    for k in range(image.shape[0]):
        if state[k, y, x] != USABLE:
            continue
        count += 1
        value, noise = image[k, y, x], np.sqrt(variance[k, y, x])
        if _is_outlier(value, noise, median, k, typical, peaks, wing, limits):
            outliers[found] = k
            found += 1
    if found > max_outliers(count, limits.max_fraction):
        return True
    for i in range(found):
        state[outliers[i], y, x] = OUTLIER
    return False


@njit(nogil=True)
def _spare_variables(state, varies, radius):
    """Take back the outliers next to pixels that vary: the faint rim of the same source."""
    n, ny, nx = state.shape
    for y in range(ny):
        for x in range(nx):
            if not varies[y, x]:
                continue
            for k in range(n):
                for j in range(max(y - radius, 0), min(y + radius + 1, ny)):
                    for i in range(max(x - radius, 0), min(x + radius + 1, nx)):
                        if state[k, j, i] == OUTLIER:
                            state[k, j, i] = USABLE


@njit(nogil=True)
def _has_outlier(state):
    """Return whether a row has an outlier."""
    found = False
    for x in range(state.size):
        found |= state[x] == OUTLIER
    return found


@njit(nogil=True)
def _grow_outliers(image, variance, state, medians, wings, peaks, limits, x_offset, radius):
    """Mark the neighbours of outliers that deviate as well, if less."""
    n, ny, nx = image.shape
    sharpness = np.empty(n, np.float32)
    for k in range(n):
        for y in range(ny):
            if not _has_outlier(state[k, y]):
                continue
            for x in range(nx):
                if state[k, y, x] != OUTLIER:
                    continue
                for j in range(max(y - radius, 0), min(y + radius + 1, ny)):
                    for i in range(max(x - radius, 0), min(x + radius + 1, nx)):
                        value, noise = image[k, j, i], np.sqrt(variance[k, j, i])
                        near = abs(value - medians[j, i]) <= limits.sigma * noise
                        if near or state[k, j, i] != USABLE:
                            continue
                        typical = _typical_sharpness(state, peaks[0], j, i, sharpness)
                        wing = wings[j // BIN, (i + x_offset) // BIN]
                        if _is_outlier(
                            value, noise, medians[j, i], k, typical, peaks, wing, limits
                        ):
                            state[k, j, i] = GROWN
