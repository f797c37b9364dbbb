"""The predicted footprint of an exposure on the sky, with a margin.

One convex outline encloses all CCDs on the tangent plane at the pointing, moved outwards by the
margin. NumPy only: the Snakefile imports this.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere

if TYPE_CHECKING:
    from coaddflow.instrument.camera import Camera


FloatArray = NDArray[np.float64]

_POINTS_PER_EDGE = 8
"""Points on each edge of a CCD from which its outline is predicted."""


class Pointing(Protocol):
    """The needed columns of the exposure table; angles in degrees."""

    exposure: str
    ra: float
    dec: float
    rotation: float


def predicted_footprints(
    exposures: Iterable[Pointing], camera: "Camera", margin: float = 0.0
) -> list[tuple[FloatArray, FloatArray]]:
    """Return the outline (ra, dec) of each exposure, enlarged by the margin; all in degrees.

    A tangent sky map is fitted to these.
    """
    outlines = outline_vectors(list(exposures), camera, margin)
    return [sphere.from_vector(vectors) for vectors in outlines]


def field_radius(camera: "Camera") -> float:
    """Return the angle from the pointing to the farthest corner of a CCD, degrees."""
    return math.degrees(math.atan(math.radians(float(np.hypot(*_camera_points(camera)).max()))))


def outline_vectors(exposures: Sequence[Pointing], camera: "Camera", margin: float) -> FloatArray:
    """Return the enlarged outlines of exposures as unit vectors, shape (n, n_sides, 3)."""
    points = _camera_points(camera)
    # nowhere smaller than the margin on the sky
    outline = polygon.enclosing_outline(*points, margin * _stretch(*points, margin))
    ra, dec, rotation = (
        np.array([getattr(exposure, name) for exposure in exposures], dtype=float)[:, None]
        for name in ("ra", "dec", "rotation")
    )
    return sphere.to_vector(*sphere.tan_deproject(*_rotate(*outline, rotation), ra, dec))


def check_footprint_within_prediction(
    exposure: Pointing,
    camera: "Camera",
    margin: float,
    ra: ArrayLike,
    dec: ArrayLike,
    ccd: int | None = None,
) -> None:
    """Check that a fitted CCD lies within the predicted footprint of its exposure.

    Parameters
    ----------
    exposure : Pointing
        Row of the exposure table, as the run was planned from it.
    camera : Camera
        Positions of the CCDs.
    margin : float
        The margin of the prediction, degrees.
    ra, dec : array_like, shape (n,)
        Outline of the CCD from its fitted WCS, degrees.
    ccd : int, optional
        Its number, for the message.

    Raises
    ------
    InputError
        If a part of the CCD is outside the enlarged outline of its exposure.
    """
    xi, eta = sphere.tan_project(ra, dec, exposure.ra, exposure.dec)
    xi, eta = _rotate(xi, eta, -exposure.rotation)
    points = _camera_points(camera)
    distance, stretch = _distance_outside(xi, eta, *points), _stretch(*points, margin)
    if np.all(distance <= margin * stretch + 1e-9):
        return
    # back from the tangent plane to an angle
    excess = float(np.max(distance)) / stretch
    off = f"{excess:.3f} degrees" if np.isfinite(excess) else "more than 90 degrees"
    which = "the footprint" if ccd is None else f"CCD {ccd}"
    raise InputError(
        f"exposure {exposure.exposure}: {which} as fitted lies {off} outside the field that its "
        f"header predicts, more than the margin of {margin:g} degrees; the tracts and patches "
        "that it touches may not have been planned",
        remedy="correct the pointing of this exposure in the exposure table, or raise "
        "prediction.margin",
    )


def _camera_points(camera: "Camera") -> tuple[FloatArray, FloatArray]:
    """Return points on the edges of all CCDs on the tangent plane, at rotation 0, degrees."""
    outlines = [
        camera.footprint(detector, 0.0, 0.0, 0.0, _POINTS_PER_EDGE) for detector in camera.detectors
    ]
    ra, dec = np.concatenate(outlines, axis=1)
    return sphere.tan_project(ra, dec, 0.0, 0.0)


def _stretch(xi: FloatArray, eta: FloatArray, margin: float) -> float:
    """Return the radial scale of the tangent plane at the edge of the enlarged field."""
    radius = math.atan(math.radians(float(np.hypot(xi, eta).max()))) + math.radians(margin)
    return 1.0 / math.cos(min(radius, math.radians(80.0))) ** 2


def _distance_outside(
    xi: FloatArray, eta: FloatArray, points_xi: FloatArray, points_eta: FloatArray
) -> FloatArray:
    """Return how far positions are outside the outline of points (without margin); same unit.

    The sides are those of `polygon.enclosing_outline`, with which the run was planned. NaN becomes
    infinite.
    """
    angle = 2.0 * np.pi * np.arange(polygon.OUTLINE_SIDES) / polygon.OUTLINE_SIDES
    normals = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    reach = (normals @ np.stack([points_xi, points_eta])).max(axis=1)
    distance = (normals @ np.stack([xi, eta]) - reach[:, None]).max(axis=0)
    return np.where(np.isnan(distance), np.inf, distance)


def _rotate(xi: FloatArray, eta: FloatArray, angle: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Rotate positions on the tangent plane from north through east by an angle in degrees."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return cos * xi + sin * eta, -sin * xi + cos * eta
