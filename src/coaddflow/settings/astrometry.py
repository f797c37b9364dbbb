"""Settings of the astrometric solution."""

from pydantic import Field

from coaddflow.settings.base import Section


class AstrometrySettings(Section):
    """Matching with the reference catalogue, and fit of the WCS."""

    max_pointing_error: float = Field(30.0, gt=0, le=600)
    """Largest error of the pointing in the header, arcmin; the cone of reference stars is larger by
    this. An exposure off by more than `prediction.margin` is solved in one run and goes into the
    coadds with the next."""
    max_rotation_error: float = Field(180.0, gt=0, le=180)
    """Largest error of the rotation in the header, degrees; 180: any."""
    max_scale_error: float = Field(0.03, gt=0, le=0.2)
    """Largest relative error of the camera's pixel scale."""
    either_parity: bool = True
    """Also try the mirror image of the camera file."""
    match_tolerance: float = Field(2.0, gt=0)
    """Typical distance of stars from their predicted positions after the best shift, rotation and
    scale, pixels (centroid errors, unknown distortion); at least a thousandth of the CCD diagonal
    is used."""
    max_chance: float = Field(1e-4, gt=0, lt=1)
    """A match is accepted if fewer chance matches than this are expected."""
    min_matches: int = Field(5, ge=4)
    """Fewest matched stars for a solution."""
    max_sources: int = Field(1000, ge=10)
    """Number of brightest sources of a CCD that are used."""
    sip_order: int = Field(3, ge=1, le=5)
    """Order of the fitted polynomial; lowered for few stars. Higher orders keep the distortion of
    the camera file."""
    stars_per_term: float = Field(3.0, ge=1.5)
    """Fewest stars per coefficient of the polynomial of one axis."""
    max_corner_error: float = Field(2.5, gt=0)
    """The order is lowered until the formal error of the polynomial, everywhere on the CCD, is
    below this times the error of one star."""
    clip_sigma: float = Field(3.5, gt=1)
    """Stars with residuals above this many sigma are rejected."""
    centroid_floor: float = Field(0.02, gt=0)
    """Added in quadrature to all centroid errors, pixels."""
    max_rms_pixels: float = Field(0.5, gt=0)
    """Largest rms distance (both axes) between stars and catalogue, pixels; above it the CCD
    fails."""
