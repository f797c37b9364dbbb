"""Which detections of different exposures are the same star.

Exposures are taken in the order of time. Each detection goes to the star that is nearest to it, if
it is also the star's nearest detection, within a radius; what no star has found begins a new one.
Stars of the reference catalogue move by their proper motion, others are looked for where they were
last. Stars with a close neighbour are left out in the end: in crowded places links may be wrong.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from coaddflow.geometry.sphere import to_vector
from coaddflow.settings.solution import LinkingSettings
from coaddflow.solution.detections import MAS, Detections, Exposures, ReferenceStars, TractFrame

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int32]

_MEMORY = 4.0
"""Detections over which the place of a star is averaged: more would lose those that move."""

_RIVAL = 0.1
"""A neighbour with fewer detections than this fraction of the star's is noise, not a star."""


@dataclass(frozen=True)
class Links:
    """The stars of a solution.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Detections that belong to a star.
    star : ndarray of int32, shape (n,)
        The star of each.
    longitude, latitude : ndarray of float64, shape (n stars,)
        Places in the `TractFrame`, degrees: of the catalogue, or means.
    reference : ndarray of int32, shape (n stars,)
        Rows in the reference catalogue; -1 for stars that it does not have.
    """

    rows: NDArray[np.int64]
    star: IndexArray
    longitude: FloatArray
    latitude: FloatArray
    reference: IndexArray

    def __len__(self) -> int:
        return len(self.longitude)


def link_detections(
    detections: Detections,
    exposures: Exposures,
    references: ReferenceStars,
    frame: TractFrame,
    settings: LinkingSettings,
) -> Links:
    """Find the stars of all exposures.

    Parameters
    ----------
    detections : Detections
        Of all exposures; their ``ra`` and ``dec`` should be good to a fraction of the radius.
    exposures, references, frame
        What they belong to.
    settings : LinkingSettings
        Radius, isolation, and number of detections.

    Returns
    -------
    Links
        Stars of the catalogue that no exposure has are not in it.
    """
    stars = _Stars(references, frame, len(detections))
    longitude, latitude = frame.of_sky(detections.ra, detections.dec)
    ends = detections.ends(len(exposures))
    star = np.full(len(detections), -1, np.int32)
    for number in np.argsort(exposures.mjd, kind="stable"):
        rows = slice(ends[number], ends[number + 1])
        here = np.stack([longitude[rows], latitude[rows]], axis=1)
        star[rows] = stars.find(here, exposures.year[number], settings.radius / 3600.0)
    return _chosen(star, stars, settings)


def mutual_nearest(
    place: FloatArray, here: FloatArray, radius: float
) -> tuple[IndexArray, NDArray[np.bool_]]:
    """Match detections to stars: each to its nearest star, if it is also that star's nearest.

    Parameters
    ----------
    place, here : ndarray of float64, shapes (m, 2) and (n, 2)
        Longitudes and latitudes of stars and of detections, degrees.
    radius : float
        Largest distance, degrees.

    Returns
    -------
    star : ndarray of int32, shape (n,)
        Star of each detection; -1 if it has none.
    is_near : ndarray of bool, shape (n,)
        Whether there is any star within the radius.
    """
    found = np.full(len(here), -1, np.int32)
    if len(place) == 0 or len(here) == 0:
        return found, np.zeros(len(here), dtype=bool)
    distance, nearest = cKDTree(to_vector(*place.T)).query(
        to_vector(*here.T), distance_upper_bound=2.0 * np.sin(np.radians(radius) / 2.0)
    )
    # the first of the sorted detections of a star is its nearest one
    order = np.argsort(distance, kind="stable")
    order = order[np.isfinite(distance[order])]
    _, first = np.unique(nearest[order], return_index=True)
    found[order[first]] = nearest[order[first]]
    return found, np.isfinite(distance)


class _Stars:
    """The stars found so far."""

    def __init__(self, references: ReferenceStars, frame: TractFrame, most: int):
        self.n = self.n_reference = len(references)
        self.year = references.year
        motion = np.nan_to_num(references.motion) / MAS
        self.motion = frame.turned(references.ra, references.dec, motion)
        self.place = np.zeros((self.n + most, 2))
        self.place[: self.n] = np.stack(frame.of_sky(references.ra, references.dec), axis=1)
        self.sums = np.zeros((self.n + most, 2))
        self.count = np.zeros(self.n + most, np.int32)

    def find(self, here: FloatArray, year: float, radius: float) -> IndexArray:
        """Return the star of each detection, shape (n, 2) in degrees, of an exposure."""
        place = self.place[: self.n].copy()
        moved = self.motion * (year - self.year)
        moved[:, 0] /= np.cos(np.radians(place[: self.n_reference, 1]))
        place[: self.n_reference] += moved
        found, is_near = mutual_nearest(place, here, radius)
        # a second detection beside a star is no new star, nor one of it
        new = np.flatnonzero((found < 0) & ~is_near)
        found[new] = self.n + np.arange(len(new))
        self.place[self.n : self.n + len(new)] = here[new]
        self.n += len(new)
        self._see(found[found >= 0], here[found >= 0])
        return found

    def _see(self, star: IndexArray, here: FloatArray) -> None:
        """Note where stars are now."""
        self.count[star] += 1
        self.sums[star] += here
        moving = star >= self.n_reference
        star, here = star[moving], here[moving]
        part = 1.0 / np.minimum(self.count[star], _MEMORY)[:, None]
        self.place[star] += part * (here - self.place[star])


def _chosen(star: IndexArray, stars: _Stars, settings: LinkingSettings) -> Links:
    """Leave out stars that are crowded or seen too seldom."""
    n, count = stars.n, stars.count[: stars.n]
    is_reference = np.arange(n) < stars.n_reference
    mean = stars.sums[:n] / np.maximum(count, 1)[:, None]
    place = np.where(is_reference[:, None], stars.place[:n], mean)
    used = (count >= np.where(is_reference, 1, settings.min_detections)) & ~_crowded(
        place, count, settings
    )
    number = np.where(used, np.cumsum(used) - 1, -1).astype(np.int32)
    of_detection = np.where(star >= 0, number[star], -1)
    rows = np.flatnonzero(of_detection >= 0)
    reference = np.where(is_reference, np.arange(n), -1).astype(np.int32)
    return Links(
        rows, of_detection[rows].astype(np.int32), place[used, 0], place[used, 1], reference[used]
    )


def _crowded(place: FloatArray, count: IndexArray, settings: LinkingSettings) -> NDArray[np.bool_]:
    """Return which stars have a neighbour that is seen about as often as they are."""
    seen = np.flatnonzero(count > 0)
    reach = 2.0 * np.sin(np.radians(settings.isolation * settings.radius / 3600.0) / 2.0)
    pairs = cKDTree(to_vector(*place[seen].T)).query_pairs(reach, output_type="ndarray")
    crowded = np.zeros(len(place), dtype=bool)
    for one, other in (pairs.T, pairs.T[::-1]):
        rival = count[seen[other]] > _RIVAL * count[seen[one]]
        crowded[seen[one[rival]]] = True
    return crowded
