"""Tables that stand for many files: small ones on which jobs depend in place of all of them.

An exposure of 104 CCDs is calibrated with some 400 files. Were they all inputs of its job,
Snakemake would look at each of them for each exposure. The table stands for them: it names them
with checksums, so that it changes when one of them does, and is written again only then. In the
same way a table of the raw frames of a kind of calibration frames stands for them, for its CCDs.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from coaddflow.errors import InputError
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


@dataclass(frozen=True)
class FrameRow:
    """One raw frame that calibration frames of all CCDs are made from."""

    path: str
    "The file, relative to the working folder, or absolute where the table of exposures is."
    exposure_time: float
    "Exposure time, s."
    size: int
    "Bytes of the file."
    changed: int
    "When it was changed, ns since 1970: a frame that is replaced by another changes the table."


def write_frame_table(path: str | Path, exposure_times: Mapping[str, float], frames: str) -> None:
    """Write the table of raw frames with their exposure times, whole or not at all.

    Raises
    ------
    InputError
        If a frame is not there.
    """
    rows = []
    for file, exposure_time in exposure_times.items():
        try:
            state = Path(file).stat()
        except OSError as error:
            cause = f"the raw frame cannot be read: {error.strerror}"
            raise InputError(cause, path=file, remedy="get it again") from error
        rows.append(FrameRow(file, exposure_time, state.st_size, state.st_mtime_ns))
    ecsv.write_records(path, FrameRow, rows, {"frames": frames})


def read_frame_table(path: str | Path) -> Sequence[FrameRow]:
    """Read the table of raw frames; raise InputError if it is missing or damaged."""
    return ecsv.read_records(path, FrameRow, "a table of raw frames")
