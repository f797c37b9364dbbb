"""The backend of dask workers: those of an existing scheduler, or some that are started here.

Each message is a task that is bound to its worker. Workers that are started here spill nothing to
disk; for others that is a setting of theirs (docs/pool.md).

Messages are packed by the pool, not by dask, which does not align the arrays that it receives:
their sums then have other bits. Workers that are started here are not those of
`distributed.LocalCluster`, which runs the script of the master again in each worker.

Who reaches a scheduler or worker of dask can run code as its owner. Those that are started here
therefore speak TLS with a certificate of their own, which both ends must show, and serve no pages.
"""

import contextlib
import ctypes
import json
import logging
import os
import platform
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from itertools import count
from pathlib import Path
from pickle import PickleBuffer
from typing import Any

import distributed

from coaddflow.pool.backend import Backend, Event, Joined, Lost, Replied, available_cores
from coaddflow.pool.failure import PoolError
from coaddflow.pool.messages import Forget, Message, Run, from_frames, to_frames
from coaddflow.pool.packing import LARGE
from coaddflow.pool.processes import start_python, terminate_then_kill
from coaddflow.pool.worker import WorkerLoop

_SECONDS_FOR_FILE = 30.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_BETWEEN_LOOKS_AT_START = 0.05
"""While there are fewer workers than wanted."""
_SECONDS_WITHOUT_WORKERS = 120.0
_SECONDS_TO_STOP = 5.0
_SECONDS_TO_FETCH = 10.0
_ALIGNMENT = 16

WORKER_SETTINGS = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}
"""No pixels are written to disk when memory is short."""


class WithoutPages:
    """A scheduler or worker that does not serve HTTP, which dask lets anybody read."""

    def start_http_server(self, *_: object, **__: object) -> None:
        """Start none."""


class Frames:
    """The frames of a message: dask passes large ones without a copy in its pickle.

    They arrive writable, and aligned as memory of NumPy is.
    """

    def __init__(self, frames: Sequence[Any]):
        self.frames = list(frames)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        """Pickle large frames out of band."""
        frames = [
            PickleBuffer(frame) if memoryview(frame).nbytes >= LARGE else bytes(frame)
            for frame in self.frames
        ]
        return _received, (frames,)

    @property
    def nbytes(self) -> int:
        """Size of all frames, bytes."""
        return sum(memoryview(frame).nbytes for frame in self.frames)


def _received(frames: Sequence[Any]) -> Frames:
    return Frames([frame if _is_aligned(frame) else bytearray(frame) for frame in frames])


def _is_aligned(frame: Any) -> bool:
    """Return whether a frame can be written to and is aligned as memory of NumPy is."""
    if memoryview(frame).readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(frame)) % _ALIGNMENT == 0


# what runs in a dask worker ----------------------------------------------------------------

_loops: dict[str, WorkerLoop] = {}
_lock = threading.Lock()


def _begin(
    pool: str, numbers: dict[str, int], paths: Sequence[str], dask_worker: distributed.Worker
) -> tuple[int, str]:
    """Join a pool, as the worker of the number that belongs to this address."""
    sys.path += [path for path in paths if path not in sys.path]
    _loops[pool] = WorkerLoop(numbers[dask_worker.address], capture_log=True)
    return os.getpid(), platform.node()


def _handle(pool: str, worker: int, messages: Sequence[Frames]) -> Frames | None:
    """Do what messages ask; None if they are for another process."""
    reply = None
    with _lock:
        loop = _loops.get(pool)
        if loop is None or loop.id != worker:
            return None
        for message in messages:
            reply = loop.handle(from_frames(message.frames))
    return None if reply is None else Frames(to_frames(reply))


def _end(pool: str) -> None:
    """Leave a pool."""
    _loops.pop(pool, None)


# what runs in the master -------------------------------------------------------------------


class DaskBackend(Backend):
    """Workers of the dask scheduler at an address or in a scheduler file, or of one started here.

    ``workers`` is how many to use; None for all that the scheduler has, or for one per core if
    they are started here.
    """

    def __init__(self, workers: int | None, address: str | None):
        super().__init__()
        self._wanted = workers if address or workers else available_cores()
        self._address = address
        self.reads_ahead = address is None
        self._numbers = count()
        self._addresses: dict[int, str] = {}
        self._futures: dict[int, distributed.Future] = {}
        self._ahead: dict[int, list[Frames]] = {}
        self._done: queue.SimpleQueue[tuple[int, distributed.Future]] = queue.SimpleQueue()
        self._own: _OwnWorkers | None = None
        self._client: distributed.Client | None = None
        self._next_look = 0.0
        self._last_seen = time.monotonic()
        self._pool = f"{platform.node()}-{os.getpid()}-{id(self)}-{time.time_ns()}"

    def start(self) -> None:
        """Connect to the scheduler, or start one with its workers."""
        try:
            target: Any = self._address
            if target is None:
                self._own = _OwnWorkers(self._wanted)
                target = self._own.cluster
            if str(target).endswith(".json"):
                _wait_for_file(Path(target))
            kind = "scheduler_file" if str(target).endswith(".json") else "address"
            self._client = distributed.Client(
                **{kind: target}, direct_to_workers=True, set_as_default=False
            )
        except BaseException as error:
            self.close(abort=True)
            if isinstance(error, OSError):
                raise PoolError(
                    f"no dask scheduler answers at {self._address}. Start it (docs/pool.md), or "
                    "correct parallel.dask_address"
                ) from error
            raise

    def send(self, worker: int, message: Message) -> None:
        """Send a message to a worker; one without an answer is sent along with the next."""
        frames = Frames(to_frames(message))
        self.traffic.count(frames.nbytes)
        if not isinstance(message.head, Run | Forget):
            self._ahead.setdefault(worker, []).append(frames)
            return
        messages = [*self._ahead.pop(worker, []), frames]
        address = self._addresses[worker]
        arguments = [self._placed(one, address) for one in messages]
        future = self._client.submit(
            *(_handle, self._pool, worker, arguments),
            workers=[address],
            allow_other_workers=False,
            pure=False,
        )
        if isinstance(message.head, Run):
            self._futures[worker] = future
            future.add_done_callback(lambda done: self._done.put((worker, done)))
        else:
            distributed.fire_and_forget(future)

    def wait(self) -> list[Event]:
        """Wait for answers, and for workers that join or leave.

        Raise PoolError if there are no workers for two minutes, or they fail.
        """
        events: list[Event] = []
        while not events:
            if time.monotonic() >= self._next_look:
                events += self._joined_and_left()
                all_here = len(self._addresses) >= (self._wanted or 1)
                pause = _SECONDS_BETWEEN_LOOKS if all_here else _SECONDS_BETWEEN_LOOKS_AT_START
                self._next_look = time.monotonic() + pause
            with contextlib.suppress(queue.Empty):
                pause = 0.0 if events else max(self._next_look - time.monotonic(), 0.001)
                events += self._answer(*self._done.get(timeout=pause))
        return events

    def close(self, abort: bool) -> None:
        """Let the workers drop what they hold; end those that were started here."""
        try:
            if self._client is not None:
                for future in self._futures.values():
                    future.cancel()
                self._futures.clear()
                if self._own is None:
                    workers = list(self._addresses.values())
                    self._client.run(_end, self._pool, workers=workers, on_error="ignore")
                self._client.close(timeout=_SECONDS_TO_STOP)
        finally:
            if self._own is not None:
                self._own.close()

    def _placed(self, frames: Frames, address: str) -> Any:
        """Send large frames to a worker directly: the scheduler passes on small tasks only."""
        if frames.nbytes < LARGE:
            return frames
        return self._client.scatter(frames, workers=[address], hash=False, direct=True)

    def _answer(self, worker: int, future: distributed.Future) -> list[Event]:
        """Return the answer of a worker, unless it was given up."""
        if self._futures.get(worker) is not future:
            return []
        if future.status == "error" and not _is_loss(future.exception()):
            raise PoolError(f"a dask worker fails: {future.exception()}")
        reply = self._fetched(worker, future)
        if reply is None:
            return [self._lost(worker)]
        del self._futures[worker]
        self.traffic.count(reply.nbytes)
        return [Replied(worker, from_frames(reply.frames))]

    def _fetched(self, worker: int, future: distributed.Future) -> Frames | None:
        """Return an answer that is ready; None if its worker is gone or was restarted."""
        while True:
            try:
                return future.result(timeout=_SECONDS_TO_FETCH)
            except TimeoutError:
                # dask would wait forever for a result that was lost with its worker
                if self._addresses[worker] not in self._client.nthreads():
                    return None
            except (OSError, CancelledError, distributed.KilledWorker):
                return None

    def _joined_and_left(self) -> list[Event]:
        """Return which workers are gone and which are ready."""
        if self._own is not None:
            self._own.replace_dead()
        present = set(self._client.nthreads())
        gone = [number for number, address in self._addresses.items() if address not in present]
        events: list[Event] = [self._lost(number) for number in gone]
        new = sorted(present - set(self._addresses.values()))
        if self._wanted is not None:
            new = new[: self._wanted - len(self._addresses)]
        events += self._join(new) if new else []
        if self._addresses:
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > _SECONDS_WITHOUT_WORKERS:
            raise PoolError(f"the dask scheduler has no workers ({self._address or 'own'})")
        return events

    def _join(self, new: list[str]) -> list[Event]:
        """Let workers join the pool."""
        numbers = {address: next(self._numbers) for address in new}
        arguments = (self._pool, numbers, sys.path)
        found = self._client.run(_begin, *arguments, workers=new, on_error="return")
        events: list[Event] = []
        for address, answer in found.items():
            if isinstance(answer, OSError):
                continue  # it is gone again
            if isinstance(answer, Exception):
                raise PoolError(f"the dask worker {address} fails: {answer}")
            self._addresses[numbers[address]] = address
            events.append(Joined(numbers[address], *answer))
        return events

    def _lost(self, number: int) -> Event:
        address = self._addresses.pop(number)
        future = self._futures.pop(number, None)
        if future is not None:
            future.cancel()
        self._ahead.pop(number, None)
        return Lost(number, f"has left the dask scheduler ({address})")


def _is_loss(error: BaseException | None) -> bool:
    """Return whether an exception of dask says that a worker is gone."""
    return isinstance(error, distributed.KilledWorker | OSError)


def _wait_for_file(path: Path) -> None:
    """Wait for the file of a scheduler that has just been started; raise FileNotFoundError."""
    end = time.monotonic() + _SECONDS_FOR_FILE
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(str(path))
        time.sleep(0.2)


class _Scheduler(WithoutPages, distributed.Scheduler):
    pass


class _OwnWorkers:
    """A scheduler in this process, and worker processes that end with it."""

    def __init__(self, n_workers: int):
        self._lifeline = os.pipe()
        self._logger = logging.getLogger("distributed")
        self._log_level = self._logger.level
        self._logger.setLevel(logging.CRITICAL)  # the pool reports what matters
        security = distributed.Security.temporary()
        self._certificate = json.dumps([security.tls_worker_cert, security.tls_worker_key]).encode()
        options = {"host": "127.0.0.1", "protocol": "tls://", "security": security}
        self.cluster = distributed.SpecCluster(
            scheduler={"cls": _Scheduler, "options": options | {"dashboard": False}},
            security=security,
            silence_logs=False,
        )
        self._processes = [self._start() for _ in range(n_workers)]

    def replace_dead(self) -> None:
        """Start a worker in place of each that is gone."""
        for i, process in enumerate(self._processes):
            if process.poll() is not None:
                self._processes[i] = self._start()

    def close(self) -> None:
        """End them all."""
        try:
            terminate_then_kill(self._processes, _SECONDS_TO_STOP)
            self.cluster.close(timeout=_SECONDS_TO_STOP)
        finally:
            for descriptor in self._lifeline:
                os.close(descriptor)
            self._logger.setLevel(self._log_level)

    def _start(self) -> subprocess.Popen[bytes]:
        read, write = os.pipe()
        try:
            with os.fdopen(write, "wb") as stream:
                stream.write(self._certificate)
            descriptors = (self._lifeline[0], read)
            return start_python(
                "coaddflow.pool.dask_child",
                [self.cluster.scheduler_address, *map(str, descriptors)],
                descriptors,
            )
        finally:
            os.close(read)
