"""The manifest of an exposure, gathered from the rows of its CCDs.

Here an exposure fails: if too many of its CCDs have, or if it lies where the plan of the run did
not allow for it. By default it is then left out: in its manifest all CCDs are failed, each with its
reason, so that tracts are coadded without it, and the calexps that it has are set aside. Or it
stops the run (`calexp.on_failed_exposure: stop`): there is no manifest, and the rows are kept for
people beside where it would be.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from coaddflow.errors import InputError, Reason
from coaddflow.files import move, remove
from coaddflow.ingest.pointing import fit_without_strays, misfit
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.footprint import check_footprint_within_prediction
from coaddflow.settings.calexp import CalexpSettings
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.manifest import CcdRow, fraction_lost, lost_of, write_manifest
from coaddflow.tables.paths import set_aside_path, sources_path
from coaddflow.tables.pointings import Angles, Correction, write_new
from coaddflow.tables.verdict import PASSES, TOO_MANY_FAILED, Verdict, write_verdict

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """What the run was planned from; of images calibrated elsewhere, their own WCS.

    Attributes
    ----------
    exposure : ExposureRow
        Row of the table of exposures.
    camera : Camera
        Positions of the CCDs.
    margin : float
        `prediction.margin`, degrees.
    """

    exposure: ExposureRow
    camera: Camera
    margin: float


@dataclass(frozen=True)
class _Failure:
    """Why an exposure fails, and what to do about it."""

    cause: str
    message: str
    remedy: str
    outside: frozenset[int] = frozenset()


def make_manifest(
    manifest: str | Path,
    rows: Sequence[CcdRow],
    settings: CalexpSettings,
    planned: Planned | None = None,
    key: str = PASSES,
) -> list[CcdRow]:
    """Gather the rows of an exposure into its manifest.

    Parameters
    ----------
    manifest : str or Path
        ``.../{exposure}.ecsv``. If the exposure fails and is to stop the run, the rows go to
        ``{exposure}.failed.ecsv`` beside it, and there is no manifest.
    rows : sequence of CcdRow
        The rows of its CCDs.
    settings : CalexpSettings
        How many CCDs may fail, and what then becomes of the exposure.
    planned : Planned, optional
        What the run was planned from; None for images calibrated elsewhere.
    key : str
        The key of the verdict in the params of the job (`tables.verdict`).

    Returns
    -------
    list of CcdRow
        The rows of the manifest.

    Raises
    ------
    InputError
        If the exposure fails and is to stop the run, or the calexp of a CCD is gone.
    """
    manifest = Path(manifest)
    failed_manifest = manifest.with_suffix(".failed.ecsv")
    remove(manifest)
    found = sorted(rows, key=lambda row: row.ccd)
    for row in found:
        if row.state == "done":
            _bring_back(row)
            _check_calexp(row, manifest)
    found, failure = _judged(found, settings.max_failed_fraction, planned, manifest)
    for row in found:
        if row.state == "failed":
            _LOG.warning("CCD %d failed: %s: %s", row.ccd, row.reason, row.message)
    if failure is not None and settings.on_failed_exposure == "stop":
        write_manifest(failed_manifest, found)
        raise InputError(failure.message, path=failed_manifest, remedy=failure.remedy)
    verdict = Verdict(key, failed_fraction=fraction_lost(found))
    if failure is not None:
        _LOG.warning("%s. It is left out; %s", failure.message, failure.remedy)
        margin = planned.margin if planned is not None else 0.0
        verdict = replace(verdict, cause=failure.cause, message=failure.message, margin=margin)
        found = [_left_out(row, failure) for row in found]
    used = {row.ccd for row in found if row.state == "done"}
    for row in rows:
        if row.state == "done" and row.ccd not in used:
            _set_aside(row)
    write_verdict(manifest, verdict)
    write_manifest(manifest, found)
    remove(failed_manifest)
    return found


def _judged(
    rows: list[CcdRow], max_failed_fraction: float, planned: Planned | None, manifest: Path
) -> tuple[list[CcdRow], _Failure | None]:
    """Return the rows, with CCDs failed whose WCS is wrong, and why the exposure fails, if so."""
    outside: dict[int, str] = {}
    if planned is not None:
        outside = _outside(rows, planned)
    elsewhere = None
    if outside:
        fitted = [row for row in rows if row.state == "done"]
        exposure = planned.exposure
        pointing, strays = fit_without_strays(fitted, planned.camera, *Angles.of(exposure))
        wrong = {row.ccd for row in strays} & outside.keys()
        rows = [_stray(row, outside[row.ccd]) if row.ccd in wrong else row for row in rows]
        others = {ccd: message for ccd, message in outside.items() if ccd not in wrong}
        if others and _too_many_failures(rows, max_failed_fraction) is None:
            remedy = "raise prediction.margin"
            correction = Correction(Angles.of(exposure), pointing.angles)
            moved = replace(planned, exposure=_at(exposure, correction.fitted))
            if reason := misfit(pointing):
                remedy = reason
            elif not _outside([row for row in rows if row.ccd not in wrong], moved):
                write_new(manifest.parent.with_name("pointings"), exposure.exposure, correction)
                remedy = "run again: the next run uses the fitted pointing"
            elsewhere = _Failure(
                Reason.OUTSIDE_PREDICTION, next(iter(others.values())), remedy, frozenset(others)
            )
    return rows, _too_many_failures(rows, max_failed_fraction) or elsewhere


def _outside(rows: Sequence[CcdRow], planned: Planned) -> dict[int, str]:
    """Return the CCDs that lie where the plan did not allow for them, with a message."""
    found = {}
    for row in rows:
        if row.state == "done":
            try:
                check_footprint_within_prediction(
                    planned.exposure,
                    planned.camera,
                    planned.margin,
                    row.footprint_ra,
                    row.footprint_dec,
                    row.ccd,
                )
            except InputError as error:
                found[row.ccd] = error.cause
    return found


def _at(exposure: ExposureRow, angles: Angles) -> ExposureRow:
    return exposure.model_copy(update=angles._asdict())


def _too_many_failures(rows: Sequence[CcdRow], max_fraction: float) -> _Failure | None:
    """Return why the exposure fails if it has lost too much: whole CCDs, or parts of others."""
    if fraction_lost(rows) <= max_fraction:
        return None
    reasons = [row.reason for row in rows if row.state == "failed"]
    parts = [f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)]
    incomplete = [row for row in rows if row.state == "done" and lost_of(row)]
    if incomplete:
        mean = sum(map(lost_of, incomplete)) / len(incomplete)
        parts.append(f"{len(incomplete)} others lost {100 * mean:.0f} % of their pixels")
    why = ", ".join(parts)
    return _Failure(
        TOO_MANY_FAILED,
        f"exposure {rows[0].exposure} fails: {len(reasons)} of {len(rows)} CCDs failed ({why}), "
        f"more than calexp.max_failed_fraction = {max_fraction:g} allows",
        "look at the reasons there; then correct the cause, add the exposure to the setting "
        "`exclude`, or raise calexp.max_failed_fraction",
    )


def _left_out(row: CcdRow, failure: _Failure) -> CcdRow:
    """Return the row of a CCD of an exposure that is left out; what failed keeps its reason."""
    if row.state == "failed":
        return row
    reason = Reason.OUTSIDE_PREDICTION if row.ccd in failure.outside else Reason.EXPOSURE_FAILED
    return _failed(row, reason, f"calibrated, but {failure.message}")


def _stray(row: CcdRow, message: str) -> CcdRow:
    message = f"its WCS does not agree with those of the other CCDs ({message})"
    return _failed(row, Reason.STRAY_WCS, message)


def _failed(row: CcdRow, reason: Reason, message: str) -> CcdRow:
    """Return the row of a CCD that was calibrated and is not used; what was measured stays."""
    nothing = {"path": "", "sha256": ""}
    failed = {"state": "failed", "reason": reason, "message": message}
    return CcdRow.model_validate(row.model_dump() | nothing | failed)


def _check_calexp(row: CcdRow, manifest: Path) -> None:
    if not Path(row.path).is_file():
        raise InputError(
            f"the calexp of CCD {row.ccd} is gone",
            path=row.path,
            remedy=f"remove {Path(row.path).with_suffix('.json')} (or {manifest}, with "
            "`parallel.calexp: exposure`) and run again",
        )


def _files(row: CcdRow) -> list[tuple[Path, Path]]:
    """Return where the calexp of a CCD and its sources are, and where if they are set aside."""
    files = (Path(row.path), Path(sources_path(row.path)))
    return [(path, Path(set_aside_path(path))) for path in files]


def _set_aside(row: CcdRow) -> None:
    """Move the calexp of a CCD that is not used to where nobody takes it for a good one."""
    for path, aside in _files(row):
        if path.is_file():
            aside.parent.mkdir(exist_ok=True)
            move(path, aside)


def _bring_back(row: CcdRow) -> None:
    """Move the calexp of a CCD that was set aside to its place."""
    for path, aside in _files(row):
        if aside.is_file() and not path.is_file():
            move(aside, path)
