"""The backend without processes: the master does all items itself, one after the other.

Items and results are packed and unpacked as for other processes: a function cannot change what
belongs to the master, and what cannot be pickled is found here too.
"""

import os
import platform

from coaddflow.pool.backend import Backend, Event, Joined, Replied
from coaddflow.pool.messages import Message
from coaddflow.pool.packing import copied
from coaddflow.pool.worker import WorkerLoop

_WORKER = 0


class SerialBackend(Backend):
    """One worker, which is the master itself."""

    in_this_process = True

    def __init__(self) -> None:
        super().__init__()
        self._loop = WorkerLoop(_WORKER, capture_log=False)
        self._events: list[Event] = []

    def start(self) -> None:
        """Report that the worker is ready."""
        self._events.append(Joined(_WORKER, os.getpid(), platform.node()))

    def send(self, worker: int, message: Message) -> None:
        """Do what the message asks, now."""
        if message.body is not None:
            message = message._replace(body=copied(message.body))
        reply = self._loop.handle(message)
        if reply is not None:
            if reply.body is not None:
                reply = reply._replace(body=copied(reply.body))
            self._events.append(Replied(worker, reply))

    def wait(self) -> list[Event]:
        """Return what happened since the last call."""
        events, self._events = self._events, []
        return events

    def close(self, abort: bool) -> None:
        """Drop all states."""
        self._loop = WorkerLoop(_WORKER, capture_log=False)
