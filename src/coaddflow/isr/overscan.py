"""The bias level of an amplifier, from the overscan: pixels read after the last real one of a row.

The mean of the overscan of a row is a noisy measurement of its level. How far the level is smoothed
over rows follows from the rows themselves, by generalised cross-validation [2]_ of a penalised
smoother [3]_: slow drifts are averaged over hundreds of rows, fast ones over few. Two things that
no smoothing follows are looked for. Where the level jumps, the rows before and after are smoothed
apart. Where single rows scatter more than the noise of their pixels allows, the part of this
scatter that the data share (the slope of a regression between rows of data and of overscan) is
subtracted row by row.

References
----------
.. [1] Howell 2006, "Handbook of CCD Astronomy", 2nd edition, section 3.3.
.. [2] Craven & Wahba 1979, Numerische Mathematik 31, 377.
.. [3] Eilers 2003, Analytical Chemistry 75, 3631 (Whittaker's smoother).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, ndimage

from coaddflow.errors import InputError
from coaddflow.geometry.box import Box
from coaddflow.image.statistics import mad_sigma
from coaddflow.instrument.camera import Amplifier
from coaddflow.settings.detrend import DetrendSettings

_CLIP = 4.0
_ROUNDING = 0.5
"""Counts are integers: no deviation smaller than this is an outlier."""

_FEW_COLUMNS = 8
"""In fewer columns an outlier moves the median of its row."""

_OUTLIER_ROW = 6.0
"""Rows that differ from their neighbours by so many errors have been reached by bleeding."""

_STEP_ROWS, _STEP_SIGMA = 12, 6.5
"""A jump: lines through so many rows before and after it miss each other by so many errors."""

_ROW_NOISE_SIGMA = 5.0
"""Significance of scatter between rows that the noise of the pixels does not explain."""

_GAIN, _TRACE = 0.2652, 0.3536
"""For a penalty p, the variance of a smoothed row is _GAIN p^(-1/4) of that of a single one, and
its own weight in it is _TRACE p^(-1/4)."""

_MIN_INDEPENDENT = 4
"""The level is never smoother than this many independent rows would be."""


class OverscanLevel(NamedTuple):
    """The bias level of the rows of an amplifier's data.

    Attributes
    ----------
    level : ndarray of float32, shape (rows of the data section,)
        Bias level of each row, counts.
    noise : float
        Standard deviation of single overscan pixels, counts.
    error : float
        Error of the level of a row, counts.
    known : ndarray of bool, shape (rows,)
        Rows that the overscan tells the level of: their own, or that of rows within the smoothing
        length. Elsewhere the level is a guess.
    remark : str
        What the overscan shows besides a smooth level (jumps, scatter of rows), and what was done.
    is_followed : bool
        Whether the method of the settings follows it.
    """

    level: NDArray[np.float32]
    noise: float
    error: float
    known: NDArray[np.bool_]
    remark: str = ""
    is_followed: bool = True


def overscan_level(
    array: NDArray, amplifier: Amplifier, settings: DetrendSettings
) -> OverscanLevel:
    """Return the bias level for each row of an amplifier's data [1]_.

    Parameters
    ----------
    array : ndarray, shape (ny, nx)
        The raw array that contains the overscan; NaN where nothing was measured.
    amplifier : Amplifier
        Its sections.
    settings : DetrendSettings
        Method; columns next to the data are left out, since trailing charge reaches them.

    Returns
    -------
    OverscanLevel
        Its level is finite. No row is known if the overscan was not read out: without a finite
        pixel, or all zero or full.

    Raises
    ------
    InputError
        If levels of rows are asked for and the overscan does not cover all rows.
    """
    x0, y0, x1, y1 = without_trail(amplifier, settings.overscan_skip)
    first, last = amplifier.data[1], amplifier.data[3]
    if settings.overscan != "constant" and (y0 > first or y1 < last):
        raise InputError(
            f"the overscan of amplifier {amplifier.name} does not cover all rows of its data",
            remedy="set detrend.overscan to `constant`",
        )
    pixels = array[y0:y1, x0:x1].astype(np.float64)
    if settings.overscan != "constant":
        pixels = pixels[first - y0 : last - y0]
    pixels[~np.isfinite(pixels) | (pixels >= amplifier.saturation)] = np.nan
    n_rows = last - first
    if not _was_read(pixels):
        return OverscanLevel(np.zeros(n_rows, np.float32), 0.0, 0.0, np.zeros(n_rows, bool))
    rows, noise, error = _row_levels(pixels, settings.overscan_smoothing)
    if settings.overscan == "constant":
        return _constant(rows, noise, error, n_rows)
    if settings.overscan == "polynomial":
        return _polynomial(rows, noise, error, settings.overscan_order)
    data = array[first:last, amplifier.data[0] : amplifier.data[2]]
    return _smoothed(rows, noise, error, settings.overscan_smoothing, data)


def _was_read(pixels: NDArray[np.float64]) -> bool:
    """Tell whether an overscan holds measurements; full pixels are NaN by now."""
    return bool(np.any(np.isfinite(pixels) & (pixels != 0)))


def without_trail(amplifier: Amplifier, skip: int) -> Box:
    """Return the overscan without the columns next to the data (at most half of them)."""
    x0, y0, x1, y1 = amplifier.overscan
    skip = min(skip, (x1 - x0) // 2)
    if x0 >= amplifier.data[2]:
        return x0 + skip, y0, x1, y1
    if x1 <= amplifier.data[0]:
        return x0, y0, x1 - skip, y1
    return x0, y0, x1, y1


def _row_levels(
    pixels: NDArray[np.float64], width: int
) -> tuple[NDArray[np.float64], float, float]:
    """Return the mean of each row without outliers, the scatter of pixels, the error of a mean.

    Rows without a good pixel are NaN.
    """
    n = pixels.shape[1]
    good = np.isfinite(pixels)
    middle = np.full(len(pixels), np.nan)
    some = good.any(axis=1)
    middle[some] = np.nanmedian(pixels[some], axis=1)
    residual = np.where(good, pixels - middle[:, None], 0.0)
    # the residuals of few pixels from their own median are smaller than their scatter
    limit = _CLIP * mad_sigma(residual[good], 0.0) * np.sqrt(n / max(n - 1, 1)) + 2 * _ROUNDING
    outlier = good & (np.abs(residual) > limit)
    if n < _FEW_COLUMNS:
        typical = ndimage.median_filter(_bridged(middle), size=2 * width + 1, mode="nearest")
        spoilt = outlier.any(axis=1, keepdims=True)
        outlier = np.where(spoilt, np.abs(pixels - typical[:, None]) > limit, outlier)
    good &= ~outlier
    number = good.sum(axis=1)
    with np.errstate(invalid="ignore"):
        level = np.where(good, pixels, 0.0).sum(axis=1) / number
    squares = (np.where(good, pixels - level[:, None], 0.0) ** 2).sum()
    freedom = number.sum() - np.count_nonzero(number)
    if freedom > 0:
        noise = float(np.sqrt(squares / freedom))
    else:  # one column: neighbouring rows differ by the noise of both
        step = np.diff(level[np.isfinite(level)])
        noise = mad_sigma(step, 0.0) / np.sqrt(2) if len(step) else 0.0
    return level, noise, noise / np.sqrt(max(np.median(number), 1))


def _bridged(level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return levels with lines through those that are not known."""
    row, known = np.arange(len(level)), np.isfinite(level)
    return np.interp(row, row[known], level[known])


def _constant(rows: NDArray[np.float64], noise: float, error: float, n_rows: int) -> OverscanLevel:
    """Return one level for all rows."""
    known = rows[np.isfinite(rows)]
    middle = np.median(known)
    spread = max(mad_sigma(known, middle), error)
    level = known[np.abs(known - middle) <= _CLIP * spread + _ROUNDING].mean()
    remark, is_followed = _what_is_left(known - level, error)
    return OverscanLevel(
        np.full(n_rows, level, np.float32),
        noise,
        error / np.sqrt(len(known)),
        np.ones(n_rows, bool),
        remark,
        is_followed,
    )


def _polynomial(rows: NDArray[np.float64], noise: float, error: float, order: int) -> OverscanLevel:
    """Fit the levels of the rows by a polynomial, with clipping."""
    row, known = np.linspace(-1, 1, len(rows)), np.isfinite(rows)
    order = min(order, np.count_nonzero(known) - 1)
    keep = known
    fitted = np.full(len(rows), np.median(rows[known]))
    for _ in range(5):
        coefficients = np.polynomial.legendre.legfit(row[keep], rows[keep], order)
        fitted = np.polynomial.legendre.legval(row, coefficients)
        residual = np.where(known, np.abs(rows - fitted), 0.0)
        typical = max(mad_sigma(residual[known], 0.0), error)
        keep = known & (residual < _CLIP * typical + _ROUNDING)
    remark, is_followed = _what_is_left((rows - fitted)[known], error)
    everywhere = np.ones(len(rows), bool)
    own = error / np.sqrt(len(rows) / (order + 1))
    return OverscanLevel(fitted.astype(np.float32), noise, own, everywhere, remark, is_followed)


def _what_is_left(residual: NDArray[np.float64], error: float) -> tuple[str, bool]:
    """Say whether rows scatter about their model by more than their errors."""
    scatter = mad_sigma(residual, 0.0)
    if scatter <= 1.5 * error + _ROUNDING:
        return "", True
    return f"rows differ from it by {scatter:.1f} adu", False


def _smoothed(
    rows: NDArray[np.float64], noise: float, error: float, width: int, data: NDArray
) -> OverscanLevel:
    """Smooth the levels of rows as far as they are smooth, over at least ``width`` of them."""
    known = np.isfinite(rows)
    if width <= 1 or len(rows) < 3:
        return OverscanLevel(_bridged(rows).astype(np.float32), noise, error, known)
    excess = _row_noise(rows[known], error)
    single = float(np.hypot(error, excess))
    typical = ndimage.median_filter(_bridged(rows), size=2 * width + 1, mode="nearest")
    with np.errstate(invalid="ignore"):
        trusted = np.abs(rows - typical) <= _OUTLIER_ROW * single + _ROUNDING
    level = np.where(trusted, rows, typical)
    jumps = _jumps(level, single)
    smooth, gain = _whittaker(level, trusted, jumps, width)
    own, remarks, is_followed = single * np.sqrt(gain), [], True
    if jumps.size:
        places = ", ".join(str(int(row)) for row in jumps[:5])
        remarks.append(f"{jumps.size} jumps (before row {places})")
    if excess > 0:
        shared, is_shared = _shared_scatter(level - smooth, data, excess, error)
        smooth += shared * (level - smooth)
        # what is left of the scatter of the rows, and what the overscan's noise adds
        left = (1 - shared) * excess if is_shared else 0.0
        own = float(np.sqrt(own**2 + left**2 + (shared * error) ** 2))
        remarks.append(f"rows scatter by {excess:.2f} adu, {100 * shared:.0f} % subtracted")
        is_followed = is_shared
    reach = ndimage.binary_dilation(known, iterations=width)
    return OverscanLevel(
        smooth.astype(np.float32), noise, float(own), reach, "; ".join(remarks), is_followed
    )


def _row_noise(rows: NDArray[np.float64], error: float) -> float:
    """Return the scatter of single rows beyond their error, counts; 0 if it is not significant."""
    if len(rows) < 3:
        return 0.0
    variance = mad_sigma(np.diff(rows), 0.0) ** 2 / 2
    # the error of a variance from the median of absolute differences
    least = error**2 * (1 + _ROW_NOISE_SIGMA * 1.7 * np.sqrt(2 / len(rows))) + 1e-4
    return float(np.sqrt(variance - error**2)) if variance > least else 0.0


def _jumps(level: NDArray[np.float64], error: float) -> NDArray[np.intp]:
    """Return the rows before which the level jumps.

    Lines are fitted to the rows before and after each place; a jump is where they miss each other
    most. A drift, however steep, does not.
    """
    n = _STEP_ROWS
    if len(level) < 2 * n:
        return np.empty(0, np.intp)
    # weights of the value at one end, half a row outside, of a line through n values
    place = np.arange(n) - (n - 1) / 2
    end = 1 / n + (n / 2) * place / (place**2).sum()
    kernel = np.concatenate([-end, end[::-1]])
    miss = np.correlate(np.pad(level, n, mode="reflect"), kernel, mode="valid")[:-1]
    deviation = np.abs(miss) / (error * np.sqrt((kernel**2).sum()) + 1e-9)
    highest = ndimage.maximum_filter1d(deviation, 2 * n + 1)
    found = (deviation >= _STEP_SIGMA) & (deviation == highest) & (np.abs(miss) > _ROUNDING)
    found[:2] = found[-1:] = False
    return np.flatnonzero(found)


def _whittaker(
    level: NDArray[np.float64], trusted: NDArray[np.bool_], jumps: NDArray[np.intp], width: int
) -> tuple[NDArray[np.float64], float]:
    """Return smoothed levels, and their variance over that of a single one.

    Rows that are not trusted have no weight, and nothing is smoothed across a jump. The penalty
    on second differences is the one of least cross-validation among those that average over at
    least ``width`` rows [2]_ [3]_.
    """
    n = len(level)
    weight = trusted.astype(float)
    middle = np.median(level)
    curved = np.ones(n - 2)  # second differences, by the first of their three rows
    for jump in jumps:
        curved[max(jump - 2, 0) : jump] = 0.0
    bands = np.zeros((3, n))
    for offset, factor in ((0, 1.0), (1, -2.0), (2, 1.0)):
        for other, also in ((0, 1.0), (1, -2.0), (2, 1.0)):
            if other >= offset:
                shift = other - offset
                bands[2 - shift, other : other + n - 2] += factor * also * curved
    bands[2] += 1e-12  # rows cut off from all others
    roughest = _GAIN * width
    smoothest = max(_GAIN * n / _MIN_INDEPENDENT, roughest)
    best = np.inf, level, 1.0
    for root in np.geomspace(roughest, smoothest, 2 + int(4 * np.log2(smoothest / roughest))):
        system = root**4 * bands
        system[2] += weight
        smooth = linalg.solveh_banded(system, weight * (level - middle), check_finite=False)
        residual = (weight * (level - middle - smooth)) ** 2
        score = residual.sum() / weight.sum() / (1 - _TRACE / root) ** 2
        if score < best[0]:
            best = score, smooth + middle, _GAIN / root
    return best[1:]


def _shared_scatter(
    deviation: NDArray[np.float64], data: NDArray, excess: float, error: float
) -> tuple[float, bool]:
    """Return the part of the scatter of overscan rows to subtract, and if the data share it.

    The part is the slope of the regression of data rows on overscan rows, both as differences of
    neighbours. Where stars or photon noise hide it, it is the one of least error if all that
    exceeds the noise of the overscan is shared.
    """
    expected = excess**2 / (excess**2 + error**2)
    finite = np.isfinite(data)
    if finite.all():
        rows = np.median(data, axis=1)
    else:
        rows = np.full(len(data), np.nan)
        some = finite.any(axis=1)
        rows[some] = np.nanmedian(data[some], axis=1)
    own, light = np.diff(deviation), np.diff(rows.astype(float))
    use = np.isfinite(light)
    if np.count_nonzero(use) < 30:
        return expected, True
    light = light - np.median(light[use])
    use &= np.abs(light) <= _CLIP * mad_sigma(light[use], 0.0) + _ROUNDING
    use &= np.abs(own) <= _CLIP * mad_sigma(own, 0.0) + _ROUNDING
    square = (own[use] ** 2).sum()
    if not square > 0:
        return expected, True
    slope = (own[use] * light[use]).sum() / square
    slope_error = np.std(light[use] - slope * own[use]) / np.sqrt(square)
    if slope_error > 0.1:
        return expected, True
    return float(np.clip(slope, 0.0, 1.0)), bool(slope > 0.5 * expected)
