"""What the pool needs of the processes it works with."""

import os
from abc import ABC, abstractmethod
from typing import NamedTuple

from coaddflow.pool.messages import Joined, Message
from coaddflow.pool.packing import Packed


class Replied(NamedTuple):
    """A worker sent an answer."""

    worker: int
    message: Message


class Lost(NamedTuple):
    """A worker is gone, and with it all that it held."""

    worker: int
    reason: str


Event = Joined | Replied | Lost


class Traffic:
    """What the master has sent and received, bytes."""

    def __init__(self) -> None:
        self.piped = 0
        """Copied through pipes, sockets or the network."""
        self.shared = 0
        """Crossed in shared memory."""

    def count(self, piped: int, shared: int = 0) -> None:
        """Count a message."""
        self.piped += piped
        self.shared += shared


class Backend(ABC):
    """Workers, and messages to and from them.

    The pool gives a worker one item at a time. A worker that is gone is reported by `Lost`; the
    one that replaces it by `Joined`, with a number never used before.
    """

    in_this_process = False
    """Functions run in the process of the master."""

    reads_ahead = False
    """Workers are other processes of this machine, and find what the master reads in memory."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    @abstractmethod
    def start(self) -> None:
        """Start the workers, without waiting until they are ready."""

    def prepare(self, packed: Packed) -> Packed:
        """Return what several workers will be sent, in a form that is made only once."""
        return packed

    @abstractmethod
    def send(self, worker: int, message: Message) -> None:
        """Send a message to an idle worker; if the worker is gone, `wait` will say so."""

    @abstractmethod
    def wait(self) -> list[Event]:
        """Wait until something happens, and return what."""

    @abstractmethod
    def close(self, abort: bool) -> None:
        """End the workers: at once if ``abort``, else when they have finished their items."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
