"""Master frames without the noise of the few exposures that they are made from.

A mean of five bias frames has a fifth of the variance of one of them, and adds it to every
exposure. Most of it is no structure of the detector. A master is therefore taken to be the sum of
structure along columns, along rows, on patches of some pixels, and of single pixels; how far the
last two stand out of the noise is learnt from the frame itself. Their amplitudes, in units of
their errors, are described by a mixture of normal distributions of many widths, and each value is
replaced by its expectation under this prior [1]_: what is noise becomes zero, what is
significant (hot pixels, bad columns, patterns of the readout) stays as it is.

References
----------
.. [1] Stephens 2017, Biostatistics 18, 275 (adaptive shrinkage with empirical Bayes).
.. [2] Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3, 3 (variances from few values, moderated).
"""

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.image.masked_image import MaskedImage
from coaddflow.image.medians import masked_median, medians_of_pieces

_LINE = 129
"""Pixels along a column or a row over which their structure is averaged."""

_PIECE = 64
"""Rows over which the first guess of a column, a median, is taken."""

_PATCH = 9
"""Side of the patches, pixels."""

_VARIANCE_PIXELS, _VARIANCE_WEIGHT = 65, 30.0
"""The variance of a pixel is that of the area around it, with the weight of so many frames."""

_OUTLIER = 4.0
"""Values enter means with no more than so many errors of the pixels around."""

_NARROWEST, _WIDTH_RATIO, _LARGEST, _BINS, _ROUNDS = 0.25, 2.0**0.5, 12.0, 240, 200
"""Widths of the prior in units of the error; values beyond the largest are kept as they are."""


def without_noise(master: MaskedImage, n_frames: int) -> MaskedImage:
    """Return a master frame whose noise is shrunk, and whose structure is kept.

    Parameters
    ----------
    master : MaskedImage
        A mean of frames, with the variance of each pixel from their scatter. Pixels that are not
        finite, or flagged, stay as they are.
    n_frames : int
        How many frames it is made from.

    Returns
    -------
    MaskedImage
        Image and variance of the expectation of each pixel; the mask is that of the master.
    """
    image = master.image
    good = np.isfinite(image) & np.isfinite(master.variance) & (master.mask == 0)
    if np.count_nonzero(good) < _LINE or not (master.variance[good] > 0).any():
        return master
    rest, clipped, line = np.where(good, image, np.float32(0)), *np.empty((2, *image.shape), "f4")
    variance, common = _moderated(master.variance, good, n_frames, spare=line)
    # a cosmic ray that three frames cannot clip has a large error of its own
    largest = np.multiply(np.sqrt(common, out=common), np.float32(_OUTLIER), out=common)
    model = np.zeros_like(image)
    np.copyto(line, image)
    np.copyto(line, masked_median(image, ~good), where=~good)
    _take_off(medians_of_pieces(line, _PIECE), _PIECE, good, rest, model, largest, clipped)
    for axis in (0, 1):
        _mean(clipped, good, _LINE, line, axis)
        _take_off(line, 1, good, rest, model, largest, clipped)
    _mean(clipped, good, _PATCH, line)
    _shrink(line, variance, good, _PATCH, spread=clipped)
    _take_off(line, 1, good, rest, model, largest, clipped)
    spread = clipped
    _shrink(rest, variance, good, 1, spread)
    # what the means along columns and rows add
    variance *= np.float32(2)
    variance /= np.float32(_LINE)
    spread += variance
    model += rest
    np.copyto(model, image, where=~good)
    np.copyto(spread, master.variance, where=~good)
    return MaskedImage(model, spread, master.mask)


@njit(error_model="numpy")
def _take_off(part, rows, good, rest, model, largest, clipped):
    """Add a part of the structure to the model, take it off the rest, and clip this.

    Each row of the part is that of so many rows. Pixels that are not good are 0 in the rest.
    """
    ny, nx = rest.shape
    for y in range(ny):
        piece, known, left, whole = part[y // rows], good[y], rest[y], model[y]
        limit, out = largest[y], clipped[y]
        for x in range(nx):
            whole[x] += piece[x]
            value = left[x] - (piece[x] if known[x] else np.float32(0))
            left[x] = value
            value = value if value > -limit[x] else -limit[x]
            out[x] = value if value < limit[x] else limit[x]


def _moderated(
    variance: NDArray[np.float32],
    good: NDArray[np.bool_],
    n_frames: int,
    spare: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return variances of pixels, most of which is that of the pixels around [2]_; and that.

    ``spare`` is a frame that can be overwritten.
    """
    typical = float(masked_median(variance, ~good))
    own, common = np.where(good, variance, np.float32(0)), np.empty_like(variance)
    _mean(np.minimum(own, 10 * typical, out=spare), good, _VARIANCE_PIXELS, common)
    np.maximum(common, 1e-3 * typical + 1e-30, out=common)
    np.copyto(own, common, where=~good)
    freedom = n_frames - 1
    own *= np.float32(freedom)
    own += np.multiply(common, np.float32(_VARIANCE_WEIGHT), out=spare)
    own /= np.float32(_VARIANCE_WEIGHT + freedom)
    return own, common


def _mean(
    values: NDArray[np.float32],
    good: NDArray[np.bool_],
    size: int,
    means: NDArray[np.float32],
    axis: int | None = None,
) -> None:
    """Find means of the good pixels over lines along an axis, or over squares.

    Values that are not good must be 0. Beyond the borders the image is reflected.
    """
    weights = None if good.all() else good.view(np.uint8)
    _running_means(values, weights, size, axis != 1, axis != 0, means)


@njit(error_model="numpy")
def _running_means(values, weights, size, along_y, along_x, means):
    """Means of the values over those of their weights, all 1 if None.

    Sums are in double precision: running sums in single precision drift.
    """
    ny, nx = values.shape
    rows, columns = _reflected(ny, size), _reflected(nx, size)
    sums, line, sums_of_weights, weight = np.zeros(nx), np.empty(nx), np.zeros(nx), np.ones(nx)
    for y in range(ny):
        _mean_along_y(values, y, rows, size if along_y else 1, sums, line)
        _mean_along_x(line, columns, size if along_x else 1)
        if weights is not None:
            _mean_along_y(weights, y, rows, size if along_y else 1, sums_of_weights, weight)
            _mean_along_x(weight, columns, size if along_x else 1)
        out = means[y]
        for x in range(nx):
            out[x] = line[x] / (weight[x] if weight[x] > 1e-6 else 1e-6)


@njit(error_model="numpy")
def _mean_along_y(plane, y, rows, size, sums, line):
    """Set a line to the means of this many rows, after those of the row before."""
    nx = len(line)
    if size == 1:
        row = plane[y]
        for x in range(nx):
            line[x] = row[x]
        return
    if y == 0:
        for k in rows[:size]:
            row = plane[k]
            for x in range(nx):
                sums[x] += row[x]
    else:
        new, old = plane[rows[y + size - 1]], plane[rows[y - 1]]
        for x in range(nx):
            sums[x] += np.float64(new[x]) - np.float64(old[x])
    for x in range(nx):
        line[x] = sums[x] / size


@njit(error_model="numpy")
def _mean_along_x(line, columns, size):
    """Replace a line by its running means."""
    if size == 1:
        return
    padded = line[columns]
    total = 0.0
    for x in range(size):
        total += padded[x]
    line[0] = total
    for x in range(1, len(line)):
        total += padded[x + size - 1] - padded[x - 1]
        line[x] = total
    for x in range(len(line)):
        line[x] /= size


@njit()
def _reflected(n, size):
    """Return the places of n pixels, with half of ``size`` on both sides, reflected."""
    places = np.arange(-(size // 2), n + size - size // 2 - 1) % (2 * n)
    return np.where(places < n, places, 2 * n - 1 - places)


def _shrink(
    values: NDArray[np.float32],
    variance: NDArray[np.float32],
    good: NDArray[np.bool_],
    size: int,
    spread: NDArray[np.float32],
) -> None:
    """Replace values by what they are expected to be without their errors, and find its variance.

    The prior is a mixture of normal distributions of mean zero, with weights fitted to the values
    by expectation maximisation [1]_. Values are means over squares of ``size`` pixels, whose
    variance is given; that of what is expected is written to ``spread``.
    """
    edges = np.linspace(0.0, _LARGEST, _BINS + 1)
    number = _histogram(values, variance, good, np.float32(size), edges)
    middle = (edges[1:] + edges[:-1]) / 2
    n_widths = int(np.ceil(np.log(2 * _LARGEST / _NARROWEST) / np.log(_WIDTH_RATIO))) + 1
    widths = np.concatenate([[0.0], _NARROWEST * _WIDTH_RATIO ** np.arange(n_widths)])
    total = 1.0 + widths**2
    density = np.exp(-0.5 * middle[:, None] ** 2 / total) / np.sqrt(total)
    share = np.full(len(widths), 1.0 / len(widths))
    for _ in range(_ROUNDS):
        belongs = share * density
        belongs /= belongs.sum(axis=1, keepdims=True)
        share = number @ belongs / max(number.sum(), 1)
    belongs = share * density + 1e-300
    belongs /= belongs.sum(axis=1, keepdims=True)
    kept = widths**2 / total
    factor = belongs @ kept
    factor_of_spread = factor + middle**2 * (belongs @ kept**2 - factor**2)
    tables = middle, factor, factor_of_spread
    _interpolate(values, variance, np.float32(size), *tables, spread)


@njit(error_model="numpy")
def _histogram(values, variance, good, size, edges):
    """Count the good pixels between edges of equal distance, in units of their errors."""
    number = np.zeros(len(edges) - 1, np.int64)
    per_unit = len(number) / edges[-1]
    for y in range(len(values)):
        for x in range(values.shape[1]):
            z = np.float64(abs(values[y, x] / (np.sqrt(variance[y, x]) / size)))
            if good[y, x] and z <= edges[-1]:
                number[_last_not_above(edges[:-1], z, per_unit)] += 1
    return number


@njit(error_model="numpy")
def _last_not_above(places, value, per_unit):
    """Return the last of places, of equal distance, that is not above a value; at least 0."""
    i = min(max(int((value - places[0]) * per_unit), 0), len(places) - 1)
    while i > 0 and places[i] > value:
        i -= 1
    while i < len(places) - 1 and places[i + 1] <= value:
        i += 1
    return i


@njit(error_model="numpy")
def _interpolate(values, variance, size, middle, factor, factor_of_spread, spread):
    """Multiply values by their factors, and find squared errors times theirs, from tables.

    A value larger than those of the table is no noise.
    """
    ny, nx = values.shape
    per_unit = (len(middle) - 1) / (middle[-1] - middle[0])
    step = np.diff(middle)
    slope, slope_of_spread = np.diff(factor) / step, np.diff(factor_of_spread) / step
    for y in range(ny):
        for x in range(nx):
            error = np.sqrt(variance[y, x]) / size
            z = np.float64(abs(values[y, x] / error))
            a, b = 1.0, 1.0
            if z <= middle[0]:
                a, b = factor[0], factor_of_spread[0]
            elif z < middle[-1]:
                i = _last_not_above(middle[:-1], z, per_unit)
                a = slope[i] * (z - middle[i]) + factor[i]
                b = slope_of_spread[i] * (z - middle[i]) + factor_of_spread[i]
            elif z == middle[-1]:
                a, b = factor[-1], factor_of_spread[-1]
            values[y, x] *= np.float32(a)
            spread[y, x] = np.float32(b) * (error * error)
