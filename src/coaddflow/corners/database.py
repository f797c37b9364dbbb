"""The corner database: which CCD covers which patch, and how good it is.

It is made from the manifests of the exposures alone; no pixel file or header is opened to learn
what overlaps. A tract's database is always made anew; the survey's database is updated: only rows
of exposures whose manifest was added, changed or dropped are touched. Both are written under a
temporary name and renamed, so that readers, who open the file without locks, always see a whole
one. The same manifests give the same content. `corner_schema` documents tables and columns.

References
----------
.. [1] Sutherland & Hodgman 1974, Commun. ACM 17, 32 (covered fractions by clipping).
.. [2] Beckmann et al. 1990, Proc. SIGMOD '90, 322 (R*tree), here on unit vectors.
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
from numpy.typing import ArrayLike, NDArray

from coaddflow.corners.schema import (
    APPLICATION_ID,
    MANIFEST_COLUMNS,
    SCHEMA_VERSION,
    STATEMENTS,
    TABLES,
    schema_markdown,
)
from coaddflow.corners.selection import median_zero_point, reasons_against
from coaddflow.errors import InputError
from coaddflow.files import atomic_path, sha256_of
from coaddflow.geometry import polygon, sphere
from coaddflow.settings.selection import SelectionSettings
from coaddflow.skymap.maps import SkyMap, Tract
from coaddflow.tables.manifest import CcdRow, read_manifest

__all__ = [
    "CcdOverlap",
    "CornerDatabase",
    "Rejection",
    "Selection",
    "SurveyUpdate",
    "build_survey_database",
    "build_tract_database",
    "patch_overlaps",
    "schema_markdown",
    "update_survey_database",
]

_REBUILD = "remove it and run the workflow again; it is made from the manifests"

_INSERT = {
    table.name: f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})"  # noqa: S608 - names of the schema
    for table in TABLES
}


@dataclass(frozen=True)
class CcdOverlap:
    """A CCD on a patch.

    Attributes
    ----------
    ccd : CcdRow
        The CCD, as its manifest has it.
    tract : int
        The tract.
    patch : str
        The patch.
    patch_fraction : float
        Part of the patch's outer box that the CCD covers.
    ccd_fraction : float
        Part of the CCD that lies on the outer box.
    """

    ccd: CcdRow
    tract: int
    patch: str
    patch_fraction: float
    ccd_fraction: float


@dataclass(frozen=True)
class Rejection:
    """A CCD that covers a patch but does not go into its coadd, and why."""

    overlap: CcdOverlap
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """The CCDs of one band on a patch, ordered by exposure id and CCD."""

    selected: list[CcdOverlap]
    rejected: list[Rejection]


@dataclass(frozen=True)
class SurveyUpdate:
    """What an update of the survey's database did: exposure ids, each list in order."""

    added: list[str]
    redone: list[str]
    dropped: list[str]
    unchanged: list[str]


def patch_overlaps(
    footprint_ra: ArrayLike, footprint_dec: ArrayLike, tract: Tract
) -> list[tuple[str, float, float]]:
    """Return the patches of a tract that a footprint overlaps, and how much [1]_.

    Parameters
    ----------
    footprint_ra, footprint_dec : array_like, shape (n,)
        Outline in order, ICRS degrees; it may be slightly bowed.
    tract : Tract
        The tract.

    Returns
    -------
    list of (patch, patch_fraction, ccd_fraction)
        Fractions of the patch's outer box and of the footprint, by area on the tangent plane; x
        running fastest. Empty if the footprint misses the tract.
    """
    axis, radius = polygon.bounding_cap(sphere.to_vector(footprint_ra, footprint_dec))
    distance = sphere.separation(*sphere.from_vector(axis), tract.ra, tract.dec)
    if distance > radius + tract.radius + 1e-6:
        return []
    points = tract.footprint_pixels(footprint_ra, footprint_dec)
    whole = polygon.area(points)
    overlaps = []
    for patch_id, covered in tract.patch_areas(points).items():
        x0, y0, x1, y1 = tract.patch(patch_id).outer_box
        box_area = (x1 - x0) * (y1 - y0)
        overlaps.append((patch_id, min(covered / box_area, 1.0), min(covered / whole, 1.0)))
    return overlaps


class CornerDatabase:
    """A corner database, opened for reading.

    Parameters
    ----------
    path : str or Path
        A tract's or the survey's database. It is read without locks: files are never changed
        under their final name.

    Raises
    ------
    InputError
        If it is missing, is not a corner database, or has another schema version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                "there is no corner database", path=path, remedy="run the workflow that makes it"
            )
        _require_rtree()
        self._zero_points: dict[str, float | None] = {}
        self._connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode=ro&immutable=1", uri=True
        )
        self._connection.row_factory = sqlite3.Row
        try:
            self._check_version()
        except InputError:
            self.close()
            raise

    def __enter__(self) -> "CornerDatabase":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _check_version(self) -> None:
        application = self._rows("PRAGMA application_id")[0][0]
        version = self._rows("PRAGMA user_version")[0][0]
        if application != APPLICATION_ID:
            raise InputError("is not a corner database", path=self.path, remedy=_REBUILD)
        if version != SCHEMA_VERSION:
            raise InputError(
                f"has schema version {version}, but this version of coaddflow reads "
                f"{SCHEMA_VERSION}",
                path=self.path,
                remedy=_REBUILD,
            )

    def _rows(self, query: str, parameters: Sequence[object] = ()) -> list[sqlite3.Row]:
        try:
            return self._connection.execute(query, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            raise InputError(
                f"is not a readable corner database ({error})", path=self.path, remedy=_REBUILD
            ) from error

    def facts(self) -> dict[str, str]:
        """Return the table ``meta``."""
        return {row["key"]: row["value"] for row in self._rows("SELECT * FROM meta")}

    def tracts(self) -> list[int]:
        """Return the tracts of the database, in order."""
        return [row["tract"] for row in self._rows("SELECT tract FROM tracts ORDER BY tract")]

    def exposures(self) -> dict[str, str]:
        """Return the exposures, in order, with the checksums of their manifests."""
        rows = self._rows("SELECT exposure, manifest_sha256 FROM exposures ORDER BY exposure")
        return {row["exposure"]: row["manifest_sha256"] for row in rows}

    def manifests(self) -> dict[str, str]:
        """Return the manifests of the exposures, in order of their ids."""
        rows = self._rows("SELECT exposure, manifest FROM exposures ORDER BY exposure")
        return {row["exposure"]: row["manifest"] for row in rows}

    def ccds(self, exposure: str | None = None) -> list[CcdRow]:
        """Return all CCDs, or those of one exposure, failed ones too; by exposure and CCD."""
        return [
            _ccd_row(row)
            for row in self._rows(
                "SELECT * FROM ccds WHERE ? IS NULL OR exposure = ? ORDER BY exposure, ccd",
                (exposure, exposure),
            )
        ]

    def query_point(self, ra: float, dec: float, band: str | None = None) -> list[CcdRow]:
        """Return the CCDs whose footprint holds a position.

        Parameters
        ----------
        ra, dec : float
            ICRS degrees; any RA, also beyond 0 to 360.
        band : str, optional
            Only this band.

        Returns
        -------
        list of CcdRow
            By exposure and CCD.

        Raises
        ------
        InputError
            If the position is not one.
        """
        if not (np.isfinite(ra) and -90.0 <= dec <= 90.0):
            raise InputError(
                f"RA {ra}, Dec {dec} is not a position",
                remedy="give both in degrees, Dec between -90 and 90",
            )
        x, y, z = sphere.to_vector(ra, dec).tolist()
        rows = self._rows(
            "SELECT ccds.* FROM ccd_boxes JOIN ccds USING (ccd_key)"
            " WHERE x_min <= ? AND x_max >= ? AND y_min <= ? AND y_max >= ?"
            " AND z_min <= ? AND z_max >= ? AND (? IS NULL OR band = ?)"
            " ORDER BY exposure, ccd",
            (x, x, y, y, z, z, band, band),
        )
        return [ccd for ccd in map(_ccd_row, rows) if _holds(ccd, ra, dec)]

    def query_patch(self, tract: int, patch: str, band: str | None = None) -> list[CcdOverlap]:
        """Return the CCDs that overlap the outer box of a patch.

        Parameters
        ----------
        tract, patch : int, str
            The patch.
        band : str, optional
            Only this band.

        Returns
        -------
        list of CcdOverlap
            By exposure and CCD, before any selection.

        Raises
        ------
        InputError
            If the database has no such patch.
        """
        self._require_patch(tract, patch)
        rows = self._rows(
            "SELECT * FROM ccd_patches JOIN ccds USING (ccd_key)"
            " WHERE tract = ? AND patch = ? AND (? IS NULL OR band = ?) ORDER BY exposure, ccd",
            (tract, patch, band, band),
        )
        return [
            CcdOverlap(_ccd_row(row), tract, patch, row["patch_fraction"], row["ccd_fraction"])
            for row in rows
        ]

    def select(self, tract: int, patch: str, band: str, settings: SelectionSettings) -> Selection:
        """Return which CCDs go into the coadd of a patch, and which do not, with the reasons.

        Parameters
        ----------
        tract, patch, band : int, str, str
            The coadd.
        settings : SelectionSettings
            The cuts. The reference of ``max_zero_point_loss`` is the median of all CCDs of the
            band in this database.

        Returns
        -------
        Selection
            Both lists by exposure and CCD.

        Raises
        ------
        InputError
            If the database has no such patch.
        """
        reference = None
        if settings.max_zero_point_loss is not None:
            reference = self._median_zero_point(band)
        selection = Selection([], [])
        for overlap in self.query_patch(tract, patch, band):
            reasons = reasons_against(overlap.ccd, settings, reference)
            if reasons:
                selection.rejected.append(Rejection(overlap, reasons))
            else:
                selection.selected.append(overlap)
        return selection

    def _median_zero_point(self, band: str) -> float | None:
        """Return that of all CCDs of a band; the file does not change while it is open."""
        if band not in self._zero_points:
            rows = self._rows("SELECT * FROM ccds WHERE band = ? AND state = 'done'", (band,))
            self._zero_points[band] = median_zero_point(map(_ccd_row, rows))
        return self._zero_points[band]

    def _require_patch(self, tract: int, patch: str) -> None:
        if not self._rows("SELECT 1 FROM tracts WHERE tract = ?", (tract,)):
            raise InputError(
                f"has no tract {tract}: no CCD overlaps it",
                path=self.path,
                remedy="`coaddflow skymap find RA DEC` tells which tract a position is on",
            )
        if not self._rows("SELECT 1 FROM patches WHERE tract = ? AND patch = ?", (tract, patch)):
            raise InputError(
                f"tract {tract} has no patch {patch!r}",
                path=self.path,
                remedy="patches are named 'x_y'; `coaddflow skymap find RA DEC` prints the name",
            )


def build_tract_database(path: str | Path, manifests: Iterable[str | Path], tract: Tract) -> None:
    """Make the corner database of a tract.

    Parameters
    ----------
    path : str or Path
        The file; replaced as a whole.
    manifests : iterable of str or Path
        Manifests of all exposures that can touch the tract. Their CCDs all stand in the table,
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
    """Make the corner database of a survey from all its manifests, anew.

    Parameters
    ----------
    path : str or Path
        The file; replaced as a whole.
    manifests : iterable of str or Path
        Manifests of all exposures.
    skymap : SkyMap
        Tracts and patches.

    Raises
    ------
    InputError
        As `build_tract_database`.
    """
    exposures = _read_manifests(manifests)
    with _writing(path) as connection:
        _create(connection, {"kind": "survey", "skymap": skymap.settings.model_dump_json()})
        for exposure in sorted(exposures):
            _insert_exposure(connection, exposures[exposure], skymap)
    return SurveyUpdate(added=sorted(exposures), redone=[], dropped=[], unchanged=[])


def update_survey_database(
    path: str | Path, manifests: Iterable[str | Path], skymap: SkyMap
) -> SurveyUpdate:
    """Bring the corner database of a survey up to its manifests.

    Only rows of exposures whose manifest is new, has another checksum or is no longer there are
    touched; the content is that of a database made anew. Where the old file is missing, damaged,
    of another schema version or of another sky map, everything is made anew.

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
        What was done.

    Raises
    ------
    InputError
        As `build_tract_database`.
    """
    paths = list(dict.fromkeys(str(manifest) for manifest in manifests))
    known = _known_manifests(path, skymap)
    if known is None:
        return build_survey_database(path, paths, skymap)
    checksums = {manifest: _checksum(manifest) for manifest in paths}
    unchanged = {
        known[manifest].exposure
        for manifest, checksum in checksums.items()
        if manifest in known and known[manifest].sha256 == checksum
    }
    changed = _read_manifests(
        manifest
        for manifest in paths
        if manifest not in known or known[manifest].sha256 != checksums[manifest]
    )
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
        connection.execute("DELETE FROM tracts WHERE tract NOT IN (SELECT tract FROM ccd_patches)")
    return update


@dataclass(frozen=True)
class _Manifest:
    """A manifest; ``rows`` are not kept of those that did not change."""

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
    """Return the manifests of a survey's database by path; None if it is of no use."""
    try:
        with CornerDatabase(path) as database:
            facts = database.facts()
            whole = database._rows("PRAGMA quick_check(1)")[0][0] == "ok"
            rows = database._rows("SELECT manifest, manifest_sha256, exposure FROM exposures")
    except InputError:
        return None
    if not whole or facts.get("skymap") != skymap.settings.model_dump_json():
        return None
    return {row["manifest"]: _Manifest(*row) for row in rows}


@contextlib.contextmanager
def _writing(path: str | Path, copy_from: str | Path | None = None) -> Iterator[sqlite3.Connection]:
    """Give a connection to a temporary database, which takes the name ``path`` at the end."""
    _require_rtree()
    with atomic_path(path) as temporary:
        if copy_from is not None:
            shutil.copyfile(copy_from, temporary)
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            # nobody else knows this file, and if it fails it is thrown away: no journal
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


def _require_rtree() -> None:
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute("CREATE VIRTUAL TABLE probe USING rtree(id, x0, x1)")
    except sqlite3.OperationalError as error:
        raise InputError(
            f"the SQLite library {sqlite3.sqlite_version} of this Python has no R*Tree module",
            remedy="use a Python whose sqlite3 has it, such as those of Debian, conda-forge or "
            "python.org (SQLite compiled with SQLITE_ENABLE_RTREE)",
        ) from error
    finally:
        connection.close()


def _create(connection: sqlite3.Connection, facts: dict[str, str]) -> None:
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID:d}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
    for statement in STATEMENTS:
        connection.execute(statement)
    connection.executemany(_INSERT["meta"], sorted(facts.items()))


def _insert_tract(connection: sqlite3.Connection, tract: Tract) -> None:
    """Enter a tract and all its patches, if it is not there yet."""
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
    """Enter an exposure with its CCDs and their overlaps."""
    rows, first = manifest.rows, manifest.rows[0]
    done = [row for row in rows if row.state == "done"]
    centre = (None, None, None)
    if done:
        vertices = [sphere.to_vector(row.footprint_ra, row.footprint_dec) for row in done]
        axis, radius = polygon.bounding_cap(np.concatenate(vertices))
        centre = (*_sky(axis), float(radius))
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
        return
    vectors = sphere.to_vector(row.footprint_ra, row.footprint_dec)
    axis, radius = polygon.bounding_cap(vectors)
    ra, dec = _sky(axis)
    outline = json.dumps(list(zip(row.footprint_ra, row.footprint_dec, strict=True)))
    connection.execute(_INSERT["ccds"], (key, *copied, ra, dec, outline))
    connection.execute(_INSERT["ccd_boxes"], (key, *_vector_box(vectors, float(radius))))
    if isinstance(tracts, SkyMap):
        tracts = [tracts.tract(i) for i in tracts.tracts_near(ra, dec, float(radius))]
    for tract in tracts:
        overlaps = patch_overlaps(row.footprint_ra, row.footprint_dec, tract)
        if overlaps:
            _insert_tract(connection, tract)
        connection.executemany(
            _INSERT["ccd_patches"],
            [(tract.id, patch, key, *fractions) for patch, *fractions in overlaps],
        )


def _delete_exposure(connection: sqlite3.Connection, exposure: str) -> None:
    connection.execute(
        "DELETE FROM ccd_boxes WHERE ccd_key IN (SELECT ccd_key FROM ccds WHERE exposure = ?)",
        (exposure,),
    )
    # foreign keys take the CCDs and their overlaps along
    connection.execute("DELETE FROM exposures WHERE exposure = ?", (exposure,))


def _ccd_key(exposure: str, ccd: int) -> int:
    """Return a positive 63-bit number that depends on nothing but exposure and CCD."""
    digest = hashlib.sha256(f"{exposure}/{ccd}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _vector_box(vectors: NDArray[np.float64], radius: float) -> list[float]:
    """Return x_min, x_max, y_min, ... of a box that holds every direction of a footprint.

    The flat polygon between the vertices is inside their box, and the sphere bulges out from it
    by at most 1 - cos(radius) of the circle around the footprint.
    """
    bulge = 1.0 - np.cos(np.radians(radius)) + 1e-12
    edges = np.stack([vectors.min(axis=0) - bulge, vectors.max(axis=0) + bulge], axis=1)
    return edges.ravel().tolist()


def _sky(axis: NDArray[np.float64]) -> tuple[float, float]:
    ra, dec = sphere.from_vector(axis)
    return float(ra), float(dec)


def _ccd_row(row: sqlite3.Row) -> CcdRow:
    """Return a CCD as its manifest had it (checked when the manifest was read)."""
    outline = json.loads(row["footprint"] or "[]")
    return CcdRow.model_construct(
        **{name: row[name] for name in MANIFEST_COLUMNS},
        footprint_ra=[vertex[0] for vertex in outline],
        footprint_dec=[vertex[1] for vertex in outline],
    )


def _holds(ccd: CcdRow, ra: float, dec: float) -> bool:
    """Return whether the footprint of a CCD holds a position near it."""
    xi, eta = sphere.tan_project(ccd.footprint_ra, ccd.footprint_dec, ra, dec)
    return bool(polygon.contains(np.stack([xi, eta], axis=1), 0.0, 0.0))
