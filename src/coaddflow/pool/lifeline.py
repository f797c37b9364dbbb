"""No worker outlives its master: a thread waits until a connection to the master is closed.

Where master and worker may be on different nodes this is a TCP connection. Both ends prove that
they know the key of the job, by the challenge of `multiprocessing.connection` (HMAC), before the
connection counts for anything. Nothing is sent on it but one message that all is done.
"""

import contextlib
import os
import platform
import queue
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import NamedTuple, Self

_SECONDS_TO_CONNECT = 60.0
_SECONDS_TO_STOP = 3.0
_SECONDS_TO_PROVE = 10.0
_MOST_UNPROVEN = 32
"""Strangers that may be unproven at a time beside the workers; more are closed at once."""
_RANK = struct.Struct("<q")


class Stopped(BaseException):
    """SIGTERM was received: give up the item, but clean up after it."""


def raise_on_sigterm() -> None:
    """Let SIGTERM raise `Stopped`, so that unfinished files are removed; ignore a second one."""
    signal.signal(signal.SIGTERM, _raise_stopped)


def _raise_stopped(number: int, _frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Stopped


def end_when(master_is_gone: Callable[[], bool]) -> None:
    """End this process when the master is gone.

    ``master_is_gone`` waits for the end of the connection to the master. It returns False if that
    was closed because all work is done.
    """

    def watch() -> None:
        if not master_is_gone():
            return
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SECONDS_TO_STOP)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


class Address(NamedTuple):
    """Where a `Listener` listens, and the key that it expects."""

    host: str
    port: int
    key: str
    """Hexadecimal. It is handed over in a file that only the owner can read, or by MPI, and never
    on a command line."""


class Listener:
    """Accepts the connections of workers, in a ``with`` block, which closes them at its end.

    It listens on all interfaces, since MPI decides on which nodes the workers are. A stranger that
    connects is asked to prove that it knows the key, learns nothing, and delays nobody.

    Parameters
    ----------
    backlog : int
        How many workers may connect at the same time.
    """

    def __init__(self, backlog: int = 1):
        self._key = secrets.token_bytes(32)
        self._server = socket.create_server(("", 0), backlog=backlog)
        # all workers may come at the same moment
        self._unproven = threading.BoundedSemaphore(_MOST_UNPROVEN + backlog)
        self._accepted: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: list[socket.socket] | None = []
        """Connections that nobody has asked for yet; None: it is closed."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, name="listener", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # ends the waiting of the thread
        self._server.close()
        with self._lock:
            connections, self._open = self._open, None
        for connection in connections:
            connection.close()

    @property
    def address(self) -> Address:
        """What a worker needs to connect."""
        return Address(platform.node(), self._server.getsockname()[1], self._key.hex())

    def accept(self, timeout: float) -> tuple[int, socket.socket]:
        """Return the rank and the connection of the next worker that has proved itself.

        The connection is the caller's to close.

        Raises
        ------
        TimeoutError
            If there is none for so many seconds.
        """
        try:
            rank, connection = self._accepted.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError(f"no worker connected for {timeout:.0f} s") from None
        with self._lock:
            self._open.remove(connection)
        return rank, connection

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return  # closed
            if not self._unproven.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._ask, args=(connection,), daemon=True).start()

    def _ask(self, connection: socket.socket) -> None:
        """Keep a connection if the other end knows the key."""
        try:
            with _messages(connection) as messages:
                deliver_challenge(messages, self._key)
                answer_challenge(messages, self._key)
                (rank,) = _RANK.unpack(messages.recv_bytes(_RANK.size))
            keep_alive(connection)
            self._keep(rank, connection)
        except (AuthenticationError, OSError, EOFError, ValueError, struct.error):
            connection.close()
        finally:
            self._unproven.release()

    def _keep(self, rank: int, connection: socket.socket) -> None:
        """Hand a connection on, unless the listener is closed by now."""
        with self._lock:
            if self._open is None:
                connection.close()
            else:
                self._open.append(connection)
                self._accepted.put((rank, connection))


def connect(address: Address, rank: int) -> socket.socket:
    """Return a connection to the master, perhaps on another node.

    The kernel closes it when the master ends, even if that is killed.

    Parameters
    ----------
    address : Address
        Where the master listens.
    rank : int
        Number by which the master knows this worker.

    Raises
    ------
    OSError
        If nobody answers there, or not in time.
    multiprocessing.AuthenticationError
        If who answers does not know the key.
    """
    host = "127.0.0.1" if address.host == platform.node() else address.host
    connection = socket.create_connection((host, address.port), _SECONDS_TO_CONNECT)
    key = bytes.fromhex(address.key)
    with contextlib.ExitStack() as on_error:
        on_error.callback(connection.close)
        with _messages(connection, _SECONDS_TO_CONNECT) as messages:
            answer_challenge(messages, key)
            deliver_challenge(messages, key)
            messages.send_bytes(_RANK.pack(rank))
        keep_alive(connection)
        on_error.pop_all()
    return connection


@contextlib.contextmanager
def _messages(connection: socket.socket, seconds: float = _SECONDS_TO_PROVE):
    """Give the messages of `multiprocessing` on a socket, none of which may take longer."""
    connection.settimeout(None)  # they read without Python's time limits, so the kernel has to
    no_limit = struct.pack("@ll", 0, 0)
    limit = struct.pack("@ll", int(seconds), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    with Connection(os.dup(connection.fileno())) as messages:
        yield messages
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, no_limit)


def keep_alive(connection: socket.socket) -> None:
    """Notice within a minute that the node at the other end of a connection is down."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def pipe_has_ended(descriptor: int) -> Callable[[], bool]:
    """Return a function for `end_when` that waits until the other end of a pipe is closed."""

    def wait() -> bool:
        os.read(descriptor, 1)
        return True

    return wait
