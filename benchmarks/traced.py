"""Count with strace what programs open, read and write."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

_READ = ("read", "pread64", "readv", "preadv", "preadv2")
_WRITTEN = ("write", "pwrite64", "writev", "pwritev", "pwritev2")
CALLS = ",".join(("openat", *_READ, *_WRITTEN))

_OPENED = re.compile(r'^openat\([^"]*"[^"]*".*= \d+<([^>]*)>')
_MOVED = re.compile(r"^(\w+)\(.*?<([^>]*)>.*= (\d+)")


def traced(command: list[str], trace: str | Path) -> list[str]:
    """Return the command line that runs a command under strace; traces go to ``trace``.PID."""
    return ["strace", "-ff", "-y", "-qq", "-s", "0", "-o", str(trace), "-e", CALLS, *command]


def count(trace: str | Path, part_of: Callable[[str], str | None]) -> dict[str, Counter]:
    """Sum what strace has seen; see `count_processes`."""
    totals = _nothing()
    for seen in count_processes(trace, part_of):
        for what, counter in seen.items():
            totals[what] += counter
    return totals


def _nothing() -> dict[str, Counter]:
    return {what: Counter() for what in ("opened", "reads", "read", "written")}


def count_processes(
    trace: str | Path, part_of: Callable[[str], str | None]
) -> Iterator[dict[str, Counter]]:
    """Yield what strace has seen of each process or thread, and remove its files.

    Parameters
    ----------
    trace : path
        As it was given to `traced`.
    part_of : callable
        Returns under which name a file is counted, None for not at all.

    Yields
    ------
    dict of str to Counter
        "opened": openings, "reads": calls to read, "read" and "written": bytes, each by name.
    """
    for path in Path(trace).parent.glob(f"{Path(trace).name}*"):
        totals = _nothing()
        for line in path.read_text(errors="replace").splitlines():
            if match := _OPENED.match(line):
                if (part := part_of(match[1])) and not Path(match[1]).is_dir():
                    totals["opened"][part] += 1
            elif (match := _MOVED.match(line)) and (part := part_of(match[2])):
                kind = "read" if match[1] in _READ else "written"
                totals[kind][part] += int(match[3])
                totals["reads"][part] += kind == "read"
        path.unlink()
        yield totals
