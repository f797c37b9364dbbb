"""The backend of MPI ranks: rank 0 is the master, every other rank is a worker.

``mpirun -n 9 python -m coaddflow.pool script.py`` runs the script on rank 0, and eight ranks wait
for the pools that it opens (`run`). All waiting is polling with pauses: MPI's own waiting keeps a
core busy and cannot be interrupted.

MPI does not report that a rank is gone: whoever waits for it waits forever. Each worker therefore
has a TCP connection to the master on which nothing is sent; the kernel closes it when either ends.
"""

import contextlib
import os
import platform
import runpy
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from mpi4py import MPI

from coaddflow.errors import InputError
from coaddflow.pool.backend import Backend, Event, Joined, Replied
from coaddflow.pool.failure import PoolError
from coaddflow.pool.lifeline import Listener, Stopped, connect, end_when, raise_on_sigterm
from coaddflow.pool.messages import Begin, End, Message, Run, Stop, from_frames, to_frames
from coaddflow.pool.worker import WorkerLoop
from coaddflow.runtime.threads import single_threaded

_SIZES, _FRAMES = 1, 2  # tags
_MOST_BYTES = 1 << 30  # per MPI message: counts are 32 bit in many versions
_SHORTEST_PAUSE, _LONGEST_PAUSE, _PAUSE_IN_TRANSFER = 2e-5, 1e-3, 5e-5
_SECONDS_TO_CONNECT = 60.0
_SECONDS_TO_STOP = 5.0


def send_frames(comm: MPI.Comm, rank: int, frames: Sequence[Any], check: Callable[[], None]) -> int:
    """Send frames to a rank; return the number of bytes. `check` is called while waiting."""
    sizes = struct.pack(f"<{len(frames)}q", *(memoryview(frame).nbytes for frame in frames))
    requests = [comm.Isend([sizes, MPI.BYTE], rank, _SIZES)]
    for frame in frames:
        requests += [comm.Isend([part, MPI.BYTE], rank, _FRAMES) for part in _parts(frame)]
    _finish(requests, check)
    return len(sizes) + sum(memoryview(frame).nbytes for frame in frames)


def receive_frames(
    comm: MPI.Comm, status: MPI.Status, check: Callable[[], None]
) -> list[bytearray]:
    """Receive the frames of a message that `_probe` has found."""
    rank, sizes = status.Get_source(), bytearray(status.Get_count(MPI.BYTE))
    comm.Recv([sizes, MPI.BYTE], rank, _SIZES)
    frames = [bytearray(size) for size in struct.unpack(f"<{len(sizes) // 8}q", sizes)]
    requests = [
        comm.Irecv([part, MPI.BYTE], rank, _FRAMES) for frame in frames for part in _parts(frame)
    ]
    _finish(requests, check)
    return frames


def _parts(frame: Any) -> list[memoryview]:
    """Split a frame into parts that are not too long for MPI."""
    view = memoryview(frame).cast("B")
    return [view[i : i + _MOST_BYTES] for i in range(0, view.nbytes, _MOST_BYTES)]


def _finish(requests: list[MPI.Request], check: Callable[[], None]) -> None:
    while not MPI.Request.Testall(requests):
        check()
        time.sleep(_PAUSE_IN_TRANSFER)


def _probe(comm: MPI.Comm, check: Callable[[], None]) -> MPI.Status:
    """Wait for a message from any rank."""
    status, pause = MPI.Status(), _SHORTEST_PAUSE
    while not comm.Iprobe(MPI.ANY_SOURCE, _SIZES, status):
        check()
        time.sleep(pause)
        pause = min(2.0 * pause, _LONGEST_PAUSE)
    return status


class World:
    """The other ranks of a communicator, as rank 0 knows them."""

    def __init__(self, comm: MPI.Comm):
        self.comm = comm
        self.broken = False
        """A rank is gone or does not stop: the program can only be aborted."""
        self.hosts = dict(enumerate(comm.gather((os.getpid(), platform.node()))))
        self._lifelines = _accept_lifelines(comm)

    def check(self) -> None:
        """Raise PoolError if a rank is gone."""
        for rank, connection in self._lifelines.items():
            with contextlib.suppress(BlockingIOError):
                gone = True
                with contextlib.suppress(ConnectionError):
                    gone = not connection.recv(1)
                if gone:
                    self.broken = True
                    process, host = self.hosts[rank]
                    raise PoolError(
                        f"rank {rank} (process {process} on {host}) is gone: it was killed (out "
                        "of memory, time limit) or its node was lost. Run the job again"
                    )

    def end(self) -> None:
        """Let all ranks end."""
        for connection in self._lifelines.values():
            connection.sendall(b".")
        for rank in self._lifelines:
            send_frames(self.comm, rank, to_frames(Message(End())), lambda: None)
        for connection in self._lifelines.values():
            connection.close()


_world: World | None = None


def _accept_lifelines(comm: MPI.Comm) -> dict[int, socket.socket]:
    """Accept the connections of all other ranks."""
    lifelines: dict[int, socket.socket] = {}
    with Listener(backlog=comm.size) as listener:
        comm.bcast(listener.address)
        while len(lifelines) < comm.size - 1:
            rank, connection = listener.accept(_SECONDS_TO_CONNECT)
            connection.setblocking(False)
            lifelines[rank] = connection
    return lifelines


def _connect_lifeline(comm: MPI.Comm) -> socket.socket:
    """Connect to rank 0."""
    return connect(comm.bcast(None), comm.rank)


class MpiBackend(Backend):
    """The ranks of an MPI program that was started with ``python -m coaddflow.pool``.

    ``workers`` is how many to use; None for all but the first.
    """

    def __init__(self, workers: int | None):
        super().__init__()
        if _world is None:
            raise InputError(
                "the pool backend 'mpi' needs a program that was started with MPI",
                remedy="start it with: mpirun -n RANKS python -m coaddflow.pool SCRIPT",
            )
        if _world.broken:
            raise PoolError("a rank is gone or does not stop: the program must end")
        n_ranks = _world.comm.size - 1
        if n_ranks < (workers or 1):
            raise InputError(
                f"there are {n_ranks} MPI ranks for {workers or 1} workers",
                remedy="start one more rank than workers: rank 0 is the master",
            )
        self._world = _world
        self._ranks = range(1, (workers or n_ranks) + 1)
        self._busy: set[int] = set()
        self._events: list[Event] = []

    def start(self) -> None:
        """Open a pool on the ranks."""
        for rank in self._ranks:
            self._send(rank, Message(Begin(rank, tuple(sys.path))))
            self._events.append(Joined(rank, *self._world.hosts[rank]))

    def send(self, worker: int, message: Message) -> None:
        """Send a message to a rank."""
        if isinstance(message.head, Run):
            self._busy.add(worker)
        self._send(worker, message)

    def wait(self) -> list[Event]:
        """Wait for an answer; raise PoolError if a rank is gone."""
        if not self._events:
            self._events.append(self._next_reply(self._world.check))
        events, self._events = self._events, []
        return events

    def close(self, abort: bool) -> None:
        """Let the ranks drop the pool, and wait for the next one."""
        until = time.monotonic() + _SECONDS_TO_STOP

        def check() -> None:
            self._world.check()
            if time.monotonic() > until:
                self._world.broken = True
                raise PoolError("some MPI ranks do not stop")

        try:
            while self._busy:
                self._next_reply(check)
            for rank in self._ranks:
                self._send(rank, Message(Stop()))
        except PoolError:
            if not abort:
                raise

    def _next_reply(self, check: Callable[[], None]) -> Replied:
        status = _probe(self._world.comm, check)
        frames = receive_frames(self._world.comm, status, self._world.check)
        rank = status.Get_source()
        self._busy.discard(rank)
        self.traffic.count(sum(map(len, frames)))
        return Replied(rank, from_frames(frames))

    def _send(self, rank: int, message: Message) -> None:
        frames = to_frames(message)
        self.traffic.count(send_frames(self._world.comm, rank, frames, self._world.check))


def run(arguments: Sequence[str]) -> int:
    """Run a script on rank 0; the other ranks are the workers of the pools that it opens.

    The arguments are a script and its arguments, or ``-m``, a module and its arguments. Returns
    the exit code, except when a rank is gone: then MPI ends the program.
    """
    global _world  # noqa: PLW0603 - there is one world per process, as in MPI
    comm = MPI.COMM_WORLD.Dup()
    raise_on_sigterm()
    if comm.rank > 0:
        return _serve(comm)
    _world = World(comm)
    code = _run_script(list(arguments))
    if _world.broken:
        sys.stdout.flush()
        sys.stderr.flush()
        comm.Abort(code or 1)
    _world.end()
    return code


def _run_script(arguments: list[str]) -> int:
    """Run a script or module as Python would, and return its exit code."""
    try:
        if arguments[0] == "-m":
            sys.argv[:] = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = arguments
            sys.path[0] = os.path.dirname(os.path.realpath(arguments[0]))  # noqa: PTH120
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as error:
        if isinstance(error.code, int | None):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except Stopped:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve(comm: MPI.Comm) -> int:
    """Be a worker until the program ends."""
    os.environ.update(single_threaded({}))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    comm.gather((os.getpid(), platform.node()))
    lifeline = _connect_lifeline(comm)
    end_when(lambda: not lifeline.recv(1))
    loop = None
    try:
        while True:
            message = from_frames(receive_frames(comm, _probe(comm, _nothing), _nothing))
            if isinstance(message.head, End):
                return 0
            if isinstance(message.head, Begin):
                sys.path += [path for path in message.head.paths if path not in sys.path]
                loop = WorkerLoop(message.head.worker, capture_log=True)
            elif isinstance(message.head, Stop):
                loop = None
            elif (reply := loop.handle(message)) is not None:
                send_frames(comm, 0, to_frames(reply), _nothing)
            del message
            reply = None
    except Stopped:
        # finalizing MPI would wait for the other ranks
        os._exit(128 + signal.SIGTERM)


def _nothing() -> None:
    pass
