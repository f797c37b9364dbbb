"""Which survey a folder holds: two surveys in one folder would replace each other's products.

Settings that have been edited, exposures that were added or dropped, and a table or camera file of
another name are the same survey. It is another one if neither the tables nor any exposure (by
camera, id and time) are those that are recorded.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coaddflow.errors import InputError
from coaddflow.files import atomic_path
from coaddflow.tables import paths
from coaddflow.workflow.plan import Plan

SURVEY = f"{paths.RESULTS}/survey.json"


def check_survey(plan: Plan, record: str | Path = SURVEY) -> None:
    """Raise InputError if the products in this folder are of another survey."""
    try:
        known = json.loads(Path(record).read_text(encoding="utf-8"))
        tables, exposures = list(known["tables"]), dict(known["exposures"])
        camera = known["camera"]
    except (OSError, ValueError, KeyError, TypeError):
        # nothing has run here, or an older version: nobody knows
        return
    own = _describe(plan)
    same_exposure = camera == own["camera"] and any(
        exposures.get(name) == mjd for name, mjd in own["exposures"].items()
    )
    if set(tables) & set(own["tables"]) or same_exposure:
        return
    raise InputError(
        f"this folder holds the products of another survey ({' and '.join(tables)}, "
        f"{len(exposures)} exposures), which a run with these settings would replace",
        path=record,
        remedy="run in a folder of its own (snakemake --directory FOLDER); if the other survey is "
        f"no longer needed, rm {record}",
    )


def check_writable(
    folders: Iterable[str | Path] = (".", ".snakemake", paths.RESULTS, paths.LOGS),
) -> None:
    """Raise InputError if a folder that a run writes into is a file, or may not be written to.

    Snakemake notices it in the middle of a run, or with a traceback.
    """
    for folder in map(Path, folders):
        if not folder.exists() and not folder.is_symlink():
            continue
        if not folder.is_dir():
            raise InputError("is not a folder", path=folder, remedy="move it away")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(
                "the folder may not be written to",
                path=folder,
                remedy="correct its permissions, or run elsewhere (snakemake --directory FOLDER)",
            )


def record_survey(plan: Plan, record: str | Path = SURVEY) -> None:
    """Record whose products a folder holds; called when a run begins."""
    text = json.dumps(_describe(plan), indent=1) + "\n"
    with contextlib.suppress(OSError):
        if Path(record).read_text(encoding="utf-8") == text:
            return
    with atomic_path(record) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _describe(plan: Plan) -> dict[str, Any]:
    """Return tables, camera and exposures of a plan, as plain values."""
    settings = plan.settings
    times = {name: row.mjd for name, row in plan.science.items()}
    for name, images in plan.images.items():
        times[name] = min(row.mjd for row in images.values())
    return {
        "tables": [t for t in (settings.exposures, settings.calibrated.table) if t is not None],
        "camera": settings.camera,
        "exposures": dict(sorted(times.items())),
    }
