"""Objects above a matched filter's threshold: sep, applied only to where there is something.

The filter is most of the work, and most of an image is empty sky. Where the threshold is passed at
all is found first, with the same filter as a product of two profiles, which is several times
faster. What is around these places is put together on an atlas, which is usually a tenth of the
image, and sep extracts and deblends on that. The wings of bright objects give many false ones;
since this depends on the distances of objects on the image, they are removed afterwards.

References
----------
.. [1] Bertin & Arnouts 1996, A&AS 117, 393, section 5 (deblending) and 6 (cleaning).
.. [2] Barbary 2016, JOSS 1, 58 (sep).
.. [3] He, Chao & Suzuki 2008, IEEE Trans. Image Process. 17, 749 (labelling of runs).
"""

import math
from typing import NamedTuple

import numpy as np
import sep
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.errors import CcdFailure, Reason
from coaddflow.image.row_blocks import over_rows
from coaddflow.settings.detection import DetectionSettings

_FIRST_PIXEL_STACK = 300_000
_FIRST_SUB_OBJECTS, _MOST_SUB_OBJECTS = 1024, 65536

_SLACK = 0.999
"""Places are looked for with a threshold that is lower by more than rounding errors."""

_CLEAN_ZONE = 10.0
"""Wings reach to so many times the sum of the sizes of two objects."""


class Found(NamedTuple):
    """Objects, and the pixels that belong to them.

    Attributes
    ----------
    objects : ndarray, shape (n,)
        Columns of `sep.extract`.
    y, x : ndarray of int32, shape (n pixels,)
        All pixels of all objects.
    index : ndarray of int32, shape (n pixels,)
        Object that each belongs to.
    """

    objects: NDArray
    y: NDArray[np.int32]
    x: NDArray[np.int32]
    index: NDArray[np.int32]


def find_objects(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    profile: NDArray[np.float64],
    threshold: float,
    settings: DetectionSettings,
    threads: int = 1,
) -> Found:
    """Find the objects of an image without its sky [1]_ [2]_.

    Parameters
    ----------
    image, variance : ndarray of float32, shape (ny, nx)
        Finite everywhere; pixels without variance are left out.
    profile : ndarray of float64, shape (2 half + 1,)
        The filter is the product of this profile along rows and columns.
    threshold : float
        Least signal-to-noise of the filtered pixels.
    settings : DetectionSettings
        Number of pixels, and deblending.
    threads : int
        Number of threads that share the rows, where places above the threshold are looked for.

    Raises
    ------
    CcdFailure
        See `extract`.
    """
    image, variance = np.ascontiguousarray(image), np.ascontiguousarray(variance)
    profile = profile / profile.sum()
    kernel = np.outer(profile, profile)
    runs, row_start = _all_runs_above(image, variance, profile, _SLACK * threshold, threads)
    groups = _groups_of(runs, row_start, settings.min_pixels)
    parts, n = [], 0
    for atlas in _atlases(groups, len(profile) // 2, image.shape):
        found, segments = extract(
            atlas.cut(image),
            threshold,
            var=atlas.cut(variance),
            minarea=settings.min_pixels,
            filter_kernel=kernel,
            filter_type="matched",
            deblend_nthresh=settings.deblend_levels,
            deblend_cont=settings.deblend_contrast,
            clean=False,
            segmentation_map=True,
        )
        part = _on_image(Found(found, *_pixels_of(segments)), atlas, groups)
        parts.append(part._replace(index=part.index + np.int32(n)))
        n += len(part.objects)
    found = Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    alone = _stand_alone(image, variance, found, kernel, threshold, settings.min_pixels)
    return _subset(found, alone)


def extract(image: NDArray[np.float32], threshold: float, **options):
    """Run `sep.extract`, with larger buffers where the field is crowded.

    Raises
    ------
    CcdFailure
        ``detection_failed`` if the largest buffers are too small, or pixels so bright that the
        position of a source is not finite.
    """
    stack, sub_objects = _FIRST_PIXEL_STACK, _FIRST_SUB_OBJECTS
    while True:
        sep.set_extract_pixstack(min(stack, image.size + 1))
        sep.set_sub_object_limit(sub_objects)
        try:
            found = sep.extract(image, threshold, **options)
            break
        except Exception as error:
            if type(error) is not Exception:  # which is what sep raises where it gives up
                raise
            if "pixel buffer full" in str(error) and stack <= image.size:
                stack *= 4
            elif "deblending overflow" in str(error) and sub_objects < _MOST_SUB_OBJECTS:
                sub_objects *= 4
            else:
                reason = f"source extraction failed: {error}"
                raise CcdFailure(Reason.DETECTION_FAILED, reason) from error
    sources = found[0] if isinstance(found, tuple) else found
    if not all(np.isfinite(sources[name]).all() for name in ("x", "y")):
        raise CcdFailure(
            Reason.DETECTION_FAILED,
            "sources have no finite position: pixels are near the largest float",
        )
    return found


class _Groups(NamedTuple):
    """Groups of connected pixels.

    ``runs``, shape (4, n runs), are the pixels: row, first and last column, and group, in the order
    of the image, and ``row_start`` the runs at which rows begin. ``box``, shape (n groups, 4), has
    first row and column, and numbers of rows and columns, of each group.
    """

    runs: NDArray[np.int32]
    row_start: NDArray[np.int64]
    box: NDArray[np.int64]


class _Atlas(NamedTuple):
    """Parts of an image side by side.

    ``group`` says around which groups they are cut out, ``box`` what is cut out, which may reach
    over the border, and ``corner`` are their places.
    """

    group: NDArray[np.int64]
    box: NDArray[np.int64]
    corner: NDArray[np.int64]
    shape: tuple[int, int]

    def cut(self, plane: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the parts of a plane: 0 where nothing is cut out, or beyond the border."""
        pixels = np.zeros(self.shape, np.float32)
        _cut(plane, self.box, self.corner, pixels)
        return pixels

    def part_at(self, y: NDArray, x: NDArray) -> NDArray[np.int32]:
        """Return the part that stands at places of the atlas."""
        parts = np.full(self.shape, -1, np.int32)
        _number(self.box, self.corner, parts)
        return parts[y, x]


def _all_runs_above(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    profile: NDArray[np.float64],
    threshold: float,
    threads: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the runs of pixels whose filtered signal-to-noise is above a threshold.

    They have row, first and last column, and room for a number, shape (4, n); the second array
    says with which of them each row begins, shape (ny + 1,).
    """
    profile = profile.astype(np.float32)

    def work(first: int, last: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return _runs_above(image, variance, profile, threshold, first, last)

    parts = over_rows(work, len(image), threads)
    runs, numbers = zip(*parts, strict=True)
    row_start = np.zeros(len(image) + 1, np.int64)
    np.cumsum(np.concatenate(numbers), out=row_start[1:])
    return np.hstack(runs), row_start


def _groups_of(runs: NDArray[np.int32], row_start: NDArray[np.int64], min_pixels: int) -> _Groups:
    """Return the groups of enough connected pixels."""
    box, size = _connect(runs, row_start)
    large = size >= min_pixels
    runs[3] = np.where(large, np.cumsum(large) - 1, -1)[runs[3]]
    return _Groups(runs, row_start, box[large])


def _atlases(groups: _Groups, half: int, shape: tuple[int, int]) -> list[_Atlas]:
    """Lay out the groups: one atlas for all that do not touch the border, one for each that does.

    If that is not less than the image, the image is the only one, as one part around all groups.
    """
    # filtered pixels beside a group must be right as well, or they might join it
    first = groups.box[:, :2] - 2 * half
    last = groups.box[:, :2] + groups.box[:, 2:] + 2 * half
    box = np.hstack([first, last - first])
    touches = (groups.box[:, :2] == 0) | (groups.box[:, :2] + groups.box[:, 2:] == shape)
    inner = np.flatnonzero(~touches.any(axis=1))
    corner, size = _shelves(box[inner], shape[1])
    atlases = [_Atlas(inner, box[inner], corner, size)]
    # beyond the border nothing can be found: there the part must end
    first, last = np.maximum(first, 0), np.minimum(last, shape)
    box = np.hstack([first, last - first])
    for i in np.flatnonzero(touches.any(axis=1)):
        atlases.append(_Atlas(np.array([i]), box[[i]], np.zeros((1, 2), int), tuple(box[i, 2:])))
    if sum(ny * nx for *_, (ny, nx) in atlases) < shape[0] * shape[1]:
        return atlases
    groups.runs[3] = np.minimum(groups.runs[3], 0)
    return [_Atlas(np.array([0]), np.array([[0, 0, *shape]]), np.zeros((1, 2), int), shape)]


def _shelves(box: NDArray[np.int64], width: int) -> tuple[NDArray[np.int64], tuple[int, int]]:
    """Return where boxes stand if they are put side by side, the highest first, and the shape."""
    corner = np.zeros((len(box), 2), np.int64)
    width = int(max(width, box[:, 3].max(initial=1)))
    row = column = height = 0
    for i in np.argsort(-box[:, 2], kind="stable"):
        if column + box[i, 3] > width:
            row, column, height = row + height, 0, 0
        height = max(height, int(box[i, 2]))
        corner[i] = row, column
        column += int(box[i, 3])
    return corner, (max(row + height, 1), width)


def _pixels_of(segments: NDArray[np.int32]) -> tuple[NDArray, NDArray, NDArray]:
    """Return row, column and object of all pixels that belong to an object."""
    y, x = np.nonzero(segments)
    return y.astype(np.int32), x.astype(np.int32), segments[y, x] - np.int32(1)


def _on_image(found: Found, atlas: _Atlas, groups: _Groups) -> Found:
    """Return what was found on an atlas, with its places on the image.

    What belongs to another group, of which a part was cut out too, is left out, and what sep finds
    beside the parts or, in parts that reach beyond the image, outside.
    """
    part = atlas.part_at(found.objects["ycpeak"], found.objects["xcpeak"])
    found = _subset(found, part >= 0)
    objects, part = found.objects.copy(), part[part >= 0]
    dy, dx = (atlas.box[part, :2] - atlas.corner[part]).T
    for shift, axis in ((dy, "y"), (dx, "x")):
        for name in (axis, f"{axis}min", f"{axis}max", f"{axis}peak", f"{axis}cpeak"):
            objects[name] += shift
    y = found.y + dy.astype(np.int32)[found.index]
    x = found.x + dx.astype(np.int32)[found.index]
    own = _group_at(groups.runs, groups.row_start, objects["ycpeak"], objects["xcpeak"])
    return _subset(Found(objects, y, x, found.index), own == atlas.group[part])


def _subset(found: Found, keep: NDArray[np.bool_]) -> Found:
    """Return some of the objects, with their pixels."""
    index = np.where(keep, np.cumsum(keep) - 1, -1).astype(np.int32)[found.index]
    inside = index >= 0
    return Found(found.objects[keep], found.y[inside], found.x[inside], index[inside])


def _stand_alone(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    found: Found,
    kernel: NDArray[np.float64],
    threshold: float,
    min_pixels: int,
) -> NDArray[np.bool_]:
    """Return which objects would be found without the wings of brighter ones [1]_.

    The wings are those of a Moffat profile of exponent 1 with the flux, shape and threshold of the
    object. An object is in them where its `min_pixels`-th brightest pixel is not above them.
    """
    objects, n = found.objects, len(found.objects)
    limit, peak, a = (objects[name].astype(float) for name in ("thresh", "peak", "a"))
    bright = image[found.y, found.x] > (0.5 * (limit + peak))[found.index]
    n_bright = np.bincount(found.index, bright, n)
    area = math.pi * a * objects["b"]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 2.0 * limit / (limit + peak)
        fewer = np.where(n_bright < objects["tnpix"], n_bright - objects["tnpix"], -1.0)
        filled = np.minimum(fewer / (2.0 * np.log(np.where(ratio < 1.0, ratio, 0.99)) * area), 1.0)
        amplitude = objects["cflux"] / (2.0 * area * np.where(ratio > 0.0, filled, 1.0))
        slope = (amplitude / limit - 1.0) * area / objects["npix"]
    height = _heights(image, variance, found.y, found.x, kernel, threshold)
    order = np.lexsort((-height, found.index))
    first = np.searchsorted(found.index[order], np.arange(n))
    contrast = height[order[first + min_pixels - 1]]
    brightest_first = np.argsort(-objects["cflux"], kind="stable")
    columns = (objects[name].astype(float) for name in ("x", "y", "cxx", "cyy", "cxy"))
    return _survivors(brightest_first, *columns, a, amplitude, slope, contrast)


@njit(nogil=True, error_model="numpy")
def _survivors(order, x, y, cxx, cyy, cxy, a, amplitude, slope, contrast):
    """Return which objects are not in the wings of a brighter one that survives."""
    survives = np.ones(len(order), np.bool_)
    for first in range(len(order)):
        i = order[first]
        if not survives[i]:
            continue
        for second in range(first + 1, len(order)):
            j = order[second]
            dx, dy = x[j] - x[i], y[j] - y[i]
            reach = _CLEAN_ZONE * (a[i] + a[j])
            if not survives[j] or dx * dx + dy * dy > reach * reach:
                continue
            fall = 1.0 + slope[i] * (cxx[i] * dx * dx + cyy[i] * dy * dy + cxy[i] * dx * dy)
            if fall > 1.0 and amplitude[i] / fall > contrast[j]:
                survives[j] = False
    return survives


@njit(nogil=True)
def _heights(image, variance, y, x, kernel, threshold):
    ny, nx = image.shape
    half = len(kernel) // 2
    height = np.empty(len(y))
    for i in range(len(y)):
        total = 0.0
        for j in range(max(-half, -y[i]), min(half, ny - 1 - y[i]) + 1):
            for k in range(max(-half, -x[i]), min(half, nx - 1 - x[i]) + 1):
                total += kernel[j + half, k + half] * image[y[i] + j, x[i] + k]
        height[i] = total - threshold * math.sqrt(variance[y[i], x[i]])
    return height


@njit(nogil=True)
def _runs_above(image, variance, profile, threshold, first, last):
    """Return the runs of some rows (see `_all_runs_above`), and how many each row has."""
    ny, nx = image.shape
    size, half = len(profile), len(profile) // 2
    signals = np.zeros((size, nx), np.float32)  # the rows around, divided by the variance
    weights = np.zeros((size, nx), np.float32)
    signal, weight = np.zeros(nx + 2 * half, np.float32), np.zeros(nx + 2 * half, np.float32)
    total, total_weight = np.empty(nx, np.float32), np.empty(nx, np.float32)
    above = np.zeros(nx // 8 * 8 + 8, np.uint8)
    runs, n = np.empty((4, 4096), np.int32), 0
    number = np.zeros(last - first, np.int64)
    limit = np.float32(threshold * threshold)
    for ahead in range(max(first - half, 0), last + half):
        place = ahead % size
        if ahead < ny:
            _divided(image[ahead], variance[ahead], signals[place], weights[place])
        else:
            signals[place], weights[place] = np.float32(0), np.float32(0)
        y = ahead - half
        if y < first:
            continue
        inner, inner_weight = signal[half : half + nx], weight[half : half + nx]
        inner[:], inner_weight[:] = np.float32(0), np.float32(0)
        for t in range(size):
            _add(inner, signals[(y + t - half) % size], profile[t])
            _add(inner_weight, weights[(y + t - half) % size], profile[t] * profile[t])
        total[:], total_weight[:] = np.float32(0), np.float32(0)
        for t in range(size):
            _add(total, signal[t : t + nx], profile[t])
            _add(total_weight, weight[t : t + nx], profile[t] * profile[t])
        any_above = 0
        for x in range(nx):
            above[x] = (total[x] > 0) & (total[x] * total[x] > limit * total_weight[x])
            any_above |= above[x]
        if any_above:
            before = n
            runs, n = _append_runs(above, y, runs, n)
            number[y - first] = n - before
    return runs[:, :n].copy(), number


@njit(nogil=True, error_model="numpy")
def _divided(image, variance, signal, weight):
    """Write image / variance and 1 / variance of a row; 0 where there is no variance."""
    for x in range(len(image)):
        weight[x] = np.float32(1) / variance[x] if variance[x] != 0 else np.float32(0)
        signal[x] = image[x] * weight[x]


@njit(nogil=True)
def _add(total, row, factor):
    for x in range(len(total)):
        total[x] += factor * row[x]


@njit(nogil=True)
def _append_runs(above, y, runs, n):
    """Append the runs of a row to those that are known, for which more room may be needed.

    The row is as long as whole words, and ends with a pixel that is not above.
    """
    start = -1
    for word, eight in enumerate(above.view(np.uint64)):
        if eight == 0 and start < 0:
            continue
        for x in range(8 * word, 8 * word + 8):
            if above[x] and start < 0:
                start = x
            elif start >= 0 and not above[x]:
                if n == runs.shape[1]:
                    longer = np.empty((4, 2 * n), np.int32)
                    longer[:, :n] = runs
                    runs = longer
                runs[0, n], runs[1, n], runs[2, n] = y, start, x - 1
                start = -1
                n += 1
    return runs, n


@njit(nogil=True)
def _connect(runs, row_start):
    """Write the group of each run, of those that touch, also over corners, to the fourth row [3]_.

    Returned are the boxes of the groups (first row and column, number of rows and columns), shape
    (n groups, 4), and their numbers of pixels.
    """
    n = runs.shape[1]
    parent = np.arange(n)
    for y in range(1, len(row_start) - 1):
        before = row_start[y - 1]
        for i in range(row_start[y], row_start[y + 1]):
            while before < row_start[y] and runs[2, before] + 1 < runs[1, i]:
                before += 1
            touching = before
            while touching < row_start[y] and runs[1, touching] <= runs[2, i] + 1:
                one, other = _root(parent, i), _root(parent, touching)
                parent[max(one, other)] = min(one, other)
                touching += 1
    count = 0
    for i in range(n):  # a root comes before what hangs on it
        root = _root(parent, i)
        if root == i:
            runs[3, i] = count
            count += 1
        else:
            runs[3, i] = runs[3, root]
    box, size = np.zeros((count, 4), np.int64), np.zeros(count, np.int64)
    for i in range(n):
        y, start, end, group = runs[0, i], runs[1, i], runs[2, i], runs[3, i]
        if size[group] == 0:
            box[group, 0], box[group, 1], box[group, 3] = y, start, end
        size[group] += end - start + 1
        box[group, 1] = min(box[group, 1], start)
        box[group, 2] = y - box[group, 0] + 1
        box[group, 3] = max(box[group, 3], end)
    box[:, 3] -= box[:, 1] - 1
    return box, size


@njit(nogil=True)
def _root(parent, i):
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(nogil=True)
def _group_at(runs, row_start, y, x):
    """Return the group of each pixel, -1 where there is none, or outside of the image."""
    group = np.full(len(y), -1)
    for i in range(len(y)):
        if not 0 <= y[i] < len(row_start) - 1:
            continue
        for run in range(row_start[y[i]], row_start[y[i] + 1]):
            if runs[1, run] <= x[i] <= runs[2, run]:
                group[i] = runs[3, run]
    return group


@njit(nogil=True)
def _cut(plane, box, corner, atlas):
    ny, nx = plane.shape
    for i in range(len(box)):
        y0, x0 = box[i, 0], box[i, 1]
        start, end = max(0, -x0), min(box[i, 3], nx - x0)
        for j in range(max(0, -y0), min(box[i, 2], ny - y0)):
            row = atlas[corner[i, 0] + j]
            for k in range(start, end):
                row[corner[i, 1] + k] = plane[y0 + j, x0 + k]


@njit(nogil=True)
def _number(box, corner, parts):
    for i in range(len(box)):
        y, x = corner[i]
        parts[y : y + box[i, 2], x : x + box[i, 3]] = i
