"""Which item a worker gets next: the longest that it may have and for which there is memory."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Task:
    """One item of a map.

    Attributes
    ----------
    number : int
        Unique in the pool.
    index : int
        Place of the item in its map.
    item : object
        The item.
    label : str
        Its name for people.
    cost : float
        How long it takes, in any unit.
    memory : int
        Bytes it needs while it is in work.
    owner : int or None
        The only worker that can do it, since it holds its state.
    """

    number: int
    index: int
    item: Any
    label: str
    cost: float = 0.0
    memory: int = 0
    owner: int | None = None


class TaskQueue:
    """Tasks that wait, those with the highest cost first, equal ones in their order."""

    def __init__(self, tasks: Iterable[Task]):
        self._waiting: dict[int | None, list[Task]] = {None: []}
        for task in sorted(tasks, key=_rank):
            self._waiting.setdefault(task.owner, []).append(task)

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def take(self, worker: int, room: float) -> Task | None:
        """Take out the first task that a worker may do in this much memory, if there is one.

        A task that does not fit is passed over, not waited for: it comes first again as soon as
        something ends.
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

    def take_all_of(self, worker: int) -> list[Task]:
        """Take out all tasks that only this worker could do."""
        return self._waiting.pop(worker, [])


def _rank(task: Task) -> tuple[float, int]:
    return -task.cost, task.index
