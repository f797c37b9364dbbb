# What all rules share: the settings, the plan, and the functions that answer "which files?",
# "which settings?" and "how much memory?". The only file with functions.
#
# Snakemake reads this again in every job of a cluster, so nothing slow may happen here: the plan
# comes from a cache (coaddflow.workflow.plan), and astropy is not imported.

import functools
import math
import os
import sys
import time

from snakemake import __version__ as snakemake_version
from snakemake.dag import DAG
from snakemake.jobs import GroupJob, Job

RUN_STARTED = time.time()

try:
    from coaddflow.cluster import slurm as cluster
    from coaddflow.runtime import log as joblog
    from coaddflow.workflow import report as messages
    from coaddflow.workflow import plan as planning
    from coaddflow.runtime import resources as needs
    from coaddflow.errors import InputError
    from coaddflow.settings import load_settings
    from coaddflow.settings.keys import check_keys
    from coaddflow.tables.manifest import ccds_failed_with, failed_fraction
except ModuleNotFoundError as error:
    sys.exit(
        f"coaddflow: error: {error}. The package is not installed for {sys.executable}. Run "
        "`make demo`, or `pip install -e .` in the folder of the Snakefile"
    )


# ---------------------------------------------------------------------------------------------
# Settings and plan
# ---------------------------------------------------------------------------------------------


DEMO_HINT = (
    ". These are the settings of the demo: `make demo` makes its data and runs it; "
    "--configfile FILE takes the settings of another survey"
)


def config_file():
    """Return the settings file of a run that names none: the working folder's, or the demo's."""
    own = "config.yaml"
    return own if os.path.exists(own) else os.path.join(workflow.basedir, own)


# A file given with --configfile must not be mixed with the demo's settings, so the default is
# read only where none is given.
if not workflow.overwrite_configfiles:

    configfile: config_file()


def checked_plan():
    """Return the plan of the run; a mistake of the user ends it with one line, no traceback."""
    source = ", ".join(str(path) for path in workflow.configfiles) or None
    try:
        # jobs have been checked by the run that started them
        for path in workflow.configfiles if workflow.is_main_process else ():
            with open(path, encoding="utf-8") as stream:
                check_keys(stream.read(), path)
        plan = planning.make_plan(load_settings(config, source))
        plan.check()
        return plan
    except InputError as error:
        demo = os.path.realpath(os.path.join(workflow.basedir, "config.yaml"))
        is_demo = [os.path.realpath(path) for path in workflow.configfiles] == [demo]
        hint = DEMO_HINT if is_demo else ""
        sys.exit(f"coaddflow: error: {error}{hint}")


PLAN = checked_plan()
SETTINGS = PLAN.settings


wildcard_constraints:
    exposure="[A-Za-z0-9][A-Za-z0-9_-]*",
    ccd=r"\d+",
    band="[A-Za-z0-9][A-Za-z0-9_-]*",
    tract=r"\d+",
    patch=r"\d+_\d+",


# Whether the scheduler sees exposures, or their CCDs.
WHOLE_EXPOSURES = SETTINGS.parallel.calexp == "exposure"


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


def replace_in_snakemake(owner, name, replacement):
    """Put something in the place of a method of Snakemake's, and return the method."""
    found = getattr(owner, name, None)
    if found is None:
        warn_of_snakemake(f"{owner.__name__}.{name}")
    setattr(owner, name, replacement)
    return found


def warn_of_snakemake(name):
    """Say that this Snakemake lacks something that is replaced here."""
    print(
        f"coaddflow: warning: Snakemake {snakemake_version} has no {name}, which coaddflow "
        "replaces (rules/common.smk tells why)",
        file=sys.stderr,
    )


# Snakemake 9.27 looks for groups that depend on themselves twice. DAG.validate_group takes a time
# that grows with the number of jobs; DAG._check_groups, which looks for the same afterwards, one
# that grows with the square of a group's size times the number of all jobs before it: 75 s for 12
# exposures of HSC, hours for a survey. It is left out (docs/workflow.md).
replace_in_snakemake(DAG, "_check_groups", lambda self: None)


def group_of(name):
    """Return the group of a rule: a name with wildcards on a cluster, None elsewhere."""
    return name if ON_CLUSTER else None


# The group of a tract. With MPI its bands are jobs of their own: Snakemake would add the CPUs of a
# task to those of the other bands, and not only the tasks.
BY_BAND = SETTINGS.parallel.backend == "mpi" and SETTINGS.parallel.coadd == "tract"
TRACT_GROUP = group_of("tract_{tract}_{band}" if BY_BAND else "tract_{tract}")


# A failure that another attempt cannot mend (too many failed CCDs, an unusable file) is not tried
# again. Snakemake 9.27 has only `retries` of a rule, and a group is tried as often as that rule of
# it that is tried most, so the answer is taken from the last words of the jobs' logs.
def retries_left(job):
    """Return how often a job or a group of jobs may be tried again."""
    jobs = job.jobs if job.is_group() else [job]
    if joblog.failed_for_good([log for one in jobs for log in one.log], RUN_STARTED):
        return 0
    return max(one.rule.restart_times for one in jobs)


for kind_of_job in (Job, GroupJob):
    replace_in_snakemake(kind_of_job, "restart_times", property(retries_left))


def log_words_of_cluster(group, msg=None, **options):
    """Log that a group of jobs has failed, and what the cluster says about it."""
    if msg and workflow.is_main_process:
        print(f"coaddflow: {group.name}: {msg.splitlines()[0]}", file=sys.stderr)
    log_error_of_group(group, msg, **options)


# Snakemake 9.27 drops the words with which a cluster refuses or ends a group of jobs.
log_error_of_group = replace_in_snakemake(GroupJob, "log_error", log_words_of_cluster)


def raw_exposure_pattern():
    """Return a pattern of the exposures that are made from raw frames."""
    others = "|".join(PLAN.images)
    return (
        rf"(?!(?:{others})[/.])[A-Za-z0-9][A-Za-z0-9_-]*"
        if others
        else "[A-Za-z0-9_-]+"
    )


def image_exposure_pattern():
    """Return a pattern of the exposures that were calibrated elsewhere."""
    return "|".join(PLAN.images)


# ---------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------


def calibration_frames():
    """Return the calibration frames that are made, for all CCDs."""
    frames = {
        PLAN.calib_product(kind, ccd, band)
        for kind in planning.CALIB_KINDS
        if PLAN.science and getattr(SETTINGS.calibs, kind).source != "given"
        for ccd in PLAN.ccds
        for band in PLAN.bands
    }
    return sorted(frames - {None})


def coadds_of(tract):
    """Return the coadds of a tract, of all bands: the files, or the lists that name them."""
    if SETTINGS.parallel.coadd == "tract":
        return [
            f"results/coadd/{band}/{tract}.ecsv"
            for band in PLAN.bands
            if PLAN.patches_of(band, tract)
        ]
    return [
        f"results/coadd/{band}/{tract}/{patch}.fits"
        for band in PLAN.bands
        for patch in PLAN.patches_of(band, tract)
    ]


def warps_of(exposure):
    """Return the warp tables of an exposure, one a tract; none where a tract is one job."""
    if SETTINGS.parallel.coadd == "tract":
        return []
    return [
        f"results/warp/{tract}/{exposure}.ecsv" for tract in PLAN.overlaps[exposure]
    ]


def or_one_line(make_ready):
    """Make the run ready; what hinders it ends it with one line, no traceback."""
    try:
        make_ready(workflow)
    except InputError as error:
        sys.exit(f"coaddflow: error: {error}")


def all_products(wildcards):
    """Return what a run makes. It is asked for when planning begins, after the executor is known.

    Manifests, warp tables, databases and calibration frames are named here although coadds hang
    on them: Snakemake does not miss an intermediate file that a failed job has taken away as long
    as the older files made from it are there, and the next run would call them up to date.
    """
    or_one_line(cluster.prepare)
    return [
        *calibration_frames(),
        *(f"results/summary/{exposure}.ecsv" for exposure in PLAN.exposures),
        "results/corners.sqlite",
        *(path for exposure in PLAN.exposures for path in warps_of(exposure)),
        *(
            f"results/corners/{band}/{tract}.sqlite"
            for tract in PLAN.tracts
            for band in PLAN.bands
            if PLAN.patches_of(band, tract)
        ),
        *(path for tract in PLAN.tracts for path in coadds_of(tract)),
        *(f"results/coadd/{tract}.png" for tract in PLAN.tracts),
    ]


# ---------------------------------------------------------------------------------------------
# Which files a job needs
# ---------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=None)
def is_there(path):
    return os.path.exists(path)


@functools.lru_cache(maxsize=4096)
def failed_for_want_of_file(row):
    """Return whether a CCD's row says that its raw file was missing (or there is no row)."""
    try:
        with open(row, encoding="utf-8") as stream:
            return '"missing_file"' in stream.read()
    except FileNotFoundError:
        return True


def files_or_failure(files, row):
    """Return the raw files of a CCD as inputs of its job.

    A file that is not there would stop the whole plan, so it is left out: the job then runs, and
    the CCD fails with its reason. When the file appears the set of inputs changes, and the CCD is
    done again. Where the CCD has been done and its raw file has since been moved away (an
    archive), the file stays an input and the CCD stays done.
    """
    if all(is_there(path) for path in files) or not failed_for_want_of_file(row):
        return files
    return [path for path in files if is_there(path)]


@functools.lru_cache(maxsize=4096)
def failed_for_want_of_frames(master):
    """Return whether a calibration frame could not be made because raw frames were missing."""
    with open(master, "rb") as stream:
        return b"CFFAILED= 'missing_frames" in stream.read(2880)


def frames_or_failure(kind, wildcards):
    """Return the raw frames that a calibration frame of a CCD is made from.

    As with `files_or_failure`: frames that are not there are left out, unless the calibration
    frame has been made from them already.
    """
    ccd, band = int(wildcards.ccd), getattr(wildcards, "band", None)
    files = [PLAN.raw_file(exposure, ccd) for exposure in PLAN.calib_frames(kind, band)]
    done = PLAN.calib_product(kind, ccd, band or PLAN.bands[0])
    found = [path for path in files if is_there(path)]
    if len(found) < len(files) and done and is_there(done):
        return found if failed_for_want_of_frames(done) else files
    return found


def bias_inputs(wildcards):
    """Return what the master bias of a CCD is made from."""
    return {"raw": frames_or_failure("bias", wildcards)}


def dark_inputs(wildcards):
    """Return what the master dark of a CCD is made from."""
    return {"raw": frames_or_failure("dark", wildcards)} | calibs_of_ccd(
        wildcards, "bias"
    )


def flat_inputs(wildcards):
    """Return what the flat of a CCD and band is made from."""
    inputs = {"raw": frames_or_failure("flat", wildcards)}
    return inputs | calibs_of_ccd(wildcards, "bias", "dark")


def defects_inputs(wildcards):
    """Return what the map of bad pixels of a CCD is made from."""
    if SETTINGS.calibs.defects.source == "night_sky":
        if PLAN.defects_from_dark:
            return calibs_of_ccd(wildcards, "dark")
        inputs = {"raw": frames_or_failure("defects", wildcards)}
        return inputs | calibs_of_ccd(wildcards, "bias")
    flats = PLAN.flats_of(int(wildcards.ccd))
    return calibs_of_ccd(wildcards, "dark") | {"flats": flats}


def calibs_of_ccd(wildcards, *kinds, band=None):
    """Return the calibration frames of a CCD that there are, by kind."""
    band = band or getattr(wildcards, "band", PLAN.bands[0])
    products = {
        kind: PLAN.calib_product(kind, int(wildcards.ccd), band) for kind in kinds
    }
    return {kind: path for kind, path in products.items() if path is not None}


def calexp_inputs(wildcards):
    """Return the raw file, calibration frames and reference catalogue of a CCD."""
    exposure, ccd = wildcards.exposure, int(wildcards.ccd)
    row = f"results/calexp/{exposure}/{ccd}.json"
    return {
        "raw": files_or_failure([PLAN.raw_file(exposure, ccd)], row),
        **calibs_of_ccd(wildcards, *planning.CALIB_KINDS, band=PLAN.band_of(exposure)),
        "refcat": PLAN.refcat_files,
    }


def exposure_inputs(wildcards):
    """Return the raw files, calibration frames and reference catalogue of all CCDs."""
    exposure, band = wildcards.exposure, PLAN.band_of(wildcards.exposure)
    raw = {ccd: [PLAN.raw_file(exposure, ccd)] for ccd in PLAN.ccds}
    calibs = [
        PLAN.calib_product(kind, ccd, band)
        for kind in planning.CALIB_KINDS
        for ccd in PLAN.ccds
    ]
    return {
        "raw": files_of_exposure_or_failure(exposure, raw),
        "calibs": list(dict.fromkeys(path for path in calibs if path is not None)),
        "refcat": PLAN.refcat_files,
    }


def files_of_exposure_or_failure(exposure, files):
    """Return the raw files of an exposure, given by CCD, as inputs of its job.

    As with `files_or_failure`: a file that is not there is left out only if its CCD has failed
    for want of it, or the exposure has not been done.
    """
    manifest = f"results/summary/{exposure}.ecsv"
    without = ccds_failed_with(manifest, "missing_file")
    kept = [
        path
        for ccd, paths in files.items()
        for path in paths
        if is_there(path) or not (without is None or ccd in without)
    ]
    return list(dict.fromkeys(kept))


def images_inputs(wildcards):
    """Return the files of all images of an exposure that was calibrated elsewhere."""
    exposure = wildcards.exposure
    files = {ccd: PLAN.image_files(exposure, ccd) for ccd in PLAN.ccds_of(exposure)}
    return files_of_exposure_or_failure(exposure, files)


def calibrated_inputs(wildcards):
    """Return the files of an image calibrated elsewhere: image, weight, mask."""
    exposure, ccd = wildcards.exposure, int(wildcards.ccd)
    row = f"results/calexp/{exposure}/{ccd}.json"
    return files_or_failure(PLAN.image_files(exposure, ccd), row)


def rows_of_exposure(wildcards):
    """Return the rows of all CCDs of an exposure."""
    exposure = wildcards.exposure
    return [f"results/calexp/{exposure}/{ccd}.json" for ccd in PLAN.ccds_of(exposure)]


def manifests_of_tract(wildcards):
    """Return the manifests of the exposures of a band that can touch a tract."""
    exposures = PLAN.exposures_of_tract(int(wildcards.tract), wildcards.band)
    return [f"results/summary/{exposure}.ecsv" for exposure in exposures]


def all_manifests(wildcards):
    """Return the manifests of all exposures."""
    return [f"results/summary/{exposure}.ecsv" for exposure in PLAN.exposures]


def warps_of_patch(wildcards):
    """Return the warp tables of the exposures of a band that can touch a patch."""
    tract = int(wildcards.tract)
    exposures = PLAN.exposures_of_patch(wildcards.band, tract, wildcards.patch)
    return [f"results/warp/{tract}/{exposure}.ecsv" for exposure in exposures]


def patches_of_tract(wildcards):
    """Return the patches of a tract that exposures of a band can touch."""
    return PLAN.patches_of(wildcards.band, int(wildcards.tract))


def coadds_of_tract(wildcards):
    """Return the coadds of a tract, of all bands."""
    return coadds_of(int(wildcards.tract))


# ---------------------------------------------------------------------------------------------
# What a job does differently when the settings or the tables change (params)
# ---------------------------------------------------------------------------------------------
# A job is done again when its params change, so they carry the settings that it uses, and no
# others; nothing absolute, random or temporal.


def ccd_facts(wildcards):
    """Return what the table says about an exposure or an image."""
    return PLAN.facts(wildcards.exposure, int(wildcards.ccd))


def exposure_facts(wildcards):
    """Return what the table says about a raw exposure; None for images calibrated elsewhere."""
    return (
        PLAN.facts(wildcards.exposure) if wildcards.exposure in PLAN.science else None
    )


def ccds_of_exposure(wildcards):
    """Return raw file and calibration frames of each CCD of an exposure."""
    exposure, band = wildcards.exposure, PLAN.band_of(wildcards.exposure)
    found = []
    for ccd in PLAN.ccds_of(exposure):
        calibs = {
            kind: PLAN.calib_product(kind, ccd, band) for kind in planning.CALIB_KINDS
        }
        found.append(
            {
                "ccd": ccd,
                "raw": PLAN.raw_file(exposure, ccd),
                "calibs": {
                    kind: path for kind, path in calibs.items() if path is not None
                },
            }
        )
    return found


def images_of_exposure(wildcards):
    """Return what the table says about the images of an exposure calibrated elsewhere."""
    exposure = wildcards.exposure
    return [PLAN.facts(exposure, ccd) for ccd in PLAN.ccds_of(exposure)]


def exposure_times(wildcards, input):
    """Return the exposure times of the frames of a calibration frame, by file."""
    exposures = [*PLAN.calibration.values(), *PLAN.science.values()]
    ccd = int(wildcards.ccd)
    times = {PLAN.raw_file(row.exposure, ccd): row.exposure_time for row in exposures}
    return {path: times[path] for path in input.get("raw", [])}


def ccd_fingerprint(wildcards):
    """Return a checksum of what the camera file says about a CCD."""
    return PLAN.ccds[int(wildcards.ccd)].fingerprint


@functools.lru_cache(maxsize=None)
def calexp_settings_of_band(band):
    """Return the settings that make a calexp of a band."""
    return PLAN.calexp_settings(band)


def calexp_settings(wildcards):
    """Return the settings that make the calexps of an exposure."""
    return calexp_settings_of_band(PLAN.band_of(wildcards.exposure))


@functools.lru_cache(maxsize=None)
def exposure_settings_of_band(band):
    """Return the settings that make all calexps of an exposure of a band."""
    return PLAN.exposure_settings(band)


def exposure_settings(wildcards):
    """Return the settings that make the calexps of an exposure in one job."""
    return exposure_settings_of_band(PLAN.band_of(wildcards.exposure))


def verdict(wildcards):
    """Return whether an exposure that has passed would fail by the settings of today.

    `calexp.max_failed_fraction` is not in the params of the gather job itself: raising it, to let
    one exposure pass, must not redo all others with all that hangs on them. Lowering it must fail
    those that now have too many failures, and no others.
    """
    manifest = f"results/summary/{wildcards.exposure}.ecsv"
    fraction = failed_fraction(manifest)
    return "fails" if fraction > SETTINGS.calexp.max_failed_fraction else "passes"


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


def lift_default_rate_limit():
    """Take away the limit on jobs a second, unless the user has set one.

    Snakemake 9.27 enforces its default of 100 jobs a second by looking at all waiting jobs again
    one second after every look; each job that ends adds a look to those of every second. After a
    thousand jobs the scheduler does nothing else.
    """
    if not hasattr(workflow.scheduler, "job_rate_limiter"):
        warn_of_snakemake("JobScheduler.job_rate_limiter")
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    if limit is not None and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


def report_start():
    """Say what the run is about, and what a user may not expect."""
    or_one_line(cluster.begin)
    print(messages.start_text(PLAN), file=sys.stderr)


def report_success():
    """Say what there is now."""
    print(messages.success_text(PLAN), file=sys.stderr)


def report_failure():
    """Say what failed, why, and where its log is."""
    print(messages.failure_text("logs", RUN_STARTED), file=sys.stderr)
