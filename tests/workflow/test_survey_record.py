"""A folder holds one survey: another one is refused, a changed one is not."""

import os
from pathlib import Path

import pytest
from test_plan import _in_folder, plan_of, science  # noqa: F401 - a fixture

from coaddflow.errors import InputError
from coaddflow.workflow.survey_record import SURVEY, check_survey, record_survey


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


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tables": 3, "exposures": []}'])
def test_a_damaged_record_stops_nothing(content):
    plan = plan_of([science("a")])
    Path(SURVEY).parent.mkdir()
    Path(SURVEY).write_text(content)
    check_survey(plan)
    record_survey(plan)
    check_survey(plan)
