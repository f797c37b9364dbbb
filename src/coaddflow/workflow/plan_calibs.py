"""The calibration frames of a plan: what there is, what it is made from, and who takes it.

What a calibration frame is made from, and which an exposure takes, follows from kinds, bands and
nights (`calib_sets`). What has sets is named by them in its path; without sets all is `ALWAYS`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coaddflow.errors import InputError
from coaddflow.settings import Settings
from coaddflow.tables import paths
from coaddflow.tables.exposures import ExposureRow, has_ccd
from coaddflow.tables.paths import CALIB_KINDS, KINDS_BY_BAND
from coaddflow.workflow.calib_sets import (
    ALWAYS,
    CalibSets,
    CandidateFrames,
    HeldSet,
    date_of,
    night_of,
    night_of_frame,
    of_night,
    set_sizes,
)

MADE_WITH = {"bias": (), "dark": ("bias",), "flat": ("bias", "dark"), "defects": ("bias",)}
"""Kinds of calibration frames that raw frames of each kind are detrended with."""


class CalibrationPlan:
    """The calibration frames of a `Plan`, which has the attributes that are declared here."""

    settings: Settings
    science: Mapping[str, ExposureRow]
    calibration: Mapping[str, ExposureRow]
    ccds: Mapping[int, Any]
    bands: list[str]
    raw_bands: list[str]
    known_calib_sets: Mapping[str, Mapping[str, list]] | None

    def _raw_row(self, exposure: str) -> ExposureRow:
        return self.science.get(exposure) or self.calibration[exposure]

    @functools.cached_property
    def calib_sets(self) -> CalibSets:
        """The sets of calibration frames."""
        calibs = self.settings.calibs
        if self.known_calib_sets is not None:
            return CalibSets.from_plain(calibs, self.known_calib_sets)
        return CalibSets.of_frames(self._candidates)

    @functools.cached_property
    def _candidates(self) -> CandidateFrames:
        """Raw exposures from which calibration frames can be made."""
        return CandidateFrames(
            self.settings.calibs, self.science.values(), self.calibration.values()
        )

    @functools.lru_cache(maxsize=256)  # noqa: B019 - one plan a run
    def calib_frames_by_set(self, kind: str, band: str | None = None) -> dict[str, list[str]]:
        """Return `calib_frames` of all sets, by the name of the set."""
        sets, calibs = self.calib_sets.of(kind, band), self.settings.calibs
        if kind == "defects" and calibs.defects_from:
            return {}
        found: dict[str, list[str]] = {one.name: [] for one in sets}
        is_dated = calibs.sets_of(kind).in_use
        for row in self._candidates.of(kind, band) if sets else ():
            one = of_night(sets, night_of_frame(row, calibs)) if is_dated else sets[0]
            if one is not None:
                found[one.name].append(row.exposure)
        return found

    def calib_frames(self, kind: str, band: str | None = None, name: str = ALWAYS) -> list[str]:
        """Return the raw exposures that a calibration frame is made from.

        Those of the night sky are in order of time, others in the order of the table.

        Parameters
        ----------
        kind : {"bias", "dark", "flat", "defects"}
            What is made.
        band : str, optional
            For flats.
        name : str
            The set.

        Returns
        -------
        list of str
            Empty if none is made: it is given, not wanted, or there are too few exposures.
        """
        return list(self.calib_frames_by_set(kind, band).get(name, ()))

    @functools.lru_cache(maxsize=256)  # noqa: B019 - one plan a run
    def frame_table(self, kind: str, band: str | None = None, name: str = ALWAYS) -> str | None:
        """Return the table of the raw frames of a kind of calibration frames, as `calib_frames`.

        None if there are no frames, or each CCD has files of its own: a table would redo all CCDs
        when the file of one is replaced.
        """
        rows = [self._raw_row(exposure) for exposure in self.calib_frames(kind, band, name)]
        if not rows or any(has_ccd(row.path) for row in rows):
            return None
        return paths.FRAME_TABLE.format(frames=paths.frames_id(kind, band, name))

    def calib_product(
        self, kind: str, ccd: int, band: str, name: str | None = ALWAYS
    ) -> str | None:
        """Return the calibration frame of a CCD and band in a set; None if there is none."""
        settings = getattr(self.settings.calibs, kind)
        if name is None:
            return None
        if settings.source == "given":
            path = settings.path.replace("{ccd}", str(ccd)).replace("{band}", band)
            return path.replace("{set}", name)
        if not self._has_set(kind, band, name):
            return None
        is_of_band = self._band_of_calib(kind, band) is not None
        template = paths.CALIB_OF_BAND if is_of_band else paths.CALIB
        return paths.calib_path(template.replace("{kind}", kind), name, band=band, ccd=ccd)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one plan a run
    def _has_set(self, kind: str, band: str | None, name: str) -> bool:
        """Return whether there are calibration frames of a kind in a set."""
        parts = self.calib_sets.parts_of(kind, band, name)
        return any(
            part in (one.name for one in self.calib_sets.of(source, band))
            for source, part in parts.items()
        )

    def made_with(self, kind: str) -> tuple[str, ...]:
        """Return the kinds of calibration frames that one of this kind is made with."""
        of_defects = self.settings.calibs.defects_from if kind == "defects" else ()
        return of_defects or MADE_WITH[kind]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one plan a run
    def sets_made_with(self, kind: str, band: str | None, name: str) -> dict[str, list[str]]:
        """Return the sets that a calibration frame of a set is made with, by kind.

        Those that its raw frames take: they may be several. None if it is given.
        """
        if getattr(self.settings.calibs, kind).source == "given":
            return {}
        if kind == "defects" and self.settings.calibs.defects_from:
            parts = self.calib_sets.parts_of(kind, band, name)
            return {source: [part] for source, part in parts.items()}
        dated = self.sets_of_frames(kind, band, name)
        found = {
            source: list(dict.fromkeys(dated[source].values()))
            if source in dated
            else [one.name for one in self.calib_sets.of(source, band)]
            for source in self.made_with(kind)
        }
        return {source: names for source, names in found.items() if names}

    @functools.lru_cache(maxsize=512)  # noqa: B019 - one plan a run
    def sets_of_frames(self, kind: str, band: str | None, name: str) -> dict[str, dict[str, str]]:
        """Return the sets that the raw frames of a set take, by kind and exposure.

        They take those of their nights, as exposures on the sky do. Kinds that have no sets are
        left out.
        """
        sources = self.calib_sets.dated(self.made_with(kind), band)
        found: dict[str, dict[str, str]] = {source: {} for source in sources}
        for exposure in self.calib_frames(kind, band, name) if sources else ():
            night = night_of_frame(self._raw_row(exposure), self.settings.calibs)
            for source in sources:
                one = self.calib_sets.held(source, band, night)
                if one is not None:
                    found[source][exposure] = one.name
        return found

    @functools.lru_cache(maxsize=512)  # noqa: B019 - one plan a run
    def calibs_of_band(self, band: str, taken: str = ALWAYS) -> dict[int, dict[str, str]]:
        """Return the calibration frames that there are in a band, by CCD and kind.

        They are asked for by each CCD of each exposure, and worked out once for the sets that it
        has (``taken``, as `sets_taken`).
        """
        names = {kind: self.calib_sets.name_of(kind, band, taken) for kind in CALIB_KINDS}
        return {
            ccd: {
                kind: path
                for kind, name in names.items()
                if (path := self.calib_product(kind, ccd, band, name)) is not None
            }
            for ccd in self.ccds
        }

    def calib_table(self, band: str, taken: str = ALWAYS) -> str | None:
        """Return the table of the calibration frames of a band; None if there are none."""
        names = (self.calib_sets.name_of(kind, band, taken) for kind in CALIB_KINDS)
        if all(name is None for name in names):
            return None
        return paths.calib_path(paths.CALIB_TABLE, taken, band=band)

    def sets_taken(self, exposure: str) -> str:
        """Return the name of the sets of calibration frames that a raw exposure takes."""
        row = self.science[exposure]
        return self._taken(row.band, self._night_of(row))

    def _night_of(self, row: ExposureRow) -> int:
        return night_of(row.mjd, self.settings.calibs.longitude or 0.0)

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - one plan a run
    def _taken(self, band: str, night: int) -> str:
        return self.calib_sets.taken(band, night)

    def shown_sets(self, exposure: str) -> str:
        """Return the sets that an exposure takes, for people (`CalibSets.shown`)."""
        row = self.science.get(exposure)
        return "" if row is None else self._shown(row.band, self._night_of(row))

    @functools.lru_cache(maxsize=65536)  # noqa: B019 - one plan a run
    def _shown(self, band: str, night: int) -> str:
        return self.calib_sets.shown(band, night)

    @functools.cached_property
    def differing_sets(self) -> list[str]:
        """Raw exposures of which the table says that they take other sets than they do.

        None where the table says nothing of sets.
        """
        said = {row.exposure: row.sets for row in self.science.values()}
        return [e for e in said if said[e] != self.shown_sets(e)] if any(said.values()) else []

    @functools.cached_property
    def dated_kinds(self) -> list[tuple[str, str | None]]:
        """Kinds of calibration frames that have sets, with their bands (None: all)."""
        return [
            (kind, band)
            for kind in CALIB_KINDS
            for band in (self.raw_bands if kind in KINDS_BY_BAND else [None])
            if self.calib_sets.dated([kind], band)
        ]

    def sets_of_exposures(self, kind: str, band: str | None) -> dict[str, HeldSet | None]:
        """Return the set of a kind that each raw exposure takes, of a band or of all."""
        found: dict[str, HeldSet | None] = {}
        for one in self.raw_bands if band is None else [band]:
            for night, exposures in self._nights[one].items():
                found.update(dict.fromkeys(exposures, self.calib_sets.held(kind, one, night)))
        return found

    def exposures_outside(self, kind: str) -> list[str]:
        """Return the raw exposures that take a set which does not hold for their night."""
        bands = [band for dated, band in self.dated_kinds if dated == kind]
        taken = (self.sets_of_exposures(kind, band).items() for band in bands)
        return [name for some in taken for name, one in some if one is not None and one.distance]

    def frames_without_set(self, kind: str) -> list[str]:
        """Return the calibration frames of a kind that has sets which are in none."""
        found = []
        for dated, band in self.dated_kinds:
            if dated == kind:
                used = {e for some in self.calib_frames_by_set(kind, band).values() for e in some}
                frames = self._candidates.of(kind, band)
                found += [row.exposure for row in frames if row.exposure not in used]
        return found

    @functools.cached_property
    def _nights(self) -> dict[str, dict[int, list[str]]]:
        """Raw exposures on the sky by band and night, both in order."""
        found: dict[str, dict[int, list[str]]] = {band: {} for band in self.raw_bands}
        for row in self.science.values():
            found[row.band].setdefault(self._night_of(row), []).append(row.exposure)
        return {band: dict(sorted(nights.items())) for band, nights in found.items()}

    @functools.cached_property
    def all_sets_taken(self) -> dict[str, list[str]]:
        """What raw exposures of each band take (`sets_taken`), in order of time."""
        if not any(self.settings.calibs.sets_of(kind).in_use for kind in CALIB_KINDS):
            return {band: [ALWAYS] for band in self.raw_bands}
        return {
            band: list(dict.fromkeys(self._taken(band, night) for night in nights))
            for band, nights in self._nights.items()
        }

    @functools.cached_property
    def calib_units(self) -> dict[str, list[tuple[str | None, str]]]:
        """Band (None: of all bands) and set of all calibration frames that a run needs, by kind.

        Of sets that no exposure takes nothing is made.
        """
        found: dict[str, dict[tuple[str | None, str], None]] = {kind: {} for kind in CALIB_KINDS}
        for band, all_taken in self.all_sets_taken.items():
            for taken in all_taken:
                for kind in CALIB_KINDS:
                    name = self.calib_sets.name_of(kind, band, taken)
                    if name is not None:
                        found[kind][self._band_of_calib(kind, band), name] = None
        for kind in reversed(CALIB_KINDS):
            for band, name in list(found[kind]):
                for source, unit in self.units_made_with(kind, band, name):
                    found[source][unit] = None
        return {kind: list(units) for kind, units in found.items()}

    def units_made_with(
        self, kind: str, band: str | None, name: str
    ) -> list[tuple[str, tuple[str | None, str]]]:
        """Return kind, band and set of all that a calibration frame of a set is made with."""
        return [
            (source, (self._band_of_calib(source, band), one))
            for source, names in self.sets_made_with(kind, band, name).items()
            for one in names
        ]

    def _band_of_calib(self, kind: str, band: str | None) -> str | None:
        """Return the band that calibration frames of a kind are of, among those of a band."""
        by_band = kind in KINDS_BY_BAND or (
            kind == "defects" and self.settings.calibs.defects.source == "frames"
        )
        return band if by_band else None

    def check_sets(self) -> None:
        """Raise InputError if no set of a kind holds for an exposure or a calibration frame."""
        dated = [kind for kind in CALIB_KINDS if self.settings.calibs.sets_of(kind).in_use]
        for band, nights in self._nights.items() if dated else ():
            for kind in self.calib_sets.dated(dated, band):
                if not self.calib_sets.of(kind, band):
                    raise self._no_set_at_all(kind, band)
                for night, exposures in nights.items():
                    if self.calib_sets.held(kind, band, night) is None:
                        raise self._no_set(kind, band, night, exposures)
        for kind, units in self.calib_units.items() if dated else ():
            for band, name in units:
                frames = self.calib_frames(kind, band, name)
                for source, sets in self.sets_of_frames(kind, band, name).items():
                    without = [frame for frame in frames if frame not in sets]
                    if without:
                        night = night_of_frame(self._raw_row(without[0]), self.settings.calibs)
                        raise self._no_set(source, band, night, without[:1])

    def _no_set_at_all(self, kind: str, band: str) -> InputError:
        """Return the error for frames of a kind of which no set has enough."""
        calibs, rows = self.settings.calibs, self._candidates.of(kind, band)
        sets, n_nights = calibs.sets_of(kind), len({night_of_frame(row, calibs) for row in rows})
        is_found, is_sky = sets.gap is not None, getattr(calibs, kind).source == "night_sky"
        least = f"calibs.{kind}.min_frames{' and calibs.night_sky.min_frames' * is_sky}"
        return InputError(
            f"there are {len(rows)} {kind} frames{_in_band(kind, band)} of "
            f"{_nights(n_nights)}, but no set has the {calibs.least_frames(kind)} that are needed",
            remedy=f"{'widen the gap of' if is_found else 'name more nights for'} the sets "
            f"(calibs.sets or calibs.{kind}.sets), lower {least}, or combine the frames of all "
            f"nights (calibs.{kind}.sets: {{}})",
        )

    def _no_set(self, kind: str, band: str | None, night: int, exposures: list[str]) -> InputError:
        """Return the error for exposures of a night for which no set holds."""
        calibs = self.settings.calibs
        is_given, least = getattr(calibs, kind).source == "given", calibs.least_frames(kind)
        sizes = {} if is_given else set_sizes(kind, calibs, self._candidates.of(kind, band))
        more = f" and {len(exposures) - 1} more" if len(exposures) > 1 else ""
        near = min(self.calib_sets.of(kind, band), key=lambda one: one.distance(night))
        why = f"the nearest is {near.name!r}, {_nights(near.distance(night))} away"
        if too_small := of_night([*sizes], night):
            why = (
                f"set {too_small.name!r} has {sizes[too_small]} {kind} frames, {least} are "
                f"needed; {why}"
            )
        add = "" if is_given else f"add frames of this night (at least {least}), "
        return InputError(
            f"no set of {kind} frames{_in_band(kind, band)} holds for exposure "
            f"{exposures[0]!r}{more} of the night of {date_of(night)}; {why}",
            remedy=f"{add}widen the set (calibs.sets or calibs.{kind}.sets), take the nearest one "
            "(sets.outside: nearest), or leave the exposure out (exclude)",
        )

    def given_files(self, kind: str, band: str) -> list[str]:
        """Return the calibration frames of a kind that the settings say are given, each once."""
        if getattr(self.settings.calibs, kind).source != "given":
            return []
        names = {self.calib_sets.name_of(kind, band, one) for one in self.all_sets_taken[band]}
        names |= self._sets_for_raw_frames(kind, band)
        files = [
            self.calib_product(kind, ccd, band, name)
            for name in sorted(names - {None})
            for ccd in self.ccds
        ]
        return list(dict.fromkeys(file for file in files if file is not None))

    def _sets_for_raw_frames(self, kind: str, band: str) -> set[str]:
        """Return the sets of a kind that calibration frames of a band are made with.

        Those of no band count for the first, which stands in the paths of what they take.
        """
        return {
            name
            for made, units in self.calib_units.items()
            for of_band, one in units
            if (of_band or self.bands[0]) == band
            for source, (_, name) in self.units_made_with(made, of_band, one)
            if source == kind
        }

    def check_given(self, kind: str, band: str) -> None:
        """Raise InputError if calibration frames that are said to be given are not there."""
        files = self.given_files(kind, band)
        missing = [path for path in files if not Path(path).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(files)} files of calibs.{kind}.path are not "
                "there, of which this is the first",
                path=missing[0],
                remedy="put them there, or leave their CCDs out (exclude_ccds)",
            )


def _in_band(kind: str, band: str | None) -> str:
    return f" in {band}" if band and kind in KINDS_BY_BAND else ""


def _nights(number: int) -> str:
    return f"{number} night{'s' * (number != 1)}"
