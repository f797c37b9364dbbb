"""Which patches a CCD covers, and how much of them.

References
----------
.. [1] Sutherland & Hodgman 1974, Commun. ACM 17, 32 (covered fractions by clipping).
"""

from numpy.typing import ArrayLike

from coaddflow.geometry import polygon, sphere
from coaddflow.skymap.tract import Tract


def patch_overlaps(
    footprint_ra: ArrayLike, footprint_dec: ArrayLike, tract: Tract
) -> list[tuple[str, float, float]]:
    """Return the patches of a tract that a footprint overlaps, and how much [1]_.

    Parameters
    ----------
    footprint_ra, footprint_dec : array_like, shape (n,)
        Outline in order, ICRS degrees; it may be slightly bowed.
    tract : Tract
        The tract.

    Returns
    -------
    list of (patch, patch_fraction, ccd_fraction)
        Fractions of the patch's outer box and of the footprint, by area on the tangent plane; x
        running fastest. Empty if the footprint misses the tract.
    """
    axis, radius = polygon.bounding_cap(sphere.to_vector(footprint_ra, footprint_dec))
    distance = sphere.separation(*sphere.from_vector(axis), tract.ra, tract.dec)
    if distance > radius + tract.radius + 1e-6:
        return []
    points = tract.footprint_pixels(footprint_ra, footprint_dec)
    whole = polygon.area(points)
    overlaps = []
    for patch_id, covered in tract.patch_areas(points).items():
        x0, y0, x1, y1 = tract.patch(patch_id).outer_box
        box_area = (x1 - x0) * (y1 - y0)
        overlaps.append((patch_id, min(covered / box_area, 1.0), min(covered / whole, 1.0)))
    return overlaps
