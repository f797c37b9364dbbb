"""Rounds of work on items whose state stays with the workers, as long as no worker dies."""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coaddflow.pool.failure import Failure, PoolError, StateLost, WorkerDied, failure_of
from coaddflow.pool.pool import Function, Pool, Progress, Results
from coaddflow.pool.worker import Worker

_LOG = logging.getLogger(__name__)

_NOT_AT_FAULT = {WorkerDied.__name__, StateLost.__name__}

_LEFT_OUT = failure_of(PoolError("left out"), None)
"""What is not done stands for itself in a map."""


_ELSEWHERE = object()
"""Stands in a group for an item that was begun anew in another one."""


@dataclass(frozen=True)
class _Steps:
    """What to do with an item: one step, or all those that are to be done anew."""

    key: Hashable
    steps: tuple[tuple[Function, Any], ...]
    is_end: Callable[[Any], bool]


def _never(_result: Any) -> bool:
    return False


def _run_steps(item: _Steps, worker: Worker) -> Any:
    result = None
    for function, argument in item.steps:
        result = function(argument, worker)
        if item.is_end(result):
            break
    return result


class Rounds:
    """Items that are worked on in several rounds, each by the worker that holds its state.

    What a worker held that died is begun anew by another one: the functions of all rounds so far
    are called again with the arguments that they had. So they must do the same again when they
    are called twice. An item that ends a worker twice ends the work.

    Parameters
    ----------
    pool : Pool
        An open pool.
    keys : iterable of hashable
        The items.
    cost, memory : callable, optional
        Of a key: how long the item takes, in any unit, and bytes that it needs while it is in
        work.
    label : callable, optional
        Name of a key for people.
    is_end : callable, optional
        Whether a result ends the work on its item; defined in a module. `do` then leaves the item.
    """

    def __init__(
        self,
        pool: Pool,
        keys: Iterable[Hashable],
        *,
        cost: Callable[[Any], float] | None = None,
        memory: Callable[[Any], float] | None = None,
        label: Callable[[Any], str] = str,
        is_end: Callable[[Any], bool] = _never,
    ):
        self._pool = pool
        self._keys = list(keys)
        self._options = {
            "cost": cost and (lambda item: cost(item.key)),
            "memory": memory and (lambda item: memory(item.key)),
        }
        self._label = label
        self._is_end = is_end
        self._groups: list[tuple[list[Any], Results | None]] = [(self._keys, None)]
        self._history: list[tuple[Function, Mapping[Hashable, Any]]] = []
        self._left: set[Hashable] = set()

    @property
    def keys(self) -> list[Hashable]:
        """The items that are still worked on, in order."""
        return [key for key in self._keys if key not in self._left]

    def leave(self, key: Hashable) -> None:
        """Leave an item out of the rounds to come."""
        self._left.add(key)

    def do(
        self,
        function: Function,
        arguments: Mapping[Hashable, Any],
        progress: Progress | None = None,
    ) -> dict[Hashable, Any]:
        """Do one round.

        Parameters
        ----------
        function : callable
            ``function(argument, worker)``; defined in a module.
        arguments : mapping
            One for each of `keys`.
        progress : callable, optional
            As in `Pool.map`; counts each group of items by itself.

        Returns
        -------
        dict
            The results by key, in the order of `keys`.

        Raises
        ------
        Exception
            What a function has raised, when the others of the round have ended.
        PoolError
            If an item has ended a worker twice.
        """
        arguments = {key: arguments[key] for key in self.keys}
        found: dict[Hashable, Any] = {}
        groups, self._groups = self._groups, []
        for keys, held in groups:
            items = [
                self._steps(key, [(function, arguments[key])]) if key in arguments else _LEFT_OUT
                for key in keys
            ]
            self._take(keys, self._map(items, held, keys, progress), found)
        self._history.append((function, arguments))
        self._begin_anew([key for key in self.keys if _is_lost(found[key])], found)
        for key in self.keys:
            if isinstance(found[key], Failure):
                found[key].raise_again()
        results = {key: found[key] for key in self.keys}
        self._left.update(key for key, result in results.items() if self._is_end(result))
        return results

    def _steps(self, key: Hashable, steps: Iterable[tuple[Function, Any]]) -> _Steps:
        return _Steps(key, tuple(steps), self._is_end)

    def _map(
        self,
        items: list[Any],
        held: Results | None,
        keys: list[Hashable],
        progress: Progress | None = None,
    ) -> Results:
        if held is not None:
            return self._pool.map_again(held, _run_steps, items, progress=progress, **self._options)
        names = {key: self._label(key) for key in keys}
        return self._pool.map(
            _run_steps,
            items,
            label=lambda item: names.get(getattr(item, "key", None), ""),
            progress=progress,
            **self._options,
        )

    def _take(self, keys: list[Hashable], results: Results, found: dict[Hashable, Any]) -> None:
        """Take the results of a group, which keeps its states but not its results."""
        mine = list(keys)
        for place, key in enumerate(keys):
            if key in self._left or key is _ELSEWHERE:
                continue
            found[key] = results[place]
            if _is_lost(results[place]):
                mine[place] = _ELSEWHERE
            if not isinstance(results[place], Failure):
                results[place] = None
        self._groups.append((mine, results))

    def _begin_anew(self, lost: list[Hashable], found: dict[Hashable, Any]) -> None:
        """Do all rounds so far for items whose worker has died."""
        if not lost:
            return
        _LOG.warning("begun anew, since their worker died: %s", ", ".join(map(self._label, lost)))
        items = [
            self._steps(key, [(function, before[key]) for function, before in self._history])
            for key in lost
        ]
        self._take(lost, self._map(items, None, lost), found)
        for key in lost:
            if _is_lost(found[key]):
                raise PoolError(
                    f"{self._label(key)} has ended two workers ({found[key].message}): out of "
                    "memory, or killed. Run again with more memory"
                )


def _is_lost(result: Any) -> bool:
    return isinstance(result, Failure) and result.type in _NOT_AT_FAULT
