"""Values that describe an exposure, from headers, file names and tables.

Where each stands is said by a map of keys: a camera's `HeaderMap`, or the settings `calibrated`.
Nothing here knows an instrument.
"""

import math
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from astropy.io import fits
from astropy.io.fits.verify import VerifyError, VerifyWarning
from astropy.time import Time

from coaddflow.errors import CoaddflowError, InputError
from coaddflow.files import check_id
from coaddflow.geometry.angles import is_sexagesimal, sexagesimal
from coaddflow.image.fits_hdus import HduHeader, NotFitsError, open_fits, walk_hdus
from coaddflow.settings.value_key import ValueKey

# 1900 to 2173: a Julian Date or a year in the place of an MJD is noticed
_MJD_RANGE = (15020.0, 115000.0)


class HeaderValueError(CoaddflowError):
    """A value is missing, or cannot be right; its reason is a code such as ``missing_keyword``."""

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class FileHeaders:
    """Everything in which the values of a file are looked up."""

    file: Path
    """The file, for values in its name."""
    headers: tuple[fits.Header, ...]
    """Headers in the order in which keywords are looked up."""
    table_row: Mapping[str, object] | None = None
    """The row of a table that belongs to the file."""


def read_headers(path: Path, hdu: int) -> tuple[fits.Header, ...]:
    """Read the header of an HDU and, if that is another one, the primary header; and no pixels.

    Plain, gzip, bzip2 and fpack files; an image that fpack moved from the primary HDU into the
    first extension (keyword ZSIMPLE) is found there.

    Raises
    ------
    HeaderValueError
        ``unreadable``, ``empty_file``, ``not_fits``, ``truncated`` or ``missing_hdu``.
    """
    try:
        if path.stat().st_size == 0:
            raise HeaderValueError("empty_file", "has no content: copy it again")
        with open_fits(path) as stream:
            return _headers_of(walk_hdus(stream), hdu, path.suffix == ".fz")
    except NotFitsError as error:
        raise HeaderValueError(
            "not_fits", f"is not a FITS file ({error}): move it out, or rename {path.name}"
        ) from error
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise HeaderValueError("unreadable", f"cannot be read ({error.strerror})") from error
        raise HeaderValueError(
            "truncated", f"is cut off or damaged ({error}): copy it again"
        ) from error


def _headers_of(hdus: Iterator[HduHeader], number: int, packed: bool) -> tuple[fits.Header, ...]:
    """Return the header of an HDU of a file, and the primary header if that is another one."""
    primary = next(hdus).header
    if number > 0:
        for hdu in hdus:
            if hdu.index == number:
                return hdu.header, primary
        raise HeaderValueError("missing_hdu", f"has no HDU {number}")
    first = next(hdus, None) if packed and primary["NAXIS"] == 0 else None
    is_moved = first is not None and "ZSIMPLE" in first.header
    return (first.header if is_moved else primary,)


def header_text(key: ValueKey, what: str, image: FileHeaders) -> str:
    """Return a value as text; ``what`` is its name in the map, for messages.

    Raises
    ------
    HeaderValueError
        ``missing_keyword``, ``missing_column`` or ``bad_value``.
    """
    raw = _raw_value(key, what, image)
    if raw is None:
        if key.default is not None:
            return _as_text(key.default)
        source = f"has no keyword {key.keyword} ({what})" if key.keyword else f"no {what} is given"
        raise HeaderValueError("missing_keyword", f"{source}: set a default or another keyword")
    text = _as_text(raw)
    if key.pattern is not None:
        match = re.search(key.pattern, text)
        if match is None:
            raise HeaderValueError(
                "bad_value", f"{what}: {text!r} does not match the pattern {key.pattern!r}"
            )
        text = match.group(1) if match.re.groups else match.group(0)
    return key.values.get(text, text).strip()


def _raw_value(key: ValueKey, what: str, image: FileHeaders) -> object | None:
    value = getattr(key, "value", None)
    column = getattr(key, "column", None)
    if value is not None:
        return value
    if column is not None:
        if image.table_row is None or column not in image.table_row:
            message = f"the table of facts has no column {column} ({what})"
            raise HeaderValueError("missing_column", message)
        return image.table_row[column]
    if key.keyword is None:
        # a key with neither keyword nor pattern has only its default
        return image.file.name if key.pattern is not None else None
    found = (_card_value(header, key.keyword, what) for header in image.headers)
    return next((value for value in found if value is not None), None)


def _card_value(header: fits.Header, keyword: str, what: str) -> object | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VerifyWarning)
            value = header.get(keyword)
    except (VerifyError, ValueError) as error:
        raise HeaderValueError("bad_value", f"keyword {keyword} ({what}) cannot be read") from error
    absent = isinstance(value, fits.card.Undefined) or value is None
    return None if absent or (isinstance(value, str) and not value.strip()) else value


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).strip()


def header_id(key: ValueKey, kind: str, image: FileHeaders, setting: str) -> str:
    """Return the id of an exposure or of a band.

    ``setting`` says in messages where the map of keys is, such as ``setting calibrated.``.

    Raises
    ------
    HeaderValueError
        As `header_text`; ``bad_id``, or ``unknown_filter`` for a band that the map does not list.
    """
    text = header_text(key, kind, image)
    if kind == "band" and key.values and text not in (*key.values.values(), key.default):
        raise HeaderValueError(
            "unknown_filter", f"its filter {text!r} is not known: add it to {setting}band.values"
        )
    try:
        return check_id(text, kind)
    except InputError as error:
        raise HeaderValueError(
            "bad_id",
            f"{error.cause}: {error.remedy}; {setting}{kind} can take a part of it (pattern) or "
            "another word for it (values)",
        ) from None


def header_number(key: ValueKey, what: str, image: FileHeaders) -> float:
    """Return a value as a number: angles in degrees, times in seconds.

    Raises
    ------
    HeaderValueError
        As `header_text`; ``bad_value`` if it is no number, or if a right ascension seems to be in
        the other of hours and degrees.
    """
    text = header_text(key, what, image)
    try:
        number = sexagesimal(text) if is_sexagesimal(text) else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise HeaderValueError("bad_value", f"{what}: {text!r} is not a number")
    if key.unit == "hourangle":
        if what == "ra" and not 0 <= number <= 24:
            message = f"ra: {text!r} is not between 0 and 24 hours: set its unit to degree"
            raise HeaderValueError("bad_value", message)
        number *= 15.0
    elif key.unit == "radian":
        number *= 57.29577951308232
    elif what == "ra" and is_sexagesimal(text):
        message = f"ra: {text!r} looks like hours: set its unit to hourangle"
        raise HeaderValueError("bad_value", message)
    return round(number * key.factor + key.offset, 12)


def header_mjd(key: ValueKey, what: str, image: FileHeaders) -> float:
    """Return a time as MJD TAI, rounded to 0.1 ms.

    Raises
    ------
    HeaderValueError
        As `header_text`; ``bad_value`` if it is no time, or not in the years 1900 to 2173.
    """
    text = header_text(key, what, image)
    try:
        if key.unit == "iso" or "-" in text[1:] or ":" in text:
            time = Time(_utc_datetime(text), scale=key.scale)
        else:
            number = float(text) * key.factor - (2400000.5 if key.unit == "jd" else 0.0)
            time = Time(number, format="mjd", scale=key.scale)
        mjd = float(time.mjd)
    except ValueError as error:
        raise HeaderValueError("bad_value", f"{what}: {text!r} is not a time") from error
    if not _MJD_RANGE[0] < mjd < _MJD_RANGE[1]:
        raise HeaderValueError("bad_value", f"{what}: {text!r} is not a time of {key.unit!r}")
    return round(float(_to_tai(time).mjd) + key.offset, 9)


def _utc_datetime(text: str) -> datetime:
    """Return a time without zone; a zone in the text is applied."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def _to_tai(time: Time) -> Time:
    with warnings.catch_warnings():
        # before 1960 and in the far future ERFA doubts the leap seconds
        warnings.filterwarnings("ignore", message="ERFA function .* dubious year")
        return time.tai
