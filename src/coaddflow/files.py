"""Files that are either whole or not there, and ids that are safe to put into paths."""

import contextlib
import errno
import functools
import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from coaddflow import fence
from coaddflow.errors import InputError

_ID_PATTERNS = {
    "exposure": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}"),
    "band": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,15}"),
    "patch": re.compile(r"[0-9]{1,4}_[0-9]{1,4}"),
    # of several sets one file may be named
    "set": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}"),
}

_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}

_Change = TypeVar("_Change")

_RANDOM = 8
"""Characters that `tempfile` puts into a name."""

_CHANGES_PER_LOOK, _SECONDS_PER_LOOK = 64, 1.0
"""Files that are renamed or removed after one look at the fence, and for how long it holds: a newer
job takes longer to make its first product, unless the disk stood still meanwhile."""


def check_id(text: str, kind: str) -> str:
    """Return ``text`` if it may be used as the id of an exposure, band, patch or set.

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
    with _renamed_at_the_end(path) as (temporary,):
        yield temporary.path


@contextlib.contextmanager
def atomic_stream(path: str | Path) -> Iterator[BinaryIO]:
    """Give a file to write to that takes the name ``path`` if the block succeeds.

    As `atomic_path`, and opened once: on a shared disk that takes longer than to write a small
    file.
    """
    with atomic_streams(path) as (stream,):
        yield stream


@contextlib.contextmanager
def atomic_streams(*paths: str | Path) -> Iterator[list[BinaryIO]]:
    """Give files to write to that take the names ``paths``, in this order, if the block succeeds.

    As `atomic_stream`, with one look at the fence for all of them, when all are on disk. An error
    that is of the disk names the last one.
    """
    with _renamed_at_the_end(*paths) as temporaries, contextlib.ExitStack() as opened:
        yield [
            opened.enter_context(os.fdopen(one.handle, "w+b", closefd=False)) for one in temporaries
        ]


def atomic_text(path: str | Path, text: str) -> None:
    """Write a small file in UTF-8, whole or not at all: see `atomic_path`."""
    with atomic_stream(path) as stream:
        stream.write(text.encode())


class _Temporary(NamedTuple):
    """A file that is being written, and an open handle of it."""

    path: Path
    handle: int


@contextlib.contextmanager
def _renamed_at_the_end(*paths: str | Path) -> Iterator[list[_Temporary]]:
    """Give temporary files for `atomic_path` and `atomic_streams`."""
    with contextlib.ExitStack() as made:
        temporaries = [made.enter_context(_temporary(Path(path))) for path in paths]
        yield temporaries
        for temporary in temporaries:
            _flush(*temporary)
            temporary.path.chmod(0o666 & ~_umask())
        for temporary, path in _looking(zip(temporaries, paths, strict=True)):
            temporary.path.replace(path)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[_Temporary]:
    """Give a temporary file for ``path``, which is removed if the block fails."""
    try:
        temporary = _make_temporary(path)
        try:
            yield temporary
        except BaseException:
            os.close(temporary.handle)
            temporary.path.unlink(missing_ok=True)
            raise
        os.close(temporary.handle)
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


def _make_temporary(path: Path) -> _Temporary:
    """Make a temporary file beside ``path``, and its folder if that is missing."""
    prefix, suffix = _affixes(path)
    make = functools.partial(tempfile.mkstemp, prefix=prefix, suffix=suffix, dir=path.parent)
    try:
        handle, name = make()
    except FileNotFoundError:
        # as a rule the folder is there: on a shared disk it takes time to ask
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = make()
    return _Temporary(Path(name), handle)


def _flush(path: Path, handle: int) -> None:
    """Flush a file to disk, through ``handle`` unless its writer has made another file of the name.

    On a shared disk it takes longer to open a file than to flush it.
    """
    if os.path.samestat(path.stat(), os.fstat(handle)):
        os.fsync(handle)
        return
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def remove(*paths: str | Path) -> None:
    """Remove products of an earlier run, in this order, those that are there.

    There is a look at the fence before the first, and again after some tens of files or a second.

    Raises
    ------
    ReplacedError
        If a newer job has taken over what this job makes: the files may be that job's.
    """
    for path in _looking(paths):
        Path(path).unlink(missing_ok=True)


def _looking(changes: Iterable[_Change]) -> Iterator[_Change]:
    """Yield changes that are about to be made, with looks at the fence between some of them."""
    looked = -math.inf
    for number, change in enumerate(changes):
        if number % _CHANGES_PER_LOOK == 0 or time.monotonic() > looked + _SECONDS_PER_LOOK:
            fence.check()
            looked = time.monotonic()
        yield change


def move(path: str | Path, target: str | Path) -> None:
    """Give a product another name on the same disk, replacing what has it.

    Raises
    ------
    ReplacedError
        As with `remove`.
    """
    fence.check()
    Path(path).replace(target)


def remove_partial(*paths: str | Path) -> None:
    """Remove what killed processes left of files that they wrote with `atomic_path`.

    The files themselves stay. No other process may be writing them. Each folder is listed once.
    Errors are those of `remove`.
    """
    fence.check()
    wanted: dict[Path, set[tuple[str, str]]] = {}
    for path in map(Path, paths):
        wanted.setdefault(path.parent, set()).add(_affixes(path))
    for folder, affixes in wanted.items():
        remove(*(found for found in folder.glob(".*") if _is_partial(found.name, affixes)))


def _affixes(path: Path) -> tuple[str, str]:
    """Return how the names of the temporary files of a path begin and end."""
    return f".{path.name[:80]}.", "".join(path.suffixes[-2:])


def _is_partial(name: str, affixes: set[tuple[str, str]]) -> bool:
    """Return whether a file is one of `_make_temporary`, with some of these affixes."""
    ends = {suffix for _, suffix in affixes if name.endswith(suffix)}
    return any((name[: -len(suffix) - _RANDOM], suffix) in affixes for suffix in ends)


def _umask() -> int:
    """Return the umask of the process (which can only be read by setting it)."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 checksum of a file as a hexadecimal string."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
