"""The schema of the corner database: one description makes the SQL and its documentation.

The database is a public interface: people query it with the ``sqlite3`` program, and other
software with any SQLite library that has the R*Tree module [1]_. `SCHEMA_VERSION` is raised
whenever a table, a column or its meaning changes.

References
----------
.. [1] Beckmann et al. 1990, Proc. SIGMOD '90, 322; https://www.sqlite.org/rtree.html
"""

import sqlite3
from dataclasses import dataclass

from coaddflow.errors import InputError
from coaddflow.tables.manifest import CcdRow
from coaddflow.tables.paths import SURVEY_CORNERS, TRACT_CORNERS

SCHEMA_VERSION = 3
"""Stands in the file as ``PRAGMA user_version``."""

APPLICATION_ID = 0x63664342
"""Stands in the file as ``PRAGMA application_id``: "cfCB" in ASCII."""

MANIFEST_COLUMNS = tuple(
    name for name in CcdRow.model_fields if name not in ("footprint_ra", "footprint_dec")
)
"""Columns of ``ccds`` that are copied from the manifest."""


@dataclass(frozen=True)
class Column:
    """A column of a table or view; ``declaration`` is its SQL type with constraints."""

    name: str
    declaration: str
    description: str


@dataclass(frozen=True)
class Table:
    """A table; ``virtual`` is the SQLite module that keeps it, where it is not an ordinary one."""

    name: str
    description: str
    columns: tuple[Column, ...]
    constraints: tuple[str, ...] = ()
    virtual: str | None = None

    @property
    def sql(self) -> str:
        """The statement that creates the table."""
        if self.virtual is not None:
            names = ", ".join(column.name for column in self.columns)
            return f"CREATE VIRTUAL TABLE {self.name} USING {self.virtual}({names})"
        lines = [f"{column.name} {column.declaration}" for column in self.columns]
        body = ",\n  ".join([*lines, *self.constraints])
        return f"CREATE TABLE {self.name} (\n  {body}\n)"


@dataclass(frozen=True)
class View:
    """A ready-made query."""

    name: str
    description: str
    query: str

    @property
    def sql(self) -> str:
        """The statement that creates the view."""
        return f"CREATE VIEW {self.name} AS\n{self.query}"


def _sql_type(name: str) -> str:
    annotation = CcdRow.model_fields[name].annotation
    kinds = getattr(annotation, "__args__", (annotation,))
    kind = "REAL" if float in kinds else "INTEGER" if int in kinds else "TEXT"
    return kind if type(None) in kinds else f"{kind} NOT NULL"


TABLES = (
    Table(
        "meta",
        "Properties of the database itself.",
        (
            Column(
                "key",
                "TEXT PRIMARY KEY",
                "`kind` (`tract` or `survey`); in the survey database also `skymap`, the settings "
                "of its sky map as JSON.",
            ),
            Column("value", "TEXT NOT NULL", "The value."),
        ),
    ),
    Table(
        "exposures",
        "One row per exposure (manifest).",
        (
            Column("exposure", "TEXT PRIMARY KEY", "Exposure id."),
            Column("band", "TEXT NOT NULL", "Band."),
            Column("mjd", "REAL NOT NULL", "Start of the exposure, MJD TAI."),
            Column("exposure_time", "REAL NOT NULL", "Exposure time, s."),
            Column("n_ccds", "INTEGER NOT NULL", "CCDs in the manifest."),
            Column("n_done", "INTEGER NOT NULL", "CCDs that have a calexp."),
            Column("n_failed", "INTEGER NOT NULL", "CCDs that failed."),
            Column("ra", "REAL", "Centre of all footprints, ICRS degrees; null if all failed."),
            Column("dec", "REAL", "Likewise."),
            Column("radius", "REAL", "Distance from the centre to the farthest corner, degrees."),
            Column("manifest", "TEXT NOT NULL", "Path of the manifest."),
            Column(
                "manifest_sha256",
                "TEXT NOT NULL",
                "Checksum of the manifest; changes when the exposure is redone.",
            ),
        ),
    ),
    Table(
        "ccds",
        "All CCDs of these exposures with their quality, or the reason of their failure.",
        (
            Column(
                "ccd_key",
                "INTEGER PRIMARY KEY",
                "Hash of the exposure, and the CCD number: the same in every database.",
            ),
            *(
                Column(name, _sql_type(name), CcdRow.model_fields[name].description or "")
                for name in MANIFEST_COLUMNS
            ),
            Column("ra", "REAL", "Centre of the footprint, ICRS degrees; null for a failed CCD."),
            Column("dec", "REAL", "Likewise."),
            Column(
                "footprint",
                "TEXT",
                "Outline from the fitted WCS with points along the edges, joined by great circles: "
                "JSON [[ra, dec], ...], degrees, beginning at pixel (-0.5, -0.5) along the first "
                "row; null for a failed CCD.",
            ),
        ),
        (
            "UNIQUE (exposure, ccd)",
            "FOREIGN KEY (exposure) REFERENCES exposures (exposure) ON DELETE CASCADE",
        ),
    ),
    Table(
        "ccd_boxes",
        "R*tree of the bounding boxes of footprints in unit vectors x = cos(dec) cos(ra), "
        "y = cos(dec) sin(ra), z = sin(dec), so that RA 0 and the poles are not special. A "
        "direction inside the footprint is inside the box; the reverse need not hold.",
        (
            Column("ccd_key", "", "The CCD."),
            Column("x_min", "", "Bounds, 32-bit floats rounded outwards."),
            *(Column(name, "", "") for name in ("x_max", "y_min", "y_max", "z_min", "z_max")),
        ),
        virtual="rtree",
    ),
    Table(
        "tracts",
        "The tract; in the survey database, all tracts that a CCD overlaps.",
        (
            Column("tract", "INTEGER PRIMARY KEY", "Tract number."),
            Column("ra", "REAL NOT NULL", "Tangent point, ICRS degrees."),
            Column("dec", "REAL NOT NULL", "Likewise."),
            Column("width", "INTEGER NOT NULL", "Columns."),
            Column("height", "INTEGER NOT NULL", "Rows."),
            Column("pixel_scale", "REAL NOT NULL", "Arcsec per pixel."),
            Column("reference_x", "REAL NOT NULL", "Tangent point, 0-based pixel."),
            Column("reference_y", "REAL NOT NULL", "Likewise."),
            Column("n_patches_x", "INTEGER NOT NULL", "Patches along x."),
            Column("n_patches_y", "INTEGER NOT NULL", "Patches along y."),
        ),
    ),
    Table(
        "patches",
        "All patches of these tracts. Boxes are half-open, in 0-based tract pixels.",
        (
            Column("tract", "INTEGER NOT NULL", "The tract."),
            Column("patch", "TEXT NOT NULL", 'The patch, "x_y".'),
            Column("ra", "REAL NOT NULL", "Centre of the inner box, ICRS degrees."),
            Column("dec", "REAL NOT NULL", "Likewise."),
            Column("inner_x0", "INTEGER NOT NULL", "Inner box, without the border."),
            *(Column(f"inner_{edge}", "INTEGER NOT NULL", "") for edge in ("y0", "x1", "y1")),
            Column("outer_x0", "INTEGER NOT NULL", "Outer box, with the border."),
            *(Column(f"outer_{edge}", "INTEGER NOT NULL", "") for edge in ("y0", "x1", "y1")),
        ),
        (
            "PRIMARY KEY (tract, patch)",
            "FOREIGN KEY (tract) REFERENCES tracts (tract) ON DELETE CASCADE",
        ),
    ),
    Table(
        "ccd_patches",
        "Overlaps of CCDs with the outer boxes of patches.",
        (
            Column("tract", "INTEGER NOT NULL", "The tract."),
            Column("patch", "TEXT NOT NULL", "The patch."),
            Column("ccd_key", "INTEGER NOT NULL", "The CCD."),
            Column(
                "patch_fraction", "REAL NOT NULL", "Fraction of the outer box that the CCD covers."
            ),
            Column("ccd_fraction", "REAL NOT NULL", "Fraction of the CCD on the outer box."),
        ),
        (
            "PRIMARY KEY (tract, patch, ccd_key)",
            "FOREIGN KEY (tract) REFERENCES tracts (tract)",
            "FOREIGN KEY (ccd_key) REFERENCES ccds (ccd_key) ON DELETE CASCADE",
        ),
    ),
    Table(
        "failed_ccd_patches",
        "Where failed CCDs would lie: those of exposures that were left out by their fitted WCS, "
        "others as the tables of exposures predict.",
        (
            Column("tract", "INTEGER NOT NULL", "The tract."),
            Column("patch", "TEXT NOT NULL", "The patch."),
            Column("ccd_key", "INTEGER NOT NULL", "The CCD."),
            Column("patch_fraction", "REAL NOT NULL", "As in `ccd_patches`."),
            Column("ccd_fraction", "REAL NOT NULL", "As in `ccd_patches`."),
        ),
        (
            "PRIMARY KEY (tract, patch, ccd_key)",
            "FOREIGN KEY (tract) REFERENCES tracts (tract)",
            "FOREIGN KEY (ccd_key) REFERENCES ccds (ccd_key) ON DELETE CASCADE",
        ),
    ),
)

SURVEY_TABLES = (
    Table(
        "exposure_checks",
        "What an update compares, so that it reads only what has changed.",
        (
            Column("exposure", "TEXT PRIMARY KEY", "Exposure id."),
            Column("manifest", "TEXT NOT NULL", "Path of the manifest."),
            Column("size", "INTEGER NOT NULL", "Bytes of the manifest."),
            Column("mtime_ns", "INTEGER NOT NULL", "Its time of change, ns since 1970."),
            Column(
                "planned",
                "TEXT",
                "Checksum of the patches for which it was planned, in which its CCDs were found to "
                "lie; null if they have not been compared.",
            ),
        ),
        ("FOREIGN KEY (exposure) REFERENCES exposures (exposure) ON DELETE CASCADE",),
    ),
)
"""Tables of the survey's database alone; one of an earlier version may not have them."""

INDEXES = (
    "CREATE INDEX ccd_patches_of_ccd ON ccd_patches (ccd_key)",
    "CREATE INDEX failed_ccd_patches_of_ccd ON failed_ccd_patches (ccd_key)",
)

VIEWS = (
    View(
        "v_ccd",
        "CCDs with a calexp, and their four corners.",
        """SELECT exposure, ccd, band, mjd, ra, dec, seeing, ellipticity, zero_point, sky_level,
  depth, astrometry_rms, path,
  json_extract(footprint, '$[0][0]') AS ra_0, json_extract(footprint, '$[0][1]') AS dec_0,
  json_extract(footprint, '$[' || n || '][0]') AS ra_1,
  json_extract(footprint, '$[' || n || '][1]') AS dec_1,
  json_extract(footprint, '$[' || (2 * n) || '][0]') AS ra_2,
  json_extract(footprint, '$[' || (2 * n) || '][1]') AS dec_2,
  json_extract(footprint, '$[' || (3 * n) || '][0]') AS ra_3,
  json_extract(footprint, '$[' || (3 * n) || '][1]') AS dec_3
FROM (SELECT *, json_array_length(footprint) / 4 AS n FROM ccds WHERE footprint IS NOT NULL)""",
    ),
    View(
        "v_ccd_patch",
        "Overlaps of CCDs and patches with the quality of the CCD.",
        """SELECT tract, patch, band, exposure, ccd, patch_fraction, ccd_fraction, seeing,
  ellipticity, zero_point, sky_level, depth, astrometry_rms, path
FROM ccd_patches JOIN ccds USING (ccd_key)""",
    ),
    View(
        "v_patch_depth",
        "Numbers of exposures and CCDs on each patch in each band; `mean_exposures` is the mean "
        "number of exposures per pixel of the outer box, before any selection.",
        """SELECT tract, patch, band, count(DISTINCT exposure) AS n_exposures, count(*) AS n_ccds,
  sum(patch_fraction) AS mean_exposures, avg(seeing) AS mean_seeing
FROM ccd_patches JOIN ccds USING (ccd_key) GROUP BY tract, patch, band""",
    ),
    View(
        "v_exposure",
        "Exposures with the mean quality of their CCDs.",
        """SELECT exposure, exposures.band AS band, exposures.mjd AS mjd,
  exposures.exposure_time AS exposure_time, exposures.ra AS ra, exposures.dec AS dec, n_done,
  n_failed, avg(seeing) AS mean_seeing, avg(zero_point) AS mean_zero_point,
  avg(sky_level) AS mean_sky_level, avg(astrometry_rms) AS mean_astrometry_rms
FROM exposures JOIN ccds USING (exposure) GROUP BY exposure""",
    ),
    View(
        "v_failed",
        "Failed CCDs with the reason.",
        "SELECT exposure, ccd, band, reason, message FROM ccds WHERE state = 'failed'",
    ),
)

EXAMPLES = (
    (
        "Which patches are deepest in r?",
        "SELECT tract, patch, n_exposures, mean_exposures FROM v_patch_depth\n"
        "WHERE band = 'r' ORDER BY mean_exposures DESC LIMIT 10;",
    ),
    (
        "Which CCDs cover a patch, best seeing first?",
        "SELECT exposure, ccd, patch_fraction, seeing, path FROM v_ccd_patch\n"
        "WHERE tract = 9813 AND patch = '4_4' AND band = 'i' ORDER BY seeing;",
    ),
    (
        "Which CCDs can contain RA 150.1, Dec 2.2? (`coaddflow corners query 150.1 2.2` also "
        "tests the exact footprints.)",
        "WITH at AS (SELECT cos(radians(2.2)) * cos(radians(150.1)) AS x,\n"
        "                   cos(radians(2.2)) * sin(radians(150.1)) AS y,\n"
        "                   sin(radians(2.2)) AS z)\n"
        "SELECT exposure, ccd, band, seeing FROM at, ccd_boxes JOIN ccds USING (ccd_key)\n"
        "WHERE x BETWEEN x_min AND x_max AND y BETWEEN y_min AND y_max\n"
        "  AND z BETWEEN z_min AND z_max;",
    ),
    ("Why did CCDs fail?", "SELECT reason, count(*) FROM v_failed GROUP BY reason;"),
    (
        "Which CCDs does a patch lack?",
        "SELECT exposure, ccd, reason FROM failed_ccd_patches JOIN ccds USING (ccd_key)\n"
        "WHERE tract = 9813 AND patch = '4_4' AND band = 'i';",
    ),
)


_IN_PLACE = f"""\
## How they are written

The database of a tract is written beside the old one and renamed: under its name it never changes.
That of the survey would take longer with each exposure (60 GB for 22 million CCDs), so it is
changed in place, in one transaction with SQLite's rollback journal, `{SURVEY_CORNERS}-journal`,
which is there from the first changed row to the commit. Only a new schema, another sky map or
damage makes a new file. For those who use it:

- A query sees the survey as it was before an update, or after it. A program that keeps the file
  open sees the next update. Queries wait while the file is written: for the commit, some
  milliseconds, but where an update changes more than its cache of 64 MB holds, from then on until
  the commit. They wait a minute at most, an update waits five for queries and other updates.
- A process that is killed, or a machine that loses its power, leaves the journal. Whoever opens the
  database next, and may write it and its folder, puts back what it was; who may only read it gets
  an error that says so. The next run does it in any case. A failed update changes nothing, and
  Snakemake, which removes what a failed job has made, leaves the database.
- The journal belongs to the file: copy, move or delete both, or, while a run may be writing,
  `sqlite3 {SURVEY_CORNERS} ".backup copy.sqlite"`. To have it made anew, remove the database.
- Programs that read it need the locks of the file system: do not open it with `immutable=1` or
  `nolock=1` while a run may be writing. Where the file system has no locks, a changed copy replaces
  the file, as a whole.
- Users who share a survey all need to write the file, not only its folder (`chmod g+w`, umask 002):
  a copy does not replace a file that may not be written, since whoever may not write it cannot lock
  it against one who is changing it.
- A full disk, a quota that is used up or an error of the disk ends an update with a message that
  says so; the database is what it was, and is not made anew.
- Up to 16 MB the file is looked through at each update. Damage in a larger one is found by
  `coaddflow verify`, or when the damaged page is needed.
- What has changed is known by the size and time of the manifests. If you edit one and keep both,
  remove the database."""


def schema_markdown() -> str:
    """Return the documentation of the schema as Markdown (``docs/corners.md`` is made from it)."""
    lines = [
        "# The corner database",
        "",
        f"`{TRACT_CORNERS}` holds the exposures of one band that can touch a",
        f"tract and is used by its coadds; `{SURVEY_CORNERS}` holds the whole survey, for",
        "queries and planning. Both have this schema and can be remade from the manifests at any",
        "time. Open them with `sqlite3 -readonly`.",
        "",
        f"- Schema version (`PRAGMA user_version`): {SCHEMA_VERSION}",
        f"- Application id (`PRAGMA application_id`): {APPLICATION_ID} "
        f'("{APPLICATION_ID.to_bytes(4, "big").decode("ascii")}")',
        "- Angles are ICRS degrees; pixels are 0-based; null values could not be measured.",
        "",
        _IN_PLACE,
        "",
        "## Tables",
    ]
    for table in (*TABLES, *SURVEY_TABLES):
        only = "Only in the database of the survey. " if table in SURVEY_TABLES else ""
        lines += ["", f"### {table.name}", "", f"{only}{table.description}", ""]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        for column in table.columns:
            kind = column.declaration.removesuffix(" NOT NULL")
            lines.append(f"| `{column.name}` | {kind} | {column.description} |")
        if table.constraints:
            lines += ["", *(f"- {constraint}" for constraint in table.constraints)]
    lines += ["", "## Views"]
    for view in VIEWS:
        lines += ["", f"### {view.name}", "", view.description, "", "```sql", view.query, "```"]
    lines += ["", "## Examples"]
    for question, query in EXAMPLES:
        lines += ["", question, "", "```sql", query, "```"]
    return "\n".join(lines) + "\n"


def require_rtree() -> None:
    """Raise InputError if the SQLite of this Python has no R*Tree module."""
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
