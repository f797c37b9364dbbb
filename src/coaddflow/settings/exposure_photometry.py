"""Settings of the zero-point of a whole exposure."""

from pydantic import Field

from coaddflow.settings.base import Section


class ExposurePhotometrySettings(Section):
    """One zero-point for the exposure, with a smooth variation over the focal plane."""

    enabled: bool = False
    """Solve one zero-point for the exposure."""
    order: int = Field(2, ge=0, le=6)
    """Order of the polynomial over the focal plane; lowered for few stars."""
    stars_per_term: float = Field(10.0, ge=1)
    """Stars needed per term of the polynomial."""
    ccd_sigma: float = Field(0.05, ge=0)
    """Upper limit for the scatter of the constants of CCDs, mag; the scatter is estimated from the
    stars. 0: no constants."""
    clip_sigma: float = Field(3.5, gt=0)
    """Stars that deviate by more than this many sigma are rejected."""
    min_stars: int = Field(10, ge=1)
    """With fewer stars in total, each CCD has its own zero-point."""
    flatten: bool = True
    """Correct image, variance and fluxes for the variation within the CCD, so that its zero-point
    is valid everywhere on it."""
