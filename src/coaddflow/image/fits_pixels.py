"""Pixels between memory and FITS files, in blocks that stay in the cache.

Numbers stand in FITS files with the highest byte first. Here bytes are swapped, summed and hashed
block by block between memory and file, so that no plane passes through memory more than once for
it, and no copy of it is made.

References
----------
.. [1] FITS Standard 4.0 (2018), section 4.4.2.7 and appendix J (checksums).
"""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np
from astropy.io import fits
from numpy.typing import DTypeLike, NDArray

from coaddflow.image.fits_hdus import BLOCK, data_sum, is_plain
from coaddflow.image.row_blocks import over_rows

_BLOCK_BYTES = 1 << 18
"""Of pixels that are worked on at a time."""

_PLAIN = {-64: "f8", -32: "f4", 16: "i2", 32: "i4", 64: "i8"}
"""Types of pixels by BITPIX."""

_PUNCTUATION = {*range(ord(":"), ord("A")), *range(ord("["), ord("a"))}
"""Characters that a CHECKSUM does not have [1]_."""


def write_hdus(stream: BinaryIO, hdus: Iterable[fits.hdu.base._BaseHDU]) -> str:
    """Write HDUs one after the other, each with DATASUM and CHECKSUM.

    Parameters
    ----------
    stream : file
        Open for writing.
    hdus : iterable of HDU
        The first is a `PrimaryHDU`. They get both keywords. Compressed images must be given as
        tables.

    Returns
    -------
    str
        SHA-256 checksum of what was written, as a hexadecimal string.
    """
    digest = hashlib.sha256()
    for hdu in hdus:
        for part in _image_parts(hdu) if _is_plain_image(hdu) else _other_parts(hdu):
            stream.write(part)
            digest.update(part)
    return digest.hexdigest()


def _is_plain_image(hdu: fits.hdu.base._BaseHDU) -> bool:
    """Return whether the pixels stand in the file as they are in memory, but for their bytes."""
    if not isinstance(hdu, fits.PrimaryHDU | fits.ImageHDU):
        return False
    if hdu.data is None:
        return True
    stored = _PLAIN.get(hdu.header["BITPIX"])
    return hdu.data.dtype.newbyteorder("=") == stored and not _is_scaled(hdu.header)


def _is_scaled(header: fits.Header) -> bool:
    return any(keyword in header for keyword in ("BSCALE", "BZERO", "BLANK"))


def _image_parts(hdu: fits.PrimaryHDU | fits.ImageHDU) -> Iterator[bytes | NDArray]:
    """Yield header and data of an image, padded to whole blocks."""
    total = 0
    for block in _big_endian(hdu.data):
        total = data_sum(block.reshape(-1).view(np.uint8), total)
    # without the time, which astropy puts into these comments: the same pixels give the same bytes
    hdu.header.set("DATASUM", str(total), "sum of the data")
    hdu.header.set("CHECKSUM", "0" * 16, "sum of header and data", before="DATASUM")
    whole = data_sum(hdu.header.tostring().encode("ascii"), total)
    hdu.header.set("CHECKSUM", encode_checksum(whole))
    yield hdu.header.tostring().encode("ascii")
    size = 0
    for block in _big_endian(hdu.data):
        yield block
        size += block.nbytes
    yield bytes(-size % BLOCK)


def _big_endian(pixels: NDArray | None) -> Iterator[NDArray]:
    """Yield the pixels block by block as they stand in the file, a multiple of four bytes each."""
    if pixels is None or pixels.size == 0:
        return
    pixels = np.atleast_1d(pixels)
    rows = max(_BLOCK_BYTES // (pixels[0].nbytes * 4), 1) * 4
    for first in range(0, len(pixels), rows):
        block = np.ascontiguousarray(pixels[first : first + rows])
        yield block.astype(block.dtype.newbyteorder(">"), copy=False)


def _other_parts(hdu: fits.hdu.base._BaseHDU) -> Iterator[memoryview]:
    """Yield a table, or what else only astropy knows to write."""
    hdu.add_datasum(when="sum of the data")
    hdu.add_checksum(when="sum of header and data", override_datasum=True)
    stream = io.BytesIO()
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(stream)
    yield stream.getbuffer()[BLOCK:]


def encode_checksum(total: int) -> str:
    """Return the CHECKSUM that makes the sum of an HDU zero [1]_.

    Parameters
    ----------
    total : int
        Sum of header and data (`data_sum`), with a CHECKSUM of sixteen zeros.
    """
    found = [0] * 16
    for place, byte in enumerate((0xFFFFFFFF - total).to_bytes(4, "big")):
        quarter, rest = divmod(byte, 4)
        parts = [quarter + rest + ord("0")] + 3 * [quarter + ord("0")]
        while not _PUNCTUATION.isdisjoint(parts):
            for k in (0, 2):
                if not _PUNCTUATION.isdisjoint(parts[k : k + 2]):
                    parts[k] += 1
                    parts[k + 1] -= 1
        found[place::4] = parts
    return bytes(found[-1:] + found[:-1]).decode("ascii")


def read_pixels(
    stream: BinaryIO, hdu: fits.ImageHDU | fits.CompImageHDU, threads: int = 1
) -> NDArray:
    """Return the pixels of an image in the byte order of the machine.

    Parameters
    ----------
    stream : file
        The file that ``hdu`` was opened from, decompressed where it has to be.
    hdu : ImageHDU or CompImageHDU
        As `astropy.io.fits.open` gives it.
    threads : int
        Number of threads that read an image of a plain file.

    Raises
    ------
    EOFError
        If the file ends in the pixels.
    """
    header = hdu.header
    kind = _PLAIN.get(header["BITPIX"])
    if isinstance(hdu, fits.CompImageHDU) or kind is None or _is_scaled(header):
        return hdu.data
    shape = tuple(header[f"NAXIS{axis}"] for axis in range(header["NAXIS"], 0, -1))
    return read_block(stream, hdu.fileinfo()["datLoc"], shape, kind, threads)


def read_block(
    stream: BinaryIO, offset: int, shape: tuple[int, ...], kind: DTypeLike, threads: int = 1
) -> NDArray:
    """Return numbers that stand in a file, the highest byte first, in the machine's byte order.

    Parameters
    ----------
    stream : file
        A plain file, or a stream that decompresses one.
    offset : int
        Where the first number begins, bytes.
    shape : tuple of int
        How many there are.
    kind : dtype
        Their type in memory.
    threads : int
        Number of threads that share them.

    Raises
    ------
    EOFError
        If the file ends too early.
    """
    pixels = np.empty(shape, kind)
    flat = pixels.reshape(-1)
    is_swapped = flat.dtype.newbyteorder(">") != flat.dtype
    step = _BLOCK_BYTES // flat.itemsize

    def read(first: int, last: int) -> None:
        for start in range(first, last, step):
            block = flat[start : min(start + step, last)]
            _read_at(stream, offset + start * flat.itemsize, block.view(np.uint8))
            if is_swapped:
                block.byteswap(inplace=True)

    over_rows(read, flat.size, threads if is_plain(stream) else 1, least=step)
    return pixels


def _read_at(stream: BinaryIO, offset: int, room: NDArray[np.uint8]) -> None:
    """Fill room with the bytes of a file from an offset on; threads may share a plain one."""
    done = 0
    while done < len(room):
        if is_plain(stream):
            number = os.preadv(stream.fileno(), [room[done:]], offset + done)
        else:  # its descriptor has the compressed bytes
            stream.seek(offset + done)
            number = stream.readinto(room[done:])
        if number == 0:
            raise EOFError("it ends in its data")
        done += number
