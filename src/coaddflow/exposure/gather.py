"""The manifest of an exposure, gathered from the rows of its CCDs.

Here an exposure fails: if too many of its CCDs have, or if one lies where the plan of the run did
not allow for it. Then there is no manifest, nothing downstream is made without the exposure
silently, and the rows are kept for people beside where the manifest would be.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from coaddflow.errors import InputError
from coaddflow.files import remove
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.footprint import check_footprint_within_prediction
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.manifest import CcdRow, write_manifest

_LOG = logging.getLogger(__name__)


def make_manifest(
    manifest: str | Path,
    rows: Sequence[CcdRow],
    max_failed_fraction: float,
    exposure: ExposureRow | None = None,
    camera: Camera | None = None,
    margin: float = 0.0,
) -> list[CcdRow]:
    """Gather the rows of an exposure into its manifest.

    Parameters
    ----------
    manifest : str or Path
        ``.../{exposure}.ecsv``. If the exposure fails, the rows go to ``{exposure}.failed.ecsv``
        beside it, and there is no manifest.
    rows : sequence of CcdRow
        The rows of its CCDs.
    max_failed_fraction : float
        The exposure fails if more of its CCDs than this have failed.
    exposure, camera, margin : ExposureRow, Camera, float
        What the run was planned from; None for images calibrated elsewhere, which were planned
        from their own WCS.

    Raises
    ------
    InputError
        If too many CCDs failed, a CCD lies where the plan did not allow for it, or the calexp of
        a CCD is gone.
    """
    manifest = Path(manifest)
    failed_manifest = manifest.with_suffix(".failed.ecsv")
    remove(manifest)
    found = sorted(rows, key=lambda row: row.ccd)
    try:
        _check_failures(found, max_failed_fraction, failed_manifest)
        for row in found:
            if row.state == "done" and not Path(row.path).is_file():
                raise InputError(
                    f"the calexp of CCD {row.ccd} is gone",
                    path=row.path,
                    remedy=f"remove {Path(row.path).with_suffix('.json')} (or {manifest}, with "
                    "`parallel.calexp: exposure`) and run again",
                )
            if row.state == "done" and exposure is not None:
                check_footprint_within_prediction(
                    exposure, camera, margin, row.footprint_ra, row.footprint_dec, row.ccd
                )
    except InputError:
        write_manifest(failed_manifest, found)
        raise
    write_manifest(manifest, found)
    remove(failed_manifest)
    return found


def _check_failures(rows: Sequence[CcdRow], max_fraction: float, failed_manifest: Path) -> None:
    """Raise InputError if too many CCDs of an exposure have failed; log all that have."""
    failed = [row for row in rows if row.state == "failed"]
    for row in failed:
        _LOG.warning("CCD %d failed: %s: %s", row.ccd, row.reason, row.message)
    if len(failed) <= max_fraction * len(rows):
        return
    reasons = [row.reason for row in failed]
    why = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
    raise InputError(
        f"exposure {rows[0].exposure} fails: {len(failed)} of {len(rows)} CCDs failed ({why}), "
        f"more than calexp.max_failed_fraction = {max_fraction:g} allows",
        path=failed_manifest,
        remedy="look at the reasons there; then correct the cause, add the exposure to the "
        "setting `exclude`, or raise calexp.max_failed_fraction",
    )
