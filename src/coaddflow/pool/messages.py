"""The messages between master and workers.

A message is a small head and, for some, a body that was packed before. It is sent as a list of
frames: the pickled head, the pickle of the body, and its buffers.
"""

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from coaddflow.fence import Fence
from coaddflow.pool.failure import Failure
from coaddflow.pool.packing import Packed


class Begin(NamedTuple):
    """To an MPI rank: a pool is opened, in which it has this number. Not answered."""

    worker: int
    paths: tuple[str, ...]


class Define(NamedTuple):
    """To a worker: a constant or a function (body). Not answered."""

    name: str


class Run(NamedTuple):
    """To a worker: an item to do (body). Answered by `Done`."""

    function: str
    state: tuple[int, int]
    label: str
    log_level: int
    fence: Fence | None


class Forget(NamedTuple):
    """To a worker: drop the states of these maps and these functions. Not answered."""

    maps: tuple[int, ...]
    functions: tuple[str, ...]


class Stop(NamedTuple):
    """To a worker: the pool is closed."""


class End(NamedTuple):
    """To an MPI rank: the program ends."""


class Joined(NamedTuple):
    """From a worker: ready for work."""

    worker: int
    process: int
    host: str


class Done(NamedTuple):
    """From a worker: the result of an item (body) or its failure, and the time it took."""

    seconds: float
    holds_state: bool
    failure: Failure | None
    log: tuple[dict[str, Any], ...]


Head = Begin | End | Define | Run | Forget | Stop | Joined | Done


class Message(NamedTuple):
    """A head and its body."""

    head: Head
    body: Packed | None = None


def to_frames(message: Message) -> list[bytes | memoryview]:
    """Return the frames of a message; the buffers of its body are not copied."""
    head = pickle.dumps(message.head, protocol=5)
    if message.body is None:
        return [head]
    return [head, message.body.data, *message.body.buffers]


def from_frames(frames: Sequence[Any]) -> Message:
    """Return the message in some frames."""
    # comes from a process of this job through its memory or connection, never from a file
    head = pickle.loads(frames[0])  # noqa: S301
    if len(frames) == 1:
        return Message(head)
    return Message(head, Packed(frames[1], [memoryview(frame) for frame in frames[2:]]))
