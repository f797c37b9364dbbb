"""What a run will cost, before it is submitted.

Everything is counted: the steps of each job of the cluster, which is an exposure, a tract, or the
calibration frames of a CCD, and what each step needs (`coaddflow.workflow.needs`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from coaddflow.workflow import needs
from coaddflow.workflow.needs import Needs
from coaddflow.workflow.plan import Plan

START_CPU_SECONDS = 1.8
"""CPU time of Python and its libraries, for each step of a job and each worker."""

JOB_CPU_SECONDS = 4.5
"""CPU time of the two Snakemakes in each job of a cluster."""

PIXEL_BYTES = 13.0
"""An image with variance and mask on disk, as it is written without compression."""

Step = tuple[str, Needs]
"""A step of a job: its rule, and what it needs."""

Job = list[list[Step]]
"""A job of a cluster: its steps, those together that do not wait for each other."""


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
    return [
        _cost(kind, jobs, cores)
        for kind, jobs in _all_jobs(plan, cores).items()
        if jobs or kind != "tract"
    ]


def _cost(name: str, jobs: list[Job], cores: int) -> Cost:
    """Add up jobs of one kind."""
    steps = [step for job in jobs for level in job for _, step in level]
    seconds = JOB_CPU_SECONDS * len(jobs) + sum(
        START_CPU_SECONDS * (1 + step.workers) + step.seconds for step in steps
    )
    memory = runtime = 0
    for job in jobs:
        in_turn = [some for level in job for some in _in_turn(level, cores)]
        memory = max(
            memory,
            *(sum(step.memory + step.snakemake_share(cores) for step in some) for some in in_turn),
        )
        runtime = max(runtime, sum(some[0].runtime for some in in_turn))
    disk = PIXEL_BYTES * sum(step.pixels for step in steps) / 1e9
    return Cost(name, len(jobs), len(steps), seconds / 3600, memory, runtime, disk)


def _in_turn(level: list[Step], cores: int) -> list[list[Needs]]:
    """Return what runs side by side, one after the other, as Snakemake puts it."""
    longest = sorted((step for _, step in level), key=lambda s: (s.runtime, s.memory), reverse=True)
    width = max(cores // max(step.threads for step in longest), 1)
    return [longest[i : i + width] for i in range(0, len(longest), width)]


# ---------------------------------------------------------------------------------------------
# Jobs and their steps
# ---------------------------------------------------------------------------------------------


def _all_jobs(plan: Plan, cores: int) -> dict[str, list[Job]]:
    """Return all jobs, by kind."""
    calibration = [_calibration_job(plan, ccd) for ccd in plan.ccds]
    return {
        "calibration": [job for job in calibration if job],
        "exposure": [_exposure_job(plan, exposure, cores) for exposure in plan.exposures],
        "tract": [job for tract in plan.tracts for job in _tract_jobs(plan, tract, cores)],
        "survey": [[[("survey_corners", needs.SURVEY_CORNERS)]]],
    }


def _calibration_job(plan: Plan, ccd: int) -> Job:
    """Return the steps that make the calibration frames of a CCD."""
    level_of, levels = {}, {}
    for kind, band in needs.calib_frames_made(plan, ccd):
        before = [level_of.get(source, -1) for source in needs.calib_sources(plan, kind)]
        level_of[kind] = 1 + max(before, default=-1)
        step = needs.of_calib(plan, ccd, needs.calib_files(plan, kind, ccd, band))
        levels.setdefault(level_of[kind], []).append((needs.CALIB_RULES[kind], step))
    return [levels[level] for level in sorted(levels)]


def _exposure_job(plan: Plan, exposure: str, cores: int) -> Job:
    if plan.settings.parallel.calexp == "exposure":
        return [[("exposure", needs.of_exposure(plan, exposure, cores, _on_tasks(plan)))]]
    rule = "calexp" if exposure in plan.science else "calibrated"
    ccds = [needs.of_ccd(plan, exposure, ccd) for ccd in plan.images.get(exposure, plan.ccds)]
    return [[(rule, ccd) for ccd in ccds], [("manifest", needs.MANIFEST)]]


def _on_tasks(plan: Plan) -> bool:
    """Return whether the workers of a job of a cluster are tasks of Slurm."""
    return plan.settings.parallel.backend == "mpi"


def _tract_jobs(plan: Plan, tract: int, cores: int) -> list[Job]:
    """Return the steps that make a tract: in one job, or in one a band where MPI is used."""
    bands = needs.bands_of(plan, tract)
    picture = [("picture", needs.of_picture(plan, tract))]
    tables = [("tract_corners", needs.TRACT_CORNERS) for _ in bands]
    if plan.settings.parallel.coadd == "patch":
        names = plan.exposures_of_tract(tract)
        warps = [("warp", needs.of_warp(plan, tract, exposure)) for exposure in names]
        coadds = [
            ("coadd", needs.of_coadd(plan, band, tract, patch))
            for band in bands
            for patch in plan.patches_of(band, tract)
        ]
        return [[tables + warps, coadds, picture]]
    wholes = [
        ("tract", needs.of_tract(plan, band, tract, cores, _on_tasks(plan))) for band in bands
    ]
    if _on_tasks(plan):
        return [[tables[:1], [whole]] for whole in wholes] + [[picture]]
    return [[tables, wholes, picture]]


# ---------------------------------------------------------------------------------------------
# Steps by rule, to stand beside what was measured
# ---------------------------------------------------------------------------------------------


def steps(plan: Plan, cores: int) -> Iterator[Step]:
    """Yield all steps of a run, with so many cores for each job of the cluster."""
    for jobs in _all_jobs(plan, cores).values():
        for job in jobs:
            for level in job:
                yield from level


def asked_memory(plan: Plan, cores: int) -> dict[str, int]:
    """Return the memory that one step of each rule asks for at most, MB.

    What the Snakemakes of a cluster's job need, and the growth with each attempt, come on top.
    """
    asked: dict[str, int] = {}
    for rule, step in steps(plan, cores):
        asked[rule] = max(asked.get(rule, 0), step.memory)
    return asked


def widths(plan: Plan) -> dict[str, int]:
    """Return how many steps of a rule a job of the cluster has side by side, at least."""
    found: dict[str, int] = {}
    for rule, step in steps(plan, 1):
        found[rule] = min(found.get(rule, step.width), step.width)
    return {rule: width for rule, width in found.items() if width > 1}
