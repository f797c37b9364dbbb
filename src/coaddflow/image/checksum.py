"""Verifying DATASUM and CHECKSUM of FITS files, and telling files apart by them.

References
----------
.. [1] FITS Standard 4.0 (2018), section 4.4.2.7 and appendix J.
"""

import hashlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from coaddflow.errors import InputError
from coaddflow.image.fits_hdus import HduHeader, NotFitsError, data_sum, open_fits, walk_hdus

_CHUNK = 1 << 20


def wrong_sum(hdu: HduHeader, total: int) -> str | None:
    """Return which checksum of an HDU is wrong; None if neither is, or the header has none.

    Parameters
    ----------
    hdu : HduHeader
        The HDU; CHECKSUM covers its header too [1]_.
    total : int
        `data_sum` of its data.
    """
    stated = str(hdu.keywords.get("DATASUM") or "").strip()
    if stated.isdigit() and int(stated) not in (0, total):
        return "DATASUM"
    stated = str(hdu.keywords.get("CHECKSUM") or "")
    whole = hdu.sum + total
    if len(stated) == 16 and stated != "0" * 16 and whole % 0xFFFFFFFF != 0:
        return "CHECKSUM"
    return None


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
    path = Path(path)
    try:
        with open_fits(path) as stream:
            return list(_problems(stream))
    except (OSError, EOFError, NotFitsError, zlib.error) as error:
        raise InputError(f"is not a whole FITS file ({error})", path, remedy) from error


def fingerprint(path: str | Path, remedy: str = "get the file again") -> str:
    """Return what changes when the content of a FITS file does: a few letters and digits.

    It is the SHA-256 of the headers. Data are read only where the header has no DATASUM of theirs,
    so that files written here cost no more than their headers.

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
    digest = hashlib.sha256()
    try:
        with open_fits(Path(path)) as stream:
            for hdu in walk_hdus(stream):
                digest.update(hdu.text)
                left = 0 if hdu.keywords.get("DATASUM") else hdu.data_size
                while left > 0:
                    chunk = stream.read(min(_CHUNK, left))
                    if not chunk:
                        raise EOFError("it ends in its data")
                    digest.update(chunk)
                    left -= len(chunk)
    except (OSError, EOFError, NotFitsError, zlib.error) as error:
        raise InputError(f"is not a whole FITS file ({error})", path, remedy) from error
    return digest.hexdigest()[:32]


def _problems(stream: BinaryIO) -> Iterator[str]:
    for hdu in walk_hdus(stream):
        left, total = hdu.data_size, 0
        while left > 0:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                raise EOFError("it ends in its data")
            total, left = data_sum(chunk, total), left - len(chunk)
        which = wrong_sum(hdu, total)
        if which:
            name = f" ({hdu.name})" if hdu.name else ""
            what = "data" if which == "DATASUM" else "header or data"
            yield f"the {what} of HDU {hdu.index}{name} differ from their {which}"
