"""Resampling of an image, its variance and its mask in one pass: the hot loop of the warps.

A row of the tract is worked through some pixels at a time (`coaddflow.warp.windows.LANES`): where
they are on the CCD, what is known of their windows, the weights of the kernel, and the sums. The
few windows with flags, or of which pixels are missing, are looked at one by one.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.warp.kernels import MAX_UNROLLED, Kernel
from coaddflow.warp.mapping import PixelGrid
from coaddflow.warp.windows import CLEAN, LANES, ROOM, set_weights, sum_clean, sum_one

_FLAGGED, _INCOMPLETE, _NOT_WANTED = np.uint8(1), np.uint8(2), np.uint8(3)
_NO_DATA, _EDGE = np.int32(MaskPlane.NO_DATA), np.int32(MaskPlane.EDGE)
_SAT = np.int32(MaskPlane.SAT)


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
    set, 2 if some pixels are unusable or not on the CCD; row by row, shape
    ((ny + 1) * (nx + 1),)."""


class Rules(NamedTuple):
    """Treatment of fluxes and flags."""

    scale: float
    """Factor on the fluxes, on top of the area of the pixels."""
    mask_threshold: float
    """See `coaddflow.settings.warp.WarpSettings`."""
    max_missing: float
    """Likewise."""


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
    return Source(planes[0].ravel(), planes[1].ravel(), planes[2], state.ravel())


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
    state[max(ny - half, 0), max(nx + 1 - half - MAX_UNROLLED, 0) :] = _INCOMPLETE


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
    """Work through rows of the target, `LANES` pixels at a time; see `resample`.

    The functions for these pixels get arrays, not tuples of arrays, and parts of arrays only once
    for all pixels: numba counts the references to these, which takes as long as a few sums.
    """
    grid_x0, grid_y0, step = placing
    grid_x, grid_y, grid_area = planes
    n_rows, n_columns = grid_x.shape
    line_x, line_y, line_area = np.empty(n_columns), np.empty(n_columns), np.empty(n_columns)
    near_y, near_x = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    phases_y, phases_x = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    factors = np.empty(LANES, np.float32)
    weights_y = np.zeros((len(taps), ROOM), np.float32)
    weights_x = np.zeros((len(taps), ROOM), np.float32)
    values, noises = np.empty(ROOM, np.float32), np.empty(ROOM, np.float32)
    starts = np.empty(LANES, np.int32)
    kinds, links = np.empty(LANES, np.uint8), np.empty(LANES, np.uint8)
    image, variance, mask = source.image, source.variance, source.mask
    state, stride = source.state, mask.shape[1]
    image_out, variance_out, mask_out = target
    cells = LANES // step
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
            if first >= image_out.shape[1] or first + LANES <= 0:
                continue
            n_pixels = _place_pixels(
                *(line_x, line_y, line_area, column, min(cells, n_columns - 2 - column), step),
                *(mask.shape, rules.scale, near_y, near_x, phases_y, phases_x, factors),
            )
            if n_pixels == 0:
                continue
            begin, end = max(-first, 0), min(n_pixels, image_out.shape[1] - first)
            if begin >= end:
                continue
            lanes, pixels = slice(begin, end), slice(first + begin, first + end)
            n_clean, n_others = _sort_pixels(
                *(state, stride, len(taps) // 2 - 1, near_y[lanes], near_x[lanes]),
                *(mask_out[y_out, pixels], starts[lanes], kinds[lanes], links[lanes]),
            )
            if n_clean + n_others == 0:
                continue
            set_weights(phases_y, coefficients, weights_y)
            set_weights(phases_x, coefficients, weights_x)
            if n_clean > 0:
                sum_clean(
                    *(image, variance, stride, starts, weights_x, weights_y, kinds, links),
                    *((begin, end), taps, values, noises),
                )
                _write_clean(
                    *(kinds[lanes], values[lanes], noises[lanes], factors[lanes]),
                    *(image_out[y_out, pixels], variance_out[y_out, pixels]),
                    mask_out[y_out, pixels],
                )
                n_done += n_clean
            if n_others > 0:
                n_done += _resample_others(
                    *(image, variance, mask, stride, taps, near_y, near_x, weights_y, weights_x),
                    *(factors, kinds, image_out, variance_out, mask_out),
                    *((y_out, first, begin, end), rules),
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
def _sort_pixels(state, stride, before, near_y, near_x, mask_out, starts, kinds, links):
    """Find what is to be done for the pixels of a row; return how many are clean, and how many not.

    ``kinds`` becomes the state of the window (`Source`), or `_NOT_WANTED` where the position is off
    the CCD or the target has data; ``links`` 1 where a clean window is one pixel to the right of
    that of the lane before, which is clean too; ``starts`` the first pixel of the window. ``state``
    is flat, like the image; ``before``: taps before the position.
    """
    width, stride, before = np.int32(stride + 1), np.int32(stride), np.int32(before)
    for i in range(near_x.size):
        place = (near_y[i] + np.int32(1)) * width + near_x[i] + np.int32(1)
        kinds[i] = state[max(place, np.int32(0))]
    for i in range(near_x.size):
        starts[i] = (near_y[i] - before) * stride + near_x[i] - before
    for i in range(near_x.size):
        is_wanted = ((mask_out[i] & _NO_DATA) != 0) & (near_y[i] >= -1)
        kinds[i] = kinds[i] if is_wanted else _NOT_WANTED
    links[0] = 0
    for i in range(1, near_x.size):
        both = (kinds[i] == CLEAN) & (kinds[i - 1] == CLEAN)
        links[i] = both & (starts[i] == starts[i - 1] + 1)
    n_clean, n_others = 0, 0
    for i in range(near_x.size):
        n_clean += kinds[i] == CLEAN
        n_others += (kinds[i] != CLEAN) & (kinds[i] != _NOT_WANTED)
    return n_clean, n_others


@njit(nogil=True, error_model="numpy")
def _write_clean(kinds, values, noises, factors, image_out, variance_out, mask_out):
    """Write what has been summed: in loops of their own, which become vectors."""
    for i in range(kinds.size):
        value = values[i] * factors[i]
        image_out[i] = value if kinds[i] == CLEAN else image_out[i]
    for i in range(kinds.size):
        noise = noises[i] * factors[i] * factors[i]
        variance_out[i] = noise if kinds[i] == CLEAN else variance_out[i]
    for i in range(kinds.size):
        mask_out[i] = 0 if kinds[i] == CLEAN else mask_out[i]


@njit(nogil=True, error_model="numpy")
def _resample_others(  # noqa: PLR0913, PLR0917 - see `_resample_rows`
    image, variance, mask, stride, taps, near_y, near_x, weights_y, weights_x, factors, kinds,
    image_out, variance_out, mask_out, span, rules,
):  # fmt: skip
    """Resample pixels whose windows have flags or unusable pixels; return how many got data."""
    y_out, first, begin, end = span
    before = len(taps) // 2 - 1
    n_done = 0
    for i in range(begin, end):
        if kinds[i] == CLEAN or kinds[i] == _NOT_WANTED:
            continue
        row, column, pixel = np.int64(near_y[i]), np.int64(near_x[i]), first + i
        corner = (row - before, column - before)
        if kinds[i] == _FLAGGED:
            start = corner[0] * stride + corner[1]
            value, noise = sum_one(image, variance, start, stride, weights_x, weights_y, i, taps)
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
