"""The plan of a run: which exposures, CCDs, tracts, patches and calibration frames there are.

Everything here follows from the settings, the tables of exposures and the camera, before anything
has run, so that the Snakefile can show the whole way to the last coadd. Every job of a cluster
reads the Snakefile again; what takes time to work out is therefore kept in files (`plan_cache`),
under a checksum of all that it was made from.
"""

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coaddflow.errors import InputError
from coaddflow.settings import Settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.tables import paths
from coaddflow.tables.exposures import (
    ExposureRow,
    ImageRow,
    ccd_file,
    has_ccd,
    read_exposures,
    read_images,
)
from coaddflow.tables.paths import CALIB_KINDS, KINDS_BY_BAND
from coaddflow.tables.pointings import Angles, Correction, corrected, exposures_with_pointing
from coaddflow.workflow.calib_sets import (
    ALWAYS,
    CalibSets,
    HeldSet,
    date_of,
    frames_of,
    night_of,
    night_of_frame,
    of_night,
)
from coaddflow.workflow.names import unmatched_ccds, unmatched_names
from coaddflow.workflow.plan_cache import (
    PLAN_CACHE,
    Kept,
    KeptOverlaps,
    KeptRows,
    Overlaps,
    cached,
    keep_rows,
    kept_for_jobs,
)

if TYPE_CHECKING:
    from coaddflow.skymap.base import SkyMap
    from coaddflow.skymap.tract import Tract

NOT_IN_PARAMS = {"n_files", "sets"}
"""Columns of the table of raw exposures on which no product depends."""

MAX_REFCAT_INPUTS = 16
"""A reference catalogue of more files than this is not declared file by file."""


@dataclasses.dataclass(frozen=True)
class CcdPlan:
    """Planning data of a CCD of the camera."""

    size: tuple[int, int]
    """Columns and rows."""
    extension: str
    """What stands for the CCD in the name of its raw file."""
    fingerprint: str
    """Checksum of all that the camera file says about this CCD and about the camera as a whole; a
    CCD is done again when it changes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What there is to do."""

    settings: Settings
    """The settings of the run."""
    science: Mapping[str, ExposureRow]
    calibration: Mapping[str, ExposureRow]
    """Raw exposures by id: those on the sky that are used; bias, dark and flat frames, and those on
    the sky that are used for calibration frames alone."""
    images: Mapping[str, Mapping[int, ImageRow]]
    """Images calibrated elsewhere: exposure id, CCD."""
    ccds: Mapping[int, CcdPlan]
    """The CCDs of the camera that are used."""
    skymap: SkymapSettings
    """The sky map, with nothing left to be fitted."""
    overlaps: Overlaps
    """Patches that an exposure can touch: exposure id, tract."""
    crosstalk: str = ""
    """Checksum of what the camera file says about crosstalk between CCDs."""
    pointings: Mapping[str, Correction] = dataclasses.field(default_factory=dict)
    """Exposures whose pointing is not that of the table, but one fitted in an earlier run."""
    known_calib_sets: Mapping[str, Mapping[str, list]] | None = None
    """The sets of calibration frames, in the job of a run that has worked them out."""

    @functools.cached_property
    def exposures(self) -> list[str]:
        """Ids of all exposures on the sky, raw ones first."""
        return [*self.science, *self.images]

    @functools.cached_property
    def bands(self) -> list[str]:
        """Bands of the exposures, in order."""
        of_images = (self.band_of(exposure) for exposure in self.images)
        return sorted({*self.raw_bands, *of_images})

    @functools.cached_property
    def raw_bands(self) -> list[str]:
        """Bands of the raw exposures, in order."""
        if isinstance(self.science, KeptRows):
            return self.science.bands
        return sorted({row.band for row in self.science.values()})

    @functools.cached_property
    def first_raw(self) -> str | None:
        """The first raw exposure on the sky, if there is one."""
        if isinstance(self.science, KeptRows):
            return self.science.first
        return next(iter(self.science), None)

    @functools.cached_property
    def tracts(self) -> list[int]:
        """Tracts that some exposure can touch, in order."""
        if isinstance(self.overlaps, KeptOverlaps):
            return self.overlaps.tracts
        return sorted({tract for tracts in self.overlaps.values() for tract in tracts})

    @functools.cached_property
    def raw_sizes(self) -> tuple[tuple[int, int], ...]:
        """Columns and rows of each CCD of a raw exposure."""
        return tuple(ccd.size for ccd in self.ccds.values())

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one plan a run
    def sky_tract(self, tract: int) -> "Tract":
        """Return the grid of pixels of a tract."""
        return self._sky.tract(tract)

    @functools.cached_property
    def _sky(self) -> "SkyMap":
        from coaddflow.skymap.maps import make_skymap

        return make_skymap(self.skymap)

    @functools.cached_property
    def _by_tract(self) -> dict[int, list[str]]:
        """Exposures of each tract, in order of their ids."""
        found: dict[int, list[str]] = {tract: [] for tract in self.tracts}
        for exposure in sorted(self.exposures):
            for tract in self.overlaps[exposure]:
                found[tract].append(exposure)
        return found

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one plan a run
    def _bands_on(self, tract: int) -> dict[str, list[str]]:
        """Return the exposures of a tract by band, in order of their ids."""
        found: dict[str, list[str]] = {}
        for exposure in self.exposures_of_tract(tract):
            found.setdefault(self.band_of(exposure), []).append(exposure)
        return found

    @functools.lru_cache(maxsize=256)  # noqa: B019 - one plan a run
    def _patches_on(self, band: str, tract: int) -> dict[str, list[str]]:
        """Return the exposures of each patch of a tract, in order of their ids.

        The patches are in rows, one after the other.
        """
        if isinstance(self.overlaps, KeptOverlaps):
            touched = self.overlaps.on_tract(tract)
        else:
            touched = {e: self.overlaps[e][tract] for e in self._by_tract.get(tract, ())}
        patches: dict[str, list[str]] = {}
        for exposure in self.exposures_of_tract(tract, band):
            for patch in touched[exposure]:
                patches.setdefault(patch, []).append(exposure)
        return {patch: patches[patch] for patch in sorted(patches, key=_row_and_column)}

    def band_of(self, exposure: str) -> str:
        """Return the band of an exposure on the sky."""
        if exposure in self.science:
            return self.science[exposure].band
        return next(iter(self.images[exposure].values())).band

    def ccds_of(self, exposure: str) -> list[int]:
        """Return the CCDs of an exposure, in order."""
        return sorted(self.images.get(exposure, self.ccds))

    def exposures_of_tract(self, tract: int, band: str | None = None) -> list[str]:
        """Return the exposures that can touch a tract, of all bands or of one."""
        if band is not None:
            return list(self._bands_on(tract).get(band, ()))
        if isinstance(self.overlaps, KeptOverlaps):
            return self.overlaps.exposures_of(tract)
        return list(self._by_tract[tract])

    def patches_of(self, band: str, tract: int) -> list[str]:
        """Return the patches that exposures of this band can touch, rows one after the other."""
        return list(self._patches_on(band, tract))

    def exposures_of_patch(self, band: str, tract: int, patch: str) -> list[str]:
        """Return the exposures of a band that can touch a patch."""
        return list(self._patches_on(band, tract).get(patch, ()))

    def raw_file(self, exposure: str, ccd: int) -> str:
        """Return the raw file of a CCD, relative to the working folder where the table is."""
        row = self._raw_row(exposure)
        extension = self.ccds[ccd].extension if has_ccd(row.path) else ""
        return _as_given(row.path, self.settings.exposures, extension)

    def _raw_row(self, exposure: str) -> ExposureRow:
        return self.science.get(exposure) or self.calibration[exposure]

    def raw_files(self, exposure: str) -> dict[int, tuple[str, ...]]:
        """Return the raw files of an exposure by CCD, as `raw_file`."""
        row = self.science[exposure]
        if has_ccd(row.path):
            return {ccd: (self.raw_file(exposure, ccd),) for ccd in self.ccds}
        return dict.fromkeys(self.ccds, (self.raw_template(exposure),))

    def raw_template(self, exposure: str) -> str:
        """Return the raw files of an exposure as one name, in which {ccd} may stand for the CCD."""
        return _as_given(self._raw_row(exposure).path, self.settings.exposures)

    def image_files(self, exposure: str, ccd: int) -> list[str]:
        """Return the files of an image calibrated elsewhere: image, weight, mask; each once."""
        row, table = self.images[exposure][ccd], self.settings.calibrated.table
        names = [name for name in (row.path, row.weight_path, row.mask_path) if name]
        return [_as_given(name, table) for name in dict.fromkeys(names)]

    @functools.cached_property
    def calib_sets(self) -> CalibSets:
        """The sets of calibration frames."""
        calibs = self.settings.calibs
        if self.known_calib_sets is not None:
            return CalibSets.from_plain(calibs, self.known_calib_sets)
        return CalibSets.of_rows(calibs, self.science.values(), self.calibration.values())

    @functools.lru_cache(maxsize=256)  # noqa: B019 - one plan a run
    def calib_frames_by_set(self, kind: str, band: str | None = None) -> dict[str, list[str]]:
        """Return `calib_frames` of all sets, by the name of the set."""
        sets, calibs = self.calib_sets.of(kind, band), self.settings.calibs
        found: dict[str, list[str]] = {one.name: [] for one in sets}
        is_dated = calibs.sets_of(kind).in_use
        rows = (self.science.values(), self.calibration.values()) if sets else ((), ())
        for row in frames_of(kind, band or "", calibs, *rows):
            one = of_night(sets, night_of_frame(row, calibs)) if is_dated else sets[0]
            if one is not None:
                found[one.name].append(row.exposure)
        return found

    def calib_frames(self, kind: str, band: str | None = None, name: str = ALWAYS) -> list[str]:
        """Return the raw exposures that a calibration frame is made from, in order of time.

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
        if kind == "flat":
            return paths.calib_path(paths.FLAT, name, band=band, ccd=ccd)
        if kind == "defects" and settings.source == "frames":
            return paths.calib_path(paths.DEFECTS, name, band=band, ccd=ccd)
        return paths.calib_path(paths.CALIB.replace("{kind}", kind), name, ccd=ccd)

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
        if kind == "defects":
            return self.settings.calibs.defects_from or ("bias",)
        return {"bias": (), "dark": ("bias",), "flat": ("bias", "dark")}[kind]

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one plan a run
    def sets_made_with(self, kind: str, band: str | None, name: str) -> dict[str, str]:
        """Return the sets that a calibration frame of a set is made with, by kind.

        Those of its raw frames, which take the sets of their nights as exposures do.
        """
        if kind == "defects" and self.settings.calibs.defects_from:
            return self.calib_sets.parts_of(kind, band, name)
        found = {}
        for source in self.made_with(kind):
            one = next(iter(self._sets_held(source, band, kind, name)), None)
            if one is not None:
                found[source] = one
        return found

    def _sets_held(self, source: str, band: str | None, kind: str, name: str) -> dict[str, str]:
        """Return the sets of a kind that hold for the raw frames of a set of another kind.

        Each with its first frame.
        """
        found: dict[str, str] = {}
        if not self.settings.calibs.sets_of(source).in_use:
            return {one.name: "" for one in self.calib_sets.of(source, band)}
        for exposure in self.calib_frames(kind, band, name):
            night = night_of_frame(self._raw_row(exposure), self.settings.calibs)
            one = self.calib_sets.held(source, band, night)
            if one is not None:
                found.setdefault(one.name, exposure)
        return found

    def calibs_of(self, ccd: int, band: str, sets: Mapping[str, str]) -> dict[str, str]:
        """Return the calibration frames of a CCD that there are in some sets, by kind."""
        products = {kind: self.calib_product(kind, ccd, band, sets[kind]) for kind in sets}
        return {kind: path for kind, path in products.items() if path is not None}

    @functools.lru_cache(maxsize=512)  # noqa: B019 - one plan a run
    def calibs_of_band(self, band: str, taken: str = ALWAYS) -> dict[int, dict[str, str]]:
        """Return the calibration frames that there are in a band, by CCD and kind.

        They are asked for by each CCD of each exposure, and worked out once for the sets that it
        has (``taken``, as `sets_taken`).
        """
        names = {kind: self.calib_sets.name_of(kind, band, taken) for kind in CALIB_KINDS}
        sets = {kind: name for kind, name in names.items() if name is not None}
        return {ccd: self.calibs_of(ccd, band, sets) for ccd in self.ccds}

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
        return {
            exposure: self.calib_sets.held(kind, one, night)
            for one in (self.raw_bands if band is None else [band])
            for night, exposures in self._nights[one].items()
            for exposure in exposures
        }

    def exposures_outside(self, kind: str) -> list[str]:
        """Return the raw exposures that take a set which does not hold for their night."""
        bands = [band for dated, band in self.dated_kinds if dated == kind]
        taken = (self.sets_of_exposures(kind, band).items() for band in bands)
        return [name for some in taken for name, one in some if one is not None and one.distance]

    def frames_without_set(self, kind: str) -> list[str]:
        """Return the calibration frames of a kind that has sets which are in none."""
        rows = self.science.values(), self.calibration.values()
        found = []
        for dated, band in self.dated_kinds:
            if dated == kind:
                frames = frames_of(kind, band or "", self.settings.calibs, *rows)
                used = {e for some in self.calib_frames_by_set(kind, band).values() for e in some}
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
                for source, unit in self.units_made_with(kind, band, name).items():
                    found[source][unit] = None
        return {kind: list(units) for kind, units in found.items()}

    def units_made_with(
        self, kind: str, band: str | None, name: str
    ) -> dict[str, tuple[str | None, str]]:
        """Return band and set of what a calibration frame of a set is made with, by kind."""
        sets = self.sets_made_with(kind, band, name)
        return {source: (self._band_of_calib(source, band), sets[source]) for source in sets}

    def _band_of_calib(self, kind: str, band: str | None) -> str | None:
        """Return the band that calibration frames of a kind are of, among those of a band."""
        by_band = kind in KINDS_BY_BAND or (
            kind == "defects" and self.settings.calibs.defects.source == "frames"
        )
        return band if by_band else None

    def check(self) -> None:
        """Raise InputError for what would stop every CCD of a band, or every coadd."""
        self._check_scatter()
        # a job of a run does not go through all exposures again
        is_job = isinstance(self.science, KeptRows)
        if not is_job:
            self._check_sets()
        for band in self.raw_bands:
            self.settings.refcat.magnitude_column(band)
            # raises if there is no catalogue
            _ = self.refcat_files
            for kind in CALIB_KINDS if not is_job else ():
                self._check_given(kind, band)

    def _check_scatter(self) -> None:
        """Raise InputError if jobs of exposures or tracts could not scatter their work."""
        parallel, scratch = self.settings.parallel, self.settings.coadd.scratch
        package = {"mpi": "mpi4py", "dask": "distributed"}.get(parallel.backend)
        scatters = parallel.calexp == "exposure" or parallel.coadd == "tract"
        if scatters and package and importlib.util.find_spec(package) is None:
            raise InputError(
                f"parallel.backend {parallel.backend!r} needs the package {package}",
                remedy=f"install it: pip install 'coaddflow[{parallel.backend}]'",
            )
        if parallel.coadd == "tract" and scratch and Path(scratch).is_file():
            raise InputError(
                "coadd.scratch is no folder", path=scratch, remedy="name a folder for scratch files"
            )

    def _check_sets(self) -> None:
        """Raise InputError if an exposure or a calibration frame has no set of another kind.

        Or more than one: raw frames that are combined are detrended with the same frames.
        """
        dated = [kind for kind in CALIB_KINDS if self.settings.calibs.sets_of(kind).in_use]
        for band, nights in self._nights.items() if dated else ():
            for kind in self.calib_sets.dated(dated, band):
                for night, exposures in nights.items():
                    if self.calib_sets.held(kind, band, night) is None:
                        raise self._no_set(kind, band, night, exposures)
        for kind, units in self.calib_units.items() if dated else ():
            for band, name in units:
                for source in self.made_with(kind):
                    if source in dated and self.calib_frames(kind, band, name):
                        self._check_sets_held(source, kind, band, name)

    def _check_sets_held(self, source: str, kind: str, band: str | None, name: str) -> None:
        """Raise InputError unless one set holds for all raw frames of a calibration frame."""
        calibs = self.settings.calibs
        frames = self.calib_frames(kind, band, name)
        nights = {night_of_frame(self._raw_row(frame), calibs): frame for frame in reversed(frames)}
        for night, frame in nights.items() if self.calib_sets.of(source, band) else ():
            if self.calib_sets.held(source, band, night) is None:
                raise self._no_set(source, band, night, [frame])
        held = self._sets_held(source, band, kind, name)
        if len(held) > 1:
            examples = " and ".join(f"{one!r} ({frame})" for one, frame in list(held.items())[:2])
            raise InputError(
                f"the {kind} frames of set {name!r}{_in_band(band)} take {len(held)} sets of "
                f"{source} frames, {examples}; frames that are combined can take one",
                remedy=f"give calibs.{kind}.sets ranges that are no longer than those of "
                f"calibs.{source}.sets, or name frames of one set (calibs.{kind}.exposures)",
            )

    def _no_set(self, kind: str, band: str | None, night: int, exposures: list[str]) -> InputError:
        """Return the error for exposures of a night for which no set holds."""
        near = min(self.calib_sets.of(kind, band), key=lambda one: one.distance(night))
        more = f" and {len(exposures) - 1} more" if len(exposures) > 1 else ""
        of_band = _in_band(band if kind in KINDS_BY_BAND else None)
        return InputError(
            f"no set of {kind} frames{of_band} holds for exposure {exposures[0]!r}{more} of the "
            f"night of {date_of(night)}; the nearest is {near.name!r}, {near.distance(night)} "
            "nights away",
            remedy=f"add frames of this night (at least {self.least_frames(kind)}), widen the set "
            f"(calibs.sets or calibs.{kind}.sets), take the nearest one (sets.outside: nearest), "
            "or leave the exposure out (exclude)",
        )

    def least_frames(self, kind: str) -> int:
        """Return the fewest raw frames of which a calibration frame is made."""
        return getattr(self.settings.calibs, kind).min_frames

    def given_files(self, kind: str, band: str) -> list[str]:
        """Return the calibration frames of a kind that the settings say are given, each once."""
        if getattr(self.settings.calibs, kind).source != "given":
            return []
        names = {self.calib_sets.name_of(kind, band, one) for one in self.all_sets_taken[band]}
        files = [
            self.calib_product(kind, ccd, band, name)
            for name in sorted(names - {None})
            for ccd in self.ccds
        ]
        return list(dict.fromkeys(file for file in files if file is not None))

    def _check_given(self, kind: str, band: str) -> None:
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

    @functools.cached_property
    def refcat_files(self) -> list[str]:
        """Files of the reference catalogue on which calexps hang; none if they are very many."""
        files = [str(path) for path in self.settings.refcat.files()] if self.science else []
        return files if len(files) <= MAX_REFCAT_INPUTS else []

    def table_row(self, exposure: str, ccd: int | None = None) -> dict:
        """Return what the table says, as plain values; files relative to the working folder.

        Of a raw exposure its row, for one CCD (with its raw file) or as a whole; of an image
        calibrated elsewhere its row. Values that are the default of their column are left out. The
        CCDs of a raw file share one object, which must not be changed.
        """
        if exposure in self.science:
            return self._raw_values(exposure, None if ccd is None else self.raw_file(exposure, ccd))
        row = self.images[exposure][ccd].model_dump(mode="json", exclude_defaults=True)
        table = self.settings.calibrated.table
        files = {name: row[name] for name in ("path", "weight_path", "mask_path") if name in row}
        return row | {name: _as_given(path, table) for name, path in files.items()}

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - one plan a run
    def _raw_values(self, exposure: str, path: str | None) -> dict:
        """Return the row of a raw exposure as plain values, with another path if one is given."""
        row = self.science[exposure].model_dump(exclude=NOT_IN_PARAMS, exclude_defaults=True)
        return row if path is None else row | {"path": path}


def make_plan(
    settings: Settings, cache: str | Path | None = PLAN_CACHE, is_job: bool = False
) -> Plan:
    """Work out what there is to do.

    Parameters
    ----------
    settings : Settings
        The settings of the run; paths in them are relative to the working folder.
    cache : str or Path, optional
        Folder where to keep what takes time; None: nowhere.
    is_job : bool
        This process is a job of a run, and plans as the run did (`tables.pointings`). It keeps
        nothing.

    Raises
    ------
    InputError
        If there is nothing to do, a table or the camera is not usable, or an exposure id is in
        both tables.
    """
    for kept in kept_for_jobs(settings, cache) if is_job else ():
        plan = _plan_of_job(settings, *kept)
        if plan is not None:
            return plan
    raw_rows, image_rows = _tables(settings)
    science, calibration = raw_exposures(settings, raw_rows)
    images = _images(settings, image_rows)
    _refuse(unmatched_names(settings, raw_rows, image_rows))
    twice = sorted(set(images) & (set(science) | set(calibration)))
    if twice:
        raise InputError(
            f"exposure {twice[0]!r} is in both tables, {settings.exposures} and "
            f"{settings.calibrated.table}",
            remedy="give one of them another id",
        )
    if not science and not images:
        raise InputError(
            "no exposure on the sky is left to process",
            path=settings.exposures or settings.calibrated.table,
            remedy="check the settings bands and exclude, and the kinds in the table",
        )
    in_table = science
    rows, pointings = corrected(science.values(), with_new=not is_job)
    science = {row.exposure: row for row in rows}
    key, facts, overlaps = cached(settings, science, images, cache, is_job)
    _refuse(unmatched_ccds(settings, image_rows, facts["camera_ccds"]))
    if science and not facts["ccds"]:
        raise InputError(
            "exclude_ccds leaves no CCD of the camera", remedy="take CCDs out of exclude_ccds"
        )
    plan = Plan(
        settings=settings,
        science=science,
        calibration=calibration,
        images=images,
        overlaps=overlaps,
        pointings=pointings,
        **_of_camera(facts),
    )
    if cache is not None and not is_job:
        for_jobs = {
            "plan": key,
            "pointings": pointings,
            "calib_sets": plan.calib_sets.plain(),
        }
        keep_rows(settings, in_table.values(), calibration.values(), for_jobs, cache)
    return plan


def _of_camera(facts: Mapping) -> dict:
    """Return the parts of a plan that follow from what was worked out of camera and sky map."""
    ccds = {
        int(ccd): CcdPlan(tuple(c["size"]), c["extension"], c["fingerprint"])
        for ccd, c in facts["ccds"].items()
    }
    skymap = SkymapSettings.model_validate(facts["skymap"])
    return {"ccds": ccds, "skymap": skymap, "crosstalk": facts["crosstalk"]}


def _plan_of_job(settings: Settings, worked_out: Kept, rows: Kept) -> Plan | None:
    """Return the plan of a run in one of its jobs, in which rows are looked up one by one.

    None if the run was planned with other pointings than those that it has adopted.
    """
    table = KeptRows(rows, is_science=True)
    moved = [table[name] for name in exposures_with_pointing() if name in table]
    corrections, pointings = corrected(moved, with_new=False)
    if pointings != {
        name: Correction(*(Angles(*angles) for angles in correction))
        for name, correction in rows.facts["pointings"].items()
    }:
        return None
    return Plan(
        settings=settings,
        science=KeptRows(rows, is_science=True, instead={row.exposure: row for row in corrections}),
        calibration=KeptRows(rows, is_science=False),
        images={},
        overlaps=worked_out.overlaps,
        pointings=pointings,
        known_calib_sets=rows.facts["calib_sets"],
        **_of_camera(worked_out.facts),
    )


def _tables(settings: Settings) -> tuple[list[ExposureRow], list[ImageRow]]:
    """Return all rows of the tables of raw exposures, and of images calibrated elsewhere."""
    if settings.exposures is None and settings.calibrated.table is None:
        raise InputError(
            "the settings name no exposures",
            remedy="set exposures (raw frames) or calibrated.table (images calibrated elsewhere)",
        )
    if settings.exposures is not None and settings.camera is None:
        raise InputError("the settings name no camera", remedy="set camera: raw exposures need one")
    rows = [] if settings.exposures is None else read_exposures(settings.exposures)
    table = settings.calibrated.table
    return rows, [] if table is None else read_images(table)


def _refuse(unmatched: Sequence[str]) -> None:
    """Raise InputError if names in the settings match nothing."""
    if unmatched:
        raise InputError("; ".join(unmatched), remedy="correct the settings, or take the names out")


def raw_exposures(
    settings: Settings, rows: Sequence[ExposureRow]
) -> tuple[dict[str, ExposureRow], dict[str, ExposureRow]]:
    """Return the raw science exposures that are used, and the calibration frames."""
    used = [row for row in rows if row.exposure not in settings.exclude]
    science = [row for row in used if row.kind == "science" and _has_band(settings, row.band)]
    calibs = settings.calibs
    kinds = [getattr(calibs, kind) for kind in CALIB_KINDS]
    named = {e for kind in kinds if kind.source == "night_sky" for e in kind.exposures or ()}
    in_band = {row.exposure for row in science}
    calibration = [
        row
        for row in used
        if row.kind != "science" or (row.exposure in named and row.exposure not in in_band)
    ]
    return {row.exposure: row for row in science}, {row.exposure: row for row in calibration}


def _images(settings: Settings, rows: Sequence[ImageRow]) -> dict[str, dict[int, ImageRow]]:
    """Return the images calibrated elsewhere that are used."""
    images: dict[str, dict[int, ImageRow]] = {}
    for row in rows:
        excluded = row.exposure in settings.exclude or row.ccd in settings.exclude_ccds
        if not excluded and _has_band(settings, row.band):
            images.setdefault(row.exposure, {})[row.ccd] = row
    return images


def _in_band(band: str | None) -> str:
    return f" in {band}" if band else ""


def _row_and_column(patch: str) -> tuple[int, int]:
    column, row = patch.split("_")
    return int(row), int(column)


def _has_band(settings: Settings, band: str) -> bool:
    return settings.bands is None or band in settings.bands


@functools.lru_cache(maxsize=1024)
def _as_given(name: str, table: str, ccd: str = "") -> str:
    """Return the file that a table names, as a path relative to the working folder if it can be.

    Only names and tables that were themselves given as absolute paths stay absolute, so that a
    project that is moved as a whole has nothing to do again.
    """
    here = str(Path.cwd())
    path = os.path.normpath(Path(_folder_of(table, here), ccd_file(name, ccd) if ccd else name))
    is_absolute = Path(name).is_absolute() or Path(table).is_absolute()
    return path if is_absolute else os.path.relpath(path, here)


@functools.lru_cache(maxsize=16)
def _folder_of(table: str, here: str) -> str:
    """Return the folder of a table, links resolved, seen from a working folder."""
    return str(Path(here, table).parent.resolve())
