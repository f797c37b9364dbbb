"""Messages between two processes of one machine: small frames in a socket, large ones in memory.

A message on the socket is: the number of frames; their sizes, negative for frames in shared
memory; the small frames. The descriptors of the shared memory are sent with the first bytes
(SCM_RIGHTS).
"""

import os
import socket
import struct
from collections.abc import Sequence

from coaddflow.pool.backend import Traffic
from coaddflow.pool.memory import Shared, attach
from coaddflow.pool.packing import LARGE

_COUNT = struct.Struct("<q")
_MOST_DESCRIPTORS = 253

Frame = bytes | memoryview | Shared


class Channel:
    """One end of a connection by a Unix stream socket; ``traffic`` counts the messages."""

    def __init__(self, connection: socket.socket, traffic: Traffic | None = None):
        self._socket = connection
        self._traffic = traffic if traffic is not None else Traffic()

    def fileno(self) -> int:
        """Return the file descriptor, for `selectors`."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def send(self, frames: Sequence[Frame]) -> None:
        """Send a message; raise OSError if the other end is gone."""
        shared: list[Shared] = []
        made_here: list[Shared] = []
        small: list[bytes | memoryview] = []
        sizes: list[int] = []
        try:
            for frame in frames:
                if isinstance(frame, Shared):
                    shared.append(frame)
                    sizes.append(-frame.nbytes)
                elif memoryview(frame).nbytes >= LARGE:
                    made_here.append(Shared(frame))
                    shared.append(made_here[-1])
                    sizes.append(-shared[-1].nbytes)
                else:
                    small.append(frame)
                    sizes.append(memoryview(frame).nbytes)
            head = _COUNT.pack(len(sizes))
            socket.send_fds(self._socket, [head], [one.descriptor for one in shared])
            rest = b"".join([struct.pack(f"<{len(sizes)}q", *sizes), *small])
            self._socket.sendall(rest)
        finally:
            for one in made_here:
                one.close()
        self._traffic.count(len(head) + len(rest), sum(one.nbytes for one in shared))

    def receive(self) -> list[bytearray | memoryview]:
        """Wait for a message and return its frames, all writable.

        Raises
        ------
        EOFError
            If the other end is closed.
        OSError
            If there are too many open files.
        """
        head, descriptors, flags, _ = socket.recv_fds(
            self._socket, _COUNT.size, _MOST_DESCRIPTORS, getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        )
        try:
            if flags & socket.MSG_CTRUNC:
                raise OSError("too many open files: shared memory could not be received")
            head += self._read(_COUNT.size - len(head)) if head else b""
            if not head:
                raise EOFError
            (n_frames,) = _COUNT.unpack(head)
            sizes = struct.unpack(f"<{n_frames}q", self._read(8 * n_frames))
            frames = []
            for size in sizes:
                frames.append(attach(descriptors.pop(0), -size) if size < 0 else self._read(size))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        small, shared = sum(s for s in sizes if s > 0), -sum(s for s in sizes if s < 0)
        self._traffic.count(len(head) + 8 * n_frames + small, shared)
        return frames

    def _read(self, n_bytes: int) -> bytearray:
        data = bytearray(n_bytes)
        view, n_read = memoryview(data), 0
        while n_read < n_bytes:
            n_new = self._socket.recv_into(view[n_read:])
            if n_new == 0:
                raise EOFError
            n_read += n_new
        return data
