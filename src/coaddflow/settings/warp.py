"""Settings of the warps."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class WarpSettings(Section):
    """Resampling of CCD pixels onto the pixels of a tract."""

    kernel: Literal["lanczos3", "lanczos5", "bilinear"] = "lanczos3"
    """Interpolation kernel: `lanczos3` preserves PSF and noise best at its cost; `lanczos5` is
    sharper but rings farther; `bilinear` blurs."""
    grid_step: int = Field(32, ge=4, le=512)
    """Spacing of the grid on which the pixel mapping is computed, pixels; interpolated with cubics,
    and halved where that exceeds `grid_tolerance`."""
    grid_tolerance: float = Field(1e-3, gt=0.0, le=0.1)
    """Largest error of the interpolated mapping, pixels."""
    mask_threshold: float = Field(0.05, ge=0.0, lt=1.0)
    """A pixel takes the mask bits of input pixels with a larger absolute weight than this."""
    max_missing: float = Field(0.1, ge=0.0, lt=0.5)
    """Largest sum of absolute weights of missing input pixels: up to it a pixel is computed from
    the others and flagged EDGE, beyond it is NO_DATA."""
