"""Files that a user asks a run for by name: whether the run makes them, and if not, why."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from coaddflow.errors import InputError, did_you_mean
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import STAGES, Names, Product, Stage

_LISTED = 12


def check_targets(plan: Plan, files: Iterable[str]) -> None:
    """Raise InputError if a run is asked for a file that it does not make, or not by this name.

    Without this, Snakemake shows the KeyError of an input function, or makes an empty coadd of a
    band that the survey does not have.

    Parameters
    ----------
    plan : Plan
        The plan of the run.
    files : iterable of str
        Files that the user has named, relative to the working folder.
    """
    # the files of one kind at a time: those of all CCDs of a large survey are millions
    made = functools.cache(lambda product: frozenset(product.files(plan)))
    for file in files:
        name = Path(file).as_posix()
        matches = [
            (stage, product, match.groupdict())
            for stage in STAGES.values()
            if stage.is_planned(plan)
            for product in _products(stage)
            if (match := re.fullmatch(_pattern(product.template(plan)), name))
        ]
        if not matches:
            _check_other(plan, name)
            continue
        makers = [match for match in matches if name in made(match[1])]
        if not makers:
            raise InputError(
                f"this run does not make {name}: {_why(plan, *matches[0][1:])}",
                remedy="`snakemake -n` shows all that it makes",
            )
        promised = [stage.products[0] for stage, *_ in makers]
        if not any(product in promised for _, product, _ in makers):
            with_it = promised[0].file(makers[0][2])
            raise InputError(
                f"{name} is not made alone, but by the job that makes {with_it}",
                remedy=f"ask for {with_it}",
            )


def _products(stage: Stage) -> Iterator[Product]:
    """Yield what a stage's job makes; not what jobs of the stages that it includes promise."""
    yield from stage.products
    for name in stage.includes:
        yield from STAGES[name].products[1:]


def _pattern(template: str) -> str:
    """Return the regular expression of the files of a template."""
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(template))


def _check_other(plan: Plan, name: str) -> None:
    """Refuse a file that is not named like any product of the run, unless it is there."""
    if name.startswith(("logs/", "results/benchmarks/")) or Path(name).exists():
        return
    rules = [stage.name for stage in STAGES.values() if stage.is_planned(plan)]
    raise InputError(
        f"there is no target {name!r}{did_you_mean(name, ['all', *rules])}",
        remedy="a target is a product (docs/products.md), such as "
        f"{next(iter(STAGES['survey_corners'].files(plan)))}; after --configfile FILE write -- "
        "before it",
    )


def _why(plan: Plan, product: Product, names: Names) -> str:
    """Return why a plan has no product of these names: which of them is unknown."""
    known: dict[str, Callable[[], Iterable[object]]] = {
        "exposure": lambda: plan.exposures,
        "ccd": lambda: sorted({c for e in plan.exposures for c in plan.ccds_of(e)}),
        "band": lambda: plan.bands,
        "tract": lambda: plan.tracts,
        "set": lambda: sorted({unit["set"] for unit in product.units(plan)}),
    }
    for kind, value in names.items():
        there = [str(one) for one in known[kind]()] if kind in known else []
        if there and value not in there:
            what = "CCD" if kind == "ccd" else kind
            listed = ", ".join(there[:_LISTED]) + (", ..." if len(there) > _LISTED else "")
            return f"there is no {what} {value!r}{did_you_mean(value, there)}; there are {listed}"
    alike = [
        unit
        for unit in product.units(plan)
        if all(unit.get(kind) == names[kind] for kind in names if kind != "patch")
    ]
    if "patch" in names and alike:
        patches = [unit["patch"] for unit in alike]
        listed = ", ".join(patches[:_LISTED]) + (", ..." if len(patches) > _LISTED else "")
        return f"no exposure can touch patch {names['patch']!r}; those that can be are {listed}"
    return "nothing is made of " + ", ".join(f"{kind} {value}" for kind, value in names.items())
