"""What `coaddflow status` says of every state that a run can be in."""

import json
import time

import pytest

from coaddflow.cluster.attempts import Attempt, record
from coaddflow.errors import InputError
from coaddflow.runtime.log import job_log
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow, write_exposures, write_images
from coaddflow.tables.manifest import CcdRow, write_manifest, write_row
from coaddflow.workflow.plan import make_plan
from coaddflow.workflow.status import status_json, status_table, survey_status

SKYMAP = {
    "kind": "tangent",
    "pixel_scale": 1.0,
    "tangent": {"ra": 150.0, "dec": 2.0, "width": 1.0, "height": 1.0},
}


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
    path.write_text("pixels")


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
            path.touch()


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


def test_a_calexp_that_was_removed_is_missing_again(plan_of, tmp_path):
    plan = plan_of("a")
    finish(tmp_path, "a")
    (tmp_path / "results/calexp/a/3.fits").unlink()
    status = survey_status(plan)
    (ccd,) = [ccd for ccd in status.exposures[0].ccds if ccd.state == "missing"]
    assert (ccd.ccd, ccd.reason) == (3, "calexp_gone") and status.exit_code == 3


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
    assert "a CCD 0  no_stars: only 1 source" in text
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
