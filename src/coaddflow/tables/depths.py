"""The table of the depths of a tract: one row a coadd, and one a band, with what was left out."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from coaddflow.tables import ecsv

WHOLE_TRACT = "all"
"""Patch of the row for a band on the whole tract."""


@dataclass(frozen=True)
class DepthRow:
    """The depth of a coadd, or of all coadds of a band on the tract."""

    band: str
    "Band of the coadds."
    patch: str
    "Patch id; ``all``: the whole tract."
    depth: float
    "Median over the pixels with a value, AB magnitude of a point source at 5 sigma."
    seeing: float
    "FWHM of the PSF, arcsec."
    n_pixels: int
    "Pixels with a value; those in the overlap of two patches count twice."
    n_exposures: int
    "Exposures of which at least one pixel is used."
    n_left_out: int
    "CCDs that the selection left out."
    left_out: str
    "Exposures of which no pixel is used, and CCDs were left out, joined by commas."


def write_depth_table(path: str | Path, rows: Iterable[DepthRow], tract: int) -> None:
    """Write the table, in the order of the rows."""
    ecsv.write_records(path, DepthRow, rows, {"tract": tract})


def read_depth_table(path: str | Path) -> list[DepthRow]:
    """Read the table; raise InputError if it is missing or damaged."""
    return ecsv.read_records(path, DepthRow, "a table of depths")
