"""Warps on disk: one file per patch, and their table, written last."""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from coaddflow.files import check_id, remove
from coaddflow.geometry.box import Box, part_of
from coaddflow.geometry.wcs_header import wcs_to_header
from coaddflow.image.fits_pixels import read_block
from coaddflow.image.masked_image import (
    AB_ZERO_POINT,
    Compression,
    MaskedImage,
    masked_image_hdus,
    reading,
    write_fits,
)
from coaddflow.settings.warp import WarpSettings
from coaddflow.skymap.tract import Tract, patch_position
from coaddflow.tables.warps import WarpRow, WarpTable, write_warp_table
from coaddflow.warp.ccd_psf import TABLE, CcdPsf, psfs_from_hdu, psfs_hdu

_KINDS = {"IMAGE": "f4", "VARIANCE": "f4", "MASK": "i4"}
"""Types of the pixels of the extensions."""


@dataclass(frozen=True)
class Warp:
    """The pixels of an exposure on a part of a tract."""

    box: Box
    """Its pixels on the tract."""
    masked_image: MaskedImage
    """Pixels in nJy; NaN, infinite variance and NO_DATA where the exposure has no data."""
    ccds: tuple[int, ...] = ()
    """The CCDs that contributed, ascending."""
    n_covered: int = 0
    """Number of pixels with data."""
    ccd_psfs: tuple[CcdPsf, ...] = ()
    """PSFs of the CCDs that cover it, by CCD number, of those that have one. Where a CCD lies under
    others or is flagged, it may have no pixel."""

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract inside ``self.box``, without a copy."""
        return self.masked_image.part(part_of(self.box, box))

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """See `WarpReader`."""
        target.put(self.read_box(box), corner)

    def read_psfs(self) -> tuple[CcdPsf, ...]:
        """See `WarpReader`."""
        return self.ccd_psfs


class WarpReader(Protocol):
    """Pixels of a warp for a coadd: `Warp` in memory, `WarpFile` on disk."""

    box: Box

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """Put the pixels of a box of the tract, inside ``self.box``, into an image.

        ``corner``: row and column of the first one.
        """

    def read_psfs(self) -> Sequence[CcdPsf]:
        """Return the PSFs of the CCDs that cover it, by CCD number, of those that have one."""


def write_warps(
    table_path: str | Path,
    exposure: str,
    tract: Tract,
    warps: Iterable[tuple[str, Warp | None]],
    settings: WarpSettings,
    cards: fits.Header | None = None,
    compression: Compression = "none",
) -> None:
    """Write the warps of an exposure on the patches of a tract, and their table.

    The patches go into the folder beside the table that has the exposure's name. Warps of an
    earlier run are removed first, and the table is written last: if it exists, all files that it
    names are complete. It is empty if the exposure touches no patch.

    Parameters
    ----------
    table_path : str or Path
        ``.../{tract}/{exposure}.ecsv``.
    exposure, tract : str, Tract
        Which warps.
    warps : iterable of (str, Warp or None)
        Patch id and warp, as `warp_patches` yields them.
    settings : WarpSettings
        What they were made with.
    cards : astropy.io.fits.Header, optional
        Further cards for the primary header of each file (provenance).
    compression : {"none", "lossless", "quantized"}
        See `write_warp`.
    """
    table_path = Path(table_path)
    folder = table_path.parent / check_id(exposure, "exposure")
    remove_warps(folder)
    rows = []
    for patch, warp in warps:
        if warp is None:
            continue
        path = folder / f"{patch}.fits"
        header = fits.Header() if cards is None else cards.copy()
        header["EXPOSURE"] = exposure
        header["TRACT"] = tract.id
        header["PATCH"] = patch
        header["KERNEL"] = (settings.kernel, "of the resampling")
        checksum = write_warp(path, warp, tract, header, compression)
        ccds = ",".join(map(str, warp.ccds))
        name = path.relative_to(table_path.parent).as_posix()
        rows.append(WarpRow(patch, name, *warp.box, ccds, warp.n_covered, checksum))
    rows.sort(key=lambda row: patch_position(row.patch))
    write_warp_table(table_path, WarpTable(exposure, tract.id, tuple(rows)))


def write_warp(
    path: str | Path,
    warp: Warp,
    tract: Tract,
    cards: fits.Header,
    compression: Compression = "none",
) -> str:
    """Write a warp: primary header with ``cards``; IMAGE, MASK, VARIANCE and CCD_PSFS.

    It is never quantised but ``lossless``, because coadds are made from it and would be rounded
    twice; see `coaddflow.image.masked_image.image_hdu`. Returned is the SHA-256 checksum.
    """
    kept = "lossless" if compression == "quantized" else compression
    hdus = masked_image_hdus(warp.masked_image, part_header(tract, warp.box), "nJy", kept)
    return write_fits(path, [fits.PrimaryHDU(header=cards), *hdus, psfs_hdu(warp.ccd_psfs)])


def part_header(tract: Tract, box: Box) -> fits.Header:
    """Return the WCS of a part of a tract, with its first pixel in LTV1/2.

    LTVn are IRAF keywords: ds9 shows tract pixels (1-based) as physical coordinates.
    """
    header = wcs_to_header(tract.wcs())
    header["CRPIX1"] -= box[0]
    header["CRPIX2"] -= box[1]
    header["LTV1"] = (float(-box[0]), "pixel here minus pixel of the tract")
    header["LTV2"] = (float(-box[1]), "pixel here minus pixel of the tract")
    header["PHOTZP"] = (AB_ZERO_POINT, "AB magnitude of one unit")
    return header


def part_box(header: fits.Header, shape: tuple[int, int]) -> Box:
    """Return the pixels of the tract in an image of this shape (ny, nx) with a `part_header`."""
    x0, y0 = round(-header["LTV1"]), round(-header["LTV2"])
    return x0, y0, x0 + shape[1], y0 + shape[0]


def part_tract(header: fits.Header, box: Box) -> Tract:
    """Return the tract of which an image with a `part_header` is a part.

    It has the pixels of the tract; of its patches the file knows none, and it is one.
    """
    pixels = (header["CRPIX1"] - 1.0 + box[0], header["CRPIX2"] - 1.0 + box[1])
    size = (max(box[2], 1), max(box[3], 1))
    scale = 3600.0 * header["CD2_2"]
    return Tract(0, header["CRVAL1"], header["CRVAL2"], pixels, (1, 1), size, 0, scale)


def remove_warps(folder: str | Path) -> None:
    """Remove the warps of an exposure on a tract, ``.../{tract}/{exposure}``, their table first."""
    folder = Path(folder)
    remove(folder.with_suffix(".ecsv"))
    remove(kept_table(folder))
    for stale in folder.glob("*.fits"):
        remove(stale)
    with contextlib.suppress(OSError):  # not there, or something else is in it
        folder.rmdir()


def kept_table(folder: str | Path) -> Path:
    """Return the table of the warps in a folder, if the job of a tract keeps them.

    It has a name of its own: with the name of the rule ``warp``, Snakemake would take the warps for
    those of the rule, whatever their settings.
    """
    return Path(folder).with_suffix(".kept.ecsv")


class WarpFile:
    """A warp on disk, written by `write_warp`, read in parts; ``box`` is its pixels on the tract.

    Raises
    ------
    InputError
        If it is missing, damaged or not a warp; also when pixels are read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with self._reading(is_checked=False), fits.open(self.path, memmap=False) as hdus:
            header = hdus["IMAGE"].header
            self.box: Box = part_box(header, (header["NAXIS2"], header["NAXIS1"]))
            self._offsets = {
                name: hdus[name].fileinfo()["datLoc"]
                for name in _KINDS
                if not isinstance(hdus[name], fits.CompImageHDU)
            }
            self._ccd_psfs = psfs_from_hdu(hdus[TABLE])

    def _reading(self, is_checked: bool = True) -> contextlib.AbstractContextManager[None]:
        remedy = "remove it and the table beside its folder, and run the workflow again"
        return reading(self.path, "warp", remedy, is_checked)

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, which must be inside ``self.box``."""
        part = part_of(self.box, box)
        with self._reading():
            if len(self._offsets) == len(_KINDS):
                with self.path.open("rb") as stream:
                    return MaskedImage(*(self._read_plane(stream, n, part) for n in _KINDS))
            with fits.open(self.path, memmap=False) as hdus:
                return MaskedImage(*(hdus[name].section[part] for name in _KINDS))

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """See `WarpReader`."""
        target.put(self.read_box(box), corner)

    def read_psfs(self) -> list[CcdPsf]:
        """See `WarpReader`."""
        return self._ccd_psfs

    def _read_plane(self, stream: BinaryIO, name: str, part: tuple[slice, slice]) -> NDArray:
        """Read a part of an uncompressed extension from its place in the file."""
        rows, columns = part
        kind, width = _KINDS[name], self.box[2] - self.box[0]
        if columns.stop - columns.start < width:
            shape = (self.box[3] - self.box[1], width)
            plane = np.memmap(stream, f">{kind}", "r", self._offsets[name], shape)
            return plane[part].astype(kind)
        offset = self._offsets[name] + rows.start * width * 4
        return read_block(stream, offset, (rows.stop - rows.start, width), kind)
