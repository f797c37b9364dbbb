"""What of a plan takes time to work out, kept in files named after a checksum of their causes.

Databases of SQLite in the folder `PLAN_CACHE`, each made as a whole and then only read: a run and
its jobs, which may be on other machines, hold them open, so that other causes get other files.
``plan-*.sqlite`` has what follows from camera, sky map and pointings. ``rows-*.sqlite`` has the
rows of the table of exposures as a run read and checked them: a job of that run looks up those that
it works on, and takes the same time in a survey of any size. Jobs write none.
"""

import contextlib
import hashlib
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coaddflow import __version__
from coaddflow.errors import InputError
from coaddflow.files import atomic_path, remove
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow, content_without_sets

if TYPE_CHECKING:
    from coaddflow.instrument.camera import Camera

PLAN_CACHE = Path(".snakemake") / "coaddflow"
"""The folder of the files."""

_NEWEST = 4
_SECONDS = 7 * 86400.0
"""Files of each kind that stay: the newest, and all that a run has used in this time."""

_FIT_MARGIN = 0.05
"""Largest margin of a fitted tract around its exposures, as a fraction of the field's radius."""

PACKAGE = Path(__file__).parents[1]

PLAN_SOURCES = (
    "errors.py",
    "fence.py",
    "files.py",
    "settings",
    "geometry",
    "tables",
    "instrument",
    "skymap",
    "workflow/calib_sets.py",
    "workflow/names.py",
    "workflow/plan.py",
    "workflow/plan_cache.py",
    "workflow/plan_calibs.py",
    "workflow/stages.py",
)
"""Modules and packages that make the plan, below `PACKAGE`: other sources, other plans."""


Overlaps = Mapping[str, Mapping[int, Sequence[str]]]
"""Patches by exposure and tract."""


class WorkedOut(NamedTuple):
    """What takes time to work out."""

    key: str
    """Checksum of its causes."""
    facts: dict
    """Of camera and sky map, as plain values: ``ccds``, ``camera_ccds``, ``crosstalk``,
    ``skymap``."""
    overlaps: Overlaps
    """Patches that an exposure can touch."""


def cached(
    settings: Settings,
    science: Mapping[str, ExposureRow],
    images: Mapping[str, Mapping[int, ImageRow]],
    cache: str | Path | None,
    is_job: bool = False,
) -> WorkedOut:
    """Return camera facts, sky map and overlaps, from a file of the folder ``cache`` if it has one.

    If not, one is made, unless this is a job of a run.
    """
    key = _checksum(settings, science, images)
    kept = None
    if cache is not None:
        path = _path_of_plan(cache, key)
        kept = _kept(path, key, is_job)
    if kept is None:
        worked_out = WorkedOut(key, *_work_out(settings, science, images))
        if cache is None or is_job:
            return worked_out
        _keep(path, key, worked_out.facts, _OVERLAPS, _lines_of(worked_out.overlaps))
        # looked up from now on, which takes less memory
        kept = _kept(path, key)
    return worked_out if kept is None else WorkedOut(key, kept.facts, kept.overlaps)


# ---------------------------------------------------------------------------------------------
# Databases
# ---------------------------------------------------------------------------------------------


class _Schema(NamedTuple):
    tables: str
    insert: str


_OVERLAPS = _Schema(
    """
    CREATE TABLE overlaps (exposure TEXT, tract INTEGER, patches TEXT);
    CREATE INDEX of_exposure ON overlaps (exposure);
    CREATE INDEX of_tract ON overlaps (tract);
    """,
    "INSERT INTO overlaps VALUES (?, ?, ?)",
)
_ROWS = _Schema(
    """
    CREATE TABLE rows (exposure TEXT PRIMARY KEY, is_science INTEGER, band TEXT, cells TEXT);
    CREATE INDEX of_kind ON rows (is_science, band);
    """,
    "INSERT INTO rows VALUES (?, ?, ?, ?)",
)


def _path_of_plan(cache: str | Path, key: str) -> Path:
    return Path(cache) / f"plan-{key[:16]}.sqlite"


def _newest_first(folder: str | Path, pattern: str) -> list[Path]:
    """Return the files of a folder, those first that were used last."""
    times = {}
    for path in Path(folder).glob(pattern):
        with contextlib.suppress(OSError):
            times[path] = path.stat().st_mtime
    return sorted(times, key=times.__getitem__, reverse=True)


def _keep(
    path: Path, key: str, facts: Mapping, schema: "_Schema", lines: Iterable[Sequence]
) -> None:
    """Write a database, remove old ones of its kind.

    A run that cannot keep its plan works it out again.
    """
    with contextlib.suppress(InputError, OSError, sqlite3.Error):
        with (
            atomic_path(path) as temporary,
            contextlib.closing(sqlite3.connect(temporary)) as database,
        ):
            database.executescript(
                "PRAGMA journal_mode = OFF; CREATE TABLE kept (key TEXT, facts TEXT); "
                f"{schema.tables}"
            )
            with database:
                database.execute("INSERT INTO kept VALUES (?, ?)", (key, json.dumps(facts)))
                database.executemany(schema.insert, lines)
        kind = path.name.split("-")[0]
        for old in _newest_first(path.parent, f"{kind}-*.sqlite")[_NEWEST:]:
            if old.stat().st_mtime < time.time() - _SECONDS:
                remove(old)


def _kept(path: Path, key: str, is_job: bool = False) -> "Kept | None":
    """Return the database of a key; None if it is not there, damaged, or of another key.

    A job does not look for damage in what its run has looked through.
    """
    with contextlib.suppress(sqlite3.Error, ValueError):
        kept = Kept(path)
        if kept.key == key and (is_job or kept.is_sound()):
            if not is_job:
                with contextlib.suppress(OSError):
                    os.utime(path)  # it is in use
            return kept
    return None


class Kept:
    """A database of `_keep`, which any thread may ask.

    Raises
    ------
    sqlite3.Error, ValueError
        If it is missing or cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        # nobody writes into it: no locks, which file systems of clusters may not have
        uri = f"{self.path.absolute().as_uri()}?mode=ro&immutable=1"
        # Snakemake asks for the resources of a job that failed in a thread of its own
        self._database = sqlite3.connect(uri, uri=True, check_same_thread=False)
        self._lock = threading.Lock()
        [(self.key, facts)] = self._database.execute("SELECT key, facts FROM kept").fetchall()
        self.facts: dict = json.loads(facts)

    def is_sound(self) -> bool:
        """Return whether all of it can be read; raise sqlite3.Error if it cannot."""
        return self._database.execute("PRAGMA quick_check(1)").fetchall() == [("ok",)]

    def lines(self, query: str, *values: Any) -> list[tuple]:
        """Return the answer to a query.

        Raises
        ------
        InputError
            If the database is damaged.
        """
        try:
            with self._lock:
                return self._database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self.damage(error) from error

    def damage(self, error: Exception) -> InputError:
        """Return the error that says that the database is damaged."""
        cause = f"the plan that is kept here cannot be read ({error})"
        return InputError(cause, self.path, remedy="remove it and run again")

    @property
    def overlaps(self) -> "KeptOverlaps":
        """Patches by exposure and tract."""
        return KeptOverlaps(self)


class KeptOverlaps(Mapping):
    """Patches by exposure and tract, each looked up when it is asked for."""

    def __init__(self, kept: Kept):
        self.kept = kept

    def __getitem__(self, exposure: str) -> dict[int, list[str]]:
        query = "SELECT tract, patches FROM overlaps WHERE exposure = ? ORDER BY rowid"
        lines = self.kept.lines(query, exposure)
        if not lines:
            raise KeyError(exposure)
        return _tracts_of(lines)

    def __iter__(self) -> Iterator[str]:
        lines = self.kept.lines("SELECT exposure FROM overlaps GROUP BY 1 ORDER BY rowid")
        return (exposure for (exposure,) in lines)

    def __len__(self) -> int:
        return self.kept.lines("SELECT count(DISTINCT exposure) FROM overlaps")[0][0]

    @property
    def tracts(self) -> list[int]:
        """All tracts, in order."""
        lines = self.kept.lines("SELECT DISTINCT tract FROM overlaps WHERE tract NOTNULL")
        return sorted(tract for (tract,) in lines)

    def exposures_of(self, tract: int) -> list[str]:
        """Return the exposures that can touch a tract, in order of their ids."""
        lines = self.kept.lines("SELECT exposure FROM overlaps WHERE tract = ?", tract)
        return sorted(exposure for (exposure,) in lines)

    def on_tract(self, tract: int) -> dict[str, list[str]]:
        """Return the patches of a tract that exposures can touch, in order of their ids."""
        query = "SELECT exposure, patches FROM overlaps WHERE tract = ? ORDER BY exposure"
        return {exposure: _names_of(patches) for exposure, patches in self.kept.lines(query, tract)}


def _tracts_of(lines: Iterable[tuple[int | None, str]]) -> dict[int, list[str]]:
    """Return patches by tract; the line of an exposure that touches none has no tract."""
    return {tract: _names_of(patches) for tract, patches in lines if tract is not None}


def _names_of(patches: str) -> list[str]:
    return [sys.intern(patch) for patch in patches.split()]


def _lines_of(overlaps: Overlaps) -> Iterator[tuple[str, int | None, str]]:
    for exposure, tracts in overlaps.items():
        for tract, patches in tracts.items() or ((None, ()),):
            yield exposure, tract, " ".join(patches)


class KeptRows(Mapping):
    """Rows of the table of exposures by id, each made when it is asked for.

    Parameters
    ----------
    kept : Kept
        Where they are.
    is_science : bool
        Whether they are the exposures on the sky that are used, or those for calibration frames.
    instead : mapping, optional
        Rows that have been corrected.
    """

    def __init__(
        self, kept: Kept, is_science: bool, instead: Mapping[str, ExposureRow] | None = None
    ):
        self.kept, self._is_science = kept, is_science
        self._made = dict(instead or {})

    def __getitem__(self, exposure: str) -> ExposureRow:
        if exposure not in self._made:
            query = "SELECT cells FROM rows WHERE exposure = ? AND is_science = ?"
            lines = self.kept.lines(query, exposure, self._is_science)
            if not lines:
                raise KeyError(exposure)
            try:
                cells = json.loads(lines[0][0])
            except ValueError as error:
                raise self.kept.damage(error) from error
            # they were checked by the run
            self._made[exposure] = ExposureRow.model_construct(**cells)
        return self._made[exposure]

    def __iter__(self) -> Iterator[str]:
        query = "SELECT exposure FROM rows WHERE is_science = ? ORDER BY rowid"
        return (name for (name,) in self.kept.lines(query, self._is_science))

    def __len__(self) -> int:
        query = "SELECT count(*) FROM rows WHERE is_science = ?"
        return self.kept.lines(query, self._is_science)[0][0]

    @property
    def first(self) -> str | None:
        """The first exposure, if there is one."""
        query = "SELECT exposure FROM rows WHERE is_science = ? ORDER BY rowid LIMIT 1"
        lines = self.kept.lines(query, self._is_science)
        return lines[0][0] if lines else None

    @property
    def bands(self) -> list[str]:
        """The bands of these rows, in order."""
        query = "SELECT DISTINCT band FROM rows WHERE is_science = ? ORDER BY band"
        return [band for (band,) in self.kept.lines(query, self._is_science)]


def keep_rows(
    settings: Settings,
    science: Iterable[ExposureRow],
    calibration: Iterable[ExposureRow],
    facts: Mapping,
    cache: str | Path,
) -> None:
    """Keep the rows of a run for its jobs, unless they are there.

    Parameters
    ----------
    settings : Settings
        The settings of the run.
    science, calibration : iterable of ExposureRow
        Exposures on the sky that are used, as the table has them; frames for calibration.
    facts : mapping
        What else its jobs must know, as plain values.
    cache : str or Path
        `PLAN_CACHE`, or what stands for it.
    """
    key = _key_of_run(settings)
    path = Path(cache) / f"rows-{key[:16]}-{_fingerprint(facts)}.sqlite"
    if _kept(path, key) is not None:
        return
    lines = (
        (row.exposure, is_science, row.band, json.dumps(dict(row)))
        for is_science, rows in ((True, science), (False, calibration))
        for row in rows
    )
    _keep(path, key, facts, _ROWS, lines)


def kept_for_jobs(settings: Settings, cache: str | Path | None) -> Iterator[tuple[Kept, Kept]]:
    """Yield plan and rows of runs with the settings, tables and sources of a job, the last first.

    They differ in the pointings that the runs began with. Not kept are images calibrated
    elsewhere: surveys that have some are planned anew.
    """
    if cache is None or settings.calibrated.table is not None:
        return
    try:
        key = _key_of_run(settings)
    except OSError:
        return
    for path in _newest_first(cache, f"rows-{key[:16]}-*.sqlite"):
        rows = _kept(path, key, is_job=True)
        if rows is not None:
            of_plan = rows.facts["plan"]
            plan = _kept(_path_of_plan(cache, of_plan), of_plan, is_job=True)
            if plan is not None:
                yield plan, rows


def _key_of_run(settings: Settings) -> str:
    """Return a checksum of settings, tables and sources."""
    digest = _digest_of_sources()
    digest.update(settings.model_dump_json().encode())
    # what sets it shows may be brought up to date while the run goes on
    digest.update(content_without_sets(settings.exposures) if settings.exposures else b"-")
    digest.update(_camera_file(settings.camera).read_bytes() if settings.camera else b"-")
    return digest.hexdigest()


def _camera_file(camera: str) -> Path:
    from coaddflow.instrument.camera import camera_file

    return camera_file(camera)


def _digest_of_sources() -> "hashlib._Hash":
    digest = hashlib.sha256(__version__.encode())
    for source in plan_sources():
        digest.update(source.read_bytes())
    return digest


# ---------------------------------------------------------------------------------------------
# What is worked out
# ---------------------------------------------------------------------------------------------


def plan_sources() -> list[Path]:
    """Return the source files that make the plan, in order."""
    found = (PACKAGE / name for name in PLAN_SOURCES)
    return [
        source
        for path in found
        for source in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]


def _checksum(
    settings: Settings,
    science: Mapping[str, ExposureRow],
    images: Mapping[str, Mapping[int, ImageRow]],
) -> str:
    """Return a checksum of everything that decides what is worked out."""
    digest = _digest_of_sources()
    relevant = settings.model_dump_json(include={"skymap", "prediction", "exclude_ccds"})
    digest.update(relevant.encode())
    if settings.camera is not None:
        digest.update(_camera_file(settings.camera).read_bytes())
    for row in science.values():
        digest.update(repr((row.exposure, row.ra, row.dec, row.rotation)).encode())
    for ccds in images.values():
        for row in ccds.values():
            digest.update(repr((*row.key, row.footprint_ra, row.footprint_dec)).encode())
    return digest.hexdigest()


def _work_out(
    settings: Settings,
    science: Mapping[str, ExposureRow],
    images: Mapping[str, Mapping[int, ImageRow]],
) -> tuple[dict, Overlaps]:
    """Return the CCDs of the camera, the sky map, and which exposure can touch which patch."""
    from coaddflow.instrument.camera import load_camera
    from coaddflow.instrument.footprint import predicted_footprints
    from coaddflow.skymap.coverage import predicted_overlaps, predicted_overlaps_of_images
    from coaddflow.skymap.maps import make_skymap

    camera = load_camera(settings.camera) if settings.camera is not None else None
    margin = settings.prediction.margin
    rows = [row for ccds in images.values() for row in ccds.values()]
    footprints = [(row.footprint_ra, row.footprint_dec) for row in rows]
    names = [row.exposure for row in rows]
    if camera is not None:
        footprints += predicted_footprints(science.values(), camera, _fit_margin(camera, margin))
        names += [row.exposure for row in science.values()]
    scale = camera.pixel_scale if camera is not None else _scale_of_images(images)
    skymap = make_skymap(settings.skymap, footprints, scale, names)
    overlaps = predicted_overlaps_of_images(rows, skymap)
    if camera is not None:
        overlaps |= predicted_overlaps(science.values(), camera, skymap, margin)
    between_ccds = [link.changed() for link in camera.crosstalk] if camera is not None else []
    facts = {
        "ccds": _ccds(camera, settings.exclude_ccds) if camera is not None else {},
        "camera_ccds": [d.id for d in camera.detectors] if camera is not None else [],
        "crosstalk": _fingerprint(between_ccds) if between_ccds else "",
        "skymap": skymap.settings.model_dump(mode="json"),
    }
    return facts, overlaps


def _fit_margin(camera: "Camera", margin: float) -> float:
    """Return by how much a fitted tract reaches beyond its exposures, degrees.

    With the whole margin of the prediction, which allows for pointings that are far off, most
    patches of a small camera would lie where no exposure is.
    """
    from coaddflow.instrument.footprint import field_radius

    return min(margin, _FIT_MARGIN * field_radius(camera))


def _scale_of_images(images: Mapping[str, Mapping[int, ImageRow]]) -> float:
    """Return the median pixel scale of images calibrated elsewhere, arcsec, to three digits."""
    from coaddflow.geometry.sphere import separation

    scales = sorted(
        float(
            separation(
                row.footprint_ra[0], row.footprint_dec[0], row.footprint_ra[1], row.footprint_dec[1]
            )
        )
        * 3600.0
        / row.nx
        for ccds in images.values()
        for row in ccds.values()
    )
    return float(f"{scales[len(scales) // 2]:.3g}")


def _fingerprint(values: Sequence | Mapping) -> str:
    """Return a checksum of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _ccds(camera, exclude: Sequence[int]) -> dict[int, dict]:
    """Return the planning data of each CCD, as plain values."""
    unrelated = ("detectors", "description", "header", "crosstalk")
    common = {key: value for key, value in camera.changed().items() if key not in unrelated}
    return {
        detector.id: {
            "size": detector.size,
            "extension": str(detector.extension),
            "fingerprint": _fingerprint([common, detector.changed()]),
        }
        for detector in camera.detectors
        if detector.id not in exclude
    }
