"""Workers that are forks of the master: they have at once what it has imported.

A fresh Python process takes a second for its imports, and opens some thousands of files for them.
A fork of a process that has one thread is safe on Linux. What a worker must not have of its master
is put aside first: open files and sockets, its log, its signals and its ``__main__`` module.
"""

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from collections.abc import Collection, Iterator, Sequence

from coaddflow.runtime.threads import single_threaded

_DESCRIPTORS = "/proc/self/fd"
_THREADS = "/proc/self/task"
_STANDARD_STREAMS = 3
_FORKED = {signal.SIGINT, signal.SIGTERM}
"""Signals that are held back while a fork has the handlers of its master."""


class Fork:
    """A process that was forked, with the methods of `subprocess.Popen` that the pool uses."""

    def __init__(self, process: multiprocessing.Process):
        self._process = process
        self.pid = process.pid

    def terminate(self) -> None:
        """Send SIGTERM, if it has not ended."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal, when it has ended.

        Raises
        ------
        subprocess.TimeoutExpired
            If it has not ended after ``timeout`` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired([self._process.name], timeout)
        return self._process.exitcode


def can_fork() -> bool:
    """Return whether a fork of this process is safe: on Linux, with one thread."""
    return sys.platform == "linux" and len(os.listdir(_THREADS)) == 1  # noqa: PTH208


def fork(module: str, arguments: Sequence[str], descriptors: Collection[int]) -> Fork:
    """Start the function ``main`` of a module in a fork of this process.

    It gets the arguments, and keeps of all open files these descriptors and the standard streams.
    """
    context = multiprocessing.get_context("fork")
    others = [number for number in _open_descriptors() if number not in descriptors]
    process = context.Process(
        target=_run_fork, args=(module, arguments, others), name=module, daemon=True
    )
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _FORKED)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return Fork(process)


def _open_descriptors() -> Iterator[int]:
    """Yield the open files of this process, except the standard streams."""
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - it is closed before they are looked at
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            if int(name) >= _STANDARD_STREAMS:
                yield int(name)


def _run_fork(module: str, arguments: Sequence[str], others: Sequence[int]) -> None:
    """Be a worker, in the fork."""
    os.environ.update(single_threaded({}))
    _close(others)
    logging.captureWarnings(False)
    logging.getLogger().handlers.clear()
    # functions of the master's script are refused, as by a fresh process
    sys.modules["__main__"] = types.ModuleType("__main__")
    importlib.import_module(module).main(*arguments)


def _close(descriptors: Sequence[int]) -> None:
    """Let go of files of the master.

    Their numbers stay in use: objects of the master that own them may be finalized here.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in descriptors:
        if number != nothing:
            os.dup2(nothing, number, inheritable=False)
    os.close(nothing)
