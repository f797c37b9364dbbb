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

from collections.abc import Iterable

from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.rings import RingsSkyMap
from coaddflow.skymap.tangent import Footprint, TangentSkyMap, fit_tangent


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
