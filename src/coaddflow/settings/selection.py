"""Settings that choose which CCDs go into the coadds."""

from pydantic import Field

from coaddflow.settings.base import Section


class SelectionSettings(Section):
    """Quality that a CCD must have to go into a coadd; null: no cut.

    A CCD whose quality in a figure with a cut is not known is left out. Every CCD that is left
    out stands in the coadd's table of inputs with the reason.
    """

    max_seeing: float | None = Field(None, gt=0, description="FWHM of the PSF, arcsec.")
    max_ellipticity: float | None = Field(None, ge=0, le=1, description="|e| of the PSF.")
    min_zero_point: float | None = Field(
        None,
        description="Magnitude of one electron per second: the zero-point less "
        "2.5 log10(exposure time). Leaves out cloudy exposures.",
    )
    max_zero_point_loss: float | None = Field(
        None,
        ge=0,
        description="How much less than the median of its band in the tract this magnitude may "
        "be. Leaves out cloudy exposures where the clear zero-point is not known beforehand.",
    )
    max_zero_point_scatter: float | None = Field(
        None, ge=0, description="Scatter of the stars of the zero-point, mag."
    )
    max_sky: float | None = Field(
        None, description="Sky level, electrons per second and square arcsecond."
    )
    max_astrometry_rms: float | None = Field(
        None, gt=0, description="Residual of the astrometric fit in one coordinate, arcsec."
    )
    min_matched: int | None = Field(
        None, ge=0, description="Stars of this CCD in the astrometric fit."
    )
    min_zero_point_stars: int | None = Field(None, ge=0, description="Stars of the zero-point.")
    min_psf_stars: int | None = Field(None, ge=0, description="Stars of the PSF model.")
    min_depth: float | None = Field(
        None, description="Magnitude of a point source at 5 sigma on the calexp."
    )
    exclude_exposures: tuple[str, ...] = Field((), description="Exposures to leave out.")
    exclude_ccds: tuple[int, ...] = Field((), description="CCDs to leave out of all exposures.")
