"""Writing corner databases: of a tract, and of the whole survey.

They are made only from the manifests of the exposures; no pixel file or header is opened. The
database of a tract is always rebuilt; the database of the survey is updated: only rows of exposures
whose manifest was added, changed or dropped are touched. Both are written under a temporary name
and renamed, so that readers, which open the file without locks, always see a complete one. The same
manifests give the same content.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coaddflow.corners.database import CornerDatabase
from coaddflow.corners.schema import (
    APPLICATION_ID,
    MANIFEST_COLUMNS,
    SCHEMA_VERSION,
    STATEMENTS,
    TABLES,
    require_rtree,
)
from coaddflow.errors import InputError
from coaddflow.files import atomic_path, sha256_of
from coaddflow.geometry import polygon, sphere
from coaddflow.skymap.base import SkyMap
from coaddflow.skymap.tract import Tract
from coaddflow.tables.manifest import CcdRow, read_manifest

_INSERT = {
    table.name: f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})"  # noqa: S608 - names of the schema
    for table in TABLES
}


@dataclass(frozen=True)
class SurveyUpdate:
    """Changes of the exposures in the survey's database: exposure ids, each list in order."""

    added: list[str]
    redone: list[str]
    dropped: list[str]
    unchanged: list[str]


def build_tract_database(path: str | Path, manifests: Iterable[str | Path], tract: Tract) -> None:
    """Make the corner database of a tract.

    Parameters
    ----------
    path : str or Path
        The file; replaced as a whole.
    manifests : iterable of str or Path
        Manifests of all exposures that can touch the tract. The database lists all their CCDs,
        also those that failed or lie elsewhere.
    tract : Tract
        The tract.

    Raises
    ------
    InputError
        If a manifest cannot be read, two are of the same exposure, or the file cannot be written.
    """
    exposures = _read_manifests(manifests)
    with _writing(path) as connection:
        _create(connection, {"kind": "tract"})
        _insert_tract(connection, tract)
        for exposure in sorted(exposures):
            _insert_exposure(connection, exposures[exposure], [tract])


def build_survey_database(
    path: str | Path, manifests: Iterable[str | Path], skymap: SkyMap
) -> SurveyUpdate:
    """Rebuild the corner database of a survey; see `update_survey_database`."""
    exposures = _read_manifests(manifests)
    with _writing(path) as connection:
        _create(connection, {"kind": "survey", "skymap": skymap.settings.model_dump_json()})
        for exposure in sorted(exposures):
            _insert_exposure(connection, exposures[exposure], skymap)
    return SurveyUpdate(added=sorted(exposures), redone=[], dropped=[], unchanged=[])


def update_survey_database(
    path: str | Path, manifests: Iterable[str | Path], skymap: SkyMap
) -> SurveyUpdate:
    """Update the corner database of a survey from its manifests.

    Only rows of exposures whose manifest is new, has another checksum or no longer exists are
    touched; the content is that of a rebuilt database. If the old file is missing, damaged, or of
    another schema version or sky map, the database is rebuilt.

    Parameters
    ----------
    path : str or Path
        The file; a changed copy replaces it as a whole.
    manifests : iterable of str or Path
        Manifests of all exposures.
    skymap : SkyMap
        Tracts and patches.

    Returns
    -------
    SurveyUpdate
        The changes.

    Raises
    ------
    InputError
        As `build_tract_database`.
    """
    paths = list(dict.fromkeys(str(manifest) for manifest in manifests))
    known = _known_manifests(path, skymap)
    if known is None:
        return build_survey_database(path, paths, skymap)
    same = {p for p in paths if _checksum(p) == (known[p].sha256 if p in known else None)}
    unchanged = {known[manifest].exposure for manifest in same}
    changed = _read_manifests(manifest for manifest in paths if manifest not in same)
    for exposure in unchanged & set(changed):
        raise _occurs_twice(exposure, changed[exposure].path)
    old = {manifest.exposure for manifest in known.values()}
    update = SurveyUpdate(
        added=sorted(set(changed) - old),
        redone=sorted(set(changed) & old),
        dropped=sorted(old - set(changed) - unchanged),
        unchanged=sorted(unchanged),
    )
    with _writing(path, copy_from=path) as connection:
        for exposure in [*update.redone, *update.dropped]:
            _delete_exposure(connection, exposure)
        for exposure in sorted(changed):
            _insert_exposure(connection, changed[exposure], skymap)
        connection.execute(
            "DELETE FROM tracts WHERE tract NOT IN (SELECT tract FROM ccd_patches) "
            "AND tract NOT IN (SELECT tract FROM failed_ccd_patches)"
        )
    return update


@dataclass(frozen=True)
class _Manifest:
    """A manifest; without ``rows`` if it is known only from the database."""

    path: str
    sha256: str
    exposure: str
    rows: tuple[CcdRow, ...] = ()


def _read_manifests(paths: Iterable[str | Path]) -> dict[str, _Manifest]:
    """Return manifests by exposure."""
    manifests: dict[str, _Manifest] = {}
    for path in dict.fromkeys(map(str, paths)):
        checksum = _checksum(path)
        rows = tuple(sorted(read_manifest(path), key=lambda row: row.ccd))
        exposures = {row.exposure for row in rows}
        problem = None
        if len(exposures) != 1 or len({row.ccd for row in rows}) != len(rows):
            problem = "is not a manifest: it must have each CCD of one exposure once"
        for row in rows:
            n = len(row.footprint_ra)
            if row.state == "done" and (n < 3 or len(row.footprint_dec) != n):
                problem = f"CCD {row.ccd} is done but has no footprint"
        if problem is not None:
            raise InputError(problem, path=path, remedy="remove it and run the workflow again")
        (exposure,) = exposures
        if exposure in manifests:
            raise _occurs_twice(exposure, path)
        manifests[exposure] = _Manifest(path, checksum, exposure, rows)
    return manifests


def _occurs_twice(exposure: str, path: str) -> InputError:
    return InputError(
        f"exposure {exposure} has another manifest already",
        path=path,
        remedy="give each exposure one manifest",
    )


def _checksum(path: str | Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise InputError(
            f"the manifest cannot be read: {error.strerror}",
            path=path,
            remedy="run the workflow again; it makes the manifests that are missing",
        ) from error


def _known_manifests(path: str | Path, skymap: SkyMap) -> dict[str, _Manifest] | None:
    """Return the manifests in a survey's database by path; None if it must be rebuilt."""
    try:
        with CornerDatabase(path) as database:
            whole = database.query("PRAGMA quick_check(1)")[0][0] == "ok"
            if not whole or database.meta().get("skymap") != skymap.settings.model_dump_json():
                return None
            rows = database.query("SELECT manifest, manifest_sha256, exposure FROM exposures")
    except InputError:
        return None
    return {row["manifest"]: _Manifest(*row) for row in rows}


@contextlib.contextmanager
def _writing(path: str | Path, copy_from: str | Path | None = None) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a temporary database, which is renamed to ``path`` at the end."""
    require_rtree()
    with atomic_path(path) as temporary:
        if copy_from is not None:
            shutil.copyfile(copy_from, temporary)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            # no other process uses this file, and it is discarded on failure: no journal
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise
        finally:
            connection.close()


def _create(connection: sqlite3.Connection, meta: dict[str, str]) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID:d}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
    for statement in STATEMENTS:
        connection.execute(statement)
    connection.executemany(_INSERT["meta"], sorted(meta.items()))


def _insert_tract(connection: sqlite3.Connection, tract: Tract) -> None:
    """Insert a tract and all its patches, unless it is there."""
    if connection.execute("SELECT 1 FROM tracts WHERE tract = ?", (tract.id,)).fetchone():
        return
    connection.execute(
        _INSERT["tracts"],
        (
            tract.id,
            tract.ra,
            tract.dec,
            tract.width,
            tract.height,
            tract.pixel_scale,
            *tract.reference_pixel,
            *tract.n_patches,
        ),
    )
    patches = tract.patches()
    inner = np.array([patch.inner_box for patch in patches], dtype=float)
    middle = (inner[:, :2] + inner[:, 2:] - 1.0) / 2.0
    centres = zip(*(angle.tolist() for angle in tract.pixel_to_sky(*middle.T)), strict=True)
    connection.executemany(
        _INSERT["patches"],
        [
            (tract.id, patch.id, *centre, *patch.inner_box, *patch.outer_box)
            for patch, centre in zip(patches, centres, strict=True)
        ],
    )


def _insert_exposure(
    connection: sqlite3.Connection, manifest: _Manifest, tracts: SkyMap | Sequence[Tract]
) -> None:
    """Insert an exposure with its CCDs and their overlaps."""
    rows, first = manifest.rows, manifest.rows[0]
    done = [row for row in rows if row.state == "done"]
    centre = (None, None, None)
    if done:
        vertices = [sphere.to_vector(row.footprint_ra, row.footprint_dec) for row in done]
        axis, radius = polygon.bounding_cap(np.concatenate(vertices))
        centre = (*map(float, sphere.from_vector(axis)), float(radius))
    connection.execute(
        _INSERT["exposures"],
        (
            manifest.exposure,
            first.band,
            first.mjd,
            first.exposure_time,
            len(rows),
            len(done),
            len(rows) - len(done),
            *centre,
            manifest.path,
            manifest.sha256,
        ),
    )
    for row in rows:
        _insert_ccd(connection, row, tracts)


def _insert_ccd(
    connection: sqlite3.Connection, row: CcdRow, tracts: SkyMap | Sequence[Tract]
) -> None:
    key = _ccd_key(row.exposure, row.ccd)
    copied = [getattr(row, name) for name in MANIFEST_COLUMNS]
    if row.state == "failed":
        connection.execute(_INSERT["ccds"], (key, *copied, None, None, None))
        if len(row.footprint_ra) > 2:
            axis, radius = polygon.bounding_cap(
                sphere.to_vector(row.footprint_ra, row.footprint_dec)
            )
            cap = (*map(float, sphere.from_vector(axis)), float(radius))
            _insert_overlaps(connection, "failed_ccd_patches", row, cap, tracts)
        return
    vectors = sphere.to_vector(row.footprint_ra, row.footprint_dec)
    axis, radius = polygon.bounding_cap(vectors)
    ra, dec = map(float, sphere.from_vector(axis))
    outline = json.dumps(list(zip(row.footprint_ra, row.footprint_dec, strict=True)))
    connection.execute(_INSERT["ccds"], (key, *copied, ra, dec, outline))
    connection.execute(_INSERT["ccd_boxes"], (key, *_vector_box(vectors, float(radius))))
    _insert_overlaps(connection, "ccd_patches", row, (ra, dec, float(radius)), tracts)


def _insert_overlaps(
    connection: sqlite3.Connection,
    table: str,
    row: CcdRow,
    cap: tuple[float, float, float],
    tracts: SkyMap | Sequence[Tract],
) -> None:
    """Insert the overlaps of a footprint, inside a circle (ra, dec, radius), with patches."""
    key = _ccd_key(row.exposure, row.ccd)
    if isinstance(tracts, SkyMap):
        tracts = [tracts.tract(i) for i in tracts.tracts_near(*cap)]
    for tract in tracts:
        overlaps = tract.patch_overlaps(row.footprint_ra, row.footprint_dec)
        if overlaps:
            _insert_tract(connection, tract)
        connection.executemany(
            _INSERT[table],
            [(tract.id, patch, key, *fractions) for patch, *fractions in overlaps],
        )


def _delete_exposure(connection: sqlite3.Connection, exposure: str) -> None:
    connection.execute(
        "DELETE FROM ccd_boxes WHERE ccd_key IN (SELECT ccd_key FROM ccds WHERE exposure = ?)",
        (exposure,),
    )
    # foreign keys delete the CCDs and their overlaps
    connection.execute("DELETE FROM exposures WHERE exposure = ?", (exposure,))


def _ccd_key(exposure: str, ccd: int) -> int:
    """Return a positive 63-bit number that depends only on exposure and CCD."""
    digest = hashlib.sha256(f"{exposure}/{ccd}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _vector_box(vectors: NDArray[np.float64], radius: float) -> list[float]:
    """Return x_min, x_max, y_min, ... of a box that contains every direction of a footprint.

    The flat polygon between the vertices is inside their box, and the sphere bulges out of it by
    at most 1 - cos(radius), with the radius of the circle around the footprint.
    """
    bulge = 1.0 - np.cos(np.radians(radius)) + 1e-12
    edges = np.stack([vectors.min(axis=0) - bulge, vectors.max(axis=0) + bulge], axis=1)
    return edges.ravel().tolist()
