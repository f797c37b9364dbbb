"""What the jobs of a survey have really taken, and what to ask for."""

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.workflow.cost import kind_of
from coaddflow.workflow.needs import SNAKEMAKE_MB
from coaddflow.workflow.stages import STAGES, calib_stage

ROOM = 1.3
"""Memory that is suggested over what was measured."""

TIME_ROOM = 2.0
"""The same for time, which differs more from node to node; a step that needs more gets it when it
is repeated."""


@dataclass(frozen=True)
class Measured:
    """What the steps of one rule took, from their benchmark files."""

    rule: str
    n_steps: int
    """Steps that have been run."""
    core_hours: float
    """CPU time of all."""
    memory: float
    """Largest memory of one, MB."""
    seconds: float
    """Longest time of one, s."""
    asked: int = 0
    """Memory that the plan asks for, MB; 0 if it has no such step."""


def measured(folder: str | Path, asked: Mapping[str, int] | None = None) -> list[Measured]:
    """Read the benchmark files of a run.

    Parameters
    ----------
    folder : str or Path
        ``results/benchmarks``.
    asked : mapping of str to int, optional
        `asked_memory` of the plan, to stand beside what was measured.

    Returns
    -------
    list of Measured
        One entry a rule; empty if nothing has run.
    """
    rows: dict[str, list[dict[str, float]]] = {}
    for path in sorted(Path(folder).rglob("*.tsv")):
        parts = path.relative_to(folder).parts
        name = parts[1] if parts[0] == "calibs" else parts[0]
        rule = calib_stage(name) if name in CALIB_KINDS else name
        with path.open(encoding="ascii", newline="") as stream:
            for row in csv.DictReader(stream, delimiter="\t"):
                rows.setdefault(rule, []).append(
                    {key: _number(row.get(key)) for key in ("s", "max_rss", "cpu_time")}
                )
    return [
        Measured(
            rule,
            len(values),
            sum(row["cpu_time"] for row in values) / 3600,
            # Snakemake counts in units of 2^20
            max(row["max_rss"] for row in values) * 1.048576,
            max(row["s"] for row in values),
            (asked or {}).get(rule, 0),
        )
        for rule, values in rows.items()
    ]


def core_hours_of(kind: str, steps: Iterable[Measured]) -> float | None:
    """Return the measured CPU time of a kind of job, or of "all"; None if none has run."""
    groups = {name: stage.group for name, stage in STAGES.items()}
    hours = [
        step.core_hours for step in steps if kind in ("all", kind_of(groups.get(step.rule, "")))
    ]
    return sum(hours) if hours else None


def suggestion(
    steps: Iterable[Measured], cores: int = 1, side_by_side: Mapping[str, int] | None = None
) -> list[str]:
    """Return settings of Snakemake that ask for what was measured, with some room.

    Parameters
    ----------
    steps : iterable of Measured
        From `measured`.
    cores : int
        Cores of one job: so many steps of an exposure or tract share its Snakemakes.
    side_by_side : mapping of str to int, optional
        From `widths`: no more steps of a rule than these share them.
    """
    words = []
    for step in steps:
        width = min(cores, (side_by_side or {}).get(step.rule, 1))
        memory = max(math.ceil(ROOM * step.memory + SNAKEMAKE_MB / width), 100)
        minutes = max(math.ceil(TIME_ROOM * step.seconds / 60), 2)
        words += [f"{step.rule}:mem_mb={memory}", f"{step.rule}:runtime={minutes}"]
    return words


def disk_used(results: str | Path) -> float:
    """Return the size of all products, GB."""
    return sum(path.stat().st_size for path in Path(results).rglob("*") if path.is_file()) / 1e9


def _number(text: str | None) -> float:
    """Return a number of a benchmark file; jobs that end at once have NA or a dash."""
    try:
        return float(text or 0)
    except ValueError:
        return 0.0
