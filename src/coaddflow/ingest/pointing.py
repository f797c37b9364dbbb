"""The pointing of an exposure from the fitted footprints of its CCDs.

A camera that points elsewhere is the same camera turned on the sphere. The best turn between
predicted and fitted outlines is therefore a rotation in three dimensions, which has a closed
solution: no starting value, no iteration, no trouble at the poles.

References
----------
.. [1] Wahba 1965, SIAM Review 7, 409 (the problem).
.. [2] Markley 1988, J. Astronautical Sciences 36, 245 (its solution by singular values).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coaddflow.geometry import sphere
from coaddflow.instrument.camera import Camera
from coaddflow.tables.manifest import FOOTPRINT_POINTS_PER_EDGE, CcdRow
from coaddflow.tables.pointings import Angles

MAX_MISFIT = 0.05
"""Largest rms between predicted and fitted outlines, as part of their extent."""


@dataclass(frozen=True)
class Pointing:
    """Where the camera looked, as its fitted CCDs tell."""

    ra: float
    """RA of the pointing, ICRS degrees."""
    dec: float
    """Dec of the pointing, ICRS degrees."""
    rotation: float
    """Rotation of the exposure, degrees in [0, 360)."""
    rms: float
    """What is left between predicted and fitted outlines, arcsec."""
    extent: float
    """Rms distance of the outlines from their centre, arcsec: what `rms` compares with."""
    shift: float
    """Distance of the pointing from the one assumed before, arcsec."""

    @property
    def angles(self) -> Angles:
        """The pointing, as tables have it."""
        return Angles(self.ra, self.dec, self.rotation).rounded()


def fit_pointing(
    rows: Sequence[CcdRow], camera: Camera, ra: float, dec: float, rotation: float
) -> Pointing:
    """Find the pointing and rotation that put the camera's CCDs onto their fitted footprints.

    Parameters
    ----------
    rows : sequence of CcdRow
        CCDs of one exposure; ValueError if none has a fitted footprint.
    ra, dec, rotation : float
        Pointing assumed so far, degrees (any is good).

    Returns
    -------
    Pointing
        The best in the sense of least squares on the sphere [1]_, [2]_.
    """
    used = [row for row in rows if len(row.footprint_ra) == 4 * FOOTPRINT_POINTS_PER_EDGE]
    if not used:
        raise ValueError("no CCD has a fitted footprint")
    fitted = [sphere.to_vector(row.footprint_ra, row.footprint_dec) for row in used]
    predicted = [
        sphere.to_vector(
            *camera.footprint(
                camera.detector(row.ccd), ra, dec, rotation, FOOTPRINT_POINTS_PER_EDGE
            )
        )
        for row in used
    ]
    before, after = np.concatenate(predicted), np.concatenate(fitted)
    turn = _best_rotation(before, after)
    new_ra, new_dec = sphere.from_vector(turn @ sphere.to_vector(ra, dec))
    return Pointing(
        ra=float(new_ra),
        dec=float(new_dec),
        rotation=_turned_angle(turn, ra, dec, rotation),
        rms=_arcsec_rms(before @ turn.T - after),
        extent=_arcsec_rms(after - after.mean(axis=0)),
        shift=float(sphere.separation(ra, dec, new_ra, new_dec) * 3600.0),
    )


def fit_without_strays(
    rows: Sequence[CcdRow], camera: Camera, ra: float, dec: float, rotation: float
) -> tuple[Pointing, list[CcdRow]]:
    """Fit the pointing without CCDs whose fitted footprint does not agree with the others.

    Parameters
    ----------
    rows, camera, ra, dec, rotation
        See `fit_pointing`.

    Returns
    -------
    pointing : Pointing
        Fitted to the CCDs that agree; to all if less than half of them do.
    strays : list of CcdRow
        The others: their WCS is wrong. None if less than half agree.
    """
    first = fit_pointing(rows, camera, ra, dec, rotation)
    kept, strays, found = list(rows), [], first
    while len(kept) > 2:
        limit = MAX_MISFIT * found.extent
        errors = [_distance(row, camera, found) for row in kept]
        worst = int(np.argmax(errors))
        # of the whole field: a CCD alone is small
        if errors[worst] <= limit:
            return found, strays
        strays.append(kept.pop(worst))
        if 2 * len(kept) <= len(rows):
            break
        found = fit_pointing(kept, camera, ra, dec, rotation)
    return (found, strays) if not misfit(found) and 2 * len(kept) > len(rows) else (first, [])


def _distance(row: CcdRow, camera: Camera, pointing: Pointing) -> float:
    """Return the rms distance of a fitted footprint from its place at a pointing, arcsec."""
    angles = pointing.ra, pointing.dec, pointing.rotation
    expected = camera.footprint(camera.detector(row.ccd), *angles, FOOTPRINT_POINTS_PER_EDGE)
    fitted = sphere.to_vector(row.footprint_ra, row.footprint_dec)
    return _arcsec_rms(sphere.to_vector(*expected) - fitted)


def misfit(pointing: Pointing, max_misfit: float = MAX_MISFIT) -> str | None:
    """Return why the camera file, and not the pointing, is at fault; None if it is not."""
    if pointing.rms <= max_misfit * pointing.extent:
        return None
    return (
        f"predicted and fitted outlines differ by {pointing.rms:.0f} arcsec at the best "
        "pointing: check scale, parity and positions in the camera file"
    )


def _best_rotation(before: NDArray, after: NDArray) -> NDArray[np.float64]:
    """Return the rotation matrix R that minimises sum |R before - after|^2 [2]_."""
    u, _, vt = np.linalg.svd(after.T @ before)
    return u @ np.diag([1.0, 1.0, np.linalg.det(u) * np.linalg.det(vt)]) @ vt


def _arcsec_rms(vectors: NDArray) -> float:
    return float(np.degrees(np.sqrt(np.mean(np.sum(vectors**2, axis=-1)))) * 3600.0)


def _turned_angle(turn: NDArray, ra: float, dec: float, rotation: float) -> float:
    """Return the position angle at the new pointing of what was at ``rotation`` at the old."""
    north, east = _north_east(ra, dec)
    angle = np.radians(rotation)
    direction = turn @ (np.cos(angle) * north + np.sin(angle) * east)
    north, east = _north_east(*sphere.from_vector(turn @ sphere.to_vector(ra, dec)))
    return float(np.degrees(np.arctan2(direction @ east, direction @ north)) % 360.0)


def _north_east(ra: float, dec: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the unit vectors to the north and to the east at a position."""
    ra, dec = np.radians(ra), np.radians(dec)
    north = np.array([-np.sin(dec) * np.cos(ra), -np.sin(dec) * np.sin(ra), np.cos(dec)])
    return north, np.array([-np.sin(ra), np.cos(ra), 0.0])
