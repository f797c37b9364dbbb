"""No worker outlives its master: a thread waits for the end of a connection to the master."""

import os
import signal
import threading
import time
from collections.abc import Callable

_SECONDS_TO_STOP = 3.0


class Stopped(BaseException):
    """SIGTERM: leave the item, but clean up after it."""


def raise_on_sigterm() -> None:
    """Let SIGTERM raise `Stopped`, so that files that are being written are removed."""
    signal.signal(signal.SIGTERM, _raise_stopped)


def _raise_stopped(_number: int, _frame: object) -> None:
    raise Stopped


def end_when(master_is_gone: Callable[[], bool]) -> None:
    """End this process when a function that waits for the end of the master returns True.

    Parameters
    ----------
    master_is_gone : callable
        Waits. Returns False if the connection ended because all work is done.
    """

    def watch() -> None:
        if not master_is_gone():
            return
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SECONDS_TO_STOP)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def pipe_has_ended(descriptor: int) -> Callable[[], bool]:
    """Return a function that waits until the other end of a pipe is closed."""

    def wait() -> bool:
        os.read(descriptor, 1)
        return True

    return wait
