"""A job that scatters is the same whatever backend the settings name."""

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from backends import MPI, needs_dask, needs_mpi

from coaddflow.errors import InputError
from coaddflow.fence import Fence, begin, fenced_by
from coaddflow.pool import PoolError
from coaddflow.pool.launch import run_job
from coaddflow.settings.parallel import ParallelSettings

BACKENDS = [
    ParallelSettings(backend="serial"),
    ParallelSettings(backend="processes"),
    pytest.param(ParallelSettings(backend="mpi", mpi_command=MPI), marks=needs_mpi),
]


def run(parallel, folder, **spec):
    return run_job("launch_work", spec, parallel, workers=2, folder=folder)


@pytest.mark.filterwarnings("ignore:the master is odd")
@pytest.mark.parametrize("parallel", BACKENDS, ids=lambda p: p.backend)
def test_a_job_returns_logs_and_fails_alike(parallel, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert run(parallel, tmp_path, numbers=[1, 2, 3]) == {"doubled": [2, 4, 6], "n_failed": 0}
    told = [(record.name, record.getMessage()) for record in caplog.records]
    assert ("coaddflow.work", "there are 3 numbers") in told
    doubling = "doubling" if parallel.backend == "serial" else "number 2: doubling"
    assert ("coaddflow.work", doubling) in told
    with pytest.raises(InputError, match=r"numbers.txt: is no number. Count again"):
        run(parallel, tmp_path, numbers=[], mistake=True)
    bug = PoolError if parallel.backend == "mpi" else ZeroDivisionError
    with pytest.raises(bug, match="by nothing"):
        run(parallel, tmp_path, numbers=[], bug=True)
    assert list(tmp_path.iterdir()) == []


DASK = pytest.param(ParallelSettings(backend="dask"), marks=needs_dask)


@pytest.mark.filterwarnings("ignore:the master is odd")
@pytest.mark.parametrize("parallel", [*BACKENDS, DASK], ids=lambda p: p.backend)
def test_workers_of_a_job_that_was_replaced_write_nothing(parallel, tmp_path):
    token = Fence(str(tmp_path / "token"), "a job")
    begin(token)
    files = [str(tmp_path / f"{number}.txt") for number in range(4)]
    with fenced_by(token):
        failed = run(parallel, tmp_path, numbers=[], files=files, token=token.token)
    assert failed == [[], ["ReplacedError"] * 2]
    assert sorted(path.name for path in tmp_path.glob("*.txt")) == ["0.txt", "1.txt"]


@needs_mpi
def test_a_lost_rank_fails_the_job_with_a_message(tmp_path):
    parallel = ParallelSettings(backend="mpi", mpi_command=MPI)
    with pytest.raises(PoolError, match="is gone: it was killed"):
        run(parallel, tmp_path, numbers=[1, "die", 2])
    assert list(tmp_path.iterdir()) == []


@needs_mpi
def test_the_ranks_end_with_the_process_that_started_them(tmp_path):
    code = (
        "import sys; sys.path[:] = sys.argv[2:]\n"
        "from coaddflow.pool.launch import run_job\n"
        "from coaddflow.settings.parallel import ParallelSettings\n"
        f"parallel = ParallelSettings(backend='mpi', mpi_command={MPI})\n"
        "spec = {'numbers': ['sleep', 'sleep']}\n"
        "run_job('launch_work', spec, parallel, workers=2, folder=sys.argv[1])\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *sys.path])
    wait_for(lambda: len(ranks(tmp_path)) >= 4)  # mpirun and three ranks
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    wait_for(lambda: not ranks(tmp_path))


def ranks(folder):
    """Return the processes that have a folder among their arguments, but for the starter."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(w.startswith(os.fsencode(folder) + b"/.mpi.") for w in words):
            found.append(path.parent.name)
    return found


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_program_that_is_not_there_is_named(tmp_path):
    parallel = ParallelSettings(backend="mpi", mpi_command=("no-such-mpirun",))
    with pytest.raises(InputError, match=r"no program 'no-such-mpirun'.*parallel\.mpi_command"):
        run(parallel, tmp_path, numbers=[])


def test_the_message_of_the_launcher_is_the_error_in_one_line(tmp_path):
    """Open MPI breaks a sentence over lines, between rules, and ends with a null byte."""
    launcher = tmp_path / "launcher"
    launcher.write_text(
        "#!/bin/sh\necho it begins\necho -----\necho rank 1 on node n2 exited on\n"
        "echo 'signal 9 (Killed).'\necho -----\nprintf '\\000\\n'\nexit 137\n"
    )
    launcher.chmod(0o755)
    parallel = ParallelSettings(backend="mpi", mpi_command=(str(launcher),))
    said = r"exit code 137: rank 1 on node n2 exited on signal 9 \(Killed\)\.$"
    with pytest.raises(PoolError, match=said):
        run(parallel, tmp_path)
