"""Settings of the astrometric solution of a whole exposure."""

from pydantic import Field

from coaddflow.settings.base import Section


class ExposureAstrometrySettings(Section):
    """One astrometric solution for the focal plane, with small terms for each CCD.

    Stars are matched and clipped as in the section astrometry.
    """

    enabled: bool = False
    """Solve the exposure as a whole."""
    order: int = Field(5, ge=1, le=7)
    """Order of the polynomial over the focal plane, on top of the distortion of the camera file;
    lowered for few stars."""
    ccd_order: int = Field(2, ge=1, le=4)
    """Order of the polynomial of each CCD, whose coefficients have the following priors."""
    offset_sigma: float = Field(5.0, gt=0)
    """Upper limit for the scatter of CCD positions around the camera file in one axis, pixels; the
    scatter is estimated from the exposure."""
    rotation_sigma: float = Field(2.0, gt=0)
    """Upper limit for the scatter of CCD rotations, as shift of the middle of the short edge,
    pixels."""
    shape_sigma: float = Field(0.05, gt=0)
    """Upper limit for the scatter of each other coefficient, pixels at the edge of the CCD."""
    min_ccds: int = Field(2, ge=2)
    """With fewer CCDs that agree, each CCD is solved by itself."""
    max_offset: float = Field(25.0, gt=0)
    """A CCD farther than this from its predicted position, pixels, is solved by itself."""
    max_formal_error: float = Field(0.5, gt=0)
    """A CCD with a larger formal error at a corner, pixels, is solved by itself."""
    max_predicted_error: float = Field(1.0, ge=0)
    """A CCD with too few stars for a solution of its own takes that of its exposure if the expected
    error at a corner is below this, pixels (flag `predicted_wcs` in the manifest); 0: it fails."""
    max_rms_ratio: float = Field(3.0, gt=1)
    """A CCD is solved by itself if its residuals, relative to the errors of its stars, exceed those
    of the exposure by this factor."""
