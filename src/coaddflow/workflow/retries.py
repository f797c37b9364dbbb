"""Retries: a job that failed asks for more of what was short, and of nothing else.

What Snakemake calls ``attempt`` counts all failures. Here the memory of a step is that of its first
request times 1 + the attempts that ran out of memory, and its time limit likewise
(`coaddflow.cluster.attempts` keeps the history). Nothing asks for more than a node has or the
partition allows. The replacements in `coaddflow.workflow.snakemake_patches` call what stands here,
for all executors, in the run of the user and in the jobs of a cluster.
"""

import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from snakemake.resources import Resource

from coaddflow.cluster import attempts, history
from coaddflow.cluster.attempts import Attempt
from coaddflow.cluster.limits import NO_LIMITS, Limits, ask_again, pbs_limits, slurm_limits
from coaddflow.errors import InputError
from coaddflow.runtime import log as joblog
from coaddflow.runtime.resources import TIME_MARGIN

MEMORY = ("mem_mb", "mem_mb_per_cpu")
"""Resources that grow when memory was short."""

_NEEDED = re.compile(r"\bneed (\d+) MB\b")
"""What a job says that has less memory than is of any use."""

_MEMORY_SHORT = re.compile(rf"out of memory|MemoryError|{_NEEDED.pattern}")
"""Result lines of jobs whose memory was short."""

Amounts = Mapping[str, int]
"""Memory (``mem_mb``), time limit in minutes (``runtime``) and ``cores``."""


class Retries:
    """The attempts of a run, and what its jobs ask for.

    Parameters
    ----------
    since : float
        When the run began, seconds since the epoch.
    folder : path
        The folder of the survey.
    """

    def __init__(self, since: float, folder: str | Path = "."):
        self.run = time.strftime("%Y%m%d-%H%M%S", time.localtime(since))
        self.too_large: dict[str, str] = {}
        """Jobs whose first request no node can meet, and what they need that is not there."""
        self._since, self._folder = since, folder
        self._histories: dict[str, list[Attempt]] = {}
        self._last: set[str] = set()
        self._kills = oom_kills()

    def history(self, key: str) -> list[Attempt]:
        """Return the recorded attempts at a job; its file is read once."""
        if key not in self._histories:
            self._histories[key] = attempts.history(key, self._folder)
        return self._histories[key]

    def left(self, job: Any) -> int:
        """Return how often a job (of Snakemake) may be repeated."""
        key = key_of(job)
        if key in self._last or joblog.failed_for_good(_logs_of(job), self._since):
            return 0
        most = max(one.rule.restart_times for one in jobs_of(job))
        return most + attempts.uncounted(self.history(key), self.run)

    # ------------------------------------------------------------------------------------------
    # What a step and a job ask for
    # ------------------------------------------------------------------------------------------

    def resources(
        self, rule: Any, wildcards: Mapping[str, str], attempt: int, evaluate: Callable[[int], Any]
    ) -> Any:
        """Return the resources of a step, with more of what was short.

        Parameters
        ----------
        rule : snakemake.rules.Rule
            The rule of the step.
        wildcards : mapping of str to str
            Its wildcards.
        attempt : int
            The attempt, as Snakemake counts.
        evaluate : callable
            Evaluates the resources of the rule for an attempt.
        """
        key = attempts.key_of(rule.expand_group(wildcards), rule.name, wildcards.values())
        found = self.history(key)
        request = request_of(rule.workflow) if found else ""
        grades = attempts.grades(found, rule.name, request)
        by_attempt = {n: evaluate(n) for n in {1, attempt, grades.memory, grades.time}}
        asked = dict(by_attempt[attempt].items())
        changed, first = dict(asked), by_attempt[1]
        grade_of = {**dict.fromkeys(MEMORY, grades.memory), "runtime": grades.time}
        for name, grade in grade_of.items():
            if isinstance(asked.get(name), int):
                amount = by_attempt[grade].get(name)
                # one that does not depend on the attempt is multiplied
                changed[name] = grade * amount if amount == first.get(name) else amount
        if grades.needed_mb and isinstance(asked.get("mem_mb"), int):
            changed["mem_mb"] = max(changed["mem_mb"], grades.memory * grades.needed_mb)
        self._cap(key, rule, changed, first)
        if changed == asked:
            return by_attempt[attempt]
        if "mem_mb" in changed:  # the same in other units
            memory = Resource("mem_mb", changed["mem_mb"])
            changed["mem"] = memory.format_human_friendly()
            changed["mem_mib"] = memory.from_mb_to_mib().value
        return type(first)(fromdict=changed)

    def _cap(self, key: str, rule: Any, asked: dict[str, Any], first: Any) -> None:
        """Lower what a step asks for to what there is; note a first request that is too large."""
        most = rule.workflow.global_resources.get("mem_mb")
        limits = limits_of(rule.workflow, asked)
        memory = limits.memory(asked.get("_cores", 1))
        caps = {
            # tasks on several nodes have the memory of all of them
            "mem_mb": None if asked.get("mem_mb_per_cpu") else (most and most.value) or memory,
            "mem_mb_per_cpu": memory,
            "runtime": limits.runtime,
        }
        needs = {name: first.get(name) for name in caps}
        for name, cap in caps.items():
            if isinstance(cap, int) and isinstance(asked.get(name), int):
                asked[name] = min(asked[name], cap)
        if needs["mem_mb_per_cpu"]:
            needs["mem_mb"] = needs["mem_mb_per_cpu"]
        if memory and isinstance(needs["mem_mb"], int) and needs["mem_mb"] > memory:
            self.too_large[f"{key} ({rule.name})"] = (
                f"asks for {needs['mem_mb']} MB, and the largest node of {limits.where} has "
                f"{memory} MB. Use larger nodes (another partition or queue) or fewer --cores, or "
                f"ask for less: --set-resources {rule.name}:mem_mb={memory}"
            )
        self.note_time(f"{key} ({rule.name})", rule.name, needs["runtime"], limits)

    def note_time(self, name: str, rule: str, runtime: Any, limits: Limits) -> None:
        """Note a job that takes longer than its partition allows, although nothing hinders it."""
        if limits.runtime and isinstance(runtime, int) and runtime > TIME_MARGIN * limits.runtime:
            self.too_large[name] = (
                f"asks for {runtime} minutes, and {limits.where} allows {limits.runtime}. Use "
                "another partition or queue, or more --cores; or ask for less if you know better: "
                f"--set-resources {rule}:runtime={limits.runtime}"
            )

    def cap_group(self, group: Any, asked: dict[str, Any]) -> None:
        """Lower the time limit of a group, the sum of its steps, to what the partition allows."""
        limits = limits_of(group.dag.workflow, asked)
        if limits.runtime and isinstance(asked.get("runtime"), int):
            self.note_time(key_of(group), jobs_of(group)[0].rule.name, asked["runtime"], limits)
            asked["runtime"] = min(asked["runtime"], limits.runtime)

    def check_first_requests(self, workflow: Any) -> None:
        """Refuse a run in which a job asks at once for what no node can give.

        What jobs ask for from now on fits a node: groups have fewer steps side by side.

        Raises
        ------
        InputError
            With a job, its need, what there is, and the remedy.
        """
        jobs = [job for job in workflow.dag.needrun_jobs() if not job.is_local]
        ask_again()
        limits = limits_of(workflow, jobs[0].resources if jobs else {})
        if limits == NO_LIMITS:
            return
        cores = workflow.resource_settings.cores
        if limits.cores and cores and cores > limits.cores:
            _to_user(
                f"--cores {cores} is more than the {limits.cores} cores of a node of "
                f"{limits.where}: jobs get {limits.cores}"
            )
            cores = limits.cores
            workflow.resource_settings.cores = workflow.global_resources["_cores"] = cores
        for job in jobs:
            job.rule.expand_resources(job.wildcards_dict, job.input, 1)
        memory = limits.memory(cores or 1)
        on_nodes = any(job.resources.get("mem_mb_per_cpu") for job in jobs)
        if memory and not on_nodes and not workflow.global_resources.get("mem_mb").value:
            workflow.register_resource("mem_mb", memory)
        for group in {workflow.dag._group.get(job) for job in jobs} - {None}:
            group.resources  # noqa: B018 - its limits are noted when it is asked
            group._resources = None
        if self.too_large:
            name, why = next(iter(self.too_large.items()))
            others = len(self.too_large) - 1
            more = f" ({others} more jobs ask for too much)" if others else ""
            raise InputError(f"{name} {why}{more}")

    # ------------------------------------------------------------------------------------------
    # How an attempt ended
    # ------------------------------------------------------------------------------------------

    def failed(self, job: Any, executor: str, job_id: str, message: str, log: str) -> None:
        """Record how an attempt at a job ended, before Snakemake decides about the next.

        Parameters
        ----------
        job : snakemake.jobs.AbstractJob
            The job.
        executor : str
            Name of the executor's plugin; that of this machine is "local".
        job_id, message, log : str
            Number of the job there, what the executor says, and the log of the job, if it has them.
        """
        key, asked = key_of(job), asked_by(job)
        outcome, words = self._end(job, executor, job_id, message, log)
        if executor == "local" and outcome == "failed" and not self.left(job):
            return  # the end of the run tells it
        needed = _NEEDED.search(words)
        made = Attempt(
            time.strftime("%Y-%m-%dT%H:%M:%S"),
            request_of(job.dag.workflow),
            self.run,
            {"slurm": "Slurm", "cluster-generic": "PBS"}.get(executor, executor),
            job_id,
            tuple(sorted({one.rule.name for one in jobs_of(job)})),
            asked,
            outcome,
            words,
            int(needed[1]) if needed else 0,
        )
        before = self.history(key)
        self._histories[key] = [*before, made]
        job.attempt = job.attempt  # what it asks for is evaluated anew
        following = asked_by(job)
        if _is_hopeless(made, following):
            self._last.add(key)
        again = self.left(job) > job.attempt - 1
        made = made._replace(next=following if again else None)
        self._histories[key] = [*before, made]
        _to_user(f"{key}: {attempts.told(made)}")
        try:
            attempts.record(key, made, self._folder)
        except OSError as error:
            _to_user(f"{key}: this attempt is not in the history: {error}")

    def _end(self, job: Any, executor: str, job_id: str, message: str, log: str) -> tuple[str, str]:
        """Return how an attempt ended, and the words that say so."""
        outcome, words = "unknown", ""
        if executor == "slurm":
            outcome, words = history.end_of_slurm_job(job_id, message, log)
        elif executor == "cluster-generic":
            outcome, words = history.end_of_pbs_job(job_id, key_of(job)[:60], self._folder)
        if outcome not in ("failed", "unknown"):
            return outcome, words
        earlier = [_seconds(one.when) for one in self.history(key_of(job))[-1:]]
        lines = joblog.failures(_logs_of(job), max([self._since, *earlier]))
        silent = (joblog.NO_RESULT, joblog.NO_LOG)
        told = [line for line in lines if line not in silent]
        short = next((line for line in told if _MEMORY_SHORT.search(line)), "")
        if short:
            return attempts.OUT_OF_MEMORY, short
        if executor == "local" and joblog.NO_RESULT in lines:
            return self._why_killed()
        failed = next(iter(told), "")
        return ("failed", failed) if failed else (outcome, words)

    def _why_killed(self) -> tuple[str, str]:
        """Return how a process of this machine ended that has written no result line."""
        before, self._kills = self._kills, oom_kills()
        if self._kills is None or self._kills != before:
            return attempts.OUT_OF_MEMORY, "killed by the kernel"
        return "killed", "not by the kernel for want of memory"


def _is_hopeless(made: Attempt, following: Amounts) -> bool:
    """Return whether the next attempt would end in the same way."""
    short = {attempts.OUT_OF_MEMORY: "mem_mb", attempts.TIME_LIMIT: "runtime"}.get(made.outcome)
    if short:
        return following.get(short, 0) <= made.asked.get(short, 0)
    return made.outcome == "refused" and history.will_be_refused(made.words)


# ---------------------------------------------------------------------------------------------
# Jobs of Snakemake
# ---------------------------------------------------------------------------------------------


def jobs_of(job: Any) -> list[Any]:
    """Return the steps of a job of the cluster, or the job itself."""
    return list(job.jobs) if job.is_group() else [job]


def key_of(job: Any) -> str:
    """Return the name of a job in the history."""
    one = jobs_of(job)[0]
    return attempts.key_of(one.group, one.rule.name, one.wildcards_dict.values())


def asked_by(job: Any) -> Amounts:
    """Return what a job asks for."""
    names = {"mem_mb": "mem_mb", "runtime": "runtime", "_cores": "cores"}
    found = {names[name]: job.resources.get(name) for name in names}
    return {name: amount for name, amount in found.items() if isinstance(amount, int)}


def request_of(workflow: Any) -> str:
    """Return a short name for what the user asks for by hand."""
    asked = workflow.resource_settings
    words = [
        f"{rule}:{name}={value.raw}"
        for rule, found in asked._parsed_overwrite_resources.items()
        for name, value in found.items()
    ]
    return attempts.digest_of([*words, *asked._parsed_default_resources.args])


def _logs_of(job: Any) -> Iterable[str]:
    return [str(log) for one in jobs_of(job) for log in one.log]


def _seconds(when: str) -> float:
    return time.mktime(time.strptime(when, "%Y-%m-%dT%H:%M:%S"))


# ---------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------


def limits_of(workflow: Any, asked: Mapping[str, Any]) -> Limits:
    """Return the limits of the partition or queue that a job of a run goes to."""
    executor = getattr(workflow.executor_plugin, "name", None) if workflow.is_main_process else None
    if executor == "slurm":
        return slurm_limits(str(asked.get("slurm_partition") or ""))
    if executor == "cluster-generic":
        return pbs_limits(str(asked.get("pbs_queue") or ""))
    return NO_LIMITS


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed for want of memory; None: unknown."""
    try:
        text = Path("/proc/vmstat").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(match[1]) if match else None


def _to_user(line: str) -> None:
    print(f"coaddflow: {line}", file=sys.stderr)
