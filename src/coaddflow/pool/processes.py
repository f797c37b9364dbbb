"""The backend of worker processes on this machine.

Every worker is a fresh Python process: a fork of a process with threads may hang, and a fresh one
reads the number of threads before it loads a numerical library. It does not run the script of
the master again.

No worker outlives the master: each waits, in a thread of its own, for the end of a pipe of which
the master alone has the other end. The kernel closes that end even if the master is killed.
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
from collections.abc import Sequence
from itertools import count

from coaddflow.pool.backend import Backend, Event, Joined, Lost, Replied
from coaddflow.pool.channel import Channel
from coaddflow.pool.failure import PoolError
from coaddflow.pool.memory import Shared
from coaddflow.pool.messages import Hello, Message, Stop, from_frames, to_frames
from coaddflow.pool.packing import LARGE, Packed
from coaddflow.runtime.threads import single_threaded

_START = (
    "import importlib, json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main(*sys.argv[3:])"
)

_SECONDS_TO_STOP = 5.0
"""Time for a worker that was told to stop, and one that was sent SIGTERM."""


class _Child:
    """A worker process and the connection to it."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel):
        self.process = process
        self.channel = channel
        self.ready = False


class ProcessBackend(Backend):
    """Worker processes.

    Parameters
    ----------
    workers : int
        How many.
    """

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
            for _ in range(self._n_workers):
                self._launch()
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
        with contextlib.suppress(ConnectionError):  # its end is seen by `wait`
            self._children[worker].channel.send(to_frames(message))

    def wait(self) -> list[Event]:
        """Wait for answers and for the end of processes."""
        events: list[Event] = []
        while not events:
            for key, _ in self._selector.select():
                events += self._hear(key.data)
        return events

    def close(self, abort: bool) -> None:
        """End all processes."""
        try:
            if not abort:
                for number in self._children:
                    self.send(number, Message(Stop()))
                self._await_end()
            for child in self._children.values():
                if child.process.poll() is None:
                    child.process.terminate()
            self._await_end()
        finally:
            self._end_without_mercy()

    def _end_without_mercy(self) -> None:
        """Kill what still runs, and free everything."""
        for child in self._children.values():
            if child.process.poll() is None:
                child.process.kill()
            child.process.wait()
            child.channel.close()
        self._children.clear()
        self._selector.close()
        for descriptor in self._lifeline or ():
            os.close(descriptor)
        self._lifeline = None

    def _await_end(self) -> None:
        """Give the processes some time to end."""
        until = time.monotonic() + _SECONDS_TO_STOP
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(until - time.monotonic(), 0.0))

    def _launch(self) -> None:
        """Start one worker process."""
        number = next(self._numbers)
        ours, theirs = socket.socketpair()
        with theirs:
            numbers = [str(number), str(theirs.fileno()), str(self._lifeline[0])]
            process = start_python(
                "coaddflow.pool.child", numbers, (theirs.fileno(), self._lifeline[0])
            )
        child = _Child(process, Channel(ours, self.traffic))
        self._children[number] = child
        self._selector.register(child.channel, selectors.EVENT_READ, number)

    def _hear(self, number: int) -> list[Event]:
        """Receive from a worker that has sent something or has ended."""
        child = self._children[number]
        try:
            message = from_frames(child.channel.receive())
        except (EOFError, ConnectionError):
            return self._bury(number)
        if isinstance(message.head, Hello):
            child.ready = True
            return [Joined(number, message.head.process, message.head.host)]
        return [Replied(number, message)]

    def _bury(self, number: int) -> list[Event]:
        """Tell how a worker ended, and start one in its place."""
        child = self._children[number]
        try:
            child.process.wait(_SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
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
        self._launch()
        return [Lost(number, _reason(code))]


def start_python(
    module: str, arguments: Sequence[str], descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    """Start the function ``main`` of a module in a fresh Python process with one thread.

    Parameters
    ----------
    module : str
        The module.
    arguments : sequence of str
        What its ``main`` is called with.
    descriptors : sequence of int
        File descriptors that the process shall have.
    """
    return subprocess.Popen(  # noqa: S603 - this Python, with fixed arguments
        [sys.executable, "-c", _START, json.dumps(sys.path), module, *arguments],
        env=single_threaded(os.environ),
        stdin=subprocess.DEVNULL,
        pass_fds=descriptors,
    )


def _reason(code: int) -> str:
    """Return in words how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory, or by hand)" if -code == signal.SIGKILL else ""
    return f"was ended by {name}{hint}"
