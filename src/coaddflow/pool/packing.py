"""Python objects to bytes and back, without copies of large arrays.

Pickle protocol 5 (PEP 574) hands out the pixels of contiguous NumPy arrays as views of their
memory. How these reach another process is up to the backend. Arrays that are not contiguous, and
subclasses of arrays (columns of tables, quantities), are copied into the pickle.
"""

import pickle
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from coaddflow.pool.failure import CannotPickle

LARGE = 1 << 16
"""Bytes from which a buffer is sent separately: system calls of its own then pay off."""

_MAX_BUFFERS = 200
"""Buffers per message; Linux sends at most 253 file descriptors at once."""


class Packed(NamedTuple):
    """A pickle, and the large buffers that belong to it (see also `Backend.prepare`)."""

    data: bytes
    buffers: Sequence[memoryview]


def pack(value: Any, name: str) -> Packed:
    """Pickle an object; large arrays in it are not copied.

    Parameters
    ----------
    value : object
        What to pickle. It must not change as long as the result is in use.
    name : str
        Its name in error messages.

    Raises
    ------
    CannotPickle
        If something in it cannot be pickled; the message says what and where.
    """
    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < LARGE or len(buffers) >= _MAX_BUFFERS:
            return True
        buffers.append(view)
        return False

    try:
        data = pickle.dumps(value, protocol=5, buffer_callback=keep_in_band)
    except MemoryError:
        raise
    except Exception as error:
        place, culprit = _culprit(value, name, set())
        raise CannotPickle(
            f"{place} is {_description(culprit)}, which cannot be pickled ({error})"
        ) from error
    return Packed(data, buffers)


def unpack(packed: Packed) -> Any:
    """Return the object; its large arrays are views of the buffers, and writable if these are."""
    # comes from a process of this job through its memory or connection, never from a file
    return pickle.loads(packed.data, buffers=packed.buffers)  # noqa: S301


def copied(packed: Packed) -> Packed:
    """Return a copy with writable buffers of its own."""
    return Packed(packed.data, [memoryview(bytearray(buffer)) for buffer in packed.buffers])


def read_only(packed: Packed) -> Packed:
    """Return the same with read-only buffers."""
    return Packed(packed.data, [buffer.toreadonly() for buffer in packed.buffers])


def _culprit(value: Any, name: str, seen: set[int]) -> tuple[str, Any]:
    """Return place and object of the innermost thing that cannot be pickled."""
    seen.add(id(value))
    for place, part in _parts(value, name):
        if id(part) not in seen and not _can_pickle(part):
            return _culprit(part, place, seen)
    return name, value


def _parts(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of an object, each with its name."""
    if isinstance(value, dict):
        yield from ((f"a key of {name}", key) for key in value)
        yield from ((f"{name}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        fields = getattr(value, "_fields", None)
        for i, part in enumerate(value):
            yield (f"{name}.{fields[i]}" if fields else f"{name}[{i}]"), part
    elif isinstance(value, partial):
        yield f"{name}.func", value.func
        yield from _parts(value.args, f"{name}.args")
        yield from _parts(value.keywords, f"{name}.keywords")
    else:
        attributes = getattr(value, "__dict__", {})
        yield from ((f"{name}.{key}", part) for key, part in attributes.items())
        bound = getattr(value, "__self__", None)
        if bound is not None:
            yield f"{name}.__self__", bound


def _can_pickle(value: Any) -> bool:
    try:
        pickle.dumps(value, protocol=5, buffer_callback=lambda _buffer: None)
    except Exception:
        return False
    return True


def _description(value: Any) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    name = getattr(value, "__qualname__", None)
    return f"the {kind} {name!r}" if name else f"a {kind}"
