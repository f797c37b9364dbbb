"""Settings of detrending, cosmic rays and filling."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class DetrendSettings(Section):
    """From raw counts to electrons. Steps whose calibration frame is missing are skipped."""

    check_raw: bool = True
    """Verify DATASUM and CHECKSUM where a raw file has them, and reject data that end in zero
    bytes, as in an incomplete copy."""
    overscan: Literal["rows", "polynomial", "constant", "none"] = "rows"
    """Bias level from the overscan: clipped mean of each row, smoothed as far as it is smooth
    (`rows`; jumps and scatter of rows are followed), polynomial along the rows (`polynomial`), one
    level per amplifier (`constant`), or `none`."""
    overscan_skip: int = Field(2, ge=0)
    """Overscan columns next to the data that are ignored because of trailing charge; at most half
    of them."""
    overscan_smoothing: int = Field(9, ge=1)
    """Fewest rows over which the level of `rows` is averaged; 1: none."""
    overscan_order: int = Field(3, ge=0, le=15)
    """Order of `polynomial`."""
    pedestal: float = 0.0
    """Counts subtracted from amplifiers without overscan, for cameras with neither overscan nor
    bias frames."""
    saturation: bool = True
    """Mask saturated pixels (SAT, SUSPECT)."""
    saturation_growth: int = Field(1, ge=0)
    """Growth of saturated regions in all directions, pixels."""
    bleed_length: int = Field(4, ge=1)
    """Runs of at least this many saturated pixels in a column are bleed trails."""
    bleed_growth: int = Field(4, ge=0)
    """Growth of bleed trails at both ends, pixels."""
    suspect_fraction: float = Field(0.95, gt=0, le=1)
    """Fraction of the saturation level above which pixels are SUSPECT."""
    crosstalk: bool = True
    """Correct crosstalk between the amplifiers of a CCD."""
    saturated_ghosts: float = Field(0.25, gt=0, le=1)
    """CROSSTALK is set where the correction exceeds the noise; for ghosts of saturated pixels,
    which are lower limits, where it exceeds this fraction of the noise."""
    bias: bool = True
    """Subtract the master bias."""
    linearity: bool = True
    """Correct non-linearity."""
    dark: bool = True
    """Subtract the master dark."""
    dark_scale: Literal["exposure_time", "fitted"] = "exposure_time"
    """Scale the dark by the exposure time; with `fitted` also by a factor fitted to its hot pixels,
    for detectors whose temperature drifts."""
    flat: bool = True
    """Divide by the flat."""
    flat_limits: tuple[float, float] = (0.1, 10.0)
    """Pixels whose flat is outside this range are BAD."""
    defects: bool = True
    """Mask the defects of the camera file and of the defect map."""
    max_lost_fraction: float = Field(0.75, ge=0, le=1)
    """A CCD fails if a larger fraction of its pixels is BAD, SAT or NO_DATA: the default allows for
    one dead amplifier of two."""
    edge: int = Field(5, ge=0)
    """Width of the border that is flagged EDGE, pixels."""


class CosmicsSettings(Section):
    """Cosmic rays on a single exposure, found by their sharpness."""

    enabled: bool = True
    """Find cosmic rays."""
    sigma: float = Field(5.0, gt=0)
    """Detection threshold in the Laplacian, sigma."""
    neighbour_fraction: float = Field(0.3, gt=0, le=1)
    """Fraction of `sigma` that suffices next to a cosmic ray."""
    contrast: float = Field(3.0, gt=0)
    """Minimum contrast between Laplacian and fine structure; larger protects sharp stars."""
    iterations: int = Field(1, ge=1, le=8)
    """Number of iterations; each one more finds about 1 % more of the pixels."""
    psf_sharpness: float = Field(0.8, gt=0, le=1)
    """A candidate is accepted if, in some direction, its neighbours are fainter than this fraction
    of what they are in the sharpest stars of the image."""
    seeing: float = Field(2.0, ge=1)
    """FWHM assumed if the image has too few stars, pixels; too large a value makes stars into
    cosmic rays."""
    growth: int = Field(1, ge=0, le=5)
    """Growth of cosmic rays, pixels."""
    max_fraction: float = Field(0.05, gt=0, le=1)
    """If a larger fraction is flagged the CCD fails: the seeing or the noise model is wrong."""


class InterpolationSettings(Section):
    """Filling of small masked regions."""

    planes: tuple[str, ...] = ("BAD", "CR")
    """Mask planes whose pixels are filled from their neighbours."""
    max_gap: int = Field(5, ge=1)
    """Gaps longer than this along both row and column are not filled, pixels."""
    saturated_gap: int = Field(100, ge=0)
    """Cores of saturated stars are filled with the PSF fitted to their wings; where that fails,
    runs of at most this many saturated pixels are bridged along the rows. All keep SAT."""
