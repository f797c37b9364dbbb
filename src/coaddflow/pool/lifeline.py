"""No worker outlives its master: a thread waits until a connection to the master is closed."""

import os
import signal
import threading
import time
from collections.abc import Callable

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

    Parameters
    ----------
    master_is_gone : callable
        Waits for the end of the connection to the master, and returns False if it was closed
        because all work is done.
    """

    def watch() -> None:
        if not master_is_gone():
            return
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_SECONDS_TO_STOP)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def pipe_has_ended(descriptor: int) -> Callable[[], bool]:
    """Return a function for `end_when` that waits until the other end of a pipe is closed."""

    def wait() -> bool:
        os.read(descriptor, 1)
        return True

    return wait
