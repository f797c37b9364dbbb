"""Anonymous memory that is shared between processes.

It is passed as a file descriptor. The kernel frees it when the last process that uses it has
dropped it or has ended, however it ended: nothing can be left behind, and the size of /dev/shm
(64 MB in many containers) is no limit.
"""

import ctypes
import mmap
import os
import tempfile
import weakref
from functools import cache

_AT_ONCE = 1 << 30
"""Bytes per call: Linux writes at most 2 GiB."""


class Shared:
    """A copy of contiguous bytes in memory that can be passed to other processes."""

    def __init__(self, data: bytes | memoryview):
        view = memoryview(data).cast("B")
        self.nbytes = view.nbytes
        self.descriptor = _anonymous_file()
        """File descriptor; closed by `close` or with this object."""
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)
        written = 0
        while written < view.nbytes:
            written += os.write(self.descriptor, view[written : written + _AT_ONCE])

    def close(self) -> None:
        """Release it here; processes that have received it keep it."""
        self._finalizer()


def attach(descriptor: int, n_bytes: int) -> memoryview:
    """Return memory that another process has passed, and close its descriptor.

    The memory is writable, and unmapped when nothing refers to it any more. Unlike `mmap.mmap`,
    this keeps no file descriptor open per mapping; a process may have only 1024 of them.
    """
    library = _c_library()
    try:
        address = library.mmap(
            None, n_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, descriptor, 0
        )
    finally:
        os.close(descriptor)
    if address == ctypes.c_void_p(-1).value:
        raise MemoryError(f"cannot map {n_bytes} bytes: {os.strerror(ctypes.get_errno())}")
    block = (ctypes.c_ubyte * n_bytes).from_address(address)
    weakref.finalize(block, library.munmap, address, n_bytes).atexit = False
    return memoryview(block).cast("B")


@cache
def _c_library() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    size, pointer, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    library.mmap.restype = pointer
    library.mmap.argtypes = [pointer, size, integer, integer, integer, ctypes.c_long]
    library.munmap.argtypes = [pointer, size]
    return library


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coaddflow", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as stream:  # macOS; unlinked at once
        return os.dup(stream.fileno())
