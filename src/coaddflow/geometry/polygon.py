"""Polygons in the plane and on the sphere: clipping, area, containment, enclosing outlines.

Straight lines of a tangent plane are great circles of the sky, so a footprint whose vertices are
joined by great circles is an ordinary polygon in any tangent plane, and what overlaps what can be
decided there without approximation. NumPy only.

References
----------
.. [1] Sutherland & Hodgman 1974, Commun. ACM 17, 32 (clipping against convex regions).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]

OUTLINE_SIDES = 32
"""Sides of an enclosing outline."""


def clip_half_space(points: FloatArray, distance: FloatArray) -> FloatArray:
    """Return the part of a polygon on the positive side of a plane [1]_.

    Parameters
    ----------
    points : ndarray of float64, shape (n, d)
        Vertices in order.
    distance : ndarray of float64, shape (n,)
        Signed distance of each vertex from the plane, in any unit (linear in the coordinates).

    Returns
    -------
    ndarray of float64, shape (m, d)
        Vertices in order; empty where nothing is left. A polygon that is not convex may come
        back with parts joined by coinciding edges, which have no area.
    """
    inside = distance >= 0.0
    if inside.all():
        return points
    if not inside.any():
        return points[:0]
    next_distance = np.roll(distance, -1)
    crosses = inside != (next_distance >= 0.0)
    step = np.where(crosses, distance, 0.0) / np.where(crosses, distance - next_distance, 1.0)
    crossings = points + step[:, None] * (np.roll(points, -1, axis=0) - points)
    both = np.stack([points, crossings], axis=1)
    return both[np.stack([inside, crosses], axis=1)]


def area(points: FloatArray) -> FloatArray | float:
    """Return the areas inside polygons with vertices (x, y), shape (..., n, 2), of either sense."""
    if points.shape[-2] < 3:
        return np.zeros(points.shape[:-2])[()]
    x, y = (points[..., axis] - points[..., :1, axis] for axis in (0, 1))
    return np.abs(np.sum(x * _next(y) - y * _next(x), axis=-1)) / 2.0


def area_in_box(
    points: FloatArray, box: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike]
) -> FloatArray | float:
    """Return the areas of the parts of polygons that lie inside rectangles.

    The area is the integral over x of the height of the polygon between the lower and the upper
    side of the rectangle: a sum over the edges, of which each is limited to the rectangle, so that
    no clipped polygon is made. Exact for all polygons whose edges do not cross.

    Parameters
    ----------
    points : ndarray of float64, shape (..., n, 2)
        Vertices (x, y) in order, of either sense.
    box : (x0, y0, x1, y1), each array_like, shape (...)
        The rectangles.
    """
    x0, y0, x1, y1 = (np.asarray(edge, dtype=float)[..., None] for edge in box)
    x, y, width, height = points[..., 0] - x0, points[..., 1] - y0, x1 - x0, y1 - y0
    run, rise = _next(x) - x, _next(y) - y
    slope = rise / np.where(run == 0.0, 1.0, run)
    start, end = np.clip(x, 0.0, width), np.clip(_next(x), 0.0, width)
    at_start, at_end = y + (start - x) * slope, y + (end - x) * slope
    low, high = np.clip(at_start, 0.0, height), np.clip(at_end, 0.0, height)
    # the height goes from low to high between the parts of the edge at which it reaches the sides
    step = at_end - at_start
    step = np.where(step == 0.0, 1.0, step)
    reached = np.clip(-at_start / step, 0.0, 1.0) + np.clip((height - at_start) / step, 0.0, 1.0)
    mean = low + (high - low) * (1.0 - reached / 2.0)
    # the steps add up to nothing: without the largest height a polygon above has no rounding error
    mean -= mean.max(axis=-1, keepdims=True)
    return np.abs(np.sum((end - start) * mean, axis=-1))


def _next(values: FloatArray) -> FloatArray:
    """Return the values of the vertices that follow, shape (..., n)."""
    return np.concatenate([values[..., 1:], values[..., :1]], axis=-1)


def contains(points: FloatArray, x: ArrayLike, y: ArrayLike) -> NDArray[np.bool_]:
    """Return whether positions lie inside a polygon (even-odd rule).

    Parameters
    ----------
    points : ndarray of float64, shape (n, 2)
        Vertices (x, y) in order; the polygon need not be convex.
    x, y : array_like, shape (...)
        Positions. NaN is outside.
    """
    x, y = np.asarray(x, dtype=float)[..., None], np.asarray(y, dtype=float)[..., None]
    (x0, y0), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    spans = (y0 <= y) != (y1 <= y)
    rise = np.where(y1 == y0, 1.0, y1 - y0)
    crosses = spans & (x < x0 + (y - y0) / rise * (x1 - x0))
    return np.count_nonzero(crosses, axis=-1) % 2 == 1


def enclosing_outline(
    x: FloatArray, y: FloatArray, margin: ArrayLike, start: ArrayLike = 0.0
) -> tuple[FloatArray, FloatArray]:
    """Return a convex polygon around sets of points, at least ``margin`` away from all of them.

    Each side touches the convex hull of the points, moved outwards by the margin, so the outline
    is exact for rectangles parallel to a side and a little too large for other shapes; it is
    never too small.

    Parameters
    ----------
    x, y : ndarray of float64, shape (..., n)
        The points.
    margin : float or array_like, shape (...)
        Distance, in the unit of the points.
    start : float or array_like, shape (...)
        Direction of the normal of the first side, radians.

    Returns
    -------
    x, y : ndarray of float64, shape (..., OUTLINE_SIDES)
        Vertices, anticlockwise; the directions of the sides are spaced evenly.
    """
    angle = np.asarray(start)[..., None] + 2.0 * np.pi * np.arange(OUTLINE_SIDES) / OUTLINE_SIDES
    normal_x, normal_y = np.cos(angle), np.sin(angle)
    distances = [
        np.max(normal_x[..., k, None] * x + normal_y[..., k, None] * y, axis=-1)
        for k in range(OUTLINE_SIDES)
    ]
    reach = np.stack(distances, axis=-1) + np.asarray(margin)[..., None]
    next_x, next_y = np.roll(normal_x, -1, axis=-1), np.roll(normal_y, -1, axis=-1)
    next_reach = np.roll(reach, -1, axis=-1)
    determinant = np.sin(2.0 * np.pi / OUTLINE_SIDES)
    return (
        (reach * next_y - next_reach * normal_y) / determinant,
        (next_reach * normal_x - reach * next_x) / determinant,
    )


def bounding_cap(vectors: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return circles on the sky that hold sets of directions.

    The directions are unit vectors within one hemisphere, shape (..., n, 3). Returned are centres
    (unit vectors), shape (..., 3), and radii in degrees, shape (...).
    """
    axis = vectors.mean(axis=-2)
    axis = axis / np.linalg.norm(axis, axis=-1, keepdims=True)
    half_chord = np.linalg.norm(vectors - axis[..., None, :], axis=-1).max(axis=-1) / 2.0
    return axis, np.degrees(2.0 * np.arcsin(np.minimum(half_chord, 1.0)))
