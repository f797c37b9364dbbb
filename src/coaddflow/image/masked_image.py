"""Pixels with their variance and mask, and their form in FITS files.

Mask planes are bits with names; every MASK extension says in its header which bit has which
name (keywords ``MP_<name>``), so that no reader needs this module to understand a file.
"""

import collections
import contextlib
import enum
import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning
from numpy.typing import NDArray

from coaddflow.errors import CoaddflowError, InputError
from coaddflow.files import atomic_streams
from coaddflow.image.checksum import wrong_sums
from coaddflow.image.fits_hdus import open_fits, walk_hdus
from coaddflow.image.fits_pixels import read_pixels, write_hdus
from coaddflow.image.row_blocks import over_rows

AB_ZERO_POINT = 31.4
"""AB magnitude of 1 nJy."""

_ROWS_IN_CACHE = 32
"""Rows of a mask that are looked at at once."""

Compression = Literal["none", "lossless", "quantized"]


class MaskPlane(enum.IntFlag):
    """What can be wrong (or known) about a pixel; values are bits of the int32 mask."""

    BAD = 1 << 0
    "Defect of the detector: dead, hot, or in a bad column."
    SAT = 1 << 1
    "Saturated, or reached by the bleeding of a saturated pixel."
    CR = 1 << 2
    "Hit by a cosmic ray."
    EDGE = 1 << 3
    "Too near the edge of the CCD for a full resampling kernel or background mesh."
    DETECTED = 1 << 4
    "Part of a detected source."
    NO_DATA = 1 << 5
    "Nothing was measured here."
    SUSPECT = 1 << 6
    "Close to saturation, or in a range where the linearity is not known."
    INTRP = 1 << 7
    "Value interpolated from the neighbours."
    CROSSTALK = 1 << 8
    "A correction for crosstalk larger than the noise, or not known well, was made here."
    CLIPPED = 1 << 9
    "On a coadd: at least one input was rejected as an outlier here."
    STREAK = 1 << 10
    "Part of the trail of a satellite or an aeroplane."
    INEXACT_PSF = 1 << 11
    "On a coadd: within the FWHM of the PSF the pixels are made of other exposures, or filled."


@dataclass
class MaskedImage:
    """An image with its variance and mask, each of shape (ny, nx)."""

    image: NDArray[np.float32]
    """Pixel values; NaN where nothing was measured."""
    variance: NDArray[np.float32]
    """Variance of the pixel values, in the square of their unit."""
    mask: NDArray[np.int32]
    """What is known of each pixel: bits of `MaskPlane`."""

    def __post_init__(self):
        self.image = np.asarray(self.image, dtype=np.float32)
        self.variance = np.asarray(self.variance, dtype=np.float32)
        self.mask = np.asarray(self.mask, dtype=np.int32)
        if not self.image.shape == self.variance.shape == self.mask.shape:
            raise ValueError(
                f"planes of different shape: image {self.image.shape}, "
                f"variance {self.variance.shape}, mask {self.mask.shape}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (ny, nx)."""
        return self.image.shape

    @property
    def lost_fraction(self) -> float:
        """Fraction of the pixels that measured nothing (BAD, SAT or NO_DATA), filled or not."""
        return float(np.mean(self.has_any(MaskPlane.BAD | MaskPlane.SAT | MaskPlane.NO_DATA)))

    @classmethod
    def empty(cls, shape: tuple[int, int]) -> "MaskedImage":
        """Return an image in which nothing was measured: NaN, infinite variance, NO_DATA."""
        return cls(
            np.full(shape, np.nan, np.float32),
            np.full(shape, np.inf, np.float32),
            np.full(shape, MaskPlane.NO_DATA, np.int32),
        )

    def forget(self, rows: slice) -> None:
        """Make some rows those of an image in which nothing was measured (`empty`)."""
        self.image[rows], self.variance[rows], self.mask[rows] = np.nan, np.inf, MaskPlane.NO_DATA

    def part(self, place: tuple[slice, slice]) -> "MaskedImage":
        """Return rows and columns of the image, without a copy."""
        return MaskedImage(self.image[place], self.variance[place], self.mask[place])

    def put(self, pixels: "MaskedImage", corner: tuple[int, int]) -> None:
        """Put the pixels of another image into this one, the first at (row, column) ``corner``."""
        (y, x), (ny, nx) = corner, pixels.shape
        place = (slice(y, y + ny), slice(x, x + nx))
        self.image[place], self.variance[place] = pixels.image, pixels.variance
        self.mask[place] = pixels.mask

    def has_any(self, planes: MaskPlane) -> NDArray[np.bool_]:
        """Return where at least one of ``planes`` is set, shape (ny, nx)."""
        found, bits = np.empty(self.mask.shape, bool), np.int32(planes)
        for first in range(0, len(found), _ROWS_IN_CACHE):
            rows = slice(first, first + _ROWS_IN_CACHE)
            np.not_equal(self.mask[rows] & bits, 0, out=found[rows])
        return found


def flux_scale(zero_point: float) -> float:
    """Return nJy per unit for pixels whose unit has this AB magnitude."""
    return float(10.0 ** (0.4 * (AB_ZERO_POINT - zero_point)))


def planes_from_names(names: list[str] | tuple[str, ...]) -> MaskPlane:
    """Return the union of mask planes given by name, such as ``["BAD", "CR"]``.

    Raises
    ------
    InputError
        If a name is not that of a mask plane.
    """
    union = MaskPlane(0)
    for name in names:
        if name not in MaskPlane.__members__:
            raise InputError(
                f"{name!r} is not a mask plane", remedy=f"use some of {list(MaskPlane.__members__)}"
            )
        union |= MaskPlane[name]
    return union


def image_hdu(
    name: str, pixels: NDArray, header: fits.Header | None = None, compression: Compression = "none"
) -> fits.ImageHDU | fits.CompImageHDU:
    """Return an image extension, compressed as the settings say.

    Parameters
    ----------
    name : str
        EXTNAME.
    pixels : ndarray, shape (ny, nx)
        Pixel values.
    header : astropy.io.fits.Header, optional
        Further cards (WCS, units, provenance).
    compression : {"none", "lossless", "quantized"}
        ``lossless`` is GZIP_2 for floats and RICE for integers; ``quantized`` is RICE with a
        step of 1/16 of the noise and subtractive dithering (Pence et al. 2010, PASP 122, 1065)
        for floats. NaN and infinity survive ``none`` and ``lossless``.
    """
    if compression == "none":
        return fits.ImageHDU(pixels, header=header, name=name)
    if pixels.dtype.kind != "f":
        method = {"compression_type": "RICE_1"}
    elif compression == "lossless":
        method = {"compression_type": "GZIP_2", "quantize_level": 0}
    else:
        method = {"compression_type": "RICE_1", "quantize_level": 16}
        method |= {"quantize_method": 2, "dither_seed": 1}
    return fits.CompImageHDU(pixels, header=header, name=name, **method)


def masked_image_hdus(
    masked_image: MaskedImage,
    header: fits.Header | None = None,
    unit: str = "electron",
    compression: Compression = "none",
) -> list[fits.ImageHDU | fits.CompImageHDU]:
    """Return the IMAGE, MASK and VARIANCE extensions of a product.

    Parameters
    ----------
    masked_image : MaskedImage
        What is written.
    header : astropy.io.fits.Header, optional
        Cards for all three extensions (the WCS, above all).
    unit : str
        BUNIT of the image; that of the variance is its square.
    compression : {"none", "lossless", "quantized"}
        See `image_hdu`. Masks are always kept exactly.
    """
    header = header if header is not None else fits.Header()
    image_header, mask_cards, variance_header = header.copy(), header.copy(), header.copy()
    image_header["BUNIT"] = unit
    mask_cards.extend(_mask_header())
    variance_header["BUNIT"] = f"{unit}**2" if unit else ""
    return [
        image_hdu("IMAGE", masked_image.image, image_header, compression),
        image_hdu("MASK", masked_image.mask, mask_cards, compression),
        image_hdu("VARIANCE", masked_image.variance, variance_header, compression),
    ]


def _mask_header() -> fits.Header:
    """Return the cards that say which bit of a MASK extension has which name."""
    header = fits.Header()
    for plane in MaskPlane:
        header[f"HIERARCH MP_{plane.name}" if len(plane.name) > 5 else f"MP_{plane.name}"] = (
            int(plane).bit_length() - 1,
            "bit number of this mask plane",
        )
    return header


def write_fits(path: str | Path, hdus: list, threads: int = 1) -> str:
    """Write extensions after a primary HDU, with CHECKSUM and DATASUM, whole or not at all.

    If the first is no `PrimaryHDU` (provenance), an empty one is put before it. The same pixels and
    cards give the same bytes. Returned is the SHA-256 checksum of the file (`sha256_of`).
    """
    return write_fits_files({path: hdus}, threads)[0]


def write_fits_files(files: Mapping[str | Path, list], threads: int = 1) -> list[str]:
    """Write files as `write_fits` does, extensions by path; return their checksums.

    They take their names in the order in which they are given, when all have been written.
    ``threads`` share the extensions that are compressed.
    """
    with atomic_streams(*files) as streams:
        return [
            write_hdus(stream, _content(hdus, threads))
            for stream, hdus in zip(streams, files.values(), strict=True)
        ]


def _content(hdus: list, threads: int) -> fits.HDUList:
    """Return the HDUs of a file in the form that they have there, after a primary HDU."""
    if not isinstance(hdus[0], fits.PrimaryHDU):
        hdus = [fits.PrimaryHDU(), *hdus]
    parts = over_rows(
        lambda first, last: [_as_stored(hdu) for hdu in hdus[first:last]], len(hdus), threads, 1
    )
    content = fits.HDUList([hdu for part in parts for hdu in part])
    content.update_extend()
    return content


def _as_stored(hdu: fits.hdu.base.ExtensionHDU) -> fits.hdu.base.ExtensionHDU:
    """Return an HDU in the form that it has in the file: a table, if it is compressed."""
    if not isinstance(hdu, fits.CompImageHDU):
        return hdu
    stream = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(stream)
    stream.seek(0)
    table = fits.open(stream, disable_image_compression=True)[1]
    _clear_gzip_times(stream.getbuffer(), table)
    return table


def _clear_gzip_times(content: memoryview, table: fits.BinTableHDU) -> None:
    """Set the time in the gzip header (RFC 1952: bytes 4 to 7) of each compressed tile to 0.

    Quantised images have such tiles too, where the pixels of a tile could not be quantised.
    """
    start, header = table.fileinfo()["datLoc"], table.header
    heap = start + header.get("THEAP", header["NAXIS1"] * header["NAXIS2"])
    kind = table.columns.dtype.newbyteorder(">")
    rows = np.frombuffer(content, kind, header["NAXIS2"], start)
    columns = ["GZIP_COMPRESSED_DATA"]
    if header["ZCMPTYPE"].startswith("GZIP"):
        columns.append("COMPRESSED_DATA")
    for name in set(columns) & set(rows.dtype.names):
        for length, offset in rows[name]:
            if length:
                content[heap + offset + 4 : heap + offset + 8] = bytes(4)


@contextlib.contextmanager
def reading(
    path: str | Path,
    what: str,
    remedy: str = "remove it and run the workflow again",
    is_checked: bool = False,
) -> Iterator[None]:
    """Raise InputError if a FITS file turns out in the block not to be a readable ``what``.

    The sizes that its headers state are compared with the file before the block reads anything,
    unless that was done before (``is_checked``). Stands around reading and nothing else: whatever
    a library raises on a damaged file is caught.
    """
    try:
        if not is_checked:
            with open_fits(Path(path)) as stream:
                _check_sizes(stream)
        yield
    except InputError as error:
        if error.path is None:  # what an extension lacks, of whatever file
            raise InputError(error.cause, path, error.remedy or remedy) from error
        raise
    except (CoaddflowError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"is not a readable {what} ({error})", path, remedy) from error


def _check_sizes(stream: BinaryIO) -> None:
    """Compare the sizes that the headers of a file state with the file."""
    collections.deque(walk_hdus(stream), maxlen=0)


def read_masked_image(
    path: str | Path, remedy: str = "remove it and run the workflow again", verify: bool = False
) -> tuple[MaskedImage, fits.Header]:
    """Read the `masked_image_hdus` of a product, and the header of its IMAGE extension.

    ``remedy`` is what an error says about a damaged file: what makes it again depends on which
    product it is. If asked (``verify``), DATASUM and CHECKSUM of all extensions are verified first.

    Raises
    ------
    InputError
        If the file is missing, damaged, or has not these extensions.
    """
    if verify:
        verify_sums(path, remedy)
    with opened_fits(path, "product of coaddflow", remedy) as (stream, hdus):
        return read_planes(stream, hdus)


def verify_sums(path: str | Path, remedy: str) -> None:
    """Raise InputError if a DATASUM or CHECKSUM of a product is wrong; see `read_masked_image`."""
    wrong = wrong_sums(path, remedy)
    if wrong:
        raise InputError(
            f"is damaged: {wrong[0]}",
            path,
            "`coaddflow verify` names all damaged products, and what to remove",
        )


@contextlib.contextmanager
def opened_fits(
    path: str | Path, what: str, remedy: str = "remove it and run the workflow again"
) -> Iterator[tuple[BinaryIO, fits.HDUList]]:
    """Open a FITS file, once; errors are those of `reading`.

    Given a name, astropy opens a file twice, and `reading` once more: on a slow shared disk that
    takes longer than to read a header.

    Yields
    ------
    stream, hdus : file, HDUList
        The file, decompressed where its first bytes say so, for `read_planes`; and its HDUs.
    """
    with (
        reading(path, what, remedy, is_checked=True),
        warnings.catch_warnings(),
        open_fits(Path(path)) as stream,
    ):
        warnings.simplefilter("error", AstropyUserWarning)  # a truncated file only warns
        _check_sizes(stream)
        stream.seek(0)
        with fits.open(stream, memmap=False) as hdus:
            yield stream, hdus


def read_planes(
    stream: BinaryIO, hdus: fits.HDUList, threads: int = 1
) -> tuple[MaskedImage, fits.Header]:
    """Read the `masked_image_hdus` of an `opened_fits`, and the header of its IMAGE extension."""
    planes = (read_pixels(stream, hdus[name], threads) for name in ("IMAGE", "VARIANCE", "MASK"))
    return MaskedImage(*planes), hdus["IMAGE"].header
