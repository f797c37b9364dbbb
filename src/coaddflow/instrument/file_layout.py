"""How a camera's raw files are named and what their headers are called."""

import re
from typing import Literal

from pydantic import Field, model_validator

from coaddflow.errors import InputError
from coaddflow.settings.base import Section
from coaddflow.settings.value_key import ValueKey


class HeaderKey(ValueKey):
    """Where to find one property of an exposure."""

    form: str = Field(
        "{}",
        description="How the simulator writes the value: a Python format such as {} or {:08d}.",
    )

    @model_validator(mode="after")
    def _check(self) -> "HeaderKey":
        if self.keyword is None and self.pattern is None and self.default is None:
            raise ValueError("needs a keyword, a pattern or a default")
        return self


class HeaderMap(Section):
    """What ingest reads from the headers."""

    exposure: HeaderKey = Field(description="Exposure id.")
    kind: HeaderKey = Field(description="Kind of frame: science, bias, dark or flat.")
    band: HeaderKey = Field(description="Band (filter).")
    ra: HeaderKey = Field(description="Right ascension of the pointing.")
    dec: HeaderKey = Field(description="Declination of the pointing.")
    rotation: HeaderKey = Field(description="Position angle of the focal plane's +y.")
    mjd: HeaderKey = Field(description="Start of the exposure.")
    exposure_time: HeaderKey = Field(description="Exposure time.")


class FileLayout(Section):
    """How the raw files of an exposure are organised."""

    files: Literal["exposure", "ccd"] = Field(
        description="One file per exposure, or one file per CCD."
    )
    names: tuple[str, ...] = Field(
        ("*.fits", "*.fits.gz", "*.fits.fz"), description="Shell patterns of the raw files."
    )
    ccd_pattern: str | None = Field(
        None,
        description="With one file per CCD: regular expression whose group (?P<ccd>...) is the "
        "part of the file name that identifies the CCD.",
    )
    numbers_per_exposure: int | None = Field(
        None,
        ge=1,
        description="With one file per CCD and running numbers as names: count of numbers per "
        "exposure. The group `ccd` is then a number, its remainder is the `extension` of the CCD, "
        "and paths contain {ccd+00123400}.",
    )
    name_form: str = Field(
        "{exposure}.fits",
        description="File names written by the simulator, with {exposure} and, with one file per "
        "CCD, {ccd} or (for running numbers) {ccd+number of the first file}.",
    )
    header_hdu: int = Field(0, ge=0, description="HDU whose header describes the exposure.")

    @model_validator(mode="after")
    def _check(self) -> "FileLayout":
        if self.files == "ccd" and "(?P<ccd>" not in (self.ccd_pattern or ""):
            raise ValueError("one file per CCD needs ccd_pattern with a group (?P<ccd>...)")
        return self


def file_template(name: str, layout: FileLayout) -> tuple[str, str]:
    """Take the CCD out of the name of its file; inverse of `tables.exposures.ccd_file`.

    Returns
    -------
    template : str
        The common form of the names of the exposure's files.
    extension : str
        `Detector.extension` of the CCD.

    Raises
    ------
    InputError
        If the name does not have the form of ``layout.ccd_pattern``.
    """
    match = re.search(layout.ccd_pattern or "", name)
    if match is None:
        raise InputError(
            f"the name {name!r} does not tell the CCD (pattern {layout.ccd_pattern!r})"
        )
    text, extension = "{ccd}", match["ccd"]
    if layout.numbers_per_exposure is not None:
        digits = len(extension)
        first, offset = divmod(int(extension), layout.numbers_per_exposure)
        text = f"{{ccd+{first * layout.numbers_per_exposure:0{digits}d}}}"
        extension = str(offset)
    start, end = match.span("ccd")
    return f"{name[:start]}{text}{name[end:]}", extension
