"""A job that scatters its work: opens the pool that the settings want, whatever the backend.

A module that does such a job has a function ``run(pool, spec)``: it scatters with the pool, and
``spec`` are plain values (names of files, numbers, sections of the settings). What it returns are
plain values too. `run_job` calls it: in this process, or on rank 0 of an MPI program that is
started for it. Plain values travel as JSON in both cases, so that nothing works with one backend
only.
"""

import contextlib
import importlib
import json
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coaddflow.errors import CoaddflowError, InputError, is_lasting
from coaddflow.files import atomic_path
from coaddflow.pool import Pool, PoolError
from coaddflow.pool.lifeline import end_when
from coaddflow.settings.parallel import ParallelSettings

_LOG = logging.getLogger(__name__)

_REQUEST, _RESULT = "request.json", "result.json"
_SECONDS_TO_STOP = 10.0
_SECONDS_TO_CONNECT = 60.0


def run_job(
    module: str,
    spec: Mapping[str, Any],
    parallel: ParallelSettings,
    *,
    workers: int,
    memory_mb: float | None = None,
    folder: str | Path = ".",
) -> Any:
    """Run a job on the pool that the settings want.

    Parameters
    ----------
    module : str
        Name of a module with a function ``run(pool, spec)``, such as ``coaddflow.coadd.tract_job``.
        Raise `InputError` in it for what the user can mend; everything that it and its workers
        log is in the log of this process.
    spec : mapping
        What the job is about, as plain values; the function gets a copy.
    parallel : ParallelSettings
        Backend, and how MPI or dask are reached.
    workers : int
        Workers at most (``threads`` of the rule). With `serial` there is one; a scheduler of
        dask that is there already gives all that it has.
    memory_mb : float, optional
        Limit for the memory of the items in work together (`Pool.map`, ``memory``), MB. It
        does not hold for workers of a scheduler of dask that is there already: they are not in
        the memory of this job.
    folder : str or Path
        Where the request to an MPI program stands for a moment. All nodes of the job must have
        it: the working folder, as a rule.

    Returns
    -------
    object
        What the function returned, as plain values.

    Raises
    ------
    InputError
        That of the function; or if the backend is not installed or cannot be started.
    PoolError
        If the MPI program ended in another way: the message is the last line that it printed.
    """
    elsewhere = parallel.backend == "dask" and parallel.dask_address is not None
    request = {
        "module": module,
        "spec": spec,
        "workers": None if elsewhere else workers,
        "memory_limit": None if memory_mb is None or elsewhere else 1e6 * memory_mb,
    }
    request = json.loads(json.dumps(request))
    if parallel.backend == "mpi":
        return _run_with_mpi(request, parallel.mpi_command, Path(folder))
    address = parallel.dask_address if parallel.backend == "dask" else None
    return _run(request, parallel.backend, address)


def _run(request: Mapping[str, Any], backend: str, address: str | None = None) -> Any:
    """Open the pool and call the function of the module."""
    function = importlib.import_module(request["module"]).run
    limit = request["memory_limit"]
    with Pool(backend, request["workers"], memory_limit=limit, address=address) as pool:
        return json.loads(json.dumps(function(pool, request["spec"])))


# The process that starts MPI ------------------------------------------------------------------


def _run_with_mpi(request: dict[str, Any], command: Sequence[str], folder: Path) -> Any:
    """Start the ranks, repeat what they log, and return what rank 0 left."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".mpi.", dir=folder) as shared,
        socket.create_server(("", 0)) as lifeline,
    ):
        request["lifeline"] = (platform.node(), lifeline.getsockname()[1])
        request["paths"] = sys.path
        request["level"] = logging.getLogger().getEffectiveLevel()
        (Path(shared) / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        program = [sys.executable, "-m", "coaddflow.pool", "-m", __name__, shared]
        ranks = ["-n", str(request["workers"] + 1)]
        code, last = _run_and_log([_find_program(command[0]), *command[1:], *ranks, *program])
        try:
            answer = json.loads((Path(shared) / _RESULT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PoolError(f"the MPI program ended with exit code {code}: {last}") from None
    if "error" in answer:
        raise _error_of(answer["error"])
    if code != 0:
        raise PoolError(f"the MPI program ended with exit code {code}: {last}")
    return answer["result"]


def _find_program(name: str) -> str:
    """Return the path of a program: as the shell finds it, else beside this Python."""
    beside = str(Path(sys.executable).parent)
    path = shutil.which(name) or shutil.which(name, path=beside)
    if path is None:
        raise InputError(
            f"there is no program {name!r}, which shall start the ranks of MPI",
            remedy="load the MPI of the cluster, or correct parallel.mpi_command",
        )
    return path


def _run_and_log(command: Sequence[str]) -> tuple[int, str]:
    """Run a program and log its lines; return its exit code and last words."""
    process = subprocess.Popen(  # noqa: S603 - a program that the settings name, with its arguments
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    words = _LastWords()
    try:
        for line in process.stdout:
            words.hear(line.rstrip())
        return process.wait(), words.text
    finally:
        _stop(process)


class _LastWords:
    """Logs what an MPI program prints, and remembers the last of it.

    Open MPI breaks what it has to say over lines, between two rules.
    """

    def __init__(self) -> None:
        self.text = "it printed nothing"
        self._framed: list[str] | None = None

    def hear(self, line: str) -> None:
        """Log a line: a record of rank 0, or whatever MPI says."""
        if line and set(line) == {"-"}:
            self._framed = [] if self._framed is None else None
        if not any(character.isalnum() for character in line):
            return
        try:
            entry = json.loads(line)
            name, level, text = entry["name"], int(entry["level"]), str(entry["text"])
            self.text = text.splitlines()[-1] if text else text
        except (ValueError, KeyError, TypeError):
            name, level, text = __name__, logging.WARNING, line
            if self._framed is None:
                self.text = line.strip()
            else:
                self._framed += line.split()
                self.text = " ".join(self._framed)
        logging.getLogger(name).log(level, "%s", text)


def _stop(process: subprocess.Popen[str]) -> None:
    """End a program that still runs: at first by a word, then without mercy."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_STOP)
    if process.poll() is None:
        process.kill()
        process.wait()
    process.stdout.close()


def _error_of(told: Mapping[str, Any]) -> CoaddflowError:
    """Return an error that was told by rank 0."""
    if told["type"] == "InputError":
        error = InputError(told["cause"], told["path"], told["remedy"])
    else:
        error = CoaddflowError(told["cause"]) if told["lasting"] else PoolError(told["cause"])
    error.lasting = told["lasting"]
    return error


# Rank 0 of the MPI program --------------------------------------------------------------------


def _follow(host: str, port: int) -> None:
    """End this process when the one that started MPI ends, also if it is killed.

    The connection stands as long as that process has its end of it, which it never reads; the
    input that `mpirun` passes on tells nothing, since Open MPI does not pass on its end.
    """
    address = "127.0.0.1" if host == platform.node() else host
    connection = socket.create_connection((address, port), _SECONDS_TO_CONNECT)
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def wait() -> bool:
        with contextlib.suppress(ConnectionError):
            connection.recv(1)
        return True

    end_when(wait)


class _LineHandler(logging.Handler):
    """Prints log records as lines that the process that started MPI understands."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[0] is not None:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        line = json.dumps({"name": record.name, "level": record.levelno, "text": text})
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def _log_lines(level: int) -> Iterator[None]:
    """Log to standard error in a block."""
    root = logging.getLogger()
    root.handlers[:] = [_LineHandler()]
    root.setLevel(level)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = []


def main(shared: str) -> int:
    """Do what a request asks on rank 0, and leave the answer beside it."""
    request = json.loads((Path(shared) / _REQUEST).read_text(encoding="utf-8"))
    _follow(*request["lifeline"])
    sys.path += [path for path in request["paths"] if path not in sys.path]
    with _log_lines(request["level"]):
        try:
            answer = {"result": _run(request, "mpi")}
        except Exception as error:
            if not isinstance(error, CoaddflowError):
                text = "".join(traceback.format_exception(error))
                logging.getLogger(__name__).error("Traceback:\n%s", text)
            answer = {"error": _told(error)}
    with atomic_path(Path(shared) / _RESULT) as temporary:
        temporary.write_text(json.dumps(answer), encoding="utf-8")
    return 1 if "error" in answer else 0


def _told(error: Exception) -> dict[str, str | bool | None]:
    """Return an error as plain values."""
    if isinstance(error, InputError):
        path = None if error.path is None else os.fspath(error.path)
        return {
            "type": "InputError",
            "cause": error.cause,
            "path": path,
            "remedy": error.remedy,
            "lasting": is_lasting(error),
        }
    known = isinstance(error, CoaddflowError)
    cause = str(error) if known else f"{type(error).__name__}: {error}"
    return {"type": "other", "cause": cause, "lasting": is_lasting(error)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
