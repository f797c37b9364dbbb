"""Settings of the coadds."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class ClipSettings(Section):
    """Which values of single exposures are outliers among all epochs of a pixel.

    A value is an outlier if it is farther from the median of the epochs than ``sigma`` times its
    noise, plus ``relative`` times the median, plus ``wings`` times the peak of a star nearby.
    """

    enabled: bool = Field(True, description="Whether outliers are clipped at all.")
    sigma: float = Field(5.0, gt=0.0, description="Threshold in units of the noise.")
    relative: float = Field(
        0.3,
        ge=0.0,
        description="Part of the median that is added to the threshold, for PSFs that differ. "
        "What the stated seeing of the exposures makes differ is added to it.",
    )
    wings: float = Field(
        0.1,
        ge=0.0,
        description="Part of the peak of a star that is added to the threshold beside it, for the "
        "wings of PSFs that differ; less from about 1 FWHM on.",
    )
    unknown_seeing_ratio: float = Field(
        1.5,
        ge=1.0,
        description="How much sharper than the others an exposure of unknown seeing may be.",
    )
    smooth_sigma: float | None = Field(
        5.0,
        gt=0.0,
        description="Threshold for means of 4 x 4 pixels, which finds faint trails; null: off.",
    )
    grow_sigma: float = Field(
        2.5,
        gt=0.0,
        description="Threshold for the neighbours of an outlier, in units of the noise.",
    )
    grow_radius: int = Field(
        2, ge=0, le=8, description="How far from an outlier that lower threshold holds, pixels."
    )
    max_fraction: float = Field(
        0.03,
        ge=0.0,
        lt=0.5,
        description="Of n epochs, min(0.4 n, 2 + max_fraction n) may be outliers at a pixel (none "
        "of 2, 1 of 3 or 4, 2 of 5 and more); if more are, it varies and nothing is clipped.",
    )


class BackgroundMatchingSettings(Section):
    """Whether the skies of the exposures of a tract are brought to a common level.

    One correction per exposure is solved for from all overlaps; needs `parallel.coadd: tract`.
    """

    enabled: bool = Field(False, description="Whether it is done.")
    model: Literal["constant", "plane"] = Field(
        "constant", description="What is subtracted from an exposure: a constant, or a plane."
    )
    bin_size: int = Field(
        256,
        ge=8,
        le=4096,
        description="Side of the squares of tract pixels in which the skies are compared.",
    )
    min_fraction: float = Field(
        0.2,
        gt=0.0,
        le=1.0,
        description="Part of a square that must be sky without detected sources or flaws.",
    )
    sigma: float = Field(
        4.0,
        gt=0.0,
        description="Squares that deviate by more than so many standard deviations from the "
        "solution are left out.",
    )


class CoaddSettings(Section):
    """How the warps of a band become a coadd."""

    bad_planes: tuple[str, ...] = Field(
        ("BAD", "SAT", "CR", "EDGE", "NO_DATA", "INTRP", "STREAK"),
        description="Mask planes with which a pixel of a warp is left out.",
    )
    fill_planes: tuple[str, ...] = Field(
        ("SAT", "INTRP"),
        description="Where every exposure is left out, those with one of these planes are used "
        "all the same, with the bits kept and a large variance, so that the cores of bright stars "
        "are no holes.",
    )
    fill_error: float = Field(
        1.0, ge=0.0, description="Relative error that is added to the pixels filled in so."
    )
    clip: ClipSettings = Field(default_factory=ClipSettings, description="Clipping of outliers.")
    background_matching: BackgroundMatchingSettings = Field(
        default_factory=BackgroundMatchingSettings,
        description="Bringing the exposures of a tract to a common sky.",
    )
    keep_warps: bool = Field(
        False,
        description="Write the warps too where a tract is one job (`parallel.coadd: tract`): the "
        "same warps as of `patch`, in results/warp. It costs their disk space. Tracts that are "
        "done are not done again for it (`snakemake --forcerun tract` does).",
    )
    spool_mb: int = Field(
        4096,
        ge=0,
        description="Memory in which a job of a tract keeps the warps that wait for their patches, "
        "MB; those beyond it wait in the scratch folder.",
    )
    scratch: str | None = Field(
        None,
        description="Folder for warps that wait and have no place in memory; null: that of the "
        "machine for temporary files (TMPDIR), or results/scratch if the job may have workers on "
        "other nodes (`parallel.backend: mpi`, `dask`), which all must have it.",
    )
    memory_mb: int = Field(
        512,
        ge=16,
        description="Memory for the pixels of all warps that a patch has in work at a time, MB; "
        "blocks of pixels are made to fit (but never less than 32 x 32 and what clipping needs "
        "around them).",
    )
