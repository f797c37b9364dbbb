"""Settings of the calibration frames."""

from typing import Literal

from pydantic import Field, model_validator

from coaddflow.settings.base import Section


class _Kind(Section):
    """What all kinds of calibration frames have in common."""

    source: str
    path: str | None = Field(
        None,
        description="With `given`: path of the files; {ccd} and {band} stand for the number of "
        "the CCD and the band.",
    )
    exposures: tuple[str, ...] | None = Field(
        None, description="Exposures to make it from; null: all of the fitting kind."
    )
    min_frames: int = Field(3, ge=2, description="With fewer exposures it is not made.")

    @model_validator(mode="after")
    def _check(self) -> "_Kind":
        if (self.source == "given") != (self.path is not None):
            raise ValueError("path belongs to source `given`, and is needed there")
        return self


class BiasSettings(_Kind):
    """Master bias, in counts, after overscan subtraction."""

    source: Literal["frames", "given", "none"] = Field(
        "frames", description="`frames`: made from bias exposures."
    )


class DarkSettings(_Kind):
    """Master dark, in electrons per second."""

    source: Literal["frames", "night_sky", "given", "none"] = Field(
        "frames",
        description="`frames`: made from dark exposures; `night_sky`: the additive pattern that "
        "stays on the CCD while dithered science exposures move on the sky (hot and warm pixels, "
        "bias structure), of mean zero.",
    )


class FlatSettings(_Kind):
    """Flat, for each band; its median over the CCD is 1."""

    source: Literal["frames", "night_sky", "given", "none"] = Field(
        "frames",
        description="`frames`: made from flat exposures of the band; `night_sky`: from the sky of "
        "dithered science exposures of the band.",
    )
    scales: Literal["all", "large", "small"] = Field(
        "all",
        description="What of the night-sky flat is used: `large`: the smooth illumination only; "
        "`small`: the response of single pixels only.",
    )
    smoothing: int = Field(
        64, ge=4, description="Pixels over which the illumination of `large` is averaged."
    )


class DefectsSettings(_Kind):
    """Map of hot, dead and otherwise bad pixels."""

    source: Literal["frames", "night_sky", "given", "none"] = Field(
        "frames",
        description="`frames`: from the master dark and the flats; `night_sky`: from dithered "
        "science exposures.",
    )
    hot_sigma: float = Field(
        10.0, gt=0, description="Hot pixels: excess over the neighbours, in robust sigma."
    )
    hot_rate: float | None = Field(
        None,
        gt=0,
        description="Hot pixels: excess of the dark in electrons per second, in addition to "
        "`hot_sigma`, where weakly hot pixels are left to the subtraction of the dark.",
    )
    response: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="Pixels whose flat differs from its neighbourhood by more than this are bad.",
    )
    column_sigma: float = Field(
        8.0, gt=0, description="Bad columns: deviation of a piece of a column, in robust sigma."
    )


class NightSkySettings(Section):
    """How dithered science exposures are turned into calibration frames."""

    min_frames: int = Field(5, ge=3, description="With fewer science exposures it is refused.")
    threshold: float = Field(
        2.0, gt=0, description="Sources are masked down to this many sigma of the smoothed frame."
    )
    growth: int = Field(2, ge=0, description="Pixels by which masked sources are grown.")
    mesh: int = Field(64, ge=8, description="Mesh of the local sky for this search, pixels.")
    max_persistence: float = Field(
        0.3,
        gt=0,
        le=1,
        description="Largest part of the pixels with sources that may have them in more than half "
        "of the exposures; above, the exposures are not dithered enough.",
    )
    min_clear: int = Field(
        3, ge=2, description="Pixels seen free of sources less often are filled from neighbours."
    )


class CalibsSettings(Section):
    """Calibration frames: where they come from and how they are combined."""

    bias: BiasSettings = Field(default_factory=BiasSettings, description="Master bias.")
    dark: DarkSettings = Field(default_factory=DarkSettings, description="Master dark.")
    flat: FlatSettings = Field(default_factory=FlatSettings, description="Flats.")
    defects: DefectsSettings = Field(default_factory=DefectsSettings, description="Defects.")
    night_sky: NightSkySettings = Field(
        default_factory=NightSkySettings, description="Calibration from science exposures."
    )
    clip_sigma: float = Field(
        4.0, ge=2, description="Values farther than this from the median of a pixel are left out."
    )
    clip_iterations: int = Field(3, ge=0, le=20, description="Rounds of clipping.")
    memory: float = Field(
        1.0,
        gt=0,
        description="Stacks larger than this (GB) stand on disk while they are combined.",
    )
