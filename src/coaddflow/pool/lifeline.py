"""No worker outlives its master: a thread waits until a connection to the master is closed."""

import os
import platform
import signal
import socket
import threading
import time
from collections.abc import Callable

_SECONDS_TO_CONNECT = 60.0
_SECONDS_TO_STOP = 3.0


class Stopped(BaseException):
    """SIGTERM was received: give up the item, but clean up after it."""


def raise_on_sigterm() -> None:
    """Let SIGTERM raise `Stopped`, so that unfinished files are removed."""
    signal.signal(signal.SIGTERM, _raise_stopped)


def _raise_stopped(_number: int, _frame: object) -> None:
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


def connect(host: str, port: int) -> socket.socket:
    """Return a connection to the master, perhaps on another node; nothing is sent on it.

    The kernel closes it when the master ends, even if that is killed.
    """
    address = "127.0.0.1" if host == platform.node() else host
    connection = socket.create_connection((address, port), _SECONDS_TO_CONNECT)
    connection.settimeout(None)
    keep_alive(connection)
    return connection


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
