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
from coaddflow.tables.exposures import (
    ExposureRow,
    ImageRow,
    ccd_file,
    has_ccd,
    read_exposures,
    read_images,
)
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.tables.pointings import Angles, Correction, corrected, exposures_with_pointing
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
from coaddflow.workflow.plan_calibs import CalibrationPlan

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
class Plan(CalibrationPlan):
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

    def check(self) -> None:
        """Raise InputError for what would stop every CCD of a band, or every coadd."""
        self._check_scatter()
        # a job of a run does not go through all exposures again
        is_job = isinstance(self.science, KeptRows)
        if not is_job:
            self.check_sets()
        for band in self.raw_bands:
            self.settings.refcat.magnitude_column(band)
            # raises if there is no catalogue
            _ = self.refcat_files
            for kind in CALIB_KINDS if not is_job else ():
                self.check_given(kind, band)

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
