"""Settings of the selection of CCDs for coadds."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Ids, Section


class SelectionSettings(Section):
    """Quality cuts on the CCDs of a coadd; null: no cut.

    A CCD for which the value of a cut is unknown is left out, except by the two ratios. The INPUTS
    table of the coadd lists every CCD that is left out, with the reason; `coaddflow status` counts
    them. Where a band has no CCD left on a tract, its coadds fail.
    """

    max_seeing_ratio: float | None = Field(2.0, ge=1.0)
    """Largest FWHM of the PSF relative to the median of the band in the tract."""
    max_noise_ratio: float | None = Field(10.0, ge=1.0)
    """Largest sky noise in nJy (per area on the sky) relative to the median of the band in the
    tract: such a CCD would have a hundredth of the weight."""

    max_seeing: float | None = Field(None, gt=0)
    """Largest FWHM of the PSF, arcsec."""
    max_ellipticity: float | None = Field(None, ge=0, le=1)
    """Largest |e| of the PSF."""
    min_zero_point: float | None = None
    """Smallest zero-point for one electron per second, mag (zero-point less 2.5 log10(exposure
    time)); leaves out cloudy exposures."""
    max_zero_point_loss: float | None = Field(None, ge=0)
    """Largest loss of this zero-point relative to the median of the band in the tract, mag; leaves
    out cloudy exposures where the clear zero-point is not known."""
    max_zero_point_scatter: float | None = Field(None, ge=0)
    """Largest scatter of the stars of the zero-point, mag."""
    max_sky: float | None = None
    """Largest sky level, electrons per second per square arcsecond."""
    max_astrometry_rms: float | None = Field(None, gt=0)
    """Largest rms residual of the astrometric fit in one axis, arcsec."""
    min_matched: int | None = Field(None, ge=0)
    """Fewest stars of the CCD in the astrometric fit."""
    min_zero_point_stars: int | None = Field(None, ge=0)
    """Fewest stars of the zero-point."""
    min_psf_stars: int | None = Field(None, ge=0)
    """Fewest stars of the PSF model."""
    min_depth: float | None = None
    """Smallest 5-sigma magnitude of a point source on the calexp."""
    exclude_flags: tuple[Literal["predicted_wcs", "exposure_zero_point", "own_sky"], ...] = ()
    """CCDs with one of these flags of the manifest are left out: they have the WCS or zero-point of
    their exposure, or not the sky of the focal plane."""
    exclude_exposures: Ids = ()
    """Exposures to leave out."""
    exclude_ccds: tuple[int, ...] = ()
    """CCDs to leave out of all exposures."""
