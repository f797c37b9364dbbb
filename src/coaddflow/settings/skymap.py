"""Settings of the sky map."""

from typing import Literal

from pydantic import Field, model_validator

from coaddflow.settings.base import Section


class RingsSettings(Section):
    """All-sky map in rings of declination; the defaults are those of the HSC survey."""

    num_rings: int = Field(120, ge=1, le=2000)
    """Rings of tracts between the polar caps; tracts have a size of 180 degrees / (num_rings +
    1)."""
    ra_start: float = Field(0.0, ge=0.0, lt=360.0)
    """RA of the centre of the first tract of each ring, degrees."""
    tract_overlap: float = Field(1.0 / 60.0, ge=0.0, le=5.0)
    """Minimum extent of a tract beyond its inner region, degrees."""
    version: Literal[0, 1] = 1
    """Numbering of the tracts at ra_start. 1: current Rubin pipelines. 0: HSC-SSP releases, which
    number these tracts differently and omit the first tract of the northernmost ring."""


class TangentSettings(Section):
    """One tract on one tangent plane; null values are fitted to the exposures."""

    ra: float | None = Field(None, ge=0.0, lt=360.0)
    """RA of the centre, degrees."""
    dec: float | None = Field(None, ge=-90.0, le=90.0)
    """Declination of the centre, degrees."""
    width: float | None = Field(None, gt=0.0, le=40.0)
    """Extent from east to west, degrees."""
    height: float | None = Field(None, gt=0.0, le=40.0)
    """Extent from south to north, degrees."""

    @model_validator(mode="after")
    def _check(self) -> "TangentSettings":
        if (self.ra is None) != (self.dec is None):
            raise ValueError("give both ra and dec, or neither")
        if (self.width is None) != (self.height is None):
            raise ValueError("give both width and height, or neither")
        return self


class SkymapSettings(Section):
    """Division of the sky into tracts and patches, the images of coadds."""

    kind: Literal["rings", "tangent"] = "rings"
    """`rings`: the all-sky scheme of HSC and Rubin; `tangent`: one tract, for a small survey."""
    pixel_scale: float | None = Field(None, gt=0.0, le=60.0)
    """Pixel scale of warps and coadds, arcsec; null: that of the camera, or of the images that were
    calibrated elsewhere."""
    patch_inner_size: int = Field(4000, ge=16, le=32000)
    """Columns and rows of a patch without its border; a tangent tract is divided into equal patches
    of at most this size."""
    patch_border: int = Field(100, ge=0, le=4000)
    """Width by which a patch extends into its neighbours, pixels."""
    rings: RingsSettings = Field(default_factory=RingsSettings)
    """For `kind: rings`."""
    tangent: TangentSettings = Field(default_factory=TangentSettings)
    """For `kind: tangent`."""

    @model_validator(mode="after")
    def _check(self) -> "SkymapSettings":
        if self.patch_border > self.patch_inner_size:
            raise ValueError("patch_border is larger than patch_inner_size")
        return self
