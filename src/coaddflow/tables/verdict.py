"""The verdict on an exposure of which something failed: whether it is left out, and why.

The job that gathers an exposure writes it beside the manifest, before the manifest. Of most
exposures nothing fails, and they have none. Planning compares it with the settings of today: an
exposure comes in by itself when the limit that it broke is raised, and goes when one is lowered.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from coaddflow.errors import Reason
from coaddflow.files import atomic_text, remove

PASSES = "passes"
"""Key of an exposure that has never been judged again."""

TOO_MANY_FAILED = "too_many_failed"


@dataclass(frozen=True)
class Verdict:
    """What a gather job decided."""

    key: str
    """What stood in the ``params`` of the job: as long as it stands there, the job is not run
    again."""
    cause: str = ""
    """Why the exposure is left out: ``too_many_failed`` or ``outside_prediction``; empty: it is
    not."""
    message: str = ""
    """The same in one sentence."""
    margin: float = 0.0
    """The `prediction.margin` of that run, degrees."""
    failed_fraction: float = 0.0
    """The fraction of the exposure that failed (`tables.manifest.fraction_lost`). It stands here
    since the manifest is away while its job runs, and planning in that job must find the same."""


def verdict_path(manifest: str | Path) -> Path:
    """Return where the verdict on an exposure is, beside its manifest."""
    return Path(manifest).with_suffix(".verdict.json")


def write_verdict(manifest: str | Path, verdict: Verdict) -> None:
    """Write a verdict; one that says nothing is removed."""
    path = verdict_path(manifest)
    if verdict == Verdict(PASSES):
        remove(path)
        return
    atomic_text(path, json.dumps(dataclasses.asdict(verdict), indent=1) + "\n")


def read_verdict(manifest: str | Path) -> Verdict:
    """Return the verdict on an exposure; a damaged one has it judged again."""
    try:
        verdict = Verdict(**json.loads(verdict_path(manifest).read_text(encoding="utf-8")))
        return dataclasses.replace(verdict, failed_fraction=float(verdict.failed_fraction))
    except OSError:
        return Verdict(PASSES)
    except (ValueError, TypeError):
        return Verdict("damaged")


def key_of_today(known: Verdict, max_failed_fraction: float, margin: float, stop: bool) -> str:
    """Return what the params of the gather job say: the known key, unless it would now decide else.

    Parameters
    ----------
    known : Verdict
        The last decision.
    max_failed_fraction : float
        The limit of today.
    margin : float
        The `prediction.margin` of today, degrees.
    stop : bool
        Whether failed exposures stop the run.
    """
    today = TOO_MANY_FAILED if known.failed_fraction > max_failed_fraction else ""
    if not today and known.cause == Reason.OUTSIDE_PREDICTION and known.margin == margin:
        today = known.cause
    if today == known.cause and not (today and stop):
        return known.key
    other = f"stop: {today}" if today and stop else today or PASSES
    return other if other != known.key else f"{other} again"
