"""The HDUs of a FITS file, one after the other: headers are read, data are skipped.

Nothing behind the last HDU that is asked for is looked at. Since every byte up to there is asked
for by number, a file that ends too early is known for certain, in plain, gzip, bzip2 and fpack
files alike. What a header says of sizes is compared with the file before anything is read.

References
----------
.. [1] Pence et al. 2010, A&A 524, A42 (FITS 3.0: blocks, sizes, special records).
.. [2] White et al. 2012, "Tiled Image Convention for Storing Compressed Images in FITS".
.. [3] FITS Standard 4.0 (2018), section 4.4.2.7 and appendix J (checksums).
"""

import bz2
import contextlib
import functools
import gzip
import io
import math
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from astropy.io import fits
from astropy.utils.exceptions import AstropyWarning
from numpy.typing import NDArray

from coaddflow.errors import Reason

BLOCK = 2880
"""Headers and data are padded to a multiple of this many bytes [1]_."""

_CARD = 80

_LARGEST = 1 << 50
"""No HDU has so many bytes of data."""

_LONG_HEADER = 1 << 18
"""Of longer headers the comments are left out: nothing here reads them, and they take time."""
_LONGEST_HEADER = 8 << 20
"""No header has so many bytes without its comments (100,000 cards)."""

_BEST_COMPRESSION = 2000
"""No tile is compressed by more: gzip reaches 1030."""
_SMALLEST_COMPRESSED = 1 << 20
"""Images of no more bytes than this are not compared with the size of their tiles."""

_COMMENTS = (b"COMMENT ", b"HISTORY ", b"        ")
_STRUCTURAL = re.compile(
    rb"(XTENSION|EXTNAME|BITPIX|NAXIS\d{0,3}|PCOUNT|GCOUNT|ZIMAGE|ZBITPIX|ZNAXIS\d{0,3}|ZTILE\d{1,3}"
    rb"|DATASUM|CHECKSUM|ZSIMPLE|GROUPS) *"
)
_VALUE = re.compile(rb"\s*(?:'((?:[^']|'')*)'|([^/]*?))\s*(?:/.*)?", re.DOTALL)


class NotFitsError(Exception):
    """A file, or one of its headers, is not FITS."""


def problem_of(error: Exception) -> tuple[Reason, str] | None:
    """Return why a file cannot be read, from any exception of a library that has tried to.

    The net of the readers: on damaged files libraries raise anything. It stands around reading and
    decoding and nothing else.

    Returns
    -------
    tuple of Reason and str, or None
        The reason and what is wrong, in a few words; None for trouble of the machine (no memory, a
        disk that does not answer), which is no fault of the file.
    """
    if isinstance(error, NotFitsError):
        return Reason.NOT_FITS, str(error)
    if isinstance(error, EOFError):
        return Reason.TRUNCATED_FILE, str(error)
    if isinstance(
        error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError
    ):
        return Reason.MISSING_FILE, error.strerror or str(error)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
        return None
    return Reason.DAMAGED_FILE, " ".join(f"{error or type(error).__name__}".split())


@dataclass(frozen=True)
class HduHeader:
    """The header of one HDU, whose sizes are those of the file."""

    index: int
    """Number of the HDU in the file, from 0."""
    text: bytes
    """The header in ASCII; if it is very long, without its comments."""
    keywords: dict[str, str | int | float | bool | None]
    """Values of the cards that say how the data are stored, and of EXTNAME and the checksums."""
    data_size: int
    """Bytes of the data, without padding."""
    sum: int
    """Checksum of the header as it stands in the file (`data_sum`)."""

    @functools.cached_property
    def header(self) -> fits.Header:
        """The header; NotFitsError if its cards cannot be told apart."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", AstropyWarning)  # cards of odd style
                return fits.Header.fromstring(self.text)
        except Exception as error:  # astropy raises anything on damaged cards
            raise NotFitsError(f"the header of HDU {self.index} is not FITS ({error})") from error

    @property
    def name(self) -> str:
        """EXTNAME in capitals; PRIMARY or empty if there is none."""
        given = str(self.keywords.get("EXTNAME") or "").strip().upper()
        return given or ("" if self.index else "PRIMARY")

    @property
    def is_compressed(self) -> bool:
        """Whether it is an image that is stored as a table of compressed tiles [2]_."""
        return self._is_table and self.keywords.get("ZIMAGE") is True

    @property
    def is_image(self) -> bool:
        """Whether it is an image, compressed or not, with at least one pixel."""
        return self.is_compressed or (not self._is_table and self.data_size > 0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the image, rows before columns; without axes of length 1 beyond the second.

        Empty if it is no image.
        """
        if not self.is_image:
            return ()
        axes = _axes(self.keywords, "Z" if self.is_compressed else "")
        while len(axes) > 2 and axes[-1] == 1:
            axes.pop()
        return tuple(reversed(axes))

    @property
    def pixel_bytes(self) -> int:
        """Bytes of a pixel, decompressed."""
        return abs(_whole(self.keywords, "ZBITPIX" if self.is_compressed else "BITPIX")) // 8

    @property
    def _is_table(self) -> bool:
        return self.index > 0 and self.keywords.get("XTENSION") != "IMAGE"


@contextlib.contextmanager
def open_fits(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, once, decompressed where its first bytes say so."""
    with path.open("rb") as plain, decompressed(plain) as stream:
        yield stream


class KeptOpen:
    """Opens files as `open_fits` does, and keeps the last one open.

    The CCDs of an exposure may stand in one file. On a slow shared disk it takes longer to open a
    file than to read a header.
    """

    def __init__(self):
        self._path: Path | None = None
        self._descriptor = -1
        self._close: Callable[[], object] = lambda: None

    @contextlib.contextmanager
    def __call__(self, path: Path) -> Iterator[BinaryIO]:
        """Open a file for reading, from its first byte on; it must not change meanwhile."""
        if path != self._path or not self._is_same():
            self._path = None
            self._close()
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._close = weakref.finalize(self, os.close, self._descriptor)
            self._path = path
        with os.fdopen(self._descriptor, "rb", closefd=False) as plain:
            plain.seek(0)
            with decompressed(plain) as stream:
                yield stream

    def _is_same(self) -> bool:
        """Return whether the file that is open still has its name."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False


@contextlib.contextmanager
def decompressed(plain: BinaryIO) -> Iterator[BinaryIO]:
    """Give what a file holds, decompressed where its first bytes say so; the file stays open."""
    magic = plain.peek(3)[:3]
    if magic[:2] == b"\x1f\x8b":
        with gzip.open(plain) as stream:
            yield stream
    elif magic == b"BZh":
        with bz2.open(plain) as stream:
            yield stream
    else:
        yield plain


def is_plain(stream: BinaryIO) -> bool:
    """Return whether a file of `open_fits` is read as it is, without decompression."""
    return isinstance(stream, io.BufferedReader | io.FileIO)


def walk_hdus(stream: BinaryIO, largest: int | None = None) -> Iterator[HduHeader]:
    """Yield the HDUs of a file of `open_fits`; the stream then stands at the data of each.

    Parameters
    ----------
    stream : file
        As `open_fits` gives it.
    largest : int, optional
        Bytes that the data of an HDU may have in a gzip or bzip2 file, where the size of the file
        does not limit them; None: no limit.

    Raises
    ------
    NotFitsError
        If the file or a header is not FITS, or sizes in it are impossible.
    EOFError
        If the file ends in a header or in data that are skipped, or is smaller than a header says.
    zlib.error, OSError
        If the file cannot be decompressed (without an error number) or read.
    """
    position, end, index = 0, 0, 0
    while True:
        # a seek in a compressed stream stops at its end, one in a plain file does not
        reached = min(_known_size(stream, position), position)
        reached = min(stream.seek(reached), reached)
        if reached < end:
            raise EOFError("it ends in its data")
        if reached < position:
            return  # some programs leave out the padding of the last data
        block = stream.read(BLOCK)
        if index == 0 and not block.startswith(b"SIMPLE  ="):
            if not block:
                raise EOFError("it is empty")
            raise NotFitsError("it does not begin as FITS files do")
        if index > 0 and not block.startswith(b"XTENSION"):
            if block and not block.strip(b"\0"):
                raise EOFError("it ends in zero bytes")  # a broken copy that was filled up
            return  # the end, or special records, which may follow the last HDU [1]_
        text, length, total = _header_text(stream, block, index)
        keywords = _structure(text)
        size = _data_size(keywords, index)
        hdu = HduHeader(index, text, keywords, size, total)
        _check_tiles(hdu)
        if not is_plain(stream) and largest is not None and size > largest:
            raise NotFitsError(f"HDU {index} says that it has {size} bytes, at most {largest} fit")
        yield hdu
        end = position + length + size
        position += length + -(-size // BLOCK) * BLOCK
        index += 1


def read_data(stream: BinaryIO, hdu: HduHeader) -> bytes:
    """Read the data at which the stream stands, without padding; errors as `walk_hdus`."""
    # asked for more than there is, the stream would make room for it first
    if is_plain(stream):
        left = _known_size(stream, 0) - stream.tell()
        if hdu.data_size > left:
            raise EOFError("it ends in its data")
    body = stream.read(hdu.data_size)
    if len(body) < hdu.data_size:
        raise EOFError("it ends in its data")
    if not is_plain(stream):
        stream.read(-hdu.data_size % BLOCK)
        stream.peek(1)  # at the end of the file this verifies its checksum
    return body


def data_sum(data: bytes | memoryview, start: int = 0) -> int:
    """Return the 32-bit ones' complement sum of bytes [3]_.

    Parameters
    ----------
    data : bytes-like
        Padded with zeros to a multiple of four bytes.
    start : int
        Sum of what stands before it, whose length must be a multiple of four.
    """
    whole = len(data) // 4 * 4
    words = np.frombuffer(data, ">u4", whole // 4)
    total = start + int(words.sum(dtype=np.uint64))
    if whole < len(data):
        total += int.from_bytes(bytes(data[whole:]).ljust(4, b"\0"), "big")
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total


def as_plane(pixels: NDArray) -> NDArray:
    """Return an array without axes of length 1 before the last two."""
    while pixels.ndim > 2 and pixels.shape[0] == 1:
        pixels = pixels[0]
    return pixels


def _known_size(stream: BinaryIO, position: int) -> int:
    """Return the length of a plain file, and of others the part that has been read."""
    return os.fstat(stream.fileno()).st_size if is_plain(stream) else position


def _header_text(stream: BinaryIO, block: bytes, index: int) -> tuple[bytes, int, int]:
    """Return the header that begins with ``block``, its length in the file, and its checksum."""
    parts, length, kept, total = [], 0, 0, 0
    while True:
        if len(block) < BLOCK:
            raise EOFError("it ends in a header")
        length += BLOCK
        total = data_sum(block, total)
        cards = [block[i : i + _CARD] for i in range(0, BLOCK, _CARD)]
        end = next((n for n, card in enumerate(cards) if card[:8] == b"END     "), None)
        if length > _LONG_HEADER:
            block = _without_comments(block)
        parts.append(block)
        kept += len(block)
        if kept > _LONGEST_HEADER:
            raise NotFitsError(f"the header of HDU {index} has more than {kept // _CARD} cards")
        if end is not None:
            text = b"".join(parts)
            text = _without_comments(text) if length > _LONG_HEADER else text
            text += b" " * (-len(text) % BLOCK)
            # some observatories write characters that FITS does not allow
            text = text if text.isascii() else text.decode("latin-1").encode("ascii", "replace")
            return text, length, total
        block = stream.read(BLOCK)


def _without_comments(text: bytes) -> bytes:
    """Return cards without comments and empty ones."""
    cards = (text[i : i + _CARD] for i in range(0, len(text), _CARD))
    return b"".join(card for card in cards if not card.startswith(_COMMENTS))


def _structure(text: bytes) -> dict[str, str | int | float | bool | None]:
    """Return the values of the cards that say how data are stored; the first of each counts."""
    found: dict[str, str | int | float | bool | None] = {}
    for start in range(0, len(text), _CARD):
        keyword = text[start : start + 8]
        if _STRUCTURAL.fullmatch(keyword) and text[start + 8 : start + 9] == b"=":
            name = keyword.decode().rstrip()
            found.setdefault(name, _value(text[start + 9 : start + _CARD]))
    return found


def _value(field: bytes) -> str | int | float | bool | None:
    """Return the value of a card; a text that is none of FITS's values as it is."""
    quoted, plain = _VALUE.fullmatch(field).groups()
    if quoted is not None:
        return quoted.decode("ascii", "replace").replace("''", "'").rstrip()
    text = plain.decode("ascii", "replace").strip()
    if text in ("T", "F"):
        return text == "T"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text.replace("D", "E"))
    return text or None


def _whole(keywords: dict, name: str, default: int | None = None) -> int:
    """Return a number of a header that must be whole; NotFitsError names the keyword."""
    value = keywords.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        said = "is missing" if name not in keywords else f"is {value!r}, not a whole number"
        raise NotFitsError(f"{name} {said}")
    return value


def _axes(keywords: dict, prefix: str) -> list[int]:
    """Return the lengths of the axes, columns first; NotFitsError if one is impossible."""
    number = _whole(keywords, f"{prefix}NAXIS")
    if not 0 <= number <= 999:
        raise NotFitsError(f"{prefix}NAXIS is {number}")
    axes = [_whole(keywords, f"{prefix}NAXIS{i + 1}") for i in range(number)]
    for i, length in enumerate(axes):
        if length < 0:
            raise NotFitsError(f"{prefix}NAXIS{i + 1} is {length}")
    return axes


def _data_size(keywords: dict, index: int) -> int:
    """Return the number of data bytes, without padding [1]_; NotFitsError if it is impossible."""
    try:
        bits, axes = _whole(keywords, "BITPIX"), _axes(keywords, "")
        if bits not in (8, 16, 32, 64, -32, -64):
            raise NotFitsError(f"BITPIX is {bits}")
        extra, groups = _whole(keywords, "PCOUNT", 0), _whole(keywords, "GCOUNT", 1)
        if extra < 0 or groups < 0:
            raise NotFitsError(f"PCOUNT is {extra}, GCOUNT is {groups}")
        if axes and axes[0] == 0 and index == 0 and keywords.get("GROUPS") is True:
            axes = axes[1:]  # random groups
    except NotFitsError as error:
        raise NotFitsError(f"the header of HDU {index} is damaged: {error}") from error
    size = abs(bits) // 8 * groups * (extra + math.prod(axes)) if axes else 0
    if size > _LARGEST:
        raise NotFitsError(f"the header of HDU {index} is damaged: it says {size:g} bytes of data")
    return size


def _check_tiles(hdu: HduHeader) -> None:
    """Compare the sizes of a compressed image with its table of tiles [2]_."""
    if not hdu.is_compressed:
        return
    try:
        axes = _axes(hdu.keywords, "Z")
        tile = [
            _whole(hdu.keywords, f"ZTILE{i + 1}", axes[0] if i == 0 else 1)
            for i in range(len(axes))
        ]
        if _whole(hdu.keywords, "ZBITPIX") not in (8, 16, 32, 64, -32, -64):
            raise NotFitsError(f"ZBITPIX is {hdu.keywords['ZBITPIX']}")
        if not axes or min(axes) < 1 or min(tile) < 1:
            raise NotFitsError(f"ZNAXIS and ZTILE give tiles of {tile} in an image of {axes}")
        rows = _whole(hdu.keywords, "NAXIS2")
        tiles = math.prod(-(-n // step) for n, step in zip(axes, tile, strict=True))
        if tiles != rows:
            raise NotFitsError(f"it has {rows} tiles, but an image of {axes} has {tiles}")
        size = math.prod(axes) * hdu.pixel_bytes
        if size > max(_SMALLEST_COMPRESSED, _BEST_COMPRESSION * hdu.data_size):
            raise NotFitsError(f"an image of {axes} does not fit into {hdu.data_size} bytes")
    except NotFitsError as error:
        raise NotFitsError(f"the header of HDU {hdu.index} is damaged: {error}") from error
