"""What goes wrong in workers, for the tests of the exposure job; workers import this module."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from coaddflow.calexp.job import CcdFiles


@dataclass(frozen=True)
class DeadlyFiles(CcdFiles):
    """Files of a CCD that end the process that asks for one of them, a number of times.

    Attributes
    ----------
    master : int
        The process that lives.
    deadly : str
        The file that must not be asked for: "raw" (when the CCD is read), "calibs" (when it is
        measured) or "calexp" (when it is written).
    traces : str
        A folder in which each death leaves a trace.
    deaths : int
        How often.
    """

    master: int = 0
    deadly: str = ""
    traces: str = ""
    deaths: int = 1

    def __getattribute__(self, name):
        get = super().__getattribute__
        if name in ("raw", "calibs", "calexp") and name == get("deadly"):
            _die(get("master"), get("traces"), get("deaths"))
        return get(name)


class BuggyFiles(CcdFiles):
    """Files of a CCD with a mistake in the program."""

    def __getattribute__(self, name):
        if name == "calibs":
            raise AttributeError("'NoneType' object has no attribute 'mask'")
        return super().__getattribute__(name)


def _die(master, traces, deaths):
    if os.getpid() == master:
        return
    for number in range(deaths):
        try:
            (Path(traces) / str(number)).mkdir(parents=True)
        except FileExistsError:
            continue
        os.kill(os.getpid(), signal.SIGKILL)
