"""Settings of the sky background of a CCD."""

from pydantic import Field, model_validator

from coaddflow.settings.base import Section


class BackgroundSettings(Section):
    """Sky background: a mesh of superpixels with sources masked."""

    mesh_size: int = Field(128, ge=8)
    """Approximate size of a superpixel, pixels; the CCD is tiled evenly."""
    clip_sigma: float = Field(3.0, ge=1.5)
    """Pixels farther than this many sigma from the mean of a superpixel are rejected."""
    mask_sigma: float = Field(3.0, gt=0)
    """Significance above which small and large blocks are masked as sources."""
    mask_passes: int = Field(3, ge=0)
    """Passes of masking sources and estimating the sky again."""
    small_block: int = Field(4, ge=1)
    """Block size for finding stars, pixels."""
    large_block: int = Field(16, ge=1)
    """Block size for finding faint halos of stars and galaxies, pixels."""
    min_fraction: float = Field(0.4, ge=0, lt=1)
    """Superpixels with less sky than this fraction of the median superpixel are filled from their
    neighbours."""
    filter_size: int = Field(3, ge=1)
    """Width of the median filter over superpixels; odd; 1: none."""

    @model_validator(mode="after")
    def _check(self) -> "BackgroundSettings":
        if self.filter_size % 2 == 0:
            raise ValueError("filter_size must be odd")
        return self
