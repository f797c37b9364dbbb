"""A line on the terminal that tells how far long work has come."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

Item = TypeVar("Item")

_FIRST_AFTER = 0.5
_SECONDS_BETWEEN = {True: 0.1, False: 10.0}
_WIDTH = 75


class ProgressLine:
    """Tells how far some work has come.

    On a terminal one line is written over and over; in a log, a line every ten seconds. Work of
    less than half a second says nothing.

    Parameters
    ----------
    label : str
        What the work is.
    stream : text stream, optional
        Where to report; default stderr.
    """

    def __init__(self, label: str, stream: TextIO | None = None):
        self._label = label
        self._stream = stream if stream is not None else sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._due = self._start + (_FIRST_AFTER if self._terminal else _SECONDS_BETWEEN[False])
        self._shown = False

    def show(self, done: int, total: int, last: str = "") -> None:
        """Report, if it is time to.

        Parameters
        ----------
        done, total : int
            Pieces of work.
        last : str
            Name of the last piece.
        """
        now = time.monotonic()
        if now < self._due:
            return
        left = (now - self._start) / max(done, 1) * (total - done)
        text = f"{self._label}: {done} of {total}, about {left:.0f} s left"
        text += f" ({last})" if last else ""
        self._stream.write(f"\r{text:<{_WIDTH}}" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._shown = True
        self._due = now + _SECONDS_BETWEEN[self._terminal]

    def close(self) -> None:
        """Remove the line from the terminal."""
        if self._shown and self._terminal:
            self._stream.write("\r" + " " * _WIDTH + "\r")
            self._stream.flush()


def progress(
    items: Iterable[Item], label: str, total: int, stream: TextIO | None = None
) -> Iterator[Item]:
    """Yield ``items`` and report on stderr how many are done; see `ProgressLine`.

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
    line = ProgressLine(label, stream)
    for done, item in enumerate(items):
        line.show(done, total)
        yield item
    line.close()
