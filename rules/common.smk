# What all rules share: the settings, the plan, and what answers "which files?", "which settings?"
# and "how much memory?" of a job. The only file with functions.
#
# Snakemake reads this again in every job of a cluster, so nothing slow may happen here: the plan
# comes from a cache (workflow/plan_cache.py), and astropy is not imported.

import atexit
import functools
import gc
import os
import sys
import time

RUN_STARTED = time.time()

# Planning makes millions of objects that all stay: to look through them again and again for garbage
# takes a third of its time. `report_start` switches it on again, for what a run makes.
gc.disable()
# nor at the end: 4 s of 5,000 exposures
atexit.register(gc.freeze)

try:
    from coaddflow import fence
    from coaddflow.cluster import slurm as cluster
    from coaddflow.errors import InputError
    from coaddflow.runtime import resources
    from coaddflow.settings import load_settings
    from coaddflow.settings.keys import read_file
    from coaddflow.tables import paths, pointings
    from coaddflow.workflow import catalogue, cost, needs, progress, report
    from coaddflow.workflow import snakemake_patches, stages, survey_record, targets
    from coaddflow.workflow.inputs import Inputs
    from coaddflow.workflow.params import Params
    from coaddflow.workflow.plan import make_plan
except ModuleNotFoundError as error:
    sys.exit(
        f"coaddflow: error: {error}. The package is not installed for {sys.executable}. Run "
        "`make demo`, or `pip install -e .` in the folder of the Snakefile"
    )


if workflow.is_main_process:
    progress.plan_until_interrupted()


def config_file():
    """Return the settings file of a run that names none: the working folder's, or the demo's."""
    own = "config.yaml"
    return own if os.path.exists(own) else os.path.join(workflow.basedir, own)


def exit_on_input_error(step, *arguments, hint=""):
    """Do a step of the run; a mistake of the user ends it with one line, no traceback."""
    try:
        return step(*arguments)
    except InputError as error:
        sys.exit(f"coaddflow: error: {error}{hint}")


# A file given with --configfile must not be mixed with the demo's settings, so the default is
# read only where none is given.
if not workflow.overwrite_configfiles:
    exit_on_input_error(read_file, config_file())

    configfile: config_file()


def checked_plan():
    """Return the plan of the run."""
    # jobs have been checked by the run that started them
    for path in workflow.configfiles if workflow.is_main_process else ():
        read_file(path)
    source = ", ".join(str(path) for path in workflow.configfiles) or None
    plan = make_plan(load_settings(config, source), is_job=not workflow.is_main_process)
    plan.check()
    if workflow.is_main_process:
        survey_record.check_survey(plan)
        survey_record.check_writable()
    return plan


PLAN = exit_on_input_error(checked_plan, hint=report.demo_hint(workflow))
SETTINGS = PLAN.settings
INPUTS = Inputs(PLAN)
PARAMS = Params(PLAN)


wildcard_constraints:
    exposure="[A-Za-z0-9][A-Za-z0-9_-]*",
    ccd=r"\d+",
    band="[A-Za-z0-9][A-Za-z0-9_-]*",
    tract=r"\d+",
    patch=r"\d+_\d+",
    frames="[A-Za-z0-9][A-Za-z0-9_.-]*",
    # the folder `frames` is no set
    set="(?!frames/)[A-Za-z0-9][A-Za-z0-9_+-]*",


# Exposures that were calibrated elsewhere, and all others, as patterns.
IMPORTED = "|".join(PLAN.images)
RAW = (
    rf"(?!(?:{IMPORTED})[/.])[A-Za-z0-9][A-Za-z0-9_-]*"
    if IMPORTED
    else "[A-Za-z0-9_-]+"
)

# Whether jobs go to a cluster: `jobs` is given, or this is such a job. Then the jobs of an exposure,
# those of a tract and the calibration frames of a CCD are one group each, which is one job of the
# cluster and named in its queue. Elsewhere groups have no effect, but planning takes four times as
# long with them.
ON_CLUSTER = (
    workflow.resource_settings.nodes is not None or not workflow.is_main_process
)

# Whether this is the Snakemake that works on the jobs inside a job that went to Slurm. It gets back
# what Slurm said of the allocation: the executor takes that away from jobs of MPI.
INSIDE_SLURM = not workflow.is_main_process and cluster.hand_down_allocation(os.environ)

# What scripts, and the workers that they start, call the job that they are part of.
os.environ[fence.VARIABLE] = fence.name_job(workflow.is_main_process, RUN_STARTED)

RETRIES = snakemake_patches.replace_internals(RUN_STARTED, workflow.is_main_process)
if workflow.is_main_process:
    snakemake_patches.check_targets_first(
        lambda files: exit_on_input_error(targets.check_targets, PLAN, files)
    )


def is_planned(name):
    """Return whether a stage is part of the run."""
    return stages.STAGES[name].is_planned(PLAN)


def in_set(name, template):
    """Return a template of a stage of calibration frames, in a folder of its set if there is one."""
    return paths.in_set(template) if has_sets(name) else template


def naming_set(name, message):
    """Return the message of a stage of calibration frames, which names its set if there is one."""
    return f"{message}, set {{wildcards.set}}" if has_sets(name) else message


def has_sets(name):
    """Return whether the jobs of a stage of calibration frames are of sets."""
    product = stages.STAGES[name].products[0]
    return product.template(PLAN) != product.path


def group_of(name):
    """Return the group of a stage's jobs on a cluster, None elsewhere."""
    return stages.STAGES[name].group_in(PLAN) if ON_CLUSTER else None


def all_products(wildcards):
    """Return what a run makes. It is asked for when planning begins, after the executor is known."""
    exit_on_input_error(cluster.prepare, workflow)
    return stages.targets(PLAN)


# ---------------------------------------------------------------------------------------------
# Memory (MB) and time (minutes): of the first attempt; workflow/retries.py says what later ones
# ask for
# ---------------------------------------------------------------------------------------------


def scatters_over_tasks():
    """Return whether jobs scatter over tasks of Slurm, which may be on several nodes.

    Asked when a job is planned: Snakemake does not know its executor before.
    """
    if SETTINGS.parallel.backend != "mpi":
        return False
    executor = workflow.executor_plugin
    return INSIDE_SLURM or (executor and executor.name in ("slurm", "slurm-jobstep"))


def needs_of(name, cores, *names):
    """Return what a job of a stage needs, with so many cores; a job is asked several times."""
    return needs_of_alike(name, cores, *needs.alike(PLAN, dict(names)).items())


@functools.lru_cache(maxsize=4096)
def needs_of_alike(name, cores, *names):
    """Return what all jobs of a stage need that need the same."""
    stage = stages.STAGES[name]
    return needs.of(stage, PLAN, dict(names), cores, scatters_over_tasks())


def memory(name):
    """Return the function of a rule for its memory, MB."""

    def mem_mb(wildcards, threads):
        job = needs_of(name, threads, *wildcards.items())
        cores = workflow.resource_settings.cores
        return job.asked(cores, scatters_over_tasks(), ON_CLUSTER)

    return mem_mb


def minutes(name):
    """Return the function of a rule for its time limit, minutes."""
    return lambda wildcards, threads: (
        needs_of(name, threads, *wildcards.items()).runtime
    )


def cores(name):
    """Return the function of a rule that scatters for the cores that it wants."""
    return lambda wildcards: needs_of(name, None, *wildcards.items()).threads


def cores_with_spare(name):
    """Return the function of a rule whose steps share idle cores for the cores that it wants."""
    return lambda wildcards: cores(name)(wildcards) * spare_cores(name)


@functools.cache
def spare_cores(name):
    """Return by how many times more cores the run has than all jobs of a stage need."""
    of_run = None if ON_CLUSTER else workflow.resource_settings.cores
    return needs.spare_cores(stages.STAGES[name], PLAN, of_run)


def if_mpi(function):
    """Return the function of a resource that only jobs of MPI have; without MPI nothing asks it."""
    return function if SETTINGS.parallel.backend == "mpi" else None


def mpi_allocation():
    """Return the function of the mark of jobs that start MPI by themselves.

    With None Slurm starts a single task.
    """
    return if_mpi(lambda wildcards: 1 if scatters_over_tasks() else None)


def tasks(name):
    """Return the function of a rule that scatters for its tasks of Slurm, if it has some."""

    def number(wildcards):
        workers = needs_of(name, None, *wildcards.items()).workers
        return workers + 1 if scatters_over_tasks() else None

    return if_mpi(number)


def task_memory(name):
    """Return the function of a rule that scatters for the memory of each task, MB."""

    def mem_mb(wildcards, threads):
        of_task = needs_of(name, threads, *wildcards.items()).task_memory
        return of_task if scatters_over_tasks() else None

    return if_mpi(mem_mb)


# The Snakemake inside a job of a cluster works within what the job was given.
if not workflow.is_main_process:
    for name, amount in cluster.allocation().items():
        workflow.register_resource(name, amount)

# On one machine the jobs that run side by side must fit into its memory. `--resources mem_mb=N`
# or a profile says otherwise.
if not ON_CLUSTER and not {"mem", "mem_mb"} & set(workflow.global_resources):
    workflow.register_resource("mem_mb", resources.machine_memory())


# ---------------------------------------------------------------------------------------------
# What the user is told
# ---------------------------------------------------------------------------------------------


PROGRESS = progress.Progress(progress.to_user)


def report_start():
    """Say what the run is about, and what a user may not expect."""
    gc.freeze()
    gc.enable()
    exit_on_input_error(catalogue.check_before_run, PLAN)
    exit_on_input_error(survey_record.record_survey, PLAN)
    exit_on_input_error(cluster.begin, workflow)
    snakemake_patches.keep_to_cores_of_this_machine(workflow)
    exit_on_input_error(RETRIES.check_first_requests, workflow)
    exit_on_input_error(pointings.adopt, PLAN.pointings)
    snakemake_patches.lift_default_rate_limit(workflow)
    progress.follow(PROGRESS, workflow, cost.typical_seconds(PLAN))
    progress.to_user(report.start_text(PLAN))


def report_success():
    """Say what there is now."""
    progress.to_user(report.success_text(PLAN))


def report_failure():
    """Say what failed, why, and where its log is; after Ctrl-C only how far the run is."""
    if PROGRESS.interrupted:
        progress.to_user(report.interrupted_text(PROGRESS.done, PROGRESS.total))
        sys.exit(report.INTERRUPTED)
    progress.to_user(report.failure_text(paths.LOGS, RUN_STARTED))
