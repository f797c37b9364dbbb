"""Settings of detrending and of the search for cosmic rays."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class DetrendSettings(Section):
    """From raw counts to electrons. Steps whose calibration frame is missing are left out."""

    check_raw: bool = Field(
        True,
        description="Verify DATASUM where a raw file has one, and refuse data that end in zero "
        "bytes, as a broken copy leaves them.",
    )
    overscan: Literal["rows", "polynomial", "constant", "none"] = Field(
        "rows",
        description="Bias level from the overscan: `rows`: clipped mean of each row, smoothed; "
        "`polynomial`: fitted along the rows; `constant`: one number for each amplifier.",
    )
    overscan_skip: int = Field(
        2,
        ge=0,
        description="Overscan columns next to the data that are not used (trailing charge); at "
        "most half of the columns.",
    )
    overscan_smoothing: int = Field(
        9, ge=1, description="Rows over which the level of `rows` is averaged; 1: none."
    )
    overscan_order: int = Field(3, ge=0, le=15, description="Order of `polynomial`.")
    pedestal: float = Field(
        0.0,
        description="Counts subtracted from amplifiers without overscan, for cameras that have "
        "neither overscan nor bias frames.",
    )
    saturation: bool = Field(True, description="Mask saturated pixels (SAT, SUSPECT).")
    saturation_growth: int = Field(
        1, ge=0, description="Pixels by which saturated regions are grown in all directions."
    )
    bleed_length: int = Field(
        4,
        ge=1,
        description="Runs of saturated pixels of at least this length in one column are bleeding.",
    )
    bleed_growth: int = Field(
        4, ge=0, description="Pixels by which bleeding is grown along its column at both ends."
    )
    suspect_fraction: float = Field(
        0.95, gt=0, le=1, description="Part of the saturation from which pixels are SUSPECT."
    )
    crosstalk: bool = Field(True, description="Correct crosstalk between the amplifiers of a CCD.")
    saturated_ghosts: float = Field(
        0.25,
        gt=0,
        le=1,
        description="Ghosts of saturated pixels are known only from below: they are flagged "
        "CROSSTALK where the correction is larger than this part of the noise, ghosts of other "
        "pixels where it is larger than the noise.",
    )
    bias: bool = Field(True, description="Subtract the master bias.")
    linearity: bool = Field(True, description="Correct non-linearity.")
    dark: bool = Field(True, description="Subtract the master dark.")
    dark_scale: Literal["exposure_time", "fitted"] = Field(
        "exposure_time",
        description="`fitted`: the dark scaled by the exposure time is scaled once more by a "
        "factor fitted to its hot pixels, for detectors whose temperature drifts.",
    )
    flat: bool = Field(True, description="Divide by the flat.")
    flat_limits: tuple[float, float] = Field(
        (0.1, 10.0), description="Pixels whose flat is not between these values are BAD."
    )
    defects: bool = Field(True, description="Mask the defects of camera file and defects frame.")
    edge: int = Field(5, ge=0, description="Width of the border that is flagged EDGE, pixels.")


class CosmicsSettings(Section):
    """Cosmic rays on a single exposure, by the sharpness of their edges."""

    enabled: bool = Field(True, description="Look for cosmic rays.")
    sigma: float = Field(
        5.0, gt=0, description="Significance of the Laplacian that a cosmic ray has at least."
    )
    neighbour_fraction: float = Field(
        0.3, gt=0, le=1, description="Part of `sigma` that suffices beside a cosmic ray."
    )
    contrast: float = Field(
        3.0,
        gt=0,
        description="Contrast between Laplacian and fine structure; larger protects sharp stars.",
    )
    iterations: int = Field(
        1, ge=1, le=8, description="Passes; each costs several seconds on a CCD of 8 Mpixel."
    )
    psf_sharpness: float = Field(
        0.8,
        gt=0,
        le=1,
        description="A detection counts if, in some direction, its neighbours are fainter than "
        "this part of what they are in the sharpest stars of the image.",
    )
    seeing: float = Field(
        2.0,
        ge=1,
        description="FWHM in pixels that is taken for the stars of an image which has too few of "
        "them; too large a value makes stars into cosmic rays.",
    )
    growth: int = Field(1, ge=0, le=5, description="Pixels by which cosmic rays are grown.")
    max_fraction: float = Field(
        0.05,
        gt=0,
        le=1,
        description="If more of the CCD than this is flagged, the CCD fails: the seeing or the "
        "noise model is wrong.",
    )


class InterpolationSettings(Section):
    """Filling of small masked regions."""

    planes: tuple[str, ...] = Field(
        ("BAD", "CR"), description="Mask planes whose pixels are filled from their neighbours."
    )
    max_gap: int = Field(
        5,
        ge=1,
        description="Gaps longer than this along both rows and columns stay as they are.",
    )
    saturated_gap: int = Field(
        100,
        ge=0,
        description="The cores of saturated stars are filled with the PSF fitted to their wings; "
        "where that fails, runs of at most so many saturated pixels are bridged along the rows. "
        "All stay flagged SAT.",
    )
