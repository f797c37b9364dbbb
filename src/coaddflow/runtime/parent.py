"""A job ends when the Snakemake that started it has ended, however that ended.

Otherwise a job of a run that was killed (``kill -9``) would go on beside the next run, and its
products could replace those of that run. Looked up in ``/proc``: on other systems than Linux
nothing is watched. Standard library only.
"""

import os
import signal
import threading
from pathlib import Path

_SHELLS = {"sh", "bash", "dash"}
"""Snakemake starts scripts through one of these, which outlives it."""

_SECONDS_BETWEEN_LOOKS = 1.0


def end_with_starter() -> threading.Event:
    """Send this process SIGTERM when the process that started it is gone.

    Returns
    -------
    threading.Event
        To be set when the work is done, which ends the watch.
    """
    done = threading.Event()
    starter = _starter()
    if starter is not None:
        threading.Thread(target=_watch, args=(starter, done), daemon=True).start()
    return done


def _watch(starter: tuple[int, str], done: threading.Event) -> None:
    pid, began = starter
    while not done.wait(_SECONDS_BETWEEN_LOOKS):
        found = _look(pid)
        if found is None or found[2] != began:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _starter() -> tuple[int, str] | None:
    """Return the first process above this one that is no shell: its id, and when it began."""
    pid = os.getppid()
    while pid > 1:
        found = _look(pid)
        if found is None:
            return None
        name, parent, began = found
        if name not in _SHELLS:
            return pid, began
        pid = parent
    return None


def _look(pid: int) -> tuple[str, int, str] | None:
    """Return name, parent and start time of a process; None if it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    # the name may hold blanks and brackets
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return None if fields[0] in "ZX" else (name, int(fields[1]), fields[19])
