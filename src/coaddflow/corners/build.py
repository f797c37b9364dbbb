"""Making corner databases from the manifests of the exposures; no pixel file or header is opened.

The same manifests give the same content. What CCDs cover is computed for many exposures at a time.
"""

import functools
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from coaddflow.corners.connections import new_database
from coaddflow.corners.schema import (
    APPLICATION_ID,
    INDEXES,
    MANIFEST_COLUMNS,
    SCHEMA_VERSION,
    SURVEY_TABLES,
    TABLES,
    VIEWS,
)
from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.skymap.tract import Tract, footprint_overlaps
from coaddflow.tables.manifest import CcdRow, rows_of_manifest

INSERT = {
    table.name: f"INSERT INTO {table.name} VALUES ({', '.join('?' * len(table.columns))})"  # noqa: S608 - names of the schema
    for table in (*TABLES, *SURVEY_TABLES)
}
"""Statements that insert a row, by table."""

_CCDS_AT_ONCE = 1000
"""CCDs whose overlaps are computed together, to limit the memory."""

_CCDS_OF_A_HASH = 4096
"""CCD numbers from which the keys of CCDs are consecutive."""

_of_manifest = attrgetter(*MANIFEST_COLUMNS)

TractsNear = Callable[[float, float, float], Iterable[Tract]]
"""Returns the tracts that a circle (ra, dec, radius) may touch."""


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read."""

    path: str
    sha256: str
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of change, nanoseconds since 1970."""
    rows: tuple[CcdRow, ...]
    """By CCD."""

    @property
    def exposure(self) -> str:
        """The exposure."""
        return self.rows[0].exposure


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
    with new_database(path) as connection:
        create_tables(connection, {"kind": "tract"})
        insert_tract(connection, tract)
        for batch in in_batches(read_manifests(manifests)):
            insert_exposures(connection, batch, lambda *_: [tract])
        create_indexes(connection)


def read_manifests(paths: Iterable[str | Path]) -> Iterator[Manifest]:
    """Yield manifests, in the order of the names of their files.

    Raises
    ------
    InputError
        If one cannot be read, is none, or two are of the same exposure.
    """
    seen = set()
    for path in sorted(set(map(str, paths)), key=lambda path: (Path(path).name, path)):
        manifest = _read_manifest(path)
        if manifest.exposure in seen:
            raise occurs_twice(manifest)
        seen.add(manifest.exposure)
        yield manifest


def _read_manifest(path: str) -> Manifest:
    content, size, mtime_ns = content_of(path)
    rows = tuple(sorted(rows_of_manifest(path, content), key=lambda row: row.ccd))
    problem = None
    if len({row.exposure for row in rows}) != 1 or len({row.ccd for row in rows}) != len(rows):
        problem = "is not a manifest: it must have each CCD of one exposure once"
    for row in rows:
        n = len(row.footprint_ra)
        if row.state == "done" and (n < 3 or len(row.footprint_dec) != n):
            problem = f"CCD {row.ccd} is done but has no footprint"
    if problem is not None:
        raise InputError(problem, path=path, remedy="remove it and run the workflow again")
    return Manifest(path, checksum_of(content), size, mtime_ns, rows)


def checksum_of(content: bytes) -> str:
    """Return the checksum of a manifest."""
    return hashlib.sha256(content).hexdigest()


def content_of(path: str) -> tuple[bytes, int, int]:
    """Return the content of a manifest, opened once, with its size and time of change (ns).

    Raises
    ------
    InputError
        If it cannot be read.
    """
    try:
        with Path(path).open("rb", buffering=0) as stream:
            # the time first: if it is changed meanwhile, it is read again the next time
            status = os.fstat(stream.fileno())
            return stream.readall(), status.st_size, status.st_mtime_ns
    except OSError as error:
        raise InputError(
            f"the manifest cannot be read: {error.strerror}",
            path=path,
            remedy="run the workflow again; it makes the manifests that are missing",
        ) from error


def occurs_twice(manifest: Manifest) -> InputError:
    """Return the error of a second manifest of an exposure."""
    return InputError(
        f"exposure {manifest.exposure} has another manifest already",
        path=manifest.path,
        remedy="give each exposure one manifest",
    )


def in_batches(manifests: Iterable[Manifest]) -> Iterator[list[Manifest]]:
    """Yield manifests in lists of about `_CCDS_AT_ONCE` CCDs."""
    batch: list[Manifest] = []
    n_ccds = 0
    for manifest in manifests:
        batch.append(manifest)
        n_ccds += len(manifest.rows)
        if n_ccds >= _CCDS_AT_ONCE:
            yield batch
            batch, n_ccds = [], 0
    if batch:
        yield batch


def create_tables(connection: sqlite3.Connection, meta: dict[str, str]) -> None:
    """Make the tables of a new database."""
    connection.execute(f"PRAGMA application_id = {APPLICATION_ID:d}")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION:d}")
    for table in TABLES:
        connection.execute(table.sql)
    connection.executemany(INSERT["meta"], sorted(meta.items()))


def create_indexes(connection: sqlite3.Connection) -> None:
    """Make what stands on the rows of a new database: sorted once, not kept in order."""
    for statement in (*INDEXES, *(view.sql for view in VIEWS)):
        connection.execute(statement)


def insert_tract(connection: sqlite3.Connection, tract: Tract) -> None:
    """Insert a tract and all its patches, unless it is there."""
    if connection.execute("SELECT 1 FROM tracts WHERE tract = ?", (tract.id,)).fetchone():
        return
    connection.execute(
        INSERT["tracts"],
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
        INSERT["patches"],
        [
            (tract.id, patch.id, *centre, *patch.inner_box, *patch.outer_box)
            for patch, centre in zip(patches, centres, strict=True)
        ],
    )


def insert_exposures(
    connection: sqlite3.Connection, manifests: Sequence[Manifest], tracts_near: TractsNear
) -> None:
    """Insert exposures with their CCDs, the overlaps of these, and the tracts that they touch.

    Parameters
    ----------
    connection : Connection
        The database.
    manifests : sequence of Manifest
        The exposures.
    tracts_near : callable
        Returns the tracts that are near a circle (ra, dec, radius in degrees).
    """
    rows = [row for manifest in manifests for row in manifest.rows]
    keys = [_ccd_key(row) for row in rows]
    places = _places(rows)
    exposures, tracts = _exposures_and_tracts(manifests, places, tracts_near)
    centres: dict[int, tuple[float, float]] = {}
    boxes = []
    for place in places:
        for index, centre, box in zip(place.ccds, place.centres(), place.boxes(), strict=True):
            if rows[index].state == "done":
                centres[index] = centre
                boxes.append((keys[index], *box))
    connection.executemany(INSERT["exposures"], exposures)
    none = (None, None)
    connection.executemany(
        INSERT["ccds"],
        (
            (key, *_of_manifest(row), *centres.get(index, none), _outline(row))
            for index, (key, row) in enumerate(zip(keys, rows, strict=True))
        ),
    )
    connection.executemany(INSERT["ccd_boxes"], boxes)
    states = [row.state for row in rows]
    for place in places:
        _insert_overlaps(connection, place, keys, states, tracts)


class _Places:
    """Where CCDs are whose footprints have the same number of vertices."""

    def __init__(self, rows: Sequence[CcdRow], ccds: Sequence[int]):
        self.ccds = ccds
        """Indices of the CCDs."""
        self.vectors = sphere.to_vector(
            [rows[index].footprint_ra for index in ccds],
            [rows[index].footprint_dec for index in ccds],
        )
        """Unit vectors, shape (n, n_vertices, 3)."""
        self._axis, self._radius = polygon.bounding_cap(self.vectors)

    def centres(self) -> Iterator[tuple[float, float]]:
        """Yield (ra, dec) of the circles around the footprints."""
        return zip(*(angle.tolist() for angle in sphere.from_vector(self._axis)), strict=True)

    def boxes(self) -> list[list[float]]:
        """Return the boxes around the footprints, as `vector_boxes` does."""
        return vector_boxes(self.vectors, self._radius).tolist()


def _places(rows: Sequence[CcdRow]) -> list[_Places]:
    """Return where CCDs are; failed ones need not have a place."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        if len(row.footprint_dec) == len(row.footprint_ra) > 2:
            by_length.setdefault(len(row.footprint_ra), []).append(index)
    return [_Places(rows, ccds) for ccds in by_length.values()]


def _exposures_and_tracts(
    manifests: Sequence[Manifest], places: Sequence[_Places], tracts_near: TractsNear
) -> tuple[list[tuple[object, ...]], list[Tract]]:
    """Return the rows of exposures in the database, and the tracts that are near some of them."""
    vertices = {
        ccd: vectors
        for place in places
        for ccd, vectors in zip(place.ccds, place.vectors, strict=True)
    }
    exposures, tracts, start = [], {}, 0
    for manifest in manifests:
        own, start = range(start, start + len(manifest.rows)), start + len(manifest.rows)
        placed = [vertices[ccd] for ccd in own if ccd in vertices]
        if placed:
            tracts |= {tract.id: tract for tract in tracts_near(*_circle(placed))}
        states = zip(own, manifest.rows, strict=True)
        done = [vertices[ccd] for ccd, row in states if row.state == "done"]
        exposures.append(_exposure_values(manifest, done))
    return exposures, [tracts[number] for number in sorted(tracts)]


def _exposure_values(manifest: Manifest, done: Sequence[NDArray[np.float64]]) -> tuple[object, ...]:
    """Return the row of an exposure in the database, with the vertices of CCDs that are done."""
    n_ccds, first = len(manifest.rows), manifest.rows[0]
    return (
        manifest.exposure,
        first.band,
        first.mjd,
        first.exposure_time,
        n_ccds,
        len(done),
        n_ccds - len(done),
        *(_circle(done) if done else (None, None, None)),
        manifest.path,
        manifest.sha256,
    )


def _circle(footprints: Sequence[NDArray[np.float64]]) -> tuple[float, float, float]:
    """Return (ra, dec, radius) of a circle around vertices, unit vectors; degrees."""
    axis, radius = polygon.bounding_cap(np.concatenate(footprints))
    return (*map(float, sphere.from_vector(axis)), float(radius))


def _outline(row: CcdRow) -> str | None:
    """Return the footprint of a CCD as `json.dumps` would write it; None if it failed."""
    if row.state == "failed":
        return None
    vertices = list(zip(row.footprint_ra, row.footprint_dec, strict=True))
    text = to_json(vertices).decode().replace(",", ", ")
    # exponents are written in another way
    return json.dumps(vertices) if "e" in text else text


def _insert_overlaps(
    connection: sqlite3.Connection,
    place: _Places,
    keys: Sequence[int],
    states: Sequence[str],
    tracts: Sequence[Tract],
) -> None:
    """Insert the overlaps of CCDs with patches, and the tracts of these.

    ``keys`` and ``states`` are those of all CCDs.
    """
    found = footprint_overlaps(place.vectors, tracts)
    values: dict[str, list[tuple[object, ...]]] = {"done": [], "failed": []}
    for index, number, patch, *fractions in zip(*(part.tolist() for part in found), strict=True):
        tract, ccd = tracts[number], place.ccds[index]
        values[states[ccd]].append((tract.id, tract.patch_ids()[patch], keys[ccd], *fractions))
    for number in np.unique(found.tract):
        insert_tract(connection, tracts[number])
    connection.executemany(INSERT["ccd_patches"], values["done"])
    connection.executemany(INSERT["failed_ccd_patches"], values["failed"])


def _ccd_key(row: CcdRow) -> int:
    """Return a positive 63-bit number that depends only on exposure and CCD.

    The CCDs of an exposure follow each other, and so do their rows in the file: what is added or
    deleted with an exposure is in few pages.
    """
    group, number = divmod(row.ccd, _CCDS_OF_A_HASH)
    return _first_key(row.exposure, group) + number


@functools.lru_cache(maxsize=16)
def _first_key(exposure: str, group: int) -> int:
    digest = hashlib.sha256(f"{exposure}/{group}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 1) // _CCDS_OF_A_HASH * _CCDS_OF_A_HASH


def vector_boxes(vectors: NDArray[np.float64], radius: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return boxes (x_min, x_max, y_min, ...) that contain every direction of footprints.

    The flat polygon between the vertices is inside their box, and the sphere bulges out of it by
    at most 1 - cos(radius), with the radius of the circle around the footprint.

    Parameters
    ----------
    vectors : ndarray of float64, shape (n, n_vertices, 3)
        Vertices of the footprints.
    radius : ndarray of float64, shape (n,)
        Of circles around them, degrees.
    """
    bulge = (1.0 - np.cos(np.radians(radius)) + 1e-12)[:, None]
    # one vertex of all footprints after the other: vector instructions need long rows
    vertices = np.ascontiguousarray(np.moveaxis(vectors, 1, 0))
    edges = np.stack([vertices.min(axis=0) - bulge, vertices.max(axis=0) + bulge], axis=-1)
    return edges.reshape(len(vectors), 6)
