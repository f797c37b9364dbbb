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


class TrailSettings(Section):
    """Search for straight trails in the difference of an exposure."""

    sigma: float = Field(8.0, gt=0.0)
    """Threshold of the sum along a line, in units of its noise."""
    max_width: int = Field(60, ge=8, le=200)
    """Widest trail, pixels."""
    min_length: int = Field(200, ge=64)
    """Shortest line with data that can be a trail, pixels."""
    min_coverage: float = Field(0.6, gt=0.0, le=1.0)
    """Least part of the line through the image, where it has data, along which the trail is seen:
    spikes of stars and bleed columns end."""
    max_trails: int = Field(10, ge=1)
    """Trails of an exposure at most."""


class ArtifactSettings(Section):
    """Artifacts: regions of single exposures that differ from the model of the static sky."""

    sigma: float = Field(6.0, gt=0.0)
    """Threshold of a region, in units of the noise of the smoothed difference, which has more large
    values than a normal distribution where the epochs are few."""
    grow_sigma: float = Field(2.5, gt=0.0)
    """A region goes on to where the smoothed difference falls below this."""
    coarse: int = Field(4, ge=2, le=16)
    """Side of the bins of the second, coarser map of differences, pixels: it shows what is wide and
    faint."""
    relative: float = Field(0.05, ge=0.0, lt=1.0)
    """Part of the static light nearby by which a difference is reduced, for what is left of stars
    after the matching of the PSFs."""
    max_fraction: float = Field(0.03, ge=0.0, lt=0.5)
    """Of n epochs at most min(0.4 n, 2 + max_fraction n) may show a region that is an artifact."""
    max_persistent: float = Field(0.5, gt=0.0, le=1.0)
    """Part of a region that more epochs may show: trails cross variable stars."""
    trails: TrailSettings = Field(default_factory=TrailSettings)
    """Search for straight trails."""
