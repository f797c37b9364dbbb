"""Compiled functions: numba's `njit`, compiled once and kept where this user can write.

They are kept in the first of these folders that can be written to: what ``NUMBA_CACHE_DIR`` names,
``coaddflow`` in the user's cache folder (``XDG_CACHE_HOME``, otherwise ``~/.cache``), and the
folder of the survey, in which every job runs: on compute nodes HOME may be missing or read-only.
Each version of coaddflow, numba and Python, and each kind of processor, has its own part of it.

Processes that start together with an empty folder would all compile the same functions. So one
compiles at a time, and the others then find what it has compiled; where everything has been
compiled ahead (`note_that_all_is_compiled`) nobody waits. What cannot be read is compiled again,
and a full disk only means that nothing is kept.
"""

import contextlib
import fcntl
import functools
import glob
import hashlib
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba

from coaddflow import __version__

_IN_SURVEY = Path(".snakemake") / "coaddflow"

_LONGEST_WAIT = 120.0
"""Seconds to wait while another process compiles; afterwards this one waits no more. A function
takes up to 9."""

_patience = _LONGEST_WAIT

_LOCK, _COMPLETE = "lock", "complete"
"""Files in the folder: the lock, and a note that all functions have been compiled."""

FUNCTIONS: list[Any] = []
"""The functions of all modules that are imported."""

_TRIED = ((0, 68),)
"""Versions of numba for which `_look_up_at_once` has been tried: it is not among what numba
promises to keep."""

_compiling = threading.local()

_sources: dict[Callable[..., Any], frozenset[str]] = {}
"""Files of each function and of those that it calls."""


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function when it is called, and keeps it for other runs.

    Parameters
    ----------
    **options
        Those of `numba.njit`, without ``cache``.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        folder = cache_folder()
        if folder is None:
            FUNCTIONS.append(numba.njit(**options)(function))
            return FUNCTIONS[-1]
        before = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(folder / _digest_of_called(function))
        try:
            compiled = numba.njit(cache=True, **options)(function)
        finally:
            numba.config.CACHE_DIR = before
        _look_up_at_once(compiled)
        compiled.compile = _compile_alone(compiled, folder)
        FUNCTIONS.append(compiled)
        return compiled

    return decorate


@functools.cache
def cache_folder() -> Path | None:
    """Return where compiled functions are kept; None if they are not.

    The folder belongs to this user, and nobody else can write to it: what is found there is
    executed.
    """
    for parent in _parents():
        # homes are shared by nodes of different kinds
        folder = parent / f"{__version__}-{_processor_and_versions()}"
        if _is_made_for_us(parent) and _is_made_for_us(folder):
            return folder.absolute()
    return None


def _parents() -> Iterator[Path]:
    """Return the folders that may hold compiled functions, the best first."""
    if os.environ.get("NUMBA_CACHE_DIR"):
        yield Path(os.environ["NUMBA_CACHE_DIR"])
    of_user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    with contextlib.suppress(RuntimeError):  # a user without HOME
        yield Path(of_user).expanduser() / "coaddflow"
    if _IN_SURVEY.parent.is_dir():
        yield _IN_SURVEY / "compiled"


def _processor_and_versions() -> str:
    features = llvmlite.binding.get_host_cpu_features().flatten()
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    processor = llvmlite.binding.get_host_cpu_name()
    return f"{python}-numba{numba.__version__}-{processor}-{digest}"


def _is_made_for_us(folder: Path) -> bool:
    """Make a folder if there is none; return whether only this user can write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    is_shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return is_own and not is_shared and os.access(folder, os.W_OK | os.X_OK)


def _digest_of_called(function: Callable[..., Any]) -> str:
    """Return a name for the state of the other files that a function is compiled from.

    Functions that it calls become part of what is compiled, and constants of its package may, but
    numba only looks whether the function's own file has changed. A function must be defined after
    those of other files that it calls.
    """
    own = function.__code__.co_filename
    called = (function.__globals__.get(name) for name in function.__code__.co_names)
    files = {own}.union(*(_sources.get(getattr(one, "py_func", None), ()) for one in called))
    files |= _package_of(own)
    _sources[function] = frozenset(files)
    states = sorted(_state_of(path) for path in files - {own})
    return hashlib.sha256(repr(states).encode()).hexdigest()[:8] if states else ""


@functools.cache
def _package_of(path: str) -> frozenset[str]:
    """Return the files beside a file of this package; none beside another one."""
    folder = Path(path).parent
    if not folder.is_relative_to(Path(__file__).parent):
        return frozenset()
    return frozenset(map(str, folder.glob("*.py")))


@functools.cache
def _state_of(path: str) -> tuple[str, int, int]:
    """Return the name of a file, its size, and its time of change."""
    status = Path(path).stat()
    return path, status.st_size, status.st_mtime_ns


def note_that_all_is_compiled() -> None:
    """Let processes that start from now on look for compiled functions without waiting in turn."""
    folder = cache_folder()
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / _COMPLETE).touch()


@functools.cache
def _is_all_compiled(folder: Path) -> bool:
    return (folder / _COMPLETE).exists()


def _look_up_at_once(function: Any) -> None:
    """Let numba look for what is kept of a function before it gets ready to compile.

    To read all declarations, and parts of scipy with them, takes half a second of each process, and
    what has been compiled needs none of them. The compiler still reads them when it is called.
    """
    if numba.version_info[:2] not in _TRIED:
        return
    kept = function._cache

    def load_overload(signature: Any, context: Any) -> Any:
        numba.core.runtime.rtsys.initialize(context)  # it counts the references to arrays
        with kept._guard_against_spurious_io_errors():
            return kept._load_overload(signature, context)
        return None  # the block has swallowed an exception

    kept.load_overload = load_overload


def _compile_alone(function: Any, folder: Path) -> Callable[[Any], Any]:
    """Return the method `compile` of a function, for one process at a time.

    It looks first for what others have compiled.
    """
    compile_ = function.compile

    def compile_or_find(signature: Any) -> Any:
        try:
            return compile_(signature)
        except numba.core.errors.NumbaError:
            raise
        except Exception:
            # what was kept is damaged, or there is no room to keep what has been compiled
            _forget(function)
            return compile_(signature)

    def compile_alone(signature: Any) -> Any:
        # a function that is called by the one compiled needs no lock of its own
        if getattr(_compiling, "active", False) or _is_all_compiled(folder):
            return compile_or_find(signature)
        with _locked(folder / _LOCK):
            _compiling.active = True
            try:
                return compile_or_find(signature)
            finally:
                _compiling.active = False

    return compile_alone


def _forget(function: Any) -> None:
    """Remove the list of what is kept of a function."""
    module = Path(function.py_func.__code__.co_filename).stem
    name = f"{module}.{function.py_func.__qualname__}".replace("<", "").replace(">", "")
    for index in Path(function.stats.cache_path).glob(f"{glob.escape(name)}-*.nbi"):
        with contextlib.suppress(OSError):
            index.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file, if the file system has locks and nobody holds it for too long."""
    global _patience  # noqa: PLW0603 - of the whole process
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        yield
        return
    try:
        began, pause = time.monotonic(), 0.002
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - began > _patience:
                    _patience = 0.0
                    break
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            except OSError:  # no locks here
                break
        yield
    finally:
        os.close(file)  # the lock ends with it, however the process ends
