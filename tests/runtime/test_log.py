"""The log of a job tells how it ended, whatever happened to the job."""

import logging
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from coaddflow.errors import InputError
from coaddflow.runtime import log as joblog


def last_line(path):
    return path.read_text().splitlines()[-1]


def test_a_finished_job_says_what_it_cost(tmp_path):
    log = tmp_path / "logs" / "a.log"
    with joblog.job_log(log) as logger:
        logger.info("halfway")
        logging.getLogger("elsewhere").warning("look here")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("a pixel is odd", stacklevel=1)
    text = log.read_text()
    assert "halfway" in text
    assert "look here" in text
    assert "a pixel is odd" in text
    assert last_line(log).startswith("coaddflow: finished in 0.")
    assert " s CPU, " in last_line(log)
    assert joblog.failed_jobs(tmp_path / "logs") == []


def test_a_mistake_of_the_user_is_one_line_without_traceback(tmp_path, capsys):
    log = tmp_path / "a.log"
    with pytest.raises(SystemExit) as stop, joblog.job_log(log):
        raise InputError("is not a table", path="x.ecsv", remedy="make it again")
    assert stop.value.code == 1
    assert last_line(log) == "coaddflow: failed: x.ecsv: is not a table. Make it again"
    assert "Traceback" not in log.read_text()
    assert capsys.readouterr().err == (
        f"coaddflow: failed: x.ecsv: is not a table. Make it again (log: {log})\n"
    )


@pytest.mark.parametrize(
    ("error", "cause", "for_good"),
    [
        (InputError("too many failed"), None, True),
        (InputError("cannot be read"), OSError("stale file handle"), False),
        (MemoryError(), None, False),
        (KeyError("nothing"), None, False),
    ],
)
def test_only_what_another_attempt_cannot_mend_has_failed_for_good(
    tmp_path, error, cause, for_good
):
    log = tmp_path / "a.log"
    began = time.time() - 1
    with pytest.raises(SystemExit), joblog.job_log(log):
        raise error from cause
    logs = [tmp_path / "not there.log", log]
    assert joblog.failed_for_good(logs, began) is for_good
    assert not joblog.failed_for_good(logs, time.time() + 10), "of an earlier run"


def test_an_unforeseen_error_leaves_its_traceback_in_the_log(tmp_path):
    log = tmp_path / "a.log"
    with pytest.raises(SystemExit), joblog.job_log(log):
        {}["nothing"]
    assert "Traceback (most recent call last)" in log.read_text()
    assert last_line(log) == "coaddflow: failed: KeyError: 'nothing'"


def test_a_log_is_begun_anew(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("coaddflow: failed: yesterday\n")
    with joblog.job_log(log):
        pass
    assert "yesterday" not in log.read_text()


def test_threads_are_limited_before_numpy_is_loaded(tmp_path):
    code = (
        "from coaddflow.runtime.log import job_log; import os, sys\n"
        f"with job_log({str(tmp_path / 'a.log')!r}):\n"
        "    assert 'numpy' not in sys.modules\n"
        "    assert os.environ['OPENBLAS_NUM_THREADS'] == '1'\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "7"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("number", "last"),
    [
        (signal.SIGTERM, "coaddflow: failed: stopped by SIGTERM (time limit, or cancelled)"),
        (signal.SIGKILL, "begun"),
    ],
)
def test_a_job_that_is_killed_is_found(tmp_path, number, last):
    log = tmp_path / "logs" / "warp" / "7.log"
    code = (
        "from coaddflow.runtime.log import job_log; import os\n"
        f"with job_log({str(log)!r}) as logger:\n"
        "    logger.info('begun')\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.PIPE)
    assert ended.returncode == (143 if number == signal.SIGTERM else -9)
    assert last_line(log).endswith(last)
    (failed,) = joblog.failed_jobs(tmp_path / "logs")
    assert failed.job == "warp/7"
    assert failed.reason == (
        last.removeprefix(joblog.FAILED) if number == signal.SIGTERM else joblog.NO_RESULT
    )


def test_an_interrupt_that_was_held_back_ends_the_job_when_it_begins(tmp_path):
    """Snakemake's threads start jobs with it blocked, while Python and libraries are loaded."""
    log = tmp_path / "logs" / "warp" / "7.log"
    code = (
        "import os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "from coaddflow.runtime.log import job_log\n"
        f"with job_log({str(log)!r}):\n"
        "    pass\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], check=False, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (130, b"")
    assert last_line(log).endswith("interrupted")


def run_code(code):
    """Run a program in a Python of its own; return how it ended and what it said."""
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, None])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_disturb_the_end_of_a_job(tmp_path, first, second):
    log = tmp_path / "job.log"
    code = (
        "import os, signal, traceback\n"
        "from coaddflow.runtime.log import job_log\n"
        "whole = traceback.format_exception\n"
        "def impatient(error):\n"
        f"    os.kill(os.getpid(), {int(second)})\n"
        "    return whole(error)\n"
        "traceback.format_exception = impatient\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n"
        f"with job_log({str(log)!r}):\n"
        "    try:\n"
        f"        os.kill(os.getpid(), {int(first or 0)})\n"
        "        raise ValueError('not foreseen')\n"
        "    finally:\n"
        f"        {'pass' if first is None else f'os.kill(os.getpid(), {int(second)})'}\n"
        "        print('tidied up', flush=True)\n"
    )
    ended = run_code(code)
    assert ended.stdout == "tidied up\n"
    assert ended.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, None: 1}[first]
    assert "Traceback" not in ended.stderr
    reason = {
        signal.SIGINT: "interrupted",
        signal.SIGTERM: "stopped by SIGTERM (time limit, or cancelled)",
        None: "ValueError: not foreseen",
    }
    assert last_line(log) == f"coaddflow: failed: {reason[first]}"


def test_a_job_that_does_not_end_hears_the_next_signal(tmp_path):
    """An exception that a finaliser raises is lost, and with it the signal."""
    code = (
        "import os, signal, time\n"
        "from coaddflow.runtime import log\n"
        "log._SECONDS_TO_END = 0.05\n"
        f"with log.job_log({str(tmp_path / 'job.log')!r}):\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException:\n"
        "        pass\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # too soon
        "    time.sleep(0.1)\n"
        "    print('goes on', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('did not hear', flush=True)\n"
    )
    ended = run_code(code)
    assert (ended.returncode, ended.stdout) == (143, "goes on\n")


def test_a_signal_does_not_spoil_a_job_that_has_finished(tmp_path):
    code = (
        "import os, signal\n"
        "from coaddflow.runtime import log\n"
        "stop = log.ParentWatch.stop\n"
        "def late(watch):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    stop(watch)\n"
        "log.ParentWatch.stop = late\n"
        f"with log.job_log({str(tmp_path / 'job.log')!r}):\n"
        "    pass\n"
    )
    ended = run_code(code)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert last_line(tmp_path / "job.log").startswith(joblog.FINISHED)


def test_failures_of_earlier_runs_are_not_reported_again(tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"{name}.log").write_text(f"coaddflow: failed: {name}\n")
    os.utime(tmp_path / "old.log", (1000.0, 1000.0))
    assert [item.reason for item in joblog.failed_jobs(tmp_path, since=2000.0)] == ["new"]


def test_the_table_of_failures_says_what_why_and_where(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.log").write_text("coaddflow: failed: no room\n")
    table = joblog.failure_table(joblog.failed_jobs(tmp_path), limit=2)
    assert "0  no room" in table
    assert str(tmp_path / "1.log") in table
    assert "... and 1 more" in table
