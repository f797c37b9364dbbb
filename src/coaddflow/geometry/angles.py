"""Angles and numbers as people and headers write them."""

import math
import re

_FIELD = r"(\d+(?:[.,]\d*)?|[.,]\d+)"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<digits>\d[\d.,]*|[.,]\d+)(?:[eEdD](?P<power>[+-]?\d+))?\s*(?P<unit>.*)"
)
_IN_ASCII = str.maketrans({"\N{MINUS SIGN}": "-", "\N{PRIME}": "'", "\N{DOUBLE PRIME}": '"'})
_DECIMAL = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SEXAGESIMAL = re.compile(
    rf"(?P<sign>[+-]?)\s*(\d+)\s*(?P<unit>[hHdD°:\s])\s*{_FIELD}\s*[mM':\s]?\s*(?:{_FIELD})?\s*"
    r"(?:[sS\"]|'')?"
)


def is_sexagesimal(text: str) -> bool:
    """Return whether a text has the form of a sexagesimal angle."""
    return _SEXAGESIMAL.fullmatch(_cleaned(text)) is not None


def sexagesimal(text: str) -> float:
    """Return the decimal value of a sexagesimal number, in its own unit (hours or degrees).

    Raises
    ------
    ValueError
        If the text has not this form, or minutes or seconds are 60 or more.
    """
    match = _SEXAGESIMAL.fullmatch(_cleaned(text))
    if match is None:
        raise ValueError(f"{text!r} is neither decimal degrees nor a sexagesimal angle")
    sign, whole, _, minutes, seconds = match.groups()
    parts = [float(part.replace(",", ".")) for part in (whole, minutes, seconds or "0")]
    if max(parts[1:]) >= 60.0:
        raise ValueError(f"{text!r} has minutes or seconds of 60 or more")
    value = parts[0] + parts[1] / 60.0 + parts[2] / 3600.0
    return math.copysign(value, -1.0 if sign == "-" else 1.0)


def sexagesimal_unit(text: str) -> str:
    """Return what a sexagesimal text says of its unit: ``h`` or ``d``; empty if nothing."""
    match = _SEXAGESIMAL.fullmatch(_cleaned(text))
    unit = match["unit"].lower() if match else ""
    return {"h": "h", "d": "d", "°": "d"}.get(unit, "")


def parse_number(value: object) -> tuple[float, str]:
    """Return a number as headers write it, and the text of a unit behind it.

    Read are numbers, and texts with quotes, a decimal comma, exponents with E or D, and a unit:
    ``1.5``, ``'1.5'``, ``1,5``, ``1.5D2``, ``30 s``, ``1.6 e-/ADU``.

    Raises
    ------
    ValueError
        If it is no finite number, or one whose comma may be a decimal comma or part thousands.
    """
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is not a number")
    if isinstance(value, int | float):
        if abs(value) > 1e300 or not math.isfinite(value):
            raise ValueError(f"{value!r} is not a number")
        return float(value), ""
    text = _cleaned(str(value)).strip("'\"[] ")
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{value!r} is not a number")
    digits = match["digits"]
    if digits.count(",") == 1 and "." not in digits:
        whole, decimals = digits.split(",")
        if len(decimals) == 3 and whole.strip("0"):
            raise ValueError(f"{value!r} may be a decimal or a thousand: write a point, no comma")
        digits = f"{whole}.{decimals}"
    number = float(f"{match['sign']}{digits}e{match['power'] or 0}")
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not a number")
    return number, match["unit"].strip()


def _cleaned(text: str) -> str:
    """Return a text without blanks around it, with minus and primes in ASCII."""
    return text.strip().translate(_IN_ASCII)


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
    text = _cleaned(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    unit = sexagesimal_unit(text)
    in_hours = unit == "h" or (hours and unit != "d")
    return sexagesimal(text) * (15.0 if in_hours else 1.0)
