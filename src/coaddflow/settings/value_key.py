"""Where a value of a file stands."""

from typing import Literal

from pydantic import Field, field_validator

from coaddflow.settings.base import Section


class ValueKey(Section):
    """Where to find one property of a file, and how to read it."""

    keyword: str | None = None
    """Header keyword: of the image, or else of the primary header."""
    join: tuple[str, ...] = ()
    """Keywords whose values are appended, separated by blanks: a time of day (UT) after the date
    (DATE-OBS)."""
    pattern: str | None = None
    """Regular expression whose first group is the value; applied to what is found, or to the file
    name if nothing else is named."""
    values: dict[str, str] = Field(default_factory=dict)
    """Translations of values, such as long filter names. For logical cards write T and F."""
    unit: Literal["degree", "hourangle", "radian", "mjd", "jd", "iso", "second", "none"] = "none"
    """Unit of the value; a unit written behind the number in the card comes first."""
    scale: Literal["tai", "utc", "tt"] = "utc"
    """Time scale of a time; not set: that of TIMESYS in the header, or else UTC."""
    offset: float = 0.0
    """Added to a number, after the factor."""
    factor: float = 1.0
    """Multiplies a number, before the offset."""
    default: str | float | None = None
    """Value if it is not found; null: it is required."""

    @field_validator("values", mode="before")
    @classmethod
    def _keys_are_text(cls, content: object) -> object:
        # YAML reads `yes`, `on` and numbers as what they are
        if not isinstance(content, dict):
            return content
        words = {True: "T", False: "F"}
        return {
            words[key] if isinstance(key, bool) else str(key): value
            for key, value in content.items()
        }
