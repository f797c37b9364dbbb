"""Settings of images that were calibrated elsewhere and enter after the calexp stage."""

from typing import Literal

from pydantic import Field, model_validator

from coaddflow.settings.base import Section
from coaddflow.settings.value_key import ValueKey

PixelUnit = Literal[
    "electron",
    "electron_per_second",
    "adu",
    "adu_per_second",
    "nanojansky",
    "microjansky",
    "jansky",
    "nanomaggy",
]

FLUX_ZERO_POINTS = {"nanojansky": 31.4, "microjansky": 23.9, "jansky": 8.9, "nanomaggy": 22.5}
"""AB magnitude of one unit."""


class Fact(ValueKey):
    """Where to find one property of an image: in a header, a table, the file name, or here."""

    column: str | None = None
    """Column of the table `facts`."""
    value: str | int | float | None = None
    """The value itself, the same for all images."""

    @model_validator(mode="after")
    def _check(self) -> "Fact":
        if sum(source is not None for source in (self.keyword, self.column, self.value)) > 1:
            raise ValueError("give one of keyword, column and value")
        return self


class FactsTableSettings(Section):
    """A table with one row per image, such as the CCD table of a survey."""

    path: str | None = None
    """FITS table, ECSV or CSV file; null: no table."""
    hdu: int = Field(1, ge=1)
    """HDU of a FITS table."""
    match: dict[str, Fact] = Field(default_factory=dict)
    """For each key column of the table, the property of the image that it must equal; together they
    must select one row."""


class CompanionSettings(Section):
    """Where the weight map or the mask of an image is."""

    kind: str
    replace: tuple[str, str] | None = None
    """Text in the name of the image file and its replacement in the name of this file; null: the
    same file."""
    hdu: int | str | None = None
    """HDU number or name; null: the HDU of the image plus `hdu_offset`."""
    hdu_offset: int = 0
    """HDU of this minus that of the image."""


class WeightSettings(CompanionSettings):
    """Weight map of an image."""

    kind: Literal["inverse_variance", "variance", "rms", "none"] = "none"
    """Quantity in the weight map; `none`: the variance is estimated from the sky."""
    zero_planes: tuple[str, ...] = ("NO_DATA",)
    """Mask planes set where the weight is zero or not a number. SAT pixels of the mask are kept, so
    that cores of bright stars are not holes."""


class MaskSettings(CompanionSettings):
    """Mask of an image."""

    kind: Literal["bits", "codes", "named_bits", "none"] = "none"
    """`bits`: sums of powers of two; `codes`: each value is one condition; `named_bits`: bits named
    in header cards MP_<name>."""
    planes: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Mask planes for each bit number (0 is the lowest), code or name; an empty list: none."""
    unlisted: tuple[str, ...] = ("BAD",)
    """Mask planes for bits, codes or names that `planes` does not list."""

    @model_validator(mode="before")
    @classmethod
    def _keys_are_text(cls, content: object) -> object:
        # YAML reads `3: [SAT]` as a number
        if isinstance(content, dict) and isinstance(content.get("planes"), dict):
            planes = {
                str(key): [names] if isinstance(names, str) else names
                for key, names in content["planes"].items()
            }
            content = {**content, "planes": planes}
        return content

    @model_validator(mode="after")
    def _check(self) -> "MaskSettings":
        if self.kind in ("bits", "codes"):
            for key in self.planes:
                if not key.lstrip("-").isdecimal():
                    raise ValueError(f"planes: {key!r} is not a number")
        if self.kind == "bits" and any(not 0 <= int(key) < 64 for key in self.planes):
            raise ValueError("planes: bit numbers are 0 to 63")
        return self


class CalibratedSettings(Section):
    """Images calibrated elsewhere: any FITS image with a WCS and a zero-point."""

    table: str | None = None
    """Table of the images, made by `coaddflow ingest --calibrated`."""
    names: tuple[str, ...] = ("*.fits", "*.fits.gz", "*.fits.fz")
    """Shell patterns of the image files."""
    hdu: int | str | None = None
    """HDU number or name of the image; null: every HDU with a 2-d image."""
    exposure: Fact = Fact(pattern=r"^([^.]+)")
    """Exposure id."""
    ccd: Fact = Fact(value=0)
    """CCD number."""
    band: Fact = Fact(keyword="FILTER")
    """Band."""
    mjd: Fact = Fact(keyword="MJD-OBS", unit="mjd")
    """Start of the exposure."""
    exposure_time: Fact = Fact(keyword="EXPTIME", unit="second")
    """Exposure time, s."""
    facts: FactsTableSettings = FactsTableSettings()
    """Table of properties that are not in the headers."""
    weight: WeightSettings = WeightSettings()
    """Weight map."""
    mask: MaskSettings = MaskSettings()
    """Mask."""
    unit: PixelUnit = "electron"
    """Unit of the pixels."""
    check_unit: bool = True
    """Skip images whose BUNIT is another unit, of those that can be told apart for certain."""
    check_sums: bool = True
    """Verify DATASUM and CHECKSUM of images, weights and masks that have them."""
    gain: Fact = Fact(value=1.0)
    """Electrons per count (ADU), or per flux unit for images in flux units."""
    zero_point: Fact | None = None
    """AB magnitude of one `zero_point_unit`; null: follows from the unit (images in flux units)."""
    zero_point_unit: PixelUnit | None = None
    """Unit to which the zero-point refers; null: that of the image."""
    zero_point_error: Fact | None = None
    """Error of the zero-point, mag."""
    seeing: Fact | None = None
    """FWHM of the PSF; null: measured."""
    seeing_unit: Literal["arcsec", "pixel"] = "arcsec"
    """Unit of the seeing."""
    sky: Fact | None = None
    """Sky level per pixel; null: measured, if the image still has its sky."""
    sky_unit: PixelUnit | None = None
    """Unit of the sky level; null: that of the image."""
    subtract_sky: Literal["measured", "given", "none"] = "measured"
    """Sky to subtract: `measured` on a mesh (settings `background`), `given` (the level `sky`;
    better where a bright object fills the image), or `none`."""

    @model_validator(mode="after")
    def _check(self) -> "CalibratedSettings":
        for key in ("zero_point_unit", "sky_unit"):
            unit = getattr(self, key)
            if unit is not None and unit != self.unit and unit in FLUX_ZERO_POINTS:
                raise ValueError(f"{key}: flux units are for images in the same unit")
        if self.table is None:
            # only a part of the settings, as one stage uses them, or none
            return self
        if self.zero_point is None and self.unit not in FLUX_ZERO_POINTS:
            raise ValueError(f"zero_point is needed for images in {self.unit}")
        if self.subtract_sky == "given" and self.sky is None:
            raise ValueError("subtract_sky: given, but sky is not")
        return self
