"""Threads: one for numerical libraries, since workers run in parallel; and the end of others.

Standard library only.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def single_threaded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which numerical libraries start one thread."""
    return {**environment, **dict.fromkeys(THREAD_VARIABLES, "1")}


def join_thread(thread: threading.Thread, seconds: float | None = None) -> None:
    """Wait for a thread that ends, until the system knows of it as well.

    Python may see its end before; a process is best forked when it has one thread.

    Parameters
    ----------
    thread : Thread
        It may not have been started, if a signal came in between.
    seconds : float, optional
        The longest time to wait; without it only that for the system, a second, is limited.
    """
    if thread.ident is None:
        return
    thread.join(seconds)
    until = time.monotonic() + 1.0
    listed = Path(f"/proc/self/task/{thread.native_id}")
    while not thread.is_alive() and listed.exists() and time.monotonic() < until:
        time.sleep(0.001)
