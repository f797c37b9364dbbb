"""Settings of the sky map."""

from typing import Literal

from pydantic import Field, model_validator

from coaddflow.settings.base import Section


class RingsSettings(Section):
    """The all-sky map in rings of declination; the defaults are those of the HSC survey."""

    num_rings: int = Field(
        120,
        ge=1,
        le=2000,
        description="Rings of tracts between the two polar caps; sets the size of the tracts "
        "(180 degrees / (num_rings + 1)).",
    )
    ra_start: float = Field(
        0.0, ge=0.0, lt=360.0, description="RA of the centre of the first tract of each ring, deg."
    )
    tract_overlap: float = Field(
        1.0 / 60.0,
        ge=0.0,
        le=5.0,
        description="How far a tract extends at least beyond its inner region, degrees.",
    )
    version: Literal[0, 1] = Field(
        1,
        description="Numbering of the tracts at ra_start. 1: that of the Rubin pipelines today. "
        "0: that of the HSC-SSP releases, which names these tracts differently and leaves the "
        "first tract of the northernmost ring out.",
    )


class TangentSettings(Section):
    """One tract on one tangent plane; what is null is fitted to the exposures."""

    ra: float | None = Field(
        None, ge=0.0, lt=360.0, description="RA of the centre, degrees; null: fitted."
    )
    dec: float | None = Field(
        None, ge=-90.0, le=90.0, description="Declination of the centre, degrees; null: fitted."
    )
    width: float | None = Field(
        None, gt=0.0, le=40.0, description="Extent from east to west, degrees; null: fitted."
    )
    height: float | None = Field(
        None, gt=0.0, le=40.0, description="Extent from south to north, degrees; null: fitted."
    )

    @model_validator(mode="after")
    def _check(self) -> "TangentSettings":
        if (self.ra is None) != (self.dec is None):
            raise ValueError("give both ra and dec, or neither")
        if (self.width is None) != (self.height is None):
            raise ValueError("give both width and height, or neither")
        return self


class SkymapSettings(Section):
    """How the sky is cut into tracts and patches, the images that coadds are made of."""

    kind: Literal["rings", "tangent"] = Field(
        "rings",
        description="rings: the all-sky scheme of HSC and Rubin. tangent: one tract, for a small "
        "survey.",
    )
    pixel_scale: float = Field(
        0.168, gt=0.0, le=60.0, description="Arcseconds per pixel of warps and coadds."
    )
    patch_inner_size: int = Field(
        4000,
        ge=16,
        le=32000,
        description="Columns and rows of a patch without its border; a tangent tract is divided "
        "into equal patches of at most this size.",
    )
    patch_border: int = Field(
        100, ge=0, le=4000, description="Overlap of a patch into its neighbours, pixels."
    )
    rings: RingsSettings = Field(default_factory=RingsSettings, description="For kind: rings.")
    tangent: TangentSettings = Field(
        default_factory=TangentSettings, description="For kind: tangent."
    )

    @model_validator(mode="after")
    def _check(self) -> "SkymapSettings":
        if self.patch_border > self.patch_inner_size:
            raise ValueError("patch_border is larger than patch_inner_size")
        return self
