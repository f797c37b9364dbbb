"""Workers that are forks of the master: they have at once what it has imported.

A fresh Python process takes a second for its imports, and opens some thousands of files for them.
A fork of a process that has one thread is safe on Linux. What a worker must not have of its master
is put aside first: open files, handlers of logs and signals, tracing, the state of random numbers
and of floating-point errors, and the ``__main__`` module. It keeps the filters of warnings, and
what the script has changed in modules.
"""

import atexit
import contextlib
import gc
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NoReturn

from coaddflow.runtime.threads import single_threaded

_DESCRIPTORS = "/proc/self/fd"
_THREADS = "/proc/self/task"
_STANDARD_STREAMS = 3
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.05
"""Seconds between looks at a process that is to end."""


class Fork:
    """A process that was forked, with the methods of `subprocess.Popen` that the pool uses."""

    def __init__(self, pid: int):
        self.pid = pid
        self._code: int | None = None

    def terminate(self) -> None:
        """Send SIGTERM, if it has not ended."""
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, if it has not ended."""
        self._send(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code, negative for a signal, when it has ended.

        Raises
        ------
        subprocess.TimeoutExpired
            If it has not ended after ``timeout`` seconds.
        """
        if timeout is None:
            self._look(0)
            return self._code
        until, pause = time.monotonic() + timeout, _SHORTEST_PAUSE
        while self._look(os.WNOHANG) is None:
            left = until - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
        return self._code

    def _send(self, number: int) -> None:
        if self._look(os.WNOHANG) is None:  # else the number may be that of another process
            os.kill(self.pid, number)

    def _look(self, options: int) -> int | None:
        """Return the exit code, if it has ended."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, options)
            except ChildProcessError:  # SIGCHLD is ignored here: nobody knows the code
                self._code = 0
            else:
                self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def can_fork() -> bool:
    """Return whether a fork of this process is safe: on Linux, with one thread."""
    try:
        threads = os.listdir(_THREADS)  # noqa: PTH208 - names, not paths
    except OSError:
        return False
    return sys.platform == "linux" and len(threads) == 1


def fork(main: Callable[..., None], arguments: Sequence[str], descriptors: Collection[int]) -> Fork:
    """Call a function in a fork of this process, which ends with it.

    The fork keeps of all open files these descriptors and the standard streams. SIGINT and SIGTERM
    are held back until the function lets them pass.

    Raises
    ------
    OSError
        If there is no room for another process.
    """
    for stream in filter(None, (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)):
        with contextlib.suppress(ValueError):  # it is closed
            stream.flush()  # else the fork would say it again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _work(main, arguments, descriptors, before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Fork(pid)


def _work(
    main: Callable[..., None],
    arguments: Sequence[str],
    descriptors: Collection[int],
    mask: Iterable[int],
) -> NoReturn:
    """Be a worker, in the fork; never return to what the master was doing."""
    code = 1
    try:
        _forget_master(descriptors)
        signal.pthread_sigmask(signal.SIG_SETMASK, {*mask, signal.SIGINT, signal.SIGTERM})
        main(*arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _forget_master(kept: Collection[int]) -> None:
    """Put aside what a worker must not have of its master, as in a fresh process."""
    _close_all_but(kept)
    atexit._clear()
    gc.freeze()  # objects of the master need no more looks, which would copy their memory
    sys.settrace(None)
    sys.setprofile(None)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(single_threaded({}))
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    logging.captureWarnings(False)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        getattr(logger, "handlers", []).clear()
    if numpy := sys.modules.get("numpy"):
        numpy.seterr(all="warn", under="ignore")
    if random := sys.modules.get("numpy.random"):
        random.seed()


def _close_all_but(kept: Collection[int]) -> None:
    """Let go of files of the master.

    Their numbers stay in use: objects of the master that own them may be finalized here.
    """
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    for name in os.listdir(_DESCRIPTORS):  # noqa: PTH208 - names, not paths
        number = int(name)
        if number < _STANDARD_STREAMS or number in kept or number == nothing:
            continue
        with contextlib.suppress(OSError):  # the one that listed them is closed
            os.fstat(number)
            os.dup2(nothing, number, inheritable=False)
    os.close(nothing)
