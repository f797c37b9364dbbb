"""Settings of the comparison of exposures that finds artifacts."""

from pydantic import Field

from coaddflow.settings.base import Section


class PsfMatchingSettings(Section):
    """Matching of warps to a common PSF."""

    max_ratio: float = Field(1.4, ge=1.0)
    """Exposures whose PSF is wider than this times the median are not matched to the common PSF
    (four exposures or more)."""
    margin: float = Field(1.05, gt=1.0, le=1.5)
    """Width of the common PSF relative to the widest PSF that is matched to it."""
    beta: float = Field(3.5, gt=1.0)
    """Exponent of the Moffat function that is the common PSF."""
    reach: float = Field(2.0, ge=1.0, le=4.0)
    """Half width of the kernels in FWHM of the common PSF."""
    order: int = Field(2, ge=0, le=4)
    """Order of the polynomial by which a kernel varies over a CCD; lower where the PSF is known at
    few positions."""
    damping: float = Field(1e-4, gt=0.0)
    """Weight of the noise of a kernel against the error of the PSF that it makes."""
    cell: int = Field(256, ge=32, le=2048)
    """Side of the cells that are convolved at a time, tract pixels."""
    mask_threshold: float = Field(0.05, ge=0.0, lt=1.0)
    """A pixel takes the mask bits of pixels with a larger part of the absolute kernel."""
    max_missing: float = Field(0.1, ge=0.0, lt=0.5)
    """Largest part of the absolute kernel on missing pixels: up to it a pixel is computed from the
    others and flagged EDGE, beyond it is NO_DATA."""
