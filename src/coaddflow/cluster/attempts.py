"""The history of attempts at jobs, and what the next attempt may ask for.

A job that fails is tried again with the same request, unless its memory or its time was short:
only then it asks for more. Each failure is recorded in the folder of the survey, one small file a
job (`FOLDER`), by the Snakemake that the user started and by nothing else. Jobs read these files,
since they must find the requests that they were submitted with, and so does `coaddflow status`.
Standard library only.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(".snakemake") / "coaddflow" / "attempts"
"""Where the histories are, in the folder of the survey."""

OUT_OF_MEMORY = "out of memory"
TIME_LIMIT = "time limit"
CONTROLLER_AWAY = "controller away"
"""The job could not start its step because the controller was away: this counts as no attempt."""

UNCOUNTED_AT_MOST = 20
"""Attempts in a row that do not count, so that no trouble of a cluster is met for ever."""

KEPT = 50
"""Attempts that are kept of each job."""


class Attempt(NamedTuple):
    """An attempt at a job that failed, or its submission that was refused."""

    when: str
    """Local time at which its end was noticed, ISO 8601."""
    request: str
    """What the user asks for by hand, as `digest_of` has it."""
    run: str
    """Which run of Snakemake made it."""
    system: str
    """"Slurm", "PBS" or "local"."""
    job_id: str
    """Number of the job there; empty if there is none."""
    steps: tuple[str, ...]
    """Rules of its steps."""
    asked: Mapping[str, int]
    """What it asked for: ``mem_mb``, ``runtime`` (minutes), ``cores``."""
    outcome: str
    """How it ended, an outcome of `coaddflow.cluster.history`."""
    words: str
    """The same in the words of the cluster or of the log, one line."""
    needed_mb: int = 0
    """Memory that the job itself said it needs, MB; 0: it said nothing."""
    next: Mapping[str, int] | None = None
    """What the next attempt asks for; None: there is none."""


class Grades(NamedTuple):
    """How much of each resource a step asks for, in units of its first request."""

    memory: int = 1
    time: int = 1
    needed_mb: int = 0
    """The least memory that is of use, MB."""


def key_of(group: str | None, rule: str, wildcards: Iterable[str]) -> str:
    """Return the name of a job in the history: its group, or else its rule and wildcards."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", group or "_".join([rule, *wildcards]))


def digest_of(words: Iterable[str]) -> str:
    """Return a short name for what a user asks for by hand (`--set-resources` and the like).

    What was short under one request says nothing of another one.
    """
    return hashlib.sha256("\n".join(sorted(words)).encode()).hexdigest()[:12]


def histories(folder: str | Path = ".") -> dict[str, list[Attempt]]:
    """Return the recorded attempts at all jobs of a survey, by key."""
    found = {path.stem: _read(path) for path in sorted((Path(folder) / FOLDER).glob("[!.]*.json"))}
    return {key: attempts for key, attempts in found.items() if attempts}


def history(key: str, folder: str | Path = ".") -> list[Attempt]:
    """Return the recorded attempts at one job."""
    return _read(Path(folder) / FOLDER / f"{key}.json")


def record(key: str, attempt: Attempt, folder: str | Path = ".") -> None:
    """Add an attempt to the history of a job.

    Raises
    ------
    OSError
        If the file cannot be written; it is then what it was.
    """
    path = Path(folder) / FOLDER / f"{key}.json"
    kept = [one._asdict() for one in [*_read(path), attempt][-KEPT:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"key": key, "attempts": kept}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def grades(attempts: Iterable[Attempt], step: str, request: str) -> Grades:
    """Return what a step of a job asks for, from how earlier attempts at the job ended.

    Parameters
    ----------
    attempts : iterable of Attempt
        The history of the job.
    step : str
        The rule of the step.
    request : str
        What the user asks for by hand now: attempts under another request do not count.
    """
    ends = [one for one in attempts if one.request == request and step in one.steps]
    return Grades(
        1 + sum(one.outcome == OUT_OF_MEMORY and not one.needed_mb for one in ends),
        1 + sum(one.outcome == TIME_LIMIT for one in ends),
        max((one.needed_mb for one in ends), default=0),
    )


def told(attempt: Attempt) -> str:
    """Return in one line how an attempt ended, and what the next one asks for."""
    number = f" {attempt.job_id}" if attempt.job_id else ""
    what = f"{attempt.system} job{number} ({_amounts(attempt.asked)}) {attempt.outcome}"
    if attempt.words:
        what += f" [{attempt.words}]"
    if attempt.next is None:
        return f"{what}; no further attempt"
    if attempt.next == attempt.asked:
        return f"{what}; the next attempt asks for the same"
    return f"{what}; the next attempt asks for {_amounts(attempt.next)}"


def _amounts(asked: Mapping[str, int]) -> str:
    units = {"mem_mb": "MB", "runtime": "minutes", "cores": "cores"}
    return ", ".join(f"{asked[name]} {unit}" for name, unit in units.items() if name in asked)


def uncounted(attempts: Iterable[Attempt], run: str) -> int:
    """Return how many attempts of a run do not count: the cluster alone was at fault."""
    number = sum(one.outcome == CONTROLLER_AWAY for one in attempts if one.run == run)
    return min(number, UNCOUNTED_AT_MOST)


def _read(path: Path) -> list[Attempt]:
    """Return the attempts of a file; one that is damaged or of another version tells nothing."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["attempts"]
        return [Attempt(**{**row, "steps": tuple(row["steps"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return []
