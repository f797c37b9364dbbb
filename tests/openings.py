"""Count how often the files of a folder are opened in this process."""

import contextlib
import os
import re
import sys
from collections import Counter
from pathlib import Path

from coaddflow.fence import FOLDER, Fence, begin, fenced_by

_RANDOM = re.compile(r"\.(.+)\.[a-z0-9_]{8}(\.[a-z.]+)?")
"""Names under which products are written; they have the final ones in them."""

_counters: list[Counter] = []


def _hook(event, arguments):
    if event == "open" and _counters and isinstance(arguments[0], str | Path):
        path = Path(os.path.abspath(arguments[0]))  # noqa: PTH100 - links stay
        if path.is_relative_to(Path.cwd()):
            found = _RANDOM.fullmatch(path.name)
            name = path.with_name(found[1]) if found else path
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
            _counters[-1]["w" if writes else "r", str(name.relative_to(Path.cwd()))] += 1


@contextlib.contextmanager
def counted_openings():
    """Count what a block opens in the working folder, as a job that has its token.

    Yields
    ------
    Counter
        Openings by "r" or "w" and name.
    """
    if not _counters:
        sys.addaudithook(_hook)  # it can never be taken away
        _counters.append(Counter())
    fence = Fence(str(FOLDER / "unit"), "job")
    begin(fence)
    _counters.append(Counter())
    try:
        with fenced_by(fence):
            yield _counters[-1]
    finally:
        _counters.pop()


def openings_of(counter, part):
    """Return how often files were opened that have a text in their names."""
    return sum(number for (_, name), number in counter.items() if part in name)
