"""The reference catalogue is read as a whole once, before the first job of a run.

A job whose catalogue turns out to be damaged has lost its old products already: Snakemake removes
them when it begins. The catalogue is read in a process of its own, since Snakemake's does not
import astropy, and again only when a file has changed.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from coaddflow.errors import InputError
from coaddflow.files import atomic_path
from coaddflow.settings.refcat import RefcatSettings
from coaddflow.workflow.plan import Plan

CHECKED = Path(".snakemake") / "coaddflow" / "catalogue.json"
"""Checksum of what has been read without a fault, in the working folder."""

_LARGEST = 4e9
"""Bytes; larger catalogues are read by the jobs only, and by `coaddflow check-config`."""

_BROKEN = 2


def check_before_run(plan: Plan, checked: Path = CHECKED) -> None:
    """Raise InputError if the reference catalogue of a run cannot be read; names the file."""
    if not plan.science:
        return
    states = [(str(path), path.stat()) for path in plan.settings.refcat.files()]
    if sum(state.st_size for _, state in states) > _LARGEST:
        return
    asked = {
        "settings": plan.settings.refcat.model_dump(mode="json"),
        "bands": sorted({row.band for row in plan.science.values()}),
        "files": [(path, state.st_size, state.st_mtime_ns) for path, state in states],
    }
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    with contextlib.suppress(OSError):
        if checked.read_text(encoding="utf-8") == key:
            return
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "coaddflow.workflow.catalogue"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == _BROKEN:
        cause, path, remedy = json.loads(done.stdout)
        raise InputError(cause, path, remedy)
    # what else may go wrong there is told by the jobs
    if done.returncode == 0:
        with contextlib.suppress(InputError, OSError), atomic_path(checked) as temporary:
            temporary.write_text(key, encoding="utf-8")


def main() -> int:
    """Read the catalogue that standard input describes; print the error if it cannot be read."""
    from coaddflow.astrometry.refcat import check_catalogue

    asked = json.load(sys.stdin)
    try:
        check_catalogue(RefcatSettings.model_validate(asked["settings"]), asked["bands"])
    except InputError as error:
        print(json.dumps([error.cause, error.path and str(error.path), error.remedy]))
        return _BROKEN
    return 0


if __name__ == "__main__":
    sys.exit(main())
