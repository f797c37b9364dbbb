"""Memory that a job frees stays with the process, for the next array.

glibc takes arrays of more than 32 MB, which is each plane of a CCD, from the system, and gives them
back when they are freed. The system fills what it hands out with zeros, page by page: a tenth to a
quarter of the time of a job went there. Here glibc is told to keep what is freed. The most that a
job needs at a time stays about the same; a worker gives back what it kept when a round of its job
has ended, for the others. Other C libraries (macOS, musl) are left alone. Standard library only.
"""

import contextlib
import ctypes
import os

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
"""Parameters of glibc's ``mallopt`` (malloc.h)."""

_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory; return whether it has done so.

    To be called at the start of a process, before it has threads. Nothing is changed if one of
    glibc's variables of the environment (``MALLOC_..._``) or another allocator is in use.
    """
    given = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if given or os.environ.get("LD_PRELOAD"):
        return False
    try:
        library = ctypes.CDLL(None)
        version, set_option = library.gnu_get_libc_version, library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    version.restype = ctypes.c_char_p
    set_option.argtypes, set_option.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST), (_ARENA_MAX, 1))
    return bool(version()) and all(set_option(*option) == 1 for option in options)


def give_back_freed_memory() -> None:
    """Give the system all memory that this process has freed and kept, if the C library can."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))
