"""Which item a worker gets next: the longest one that it may do and for which there is memory."""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any


@dataclass(frozen=True)
class Task:
    """One item of a map, and what `Pool.map` knows of it."""

    index: int
    """Position of the item in its map."""
    item: Any
    """Argument of the function."""
    label: str
    """Name of the item in messages."""
    cost: float = 0.0
    """Expected time in any unit: the longest item is done first."""
    memory: int = 0
    """Memory that it needs, bytes."""
    owner: int | None = None
    """The only worker that can do it, because it holds the state of the item."""


class TaskQueue:
    """Waiting tasks, those of highest cost first, equal ones in their order."""

    def __init__(self, tasks: Iterable[Task]):
        self._waiting: dict[int | None, list[Task]] = {None: []}
        for task in sorted(tasks, key=_rank):
            self._waiting.setdefault(task.owner, []).append(task)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take(self, worker: int, room: float) -> Task | None:
        """Remove and return the first task that a worker may do in this much memory, if any.

        A task that does not fit is passed over, and is the first again when another one ends.
        """
        best = None
        for owner in (None, worker):
            for task in self._waiting.get(owner, ()):
                if task.memory <= room:
                    best = task if best is None else min(best, task, key=_rank)
                    break
        if best is not None:
            self._waiting[best.owner].remove(best)
        return best

    def following(self, number: int) -> list[Task]:
        """Return so many of the tasks that are likely to be taken next."""
        return list(islice(heapq.merge(*self._waiting.values(), key=_rank), number))

    def take_all_of(self, worker: int) -> list[Task]:
        """Remove and return all tasks that only this worker could do."""
        return self._waiting.pop(worker, [])


def _rank(task: Task) -> tuple[float, int]:
    return -task.cost, task.index
