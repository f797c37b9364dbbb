"""The table of the warps of an exposure on a tract: what its job promises.

It is written last: where it stands, all warps that it names are whole.
"""

from dataclasses import dataclass
from pathlib import Path

from coaddflow.tables import ecsv


@dataclass(frozen=True)
class WarpRow:
    """One warp: the pixels of the exposure on a patch."""

    patch: str
    "Patch id."
    path: str
    "The file, relative to the folder of the table."
    x0: int
    "Its pixels on the tract: first column,"
    y0: int
    "first row,"
    x1: int
    "column behind the last,"
    y1: int
    "row behind the last."
    ccds: str
    "The CCDs that contribute, ascending, joined by commas."
    n_covered: int
    "Pixels with data."
    sha256: str
    "Checksum of the file."


@dataclass(frozen=True)
class WarpTable:
    """The warps of an exposure on a tract, ordered by patch."""

    exposure: str
    tract: int
    warps: tuple[WarpRow, ...]


def write_warp_table(path: str | Path, table: WarpTable) -> None:
    """Write the table as ECSV, whole or not at all."""
    meta = {"exposure": table.exposure, "tract": table.tract}
    ecsv.write_records(path, WarpRow, table.warps, meta)


def read_warp_table(path: str | Path) -> WarpTable:
    """Read the table; raise InputError if it is missing or damaged."""
    what = "a table of warps"
    warps = ecsv.read_records(path, WarpRow, what)
    try:
        meta = ecsv.read_meta(path)
        return WarpTable(str(meta["exposure"]), int(meta["tract"]), tuple(warps))
    except (OSError, ValueError, KeyError) as error:
        raise ecsv.damaged(path, what, error) from error
