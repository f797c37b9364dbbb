"""Several rounds of work on the same items, whose state stays with the workers between rounds."""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coaddflow.pool.failure import Failure, PoolError, StateLost, WorkerDied, failure_of
from coaddflow.pool.pool import Function, Pool, Results
from coaddflow.pool.read_ahead import FilePart
from coaddflow.pool.worker import Worker

_LOG = logging.getLogger(__name__)

_LOST = {WorkerDied.__name__, StateLost.__name__}

_LEFT_OUT = failure_of(PoolError("left out"), None)
"""An item that is a failure is not done."""

_MOVED = object()
"""Takes the place of an item that was restarted in another group."""


@dataclass(frozen=True)
class _Steps:
    """What to do with an item: the step of this round, or all steps so far to restart it."""

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
    """Items that are processed in several rounds, each by the worker that holds its state.

    When a worker dies its items are restarted on another one: the functions of all rounds so far
    are called again with their arguments, and must give the same results again. An item that
    kills two workers ends the work.

    Parameters
    ----------
    pool : Pool
        An open pool.
    keys : iterable of hashable
        The items.
    cost, memory : callable, optional
        Functions of a key: how long the item takes, in any unit, and the bytes that it needs
        while it is processed.
    label : callable, optional
        Name of a key in messages.
    is_end : callable, optional
        Whether a result ends the work on its item; defined in a module. `do` then leaves out the
        item.
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
        """The items that are not left out, in order."""
        return [key for key in self._keys if key not in self._left]

    def leave(self, key: Hashable) -> None:
        """Leave out an item from now on."""
        self._left.add(key)

    def do(
        self,
        function: Function,
        arguments: Mapping[Hashable, Any],
        files: Callable[[Any], Iterable[FilePart]] | None = None,
    ) -> dict[Hashable, Any]:
        """Do one round.

        Parameters
        ----------
        function : callable
            ``function(argument, worker)``; defined in a module.
        arguments : mapping
            One for each of `keys`.
        files : callable, optional
            Returns what an item reads from files, by its key (`Pool.map`).

        Returns
        -------
        dict
            The results by key, in the order of `keys`.

        Raises
        ------
        Exception
            What a function has raised, after the rest of the round is done.
        PoolError
            If an item has killed two workers.
        """
        arguments = {key: arguments[key] for key in self.keys}
        found: dict[Hashable, Any] = {}
        groups, self._groups = self._groups, []
        for keys, held in groups:
            items = [
                self._steps(key, [(function, arguments[key])]) if key in arguments else _LEFT_OUT
                for key in keys
            ]
            self._collect(keys, self._map(items, held, keys, files), found)
        self._history.append((function, arguments))
        self._restart([key for key in self.keys if _is_lost(found[key])], found)
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
        files: Callable[[Any], Iterable[FilePart]] | None = None,
    ) -> Results:
        files_of = {"files": files and (lambda item: files(item.key))}
        if held is not None:
            return self._pool.map_again(held, _run_steps, items, **self._options, **files_of)
        names = {key: self._label(key) for key in keys}
        return self._pool.map(
            _run_steps,
            items,
            label=lambda item: names.get(getattr(item, "key", None), ""),
            **files_of,
            **self._options,
        )

    def _collect(self, keys: list[Hashable], results: Results, found: dict[Hashable, Any]) -> None:
        """Collect the results of a group, which keeps its states but not its results."""
        mine = list(keys)
        for i, key in enumerate(keys):
            if key in self._left or key is _MOVED:
                continue
            found[key] = results[i]
            if _is_lost(results[i]):
                mine[i] = _MOVED
            if not isinstance(results[i], Failure):
                results[i] = None
        self._groups.append((mine, results))

    def _restart(self, lost: list[Hashable], found: dict[Hashable, Any]) -> None:
        """Do all rounds so far for items whose worker has died."""
        if not lost:
            return
        _LOG.warning("restarted because their worker died: %s", ", ".join(map(self._label, lost)))
        items = [
            self._steps(key, [(function, before[key]) for function, before in self._history])
            for key in lost
        ]
        self._collect(lost, self._map(items, None, lost), found)
        for key in lost:
            if _is_lost(found[key]):
                raise PoolError(
                    f"{self._label(key)} has killed two workers ({found[key].message}). "
                    "Run again with more memory"
                )


def _is_lost(result: Any) -> bool:
    return isinstance(result, Failure) and result.type in _LOST
