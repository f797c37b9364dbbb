"""Values that describe an exposure, from headers, file names and tables.

Where each stands is said by a map of keys: a camera's `HeaderMap`, or the settings `calibrated`.
Nothing here knows an instrument.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ParamSpec, TypeVar

from astropy.io import fits
from astropy.io.fits.verify import VerifyWarning
from astropy.time import Time

from coaddflow.errors import CoaddflowError, InputError, Reason
from coaddflow.files import check_id
from coaddflow.geometry.angles import (
    is_sexagesimal,
    parse_number,
    sexagesimal,
    sexagesimal_unit,
)
from coaddflow.image.fits_hdus import HduHeader, open_fits, problem_of, walk_hdus
from coaddflow.settings.value_key import ValueKey

# 1900 to 2173: a Julian Date or a year in the place of an MJD is noticed
_MJD_RANGE = (15020.0, 115000.0)

_LIMITS = {
    "ra": (-180.0, 360.0, "degrees"),
    "dec": (-90.0, 90.0, "degrees"),
    "rotation": (-1080.0, 1080.0, "degrees"),
    "exposure_time": (0.0, 1e7, "s"),
    "gain": (0.0, 1e30, "electrons"),
    "zero_point": (-100.0, 100.0, "mag"),
    "zero_point_error": (0.0, 100.0, "mag"),
    "seeing": (0.0, 1e4, "arcsec or pixels"),
    "sky": (-1e12, 1e12, "units"),
}
"""Values outside of these cannot be right."""

_SECONDS = dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0)
_SECONDS |= {"ms": 1e-3, "msec": 1e-3, "us": 1e-6, "min": 60.0, "minutes": 60.0}
_SECONDS |= dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0)
_DEGREES = dict.fromkeys(("d", "deg", "degs", "degree", "degrees", "\N{DEGREE SIGN}"), 1.0)
_DEGREES |= dict.fromkeys(("h", "hr", "hour", "hours"), 15.0)
_DEGREES |= dict.fromkeys(("rad", "radian", "radians"), 57.29577951308232)
_DEGREES |= {"arcmin": 1.0 / 60.0, "arcsec": 1.0 / 3600.0}
_OF_GAIN = re.compile(r"(e|el|e-|electrons?)(\s*(/|per)\s*(adu|dn|counts?))?")
_OF_OTHERS = {"mag", "mags", "arcsec", "pix", "pixel", "pixels", "adu", "dn", "counts", "electron"}
_OF_OTHERS |= {"electrons", "e-", "e"}
_ANGLES = ("ra", "dec", "rotation")

_YES = {"t", "true", "yes", "y", "1", "on"}
_NO = {"f", "false", "no", "n", "0", "off"}

_SCALES = dict.fromkeys(("UTC", "UT", "UT1", "GMT", "Z"), "utc")
_SCALES |= {"TAI": "tai", "IAT": "tai", "TT": "tt", "TDT": "tt", "ET": "tt", "TDB": "tt"}
_TIMES_OF_DAY = ("UTC-OBS", "UT-OBS", "TIME-OBS", "UTC", "UT", "UTSTART", "UT-STR")
"""Cards with the time of day, where DATE-OBS has the date only."""

_DATE = re.compile(
    r"(?:(?P<year>\d{4})[-/](?P<month>\d{1,2})[-/](?P<day>\d{1,2})"
    r"|(?P<d>\d{1,2})/(?P<m>\d{1,2})/(?P<y>\d{4}|\d{2}))"
    r"(?P<time>[T\s]+\S.*)?"
)
_CLOCK = re.compile(
    r"(\d{1,2})[:hH\s]\s*(\d{1,2})(?:[:mM\s]\s*(\d{1,2}(?:[.,]\d*)?))?\s*[sS]?\s*"
    r"(Z|UTC?|GMT|[+-]\d\d:?\d\d)?"
)

_Arguments = ParamSpec("_Arguments")
_Value = TypeVar("_Value")


class HeaderValueError(CoaddflowError):
    """A value is missing, or cannot be right; its reason is a code such as ``missing_keyword``."""

    def __init__(self, reason: str, message: str, missing: str = ""):
        super().__init__(reason, message, missing)
        self.reason = reason
        self.message = message
        self.missing = missing
        """The keyword that is missing, and what of."""

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
    notes: list[str] = field(default_factory=list)
    """What was guessed, or contradicts the map of keys, while values were read."""


class Problems:
    """What is wrong with a file: all of it, so that it can be put right at once."""

    def __init__(self):
        self.errors: list[HeaderValueError] = []

    def read(
        self, get: Callable[_Arguments, _Value], *args: _Arguments.args, **keys: _Arguments.kwargs
    ) -> _Value | None:
        """Return ``get(*args, **keys)``, or None if that raises HeaderValueError."""
        try:
            return get(*args, **keys)
        except HeaderValueError as error:
            self.errors.append(error)
            return None

    def raise_all(self) -> None:
        """Raise one HeaderValueError for all that were collected, if there are any."""
        if len(self.errors) == 1:
            raise self.errors[0]
        missing = [error.missing for error in self.errors if error.missing]
        messages = [error.message for error in self.errors if not error.missing]
        if missing:
            messages.insert(
                0, f"has no keyword {', '.join(missing)}: set a default or another keyword"
            )
        if messages:
            raise HeaderValueError(self.errors[0].reason, "; ".join(messages))


_PROBLEMS = {
    Reason.NOT_FITS: ("not_fits", "is not a FITS file ({}): move it out, or rename {name}"),
    Reason.TRUNCATED_FILE: ("truncated", "is cut off ({}): copy it again"),
    Reason.MISSING_FILE: ("unreadable", "cannot be read ({})"),
    Reason.DAMAGED_FILE: ("truncated", "is cut off or damaged ({}): copy it again"),
}


def read_hdus(path: Path, largest: int | None = None) -> list[HduHeader]:
    """Read the headers of all HDUs of a file, and no pixels; its length is compared with them.

    Plain, gzip, bzip2 and fpack files. Gzip and bzip2 files are decompressed to their end, since
    nothing else tells whether they are whole.

    Parameters
    ----------
    path : Path
        The file.
    largest : int, optional
        See `walk_hdus`.

    Raises
    ------
    HeaderValueError
        ``unreadable``, ``empty_file``, ``not_fits`` or ``truncated``.
    """
    try:
        if path.exists() and not path.is_file():
            raise HeaderValueError("unreadable", "is a pipe or a device, not a file: remove it")
        if path.stat().st_size == 0:
            raise HeaderValueError("empty_file", "has no content: copy it again")
        with open_fits(path) as stream:
            return list(walk_hdus(stream, largest))
    except HeaderValueError:
        raise
    except Exception as error:
        found = problem_of(error)
        if found is None and isinstance(error, OSError):
            raise HeaderValueError("unreadable", f"cannot be read ({error.strerror})") from error
        if found is None:
            raise
        reason, text = _PROBLEMS[found[0]]
        raise HeaderValueError(reason, text.format(found[1], name=path.name)) from error


def read_headers(path: Path, hdu: int, largest: int | None = None) -> tuple[fits.Header, ...]:
    """Read the header of an HDU and, if that is another one, the primary header; see `read_hdus`.

    An image that fpack moved from the primary HDU into the first extension is found there, whatever
    the name of the file.

    Raises
    ------
    HeaderValueError
        As `read_hdus`; ``missing_hdu``.
    """
    return headers_of(read_hdus(path, largest), hdu)


def headers_of(hdus: list[HduHeader], number: int) -> tuple[fits.Header, ...]:
    """Return the header of an HDU of a file, and the primary header if that is another one."""
    if number >= len(hdus):
        raise HeaderValueError("missing_hdu", f"has no HDU {number}")
    is_moved = (
        number == 0
        and len(hdus) > 1
        and hdus[0].data_size == 0
        and hdus[1].is_compressed
        and "ZSIMPLE" in hdus[1].keywords
    )
    numbers = (1,) if is_moved else dict.fromkeys((number, 0))
    try:
        return tuple(hdus[n].header for n in numbers)
    except Exception as error:
        cause = problem_of(error)
        if cause is None:
            raise
        raise HeaderValueError("not_fits", f"is not a FITS file ({cause[1]})") from error


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
        if key.keyword is None:
            raise HeaderValueError("missing_keyword", f"no {what} is given: set a default")
        name = f"{key.keyword} ({what})"
        remedy = "set a default or another keyword"
        raise HeaderValueError("missing_keyword", f"has no keyword {name}: {remedy}", name)
    text = _as_text(raw)
    if key.pattern is not None:
        match = re.search(key.pattern, text)
        if match is None:
            raise HeaderValueError(
                "bad_value", f"{what}: {text!r} does not match the pattern {key.pattern!r}"
            )
        text = match.group(1) if match.re.groups else match.group(0)
    return _translated(text, key.values, what).strip()


def _translated(text: str, values: Mapping[str, str], what: str) -> str:
    """Return the translation of a value; logical values and kinds of frames in any spelling."""
    if text in values:
        return values[text]
    for words in (_YES, _NO):
        if text.lower() in words:
            found = [value for name, value in values.items() if name.lower() in words]
            if len(found) == 1:
                return found[0]
    if what == "kind":
        found = {value for name, value in values.items() if name.lower() == text.lower()}
        if len(found) == 1:
            return found.pop()
    return text


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
    first = _first_card(image.headers, key.keyword, what)
    if first is None or not key.join:
        return first
    more = [_first_card(image.headers, name, what) for name in key.join]
    missing = [name for name, value in zip(key.join, more, strict=True) if value is None]
    if missing:
        name = f"{', '.join(missing)} ({what})"
        remedy = "correct `join`"
        raise HeaderValueError("missing_keyword", f"has no keyword {name}: {remedy}", name)
    return " ".join(_as_text(value) for value in (first, *more))


def _first_card(headers: Iterable[fits.Header], keyword: str, what: str) -> object | None:
    found = (_card_value(header, keyword, what) for header in headers)
    return next((value for value in found if value is not None), None)


def _card_value(header: fits.Header, keyword: str, what: str) -> object | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VerifyWarning)
            value = header.get(keyword)
    except Exception as error:  # astropy raises VerifyError, ValueError and others on odd cards
        raise HeaderValueError("bad_value", f"keyword {keyword} ({what}) cannot be read") from error
    absent = isinstance(value, fits.card.Undefined) or value is None
    return None if absent or (isinstance(value, str) and not value.strip()) else value


def _as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("ascii", "replace").strip()
    if isinstance(value, bool):
        return "T" if value else "F"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).strip()


def _named(key: ValueKey, what: str) -> str:
    """Return a value and its keyword, for messages."""
    return f"{what} ({key.keyword})" if key.keyword else what


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
    named = _named(key, what)
    try:
        number = _number_of(key, what, text)
    except ValueError as error:
        raise HeaderValueError("bad_value", f"{named}: {error}") from error
    if key.unit == "hourangle" and what == "ra" and not 0 <= number / 15.0 <= 24:
        message = f"{named}: {text!r} is not between 0 and 24 hours: set its unit to degree"
        raise HeaderValueError("bad_value", message)
    number = round(number * key.factor + key.offset, 12)
    low, high, unit = _LIMITS.get(what, (-1e30, 1e30, ""))
    if not low <= number <= high:
        raise HeaderValueError(
            "bad_value", f"{named}: {text!r} is not between {low:g} and {high:g} {unit}"
        )
    return number


def _number_of(key: ValueKey, what: str, text: str) -> float:
    """Return a number in degrees or seconds, before factor and offset; ValueError says why not."""
    is_angle = what in _ANGLES or key.unit in ("degree", "hourangle", "radian")
    is_time = what == "exposure_time" or key.unit == "second"
    if is_sexagesimal(text) and (is_angle or (is_time and ":" in text)):
        if is_angle:
            return _sexagesimal_angle(key, what, text)
        if text.count(":") != 2:
            raise ValueError(f"{text!r} is not a number")
        return 3600.0 * sexagesimal(text)
    try:
        number, unit = parse_number(text)
    except ValueError as error:
        reason = str(error) if "thousand" in str(error) else f"{text!r} is not a number"
        raise ValueError(reason) from error
    if not unit:
        return number * {"hourangle": 15.0, "radian": _DEGREES["rad"]}.get(key.unit, 1.0)
    factors = _DEGREES if is_angle else _SECONDS if is_time else {}
    if unit.lower() in factors:
        return number * factors[unit.lower()]
    is_known = _OF_GAIN.fullmatch(unit.lower()) if what == "gain" else unit.lower() in _OF_OTHERS
    if factors or not is_known:
        raise ValueError(f"{text!r} is not a number: the unit {unit!r} is not known here")
    return number


def _sexagesimal_angle(key: ValueKey, what: str, text: str) -> float:
    """Return a sexagesimal angle in degrees."""
    unit = sexagesimal_unit(text)
    if not unit and key.unit != "hourangle" and what == "ra":
        raise ValueError(f"{text!r} looks like hours: set its unit to hourangle")
    in_hours = unit == "h" or (not unit and key.unit == "hourangle")
    return sexagesimal(text) * (15.0 if in_hours else 1.0)


def header_mjd(key: ValueKey, what: str, image: FileHeaders) -> float:
    """Return a time as MJD TAI, rounded to 0.1 ms.

    Raises
    ------
    HeaderValueError
        As `header_text`; ``bad_value`` if it is no time, or not in the years 1900 to 2173.
    """
    text, named = header_text(key, what, image), _named(key, what)
    scale, shift = _time_scale(key, what, image)
    try:
        if key.unit == "iso" or re.search(r"[-:/]", text[1:]) is not None:
            time = Time(_moment(key, what, text, image), scale=scale)
        else:
            number = parse_number(text)[0] * key.factor
            time = Time(
                number - (2400000.5 if key.unit == "jd" else 0.0), format="mjd", scale=scale
            )
        mjd = float(time.mjd)
    except HeaderValueError:
        raise
    except (ValueError, ArithmeticError) as error:
        detail = f" ({error})" if "year" in str(error) else ""
        raise HeaderValueError("bad_value", f"{named}: {text!r} is not a time{detail}") from error
    if not _MJD_RANGE[0] < mjd < _MJD_RANGE[1]:
        other = "mjd" if key.unit == "jd" else "jd"
        is_other = (
            _MJD_RANGE[0] < mjd + (2400000.5 if other == "mjd" else -2400000.5) < _MJD_RANGE[1]
        )
        hint = f": set its unit to {other}" if is_other else ""
        raise HeaderValueError(
            "bad_value", f"{named}: {text!r} is not a time of {key.unit!r}{hint}"
        )
    return round(float(_to_tai(time).mjd) + shift / 86400.0 + key.offset, 9)


def _time_scale(key: ValueKey, what: str, image: FileHeaders) -> tuple[str, float]:
    """Return the time scale of a value, and seconds to be added: that of TIMESYS, or of the map."""
    said = _first_card(image.headers, "TIMESYS", what) if key.keyword else None
    name = str(said or "").strip().upper()
    if name == "GPS" and "scale" not in key.model_fields_set:
        return "tai", 19.0
    found = _SCALES.get(name)
    if "scale" in key.model_fields_set:
        if found not in (None, key.scale) or name == "GPS":
            image.notes.append(f"TIMESYS is {name}, {what}.scale is {key.scale}, which counts")
        return key.scale, 0.0
    if name and found is None:
        image.notes.append(f"TIMESYS is {name}, which is not known: {key.scale.upper()} is assumed")
    return found or key.scale, 0.0


def _moment(key: ValueKey, what: str, text: str, image: FileHeaders) -> datetime:
    """Return a date and time without zone, as FITS, old FITS and others write it; ValueError."""
    match = _DATE.fullmatch(text)
    if match is None:
        return _without_zone(datetime.fromisoformat(text))
    date = _date_of(match)
    clock = (match["time"] or "").lstrip("T \t").strip()
    if key.join:
        # a date that has its time already, and the time once more
        first, _, rest = clock.partition(" ")
        clock = (first if first.strip("0:.") else rest) if rest and ":" in first else clock
    if not clock:
        clock = _time_of_day(key, what, image)
    found = _CLOCK.fullmatch(clock)
    if found is None:
        raise ValueError(f"{clock!r} is no time of day")
    hours, minutes, seconds, zone = found.groups()
    if int(hours) > 24 or int(minutes) > 59 or float((seconds or "0").replace(",", ".")) > 60.999:
        raise ValueError(f"{clock!r} is no time of day")
    day = timedelta(
        hours=int(hours), minutes=int(minutes), seconds=float((seconds or "0").replace(",", "."))
    )
    if zone and zone[0] in "+-":
        digits = zone[1:].replace(":", "")
        shift = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
        day -= shift if zone[0] == "+" else -shift
    return date + day


def _date_of(match: re.Match) -> datetime:
    """Return the day; two digits of a year are of the 20th century, as FITS has it."""
    if match["year"] is not None:
        return datetime(int(match["year"]), int(match["month"]), int(match["day"]))
    day, month, year = (int(match[name]) for name in "dmy")
    if len(match["y"]) == 2:
        if year < 70:
            raise ValueError(f"the year {match['y']} means 19{match['y']} in FITS: write 4 digits")
        year += 1900
    elif day <= 12 and month <= 12 and day != month:
        raise ValueError("day and month cannot be told apart: write the year first")
    if month > 12:
        raise ValueError("the order of day, month and year is not that of FITS")
    return datetime(year, month, day)


def _time_of_day(key: ValueKey, what: str, image: FileHeaders) -> str:
    """Return the time of day from another card than that of the date; midnight if there is none."""
    if key.keyword:
        for name in _TIMES_OF_DAY:
            value = _first_card(image.headers, name, what)
            if value is not None and name != key.keyword and _CLOCK.fullmatch(str(value).strip()):
                image.notes.append(f"{key.keyword} has no time of day: {name} is taken for it")
                return str(value).strip()
    image.notes.append(
        f"{_named(key, what)} has no time of day: midnight is assumed; name the card with the time "
        f"in {what}.join"
    )
    return "00:00:00"


def _without_zone(moment: datetime) -> datetime:
    """Return a time without zone; a zone is applied."""
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def _to_tai(time: Time) -> Time:
    with warnings.catch_warnings():
        # before 1960 and in the far future ERFA doubts the leap seconds
        warnings.filterwarnings("ignore", message="ERFA function .* dubious year")
        return time.tai
