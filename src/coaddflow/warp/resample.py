"""Resampling of an image, its variance and its mask in one pass: the hot loop of the warps.

The weights of the separable kernels [1]_ are polynomials of the phase, the position within a pixel:
no sine is computed per pixel, and they are right to 5e-7. They are computed for many tract pixels
at a time, in loops that the compiler turns into vector instructions; then a row of the window is
one vector (`_sum_window`). Sums have a fixed order without "fast math", so the result is the same
on every machine and for any number of threads.

On a grid coarser than the CCD the kernel is stretched to the pixels of the grid (`stretch_of`), so
that all photons are used. Else pixels between the taps would be left out, and the noise of the
others would be aliased: with pixels four times larger at ten times the variance.

References
----------
.. [1] Duchon 1979, J. Appl. Meteor. 18, 1016 (Lanczos filtering); Bertin et al. 2002, ASP Conf.
   Ser. 281, 228 (its use for astronomical images in SWarp).
"""

import itertools
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload
from numpy.polynomial import Chebyshev, Polynomial
from numpy.typing import ArrayLike, NDArray

from coaddflow.compiled import njit
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.warp.mapping import PixelGrid

KernelName = Literal["lanczos3", "lanczos5", "bilinear"]

_TAPS = {"bilinear": 2, "lanczos3": 6, "lanczos5": 10}
_PHASES = 2048

_DEGREE = 9
"""Of the polynomials of a kernel that is not stretched."""

_PIECES = 64
"""A stretched kernel has kinks, at multiples of 1/8 of a pixel: it is made of cubic pieces."""

_STRETCH_STEPS = 8
"""Kernels are stretched by multiples of 1/8: few tables, and none for scales that are alike."""

_LANES = 512
"""Tract pixels that are worked on together: at least as many as are between two nodes of a grid;
what is known of them stays in the fastest cache."""

_MAX_UNROLLED = 16
"""Taps up to which the loops over them are unrolled."""

_CLEAN, _FLAGGED, _INCOMPLETE = np.uint8(0), np.uint8(1), np.uint8(2)
_NO_DATA, _EDGE = np.int32(MaskPlane.NO_DATA), np.int32(MaskPlane.EDGE)
_SAT = np.int32(MaskPlane.SAT)


class Kernel(NamedTuple):
    """An interpolation kernel: polynomials of the phase, for each tap."""

    coefficients: NDArray[np.float32]
    """If the kernel is not stretched, of the polynomials in phase - 1/2 of the taps at and before
    the position, the lowest power first, shape (1, taps / 2, 10): the other taps mirror them. Else
    of the cubics in the phase after the beginning of a piece, shape (pieces, taps, 4)."""
    taps: tuple[int, ...] | NDArray[np.int64]
    """Offset of each tap from the pixel at or before the position, such as (-2, ... 3). (The
    compiler knows the length of a tuple.) An array for long kernels."""
    stretch: float
    """CCD pixels per unit of the kernel, at least 1 (`stretch_of`)."""


class Source(NamedTuple):
    """Pixels of a CCD, prepared for resampling by `prepare_source`."""

    image: NDArray[np.float32]
    """Pixels of the CCD, row by row, shape (ny * nx,)."""
    variance: NDArray[np.float32]
    """Likewise."""
    mask: NDArray[np.int32]
    """Flags of the CCD, shape (ny, nx)."""
    state: NDArray[np.uint8]
    """State of the window of the kernel around a position whose pixel (that at or before it) is
    [row - 1, column - 1]: 0 if all pixels of the window are usable and no bit is set, 1 if bits are
    set, 2 if some pixels are unusable or not on the CCD; shape (ny + 1, nx + 1)."""


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
    """Return a kernel; its weights differ from `kernel_weights` by less than 1e-6."""
    half = _TAPS[name] // 2
    reach = int(np.ceil(half * stretch))
    offsets = np.arange(1 - reach, reach + 1)
    kept = tuple(offsets.tolist()) if offsets.size <= _MAX_UNROLLED else offsets
    if stretch == 1.0:
        polynomials = _fit(name, stretch, (0.0, 1.0), _DEGREE, 0.5)[None, :half]
    else:
        edges = np.arange(_PIECES + 1) / _PIECES
        pieces = itertools.pairwise(edges)
        polynomials = np.stack([_fit(name, stretch, piece, 3, piece[0]) for piece in pieces])
    return Kernel(np.ascontiguousarray(polynomials, np.float32), kept, stretch)


def _fit(
    name: KernelName, stretch: float, domain: tuple[float, float], degree: int, origin: float
) -> NDArray[np.float64]:
    """Return polynomials in (phase - origin) for each tap, by interpolation at Chebyshev nodes."""
    nodes = (np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1)) + 1.0) / 2.0
    phases = domain[0] + nodes * (domain[1] - domain[0])
    weights = kernel_weights(name, phases, stretch)
    fits = [Chebyshev.fit(phases - origin, one, degree) for one in weights.T]
    found = np.zeros((len(fits), degree + 1))
    for row, fit in zip(found, fits, strict=True):
        coefficients = fit.convert(kind=Polynomial).coef
        row[: coefficients.size] = coefficients
    return found


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


def prepare_source(masked_image: MaskedImage, kernel: Kernel) -> Source:
    """Look for the windows on a CCD that are clean.

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
        It refers to the pixels of ``masked_image``.
    """
    ny, nx = masked_image.shape
    planes = (masked_image.image, masked_image.variance, masked_image.mask)
    planes = tuple(np.ascontiguousarray(plane) for plane in planes)
    state = np.empty((ny + 1, nx + 1), np.uint8)
    lines = np.empty((ny, nx + 1), np.uint8)
    _find_states(*planes, len(kernel.taps) // 2, lines, state)
    return Source(planes[0].ravel(), planes[1].ravel(), planes[2], state)


@njit(nogil=True, error_model="numpy")
def _is_usable(value, noise, bits):
    # differences are NaN, and comparisons false, if a value is not finite
    return (value - value == 0) & (noise > 0) & (noise - noise == 0) & ((bits & _NO_DATA) == 0)


@njit(nogil=True, error_model="numpy")
def _find_states(image, variance, mask, half, lines, state):
    """Find the worst state of the pixels in each window, see `Source`; ``lines`` is for scratch."""
    ny, nx = image.shape
    # beyond the CCD nothing is usable
    padded = np.full(nx + 2 * half, _INCOMPLETE, np.uint8)
    for j in range(ny):
        for i in range(nx):
            bits = mask[j, i]
            usable = _is_usable(image[j, i], variance[j, i], bits)
            padded[half + i] = np.uint8(bits != 0) if usable else _INCOMPLETE
        _maximum_of(padded, 2 * half, 1, lines[j])
    for j in range(ny + 1):
        if j < half or j + half > ny:
            state[j] = _INCOMPLETE
        else:
            _maximum_of(lines[j - half :].reshape(-1), 2 * half, nx + 1, state[j])
    # no vector may reach beyond the last pixel
    state[max(ny - half, 0), max(nx + 1 - half - _MAX_UNROLLED, 0) :] = _INCOMPLETE


@njit(nogil=True, error_model="numpy")
def _maximum_of(values, n, step, result):
    """Write the largest of n values, a step apart, beginning at each."""
    result[:] = values[: result.size]
    for k in range(1, n):
        shifted = values[k * step : k * step + result.size]
        for i in range(result.size):
            result[i] = max(result[i], shifted[i])


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
        kernel.coefficients,
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


@njit(nogil=True, error_model="numpy")
def _set_weights(phases, coefficients, weights):
    """Set the weights of the taps, shape (taps, lanes), from the phases less 1/2."""
    if coefficients.shape[0] > 1:
        _set_stretched_weights(phases, coefficients, weights)
    else:
        _set_mirrored_weights(phases, coefficients, weights)


@njit(nogil=True, error_model="numpy")
def _set_mirrored_weights(phases, coefficients, weights):
    """Set the weights from the even and odd powers of the first half of the taps."""
    n_taps = weights.shape[0]
    for k in range(coefficients.shape[1]):
        c0, c1, c2 = coefficients[0, k, 0], coefficients[0, k, 1], coefficients[0, k, 2]
        c3, c4, c5 = coefficients[0, k, 3], coefficients[0, k, 4], coefficients[0, k, 5]
        c6, c7, c8 = coefficients[0, k, 6], coefficients[0, k, 7], coefficients[0, k, 8]
        c9 = coefficients[0, k, 9]
        for i in range(_LANES):
            t = phases[i]
            square = t * t
            even = c0 + square * (c2 + square * (c4 + square * (c6 + square * c8)))
            odd = t * (c1 + square * (c3 + square * (c5 + square * (c7 + square * c9))))
            weights[k, i] = even + odd
            weights[n_taps - 1 - k, i] = even - odd


@njit(nogil=True, error_model="numpy")
def _set_stretched_weights(phases, coefficients, weights):
    """Set the weights from cubic pieces."""
    n_pieces = coefficients.shape[0]
    for i in range(_LANES):
        place = (phases[i] + np.float32(0.5)) * np.float32(n_pieces)
        piece = min(max(int(place), 0), n_pieces - 1)
        t = (place - np.float32(piece)) / np.float32(n_pieces)
        for k in range(weights.shape[0]):
            high = coefficients[piece, k, 2] + t * coefficients[piece, k, 3]
            weights[k, i] = coefficients[piece, k, 0] + t * (coefficients[piece, k, 1] + t * high)


@intrinsic
def _sum_window(typing_context, image, variance, start, stride, weights_x, weights_y, lane, taps):
    """Sum one window of two planes, the second with the squares of the weights.

    Arguments: two flat float32 arrays; index of the window's first pixel; length of a row;
    contiguous arrays of weights, shape (taps, lanes); which lane of these; tuple whose length is
    the number of taps. Returns both sums as float32. Emits, for each row of the window, one vector
    load and multiplication with addition per plane; the equivalent Python loop is compiled to
    scalar code, which takes three times as long.
    """
    signature = types.UniTuple(types.float32, 2)(
        image, variance, start, stride, weights_x, weights_y, lane, taps
    )
    return signature, _emit_sum_window


def _emit_sum_window(context, builder, signature, arguments):
    """Emit the instructions of `_sum_window`."""
    n_taps = signature.args[7].count
    lanes = _vector_lanes(n_taps)
    vector = ir.VectorType(ir.FloatType(), lanes)
    start, stride, lane = arguments[2], arguments[3], arguments[6]
    zeros = ir.Constant(vector, [0.0] * lanes)

    def data_of(number: int) -> ir.Value:
        make = context.make_array(signature.args[number])
        return make(context, builder, arguments[number]).data

    def weights(number: int) -> list[ir.Value]:
        """Load the weights of the taps at this lane."""
        places = [builder.add(lane, lane.type(tap * _LANES)) for tap in range(n_taps)]
        return [builder.load(builder.gep(data_of(number), [place])) for place in places]

    weights_y, across = weights(5), zeros
    for tap, weight in enumerate(weights(4)):
        across = builder.insert_element(across, weight, ir.IntType(32)(tap))
    # what is loaded beyond the taps is not used: it need not be a number
    is_tap = ir.Constant(ir.VectorType(ir.IntType(1), lanes), [k < n_taps for k in range(lanes)])
    sums = []
    for number in (0, 1):
        if number == 1:  # the variance takes the squares
            across = builder.fmul(across, across)
            weights_y = [builder.fmul(weight, weight) for weight in weights_y]
        data, columns, index = data_of(number), zeros, start
        for weight in weights_y:
            pointer = builder.bitcast(builder.gep(data, [index]), vector.as_pointer())
            pixels = builder.load(pointer)
            pixels.align = 4
            columns = _multiply_add(builder, _splat(builder, weight, vector), pixels, columns)
            index = builder.add(index, stride)
        products = builder.fmul(across, builder.select(is_tap, columns, zeros))
        sums.append(_sum_lanes(builder, products))
    return cgutils.pack_array(builder, sums)


def _multiply_add(builder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Emit a * b + c of vectors, rounded once: the same on every machine."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fma.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _sum_lanes(builder, values: ir.Value) -> ir.Value:
    """Emit the sum of the lanes of a vector, whose number is a power of 2: halves are added."""
    lanes = ir.VectorType(ir.IntType(32), values.type.count)
    n = values.type.count
    while n > 1:
        n //= 2
        upper = [n + k if k < n else k for k in range(lanes.count)]
        shifted = builder.shuffle_vector(values, values, ir.Constant(lanes, upper))
        values = builder.fadd(values, shifted)
    return builder.extract_element(values, ir.IntType(32)(0))


def _splat(builder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Emit a vector with the same value in all lanes."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(first, first, lanes)


def _vector_lanes(n_taps: int) -> int:
    """Return how many pixels of a row are loaded together for so many taps."""
    return 1 << (n_taps - 1).bit_length() if n_taps <= _MAX_UNROLLED else n_taps


def _sum_one(image, variance, start, stride, weights_x, weights_y, lane, taps):
    """Sum one window, as `_sum_window`, for any kernel."""


@overload(_sum_one)
def _choose_sum_one(image, variance, start, stride, weights_x, weights_y, lane, taps):
    return _sum_unrolled if isinstance(taps, types.UniTuple) else _sum_long_window


def _sum_unrolled(image, variance, start, stride, weights_x, weights_y, lane, taps):
    return _sum_window(image, variance, start, stride, weights_x, weights_y, lane, taps)


def _sum_long_window(image, variance, start, stride, weights_x, weights_y, lane, taps):
    """Sum a window of a long kernel."""
    value, noise = np.float32(0), np.float32(0)
    for k in range(len(taps)):
        column, column_noise = np.float32(0), np.float32(0)
        for j in range(len(taps)):
            weight, pixel = weights_y[j, lane], start + j * stride + k
            column += weight * image[pixel]
            column_noise += weight * weight * variance[pixel]
        weight = weights_x[k, lane]
        value += weight * column
        noise += weight * weight * column_noise
    return value, noise


@njit(nogil=True, error_model="numpy")
def _gather_bits(mask, corner, weights_y, weights_x, lane, rules):
    """Return the flags of the pixels of a window with enough weight.

    Each pixel must have it; if so told, those with the same flag together.
    """
    sums = np.zeros(31 if rules.summed else 0, np.float32)
    bits = np.int32(0)
    for j in range(weights_y.shape[0]):
        y = corner[0] + j
        if not 0 <= y < mask.shape[0]:
            continue
        limit = rules.mask_threshold / max(abs(weights_y[j, lane]), np.float32(1e-9))
        for k in range(weights_x.shape[0]):
            x = corner[1] + k
            found = mask[y, x] if 0 <= x < mask.shape[1] else np.int32(0)
            if found == 0:
                continue
            weight = abs(weights_x[k, lane])
            if not rules.summed and weight > limit:
                bits |= found
            for bit in range(sums.size):
                if found & (np.int32(1) << bit):
                    sums[bit] += weight * abs(weights_y[j, lane])
    for bit in range(sums.size):
        if sums[bit] > rules.mask_threshold:
            bits |= np.int32(1) << bit
    return bits


@njit(nogil=True, error_model="numpy")
def _weigh_incomplete(image, variance, mask, stride, corner, weights_y, weights_x, lane, rules):
    """Return (image, variance, mask) from a window with unusable pixels.

    The sums over the others are divided by their weight.
    """
    value, noise, total, missing = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for j in range(weights_y.shape[0]):
        y = corner[0] + j
        for k in range(weights_x.shape[0]):
            x = corner[1] + k
            weight = weights_y[j, lane] * weights_x[k, lane]
            usable = 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]
            if usable:
                pixel = y * stride + x
                usable = _is_usable(image[pixel], variance[pixel], mask[y, x])
            if usable:
                total += weight
                value += weight * image[pixel]
                noise += weight * weight * variance[pixel]
            else:
                missing += abs(weight)
    if missing > rules.max_missing:
        return np.float32(np.nan), np.float32(np.inf), _NO_DATA
    bits = _gather_bits(mask, corner, weights_y, weights_x, lane, rules)
    if missing > (rules.mask_threshold if rules.summed else np.float32(0)):
        bits |= _EDGE
    return value / total, noise / (total * total), bits & ~_NO_DATA


@njit(nogil=True, error_model="numpy")
def _lowest_around(image, variance, mask, stride, row, column):
    """Return the smallest of the four pixels around a position; unusable ones are left out.

    A kernel rings at the border of a saturated core, where the image is not that of a star: what
    it takes below all pixels around would be a black hole in the coadd.
    """
    low = np.float32(np.inf)
    for y in range(max(row, 0), min(row + 2, mask.shape[0])):
        for x in range(max(column, 0), min(column + 2, mask.shape[1])):
            pixel = y * stride + x
            if _is_usable(image[pixel], variance[pixel], mask[y, x]):
                low = min(low, image[pixel])
    return low if low < np.inf else np.float32(-np.inf)


@njit(nogil=True, error_model="numpy")
def _cubic(p0, p1, p2, p3):
    """Return the coefficients of the cubic through values at -1, 0, 1, 2."""
    return (
        p1,
        p2 - p0 / 3.0 - p1 / 2.0 - p3 / 6.0,
        (p0 + p2) / 2.0 - p1,
        (p3 - p0) / 6.0 + (p1 - p2) / 2.0,
    )


@njit(nogil=True, error_model="numpy")
def _interpolate_line(plane, row, t, line):
    """Interpolate the nodes between two rows of nodes, for all columns."""
    for i in range(plane.shape[1]):
        c0, c1, c2, c3 = _cubic(
            plane[row - 1, i], plane[row, i], plane[row + 1, i], plane[row + 2, i]
        )
        line[i] = c0 + t * (c1 + t * (c2 + t * c3))


@njit(nogil=True, error_model="numpy")
def _resample_rows(source, planes, placing, coefficients, taps, target, rows, rules):
    """Work through rows of the target, `_LANES` pixels at a time; see `resample`.

    The functions for these pixels get arrays, not tuples of arrays or parts of them: numba counts
    the references to these, which takes as long as the sums.
    """
    grid_x0, grid_y0, step = placing
    grid_x, grid_y, grid_area = planes
    n_rows, n_columns = grid_x.shape
    line_x, line_y, line_area = np.empty(n_columns), np.empty(n_columns), np.empty(n_columns)
    near_y, near_x = np.empty(_LANES, np.int64), np.empty(_LANES, np.int64)
    phases_y, phases_x = np.zeros(_LANES, np.float32), np.zeros(_LANES, np.float32)
    factors = np.empty(_LANES, np.float32)
    weights_y = np.empty((len(taps), _LANES), np.float32)
    weights_x = np.empty((len(taps), _LANES), np.float32)
    image, variance, mask = source.image, source.variance, source.mask
    state, stride = source.state, mask.shape[1]
    image_out, variance_out, mask_out = target
    cells = _LANES // step
    n_done = 0
    for y_out in range(rows[0], rows[1]):
        row = (y_out - grid_y0) // step
        if row < 1 or row + 2 >= n_rows:
            continue
        t = (y_out - grid_y0 - row * step) / step
        _interpolate_line(grid_x, row, t, line_x)
        _interpolate_line(grid_y, row, t, line_y)
        _interpolate_line(grid_area, row, t, line_area)
        for column in range(1, n_columns - 2, cells):
            first = grid_x0 + column * step
            if first >= image_out.shape[1] or first + _LANES <= 0:
                continue
            n_pixels = _place_pixels(
                *(line_x, line_y, line_area, column, min(cells, n_columns - 2 - column), step),
                *(mask.shape, rules.scale, near_y, near_x, phases_y, phases_x, factors),
            )
            if n_pixels == 0:
                continue
            span = (y_out, first, max(-first, 0), min(n_pixels, image_out.shape[1] - first))
            _set_weights(phases_y, coefficients, weights_y)
            _set_weights(phases_x, coefficients, weights_x)
            n_clean, n_others = _resample_clean(
                *(image, variance, state, stride, taps, near_y, near_x),
                *(weights_y, weights_x, factors, image_out, variance_out, mask_out, span),
            )
            n_done += n_clean
            if n_others > 0:
                n_done += _resample_others(
                    *(image, variance, mask, state, stride, taps, near_y, near_x),
                    *(weights_y, weights_x, factors, image_out, variance_out, mask_out, span),
                    rules,
                )
    return n_done


@njit(nogil=True, error_model="numpy")
def _cubic_at(line, i):
    return _cubic(line[i - 1], line[i], line[i + 1], line[i + 2])


@njit(nogil=True, error_model="numpy")
def _place_pixels(  # noqa: PLR0913, PLR0917 - see `_resample_rows`
    line_x, line_y, line_area, column, n_cells, step, shape, scale,
    near_y, near_x, phases_y, phases_x, factors,
):  # fmt: skip
    """Find positions and factors of the pixels between the nodes of a row; return how many.

    ``near_y``, ``near_x``: pixel of the CCD at or before the position, -2 if it is off the CCD;
    phases are less 1/2. Returned is 0 if all are off the CCD.
    """
    y_end, x_end = shape[0] - 0.5, shape[1] - 0.5
    length = 1.0 / step
    for cell in range(n_cells):
        x0, x1, x2, x3 = _cubic_at(line_x, column + cell)
        y0, y1, y2, y3 = _cubic_at(line_y, column + cell)
        a0, a1, a2, a3 = _cubic_at(line_area, column + cell)
        for k in range(step):
            i, t = cell * step + k, k * length
            x = x0 + t * (x1 + t * (x2 + t * x3))
            y = y0 + t * (y1 + t * (y2 + t * y3))
            # NaN, far from the CCD, also fails these comparisons
            inside = (x >= -0.5) & (x <= x_end) & (y >= -0.5) & (y <= y_end)
            x = x if inside else -2.0
            y = y if inside else -2.0
            floor_x, floor_y = np.floor(x), np.floor(y)
            near_y[i], near_x[i] = np.int32(floor_y), np.int32(floor_x)
            phases_y[i], phases_x[i] = np.float32(y - floor_y - 0.5), np.float32(x - floor_x - 0.5)
            factors[i] = np.float32(a0 + t * (a1 + t * (a2 + t * a3))) * scale
    highest = near_y[0]
    for i in range(n_cells * step):
        highest = max(highest, near_y[i])
    return n_cells * step if highest > -2 else 0


@njit(nogil=True, error_model="numpy")
def _resample_clean(  # noqa: PLR0913, PLR0917 - see `_resample_rows`
    image, variance, state, stride, taps, near_y, near_x, weights_y, weights_x, factors,
    image_out, variance_out, mask_out, span,
):  # fmt: skip
    """Resample pixels of one row with a clean window; return how many, and how many others."""
    y_out, first, begin, end = span
    before = len(taps) // 2 - 1
    n_done, n_others = 0, 0
    for i in range(begin, end):
        row, column, pixel = near_y[i], near_x[i], first + i
        if row < -1 or (mask_out[y_out, pixel] & _NO_DATA) == 0:
            continue
        if state[row + 1, column + 1] != _CLEAN:
            n_others += 1
            continue
        start = (row - before) * stride + column - before
        value, noise = _sum_one(image, variance, start, stride, weights_x, weights_y, i, taps)
        image_out[y_out, pixel] = value * factors[i]
        variance_out[y_out, pixel] = noise * factors[i] * factors[i]
        mask_out[y_out, pixel] = 0
        n_done += 1
    return n_done, n_others


@njit(nogil=True, error_model="numpy")
def _resample_others(  # noqa: PLR0913, PLR0917 - see `_resample_rows`
    image, variance, mask, state, stride, taps, near_y, near_x, weights_y, weights_x, factors,
    image_out, variance_out, mask_out, span, rules,
):  # fmt: skip
    """Resample pixels whose windows have flags or unusable pixels; return how many got data."""
    y_out, first, begin, end = span
    before = len(taps) // 2 - 1
    n_done = 0
    for i in range(begin, end):
        row, column, pixel = near_y[i], near_x[i], first + i
        if row < -1 or (mask_out[y_out, pixel] & _NO_DATA) == 0:
            continue
        corner = (row - before, column - before)
        if state[row + 1, column + 1] == _FLAGGED:
            start = corner[0] * stride + corner[1]
            value, noise = _sum_one(image, variance, start, stride, weights_x, weights_y, i, taps)
            bits = _gather_bits(mask, corner, weights_y, weights_x, i, rules)
        else:
            value, noise, bits = _weigh_incomplete(
                image, variance, mask, stride, corner, weights_y, weights_x, i, rules
            )
        if (bits & _SAT) != 0:
            value = max(value, _lowest_around(image, variance, mask, stride, row, column))
        image_out[y_out, pixel] = value * factors[i]
        variance_out[y_out, pixel] = noise * factors[i] * factors[i]
        mask_out[y_out, pixel] = bits
        n_done += (bits & _NO_DATA) == 0
    return n_done
