"""What `coaddflow status` says of every state that a run can be in."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.cluster.attempts import Attempt, record
from coaddflow.errors import InputError
from coaddflow.image.provenance import settings_hash
from coaddflow.runtime.log import job_log
from coaddflow.settings import Settings
from coaddflow.tables.depths import DepthRow, write_depth_table
from coaddflow.tables.exposures import ExposureRow, ImageRow, write_exposures, write_images
from coaddflow.tables.manifest import CcdRow, read_manifest, write_manifest, write_row
from coaddflow.tables.verdict import PASSES, TOO_MANY_FAILED, Verdict, write_verdict
from coaddflow.tables.warps import WarpRow, WarpTable, write_warp_table
from coaddflow.workflow.plan import make_plan
from coaddflow.workflow.report import success_text
from coaddflow.workflow.stages import STAGES
from coaddflow.workflow.status import survey_status
from coaddflow.workflow.status_text import status_json, status_table

SKYMAP = {
    "kind": "tangent",
    "pixel_scale": 1.0,
    "tangent": {"ra": 150.0, "dec": 2.0, "width": 1.0, "height": 1.0},
}


FITS = fits.Header([("SIMPLE", True), ("BITPIX", 8), ("NAXIS", 0)]).tostring().encode()
"""The smallest whole FITS file."""


def exposure(name, **changes):
    row = {
        "exposure": name,
        "kind": "science",
        "band": "r",
        "ra": 150.0,
        "dec": 2.0,
        "rotation": 0.0,
        "mjd": 60000.0,
        "exposure_time": 30.0,
        "path": f"{name}.fits",
    }
    return ExposureRow(**(row | changes))


@pytest.fixture
def plan_of(tmp_path, monkeypatch):
    """Return a function that plans a run of exposures of the demo camera (CCDs 0 to 5)."""
    monkeypatch.chdir(tmp_path)

    def plan(*names, **changes):
        bias = exposure("zero", kind="bias", band="", ra=None, dec=None, rotation=None)
        write_exposures("exposures.ecsv", [bias, *(exposure(name) for name in names)])
        settings = {
            "camera": "demo",
            "exposures": "exposures.ecsv",
            "skymap": SKYMAP,
            "refcat": {"path": "stars.csv"},
        }
        (tmp_path / "stars.csv").write_text("ra,dec,mag\n150,2,15\n")
        return make_plan(Settings(**(settings | changes)), cache=None)

    return plan


def ccd_row(name, ccd, reason="", message=""):
    return CcdRow(
        exposure=name,
        ccd=ccd,
        band="r",
        mjd=60000.0,
        exposure_time=30.0,
        state="failed" if reason else "done",
        reason=reason,
        message=message,
    )


def calexp(folder, name, ccd):
    path = folder / f"results/calexp/{name}/{ccd}.fits"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(FITS)


def finish(folder, name, failures=None, manifest=True):
    """Leave what a run leaves of an exposure."""
    failures = failures or {}
    rows = [ccd_row(name, ccd, *failures.get(ccd, ())) for ccd in range(6)]
    for row in rows:
        write_row(folder / f"results/calexp/{name}/{row.ccd}.json", row)
        if row.state == "done":
            calexp(folder, name, row.ccd)
    if manifest:
        write_manifest(folder / f"results/summary/{name}.ecsv", rows)


def finish_tracts(folder, *without):
    """Leave what a run leaves of coadds (the tract of the tests is one patch) and databases."""
    coadds, depths = ("coadd/r/0/0_0.fits", "coadd/0.png"), ("depth/r/0/0_0.fits", "depth/0.ecsv")
    for name in (*coadds, *depths, "corners/r/0.sqlite", "corners.sqlite"):
        path = folder / "results" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in without:
            path.write_bytes(FITS if path.suffix == ".fits" else b"")


def test_before_the_first_run_everything_is_missing(plan_of):
    status = survey_status(plan_of("a", "b"))
    assert (status.count("missing"), status.exit_code) == (12, 3)
    assert "12 missing" in status_table(status)


def test_a_finished_survey_is_done(plan_of, tmp_path):
    plan = plan_of("a", "b")
    finish(tmp_path, "a")
    finish(tmp_path, "b")
    finish_tracts(tmp_path)
    status = survey_status(plan)
    assert (status.count("done"), status.exit_code) == (12, 0)
    assert status_table(status).splitlines() == [
        "2 exposures, 2 done; 12 CCDs: 12 done, 0 failed, 0 missing",
        "2 of 2 corner databases, 1 of 1 coadds, 1 of 1 pictures, 1 of 1 depth tables, "
        "1 of 1 depth maps",
    ]


def test_what_the_selection_left_out_is_told(plan_of, tmp_path):
    plan = plan_of("a", "b")
    finish(tmp_path, "a")
    finish(tmp_path, "b")
    finish_tracts(tmp_path)
    table = tmp_path / "results/depth/0.ecsv"
    rows = [
        DepthRow("r", "0_0", float("nan"), float("nan"), 0, 0, 2, "b"),
        DepthRow("r", "1_0", 24.0, 0.8, 100, 1, 1, ""),
        DepthRow("r", "all", 24.0, 0.8, 100, 1, 3, "b"),
    ]
    write_depth_table(table, rows, 0)
    told = (
        "tract 0, band r: the selection left out 3 CCDs, among them all of exposure b; "
        "so that nothing is left of patch 0_0"
    )
    status = survey_status(plan)
    assert told in status_table(status)
    assert told in success_text(plan)
    assert json.loads(status_json(status))["not_coadded"] == [told]
    write_depth_table(table, [DepthRow("r", "all", float("nan"), 0.8, 0, 0, 0, "")], 0)
    assert "tract 0, band r: the coadds have no data" in status_table(survey_status(plan))
    write_depth_table(table, [DepthRow("r", "all", 24.0, 0.8, 100, 2, 0, "")], 0)
    assert survey_status(plan).not_coadded == ()


def test_a_ccd_that_lost_much_of_its_area_is_named(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a")
    finish_tracts(tmp_path)
    losses = {1: 0.51, 2: 0.03}
    rows = [
        ccd_row("a", ccd).model_copy(update={"lost_fraction": losses.get(ccd)}) for ccd in range(6)
    ]
    write_manifest(tmp_path / "results/summary/a.ecsv", rows)
    status = survey_status(plan)
    assert status.exit_code == 0
    lines = status_table(status).splitlines()
    at = lines.index("CCDs that are done but lost more than 10 % of their pixels:")
    assert lines[at + 1] == "  a CCD 1  51 % are BAD, SAT or NO_DATA"
    assert lines[at + 2] == ""
    (told,) = json.loads(status_json(status))["incomplete"]
    assert (told["exposure"], told["ccd"], told["lost_fraction"]) == ("a", 1, 0.51)


@pytest.mark.parametrize("lost", ["coadd/r/0/0_0.fits", "coadd/0.png", "corners/r/0.sqlite"])
def test_what_is_made_from_the_exposures_counts_too(plan_of, tmp_path, lost):
    plan = plan_of("a")
    finish(tmp_path, "a")
    finish_tracts(tmp_path, lost)
    status = survey_status(plan)
    assert status.count("missing") == 0 and status.exit_code == 3
    (kind,) = [kind for kind in status.products if kind.missing]
    assert kind.missing == (lost,)
    assert f"{kind.planned - 1} of {kind.planned} {kind.kind}" in status_table(status)
    assert json.loads(status_json(status))["exit_code"] == 3


def test_a_tract_in_one_job_counts_by_its_list(plan_of, tmp_path):
    plan = plan_of("a", parallel={"coadd": "tract"})
    finish(tmp_path, "a")
    finish_tracts(tmp_path)
    lists = {kind.kind: kind for kind in survey_status(plan).products}["lists of coadds"]
    assert lists.missing == ("coadd/r/0.ecsv",)
    (tmp_path / "results/coadd/r/0.ecsv").touch()
    assert survey_status(plan).exit_code == 0


def test_a_failed_ccd_is_reported_with_its_reason_and_its_log(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a", {4: ("no_stars", 'only 1 source, in "a b.fits"')})
    with job_log(tmp_path / "logs/calexp/a/4.log"):
        pass
    finish_tracts(tmp_path)
    status = survey_status(plan)
    assert (status.count("done"), status.count("failed"), status.exit_code) == (5, 1, 1)
    text = status_table(status)
    assert 'a CCD 4  no_stars: only 1 source, in "a b.fits"' in text
    assert "log: logs/calexp/a/4.log" in text
    assert "why: 1 no_stars" in text


def test_a_crashed_job_is_missing_with_the_last_word_of_its_log(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a", manifest=False)
    (tmp_path / "results/calexp/a/2.json").unlink()
    with pytest.raises(SystemExit), job_log(tmp_path / "logs/calexp/a/2.log"):
        raise MemoryError
    status = survey_status(plan)
    (ccd,) = [ccd for ccd in status.exposures[0].ccds if ccd.state == "missing"]
    assert (ccd.ccd, ccd.reason, ccd.message) == (2, "job_failed", "out of memory")
    assert status.exit_code == 3


def test_an_exposure_that_was_refused_is_reported_with_the_reason(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a", {ccd: ("no_stars", "clouds") for ccd in range(4)}, manifest=False)
    with pytest.raises(SystemExit), job_log(tmp_path / "logs/manifest/a.log"):
        raise ValueError("4 of 6 CCDs failed")
    status = survey_status(plan)
    assert status.count("missing") == 0 and status.exit_code == 3
    text = status_table(status)
    assert "no manifest\n  ValueError: 4 of 6 CCDs failed" in text


def test_exposures_that_are_left_out_are_counted_and_too_many_are_an_error(plan_of, tmp_path):
    plan = plan_of("a", "b")
    finish(tmp_path, "a")
    finish(tmp_path, "b", {ccd: ("no_stars", "clouds") for ccd in range(4)})
    verdict = Verdict(PASSES, TOO_MANY_FAILED, "4 of 4 CCDs failed (4 no_stars)")
    write_verdict(tmp_path / "results/summary/b.ecsv", verdict)
    status = replace(survey_status(plan), products=())
    assert [one.exposure for one in status.left_out] == ["b"]
    assert replace(status, max_left_out_fraction=0.5).exit_code == 1
    assert replace(status, max_left_out_fraction=0.4).exit_code == 4
    text = status_table(status)
    assert "left out\n  4 of 4 CCDs failed (4 no_stars)" in text
    assert "1 of 2 exposures left out of all coadds, more than calexp.max_left_out" in text


def test_flags_of_ccds_are_counted(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a")
    manifest = tmp_path / "results/summary/a.ecsv"
    rows = read_manifest(manifest)
    rows[1] = rows[1].model_copy(update={"flags": "predicted_wcs,own_sky"})
    rows[2] = rows[2].model_copy(update={"flags": "own_sky"})
    write_manifest(manifest, rows)
    text = status_table(survey_status(plan))
    assert "flag predicted_wcs: 1 CCDs of 1 exposures (a)" in text
    assert "flag own_sky: 2 CCDs of 1 exposures (a)" in text


def test_a_calexp_that_was_removed_is_missing_again(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a")
    (tmp_path / "results/calexp/a/3.fits").unlink()
    status = survey_status(plan)
    (ccd,) = [ccd for ccd in status.exposures[0].ccds if ccd.state == "missing"]
    assert (ccd.ccd, ccd.reason) == (3, "calexp_gone") and status.exit_code == 3
    # jobs of whole exposures leave no row: then the manifest is all that is to be removed
    row = tmp_path / "results/calexp/a/3.json"
    for remedy in (
        "remove results/calexp/a/3.json and results/summary/a.ecsv and run the",
        "remove results/summary/a.ecsv and run the",
    ):
        (ccd,) = [one for one in survey_status(plan).exposures[0].ccds if one.state == "missing"]
        assert f": {remedy}" in ccd.message
        row.unlink(missing_ok=True)


def test_a_row_that_is_cut_off_counts_as_missing(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a", manifest=False)
    (tmp_path / "results/calexp/a/0.json").write_text('{"exposure": "a", "cc')
    assert survey_status(plan).count("missing") == 1


def attempt(**changes):
    """Return an attempt at a job that ran out of memory."""
    known = {
        "when": "2026-11-30T04:00:00",
        "request": "r",
        "run": "1",
        "system": "Slurm",
        "job_id": "12",
        "steps": ("calexp",),
        "asked": {"mem_mb": 500},
        "outcome": "out of memory",
        "words": "OUT_OF_MEMORY",
        "next": {"mem_mb": 1000},
    }
    return Attempt(**(known | changes))


def test_each_attempt_and_each_refusal_of_what_is_not_done_is_told(plan_of, tmp_path):
    plan = plan_of("a", "b")
    finish(tmp_path, "a")
    record("exposure_a", attempt(job_id="7"))
    record("exposure_b", attempt())
    refused = {"outcome": "refused", "words": "Invalid account", "job_id": "", "next": None}
    record("exposure_b", attempt(**refused))
    status = survey_status(plan)
    text = status_table(status)
    assert "exposure_b\n    2026-11-30 04:00:00  Slurm job 12 (500 MB) out of memory" in text
    assert "Slurm job (500 MB) refused [Invalid account]; no further attempt" in text
    assert "Slurm job 7" not in text, "exposure a is done"
    assert "Slurm job 7" in status_table(status, every_exposure=True)
    told = json.loads(status_json(status))["attempts"]
    assert [one["job_id"] for one in told["exposure_b"]] == ["12", ""]
    finish(tmp_path, "b")
    finish_tracts(tmp_path)
    assert "attempts" not in status_table(survey_status(plan))


def test_excluded_exposures_and_ccds_are_not_asked_for(plan_of):
    status = survey_status(plan_of("a", "b", exclude=["b"], exclude_ccds=[0, 1]))
    assert [exposure.exposure for exposure in status.exposures] == ["a"]
    assert status.count("missing") == 4


def test_images_calibrated_elsewhere_count_by_their_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    square = {
        "footprint_ra": (150.1, 150.0, 150.0, 150.1),
        "footprint_dec": (2.0, 2.0, 2.1, 2.1),
        "nx": 10,
        "ny": 10,
        "electrons_per_unit": 1.0,
        "zero_point": 30.0,
        "mjd": 60000.0,
        "exposure_time": 1.0,
        "path": "x.fits",
        "hdu": 1,
    }
    rows = [ImageRow(exposure="e", ccd=ccd, band="g", **square) for ccd in (28, 61)]
    write_images("images.ecsv", rows)
    settings = Settings(
        calibrated={"table": "images.ecsv", "zero_point": {"value": 30.0}}, skymap=SKYMAP
    )
    plan = make_plan(settings, cache=None)
    calexp(tmp_path, "e", 28)
    write_row("results/calexp/e/28.json", ccd_row("e", 28))
    status = survey_status(plan)
    assert [(ccd.ccd, ccd.state) for ccd in status.exposures[0].ccds] == [
        (28, "done"),
        (61, "missing"),
    ]


def test_json_has_the_same_numbers(plan_of, tmp_path):
    plan = plan_of("a", "b")
    finish(tmp_path, "a", {1: ("no_stars", "clouds")})
    content = json.loads(status_json(survey_status(plan)))
    assert content["ccds"] == {"done": 5, "failed": 1, "missing": 6}
    assert content["exit_code"] == 3
    first, second = content["exposures"]
    assert [ccd["ccd"] for ccd in first["not_done"]] == [1]
    assert first["not_done"][0]["reason"] == "no_stars" and not second["manifest"]


def test_a_large_survey_is_reported_in_few_lines_and_seconds(plan_of, tmp_path):
    names = [f"e{number:03d}" for number in range(200)]
    plan = plan_of(*names)
    finish(tmp_path, "e000", {1: ("no_stars", "clouds")})
    manifest = (tmp_path / "results/summary/e000.ecsv").read_text()
    for name in names[1:150]:
        text = manifest.replace("e000", name)
        (tmp_path / f"results/summary/{name}.ecsv").write_text(text)
        for ccd in (0, 2, 3, 4, 5):
            calexp(tmp_path, name, ccd)
    start = time.process_time()
    status = survey_status(plan)
    assert time.process_time() - start < 1.0
    text = status_table(status)
    assert len(text.splitlines()) < 60 and "--all lists them" in text
    assert len(status_table(status, every_exposure=True).splitlines()) > 300


def test_a_refused_exposure_on_a_cluster_keeps_its_reasons(plan_of, tmp_path):
    """There the calexps and rows are taken away with the job that failed."""
    plan = plan_of("a")
    rows = [ccd_row("a", ccd, "no_stars" if ccd < 4 else "", "only 1 source") for ccd in range(6)]
    (tmp_path / "results/summary").mkdir(parents=True)
    write_manifest(tmp_path / "results/summary/a.failed.ecsv", rows)
    with pytest.raises(SystemExit), job_log(tmp_path / "logs/manifest/a.log"):
        raise InputError("4 of 6 CCDs failed")
    status = survey_status(plan)
    assert (status.count("failed"), status.count("missing"), status.exit_code) == (4, 2, 3)
    text = status_table(status)
    assert "4 of 6 CCDs failed" in text
    assert "a CCD 0 and 3 more  no_stars: only 1 source" in text
    assert "2 refused" in text


def ledger(folder, *lines):
    """Leave what profiles/pbs says about jobs that have ended."""
    path = folder / ".snakemake/coaddflow/pbs/ended.tsv"
    path.parent.mkdir(parents=True)
    path.write_text("".join("2026-11-27T02:00:00\t" + "\t".join(line) + "\n" for line in lines))


def test_what_the_cluster_says_explains_a_log_without_last_word(plan_of, tmp_path, monkeypatch):
    plan = plan_of("a", "b")
    monkeypatch.setenv("PBS_JOBID", "4.server")
    log = tmp_path / "logs/calexp/a/2.log"
    with job_log(log):
        pass
    log.write_text(log.read_text().splitlines()[0] + "\n")
    failed = "exposure_a: walltime 65 exceeded limit 60"
    ledger(tmp_path, ("4.server", "exposure_a", "failed", failed))
    status = survey_status(plan)
    text = status_table(status)
    assert "a CCD 2  job_failed: PBS job 4.server was killed at its time limit" in text
    assert "--set-resources calexp:runtime=" in text
    assert json.loads(status_json(status))["exposures"][0]["job"]["outcome"] == "time limit"


def test_a_job_that_never_began_was_not_killed(plan_of, tmp_path):
    plan = plan_of("a")
    log = tmp_path / "logs/calexp/a/2.log"
    log.parent.mkdir(parents=True)
    log.touch()
    text = status_table(survey_status(plan))
    assert "killed:" not in text
    assert "has not begun" in text
    ledger(tmp_path, ("4.server", "exposure_a", "failed", "terminated by user"))
    text = status_table(survey_status(plan))
    assert "PBS job 4.server was cancelled" in text
    assert "job_failed" not in text, "the steps of a job that was cancelled need no words"


def test_jobs_of_tracts_and_calibration_frames_count_until_their_products_are_there(
    plan_of, tmp_path
):
    plan = plan_of("a")
    ledger(
        tmp_path,
        ("4.server", "survey_corners", "failed", "terminated by user"),
        ("5.server", "tract_0", "failed", "terminated by user"),
    )
    assert [job.unit for job in survey_status(plan).jobs] == ["survey_corners", "tract_0"]
    assert "tract_0  PBS job 5.server was cancelled" in status_table(survey_status(plan))
    (tmp_path / "results").mkdir()
    (tmp_path / "results/corners.sqlite").touch()
    assert [job.unit for job in survey_status(plan).jobs] == ["tract_0"]


def whole(plan_of, folder, **changes):
    """Leave a finished survey of one exposure."""
    plan = plan_of("a", **changes)
    finish(folder, "a")
    finish_tracts(folder)
    return plan


@pytest.mark.parametrize(
    ("name", "reason", "removed"),
    [
        ("summary/a.ecsv", "damaged_manifest", {"results/summary/a.ecsv"}),
        (
            "calexp/a/3.fits",
            "calexp_truncated",
            {"results/calexp/a/3.json", "results/summary/a.ecsv"},
        ),
    ],
)
def test_what_is_cut_off_is_named_with_what_to_remove(plan_of, tmp_path, name, reason, removed):
    plan = whole(plan_of, tmp_path)
    path = tmp_path / "results" / name
    path.write_bytes(path.read_bytes()[:-50])  # in the middle of a row
    status = survey_status(plan)
    lost = [ccd for ccd in status.exposures[0].ccds if ccd.state == "missing"]
    assert lost and {ccd.reason for ccd in lost} == {reason}
    assert {file for ccd in lost for file in ccd.remedy} == removed
    # a run does not make it again by itself: a script must not wait for it
    assert status.exit_code == 1
    assert f"remove {' and '.join(lost[0].remedy)}" in status_table(status)


def test_a_calexp_that_is_cut_off_between_blocks_is_not_whole(plan_of, tmp_path):
    plan = whole(plan_of, tmp_path)
    path = tmp_path / "results/calexp/a/3.fits"
    fits.writeto(path, np.zeros((100, 100)), overwrite=True)
    assert not [ccd for ccd in survey_status(plan).exposures[0].ccds if ccd.state == "missing"]
    path.write_bytes(path.read_bytes()[: 5 * 2880])
    (lost,) = [ccd for ccd in survey_status(plan).exposures[0].ccds if ccd.state == "missing"]
    assert (lost.ccd, lost.reason) == (3, "calexp_truncated")


def test_a_ccd_that_a_whole_manifest_lacks_is_one_for_the_next_run(plan_of, tmp_path):
    """It was excluded, or is new in the camera file."""
    plan = whole(plan_of, tmp_path)
    manifest = tmp_path / "results/summary/a.ecsv"
    write_manifest(manifest, read_manifest(manifest)[:-1])
    status = survey_status(plan)
    (missing,) = [ccd for ccd in status.exposures[0].ccds if ccd.state == "missing"]
    assert (missing.reason, missing.remedy) == ("", ())
    assert status.exit_code == 3


def test_a_row_that_is_cut_off_is_named_with_what_to_remove(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a", manifest=False)
    (tmp_path / "results/calexp/a/0.json").write_text('{"exposure": "a", "cc')
    (ccd,) = [ccd for ccd in survey_status(plan).exposures[0].ccds if ccd.state != "done"]
    assert (ccd.reason, ccd.remedy) == ("damaged_row", ("results/calexp/a/0.json",))


@pytest.mark.parametrize("changes", [{}, {"parallel": {"coadd": "tract"}}])
@pytest.mark.parametrize("cut", [True, False])
def test_a_coadd_that_is_gone_or_cut_off_is_told_with_what_to_remove(
    plan_of, tmp_path, changes, cut
):
    plan = whole(plan_of, tmp_path, **changes)
    (tmp_path / "results/coadd/r/0.ecsv").touch()
    coadd = tmp_path / "results/coadd/r/0/0_0.fits"
    if cut:
        coadd.write_bytes(coadd.read_bytes()[:-1])
    else:
        coadd.unlink()
    status, whole_tract = survey_status(plan), bool(changes)
    (kind,) = [kind for kind in status.products if kind.missing or kind.damaged]
    assert (kind.damaged if cut else kind.missing) == ("coadd/r/0/0_0.fits",)
    if whole_tract:
        assert kind.remove == ("results/coadd/r/0.ecsv",)
    else:
        assert kind.remove == (("results/coadd/r/0/0_0.fits",) if cut else ())
    # only what a run makes without being asked counts as not run yet
    assert status.exit_code == (1 if kind.remove else 3)
    assert all(f"    {name}" in status_table(status) for name in kind.remove)


def test_a_depth_map_that_is_gone_needs_its_table_removed(plan_of, tmp_path):
    plan = whole(plan_of, tmp_path)
    (tmp_path / "results/depth/r/0/0_0.fits").unlink()
    status = survey_status(plan)
    (kind,) = [kind for kind in status.products if kind.missing]
    assert kind.remove == ("results/depth/0.ecsv",) and status.exit_code == 1


@pytest.mark.parametrize(
    ("log", "product"),
    [
        ("coadd/r/0/0_0", "coadd/r/0/0_0.fits"),
        ("depth/0", "depth/0.ecsv"),
        ("tract_corners/r/0", "corners/r/0.sqlite"),
        ("survey_corners", "corners.sqlite"),
        ("warp/0/a", "warp/0/a.ecsv"),
    ],
)
def test_steps_of_tracts_that_failed_are_named_until_their_product_is_there(
    plan_of, tmp_path, log, product
):
    plan = whole(plan_of, tmp_path)
    (tmp_path / "results" / product).unlink(missing_ok=True)
    with pytest.raises(SystemExit), job_log(tmp_path / f"logs/{log}.log"):
        raise InputError("the pixels are gone")
    status = survey_status(plan)
    assert [step.job for step in status.failed_steps] == [log]
    assert f"  {log}  the pixels are gone" in status_table(status)
    json.loads(status_json(status))
    (tmp_path / "results" / product).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "results" / product).touch()
    assert not survey_status(plan).failed_steps


def test_a_job_that_runs_has_not_failed(plan_of, tmp_path):
    plan = plan_of("a")
    log = tmp_path / "logs/calexp/a/2.log"
    with job_log(log):
        pass
    log.write_text(log.read_text().splitlines()[0] + "\n")
    assert "a CCD 2  job_failed" in status_table(survey_status(plan))
    lock = tmp_path / ".snakemake/locks/0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    text = status_table(survey_status(plan))
    assert "a CCD 2  running" in text and "job_failed" not in text


def test_warps_that_are_gone_are_told_with_the_table_to_remove(plan_of, tmp_path):
    plan = whole(plan_of, tmp_path)
    row = WarpRow("0_0", "a/0_0.fits", 0, 0, 4, 4, "0", 16, "")
    table = tmp_path / "results/warp/0/a.ecsv"
    write_warp_table(table, WarpTable("a", 0, (row,)))
    assert survey_status(plan).lost_warps == ("results/warp/0/a.ecsv",)
    (table.parent / "a").mkdir()
    (table.parent / "a/0_0.fits").write_bytes(FITS)
    assert not survey_status(plan).lost_warps


def test_products_of_other_settings_are_told(plan_of, tmp_path):
    plan = whole(plan_of, tmp_path)
    header = fits.Header([("SIMPLE", True), ("BITPIX", 8), ("NAXIS", 0)])
    stages = {"calexp/a/0.fits": "calexp", "coadd/r/0/0_0.fits": "coadd"}
    for name, stage in stages.items():
        settings = plan.settings.only(*STAGES[stage].sections).provenance()
        header["CFSETHSH"] = settings_hash(settings)
        (tmp_path / "results" / name).write_bytes(header.tostring().encode())
    assert survey_status(plan).other_settings == ()
    changed = plan_of("a", psf={"order": 1}, coadd={"bad_planes": ["BAD"]})
    assert survey_status(changed).other_settings == ("exposure a", "coadd/r/0/0_0.fits")
    assert "made with other settings than these (2)" in status_table(survey_status(changed))
    assert survey_status(changed).exit_code == 3, "a run makes them again"
