"""The jobs of a survey in the queue of a cluster, and how they ended.

Nothing is recorded for this. On Slurm, the logs of Snakemake name what was submitted, and `sacct`,
or without accounting the log of the job, says how it ended. On PBS, `cluster.pbs.records` know it.
"""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from coaddflow.cluster.pbs import outcome as pbs_outcome
from coaddflow.cluster.pbs import records, server
from coaddflow.cluster.pbs.server import ServerJob
from coaddflow.cluster.slurm import output_of

Outcome = Literal[
    "done",
    "live",
    "cancelled",
    "preempted",
    "out of memory",
    "time limit",
    "node failed",
    "never runs",
    "refused",
    "held",
    "replaced",
    "controller away",
    "killed",
    "failed",
    "unknown",
]

EXPLANATIONS: dict[Outcome, str] = {
    "live": "is still in the queue or running: wait for it",
    "cancelled": "was cancelled by hand (scancel, qdel or Ctrl-C): run the same command again",
    "preempted": "was preempted by jobs of higher priority: run the same command again, or choose "
    "a partition without preemption",
    "out of memory": "probably ran out of memory: run the same command again; if it fails again "
    "after all retries, add --set-resources {rule}:mem_mb=MEGABYTES with more memory",
    "time limit": "was killed at its time limit: run the same command again; if it fails again "
    "after all retries, add --set-resources {rule}:runtime=MINUTES with more time",
    "node failed": "was lost when its node failed: run the same command again",
    "never runs": "can never start, because it asks for more than a node has, or than the "
    "partition or your account allows: cancel it, and run again with fewer --cores, less memory "
    "(--set-resources {rule}:mem_mb=MEGABYTES) or less time "
    "(--set-resources {rule}:runtime=MINUTES)",
    "refused": "was not accepted by the queue system: ask for what its message allows "
    "(--set-resources {rule}:mem_mb=MEGABYTES {rule}:runtime=MINUTES, fewer --cores, or another "
    "partition or queue)",
    "held": "will not start by itself: release it (qrls), or cancel it (cancel.py) and run again",
    "replaced": "was deleted by coaddflow in favour of a job that does what is wanted now: run the "
    "same command again if that is not in the queue",
    "controller away": "could not start its step while the controller of Slurm was away: run the "
    "same command again",
    "killed": "was killed, and not for its memory: run the same command again",
    "failed": "failed: the errors of its steps say why, or else its log",
    "unknown": "is gone, and nothing says how it ended: look at its log, or run the same command "
    "again",
}
"""What became of a job and what to do, in one sentence. ``{rule}`` is the rule that needs most."""

_SUBMITTED = re.compile(r"has been submitted with SLURM jobid (\d+) \(log: (.*)\)\.")

_SLURM_OUTCOMES: dict[str, Outcome] = {
    "COMPLETED": "done",
    "CANCELLED": "cancelled",
    "PREEMPTED": "preempted",
    "OUT_OF_MEMORY": "out of memory",
    "TIMEOUT": "time limit",
    "DEADLINE": "time limit",
    "NODE_FAIL": "node failed",
    "BOOT_FAIL": "node failed",
    "FAILED": "failed",
    **dict.fromkeys(
        ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"), "live"
    ),
}

_NEVER_RUNS = re.compile(
    r"PartitionTimeLimit|PartitionNodeLimit|BadConstraints|QOSMax\w*Per(Job|Node)"
    r"|AssocMax\w*PerJob"
)
"""Reasons of Slurm for which a job never starts."""

_IDS_AT_ONCE = 500
"""Jobs that sacct is asked for at a time, because command lines have a limited length."""

_KILLED = r"task \S+ Killed|exit (code|status) (137|265)\b|Signals\.SIGKILL"
"""What is said of a process that was killed, whoever did it."""

_WORDS: tuple[tuple[Outcome, str], ...] = (
    ("never runs", r"can never run"),
    (
        "out of memory",
        r"oom.?kill|out of memory|exceeded (job |step )?memory limit|mem \S* ?exceeded"
        r"|exceeded resource v?mem",
    ),
    ("time limit", r"due to time limit|walltime \S* ?exceeded|exceeded resource walltime"),
    ("node failed", r"due to node failure|its node was lost"),
    ("replaced", re.escape(pbs_outcome.REPLACED)),
    ("cancelled", r"cancelled at|terminated by|deleted|job killed by"),
    (
        "controller away",
        r"(unable to|contact).* slurm controller|socket timed out on send/recv",
    ),
    # the kernel, or Slurm without confinement, says only this
    ("out of memory", _KILLED),
    ("unknown", f"{pbs_outcome.GONE}|{pbs_outcome.NO_CODE}"),
)


_KILLED_STEP = re.compile(r"exit status 137\b|Signals\.SIGKILL")
"""What the Snakemake in a job says of a step that was killed."""

_STATE = re.compile(r"status is: '(\w+)")
"""State of a job in the executor's message."""

_WILL_NOT_BE_ACCEPTED = re.compile(
    r"node configuration is not available|can ?not be satisfied|time limit is invalid"
    r"|invalid (account|partition|qos)|more processors requested than permitted"
    # qsub, and coaddflow of what no node of PBS has
    r"|unknown queue|violates queue|unauthorized|illegal|asks for \d+ (MB|cores|minutes), and",
    re.IGNORECASE,
)
"""What sbatch says about a request that it will refuse the next time, too."""


class JobNames:
    """How the jobs of a cluster are called: by their group, then by the rules of their steps.

    Parameters
    ----------
    rules : mapping of str to sequence of str
        The rules of each group, ``exposure_{exposure}``, that which needs most before the others.
    """

    def __init__(self, rules: Mapping[str, Sequence[str]]):
        self._rules, patterns = {}, []
        for group, names in rules.items():
            prefix, _, wildcard = group.partition("{")
            longest_first = "|".join(sorted(names, key=len, reverse=True))
            # an exposure is called what its observer likes; a band may follow the number of a tract
            unit = ".+?" if wildcard == "exposure}" else "[0-9]+"
            rest = rf"(?:_(?:{longest_first}))*" if wildcard == "exposure}" else r"(?:_\D.*)?"
            patterns.append(rf"(?P<{prefix}>{prefix}{unit}){rest}")
            self._rules[prefix] = (names, re.compile(rf"_({longest_first})(?=_|$)"))
        self._pattern = re.compile("|".join(patterns))

    def unit(self, name: str) -> str:
        """Return what a job works on: ``exposure_1001``, ``tract_0``, ``calibs_3``, or a rule."""
        match = self._pattern.fullmatch(name)
        return match[match.lastgroup] if match else name

    def heaviest(self, name: str) -> str:
        """Return the rule of a job that needs most."""
        match = self._pattern.fullmatch(name)
        if not match:
            return name
        names, pattern = self._rules[match.lastgroup]
        steps = pattern.findall(name[match.end(match.lastgroup) :])
        return next((rule for rule in names if rule in steps), names[0])


class ClusterJob(NamedTuple):
    """A job of a cluster."""

    system: Literal["Slurm", "PBS"]
    """The queue system."""
    job_id: str
    """Its number there."""
    name: str
    """Its name in Snakemake: the group with its rules, or the rule with its wildcards."""
    outcome: Outcome
    """How it ended, a key of `EXPLANATIONS` or "done"."""
    words: str
    """How it ended, in the words of the cluster."""
    log: str
    """The log of the job."""
    names: JobNames
    """How the jobs are called."""

    @property
    def unit(self) -> str:
        """What it works on: ``exposure_1001``, ``tract_0``, ``calibs_3``, or a rule."""
        return self.names.unit(self.name)

    @property
    def explanation(self) -> str:
        """What became of the job and what to do, in one sentence."""
        rule = self.names.heaviest(self.name)
        text = EXPLANATIONS.get(self.outcome, "").format(rule=rule)
        return f"{self.system} job {self.job_id} {text} ({self.words})"


def latest_jobs(
    folder: str | Path, names: JobNames, since: float = 0.0, wanted: Callable[[str], bool] = bool
) -> dict[str, ClusterJob]:
    """Return the last job of every exposure, tract and CCD that was submitted from a folder.

    Parameters
    ----------
    folder : str or Path
        The working folder of the survey.
    names : JobNames
        How the jobs are called (`workflow.stages.job_names`).
    since : float
        Runs that ended before this time are left out; seconds since the epoch.
    wanted : callable, optional
        Whether Slurm is to be asked for the job of an exposure, tract or CCD; by default for all.
    """
    folder = Path(folder)
    latest = {job.unit: job for job in _pbs_jobs(folder / records.FOLDER, names, since)}
    submitted = {
        unit: job
        for unit, job in _slurm_submissions(folder / ".snakemake/log", names, since).items()
        if wanted(unit)
    }
    states = _slurm_states(job_id for job_id, _ in submitted.values())
    for unit, (job_id, log) in submitted.items():
        outcome, words = _slurm_outcome(*states.get(job_id, ("", "")), Path(log))
        name = _name_of_log(Path(log))
        latest[unit] = ClusterJob("Slurm", job_id, name, outcome, words, log, names)
    return latest


def _outcome_from_words(text: str) -> Outcome:
    found = (outcome for outcome, words in _WORDS if re.search(words, text, re.IGNORECASE))
    return next(found, "failed")


# ---------------------------------------------------------------------------------------------
# One job that has just ended
# ---------------------------------------------------------------------------------------------


def end_of_slurm_job(job_id: str, message: str, log: str | Path) -> tuple[Outcome, str]:
    """Return how a job ended that the executor for Slurm gives up, also in Slurm's words.

    Parameters
    ----------
    job_id : str
        Its number; empty if its submission was refused.
    message : str
        What the executor says.
    log : path
        The log of the job.
    """
    if not job_id:
        match = re.search(r"error message was '(.*?)'\.?$", message, re.MULTILINE | re.DOTALL)
        return "refused", " ".join((match[1] if match else message).split())
    match = _STATE.search(message)
    state, reason = (match[1], "") if match else _slurm_states([job_id]).get(job_id, ("", ""))
    return _slurm_outcome(state, reason, Path(log))


def end_of_pbs_job(job_id: str, name: str, folder: str | Path = ".") -> tuple[Outcome, str]:
    """Return how a job ended by the records of PBS, also in their words.

    Parameters
    ----------
    job_id : str
        Its number; empty if its submission was refused.
    name : str
        Its name in the queue.
    folder : path
        The working folder of the survey.
    """
    for line in reversed(records.read(Path(folder) / records.FOLDER / "ended.tsv").splitlines()):
        _, found, label, outcome, reason, *_ = [*line.split("\t"), "", "", "", "", ""]
        if found != job_id or (not job_id and label != name):
            continue
        words = reason.partition(" (log: ")[0].removeprefix(f"{label}: ")
        return _pbs_end(outcome, words), words
    return ("unknown", "") if job_id else ("refused", "")


def _pbs_end(outcome: str, words: str) -> Outcome:
    """Return how a job ended that has not succeeded, by its row in the records of PBS."""
    return "refused" if outcome == "refused" else _outcome_from_words(words)


def will_be_refused(words: str) -> bool:
    """Return whether a queue system that refused a job would refuse the same request again."""
    return _WILL_NOT_BE_ACCEPTED.search(words) is not None


# ---------------------------------------------------------------------------------------------
# Slurm
# ---------------------------------------------------------------------------------------------


def _slurm_submissions(logs: Path, names: JobNames, since: float) -> dict[str, tuple[str, str]]:
    """Return number and log of the last job of each unit, from the logs of Snakemake."""
    found: dict[str, tuple[str, str]] = {}
    for path in sorted(logs.glob("*.snakemake.log")):
        if path.stat().st_mtime < since:
            continue
        with path.open(encoding="utf-8", errors="replace") as stream:
            for line in stream:
                match = _SUBMITTED.search(line)
                if match:
                    job_id, log = match.groups()
                    found[names.unit(_name_of_log(Path(log)))] = (job_id, log)
    return found


def _name_of_log(log: Path) -> str:
    """Return the name of a job, from its log ``.../group_NAME/[wildcards/]ID.log``."""
    for part in reversed(log.parts[:-1]):
        kind, _, name = part.partition("_")
        if kind == "group" and name:
            return name
        if kind == "rule" and name:
            wildcards = log.parts[log.parts.index(part) + 1 : -1]
            return "_".join([name, *wildcards])
    return log.stem


def _slurm_states(job_ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return state and reason of jobs in Slurm's words; empty if it says nothing.

    The accounting knows all jobs, but learns late; the controller knows recent ones at once.
    """
    job_ids = list(job_ids)
    if not job_ids:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for first in range(0, len(job_ids), _IDS_AT_ONCE):
        some = ",".join(job_ids[first : first + _IDS_AT_ONCE])
        found |= _rows_of(["sacct", "-X", "-n", "-P", "-j", some, "--format", "JobIDRaw,State"])
    # all jobs of the user: asked for single jobs, squeue fails if it has forgotten one
    return found | _rows_of(["squeue", "--me", "--states", "all", "--noheader", "-o", "%i|%T|%r"])


def _rows_of(command: list[str]) -> dict[str, tuple[str, str]]:
    """Return the lines ``ID|STATE|REASON`` of a command of Slurm; empty if it fails."""
    try:
        text = output_of(command, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = (line.strip().split("|") for line in text.splitlines())
    return {row[0]: (row[1], *row[2:], "")[:2] for row in rows if len(row) in (2, 3)}


def _slurm_outcome(state: str, reason: str, log: Path) -> tuple[Outcome, str]:
    """Return how a job ended, also in Slurm's words, from its state and its log."""
    if state == "PENDING" and _NEVER_RUNS.search(reason):
        return "never runs", f"{state}: {reason}"
    outcome = _SLURM_OUTCOMES.get(state.partition(" ")[0], "unknown")
    # a step that is killed for its memory may be reported as failed or cancelled
    if outcome in ("failed", "unknown", "cancelled"):
        said = _slurm_words(log)
        # scancel kills, too
        if said and not (outcome == "cancelled" and re.search(_KILLED, said, re.IGNORECASE)):
            return _outcome_from_words(said), f"{state}: {said}" if state else said
    return outcome, state or "Slurm's accounting says nothing about it"


def _slurm_words(log: Path) -> str:
    """Return the most telling line about the end of a job in its log.

    Slurm writes some, and the Snakemake in the job says when a step was killed.
    """
    lines = records.read(log).splitlines()
    said = [line for line in lines if line.startswith(("slurmstepd", "srun: error:"))]
    said += [line for line in lines if _KILLED_STEP.search(line)]
    order = [words for _, words in _WORDS]

    def rank(line: str) -> int:
        found = (i for i, words in enumerate(order) if re.search(words, line, re.IGNORECASE))
        return next(found, len(order))

    return min(said, key=rank, default="").strip()


# ---------------------------------------------------------------------------------------------
# PBS
# ---------------------------------------------------------------------------------------------


def _pbs_jobs(folder: Path, names: JobNames, since: float) -> list[ClusterJob]:
    """Return the jobs that the programs of profiles/pbs have recorded, live ones last."""
    found = []
    begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since))
    for line in records.read(folder / "ended.tsv").splitlines():
        when, job_id, name, outcome, reason, *rules = [*line.split("\t"), "", "", "", "", ""]
        if when < begin:
            continue
        log = re.search(r"\(log: ([^)]*)\)", reason)
        words = reason.partition(" (log: ")[0].removeprefix(f"{name}: ")
        how = "done" if outcome == "success" else _pbs_end(outcome, words)
        name = _with_rules(name, rules, names)
        found.append(ClusterJob("PBS", job_id, name, how, words, log[1] if log else "", names))
    return [*found, *_pbs_jobs_not_seen_to_end(folder, names)]


def _pbs_jobs_not_seen_to_end(folder: Path, names: JobNames) -> list[ClusterJob]:
    """Return the jobs that are live, or ended since a Snakemake last looked."""
    found = []
    ids = sorted(folder.glob("ids/[!.]*"))
    queue = _pbs_queue([path.name for path in ids]) if ids else None
    for path in ids:
        with contextlib.suppress(OSError):
            label = path.read_text(encoding="utf-8").strip()
            how, words = _pbs_outcome(folder, path.name, label, queue)
            name = _with_rules(records.name_of(label), _pbs_rules(folder, label), names)
            log = str(records.log_of(label))
            found.append(ClusterJob("PBS", path.name, name, how, words, log, names))
    return found


def _with_rules(name: str, rules: Iterable[str], names: JobNames) -> str:
    """Return the name of a PBS job with its rules, as Snakemake has it on Slurm."""
    with_rules = "_".join([name, *filter(None, rules)])
    return with_rules if names.unit(with_rules) == names.unit(name) else name


def _pbs_rules(folder: Path, label: str) -> list[str]:
    """Return the rules of a job that has not been seen to end."""
    try:
        targets = json.loads(records.read(folder / "jobs" / f"{label}.json"))["targets"]
        return sorted({target.partition(":")[0] for target in targets})
    except (ValueError, TypeError, KeyError):
        return []


def _pbs_queue(job_ids: list[str]) -> dict[str, ServerJob] | None:
    """Return what PBS says of jobs, by their number; None if it gives no answer."""
    try:
        jobs, _ = server.ask(job_ids)
    except (server.ServerAwayError, OSError):
        return None
    return {job_id.partition(".")[0]: job for job_id, job in jobs.items()}


def _pbs_outcome(
    folder: Path, job_id: str, label: str, queue: dict[str, ServerJob] | None
) -> tuple[Outcome, str]:
    """Return what became of a job that has not been seen to end."""
    code = records.read(folder / "exit" / label).strip()
    if code:
        return ("done", "") if code == "0" else ("failed", f"exit code {code}")
    path = folder / "cancelled" / job_id
    if path.exists():
        deleted = records.read(path) or pbs_outcome.CANCELLED
        return _outcome_from_words(deleted), deleted
    if queue is None:
        seen = time.strftime("%Y-%m-%d %H:%M", time.localtime(_pbs_last_asked(folder, job_id)))
        return "live", f"at {seen}; PBS does not answer now: qstat {job_id}"
    return _pbs_outcome_in_queue(queue.get(job_id.partition(".")[0]), label, folder)


def _pbs_outcome_in_queue(job: ServerJob | None, label: str, folder: Path) -> tuple[Outcome, str]:
    """Return what became of a job without exit code, by what PBS says of it."""
    if job is None or (job.state in server.FINISHED_STATES and job.exit_status is None):
        words = f"{pbs_outcome.GONE}: {pbs_outcome.LIKELY}"
        return _outcome_from_words(words), words
    if job.state in server.FINISHED_STATES or server.never_runs(job):
        word, words, _ = pbs_outcome.end_of(job)
        return "done" if word == "success" else _outcome_from_words(words), words
    too_much = pbs_outcome.is_too_large(label, folder) if job.state == "Q" else ""
    if too_much:
        return "never runs", f"it {too_much}"
    waits = pbs_outcome.waits(job)
    return "held" if job.state == "H" else "live", waits or "it is running"


def _pbs_last_asked(folder: Path, job_id: str) -> float:
    """Return when PBS was last asked about its jobs, or when a job was submitted, if later."""
    submitted = (folder / "ids" / job_id).stat().st_mtime
    with contextlib.suppress(ValueError, TypeError, KeyError):
        answer = json.loads(records.read(folder / "answer.json"))
        return max(submitted, float(answer["asked"]))
    return submitted
