"""A worker process: it handles messages until it is told to stop or the master is gone."""

import contextlib
import os
import platform
import signal
import socket
import sys

from coaddflow.pool.channel import Channel
from coaddflow.pool.lifeline import Stopped, end_when, pipe_has_ended, raise_on_sigterm
from coaddflow.pool.messages import Joined, Message, Stop, from_frames, to_frames
from coaddflow.pool.worker import WorkerLoop


def main(worker: str, connection: str, lifeline: str) -> None:
    """Work for a master, as the worker of this number.

    ``connection`` is the file descriptor of a socket to the master, ``lifeline`` that of a pipe
    that is closed when the master ends.
    """
    sys.argv[1:] = []
    # Ctrl-C reaches all processes of the terminal; the master decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        raise_on_sigterm()
        # a fork begins with both held back
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        end_when(pipe_has_ended(int(lifeline)))
        with socket.socket(fileno=int(connection)) as opened:
            _serve(int(worker), Channel(opened))
    except Stopped:
        sys.exit(128 + signal.SIGTERM)


def _serve(worker: int, channel: Channel) -> None:
    loop = WorkerLoop(worker, capture_log=True)
    with contextlib.suppress(EOFError, ConnectionError):
        channel.send(to_frames(Message(Joined(worker, os.getpid(), platform.node()))))
        while True:
            message = from_frames(channel.receive())
            if isinstance(message.head, Stop):
                return
            reply = loop.handle(message)
            del message  # the item in it may be large
            if reply is not None:
                channel.send(to_frames(reply))
            del reply
