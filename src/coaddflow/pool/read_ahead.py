"""Files of the items that come next are read while the workers are busy with others.

On a shared disk that answers slowly a worker otherwise computes, waits for its files, and computes
again. Nothing is kept here: the system is asked to read into its own memory, where the worker
finds the bytes. Standard library only.

References
----------
.. [1] posix_fadvise(2), Linux man-pages (POSIX_FADV_WILLNEED).
"""

import contextlib
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

_SLICE = 4 << 20
"""Bytes that are asked for at a time: few enough to stop soon, many for one answer of a server."""

_SECONDS_AT_ONCE, _BYTES_A_SECOND = 1e-3, 4e9
"""What takes no longer, and as much longer as these bytes need, was in memory already."""


class FilePart(NamedTuple):
    """Bytes of a file; to its end by default."""

    file: str | os.PathLike[str] | int
    """Its path, or the descriptor of one that stays open."""
    start: int = 0
    stop: int | None = None


Parts = Callable[[], Iterable[FilePart]]


class ReadAhead:
    """Reads parts of files into the memory of the system, in a thread, one after the other.

    Where files are in memory already, or the disk is as fast, it would only open them once more:
    it then passes over one request, after the next such one three, then seven, and so on.

    Parameters
    ----------
    clock : callable
        Gives the time, s.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: queue.Queue[Parts | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._is_open = hasattr(os, "posix_fadvise")
        self._passed_over, self._to_pass_over = 0, 0

    def ask(self, parts: Parts) -> None:
        """Read what a function returns; it is called in the thread.

        A file that cannot be read is passed over: whoever needs it will say so.
        """
        if not self._is_open:
            return
        if self._passed_over < self._to_pass_over:
            self._passed_over += 1
            return
        self._asked.put(parts)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread; what has not been read is left."""
        self._is_open = False
        self._asked.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        while (parts := self._asked.get()) is not None and self._is_open:
            began = self._clock()
            n_bytes = self._read_all(parts)
            took = self._clock() - began
            was_there = took <= _SECONDS_AT_ONCE + n_bytes / _BYTES_A_SECOND
            self._to_pass_over = 2 * self._to_pass_over + 1 if was_there else 0
            self._passed_over = 0
            self._asked.task_done()

    def _read_all(self, parts: Parts) -> int:
        """Read parts of files; return their bytes."""
        n_bytes = 0
        # damaged files raise anything; who reads them for their pixels says what is wrong
        with contextlib.suppress(Exception):
            for part in parts():
                with contextlib.suppress(OSError):
                    n_bytes += self._read(part)
        return n_bytes

    def _read(self, part: FilePart) -> int:
        if isinstance(part.file, int):
            return self._read_open(part.file, part)
        if not stat.S_ISREG(Path(part.file).stat().st_mode):
            return 0  # to open a pipe would wait for its other end, and end the wait of others
        descriptor = os.open(part.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self._read_open(descriptor, part)
        finally:
            os.close(descriptor)

    def _read_open(self, descriptor: int, part: FilePart) -> int:
        size = os.fstat(descriptor).st_size
        stop = size if part.stop is None else min(part.stop, size)
        for start in range(part.start, stop, _SLICE):
            if not self._is_open:
                return 0
            length = min(_SLICE, stop - start)
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)
            # waits until the slice is there, so that a slow disk has few requests at a time
            os.pread(descriptor, 1, start + length - 1)
        return max(stop - part.start, 0)
