# What all rules share: the settings, the plan, and what answers "which files?", "which settings?"
# and "how much memory?" of a job. The only file with functions.
#
# Snakemake reads this again in every job of a cluster, so nothing slow may happen here: the plan
# comes from a cache (workflow/plan_cache.py), and astropy is not imported.

import functools
import math
import os
import sys
import time

RUN_STARTED = time.time()

try:
    from coaddflow.cluster import slurm as cluster
    from coaddflow.errors import InputError
    from coaddflow.runtime import resources as needs
    from coaddflow.settings import load_settings
    from coaddflow.settings.keys import check_keys
    from coaddflow.tables import paths
    from coaddflow.workflow import progress, report, snakemake_patches, stages
    from coaddflow.workflow.inputs import Inputs
    from coaddflow.workflow.params import Params
    from coaddflow.workflow.plan import make_plan
except ModuleNotFoundError as error:
    sys.exit(
        f"coaddflow: error: {error}. The package is not installed for {sys.executable}. Run "
        "`make demo`, or `pip install -e .` in the folder of the Snakefile"
    )


def config_file():
    """Return the settings file of a run that names none: the working folder's, or the demo's."""
    own = "config.yaml"
    return own if os.path.exists(own) else os.path.join(workflow.basedir, own)


# A file given with --configfile must not be mixed with the demo's settings, so the default is
# read only where none is given.
if not workflow.overwrite_configfiles:

    configfile: config_file()


def exit_on_input_error(step, *arguments):
    """Do a step of the run; a mistake of the user ends it with one line, no traceback."""
    try:
        return step(*arguments)
    except InputError as error:
        sys.exit(f"coaddflow: error: {error}{report.demo_hint(workflow)}")


def checked_plan():
    """Return the plan of the run."""
    # jobs have been checked by the run that started them
    for path in workflow.configfiles if workflow.is_main_process else ():
        with open(path, encoding="utf-8") as stream:
            check_keys(stream.read(), path)
    source = ", ".join(str(path) for path in workflow.configfiles) or None
    plan = make_plan(load_settings(config, source))
    plan.check()
    return plan


PLAN = exit_on_input_error(checked_plan)
SETTINGS = PLAN.settings
INPUTS = Inputs(PLAN)
PARAMS = Params(PLAN)


wildcard_constraints:
    exposure="[A-Za-z0-9][A-Za-z0-9_-]*",
    ccd=r"\d+",
    band="[A-Za-z0-9][A-Za-z0-9_-]*",
    tract=r"\d+",
    patch=r"\d+_\d+",


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

snakemake_patches.replace_internals(RUN_STARTED, workflow.is_main_process)


def is_planned(name):
    """Return whether a stage is part of the run."""
    return stages.STAGES[name].is_planned(PLAN)


def group_of(name):
    """Return the group of a stage's jobs on a cluster, None elsewhere.

    With MPI the bands of a tract are jobs of their own: Snakemake would add the CPUs of a task to
    those of the other bands, and not only the tasks.
    """
    by_band = (
        name in ("tract", "tract_corners")
        and SETTINGS.parallel.backend == "mpi"
        and SETTINGS.parallel.coadd == "tract"
    )
    group = stages.STAGES[name].group + ("_{band}" if by_band else "")
    return group if ON_CLUSTER else None


def all_products(wildcards):
    """Return what a run makes. It is asked for when planning begins, after the executor is known."""
    exit_on_input_error(cluster.prepare, workflow)
    return stages.targets(PLAN)


# ---------------------------------------------------------------------------------------------
# Memory (MB) and time (minutes)
# ---------------------------------------------------------------------------------------------


def ccd_pixels(wildcards):
    """Return the number of pixels of a CCD."""
    exposure, ccd = getattr(wildcards, "exposure", None), int(wildcards.ccd)
    if exposure in PLAN.images:
        return PLAN.images[exposure][ccd].nx * PLAN.images[exposure][ccd].ny
    nx, ny = PLAN.ccds[ccd].size
    return nx * ny


def pixels_of_ccds(exposure):
    """Return the number of pixels of each CCD of an exposure."""
    if exposure in PLAN.images:
        return [image.nx * image.ny for image in PLAN.images[exposure].values()]
    return [nx * ny for nx, ny in (ccd.size for ccd in PLAN.ccds.values())]


def exposure_pixels(exposure):
    """Return the largest number of pixels of a CCD of an exposure, and that of all together."""
    counts = pixels_of_ccds(exposure)
    return max(counts), sum(counts)


def patch_pixels():
    """Return the number of pixels of a patch with its border."""
    return (SETTINGS.skymap.patch_inner_size + 2 * SETTINGS.skymap.patch_border) ** 2


def snakemake_share(width):
    """Return the part of a step in the memory of the Snakemakes in its job, MB.

    Parameters
    ----------
    width : int
        Steps of the job that can run side by side; Snakemake adds their memory.
    """
    if not ON_CLUSTER:
        return 0
    return math.ceil(
        needs.SNAKEMAKE_MB
        / max(min(width, workflow.resource_settings.cores or width), 1)
    )


def growing(amount):
    """Return a resource of a fixed amount, and that much more at each further attempt."""
    return lambda wildcards, attempt: attempt * amount


def ccd_memory(wildcards, attempt):
    share = snakemake_share(len(PLAN.ccds_of(wildcards.exposure)))
    return attempt * (share + needs.ccd_memory(ccd_pixels(wildcards)))


def ccd_runtime(wildcards, attempt):
    return attempt * needs.ccd_runtime(ccd_pixels(wildcards))


def calib_memory(wildcards, input, attempt):
    stack = needs.calib_memory(
        ccd_pixels(wildcards), len(input), SETTINGS.calibs.memory
    )
    return attempt * (snakemake_share(1) + stack)


def calib_runtime(wildcards, input, attempt):
    return attempt * needs.calib_runtime(ccd_pixels(wildcards), len(input))


def spreads_over_nodes():
    """Return whether jobs scatter over tasks of Slurm, which may be on several nodes.

    Asked when a job is planned: Snakemake does not know its executor before.
    """
    if SETTINGS.parallel.backend != "mpi":
        return False
    executor = workflow.executor_plugin
    return INSIDE_SLURM or (executor and executor.name in ("slurm", "slurm-jobstep"))


def mpi_allocation(wildcards):
    """Return the mark of jobs that start MPI by themselves; None: Slurm starts a single task."""
    return 1 if spreads_over_nodes() else None


def exposure_workers(wildcards):
    """Return the workers of the job of an exposure: never more than it has CCDs."""
    if SETTINGS.parallel.backend == "serial":
        return 1
    return min(SETTINGS.parallel.workers, len(PLAN.ccds_of(wildcards.exposure)))


def works_elsewhere():
    """Return whether the workers are not processes of the job, or of its node at least."""
    parallel = SETTINGS.parallel
    dask = parallel.backend == "dask" and parallel.dask_address is not None
    return dask or spreads_over_nodes()


def exposure_threads(wildcards):
    """Return the cores of the job of an exposure, or of each of its tasks."""
    return 1 if works_elsewhere() else exposure_workers(wildcards)


def exposure_tasks(wildcards):
    """Return the tasks of the job of an exposure, that which gathers included; None: one."""
    return exposure_workers(wildcards) + 1 if spreads_over_nodes() else None


def exposure_needs(wildcards, threads):
    """Return the memory that the workers of an exposure need together, MB, and their number."""
    pixels = pixels_of_ccds(wildcards.exposure)
    parts = SETTINGS.exposure.enabled if wildcards.exposure in PLAN.science else ()
    crosstalk = "crosstalk" in parts and bool(PLAN.crosstalk)
    workers = exposure_workers(wildcards) if spreads_over_nodes() else threads
    return needs.exposure_memory(pixels, workers, bool(parts), crosstalk), workers


def exposure_memory(wildcards, threads, attempt):
    memory, _ = exposure_needs(wildcards, threads)
    return attempt * (snakemake_share(1) + memory)


def exposure_task_memory(wildcards, threads, attempt):
    """Return the memory of each task of an exposure, MB; None: it is asked for by node."""
    memory, workers = exposure_needs(wildcards, threads)
    return (
        attempt * needs.task_memory(memory, workers) if spreads_over_nodes() else None
    )


def exposure_runtime(wildcards, threads, attempt):
    workers = exposure_workers(wildcards) if works_elsewhere() else threads
    pixels = pixels_of_ccds(wildcards.exposure)
    return attempt * needs.exposure_runtime(pixels, workers)


def warp_memory(wildcards, attempt):
    largest, _ = exposure_pixels(wildcards.exposure)
    share = snakemake_share(len(PLAN.exposures_of_tract(int(wildcards.tract))))
    return attempt * (share + needs.warp_memory(largest, patch_pixels()))


def warp_runtime(wildcards, attempt):
    _, together = exposure_pixels(wildcards.exposure)
    return attempt * needs.warp_runtime(together)


def coadd_memory(wildcards, input, attempt):
    share = snakemake_share(len(PLAN.patches_of(wildcards.band, int(wildcards.tract))))
    coadd = needs.coadd_memory(
        patch_pixels(), len(input.warps), SETTINGS.coadd.memory_mb
    )
    return attempt * (share + coadd)


def coadd_runtime(wildcards, input, attempt):
    return attempt * needs.coadd_runtime(patch_pixels(), len(input.warps))


def tract_inputs(wildcards):
    """Return how many exposures can touch each patch of a tract, and the pixels of their CCDs."""
    band, tract = wildcards.band, int(wildcards.tract)
    patches = PLAN.patches_of(band, tract)
    inputs = [len(PLAN.exposures_of_patch(band, tract, patch)) for patch in patches]
    ccds = [exposure_pixels(e) for e in PLAN.exposures_of_tract(tract, band)]
    return inputs, ccds


def tract_workers():
    """Return the workers of the job of a tract."""
    return 1 if SETTINGS.parallel.backend == "serial" else SETTINGS.parallel.workers


def tract_threads(wildcards):
    """Return the cores of the job of a tract, or of each of its tasks."""
    return 1 if works_elsewhere() else tract_workers()


def tract_tasks(wildcards):
    """Return the tasks of the job of a tract, that which gathers included; None: one."""
    return tract_workers() + 1 if spreads_over_nodes() else None


def tract_needs(wildcards, threads):
    """Return the memory of a tract's workers together and of the gathering process, MB."""
    inputs, ccds = tract_inputs(wildcards)
    together = needs.tract_memory(
        max(largest for largest, _ in ccds),
        sum(together for _, together in ccds),
        patch_pixels(),
        max(inputs),
        SETTINGS.coadd.memory_mb,
        # workers on several nodes have no memory in common
        0 if works_elsewhere() else SETTINGS.coadd.spool_mb,
        tract_workers() if spreads_over_nodes() else threads,
    )
    matching = SETTINGS.coadd.background_matching
    gathering = 0
    if matching.enabled:
        gathering = needs.matching_memory(
            len(ccds), patch_pixels(), len(inputs), matching.bin_size
        )
    return together, gathering


def tract_memory(wildcards, threads, attempt):
    return attempt * (snakemake_share(1) + sum(tract_needs(wildcards, threads)))


def tract_task_memory(wildcards, threads, attempt):
    """Return the memory of each task of a tract, MB; None: it is asked for by node."""
    if not spreads_over_nodes():
        return None
    together, gathering = tract_needs(wildcards, threads)
    return attempt * needs.task_memory(together, tract_workers(), gathering)


def tract_runtime(wildcards, threads, attempt):
    inputs, ccds = tract_inputs(wildcards)
    together = sum(pixels for _, pixels in ccds)
    workers = tract_workers() if works_elsewhere() else threads
    return attempt * needs.tract_runtime(together, patch_pixels(), inputs, workers)


def picture_memory(wildcards, attempt):
    tract = int(wildcards.tract)
    coadds = sum(len(PLAN.patches_of(band, tract)) for band in PLAN.bands)
    picture = needs.picture_memory(patch_pixels(), coadds)
    return attempt * (snakemake_share(1) + picture)


# The Snakemake inside a job of a cluster works within what the job was given.
if not workflow.is_main_process:
    for name, amount in cluster.allocation().items():
        workflow.register_resource(name, amount)

# On one machine the jobs that run side by side must fit into its memory. `--resources mem_mb=N`
# or a profile says otherwise.
if not ON_CLUSTER and not {"mem", "mem_mb"} & set(workflow.global_resources):
    workflow.register_resource("mem_mb", needs.machine_memory())


# ---------------------------------------------------------------------------------------------
# What the user is told
# ---------------------------------------------------------------------------------------------


PROGRESS = progress.Progress({}, progress.to_user)


def report_start():
    """Say what the run is about, and what a user may not expect."""
    exit_on_input_error(cluster.begin, workflow)
    snakemake_patches.lift_default_rate_limit(workflow)
    progress.follow(PROGRESS, workflow)
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
