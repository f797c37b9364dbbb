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


def clip_to_box(points: FloatArray, box: tuple[float, float, float, float]) -> FloatArray:
    """Return the part of a polygon, vertices (x, y), inside a rectangle (x0, y0, x1, y1) [1]_."""
    x0, y0, x1, y1 = box
    for axis, sign, edge in ((0, 1.0, x0), (0, -1.0, x1), (1, 1.0, y0), (1, -1.0, y1)):
        points = clip_half_space(points, sign * (points[:, axis] - edge))
        if len(points) == 0:
            break
    return points


def area(points: FloatArray) -> float:
    """Return the area inside a polygon with vertices (x, y), shape (n, 2), of either sense."""
    if len(points) < 3:
        return 0.0
    x, y = (points - points[0]).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2.0)


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
