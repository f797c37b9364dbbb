"""Settings of the warps."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class WarpSettings(Section):
    """How the pixels of a CCD are resampled onto the pixels of a tract."""

    kernel: Literal["lanczos3", "lanczos5", "bilinear"] = Field(
        "lanczos3",
        description="Interpolation. lanczos3 keeps the PSF and the noise best at its cost; "
        "lanczos5 is sharper and rings farther; bilinear blurs.",
    )
    grid_step: int = Field(
        32,
        ge=4,
        le=512,
        description="The mapping between pixels is computed every so many pixels and interpolated "
        "with cubics in between; halved where that misses grid_tolerance.",
    )
    grid_tolerance: float = Field(
        1e-3, gt=0.0, le=0.1, description="Largest error of the interpolated mapping, pixels."
    )
    mask_threshold: float = Field(
        0.05,
        ge=0.0,
        lt=1.0,
        description="A pixel takes the mask bits of those input pixels whose weight in it is "
        "larger than this, in absolute value.",
    )
    max_missing: float = Field(
        0.1,
        ge=0.0,
        lt=0.5,
        description="Largest sum of the absolute weights of missing input pixels with which a "
        "pixel is still computed (from the others, and flagged EDGE); beyond it is NO_DATA.",
    )
