"""Figures of merit on paper: goals, the table, the file."""

import json

import pytest

from coaddflow.qa.metrics import Metric, table_of, write_metrics

FLUX = Metric("coadd.flux_bias.r", 0.123456789, "%", "How wrong.", least=-0.2, most=0.2, error=0.05)


@pytest.mark.parametrize(
    ("least", "most", "value", "goal", "met"),
    [
        (None, 1.0, 0.5, "<= 1", True),
        (None, 1.0, 1.5, "<= 1", False),
        (0.97, None, 0.96, ">= 0.97", False),
        (-1.0, 1.0, -1.5, "-1 to 1", False),
        (None, None, 3.0, "", None),
        (None, 1.0, None, "<= 1", None),
    ],
)
def test_a_goal_is_met_or_not(least, most, value, goal, met):
    metric = Metric("one", value, "", "", least=least, most=most)
    assert (metric.goal, metric.met) == (goal, met)


def test_the_file_is_a_flat_list_that_json_can_hold(tmp_path):
    missing = Metric("two", None, "mas", "Nothing there.", most=1.0)
    infinite = Metric("three", float("nan"), "", "Not a number.", n=0)
    write_metrics([FLUX, missing, infinite], tmp_path / "metrics.json")
    first, second, third = json.loads((tmp_path / "metrics.json").read_text())
    assert first == {
        "name": "coadd.flux_bias.r",
        "value": 0.123457,
        "unit": "%",
        "error": 0.05,
        "n": None,
        "goal": "-0.2 to 0.2",
        "met": True,
        "definition": "How wrong.",
    }
    assert (second["value"], second["met"]) == (None, None)
    assert third["value"] is None


def test_the_table_says_which_goal_is_missed():
    missed = Metric("worse", 3.0, "mas", "", most=1.0, n=7)
    lines = table_of([FLUX, missed]).splitlines()
    assert [line.count("|") for line in lines] == [5] * 4
    assert "0.1235 ± 0.05 %" in lines[2]
    assert "yes" in lines[2]
    assert "**no**" in lines[3]
