"""The depth maps of the coadds of a tract, and the table of their medians: the whole job.

What depth is, is in `coaddflow.coadd.point_sources`. The PSF is that of the coadd. Of exposures
without a PSF, which were calibrated elsewhere, it is a Gaussian, with a second moment that is the
mean of theirs, weighted as they are in the coadd.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.coadd.mean import effective_area
from coaddflow.coadd.point_sources import area_map, depth_of
from coaddflow.coadd.product import stored_coadd
from coaddflow.coadd.psf import stored_psf_grid
from coaddflow.errors import InputError
from coaddflow.files import remove
from coaddflow.geometry.box import Box
from coaddflow.image.masked_image import image_hdu, opened_fits, write_fits
from coaddflow.image.provenance import provenance_header
from coaddflow.settings import Settings
from coaddflow.skymap.tract import Tract, patch_position
from coaddflow.tables.coadds import coadd_files, coadd_remedy
from coaddflow.tables.depths import WHOLE_TRACT, DepthRow, write_depth_table
from coaddflow.warp.files import part_header

_LOG = logging.getLogger(__name__)

_BIN = 0.001
"""Magnitudes to which the median of a tract is known: its pixels are counted in bins."""


_PATCH = re.compile(r"[0-9]+_[0-9]+")


Ccd = tuple[str, str]
"""Exposure and CCD."""


def make_depth(
    table: str | Path,
    coadds: Iterable[str | Path],
    tract: Tract,
    settings: Settings,
) -> None:
    """Make the depth maps of a tract in all bands, and the table of their medians: the whole job.

    Maps of an earlier run whose patch or band no longer has a coadd are removed.

    Parameters
    ----------
    table : str or Path
        ``.../{tract}.ecsv``, written last. The maps go to ``.../{band}/{tract}/{patch}.fits``.
    coadds : iterable of str or Path
        Coadds ``.../{band}/{tract}/{patch}.fits``, or lists that name them.
    tract : Tract
        The tract.
    settings : Settings
        Section products.

    Raises
    ------
    InputError
        If a coadd is not readable, or a map cannot be written.
    """
    table = Path(table)
    remove(table)
    rows: list[DepthRow] = []
    by_band: dict[str, list[Path]] = {}
    for coadd in coadd_files(coadds):
        by_band.setdefault(coadd.parts[-3], []).append(coadd)
    _remove_stale_maps(table, by_band)
    for band, paths in sorted(by_band.items()):
        folder = table.parent / band / table.stem
        rows += _band_depth(band, paths, folder, tract, settings)
    write_depth_table(table, rows, tract.id)


def _remove_stale_maps(table: Path, coadds: Mapping[str, Sequence[Path]]) -> None:
    """Remove the maps of a tract that belong to none of these coadds, by band."""
    for path in table.parent.glob(f"*/{table.stem}/*.fits"):
        current = {coadd.name for coadd in coadds.get(path.parts[-3], ())}
        if _PATCH.fullmatch(path.stem) and path.name not in current:
            remove(path)
            _LOG.info("removed %s, whose coadd is no longer made", path)


def _band_depth(
    band: str, coadds: Sequence[Path], folder: Path, tract: Tract, settings: Settings
) -> list[DepthRow]:
    """Write the maps of a band; return a row for each, and one for all."""
    rows, counts = [], np.zeros(0, np.int64)
    all_used: set[str] = set()
    all_left: set[Ccd] = set()
    for path in sorted(coadds, key=lambda path: patch_position(path.stem)):
        with opened_fits(path, "coadd", coadd_remedy(path)) as (stream, hdus):
            (coadd, coadd_header), grid = stored_coadd(stream, hdus), stored_psf_grid(hdus)
        seeing = coadd_header.get("SEEING", float("nan"))
        variance = coadd.masked_image.variance
        if grid is not None:
            area = area_map(grid, variance.shape)
        else:
            area = effective_area(seeing, tract.pixel_scale)
        if "COVFACT" not in coadd_header:
            raise InputError("is from an older version", path, coadd_remedy(path))
        depth = depth_of(variance, area, coadd_header["COVFACT"])
        header = _header(tract, coadd.box, band, path.stem, seeing)
        primary = fits.PrimaryHDU(header=provenance_header(settings.provenance(), [path]))
        compression = settings.products.compression
        write_fits(folder / path.name, [primary, image_hdu("DEPTH", depth, header, compression)])
        values = depth[np.isfinite(depth)]
        median = float(np.median(values)) if values.size else float("nan")
        used, left = _used_and_left_out(coadd.inputs)
        all_used, all_left = all_used | used, all_left | left
        rows.append(_row(band, path.stem, median, seeing, values.size, used, left))
        _LOG.info("%s: %.3f mag at 5 sigma, seeing %.2f arcsec", path, median, seeing)
        found = np.bincount(np.maximum(values / _BIN, 0).astype(np.int64), minlength=counts.size)
        found[: counts.size] += counts
        counts = found
    filled = [row for row in rows if row.n_pixels]
    weights = [row.n_pixels for row in filled] or [1]
    seeing = float(np.average([row.seeing for row in filled] or [np.nan], weights=weights))
    n_pixels = sum(row.n_pixels for row in rows)
    whole = _row(band, WHOLE_TRACT, _median(counts), seeing, n_pixels, all_used, all_left)
    return [*rows, whole]


def _used_and_left_out(inputs: Table) -> tuple[set[str], set[Ccd]]:
    """Return the exposures that are used in a coadd, and the CCDs that the selection left out."""
    used = {str(row["exposure"]) for row in inputs if row["n_used"]}
    if "reason" not in inputs.colnames:
        return used, set()
    left = {
        (str(row["exposure"]), str(row["ccds"]))
        for row in inputs
        if str(row["reason"]).strip() and not str(row["reason"]).startswith("failed")
    }
    return used, left


def _row(
    band: str,
    patch: str,
    depth: float,
    seeing: float,
    n_pixels: int,
    used: set[str],
    left: set[Ccd],
) -> DepthRow:
    without = ",".join(sorted({exposure for exposure, _ in left} - used))
    figures = round(depth, 4), round(seeing, 4), n_pixels, len(used), len(left)
    return DepthRow(band, patch, *figures, without)


def _header(tract: Tract, box: Box, band: str, patch: str, seeing: float) -> fits.Header:
    """Return the header of a depth map."""
    header = part_header(tract, box)
    del header["PHOTZP"]
    header["BUNIT"] = ("mag", "AB, point source at 5 sigma")
    header["FILTER"], header["TRACT"], header["PATCH"] = band, tract.id, patch
    if np.isfinite(seeing):
        header["SEEING"] = (seeing, "[arcsec] FWHM of the PSF")
    return header


def _median(counts: NDArray[np.int64]) -> float:
    """Return the median of values that are counted in bins; NaN if there are none."""
    if not counts.sum():
        return float("nan")
    middle = np.searchsorted(np.cumsum(counts), counts.sum() / 2.0)
    return float((middle + 0.5) * _BIN)
