"""A job does not outlive the Snakemake that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_a_job_whose_snakemake_is_killed_ends_although_its_shell_goes_on(tmp_path):
    log = tmp_path / "job.log"
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, JOB, str(log)], stdout=subprocess.PIPE, text=True
    )
    with starter:
        assert starter.stdout.readline() == "begun\n"
        os.kill(starter.pid, signal.SIGKILL)
        # the end of the output is that of the last process that had it
        assert starter.stdout.read() == ""
    assert "stopped by SIGTERM" in log.read_text().splitlines()[-1]


def test_a_job_whose_starter_lives_goes_on(tmp_path):
    program = JOB.replace("60", "2.5")
    began = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", program, tmp_path / "log"], check=False)
    assert ended.returncode == 0
    assert time.monotonic() - began > 2.5
