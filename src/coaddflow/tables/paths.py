"""Where everything that a run makes is, relative to its working folder.

Templates: the rules take them as they are, ``CALEXP.format(exposure="1001", ccd=3)`` names a file.
"""

from pathlib import Path

RESULTS = "results"
LOGS = "logs"

CALIB_KINDS = ("bias", "dark", "flat", "defects")
"""Calibration frames, in the order in which they are made."""

KINDS_BY_BAND = ("flat",)
"""Those that are made from exposures of one band."""

CALIB = "results/calibs/{kind}/{ccd}.fits"
CALIB_OF_BAND = "results/calibs/{kind}/{band}/{ccd}.fits"
FLAT = CALIB_OF_BAND.replace("{kind}", "flat")
DEFECTS = CALIB_OF_BAND.replace("{kind}", "defects")
"""Bad pixels of the flat of a band, and of the dark; one from the night sky is a `CALIB`."""

FRAME_TABLE = "results/calibs/frames/{frames}.ecsv"
"""The raw frames of a kind of calibration frames (`frames_id`), in one small file."""

CALIB_TABLE = "results/calibs/{band}.ecsv"
"""All calibration frames of a band, in one small file."""


def in_set(template: str) -> str:
    """Return the template of a file of calibration frames in a folder of its set, ``{set}``.

    Such folders there are only where sets of different nights are.
    """
    return template.replace("{", "{set}/{", 1)


def frames_id(kind: str, band: str | None, name: str) -> str:
    """Return what stands for raw frames of a kind, band and set: ``bias``, ``flat_r.20260105``."""
    return (kind if band is None else f"{kind}_{band}") + (f".{name}" if name else "")


def frames_of(text: str) -> tuple[str, str | None, str]:
    """Return kind, band and set of what is from `frames_id`."""
    frames, _, name = text.partition(".")
    kind, _, band = frames.partition("_")
    return kind, band or None, name


def calib_path(template: str, name: str, **names: object) -> str:
    """Return a file of the calibration frames of a set; empty: there is one set for all nights."""
    return in_set(template).format(set=name, **names) if name else template.format(**names)


CALEXP = "results/calexp/{exposure}/{ccd}.fits"
SOURCES = "results/calexp/{exposure}/{ccd}_sources.fits"
ROW = "results/calexp/{exposure}/{ccd}.json"
MANIFEST = "results/summary/{exposure}.ecsv"
POINTINGS = "results/pointings"


def sources_path(calexp: str | Path) -> str:
    """Return the catalogue of the sources of a calexp."""
    path = Path(calexp)
    return str(path.with_name(f"{path.stem}_sources.fits"))


def set_aside_path(path: str | Path) -> str:
    """Return where a calexp (or its sources) is that is not used because its exposure is not."""
    return str(Path(path).parent / "left_out" / Path(path).name)


TRACT_CORNERS = "results/corners/{band}/{tract}.sqlite"
SURVEY_CORNERS = "results/corners.sqlite"

WARP_TABLE = "results/warp/{tract}/{exposure}.ecsv"

COADD = "results/coadd/{band}/{tract}/{patch}.fits"
COADD_TABLE = "results/coadd/{band}/{tract}.ecsv"
PICTURE = "results/coadd/{tract}.png"

DEPTH = "results/depth/{band}/{tract}/{patch}.fits"
DEPTH_TABLE = "results/depth/{tract}.ecsv"
