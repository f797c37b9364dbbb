"""Settings of the sky over the focal plane."""

from pydantic import Field

from coaddflow.settings.base import Section


class SkyCorrectionSettings(Section):
    """One sky for the focal plane in place of one for each CCD."""

    enabled: bool = False
    """Fit the sky over the focal plane."""
    scale: float = Field(20.0, gt=0)
    """Spacing of the knots of the sky, arcmin: larger structure is sky, much smaller structure
    stays on the image."""
    response_sigma: float = Field(0.05, ge=0, lt=1)
    """Expected scatter of the response of CCDs (flats are normalised on each CCD); 0: equal
    response."""
    clip_sigma: float = Field(3.0, gt=0)
    """Significance above which superpixels are sources or defects."""
    grow: float = Field(3.0, ge=0)
    """Growth of extended sources, in superpixels."""
    min_fraction: float = Field(0.5, gt=0, le=1)
    """Smallest fraction of superpixels with sky; below it CCDs keep their own sky, with the flag
    `own_sky` in the manifest. A third of them was seen to give a sky that is 0.7 % too low."""
    max_level_ratio: float = Field(3.0, gt=1)
    """A CCD whose sky differs from the median of the CCDs by more than this factor has no part in
    the fit, and keeps its own sky."""
