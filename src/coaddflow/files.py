"""Files that are either whole or not there, and ids that are safe to put into paths."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from coaddflow.errors import InputError

_ID_PATTERNS = {
    "exposure": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"),
    "band": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,15}"),
    "patch": re.compile(r"[0-9]{1,4}_[0-9]{1,4}"),
}


_CANNOT_WRITE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
}


def check_id(text: str, kind: str) -> str:
    """Return ``text`` if it may be used as an id of this kind.

    Parameters
    ----------
    text : str
        The candidate.
    kind : {"exposure", "band", "patch"}
        What it identifies.

    Raises
    ------
    InputError
        If the id has characters that do not belong into a path, a job name or a wildcard.
    """
    if not isinstance(text, str) or not _ID_PATTERNS[kind].fullmatch(text):
        raise InputError(
            f"{text!r} is not a valid {kind} id",
            remedy="use letters, digits, '_' and '-' only, beginning with a letter or digit",
        )
    return text


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path that takes the name ``path`` if the block succeeds.

    The temporary file stands in the same folder (so that the rename cannot cross file systems),
    keeps the suffixes of ``path`` (writers look at them), is flushed to disk before the rename,
    and is removed if the block fails: a file under its final name is always whole.

    Parameters
    ----------
    path : str or Path
        The final name. Missing parent folders are created.

    Yields
    ------
    Path
        Where to write.

    Raises
    ------
    InputError
        If the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix, suffix = _around_random(path)
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        # astropy reports a full disk, and NumPy a quota, without an error number
        full = re.search(r"space on disk|\d+ requested and \d+ written", str(error)) is not None
        if not full and error.errno not in _CANNOT_WRITE:
            raise
        raise InputError(
            f"cannot be written: {'no space left on device' if full else error.strerror}",
            path=path,
            remedy="free some space or check the permissions of the folder, then run again",
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_with_cut_short(path: str | Path) -> None:
    """Remove a file, and what processes that were killed left of writing it.

    To be called only by the one that makes the file: another that just writes it would fail.

    Parameters
    ----------
    path : str or Path
        The final name, as given to `atomic_path`; it need not be there.
    """
    path = Path(path)
    path.unlink(missing_ok=True)
    prefix, suffix = _around_random(path)
    for left in path.parent.glob(f"{glob.escape(prefix)}????????{glob.escape(suffix)}"):
        left.unlink(missing_ok=True)


def _around_random(path: Path) -> tuple[str, str]:
    """Return what stands before and after the random part of a temporary name."""
    return f".{path.name[:80]}.", "".join(path.suffixes[-2:])


def _umask() -> int:
    """Return the umask of the process (which can only be read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 checksum of a file as a hexadecimal string."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
