"""What a run will cost, before it is submitted.

Everything is counted: the steps of each job of the cluster, which is an exposure, a tract, or the
calibration frames of a CCD (the groups of the registry), and what each step needs
(`workflow.needs`).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from coaddflow.workflow import needs
from coaddflow.workflow.calib_sets import ALWAYS
from coaddflow.workflow.needs import Needs
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import CALIB_STAGES, STAGES, Stage

START_CPU_SECONDS = 1.8
"""CPU time of Python and its libraries, for each step of a job, and each worker that is no fork."""

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

    Memory and time limit are those of the first attempt; later ones ask for more of what was short.
    """

    name: str
    """"calibration", "exposure", "tract", "survey"; "all" of the sum."""
    n_jobs: int
    """Jobs of the cluster."""
    n_steps: int
    """Steps (jobs of Snakemake) in all of them together."""
    core_hours: float
    """CPU time of all."""
    memory: int
    """Largest memory of one job, MB."""
    runtime: int
    """Longest time limit of one job, minutes."""
    disk: float
    """Size of the products, GB (1e9 bytes)."""


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
        _cost(kind, jobs, cores, plan.settings.parallel.backend)
        for kind, jobs in _all_jobs(plan, cores).items()
        if jobs or kind != "tract"
    ]


def total(costs: list[Cost]) -> Cost:
    """Return the cost of all jobs; memory and time limit are those of the largest."""
    return Cost(
        "all",
        sum(one.n_jobs for one in costs),
        sum(one.n_steps for one in costs),
        sum(one.core_hours for one in costs),
        max(one.memory for one in costs),
        max(one.runtime for one in costs),
        sum(one.disk for one in costs),
    )


def _cost(name: str, jobs: list[Job], cores: int, backend: str) -> Cost:
    """Add up jobs of one kind."""
    steps = [step for job in jobs for level in job for _, step in level]
    starts = sum(1 + (step.workers if backend in ("mpi", "dask") else 0) for step in steps)
    seconds = JOB_CPU_SECONDS * len(jobs) + START_CPU_SECONDS * starts
    seconds += sum(step.seconds for step in steps)
    memory = runtime = 0
    for job in jobs:
        in_turn = [some for level in job for some in _in_turn(level, cores)]
        runtime = max(runtime, sum(some[0].runtime for some in in_turn))
        for some in in_turn:
            asked = sum(step.asked(cores, backend == "mpi") for step in some)
            memory = max(memory, asked)
    disk = PIXEL_BYTES * sum(step.pixels for step in steps) / 1e9
    return Cost(name, len(jobs), len(steps), seconds / 3600, memory, runtime, disk)


def _in_turn(level: list[Step], cores: int) -> list[list[Needs]]:
    """Return what runs side by side, one after the other, as Snakemake puts it."""
    longest = sorted((step for _, step in level), key=lambda s: (s.runtime, s.memory), reverse=True)
    turns: list[list[Needs]] = []
    room: list[int] = []
    full = 0  # turns at the beginning without a free core
    for step in longest:
        wanted = min(step.threads, cores)
        place = next((i for i in range(full, len(turns)) if room[i] >= wanted), len(turns))
        if place == len(turns):
            turns.append([])
            room.append(cores)
        turns[place].append(step)
        room[place] -= wanted
        while full < len(turns) and room[full] == 0:
            full += 1
    return turns


# ---------------------------------------------------------------------------------------------
# Jobs and their steps
# ---------------------------------------------------------------------------------------------


_KINDS = {"calibs": "calibration", "exposure": "exposure", "tract": "tract"}
"""Kinds of jobs, by how the names of their groups begin."""


def kind_of(group: str) -> str:
    """Return the kind of a job, from the name of its group, or of its stage if it has none."""
    return _KINDS.get(group.partition("_")[0], "survey")


def _all_jobs(plan: Plan, cores: int) -> dict[str, list[Job]]:
    """Return all jobs, by kind."""
    groups: dict[str, dict[int, list[Step]]] = {}
    on_tasks, parts = plan.settings.parallel.backend == "mpi", _parts_of_calibs(plan)
    for stage in STAGES.values():
        if stage.is_local:
            continue
        kind = CALIB_STAGES.get(stage.name)
        is_alone, level = kind is None and _is_alone(stage, plan), _level(stage, plan)
        for names in stage.units(plan):
            group = stage.group_in(plan).format(**names) or stage.name
            if is_alone:
                group = " ".join((group, stage.name, *names.values()))
            elif kind is not None:
                unit = kind, names.get("band"), names.get("set", ALWAYS)
                group = f"{group} {parts[unit]}"
            step = needs.of(stage, plan, names, cores, on_tasks)
            groups.setdefault(group, {}).setdefault(level, []).append((stage.name, step))
    jobs: dict[str, list[Job]] = {kind: [] for kind in (*_KINDS.values(), "survey")}
    for group, levels in groups.items():
        jobs[kind_of(group)].append([levels[level] for level in sorted(levels)])
    return jobs


Unit = tuple[str, str | None, str]
"""Kind, band and set of a calibration frame."""


def _parts_of_calibs(plan: Plan) -> dict[Unit, Unit]:
    """Return one calibration frame of each part of those of a CCD, by the frames of the part.

    Snakemake sends those as a job of their own that neither take others nor are taken by them.
    """
    part: dict[Unit, Unit] = {}

    def first_of(unit: Unit) -> Unit:
        while (before := part.setdefault(unit, unit)) != unit:
            # halved, or a dark of all nights would make a chain as long as there are nights
            part[unit] = unit = part[before]
        return unit

    for kind, units in plan.calib_units.items():
        for band, name in units:
            own = first_of((kind, band, name))
            for source, unit in plan.units_made_with(kind, band, name):
                if getattr(plan.settings.calibs, source).source != "given":
                    part[first_of((source, *unit))] = own
    return {unit: first_of(unit) for unit in part}


def _is_alone(stage: Stage, plan: Plan) -> bool:
    """Return whether steps have nothing to do with others of their group.

    Snakemake sends each of these as a job of its own.
    """
    group = stage.group_in(plan)
    others = [
        other
        for other in STAGES.values()
        if other.group_in(plan) == group and _has_jobs(other, plan)
    ]
    before = _before(stage, plan)
    return not any(other in before or stage in _before(other, plan) for other in others)


def _level(stage: Stage, plan: Plan) -> int:
    """Return how many steps of its job a step waits for, one after the other."""
    return max((1 + _level(other, plan) for other in _before(stage, plan)), default=0)


def _before(stage: Stage, plan: Plan) -> list[Stage]:
    """Return the stages of a plan whose products a step takes, of those that may be in its job."""
    before = stage.after
    if stage.name in CALIB_STAGES:
        sources = plan.made_with(CALIB_STAGES[stage.name])
        before = tuple(f"master_{kind}" for kind in sources)
    return [STAGES[name] for name in before if _has_jobs(STAGES[name], plan)]


def _has_jobs(stage: Stage, plan: Plan) -> bool:
    return any(True for _ in stage.units(plan))


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

    What the Snakemakes of a cluster's job need comes on top, and what later attempts ask for.
    """
    asked: dict[str, int] = {}
    on_tasks = plan.settings.parallel.backend == "mpi"
    for rule, step in steps(plan, cores):
        asked[rule] = max(asked.get(rule, 0), step.asked(cores, on_tasks, has_snakemakes=False))
    return asked


def widths(plan: Plan) -> dict[str, int]:
    """Return how many steps of a rule a job of the cluster has side by side, at least."""
    found: dict[str, int] = {}
    for rule, step in steps(plan, 1):
        found[rule] = min(found.get(rule, step.width), step.width)
    return {rule: width for rule, width in found.items() if width > 1}


def typical_seconds(plan: Plan) -> dict[str, float]:
    """Return the CPU time of one job of each stage, the first of the plan."""
    found = {}
    for stage in STAGES.values():
        for names in itertools.islice(stage.units(plan), 1):
            found[stage.name] = START_CPU_SECONDS + needs.of(stage, plan, names).seconds
    return found
