"""One job of a survey runs in a plain Python process, by the script of its rule."""

import contextlib
import shutil
import subprocess
import sys

import pytest
import yaml
from survey_run import COARSE, SETTINGS, Survey, environment

from coaddflow.workflow.stage import stage
from coaddflow.workflow.stages import STAGES

FINE = {
    "master_bias": ("ccd=0", "results/calibs/bias/0.fits"),
    "master_dark": ("ccd=0", "results/calibs/dark/0.fits"),
    "master_flat": ("band=r ccd=0", "results/calibs/flat/r/0.fits"),
    "defects": ("band=r ccd=0", "results/calibs/defects/r/0.fits"),
    "frame_table": ("frames=flat_{band}", "results/calibs/frames/flat_{band}.ecsv"),
    "calexp": ("exposure={exposure} ccd=0", "results/calexp/{exposure}/0.fits"),
    "manifest": ("exposure={exposure}", "results/summary/{exposure}.ecsv"),
    "tract_corners": ("band={band} tract={tract}", "results/corners/{band}/{tract}.sqlite"),
    "survey_corners": ("", "results/corners.sqlite"),
    "warp": ("exposure={exposure} tract={tract}", "results/warp/{tract}/{exposure}.ecsv"),
    "coadd": (
        "band={band} tract={tract} patch={patch}",
        "results/coadd/{band}/{tract}/{patch}.fits",
    ),
    "picture": ("tract={tract}", "results/coadd/{tract}.png"),
    "depth": ("tract={tract}", "results/depth/{tract}.ecsv"),
}
COARSE_JOBS = {
    "calib_table": ("band={band}", "results/calibs/{band}.ecsv"),
    "exposure": ("exposure={exposure}", "results/summary/{exposure}.ecsv"),
    "tract": ("band={band} tract={tract}", "results/coadd/{band}/{tract}.ecsv"),
    "depth": FINE["depth"],
}
IMPORTED = {
    "calibrated": ("exposure={exposure} ccd=0", "results/calexp/{exposure}/0.fits"),
    "calibrated_exposure": ("exposure={exposure}", "results/summary/{exposure}.ecsv"),
}
"""Wildcards of a job of each rule, and what it makes."""

FROM_CALEXPS = {
    "calibrated": {
        "table": "images.ecsv",
        "hdu": "IMAGE",
        "exposure": {"keyword": "EXPOSURE"},
        "ccd": {"keyword": "CCD"},
        "zero_point": {"keyword": "PHOTZP"},
        "weight": {"kind": "variance", "hdu": "VARIANCE"},
    },
    "skymap": SETTINGS["skymap"],
}
"""Settings that take in calexps as images that were calibrated elsewhere."""


@pytest.fixture(scope="module")
def imported_survey(finished_survey, tmp_path_factory):
    """An exposure of the finished survey, taken in as if it had been calibrated elsewhere."""
    survey = Survey(tmp_path_factory.mktemp("imported"))
    exposure = names_in(finished_survey)["exposure"]
    shutil.copytree(finished_survey / f"results/calexp/{exposure}", survey / "calexps")
    write_imported(survey)
    ingest = survey.coaddflow("ingest", "--calibrated", "calexps")
    assert ingest.returncode == 0, ingest.text
    run = survey.run("--until", "manifest")
    assert run.returncode == 0, run.text
    return survey


def write_imported(survey, **more):
    (survey / "config.yaml").write_text(yaml.safe_dump(FROM_CALEXPS | more))


def names_in(survey):
    """Return an exposure, and a band, tract and patch that have a coadd."""
    table = min(survey.folder.glob("results/summary/*.ecsv"))
    coadd = min(survey.folder.glob("results/coadd/*/*/*.fits"))
    band, tract, patch = coadd.relative_to(survey.folder / "results/coadd").with_suffix("").parts
    return {"exposure": table.stem, "band": band, "tract": tract, "patch": patch}


def run_job(survey, rule, wildcards):
    """Run a job as a user does in a debugger; return what it said."""
    command = [sys.executable, "-m", "coaddflow.workflow.stage", rule, *wildcards.split()]
    return subprocess.run(
        command, cwd=survey.folder, check=True, capture_output=True, text=True, env=environment()
    )


@pytest.mark.parametrize("rule", FINE)
def test_each_script_makes_its_product_again(survey, rule):
    check(survey, rule, *FINE[rule])


@pytest.mark.parametrize("rule", COARSE_JOBS)
def test_each_script_of_whole_exposures_and_tracts_makes_its_product_again(
    coarse_survey, tmp_path, rule
):
    check(coarse_survey.copy_to(tmp_path / "survey"), rule, *COARSE_JOBS[rule])


@pytest.mark.parametrize("rule", IMPORTED)
def test_each_script_of_images_calibrated_elsewhere_makes_its_product_again(
    imported_survey, tmp_path, rule
):
    survey = imported_survey.copy_to(tmp_path / "survey")
    if rule == "calibrated_exposure":  # it makes what the jobs of single CCDs have made
        write_imported(survey, **COARSE)
    (table,) = survey.folder.glob("results/summary/*.ecsv")
    check(survey, rule, *IMPORTED[rule], {"exposure": table.stem})


def test_the_script_of_every_stage_is_tried():
    # the sky of six small frames has no map of bad pixels: test_real_data.py makes one
    tried = FINE.keys() | COARSE_JOBS.keys() | IMPORTED.keys()
    assert tried | {"night_sky_defects"} == STAGES.keys()


def check(survey, rule, wildcards, product, names=None):
    names = names or names_in(survey)
    path = survey / product.format(**names)
    before, logs = path.read_bytes(), sorted((survey / "logs").rglob("*.log"))
    times = [log.stat().st_mtime_ns for log in logs]
    if rule != "survey_corners":  # it is brought up to date
        path.unlink()
    run_job(survey, rule, wildcards.format(**names))
    if path.suffix != ".sqlite":
        assert path.read_bytes() == before
    assert path.exists()
    assert [log.stat().st_mtime_ns for log in logs] == times, "the log of the run stays"


def test_errors_are_raised_as_they_are(survey):
    exposure = names_in(survey)["exposure"]
    (survey / f"results/calexp/{exposure}/0.json").write_text("{")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run_job(survey, "manifest", f"exposure={exposure}")
    assert "is not a row of a CCD" in raised.value.stderr
    assert "Traceback" in raised.value.stderr


def test_a_job_that_is_not_in_the_run_is_named(finished_survey):
    with contextlib.chdir(finished_survey.folder):
        with pytest.raises(ValueError, match="no rule 'wrap'; it has calexp, coadd"):
            stage.mock("wrap")
        with pytest.raises(ValueError, match="no rule 'all'"):
            stage.mock("all")
        with pytest.raises(ValueError, match="'warp' has the wildcards: exposure, tract"):
            stage.mock("warp", tract=1)
        mocked = stage.mock("warp", tract=664004, exposure="1001")
    assert mocked.input.manifest == "results/summary/1001.ecsv"
    assert mocked.wildcards.exposure == "1001"


def test_a_job_that_is_not_in_the_plan_is_one_line(finished_survey):
    wildcards = "exposure=9999 ccd=0"
    with pytest.raises(subprocess.CalledProcessError) as raised:
        run_job(finished_survey, "calexp", wildcards)
    assert raised.value.returncode == 2
    said = raised.value.stderr
    assert f"this run has no job calexp {wildcards}; it has, for example, calexp exposure=" in said
    assert "Traceback" not in said
