"""Names in the settings that match nothing in the tables and the camera.

A frame that is not found would be left out without a word, and with all frames of a kind the whole
survey would go uncalibrated. Everything is compared with what the tables say, before anything runs.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from coaddflow.errors import did_you_mean
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow
from coaddflow.tables.paths import CALIB_KINDS

_LISTED = 12


def unmatched_names(
    settings: Settings, rows: Sequence[ExposureRow], images: Sequence[ImageRow]
) -> list[str]:
    """Return a sentence for every exposure and band in the settings that matches nothing.

    Parameters
    ----------
    settings : Settings
        The settings of the run.
    rows, images : sequence
        All rows of the tables of raw exposures and of images calibrated elsewhere.
    """
    known = {row.exposure: row.kind for row in rows} | {row.exposure: "science" for row in images}
    bands = {row.band for row in (*rows, *images) if row.band}
    return [
        *_unknown("bands", settings.bands or (), bands, "band"),
        *_unknown("exclude", settings.exclude, known, "exposure"),
        *_unknown(
            "selection.exclude_exposures", settings.selection.exclude_exposures, known, "exposure"
        ),
        *(problem for kind in CALIB_KINDS for problem in _frames(settings, kind, known)),
    ]


def unmatched_ccds(
    settings: Settings, images: Sequence[ImageRow], ccds: Collection[int]
) -> list[str]:
    """Return the same for CCDs, which are those of the camera (``ccds``) and of the images."""
    known = {*ccds, *(row.ccd for row in images)}
    return [
        *_unknown("exclude_ccds", settings.exclude_ccds, known, "CCD"),
        *_unknown("selection.exclude_ccds", settings.selection.exclude_ccds, known, "CCD"),
    ]


def _frames(settings: Settings, kind: str, known: Mapping[str, str]) -> Iterator[str]:
    """Yield what is wrong with the exposures that a calibration frame is to be made from."""
    section = getattr(settings.calibs, kind)
    key, named = f"calibs.{kind}.exposures", section.exposures or ()
    wanted = "science" if section.source == "night_sky" else kind
    if kind == "defects" and section.source == "frames":
        # made from darks and flats that have settings of their own
        yield from _unknown(key, named, known, "exposure")
        return
    suitable = [exposure for exposure, is_a in known.items() if is_a == wanted]
    yield from _unknown(key, [e for e in named if e not in known], suitable, "exposure")
    for exposure in named:
        if known.get(exposure, wanted) != wanted:
            yield (
                f"setting {key!r}: exposure {exposure!r} is a {known[exposure]} exposure in the "
                f"table and not a {wanted} exposure{did_you_mean(exposure, suitable)}"
            )


def _unknown(
    key: str, names: Iterable[object], known: Collection[object], what: str
) -> Iterator[str]:
    """Yield a sentence for each name that is not known."""
    for name in names:
        if name not in known:
            listed = ", ".join(map(str, sorted(known, key=str)[:_LISTED]))
            more = ", ..." if len(known) > _LISTED else ""
            yield (
                f"setting {key!r}: there is no {what} {name!r}{did_you_mean(name, known)}; "
                + (f"there are {listed}{more}" if known else "there are none")
            )
