"""Settings of the zero-point of a whole exposure."""

from pydantic import Field

from coaddflow.settings.base import Section


class ExposurePhotometrySettings(Section):
    """One zero-point for the exposure, with a smooth residual over the focal plane."""

    enabled: bool = Field(False, description="Whether the exposure has one zero-point.")
