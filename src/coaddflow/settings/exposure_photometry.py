"""Settings of the zero-point of a whole exposure."""

from pydantic import Field

from coaddflow.settings.base import Section


class ExposurePhotometrySettings(Section):
    """One zero-point for the exposure, with a smooth residual over the focal plane."""

    enabled: bool = Field(False, description="Whether the exposure has one zero-point.")
    order: int = Field(
        2,
        ge=0,
        le=6,
        description="Order of the polynomial over the focal plane (lowered for few stars).",
    )
    stars_per_term: float = Field(
        10.0, ge=1, description="Stars needed for each term of the polynomial."
    )
    ccd_sigma: float = Field(
        0.05,
        ge=0,
        description="Largest scatter of the constants of CCDs, mag; how large it is the stars "
        "tell. 0: CCDs have no constants.",
    )
    clip_sigma: float = Field(
        3.5, gt=0, description="Stars that deviate more than this are left out."
    )
    min_stars: int = Field(
        10, ge=1, description="With fewer stars in all, each CCD has a zero-point by itself."
    )
    flatten: bool = Field(
        True,
        description="Whether image, variance and fluxes are divided by the residual inside the "
        "CCD, so that its zero-point holds all over it.",
    )
