"""Making the sky map that the settings describe."""

from collections.abc import Iterable, Sequence

from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.base import SkyMap
from coaddflow.skymap.rings import RingsSkyMap
from coaddflow.skymap.tangent import Footprint, TangentSkyMap, fit_tangent

HSC_PIXEL_SCALE = 0.168
"""Pixel scale of the sky map of HSC and of Rubin's early data, arcsec."""


def make_skymap(
    settings: SkymapSettings,
    footprints: Iterable[Footprint] | None = None,
    pixel_scale: float = HSC_PIXEL_SCALE,
    names: Sequence[str] | None = None,
) -> SkyMap:
    """Return the sky map that the settings describe.

    Parameters
    ----------
    settings : SkymapSettings
        Kind and parameters.
    footprints : iterable of (ra, dec), optional
        Outlines of the exposures, degrees; needed where the settings leave the centre or the
        size of a tangent tract to be fitted.
    pixel_scale : float
        Pixel scale where the settings leave it open, arcsec.
    names : sequence of str, optional
        Exposure of each outline, for messages.

    Raises
    ------
    InputError
        As `fit_tangent`.
    """
    if settings.pixel_scale is None:
        settings = settings.model_copy(update={"pixel_scale": pixel_scale})
    if settings.kind == "rings":
        return RingsSkyMap(settings)
    return TangentSkyMap(fit_tangent(settings, footprints, names))
