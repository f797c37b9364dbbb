"""The sky map: tracts and patches, the pixel grids on which exposures meet.

A tract is an image in the tangent (TAN) projection about its centre, +x to the west and +y to the
north; it is cut into patches named ``"x_y"``. The inner boxes of the patches tile the tract; the
outer boxes reach ``patch_border`` pixels into the neighbours but not beyond the tract. Each
direction on the sky belongs to the inner region of exactly one tract of the ``rings`` map, which
numbers and places tracts and patches as the sky maps of the HSC survey and of the Rubin pipelines
do for the same parameters [1]_. NumPy only: the Snakefile imports this.

The declination rings are numbered from south to north, tract 0 is the southern polar cap, and
within a ring the tracts are numbered eastwards from ``ra_start``. Version 0 of the published map
counted the tract at ``ra_start`` as the last of its ring, not as the first (in all rings but the
southernmost), named the first tract of the southernmost ring twice and had none for the first of
the northernmost; positions that belong there get the number of the northern polar cap, which does
not reach them.

References
----------
.. [1] LSST Science Pipelines, package ``skymap``, ``RingsSkyMap`` and ``TractInfo``
   (https://github.com/lsst/skymap); ticket DM-14809 for the two versions.
.. [2] Calabretta & Greisen 2002, A&A 395, 1077 (TAN; sections 2.2-2.4 for LONPOLE).
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.settings.skymap import RingsSettings, SkymapSettings, TangentSettings

if TYPE_CHECKING:
    from astropy.wcs import WCS

Box = tuple[int, int, int, int]
"""Half-open pixel box (x0, y0, x1, y1) in the tract, 0-based."""

Footprint = tuple[ArrayLike, ArrayLike]
"""Vertices (ra, dec) in order, degrees."""

MIN_OVERLAP_AREA = 1e-6
"""Square pixels below which two regions merely touch."""

_MAX_TANGENT_RADIUS = 28.0
"""Degrees from the centre to a corner beyond which one tangent plane is refused."""

_FRONT = math.cos(math.radians(89.0))


@dataclass(frozen=True)
class Patch:
    """One image of a tract.

    Attributes
    ----------
    id : str
        ``"x_y"``, counted from the tract's first pixel.
    inner_box : tuple of int
        Pixels that are this patch's own, half-open (x0, y0, x1, y1).
    outer_box : tuple of int
        With the border shared with the neighbours.
    """

    id: str
    inner_box: Box
    outer_box: Box


@dataclass(frozen=True)
class Tract:
    """A pixel grid in the tangent projection, cut into patches.

    Attributes
    ----------
    id : int
        Number in the sky map.
    ra, dec : float
        Tangent point, ICRS degrees.
    reference_pixel : tuple of float
        Where the tangent point stands, 0-based pixels (x, y).
    n_patches : tuple of int
        Patches in x and y.
    patch_inner_size : tuple of int
        Columns and rows of the inner box of every patch.
    patch_border : int
        Pixels.
    pixel_scale : float
        Arcseconds per pixel at the tangent point.
    """

    id: int
    ra: float
    dec: float
    reference_pixel: tuple[float, float]
    n_patches: tuple[int, int]
    patch_inner_size: tuple[int, int]
    patch_border: int
    pixel_scale: float

    @property
    def width(self) -> int:
        """Columns."""
        return self.n_patches[0] * self.patch_inner_size[0]

    @property
    def height(self) -> int:
        """Rows."""
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
        return np.stack(
            [
                x0 * centre - pixels_per_radian * east,
                y0 * centre + pixels_per_radian * north,
                centre,
            ]
        )

    def wcs(self) -> "WCS":
        """Return the astropy WCS of the whole tract.

        LONPOLE is always given, as its default changes at the pole [2]_. For the WCS of a patch
        subtract the lower corner of its outer box from CRPIX.
        """
        from astropy.wcs import WCS

        wcs = WCS(naxis=2)
        wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
        wcs.wcs.cunit = ["deg", "deg"]
        wcs.wcs.crval = [self.ra, self.dec]
        wcs.wcs.crpix = [self.reference_pixel[0] + 1.0, self.reference_pixel[1] + 1.0]
        scale = self.pixel_scale / 3600.0
        wcs.wcs.cd = [[-scale, 0.0], [0.0, scale]]
        wcs.wcs.lonpole = 180.0
        wcs.wcs.radesys = "ICRS"
        wcs.pixel_shape = (self.width, self.height)
        wcs.wcs.set()
        return wcs

    def patch(self, patch_id: str) -> Patch:
        """Return the patch named ``"x_y"``; raise InputError if the tract has none."""
        match = re.fullmatch(r"(0|[1-9][0-9]{0,3})_(0|[1-9][0-9]{0,3})", patch_id)
        nx, ny = self.n_patches
        if match is None or int(match[1]) >= nx or int(match[2]) >= ny:
            raise InputError(
                f"tract {self.id} has no patch {patch_id!r}",
                remedy=f"patches are named 'x_y', from '0_0' to '{nx - 1}_{ny - 1}'",
            )
        ix, iy = int(match[1]), int(match[2])
        (x0, x1), (y0, y1) = self._span(0, ix, 0), self._span(1, iy, 0)
        (outer_x0, outer_x1), (outer_y0, outer_y1) = (
            self._span(0, ix, self.patch_border),
            self._span(1, iy, self.patch_border),
        )
        return Patch(patch_id, (x0, y0, x1, y1), (outer_x0, outer_y0, outer_x1, outer_y1))

    def _span(self, axis: int, index: int, border: int) -> tuple[int, int]:
        """Return the first and the last-plus-one pixel of a patch along an axis."""
        size, n = self.patch_inner_size[axis], self.n_patches[axis]
        return max(index * size - border, 0), min((index + 1) * size + border, n * size)

    def outer_spans(self, axis: int) -> NDArray[np.int64]:
        """Return the outer boxes of all patches along x (axis 0) or y (1), shape (2, n)."""
        size, n = self.patch_inner_size[axis], self.n_patches[axis]
        first = np.arange(n) * size
        return np.stack(
            [
                np.maximum(first - self.patch_border, 0),
                np.minimum(first + size + self.patch_border, n * size),
            ]
        )

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

        What lies farther than 89 degrees from the tangent point is cut off.
        """
        homogeneous = sphere.to_vector(ra, dec) @ self.vector_to_pixel.T
        homogeneous = polygon.clip_half_space(homogeneous, homogeneous[:, 2] - _FRONT)
        return homogeneous[:, :2] / homogeneous[:, 2:]

    def patch_areas(self, points: NDArray[np.float64]) -> dict[str, float]:
        """Return how much of each patch's outer box a polygon covers.

        Parameters
        ----------
        points : ndarray of float64, shape (n, 2)
            Outline in pixels of the tract (`footprint_pixels`).

        Returns
        -------
        dict of str to float
            Area in square pixels for the patches that are covered at all, x running fastest.
        """
        if len(points) < 3:
            return {}
        ranges = [self._indices_near(axis, points[:, axis]) for axis in (0, 1)]
        areas = {}
        for iy in ranges[1]:
            y0, y1 = self._span(1, iy, self.patch_border)
            for ix in ranges[0]:
                x0, x1 = self._span(0, ix, self.patch_border)
                box = (x0 - 0.5, y0 - 0.5, x1 - 0.5, y1 - 0.5)
                covered = polygon.area(polygon.clip_to_box(points, box))
                if covered > MIN_OVERLAP_AREA:
                    areas[f"{ix}_{iy}"] = covered
        return areas

    def _indices_near(self, axis: int, position: NDArray[np.float64]) -> range:
        """Return the patch indices along an axis whose outer boxes reach a range of pixels."""
        size, n = self.patch_inner_size[axis], self.n_patches[axis]
        first = math.floor((position.min() + 0.5 - self.patch_border) / size)
        last = math.floor((position.max() + 0.5 + self.patch_border) / size)
        return range(max(first, 0), min(last + 1, n))

    def patches_touching(self, ra_polygon: ArrayLike, dec_polygon: ArrayLike) -> list[str]:
        """Return the patches whose outer boxes overlap a region of the sky.

        Parameters
        ----------
        ra_polygon, dec_polygon : array_like, shape (n,)
            Vertices in order, ICRS degrees, joined by great circles; less than a hemisphere.
        """
        return list(self.patch_areas(self.footprint_pixels(ra_polygon, dec_polygon)))

    def touches(self, ra_polygon: ArrayLike, dec_polygon: ArrayLike) -> bool:
        """Return whether a region of the sky overlaps the tract's pixels."""
        points = self.footprint_pixels(ra_polygon, dec_polygon)
        box = (-0.5, -0.5, self.width - 0.5, self.height - 0.5)
        return polygon.area(polygon.clip_to_box(points, box)) > MIN_OVERLAP_AREA


class SkyMap:
    """A set of tracts. Made by `make_skymap`.

    Attributes
    ----------
    settings : SkymapSettings
        What it was made from, with nothing left to be fitted.
    n_tracts : int
        Tracts are numbered from 0 to ``n_tracts - 1``.
    """

    settings: SkymapSettings
    n_tracts: int

    def tract(self, tract_id: int | str) -> Tract:
        """Return a tract by number; raise InputError if there is none."""
        raise NotImplementedError

    def find_tract(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64] | int:
        """Return the tract in whose inner region positions lie; -1 off the map.

        Parameters
        ----------
        ra, dec : array_like, shape (...)
            ICRS degrees.

        Returns
        -------
        int or ndarray of int64, shape (...)
            An int for scalars.

        Raises
        ------
        InputError
            If a value is not finite, or a declination not between -90 and 90.
        """
        raise NotImplementedError

    def tracts_near(self, ra: float, dec: float, radius: float) -> list[int]:
        """Return, in order, all tracts that a circle of this radius (degrees) may touch.

        Corners of tracts count as if the tracts were round, so a few too many may come back, but
        none is missed.
        """
        raise NotImplementedError

    def tracts_touching(self, ra_polygon: ArrayLike, dec_polygon: ArrayLike) -> list[int]:
        """Return, in order, the tracts whose pixels overlap a region of the sky.

        Parameters
        ----------
        ra_polygon, dec_polygon : array_like, shape (n,)
            Vertices in order, ICRS degrees, joined by great circles; less than a hemisphere.
        """
        axis, radius = polygon.bounding_cap(sphere.to_vector(ra_polygon, dec_polygon))
        ra, dec = sphere.from_vector(axis)
        return [
            tract_id
            for tract_id in self.tracts_near(float(ra), float(dec), float(radius))
            if self.tract(tract_id).touches(ra_polygon, dec_polygon)
        ]

    def _checked(self, tract_id: int | str) -> int:
        """Return a tract number (or its decimal text) as int; raise InputError if there is none."""
        text = str(tract_id)
        if not (text.isascii() and text.isdigit() and int(text) < self.n_tracts):
            raise InputError(
                f"the sky map has no tract {tract_id!r}",
                remedy=f"tracts are numbered from 0 to {self.n_tracts - 1}",
            )
        return int(text)


class RingsSkyMap(SkyMap):
    """The whole sky in rings of declination, as HSC and Rubin publish it [1]_."""

    def __init__(self, settings: SkymapSettings):
        self.settings = settings
        rings = settings.rings
        self._ring_size = math.pi / (rings.num_rings + 1)
        self._ring_counts = _tracts_per_ring(rings)
        self._first_of_ring = 1 + np.concatenate([[0], np.cumsum(self._ring_counts)])
        self.n_tracts = int(self._ring_counts.sum()) + 2
        self._layout = _published_layout(
            math.degrees(0.5 * self._ring_size) + rings.tract_overlap, settings
        )
        self._ra, self._dec = self._centres()
        self._vectors = sphere.to_vector(self._ra, self._dec)
        self._tracts: dict[int, Tract] = {}

    def _centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the centres of all tracts in degrees, shape (n_tracts,)."""
        ring, number = self._ring_and_number(np.arange(1, self.n_tracts - 1))
        ra = np.degrees(2.0 * np.pi * number / self._ring_counts[ring])
        dec = np.degrees(self._ring_size * (ring + 1) - 0.5 * np.pi)
        ra = (ra + self.settings.rings.ra_start) % 360.0
        return np.concatenate([[0.0], ra, [0.0]]), np.concatenate([[-90.0], dec, [90.0]])

    def _ring_and_number(self, tract_id: NDArray) -> tuple[NDArray, NDArray]:
        """Return the ring and the place in it, from ra_start eastwards, of tracts off the caps."""
        if self.settings.rings.version == 1:
            ring = np.searchsorted(self._first_of_ring, tract_id, side="right") - 1
        else:
            ring = np.searchsorted(self._first_of_ring, tract_id, side="left") - 1
            ring = np.maximum(ring, 0)
        return ring, (tract_id - self._first_of_ring[ring]) % self._ring_counts[ring]

    def tract(self, tract_id: int | str) -> Tract:
        """Return a tract by number; raise InputError if there is none."""
        index = self._checked(tract_id)
        if index not in self._tracts:
            self._tracts[index] = Tract(
                index, float(self._ra[index]), float(self._dec[index]), **self._layout
            )
        return self._tracts[index]

    def find_tract(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64] | int:
        """Return the tract in whose inner region positions lie; see `SkyMap.find_tract`."""
        _check_positions(ra, dec)
        ra, dec = np.broadcast_arrays(np.radians(ra), np.radians(dec))
        south_edge = 0.5 * self._ring_size - 0.5 * np.pi
        n_rings = len(self._ring_counts)
        ring = np.clip(((dec - south_edge) / self._ring_size).astype(np.int64), 0, n_rings - 1)
        count = self._ring_counts[ring]
        from_start = (ra - math.radians(self.settings.rings.ra_start)) % (2.0 * np.pi)
        number = (from_start / (2.0 * np.pi / count) + 0.5).astype(np.int64) % count
        if self.settings.rings.version == 0:
            # the tract at ra_start stands where version 1 has the first of the next ring
            ring = np.where((number == 0) & (ring > 0), ring + 1, ring)
        tract_id = self._first_of_ring[ring] + number
        tract_id = np.where(dec < south_edge, 0, tract_id)
        tract_id = np.where(dec > -south_edge, self.n_tracts - 1, tract_id)
        return int(tract_id) if tract_id.ndim == 0 else tract_id

    def tracts_near(self, ra: float, dec: float, radius: float) -> list[int]:
        """Return, in order, all tracts that a circle of this radius (degrees) may touch."""
        reach = radius + self.tract(0).radius + 1e-6
        # centres are in order of declination
        first, last = np.searchsorted(self._dec, [dec - reach, dec + reach])
        cosine = self._vectors[first:last] @ sphere.to_vector(ra, dec)
        near = np.flatnonzero(cosine >= math.cos(math.radians(min(reach, 180.0)))) + first
        if self.settings.rings.version == 0:
            near = near[near != self._first_of_ring[1]]  # the first tract over again
        return near.tolist()


class TangentSkyMap(SkyMap):
    """One tract, number 0, with its tangent point in the middle."""

    n_tracts = 1

    def __init__(self, settings: SkymapSettings):
        tangent = settings.tangent
        if tangent.ra is None or tangent.width is None:
            raise ValueError("centre and size of the tract are not known; use make_skymap")
        self.settings = settings
        sizes, counts = [], []
        for extent in (tangent.width, tangent.height):
            pixels = 2.0 * math.degrees(math.tan(math.radians(extent / 2.0)))
            pixels = max(math.ceil(pixels * 3600.0 / settings.pixel_scale - 1e-3), 1)
            counts.append(-(-pixels // settings.patch_inner_size))
            sizes.append(-(-pixels // counts[-1]))
        middle = tuple((size * count - 1) / 2.0 for size, count in zip(sizes, counts, strict=True))
        self._tract = Tract(
            0,
            tangent.ra,
            tangent.dec,
            reference_pixel=middle,
            n_patches=tuple(counts),
            patch_inner_size=tuple(sizes),
            patch_border=min(settings.patch_border, *sizes),
            pixel_scale=settings.pixel_scale,
        )

    def tract(self, tract_id: int | str) -> Tract:
        """Return tract 0; raise InputError for any other."""
        self._checked(tract_id)
        return self._tract

    def find_tract(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64] | int:
        """Return 0 for positions on the tract, -1 elsewhere; see `SkyMap.find_tract`."""
        _check_positions(ra, dec)
        tract_id = np.where(self._tract.contains(ra, dec), 0, -1)
        return int(tract_id) if tract_id.ndim == 0 else tract_id

    def tracts_near(self, ra: float, dec: float, radius: float) -> list[int]:
        """Return [0] if a circle of this radius (degrees) may touch the tract, else []."""
        tract = self._tract
        distance = sphere.separation(ra, dec, tract.ra, tract.dec)
        return [0] if distance <= radius + tract.radius + 1e-6 else []


def make_skymap(
    settings: SkymapSettings, footprints: Iterable[Footprint] | None = None
) -> RingsSkyMap | TangentSkyMap:
    """Return the sky map that the settings describe.

    Parameters
    ----------
    settings : SkymapSettings
        Kind and parameters.
    footprints : iterable of (ra, dec), optional
        Outlines of the exposures, degrees; needed where the settings leave the centre or the
        size of a tangent tract to be fitted.

    Raises
    ------
    InputError
        If there is nothing to fit to, or the exposures do not fit on one tangent plane.
    """
    if settings.kind == "rings":
        return RingsSkyMap(settings)
    return TangentSkyMap(fit_tangent(settings, footprints))


def fit_tangent(
    settings: SkymapSettings, footprints: Iterable[Footprint] | None = None
) -> SkymapSettings:
    """Return the settings with the centre and size of the tangent tract filled in.

    The tract is the smallest upright one that holds all footprints. Its centre is rounded to a
    thousandth of a degree. As it follows the exposures, an added exposure can move it; a survey
    that grows should have it fixed in its settings.

    Parameters
    ----------
    settings : SkymapSettings
        Of kind ``tangent``.
    footprints : iterable of (ra, dec), optional
        Outlines of the exposures, degrees.

    Raises
    ------
    InputError
        If there is nothing to fit to, or the exposures do not fit on one tangent plane.
    """
    tangent = settings.tangent
    if tangent.ra is not None and tangent.width is not None:
        return settings
    vectors = [sphere.to_vector(ra, dec) for ra, dec in footprints or ()]
    if not vectors:
        raise InputError(
            "there are no exposures to fit the tract to",
            remedy="set ra, dec, width and height of skymap.tangent",
        )
    points = np.concatenate(vectors)
    ra, dec = (tangent.ra, tangent.dec) if tangent.ra is not None else _middle_of(points)
    xi, eta = sphere.tan_project(*sphere.from_vector(points), ra, dec)
    reach_x, reach_y = np.abs(xi).max(), np.abs(eta).max()
    if not math.hypot(reach_x, reach_y) < math.degrees(math.tan(math.radians(_MAX_TANGENT_RADIUS))):
        raise InputError(
            "the exposures are too far apart for one tangent plane",
            remedy="use skymap.kind: rings, or set ra, dec, width and height of skymap.tangent",
        )
    width, height = tangent.width, tangent.height
    if width is None:
        width, height = (
            round(2.0 * math.degrees(math.atan(math.radians(reach))) + 2e-6, 6)
            for reach in (reach_x, reach_y)
        )
    fitted = TangentSettings(ra=ra, dec=dec, width=width, height=height)
    return settings.model_copy(update={"tangent": fitted})


def _middle_of(points: NDArray[np.float64]) -> tuple[float, float]:
    """Return the centre (ra, dec) of the upright rectangle around unit vectors, shape (n, 3)."""
    axis, _ = polygon.bounding_cap(points)
    ra, dec = (float(angle) for angle in sphere.from_vector(axis))
    for _ in range(4):
        xi, eta = sphere.tan_project(*sphere.from_vector(points), ra, dec)
        middle = [(value.min() + value.max()) / 2.0 for value in (xi, eta)]
        if not np.isfinite(middle).all():
            break
        ra, dec = (float(angle) for angle in sphere.tan_deproject(*middle, ra, dec))
    return round(ra, 3) % 360.0, min(max(round(dec, 3), -90.0), 90.0)


def _check_positions(ra: ArrayLike, dec: ArrayLike) -> None:
    if not (np.isfinite(ra).all() and (np.abs(dec) <= 90.0).all()):
        raise InputError(
            f"RA {ra}, Dec {dec} is not a position on the sky",
            remedy="give both in degrees, Dec between -90 and 90",
        )


@lru_cache(maxsize=8)
def _patch_ids(nx: int, ny: int) -> tuple[str, ...]:
    return tuple(f"{ix}_{iy}" for iy in range(ny) for ix in range(nx))


def _tracts_per_ring(rings: RingsSettings) -> NDArray[np.int64]:
    """Return how many tracts each ring has, from south to north [1]_.

    A ring is divided where it is widest, at its declination nearest to the equator. The order of
    the operations is that of the published map: on the equator the quotient is a whole number,
    and its last bit decides the count.
    """
    size = math.pi / (rings.num_rings + 1)
    counts = []
    for ring in range(rings.num_rings):
        south = size * (ring + 0.5) - 0.5 * math.pi
        nearest = min(math.fabs(south), math.fabs(south + size))
        counts.append(int(2 * math.pi * math.cos(nearest) / size) + 1)
    return np.array(counts, dtype=np.int64)


def _published_layout(half_size: float, settings: SkymapSettings) -> dict:
    """Return the pixel layout of a tract of the published maps [1]_.

    The square of half side ``half_size`` (degrees) is taken to whole pixels outwards, then grown
    on both sides to a whole number of patches; an odd pixel goes to the upper side.
    """
    half = math.tan(math.radians(half_size)) / math.radians(settings.pixel_scale / 3600.0)
    lower, upper = math.floor(0.5 - half), math.ceil(half - 0.5)
    pixels, inner = upper - lower + 1, settings.patch_inner_size
    n_patches = -(-pixels // inner)
    lower -= (n_patches * inner - pixels) // 2
    return {
        "reference_pixel": (float(-lower), float(-lower)),
        "n_patches": (n_patches, n_patches),
        "patch_inner_size": (inner, inner),
        "patch_border": settings.patch_border,
        "pixel_scale": settings.pixel_scale,
    }
