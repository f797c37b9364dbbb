"""Pixels that stand out by their Laplacian: candidates for cosmic rays.

The method is L.A.Cosmic [1]_ as astroscrappy computes it [2]_ (separable medians, a given variance,
no saturation level, cleaning by masked medians), and the pixels found are the same ones, whatever
the options: single precision, the order of each sum and the treatment of the rims are kept. What
is not kept is the way: rows are streamed through a few rows of buffers, medians are networks of
minima and maxima on vectors, the fine structure is looked at only where the Laplacian is high, and
later iterations only look where pixels were cleaned.

References
----------
.. [1] van Dokkum 2001, PASP 113, 1420.
.. [2] McCully et al. 2018, astropy/astroscrappy, doi:10.5281/zenodo.1482019 (version 1.3).
"""

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.image.medians import middle_values
from coaddflow.image.row_blocks import over_rows

SMALLEST = 5
"""Least number of rows and columns; astroscrappy writes beyond smaller images, or never ends."""

_LOW, _HIGH, _CORE = 1, 2, 4
"""Bits of a pixel: above the lower and the higher limit, and sharp enough for a cosmic ray."""

_RIM = 3
"""Pixels along the borders that are never found: no median is taken there."""

_REACH = 6
"""Pixels from which a changed value can change the bits of another pixel: two medians of 7."""

_BLOCK = 16
"""Rows of the boxes around cleaned pixels."""

_LEAST_VARIANCE, _LEAST_STRUCTURE = np.float32(1e-5), np.float32(0.01)


def laplacian_outliers(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    ignored: NDArray[np.bool_],
    sigma: float,
    neighbour_fraction: float,
    contrast: float,
    iterations: int = 1,
    threads: int = 1,
) -> NDArray[np.bool_]:
    """Return the pixels whose Laplacian stands out as that of a cosmic ray does [1]_ [2]_.

    Parameters
    ----------
    image, variance : ndarray of float32, shape (ny, nx)
        Counts or electrons with their sky, and their variance. All are finite; a NaN would make
        the pixels around it undefined.
    ignored : ndarray of bool, shape (ny, nx)
        Pixels that are not found, nor used to clean others; those around them are not found either.
    sigma : float
        Least Laplacian of a cosmic ray, after its median is taken off, in units of the noise.
    neighbour_fraction : float
        Fraction of ``sigma`` that suffices next to a cosmic ray.
    contrast : float
        Least ratio of that Laplacian to the fine structure.
    iterations : int
        Each one after the first looks at an image in which what was found is replaced by the median
        of the pixels around.
    threads : int
        Number of threads that share the rows of the first iteration.

    Returns
    -------
    ndarray of bool, shape (ny, nx)
        Never set within 3 pixels of the border.

    Raises
    ------
    ValueError
        If there are fewer than 5 rows or columns.
    """
    if min(image.shape) < SMALLEST:
        raise ValueError(f"an image of shape {image.shape} is too small to be searched")
    high, contrast = np.float32(sigma), np.float32(contrast)
    limits = np.array([np.float32(neighbour_fraction) * high, high, contrast], np.float32)
    image, variance = (np.ascontiguousarray(plane, np.float32) for plane in (image, variance))
    masked = _grown(np.ascontiguousarray(ignored, bool))
    bits = np.zeros(image.shape, np.uint8)
    found = np.zeros(image.shape, bool)
    ny, nx = image.shape

    def search(first: int, last: int) -> None:
        rows = _RIM + first, _RIM + last
        _search(image, variance, masked, limits, bits, *rows, _RIM, nx - _RIM)

    if min(ny, nx) > 2 * _RIM:
        over_rows(search, ny - 2 * _RIM, threads)
    y, x = _grow(bits, found)
    if iterations == 1 or not len(y):
        return found
    level_of_image, _ = middle_values(image, masked)
    level_of_variance, _ = middle_values(variance, masked)
    image, variance = image.copy(), variance.copy()
    for _ in range(iterations - 1):
        _clean(image, found, masked, y, x, level_of_image)
        _clean(variance, found, masked, y, x, level_of_variance)
        for box in _boxes_around(y, x, ny, nx):
            _search(image, variance, masked, limits, bits, *box)
        y, x = _grow(bits, found)
        if not len(y):
            break
    return found


@njit(error_model="numpy", nogil=True)
def _search(image, variance, masked, limits, bits, y0, y1, x0, x1):
    """Set the bits of a box that has none of the rim.

    Its rows come one after the other. What the medians of 7 rows need of the noise, the Laplacian
    over it, and the medians along the rows of both is kept in rings of 7 rows; medians along
    columns do not care in which order they are.
    """
    left, right = x0 - 3, x1 + 3
    nx = right - left
    variance_rows = np.empty((7, nx), np.float32)
    noise = np.empty((7, nx), np.float32)
    signal = np.empty((7, nx), np.float32)
    signal_rows = np.empty((7, x1 - x0), np.float32)
    work = np.empty((32, 16), np.float32)
    for y in range(max(y0 - 6, 0), y0):
        _variance_row(variance, y, left, right, variance_rows[y % 7])
    for y in range(y0 - 3, y1 + 3):
        if y + 3 < len(image):
            _variance_row(variance, y + 3, left, right, variance_rows[(y + 3) % 7])
        _noise_row(variance, variance_rows, y, left, right, noise[y % 7])
        _laplacian_row(image, y, left, right, signal[y % 7])
        _divide_by_noise(signal[y % 7], noise[y % 7])
        _medians_7(signal[y % 7], signal_rows[y % 7])
        center = y - 3
        if center >= y0:
            row = signal[center % 7][3:-3]
            out = bits[center, x0:x1]
            _compare(row, signal_rows, masked[center, x0:x1], limits, out)
            for x in range(x0, x1):
                if out[x - x0] & _HIGH:
                    value = row[x - x0] - _median_of_column(signal_rows, x - x0)
                    structure = _fine_structure(image, center, x, work)
                    structure /= noise[center % 7, x - left]
                    if value / max(structure, _LEAST_STRUCTURE) > limits[2]:
                        out[x - x0] |= _CORE


@njit(error_model="numpy", nogil=True)
def _variance_row(variance, y, left, right, out):
    """Medians of 7 pixels along a row; the rim, where there is none, is not set."""
    start, end = max(left, _RIM), min(right, variance.shape[1] - _RIM)
    _medians_7(variance[y, start - 3 : end + 3], out[start - left : end - left])


@njit(error_model="numpy", nogil=True)
def _noise_row(variance, rows, y, left, right, out):
    """Root of the medians along columns of the medians along rows; of the variance in the rim."""
    ny, nx = variance.shape
    source = variance[y, left:right]
    for i in range(len(out)):
        out[i] = source[i]
    if _RIM <= y < ny - _RIM:
        start, end = max(left, _RIM) - left, min(right, nx - _RIM) - left
        _medians_of_columns(rows[:, start:end], out[start:end])
    for i in range(len(out)):
        out[i] = np.sqrt(out[i] if out[i] > _LEAST_VARIANCE else _LEAST_VARIANCE)


@njit(error_model="numpy", nogil=True)
def _divide_by_noise(signal, noise):
    for i in range(len(signal)):
        signal[i] /= np.float32(2) * noise[i]


@njit(error_model="numpy", nogil=True)
def _compare(row, rows, masked, limits, out):
    """Compare with both limits what is above the median."""
    a, b, c, d, e, f, g = rows
    low, high = limits[0], limits[1]
    for i in range(len(out)):
        value = row[i] - _median_7(a[i], b[i], c[i], d[i], e[i], f[i], g[i])
        bit = np.uint8(value > low) | np.uint8(np.uint8(value > high) << 1)
        out[i] = np.uint8(0) if masked[i] else bit


# --- Laplacian --------------------------------------------------------------------------------


@njit(error_model="numpy", nogil=True)
def _laplacian_row(image, y, left, right, out):
    """Positive Laplacian of the image with each pixel divided into four, as their mean.

    Of the neighbours of a quarter, two are of the same pixel. Sums are in the order right, left,
    below, above, each rounded to single precision.
    """
    ny, nx = image.shape
    start, end = max(left, 1), min(right, nx - 1)
    if y == 0 or y == ny - 1:
        start = end = left
    else:
        n = end - start
        center, above, below = image[y, start:end], image[y - 1, start:end], image[y + 1, start:end]
        before, after = image[y, start - 1 : end - 1], image[y, start + 1 : end + 1]
        target = out[start - left : end - left]
        for i in range(n):
            c, u, d, b, a = center[i], above[i], below[i], before[i], after[i]
            four = np.float32(4) * c
            to_left, to_right = four - c - b, four - a - c
            total = _positive(to_left - c - u) + _positive(to_left - d - c)
            total = total + _positive(to_right - d - c)
            total = total + _positive(to_right - c - u)
            target[i] = total * np.float32(0.25)
    for x in range(left, start):
        out[x - left] = _laplacian_at_border(image, y, x)
    for x in range(max(start, end), right):
        out[x - left] = _laplacian_at_border(image, y, x)


@njit(error_model="numpy", nogil=True)
def _positive(value):
    return value if value > np.float32(0) else np.float32(0)


@njit(error_model="numpy", nogil=True)
def _laplacian_at_border(image, y, x):
    """Return what `_laplacian_row` does, where neighbours beyond the border count as zero.

    In the first row of quarters sums are in double precision, and rounded once.
    """
    ny, nx = image.shape
    c = image[y, x]
    total = np.float32(0)
    for below, after in ((0, 0), (1, 0), (1, 1), (0, 1)):
        exact = 4.0 * np.float64(c)
        rounded = np.float32(exact)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            v = y + ((below + dy) >> 1)
            u = x + ((after + dx) >> 1)
            if 0 <= v < ny and 0 <= u < nx:
                exact -= np.float64(image[v, u])
                rounded -= image[v, u]
        first = y == 0 and below == 0
        total += _positive(np.float32(exact) if first else rounded)
    return total * np.float32(0.25)


# --- medians ----------------------------------------------------------------------------------


@njit(error_model="numpy", nogil=True)
def _low(a, b):
    return a if a < b else b


@njit(error_model="numpy", nogil=True)
def _high(a, b):
    return b if a < b else a


@njit(error_model="numpy", nogil=True)
def _median_3(a, b, c):
    return _high(_low(a, b), _low(_high(a, b), c))


@njit(error_model="numpy", nogil=True)
def _median_5(a, b, c, d, e):
    """Of four of five values neither the least nor the greatest is the median."""
    return _median_3(_high(_low(a, b), _low(c, d)), _low(_high(a, b), _high(c, d)), e)


@njit(error_model="numpy", nogil=True)
def _median_7(a, b, c, d, e, f, g):
    """Of five of seven values neither the least nor the greatest is the median."""
    low_1, high_1, low_2, high_2 = _low(a, b), _high(a, b), _low(c, d), _high(c, d)
    e = _low(_high(e, _low(low_1, low_2)), _high(high_1, high_2))
    return _median_5(_high(low_1, low_2), _low(high_1, high_2), e, f, g)


@njit(error_model="numpy", nogil=True)
def _median_9(a, b, c, d, e, f, g, h, i):
    """Of six of nine values neither the least nor the greatest is the median."""
    low_1, high_1, low_2, high_2 = _low(a, b), _high(a, b), _low(c, d), _high(c, d)
    low_3, high_3 = _low(e, f), _high(e, f)
    low_1, middle_1 = _low(low_1, low_2), _high(low_1, low_2)
    middle_3 = _high(low_1, low_3)
    high_1, middle_2 = _high(high_1, high_2), _low(high_1, high_2)
    middle_4 = _low(high_1, high_3)
    return _median_7(middle_1, middle_2, middle_3, middle_4, g, h, i)


@njit(error_model="numpy", nogil=True)
def _medians_7(row, out):
    """Medians of 7 values; ``row`` has 6 more than ``out``."""
    n = len(out)
    a, b, c, d = row[:n], row[1 : n + 1], row[2 : n + 2], row[3 : n + 3]
    e, f, g = row[4 : n + 4], row[5 : n + 5], row[6 : n + 6]
    for i in range(n):
        out[i] = _median_7(a[i], b[i], c[i], d[i], e[i], f[i], g[i])


@njit(error_model="numpy", nogil=True)
def _medians_of_columns(rows, out):
    a, b, c, d, e, f, g = rows
    for i in range(len(out)):
        out[i] = _median_7(a[i], b[i], c[i], d[i], e[i], f[i], g[i])


@njit(error_model="numpy", nogil=True)
def _median_of_column(rows, i):
    a, b, c, d, e, f, g = rows
    return _median_7(a[i], b[i], c[i], d[i], e[i], f[i], g[i])


@njit(error_model="numpy", nogil=True)
def _fine_structure(image, y, x, work):
    """Return the median of 5 x 5 pixels less the median of 9 x 9 of such medians, at a pixel.

    Both are separable. In their rims, of 2 and 4 pixels, the value itself is the median.
    """
    ny, nx = image.shape
    if not (4 <= y < ny - 4 and 4 <= x < nx - 4):
        return np.float32(0)
    rows, small, medians = work[:13, :9], work[13:22, :9], work[22, :9]
    for j in range(max(y - 6, 0) - (y - 6), min(y + 7, ny) - (y - 6)):
        line = image[y - 6 + j]
        for i in range(max(x - 4, 2) - (x - 4), min(x + 5, nx - 2) - (x - 4)):
            u = x - 4 + i
            rows[j, i] = _median_5(line[u - 2], line[u - 1], line[u], line[u + 1], line[u + 2])
    for j in range(9):
        v = y - 4 + j
        for i in range(9):
            u = x - 4 + i
            if 2 <= v < ny - 2 and 2 <= u < nx - 2:
                small[j, i] = _median_5(
                    rows[j, i], rows[j + 1, i], rows[j + 2, i], rows[j + 3, i], rows[j + 4, i]
                )
            else:
                small[j, i] = image[v, u]
        a, b, c = small[j, 0], small[j, 1], small[j, 2]
        d, e, f = small[j, 3], small[j, 4], small[j, 5]
        medians[j] = _median_9(a, b, c, d, e, f, small[j, 6], small[j, 7], small[j, 8])
    a, b, c, d, e, f, g, h, i = medians[:9]
    return small[4, 4] - _median_9(a, b, c, d, e, f, g, h, i)


# --- growth and cleaning ----------------------------------------------------------------------


@njit(nogil=True)
def _grown(ignored):
    """Grow by a pixel, not in the rim of one pixel."""
    ny, nx = ignored.shape
    grown = ignored.copy()
    line = np.empty(nx, np.bool_)
    for y in range(1, ny - 1):
        above, center, below = ignored[y - 1], ignored[y], ignored[y + 1]
        for x in range(nx):
            line[x] = above[x] | center[x] | below[x]
        for x in range(1, nx - 1):
            grown[y, x] = line[x - 1] | line[x] | line[x + 1]
    return grown


@njit(nogil=True)
def _grow(bits, found):
    """Add cosmic rays and their neighbours; return where they were not found before.

    Neighbours above the higher limit are part of a cosmic ray, and so are those of both that are
    above the lower one. The rim has no bits.
    """
    ny, nx = bits.shape
    new_y, new_x, n = np.empty(1024, np.int64), np.empty(1024, np.int64), 0
    for y in range(_RIM, ny - _RIM):
        union = np.uint8(0)
        for x in range(nx):
            union |= bits[y, x]
        for x in range(_RIM, nx - _RIM if union & _CORE else 0):
            if not bits[y, x] & _CORE:
                continue
            for k in range(81):
                v, u = y + k // 27 - 1, x + k // 9 % 3 - 1
                t, s = v + k // 3 % 3 - 1, u + k % 3 - 1
                if bits[v, u] & _HIGH and bits[t, s] & _LOW and not found[t, s]:
                    if n == len(new_y):
                        new_y = np.append(new_y, np.empty_like(new_y))
                        new_x = np.append(new_x, np.empty_like(new_x))
                    found[t, s], new_y[n], new_x[n] = True, t, s
                    n += 1
    return new_y[:n], new_x[:n]


@njit(nogil=True)
def _clean(plane, found, masked, y, x, level):
    """Replace what was found by the lower median of the good ones of 5 x 5 pixels, in place.

    Only around what was newly found, at (y, x): elsewhere nothing changes.
    """
    values = np.empty(25, plane.dtype)
    for i in range(len(y)):
        for v in range(y[i] - 2, y[i] + 3):
            for u in range(x[i] - 2, x[i] + 3):
                if not found[v, u]:
                    continue
                n = 0
                for t in range(v - 2, v + 3):
                    for s in range(u - 2, u + 3):
                        if not (found[t, s] or masked[t, s]):
                            values[n] = plane[t, s]
                            n += 1
                plane[v, u] = np.sort(values[:n])[(n - 1) // 2] if n else level


@njit(nogil=True)
def _boxes_around(y, x, ny, nx):
    """Return boxes (y0, y1, x0, x1) of all pixels that cleaning around (y, x) can change."""
    reach = _REACH + 2
    n_blocks = (ny - 1) // _BLOCK + 1
    touched = np.zeros((n_blocks, nx), np.bool_)
    for i in range(len(y)):
        first, last = max(y[i] - reach, 0) // _BLOCK, min(y[i] + reach, ny - 1) // _BLOCK
        for block in range(first, last + 1):
            touched[block, max(x[i] - reach, 0) : x[i] + reach + 1] = True
    boxes = []
    for block in range(n_blocks):
        y0, y1 = max(block * _BLOCK, _RIM), min((block + 1) * _BLOCK, ny - _RIM)
        start = -1
        for u in range(_RIM, nx - _RIM + 1):
            inside = u < nx - _RIM and touched[block, u]
            if inside and start < 0:
                start = u
            elif start >= 0 and not inside:
                if y0 < y1:
                    boxes.append((y0, y1, start, u))
                start = -1
    return boxes
