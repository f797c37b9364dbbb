"""An exposure passes or fails as a whole, and leaves its reasons behind when it fails."""

import re
from pathlib import Path

import pytest

from coaddflow.errors import InputError
from coaddflow.exposure.gather import Planned, make_manifest
from coaddflow.instrument.camera import load_camera
from coaddflow.settings.calexp import CalexpSettings
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.manifest import (
    CcdRow,
    CcdState,
    fraction_lost,
    read_manifest,
    read_row,
    write_row,
)
from coaddflow.tables.pointings import adopt, corrected
from coaddflow.tables.verdict import PASSES, key_of_today, read_verdict

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


def failed_fraction(manifest):
    return fraction_lost(read_manifest(manifest))


def gather(rows, **changes):
    exposure, margin = changes.pop("exposure", EXPOSURE), changes.pop("margin", 0.01)
    planned = Planned(exposure, load_camera("mini"), margin)
    key = changes.pop("key", PASSES)
    rows = [read_row(path) for path in rows]
    return make_manifest("results/summary/7.ecsv", rows, CalexpSettings(**changes), planned, key)


def test_failed_ccds_up_to_the_threshold_are_a_result(rows_of, tmp_path):
    gather(rows_of(failed=[1, 2]))
    states = [row.state for row in read_manifest("results/summary/7.ecsv")]
    assert states == ["done", "failed", "failed", "done"]
    assert failed_fraction("results/summary/7.ecsv") == 0.5


def test_too_many_failures_stop_the_run_if_they_are_to(rows_of, tmp_path):
    gather(rows_of())
    message = "exposure 7 fails: 3 of 4 CCDs failed (3 no_stars)"
    with pytest.raises(InputError, match=re.escape(message)) as error:
        gather(rows_of(failed=[0, 1, 2]), on_failed_exposure="stop")
    assert "exclude" in str(error.value)
    assert not (tmp_path / "results/summary/7.ecsv").exists()
    kept = read_manifest("results/summary/7.failed.ecsv")
    assert [row.reason for row in kept] == ["no_stars"] * 3 + [""]
    gather(rows_of(failed=[0]))
    assert not (tmp_path / "results/summary/7.failed.ecsv").exists()


def test_lost_parts_of_ccds_count_for_the_exposure(rows_of):
    paths = rows_of(failed=[0])
    for ccd, lost in ((1, 0.52), (2, 0.55), (3, 0.09)):
        row = read_row(paths[ccd])
        write_row(paths[ccd], row.model_copy(update={"lost_fraction": lost}))
    message = "1 of 4 CCDs failed (1 no_stars, 2 others lost 54 % of their pixels)"
    with pytest.raises(InputError, match=re.escape(message)):
        gather(paths, on_failed_exposure="stop")
    gather(paths)
    assert failed_fraction("results/summary/7.ecsv") == pytest.approx((1 + 0.52 + 0.55) / 4)
    verdict = read_verdict("results/summary/7.ecsv")
    assert key_of_today(verdict, 0.5, 0.01, False) == verdict.key, "left out once, for good"
    gather(paths, max_failed_fraction=0.52)


@pytest.mark.parametrize(("n_failed", "limit"), [(29, 0.29), (57, 0.57), (58, 0.58)])
def test_planning_and_gathering_judge_alike_at_the_limit(n_failed, limit):
    """0.29 * 100 is less than 29 in floating-point numbers."""
    ccds = [CcdState("failed" if n < n_failed else "done", "", "") for n in range(100)]
    assert fraction_lost(ccds) == n_failed / 100
    assert not fraction_lost(ccds) > limit


def test_a_single_ccd_that_is_good_enough_does_not_fail_its_exposure():
    half = CcdState("done", "", "", lost_fraction=0.52)
    assert fraction_lost([half]) == 0.0
    assert fraction_lost([half, half]) == pytest.approx(0.52)


def test_an_exposure_with_too_many_failures_is_left_out_with_reasons(rows_of, tmp_path):
    gather(rows_of(failed=[0, 1, 2]))
    rows = read_manifest("results/summary/7.ecsv")
    assert {row.state for row in rows} == {"failed"}
    assert [row.reason for row in rows] == ["no_stars"] * 3 + ["exposure_failed"]
    assert "3 of 4 CCDs failed (3 no_stars)" in rows[3].message
    assert failed_fraction("results/summary/7.ecsv") == 0.75, (
        "its good CCD has not failed by itself"
    )
    # its calexp is nobody's input, and comes back with the exposure
    assert not (tmp_path / "3.fits").exists()
    assert (tmp_path / "left_out/3.fits").exists()
    gather([tmp_path / f"{ccd}.json" for ccd in range(4)], max_failed_fraction=0.75)
    assert [row.state for row in read_manifest("results/summary/7.ecsv")] == ["failed"] * 3 + [
        "done"
    ]
    assert (tmp_path / "3.fits").exists()
    assert not list(tmp_path.glob("left_out/*"))


@pytest.mark.parametrize("change", [{"max_failed_fraction": 0.75}, {"on_failed_exposure": "stop"}])
def test_the_key_of_the_params_changes_with_the_decision_and_only_then(rows_of, change):
    """What stands in the params is what the job was run with, until it would decide otherwise."""

    def key(limit=0.5, stop=False):
        return key_of_today(read_verdict("results/summary/7.ecsv"), limit, 0.01, stop)

    rows = rows_of(failed=[0, 1, 2])
    gather(rows)
    assert key() == key(limit=0.6) == PASSES
    today = {"limit": 0.75} if "max_failed_fraction" in change else {"stop": True}
    assert key(**today) != PASSES
    if "stop" in today:
        return
    gather(rows, **change, key=key(**today))
    assert read_manifest("results/summary/7.ecsv")[3].state == "done"
    assert key(**today) == read_verdict("results/summary/7.ecsv").key
    # and back
    assert key() != key(**today)
    gather(rows, key=key())
    assert key() == read_verdict("results/summary/7.ecsv").key


def test_an_exposure_that_points_elsewhere_is_left_out_until_it_is_planned_there(rows_of):
    gather(rows_of(shift=0.008))
    gather(rows_of(shift=0.05))
    reasons = {row.reason for row in read_manifest("results/summary/7.ecsv")}
    assert reasons <= {"outside_prediction", "exposure_failed"}
    assert not corrected([EXPOSURE], with_new=False)[1], "a job has the plan of its run"
    (row,), corrections = corrected([EXPOSURE], with_new=True)
    assert row.dec == pytest.approx(2.05, abs=1e-4)
    assert row.ra == pytest.approx(150.0, abs=1e-4)
    adopt(corrections)
    assert corrected([EXPOSURE], with_new=False) == ([row], corrections)
    # corrected by hand since
    other = EXPOSURE.model_copy(update={"dec": 2.04})
    assert corrected([other], with_new=True) == ([other], {})
    # and planned there, it passes
    gather(rows_of(shift=0.05), exposure=row)
    assert {one.state for one in read_manifest("results/summary/7.ecsv")} == {"done"}
    assert corrected([EXPOSURE], with_new=True)[1] == corrections
    with pytest.raises(InputError, match=r"exposure 7: CCD \d.*Run again") as error:
        gather(rows_of(shift=0.05), on_failed_exposure="stop")
    assert "prediction.margin" not in str(error.value), "the remedy is the one that is tried here"
    gather(rows_of(shift=0.05), margin=0.1)


def test_a_ccd_with_a_wrong_wcs_fails_alone(rows_of):
    paths = rows_of()
    stray = read_row(paths[2])
    moved = [dec + 0.05 for dec in stray.footprint_dec]
    write_row(paths[2], stray.model_copy(update={"footprint_dec": moved}))
    gather(paths)
    rows = read_manifest("results/summary/7.ecsv")
    assert [row.reason for row in rows] == ["", "", "stray_wcs", ""]
    assert failed_fraction("results/summary/7.ecsv") == 0.25
    assert not corrected([EXPOSURE], with_new=True)[1]


def test_a_missing_calexp_is_reported(rows_of, tmp_path):
    rows = rows_of()
    (tmp_path / "2.fits").unlink()
    with pytest.raises(InputError, match=r"2\.fits: the calexp of CCD 2 is gone"):
        gather(rows)


def test_the_verdict_is_the_same_while_the_manifest_is_away(rows_of):
    """A job of a cluster plans again, when its Snakemake has removed the manifest."""
    gather(rows_of(failed=[0]))
    assert not read_verdict("results/summary/7.ecsv").cause
    before = key_of_today(read_verdict("results/summary/7.ecsv"), 0.2, 0.01, False)
    Path("results/summary/7.ecsv").unlink()
    assert key_of_today(read_verdict("results/summary/7.ecsv"), 0.2, 0.01, False) == before
    assert before != PASSES, "its failed CCD is above the limit of today"
