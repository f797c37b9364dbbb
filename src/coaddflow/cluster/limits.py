"""What the nodes of a cluster have, and for how long a job may run.

The cluster is asked once for each partition or queue. What it does not say is no limit.
"""

import functools
import math
import re
import subprocess
import time
from typing import NamedTuple

from coaddflow.cluster.pbs.limits import NO_LIMIT, largest
from coaddflow.cluster.slurm import output_of


class Limits(NamedTuple):
    """The largest job that a partition of Slurm, or a queue of PBS, can run."""

    nodes: tuple[tuple[int, int], ...] = ()
    """Memory (MB, as the cluster counts them) and cores of its nodes, each kind once."""
    runtime: int | None = None
    """Longest time of a job, minutes; None: no limit."""
    where: str = "the cluster"
    """What these are the limits of, for messages."""

    @property
    def cores(self) -> int | None:
        """Most cores of a node; None: unknown."""
        return max((cores for _, cores in self.nodes), default=None)

    def memory(self, cores: int = 1) -> int | None:
        """Return the memory of the largest node that has so many cores, MB; None: unknown.

        If no node has so many cores, the largest counts.
        """
        enough = [memory for memory, found in self.nodes if found >= cores]
        return max(enough or [memory for memory, _ in self.nodes], default=None)


NO_LIMITS = Limits()

SILENCE = 60.0
"""Seconds after which a controller that did not answer is asked again."""

_silent_until = {"time": -math.inf}


def slurm_limits(partition: str = "") -> Limits:
    """Return the limits of a partition of Slurm, or of several (``a,b``).

    While the controller is away there are none; it is asked again after `SILENCE`.

    Parameters
    ----------
    partition : str
        Its name; empty: the default one.
    """
    if time.monotonic() < _silent_until["time"]:
        return NO_LIMITS
    try:
        return _slurm_limits(partition)
    except (OSError, subprocess.SubprocessError):
        _silent_until["time"] = time.monotonic() + SILENCE
        return NO_LIMITS


def ask_again() -> None:
    """Ask Slurm the next time, although it has not answered just now."""
    _silent_until["time"] = -math.inf


@functools.lru_cache(maxsize=64)
def _slurm_limits(partition: str) -> Limits:
    rows = _records("partition")
    wanted = set(filter(None, partition.split(",")))
    chosen = [
        row
        for row in rows
        if (row.get("PartitionName") in wanted if wanted else row.get("Default") == "YES")
    ]
    if not chosen:
        return NO_LIMITS
    names = {row["PartitionName"] for row in chosen}
    nodes = {
        _size(row) for row in _records("node") if names & set(row.get("Partitions", "").split(","))
    }
    most = [_number(row.get("MaxMemPerNode")) for row in chosen]
    if None not in most:
        nodes = {(min(memory, max(filter(None, most))), cores) for memory, cores in nodes}
    times = [minutes_of(row.get("MaxTime", "")) for row in chosen]
    longest = None if None in times else max(filter(None, times), default=None)
    return Limits(tuple(sorted(nodes)), longest, f"partition {','.join(sorted(names))}")


def pbs_limits(queue: str = "") -> Limits:
    """Return the limits of a queue of PBS.

    Parameters
    ----------
    queue : str
        Its name; empty: the default one.
    """
    # nodes come and go while a run lasts
    return _pbs_limits(queue, int(time.monotonic() / SILENCE))


@functools.lru_cache(maxsize=64)
def _pbs_limits(queue: str, _period: int) -> Limits:
    most = largest(queue, SILENCE)
    known = all(memory < NO_LIMIT for memory, _ in most.nodes)
    return Limits(most.nodes if known else (), most.runtime, most.where)


def minutes_of(text: str) -> int | None:
    """Return a time of Slurm, such as ``1-00:30:00``, in minutes; None: no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        return None
    days, first, second, _ = (int(number or 0) for number in match.groups())
    if match[1]:  # days-hours:minutes:seconds
        return 1440 * days + 60 * first + second
    if match[4]:  # hours:minutes:seconds
        return 60 * first + second
    return first  # minutes:seconds


def _size(node: dict[str, str]) -> tuple[int, int]:
    """Return memory and cores of a node that jobs may have."""
    memory = (_number(node.get("RealMemory")) or 0) - (_number(node.get("MemSpecLimit")) or 0)
    return memory, _number(node.get("CPUEfctv")) or _number(node.get("CPUTot")) or 1


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


@functools.lru_cache(maxsize=4)
def _records(what: str) -> list[dict[str, str]]:
    """Return what Slurm says of all partitions or nodes."""
    text = output_of(["scontrol", "show", what, "--oneliner"])
    # values with blanks, such as of Reason, are of no interest
    return [dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line)) for line in text.splitlines() if line]
