"""Settings of the astrometric solution."""

from pydantic import Field

from coaddflow.settings.base import Section


class AstrometrySettings(Section):
    """How sources are matched with the reference catalogue and the WCS is fitted."""

    max_pointing_error: float = Field(
        30.0,
        gt=0,
        le=600,
        description="Largest error of the pointing in the header, arcminutes. The reference stars "
        "of a circle larger by this are searched.",
    )
    max_rotation_error: float = Field(
        180.0,
        gt=0,
        le=180,
        description="Largest error of the rotation in the header, degrees; 180 for any.",
    )
    max_scale_error: float = Field(
        0.03,
        gt=0,
        le=0.2,
        description="Largest relative error of the camera's pixel scale.",
    )
    either_parity: bool = Field(
        True, description="Also look for a mirror image of what the camera file says."
    )
    match_tolerance: float = Field(
        2.0,
        gt=0,
        description="Typical distance in pixels between stars and their predicted places after "
        "the best shift, rotation and scale: centroid errors, and distortion that the camera file "
        "does not describe. A thousandth of the CCD's diagonal is taken if that is more.",
    )
    max_chance: float = Field(
        1e-4,
        gt=0,
        lt=1,
        description="A match is believed if fewer chance matches than this are expected.",
    )
    min_matches: int = Field(5, ge=4, description="Fewest matched stars for a solution.")
    max_sources: int = Field(
        1000, ge=10, description="Only so many of the brightest sources of a CCD are used."
    )
    sip_order: int = Field(
        3,
        ge=1,
        le=5,
        description="Order of the polynomial that is fitted; lowered where there are few stars. "
        "Distortion of the camera file is kept in the orders above.",
    )
    stars_per_term: float = Field(
        3.0, ge=1.5, description="Fewest stars for each coefficient of the polynomial of one axis."
    )
    max_corner_error: float = Field(
        2.5,
        gt=0,
        description="The order is lowered until the polynomial's formal error is, everywhere on "
        "the CCD, less than this times the error of one star.",
    )
    clip_sigma: float = Field(3.5, gt=1, description="Stars with larger residuals are left out.")
    centroid_floor: float = Field(
        0.02,
        gt=0,
        description="Error in pixels that is added to all centroid errors before weighting.",
    )
    max_rms_pixels: float = Field(
        0.5,
        gt=0,
        description="Largest rms distance (both axes together) between stars and catalogue, "
        "pixels. The CCD fails above it.",
    )
