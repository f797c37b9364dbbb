"""Tracts and their patches: grids of pixels on the sky.

A tract is an image in the tangent (TAN) projection about its centre, +x to the west and +y to the
north; it is cut into patches named ``"x_y"``. The inner boxes of the patches tile the tract; the
outer boxes reach ``patch_border`` pixels into the neighbours but not beyond the tract. NumPy only:
the Snakefile imports this.

References
----------
.. [1] Calabretta & Greisen 2002, A&A 395, 1077 (TAN; sections 2.2-2.4 for LONPOLE).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.geometry.box import Box

if TYPE_CHECKING:
    from astropy.wcs import WCS

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_MIN_OVERLAP_AREA = 1e-6
"""Square pixels below which two regions merely touch."""

_MAX_OUTLINES = 4096
"""Pairs of outlines and patches compared at a time: they fit into a cache."""

_REACH_MARGIN = 1e-4
"""Degrees by which circles are made larger, to be safe from rounding."""

MIN_COSINE = math.cos(math.radians(89.0))
"""Cosine of the largest angle from the tangent point; beyond it regions are cut off."""


@dataclass(frozen=True)
class Patch:
    """A part of a tract that is coadded as one image."""

    id: str
    """``"x_y"``, counted from the tract's first pixel."""
    inner_box: Box
    """Pixels that are this patch's own, half-open (x0, y0, x1, y1)."""
    outer_box: Box
    """With the border shared with the neighbours."""


@dataclass(frozen=True)
class Tract:
    """A pixel grid in the tangent projection, cut into patches."""

    id: int
    """Number in the sky map."""
    ra: float
    """RA of the tangent point, ICRS degrees."""
    dec: float
    """Dec of the tangent point, ICRS degrees."""
    reference_pixel: tuple[float, float]
    """Position of the tangent point, 0-based pixels (x, y)."""
    n_patches: tuple[int, int]
    """Patches in x and y."""
    patch_inner_size: tuple[int, int]
    """Columns and rows of the inner box of every patch."""
    patch_border: int
    """Width of the border of the outer box around the inner box, pixels."""
    pixel_scale: float
    """Arcseconds per pixel at the tangent point."""

    @property
    def width(self) -> int:
        """Pixels along x."""
        return self.n_patches[0] * self.patch_inner_size[0]

    @property
    def height(self) -> int:
        """Pixels along y."""
        return self.n_patches[1] * self.patch_inner_size[1]

    @cached_property
    def radius(self) -> float:
        """Angle from the tangent point to the farthest corner of the tract, degrees."""
        x0, y0 = self.reference_pixel
        reach_x = max(x0 + 0.5, self.width - 0.5 - x0)
        reach_y = max(y0 + 0.5, self.height - 0.5 - y0)
        return math.degrees(math.atan(math.hypot(reach_x, reach_y) * self._radians_per_pixel))

    @property
    def _radians_per_pixel(self) -> float:
        return math.radians(self.pixel_scale / 3600.0)

    def sky_to_pixel(self, ra: ArrayLike, dec: ArrayLike) -> tuple[NDArray, NDArray]:
        """Return 0-based pixel positions for ICRS degrees; NaN on the far side of the sky."""
        xi, eta = sphere.tan_project(ra, dec, self.ra, self.dec)
        pixels_per_degree = 3600.0 / self.pixel_scale
        return (
            self.reference_pixel[0] - xi * pixels_per_degree,
            self.reference_pixel[1] + eta * pixels_per_degree,
        )

    def pixel_to_sky(self, x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray]:
        """Return ICRS positions in degrees for 0-based pixel positions."""
        degrees_per_pixel = self.pixel_scale / 3600.0
        return sphere.tan_deproject(
            (self.reference_pixel[0] - np.asarray(x, dtype=float)) * degrees_per_pixel,
            (np.asarray(y, dtype=float) - self.reference_pixel[1]) * degrees_per_pixel,
            self.ra,
            self.dec,
        )

    @cached_property
    def vector_to_pixel(self) -> NDArray[np.float64]:
        """Matrix, shape (3, 3), from unit vectors to homogeneous pixel positions (x w, y w, w).

        w is the cosine of the angle from the tangent point.
        """
        ra, dec = math.radians(self.ra), math.radians(self.dec)
        east = np.array([-math.sin(ra), math.cos(ra), 0.0])
        north = np.array(
            [-math.sin(dec) * math.cos(ra), -math.sin(dec) * math.sin(ra), math.cos(dec)]
        )
        centre = sphere.to_vector(self.ra, self.dec)
        pixels_per_radian = 1.0 / self._radians_per_pixel
        x0, y0 = self.reference_pixel
        x, y = x0 * centre - pixels_per_radian * east, y0 * centre + pixels_per_radian * north
        return np.stack([x, y, centre])

    def wcs(self) -> "WCS":
        """Return the astropy WCS of the whole tract.

        LONPOLE is always given, as its default changes at the pole [1]_. For the WCS of a patch
        subtract the lower corner of its outer box from CRPIX.
        """
        from coaddflow.geometry.wcs import WcsCards, build_wcs

        crval, crpix = np.array([self.ra, self.dec]), np.array(self.reference_pixel) + 1.0
        cd = np.diag([-1.0, 1.0]) * (self.pixel_scale / 3600.0)
        return build_wcs(WcsCards("TAN", crval, crpix, cd, shape=(self.height, self.width)))

    def patch(self, patch_id: str) -> Patch:
        """Return the patch named ``"x_y"``; raise InputError if the tract has none."""
        match = re.fullmatch(r"(0|[1-9][0-9]{0,3})_(0|[1-9][0-9]{0,3})", patch_id)
        nx, ny = self.n_patches
        if match is None or int(match[1]) >= nx or int(match[2]) >= ny:
            raise InputError(
                f"tract {self.id} has no patch {patch_id!r}",
                remedy=f"patches are named 'x_y', from '0_0' to '{nx - 1}_{ny - 1}'",
            )
        return self._patch(int(match[1]), int(match[2]))

    def _patch(self, ix: int, iy: int) -> Patch:
        return _patch(ix, iy, self.n_patches, self.patch_inner_size, self.patch_border)

    def outer_spans(self, axis: int) -> NDArray[np.int64]:
        """Return the outer boxes of all patches along x (axis 0) or y (1), shape (2, n)."""
        size, n = self.patch_inner_size[axis], self.n_patches[axis]
        first = np.arange(n) * size
        end = np.minimum(first + size + self.patch_border, n * size)
        return np.stack([np.maximum(first - self.patch_border, 0), end])

    def patch_ids(self) -> tuple[str, ...]:
        """Return the names of all patches, x running fastest."""
        return _patch_ids(*self.n_patches)

    def patches(self) -> tuple[Patch, ...]:
        """Return all patches, x running fastest."""
        return _patches(self.n_patches, self.patch_inner_size, self.patch_border)

    def contains(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.bool_]:
        """Return whether positions lie on the tract's pixels."""
        x, y = self.sky_to_pixel(ra, dec)
        return (x >= -0.5) & (x < self.width - 0.5) & (y >= -0.5) & (y < self.height - 0.5)

    def find_patch(self, ra: float, dec: float) -> str | None:
        """Return the patch whose inner box holds a position; None outside the tract."""
        if not self.contains(ra, dec):
            return None
        x, y = self.sky_to_pixel(ra, dec)
        ix = int((x + 0.5) // self.patch_inner_size[0])
        iy = int((y + 0.5) // self.patch_inner_size[1])
        return f"{ix}_{iy}"

    def footprint_pixels(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.float64]:
        """Return the outline of a region in pixels, shape (m, 2).

        Parts farther than 89 degrees from the tangent point are cut off.
        """
        homogeneous = sphere.to_vector(ra, dec) @ self.vector_to_pixel.T
        homogeneous = polygon.clip_half_space(homogeneous, homogeneous[:, 2] - MIN_COSINE)
        return homogeneous[:, :2] / homogeneous[:, 2:]

    def patch_overlaps(self, ra: ArrayLike, dec: ArrayLike) -> list[tuple[str, float, float]]:
        """Return the patches that a footprint overlaps, and how much.

        Parameters
        ----------
        ra, dec : array_like, shape (n,)
            Outline in order, ICRS degrees; it may be slightly bowed.

        Returns
        -------
        list of (patch, patch_fraction, ccd_fraction)
            As `footprint_overlaps`; x running fastest. Empty if the footprint misses the tract.
        """
        found = footprint_overlaps(sphere.to_vector(ra, dec)[None], [self])
        names, rows = self.patch_ids(), zip(*(part.tolist() for part in found[2:]), strict=True)
        return [(names[patch], *fractions) for patch, *fractions in rows]


class PatchOverlaps(NamedTuple):
    """Overlaps of footprints and patches, arrays of shape (n,)."""

    footprint: IntArray
    """Index of the footprint."""
    tract: IntArray
    """Index of the tract."""
    patch: IntArray
    """Index of the patch in `Tract.patch_ids`."""
    patch_fraction: FloatArray
    """Fraction of the patch's outer box that the footprint covers, by area on the tangent plane."""
    ccd_fraction: FloatArray
    """Fraction of the footprint that is on the outer box."""


def footprint_overlaps(vectors: FloatArray, tracts: Sequence[Tract]) -> PatchOverlaps:
    """Return the patches that footprints overlap, and how much.

    Parameters
    ----------
    vectors : ndarray of float64, shape (n, n_vertices, 3)
        Vertices of the footprints in order, as unit vectors.
    tracts : sequence of Tract
        The tracts.

    Returns
    -------
    PatchOverlaps
        By footprint, tract and patch, except that footprints which reach farther than 89 degrees
        from a tangent point, where they are cut off, stand at the end.
    """
    footprint, tract = _pairs_near(vectors, tracts)
    numbers, of_number = np.unique(tract, return_inverse=True)
    matrices = np.array([tracts[number].vector_to_pixel for number in numbers]).reshape(-1, 3, 3)
    matrices = matrices[of_number][..., None]
    x, y, w = (
        sum(matrices[:, row, axis] * vectors[footprint, :, axis] for axis in range(3))
        for row in range(3)
    )
    ahead = (w >= MIN_COSINE).all(axis=1)
    points = np.stack([x, y], axis=-1)[ahead] / w[ahead, :, None]
    parts = [_overlaps_of_outlines(points, footprint[ahead], tract[ahead], tracts)]
    for index in np.flatnonzero(~ahead):
        cut = tracts[tract[index]].footprint_pixels(*sphere.from_vector(vectors[footprint[index]]))
        if len(cut) > 2:
            one = slice(index, index + 1)
            parts.append(_overlaps_of_outlines(cut[None], footprint[one], tract[one], tracts))
    return PatchOverlaps(*map(np.concatenate, zip(*parts, strict=True)))


def _pairs_near(vectors: FloatArray, tracts: Sequence[Tract]) -> tuple[IntArray, IntArray]:
    """Return the indices of footprints and of the tracts whose circles theirs touch."""
    axis, radius = polygon.bounding_cap(vectors)
    centres = sphere.to_vector([tract.ra for tract in tracts], [tract.dec for tract in tracts])
    reach = radius[:, None] + np.array([tract.radius for tract in tracts]) + _REACH_MARGIN
    cosine = axis @ centres.reshape(-1, 3).T
    return np.nonzero(cosine >= np.cos(np.radians(np.minimum(reach, 180.0))))


def _overlaps_of_outlines(
    points: FloatArray, footprint: IntArray, tract: IntArray, tracts: Sequence[Tract]
) -> PatchOverlaps:
    """Return the overlaps of outlines, shape (n, n_vertices, 2), in pixels of one tract each."""
    pair, patch, box = _outer_boxes_near(points, tract, tracts)
    covered = np.empty(len(pair))
    for start in range(0, len(pair), _MAX_OUTLINES):
        part = slice(start, start + _MAX_OUTLINES)
        covered[part] = polygon.area_in_box(points[pair[part]], tuple(box[:, part] - 0.5))
    kept = covered > _MIN_OVERLAP_AREA
    pair, (x0, y0, x1, y1), covered = pair[kept], box[:, kept], covered[kept]
    return PatchOverlaps(
        footprint[pair],
        tract[pair],
        patch[kept],
        np.minimum(covered / ((x1 - x0) * (y1 - y0)), 1.0),
        np.minimum(covered / polygon.area(points)[pair], 1.0),
    )


def _outer_boxes_near(
    points: FloatArray, tract: IntArray, tracts: Sequence[Tract]
) -> tuple[IntArray, IntArray, IntArray]:
    """Return the patches whose outer boxes overlap those around outlines in pixels of a tract.

    Returned are the index of the outline and that of the patch, shape (n,), and the outer box,
    shape (4, n): by outline, x running fastest.
    """
    size, n_patches = (
        np.array([getattr(one, name) for one in tracts], dtype=np.int64).reshape(-1, 2).T[:, tract]
        for name in ("patch_inner_size", "n_patches")
    )
    border = np.array([one.patch_border for one in tracts], dtype=np.int64)[tract]
    # an axis at a time: NumPy is slow along an axis that is not the last one
    low, high = (
        np.array([limit(points[..., axis], axis=1) for axis in (0, 1)]) + 0.5
        for limit in (np.min, np.max)
    )
    # limited before they are integers: far outside the tract they might not fit
    first = np.clip(np.floor((low - border) / size), 0, n_patches).astype(np.int64)
    end = np.clip(np.floor((high + border) / size) + 1, 0, n_patches).astype(np.int64)
    n_x, n_y = np.maximum(end - first, 0)
    outline = np.repeat(np.arange(len(points)), n_x * n_y)
    number = np.arange(len(outline)) - np.repeat(np.cumsum(n_x * n_y) - n_x * n_y, n_x * n_y)
    index = first[:, outline] + np.array([number % n_x[outline], number // n_x[outline]])
    size, n_patches, border = size[:, outline], n_patches[:, outline], border[outline]
    lower = np.maximum(index * size - border, 0)
    upper = np.minimum((index + 1) * size + border, n_patches * size)
    return outline, index[1] * n_patches[0] + index[0], np.concatenate([lower, upper])


@lru_cache(maxsize=8)
def _patches(
    n_patches: tuple[int, int], inner_size: tuple[int, int], border: int
) -> tuple[Patch, ...]:
    """Return the patches of all tracts that are cut in the same way."""
    nx, ny = n_patches
    return tuple(
        _patch(ix, iy, n_patches, inner_size, border) for iy in range(ny) for ix in range(nx)
    )


def _patch(
    ix: int, iy: int, n_patches: tuple[int, int], inner_size: tuple[int, int], border: int
) -> Patch:
    (nx, ny), (width, height) = n_patches, inner_size

    def box(border: int) -> Box:
        """Return the inner box with a border around it, cut at the tract's edge."""
        return (
            max(ix * width - border, 0),
            max(iy * height - border, 0),
            min((ix + 1) * width + border, nx * width),
            min((iy + 1) * height + border, ny * height),
        )

    return Patch(f"{ix}_{iy}", box(0), box(border))


@lru_cache(maxsize=8)
def _patch_ids(nx: int, ny: int) -> tuple[str, ...]:
    return tuple(f"{ix}_{iy}" for iy in range(ny) for ix in range(nx))


def patch_position(patch: str) -> tuple[int, int]:
    """Return (row, column) of a patch id "x_y": patches sort by it row by row."""
    x, y = patch.split("_")
    return int(y), int(x)
