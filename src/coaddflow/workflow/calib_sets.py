"""Sets of calibration frames: which of them holds in a night.

Each kind of calibration frames (flats: and band) has sets of its own, since electronics, dark
current and filters change at different times. What is made from frames of several kinds, such as
defects and the table of all frames of a band, has a name of all their sets.

A night is the date of its evening as an MJD without fraction.
"""

import bisect
import dataclasses
import datetime
import functools
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from coaddflow.errors import InputError
from coaddflow.settings.calib_sets import CalibSetsSettings, NamedSet
from coaddflow.settings.calibs import CalibsSettings
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.paths import CALIB_KINDS, KINDS_BY_BAND

ALWAYS = ""
"""Name of the set of a kind that has one for all nights; it is not in paths."""

NO_SET = "none"
"""What stands in a name for a kind that has sets of which none holds; no set has this name."""

_BETWEEN = "+"
"""What stands between the parts of a name of several sets; no set has it in its name."""

_MJD_0 = datetime.date(1858, 11, 17)
_BEGIN, _END = -200_000, 300_000
"""Nights before and after all exposures (`tables.exposures`)."""


class CalibSet(NamedTuple):
    """A set of calibration frames of one kind."""

    name: str
    """Its name, `ALWAYS` if it is the only one."""
    first: int
    last: int
    """Nights of its frames, or those for which the settings say that it holds."""

    def distance(self, night: int) -> int:
        """Return how many nights a night is away; 0: the set is of this night."""
        return max(self.first - night, night - self.last, 0)


class HeldSet(NamedTuple):
    """The set that holds in a night."""

    name: str
    distance: int
    """By how many nights it is outside of those for which the set holds; 0: it holds."""

    @property
    def text(self) -> str:
        """Its name, and whether it is taken only because no set holds."""
        return f"{self.name}(nearest)" if self.distance else self.name


ONE_SET = CalibSet(ALWAYS, _BEGIN, _END)


def night_of(mjd: float, longitude: float) -> int:
    """Return the night of a time.

    Parameters
    ----------
    mjd : float
        Time, MJD. The 37 s between TAI and UTC do not matter at noon.
    longitude : float
        East longitude of the observatory, degrees: its noon is at a UTC of 12 h - longitude / 15.

    Returns
    -------
    int
        MJD of the date on which the night begins, from noon of local mean time.
    """
    return math.floor(mjd - (0.5 - longitude / 360.0))


def date_of(night: int) -> datetime.date:
    """Return the date of the evening of a night."""
    return _MJD_0 + datetime.timedelta(days=night)


def _band_in_sets(kind: str, band: str | None) -> str:
    """Return the band by which frames of a kind are divided; empty: they are not."""
    return (band or "") if kind in KINDS_BY_BAND else ""


@dataclasses.dataclass(frozen=True)
class CandidateFrames:
    """The raw exposures of all nights from which calibration frames can be made.

    They are divided by kind and band once: a survey may have very many.
    """

    settings: CalibsSettings
    """Section `calibs`."""
    science: Collection[ExposureRow]
    """Exposures on the sky that are used."""
    calibration: Collection[ExposureRow]
    """Bias, dark and flat frames, and those on the sky that are used for calibration alone."""

    def of(self, kind: str, band: str | None = None) -> Sequence[ExposureRow]:
        """Return those of a kind and, if it is of a band, of this band.

        Those of the night sky are in order of time, others in the order of the table.
        """
        own, of_band = getattr(self.settings, kind), _band_in_sets(kind, band)
        rows: Sequence[ExposureRow] = ()
        if own.source == "night_sky":
            rows = self._on_sky.get(of_band, ())
        elif own.source == "frames":
            rows = self._by_kind.get((kind, of_band), ())
        if own.exposures is None:
            return rows
        wanted = frozenset(own.exposures)
        return [row for row in rows if row.exposure in wanted]

    @functools.cached_property
    def bands(self) -> list[str]:
        """Bands of all exposures, in order."""
        return sorted({r.band for r in itertools.chain(self.science, self.calibration) if r.band})

    @functools.cached_property
    def _on_sky(self) -> dict[str, list[ExposureRow]]:
        """Exposures on the sky by band (empty: all), in order of time."""
        # named ones are used also if their band is not
        rows = itertools.chain(self.science, self.calibration)
        in_order = sorted(
            (row for row in rows if row.kind == "science"), key=lambda row: (row.mjd, row.exposure)
        )
        found = {"": in_order}
        for row in in_order:
            found.setdefault(row.band, []).append(row)
        return found

    @functools.cached_property
    def _by_kind(self) -> dict[tuple[str, str], list[ExposureRow]]:
        """Calibration frames by kind and, of kinds that are of a band, band."""
        found: dict[tuple[str, str], list[ExposureRow]] = {}
        for row in self.calibration:
            found.setdefault((row.kind, _band_in_sets(row.kind, row.band)), []).append(row)
        return found


def sets_of(kind: str, settings: CalibsSettings, rows: Sequence[ExposureRow]) -> list[CalibSet]:
    """Return the sets of a kind of calibration frames that is made here, in order of time.

    Parameters
    ----------
    kind : str
        The kind.
    settings : CalibsSettings
        What sets there are, or how they are found; one that has too few frames does not exist.
    rows : sequence of ExposureRow
        Its frames of all nights.

    Raises
    ------
    InputError
        If a frame has no date.
    """
    is_dated = settings.sets_of(kind).in_use
    least = settings.least_frames(kind) if is_dated else getattr(settings, kind).min_frames
    return [one for one, n_frames in set_sizes(kind, settings, rows).items() if n_frames >= least]


def set_sizes(
    kind: str, settings: CalibsSettings, rows: Sequence[ExposureRow]
) -> dict[CalibSet, int]:
    """Return the numbers of frames of sets as `sets_of`, also of those with too few frames."""
    sets = settings.sets_of(kind)
    if not sets.in_use:
        return {ONE_SET: len(rows)}
    nights = [night_of_frame(row, settings) for row in rows]
    known = found_sets(nights, sets.gap) if sets.gap is not None else named_sets(sets)
    counts = Counter(of_night(known, night) for night in nights)
    return {one: counts[one] for one in known}


def of_night(sets: Sequence[CalibSet], night: int) -> CalibSet | None:
    """Return the set that a frame of a night belongs to; ``sets`` are in order of time."""
    place = bisect.bisect_right(sets, night, key=lambda one: one.first) - 1
    return sets[place] if place >= 0 and sets[place].distance(night) == 0 else None


def named_sets(sets: CalibSetsSettings) -> list[CalibSet]:
    """Return the sets that settings name, in order of time; one for all nights if they do not."""
    return sorted(map(_of_settings, sets.nights), key=lambda one: one.first) or [ONE_SET]


def _of_settings(one: NamedSet) -> CalibSet:
    first = _BEGIN if one.first is None else (one.first - _MJD_0).days
    last = _END if one.last is None else (one.last - _MJD_0).days
    return CalibSet(one.name, first, last)


def found_sets(nights: Iterable[int], gap: int) -> list[CalibSet]:
    """Return sets of nights that are at most ``gap`` nights apart, named by their first dates."""
    found: list[list[int]] = []
    for night in sorted(set(nights)):
        if found and night - found[-1][-1] <= gap:
            found[-1].append(night)
        else:
            found.append([night])
    return [CalibSet(f"{date_of(n[0]):%Y%m%d}", n[0], n[-1]) for n in found]


def night_of_frame(row: ExposureRow, settings: CalibsSettings) -> int:
    """Return the night of an exposure; raise InputError if the table does not have its time."""
    if row.mjd is None:
        raise InputError(
            f"exposure {row.exposure!r} ({row.kind}) has no mjd in the exposure table, by which "
            "its set of calibration frames is found",
            remedy="write it into the table, or leave the exposure out (exclude)",
        )
    return night_of(row.mjd, settings.longitude or 0.0)


def held(sets: Sequence[CalibSet], night: int, settings: CalibSetsSettings) -> HeldSet | None:
    """Return the set that holds in a night, or is to be taken although it does not.

    Of two sets that are equally near it is the earlier one.

    Parameters
    ----------
    sets : sequence of CalibSet
        Those of a kind, in order of time.
    night : int
        The night.
    settings : CalibSetsSettings
        How far from its frames a set holds, and whether the nearest is taken beyond.
    """
    if not sets:
        return None
    after = bisect.bisect_right(sets, night, key=lambda one: one.first)
    nearest = min(sets[max(after - 1, 0) : after + 1], key=lambda one: one.distance(night))
    beyond = max(nearest.distance(night) - (settings.gap or 0), 0)
    if beyond and settings.outside == "stop":
        return None
    return HeldSet(nearest.name, beyond)


# Names of several sets ---------------------------------------------------------------------------


def joined(names: Iterable[str]) -> str:
    """Return one name for the sets of several kinds: theirs, if it is the same.

    Kinds with one set for all nights are to be left out.
    """
    each = list(names)
    return each[0] if len(set(each)) == 1 else _BETWEEN.join(each)


def separated(name: str, kinds: Sequence[str]) -> Mapping[str, str]:
    """Return the sets of several kinds, whose name is from `joined`, by kind."""
    names = name.split(_BETWEEN) if _BETWEEN in name else itertools.repeat(name, len(kinds))
    return dict(zip(kinds, names, strict=True))


def _with_frames_for_defects(darks: Sequence[CalibSet], frames: CandidateFrames) -> list[CalibSet]:
    """Return the sets of night-sky darks in whose nights there are enough frames for defects."""
    settings, rows = frames.settings, frames.of("defects")
    if darks == [ONE_SET]:
        counts = Counter({ONE_SET: len(rows)})
    else:
        nights = (night_of_frame(row, settings) for row in rows) if darks else ()
        counts = Counter(of_night(darks, night) for night in nights)
    return [one for one in darks if counts[one] >= settings.defects.min_frames]


# The sets of a survey ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CalibSets:
    """The sets of all kinds of calibration frames of a survey."""

    settings: CalibsSettings
    """Section `calibs`."""
    made: Mapping[str, Mapping[str, Sequence[CalibSet]]]
    """Sets of what is made from exposures, in order of time: kind, band (empty: of all bands).

    Those for which there are frames, whether or not they are enough for a set."""

    @classmethod
    def of_frames(cls, frames: CandidateFrames) -> "CalibSets":
        """Return the sets of a survey.

        Parameters
        ----------
        frames : CandidateFrames
            Exposures from which calibration frames can be made.

        Raises
        ------
        InputError
            If a frame of a kind that has sets has no date.
        """
        settings = frames.settings
        made = {
            kind: {
                band: sets_of(kind, settings, rows)
                for band in (frames.bands if kind in KINDS_BY_BAND else [""])
                if (rows := frames.of(kind, band))
            }
            for kind in CALIB_KINDS
            if getattr(settings, kind).source in ("frames", "night_sky")
            and not (kind == "defects" and settings.defects_from)
        }
        if settings.defects_from == ("dark",):
            made["defects"] = {"": _with_frames_for_defects(made["dark"].get("", ()), frames)}
        return cls(settings, made)

    @classmethod
    def from_plain(cls, settings: CalibsSettings, plain: Mapping) -> "CalibSets":
        """Return the sets of a survey from what `plain` returns."""
        made = {
            kind: {band: [CalibSet(*one) for one in sets] for band, sets in of_kind.items()}
            for kind, of_kind in plain.items()
        }
        return cls(settings, made)

    def plain(self) -> dict[str, dict[str, list]]:
        """Return what was found, as plain values."""
        return {
            kind: {band: [list(one) for one in sets] for band, sets in of_kind.items()}
            for kind, of_kind in self.made.items()
        }

    def of(self, kind: str, band: str | None = None) -> Sequence[CalibSet]:
        """Return the sets of a kind, in order of time; none if there are too few frames."""
        if getattr(self.settings, kind).source == "given":
            return named_sets(self.settings.sets_of(kind))
        return self.made.get(kind, {}).get(_band_in_sets(kind, band), ())

    def held(self, kind: str, band: str | None, night: int) -> HeldSet | None:
        """Return the set of a kind that holds in a night; see `held`."""
        return held(self.of(kind, band), night, self.settings.sets_of(kind))

    def dated(self, kinds: Iterable[str] = CALIB_KINDS, band: str | None = None) -> list[str]:
        """Return those of some kinds that have sets for different nights, and frames.

        Also if no night has enough of them.
        """
        return [k for k in kinds if self.settings.sets_of(k).in_use and self._has_frames(k, band)]

    def _has_frames(self, kind: str, band: str | None) -> bool:
        is_given = getattr(self.settings, kind).source == "given"
        return is_given or _band_in_sets(kind, band) in self.made.get(kind, {})

    def exists(self, kind: str, band: str) -> bool:
        """Return whether there are calibration frames of a kind, in some night."""
        if self._are_on_dark(kind):
            return bool(self.of(kind))
        return any(self.of(one, band) for one in self.sources_of_name(kind))

    def _are_on_dark(self, kind: str) -> bool:
        """Return whether these are defects found on the dark alone, which ask for frames too."""
        return kind == "defects" and self.settings.defects_from == ("dark",)

    def shown(self, band: str, night: int) -> str:
        """Return the sets that exposures of a band take in a night, for people.

        Such as ``bias=20260105 flat=20260107(nearest)``; empty where there are no sets.
        """
        found = {kind: self.held(kind, band, night) for kind in self.dated(band=band)}
        return " ".join(f"{kind}={one.text if one else NO_SET}" for kind, one in found.items())

    def in_paths(self, kind: str) -> bool:
        """Return whether a kind of calibration frames has its set in its path."""
        return any(self.settings.sets_of(one).in_use for one in self.sources_of_name(kind))

    def sources_of_name(self, kind: str) -> tuple[str, ...]:
        """Return the kinds whose sets name a set of this kind: itself, but for found defects."""
        return (self.settings.defects_from if kind == "defects" else ()) or (kind,)

    def taken(self, band: str, night: int) -> str:
        """Return the name of all sets that exposures of a band take in a night (`joined`)."""
        found = (self.held(kind, band, night) for kind in self.dated(band=band))
        names = [NO_SET if one is None else one.name for one in found]
        return joined(names) or self._nothing(CALIB_KINDS)

    def name_of(self, kind: str, band: str, taken: str) -> str | None:
        """Return the name of the set of a kind among those of `taken`; None: there is none."""
        sources = [one for one in self.sources_of_name(kind) if self.of(one, band)]
        by_kind = separated(taken, self.dated(band=band))
        names = [by_kind.get(one, ALWAYS) for one in sources]
        if all(name == NO_SET for name in names):
            return None
        if self._are_on_dark(kind) and names[0] not in (one.name for one in self.of(kind)):
            return None
        return joined(name for name in names if name != ALWAYS) or self._nothing([kind])

    def _nothing(self, kinds: Iterable[str]) -> str:
        """Return the name where none of some kinds has frames for different nights.

        In paths there is a set wherever the settings have sets.
        """
        return NO_SET if any(map(self.in_paths, kinds)) else ALWAYS

    def parts_of(self, kind: str, band: str | None, name: str) -> dict[str, str]:
        """Return the sets of which a set of a kind has its name (`name_of`), by kind."""
        sources = [one for one in self.sources_of_name(kind) if self.of(one, band)]
        if self._are_on_dark(kind) and name not in (one.name for one in self.of(kind)):
            return {}
        dated = separated(name, self.dated(sources, band))
        return {one: dated.get(one, ALWAYS) for one in sources}
