"""What the pool needs of the processes it works with."""

import importlib
import os
from abc import ABC, abstractmethod
from types import ModuleType
from typing import NamedTuple

from coaddflow.errors import InputError
from coaddflow.pool.messages import Message
from coaddflow.pool.packing import Packed

BACKENDS = ("serial", "processes", "mpi", "dask")


class Joined(NamedTuple):
    """A worker is ready."""

    worker: int
    process: int
    host: str


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
    """What has been sent and received by the master.

    Attributes
    ----------
    messages : int
        Number of messages.
    piped : int
        Bytes that were copied through pipes, sockets or the network.
    shared : int
        Bytes that crossed in shared memory.
    """

    def __init__(self) -> None:
        self.messages = self.piped = self.shared = 0


class Backend(ABC):
    """Workers, and messages to and from them.

    The pool gives a worker one item at a time. A worker that is gone is reported by `Lost`; the
    one that replaces it by `Joined`, with a number never used before.
    """

    in_this_process = False
    """Functions run in the process of the master."""

    def __init__(self) -> None:
        self.traffic = Traffic()

    @abstractmethod
    def start(self) -> None:
        """Start the workers, without waiting until they are ready."""

    def prepare(self, packed: Packed) -> Packed:
        """Return what will be sent to several workers in a form that is made only once."""
        return packed

    @abstractmethod
    def send(self, worker: int, message: Message) -> None:
        """Send a message to a worker that has nothing to do; if it is gone, `wait` will tell."""

    @abstractmethod
    def wait(self) -> list[Event]:
        """Wait until something happens, and return what."""

    @abstractmethod
    def close(self, abort: bool) -> None:
        """End the workers: at once if ``abort``, else as soon as they have done what they have."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_backend(name: str, workers: int | None, address: str | None) -> Backend:
    """Return a backend; its packages are imported now.

    Parameters
    ----------
    name : {"serial", "processes", "mpi", "dask"}
        Which.
    workers : int or None
        Number of workers; None for what there is.
    address : str or None
        Scheduler of dask, or its scheduler file.

    Raises
    ------
    InputError
        If there is no such backend, its packages are not installed, or it does not take these
        arguments.
    """
    if name not in BACKENDS:
        raise InputError(
            f"there is no pool backend {name!r}", remedy=f"choose one of {', '.join(BACKENDS)}"
        )
    if workers is not None and workers < 1:
        raise InputError(f"a pool cannot have {workers} workers", remedy="give 1 or more")
    if address is not None and name != "dask":
        raise InputError(f"the pool backend {name!r} takes no address", remedy="leave it out")
    if name == "serial":
        from coaddflow.pool.serial import SerialBackend

        return SerialBackend()
    if name == "processes":
        from coaddflow.pool.processes import ProcessBackend

        return ProcessBackend(workers or available_cores())
    if name == "mpi":
        return load_mpi().MpiBackend(workers)
    return _load("dask").DaskBackend(workers, address)


def load_mpi() -> ModuleType:
    """Return the module of the MPI backend.

    Raises
    ------
    InputError
        If mpi4py or an MPI library is not installed.
    """
    return _load("mpi")


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"coaddflow.pool.{name}")
    except (ImportError, RuntimeError) as error:  # mpi4py without MPI library: RuntimeError
        raise InputError(
            f"the pool backend {name!r} cannot be loaded: {error}",
            remedy=f"install what it needs: pip install 'coaddflow[{name}]'",
        ) from error
