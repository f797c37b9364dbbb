"""Memory, time limit and workers of each kind of job: said here once, for the first attempt.

The rules ask the scheduler for them, times the attempt; `coaddflow plan` adds them up. The figures
per pixel stand in `coaddflow.runtime.resources`. Everything follows from the plan alone, so that a
file that is missing today changes nothing.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from coaddflow.runtime import resources
from coaddflow.workflow.calib_sets import ALWAYS
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import CALIB_STAGES, Stage

SNAKEMAKE_MB = 300
"""The two Snakemakes in each job of a cluster."""

SMALL_STEP_MB = 450
"""A step that reads and writes tables, with the Snakemakes of its job."""

ROW_BYTES = 10_000
"""A row of a manifest in memory, at most."""

WARP_OVERLAP = 1.25
"""Pixels of an exposure's warps over those of the exposure: patches overlap."""


@dataclass(frozen=True)
class Needs:
    """What one step (a job of Snakemake) needs in its first attempt."""

    memory: int
    """Memory of all of its processes together, MB."""
    runtime: int
    """Time limit, minutes."""
    seconds: float = 0.0
    """CPU time, s."""
    workers: int = 0
    """Processes over which it scatters its work, besides the one that gathers; 0: it has none."""
    threads: int = 1
    """Cores of its machine that it keeps busy."""
    gathering: int = 0
    """Part of the memory that the process that gathers needs for what it solves, MB."""
    pixels: float = 0.0
    """Pixels of the images that it writes."""
    width: int = 1
    """Steps of this kind in a job of the cluster that do not wait for each other, and so share
    the memory of its Snakemakes; 0: the memory of this one has them already."""

    def snakemake_share(self, cores: int | None) -> int:
        """Return this step's part of the memory of the Snakemakes in a job of a cluster, MB.

        Snakemake adds the memory of steps that run side by side.

        Parameters
        ----------
        cores : int or None
            Cores of the job; None: as many as its steps can use.
        """
        if not self.width:
            return 0
        at_a_time = self.width if cores is None else max(cores // self.threads, 1)
        return math.ceil(SNAKEMAKE_MB / min(self.width, at_a_time))

    @property
    def task_memory(self) -> int:
        """Memory of each task of a step that scatters over tasks of Slurm, MB.

        The task that gathers may have a node for itself, on which the Snakemakes and the process
        that started it are too.
        """
        gathers = SNAKEMAKE_MB + 2 * resources.PLAIN_MB + self.gathering
        return max(math.ceil((self.memory - self.gathering) / self.workers), gathers)

    def asked(self, cores: int | None, on_tasks: bool, has_snakemakes: bool = True) -> int:
        """Return the memory that this step asks for, MB.

        Parameters
        ----------
        cores : int or None
            Cores of its job; None: as many as its steps can use.
        on_tasks : bool
            Whether its workers are tasks of Slurm; one more gathers, and all get as much.
        has_snakemakes : bool
            Whether the Snakemakes of a job of a cluster are beside it.
        """
        if on_tasks and self.workers:
            return (self.workers + 1) * self.task_memory
        return self.memory + (self.snakemake_share(cores) if has_snakemakes else 0)


Names = Mapping[str, str]
"""Wildcards of a job and their values: ``{"exposure": "1001", "ccd": "3"}``."""


def of(
    stage: Stage, plan: Plan, names: Names, cores: int | None = None, on_tasks: bool = False
) -> Needs:
    """Return what a job of a stage needs.

    Parameters
    ----------
    stage : Stage
        The stage.
    cores : int, optional
        Cores of the job, which a job that scatters may not exceed with workers of its own.
    on_tasks : bool
        Whether its workers are tasks of Slurm, which may be on several nodes.
    """
    needs_of = OF_STAGE[stage.name]
    if stage.scatters:
        return needs_of(plan, names, cores, on_tasks)
    return needs_of(plan, names)


def alike(plan: Plan, names: Names) -> Names:
    """Return a job of the same stage that needs the same: that of the first raw exposure, for all.

    Planning asks for the needs of each job, and of the raw exposures all have the same CCDs.
    """
    if "exposure" not in names or "tract" in names or names["exposure"] not in plan.science:
        return names
    return {**names, "exposure": plan.first_raw}


def of_manifest(plan: Plan, names: Names) -> Needs:
    """Return what gathering the rows of an exposure needs."""
    return Needs(SMALL_STEP_MB, 5, width=0)


def of_tables(plan: Plan, names: Names) -> Needs:
    """Return what a step needs that reads and writes tables of a tract."""
    return Needs(SMALL_STEP_MB, 10, width=0)


def of_small_table(plan: Plan, names: Names) -> Needs:
    """Return what listing files needs, of which no more than the headers are read."""
    return Needs(SMALL_STEP_MB, 10, width=0)


def of_survey(plan: Plan, names: Names) -> Needs:
    """Return what a step needs that reads the tables of all exposures."""
    n_rows = sum(len(plan.images.get(exposure, plan.ccds)) for exposure in plan.exposures)
    return Needs(SMALL_STEP_MB + math.ceil(ROW_BYTES * n_rows / 1e6), 60, width=0)


# ---------------------------------------------------------------------------------------------
# Calibration frames
# ---------------------------------------------------------------------------------------------


def calib_files(plan: Plan, kind: str, band: str | None, name: str) -> int:
    """Return the number of files, raw or calibrated, that a calibration frame is made from."""
    made_with = plan.sets_made_with(kind, band, name).values()
    return len(plan.calib_frames(kind, band, name)) + sum(map(len, made_with))


def _of_calib(kind: str, plan: Plan, names: Names) -> Needs:
    """Return what a calibration frame of a CCD needs."""
    n_files = calib_files(plan, kind, names.get("band"), names.get("set", ALWAYS))
    nx, ny = plan.ccds[int(names["ccd"])].size
    seconds = resources.calib_seconds(nx * ny, n_files)
    memory = resources.calib_memory(nx * ny, n_files, plan.settings.calibs.memory)
    if kind == "defects" and plan.settings.calibs.defects.source == "frames":
        memory = resources.defects_memory(nx * ny)
    return Needs(memory, resources.time_limit(seconds), seconds, pixels=nx * ny)


# ---------------------------------------------------------------------------------------------
# Exposures
# ---------------------------------------------------------------------------------------------


def ccd_pixels(plan: Plan, exposure: str, ccd: int) -> int:
    """Return the number of pixels of a CCD of an exposure."""
    if exposure in plan.images:
        return plan.images[exposure][ccd].nx * plan.images[exposure][ccd].ny
    nx, ny = plan.ccds[ccd].size
    return nx * ny


def exposure_pixels(plan: Plan, exposure: str) -> tuple[int, ...]:
    """Return the number of pixels of each CCD of an exposure."""
    if exposure not in plan.images:
        return _pixels(plan.raw_sizes)
    return tuple(ccd_pixels(plan, exposure, ccd) for ccd in plan.images[exposure])


@functools.lru_cache(maxsize=16)
def _pixels(sizes: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    return tuple(nx * ny for nx, ny in sizes)


def spare_cores(stage: Stage, plan: Plan, cores: int | None) -> int:
    """Return how many times the cores of its `Needs` a step on CCDs may have.

    More than once where all CCDs, or warps, of the run would leave cores idle, unless the settings
    say how many cores share one.

    Parameters
    ----------
    cores : int or None
        Cores of the run; None on a cluster, where each job asks for its own.
    """
    parallel = plan.settings.parallel
    if cores is None or parallel.ccd_threads is not None:
        return 1
    if stage.scatters and not parallel.has_workers_here:
        return 1
    if stage.name == "warp":
        n_items = sum(len(plan.overlaps[exposure]) for exposure in plan.exposures)
    else:
        n_items = len(plan.science) * len(plan.ccds)
    return max(cores // max(n_items, 1), 1)


def of_raw_ccd(plan: Plan, names: Names) -> Needs:
    """Return what one CCD needs from raw pixels to its calexp."""
    return replace(of_ccd(plan, names), threads=plan.settings.parallel.ccd_threads or 1)


def of_ccd(plan: Plan, names: Names) -> Needs:
    """Return what an image calibrated elsewhere, or a raw CCD, needs with one thread."""
    exposure = names["exposure"]
    pixels = ccd_pixels(plan, exposure, int(names["ccd"]))
    seconds = resources.ccd_seconds(pixels)
    width = len(plan.images.get(exposure, plan.ccds))
    memory = resources.ccd_memory(pixels)
    return Needs(memory, resources.time_limit(seconds), seconds, pixels=pixels, width=width)


def _workers(plan: Plan, n_items: int, cores: int | None, on_tasks: bool) -> tuple[int, int, int]:
    """Return the workers of a job, its cores, and the workers for which it needs memory.

    ``n_items`` can be worked on at a time; the others are parameters of `of`.
    """
    parallel = plan.settings.parallel
    workers = 1 if parallel.backend == "serial" else min(parallel.workers, n_items)
    if _works_elsewhere(plan, on_tasks):
        return workers, 1, workers if on_tasks else 1
    workers = workers if cores is None else min(workers, cores)
    return workers, workers, workers


def _works_elsewhere(plan: Plan, on_tasks: bool) -> bool:
    """Return whether workers are not processes of the job, or not of its node at least."""
    parallel = plan.settings.parallel
    return on_tasks or (parallel.backend == "dask" and parallel.dask_address is not None)


def of_exposure(
    plan: Plan, names: Names, cores: int | None = None, on_tasks: bool = False
) -> Needs:
    """Return what an exposure that is one job needs; parameters as of `of`."""
    pixels, is_raw = exposure_pixels(plan, names["exposure"]), names["exposure"] in plan.science
    workers, threads, counted = _workers(plan, len(pixels), cores, on_tasks)
    if is_raw and plan.settings.parallel.has_workers_here:
        threads = workers * (plan.settings.parallel.ccd_threads or 1)
        threads = threads if cores is None else min(threads, cores)
    parts = plan.settings.exposure.enabled if is_raw else ()
    memory = resources.MASTER_MB
    memory += sum(map(resources.ccd_memory, sorted(pixels, reverse=True)[:counted]))
    if parts:
        # without coefficients in the camera file no signals of aggressors are kept
        crosstalk = "crosstalk" in parts and bool(plan.crosstalk)
        memory += resources.held_memory(pixels, crosstalk)
    rounds = math.ceil(len(pixels) / workers)
    runtime = resources.time_limit(rounds * resources.ccd_seconds(max(pixels)))
    seconds = resources.ccd_seconds(sum(pixels))
    return Needs(memory, runtime, seconds, workers, threads, pixels=sum(pixels))


# ---------------------------------------------------------------------------------------------
# Tracts
# ---------------------------------------------------------------------------------------------


def patch_pixels(plan: Plan, tract: int) -> int:
    """Return the number of pixels of the largest patch of a tract, with its border."""
    grid = plan.sky_tract(tract)
    columns, rows = (
        min(size + 2 * grid.patch_border, size * n)
        for size, n in zip(grid.patch_inner_size, grid.n_patches, strict=True)
    )
    return columns * rows


def tract_pixels(plan: Plan, tract: int) -> int:
    """Return the number of pixels of a tract."""
    grid = plan.sky_tract(tract)
    return grid.width * grid.height


def pixels_on_tract(plan: Plan, exposure: str, tract: int) -> int:
    """Return how many pixels of an exposure can fall on a tract, at most.

    A CCD that reaches beyond the tract, or has finer pixels, is not larger there than the tract.
    """
    return _at_most(exposure_pixels(plan, exposure), tract_pixels(plan, tract))


@functools.lru_cache(maxsize=1024)
def _at_most(pixels: tuple[int, ...], most: int) -> int:
    return sum(min(of_ccd, most) for of_ccd in pixels)


def of_warp(plan: Plan, names: Names) -> Needs:
    """Return what the warps of an exposure on a tract need."""
    exposure, tract = names["exposure"], int(names["tract"])
    on_tract = pixels_on_tract(plan, exposure, tract)
    largest = max(exposure_pixels(plan, exposure))
    seconds = resources.warp_seconds(on_tract)
    touched = min(resources.WARPED_PATCHES, len(plan.overlaps[exposure][tract]))
    memory = resources.warp_memory(largest, patch_pixels(plan, tract), touched)
    return Needs(
        memory,
        resources.time_limit(seconds),
        seconds,
        threads=plan.settings.parallel.ccd_threads or 1,
        pixels=WARP_OVERLAP * on_tract,
        width=len(plan.exposures_of_tract(tract)),
    )


def of_coadd(plan: Plan, names: Names) -> Needs:
    """Return what the coadd of a patch needs."""
    band, tract, patch = names["band"], int(names["tract"]), names["patch"]
    pixels, n_inputs = patch_pixels(plan, tract), len(plan.exposures_of_patch(band, tract, patch))
    seconds = resources.coadd_seconds(pixels, n_inputs)
    memory = resources.coadd_memory(pixels, n_inputs, plan.settings.coadd.memory_mb)
    width = len(plan.patches_of(band, tract))
    return Needs(memory, resources.time_limit(seconds), seconds, pixels=pixels, width=width)


def boxes_of(plan: Plan, exposure: str) -> Sequence[float]:
    """Return the pixels of an upright box around each CCD of an exposure."""
    if exposure in plan.images:
        return [resources.SPOOL_ROOM * pixels for pixels in exposure_pixels(plan, exposure)]
    return _boxes(plan.raw_sizes, plan.science[exposure].rotation)


@functools.lru_cache(maxsize=4096)
def _boxes(sizes: tuple[tuple[int, int], ...], rotation: float | None) -> tuple[float, ...]:
    return tuple(nx * ny * resources.box_room(nx, ny, rotation) for nx, ny in sizes)


def _tract_memory(plan: Plan, band: str, tract: int, counted: int) -> int:
    """Return the memory of the processes that warp the CCDs of a tract and then coadd its patches.

    ``counted`` of them are on the machine.
    """
    patches, coadd = plan.patches_of(band, tract), plan.settings.coadd
    exposures = plan.exposures_of_tract(tract, band)
    ccds = [pixels for name in exposures for pixels in exposure_pixels(plan, name)]
    inputs = max(len(plan.exposures_of_patch(band, tract, patch)) for patch in patches)
    warping = resources.warped_ccd_memory(max(ccds), tract_pixels(plan, tract))
    coadding = resources.coadd_memory(patch_pixels(plan, tract), inputs, coadd.memory_mb)
    work = resources.tract_work_memory(counted, len(ccds), warping, len(patches), coadding)
    return resources.MASTER_MB + work


def of_tract(plan: Plan, names: Names, cores: int | None = None, on_tasks: bool = False) -> Needs:
    """Return what a band of a tract that is one job needs; parameters as of `of`."""
    band, tract = names["band"], int(names["tract"])
    patches, patch = plan.patches_of(band, tract), patch_pixels(plan, tract)
    exposures = plan.exposures_of_tract(tract, band)
    settings, parallel = plan.settings.coadd, plan.settings.parallel
    workers, threads, counted = _workers(plan, parallel.workers, cores, on_tasks)
    memory = _tract_memory(plan, band, tract, counted)
    if not _works_elsewhere(plan, on_tasks):  # workers on several nodes have no memory in common
        boxes = [box for name in exposures for box in boxes_of(plan, name)]
        memory += resources.spool_memory(boxes, tract_pixels(plan, tract), settings.spool_mb)
    matching, gathering = settings.background_matching, 0
    if matching.enabled:
        gathering = resources.matching_memory(
            len(exposures), patch, len(patches), matching.bin_size
        )
    on_tract = sum(pixels_on_tract(plan, name, tract) for name in exposures)
    warping = resources.warp_seconds(on_tract)
    coadding = [
        resources.coadd_seconds(patch, len(plan.exposures_of_patch(band, tract, name)))
        for name in patches
    ]
    longest = warping / workers + math.ceil(len(patches) / workers) * max(coadding)
    # with MPI each band is a job of its own
    bands = [one for one in plan.bands if plan.patches_of(one, tract)]
    return Needs(
        memory + gathering,
        resources.time_limit(longest),
        warping + sum(coadding),
        workers,
        threads,
        gathering,
        patch * len(patches) + WARP_OVERLAP * on_tract * settings.keep_warps,
        width=1 if parallel.backend == "mpi" else len(bands),
    )


def of_picture(plan: Plan, names: Names) -> Needs:
    """Return what the picture of a tract needs."""
    tract = int(names["tract"])
    patches = {patch for band in plan.bands for patch in plan.patches_of(band, tract)}
    return Needs(resources.picture_memory(patch_pixels(plan, tract), len(patches)), 10)


def of_depth(plan: Plan, names: Names) -> Needs:
    """Return what the depth maps of a tract need, one after the other."""
    tract = int(names["tract"])
    pixels = patch_pixels(plan, tract)
    n_patches = sum(len(plan.patches_of(band, tract)) for band in plan.bands)
    seconds = resources.DEPTH_SECONDS_PER_MPIXEL * pixels / 1e6 * n_patches
    memory = resources.depth_memory(pixels)
    return Needs(memory, resources.time_limit(seconds), seconds, pixels=n_patches * pixels / 3)


# ---------------------------------------------------------------------------------------------
# By stage
# ---------------------------------------------------------------------------------------------


OF_STAGE: Mapping[str, Callable[..., Needs]] = {
    "frame_table": of_small_table,
    **{name: partial(_of_calib, kind) for name, kind in CALIB_STAGES.items()},
    "calib_table": of_small_table,
    "calexp": of_raw_ccd,
    "calibrated": of_ccd,
    "manifest": of_manifest,
    "exposure": of_exposure,
    "calibrated_exposure": of_exposure,
    "tract_corners": of_tables,
    "survey_corners": of_survey,
    "warp": of_warp,
    "coadd": of_coadd,
    "tract": of_tract,
    "picture": of_picture,
    "depth": of_depth,
}
"""What the jobs of each stage need, by its name in the registry."""
