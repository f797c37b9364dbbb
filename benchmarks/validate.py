"""Figures of finished runs for docs/validation.md.

    python benchmarks/validate.py survey results data/demo/truth
    python benchmarks/validate.py frames results ../shared/data/hatp32/refstars.csv

`survey`: a simulated survey against its truth. `frames`: the coadd of the real frames of
configs/hatp32.yaml against its reference stars.
"""

import argparse
from pathlib import Path

import numpy as np
from astropy.table import Table

from coaddflow.qa.coadd_check import detect_on
from coaddflow.qa.survey_check import (
    check_band,
    coadds_of_band,
    noise_gain,
    reference_stars_found,
    trail_left,
)
from coaddflow.tables.manifest import read_manifest


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("survey", "frames"))
    parser.add_argument("results", type=Path)
    parser.add_argument("known", type=Path, help="folder of the truth, or table of stars")
    arguments = parser.parse_args()
    print_ccds(arguments.results)
    if arguments.what == "survey":
        print_survey(arguments.results, arguments.known)
    else:
        print_frames(arguments.results, arguments.known)


def print_ccds(results: Path) -> None:
    """Print how the CCDs were solved."""
    paths = sorted((results / "summary").glob("*.ecsv"))
    rows = [row for path in paths for row in read_manifest(path)]
    done = [row for row in rows if row.state == "done"]
    rms = [np.sqrt(2.0) * row.astrometry_rms / row.pixel_scale for row in done]
    print(f"CCDs done: {len(done)} of {len(rows)}")
    print(f"astrometry, rms of both axes: {min(rms):.3f} to {max(rms):.3f} pixel")
    print(f"largest pointing error: {max(row.pointing_offset for row in done) / 60:.1f} arcmin")


def print_survey(results: Path, truth: Path) -> None:
    """Print a simulated survey's figures."""
    exposures = Table.read(truth / "exposures.ecsv")
    for band in sorted(path.name for path in (results / "coadd").iterdir() if path.is_dir()):
        f = check_band(results, truth, band)
        chi = ", ".join(f"{value:.3f}" for value in f.chi)
        print(f"band {band}: {f.n_stars} stars, positions {f.position_rms:.1f} mas rms of one axis")
        print(f"  flux bias {100 * f.flux_bias:+.2f} +- {100 * f.flux_bias_error:.2f} %")
        print(f"  chi of empty sky {chi}; variance of 12 x 12 means over white {f.covariance:.2f}")
        print(f"  {f.n_spurious} of {f.n_sources} detections are not on the true sky")
    for row in exposures:
        if np.all(np.isfinite(np.asarray(row["trail"], float))):
            on_warp, on_coadd = trail_left(results, truth, str(row["exposure"]))
            print(
                f"trail of {row['exposure']}: {on_warp:.0f} nJy on its warps, {on_coadd:.1f} left"
            )


def print_frames(results: Path, stars: Path) -> None:
    """Print the figures of the real frames."""
    coadd, header = next(coadds_of_band(results, "clear"))
    warps = sorted((results / "warp").glob("*/*/0_0.fits"))
    print(f"sky noise falls by a factor of {noise_gain(coadd, warps):.2f} ({len(warps)} frames)")
    window = detect_on(coadd.masked_image)[1]
    table = Table.read(stars)
    for least in (1, 2, 6):
        distance = reference_stars_found(coadd, header, table, least, window)
        near = np.count_nonzero(distance < 0.5)
        print(
            f"reference stars where {least} or more frames overlap: {near} of {distance.size} "
            f"within 0.5 pixel, median {np.nanmedian(distance):.2f}"
        )


if __name__ == "__main__":
    main()
