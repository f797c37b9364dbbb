"""Angles as people and headers write them, decimal or sexagesimal."""

import math
import re

_FIELD = r"(\d+(?:\.\d*)?|\.\d+)"
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SEXAGESIMAL = re.compile(
    rf"(?P<sign>[+-]?)\s*{_FIELD}\s*(?P<unit>[hd°:\s])\s*{_FIELD}\s*[m':\s]?\s*(?:{_FIELD})?\s*"
    r"[s\"]?"
)


def is_sexagesimal(text: str) -> bool:
    """Return whether a text has the form of a sexagesimal angle."""
    return _SEXAGESIMAL.fullmatch(text.strip()) is not None


def sexagesimal(text: str) -> float:
    """Return the decimal value of a sexagesimal number, in its own unit (hours or degrees).

    Raises
    ------
    ValueError
        If the text has not this form, or minutes or seconds are 60 or more.
    """
    match = _SEXAGESIMAL.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is neither decimal degrees nor a sexagesimal angle")
    sign, whole, _, minutes, seconds = match.groups()
    parts = [float(whole), float(minutes), float(seconds or 0.0)]
    if max(parts[1:]) >= 60.0:
        raise ValueError(f"{text!r} has minutes or seconds of 60 or more")
    value = parts[0] + parts[1] / 60.0 + parts[2] / 3600.0
    return math.copysign(value, -1.0 if sign == "-" else 1.0)


def parse_right_ascension(text: str) -> float:
    """Return a right ascension in [0, 360) degrees; sexagesimal values are hours.

    Raises
    ------
    ValueError
        If the text is no angle, or outside 0 to 360 degrees.
    """
    ra = _parse_angle(text, hours=True)
    if not 0.0 <= ra <= 360.0:
        raise ValueError(f"right ascension {text!r} is not between 0 and 360 degrees")
    return ra % 360.0


def parse_declination(text: str) -> float:
    """Return a declination in degrees.

    Raises
    ------
    ValueError
        If the text is no angle, or outside -90 to 90 degrees.
    """
    dec = _parse_angle(text, hours=False)
    if not -90.0 <= dec <= 90.0:
        raise ValueError(f"declination {text!r} is not between -90 and 90 degrees")
    return dec


def _parse_angle(text: str, hours: bool) -> float:
    """Return an angle in degrees: decimal, or sexagesimal such as 10h00m59s, 2d13m, -02:13:53.3.

    A sexagesimal angle is in hours, if ``hours``, unless it says otherwise (``d`` after its first
    number). ValueError if the text is neither; the message is one sentence.
    """
    text = text.strip()
    if _DECIMAL.fullmatch(text):
        return float(text)
    match = _SEXAGESIMAL.fullmatch(text)
    unit = match["unit"] if match else ":"
    in_hours = unit == "h" or (hours and unit not in "d°")
    return sexagesimal(text) * (15.0 if in_hours else 1.0)
