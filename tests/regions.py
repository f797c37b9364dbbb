"""Which tracts and patches a region of the sky touches, by clipping one polygon after the other.

Vertices (ra, dec) are in order, ICRS degrees, joined by great circles; less than a hemisphere.

References
----------
.. [1] Sutherland & Hodgman 1974, Commun. ACM 17, 32 (clipping against convex regions).
"""

from coaddflow.geometry import polygon, sphere


def clip_to_box(points, box):
    """Return the part of a polygon, vertices (x, y), inside a rectangle (x0, y0, x1, y1) [1]_."""
    x0, y0, x1, y1 = box
    for axis, sign, edge in ((0, 1.0, x0), (0, -1.0, x1), (1, 1.0, y0), (1, -1.0, y1)):
        points = polygon.clip_half_space(points, sign * (points[:, axis] - edge))
        if len(points) == 0:
            break
    return points


def overlaps_by_clipping(tract, ra, dec):
    """Return (patch, patch_fraction, ccd_fraction) of the patches that a region overlaps."""
    points = tract.footprint_pixels(ra, dec)
    found = []
    for patch in tract.patches() if len(points) > 2 else []:
        x0, y0, x1, y1 = patch.outer_box
        covered = polygon.area(clip_to_box(points, (x0 - 0.5, y0 - 0.5, x1 - 0.5, y1 - 0.5)))
        if covered > 1e-6:
            fractions = covered / ((x1 - x0) * (y1 - y0)), covered / polygon.area(points)
            found.append((patch.id, *(min(part, 1.0) for part in fractions)))
    return found


def patches_touching(tract, ra, dec):
    """Return the patches whose outer boxes overlap a region, x running fastest."""
    return [patch for patch, *_ in overlaps_by_clipping(tract, ra, dec)]


def touches(tract, ra, dec):
    """Return whether a region overlaps the tract's pixels."""
    box = (-0.5, -0.5, tract.width - 0.5, tract.height - 0.5)
    return polygon.area(clip_to_box(tract.footprint_pixels(ra, dec), box)) > 1e-6


def tracts_touching(skymap, ra, dec):
    """Return, in order, the tracts whose pixels overlap a region."""
    axis, radius = polygon.bounding_cap(sphere.to_vector(ra, dec))
    circle = (*map(float, sphere.from_vector(axis)), float(radius))
    return [i for i in skymap.tracts_near(*circle) if touches(skymap.tract(i), ra, dec)]
