"""Resampling of an image, its variance and its mask in one pass: the hot loop of the warps.

Separable kernels [1]_ are tabulated at 2048 phases, so that no sine is computed per pixel (the
error of the nearest phase is 1.4e-4 pixel rms). All taps of a row of the kernel are multiplied in
one vector instruction (`_weigh_window`); the rest is plain compiled Python. Sums have a fixed order
without "fast math", so the result is the same on every machine and for any number of threads.

On a grid coarser than the CCD the kernel is stretched to the pixels of the grid (`stretch_of`), so
that all photons are used. Else pixels between the taps would be left out, and the noise of the
others would be aliased: with pixels four times larger at ten times the variance.

References
----------
.. [1] Duchon 1979, J. Appl. Meteor. 18, 1016 (Lanczos filtering); Bertin et al. 2002, ASP Conf.
   Ser. 281, 228 (its use for astronomical images in SWarp).
"""

from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload
from numpy.typing import ArrayLike, NDArray

from coaddflow.compiled import njit
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.warp.mapping import PixelGrid

KernelName = Literal["lanczos3", "lanczos5", "bilinear"]

_TAPS = {"bilinear": 2, "lanczos3": 6, "lanczos5": 10}
_PHASES = 2048

_STRETCH_STEPS = 8
"""Kernels are stretched by multiples of 1/8: few tables, and none for scales that are alike."""

_MAX_VECTOR = 16
"""Taps in one vector; the loop for longer kernels is not unrolled."""

_CLEAN, _FLAGGED, _INCOMPLETE = 0, 1, 2
_NO_DATA, _EDGE = np.int32(MaskPlane.NO_DATA), np.int32(MaskPlane.EDGE)
_SAT = np.int32(MaskPlane.SAT)


class Kernel(NamedTuple):
    """An interpolation kernel, tabulated by the phase of the position within a pixel."""

    table: NDArray[np.float32]
    """Weights of the taps for each phase, which sum to 1, shape (2049 * lanes,); ``lanes`` is the
    number of taps rounded up to a power of two, and the weights beyond the taps are 0."""
    taps: tuple[int, ...] | NDArray[np.int64]
    """Offset of each tap from the pixel at or before the position, such as (-2, ... 3). (The
    compiler knows the length of a tuple.) An array for long kernels, for which ``lanes`` is the
    number of taps."""
    stretch: float
    """CCD pixels per unit of the kernel, at least 1 (`stretch_of`)."""


class Source(NamedTuple):
    """Pixels of a CCD, prepared for resampling by `prepare_source`; planes have the shape (n,)."""

    image: NDArray[np.float32]
    """Consecutive rows of ``stride`` pixels with a margin on all sides; 0 for unusable pixels."""
    variance: NDArray[np.float32]
    """Likewise."""
    mask: NDArray[np.int32]
    """Likewise; NO_DATA for unusable pixels."""
    state: NDArray[np.uint8]
    """State of the window of the kernel that begins at each pixel: 0 if all its pixels are usable
    and no bit is set, 1 if bits are set, 2 if some pixels are unusable."""
    nx: int
    """Columns without margin."""
    ny: int
    """Rows without margin."""
    stride: int
    """Columns with margin."""


class Rules(NamedTuple):
    """Treatment of fluxes and flags."""

    scale: float
    """Factor on the fluxes, on top of the area of the pixels."""
    mask_threshold: float
    """See `coaddflow.settings.warp.WarpSettings`."""
    max_missing: float
    """Likewise."""


def stretch_of(area: float) -> float:
    """Return by how much a kernel is stretched for output pixels that cover ``area`` CCD pixels.

    The square root of the area in steps of 1/8, at least 1: a grid that is finer than the CCD, or
    coarser by less than 6 %, has the kernel of the CCD's pixels.
    """
    return max(1.0, round(_STRETCH_STEPS * area**0.5) / _STRETCH_STEPS)


def kernel_weights(name: KernelName, phase: ArrayLike, stretch: float = 1.0) -> NDArray[np.float64]:
    """Return the weights of the taps of a kernel, which sum to 1.

    Parameters
    ----------
    name : {"lanczos3", "lanczos5", "bilinear"}
        The kernel.
    phase : array_like, shape (n,)
        Position after the pixel before it, 0 to 1.
    stretch : float
        CCD pixels per unit of the kernel.

    Returns
    -------
    ndarray of float64, shape (n, taps)
        Weights. Lanczos weights alone sum to 1 only within 1 %: without the normalisation a
        constant would ripple with the phase. Nor do they preserve centroids: a slope is shifted by
        up to 0.02 pixel, a star of 6 pixels FWHM by 0.013, one of 3 pixels by 0.003 the other way.
        Half of the first moment is therefore removed, by weights proportional to the window of the
        kernel times the distance, which leaves less than 0.005 pixel for stars of 2.5 to 6 pixels
        FWHM at any phase.
    """
    half = _TAPS[name] // 2
    reach = int(np.ceil(half * stretch))
    distance = np.arange(1 - reach, reach + 1) - np.asarray(phase, float)[:, None]
    distance /= stretch
    if name == "bilinear":
        weights = np.maximum(1.0 - np.abs(distance), 0.0)
        return weights / weights.sum(axis=1, keepdims=True)
    window = np.where(np.abs(distance) <= half, np.sinc(distance / half), 0.0)
    weights = np.sinc(distance) * window
    weights /= weights.sum(axis=1, keepdims=True)
    lever = window * (distance - np.average(distance, axis=1, weights=window, keepdims=True))
    moment = np.sum(weights * distance, axis=1, keepdims=True)
    return weights - 0.5 * moment * lever / np.sum(lever * distance, axis=1, keepdims=True)


@cache
def make_kernel(name: KernelName, stretch: float = 1.0) -> Kernel:
    """Return the table of a kernel."""
    weights = kernel_weights(name, np.arange(_PHASES + 1) / _PHASES, stretch)
    taps = weights.shape[1]
    table = np.zeros((_PHASES + 1, _lanes(taps)), np.float32)
    table[:, :taps] = weights
    offsets = np.arange(1 - taps // 2, taps // 2 + 1)
    kept = tuple(offsets.tolist()) if taps <= _MAX_VECTOR else offsets
    return Kernel(table.ravel(), kept, stretch)


def covariance_factor(name: KernelName, area_ratio: float = 1.0) -> float:
    """Return the variance of single pixels of a warp relative to that of white noise.

    Resampling makes neighbours correlate: the mean over many pixels is as noisy as before, while
    a single pixel, whose variance the VARIANCE plane states, is less so. For white noise of
    variance s^2 per input pixel, the sum over an aperture of n pixels has the variance
    n * area_ratio * s^2, and each pixel area_ratio^2 * s^2 * sum(w^2), where the sum over the
    squared weights is taken in the mean over all phases. Their ratio per pixel is returned:
    divide a sum over the VARIANCE plane by it to get the variance of a flux in an aperture that
    is large against the kernel. Coadds have the factor of their warps.

    Parameters
    ----------
    name : {"lanczos3", "lanczos5", "bilinear"}
        The kernel.
    area_ratio : float
        Input pixels that an output pixel covers; the kernel is that for this ratio.

    Returns
    -------
    float
        area_ratio * mean(sum w^2); 0.798 for lanczos3 at equal scales.
    """
    phases = (np.arange(_PHASES) + 0.5) / _PHASES
    weights = kernel_weights(name, phases, stretch_of(area_ratio))
    return area_ratio * float(np.mean(np.sum(weights**2, axis=1))) ** 2


def _lanes(taps: int) -> int:
    return 1 << (taps - 1).bit_length() if taps <= _MAX_VECTOR else taps


def prepare_source(masked_image: MaskedImage, kernel: Kernel) -> Source:
    """Copy a CCD into the form that the compiled loop wants.

    A pixel cannot be used if its value is not finite, its variance not finite and positive, or
    if it has the bit NO_DATA.

    Parameters
    ----------
    masked_image : MaskedImage
        Pixels of the CCD, shape (ny, nx), in native byte order.
    kernel : Kernel
        The kernel for resampling.

    Returns
    -------
    Source
        A copy; the input is no longer needed.
    """
    ny, nx = masked_image.shape
    half, lanes = len(kernel.taps) // 2, _lanes(len(kernel.taps))
    stride = nx + half + lanes
    shape = (ny + 2 * half + 1, stride)
    kinds = (np.float32, np.float32, np.int32, np.uint8)
    padded = tuple(np.empty(shape, kind) for kind in kinds)
    planes = (masked_image.image, masked_image.variance, masked_image.mask)
    _fill_source(tuple(np.ascontiguousarray(p) for p in planes), padded, half)
    _spread_state(padded[3], len(kernel.taps))
    return Source(*(plane.ravel() for plane in padded), nx, ny, stride)


@njit(nogil=True)
def _fill_source(planes, padded, half):
    """Copy pixels inside the margin and classify each: clean, flagged, or unusable."""
    image, variance, mask = planes
    to_image, to_variance, to_mask, to_state = padded
    ny, nx = image.shape
    for y in range(to_image.shape[0]):
        j = y - half
        for x in range(to_image.shape[1]):
            i = x - half
            to_image[y, x], to_variance[y, x] = np.float32(0), np.float32(0)
            to_mask[y, x], to_state[y, x] = _NO_DATA, _INCOMPLETE
            if 0 <= j < ny and 0 <= i < nx:
                value, noise, bits = image[j, i], variance[j, i], mask[j, i]
                to_mask[y, x] = bits | _NO_DATA
                if np.isfinite(value) and 0.0 < noise < np.inf and (bits & _NO_DATA) == 0:
                    to_image[y, x], to_variance[y, x] = value, noise
                    to_mask[y, x] = bits
                    to_state[y, x] = _CLEAN if bits == 0 else _FLAGGED


@njit(nogil=True)
def _spread_state(state, taps):
    """Replace the state of each pixel by the worst in the window that begins there."""
    ny, nx = state.shape
    for j in range(ny):
        row = state[j].copy()
        for step in range(1, taps):
            for i in range(nx - taps + 1):
                state[j, i] = max(state[j, i], row[i + step])
    for j in range(ny - taps + 1):
        for step in range(1, taps):
            for i in range(nx):
                state[j, i] = max(state[j, i], state[j + step, i])


def resample(
    source: Source,
    grid: PixelGrid,
    kernel: Kernel,
    target: MaskedImage,
    origin: tuple[int, int],
    rows: tuple[int, int],
    rules: Rules,
) -> int:
    """Resample a CCD into those pixels of an image of the tract that have no data yet.

    Fluxes are conserved: a value is the interpolated one times the CCD pixels that the tract
    pixel covers (the Jacobian of the mapping) times ``rules.scale``. The variance is
    sum(w^2 variance) times the square of these factors: that of the pixel itself, without its
    covariance with the neighbours (`covariance_factor`). Returned is the number of pixels that got
    data.

    Parameters
    ----------
    source, grid, kernel : Source, PixelGrid, Kernel
        The CCD, its pixels on the tract, and the kernel it was prepared for.
    target : MaskedImage
        Changed in place, where its mask has NO_DATA. A pixel takes the bits of input pixels with
        enough weight (``rules.mask_threshold``). Where unusable pixels have less weight than
        ``rules.max_missing``, the others are used and EDGE is set. If the kernel is stretched, its
        single weights are small: then the weights of all pixels with a bit are summed, and EDGE
        takes as much. A pixel with the bit SAT is not lower than all pixels around it.
    origin : tuple of int
        Tract pixel (x0, y0) of the first pixel of ``target``.
    rows : tuple of int
        First and last-plus-one row of ``target`` to fill. Other threads may fill others.
    rules : Rules
        Scale and treatment of flags.
    """
    return _resample_rows(
        source,
        (grid.x, grid.y, grid.area),
        (grid.x0 - origin[0], grid.y0 - origin[1], grid.step),
        kernel.table,
        kernel.taps,
        (target.image, target.variance, target.mask),
        rows,
        _Rules(*(np.float32(value) for value in rules), kernel.stretch > 1.0),
    )


class _Rules(NamedTuple):
    """`Rules` for the compiled loop."""

    scale: np.float32
    mask_threshold: np.float32
    max_missing: np.float32
    summed: bool
    """Whether the weights of all pixels with a bit are summed."""


@intrinsic
def _weigh_window(typing_context, image, variance, start, stride, table, row_x, row_y, taps):
    """Sum a window of the image with the weights, and of the variance with their squares.

    Arguments: flat float32 arrays ``image`` and ``variance``; index of the window's first pixel;
    length of a row; flat table of weights; indices in it of the weights along x and y; tuple
    whose length is the number of taps. Returns both sums as float32. Emits, for each row of the
    window, one vector load, multiplication and addition per plane; the equivalent Python loop is
    compiled to scalar code, which takes more than twice as long.
    """
    signature = types.UniTuple(types.float32, 2)(
        image, variance, start, stride, table, row_x, row_y, taps
    )
    return signature, _emit_weigh_window


def _emit_weigh_window(context, builder, signature, arguments):
    """Emit the instructions of `_weigh_window`."""
    n_taps = signature.args[7].count
    vector = ir.VectorType(ir.FloatType(), _lanes(n_taps))
    data = {
        k: context.make_array(signature.args[k])(context, builder, arguments[k]).data
        for k in (0, 1, 4)
    }

    def load(k: int, index: ir.Value) -> ir.Value:
        pointer = builder.bitcast(builder.gep(data[k], [index]), vector.as_pointer())
        loaded = builder.load(pointer)
        loaded.align = 4
        return loaded

    sums = [None, None]
    index, stride, row_x, row_y = arguments[2], arguments[3], arguments[5], arguments[6]
    for j in range(n_taps):
        weight = _splat(
            builder, builder.load(builder.gep(data[4], [builder.add(row_y, row_y.type(j))])), vector
        )
        for k, factor in enumerate((weight, builder.fmul(weight, weight))):
            term = builder.fmul(factor, load(k, index))
            sums[k] = term if sums[k] is None else builder.fadd(sums[k], term)
        index = builder.add(index, stride)
    weight = load(4, row_x)
    for k, factor in enumerate((weight, builder.fmul(weight, weight))):
        sums[k] = _sum_lanes(builder, builder.fmul(sums[k], factor))
    return cgutils.pack_array(builder, sums)


def _splat(builder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Emit a vector with the same value in all lanes."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, first, lanes)


def _sum_lanes(builder, values: ir.Value) -> ir.Value:
    """Emit the sum of a vector, by halves."""
    n = values.type.count
    while n > 1:
        n //= 2
        indices = ir.VectorType(ir.IntType(32), n)
        low = builder.shuffle_vector(values, values, ir.Constant(indices, list(range(n))))
        high = builder.shuffle_vector(values, values, ir.Constant(indices, list(range(n, 2 * n))))
        values = builder.fadd(low, high)
    return builder.extract_element(values, ir.IntType(32)(0))


def _weigh(image, variance, start, stride, table, row_x, row_y, taps):
    """Sum a window, as `_weigh_window`, for any kernel."""


@overload(_weigh, inline="always")
def _choose_weigh(image, variance, start, stride, table, row_x, row_y, taps):
    return _weigh_unrolled if isinstance(taps, types.UniTuple) else _weigh_long_window


def _weigh_unrolled(image, variance, start, stride, table, row_x, row_y, taps):
    return _weigh_window(image, variance, start, stride, table, row_x, row_y, taps)


def _weigh_long_window(image, variance, start, stride, table, row_x, row_y, taps):
    """Sum a window of a long kernel."""
    value, noise = np.float32(0), np.float32(0)
    for j in range(len(taps)):
        line, line_noise = np.float32(0), np.float32(0)
        for i in range(len(taps)):
            weight, pixel = table[row_x + i], start + j * stride + i
            line += weight * image[pixel]
            line_noise += weight * weight * variance[pixel]
        weight = table[row_y + j]
        value += weight * line
        noise += weight * weight * line_noise
    return value, noise


@njit(nogil=True)
def _sum_bits(source, start, table, row_x, row_y, taps, threshold):
    """Return the flags whose pixels in a window have together enough weight."""
    sums = np.zeros(32, np.float32)
    for j in range(len(taps)):
        for i in range(len(taps)):
            mask = source.mask[start + j * source.stride + i]
            if mask != 0:
                weight = abs(table[row_y + j] * table[row_x + i])
                for bit in range(31):
                    if mask & (np.int32(1) << bit):
                        sums[bit] += weight
    bits = np.int32(0)
    for bit in range(31):
        if sums[bit] > threshold:
            bits |= np.int32(1) << bit
    return bits


@njit(nogil=True)
def _gather_bits(source, start, table, row_x, row_y, taps, rules):
    """Return the union of the flags of the pixels of a window with enough weight."""
    threshold = rules.mask_threshold
    if rules.summed:
        return _sum_bits(source, start, table, row_x, row_y, taps, threshold)
    bits = np.int32(0)
    for j in range(len(taps)):
        pixel = start + j * source.stride
        limit = threshold / max(abs(table[row_y + j]), np.float32(1e-9))
        for i in range(len(taps)):
            if abs(table[row_x + i]) > limit:
                bits |= source.mask[pixel + i]
    return bits


@njit(nogil=True)
def _weigh_incomplete(source, start, table, row_x, row_y, taps, rules):
    """Return (image, variance, mask) from a window with unusable pixels.

    These are 0 in both planes; the sums are divided by the weight of the others.
    """
    value, noise, total, missing = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for j in range(len(taps)):
        for i in range(len(taps)):
            pixel = start + j * source.stride + i
            weight = table[row_y + j] * table[row_x + i]
            if (source.mask[pixel] & _NO_DATA) != 0:
                missing += abs(weight)
            else:
                total += weight
                value += weight * source.image[pixel]
                noise += weight * weight * source.variance[pixel]
    if missing > rules.max_missing:
        return np.float32(np.nan), np.float32(np.inf), _NO_DATA
    bits = _gather_bits(source, start, table, row_x, row_y, taps, rules)
    if missing > (rules.mask_threshold if rules.summed else np.float32(0)):
        bits |= _EDGE
    return value / total, noise / (total * total), bits & ~_NO_DATA


@njit(nogil=True)
def _lowest_around(source, start, taps):
    """Return the smallest of the four pixels around a position; unusable ones are left out.

    A kernel rings at the border of a saturated core, where the image is not that of a star: what
    it takes below all pixels around would be a black hole in the coadd.
    """
    low = np.float32(np.inf)
    before = len(taps) // 2 - 1
    for j in range(2):
        for i in range(2):
            pixel = start + (before + j) * source.stride + before + i
            if (source.mask[pixel] & _NO_DATA) == 0:
                low = min(low, source.image[pixel])
    return low if low < np.inf else np.float32(-np.inf)


@njit(nogil=True)
def _cubic(p0, p1, p2, p3):
    """Return the coefficients of the cubic through values at -1, 0, 1, 2."""
    return (
        p1,
        p2 - p0 / 3.0 - p1 / 2.0 - p3 / 6.0,
        (p0 + p2) / 2.0 - p1,
        (p3 - p0) / 6.0 + (p1 - p2) / 2.0,
    )


@njit(nogil=True)
def _interpolate_line(plane, row, t, line):
    """Interpolate the nodes between two rows of nodes, for all columns."""
    for i in range(plane.shape[1]):
        c0, c1, c2, c3 = _cubic(
            plane[row - 1, i], plane[row, i], plane[row + 1, i], plane[row + 2, i]
        )
        line[i] = c0 + t * (c1 + t * (c2 + t * c3))


@njit(nogil=True)
def _resample_rows(source, planes, placing, table, taps, target, rows, rules):
    """Work through rows of the target; see `resample`."""
    grid_x0, grid_y0, step = placing
    n_rows, n_columns = planes[0].shape
    lanes = table.size // (_PHASES + 1)
    line_x, line_y, line_area = np.empty(n_columns), np.empty(n_columns), np.empty(n_columns)
    places = np.empty((3, step), np.int64)
    factors = np.empty(step, np.float32)
    n_done = 0
    for y_out in range(rows[0], rows[1]):
        row = (y_out - grid_y0) // step
        if row < 1 or row + 2 >= n_rows:
            continue
        t = (y_out - grid_y0 - row * step) / step
        _interpolate_line(planes[0], row, t, line_x)
        _interpolate_line(planes[1], row, t, line_y)
        _interpolate_line(planes[2], row, t, line_area)
        for column in range(1, n_columns - 2):
            first = grid_x0 + column * step
            if first >= target[0].shape[1] or first + step <= 0 or np.isnan(line_x[column]):
                continue
            cubic_x, cubic_y = _cubic(*_four(line_x, column)), _cubic(*_four(line_y, column))
            _place_pixels(cubic_x, cubic_y, source, lanes, places)
            _scale_pixels(_cubic(*_four(line_area, column)), rules.scale, factors)
            n_done += _resample_cell(
                source, (places, factors), table, taps, target, (first, y_out), rules
            )
    return n_done


@njit(nogil=True)
def _four(line, i):
    return line[i - 1], line[i], line[i + 1], line[i + 2]


@njit(nogil=True)
def _place_pixels(cubic_x, cubic_y, source, lanes, places):
    """Find window and phases of the pixels between two nodes; window -1 is off the CCD.

    Rows of ``places``: first pixel of the window, and indices of the weights along x and y.
    """
    x0, x1, x2, x3 = cubic_x
    y0, y1, y2, y3 = cubic_y
    x_end, y_end, stride = source.nx - 0.5, source.ny - 0.5, source.stride
    scale = 1.0 / places.shape[1]
    for i in range(places.shape[1]):
        t = i * scale
        x = x0 + t * (x1 + t * (x2 + t * x3))
        y = y0 + t * (y1 + t * (y2 + t * y3))
        # NaN, far from the CCD, also fails these comparisons
        inside = (x >= -0.5) & (x <= x_end) & (y >= -0.5) & (y <= y_end)
        x = x if inside else 0.0
        y = y if inside else 0.0
        column, row = np.floor(x), np.floor(y)
        # the margin of half a kernel is one pixel wider than a window reaches back
        start = (np.int64(row) + 1) * stride + np.int64(column) + 1
        places[0, i] = start if inside else -1
        places[1, i] = lanes * np.int64((x - column) * _PHASES + 0.5)
        places[2, i] = lanes * np.int64((y - row) * _PHASES + 0.5)


@njit(nogil=True)
def _scale_pixels(cubic_area, scale, factors):
    """Compute the flux factors between two nodes."""
    a0, a1, a2, a3 = cubic_area
    for i in range(factors.size):
        t = i / factors.size
        factors[i] = np.float32(a0 + t * (a1 + t * (a2 + t * a3))) * scale


@njit(nogil=True)
def _resample_cell(source, placed, table, taps, target, corner, rules):
    """Resample the pixels of one row between two nodes; return how many got data."""
    places, factors = placed
    first, y_out = corner
    image, variance, mask = target
    n_done, n_later = 0, 0
    begin, end = max(-first, 0), min(places.shape[1], image.shape[1] - first)
    for i in range(begin, end):
        start = places[0, i]
        if start < 0 or (mask[y_out, first + i] & _NO_DATA) == 0:
            continue
        if source.state[start] != _CLEAN:
            n_later += 1
            continue
        row_x, row_y = places[1, i], places[2, i]
        value, noise = _weigh(
            source.image, source.variance, start, source.stride, table, row_x, row_y, taps
        )
        image[y_out, first + i] = value * factors[i]
        variance[y_out, first + i] = noise * factors[i] * factors[i]
        mask[y_out, first + i] = 0
        n_done += 1
    if n_later > 0:
        n_done += _resample_incomplete(
            source, placed, table, taps, target, (first, y_out, begin, end), rules
        )
    return n_done


@njit(nogil=True)
def _resample_incomplete(source, placed, table, taps, target, span, rules):
    """Resample what `_resample_cell` skipped: windows with flags or unusable pixels."""
    places, factors = placed
    first, y_out, begin, end = span
    image, variance, mask = target
    n_done = 0
    for i in range(begin, end):
        start = places[0, i]
        if start < 0 or source.state[start] == _CLEAN:
            continue
        if (mask[y_out, first + i] & _NO_DATA) == 0:
            continue
        row_x, row_y = places[1, i], places[2, i]
        if source.state[start] == _FLAGGED:
            value, noise = _weigh(
                source.image, source.variance, start, source.stride, table, row_x, row_y, taps
            )
            bits = _gather_bits(source, start, table, row_x, row_y, taps, rules)
        else:
            value, noise, bits = _weigh_incomplete(source, start, table, row_x, row_y, taps, rules)
        if (bits & _SAT) != 0:
            value = max(value, _lowest_around(source, start, taps))
        image[y_out, first + i] = value * factors[i]
        variance[y_out, first + i] = noise * factors[i] * factors[i]
        mask[y_out, first + i] = bits
        n_done += (bits & _NO_DATA) == 0
    return n_done
