"""Settings of the steps that make the calibrated image of one CCD."""

from pydantic import Field

from coaddflow.settings.base import Section


class CalexpSettings(Section):
    """What an exposure bears when some of its CCDs fail."""

    max_failed_fraction: float = Field(
        0.5, ge=0, le=1, description="An exposure fails if more of its CCDs than this failed."
    )
