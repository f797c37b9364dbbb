"""Where everything that a run makes is, relative to its working folder.

Templates: the rules take them as they are, ``CALEXP.format(exposure="1001", ccd=3)`` names a file.
"""

RESULTS = "results"
LOGS = "logs"

CALIB_KINDS = ("bias", "dark", "flat", "defects")
"""Calibration frames, in the order in which they are made."""

CALIB = "results/calibs/{kind}/{ccd}.fits"
FLAT = "results/calibs/flat/{band}/{ccd}.fits"

CALEXP = "results/calexp/{exposure}/{ccd}.fits"
SOURCES = "results/calexp/{exposure}/{ccd}_sources.fits"
ROW = "results/calexp/{exposure}/{ccd}.json"
MANIFEST = "results/summary/{exposure}.ecsv"

TRACT_CORNERS = "results/corners/{band}/{tract}.sqlite"
SURVEY_CORNERS = "results/corners.sqlite"

WARP_TABLE = "results/warp/{tract}/{exposure}.ecsv"

COADD = "results/coadd/{band}/{tract}/{patch}.fits"
COADD_TABLE = "results/coadd/{band}/{tract}.ecsv"
PICTURE = "results/coadd/{tract}.png"

DEPTH = "results/depth/{band}/{tract}/{patch}.fits"
DEPTH_TABLE = "results/depth/{tract}.ecsv"
