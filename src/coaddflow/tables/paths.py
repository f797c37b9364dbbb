"""Where everything that a run makes is, relative to its working folder.

Templates: the rules take them as they are, ``CALEXP.format(exposure="1001", ccd=3)`` names a file.
"""

from pathlib import Path

RESULTS = "results"
LOGS = "logs"

CALIB_KINDS = ("bias", "dark", "flat", "defects")
"""Calibration frames, in the order in which they are made."""

CALIB = "results/calibs/{kind}/{ccd}.fits"
FLAT = "results/calibs/flat/{band}/{ccd}.fits"
DEFECTS = "results/calibs/defects/{band}/{ccd}.fits"
"""Bad pixels of the flat of a band, and of the dark; one from the night sky is a `CALIB`."""

FRAME_TABLE = "results/calibs/frames/{frames}.ecsv"
"""The raw frames of a kind of calibration frames (and band: ``flat_r``), in one small file."""

CALIB_TABLE = "results/calibs/{band}.ecsv"
"""All calibration frames of a band, in one small file."""

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
