"""Figures of merit with their definitions and goals, as a table for people and for programs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coaddflow.files import atomic_path


@dataclass(frozen=True)
class Metric:
    """One figure of merit."""

    name: str
    """Words joined by dots, from the subject to what is special: ``coadd.flux_bias.r.18-20``."""
    value: float | None
    """None where it could not be measured."""
    unit: str
    """Unit; empty for ratios."""
    definition: str
    """What exactly it is, in one or two sentences."""
    least: float | None = None
    most: float | None = None
    """Goal: the value should lie between these, if they are given."""
    error: float | None = None
    """Statistical error of the value, in its unit."""
    n: int | None = None
    """Number of stars, pixels, ... behind it."""
    program: str = ""
    """Program whose product it is of, where several are compared."""

    @property
    def goal(self) -> str:
        """The goal in words; empty if there is none."""
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        if self.most is not None:
            return f"<= {self.most:g}"
        return "" if self.least is None else f">= {self.least:g}"

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if there is no goal or no value."""
        if self.value is None or not self.goal:
            return None
        low = -np.inf if self.least is None else self.least
        return bool(low <= self.value <= (np.inf if self.most is None else self.most))

    def record(self) -> dict[str, object]:
        """Return what `write_metrics` writes of it."""
        return {
            "name": ".".join(filter(None, [self.name, self.program.lower().replace(" ", "_")])),
            "value": _rounded(self.value),
            "unit": self.unit,
            "error": _rounded(self.error),
            "n": None if self.n is None else int(self.n),
            "goal": self.goal or None,
            "met": self.met,
            "definition": self.definition,
        }


def write_metrics(metrics: Sequence[Metric], path: str | Path) -> None:
    """Write figures as JSON: a list of objects, one a figure, without further structure."""
    with atomic_path(Path(path)) as temporary:
        text = json.dumps([metric.record() for metric in metrics], indent=1, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def table_of(metrics: Sequence[Metric]) -> str:
    """Return figures as a table in Markdown, those of the same name side by side."""
    programs = list(dict.fromkeys(one.program for one in metrics if one.program))
    rows = [("figure", *(programs or ["value"]), "goal", "n")]
    by_name: dict[str, list[Metric]] = {}
    for one in metrics:
        by_name.setdefault(one.name, []).append(one)
    for name, group in by_name.items():
        cells = {one.program or rows[0][1]: _cell(one) for one in group}
        n = "" if group[0].n is None else str(group[0].n)
        goal = group[0].goal + {True: " yes", False: " **no**", None: ""}[group[0].met]
        rows.append((name, *(cells.get(column, "") for column in rows[0][1:-2]), goal, n))
    width = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    rows.insert(1, tuple("-" * w for w in width))
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)) + " |"
        for row in rows
    )


def _cell(metric: Metric) -> str:
    if metric.value is None:
        return "not measured"
    error = "" if metric.error is None else f" ± {metric.error:.2g}"
    return f"{metric.value:.4g}{error} {metric.unit}".strip()


def _rounded(value: float | None) -> float | None:
    """Return a value with six digits, as JSON can hold it."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")
