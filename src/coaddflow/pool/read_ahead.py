"""Files of the items that come next are read while the workers are busy with others.

On a shared disk that answers slowly a worker otherwise computes, waits for its files, and computes
again. The bytes are read and dropped: the system keeps them in its own memory, where the worker
finds them. They are really read, since how much of a request to read ahead (posix_fadvise(2)) a
system follows depends on settings of each disk. Standard library only.
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

from coaddflow.runtime.threads import join_thread

_AT_ONCE = 1 << 20
"""Bytes that are read at a time."""

_SECONDS_AT_ONCE, _BYTES_A_SECOND = 1e-3, 1.5e9
"""Files that took no longer than this, plus their bytes at this rate, were in memory."""

_SECONDS_TO_END = 1.0


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
        self._asked: queue.Queue[tuple[Parts, Callable[[], bool]] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._is_open = True
        self._passed_over, self._to_pass_over = 0, 0

    def ask(self, parts: Parts, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Read what a function returns, as long as it is wanted.

        Both functions are called in the thread. A file that cannot be read is passed over: whoever
        needs it will say so.
        """
        if not self._is_open:
            return
        if self._passed_over < self._to_pass_over:
            self._passed_over += 1
            return
        self._asked.put((parts, is_wanted))
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="read ahead", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Read nothing more; does not wait for what is being read."""
        self._is_open = False
        self._asked.put(None)

    def wait(self) -> None:
        """Wait for the end of the thread, for a second at most: a dead disk may never answer."""
        if self._thread is not None:
            join_thread(self._thread, _SECONDS_TO_END)

    def _work(self) -> None:
        room = bytearray(_AT_ONCE)
        while (asked := self._asked.get()) is not None and self._is_open:
            self._read_all(*asked, room)
            self._asked.task_done()

    def _read_all(self, parts: Parts, is_wanted: Callable[[], bool], room: bytearray) -> None:
        """Read parts of files, and learn from it whether that is worth while."""

        def goes_on() -> bool:
            return self._is_open and is_wanted()

        began, n_bytes = self._clock(), 0
        # damaged files raise anything; who reads them for their pixels says what is wrong
        with contextlib.suppress(Exception):
            for part in parts() if goes_on() else ():
                with contextlib.suppress(OSError):
                    n_bytes += _read(part, room, goes_on)
        if goes_on():
            took = self._clock() - began
            was_there = took <= _SECONDS_AT_ONCE + n_bytes / _BYTES_A_SECOND
            self._to_pass_over = 2 * self._to_pass_over + 1 if was_there else 0
            self._passed_over = 0


def _read(part: FilePart, room: bytearray, goes_on: Callable[[], bool]) -> int:
    """Read a part as long as that goes on; return its bytes."""
    if isinstance(part.file, int):
        return _read_open(part.file, part, room, goes_on)
    if not stat.S_ISREG(Path(part.file).stat().st_mode):
        return 0  # to open a pipe would wait for its other end, and end the wait of others
    descriptor = os.open(part.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read_open(descriptor, part, room, goes_on)
    finally:
        os.close(descriptor)


def _read_open(
    descriptor: int, part: FilePart, room: bytearray, goes_on: Callable[[], bool]
) -> int:
    size = os.fstat(descriptor).st_size
    stop = size if part.stop is None else min(part.stop, size)
    place, whole = part.start, memoryview(room)
    while place < stop and goes_on():
        number = os.preadv(descriptor, [whole[: stop - place]], place)
        if number == 0:
            break
        place += number
    return place - part.start
