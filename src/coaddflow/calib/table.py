"""The table of the calibration frames of a band: see `tables.calibs`."""

from collections.abc import Mapping
from pathlib import Path

from coaddflow.image.checksum import fingerprint
from coaddflow.tables.calibs import CalibRow, write_calib_table
from coaddflow.tables.paths import RESULTS


def make_calib_table(path: str | Path, calibs: Mapping[int, Mapping[str, str]], band: str) -> None:
    """Write the table of the calibration frames of a band.

    All are read, which takes about as long as an exposure takes to read them.

    Parameters
    ----------
    path : str or Path
        The table.
    calibs : mapping
        Files by CCD and kind; a given file may serve many CCDs.
    band : str
        The band.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    files = {file for of_ccd in calibs.values() for file in of_ccd.values()}
    known = {file: fingerprint(file, _remedy(file)) for file in sorted(files)}
    rows = [
        CalibRow(ccd, kind, file, known[file])
        for ccd, of_ccd in calibs.items()
        for kind, file in of_ccd.items()
    ]
    write_calib_table(path, rows, band)


def _remedy(file: str) -> str:
    """Return what to do if a calibration frame cannot be read."""
    if Path(file).is_relative_to(RESULTS):
        return "remove it and run the workflow again"
    return "get the file again"
