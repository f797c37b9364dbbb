"""Settings of the calexp stage."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class CalexpSettings(Section):
    """How many CCDs of an exposure, and how many exposures, may fail."""

    max_failed_fraction: float = Field(0.5, ge=0, le=1)
    """The exposure fails if a larger fraction of its CCDs failed."""
    on_failed_exposure: Literal["leave_out", "stop"] = "leave_out"
    """What becomes of an exposure that fails by its data: `leave_out`: tracts are coadded without
    it, and it comes in by itself once the cause is mended; `stop`: its job fails, and so nothing is
    coadded that it can touch."""
    max_left_out_fraction: float = Field(0.2, ge=0, le=1)
    """`coaddflow status` reports an error (exit code 4) if a larger fraction of the exposures is
    left out."""
