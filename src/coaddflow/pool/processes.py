"""The backend of worker processes on this machine.

A master without threads forks its workers, which then have what it has imported (`forks`). A fork
of a process with threads may hang: there, and in place of a worker that has died, every worker is
a fresh Python process, which does not run the script of the master again.

No worker outlives the master: each waits, in a thread, for the end of a pipe whose other end only
the master has. The kernel closes that end even if the master is killed.
"""

import contextlib
import json
import os
import platform
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from coaddflow.pool import child as worker_process
from coaddflow.pool.backend import Backend, Event, Joined, Lost, Replied
from coaddflow.pool.channel import Channel
from coaddflow.pool.failure import PoolError
from coaddflow.pool.forks import Fork, can_fork, fork
from coaddflow.pool.memory import Shared
from coaddflow.pool.messages import Message, Stop, from_frames, to_frames
from coaddflow.pool.packing import LARGE, Packed
from coaddflow.runtime.parent import unwatched
from coaddflow.runtime.threads import single_threaded

_START = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(*sys.argv[3:])"
)

_SECONDS_TO_STOP = 5.0
"""Time for workers to end after `Stop`, and again after SIGTERM."""


@dataclass
class _Child:
    """A worker process and the connection to it."""

    process: subprocess.Popen[bytes] | Fork
    channel: Channel
    ready: bool = False


class ProcessBackend(Backend):
    """A number of worker processes."""

    reads_ahead = True

    def __init__(self, workers: int):
        super().__init__()
        self._n_workers = workers
        self._numbers = count()
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._lifeline: tuple[int, int] | None = None

    def start(self) -> None:
        """Start the processes."""
        self._lifeline = os.pipe()
        try:
            with unwatched():
                forked = can_fork()
                for _ in range(self._n_workers):
                    self._start_worker(forked)
        except BaseException:
            self.close(abort=True)
            raise

    def prepare(self, packed: Packed) -> Packed:
        """Put large constants into shared memory, once for all workers."""
        return Packed(
            Shared(packed.data) if len(packed.data) >= LARGE else packed.data,
            [Shared(buffer) for buffer in packed.buffers],
        )

    def send(self, worker: int, message: Message) -> None:
        """Send a message to a worker."""
        with contextlib.suppress(ConnectionError):  # `wait` sees that the worker is gone
            self._children[worker].channel.send(to_frames(message))

    def wait(self) -> list[Event]:
        """Wait for answers and for the end of processes."""
        events: list[Event] = []
        while not events:
            for key, _ in self._selector.select():
                events += self._receive(key.data)
        return events

    def close(self, abort: bool) -> None:
        """End all processes, and free everything."""
        processes = [child.process for child in self._children.values()]
        try:
            if not abort:
                for number in self._children:
                    self.send(number, Message(Stop()))
                wait_for_end(processes, _SECONDS_TO_STOP)
        finally:
            terminate_then_kill(processes, _SECONDS_TO_STOP)
            for child in self._children.values():
                child.channel.close()
            self._children.clear()
            self._selector.close()
            for descriptor in self._lifeline or ():
                os.close(descriptor)
            self._lifeline = None

    def _start_worker(self, forked: bool = False) -> None:
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = (theirs.fileno(), self._lifeline[0])
            arguments = [str(one) for one in (number, *descriptors)]
            process = _start(arguments, descriptors, forked)
        new = _Child(process, Channel(ours, self.traffic))
        self._children[number] = new
        self._selector.register(new.channel, selectors.EVENT_READ, number)

    def _receive(self, number: int) -> list[Event]:
        """Receive from a worker that has sent something or has ended."""
        child = self._children[number]
        try:
            message = from_frames(child.channel.receive())
        except (EOFError, ConnectionError):
            return [self._replace(number)]
        if isinstance(message.head, Joined):
            child.ready = True
            return [message.head]
        return [Replied(number, message)]

    def _replace(self, number: int) -> Lost:
        """Start a worker in place of one that has ended; return how that one ended."""
        child = self._children[number]
        wait_for_end([child.process], _SECONDS_TO_STOP)
        child.process.kill()
        code = child.process.wait()
        self._selector.unregister(child.channel)
        child.channel.close()
        del self._children[number]
        if not child.ready:
            raise PoolError(
                f"a worker process on {platform.node()} {_reason(code)} before it was ready; "
                "its standard error says why"
            )
        self._start_worker()
        return Lost(number, _reason(code))


def _start(
    arguments: Sequence[str], descriptors: Sequence[int], forked: bool
) -> subprocess.Popen[bytes] | Fork:
    """Start a worker, as a fork if that is wanted and there is room for one."""
    if forked:
        with contextlib.suppress(OSError):
            return fork(worker_process.main, arguments, descriptors)
    return start_python(worker_process.__name__, arguments, descriptors)


def start_python(
    module: str, arguments: Sequence[str], descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Start the function ``main`` of a module in a fresh Python process with one thread.

    It gets the arguments, and inherits the file descriptors.
    """
    return subprocess.Popen(  # noqa: S603 - this Python, with fixed arguments
        [sys.executable, "-c", _START, json.dumps(sys.path), module, *arguments],
        env=single_threaded(os.environ),
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
    )


def terminate_then_kill(processes: Sequence[subprocess.Popen[Any] | Fork], seconds: float) -> None:
    """End processes, and kill those that are still there after so many seconds."""
    try:
        for process in processes:
            process.terminate()
        wait_for_end(processes, seconds)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_for_end(processes: Iterable[subprocess.Popen[Any] | Fork], seconds: float) -> None:
    """Wait until processes have ended, all together no longer than this."""
    until = time.monotonic() + seconds
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(until - time.monotonic(), 0.0))


def _reason(code: int) -> str:
    """Return in words how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    hint = "; it probably ran out of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"
