"""One job an exposure and a tract makes what one job a CCD and a patch makes; what is redone."""

from collections import Counter

import pytest
from astropy.table import Table
from survey_run import COARSE, SETTINGS
from test_workflow import AFTER_COADDS, in_one_tract, in_two_tracts, plan_of, settings_without

from coaddflow.tables.manifest import CcdRow, ccds_failed_with, read_manifest, write_manifest


@pytest.fixture(scope="session")
def plan(raw_survey):
    """The plan of the whole survey."""
    return plan_of(raw_survey)


def contents(survey, *patterns):
    """Return the content of the products whose path matches, by name."""
    paths = [path for pattern in patterns for path in survey.folder.glob(pattern)]
    return {str(path.relative_to(survey.folder)): path.read_bytes() for path in paths}


def test_products_are_the_same_to_the_bit(finished_survey, coarse_survey):
    products = (
        "results/calexp/*/*.fits",
        "results/summary/*.ecsv",
        "results/warp/*/*/*.fits",
        "results/coadd/*/*/*.fits",
        "results/depth/*/*/*.fits",
        "results/depth/*.ecsv",
    )
    fine, coarse = contents(finished_survey, *products), contents(coarse_survey, *products)
    assert len(fine) > 30
    assert sum(name.startswith("results/depth/") for name in fine) > 10
    assert fine.keys() == coarse.keys()
    assert [name for name in fine if fine[name] != coarse[name]] == []
    pictures = ("results/coadd/*.png",)
    assert contents(finished_survey, *pictures) == contents(coarse_survey, *pictures)


def test_the_scheduler_sees_exposures_and_tracts(coarse_survey, plan):
    rules = coarse_survey.first_run.rules
    of_tracts = sum(bool(plan.patches_of(band, t)) for band in plan.bands for t in plan.tracts)
    assert rules["exposure"] == len(plan.exposures)
    assert rules["tract"] == of_tracts
    assert not {"calexp", "manifest", "warp", "coadd"} & rules.keys()
    of_ccds = (coarse_survey / "results/calexp").rglob("*.json")
    assert not list(of_ccds), "no file for each CCD but its own"
    assert coarse_survey.plan().planned_nothing


def test_the_table_of_a_tract_names_its_coadds(coarse_survey, plan):
    band, tract = plan.bands[0], plan.tracts[0]
    table = Table.read(coarse_survey / f"results/coadd/{band}/{tract}.ecsv")
    assert sorted(table["patch"]) == sorted(plan.patches_of(band, tract))


def jobs_of_tracts(plan, exposure):
    """Return the jobs that depend on an exposure in one band of its tracts."""
    band, tracts = plan.band_of(exposure), plan.overlaps[exposure]
    jobs = Counter({("survey_corners", "all exposures"): 1})
    for tract in tracts:
        jobs.update((rule, f"tract {tract}") for rule in AFTER_COADDS)
        for rule in ("tract", "tract_corners"):
            jobs[rule, f"band {band}, tract {tract}"] = 1
    return jobs


@pytest.mark.parametrize("which", [in_one_tract, in_two_tracts])
def test_a_dropped_exposure_redoes_its_tracts_and_nothing_else(
    coarse_survey, plan, tmp_path, which
):
    survey = coarse_survey.copy_to(tmp_path / "survey")
    survey.write_settings(**COARSE, **settings_without(which(plan)))
    assert survey.plan().jobs == jobs_of_tracts(plan, which(plan))


def test_a_changed_setting_redoes_what_uses_it(coarse_survey, plan, tmp_path):
    survey = coarse_survey.copy_to(tmp_path / "survey")
    survey.write_settings(**COARSE | {"coadd": {"clip": {"sigma": 6.0}}})
    assert survey.plan().rules.keys() == {"tract"} | AFTER_COADDS
    # what has no effect while it is switched off
    survey.write_settings(**COARSE | {"coadd": {"background_matching": {"bin_size": 64}}})
    assert survey.plan().planned_nothing
    survey.write_settings(**COARSE, exposure={"astrometry": {"enabled": True}})
    assert survey.plan().rules["exposure"] == len(plan.exposures)
    survey.write_settings(**COARSE, exposure={"astrometry": {"order": 3}})
    assert survey.plan().planned_nothing


def test_a_missing_raw_file_costs_its_exposure_until_it_is_back(coarse_survey, plan, tmp_path):
    survey = coarse_survey.copy_to(tmp_path / "survey")
    exposure = in_one_tract(plan)
    (survey / f"results/summary/{exposure}.ecsv").unlink()
    raw = survey / f"data/raw/{exposure}.fits"
    raw.rename(survey / "elsewhere.fits")
    run = survey.run("--until", "exposure")
    assert run.returncode == 0, run.text
    assert run.rules == Counter(exposure=1)
    status = survey.coaddflow("status")
    assert "missing_file" in status.text, status.text
    assert "1 of 6 exposures left out of all coadds" in status.text
    assert not survey.plan("--until", "exposure").jobs
    (survey / "elsewhere.fits").rename(raw)
    again = survey.run("--until", "exposure")
    assert again.returncode == 0, again.text
    assert contents(survey, "results/summary/*.ecsv") == contents(
        coarse_survey, "results/summary/*.ecsv"
    )


@pytest.mark.parametrize("granularity", ["ccd", "exposure"])
def test_a_wrong_pointing_is_fitted_and_used_by_the_next_run(granularity, request, plan, tmp_path):
    name, until = {
        "ccd": ("finished_survey", "manifest"),
        "exposure": ("coarse_survey", "exposure"),
    }[granularity]
    survey = request.getfixturevalue(name).copy_to(tmp_path / "survey")
    exposure, table = in_one_tract(plan), survey / "data/exposures.ecsv"
    row = plan.science[exposure]
    truth = table.read_text()
    table.write_text(truth.replace(f",{row.dec},", f",{row.dec + 0.02},"))
    assert table.read_text() != truth
    manifest = survey / f"results/summary/{exposure}.ecsv"

    def states():
        return {row.state for row in read_manifest(manifest)}

    run = survey.run("--until", until)
    assert run.returncode == 0, run.text
    assert states() == {"failed"}
    assert "the next run uses the fitted pointing" in survey.coaddflow("status").text
    # the remedy by hand, in a copy
    by_hand = survey.copy_to(tmp_path / "by_hand")
    told = by_hand.coaddflow("ingest", "--fitted", "results")
    assert "1 pointings put into" in told.text, told.text

    again = survey.run("--until", until)
    assert again.returncode == 0, again.text
    note = f"that an earlier run fitted, in place of that of {SETTINGS['exposures']}: {exposure}"
    assert note in again.text
    assert {what for _, what in again.jobs if exposure not in what} == set(), "no other exposure"
    assert states() == {"done"}
    assert not survey.plan("--until", until).jobs
    assert by_hand.plan("--until", until).jobs == again.jobs, "the same as with the new pointing"


def test_an_exposure_whose_raw_files_are_archived_stays_done(coarse_survey, plan, tmp_path):
    survey = coarse_survey.copy_to(tmp_path / "survey")
    exposure = plan.exposures[0]
    # of one CCD the file was never there
    manifest = survey / f"results/summary/{exposure}.ecsv"
    rows = read_manifest(manifest)
    rows[0] = CcdRow(
        **rows[0].model_dump(include={"exposure", "ccd", "band", "mjd", "exposure_time"}),
        state="failed",
        reason="missing_file",
    )
    write_manifest(manifest, rows)
    assert ccds_failed_with(manifest, "missing_file") == {rows[0].ccd}
    assert ccds_failed_with(survey / "nothing.ecsv", "missing_file") is None
    for archived in plan.exposures:
        (survey / f"data/raw/{archived}.fits").unlink()
    planned = survey.plan()
    assert "exposure" not in planned.rules, planned.text


def test_going_back_makes_again_all_warps_and_coadds_also_if_warps_were_kept(
    coarse_survey, plan, tmp_path
):
    survey = coarse_survey.copy_to(tmp_path / "survey")
    survey.write_settings(parallel={"calexp": "exposure"})
    assert list(survey.folder.glob("results/warp/*/*/*.fits"))
    planned = survey.plan().rules
    assert planned["coadd"] == sum(
        len(plan.patches_of(band, tract)) for band in plan.bands for tract in plan.tracts
    )
    assert planned["warp"] == sum(len(plan.overlaps[e]) for e in plan.exposures)
    assert set(planned) == {"warp", "coadd"} | AFTER_COADDS
