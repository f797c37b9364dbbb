"""Which sets of calibration frames exposures take, shown in the table of raw exposures.

The column `sets` is for people: sets follow from the settings and the dates of all frames, and a
run works them out anew.
"""

from pathlib import Path

from coaddflow.settings import Settings
from coaddflow.tables.exposures import read_exposures, write_exposures
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.workflow.calib_sets import CalibSets, CandidateFrames, night_of
from coaddflow.workflow.plan import raw_exposures


def show_sets(settings: Settings, table: str | Path) -> list[str]:
    """Write into a table of raw exposures which sets of calibration frames each of them takes.

    Parameters
    ----------
    settings : Settings
        The settings of the run.
    table : path
        The table; not touched where nothing changes.

    Returns
    -------
    list of str
        Exposures of which the table now says something else.

    Raises
    ------
    InputError
        If the table cannot be read or written, or a frame of a kind that has sets has no date.
    """
    rows, calibs = read_exposures(table), settings.calibs
    in_use = any(calibs.sets_of(kind).in_use for kind in CALIB_KINDS)
    if not in_use and not any(row.sets for row in rows):
        return []
    science, calibration = raw_exposures(settings, rows)
    sets = CalibSets.of_frames(CandidateFrames(calibs, science.values(), calibration.values()))
    longitude = calibs.longitude or 0.0
    shown = [
        row.model_copy(
            update={
                "sets": sets.shown(row.band, night_of(row.mjd, longitude))
                if row.exposure in science
                else ""
            }
        )
        for row in rows
    ]
    write_exposures(table, shown)
    return [new.exposure for new, old in zip(shown, rows, strict=True) if new.sets != old.sets]
