"""The job that warps an exposure to a tract."""

import logging
from collections.abc import Iterable
from pathlib import Path

from coaddflow.errors import InputError
from coaddflow.files import remove
from coaddflow.geometry.wcs_header import read_wcs
from coaddflow.image.masked_image import flux_scale, opened_fits, read_planes, verify_sums
from coaddflow.image.provenance import provenance_header
from coaddflow.measure.psf_model import stored_psf
from coaddflow.settings import Settings
from coaddflow.skymap.tract import Tract
from coaddflow.tables.manifest import CcdRow, calexp_remedy, read_manifest
from coaddflow.tables.paths import COADD, RESULTS
from coaddflow.warp.ccds import CcdImage, warp_patches
from coaddflow.warp.files import write_warps

_LOG = logging.getLogger(__name__)

SECTIONS = ("warp", "products")
"""Settings that warps depend on: those of the stage `warp`."""


def make_warps(
    table: str | Path, manifest: str | Path, tract: Tract, settings: Settings, threads: int = 1
) -> None:
    """Warp the CCDs of an exposure to a tract: the whole job.

    All CCDs that are done are warped; the selection decides later which ones are good enough for
    the coadds, so that changing it does not redo any warp.

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
    threads : int
        Number of threads that share the rows of a warp; its pixels do not depend on it.
    """
    rows = {row.ccd: row for row in read_manifest(manifest)}
    verify = settings.products.verify_on_read
    patch_ccds = ccds_of_patches(rows.values(), tract)
    exposure, band = (getattr(next(iter(rows.values())), name) for name in ("exposure", "band"))
    _remove_coadds(table, tract, band, patch_ccds)
    _LOG.info("tract %d: exposure %s covers %d patches", tract.id, exposure, len(patch_ccds))
    write_warps(
        table,
        exposure,
        tract,
        warp_patches(
            tract, patch_ccds, lambda ccd: read_ccd(rows[ccd], verify), settings.warp, threads
        ),
        settings.warp,
        provenance_header(settings.only(*SECTIONS).provenance(), [manifest]),
        settings.products.compression,
    )


def ccds_of_patches(rows: Iterable[CcdRow], tract: Tract) -> dict[str, list[int]]:
    """Return the CCDs with a calexp that overlap each patch, for patches that have some."""
    patch_ccds: dict[str, list[int]] = {}
    for row in rows:
        if row.state == "done":
            for patch, *_ in tract.patch_overlaps(row.footprint_ra, row.footprint_dec):
                patch_ccds.setdefault(patch, []).append(row.ccd)
    return patch_ccds


def _remove_coadds(table: str | Path, tract: Tract, band: str, patches: Iterable[str]) -> None:
    """Remove the coadds that depend on warps which are redone.

    They may be those of the job of the whole tract, with other settings. If the warps get the
    checksums that Snakemake recorded earlier, it would accept these coadds as their products.
    """
    results = Path(table).parent.parent.parent
    for patch in patches:
        coadd = Path(COADD.format(band=band, tract=tract.id, patch=patch))
        remove(results / coadd.relative_to(RESULTS))


def read_ccd(row: CcdRow, verify: bool = False) -> CcdImage:
    """Read the pixels of a calexp; raise InputError if that is not possible.

    If asked, DATASUM and CHECKSUM are verified first.
    """
    _LOG.info("read %s", row.path)
    remedy = calexp_remedy(row.exposure, row.ccd)
    if not Path(row.path).exists():
        raise InputError("the calexp no longer exists", path=row.path, remedy=remedy)
    if row.zero_point is None:
        raise InputError("the calexp has no zero-point", path=row.path, remedy=remedy)
    if verify:
        verify_sums(row.path, remedy)
    with opened_fits(row.path, "calexp", remedy) as (stream, hdus):
        masked_image, header = read_planes(stream, hdus)
        psf = stored_psf(hdus)
    return CcdImage(masked_image, read_wcs(header, row.path), flux_scale(row.zero_point), psf)
