"""What the processes cost that a benchmark starts."""

import resource
import time
from collections.abc import Callable
from typing import NamedTuple


class Cost(NamedTuple):
    """Seconds."""

    wall: float
    programs: float
    """CPU time of the programs, of all processes that were started and have ended."""
    system: float
    """CPU time of the system for them."""

    @property
    def cpu(self) -> float:
        """CPU time of both."""
        return self.programs + self.system


def cost_of(function: Callable[[], object]) -> Cost:
    """Return what a call costs, in processes that it starts and waits for."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    function()
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall, after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
