"""What a run will cost, before it is submitted; and what it did cost, from its benchmark files.

Everything is counted: CCDs and their pixels, frames, patches and exposures that can touch them,
times the figures of `coaddflow.resources`, which are upper bounds. One job of a cluster is an
exposure, a tract, or the calibration frames of a CCD.
"""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from coaddflow import resources as needs
from coaddflow.plan import CALIB_KINDS, Plan

START_CPU_SECONDS = 2.5
"""CPU time of Python and its libraries, for each step of a job."""

PIXEL_BYTES = 13.0
"""An image with variance and mask on disk, as it is written without compression."""

WARP_OVERLAP = 1.25
"""Pixels of an exposure's warps over those of the exposure: patches overlap."""

ROOM = 1.3
"""What is suggested over what was measured."""


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
    disk : float
        Size of the products, GB (1e9 bytes).
    """

    name: str
    n_jobs: int
    n_steps: int
    core_hours: float
    memory: int
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
        _exposures(exposures, cores),
        *([_tracts(plan, cores)] if plan.tracts else []),
        Cost("survey", 1, 1, START_CPU_SECONDS / 3600, 2 * needs.SMALL_STEP_MB, 0.0),
    ]


def ccd_pixels(plan: Plan, exposure: str) -> list[int]:
    """Return the number of pixels of each CCD of an exposure."""
    if exposure in plan.images:
        return [image.nx * image.ny for image in plan.images[exposure].values()]
    return [nx * ny for nx, ny in (ccd.size for ccd in plan.ccds.values())]


def _calibration(plan: Plan) -> Cost:
    """Return the cost of the calibration frames: one job a CCD, its frames one after another."""
    seconds, memory, size, steps, jobs = 0.0, 0, 0.0, 0, 0
    made = {
        (kind, band): len(plan.calib_frames(kind, band))
        for kind in CALIB_KINDS
        for band in (plan.bands if kind == "flat" else [None])
        if plan.science and getattr(plan.settings.calibs, kind).source not in ("given", "none")
    }
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
        seconds += sum(START_CPU_SECONDS + frames * per_frame for frames in here)
        for frames in here:
            stack = plan.settings.calibs.memory
            memory = max(memory, needs.calib_memory(pixels, frames, stack))
    return Cost("calibration", jobs, steps, seconds / 3600, memory, size / 1e9)


def _exposures(exposures: list[list[int]], cores: int) -> Cost:
    """Return the cost of all exposures, from the pixels of their CCDs."""
    steps = sum(len(ccds) + 1 for ccds in exposures)
    pixels = sum(sum(ccds) for ccds in exposures)
    seconds = START_CPU_SECONDS * steps + needs.CCD_SECONDS_PER_MPIXEL * pixels / 1e6
    memory = max(
        sum(sorted((needs.ccd_memory(n) for n in ccds), reverse=True)[:cores]) for ccds in exposures
    )
    disk = PIXEL_BYTES * pixels / 1e9
    return Cost("exposure", len(exposures), steps, seconds / 3600, memory, disk)


def _tracts(plan: Plan, cores: int) -> Cost:
    """Return the cost of all tracts: warps and coadds."""
    steps, seconds, memory, size = 0, 0.0, 0, 0.0
    as_one = plan.settings.parallel.coadd == "tract"
    patch = _patch_pixels(plan)
    for tract in plan.tracts:
        exposures = [ccd_pixels(plan, name) for name in plan.exposures_of_tract(tract)]
        warped = sum(sum(ccds) for ccds in exposures)
        inputs = [
            len(plan.exposures_of_patch(band, tract, name))
            for band in plan.bands
            for name in plan.patches_of(band, tract)
        ]
        overlap = 1.0 if as_one else WARP_OVERLAP
        seconds += needs.WARP_SECONDS_PER_MPIXEL * overlap / WARP_OVERLAP * warped / 1e6
        seconds += sum(
            needs.COADD_SECONDS_PER_MPIXEL_AND_INPUT * (2 + n) * patch / 1e6 for n in inputs
        )
        size += PIXEL_BYTES * patch * len(inputs)
        if as_one:
            steps += 2 * len(plan.bands) + 1
            memory = max(memory, _memory_as_one(plan, exposures, max(inputs), cores))
        else:
            steps += len(exposures) + len(inputs) + len(plan.bands) + 1
            memory = max(memory, _memory_of_steps(plan, exposures, inputs, cores))
        if not as_one or plan.settings.coadd.keep_warps:
            size += PIXEL_BYTES * WARP_OVERLAP * warped
    seconds += START_CPU_SECONDS * steps
    return Cost("tract", len(plan.tracts), steps, seconds / 3600, memory, size / 1e9)


def _patch_pixels(plan: Plan) -> int:
    sky = plan.settings.skymap
    return (sky.patch_inner_size + 2 * sky.patch_border) ** 2


def _memory_of_steps(plan: Plan, exposures: list[list[int]], inputs: list[int], cores: int) -> int:
    """Return the memory of the warps and coadds of a tract that run side by side, MB."""
    patch = _patch_pixels(plan)
    warp = needs.warp_memory(max(max(ccds) for ccds in exposures), patch)
    coadd = needs.coadd_memory(patch, max(inputs), plan.settings.coadd.memory_mb)
    return max(min(cores, len(exposures)) * warp, min(cores, len(inputs)) * coadd)


def _memory_as_one(plan: Plan, exposures: list[list[int]], n_inputs: int, cores: int) -> int:
    """Return the memory of the job of a tract, MB."""
    return needs.tract_memory(
        max(max(ccds) for ccds in exposures),
        sum(sum(ccds) for ccds in exposures),
        _patch_pixels(plan),
        n_inputs,
        plan.settings.coadd.memory_mb,
        plan.settings.coadd.spool_mb,
        min(plan.settings.parallel.workers, cores),
    )


# ---------------------------------------------------------------------------------------------
# After a run
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What the steps of one rule took, from their benchmark files.

    Attributes
    ----------
    rule : str
        The rule.
    n_steps : int
        Steps that have been run.
    core_hours : float
        CPU time of all.
    memory : float
        Largest memory of one, MB.
    seconds : float
        Longest time of one, s.
    """

    rule: str
    n_steps: int
    core_hours: float
    memory: float
    seconds: float


_KINDS = {
    "calexp": "exposure",
    "calibrated": "exposure",
    "warp": "tract",
    "coadd": "tract",
    "tract": "tract",
}

_RULES = {"bias": "master_bias", "dark": "master_dark", "flat": "master_flat"}


def measured(folder: str | Path) -> list[Measured]:
    """Read the benchmark files of a run.

    Parameters
    ----------
    folder : str or Path
        ``results/benchmarks``.

    Returns
    -------
    list of Measured
        One entry a rule; empty if nothing has run.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    for path in sorted(Path(folder).rglob("*.tsv")):
        parts = path.relative_to(folder).parts
        name = parts[1] if parts[0] == "calibs" else parts[0]
        with path.open(encoding="ascii", newline="") as stream:
            for row in csv.DictReader(stream, delimiter="\t"):
                rows.setdefault(_RULES.get(name, name), []).append(
                    {key: _number(row.get(key)) for key in ("s", "max_rss", "cpu_time")}
                )
    return [
        Measured(
            rule,
            len(values),
            sum(row["cpu_time"] for row in values) / 3600,
            max(row["max_rss"] for row in values),
            max(row["s"] for row in values),
        )
        for rule, values in rows.items()
    ]


def core_hours_of(kind: str, steps: Iterable[Measured]) -> float | None:
    """Return the measured CPU time of a kind of job; None if none has run."""
    hours = [step.core_hours for step in steps if _KINDS.get(step.rule, "calibration") == kind]
    return sum(hours) if hours else None


def suggestion(steps: Iterable[Measured]) -> list[str]:
    """Return arguments of Snakemake that ask for what was measured, with some room."""
    return [
        f"{step.rule}:{name}={max(math.ceil(ROOM * amount), least)}"
        for step in steps
        for name, amount, least in (
            ("mem_mb", step.memory, 100),
            ("runtime", step.seconds / 60, 2),
        )
    ]


def disk_used(results: str | Path) -> float:
    """Return the size of all products, GB."""
    return sum(path.stat().st_size for path in Path(results).rglob("*") if path.is_file()) / 1e9


def _number(text: str | None) -> float:
    """Return a number of a benchmark file; jobs that end at once have NA or a dash."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
