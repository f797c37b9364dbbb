"""The jobs of a run in the queue of a cluster: which there were, and how they ended.

Nothing extra is kept for it. On Slurm, Snakemake's own logs name what was submitted, and `sacct`,
or where there is no accounting the log of the job, tells how it ended. On PBS it is the ledger of
profiles/pbs. Standard library only.
"""

import contextlib
import json
import os
import pwd
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

Outcome = Literal[
    "done",
    "live",
    "cancelled",
    "preempted",
    "out of memory",
    "time limit",
    "node failed",
    "never runs",
    "failed",
    "unknown",
]

EXPLANATIONS: dict[Outcome, str] = {
    "live": "is still in the queue; wait for it",
    "cancelled": "was cancelled by hand (scancel, qdel, Ctrl-C); run again",
    "preempted": "had to make room for others' jobs; run again, or take a partition without that",
    "out of memory": "was killed, most likely for want of memory; run again, with more if it has "
    "been tried often enough: --set-resources {rule}:mem_mb=N",
    "time limit": "was killed at its time limit; run again, with more if it has been tried often "
    "enough: --set-resources {rule}:runtime=MINUTES",
    "node failed": "was lost with its node; run again",
    "never runs": "asks for more than any node has, or than the partition or your account allows; "
    "cancel it, and give fewer --cores, less memory or less time: "
    "--set-resources {rule}:runtime=MINUTES",
    "failed": "failed; what its steps say comes first",
    "unknown": "did not end well, and nothing tells why; look at its log, or run again",
}
"""What became of a job, and what to do about it. ``{rule}`` is the rule that needs most."""

_HEAVIEST = (
    (r"^exposure_.*_calibrated_exposure(_|$)", "calibrated_exposure"),
    (r"^exposure_.*_exposure(_|$)", "exposure"),
    (r"^exposure_.*_calibrated(_|$)", "calibrated"),
    (r"^exposure_", "calexp"),
    (r"^tract_.*_tract(?!_corners)(_|$)", "tract"),
    (r"^tract_", "coadd"),
    (r"^calibs_", "master_flat"),
)
"""The rule that needs most in a job, by the name that Snakemake gives the job."""

_SUBMITTED = re.compile(r"has been submitted with SLURM jobid (\d+) \(log: (.*)\)\.")

_UNIT = re.compile(
    r"(?P<unit>exposure_.+?)(?:_calexp|_calibrated|_exposure|_manifest)*$"
    r"|(?P<tract>tract_[0-9]+)(?:_\D.*)?$"
    r"|(?P<calibs>calibs_[0-9]+)(?:_\D.*)?$"
)

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
"""Why Slurm does not start a job, where waiting does not help."""

_IDS_AT_ONCE = 500
"""Jobs that sacct is asked for at a time: a line of arguments is not as long as one likes."""

_WORDS: tuple[tuple[Outcome, str], ...] = (
    ("never runs", r"can never run"),
    (
        "out of memory",
        r"oom.?kill|out of memory|exceeded (job |step )?memory limit|mem \S* ?exceeded"
        r"|exceeded resource v?mem",
    ),
    ("time limit", r"due to time limit|walltime \S* ?exceeded|exceeded resource walltime"),
    ("node failed", r"due to node failure|its node was lost"),
    ("cancelled", r"cancelled at|terminated by|deleted|job killed by"),
    # the kernel, or a Slurm without confinement, says no more
    ("out of memory", r"task \S+ Killed|exit (code|status) (137|265)\b"),
)


class ClusterJob(NamedTuple):
    """A job of a cluster.

    Attributes
    ----------
    system : {"Slurm", "PBS"}
        Who ran it.
    job_id : str
        Its number there.
    name : str
        How Snakemake calls it: the group with its rules, or the rule with its wildcards.
    outcome : str
        How it ended, a key of `EXPLANATIONS` or "done".
    words : str
        The same as the cluster says it.
    log : str
        What the job printed.
    """

    system: Literal["Slurm", "PBS"]
    job_id: str
    name: str
    outcome: Outcome
    words: str
    log: str

    @property
    def unit(self) -> str:
        """What it was for: ``exposure_1001``, ``tract_0``, ``calibs_3``, or a rule."""
        return unit_of(self.name)

    @property
    def explanation(self) -> str:
        """What became of the job and what to do, in one sentence."""
        rules = (rule for pattern, rule in _HEAVIEST if re.search(pattern, self.name))
        text = EXPLANATIONS.get(self.outcome, "").format(rule=next(rules, self.name))
        return f"{self.system} job {self.job_id} {text} ({self.words})"


def latest_jobs(
    folder: str | Path, since: float = 0.0, wanted: Callable[[str], bool] = bool
) -> dict[str, ClusterJob]:
    """Return the last job of every exposure, tract and CCD that was submitted from a folder.

    Parameters
    ----------
    folder : str or Path
        The working folder of the survey.
    since : float
        Runs that ended before this time (seconds since the epoch) are left out.
    wanted : callable, optional
        Whether Slurm shall be asked for the job of an exposure, tract or CCD; by default for all.
    """
    folder = Path(folder)
    latest = {job.unit: job for job in _pbs_jobs(folder / ".snakemake/coaddflow/pbs", since)}
    submitted = {
        unit: job
        for unit, job in _slurm_submissions(folder / ".snakemake/log", since).items()
        if wanted(unit)
    }
    states = _slurm_states(job_id for job_id, _ in submitted.values())
    for unit, (job_id, log) in submitted.items():
        outcome, words = _slurm_outcome(*states.get(job_id, ("", "")), Path(log))
        latest[unit] = ClusterJob("Slurm", job_id, _name_of_log(Path(log)), outcome, words, log)
    return latest


def unit_of(name: str) -> str:
    """Return what a job is for, from the name that Snakemake gives it."""
    match = _UNIT.fullmatch(name)
    return next(part for part in match.groups() if part) if match else name


def _outcome_from_words(text: str) -> Outcome:
    for outcome, pattern in _WORDS:
        if re.search(pattern, text, re.IGNORECASE):
            return outcome
    return "failed"


# ---------------------------------------------------------------------------------------------
# Slurm
# ---------------------------------------------------------------------------------------------


def _slurm_submissions(logs: Path, since: float) -> dict[str, tuple[str, str]]:
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
                    found[unit_of(_name_of_log(Path(log)))] = (job_id, log)
    return found


def _name_of_log(log: Path) -> str:
    """Return how Snakemake calls a job, from its log ``.../group_NAME/[wildcards/]ID.log``."""
    for part in reversed(log.parts[:-1]):
        kind, _, name = part.partition("_")
        if kind == "group" and name:
            return name
        if kind == "rule" and name:
            wildcards = log.parts[log.parts.index(part) + 1 : -1]
            return "_".join([name, *wildcards])
    return log.stem


def _slurm_states(job_ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return state and reason of jobs as Slurm says them; empty if it says nothing.

    The accounting knows all jobs, but learns late; the controller knows the last ones at once.
    """
    job_ids = list(job_ids)
    if not job_ids:
        return {}
    found: dict[str, tuple[str, str]] = {}
    for first in range(0, len(job_ids), _IDS_AT_ONCE):
        some = ",".join(job_ids[first : first + _IDS_AT_ONCE])
        found |= _rows_of(["sacct", "-X", "-n", "-P", "-j", some, "--format", "JobIDRaw,State"])
    # all of the user's: one that it does not know any more would be an error
    return found | _rows_of(["squeue", "--me", "--states", "all", "--noheader", "-o", "%i|%T|%r"])


def _rows_of(command: list[str]) -> dict[str, tuple[str, str]]:
    """Return the lines ``ID|STATE|REASON`` of a command of Slurm; empty if it fails."""
    environ = {name: text for name, text in os.environ.items() if not name.startswith("SQUEUE_")}
    try:
        done = subprocess.run(  # noqa: S603 - a list, no shell
            command, capture_output=True, text=True, check=True, timeout=30, env=environ
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = (line.strip().split("|") for line in done.stdout.splitlines())
    return {row[0]: (row[1], *row[2:], "")[:2] for row in rows if len(row) in (2, 3)}


def _slurm_outcome(state: str, reason: str, log: Path) -> tuple[Outcome, str]:
    """Return how a job ended, and in Slurm's words, from its state and what is in its log."""
    if state == "PENDING" and _NEVER_RUNS.search(reason):
        return "never runs", f"{state}: {reason}"
    outcome = _SLURM_OUTCOMES.get(state.partition(" ")[0], "unknown")
    # a step that is killed for its memory may count as failed, or as cancelled
    if outcome in ("failed", "unknown", "cancelled"):
        said = _slurm_words(log)
        if said:
            return _outcome_from_words(said), f"{state}: {said}" if state else said
    return outcome, state or "Slurm's accounting says nothing about it"


def _slurm_words(log: Path) -> str:
    """Return what Slurm itself has written into the log of a job."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    said = [line for line in lines if line.startswith(("slurmstepd", "srun: error:"))]
    telling = [line for line in said if _outcome_from_words(line) != "failed"]
    return next(iter([*telling, *said]), "").strip()


# ---------------------------------------------------------------------------------------------
# PBS
# ---------------------------------------------------------------------------------------------


def _pbs_jobs(folder: Path, since: float) -> list[ClusterJob]:
    """Return the jobs in the ledger of profiles/pbs, those that live last."""
    found = []
    with contextlib.suppress(OSError):
        for line in (folder / "ended.tsv").read_text(encoding="utf-8").splitlines():
            when, job_id, name, outcome, reason, *rules = [*line.split("\t"), "", "", "", "", ""]
            if _seconds(when) < since:
                continue
            log = re.search(r"\(log: ([^)]*)\)", reason)
            words = reason.partition(" (log: ")[0].removeprefix(f"{name}: ")
            how = "done" if outcome == "success" else _outcome_from_words(words)
            name = _with_rules(name, rules)
            found.append(ClusterJob("PBS", job_id, name, how, words, log[1] if log else ""))
    return [*found, *_pbs_jobs_not_seen_to_end(folder)]


def _pbs_jobs_not_seen_to_end(folder: Path) -> list[ClusterJob]:
    """Return the jobs that no Snakemake has seen to end: they live, or none has looked since."""
    found = []
    ids = sorted(folder.glob("ids/[!.]*"))
    queue = _pbs_queue() if ids else None
    for path in ids:
        with contextlib.suppress(OSError):
            label = path.read_text(encoding="utf-8").strip()
            name, log = label.rpartition(".")[0], f"logs/pbs/{label}.out"
            how, words = _pbs_outcome(folder, path.name, label, queue)
            name = _with_rules(name, _pbs_rules(folder / "jobs" / f"{label}.json"))
            found.append(ClusterJob("PBS", path.name, name, how, words, log))
    return found


def _with_rules(name: str, rules: Iterable[str]) -> str:
    """Return the name of a job of PBS as Snakemake has it elsewhere: with its rules."""
    with_rules = "_".join([name, *filter(None, rules)])
    return with_rules if unit_of(with_rules) == unit_of(name) else name


def _pbs_rules(facts: Path) -> list[str]:
    """Return the rules of a job from what the ledger says that it works on."""
    try:
        targets = json.loads(facts.read_text(encoding="utf-8"))["targets"]
        return sorted({target.partition(":")[0] for target in targets})
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _pbs_queue() -> set[str] | None:
    """Return the numbers of the user's jobs in the queue of PBS; None if it gives no answer."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
        done = subprocess.run(  # noqa: S603 - a list, no shell
            ["qstat", "-u", user],  # noqa: S607 - of the user's PATH
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (KeyError, OSError, subprocess.SubprocessError):
        return None
    # id, user, ..., state, time
    rows = [line.split() for line in done.stdout.splitlines() if line[:1].isdigit()]
    return {row[0].partition(".")[0] for row in rows if row[-2:-1] not in (["F"], ["C"], ["X"])}


def _pbs_outcome(
    folder: Path, job_id: str, label: str, queue: set[str] | None
) -> tuple[Outcome, str]:
    """Return what became of a job that no Snakemake has seen to end."""
    try:
        code = (folder / "exit" / label).read_text(encoding="ascii").strip()
    except OSError:
        if (folder / "cancelled" / job_id).exists():
            return "cancelled", "when Snakemake was interrupted, or by cancel.py"
        if queue is None:
            seen = time.strftime("%Y-%m-%d %H:%M", time.localtime(_pbs_last_asked(folder, job_id)))
            return "live", f"at {seen}; PBS gives no answer now: qstat {job_id}"
        if job_id.partition(".")[0] in queue:
            return "live", "PBS has it"
        words = "PBS does not know the job any more: killed, or its node was lost"
        return _outcome_from_words(words), words
    return ("done", "") if code == "0" else ("failed", f"exit code {code}")


def _pbs_last_asked(folder: Path, job_id: str) -> float:
    """Return when PBS was last asked about its jobs, or when a job was submitted if not since."""
    submitted = (folder / "ids" / job_id).stat().st_mtime
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        answer = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        return max(submitted, float(answer["asked"]))
    return submitted


def _seconds(when: str) -> float:
    """Return a local time of the ledger in seconds since the epoch."""
    try:
        return time.mktime(time.strptime(when, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return 0.0
