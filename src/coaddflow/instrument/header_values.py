"""Facts about an exposure from headers, file names and tables, as a map of keys tells.

The map is a camera's `HeaderMap` or the settings `calibrated`; nothing here knows an instrument.
"""

import bz2
import gzip
import re
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from astropy.io import fits
from astropy.io.fits.verify import VerifyError, VerifyWarning
from astropy.time import Time
from astropy.utils.exceptions import AstropyUserWarning

from coaddflow.errors import CoaddflowError, InputError
from coaddflow.files import check_id
from coaddflow.geometry.angles import is_sexagesimal, sexagesimal

_BLOCK = 2880
# 1900 to 2173: a Julian Date or a year in the place of an MJD is noticed
_MJD_RANGE = (15020.0, 115000.0)


class FactError(CoaddflowError):
    """A fact is not there, or cannot be right.

    Parameters
    ----------
    reason : str
        Short code for tables, such as ``missing_keyword``.
    message : str
        One sentence for people, with the remedy.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return self.message


class FactKey(Protocol):
    """Where a fact stands: `camera.HeaderKey` or `settings.calibrated.Fact`."""

    keyword: str | None
    pattern: str | None
    values: dict[str, str]
    unit: str
    scale: str
    offset: float
    factor: float
    default: str | float | None


@dataclass(frozen=True)
class Described:
    """What is known about a file before its facts are told apart.

    Attributes
    ----------
    file : Path
        The file; its name may hold facts.
    headers : tuple of astropy.io.fits.Header
        Headers in the order in which keywords are looked up.
    columns : mapping, optional
        The row of a table that belongs to the file.
    """

    file: Path
    headers: tuple[fits.Header, ...]
    columns: Mapping[str, object] | None = None


def read_headers(path: Path, hdu: int) -> tuple[fits.Header, ...]:
    """Read the header of an HDU and the primary header, and no pixels.

    Plain, gzip, bzip2 and fpack files; an image that fpack moved from the primary HDU into the
    first extension (keyword ZSIMPLE) is found there.

    Parameters
    ----------
    path : Path
        The file.
    hdu : int
        Number of the HDU.

    Returns
    -------
    tuple of astropy.io.fits.Header
        The header asked for and, if it is another one, the primary header.

    Raises
    ------
    FactError
        ``unreadable``, ``empty_file``, ``not_fits``, ``truncated`` or ``missing_hdu``.
    """
    try:
        with _open(path) as stream:
            primary = _next_header(stream, path)
            if hdu == 0:
                packed = _packed_header(stream, primary) if path.suffix == ".fz" else None
                return (packed or primary,)
            header = primary
            for number in range(1, hdu + 1):
                header = _skip_to_next(stream, header)
                if header is None:
                    raise FactError("missing_hdu", f"has no HDU {number}")
            return header, primary
    except (EOFError, ValueError, zlib.error, gzip.BadGzipFile) as error:
        raise FactError("truncated", f"is cut off or damaged ({error}): copy it again") from error
    except OSError as error:
        if error.errno is not None:
            raise FactError("unreadable", f"cannot be read ({error.strerror})") from error
        raise FactError(
            "truncated", f"is cut off in its header ({error}): copy it again"
        ) from error


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        magic = stream.read(3)
    if not magic:
        raise FactError("empty_file", "has no content: copy it again")
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path)
    return bz2.open(path) if magic == b"BZh" else path.open("rb")


def _next_header(stream: BinaryIO, path: Path) -> fits.Header:
    start = stream.read(9)
    if start != b"SIMPLE  =":
        raise FactError("not_fits", f"is not a FITS file: move it out, or rename {path.name}")
    stream.seek(0)
    return _header_here(stream)


def _header_here(stream: BinaryIO) -> fits.Header:
    with warnings.catch_warnings():
        # headers of others are often not to the letter of the standard
        warnings.simplefilter("ignore", AstropyUserWarning)
        return fits.Header.fromfile(stream)


def _skip_to_next(stream: BinaryIO, header: fits.Header) -> fits.Header | None:
    """Return the header behind the data of this one; None at the end of the file."""
    size = 0
    if header.get("NAXIS", 0) > 0:
        size = 1
        for axis in range(1, header["NAXIS"] + 1):
            size *= header[f"NAXIS{axis}"]
        size = (size + header.get("PCOUNT", 0)) * header.get("GCOUNT", 1)
        size *= abs(header["BITPIX"]) // 8
    stream.seek(-(-size // _BLOCK) * _BLOCK, 1)
    try:
        return _header_here(stream)
    except EOFError:
        return None


def _packed_header(stream: BinaryIO, primary: fits.Header) -> fits.Header | None:
    """Return the header of an image that fpack moved out of the primary HDU."""
    if primary.get("NAXIS", 0) != 0:
        return None
    header = _skip_to_next(stream, primary)
    return header if header is not None and "ZSIMPLE" in header else None


def fact_text(key: FactKey, what: str, image: Described) -> str:
    """Return a fact as text.

    Parameters
    ----------
    key : FactKey
        Where it stands.
    what : str
        Its name in the map, for messages.
    image : Described
        Headers, name and table row of the file.

    Raises
    ------
    FactError
        ``missing_keyword``, ``missing_column`` or ``bad_value``.
    """
    raw = _raw_value(key, what, image)
    if raw is None:
        if key.default is not None:
            return _as_text(key.default)
        source = f"has no keyword {key.keyword} ({what})" if key.keyword else f"no {what} is given"
        raise FactError("missing_keyword", f"{source}: set a default or another keyword")
    text = _as_text(raw)
    if key.pattern is not None:
        match = re.search(key.pattern, text)
        if match is None:
            raise FactError(
                "bad_value", f"{what}: {text!r} does not match the pattern {key.pattern!r}"
            )
        text = match.group(1) if match.re.groups else match.group(0)
    return key.values.get(text, text).strip()


def _raw_value(key: FactKey, what: str, image: Described) -> object | None:
    value = getattr(key, "value", None)
    column = getattr(key, "column", None)
    if value is not None:
        return value
    if column is not None:
        if image.columns is None or column not in image.columns:
            raise FactError("missing_column", f"the table of facts has no column {column} ({what})")
        return image.columns[column]
    if key.keyword is None:
        # a map that gives neither keyword nor pattern has only its default
        return image.file.name if key.pattern is not None else None
    for header in image.headers:
        found = _card_value(header, key.keyword, what)
        if found is not None:
            return found
    return None


def _card_value(header: fits.Header, keyword: str, what: str) -> object | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VerifyWarning)
            value = header.get(keyword)
    except (VerifyError, ValueError) as error:
        raise FactError("bad_value", f"keyword {keyword} ({what}) cannot be read") from error
    absent = isinstance(value, fits.card.Undefined) or value is None
    return None if absent or (isinstance(value, str) and not value.strip()) else value


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).strip()


def fact_id(key: FactKey, kind: str, image: Described, setting: str) -> str:
    """Return a fact that is an id: of an exposure or of a band.

    Parameters
    ----------
    key : FactKey
        Where it stands.
    kind : {"exposure", "band"}
        What it identifies.
    image : Described
        Headers, name and table row of the file.
    setting : str
        Where the map of keys is, for messages, such as ``setting calibrated.``.

    Raises
    ------
    FactError
        As `fact_text`; ``bad_id``, or ``unknown_filter`` for a band that the map does not list.
    """
    text = fact_text(key, kind, image)
    if kind == "band" and key.values and text not in (*key.values.values(), key.default):
        raise FactError(
            "unknown_filter", f"its filter {text!r} is not known: add it to {setting}band.values"
        )
    try:
        return check_id(text, kind)
    except InputError as error:
        raise FactError(
            "bad_id",
            f"{error.cause}: {error.remedy}; {setting}{kind} can take a part of it (pattern) or "
            "another word for it (values)",
        ) from None


def fact_number(key: FactKey, what: str, image: Described) -> float:
    """Return a fact as a number: angles in degrees, times in seconds.

    Raises
    ------
    FactError
        As `fact_text`; ``bad_value`` if it is no number, or if a right ascension seems to be in
        the other of hours and degrees.
    """
    text = fact_text(key, what, image)
    try:
        number = sexagesimal(text) if is_sexagesimal(text) else float(text)
    except ValueError as error:
        raise FactError("bad_value", f"{what}: {text!r} is not a number") from error
    if not abs(number) < float("inf"):
        raise FactError("bad_value", f"{what}: {text!r} is not a number")
    if key.unit == "hourangle":
        if what == "ra" and not 0 <= number <= 24:
            raise FactError(
                "bad_value", f"ra: {text!r} is no hour angle below 24: set its unit to degree"
            )
        number *= 15.0
    elif key.unit == "radian":
        number *= 57.29577951308232
    elif what == "ra" and is_sexagesimal(text):
        raise FactError("bad_value", f"ra: {text!r} looks like hours: set its unit to hourangle")
    return round(number * key.factor + key.offset, 12)


def fact_mjd(key: FactKey, what: str, image: Described) -> float:
    """Return a time as MJD TAI, rounded to 0.1 ms.

    Raises
    ------
    FactError
        As `fact_text`; ``bad_value`` if it is no time, or not in the years 1900 to 2173.
    """
    text = fact_text(key, what, image)
    try:
        if key.unit == "iso" or "-" in text[1:] or ":" in text:
            time = Time(_utc_datetime(text), scale=key.scale)
        else:
            number = float(text) * key.factor - (2400000.5 if key.unit == "jd" else 0.0)
            time = Time(number, format="mjd", scale=key.scale)
        mjd = float(time.mjd)
    except ValueError as error:
        raise FactError("bad_value", f"{what}: {text!r} is not a time") from error
    if not _MJD_RANGE[0] < mjd < _MJD_RANGE[1]:
        raise FactError("bad_value", f"{what}: {text!r} is not a time of {key.unit!r}")
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
