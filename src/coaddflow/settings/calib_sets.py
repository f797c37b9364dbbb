"""Settings of the sets of calibration frames: for which nights each of them holds."""

import datetime
import itertools
import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from coaddflow.errors import InputError
from coaddflow.files import check_id
from coaddflow.settings.base import Id, Section


def _as_iso(value: object) -> object:
    """Refuse numbers, also in quotes, which pydantic takes for seconds since 1970."""
    is_digits = isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+", value.strip())
    if isinstance(value, int | float) or is_digits:
        raise ValueError(f"{value!r} is no date: write one as 2026-01-05")
    return value


Night = Annotated[datetime.date, BeforeValidator(_as_iso)]
"""A night, by the date of its evening."""


class NamedSet(Section):
    """A set of calibration frames with the nights for which it holds."""

    name: Id
    """Name of the set: part of the paths of its frames."""
    first: Night | None = None
    """First night, by the date of its evening; null: from the beginning."""
    last: Night | None = None
    """Last night; null: until further notice."""

    @model_validator(mode="after")
    def _check(self) -> "NamedSet":
        try:
            check_id(self.name, "set")
        except InputError as error:
            raise ValueError(f"{error.cause}: {error.remedy}") from None
        if self.name in ("frames", "none"):
            raise ValueError(f"a set cannot be called {self.name!r}: it has a meaning in paths")
        if self.first is not None and self.last is not None and self.last < self.first:
            raise ValueError(f"set {self.name!r} ends before it begins")
        return self


class CalibSetsSettings(Section):
    """Sets of calibration frames, each of which holds for some nights; by default one for all.

    Frames taken in the nights of a set are combined, and exposures of these nights take them. Use
    `nights` or `gap`, and set `calibs.longitude`.
    """

    nights: tuple[NamedSet, ...] = ()
    """Sets with names of your own, such as `{name: run1, first: 2026-01-05, last: 2026-01-09}`."""
    gap: int | None = Field(None, ge=0)
    """Sets are found: nights with frames that are at most this many nights apart are one set (0:
    each night is a set), named by the date of its first night, such as `20260105`. It holds for
    these nights and for others no farther away than this."""
    outside: Literal["stop", "nearest"] = "stop"
    """Exposures of nights for which no set holds: `stop` the run before it begins, or take the
    `nearest` set. Only beside `nights` or `gap`."""

    @property
    def in_use(self) -> bool:
        """Whether there is more than one set for all nights."""
        return bool(self.nights) or self.gap is not None

    @model_validator(mode="after")
    def _check(self) -> "CalibSetsSettings":
        if self.nights and self.gap is not None:
            raise ValueError("sets are either named (`nights`) or found (`gap`)")
        # what has all defaults written out is allowed
        is_alone = self.model_fields_set == {"outside"}
        if not self.in_use and (is_alone or self.outside != "stop"):
            raise ValueError(
                "`outside` without `nights` or `gap` has no effect: there is one set for all nights"
            )
        names = [one.name for one in self.nights]
        if len(set(names)) != len(names):
            raise ValueError("two sets have the same name")
        begin, end = datetime.date.min, datetime.date.max
        in_order = sorted(self.nights, key=lambda one: one.first or begin)
        for one, after in itertools.pairwise(in_order):
            if (after.first or begin) <= (one.last or end):
                raise ValueError(f"sets {one.name!r} and {after.name!r} hold for the same nights")
        return self
