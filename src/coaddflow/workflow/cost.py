"""What a run will cost, before it is submitted; and what it did cost, from its benchmark files.

Everything is counted: CCDs and their pixels, frames, patches and exposures that can touch them,
times the figures of `runtime.resources`. One job of a cluster is an exposure, a tract, or the
calibration frames of a CCD; it has many steps, or one where the settings ``parallel`` say so.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from coaddflow.runtime import resources as needs
from coaddflow.workflow.measured import _RULES
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import CALIB_KINDS

START_CPU_SECONDS = 1.8
"""CPU time of Python and its libraries, for each step of a job and each worker."""

JOB_CPU_SECONDS = 4.5
"""CPU time of the two Snakemakes in each job of a cluster."""

PIXEL_BYTES = 13.0
"""An image with variance and mask on disk, as it is written without compression."""

WARP_OVERLAP = 1.25
"""Pixels of an exposure's warps over those of the exposure: patches overlap."""

TABLES_MINUTES, PICTURE_MINUTES, MANIFEST_MINUTES, SURVEY_MINUTES = 10, 10, 5, 60
"""Time limits of the steps that read and write tables, or the coadds made small, in rules/."""


@dataclass(frozen=True)
class Cost:
    """Cost of one kind of cluster job.

    Attributes
    ----------
    name : str
        "calibration", "exposure", "tract" or "survey".
    n_jobs : int
        Jobs of the cluster.
    n_steps : int
        Steps (jobs of Snakemake) in all of them together.
    core_hours : float
        CPU time of all.
    memory : int
        Largest memory of one job, MB.
    runtime : int
        Longest time limit of one job, minutes.
    disk : float
        Size of the products, GB (1e9 bytes).

    Memory and time limit are those of the first attempt; the second asks for twice as much, the
    third for three times.
    """

    name: str
    n_jobs: int
    n_steps: int
    core_hours: float
    memory: int
    runtime: int
    disk: float


def forecast(plan: Plan, cores: int) -> list[Cost]:
    """Return what a run will cost at most, one entry a kind of job.

    Parameters
    ----------
    plan : Plan
        What there is to do; what is done already is counted too.
    cores : int
        Cores of one job (``cores`` of the profile).
    """
    exposures = [ccd_pixels(plan, exposure) for exposure in plan.exposures]
    return [
        _calibration(plan),
        _exposures(plan, exposures, cores),
        *([_tracts(plan, cores)] if plan.tracts else []),
        Cost("survey", 1, 1, _core_hours(1, 1, 0.0), 2 * needs.SMALL_STEP_MB, SURVEY_MINUTES, 0.0),
    ]


def _core_hours(n_jobs: int, n_starts: int, seconds: float) -> float:
    """Return the CPU time of jobs: Snakemakes, starts of Python, and work."""
    return (JOB_CPU_SECONDS * n_jobs + START_CPU_SECONDS * n_starts + seconds) / 3600


def _workers(plan: Plan, cores: int) -> int:
    """Return how many processes a job of a whole exposure or tract scatters its work over."""
    serial = plan.settings.parallel.backend == "serial"
    return 1 if serial else min(cores, plan.settings.parallel.workers)


def _in_turn(amounts: Iterable[int], width: int) -> list[list[int]]:
    """Return what runs side by side, one list after the other, as Snakemake puts it.

    Parameters
    ----------
    amounts : iterable of int
        Of each step of a group that hangs on no other of them.
    width : int
        Steps that run at a time.
    """
    longest = sorted(amounts, reverse=True)
    return [longest[i : i + width] for i in range(0, len(longest), width)]


def _minutes(amounts: Iterable[int], width: int) -> int:
    """Return the time limit of steps that run side by side, as the sum of those in turn."""
    return sum(max(some) for some in _in_turn(amounts, width))


def _exposure_memory(plan: Plan, ccds: list[int], cores: int) -> int:
    """Return the memory of the job of a whole exposure, from the pixels of its CCDs."""
    workers = min(_workers(plan, cores), len(ccds))
    parts = plan.settings.exposure.enabled
    return needs.exposure_memory(ccds, workers, bool(parts), "crosstalk" in parts)


def _tract_memory(plan: Plan, tract: int, band: str, cores: int) -> int:
    """Return the memory of the step that makes a whole tract in a band."""
    exposures = [ccd_pixels(plan, name) for name in plan.exposures_of_tract(tract, band)]
    inputs, coadd = _inputs(plan, tract, band), plan.settings.coadd
    memory = needs.tract_memory(
        max(max(ccds) for ccds in exposures),
        sum(sum(ccds) for ccds in exposures),
        patch_pixels(plan),
        max(inputs),
        coadd.memory_mb,
        coadd.spool_mb,
        _workers(plan, cores),
    )
    matching = coadd.background_matching
    if matching.enabled:
        memory += needs.matching_memory(
            len(exposures), patch_pixels(plan), len(inputs), matching.bin_size
        )
    return memory


def _bands_of(plan: Plan, tract: int) -> list[str]:
    """Return the bands in which a tract has coadds."""
    return [band for band in plan.bands if plan.patches_of(band, tract)]


def asked_memory(plan: Plan, cores: int) -> dict[str, int]:
    """Return the memory that one step of each rule asks for at most, MB.

    What the Snakemakes of a cluster's job need, and the growth with each attempt, come on top.
    """
    asked: dict[str, int] = {}
    if plan.settings.parallel.calexp == "exposure":
        exposures = [ccd_pixels(plan, exposure) for exposure in plan.exposures]
        asked["exposure"] = max(_exposure_memory(plan, ccds, cores) for ccds in exposures)
    if plan.settings.parallel.coadd == "tract" and plan.tracts:
        asked["tract"] = max(
            _tract_memory(plan, tract, band, cores)
            for tract in plan.tracts
            for band in _bands_of(plan, tract)
        )
    for name, exposures in (("calexp", plan.science), ("calibrated", plan.images)):
        pixels = [max(ccd_pixels(plan, exposure)) for exposure in exposures]
        if pixels:
            asked[name] = needs.ccd_memory(max(pixels))
            asked["warp"] = max(
                asked.get("warp", 0), needs.warp_memory(max(pixels), patch_pixels(plan))
            )
    inputs = [n for tract in plan.tracts for n in _inputs(plan, tract)]
    if inputs:
        block = plan.settings.coadd.memory_mb
        asked["coadd"] = needs.coadd_memory(patch_pixels(plan), max(inputs), block)
    for (kind, _), frames in _frames_of_masters(plan).items():
        largest = max(nx * ny for nx, ny in (facts.size for facts in plan.ccds.values()))
        memory = needs.calib_memory(largest, max(frames, 2), plan.settings.calibs.memory)
        rule = _RULES.get(kind, kind)
        asked[rule] = max(asked.get(rule, 0), memory)
    return asked


def patch_pixels(plan: Plan) -> int:
    """Return the number of pixels of a patch with its border."""
    sky = plan.settings.skymap
    return (sky.patch_inner_size + 2 * sky.patch_border) ** 2


def _inputs(plan: Plan, tract: int, *bands: str) -> list[int]:
    """Return how many exposures can touch each patch of a tract, in some bands or all."""
    return [
        len(plan.exposures_of_patch(band, tract, name))
        for band in bands or plan.bands
        for name in plan.patches_of(band, tract)
    ]


def _frames_of_masters(plan: Plan) -> dict[tuple[str, str | None], int]:
    """Return the number of frames of each calibration frame of a CCD, by kind and band."""
    return {
        (kind, band): len(plan.calib_frames(kind, band))
        for kind in CALIB_KINDS
        for band in (plan.bands if kind == "flat" else [None])
        if plan.science and getattr(plan.settings.calibs, kind).source not in ("given", "none")
    }


def ccd_pixels(plan: Plan, exposure: str) -> list[int]:
    """Return the number of pixels of each CCD of an exposure."""
    if exposure in plan.images:
        return [image.nx * image.ny for image in plan.images[exposure].values()]
    return [nx * ny for nx, ny in (ccd.size for ccd in plan.ccds.values())]


def _calibration(plan: Plan) -> Cost:
    """Return the cost of the calibration frames: one job a CCD, its frames one after another."""
    seconds, memory, size, steps, jobs, longest = 0.0, 0, 0.0, 0, 0, 0
    made = _frames_of_masters(plan)
    for ccd, facts in plan.ccds.items() if made else ():
        pixels = facts.size[0] * facts.size[1]
        here = [
            max(frames, 2)
            for (kind, band), frames in made.items()
            if plan.calib_product(kind, ccd, band or plan.bands[0])
        ]
        jobs += bool(here)
        steps += len(here)
        size += PIXEL_BYTES * pixels * len(here)
        per_frame = needs.CALIB_SECONDS_PER_MPIXEL_AND_FRAME * pixels / 1e6
        seconds += sum(frames * per_frame for frames in here)
        for frames in here:
            stack = plan.settings.calibs.memory
            memory = max(memory, needs.calib_memory(pixels, frames, stack))
        # each has the others of the CCD among its inputs, at most
        longest = max(longest, sum(needs.calib_runtime(pixels, n + len(here)) for n in here))
    memory += needs.SNAKEMAKE_MB
    hours = _core_hours(jobs, steps, seconds)
    return Cost("calibration", jobs, steps, hours, memory, longest, size / 1e9)


def _exposures(plan: Plan, exposures: list[list[int]], cores: int) -> Cost:
    """Return the cost of all exposures, from the pixels of their CCDs."""
    pixels = sum(sum(ccds) for ccds in exposures)
    if plan.settings.parallel.calexp == "ccd":
        steps = starts = sum(len(ccds) + 1 for ccds in exposures)
        memory = max(
            sum(sorted((needs.ccd_memory(n) for n in ccds), reverse=True)[:cores])
            for ccds in exposures
        )
        longest = MANIFEST_MINUTES + max(
            _minutes((needs.ccd_runtime(n) for n in ccds), cores) for ccds in exposures
        )
    else:
        workers = _workers(plan, cores)
        steps, starts = len(exposures), (workers + 1) * len(exposures)
        memory = max(_exposure_memory(plan, ccds, cores) for ccds in exposures)
        longest = max(needs.exposure_runtime(ccds, min(workers, len(ccds))) for ccds in exposures)
    hours = _core_hours(len(exposures), starts, needs.CCD_SECONDS_PER_MPIXEL * pixels / 1e6)
    disk = PIXEL_BYTES * pixels / 1e9
    memory += needs.SNAKEMAKE_MB
    return Cost("exposure", len(exposures), steps, hours, memory, longest, disk)


def _tracts(plan: Plan, cores: int) -> Cost:
    """Return the cost of all tracts: warps and coadds."""
    patch = patch_pixels(plan)
    whole, workers = plan.settings.parallel.coadd == "tract", _workers(plan, cores)
    steps, starts, seconds, memory, longest, size = 0, 0, 0.0, 0, 0, 0.0
    for tract in plan.tracts:
        exposures = [ccd_pixels(plan, name) for name in plan.exposures_of_tract(tract)]
        warped = sum(sum(ccds) for ccds in exposures)
        inputs, n_bands = _inputs(plan, tract), len(_bands_of(plan, tract))
        seconds += needs.WARP_SECONDS_PER_MPIXEL * warped / 1e6
        seconds += sum(
            needs.COADD_SECONDS_PER_MPIXEL_AND_INPUT * (2 + n) * patch / 1e6 for n in inputs
        )
        # corner databases and picture
        steps += n_bands + 1
        starts += n_bands + 1
        size += PIXEL_BYTES * patch * len(inputs)
        if whole:
            steps += n_bands
            starts += (workers + 1) * n_bands
            asked, limit = _whole_tract(plan, tract, cores)
        else:
            steps += len(exposures) + len(inputs)
            starts += len(exposures) + len(inputs)
            asked, limit = _tract_by_patches(plan, tract, cores)
        if not whole or plan.settings.coadd.keep_warps:
            size += PIXEL_BYTES * WARP_OVERLAP * warped
        memory, longest = max(memory, asked), max(longest, limit + PICTURE_MINUTES)
    n_jobs = len(plan.tracts)
    hours = _core_hours(n_jobs, starts, seconds)
    return Cost("tract", n_jobs, steps, hours, memory + needs.SNAKEMAKE_MB, longest, size / 1e9)


def _tract_by_patches(plan: Plan, tract: int, cores: int) -> tuple[int, int]:
    """Return memory and time limit (MB, minutes) of a tract whose warps and patches are steps."""
    patch, block = patch_pixels(plan), plan.settings.coadd.memory_mb
    exposures = [ccd_pixels(plan, name) for name in plan.exposures_of_tract(tract)]
    inputs = _inputs(plan, tract)
    largest = max(max(ccds) for ccds in exposures)
    memory = max(
        min(cores, len(exposures)) * needs.warp_memory(largest, patch),
        min(cores, len(inputs)) * needs.coadd_memory(patch, max(inputs), block),
    )
    first = [TABLES_MINUTES] * len(_bands_of(plan, tract))
    first += [needs.warp_runtime(sum(ccds)) for ccds in exposures]
    coadds = [needs.coadd_runtime(patch, n) for n in inputs]
    return memory, _minutes(first, cores) + _minutes(coadds, cores)


def _whole_tract(plan: Plan, tract: int, cores: int) -> tuple[int, int]:
    """Return memory and time limit (MB, minutes) of a tract that is a step in each band.

    As many bands as there are cores for are worked on side by side.
    """
    workers, patch, bands = _workers(plan, cores), patch_pixels(plan), _bands_of(plan, tract)
    width = max(cores // workers, 1)
    asked = [_tract_memory(plan, tract, band, cores) for band in bands]
    limits = []
    for band in bands:
        exposures = plan.exposures_of_tract(tract, band)
        warped = sum(sum(ccd_pixels(plan, name)) for name in exposures)
        inputs = _inputs(plan, tract, band)
        limits.append(needs.tract_runtime(warped, patch, inputs, workers))
    tables = _minutes([TABLES_MINUTES] * len(bands), cores)
    return max(map(sum, _in_turn(asked, width))), tables + _minutes(limits, width)


# ---------------------------------------------------------------------------------------------
# After a run
# ---------------------------------------------------------------------------------------------


def widths(plan: Plan) -> dict[str, int]:
    """Return how many steps of a rule a job of the cluster has side by side, at least."""
    found: dict[str, list[int]] = {
        "calexp": [len(plan.ccds)] * bool(plan.science),
        "calibrated": [len(images) for images in plan.images.values()],
        "warp": [len(plan.exposures_of_tract(tract)) for tract in plan.tracts],
        "coadd": [
            len(plan.patches_of(band, tract))
            for tract in plan.tracts
            for band in _bands_of(plan, tract)
        ],
    }
    return {rule: min(numbers) for rule, numbers in found.items() if numbers}
