"""Which tracts and patches an exposure can touch, predicted before anything has run.

The plan of a run follows from the exposure table and the geometry of the camera (the workflow has
no checkpoints), with a margin for errors of the headers. The true coverage is known after
astrometry and is in the corner database; a CCD outside the prediction is an error, never a silent
hole in a coadd.

The outlines of all exposures near a tract (`coaddflow.instrument.footprint`) are compared with all
its patches at once, by separating axes [1]_. NumPy only: the Snakefile imports this.

References
----------
.. [1] Gottschalk, Lin & Manocha 1996, Proc. SIGGRAPH '96, 171 (separating axis test).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coaddflow.geometry import polygon, sphere
from coaddflow.instrument.footprint import Pointing, outline_vectors
from coaddflow.skymap.base import SkyMap
from coaddflow.skymap.tract import MIN_COSINE, Tract

if TYPE_CHECKING:
    from coaddflow.instrument.camera import Camera
    from coaddflow.tables.exposures import ImageRow

FloatArray = NDArray[np.float64]

Overlaps = dict[str, dict[int, list[str]]]
"""Patches, in order, that exposures can touch, by exposure id and tract."""

_EDGE_BOW = 0.01
"""Largest bow of the edge of an image between its corners, as a fraction of its size."""

_SHORTEST_SIDE = 1e-6
"""Pixels; rounding decides the direction of shorter sides of an outline."""

_MAX_CELLS = 1_000_000
"""Pairs of sides and patches compared at a time, to limit the memory."""


def predicted_overlaps(
    exposures: Iterable[Pointing], camera: "Camera", skymap: SkyMap, margin: float
) -> Overlaps:
    """Return the tracts and patches that each exposure can touch.

    Parameters
    ----------
    exposures : iterable of Pointing
        Rows of the exposure table, each exposure once.
    camera : Camera
        Positions of the CCDs.
    skymap : SkyMap
        Tracts and patches.
    margin : float
        Largest distance of a CCD from its predicted position, degrees.

    Returns
    -------
    dict of str to dict of int to list of str
        ``{exposure: {tract: [patch, ...]}}`` in the order of the exposures, of the tract numbers
        and of the patches (x running fastest); by the outer boxes. Exposures off the map have an
        empty dict.
    """
    exposures = list(exposures)
    if not exposures:
        return {}
    outlines = outline_vectors(exposures, camera, margin)
    return _overlaps([exposure.exposure for exposure in exposures], outlines[:, None], skymap)


def predicted_overlaps_of_images(
    images: Iterable["ImageRow"], skymap: SkyMap, margin: float = 0.0
) -> Overlaps:
    """Return the tracts and patches that images with a known WCS can touch.

    Parameters
    ----------
    images : iterable of ImageCorners
        Rows of the table of images, in any order.
    skymap : SkyMap
        Tracts and patches.
    margin : float
        Largest error of the WCS, degrees. As the table has only the corners, one hundredth of the
        image's size is added for edges bent by distortion.

    Returns
    -------
    dict of str to dict of int to list of str
        As `predicted_overlaps`; exposures in the order of their first image.
    """
    corners: dict[str, list[ImageRow]] = defaultdict(list)
    for image in images:
        corners[image.exposure].append(image)
    overlaps: Overlaps = {name: {} for name in corners}
    # exposures with the same number of images are computed together
    by_count = sorted(corners, key=lambda name: len(corners[name]))
    for _, names in groupby(by_count, key=lambda name: len(corners[name])):
        group = list(names)
        vectors = np.array(
            [
                [sphere.to_vector(image.footprint_ra, image.footprint_dec) for image in corners[n]]
                for n in group
            ]
        )
        overlaps |= _overlaps(group, _enlarged(vectors, margin), skymap)
    return overlaps


def _enlarged(vectors: FloatArray, margin: float) -> FloatArray:
    """Return convex outlines at least the margin (degrees) outside polygons.

    Vertices are unit vectors, shape (..., n, 3) of the polygons and (..., n_sides, 3) of the
    outlines.
    """
    axis, radius = polygon.bounding_cap(vectors)
    ra, dec = sphere.from_vector(axis)
    xi, eta = sphere.tan_project(*sphere.from_vector(vectors), ra[..., None], dec[..., None])
    side_xi, side_eta = np.roll(xi, -1, axis=-1) - xi, np.roll(eta, -1, axis=-1) - eta
    longest = np.argmax(np.hypot(side_xi, side_eta), axis=-1)[..., None]
    start = np.arctan2(
        np.take_along_axis(side_eta, longest, axis=-1),
        np.take_along_axis(side_xi, longest, axis=-1),
    )[..., 0]
    stretch = 1.0 / np.cos(np.radians(np.minimum(radius + margin, 80.0))) ** 2
    distance = (margin + _EDGE_BOW * radius) * stretch
    outline = polygon.enclosing_outline(xi, eta, distance, start=start)
    return sphere.to_vector(*sphere.tan_deproject(*outline, ra[..., None], dec[..., None]))


def _overlaps(names: Sequence[str], outlines: FloatArray, skymap: SkyMap) -> Overlaps:
    """Return which patches the outlines of the named exposures touch.

    ``outlines``, shape (n_exposures, n_polygons, n_vertices, 3), are convex polygons of each
    exposure as unit vectors.
    """
    near: dict[int, list[int]] = defaultdict(list)
    axis, radius = polygon.bounding_cap(outlines.reshape(len(outlines), -1, 3))
    ra, dec = sphere.from_vector(axis)
    for index, circle in enumerate(zip(ra.tolist(), dec.tolist(), radius.tolist(), strict=True)):
        for tract_id in skymap.tracts_near(*circle):
            near[tract_id].append(index)
    overlaps: Overlaps = {name: {} for name in names}
    for tract_id in sorted(near):
        tract, indices = skymap.tract(tract_id), np.array(near[tract_id])
        patches = np.array(tract.patch_ids(), dtype=object)
        for rows, touched in _touched_patches(tract, outlines, indices):
            for row, flags in zip(rows.tolist(), touched, strict=True):
                if flags.any():
                    overlaps[names[row]][tract_id] = patches[flags].tolist()
    return overlaps


def _touched_patches(
    tract: Tract, outlines: FloatArray, indices: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yield indices of exposures, and the patches (x running fastest) that they touch."""
    nx, ny = tract.n_patches
    n_polygons, n_vertices = outlines.shape[1:3]
    step = max(_MAX_CELLS // (nx * ny * n_polygons * n_vertices), 1)
    for first in range(0, len(indices), step):
        rows = indices[first : first + step]
        vectors = outlines[rows].reshape(-1, n_vertices, 3)
        touched = _boxes_touched(tract, vectors @ tract.vector_to_pixel.T)
        yield rows, touched.reshape(len(rows), n_polygons, ny * nx).any(axis=1)


def _boxes_touched(tract: Tract, homogeneous: FloatArray) -> NDArray[np.bool_]:
    """Return whether convex polygons overlap the outer boxes of a tract's patches [1]_.

    Two convex shapes are apart if, and only if, a side of one of them separates them. The
    vertices are homogeneous pixel positions, shape (n, n_vertices, 3); the result has the shape
    (n, ny, nx).
    """
    # a polygon that reaches behind the tangent plane, larger than the field of any camera, counts
    # as touching everything
    behind = (homogeneous[..., 2] <= MIN_COSINE).any(axis=-1)
    weight = np.where(behind[:, None], 1.0, homogeneous[..., 2])
    x, y = homogeneous[..., 0] / weight, homogeneous[..., 1] / weight
    (x0, x1), (y0, y1) = (tract.outer_spans(axis) - 0.5 for axis in (0, 1))
    in_x = (x.max(axis=1)[:, None] > x0) & (x.min(axis=1)[:, None] < x1)
    in_y = (y.max(axis=1)[:, None] > y0) & (y.min(axis=1)[:, None] < y1)
    touched = in_y[:, :, None] & in_x[:, None, :]
    side_x, side_y = np.roll(x, -1, axis=1) - x, np.roll(y, -1, axis=1) - y
    sense = np.sign(np.sum(x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1), axis=1))
    inward_x, inward_y = -sense[:, None] * side_y, sense[:, None] * side_x
    # the reach of a box along the inward normal of a side is the sum of a part in x and one in y
    reach_x = np.maximum(inward_x[..., None] * x0, inward_x[..., None] * x1)
    reach_y = np.maximum(inward_y[..., None] * y0, inward_y[..., None] * y1)
    edge = inward_x * x + inward_y * y
    reach = reach_y[..., :, None] + reach_x[..., None, :]
    # three sides may meet in a vertex (of a camera without a margin): one of them has no direction
    no_side = np.hypot(side_x, side_y) < _SHORTEST_SIDE
    touched &= ((reach > edge[..., None, None]) | no_side[..., None, None]).all(axis=1)
    return touched | behind[:, None, None]
