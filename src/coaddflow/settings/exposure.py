"""Settings of what is solved for a whole exposure, in a job that holds all its CCDs."""

from typing import Any

from pydantic import Field

from coaddflow.settings.base import Section
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings
from coaddflow.settings.exposure_photometry import ExposurePhotometrySettings
from coaddflow.settings.sky_correction import SkyCorrectionSettings


class ExposureCrosstalkSettings(Section):
    """Crosstalk between CCDs, from the coefficients of the camera file."""

    enabled: bool = Field(
        False, description="Whether it is corrected; within a CCD: `detrend.crosstalk`."
    )


class ExposureSettings(Section):
    """What the CCDs of an exposure have in common; all of it needs `parallel.calexp: exposure`."""

    crosstalk: ExposureCrosstalkSettings = Field(default_factory=ExposureCrosstalkSettings)
    astrometry: ExposureAstrometrySettings = Field(default_factory=ExposureAstrometrySettings)
    sky: SkyCorrectionSettings = Field(default_factory=SkyCorrectionSettings)
    photometry: ExposurePhotometrySettings = Field(default_factory=ExposurePhotometrySettings)

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the parts that are switched on."""
        return tuple(name for name in type(self).model_fields if getattr(self, name).enabled)

    def parts(self) -> dict[str, Any]:
        """Return the parts that are switched on as plain values: what products depend on."""
        return {name: getattr(self, name).model_dump(mode="json") for name in self.enabled}
