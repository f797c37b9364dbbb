"""The table of the calibration frames of a band: see `tables.calibs`."""

from collections.abc import Mapping
from pathlib import Path

from coaddflow.image.checksum import fingerprint
from coaddflow.tables.calibs import CalibRow, write_calib_table


def make_calib_table(path: str | Path, calibs: Mapping[int, Mapping[str, str]], band: str) -> None:
    """Write the table of the calibration frames of a band.

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
    known = {file: fingerprint(file) for file in sorted(files)}
    rows = [
        CalibRow(ccd, kind, file, known[file])
        for ccd, of_ccd in calibs.items()
        for kind, file in of_ccd.items()
    ]
    write_calib_table(path, rows, band)
