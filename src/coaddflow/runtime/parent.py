"""A job ends when the Snakemake that started it has ended, in whatever way.

Otherwise a job of a run that was killed (``kill -9``) would go on beside the next run, and its
products could replace those of that run. Only Linux (``/proc``) is supported: on other systems
nothing is watched. Standard library only.
"""

import os
import signal
import threading
from pathlib import Path

_SHELLS = {"sh", "bash", "dash"}
"""Snakemake starts scripts through one of these, which outlives it."""

_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_parent() -> threading.Event:
    """Send this process SIGTERM when the process that started it is gone.

    Returns
    -------
    threading.Event
        Ends the watch when it is set: when the work is done.
    """
    done = threading.Event()
    parent = _parent()
    if parent is not None:
        threading.Thread(target=_watch, args=(*parent, done), daemon=True).start()
    return done


def _watch(pid: int, started: str, done: threading.Event) -> None:
    while not done.wait(_SECONDS_BETWEEN_LOOKS):
        found = _read_stat(pid)
        if found is None or found[2] != started:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _parent() -> tuple[int, str] | None:
    """Return id and start time of the first process above this one that is not a shell."""
    pid = os.getppid()
    while pid > 1:
        found = _read_stat(pid)
        if found is None:
            return None
        name, parent, started = found
        if name not in _SHELLS:
            return pid, started
        pid = parent
    return None


def _read_stat(pid: int) -> tuple[str, int, str] | None:
    """Return name, parent and start time of a process; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # the name may contain blanks and brackets
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return None if fields[0] in "ZX" else (name, int(fields[1]), fields[19])
