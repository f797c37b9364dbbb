"""What is replaced in Snakemake, each with the reason; tried with Snakemake 9.27.

Each has a test (tests/workflow/test_snakemake_patches.py) that shows the trouble without it, and
fails when a Snakemake no longer needs it. Where this Snakemake lacks what is replaced, a warning
says so and the run goes on without.
"""

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import snakemake.api  # noqa: F401 - first: the modules of Snakemake import each other
from snakemake import __version__ as snakemake_version
from snakemake import common, rules
from snakemake.dag import DAG, ScriptProcessor
from snakemake.exceptions import WorkflowError
from snakemake.executors import local
from snakemake.executors.local import Executor as LocalExecutor
from snakemake.jobs import GroupJob, Job
from snakemake.persistence import FileBackupMixin
from snakemake.rules import Rule
from snakemake.scheduling.job_scheduler import JobScheduler
from snakemake_interface_executor_plugins.executors.base import AbstractExecutor

from coaddflow import fence
from coaddflow.errors import ReplacedError
from coaddflow.runtime.resources import machine_memory
from coaddflow.tables.paths import SURVEY_CORNERS
from coaddflow.workflow.retries import Retries
from coaddflow.workflow.stages import STAGES


def replace_internals(since: float, is_main_process: bool) -> Retries:
    """Replace what hinders a run; called once, when the Snakefile is read.

    Parameters
    ----------
    since : float
        When the run began, seconds since the epoch: older logs are of other runs.
    is_main_process : bool
        Whether this Snakemake was started by the user, and not inside a job of a cluster.

    Returns
    -------
    Retries
        The attempts of the run.
    """
    retries = Retries(since)
    check_groups_once()
    look_at_functions_once()
    look_for_scripts_once()
    ask_for_more_of_what_was_short(retries)
    retry_only_what_may_succeed(retries)
    stop_replaced_jobs()
    leave_the_survey_database_in_place()
    if is_main_process:
        record_attempts(retries)
        end_when_asked_to()
        end_when_nobody_listens()
    hold_back_interrupts()
    return retries


def check_groups_once() -> None:
    """Leave out the second look for groups that depend on themselves.

    `DAG.validate_group` finds them in a time that grows with the number of jobs.
    `DAG._check_groups`, which looks for the same afterwards, takes a time that grows with the
    square of a group's size times the number of all jobs before it: 75 s for 12 exposures of HSC,
    hours for a survey.
    """
    _replace(DAG, "_check_groups", lambda self: None)


def look_at_functions_once() -> None:
    """Keep the signatures of the functions of rules.

    Snakemake works out which arguments a function wants each time before it calls it, some ten
    times for each job: an eighth of the time of planning.
    """
    kept = functools.lru_cache(maxsize=4096)(common.get_function_params)
    for module in (common, rules):
        _replace(module, "get_function_params", kept)


def look_for_scripts_once() -> None:
    """Look for the script of each rule once.

    Snakemake looks for it again for each job: a tenth of the time of planning.
    """

    def process_job(processor: Any, job: Any) -> None:
        if job.rule not in found:
            original(processor, job)
            found.add(job.rule)

    found: set[Rule] = set()
    original = _replace(ScriptProcessor, "process_job", process_job)


def ask_for_more_of_what_was_short(retries: Retries) -> None:
    """Let memory and time limits grow for a reason, and not above what there is.

    Snakemake gives the number of the attempt to the functions and expressions of all resources,
    whatever was short: a job that somebody cancelled asks for twice the memory.
    """

    def expand(
        rule: Any, wildcards: Any, input: Any, attempt: int, skip_evaluation: Any = None
    ) -> Any:
        def evaluate(number: int) -> Any:
            return original(rule, wildcards, input, number, skip_evaluation)

        return retries.resources(rule, wildcards, attempt, evaluate)

    def resources(group: Any) -> Any:
        if group._resources is None:
            of_group.fget(group)
            retries.cap_group(group, group._resources)
        return of_group.fget(group)

    original = _replace(Rule, "expand_resources", expand)
    of_group = _replace(GroupJob, "resources", property(resources))


def retry_only_what_may_succeed(retries: Retries) -> None:
    """Do not repeat a failure that another attempt cannot mend.

    Too many failed CCDs and an unusable file are such. Snakemake has only `retries` of a rule, and
    a group is tried as often as that rule of it that is tried most; here the result lines of the
    jobs' logs decide, and what the earlier attempts at the job were short of.
    """

    def restart_times(job: Any) -> int:
        # asked when the resources of the attempt are free again: the scheduler counts those of the
        # first attempt otherwise
        job._scheduler_resources = None
        return retries.left(job)

    for kind_of_job in (Job, GroupJob):
        _replace(kind_of_job, "restart_times", property(restart_times))


def record_attempts(retries: Retries) -> None:
    """Record and print how each attempt at a job ended.

    Snakemake forgets it, and of a group of jobs it even drops why a cluster refuses or ends it.
    """

    def report(executor: Any, job_info: Any, msg: str | None = None, **options: Any) -> None:
        name = executor.workflow.executor_plugin.name
        if type(executor).__module__ == "snakemake.executors.local":
            name = "local"
        log = str((job_info.aux or {}).get("slurm_logfile", ""))
        retries.failed(job_info.job, name, job_info.external_jobid or "", msg or "", log)
        original(executor, job_info, msg, **options)

    original = _replace(AbstractExecutor, "report_job_error", report)


def end_when_asked_to() -> None:
    """Let SIGTERM end a run at any moment.

    Snakemake's handler takes a lock that the interrupted function may hold itself, for as long as
    it waits for the missing products of a job that has ended: then it waits for ever, deaf to
    further signals. Here another thread takes the lock.
    """

    def exit_gracefully(scheduler: Any, *arguments: Any) -> None:
        threading.Thread(target=original, args=(scheduler, *arguments), daemon=True).start()

    original = _replace(JobScheduler, "exit_gracefully", exit_gracefully)


def end_when_nobody_listens() -> None:
    """Let a run end whose messages cannot be printed any more: a closed terminal, a broken pipe.

    Snakemake raises BrokenPipeError while it reports a failed job, in a thread in which nobody
    notices. The job counts as running for ever, and the run waits for it, also if it is asked to
    end.
    """

    def callback(executor: Any, job_info: Any, future: Any) -> None:
        try:
            original(executor, job_info, future)
        except Exception as error:
            executor.workflow.scheduler.executor_error_callback(error)

    original = _replace(LocalExecutor, "_callback", callback)


def hold_back_interrupts() -> None:
    """Let Ctrl-C reach a job only when it has begun.

    The terminal sends it to all processes of the run. A Python that is just starting answers with
    a traceback, and leaves no word in the log of its job. Until the job has begun it must be ended
    with SIGTERM.
    """

    def run(*arguments: Any, **options: Any) -> Any:
        # of this thread of Snakemake's, and what it starts; `runtime.log` takes it back in the job
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return original(*arguments, **options)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    original = _replace(local, "run_wrapper", run)


def leave_the_survey_database_in_place() -> None:
    """Make no copy of the survey's corner database before it is brought up to date.

    Snakemake copies what a job updates, and copies it back if the job fails, also over a change
    that another process has made. The time grows with the survey. The database is changed as a
    whole or not at all (`corners.connections`).
    """

    def backup(persistence: Any, path: Path) -> None:
        if path != Path(SURVEY_CORNERS):
            original_backup(persistence, path)

    def restore(persistence: Any, path: Path) -> bool:
        """Return whether a file is whole that a failed job has updated: others are removed."""
        if path == Path(SURVEY_CORNERS):
            return path.exists()
        return original_restore(persistence, path)

    original_backup = _replace(FileBackupMixin, "backup_output", backup)
    original_restore = _replace(FileBackupMixin, "restore_output", restore)


def stop_replaced_jobs() -> None:
    """Keep the Snakemake of a job that a newer one has replaced from removing that job's products.

    Snakemake removes what a job is to make before the job begins, and again when it has failed. So
    a job gets its token (`fence`) before that, and one that has lost it removes nothing.
    """

    async def prepare(job: Any) -> None:
        token = _fence_of(job)
        if token is not None:
            try:
                fence.begin(token)
            except ReplacedError as error:
                raise WorkflowError(f"coaddflow: {error}") from None
        await original_prepare(job)

    async def cleanup(job: Any, skip_outputs: Any) -> None:
        token = _fence_of(job)
        if token is None or not fence.is_replaced(token):
            await original_cleanup(job, skip_outputs)

    original_prepare = _replace(Job, "prepare", prepare)
    original_cleanup = _replace(Job, "cleanup", cleanup)


def _fence_of(job: Any) -> fence.Fence | None:
    """Return what a job of Snakemake must have to write; None if it is none of a stage."""
    stage = STAGES.get(job.rule.name)
    return None if stage is None else fence.fence_of(stage.token(job.wildcards_dict))


def lift_default_rate_limit(workflow: Any) -> None:
    """Take away the limit on jobs a second, unless the user has set one; called when a run begins.

    Snakemake enforces its default of 100 jobs a second by looking at all waiting jobs again one
    second after every look; each job that ends adds a look to those of every second. After a
    thousand jobs the scheduler does nothing else.
    """
    if not hasattr(workflow.scheduler, "job_rate_limiter"):
        _warn("JobScheduler.job_rate_limiter")
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    if limit is not None and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


def check_targets_first(check: Callable[[Iterable[str]], None]) -> None:
    """Check the files that the user has named before planning begins.

    Planned by Snakemake, a product of an exposure, tract or patch that the survey does not have
    ends in the KeyError of an input function, with a traceback.
    """

    async def init(dag: DAG, *arguments: Any, **options: Any) -> None:
        check(sorted(map(str, dag.targetfiles or ())))
        await original(dag, *arguments, **options)

    original = _replace(DAG, "init", init)


def keep_to_cores_of_this_machine(workflow: Any) -> None:
    """Keep a run on this machine to its cores and its memory; called when a run begins.

    Snakemake takes `--jobs` for the number of jobs of a cluster, whatever the executor is, and then
    counts no cores: `-j 2` beside a profile with `cores` starts all jobs that fit into memory. Its
    help says that `--jobs` is the number of cores of a run without a cluster.
    """
    jobs = workflow.global_resources["_nodes"].value
    if not workflow.local_exec or jobs is None:
        return
    cores = min(workflow.resource_settings.cores or jobs, jobs)
    workflow.resource_settings.cores = workflow.global_resources["_cores"] = cores
    limits = {"_cores": cores}
    if not {"mem", "mem_mb"} & set(workflow.global_resources):
        limits["mem_mb"] = machine_memory()
        workflow.register_resource("mem_mb", limits["mem_mb"])
    for counted in (workflow.scheduler.global_resources, workflow.scheduler.resources):
        counted.update(limits)


def _replace(owner: type | ModuleType, name: str, replacement: Any) -> Callable[..., Any]:
    """Replace an attribute of a class or module of Snakemake's, and return what it was."""
    found = getattr(owner, name, None)
    if found is None:
        _warn(f"{owner.__name__}.{name}")
    setattr(owner, name, replacement)
    return found


def _warn(name: str) -> None:
    print(
        f"coaddflow: warning: Snakemake {snakemake_version} has no {name}, which coaddflow "
        "replaces (workflow/snakemake_patches.py says why)",
        file=sys.stderr,
    )
