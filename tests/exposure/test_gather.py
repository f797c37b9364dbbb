"""An exposure passes or fails as a whole, and leaves its reasons behind when it fails."""

import re

import pytest

from coaddflow.errors import InputError
from coaddflow.exposure.gather import make_manifest
from coaddflow.instrument.camera import load_camera
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.manifest import (
    CcdRow,
    failed_fraction,
    read_manifest,
    read_row,
    write_row,
)

EXPOSURE = ExposureRow(
    exposure="7",
    kind="science",
    band="r",
    ra=150.0,
    dec=2.0,
    rotation=10.0,
    mjd=60000.0,
    exposure_time=30.0,
    path="7.fits",
)


@pytest.fixture
def rows_of(tmp_path, monkeypatch):
    """Return a function that writes rows of an exposure; CCDs of `failed` have failed."""
    monkeypatch.chdir(tmp_path)
    camera = load_camera("mini")

    def write(failed=(), shift=0.0):
        paths = []
        for ccd in range(4):
            facts = {"exposure": "7", "ccd": ccd, "band": "r", "mjd": 60000.0}
            facts["exposure_time"] = 30.0
            ra, dec = camera.footprint(camera.detector(ccd), 150.0, 2.0 + shift, 10.0, 8)
            footprint = {"footprint_ra": ra.tolist(), "footprint_dec": dec.tolist()}
            if ccd in failed:
                message = "no light, 'dark' \"sky\""
                row = CcdRow(**facts, state="failed", reason="no_stars", message=message)
            else:
                (tmp_path / f"{ccd}.fits").touch()
                row = CcdRow(**facts, state="done", path=f"{ccd}.fits", **footprint)
            write_row(tmp_path / f"{ccd}.json", row)
            paths.append(tmp_path / f"{ccd}.json")
        return paths

    return write


def gather(rows, **changes):
    arguments = {"max_failed_fraction": 0.5, "exposure": EXPOSURE, "margin": 0.01}
    arguments["camera"] = load_camera("mini")
    rows = [read_row(path) for path in rows]
    return make_manifest("summary/7.ecsv", rows, **(arguments | changes))


def test_failed_ccds_up_to_the_threshold_are_a_result(rows_of, tmp_path):
    gather(rows_of(failed=[1, 2]))
    states = [row.state for row in read_manifest("summary/7.ecsv")]
    assert states == ["done", "failed", "failed", "done"]
    assert failed_fraction("summary/7.ecsv") == 0.5


def test_too_many_failures_fail_the_exposure_and_are_kept(rows_of, tmp_path):
    gather(rows_of())
    message = "exposure 7 fails: 3 of 4 CCDs failed (3 no_stars)"
    with pytest.raises(InputError, match=re.escape(message)) as error:
        gather(rows_of(failed=[0, 1, 2]))
    assert "exclude" in str(error.value)
    assert not (tmp_path / "summary/7.ecsv").exists()
    kept = read_manifest("summary/7.failed.ecsv")
    assert [row.reason for row in kept] == ["no_stars"] * 3 + [""]
    gather(rows_of(failed=[0]))
    assert not (tmp_path / "summary/7.failed.ecsv").exists()


def test_lost_parts_of_ccds_count_for_the_exposure(rows_of):
    paths = rows_of(failed=[0])
    for ccd, lost in ((1, 0.52), (2, 0.55), (3, 0.09)):
        row = read_row(paths[ccd])
        write_row(paths[ccd], row.model_copy(update={"lost_fraction": lost}))
    message = "1 of 4 CCDs failed (1 no_stars, 2 others lost 54 % of their pixels)"
    with pytest.raises(InputError, match=re.escape(message)):
        gather(paths)
    gather(paths, max_failed_fraction=0.52)


def test_a_ccd_outside_the_margin_fails_the_exposure(rows_of):
    gather(rows_of(shift=0.008))
    with pytest.raises(InputError, match=r"exposure 7: CCD \d.*prediction\.margin"):
        gather(rows_of(shift=0.05))
    gather(rows_of(shift=0.05), margin=0.1)


def test_a_missing_calexp_is_reported(rows_of, tmp_path):
    rows = rows_of()
    (tmp_path / "2.fits").unlink()
    with pytest.raises(InputError, match=r"2\.fits: the calexp of CCD 2 is gone"):
        gather(rows)


def test_an_exposure_without_manifest_has_not_failed(tmp_path):
    assert failed_fraction(tmp_path / "none.ecsv") == 0.0
