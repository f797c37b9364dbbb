"""Reading a corner database: which CCDs cover a position or a patch, and which go into a coadd.

`corners.build` makes it from the manifests; `corners.schema` documents its tables and columns.
"""

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic_core import from_json

from coaddflow.corners.connections import REBUILD, open_for_reading, reading_failed
from coaddflow.corners.schema import APPLICATION_ID, MANIFEST_COLUMNS, SCHEMA_VERSION, require_rtree
from coaddflow.corners.selection import BandMedians, band_medians, cuts_against, reasons_against
from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.settings.selection import SelectionSettings
from coaddflow.tables.manifest import CcdRow

_SELECT = f"SELECT ccds.footprint, {', '.join(f'ccds.{name}' for name in MANIFEST_COLUMNS)}"
"""What `_ccd_row` takes."""


@dataclass(frozen=True)
class CcdOverlap:
    """A CCD on a patch."""

    ccd: CcdRow
    """The CCD, as its manifest has it."""
    patch_fraction: float
    """Part of the patch's outer box that the CCD covers."""
    ccd_fraction: float
    """Part of the CCD that lies on the outer box."""


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
    failed: list[Rejection]
    """CCDs that would cover the patch, and have no calexp or are left out with their exposure."""


class CornerDatabase:
    """The corner database of a tract or of the survey, opened for reading.

    That of a tract is read without locks: it never changes under its name. Each query of that of
    the survey sees it as it was before an update, or after it.

    Raises
    ------
    InputError
        If it is missing, is not a corner database, has another schema version, or was left half
        changed by a job that was killed and this process may not mend it.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(
                "there is no corner database", path=path, remedy="run the workflow that makes it"
            )
        require_rtree()
        self._medians: dict[str, BandMedians] = {}
        self._connection = open_for_reading(self.path)
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
        if self.query("PRAGMA application_id")[0][0] != APPLICATION_ID:
            raise InputError("is not a corner database", path=self.path, remedy=REBUILD)
        version = self.query("PRAGMA user_version")[0][0]
        if version != SCHEMA_VERSION:
            raise InputError(
                f"has schema version {version}, but this version of coaddflow reads "
                f"{SCHEMA_VERSION}",
                path=self.path,
                remedy=REBUILD,
            )

    def query(
        self, sql: str, parameters: Sequence[object] | Mapping[str, object] = ()
    ) -> list[sqlite3.Row]:
        """Return the rows of any query; raise InputError if it fails."""
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            raise reading_failed(self.path, error) from error

    def meta(self) -> dict[str, str]:
        """Return the table ``meta``: what the database is of."""
        return {row["key"]: row["value"] for row in self.query("SELECT * FROM meta")}

    def manifests(self) -> dict[str, str]:
        """Return the manifests of the exposures, in order of their ids."""
        rows = self.query("SELECT exposure, manifest FROM exposures ORDER BY exposure")
        return {row["exposure"]: row["manifest"] for row in rows}

    def ccds(self, exposure: str | None = None) -> list[CcdRow]:
        """Return all CCDs, or those of one exposure, failed ones too; by exposure and CCD."""
        chosen, values = ("", ()) if exposure is None else (" WHERE exposure = ?", (exposure,))
        rows = self.query(f"{_SELECT} FROM ccds{chosen} ORDER BY exposure, ccd", values)
        return [self._ccd_row(row) for row in rows]

    def query_point(self, ra: float, dec: float, band: str | None = None) -> list[CcdRow]:
        """Return the CCDs whose footprint contains a position.

        Parameters
        ----------
        ra, dec : float
            ICRS degrees; RA may be outside 0 to 360.
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
        rows = self.query(
            f"{_SELECT} FROM ccd_boxes JOIN ccds USING (ccd_key)"
            " WHERE x_min <= ? AND x_max >= ? AND y_min <= ? AND y_max >= ?"
            " AND z_min <= ? AND z_max >= ? AND (? IS NULL OR band = ?)"
            " ORDER BY exposure, ccd",
            (x, x, y, y, z, z, band, band),
        )
        return [ccd for ccd in map(self._ccd_row, rows) if _holds(ccd, ra, dec)]

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
        return self._overlaps("ccd_patches", tract, patch, band)

    def _overlaps(
        self,
        table: Literal["ccd_patches", "failed_ccd_patches"],
        tract: int,
        patch: str,
        band: str | None,
    ) -> list[CcdOverlap]:
        """Return the CCDs that a table of overlaps has on a patch."""
        rows = self.query(
            f"{_SELECT}, patch_fraction, ccd_fraction FROM {table} JOIN ccds USING (ccd_key)"
            " WHERE tract = ? AND patch = ? AND (? IS NULL OR band = ?) ORDER BY exposure, ccd",
            (tract, patch, band, band),
        )
        return [self._overlap(row) for row in rows]

    def select(self, tract: int, patch: str, band: str, settings: SelectionSettings) -> Selection:
        """Return which CCDs go into the coadd of a patch, and which do not, with the reasons.

        Parameters
        ----------
        tract, patch, band : int, str, str
            The coadd.
        settings : SelectionSettings
            The cuts. Some are relative to the medians of all CCDs of the band in this database.

        Returns
        -------
        Selection
            All lists by exposure and CCD.

        Raises
        ------
        InputError
            If the database has no such patch.
        """
        medians = self.band_medians(band)
        selection = Selection([], [], [])
        for overlap in self.query_patch(tract, patch, band):
            reasons = reasons_against(overlap.ccd, settings, medians)
            if reasons:
                selection.rejected.append(Rejection(overlap, reasons))
            else:
                selection.selected.append(overlap)
        for overlap in self._overlaps("failed_ccd_patches", tract, patch, band):
            reasons = reasons_against(overlap.ccd, settings, medians)
            selection.failed.append(Rejection(overlap, reasons))
        return selection

    def band_medians(self, band: str) -> BandMedians:
        """Return the medians of all CCDs of a band, computed once."""
        if band not in self._medians:
            self._medians[band] = band_medians(self._done(band))
        return self._medians[band]

    def require_some(self, tract: int, band: str, settings: SelectionSettings) -> None:
        """Raise InputError if the cuts leave out all CCDs of a band on a tract that has some."""
        rows, medians = self._done(band, tract), self.band_medians(band)
        cuts = Counter(setting for row in rows for setting in cuts_against(row, settings, medians))
        if not rows or any(not cuts_against(row, settings, medians) for row in rows):
            return
        names = ", ".join(f"selection.{name} {count}" for name, count in cuts.most_common())
        raise InputError(
            f"the selection leaves out all {len(rows)} CCDs of band {band} on tract {tract} "
            f"(CCDs by setting: {names})",
            path=self.path,
            remedy=f"relax selection.{cuts.most_common(1)[0][0]}, or leave the exposures out "
            "of the survey with the setting exclude",
        )

    def _done(self, band: str, tract: int | None = None) -> list[CcdRow]:
        """Return the CCDs of a band that have a calexp; with a tract, those that overlap it."""
        rows = self.query(
            f"{_SELECT} FROM ccds WHERE band = :band AND state = 'done' AND (:tract IS NULL"  # noqa: S608 - names of the schema
            " OR ccd_key IN (SELECT ccd_key FROM ccd_patches WHERE tract = :tract))"
            " ORDER BY exposure, ccd",
            {"band": band, "tract": tract},
        )
        return list(map(self._ccd_row, rows))

    def _require_patch(self, tract: int, patch: str) -> None:
        if self.query("SELECT 1 FROM patches WHERE tract = ? AND patch = ?", (tract, patch)):
            return
        if not self.query("SELECT 1 FROM tracts WHERE tract = ?", (tract,)):
            raise InputError(
                f"has no tract {tract}: no CCD overlaps it",
                path=self.path,
                remedy="`coaddflow skymap find RA DEC` tells which tract a position is on",
            )
        raise InputError(
            f"tract {tract} has no patch {patch!r}",
            path=self.path,
            remedy="patches are named 'x_y'; `coaddflow skymap find RA DEC` prints the name",
        )

    def _ccd_row(self, row: Sequence[object]) -> CcdRow:
        """Return the row of a CCD in its manifest; InputError if it is not what was written.

        ``row`` is that of `_SELECT`.
        """
        try:
            footprint, *values = row
            vertices = from_json(footprint or "[]")
            ra, dec = zip(*vertices, strict=True) if vertices else ((), ())
            cells = dict(zip(MANIFEST_COLUMNS, values, strict=True))
            return CcdRow.model_validate(cells | {"footprint_ra": ra, "footprint_dec": dec})
        except (ValueError, TypeError, RecursionError) as error:
            raise reading_failed(self.path, error) from error

    def _overlap(self, row: Sequence[object]) -> CcdOverlap:
        """Return the CCD of a row, and its fractions."""
        *ccd, patch_fraction, ccd_fraction = row
        try:
            return CcdOverlap(self._ccd_row(ccd), float(patch_fraction), float(ccd_fraction))
        except (ValueError, TypeError) as error:
            raise reading_failed(self.path, error) from error


def _holds(ccd: CcdRow, ra: float, dec: float) -> bool:
    """Return whether the footprint of a CCD contains a position near it."""
    xi, eta = sphere.tan_project(ccd.footprint_ra, ccd.footprint_dec, ra, dec)
    return bool(polygon.contains(np.stack([xi, eta], axis=1), 0.0, 0.0))
