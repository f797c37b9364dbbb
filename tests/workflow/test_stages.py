"""The registry of stages, and what an update of the package redoes."""

import contextlib
import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from recorded_defaults import RECORDED, defaults_of_now
from survey_run import COARSE, REPOSITORY
from test_workflow import AFTER_COADDS, jobs_of_coadds, plan_of

from coaddflow.coadd import tract_job
from coaddflow.settings import Settings
from coaddflow.tables import paths
from coaddflow.workflow.stage import load_workflow
from coaddflow.workflow.stages import STAGES, files_by_job, targets

GRANULARITIES = [{}, COARSE]


@pytest.fixture(scope="module")
def plan(raw_survey):
    return plan_of(raw_survey)


@pytest.fixture(params=GRANULARITIES, ids=["fine", "coarse"])
def workflow(request, raw_survey, tmp_path):
    """The rules of a run, in both granularities."""
    survey = raw_survey.copy_to(tmp_path / "survey")
    survey.write_settings(**request.param)
    with contextlib.chdir(survey.folder):
        yield load_workflow(REPOSITORY / "Snakefile")


def test_every_rule_has_a_stage_and_says_what_it_does(workflow):
    rules = {rule.name: rule for rule in workflow.rules if rule.name != "all"}
    assert rules.keys() <= STAGES.keys()
    for name, rule in rules.items():
        stage = STAGES[name]
        assert rule.docstring, name
        named = set(re.findall(r"\{wildcards\.(\w+)\}", rule.message))
        assert named == rule.wildcard_names, f"the message of {name} names what it works on"
        assert rule.message.startswith(f"{name}: ")
        output = re.sub(r"\{(\w+),[^}]*\}", r"{\1}", str(rule.output[0]))
        assert output == stage.products[0].path
        assert rule.log
        params = dict(rule.params.items())
        assert "made_by" in params
        assert "camera" in stage.reads or "camera" not in params
        assert ("skymap" in stage.reads) == ("skymap" in params)
        rows = {"table_row", "images", "exposure_times"}
        assert bool({"exposures", "images"} & {*stage.reads}) == bool(rows & params.keys())


def test_all_stages_of_a_plan_are_rules(raw_survey, tmp_path):
    survey = raw_survey.copy_to(tmp_path / "survey")
    for settings in GRANULARITIES:
        survey.write_settings(**settings)
        plan = plan_of(survey)
        with contextlib.chdir(survey.folder):
            rules = {rule.name for rule in load_workflow(REPOSITORY / "Snakefile").rules}
        planned = {name for name, stage in STAGES.items() if stage.is_planned(plan)}
        assert planned == rules - {"all"}


def test_a_run_asks_for_products_of_every_stage_but_those_of_single_ccds(plan):
    asked = targets(plan)
    assert len(asked) == len(set(asked))
    for stage in STAGES.values():
        if stage.is_planned(plan):
            files = stage.files(plan)
            assert files
            assert (files[0] in asked) == (stage.name != "calexp")
    by_job = files_by_job(plan)
    exposure, tract = plan.exposures[0], plan.tracts[0]
    assert by_job[f"exposure_{exposure}"] == [paths.MANIFEST.format(exposure=exposure)]
    assert paths.PICTURE.format(tract=tract) in by_job[f"tract_{tract}"]
    assert "results/calibs/flat/r/0.fits" in by_job["calibs_0"]


# What an update of the package redoes


def raised(name):
    """Return the next version of a stage."""
    return {name: STAGES[name].version + 1}


def updated(survey, **changes):
    """Return what a run would do with another state of the package."""
    program = [sys.executable, str(Path(__file__).with_name("patched_snakemake.py"))]
    arguments = survey.command("--dry-run")[3:]
    return survey._call([*program, json.dumps(changes), *arguments])


def test_new_settings_with_neutral_defaults_redo_nothing(finished_survey, coarse_survey):
    for survey in (finished_survey, coarse_survey):
        assert updated(survey, more_settings=True).planned_nothing


def test_a_raised_version_redoes_its_stage_and_all_that_depends_on_it(finished_survey, plan):
    every_coadd = jobs_of_coadds(plan, plan.tracts, plan.bands)
    pictures = Counter({job: n for job, n in every_coadd.items() if job[0] == "picture"})
    assert updated(finished_survey, versions=raised("picture")).jobs == pictures
    assert updated(finished_survey, versions=raised("coadd")).jobs == every_coadd
    warps = updated(finished_survey, versions=raised("warp"))
    assert set(warps.rules) == {"warp", "coadd"} | AFTER_COADDS
    assert warps.rules["warp"] == sum(len(plan.overlaps[e]) for e in plan.exposures)
    calexps = set(updated(finished_survey, versions=raised("calexp")).rules)
    planned = {name for name, stage in STAGES.items() if stage.is_planned(plan)}
    before = {name for name in planned if STAGES[name].group.startswith("calibs")}
    assert calexps == planned - before - {"frame_table"}


def test_a_job_that_includes_a_stage_is_redone_with_it(coarse_survey, plan):
    assert set(updated(coarse_survey, versions=raised("warp")).rules) == {"tract"} | AFTER_COADDS
    calexps = updated(coarse_survey, versions=raised("calexp")).rules
    assert calexps["exposure"] == len(plan.exposures)
    assert "tract" in calexps


def stages_to_raise(recorded, now):
    """Return the stages whose defaults have changed while their version has not."""
    changed = {
        name
        for name, defaults in recorded["defaults"].items()
        for key, value in defaults.items()
        if now["defaults"].get(name, {}).get(key) != value
    }
    return {
        name
        for name, stage in STAGES.items()
        if changed & {*stage.sections, *stage.reads}
        and now["versions"][name] == recorded["versions"].get(name)
    }


def test_a_changed_default_raises_the_version_of_the_stages_that_use_it():
    recorded, now = yaml.safe_load(RECORDED.read_text(encoding="utf-8")), defaults_of_now()
    assert not stages_to_raise(recorded, now), "raise their versions in workflow/stages.py"
    assert recorded == now, "record it: python tests/workflow/recorded_defaults.py"


def test_the_record_of_defaults_notices_a_change():
    recorded, now = defaults_of_now(), defaults_of_now()
    now["defaults"]["warp"]["kernel"] = "bilinear"
    now["defaults"]["coadd"]["new.key"] = 1
    users = {name for name, stage in STAGES.items() if "warp" in stage.sections}
    assert stages_to_raise(recorded, now) == users >= {"warp", "coadd", "tract"}
    now["versions"] |= {name: now["versions"][name] + 1 for name in users}
    assert not stages_to_raise(recorded, now)
    now["defaults"]["skymap"]["patch_border"] = 50
    of_skymap = {"tract_corners", "survey_corners", "picture", "depth"}
    assert stages_to_raise(recorded, now) == of_skymap
    now["defaults"]["camera"]["Amplifier.flip_x"] = True
    assert {"calexp", "exposure", "master_flat"} <= stages_to_raise(recorded, now)


def test_provenance_and_params_hold_what_differs_from_the_defaults():
    settings = Settings(warp={"kernel": "bilinear"}, coadd={"clip": {"sigma": 6.0}, "scratch": "x"})
    stage = STAGES["coadd"]
    changed = {"warp": {"kernel": "bilinear"}, "coadd": {"clip": {"sigma": 6.0}}}
    assert settings.changed_in(*stage.sections) == changed
    assert settings.only(*stage.sections).provenance() == changed
    assert STAGES["tract"].sections == tract_job.SECTIONS
    assert STAGES["warp"].sections == tract_job.WARP_SECTIONS
    of_tract = {name: STAGES[name].version for name in ("tract", "warp", "coadd")}
    assert STAGES["tract"].versions == of_tract
    assert dataclasses.replace(STAGES["tract"], version=5).versions["tract"] == 5
