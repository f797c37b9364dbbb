"""Settings of the calexp stage."""

from pydantic import Field

from coaddflow.settings.base import Section


class CalexpSettings(Section):
    """How many CCDs of an exposure may fail."""

    max_failed_fraction: float = Field(0.5, ge=0, le=1)
    """The exposure fails if a larger fraction of its CCDs failed."""
