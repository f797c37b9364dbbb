"""The table of the calibration frames of a band: one small file on which its exposures depend.

An exposure of 104 CCDs is calibrated with some 400 files. Were they all inputs of its job,
Snakemake would look at each of them for each exposure. The table stands for them: it names them
with checksums, so that it changes when one of them does, and is written again only then.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coaddflow.tables import ecsv


@dataclass(frozen=True)
class CalibRow:
    """One calibration frame of one CCD."""

    ccd: int
    "CCD number."
    kind: str
    "bias, dark, flat or defects."
    path: str
    "The file, relative to the working folder, or absolute where the settings are."
    fingerprint: str
    "What changes when the frame does (`image.checksum.fingerprint`)."


def write_calib_table(path: str | Path, rows: Iterable[CalibRow], band: str) -> None:
    """Write the table as ECSV, whole or not at all."""
    ecsv.write_records(path, CalibRow, rows, {"band": band})


def read_calib_table(path: str | Path) -> Mapping[int, Mapping[str, str]]:
    """Return the files of each CCD by kind; raise InputError if the table is missing or damaged."""
    found: dict[int, dict[str, str]] = {}
    for row in ecsv.read_records(path, CalibRow, "a table of calibration frames"):
        found.setdefault(row.ccd, {})[row.kind] = row.path
    return found
