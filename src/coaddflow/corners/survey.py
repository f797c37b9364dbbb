"""The corner database of the survey, and its comparison with the plan of the run."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from coaddflow.corners.build import SurveyUpdate, update_survey_database
from coaddflow.corners.database import CornerDatabase
from coaddflow.errors import InputError
from coaddflow.skymap.base import SkyMap
from coaddflow.tables.paths import RESULTS

_LOG = logging.getLogger(__name__)


def make_survey_database(
    path: str | Path,
    manifests: Iterable[str | Path],
    skymap: SkyMap,
    overlaps: Mapping[str, Mapping[int, Sequence[str]]],
) -> SurveyUpdate:
    """Update the survey's corner database and compare it with the plan.

    Each exposure was compared with the plan when it was gathered; here all are compared with the
    current plan, so that reducing the margin leaves no hole.

    Parameters
    ----------
    path : str or Path
        The database.
    manifests : iterable of str or Path
        Manifests of all exposures.
    skymap : SkyMap
        Tracts and patches.
    overlaps : mapping
        Patches that each exposure can touch, by exposure and tract (`Plan.overlaps`).

    Raises
    ------
    InputError
        If a CCD covers a patch for which its exposure was not planned.
    """
    update = update_survey_database(path, manifests, skymap)
    _LOG.info(
        "%d exposures added, %d redone, %d dropped, %d as before",
        *map(len, (update.added, update.redone, update.dropped, update.unchanged)),
    )
    holes = _unplanned_patches(path, overlaps)
    if holes:
        exposure, tract, patch = holes[0]
        raise InputError(
            f"{len(holes)} patches are covered by exposures that were not planned for them, such "
            f"as patch {patch} of tract {tract} by exposure {exposure}",
            path=path,
            remedy="raise prediction.margin, or correct the pointings in the exposure table "
            f"(coaddflow ingest --fitted {RESULTS})",
        )
    return update


def _unplanned_patches(
    database: str | Path, overlaps: Mapping[str, Mapping[int, Sequence[str]]]
) -> list[tuple[str, int, str]]:
    """Return (exposure, tract, patch) that are covered but were not planned, in order."""
    planned = {
        (exposure, tract, patch)
        for exposure, tracts in overlaps.items()
        for tract, patches in tracts.items()
        for patch in patches
    }
    with CornerDatabase(database) as corners:
        covered = corners.query(
            "SELECT DISTINCT exposure, tract, patch FROM ccd_patches JOIN ccds USING (ccd_key)"
            " ORDER BY exposure, tract, patch"
        )
    return [row for row in map(tuple, covered) if row not in planned]
