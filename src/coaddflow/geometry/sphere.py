"""Directions on the sky as unit vectors, and the tangent plane.

Vectors have no trouble at RA 0 or at the poles, so all geometry that decides what overlaps what
goes through them. NumPy only: the Snakefile imports this.

References
----------
.. [1] Calabretta & Greisen 2002, A&A 395, 1077, section 5.1.3 (gnomonic projection).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def to_vector(ra: ArrayLike, dec: ArrayLike) -> NDArray[np.float64]:
    """Return unit vectors, shape (..., 3), for ICRS positions in degrees, shape (...)."""
    ra, dec = np.radians(ra), np.radians(dec)
    return np.stack(
        np.broadcast_arrays(np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)),
        axis=-1,
    )


def from_vector(vector: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (ra in [0, 360), dec) in degrees for vectors of any length, shape (..., 3)."""
    vector = np.asarray(vector, dtype=float)
    x, y, z = vector[..., 0], vector[..., 1], vector[..., 2]
    return np.degrees(np.arctan2(y, x)) % 360.0, np.degrees(np.arctan2(z, np.hypot(x, y)))


def separation(ra1: ArrayLike, dec1: ArrayLike, ra2: ArrayLike, dec2: ArrayLike) -> NDArray:
    """Return the angle between two directions in degrees, accurate at all angles."""
    a, b = to_vector(ra1, dec1), to_vector(ra2, dec2)
    half_chord = np.linalg.norm(a - b, axis=-1) / 2.0
    return np.degrees(2.0 * np.arcsin(np.clip(half_chord, 0.0, 1.0)))


def tan_project(
    ra: ArrayLike, dec: ArrayLike, ra0: float, dec0: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project ICRS positions onto the plane that touches the sphere at (ra0, dec0) [1]_.

    All angles are in degrees. The plane coordinates are xi, to the east, and eta, to the north;
    NaN for directions 90 degrees or more from the tangent point, which have no image.
    """
    ra, dec = np.radians(ra), np.radians(dec)
    ra0, dec0 = np.radians(ra0), np.radians(dec0)
    cos_angle = np.sin(dec0) * np.sin(dec) + np.cos(dec0) * np.cos(dec) * np.cos(ra - ra0)
    cos_angle = np.where(cos_angle > 1e-9, cos_angle, np.nan)
    xi = np.cos(dec) * np.sin(ra - ra0) / cos_angle
    eta = (np.cos(dec0) * np.sin(dec) - np.sin(dec0) * np.cos(dec) * np.cos(ra - ra0)) / cos_angle
    return np.degrees(xi), np.degrees(eta)


def tan_deproject(
    xi: ArrayLike, eta: ArrayLike, ra0: float, dec0: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Invert `tan_project`: plane coordinates in degrees to (ra in [0, 360), dec) in degrees."""
    xi, eta = np.radians(xi), np.radians(eta)
    ra0, dec0 = np.radians(ra0), np.radians(dec0)
    denominator = np.cos(dec0) - eta * np.sin(dec0)
    ra = ra0 + np.arctan2(xi, denominator)
    dec = np.arctan2(np.sin(dec0) + eta * np.cos(dec0), np.hypot(xi, denominator))
    return np.degrees(ra) % 360.0, np.degrees(dec)
