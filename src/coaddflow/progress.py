"""A line on the terminal that tells how far long work has come."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

Item = TypeVar("Item")

_FIRST_AFTER = 0.5
_SECONDS_BETWEEN = {True: 0.1, False: 10.0}


def progress(
    items: Iterable[Item], label: str, total: int, stream: TextIO | None = None
) -> Iterator[Item]:
    """Yield ``items`` and report on stderr how many are done.

    On a terminal one line is written over and over; in a log, a line every ten seconds. Work of
    less than half a second says nothing.

    Parameters
    ----------
    items : iterable
        The work.
    label : str
        What it is.
    total : int
        How many items there are.
    stream : text stream, optional
        Where to report; default stderr.
    """
    stream = stream if stream is not None else sys.stderr
    terminal = stream.isatty()
    start = time.monotonic()
    due = start + (_FIRST_AFTER if terminal else _SECONDS_BETWEEN[False])
    shown = False
    for done, item in enumerate(items):
        now = time.monotonic()
        if now >= due:
            shown = True
            left = (now - start) / max(done, 1) * (total - done)
            text = f"{label}: {done} of {total}, about {left:.0f} s left"
            stream.write(f"\r{text:<70}" if terminal else f"{text}\n")
            stream.flush()
            due = now + _SECONDS_BETWEEN[terminal]
        yield item
    if shown and terminal:
        stream.write("\r" + " " * 70 + "\r")
        stream.flush()
