"""A job does not outlive the Snakemake that started it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from coaddflow.runtime.log import job_log
from coaddflow.runtime.parent import ParentWatch, unwatched

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")

JOB = """
import sys, time
from coaddflow.runtime.log import job_log
with job_log(sys.argv[1]):
    print("begun", flush=True)
    time.sleep(60)
"""

STARTER = """
import subprocess, sys
shell = 'set -e; "$0" -c "$1" "$2"; true'
subprocess.run(["bash", "-c", shell, sys.executable, sys.argv[1], sys.argv[2]])
"""


def kill_starter_of(program, log):
    """Start a job, kill what started it, and wait for the end of the job."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, program, str(log)], stdout=subprocess.PIPE, text=True
    )
    with starter:
        assert starter.stdout.readline() == "begun\n"
        os.kill(starter.pid, signal.SIGKILL)
        # the end of the output is that of the last process that had it
        assert starter.stdout.read() == ""


def test_a_job_whose_snakemake_is_killed_ends_although_its_shell_goes_on(tmp_path):
    log = tmp_path / "job.log"
    kill_starter_of(JOB, log)
    assert "stopped by SIGTERM" in log.read_text().splitlines()[-1]


def test_a_job_that_loses_the_first_signal_is_asked_to_end_again(tmp_path):
    program = JOB.replace(
        "    time.sleep(60)",
        "    log._SECONDS_TO_END = 0.5\n"
        "    try:\n        time.sleep(60)\n    except BaseException:\n        time.sleep(6)",
    ).replace("sys, time", "sys, time; from coaddflow.runtime import log")
    log = tmp_path / "job.log"
    kill_starter_of(program, log)
    assert "stopped by SIGTERM" in log.read_text().splitlines()[-1]


def test_a_job_whose_starter_lives_goes_on(tmp_path):
    program = JOB.replace("60", "2.5")
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "log"], check=False)
    assert ended.returncode == 0
    assert time.monotonic() - began > 2.5


def test_after_a_pause_the_watch_goes_on(tmp_path):
    program = JOB.replace(
        "    print", "    from coaddflow.runtime.parent import unwatched\n    print"
    )
    program = program.replace("    time", "    with unwatched(): time.sleep(0.01)\n    time")
    log = tmp_path / "job.log"
    kill_starter_of(program, log)
    assert "stopped by SIGTERM" in log.read_text().splitlines()[-1]


@pytest.mark.parametrize("method", ["stop", "start"])
def test_a_signal_in_a_pause_ends_the_job_as_any_other(method, tmp_path, monkeypatch):
    def interrupted(watch):
        monkeypatch.setattr(ParentWatch, method, whole)
        os.kill(os.getpid(), signal.SIGTERM)
        whole(watch)

    whole, before = getattr(ParentWatch, method), signal.getsignal(signal.SIGTERM)
    n_threads = threading.active_count()
    with pytest.raises(SystemExit) as ended, job_log(tmp_path / "job.log"):
        monkeypatch.setattr(ParentWatch, method, interrupted)
        with unwatched():
            pass
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in (tmp_path / "job.log").read_text().splitlines()[-1]
    assert signal.getsignal(signal.SIGTERM) == before
    assert threading.active_count() == n_threads
