"""One tract: the warps of its exposures and the coadds of its patches.

This is where the corner database is asked what goes into what, and where files are read and
written; `warp` and `coadd` do the work. A job that holds a whole tract in memory uses the same
pieces.
"""

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from astropy.table import Table, vstack
from numpy.typing import NDArray

from coaddflow import polygon
from coaddflow.coadd import CoaddInput, coadd_patch, exposure_weight, write_coadd
from coaddflow.corners import CcdOverlap, CornerDatabase, Rejection, Selection, patch_overlaps
from coaddflow.errors import InputError
from coaddflow.image import MaskedImage, MaskPlane, flux_scale, read_masked_image
from coaddflow.manifest import CcdRow, read_manifest
from coaddflow.picture import write_picture
from coaddflow.provenance import provenance_header
from coaddflow.resample import covariance_factor
from coaddflow.settings import Settings
from coaddflow.skymap import Tract
from coaddflow.warp import (
    Box,
    CcdImage,
    WarpFile,
    WarpReader,
    read_warp_table,
    warp_exposure,
)
from coaddflow.wcs import read_wcs

_LOG = logging.getLogger(__name__)

_WAVELENGTH_ORDER = "KHJYyzIiRrVgGBUu"
"""Filters from red to blue."""

_FOOTPRINT_GROWTH = 1.5
"""Pixels by which the outline of a CCD is enlarged when the CCD is taken out of a warp."""


def make_warps(table: str | Path, manifest: str | Path, tract: Tract, settings: Settings) -> Table:
    """Warp the CCDs of an exposure to a tract: the whole job.

    All CCDs that are done are warped; whether they are good enough for the coadds is decided
    later, by the selection, so that a change of the selection makes no warp again.

    Parameters
    ----------
    table : str or Path
        ``.../{tract}/{exposure}.ecsv``, written last.
    manifest : str or Path
        The manifest of the exposure.
    tract : Tract
        The tract.
    settings : Settings
        Sections warp and products.

    Returns
    -------
    astropy.table.Table
        See `warp.warp_exposure`.
    """
    rows = {row.ccd: row for row in read_manifest(manifest)}
    patch_ccds: dict[str, list[int]] = {}
    for ccd, row in rows.items():
        if row.state == "done":
            for patch, *_ in patch_overlaps(row.footprint_ra, row.footprint_dec, tract):
                patch_ccds.setdefault(patch, []).append(ccd)
    exposure = next(iter(rows.values())).exposure
    _LOG.info("tract %d: exposure %s covers %d patches", tract.id, exposure, len(patch_ccds))
    return warp_exposure(
        table,
        exposure,
        tract,
        patch_ccds,
        lambda ccd: _read_ccd(rows[ccd]),
        settings.warp,
        cards=provenance_header(settings.section("warp"), [manifest]),
        compression=settings.products.compression,
    )


def _read_ccd(row: CcdRow) -> CcdImage:
    """Read the pixels of a calexp."""
    _LOG.info("read %s", row.path)
    masked_image, header = read_masked_image(row.path)
    if row.zero_point is None:
        raise InputError("the calexp has no zero-point", path=row.path)
    return CcdImage(masked_image, read_wcs(header, row.path), flux_scale(row.zero_point))


def make_coadd(
    path: str | Path,
    database: str | Path,
    warps: Sequence[str | Path],
    tract: Tract,
    band: str,
    patch: str,
    settings: Settings,
) -> None:
    """Coadd a patch in one band: the whole job.

    Parameters
    ----------
    path : str or Path
        The coadd. It is written also if nothing covers the patch.
    database : str or Path
        The corner database of the tract.
    warps : sequence of str or Path
        Tables of the warps of all exposures that can touch the patch.
    tract, band, patch : Tract, str, str
        Which coadd.
    settings : Settings
        Sections coadd, selection, warp (its kernel) and products.
    """
    files = _warps_of_patch(warps, patch)
    with CornerDatabase(database) as corners:
        selection = corners.select(tract.id, patch, band, settings.selection)
        inputs = _coadd_inputs(selection, files, corners, tract)
    coadd = coadd_patch(
        inputs,
        tract.patch(patch).outer_box,
        settings.coadd,
        pixel_scale=tract.pixel_scale,
        covariance=covariance_factor(settings.warp.kernel),
    )
    coadd = dataclasses.replace(coadd, inputs=with_rejected(coadd.inputs, selection.rejected))
    _LOG.info("%d exposures used, %d CCDs left out", len(inputs), len(selection.rejected))
    cards = provenance_header(
        settings.section("coadd", "selection"),
        [database, *(files[one.exposure] for one in inputs)],
    )
    cards["FILTER"] = (band, "band")
    cards["PATCH"] = (patch, "patch of the tract")
    write_coadd(path, coadd, tract, cards, settings.products.compression)


def _warps_of_patch(tables: Sequence[str | Path], patch: str) -> dict[str, Path]:
    """Return the warps that cover a patch, by exposure."""
    files = {}
    for path in map(Path, tables):
        table = read_warp_table(path)
        for row in table[table["patch"] == patch]:
            files[str(table.meta["exposure"])] = path.parent / str(row["path"])
    return files


def _coadd_inputs(
    selection: Selection, files: dict[str, Path], corners: CornerDatabase, tract: Tract
) -> list[CoaddInput]:
    """Return the warps with selected CCDs, without the pixels of CCDs that were left out."""
    selected: dict[str, list[CcdOverlap]] = {}
    for overlap in selection.selected:
        selected.setdefault(overlap.ccd.exposure, []).append(overlap)
    inputs = []
    for exposure, overlaps in selected.items():
        # a CCD may graze a patch without reaching the middle of any of its pixels
        if exposure not in files:
            continue
        reader: WarpReader = WarpFile(files[exposure])
        left_out = [r.overlap.ccd for r in selection.rejected if r.overlap.ccd.exposure == exposure]
        if left_out:
            reader = WithoutCcds(reader, left_out, tract)
        ccds = [overlap.ccd for overlap in overlaps]
        # one weight for the whole exposure, so that overlapping patches and tracts agree
        every = [row for row in corners.ccds(exposure) if row.state == "done"]
        inputs.append(
            CoaddInput(
                exposure=exposure,
                reader=reader,
                weight=exposure_weight(_figures(every, "sky_noise"), _figures(every, "zero_point")),
                ccds=",".join(str(ccd.ccd) for ccd in ccds),
                seeing=_median(every, "seeing"),
                zero_point=_median(ccds, "zero_point"),
                mjd=ccds[0].mjd,
                exposure_time=ccds[0].exposure_time,
            )
        )
    return inputs


def make_picture(path: str | Path, tract: Tract, coadds: Sequence[str | Path]) -> None:
    """Make the picture of a tract from its coadds in all bands: the whole job.

    Parameters
    ----------
    path : str or Path
        The picture.
    tract : Tract
        The tract.
    coadds : sequence of str or Path
        ``.../{band}/{tract}/{patch}.fits``.
    """
    by_band: dict[str, dict[str, Path]] = {}
    for coadd in map(Path, coadds):
        by_band.setdefault(coadd.parts[-3], {})[coadd.stem] = coadd
    write_picture(path, tract, {band: by_band[band] for band in reddest_first(by_band)})


def reddest_first(bands: Iterable[str]) -> list[str]:
    """Return bands in the order of the wavelengths that their first letters stand for.

    Bands with other names come last, in the order of their names.
    """
    return sorted(bands, key=lambda band: (_WAVELENGTH_ORDER.find(band[0]) % 100, band))


class WithoutCcds:
    """A warp in which the pixels of some CCDs count as not measured.

    Parameters
    ----------
    reader : WarpReader
        The warp of an exposure.
    ccds : sequence of CcdRow
        CCDs to take out.
    tract : Tract
        The tract.
    """

    def __init__(self, reader: WarpReader, ccds: Sequence[CcdRow], tract: Tract):
        self.box: Box = reader.box
        self._reader = reader
        self._outlines = [
            _grown(tract.footprint_pixels(ccd.footprint_ra, ccd.footprint_dec)) for ccd in ccds
        ]

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, which must be inside of ``self.box``."""
        pixels = self._reader.read_box(box)
        # a reader may hand out its own memory
        pixels = MaskedImage(pixels.image.copy(), pixels.variance.copy(), pixels.mask.copy())
        columns = np.arange(box[0], box[2])
        for row, y in enumerate(range(box[1], box[3])):
            for outline in self._outlines:
                inside = polygon.contains(outline, columns, np.full(columns.size, y))
                pixels.image[row, inside] = np.nan
                pixels.variance[row, inside] = np.inf
                pixels.mask[row, inside] |= np.int32(MaskPlane.NO_DATA)
        return pixels


def _grown(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move the vertices of an outline away from its middle."""
    offset = points - points.mean(axis=0)
    distance = np.hypot(*offset.T)[:, None]
    return points + offset / distance * _FOOTPRINT_GROWTH * np.sqrt(2.0)


def with_rejected(inputs: Table, rejected: Sequence[Rejection]) -> Table:
    """Return a coadd's table of inputs with the CCDs that were left out, and the reasons.

    The table gets a column ``reason``, which is empty for what was used; a CCD that was left out
    has a row of its own, with weight 0.
    """
    inputs = inputs.copy()
    inputs["reason"] = np.full(len(inputs), "", "U1")
    if not rejected:
        return inputs
    ccds = [item.overlap.ccd for item in rejected]
    left_out = Table(
        {
            "exposure": [ccd.exposure for ccd in ccds],
            "ccds": [str(ccd.ccd) for ccd in ccds],
            "mjd": [ccd.mjd for ccd in ccds],
            "exposure_time": [ccd.exposure_time for ccd in ccds],
            "seeing": _figures(ccds, "seeing"),
            "zero_point": _figures(ccds, "zero_point"),
            "weight": np.zeros(len(ccds)),
            "n_used": np.zeros(len(ccds), np.int64),
            "n_clipped": np.zeros(len(ccds), np.int64),
            "reason": ["; ".join(item.reasons) for item in rejected],
        }
    )
    return vstack([inputs, left_out]) if len(inputs) else left_out


def _figures(ccds: Sequence[CcdRow], name: str) -> NDArray[np.float64]:
    return np.array([_or_nan(getattr(ccd, name)) for ccd in ccds])


def _median(ccds: Sequence[CcdRow], name: str) -> float:
    figures = _figures(ccds, name)
    known = figures[np.isfinite(figures)]
    return float(np.median(known)) if known.size else float("nan")


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)
