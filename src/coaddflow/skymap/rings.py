"""The sky map of rings: tracts in rings of declination over the whole sky.

Each direction on the sky belongs to the inner region of exactly one tract. Numbers and positions
of tracts and patches are those of the sky maps of the HSC survey and of the Rubin pipelines for the
same parameters [1]_. NumPy only: the Snakefile imports this.

Rings are numbered from south to north, tract 0 is the southern polar cap, and within a ring tracts
are numbered eastwards from ``ra_start``. Version 0 of the published map counted the tract at
``ra_start`` as the last of its ring, not as the first (in all rings but the southernmost), listed
the first tract of the southernmost ring twice and omitted the first of the northernmost; positions
there get the number of the northern polar cap, which does not reach them.

References
----------
.. [1] LSST Science Pipelines, package ``skymap``, ``RingsSkyMap`` and ``TractInfo``
   (https://github.com/lsst/skymap); ticket DM-14809 for the two versions.
"""

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.geometry import sphere
from coaddflow.settings.skymap import RingsSettings, SkymapSettings
from coaddflow.skymap.base import SkyMap
from coaddflow.skymap.tract import Tract


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
        """Return the ring and the number in it, from ra_start eastwards, of tracts off the caps."""
        side = "right" if self.settings.rings.version == 1 else "left"
        ring = np.maximum(np.searchsorted(self._first_of_ring, tract_id, side=side) - 1, 0)
        return ring, (tract_id - self._first_of_ring[ring]) % self._ring_counts[ring]

    def _tract(self, number: int) -> Tract:
        if number not in self._tracts:
            ra, dec = float(self._ra[number]), float(self._dec[number])
            self._tracts[number] = Tract(number, ra, dec, **self._layout)
        return self._tracts[number]

    def _number_at(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64]:
        ra, dec = np.broadcast_arrays(np.radians(ra), np.radians(dec))
        south_edge = 0.5 * self._ring_size - 0.5 * np.pi
        n_rings = len(self._ring_counts)
        ring = np.clip(((dec - south_edge) / self._ring_size).astype(np.int64), 0, n_rings - 1)
        count = self._ring_counts[ring]
        from_start = (ra - math.radians(self.settings.rings.ra_start)) % (2.0 * np.pi)
        number = (from_start / (2.0 * np.pi / count) + 0.5).astype(np.int64) % count
        if self.settings.rings.version == 0:
            # the tract at ra_start has the number that in version 1 begins the next ring
            ring = np.where((number == 0) & (ring > 0), ring + 1, ring)
        tract_id = self._first_of_ring[ring] + number
        tract_id = np.where(dec < south_edge, 0, tract_id)
        return np.where(dec > -south_edge, self.n_tracts - 1, tract_id)

    def tracts_near(self, ra: float, dec: float, radius: float) -> list[int]:
        """Return, in order, all tracts that a circle of this radius (degrees) may touch."""
        reach = radius + self.tract(0).radius + 1e-6
        # centres are in order of declination
        first, last = np.searchsorted(self._dec, [dec - reach, dec + reach])
        cosine = self._vectors[first:last] @ sphere.to_vector(ra, dec)
        near = np.flatnonzero(cosine >= math.cos(math.radians(min(reach, 180.0)))) + first
        if self.settings.rings.version == 0:
            near = near[near != self._first_of_ring[1]]  # a duplicate of the first tract
        return near.tolist()


def _tracts_per_ring(rings: RingsSettings) -> NDArray[np.int64]:
    """Return the number of tracts in each ring, from south to north [1]_.

    A ring is divided where it is widest, at its declination nearest to the equator. The order of
    operations is that of the published map: on the equator the quotient is a whole number, and
    its last bit decides the count.
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

    The square of half side ``half_size`` (degrees) is rounded outwards to whole pixels, then grown
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
