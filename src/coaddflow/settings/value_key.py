"""Where a value of a file stands."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class ValueKey(Section):
    """Where to find one property of a file, and how to read it."""

    keyword: str | None = None
    """Header keyword: of the image, or else of the primary header."""
    pattern: str | None = None
    """Regular expression whose first group is the value; applied to what is found, or to the file
    name if nothing else is named."""
    values: dict[str, str] = Field(default_factory=dict)
    """Translations of values, such as long filter names."""
    unit: Literal["degree", "hourangle", "radian", "mjd", "jd", "iso", "second", "none"] = "none"
    """Unit of the value."""
    scale: Literal["tai", "utc", "tt"] = "utc"
    """Time scale of a time."""
    offset: float = 0.0
    """Added to a number, after the factor."""
    factor: float = 1.0
    """Multiplies a number, before the offset."""
    default: str | float | None = None
    """Value if it is not found; null: it is required."""
