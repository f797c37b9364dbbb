"""Tracts and their patches: grids of pixels on the sky.

A tract is an image in the tangent (TAN) projection about its centre, +x to the west and +y to the
north; it is cut into patches named ``"x_y"``. The inner boxes of the patches tile the tract; the
outer boxes reach ``patch_border`` pixels into the neighbours but not beyond the tract. NumPy only:
the Snakefile imports this.

References
----------
.. [1] Calabretta & Greisen 2002, A&A 395, 1077 (TAN; sections 2.2-2.4 for LONPOLE).
.. [2] Sutherland & Hodgman 1974, Commun. ACM 17, 32 (covered fractions by clipping).
"""

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.geometry.box import Box

if TYPE_CHECKING:
    from astropy.wcs import WCS

_MIN_OVERLAP_AREA = 1e-6
"""Square pixels below which two regions merely touch."""

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
        index = int(match[1]), int(match[2])
        return Patch(patch_id, self._box(*index, 0), self._box(*index, self.patch_border))

    def _box(self, ix: int, iy: int, border: int) -> Box:
        """Return the inner box of a patch with a border around it, cut at the tract's edge."""
        (nx, ny), (width, height) = self.n_patches, self.patch_inner_size
        return (
            max(ix * width - border, 0),
            max(iy * height - border, 0),
            min((ix + 1) * width + border, nx * width),
            min((iy + 1) * height + border, ny * height),
        )

    def outer_spans(self, axis: int) -> NDArray[np.int64]:
        """Return the outer boxes of all patches along x (axis 0) or y (1), shape (2, n)."""
        size, n = self.patch_inner_size[axis], self.n_patches[axis]
        first = np.arange(n) * size
        end = np.minimum(first + size + self.patch_border, n * size)
        return np.stack([np.maximum(first - self.patch_border, 0), end])

    def patch_ids(self) -> tuple[str, ...]:
        """Return the names of all patches, x running fastest."""
        return _patch_ids(*self.n_patches)

    def patches(self) -> list[Patch]:
        """Return all patches, x running fastest."""
        return [self.patch(patch_id) for patch_id in self.patch_ids()]

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
        """Return the patches that a footprint overlaps, and how much, by clipping [2]_.

        Parameters
        ----------
        ra, dec : array_like, shape (n,)
            Outline in order, ICRS degrees; it may be slightly bowed.

        Returns
        -------
        list of (patch, patch_fraction, ccd_fraction)
            Fractions of the patch's outer box and of the footprint, by area on the tangent plane; x
            running fastest. Empty if the footprint misses the tract.
        """
        axis, radius = polygon.bounding_cap(sphere.to_vector(ra, dec))
        distance = sphere.separation(*sphere.from_vector(axis), self.ra, self.dec)
        if distance > radius + self.radius + 1e-6:
            return []
        points = self.footprint_pixels(ra, dec)
        if len(points) < 3:
            return []
        whole, overlaps = polygon.area(points), []
        range_x, range_y = (self._indices_near(axis, points[:, axis]) for axis in (0, 1))
        for iy, ix in itertools.product(range_y, range_x):
            x0, y0, x1, y1 = box = self._box(ix, iy, self.patch_border)
            covered = polygon.area(polygon.clip_to_box(points, tuple(edge - 0.5 for edge in box)))
            if covered > _MIN_OVERLAP_AREA:
                fractions = (covered / ((x1 - x0) * (y1 - y0)), covered / whole)
                overlaps.append((f"{ix}_{iy}", *(min(part, 1.0) for part in fractions)))
        return overlaps

    def _indices_near(self, axis: int, position: NDArray[np.float64]) -> range:
        """Return the patch indices along an axis whose outer boxes overlap a range of pixels."""
        size, n = self.patch_inner_size[axis], self.n_patches[axis]
        first = math.floor((position.min() + 0.5 - self.patch_border) / size)
        last = math.floor((position.max() + 0.5 + self.patch_border) / size)
        return range(max(first, 0), min(last + 1, n))


@lru_cache(maxsize=8)
def _patch_ids(nx: int, ny: int) -> tuple[str, ...]:
    return tuple(f"{ix}_{iy}" for iy in range(ny) for ix in range(nx))


def patch_position(patch: str) -> tuple[int, int]:
    """Return (row, column) of a patch id "x_y": patches sort by it row by row."""
    x, y = patch.split("_")
    return int(y), int(x)
