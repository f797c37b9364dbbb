"""A folder holds one survey: another one is refused, a changed one is not."""

import os
from pathlib import Path

import pytest
from test_plan import _in_folder, plan_of, science  # noqa: F401 - a fixture

from coaddflow.errors import InputError
from coaddflow.workflow.survey_record import SURVEY, check_survey, check_writable, record_survey


def test_another_survey_is_refused_until_the_record_is_removed():
    record_survey(plan_of([science("1001"), science("1002", mjd=60000.01)]))
    other = plan_of([science("1001", mjd=61000.0)])
    os.rename("tables/exposures.ecsv", "tables/other.ecsv")  # noqa: PTH104
    settings = other.settings.model_copy(update={"exposures": "tables/other.ecsv"})
    other = plan_of([science("1001", mjd=61000.0)], exposures="tables/exposures.ecsv")
    object.__setattr__(other, "settings", settings)
    with pytest.raises(InputError, match=r"products of another survey .*rm results/survey.json"):
        check_survey(other)
    # the remedy that is named
    Path(SURVEY).unlink()
    check_survey(other)


def test_the_same_survey_goes_on_when_it_was_edited():
    record_survey(plan_of([science("a"), science("b")]))
    check_survey(plan_of([science("a"), science("b")], psf={"order": 1}))
    check_survey(plan_of([science("b"), science("c")]))
    # a table of another name, with an exposure of the survey
    renamed = plan_of([science("b"), science("d")])
    settings = renamed.settings.model_copy(update={"exposures": "all.ecsv"})
    object.__setattr__(renamed, "settings", settings)
    check_survey(renamed)


def test_exposures_of_another_camera_with_the_same_ids_are_another_survey():
    record_survey(plan_of([science("1001")]))
    own = plan_of([science("1001")])
    changed = {"exposures": "other.ecsv", "camera": "demo"}
    object.__setattr__(own, "settings", own.settings.model_copy(update=changed))
    with pytest.raises(InputError, match="products of another survey"):
        check_survey(own)


def test_folders_that_cannot_be_written_to_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    check_writable([tmp_path, folder])
    folder.write_text("a file")
    with pytest.raises(InputError, match=r"results: is not a folder. Move it away"):
        check_writable([folder])
    folder.unlink()
    folder.mkdir()
    # root may write everywhere
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"results: the folder may not be written to"):
        check_writable([folder])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tables": 3, "exposures": []}'])
def test_a_damaged_record_stops_nothing(content):
    plan = plan_of([science("a")])
    Path(SURVEY).parent.mkdir()
    Path(SURVEY).write_text(content)
    check_survey(plan)
    record_survey(plan)
    check_survey(plan)
