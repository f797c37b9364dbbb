"""The history of attempts: what is recorded, and what the next attempt asks for."""

import time

import pytest

from coaddflow.cluster.attempts import (
    FOLDER,
    KEPT,
    UNCOUNTED_AT_MOST,
    Attempt,
    Grades,
    digest_of,
    grades,
    histories,
    key_of,
    record,
    told,
    uncounted,
)
from coaddflow.workflow.report import failure_text, refused_jobs

FIRST = Attempt(
    when="2026-11-30T04:00:00",
    request="r",
    run="1",
    system="Slurm",
    job_id="12",
    steps=("picture", "tract"),
    asked={"mem_mb": 4600, "runtime": 126, "cores": 2},
    outcome="out of memory",
    words="OUT_OF_MEMORY",
    next={"mem_mb": 6000, "runtime": 126, "cores": 2},
)


def test_what_is_recorded_is_read_again(tmp_path):
    second = FIRST._replace(job_id="", outcome="refused", words="no such\tpartition", next=None)
    record("tract_0", FIRST, tmp_path)
    record("tract_0", second, tmp_path)
    assert histories(tmp_path) == {"tract_0": [FIRST, second]}


def test_the_history_of_a_job_has_an_end(tmp_path):
    for number in range(KEPT + 3):
        record("tract_0", FIRST._replace(job_id=str(number)), tmp_path)
    assert [one.job_id for one in histories(tmp_path)["tract_0"]][:: KEPT - 1] == ["3", "52"]


def test_a_damaged_history_is_none(tmp_path):
    record("tract_0", FIRST, tmp_path)
    path = tmp_path / FOLDER / "tract_0.json"
    for text in ("", "[]", "{}", path.read_text()[:-9], '{"attempts": [{"when": "x"}]}'):
        path.write_text(text)
        assert histories(tmp_path) == {}


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    record("tract_0", FIRST, tmp_path)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="no space"):
        record("tract_0", FIRST, tmp_path)
    assert histories(tmp_path) == {"tract_0": [FIRST]}
    assert len(list((tmp_path / FOLDER).iterdir())) == 1


def test_names_of_jobs_are_names_of_files():
    assert key_of("exposure_1001", "calexp", ["1001", "3"]) == "exposure_1001"
    assert key_of(None, "calexp", ["a/../b", "3"]) == "calexp_a_.._b_3"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Grades(2, 1)),
        ({"outcome": "time limit"}, Grades(1, 2)),
        ({"needed_mb": 5000}, Grades(1, 1, 5000)),
        ({"steps": ("warp",)}, Grades()),
        ({"request": "another"}, Grades()),
        *(({"outcome": end}, Grades()) for end in ("cancelled", "killed", "refused", "failed")),
    ],
)
def test_only_what_was_short_is_asked_for_again(changes, expected):
    assert grades([FIRST._replace(**changes)], "tract", "r") == expected


def test_a_request_by_hand_begins_anew():
    assert digest_of(["tract:mem_mb=1", "a=2"]) == digest_of(["a=2", "tract:mem_mb=1"])
    assert digest_of(["tract:mem_mb=1"]) != digest_of(["tract:mem_mb=2"])


def test_what_the_controller_did_not_begin_counts_as_no_attempt():
    away = FIRST._replace(outcome="controller away")
    assert uncounted([FIRST, away, away, away._replace(run="2")], "1") == 2
    assert uncounted([away] * 100, "1") == UNCOUNTED_AT_MOST


def test_an_attempt_is_told_in_one_line():
    assert told(FIRST) == (
        "Slurm job 12 (4600 MB, 126 minutes, 2 cores) out of memory [OUT_OF_MEMORY]; "
        "the next attempt asks for 6000 MB, 126 minutes, 2 cores"
    )
    assert told(FIRST._replace(next=FIRST.asked)).endswith("the next attempt asks for the same")
    assert told(FIRST._replace(next=None)).endswith("no further attempt")


def test_a_job_that_was_never_accepted_is_in_the_summary_of_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused = FIRST._replace(job_id="", outcome="refused", words="no such partition", next=None)
    began = time.mktime(time.strptime(FIRST.when, "%Y-%m-%dT%H:%M:%S"))
    record("tract_0", refused)
    record("tract_1", refused._replace(next=FIRST.asked))
    assert refused_jobs(began + 1) == []
    (line,) = refused_jobs(began)
    assert line == f"  tract_0  {told(refused)}" and "no such partition" in line
    assert line in failure_text("logs", began)
