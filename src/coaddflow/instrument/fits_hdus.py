"""The HDUs of a FITS file, one after the other: headers are read, data are skipped.

Nothing behind the last HDU that is asked for is looked at. Since every byte up to there is asked
for by number, a file that ends too early is known for certain, in plain, gzip, bzip2 and fpack
files alike.

References
----------
.. [1] Pence et al. 2010, A&A 524, A42 (FITS 3.0: blocks, sizes, special records).
"""

import bz2
import contextlib
import gzip
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning

BLOCK = 2880
"""Headers and data are padded to a multiple of this many bytes [1]_."""

_LARGEST = 1 << 40
"""No HDU has so many bytes of data: a header that says so is damaged."""

_COMPRESSED = (gzip.GzipFile, bz2.BZ2File)


class NotFitsError(Exception):
    """A file, or one of its headers, is not FITS."""


@dataclass(frozen=True)
class HduHeader:
    """The header of one HDU."""

    index: int
    """Number of the HDU in the file, from 0."""
    header: fits.Header
    text: bytes
    """The header, and the same as it stands in the file, in ASCII."""
    data_size: int
    """Bytes of the data, without padding."""


@contextlib.contextmanager
def open_fits(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, once, decompressed where its first bytes say so."""
    with path.open("rb") as plain:
        magic = plain.peek(3)[:3]
        if magic[:2] == b"\x1f\x8b":
            with gzip.open(plain) as stream:
                yield stream
        elif magic == b"BZh":
            with bz2.open(plain) as stream:
                yield stream
        else:
            yield plain


def walk_hdus(stream: BinaryIO) -> Iterator[HduHeader]:
    """Yield the HDUs of a file of `open_fits`; the stream then stands at the data of each.

    Raises
    ------
    NotFitsError
        If the file or a header is not FITS.
    EOFError
        If the file ends in a header or in data that are skipped.
    zlib.error, OSError
        If the file cannot be decompressed (without an error number) or read.
    """
    position, index = 0, 0
    while True:
        # a seek in a compressed stream stops at its end, one in a plain file does not
        if stream.seek(position) != position or position > _known_size(stream, position):
            raise EOFError("it ends in its data")
        block = stream.read(BLOCK)
        if index == 0 and not block.startswith(b"SIMPLE  ="):
            if not block:
                raise EOFError("it is empty")
            raise NotFitsError("it does not begin as FITS files do")
        if index > 0 and not block.startswith(b"XTENSION"):
            if block and not block.strip(b"\0"):
                raise EOFError("it ends in zero bytes")  # a broken copy that was filled up
            return  # the end, or special records, which may follow the last HDU [1]_
        text = _header_text(stream, block)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AstropyWarning)  # cards of odd style
                header = fits.Header.fromstring(text)
            size = _data_size(header)
        except (KeyError, TypeError, ValueError, fits.VerifyError) as error:
            raise NotFitsError(f"the header of HDU {index} is not FITS ({error})") from error
        yield HduHeader(index, header, text, size)
        position += len(text) + -(-size // BLOCK) * BLOCK
        index += 1


def read_data(stream: BinaryIO, hdu: HduHeader) -> bytes:
    """Read the data at which the stream stands, without padding; errors as `walk_hdus`."""
    # asked for more than there is, the stream would make room for it first
    if not isinstance(stream, _COMPRESSED) and hdu.data_size > _known_size(stream, 0):
        raise EOFError("it ends in its data")
    body = stream.read(hdu.data_size)
    if len(body) < hdu.data_size:
        raise EOFError("it ends in its data")
    if isinstance(stream, _COMPRESSED):
        stream.read(-hdu.data_size % BLOCK)
        stream.peek(1)  # at the end of the file this verifies its checksum
    return body


def _known_size(stream: BinaryIO, position: int) -> int:
    """Return the length of a plain file, and of others the part that has been read."""
    return position if isinstance(stream, _COMPRESSED) else os.fstat(stream.fileno()).st_size


def _header_text(stream: BinaryIO, block: bytes) -> bytes:
    """Return the header that begins with ``block``; EOFError if the file ends within it."""
    blocks = []
    while True:
        if len(block) < BLOCK:
            raise EOFError("it ends in a header")
        blocks.append(block)
        if any(block[i : i + 8] == b"END     " for i in range(0, BLOCK, 80)):
            # some observatories write characters that FITS does not allow
            return b"".join(blocks).decode("latin-1").encode("ascii", "replace")
        block = stream.read(BLOCK)


def _data_size(header: fits.Header) -> int:
    """Return the number of data bytes, without padding [1]_."""
    axes = [header[f"NAXIS{i + 1}"] for i in range(header["NAXIS"])]
    if not axes:
        return 0
    elements = header.get("GCOUNT", 1) * (header.get("PCOUNT", 0) + math.prod(axes))
    size = abs(header["BITPIX"]) // 8 * elements
    if not isinstance(size, int) or not 0 <= size < _LARGEST:
        raise ValueError(f"it has {size} bytes of data")
    return size
