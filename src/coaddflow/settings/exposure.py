"""Settings of the solutions for a whole exposure."""

from typing import Any

from pydantic import Field

from coaddflow.settings.base import Section
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings
from coaddflow.settings.exposure_photometry import ExposurePhotometrySettings
from coaddflow.settings.sky_correction import SkyCorrectionSettings


class ExposureCrosstalkSettings(Section):
    """Crosstalk between CCDs, with the coefficients of the camera file."""

    enabled: bool = Field(False, description="Correct it; within a CCD: `detrend.crosstalk`.")


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

    def parts(self) -> dict[str, Any]:
        """Return the enabled parts, on which products depend, as plain values."""
        return {name: getattr(self, name).model_dump(mode="json") for name in self.enabled}
