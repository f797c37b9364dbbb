"""Settings of detrending, cosmic rays and filling."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class DetrendSettings(Section):
    """From raw counts to electrons. Steps whose calibration frame is missing are skipped."""

    check_raw: bool = Field(
        True,
        description="Verify DATASUM where a raw file has one, and reject data that end in zero "
        "bytes, as in an incomplete copy.",
    )
    overscan: Literal["rows", "polynomial", "constant", "none"] = Field(
        "rows",
        description="Bias level from the overscan: smoothed clipped mean of each row (`rows`), "
        "polynomial along the rows (`polynomial`), one level per amplifier (`constant`), or "
        "`none`.",
    )
    overscan_skip: int = Field(
        2,
        ge=0,
        description="Overscan columns next to the data that are ignored because of trailing "
        "charge; at most half of them.",
    )
    overscan_smoothing: int = Field(
        9, ge=1, description="Rows over which the level of `rows` is averaged; 1: none."
    )
    overscan_order: int = Field(3, ge=0, le=15, description="Order of `polynomial`.")
    pedestal: float = Field(
        0.0,
        description="Counts subtracted from amplifiers without overscan, for cameras with neither "
        "overscan nor bias frames.",
    )
    saturation: bool = Field(True, description="Mask saturated pixels (SAT, SUSPECT).")
    saturation_growth: int = Field(
        1, ge=0, description="Growth of saturated regions in all directions, pixels."
    )
    bleed_length: int = Field(
        4,
        ge=1,
        description="Runs of at least this many saturated pixels in a column are bleed trails.",
    )
    bleed_growth: int = Field(4, ge=0, description="Growth of bleed trails at both ends, pixels.")
    suspect_fraction: float = Field(
        0.95,
        gt=0,
        le=1,
        description="Fraction of the saturation level above which pixels are SUSPECT.",
    )
    crosstalk: bool = Field(True, description="Correct crosstalk between the amplifiers of a CCD.")
    saturated_ghosts: float = Field(
        0.25,
        gt=0,
        le=1,
        description="CROSSTALK is set where the correction exceeds the noise; for ghosts of "
        "saturated pixels, which are lower limits, where it exceeds this fraction of the noise.",
    )
    bias: bool = Field(True, description="Subtract the master bias.")
    linearity: bool = Field(True, description="Correct non-linearity.")
    dark: bool = Field(True, description="Subtract the master dark.")
    dark_scale: Literal["exposure_time", "fitted"] = Field(
        "exposure_time",
        description="Scale the dark by the exposure time; with `fitted` also by a factor fitted to "
        "its hot pixels, for detectors whose temperature drifts.",
    )
    flat: bool = Field(True, description="Divide by the flat.")
    flat_limits: tuple[float, float] = Field(
        (0.1, 10.0), description="Pixels whose flat is outside this range are BAD."
    )
    defects: bool = Field(
        True, description="Mask the defects of the camera file and of the defect map."
    )
    edge: int = Field(5, ge=0, description="Width of the border that is flagged EDGE, pixels.")


class CosmicsSettings(Section):
    """Cosmic rays on a single exposure, found by their sharpness."""

    enabled: bool = Field(True, description="Find cosmic rays.")
    sigma: float = Field(5.0, gt=0, description="Detection threshold in the Laplacian, sigma.")
    neighbour_fraction: float = Field(
        0.3, gt=0, le=1, description="Fraction of `sigma` that suffices next to a cosmic ray."
    )
    contrast: float = Field(
        3.0,
        gt=0,
        description="Minimum contrast between Laplacian and fine structure; larger protects sharp "
        "stars.",
    )
    iterations: int = Field(
        1,
        ge=1,
        le=8,
        description="Number of iterations; each takes several seconds on a CCD of 8 megapixels.",
    )
    psf_sharpness: float = Field(
        0.8,
        gt=0,
        le=1,
        description="A candidate is accepted if, in some direction, its neighbours are fainter "
        "than this fraction of what they are in the sharpest stars of the image.",
    )
    seeing: float = Field(
        2.0,
        ge=1,
        description="FWHM assumed if the image has too few stars, pixels; too large a value makes "
        "stars into cosmic rays.",
    )
    growth: int = Field(1, ge=0, le=5, description="Growth of cosmic rays, pixels.")
    max_fraction: float = Field(
        0.05,
        gt=0,
        le=1,
        description="If a larger fraction is flagged the CCD fails: the seeing or the noise model "
        "is wrong.",
    )


class InterpolationSettings(Section):
    """Filling of small masked regions."""

    planes: tuple[str, ...] = Field(
        ("BAD", "CR"), description="Mask planes whose pixels are filled from their neighbours."
    )
    max_gap: int = Field(
        5,
        ge=1,
        description="Gaps longer than this along both row and column are not filled, pixels.",
    )
    saturated_gap: int = Field(
        100,
        ge=0,
        description="Cores of saturated stars are filled with the PSF fitted to their wings; where "
        "that fails, runs of at most this many saturated pixels are bridged along the rows. All "
        "keep SAT.",
    )
