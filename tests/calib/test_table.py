"""The table of the calibration frames of a band."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.calib.table import make_calib_table
from coaddflow.errors import InputError

MADE, GIVEN = "results/calibs/bias/1.fits", "masters/dark.fits"


@pytest.fixture(autouse=True)
def frames(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (MADE, GIVEN):
        Path(path).parent.mkdir(parents=True)
        fits.PrimaryHDU(np.ones((5, 6), np.float32)).writeto(path, checksum=True)


def table():
    make_calib_table("table.ecsv", {1: {"bias": MADE, "dark": GIVEN}, 2: {"dark": GIVEN}}, "r")
    return Path("table.ecsv").read_bytes()


def test_an_edit_that_leaves_the_checksums_changes_the_table():
    first = table()
    assert table() == first
    content = bytearray(Path(MADE).read_bytes())
    content[2880 + 3] ^= 1
    Path(MADE).write_bytes(content)
    assert table() != first


@pytest.mark.parametrize(
    ("path", "remedy"),
    [(MADE, "Remove it and run the workflow again"), (GIVEN, "Get the file again")],
)
def test_what_to_do_about_a_damaged_frame(path, remedy):
    Path(path).write_bytes(Path(path).read_bytes()[:-2880])
    with pytest.raises(InputError, match=rf"{path}: is not a whole FITS file.*{remedy}"):
        table()
    Path(path).unlink()
    with pytest.raises(InputError, match=f"{path}: cannot be read: No such file.*{remedy}"):
        table()
