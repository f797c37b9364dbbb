"""Settings of the coadds."""

from typing import ClassVar, Literal

from pydantic import Field

from coaddflow.settings.base import Section


class ClipSettings(Section):
    """Rejection of outliers among all epochs of a pixel.

    A value is an outlier if it differs from the median of the epochs by more than ``sigma`` times
    its noise, plus ``relative`` times the median, plus ``wings`` times the peak of a star nearby.
    """

    enabled: bool = True
    """Reject outliers."""
    sigma: float = Field(5.0, gt=0.0)
    """Threshold in units of the noise."""
    relative: float = Field(0.3, ge=0.0)
    """Fraction of the median added to the threshold, for differing PSFs; what the stated seeing
    predicts is added to it."""
    wings: float = Field(0.1, ge=0.0)
    """Fraction of the peak of a star added to the threshold beside it, for differing wings of PSFs;
    less beyond about 1 FWHM."""
    unknown_seeing_ratio: float = Field(1.5, ge=1.0)
    """How much sharper than the others an exposure of unknown seeing may be."""
    smooth_sigma: float | None = Field(5.0, gt=0.0)
    """Threshold for means of 4 x 4 pixels, in units of the noise, which finds faint trails; null:
    off."""
    grow_sigma: float = Field(2.5, gt=0.0)
    """Threshold for neighbours of an outlier, in units of the noise."""
    grow_radius: int = Field(2, ge=0, le=8)
    """Distance from an outlier to which `grow_sigma` applies, pixels."""
    max_fraction: float = Field(0.03, ge=0.0, lt=0.5)
    """Of n epochs at most min(0.4 n, 2 + max_fraction n) may be outliers at a pixel; where there
    are more, the source varies and nothing is rejected."""


class BackgroundMatchingSettings(Section):
    """Matching of the skies of the exposures of a tract; needs `parallel.coadd: tract`."""

    enabled: bool = False
    """Match the skies."""
    model: Literal["constant", "plane"] = "constant"
    """Correction of an exposure: a constant or a plane."""
    bin_size: int = Field(8, ge=4, le=256)
    """Side of the cells in which the skies are compared, tract pixels. Two exposures are compared
    in the cells that both cover whole; overlaps narrower than this have none."""
    min_fraction: float = Field(0.5, gt=0.0, le=1.0)
    """Smallest fraction of the pixels of a cell that must be usable (none of `bad_planes`)."""
    sigma: float = Field(4.0, gt=0.0)
    """Cells that deviate from the constant or plane of their overlap by more than this many
    standard deviations are rejected."""


class CoaddSettings(Section):
    """Combination of the warps of a band."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"memory_mb", "keep_warps", "spool_mb", "scratch"}
    )

    weight: Literal["point_source", "sky"] = "point_source"
    """Weight of an exposure: `point_source` is the inverse of sky variance times the effective area
    of the PSF, best for stars and faint galaxies; `sky` is the inverse of the sky variance, best
    for surface brightness."""
    bad_planes: tuple[str, ...] = ("BAD", "SAT", "CR", "EDGE", "NO_DATA", "INTRP", "STREAK")
    """Mask planes whose pixels are excluded."""
    fill_planes: tuple[str, ...] = ("SAT", "INTRP")
    """Where all exposures are excluded, pixels with one of these planes are used with a large
    variance, and keep their bits, so that cores of bright stars are not holes."""
    fill_error: float = Field(1.0, ge=0.0)
    """Relative error added to such pixels."""
    clip: ClipSettings = Field(default_factory=ClipSettings)
    """Rejection of outliers."""
    background_matching: BackgroundMatchingSettings = Field(
        default_factory=BackgroundMatchingSettings
    )
    """Matching of the skies of the exposures of a tract."""
    keep_warps: bool = False
    """With `parallel.coadd: tract`, also write the warps to results/warp, as `patch` does. Finished
    tracts are not redone for it (`snakemake --forcerun tract` does)."""
    spool_mb: int = Field(4096, ge=0)
    """Memory in which a tract job keeps warps that wait for their patches, MB; the others wait in
    `scratch`."""
    scratch: str | None = None
    """Folder for waiting warps that do not fit into memory; null: the temporary folder (TMPDIR), or
    results/scratch if workers may be on other nodes (`parallel.backend: mpi`, `dask`), all of which
    need access."""
    memory_mb: int = Field(512, ge=16)
    """Memory for the pixels of all warps that a patch processes at a time, MB; blocks of pixels are
    sized to fit, but not below 32 x 32 and the margin for clipping."""
