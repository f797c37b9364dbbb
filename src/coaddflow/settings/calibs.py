"""Settings of the calibration frames."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from coaddflow.settings.base import Ids, Section
from coaddflow.settings.calib_sets import CalibSetsSettings


class _Kind(Section):
    """What all kinds of calibration frames have in common."""

    # which frames are combined is in the inputs of a job
    without_effect: ClassVar[frozenset[str]] = frozenset({"sets"})

    source: str
    path: str | None = None
    """With `given`: path of the files; {ccd}, {band} and {set} are replaced."""
    exposures: Ids | None = None
    """Exposures to make it from; null: all that are suitable."""
    min_frames: int = Field(3, ge=2)
    """Fewest exposures; with fewer it is not made."""
    sets: CalibSetsSettings | None = None
    """Sets of this kind; null: those of `calibs.sets`, `{}`: one for all nights."""

    @model_validator(mode="after")
    def _check(self) -> "_Kind":
        if (self.source == "given") != (self.path is not None):
            raise ValueError("path belongs to source `given`, where it is required")
        return self


class BiasSettings(_Kind):
    """Master bias, in counts, after overscan subtraction."""

    source: Literal["frames", "given", "none"] = "frames"
    """`frames`: made from bias exposures; `given`: read from `path`."""


class DarkSettings(_Kind):
    """Master dark, in electrons per second."""

    source: Literal["frames", "night_sky", "given", "none"] = "frames"
    """`frames`: made from dark exposures; `night_sky`: the additive pattern of dithered science
    exposures (hot and warm pixels, bias structure), with zero mean; `given`: read from `path`."""


class FlatSettings(_Kind):
    """Flat of each band, with median 1 on each CCD."""

    source: Literal["frames", "night_sky", "given", "none"] = "frames"
    """`frames`: made from flat exposures of the band; `night_sky`: from the sky of dithered science
    exposures of the band; `given`: read from `path`."""
    scales: Literal["all", "large", "small"] = "all"
    """Part of the night-sky flat that is used: `all`, only the smooth illumination (`large`), or
    only the response of single pixels (`small`)."""
    smoothing: int = Field(64, ge=4)
    """Pixels over which the illumination of `large` is averaged."""


class DefectsSettings(_Kind):
    """Map of hot, dead and other bad pixels."""

    source: Literal["frames", "night_sky", "given", "none"] = "frames"
    """`frames`: made from the master dark and the flats; `night_sky`: from dithered science
    exposures; `given`: read from `path`."""
    hot_sigma: float = Field(10.0, gt=0)
    """Hot pixels: minimum excess over the neighbours, in robust sigma."""
    hot_rate: float | None = Field(None, gt=0)
    """Hot pixels: additional minimum excess in the dark, electrons per second, which leaves weakly
    hot pixels to dark subtraction; null: none."""
    response: float = Field(0.3, gt=0, lt=1)
    """Pixels whose flat differs from its neighbourhood by more than this fraction are bad."""
    column_sigma: float = Field(8.0, gt=0)
    """Bad columns: minimum deviation of a segment of a column, in robust sigma."""


class NightSkySettings(Section):
    """Calibration frames from dithered science exposures."""

    min_frames: int = Field(5, ge=3)
    """Fewest science exposures; fewer are rejected."""
    threshold: float = Field(2.0, gt=0)
    """Sources are masked above this many sigma of the smoothed frame."""
    growth: int = Field(2, ge=0)
    """Growth of masked sources, pixels."""
    mesh: int = Field(64, ge=8)
    """Mesh size of the local sky in this search, pixels."""
    max_persistence: float = Field(0.3, gt=0, le=1)
    """Largest fraction of source pixels that may be sources in more than half of the exposures;
    above it the dithers are too small and the exposures are rejected."""
    min_clear: int = Field(3, ge=2)
    """Pixels free of sources in fewer exposures than this are filled from neighbours."""


class CalibsSettings(Section):
    """Calibration frames: where they come from and how they are combined."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"memory", "sets", "longitude"})

    sets: CalibSetsSettings = Field(default_factory=CalibSetsSettings)
    """Sets of calibration frames, each of which holds for some nights; by default one for all."""
    longitude: float | None = Field(None, ge=-180, le=180)
    """Longitude of the observatory, degrees, positive to the east: nights are from noon to noon.
    Needed for sets."""
    bias: BiasSettings = Field(default_factory=BiasSettings)
    """Master bias."""
    dark: DarkSettings = Field(default_factory=DarkSettings)
    """Master dark."""
    flat: FlatSettings = Field(default_factory=FlatSettings)
    """Flats."""
    defects: DefectsSettings = Field(default_factory=DefectsSettings)
    """Defects."""
    night_sky: NightSkySettings = Field(default_factory=NightSkySettings)
    """Calibration frames from science exposures."""
    clip_sigma: float = Field(4.0, ge=2)
    """Values farther than this many sigma from the median of a pixel are rejected."""
    clip_iterations: int = Field(3, ge=0, le=20)
    """Iterations of clipping."""
    shrink_noise: bool = True
    """Remove from biases, darks and flats of few exposures what is noise rather than structure of
    the detector."""
    memory: float = Field(1.0, gt=0)
    """Stacks larger than this, GB, are kept on disk while they are combined."""

    def sets_of(self, kind: str) -> CalibSetsSettings:
        """Return the sets of a kind of calibration frames: its own, or those of all kinds."""
        own = getattr(self, kind)
        if not self._is_dated(kind):
            return CalibSetsSettings()
        return self.sets if own.sets is None else own.sets

    def least_frames(self, kind: str) -> int:
        """Return the fewest frames of a set of a kind, of those that are for some nights each."""
        own = getattr(self, kind)
        is_sky = own.source == "night_sky"
        return max(own.min_frames, self.night_sky.min_frames) if is_sky else own.min_frames

    def _is_dated(self, kind: str) -> bool:
        """Return whether frames of a kind can be in sets.

        Frames given by a path without {set} cannot, and defects have the sets of the frames on
        which they are found.
        """
        own = getattr(self, kind)
        if own.path is not None:
            return "{set}" in own.path
        return own.source != "none" and not (kind == "defects" and self.defects_from)

    def _why_undated(self, kind: str) -> str:
        own = getattr(self, kind)
        if own.source == "none":
            return "source is `none`"
        if own.path is not None:
            return "given frames need {set} in their path"
        return "defects have the sets of the frames on which they are found"

    @property
    def defects_from(self) -> tuple[str, ...]:
        """Kinds of calibration frames on which defects are found; empty: they are not."""
        if self.defects.source == "frames":
            return ("dark", "flat")
        is_sky = self.defects.source == self.dark.source == "night_sky"
        return ("dark",) if is_sky and self.defects.exposures is None else ()

    @model_validator(mode="after")
    def _check_sets(self) -> "CalibsSettings":
        for kind, own in self:
            if not isinstance(own, _Kind):
                continue
            sets = self.sets_of(kind)
            if own.sets is not None and own.sets.in_use and not self._is_dated(kind):
                raise ValueError(f"calibs.{kind}.sets has no effect: {self._why_undated(kind)}")
            if own.path is not None and "{set}" in own.path and not sets.nights:
                raise ValueError(f"calibs.{kind}.path has {{set}}: name the sets (sets.nights)")
            if sets.in_use and self.longitude is None:
                raise ValueError("calibs.sets needs calibs.longitude, by which nights are divided")
        return self
