"""A fence between two jobs that would make the same products: only the newer one goes on.

A cluster may give up a job that is still alive: a node that is cut off from the controller but
sees the disk. The next job then makes the same products beside it. So each job of an exposure, a
tract or the calibration frames of a CCD writes its name into the token of what it makes when it
begins (`begin`), and looks whether it still stands there before it gives files their final names
or removes some (`check`). If a newer job has taken the token, the older one stops.

A network file system allows no look and rename in one step. On a slow one each look takes as long
as a rename, so there is one for what is renamed together when all of it has been written (the
calexp of a CCD and its sources), and one for some tens of files of an earlier run that a job
removes when it begins. Between look and change there is the time that these few changes take,
instead of the hours for which a forgotten job may run.

A token is a text file with a line for each job that has had it, ``WHEN<tab>JOB``, the newest last.
It is replaced as a whole and read by opening it: a network file system then asks its server,
whereas what it tells of a folder may be a minute old. Standard library only.
"""

import contextlib
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from coaddflow.errors import ReplacedError

FOLDER = Path(".snakemake") / "coaddflow" / "tokens"
"""Where the tokens of a survey are, in its folder."""

VARIABLE = "COADDFLOW_JOB"
"""Variable of the environment in which a Snakemake tells its scripts what job they belong to."""

_NUMBER = re.compile(r"(?P<system>Slurm|PBS) job (?P<number>\d+)")

_REMEMBERED = 100
"""Jobs that a token names at most."""


class Fence(NamedTuple):
    """What a process looks at before it writes: plain values, so that it can be sent to workers."""

    token: str
    """Path of the token."""
    job: str
    """The job that must have it."""


_active: Fence | None = None


def name_job(is_main_process: bool, started: float, environ: Mapping[str, str] = os.environ) -> str:
    """Return the name of the job of which this Snakemake, and all that it starts, is part.

    All steps of a job of a cluster have its name, on whichever of its nodes they run. On one
    machine the job is the run.

    Parameters
    ----------
    is_main_process : bool
        Whether the user has started this Snakemake. It may be inside a job of a cluster, but it is
        not what that job is known for: several runs may follow each other in one allocation.
    started : float
        When this Snakemake began, seconds since the epoch.
    environ : mapping
        The environment.
    """
    if not is_main_process:
        for variable, system in (("PBS_JOBID", "PBS"), ("SLURM_JOB_ID", "Slurm")):
            if environ.get(variable):
                again = environ.get("SLURM_RESTART_COUNT", "0") if system == "Slurm" else "0"
                return f"{system} job {environ[variable]}" + f", start {again}" * (again != "0")
        if environ.get(VARIABLE):
            return environ[VARIABLE]
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started))
    return f"process {os.getpid()} on {platform.node()}, begun {when}"


def fence_of(unit: str, environ: Mapping[str, str] = os.environ) -> Fence:
    """Return the fence of what a job makes, such as ``exposure_1001``.

    Parameters
    ----------
    unit : str
        What the job works on (`workflow.stages.Stage.token`).
    environ : mapping
        The environment, in which the Snakemake that started this process has named its job.
    """
    job = environ.get(VARIABLE) or name_job(True, time.time(), environ)
    return Fence(str(FOLDER / unit), job)


def begin(fence: Fence) -> None:
    """Take a token for a job, unless a newer one has taken it.

    Raises
    ------
    ReplacedError
        If a newer job has it.
    """
    jobs = _jobs(fence)
    if jobs[-1:] == [fence.job]:
        return
    if fence.job in jobs or (jobs and _is_older(fence.job, jobs[-1])):
        raise _replaced(fence, jobs)
    lines = [*_lines(fence), f"{time.strftime('%Y-%m-%dT%H:%M:%S')}\t{fence.job}"]
    path = Path(fence.token)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}")
    try:
        temporary.write_text("\n".join(lines[-_REMEMBERED:]) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_replaced(fence: Fence) -> bool:
    """Return whether a job has had a token that a newer job has now."""
    return fence.job in _jobs(fence)[:-1]


@contextlib.contextmanager
def fenced_by(fence: Fence | None) -> Iterator[None]:
    """Let `check` look at a token in a block, in all threads; None: it looks at nothing.

    What fails in a job that has been replaced may fail because the newer job has removed or not yet
    made a file: the error then is that it has been replaced.
    """
    global _active  # noqa: PLW0603 - a process works for one job at a time
    before, _active = _active, fence
    try:
        yield
    except Exception as error:
        if not isinstance(error, ReplacedError):
            check()
        raise
    finally:
        _active = before


def active_fence() -> Fence | None:
    """Return the fence of this process, for the workers that it starts."""
    return _active


def check() -> None:
    """Look whether the job of this process still has its token; called before each change.

    Raises
    ------
    ReplacedError
        If it has not.
    """
    if _active is None:
        return
    jobs = _jobs(_active)
    if jobs[-1:] != [_active.job]:
        raise _replaced(_active, jobs)


def _is_older(job: str, other: str) -> bool:
    """Return whether a job of a cluster was submitted before another one, by their numbers."""
    found, against = _NUMBER.match(job), _NUMBER.match(other)
    if found is None or against is None or found["system"] != against["system"]:
        return False
    return int(found["number"]) < int(against["number"])


def _replaced(fence: Fence, jobs: list[str]) -> ReplacedError:
    unit = Path(fence.token).name
    if not jobs:
        return ReplacedError(f"{fence.job} stops: its token {fence.token} is gone")
    return ReplacedError(f"{fence.job} stops: {jobs[-1]} works on {unit} now, and has its token")


def _jobs(fence: Fence) -> list[str]:
    """Return the jobs that have had a token, the newest last."""
    return [line.partition("\t")[2] for line in _lines(fence)]


def _lines(fence: Fence) -> list[str]:
    try:
        text = Path(fence.token).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [line for line in text.splitlines() if "\t" in line]
