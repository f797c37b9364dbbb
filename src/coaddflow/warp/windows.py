"""Weighted sums over the windows of a kernel, for many tract pixels at a time.

What is known of a pixel is in a lane, one place in each of several arrays. Weights are computed in
loops over the lanes that the compiler turns into vector instructions. Where the windows of
neighbouring pixels are side by side on the CCD, as long as it is hardly turned against the tract,
the sums of `_GROUP` of them are vectors (`_sum_windows`); elsewhere a row of one window is one
(`_sum_window`). Sums have a fixed order without "fast math", the same in both, so the result is the
same on every machine and for any number of threads.
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from coaddflow.compiled import njit
from coaddflow.warp.kernels import MAX_UNROLLED

LANES = 512
"""Tract pixels that are worked on together: at least as many as are between two nodes of a grid;
what is known of them stays in the fastest cache."""

_GROUP = 16
"""Tract pixels whose windows are summed together, if they are side by side."""

ROOM = LANES + _GROUP
"""Length of what is kept for `LANES` pixels: the last group may reach beyond."""

_FEWEST = 5
"""Fewest windows that are summed as a group; a group takes as long as four single ones."""

_MAX_GROUPED = 10
"""Taps up to which windows are grouped. Those of longer kernels, which are stretched, are apart."""

CLEAN = np.uint8(0)
"""State of a pixel whose window is to be summed."""


@njit(nogil=True, error_model="numpy")
def set_weights(phases, coefficients, weights):
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
        for i in range(LANES):
            t = phases[i]
            square = t * t
            even = _fused(square, _fused(square, _fused(square, c8, c6), c4), c2)
            odd = _fused(square, _fused(square, _fused(square, c9, c7), c5), c3)
            even, odd = _fused(square, even, c0), t * _fused(square, odd, c1)
            weights[k, i] = even + odd
            weights[n_taps - 1 - k, i] = even - odd


@njit(nogil=True, error_model="numpy")
def _set_stretched_weights(phases, coefficients, weights):
    """Set the weights from cubic pieces."""
    n_pieces = coefficients.shape[0]
    for i in range(LANES):
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
    data = _data_of_arrays(context, builder, signature, arguments)
    weights_y, across = _load_weights(builder, data[5], lane, n_taps, ir.FloatType()), zeros
    for tap, weight in enumerate(_load_weights(builder, data[4], lane, n_taps, ir.FloatType())):
        across = builder.insert_element(across, weight, ir.IntType(32)(tap))
    # what is loaded beyond the taps is not used: it need not be a number
    is_tap = ir.Constant(ir.VectorType(ir.IntType(1), lanes), [k < n_taps for k in range(lanes)])
    sums = []
    for number in (0, 1):
        if number == 1:  # the variance takes the squares
            across = builder.fmul(across, across)
            weights_y = [builder.fmul(weight, weight) for weight in weights_y]
        columns, index = zeros, start
        for weight in weights_y:
            pixels = _load(builder, data[number], index, vector)
            columns = _multiply_add(builder, _splat(builder, weight, vector), pixels, columns)
            index = builder.add(index, stride)
        products = builder.fmul(across, builder.select(is_tap, columns, zeros))
        sums.append(_sum_lanes(builder, products))
    return cgutils.pack_array(builder, sums)


@intrinsic
def _sum_windows(  # noqa: PLR0913, PLR0917
    typing_context, image, variance, start, stride, weights_x, weights_y, lane, taps, values, noises
):
    """Sum the windows of `_GROUP` tract pixels, of which each is a pixel to the right of the last.

    Arguments as for `_sum_window`, whose sums these are, to the bit; ``start`` is that of the first
    window, ``lane`` that of the first pixel. The sums go into the arrays ``values`` and ``noises``,
    `_GROUP` of them from ``lane`` on, whether or not there are so many windows side by side. Emits
    one vector load and multiplication with addition for each tap and plane.
    """
    signature = types.void(
        image, variance, start, stride, weights_x, weights_y, lane, taps, values, noises
    )
    return signature, _emit_sum_windows


def _emit_sum_windows(context, builder, signature, arguments):
    """Emit the instructions of `_sum_windows`."""
    n_taps = signature.args[7].count
    vector = ir.VectorType(ir.FloatType(), _GROUP)
    start, stride, lane = arguments[2], arguments[3], arguments[6]
    zeros = ir.Constant(vector, [0.0] * _GROUP)
    data = _data_of_arrays(context, builder, signature, arguments)
    weights_x, weights_y = (
        _load_weights(builder, data[number], lane, n_taps, vector) for number in (4, 5)
    )
    unused = [zeros] * (_vector_lanes(n_taps) - n_taps)
    for number, result in ((0, 8), (1, 9)):
        if number == 1:  # the variance takes the squares
            weights_x = [builder.fmul(weight, weight) for weight in weights_x]
            weights_y = [builder.fmul(weight, weight) for weight in weights_y]
        columns, row = [zeros] * n_taps, start
        for weight in weights_y:
            for tap in range(n_taps):
                pixels = _load(builder, data[number], builder.add(row, row.type(tap)), vector)
                columns[tap] = _multiply_add(builder, weight, pixels, columns[tap])
            row = builder.add(row, stride)
        sums = [builder.fmul(*pair) for pair in zip(weights_x, columns, strict=True)] + unused
        while len(sums) > 1:  # as `_sum_lanes` adds them
            half = len(sums) // 2
            sums = [builder.fadd(*pair) for pair in zip(sums[:half], sums[half:], strict=True)]
        place = builder.gep(data[result], [lane])
        builder.store(sums[0], builder.bitcast(place, vector.as_pointer()), align=4)
    return context.get_dummy_value()


@intrinsic
def _fused(typing_context, a, b, c):
    """Return a * b + c of float32 numbers, rounded once."""

    def emit(context, builder, signature, arguments):
        return _multiply_add(builder, *arguments)

    return types.float32(types.float32, types.float32, types.float32), emit


def _data_of_arrays(context, builder, signature, arguments) -> dict[int, ir.Value]:
    """Emit the addresses of the data of those arguments that are arrays, by their number."""
    return {
        number: context.make_array(kind)(context, builder, argument).data
        for number, (kind, argument) in enumerate(zip(signature.args, arguments, strict=True))
        if isinstance(kind, types.Array)
    }


def _load_weights(
    builder, data: ir.Value, lane: ir.Value, n_taps: int, kind: ir.Type
) -> list[ir.Value]:
    """Emit the loads of the weights of all taps, of one lane or of several from there on."""
    places = [builder.add(lane, lane.type(tap * ROOM)) for tap in range(n_taps)]
    return [_load(builder, data, place, kind) for place in places]


def _load(builder, data: ir.Value, index: ir.Value, kind: ir.Type) -> ir.Value:
    """Emit the load of a number, or of a vector that begins at any index."""
    pointer = builder.bitcast(builder.gep(data, [index]), kind.as_pointer())
    loaded = builder.load(pointer)
    loaded.align = 4
    return loaded


def _multiply_add(builder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Emit a * b + c of numbers or vectors, rounded once: the same on every machine."""
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fma.v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "llvm.fma.f32"
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
    return 1 << (n_taps - 1).bit_length() if n_taps <= MAX_UNROLLED else n_taps


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


def _sum_clean(  # noqa: PLR0913, PLR0917
    image, variance, stride, starts, weights_x, weights_y, kinds, links, lanes, taps, values, noises
):  # fmt: skip
    """Do as `sum_clean`, for any kernel."""


@overload(_sum_clean)
def _choose_sum_clean(  # noqa: PLR0913, PLR0917
    image, variance, stride, starts, weights_x, weights_y, kinds, links, lanes, taps, values, noises
):  # fmt: skip
    grouped = isinstance(taps, types.UniTuple) and taps.count <= _MAX_GROUPED
    return _sum_groups if grouped else _sum_one_by_one


def _sum_groups(  # noqa: PLR0913, PLR0917
    image, variance, stride, starts, weights_x, weights_y, kinds, links, lanes, taps, values, noises
):  # fmt: skip
    # what a group loads must be there
    last = image.size - (len(taps) - 1) * (stride + 1) - _GROUP
    lane = lanes[0]
    while lane < lanes[1]:
        if kinds[lane] != CLEAN:
            lane += 1
            continue
        start, end = np.int64(starts[lane]), lane + 1
        while end < lanes[1] and links[end]:
            end += 1
        while end - lane >= _FEWEST and start <= last:
            _sum_windows(
                image, variance, start, stride, weights_x, weights_y, lane, taps, values, noises
            )
            lane, start = lane + _GROUP, start + _GROUP
        while lane < end:
            values[lane], noises[lane] = _sum_window(
                image, variance, start, stride, weights_x, weights_y, lane, taps
            )
            lane, start = lane + 1, start + 1
        lane = end


def _sum_one_by_one(  # noqa: PLR0913, PLR0917
    image, variance, stride, starts, weights_x, weights_y, kinds, links, lanes, taps, values, noises
):  # fmt: skip
    for lane in range(lanes[0], lanes[1]):
        if kinds[lane] == CLEAN:
            values[lane], noises[lane] = _sum_one(
                image, variance, np.int64(starts[lane]), stride, weights_x, weights_y, lane, taps
            )


@njit(nogil=True, error_model="numpy")
def sum_one(image, variance, start, stride, weights_x, weights_y, lane, taps):
    """Return the sums over one window of the image and, with the squared weights, the variance.

    ``start`` is the place of its first pixel in the flat images, ``stride`` the length of a row,
    ``lane`` the place of its weights; ``taps`` is `Kernel.taps`.
    """
    return _sum_one(image, variance, start, stride, weights_x, weights_y, lane, taps)


@njit(nogil=True, error_model="numpy")
def sum_clean(  # noqa: PLR0913, PLR0917
    image, variance, stride, starts, weights_x, weights_y, kinds, links, lanes, taps, values, noises
):  # fmt: skip
    """Sum the windows of the pixels of a row that are `CLEAN`, those side by side together.

    Arrays have a place for each of `LANES` pixels (`ROOM` if vectors are read or written): first
    pixel of the window, weights, state, 1 where the window is a pixel to the right of that of the
    lane before and both are clean; and the sums. ``lanes``: the first and last-plus-one. Sums
    of lanes that are not `CLEAN`, and of those after the last, are without meaning.
    """
    _sum_clean(
        *(image, variance, stride, starts, weights_x, weights_y, kinds, links, lanes, taps),
        *(values, noises),
    )
