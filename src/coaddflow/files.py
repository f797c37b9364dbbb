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
from typing import BinaryIO

from coaddflow import fence
from coaddflow.errors import InputError

_ID_PATTERNS = {
    "exposure": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"),
    "band": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,15}"),
    "patch": re.compile(r"[0-9]{1,4}_[0-9]{1,4}"),
}

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}


def check_id(text: str, kind: str) -> str:
    """Return ``text`` if it may be used as the id of an exposure, band or patch.

    Raises
    ------
    InputError
        If it has characters that do not belong into a path, a job name or a wildcard.
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

    The temporary file stands in the same folder, which is made if it is missing (so that the rename
    cannot cross file systems), keeps the suffixes of ``path`` (writers look at them), is flushed to
    disk before the rename, and is removed if the block fails: a file under its final name is whole.

    Raises
    ------
    InputError
        If the folder cannot be written to, or the disk is full.
    ReplacedError
        If a newer job has taken over what this job makes (`fence`): nothing takes the name.
    """
    with _renamed_at_the_end(path) as (temporary, _):
        yield temporary


@contextlib.contextmanager
def atomic_stream(path: str | Path) -> Iterator[BinaryIO]:
    """Give a file to write to that takes the name ``path`` if the block succeeds.

    As `atomic_path`, and opened once: on a shared disk that takes longer than to write a small
    file.
    """
    with (
        _renamed_at_the_end(path) as (_, handle),
        os.fdopen(handle, "w+b", closefd=False) as stream,
    ):
        yield stream


def atomic_text(path: str | Path, text: str) -> None:
    """Write a small file in UTF-8, whole or not at all: see `atomic_path`."""
    with atomic_stream(path) as stream:
        stream.write(text.encode())


@contextlib.contextmanager
def _renamed_at_the_end(path: str | Path) -> Iterator[tuple[Path, int]]:
    """Give a temporary file, and an open handle of it, for `atomic_path` and `atomic_stream`."""
    path = Path(path)
    handle: int | None = None
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix, suffix = _affixes(path)
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=path.parent)
        temporary = Path(name)
        yield temporary, handle
        _flush(temporary, handle)
        temporary.chmod(0o666 & ~_umask())
        fence.check()
        temporary.replace(path)
    except OSError as error:
        # astropy reports a full disk, and NumPy a quota, without an error number
        full = re.search(r"space on disk|\d+ requested and \d+ written", str(error)) is not None
        if not full and error.errno not in _DISK_FULL | _NOT_ALLOWED:
            raise
        raise InputError(
            f"cannot be written: {'no space left on device' if full else error.strerror}",
            path=path,
            remedy="free some space or check the permissions of the folder, then run again",
        ) from error
    finally:
        if handle is not None:
            os.close(handle)
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _flush(path: Path, handle: int) -> None:
    """Flush a file to disk, through ``handle`` unless its writer has made another file of the name.

    On a shared disk it takes longer to open a file than to flush it.
    """
    if os.path.samestat(path.stat(), os.fstat(handle)):
        os.fsync(handle)
        return
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def remove(path: str | Path) -> None:
    """Remove a product of an earlier run, if it is there.

    Raises
    ------
    ReplacedError
        If a newer job has taken over what this job makes: the file may be that job's.
    """
    fence.check()
    Path(path).unlink(missing_ok=True)


def move(path: str | Path, target: str | Path) -> None:
    """Give a product another name on the same disk, replacing what has it.

    Raises
    ------
    ReplacedError
        As with `remove`.
    """
    fence.check()
    Path(path).replace(target)


def remove_partial(path: str | Path) -> None:
    """Remove what killed processes left of a file that they wrote with `atomic_path`.

    The file itself stays. No other process may be writing it. Errors are those of `remove`.
    """
    fence.check()
    path = Path(path)
    prefix, suffix = (glob.escape(part) for part in _affixes(path))
    for partial in path.parent.glob(f"{prefix}????????{suffix}"):
        partial.unlink(missing_ok=True)


def _affixes(path: Path) -> tuple[str, str]:
    """Return how the names of the temporary files of a path begin and end."""
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
