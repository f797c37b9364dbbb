"""The sky map of a single tract, given or fitted to the data.

NumPy only: the Snakefile imports this.
"""

import logging
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.settings.skymap import SkymapSettings, TangentSettings
from coaddflow.skymap.base import SkyMap
from coaddflow.skymap.tract import Tract

Footprint = tuple[ArrayLike, ArrayLike]
"""Vertices (ra, dec) in order, degrees."""

_LOG = logging.getLogger(__name__)

_STRAY_PART = 0.2
"""Of more of the exposures it cannot be said that they stray: there are two fields."""
_STRAY_DISTANCE = 5.0
"""A stray exposure is so far from the others, in units of the extent of most of them."""
_STRAY_AREA = 100.0
"""So much smaller the tract must be without stray exposures to refuse them."""

_MAX_TANGENT_RADIUS = 28.0
"""Largest distance from the centre to a corner, degrees."""


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
        self._only_tract = Tract(
            0,
            tangent.ra,
            tangent.dec,
            reference_pixel=middle,
            n_patches=tuple(counts),
            patch_inner_size=tuple(sizes),
            patch_border=min(settings.patch_border, *sizes),
            pixel_scale=settings.pixel_scale,
        )

    def _tract(self, number: int) -> Tract:
        return self._only_tract

    def _number_at(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.int64]:
        return np.where(self._only_tract.contains(ra, dec), 0, -1)

    def tracts_near(self, ra: float, dec: float, radius: float) -> list[int]:
        """Return [0] if a circle of this radius (degrees) may touch the tract, else []."""
        tract = self._only_tract
        distance = sphere.separation(ra, dec, tract.ra, tract.dec)
        return [0] if distance <= radius + tract.radius + 1e-6 else []


def fit_tangent(
    settings: SkymapSettings,
    footprints: Iterable[Footprint] | None = None,
    names: Sequence[str] | None = None,
) -> SkymapSettings:
    """Return the settings with the centre and size of the tangent tract filled in.

    The tract is the smallest upright one that contains all footprints. Its centre is rounded to a
    thousandth of a degree. An added exposure can move it; a survey that grows should have it fixed
    in its settings.

    Parameters
    ----------
    settings : SkymapSettings
        Of kind ``tangent``.
    footprints : iterable of (ra, dec), optional
        Outlines of the exposures, degrees.
    names : sequence of str, optional
        Exposure of each outline, for messages.

    Raises
    ------
    InputError
        If there is nothing to fit to, the exposures do not fit on one tangent plane, or a few of
        them point far away from all others, so that the tract would be almost empty.
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
    if tangent.width is None:
        _check_strays(vectors, list(names) if names is not None else None)
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


def _check_strays(vectors: Sequence[NDArray], names: list[str] | None) -> None:
    """Refuse a few outlines that are far from all others, or name them if little hangs on them."""
    centres = np.stack([points.mean(axis=0) for points in vectors])
    middle = np.median(centres, axis=0)
    if len(vectors) < 3 or not np.linalg.norm(middle) > 0.0:
        return
    distances = sphere.separation(*sphere.from_vector(centres), *sphere.from_vector(middle))
    size = max(
        float(np.max(sphere.separation(*sphere.from_vector(points), *sphere.from_vector(centre))))
        for points, centre in zip(vectors, centres, strict=True)
    )
    extent = np.sort(distances)[int((1.0 - _STRAY_PART) * (len(vectors) - 1))] + size
    stray = distances > _STRAY_DISTANCE * extent
    if not stray.any() or stray.sum() > max(1.0, _STRAY_PART * len(vectors)):
        return
    labels = names or [f"number {n}" for n in range(1, len(vectors) + 1)]
    away = {label: d for label, d, far in zip(labels, distances, stray, strict=True) if far}
    named = ", ".join(f"{label} ({d:.2f} degrees)" for label, d in list(away.items())[:5])
    cause = (
        f"{len(away)} of {len(set(labels))} exposures point far away from all others, so that the "
        f"tract that is fitted to them would be almost empty: {named}"
    )
    remedy = (
        "correct their pointing in the table, put them into `exclude`, or set ra, dec, width and "
        "height of skymap.tangent"
    )
    with_all, without = (
        _area_of(vectors),
        _area_of([points for points, far in zip(vectors, stray, strict=True) if not far]),
    )
    if not with_all < _STRAY_AREA * without:
        raise InputError(cause, remedy=remedy)
    _LOG.warning("%s; %s", cause, remedy)


def _area_of(vectors: Sequence[NDArray]) -> float:
    """Return the area of the upright rectangle around outlines, square degrees on the plane."""
    points = np.concatenate(vectors)
    xi, eta = sphere.tan_project(*sphere.from_vector(points), *_middle_of(points))
    return float(np.ptp(xi) * np.ptp(eta))


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
