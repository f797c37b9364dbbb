"""A run says how far it is and how long the rest takes; Ctrl-C ends it with one line."""

import logging
import os
import re
import signal
import subprocess

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from survey_run import environment

from coaddflow.workflow.progress import Progress, duration


def finished(rule):
    record = logging.LogRecord(
        "x", logging.INFO, "", 0, f"Finished jobid: 3 (Rule: {rule})", (), None
    )
    record.event = LogEvent.JOB_FINISHED
    return record


def test_time_left_follows_the_cost_of_the_jobs():
    now, said = [0.0], []
    progress = Progress(said.append, clock=lambda: now[0])
    now[0] += 1000.0  # planning is not among what takes time per job
    progress.plan({"calexp": 10, "manifest": 10}, {"calexp": 9.0, "manifest": 1.0})
    for _ in range(5):
        now[0] += 60.0
        progress.emit(finished("calexp"))
    # 45 of 100 units of work in 300 s
    assert said[-1] == "coaddflow: 5 of 20 jobs done, about 6 min left"
    now[0] += 1.0
    progress.emit(finished("manifest"))
    assert len(said) == 5, "not a line for every job"
    assert progress.done == 6


def test_after_ctrl_c_only_errors_of_jobs_are_not_shown(monkeypatch):
    progress = Progress(None)
    error = logging.LogRecord("x", logging.ERROR, "", 0, "Unable to cancel jobs", (), None)
    job_error = logging.LogRecord("x", logging.ERROR, "", 0, "Error in rule calexp", (), None)
    error.event, error.exception = LogEvent.ERROR, "WorkflowError"
    job_error.event = LogEvent.JOB_ERROR
    assert progress.passes(error) and progress.passes(job_error)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    text = "Terminating processes on user request, this might take some time."
    assert progress.passes(logging.LogRecord("x", logging.WARNING, "", 0, text, (), None))
    assert progress.interrupted
    assert progress.passes(error) and not progress.passes(job_error)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2, "10 s"), (44, "40 s"), (700, "12 min"), (9000, "2.5 h")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text


def test_ctrl_c_ends_with_one_line_and_130(raw_survey, tmp_path):
    survey = raw_survey.copy_to(tmp_path / "survey")
    after = []
    with subprocess.Popen(
        survey.command("--cores", "2"),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as process:
        for line in process.stdout:
            if after or line.startswith("Finished jobid"):
                # once for the run, and once more while it ends
                if not after or line.startswith("Terminating processes"):
                    os.killpg(process.pid, signal.SIGINT)
                after.append(line)
    assert process.returncode == 130
    assert re.fullmatch(
        r"coaddflow: interrupted; [1-9] of \d+ jobs done; the same command goes on\n", after[-1]
    )
    text = "".join(after)
    assert "Traceback" not in text
    assert "Error" not in text
    # nothing is locked, and what was done is not done again
    again = survey.plan()
    assert again.returncode == 0, again.text
    assert sum(again.rules.values()) < int(after[-1].split()[4])
