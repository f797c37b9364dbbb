"""The backend without processes: everything happens in the master, one item after the other.

Items and results are packed and unpacked as for other processes, so that a function can no more
change what belongs to the master here than there, and what cannot be sent is found here too.
"""

import os
import platform

from coaddflow.pool.backend import Backend, Event, Joined, Replied
from coaddflow.pool.messages import Message
from coaddflow.pool.packing import copied
from coaddflow.pool.worker import Servant

_WORKER = 0


class SerialBackend(Backend):
    """One worker, which is the master itself."""

    in_this_process = True

    def __init__(self) -> None:
        super().__init__()
        self._servant = Servant(_WORKER, capture_log=False)
        self._events: list[Event] = []

    def start(self) -> None:
        """Start: there is nothing to start."""
        self._events.append(Joined(_WORKER, os.getpid(), platform.node()))

    def send(self, worker: int, message: Message) -> None:
        """Do what the message asks, now."""
        self.traffic.messages += 1
        if message.body is not None:
            message = message._replace(body=copied(message.body))
        reply = self._servant.handle(message)
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
        self._servant = Servant(_WORKER, capture_log=False)
