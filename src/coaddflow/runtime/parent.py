"""A job ends when the Snakemake that started it has ended, in whatever way.

Otherwise a job of a run that was killed (``kill -9``) would go on beside the next run, and its
products could replace those of that run. Only Linux (``/proc``) is supported: on other systems
nothing is watched. Standard library only.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from coaddflow.runtime.threads import join_thread

_SHELLS = {"sh", "bash", "dash"}
"""Snakemake starts scripts through one of these, which outlives it."""

_SECONDS_BETWEEN_LOOKS = 1.0


class ParentWatch:
    """Sends this process SIGTERM, each second, when the process that started it is gone.

    It looks once a second, in a thread, from `start` to `stop`.
    """

    def __init__(self) -> None:
        self._parent = _parent()
        self._thread: threading.Thread | None = None
        self._done = threading.Event()

    def start(self) -> None:
        """Begin to watch, or go on."""
        _watches.add(self)
        if self._parent is not None and self._thread is None:
            self._done.clear()
            arguments = (*self._parent, self._done)
            self._thread = threading.Thread(target=_watch, args=arguments, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread; may be called again, also if SIGTERM came in between."""
        _watches.discard(self)
        self._done.set()
        if self._thread is not None:
            join_thread(self._thread)
        self._thread = None


_watches: set[ParentWatch] = set()
"""Those that watch now."""


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Run a block without threads that watch: a process is best forked while it has one thread."""
    paused = list(_watches)
    try:
        for watch in paused:
            watch.stop()
        yield
    finally:
        for watch in paused:
            watch.start()


def _watch(pid: int, started: str, done: threading.Event) -> None:
    while not done.wait(_SECONDS_BETWEEN_LOOKS):
        found = _read_stat(pid)
        if found is None or found[2] != started:
            # again and again: a job that is ending hears only the first (`runtime.log`)
            os.kill(os.getpid(), signal.SIGTERM)


def _parent() -> tuple[int, str] | None:
    """Return id and start time of the first process above this one that is not a shell."""
    pid = os.getppid()
    while pid > 1:
        found = _read_stat(pid)
        if found is None:
            return None
        name, parent, started = found
        if name not in _SHELLS:
            return pid, started
        pid = parent
    return None


def _read_stat(pid: int) -> tuple[str, int, str] | None:
    """Return name, parent and start time of a process; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # the name may contain blanks and brackets
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return None if fields[0] in "ZX" else (name, int(fields[1]), fields[19])
