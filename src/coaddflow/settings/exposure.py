"""Settings of the solutions for a whole exposure."""

from pydantic import Field

from coaddflow.settings.base import Section
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings
from coaddflow.settings.exposure_photometry import ExposurePhotometrySettings
from coaddflow.settings.sky_correction import SkyCorrectionSettings


class ExposureCrosstalkSettings(Section):
    """Crosstalk between CCDs, with the coefficients of the camera file."""

    enabled: bool = False
    """Correct it; within a CCD: `detrend.crosstalk`."""


class ExposureSettings(Section):
    """Solutions for the whole exposure; all need `parallel.calexp: exposure`."""

    crosstalk: ExposureCrosstalkSettings = Field(default_factory=ExposureCrosstalkSettings)
    astrometry: ExposureAstrometrySettings = Field(default_factory=ExposureAstrometrySettings)
    sky: SkyCorrectionSettings = Field(default_factory=SkyCorrectionSettings)
    photometry: ExposurePhotometrySettings = Field(default_factory=ExposurePhotometrySettings)

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the enabled parts."""
        return tuple(name for name in type(self).model_fields if getattr(self, name).enabled)
