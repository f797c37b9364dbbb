"""The corner database of the survey: brought up to date, and compared with the plan of the run.

Only rows of exposures whose manifest was added, changed or dropped are touched, in place and in one
transaction (`connections`). What has not changed is known by the size and the time of its manifest,
as Snakemake, make and rsync do it, so that the time of an update does not grow with the CCDs of the
survey.
"""

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coaddflow import fence
from coaddflow.corners.build import (
    INSERT,
    Manifest,
    checksum_of,
    content_of,
    create_indexes,
    create_tables,
    in_batches,
    insert_exposures,
    occurs_twice,
    read_manifests,
)
from coaddflow.corners.connections import (
    NoLocksError,
    changed_database,
    is_damaged,
    replaced_database,
)
from coaddflow.corners.schema import APPLICATION_ID, SCHEMA_VERSION, SURVEY_TABLES
from coaddflow.errors import InputError
from coaddflow.skymap.base import SkyMap
from coaddflow.skymap.tract import Tract
from coaddflow.tables.paths import RESULTS

_LOG = logging.getLogger(__name__)

PlannedPatches = Mapping[str, Mapping[int, Sequence[str]]]
"""Patches that each exposure can touch, by exposure and tract (`Plan.overlaps`)."""

_CHECKED_BYTES = 16_000_000
"""Databases up to this size are looked through before they are changed: it takes 20 ms."""


@dataclass(frozen=True)
class SurveyUpdate:
    """Changes of the exposures in the survey's database: exposure ids, each list in order."""

    added: list[str]
    redone: list[str]
    dropped: list[str]
    unchanged: list[str]


_Known = tuple[str, int, int, str, str | None]
"""What the database knows of a manifest: path, size, time of change, exposure, checksum of its
plan. Plain tuples, of all exposures of a survey."""


@dataclass(frozen=True)
class _Survey:
    """What the database is to be of."""

    manifests: list[str]
    skymap: SkyMap
    planned: PlannedPatches | None

    @property
    def meta(self) -> dict[str, str]:
        """The table ``meta``."""
        return {"kind": "survey", "skymap": self.skymap.settings.model_dump_json()}

    def tracts_near(self, *circle: float) -> list[Tract]:
        """Return the tracts that a circle (ra, dec, radius) may touch."""
        return [self.skymap.tract(number) for number in self.skymap.tracts_near(*circle)]

    def digest(self, exposure: str) -> str | None:
        """Return a checksum of the patches for which an exposure was planned."""
        if self.planned is None:
            return None
        text = json.dumps(self.planned.get(exposure, {}))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class _Changes:
    """What an update finds, by exposure id."""

    unchanged: set[str] = field(default_factory=set)
    added: list[str] = field(default_factory=list)
    redone: list[str] = field(default_factory=list)
    tracts_left: set[int] = field(default_factory=set)
    """Tracts of exposures that were deleted."""


class _UselessError(Exception):
    """The database is of another schema or sky map, or damaged; the message says it."""


def make_survey_database(
    path: str | Path,
    manifests: Iterable[str | Path],
    skymap: SkyMap,
    overlaps: PlannedPatches,
) -> SurveyUpdate:
    """Update the survey's corner database, and compare it with the plan.

    Each exposure was compared with the plan when it was gathered; here all are compared with the
    current plan, so that reducing the margin leaves no hole.

    Parameters
    ----------
    path : str or Path
        The database.
    manifests : iterable of str or Path
        Manifests of all exposures.
    skymap : SkyMap
        Tracts and patches.
    overlaps : mapping
        Patches that each exposure can touch, by exposure and tract (`Plan.overlaps`).

    Raises
    ------
    InputError
        If a CCD covers a patch for which its exposure was not planned: the database stays as it
        was. Others as `update_survey_database`.
    """
    update = update_survey_database(path, manifests, skymap, overlaps)
    _LOG.info(
        "%d exposures added, %d redone, %d dropped, %d as before",
        *map(len, (update.added, update.redone, update.dropped, update.unchanged)),
    )
    return update


def build_survey_database(
    path: str | Path,
    manifests: Iterable[str | Path],
    skymap: SkyMap,
    planned: PlannedPatches | None = None,
) -> SurveyUpdate:
    """Rebuild the corner database of a survey beside the old one; see `update_survey_database`."""
    survey = _Survey([*map(str, manifests)], skymap, planned)
    changes = _Changes()
    with replaced_database(path) as connection:
        create_tables(connection, survey.meta)
        _create_survey_tables(connection)
        for batch in in_batches(read_manifests(survey.manifests)):
            insert_exposures(connection, batch, survey.tracts_near)
            _note_states(connection, batch, survey)
            changes.added += [manifest.exposure for manifest in batch]
        create_indexes(connection)
        _compare_with_plan(connection, survey, changes.added, path)
    return SurveyUpdate(added=sorted(changes.added), redone=[], dropped=[], unchanged=[])


def update_survey_database(
    path: str | Path,
    manifests: Iterable[str | Path],
    skymap: SkyMap,
    planned: PlannedPatches | None = None,
) -> SurveyUpdate:
    """Update the corner database of a survey from its manifests.

    Only rows of exposures whose manifest is new, has another checksum or no longer exists are
    touched; the content is that of a rebuilt database. If the old file is missing, found to be
    damaged, or of another schema version or sky map, the database is rebuilt.

    Parameters
    ----------
    path : str or Path
        The file; changed in place, all or nothing, or replaced by one that is rebuilt.
    manifests : iterable of str or Path
        Manifests of all exposures.
    skymap : SkyMap
        Tracts and patches.
    planned : mapping, optional
        Patches that each exposure can touch, by exposure and tract, to be compared.

    Returns
    -------
    SurveyUpdate
        The changes.

    Raises
    ------
    InputError
        As `build_tract_database`; if another process has the file for `CHANGE_PATIENCE`; or if a
        CCD covers a patch for which its exposure was not planned. The file stays as it was.
    """
    survey = _Survey(list(dict.fromkeys(map(str, manifests))), skymap, planned)
    if not Path(path).is_file():
        return build_survey_database(path, survey.manifests, skymap, planned)
    try:
        try:
            with changed_database(path) as connection:
                return _update(connection, survey, path)
        except NoLocksError:
            _LOG.info("the file system has no locks: a changed copy replaces %s", path)
            with replaced_database(path, copy_from=path) as connection:
                return _update(connection, survey, path)
    except (sqlite3.DatabaseError, _UselessError) as error:
        if isinstance(error, sqlite3.DatabaseError) and not is_damaged(error):
            raise
        _LOG.warning("%s is made anew: %s", path, error)
        return build_survey_database(path, survey.manifests, skymap, planned)


def _update(connection: sqlite3.Connection, survey: _Survey, path: str | Path) -> SurveyUpdate:
    """Update a database in a transaction."""
    _require_use(connection, survey, path)
    _create_survey_tables(connection)
    known = _known_manifests(connection)
    old = {exposure for *_, exposure, _ in known.values()}
    changes = _Changes()
    changed = _changed_manifests(connection, survey, known, changes)
    for batch in in_batches(read_manifests(changed)):
        fence.check()
        for manifest in batch:
            if manifest.exposure in changes.unchanged:
                raise occurs_twice(manifest)
            if manifest.exposure in old:
                _delete_exposure(connection, manifest.exposure, changes)
                changes.redone.append(manifest.exposure)
            else:
                changes.added.append(manifest.exposure)
        insert_exposures(connection, batch, survey.tracts_near)
        _note_states(connection, batch, survey)
    dropped = sorted(old - changes.unchanged - set(changes.redone))
    for exposure in dropped:
        _delete_exposure(connection, exposure, changes)
    _delete_tracts_without_ccds(connection, changes.tracts_left)
    to_compare = [*changes.added, *changes.redone, *_planned_anew(connection, survey, known)]
    _compare_with_plan(connection, survey, to_compare, path)
    return SurveyUpdate(
        sorted(changes.added), sorted(changes.redone), dropped, sorted(changes.unchanged)
    )


def _require_use(connection: sqlite3.Connection, survey: _Survey, path: str | Path) -> None:
    """Raise _UselessError if a database cannot be updated."""

    def one(sql: str) -> object:
        (value,) = connection.execute(sql).fetchone()
        return value

    if one("PRAGMA application_id") != APPLICATION_ID:
        raise _UselessError("it is not a corner database")
    if one("PRAGMA user_version") != SCHEMA_VERSION:
        raise _UselessError("it has another schema")
    if dict(connection.execute("SELECT key, value FROM meta")) != survey.meta:
        raise _UselessError("it is of another sky map")
    if Path(path).stat().st_size <= _CHECKED_BYTES and one("PRAGMA quick_check(1)") != "ok":
        raise _UselessError("it is damaged")


def _create_survey_tables(connection: sqlite3.Connection) -> None:
    """Make the tables of the survey's database that are not there."""
    (table,) = SURVEY_TABLES
    if not connection.execute(f"PRAGMA table_info({table.name})").fetchone():
        connection.execute(table.sql)
        connection.execute(
            "INSERT INTO exposure_checks SELECT exposure, manifest, -1, 0, NULL FROM exposures"
        )


def _known_manifests(connection: sqlite3.Connection) -> dict[str, _Known]:
    """Return what the database knows, by manifest."""
    rows = connection.execute(
        "SELECT manifest, size, mtime_ns, exposure, planned FROM exposure_checks"
    )
    return {row[0]: row for row in rows}


def _changed_manifests(
    connection: sqlite3.Connection,
    survey: _Survey,
    known: Mapping[str, _Known],
    changes: _Changes,
) -> list[str]:
    """Return the manifests that are new or changed; note the exposures of the others."""
    changed, unchanged = [], []
    for path in survey.manifests:
        if (before := known.get(path)) is None:
            changed.append(path)
            continue
        try:
            status = os.stat(path)  # noqa: PTH116 - of all manifests: a Path takes 8 us to make
            is_same = status.st_mtime_ns == before[2] and status.st_size == before[1]
        except OSError:
            is_same = False  # and said by whoever reads it
        (unchanged if is_same or _is_unchanged(connection, before) else changed).append(path)
    changes.unchanged |= {known[path][3] for path in unchanged}
    return changed


def _is_unchanged(connection: sqlite3.Connection, known: _Known) -> bool:
    """Return whether a manifest has the checksum that it had; if so, note its size and time."""
    path, _, _, exposure, _ = known
    content, size, mtime_ns = content_of(path)
    (before,) = connection.execute(
        "SELECT manifest_sha256 FROM exposures WHERE exposure = ?", (exposure,)
    ).fetchone()
    if checksum_of(content) != before:
        return False
    connection.execute(
        "UPDATE exposure_checks SET size = ?, mtime_ns = ? WHERE exposure = ?",
        (size, mtime_ns, exposure),
    )
    return True


def _note_states(
    connection: sqlite3.Connection, manifests: Iterable[Manifest], survey: _Survey
) -> None:
    """Note what the next update compares."""
    connection.executemany(
        INSERT["exposure_checks"],
        [
            (one.exposure, one.path, one.size, one.mtime_ns, survey.digest(one.exposure))
            for one in manifests
        ],
    )


def _delete_exposure(connection: sqlite3.Connection, exposure: str, changes: _Changes) -> None:
    """Delete an exposure with its CCDs and their overlaps; note the tracts of these."""
    for table in ("ccd_patches", "failed_ccd_patches"):
        rows = connection.execute(
            f"SELECT DISTINCT tract FROM {table} JOIN ccds USING (ccd_key) WHERE exposure = ?",  # noqa: S608 - names of the schema
            (exposure,),
        )
        changes.tracts_left |= {tract for (tract,) in rows}
    connection.execute(
        "DELETE FROM ccd_boxes WHERE ccd_key IN (SELECT ccd_key FROM ccds WHERE exposure = ?)",
        (exposure,),
    )
    # foreign keys delete the CCDs and their overlaps
    connection.execute("DELETE FROM exposures WHERE exposure = ?", (exposure,))


def _delete_tracts_without_ccds(connection: sqlite3.Connection, tracts: Iterable[int]) -> None:
    connection.executemany(
        "DELETE FROM tracts WHERE tract = ?1"
        " AND NOT EXISTS (SELECT 1 FROM ccd_patches WHERE tract = ?1)"
        " AND NOT EXISTS (SELECT 1 FROM failed_ccd_patches WHERE tract = ?1)",
        [(tract,) for tract in sorted(tracts)],
    )


def _planned_anew(
    connection: sqlite3.Connection, survey: _Survey, known: Mapping[str, _Known]
) -> list[str]:
    """Return exposures that have not changed, whose plan has; note the plan."""
    if survey.planned is None:
        return []
    anew = []
    for path in survey.manifests:
        *_, exposure, planned = known.get(path, (None, None))
        if exposure is not None and planned != (digest := survey.digest(exposure)):
            anew.append(exposure)
            connection.execute(
                "UPDATE exposure_checks SET planned = ? WHERE exposure = ?", (digest, exposure)
            )
    return anew


def _compare_with_plan(
    connection: sqlite3.Connection, survey: _Survey, exposures: Iterable[str], path: str | Path
) -> None:
    """Raise InputError if exposures cover patches for which they were not planned."""
    if survey.planned is None:
        return
    holes = []
    for exposure in sorted(set(exposures)):
        covered = connection.execute(
            "SELECT DISTINCT tract, patch FROM ccd_patches JOIN ccds USING (ccd_key)"
            " WHERE exposure = ? ORDER BY tract, patch",
            (exposure,),
        )
        tracts = survey.planned.get(exposure, {})
        holes += [
            (exposure, tract, patch)
            for tract, patch in covered
            if patch not in tracts.get(tract, ())
        ]
    if holes:
        exposure, tract, patch = holes[0]
        raise InputError(
            f"{len(holes)} patches are covered by exposures that were not planned for them, such "
            f"as patch {patch} of tract {tract} by exposure {exposure}",
            path=path,
            remedy="raise prediction.margin, or correct the pointings in the exposure table "
            f"(coaddflow ingest --fitted {RESULTS})",
        )
