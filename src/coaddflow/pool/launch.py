"""Run a job that scatters its work, on the pool backend of the settings.

The module of such a job has a function ``run(pool, spec)``, where ``spec`` and the result are
plain values (file names, numbers, sections of the settings). `run_job` calls it in this process,
or on rank 0 of an MPI program that it starts. Plain values are converted to JSON and back in both
cases, so that nothing works with one backend only.
"""

import contextlib
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coaddflow.errors import CoaddflowError, InputError, is_lasting
from coaddflow.fence import Fence, active_fence, fenced_by
from coaddflow.files import atomic_path
from coaddflow.pool import Pool, PoolError
from coaddflow.pool.lifeline import Address, Listener, connect, end_when
from coaddflow.pool.processes import terminate_then_kill
from coaddflow.settings.parallel import ParallelSettings

_LOG = logging.getLogger(__name__)

_REQUEST, _RESULT = "request.json", "result.json"
_SECONDS_TO_STOP = 10.0


def run_job(
    module: str,
    spec: Mapping[str, Any],
    parallel: ParallelSettings,
    *,
    workers: int,
    memory_mb: float | None = None,
    folder: str | Path = ".",
) -> Any:
    """Run a job on the pool backend of the settings.

    Parameters
    ----------
    module : str
        Name of a module with a function ``run(pool, spec)``, such as ``coaddflow.coadd.tract_job``.
        It raises `InputError` for mistakes of the user; what it and its workers log goes to the
        log of this process.
    spec : mapping
        Argument of the function, as plain values.
    parallel : ParallelSettings
        Backend, and how to reach MPI or dask.
    workers : int
        Largest number of workers (``threads`` of the rule). `serial` has one; an existing dask
        scheduler gives all its workers.
    memory_mb : float, optional
        Limit for the memory of the items that are processed at the same time (`Pool.map`,
        ``memory``), MB. It does not apply to the workers of an existing dask scheduler, which do
        not use the memory of this job.
    folder : str or Path
        Folder for the request to an MPI program, while it runs; all nodes of the job must see it.

    Returns
    -------
    object
        What the function returned, as plain values.

    Raises
    ------
    InputError
        Raised by the function; or the backend is not installed or cannot be started.
    PoolError
        If the MPI program ended in another way: the message is the last line that it printed.
    """
    elsewhere = parallel.backend == "dask" and parallel.dask_address is not None
    request = {
        "module": module,
        "spec": spec,
        "workers": None if elsewhere else workers,
        "memory_limit": None if memory_mb is None or elsewhere else 1e6 * memory_mb,
        "fence": active_fence(),
    }
    request = json.loads(json.dumps(request))
    if parallel.backend == "mpi":
        return _run_with_mpi(request, parallel.mpi_command, Path(folder))
    address = parallel.dask_address if parallel.backend == "dask" else None
    return _run(request, parallel.backend, address)


def _run(request: Mapping[str, Any], backend: str, address: str | None = None) -> Any:
    """Open the pool and call the function of the module."""
    function = importlib.import_module(request["module"]).run
    limit, fence = request["memory_limit"], request["fence"]
    with (
        fenced_by(fence and Fence(*fence)),
        Pool(backend, request["workers"], memory_limit=limit, address=address) as pool,
    ):
        return json.loads(json.dumps(function(pool, request["spec"])))


# The process that starts MPI ------------------------------------------------------------------


def _run_with_mpi(request: dict[str, Any], command: Sequence[str], folder: Path) -> Any:
    """Start the ranks, repeat what they log, and return the result of rank 0."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=".mpi.", dir=folder) as shared,
        Listener() as lifeline,
    ):
        request["lifeline"] = lifeline.address
        request["paths"] = sys.path
        request["level"] = logging.getLogger().getEffectiveLevel()
        # it holds the key of the lifeline; only the owner may enter the folder
        (Path(shared) / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        program = [sys.executable, "-m", "coaddflow.pool", "-m", __name__, shared]
        ranks = ["-n", str(request["workers"] + 1)]
        code, last = _run_and_log([_find_program(command[0]), *command[1:], *ranks, *program])
        try:
            answer = json.loads((Path(shared) / _RESULT).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise PoolError(f"the MPI program ended with exit code {code}: {last}") from None
    if "error" in answer:
        raise _from_plain(answer["error"])
    if code != 0:
        raise PoolError(f"the MPI program ended with exit code {code}: {last}")
    return answer["result"]


def _find_program(name: str) -> str:
    """Return the path of a program in ``PATH``, else beside this Python."""
    beside = str(Path(sys.executable).parent)
    path = shutil.which(name) or shutil.which(name, path=beside)
    if path is None:
        raise InputError(
            f"there is no program {name!r} to start the MPI ranks",
            remedy="load the MPI module of the cluster, or correct parallel.mpi_command",
        )
    return path


def _run_and_log(command: Sequence[str]) -> tuple[int, str]:
    """Run a program and log what it prints; return its exit code and its last message."""
    process = subprocess.Popen(  # noqa: S603 - a program that the settings name, with its arguments
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    output = _LauncherOutput()
    try:
        for line in process.stdout:
            output.log(line.rstrip())
        return process.wait(), output.last
    finally:
        terminate_then_kill([process], _SECONDS_TO_STOP)
        process.stdout.close()


class _LauncherOutput:
    """Logs what an MPI program prints, and keeps its last message.

    Open MPI prints a message over several lines, between two rules of dashes.
    """

    def __init__(self) -> None:
        self.last = "it printed nothing"
        self._framed: list[str] | None = None

    def log(self, line: str) -> None:
        """Log a line: a record of rank 0, or anything that MPI prints."""
        if line and set(line) == {"-"}:
            self._framed = [] if self._framed is None else None
        if not any(character.isalnum() for character in line):
            return
        try:
            entry = json.loads(line)
            name, level, text = entry["name"], int(entry["level"]), str(entry["text"])
            self.last = text.splitlines()[-1] if text else text
        except (ValueError, KeyError, TypeError):
            name, level, text = __name__, logging.WARNING, line
            if self._framed is None:
                self.last = line.strip()
            else:
                self._framed += line.split()
                self.last = " ".join(self._framed)
        logging.getLogger(name).log(level, "%s", text)


def _from_plain(error: Mapping[str, Any]) -> CoaddflowError:
    """Return the error of rank 0."""
    if "remedy" in error:
        found = InputError(error["cause"], error["path"], error["remedy"])
    else:
        found = CoaddflowError(error["cause"]) if error["lasting"] else PoolError(error["cause"])
    found.lasting = error["lasting"]
    return found


# Rank 0 of the MPI program --------------------------------------------------------------------


def _end_with(address: Address) -> None:
    """End this process when the one that started MPI ends.

    The end of standard input would not do: Open MPI does not pass it on.
    """
    connection = connect(address, rank=0)

    def wait() -> bool:
        with contextlib.suppress(ConnectionError):
            connection.recv(1)
        return True

    end_when(wait)


class _LineHandler(logging.Handler):
    """Prints log records as JSON lines for the process that started MPI."""

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
    """Do a request on rank 0, and write the result beside it."""
    request = json.loads((Path(shared) / _REQUEST).read_text(encoding="utf-8"))
    _end_with(Address(*request["lifeline"]))
    sys.path += [path for path in request["paths"] if path not in sys.path]
    with _log_lines(request["level"]):
        try:
            answer = {"result": _run(request, "mpi")}
        except Exception as error:
            if not isinstance(error, CoaddflowError):
                text = "".join(traceback.format_exception(error))
                logging.getLogger(__name__).error("Traceback:\n%s", text)
            answer = {"error": _to_plain(error)}
    with atomic_path(Path(shared) / _RESULT) as temporary:
        temporary.write_text(json.dumps(answer), encoding="utf-8")
    return 1 if "error" in answer else 0


def _to_plain(error: Exception) -> dict[str, str | bool | None]:
    """Return an error as plain values."""
    lasting = is_lasting(error)
    if isinstance(error, InputError):
        path = None if error.path is None else os.fspath(error.path)
        return {"cause": error.cause, "path": path, "remedy": error.remedy, "lasting": lasting}
    known = isinstance(error, CoaddflowError)
    cause = str(error) if known else f"{type(error).__name__}: {error}"
    return {"cause": cause, "lasting": lasting}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
