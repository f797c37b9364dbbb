"""Pointings fitted to exposures whose headers are too far off.

The job of such an exposure writes the fitted pointing, and the next plan uses it in place of that
of the table of exposures: the exposure is redone where it was in truth. A run adopts the pointings
that it was planned with before its first job, so that its jobs on a cluster, which read the
Snakefile again, all have its plan.

A pointing counts as long as the table has the pointing that it was fitted in place of.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from coaddflow.files import atomic_path
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.paths import POINTINGS

_NEW, _ADOPTED = ".new.json", ".json"


class Angles(NamedTuple):
    """A pointing; ICRS degrees."""

    ra: float
    dec: float
    rotation: float

    @classmethod
    def of(cls, row: ExposureRow) -> "Angles":
        """Take it from the table."""
        return cls(row.ra, row.dec, row.rotation)

    def rounded(self) -> "Angles":
        """Return it as it is put into a table: to 0.04 milliarcseconds."""
        return Angles(
            round(self.ra, 8) % 360.0, round(self.dec, 8), round(self.rotation, 6) % 360.0
        )


class Correction(NamedTuple):
    """The pointing of the table, and the fitted one."""

    table: Angles
    fitted: Angles


def write_new(
    folder: str | Path, exposure: str, correction: Correction, adopted: bool = False
) -> None:
    """Write the fitted pointing of an exposure, for the next plan (or one that a run adopts)."""
    path = Path(folder) / f"{exposure}{_ADOPTED if adopted else _NEW}"
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(correction._asdict()) + "\n", encoding="utf-8")


def corrected(
    rows: Iterable[ExposureRow], with_new: bool, folder: str | Path = POINTINGS
) -> tuple[list[ExposureRow], dict[str, Correction]]:
    """Return the rows of a table with fitted pointings, and what was corrected.

    Parameters
    ----------
    rows : iterable of ExposureRow
        The exposures on the sky.
    with_new : bool
        Use also those that no run has adopted: a job of a run does not.
    folder : path
        Where the pointings are.
    """
    known = {path.name for path in Path(folder).glob("*.json")}
    found, corrections = [], {}
    for row in rows:
        before = now = Angles.of(row)
        for kind in (_ADOPTED, _NEW) if with_new else (_ADOPTED,):
            if (name := f"{row.exposure}{kind}") in known:
                correction = _read(Path(folder) / name)
                if correction is not None and correction.table == now:
                    now = correction.fitted
        if now != before:
            corrections[row.exposure] = Correction(before, now)
        found.append(row.model_copy(update=now._asdict()) if now != before else row)
    return found, corrections


def exposures_with_pointing(folder: str | Path = POINTINGS) -> list[str]:
    """Return the exposures that a run has adopted a fitted pointing for, in order."""
    names = sorted(path.name for path in Path(folder).glob(f"*{_ADOPTED}"))
    return [name.removesuffix(_ADOPTED) for name in names if not name.endswith(_NEW)]


def adopt(corrections: Mapping[str, Correction], folder: str | Path = POINTINGS) -> None:
    """Make what a run was planned with the pointings of its jobs."""
    for exposure, correction in corrections.items():
        new = Path(folder) / f"{exposure}{_NEW}"
        if new.exists():
            write_new(folder, exposure, correction, adopted=True)
            new.unlink(missing_ok=True)


def has_new(exposure: str, folder: str | Path = POINTINGS) -> bool:
    """Return whether an exposure has a fitted pointing that the next run will use."""
    return (Path(folder) / f"{exposure}{_NEW}").exists()


def _read(path: Path) -> Correction | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return Correction(*(Angles(*map(float, content[name])) for name in Correction._fields))
    return None
