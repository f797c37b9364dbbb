"""Settings of the detection of sources."""

from pydantic import Field

from coaddflow.settings.base import Section


class DetectionSettings(Section):
    """Detection of sources with a matched filter."""

    threshold: float = Field(5.0, gt=0)
    """Detection threshold, signal-to-noise in the filtered image."""
    min_pixels: int = Field(3, ge=1)
    """Fewest pixels of a source."""
    deblend_levels: int = Field(32, ge=1)
    """Number of deblending levels."""
    deblend_contrast: float = Field(0.005, ge=0, le=1)
    """Smallest fraction of the flux that makes a separate source."""
    initial_fwhm: float = Field(3.0, gt=0)
    """FWHM assumed until the seeing is measured, pixels."""
    seeing_threshold: float = Field(10.0, gt=0)
    """Signal-to-noise of the sources that give the seeing."""
    grow: float = Field(1.0, ge=0)
    """Growth of the DETECTED plane around sources, in FWHM."""
