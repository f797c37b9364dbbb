"""Verifying DATASUM and CHECKSUM of FITS files, and telling files apart.

References
----------
.. [1] FITS Standard 4.0 (2018), section 4.4.2.7 and appendix J.
"""

import collections
import contextlib
import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from coaddflow.errors import InputError
from coaddflow.image.fits_hdus import (
    HduHeader,
    NotFitsError,
    data_sum,
    decompressed,
    open_fits,
    walk_hdus,
)

_CHUNK = 1 << 20


def wrong_sum(hdu: HduHeader, total: int) -> str | None:
    """Return what is wrong with a checksum of an HDU; None if neither is, or it has none.

    That is the end of a sentence which begins with the HDU. Values that are no sums are wrong.
    Empty ones, and sums of nothing but zeros, stand for sums that nobody has taken.

    Parameters
    ----------
    hdu : HduHeader
        The HDU; CHECKSUM covers its header too [1]_.
    total : int
        `data_sum` of its data.
    """
    stated = _stated(hdu, "DATASUM")
    if stated and not stated.isdecimal():
        return f"has a DATASUM that is none ({stated!r})"
    if stated and int(stated) not in (0, total):
        return "has data that differ from their DATASUM"
    stated = _stated(hdu, "CHECKSUM")
    if stated and len(stated) != 16:
        return f"has a CHECKSUM that is none ({stated!r})"
    if stated.strip("0") and (hdu.sum + total) % 0xFFFFFFFF != 0:
        return "has a header or data that differ from their CHECKSUM"
    return None


def _stated(hdu: HduHeader, keyword: str) -> str:
    """Return what a header states, as text; empty if nothing."""
    value = hdu.keywords.get(keyword)
    return "" if value is None else str(value).strip()


def wrong_sums(path: str | Path, remedy: str = "remove it and run the workflow again") -> list[str]:
    """Return a sentence for each HDU of a file whose DATASUM or CHECKSUM is wrong.

    Parameters
    ----------
    path : str or Path
        Plain, gzip, bzip2 or fpack file; it is read once, in chunks.
    remedy : str
        What the error says about a file that is not whole.

    Raises
    ------
    InputError
        If the file is missing, ends too early, or is not FITS.
    """
    with _reading(path, remedy), open_fits(Path(path)) as stream:
        return list(_problems(stream))


def fingerprint(path: str | Path, remedy: str = "get the file again") -> str:
    """Return what changes when the content of a FITS file does: a few letters and digits.

    It is from the SHA-256 of its bytes: programs that edit pixels may leave DATASUM as it was.

    Parameters
    ----------
    path : str or Path
        Plain, gzip, bzip2 or fpack file.
    remedy : str
        What the error says about a file that is not whole.

    Raises
    ------
    InputError
        If the file is missing, ends too early, or is not FITS.
    """
    with _reading(path, remedy), Path(path).open("rb") as plain:
        with decompressed(plain) as stream:
            collections.deque(walk_hdus(stream), maxlen=0)  # it is whole
        plain.seek(0)
        return hashlib.file_digest(plain, "sha256").hexdigest()[:32]


@contextlib.contextmanager
def _reading(path: str | Path, remedy: str) -> Iterator[None]:
    """Raise InputError if a file turns out in the block to be missing, or not whole."""
    try:
        yield
    except (OSError, EOFError, NotFitsError, zlib.error) as error:
        reason = getattr(error, "strerror", None)  # of the system, not of a decompressor
        cause = f"cannot be read: {reason}" if reason else f"is not a whole FITS file ({error})"
        raise InputError(cause, path, remedy) from error


def _problems(stream: BinaryIO) -> Iterator[str]:
    for hdu in walk_hdus(stream):
        left, total = hdu.data_size, 0
        while left > 0:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                raise EOFError("it ends in its data")
            total, left = data_sum(chunk, total), left - len(chunk)
        problem = wrong_sum(hdu, total)
        if problem:
            name = f" ({hdu.name})" if hdu.name else ""
            yield f"HDU {hdu.index}{name} {problem}"
