"""The log of a job: what happened, how it ended, what it cost.

Every script runs inside `job_log`. Whatever happens is in the log file that its rule names: the
messages, warnings and, for what nobody foresaw, the traceback. The last line says how the job
ended, so that one look at the end of a log (`failed_jobs` looks at all of them) tells what failed
and why, on one machine as on a cluster. Standard library only: it is imported before NumPy, which
reads the number of threads when it is loaded.
"""

import contextlib
import logging
import math
import os
import platform
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coaddflow.errors import CoaddflowError, is_lasting
from coaddflow.runtime.allocator import keep_freed_memory
from coaddflow.runtime.parent import ParentWatch
from coaddflow.runtime.threads import THREAD_VARIABLES

FINISHED = "coaddflow: finished in "
FAILED = "coaddflow: failed: "
FOR_GOOD = "coaddflow: another attempt would fail in the same way"
BEGUN = "coaddflow: begun on "
NO_RESULT = "the log has no result line: killed (out of memory or time limit), or still running"
NO_LOG = "the log is empty: the step has not begun, or died at once"

_SECONDS_TO_END = 20.0
"""The longest that the end of a job should take: workers have 5 s to end and 5 s after SIGTERM, MPI
ranks 10 s. Slurm kills a job 30 s after SIGTERM, PBS 10 s after it (`KillWait`, `kill_delay`)."""


@contextlib.contextmanager
def job_log(path: str | Path) -> Iterator[logging.Logger]:
    """Run a block as a job: with a log, and a result line at the end.

    An error that coaddflow raises on purpose ends the process with its one line on standard
    error; any other leaves its traceback in the log. The exit code is 1, or 128 + the signal.
    Numerical libraries that the block imports first have one thread: with more the last bits of
    sums depend on their number. What the job has more cores for it scatters itself.

    Parameters
    ----------
    path : str or Path
        The log file; it is begun anew.

    Yields
    ------
    logging.Logger
        For messages of the job itself.
    """
    for name in THREAD_VARIABLES:
        os.environ[name] = "1"
    keep_freed_memory()
    started = time.monotonic()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    old_level, old_handlers = root.level, root.handlers[:]
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    stop, watch = _Stop(), ParentWatch()
    try:
        stop.listen()
        watch.start()
        _last_line(handler, f"{BEGUN}{platform.node()}{_cluster_job()}")
        # Snakemake's threads start jobs with Ctrl-C held back (workflow/snakemake_patches.py)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        yield logging.getLogger("coaddflow")
        stop.hear_no_more()
        _last_line(handler, f"{FINISHED}{time.monotonic() - started:.1f} s ({_cost()})")
    except BaseException as error:
        stop.hear_no_more()  # the log tells of this error, whoever loses patience meanwhile
        code, reason = _explain(error)
        if not isinstance(error, CoaddflowError):
            root.error("Traceback:\n%s", "".join(traceback.format_exception(error)))
        if is_lasting(error):
            _last_line(handler, FOR_GOOD)
        _last_line(handler, FAILED + reason)
        if not isinstance(error, KeyboardInterrupt):
            print(f"{FAILED}{reason} (log: {path})", file=sys.stderr)
        raise SystemExit(code) from None
    finally:
        watch.stop()
        stop.close()
        logging.captureWarnings(False)
        root.handlers[:] = old_handlers
        root.setLevel(old_level)
        handler.close()


class _Stopped(BaseException):
    """A signal asked the process to end."""


class _Stop:
    """Hears the first signal that asks the job to end; a second does not disturb what it began.

    Whoever presses Ctrl-C twice, or whose batch system sends SIGTERM after it, would otherwise
    break off the removal of unfinished files and the last words of the log. If the end takes too
    long all the same, the next signal is heard.
    """

    def __init__(self) -> None:
        self._deaf_until = -math.inf
        self._mask: set[int] = set()
        self._handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """Raise at SIGTERM and, where Python would, at SIGINT."""
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            numbers.append(signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._raise) for number in numbers}

    def close(self) -> None:
        """Restore handlers, and hold back again what was held back."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def hear_no_more(self) -> None:
        """Let no signal disturb what follows, for as long as it may take."""
        self._deaf_until = time.monotonic() + _SECONDS_TO_END

    def _raise(self, number: int, _frame: object) -> None:
        if time.monotonic() > self._deaf_until:
            self.hear_no_more()
            raise KeyboardInterrupt if number == signal.SIGINT else _Stopped(number)


def _explain(error: BaseException) -> tuple[int, str]:
    """Return exit code and reason (one line) of a job that failed."""
    if isinstance(error, _Stopped):
        name = signal.Signals(error.args[0]).name
        return 128 + error.args[0], f"stopped by {name} (time limit, or cancelled)"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "interrupted"
    if isinstance(error, MemoryError):
        return 1, "out of memory"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return code, f"exit code {error.code}"
    text = str(error) if isinstance(error, CoaddflowError) else f"{type(error).__name__}: {error}"
    return 1, " ".join(text.split())


def _cluster_job(environ: Mapping[str, str] = os.environ) -> str:
    """Return in words which job of a cluster this process is part of, if any."""
    for variable, system in (("PBS_JOBID", "PBS"), ("SLURM_JOB_ID", "Slurm")):
        if environ.get(variable):
            return f", {system} job {environ[variable]}"
    return ""


def _cost() -> str:
    """Return CPU time and peak memory in words: of this process and of workers that have ended."""
    own, workers = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, workers))
    # Linux counts KiB, macOS bytes
    unit = (1 if sys.platform == "darwin" else 1024) / 1e6
    peak = f"{own.ru_maxrss * unit:.0f} MB"
    if workers.ru_maxrss:
        peak += f", of a worker {workers.ru_maxrss * unit:.0f} MB"
    return f"{cpu:.1f} s CPU, {peak}"


def _last_line(handler: logging.FileHandler, line: str) -> None:
    """Write a line as it is; a log that cannot be written must not hide how the job ended."""
    handler.flush()
    with contextlib.suppress(OSError):
        handler.stream.write(line + "\n")
        handler.stream.flush()


@dataclass(frozen=True)
class FailedJob:
    """A job that did not end well: its log, and why."""

    job: str
    reason: str
    log: Path


def failed_jobs(
    folder: str | Path, since: float = 0.0, skipped: Container[str] = ()
) -> list[FailedJob]:
    """Return the jobs whose logs do not end with success.

    Parameters
    ----------
    folder : str or Path
        The folder of all logs; the path of a log below it, without suffix, names its job.
    since : float
        Logs last written before this time (seconds since the epoch) are of earlier runs.
    skipped : container of str
        Folders in it that are not looked into: those of CCDs hold a log for each of the survey.
    """
    folder = Path(folder)
    failed = []
    places = [place for place in folder.glob("*") if place.name not in skipped]
    logs = (place.rglob("*.log") if place.is_dir() else [place] for place in places)
    for log in sorted(log for found in logs for log in found if log.suffix == ".log"):
        if log.stat().st_mtime < since:
            continue
        reason = _failure_of(log)
        if reason:
            job = log.relative_to(folder).with_suffix("").as_posix()
            failed.append(FailedJob(job, reason, log))
    return failed


def failures(logs: Iterable[str | Path], since: float = 0.0) -> list[str]:
    """Return why jobs failed, from their logs; those that ended well say nothing.

    Parameters
    ----------
    logs : iterable of str or Path
        Logs of jobs; those that are not there tell nothing.
    since : float
        Logs last written before this time (seconds since the epoch) are of earlier attempts.
    """
    found = []
    for log in map(Path, logs):
        with contextlib.suppress(OSError):
            if log.stat().st_mtime >= since:
                found.append(_failure_of(log))
    return list(filter(None, found))


def _failure_of(log: Path) -> str:
    """Return why a job failed, from its log; empty if it ended well."""
    last = (_last_lines(log) or [""])[-1]
    if last.startswith(FINISHED):
        return ""
    if last.startswith(FAILED):
        return last.removeprefix(FAILED)
    return NO_RESULT if last else NO_LOG


def failed_for_good(logs: Iterable[str | Path], since: float = 0.0) -> bool:
    """Return whether one of these logs tells of a failure that another attempt cannot mend.

    Parameters
    ----------
    logs : iterable of str or Path
        Logs of jobs; those that are not there tell nothing.
    since : float
        Logs last written before this time (seconds since the epoch) are of earlier runs.
    """
    for log in logs:
        try:
            told = Path(log).stat().st_mtime >= since and FOR_GOOD in _last_lines(Path(log))[-2:-1]
        except OSError:
            continue
        if told:
            return True
    return False


def cluster_job_of(log: str | Path) -> str:
    """Return the number of the cluster's job that wrote a log; empty if it was none."""
    try:
        with Path(log).open(encoding="utf-8", errors="replace") as stream:
            first = stream.readline()
    except OSError:
        return ""
    match = re.match(rf"{BEGUN}.*, (?:PBS|Slurm) job (\S+)$", first)
    return match[1] if match else ""


def failure_table(failed: list[FailedJob], limit: int = 50) -> str:
    """Return a table of failed jobs for people: what, why, and where the log is."""
    width = max((len(item.job) for item in failed[:limit]), default=0)
    lines = []
    for item in failed[:limit]:
        lines.append(f"  {item.job:<{width}}  {item.reason}")
        lines.append(f"  {'':<{width}}  log: {item.log}")
    if len(failed) > limit:
        lines.append(f"  ... and {len(failed) - limit} more")
    return "\n".join(lines)


def _last_lines(path: Path) -> list[str]:
    """Return the last lines of a file that have words, without reading all of it."""
    with path.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(stream.tell() - 4096, 0))
        lines = stream.read().decode("utf-8", errors="replace").splitlines()
    return [line for line in lines if line.strip()]
