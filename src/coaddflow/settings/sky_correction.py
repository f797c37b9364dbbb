"""Settings of the sky over a whole focal plane."""

from pydantic import Field

from coaddflow.settings.base import Section


class SkyCorrectionSettings(Section):
    """One sky for the focal plane in place of one for each CCD."""

    enabled: bool = Field(False, description="Whether the sky is that of the focal plane.")
