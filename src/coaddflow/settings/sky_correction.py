"""Settings of the sky over a whole focal plane."""

from pydantic import Field

from coaddflow.settings.base import Section


class SkyCorrectionSettings(Section):
    """One sky for the focal plane in place of one for each CCD."""

    enabled: bool = Field(False, description="Whether the sky is that of the focal plane.")
    scale: float = Field(
        20.0,
        gt=0,
        description="Distance of the knots of the sky, arcmin: what is larger is sky, what is "
        "much smaller stays on the image.",
    )
    response_sigma: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Expected scatter of the response of CCDs beside each other (flats are "
        "normalised on each CCD); 0: all respond alike.",
    )
    clip_sigma: float = Field(
        3.0, gt=0, description="Significance from which superpixels are sources or defects."
    )
    grow: float = Field(
        3.0,
        ge=0,
        description="Growth of extended sources found on the focal plane, in superpixels.",
    )
    min_fraction: float = Field(
        0.2,
        gt=0,
        le=1,
        description="With a smaller part of the superpixels showing sky, CCDs keep their own.",
    )
