"""Settings of the astrometric solution of a whole exposure."""

from pydantic import Field

from coaddflow.settings.base import Section


class ExposureAstrometrySettings(Section):
    """One astrometric solution for the focal plane, with small terms for each CCD.

    How stars are matched and clipped stands in the section astrometry.
    """

    enabled: bool = Field(False, description="Whether the exposure is solved as a whole.")
    order: int = Field(
        5,
        ge=1,
        le=7,
        description="Order of the polynomial over the focal plane, on top of the distortion of the "
        "camera file; lowered where there are few stars.",
    )
    ccd_order: int = Field(
        2,
        ge=1,
        le=4,
        description="Order of the polynomial that each CCD may add. Its coefficients are held by "
        "the three sigmas below.",
    )
    offset_sigma: float = Field(
        5.0,
        gt=0,
        description="How far CCDs stand from where the camera file says, pixels (standard "
        "deviation of one axis). An upper limit: the CCDs of the exposure tell how far it is.",
    )
    rotation_sigma: float = Field(
        2.0,
        gt=0,
        description="How far a rotation of CCDs moves the middle of their short edge, pixels. An "
        "upper limit likewise.",
    )
    shape_sigma: float = Field(
        0.05,
        gt=0,
        description="Each other coefficient of a CCD, pixels at its edge. An upper limit likewise.",
    )
    min_ccds: int = Field(
        2, ge=2, description="With fewer CCDs that agree, each CCD is solved by itself."
    )
    max_offset: float = Field(
        25.0,
        gt=0,
        description="A CCD that stands farther from its place than this, pixels, is solved by "
        "itself.",
    )
    max_formal_error: float = Field(
        0.5,
        gt=0,
        description="A CCD of which the stars and the exposure tell a corner's place with a larger "
        "error than this, pixels, is solved by itself.",
    )
    max_rms_ratio: float = Field(
        3.0,
        gt=1,
        description="A CCD whose residuals, relative to the errors of its stars, are larger than "
        "those of the exposure by this factor is solved by itself.",
    )
