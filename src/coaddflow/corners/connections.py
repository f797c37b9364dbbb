"""How the files of corner databases are opened: to be made, to be changed in place, to be read.

A new database is written under a temporary name and renamed, and that of a tract never changes
under its name. That of the survey is changed in place, since a copy would take a time that grows
with the survey: in one transaction with the rollback journal of SQLite [1]_, which stands beside it
as ``corners.sqlite-journal``. Whoever is killed in it leaves the journal, with the pages as they
were, and whoever opens the database next puts them back. That needs locks of the file system, as
local ones, NFS and most parallel ones have. Where they are missing, a changed copy replaces the
file.

A journal belongs to whatever file has the name. So the file is only replaced while nobody changes
it and it has no journal, and only changed while it is the one that has the name.

References
----------
.. [1] https://www.sqlite.org/atomiccommit.html, and https://www.sqlite.org/howtocorrupt.html
   sections 1.4 and 2 for journals and locks.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from coaddflow import fence
from coaddflow.corners.schema import require_rtree
from coaddflow.errors import InputError
from coaddflow.files import atomic_path, remove

REBUILD = "remove it and run the workflow again; it is made from the manifests"

CHANGE_PATIENCE, READ_PATIENCE = 300.0, 60.0
"""Seconds for which another process may have a database that is to be changed, or read."""

_CACHE_KB = 64_000
"""Pages kept in memory: before they are full, a change hinders no reader."""

_WITHOUT_LOCKS = {
    sqlite3.SQLITE_IOERR_LOCK,
    sqlite3.SQLITE_IOERR_RDLOCK,
    sqlite3.SQLITE_IOERR_UNLOCK,
    sqlite3.SQLITE_IOERR_CHECKRESERVEDLOCK,
}
"""Error codes of a file system that has no locks."""

_LOCKS_MISSING = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""Of them SQLite takes ENOLCK (NFS without its lock service) for a lock that somebody else has."""

_devices_with_locks: set[int] = set()

_NOT_ALLOWED = {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN}

_DAMAGED = {
    sqlite3.SQLITE_OK,  # text that is not UTF-8: Python finds it
    sqlite3.SQLITE_ERROR,  # no such table or column
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_CANTOPEN,  # it was removed meanwhile; others are told what they may not open
    sqlite3.SQLITE_SCHEMA,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_NOTADB,
}

_CHECK_THE_DISK = "free some space, or check the quota and the disk, then run again"


class UnavailableError(InputError):
    """A database cannot be used now, although nothing says that it is damaged."""

    lasting = False


class NoLocksError(Exception):
    """The file system has no locks."""


@contextlib.contextmanager
def new_database(
    path: str | Path, copy_from: str | Path | None = None
) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a temporary database, which is renamed to ``path`` at the end.

    Raises
    ------
    InputError
        If it cannot be written: permissions, a full disk, a quota, an error of the disk.
    """
    require_rtree()
    with atomic_path(path) as temporary:
        if copy_from is not None:
            shutil.copyfile(copy_from, temporary)
        connection = sqlite3.connect(temporary, isolation_level=None, factory=_Connection)
        try:
            # no other process uses this file, and it is discarded on failure: no journal
            _configure(connection, journal_mode="OFF", synchronous="OFF")
            if copy_from is not None:
                connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN")
            yield connection
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if _code(error) == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            if _of_the_disk(error):
                raise _disk_failed(path, "written", error) from error
            raise
        finally:
            connection.close()


@contextlib.contextmanager
def replaced_database(
    path: str | Path, copy_from: str | Path | None = None
) -> Iterator[sqlite3.Connection]:
    """Yield a connection as `new_database` does, for a file that others may be changing in place.

    Raises
    ------
    InputError
        As `changed_database`.
    """
    with contextlib.ExitStack() as until_renamed, new_database(path, copy_from) as connection:
        yield connection
        until_renamed.enter_context(_held_still(Path(path)))


@contextlib.contextmanager
def changed_database(path: str | Path) -> Iterator[sqlite3.Connection]:
    """Yield a connection to a database in a transaction, which is committed at the end.

    At any moment, also after the death of this process, the file has all of the changes or none.

    Raises
    ------
    InputError
        If the file may not be written, or, as UnavailableError, if the disk is full or fails, or
        another process has the file for `CHANGE_PATIENCE`.
    ReplacedError
        If a newer job has taken over what this job makes (`fence`).
    NoLocksError
        If the file system has no locks.
    sqlite3.DatabaseError
        If it is missing, damaged or no database.
    """
    require_rtree()
    path = Path(path)
    with _explained(path), contextlib.closing(_begin(path)) as connection:
        yield connection
        fence.check()
        connection.execute("COMMIT")
    # also where nothing was to change: it is newer than what it is made of
    os.utime(path)


def open_for_reading(path: str | Path) -> sqlite3.Connection:
    """Return a connection that only reads; one of the survey has locks while it does.

    Raises
    ------
    InputError
        If it is damaged or no corner database, or, as UnavailableError, if it was left half changed
        and this process may not mend it, another process has it for `READ_PATIENCE`, or the disk
        fails.
    """
    path = Path(path)
    connection = _connect(path, "mode=ro&immutable=1")
    # this does not change while the rest does
    with contextlib.suppress(sqlite3.DatabaseError):
        kind = connection.execute("SELECT value FROM meta WHERE key = 'kind'").fetchone()
        if kind == ("tract",):
            return connection
    connection.close()
    return _open_with_locks(path)


def _open_with_locks(path: Path) -> sqlite3.Connection:
    if not _has_locks(path):
        return _connect(path, "mode=ro&immutable=1")
    connection = _connect(path, "mode=ro")
    try:
        try:
            _read_something(connection)
        except sqlite3.OperationalError as error:
            if _code(error) != sqlite3.SQLITE_READONLY_ROLLBACK:
                raise
            _mend(path)
            _read_something(connection)
    except sqlite3.DatabaseError as error:
        connection.close()
        if _code(error) in _WITHOUT_LOCKS:
            return _connect(path, "mode=ro&immutable=1")
        raise reading_failed(path, error) from error
    return connection


def _has_locks(path: Path) -> bool:
    """Return whether the file system of a file has locks; True if that cannot be found out."""
    try:
        device = path.stat().st_dev
        if device in _devices_with_locks:
            return True
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        # of the first byte, which SQLite does not lock
        fcntl.lockf(handle, fcntl.LOCK_SH | fcntl.LOCK_NB, 1)
        fcntl.lockf(handle, fcntl.LOCK_UN, 1)
    except OSError as error:
        if error.errno in _LOCKS_MISSING:
            os.close(handle)
            return False
    # the handle stays open: to close it would end the locks that SQLite has on the file in this
    # process
    _devices_with_locks.add(device)
    return True


def _read_something(connection: sqlite3.Connection) -> None:
    connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()


def _mend(path: Path) -> None:
    """Put the pages back that somebody changed who was killed, if this process may."""
    with (
        contextlib.suppress(sqlite3.OperationalError),
        contextlib.closing(_connect(path, "mode=rw")) as connection,
    ):
        _read_something(connection)


def reading_failed(path: str | Path, error: Exception) -> InputError:
    """Return what an error says that came from reading a database."""
    code = _code(error)
    if code & 0xFF == sqlite3.SQLITE_BUSY:
        return _busy(path, READ_PATIENCE)
    if _of_the_disk(error):
        return _disk_failed(path, "read", error)
    if code == sqlite3.SQLITE_READONLY_ROLLBACK:
        return UnavailableError(
            "was left half changed by a job that was killed",
            path=path,
            remedy="let somebody read it who may write it and its folder, with `coaddflow corners "
            "query 0 0`, or run the workflow again: that puts back what it was",
        )
    if code & 0xFF in _NOT_ALLOWED:
        return UnavailableError(
            f"cannot be read: {error}",
            path=path,
            remedy="check the permissions of the file and its folder, then run again",
        )
    cause = f"is not a readable corner database ({error})"
    return InputError(" ".join(cause.split()), path=path, remedy=REBUILD)


def _begin(path: Path) -> sqlite3.Connection:
    """Return a connection in a transaction that keeps others from changing a database.

    Pages that somebody changed who was killed have been put back.
    """
    if not _has_locks(path):
        raise NoLocksError
    while True:
        before = _identity(path)
        connection = _connect(path, "mode=rw")
        try:
            # EXTRA: when the power fails, a change that was reported as made stays
            _configure(connection, journal_mode="DELETE", synchronous="EXTRA")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("BEGIN IMMEDIATE")
            if _identity(path) == before:
                return connection
            # meanwhile it was replaced: this one has no name any more, only the journal would
            connection.close()
        except sqlite3.DatabaseError:
            connection.close()
            raise


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _held_still(path: Path) -> Iterator[None]:
    """Keep others from changing a file that is replaced, which has no journal then."""
    with contextlib.ExitStack() as held:
        # unless there is none, it is of no use, or nobody changes it in place
        with contextlib.suppress(sqlite3.DatabaseError, NoLocksError), _explained(path):
            held.enter_context(contextlib.closing(_begin(path)))
        # of somebody who was killed: it would only spoil what replaces the file
        remove(f"{path}-journal")
        yield


class _Connection(sqlite3.Connection):
    """A connection that calls a database damaged whose errors cannot be put into words.

    SQLite quotes what it found, which Python then cannot decode.
    """

    def execute(self, *arguments: object) -> sqlite3.Cursor:
        """Execute a statement."""
        try:
            return super().execute(*arguments)
        except UnicodeDecodeError as error:
            damaged = sqlite3.DatabaseError("its schema is not text")
            damaged.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise damaged from error


def _connect(path: Path, options: str) -> sqlite3.Connection:
    patience = CHANGE_PATIENCE if options == "mode=rw" else READ_PATIENCE
    name = f"{path.absolute().as_uri()}?{options}"
    return sqlite3.connect(
        name, uri=True, isolation_level=None, timeout=patience, factory=_Connection
    )


def _configure(connection: sqlite3.Connection, journal_mode: str, synchronous: str) -> None:
    for pragma, value in (
        ("journal_mode", journal_mode),
        ("synchronous", synchronous),
        ("temp_store", "MEMORY"),
        ("cache_size", -_CACHE_KB),
    ):
        connection.execute(f"PRAGMA {pragma} = {value}")


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise InputError or NoLocksError for what is not the fault of the database."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = _code(error) & 0xFF
        if _code(error) in _WITHOUT_LOCKS:
            raise NoLocksError from error
        if code == sqlite3.SQLITE_BUSY:
            raise _busy(path, CHANGE_PATIENCE) from error
        if code == sqlite3.SQLITE_FULL or _of_the_disk(error):
            raise _disk_failed(path, "written", error) from error
        if code in _NOT_ALLOWED and path.exists():
            # no copy replaces it: who may not write it cannot lock it against who changes it
            raise InputError(
                f"cannot be written: {error}",
                path=path,
                remedy="whoever runs the workflow must be allowed to write the file and its "
                "folder: let its owner allow it (`chmod g+w`), then run again",
            ) from error
        raise


def is_damaged(error: sqlite3.DatabaseError) -> bool:
    """Return whether an error came from the content of a database: made anew, it is mended."""
    return _code(error) & 0xFF in _DAMAGED


def _of_the_disk(error: Exception) -> bool:
    return _code(error) & 0xFF == sqlite3.SQLITE_IOERR


def _disk_failed(path: str | Path, what: str, error: Exception) -> UnavailableError:
    """Return the error of a full disk, or of one that fails; to SQLite so does a used-up quota."""
    full = _code(error) == sqlite3.SQLITE_FULL
    cause = os.strerror(errno.ENOSPC) if full else f"{error} (or the quota is used up)"
    return UnavailableError(f"cannot be {what}: {cause}", path=path, remedy=_CHECK_THE_DISK)


def _busy(path: str | Path, patience: float) -> UnavailableError:
    return UnavailableError(
        f"another process has had it for {patience:.0f} s",
        path=path,
        remedy="wait for that process, or end it, then run again",
    )


def _code(error: Exception) -> int:
    """Return the extended code of an error of SQLite, 0 for one of Python's."""
    return getattr(error, "sqlite_errorcode", 0)
