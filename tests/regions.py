"""Which tracts and patches a region of the sky touches, by clipping one polygon after the other.

Vertices (ra, dec) are in order, ICRS degrees, joined by great circles; less than a hemisphere.
"""

from coaddflow.geometry import polygon, sphere


def patches_touching(tract, ra, dec):
    """Return the patches whose outer boxes overlap a region, x running fastest."""
    return [patch for patch, *_ in tract.patch_overlaps(ra, dec)]


def touches(tract, ra, dec):
    """Return whether a region overlaps the tract's pixels."""
    box = (-0.5, -0.5, tract.width - 0.5, tract.height - 0.5)
    return polygon.area(polygon.clip_to_box(tract.footprint_pixels(ra, dec), box)) > 1e-6


def tracts_touching(skymap, ra, dec):
    """Return, in order, the tracts whose pixels overlap a region."""
    axis, radius = polygon.bounding_cap(sphere.to_vector(ra, dec))
    circle = (*map(float, sphere.from_vector(axis)), float(radius))
    return [i for i in skymap.tracts_near(*circle) if touches(skymap.tract(i), ra, dec)]
