"""Settings of the astrometric solution of a whole exposure."""

from pydantic import Field

from coaddflow.settings.base import Section


class ExposureAstrometrySettings(Section):
    """One astrometric solution for the focal plane, with small terms for each CCD."""

    enabled: bool = Field(False, description="Whether the exposure is solved as a whole.")
