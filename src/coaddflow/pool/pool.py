"""The pool: a function is called on many items by several workers."""

import itertools
import logging
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from threadpoolctl import threadpool_limits

from coaddflow.fence import active_fence
from coaddflow.pool.backend import Backend, Event, Joined, Lost, Traffic
from coaddflow.pool.engines import make_backend
from coaddflow.pool.failure import (
    CannotPickle,
    Failure,
    PoolError,
    StateLost,
    WorkerDied,
    failure_of,
)
from coaddflow.pool.messages import Define, Forget, Message, Run
from coaddflow.pool.packing import Packed, pack, unpack
from coaddflow.pool.queue import Task, TaskQueue
from coaddflow.pool.read_ahead import FilePart, ReadAhead
from coaddflow.pool.worker import Worker

_LOG = logging.getLogger(__name__)

Function = Callable[[Any, Worker], Any]
Progress = Callable[[int, int, str], None]
Files = Callable[[Any], Iterable[FilePart]]


class _States:
    """Which worker holds the state of which item of a map."""

    def __init__(self, number: int):
        self.number = number
        self.owners: dict[int, int] = {}


class Results(list[Any]):
    """Results in the order of the items, with a `Failure` for an item that has failed.

    The workers keep the states of the items as long as this list is in use.
    """

    def __init__(self, results: Iterable[Any], labels: Sequence[str], states: _States):
        super().__init__(results)
        self.labels = list(labels)
        """Names of the items."""
        self._states = states

    @property
    def failures(self) -> list[Failure]:
        """The failures, in the order of the items."""
        return [result for result in self if isinstance(result, Failure)]


@dataclass
class _Batch:
    """A map that is being done."""

    function: str
    queue: TaskQueue
    states: _States
    receive: Callable[[int, Any], None]
    progress: Progress | None
    n_tasks: int
    files: Files | None = None
    n_done: int = 0
    asked_for: set[int] = field(default_factory=set)
    """Tasks whose files are read ahead, or were."""
    begun: set[int] = field(default_factory=set)
    """Tasks that a worker has, or had."""

    def finish(self, task: Task, result: Any) -> None:
        """Pass on the result of a task."""
        self.n_done += 1
        self.receive(task.index, result)
        if self.progress is not None:
            self.progress(self.n_done, self.n_tasks, task.label)


@dataclass
class _KnownWorker:
    """A worker as the master knows it: its process, and what was sent to it."""

    process: int
    host: str
    defined: set[str] = field(default_factory=set)
    forgotten_maps: list[int] = field(default_factory=list)
    has_worked: bool = False
    """Whether it has had an item since it was last told what to drop."""


class Pool:
    """Workers that call functions on items, and may keep the state of an item for later.

    To be used in a ``with`` block. A function that is given to the pool takes an item and the
    `Worker` it runs on, and is defined in a module. Items and results are pickled; large arrays
    in them are passed in shared memory where the backend has it. A function that raises fails
    only its item: the exception comes back as a `Failure`. The same holds for a worker that dies,
    which is replaced (MPI cannot replace a rank: there the job ends).

    Parameters
    ----------
    backend : {"processes", "serial", "mpi", "dask"}
        Where the work is done; see docs/pool.md.
    workers : int, optional
        Number of workers. Default: the cores that this process may use; with MPI all ranks but
        the first; with a dask scheduler all that it has.
    memory_limit : float, optional
        Limit for the sum of the memory of the items that are processed at the same time, bytes.
        A larger item is processed alone.
    address : str, optional
        Dask scheduler (``tcp://...``) or its scheduler file (``....json``). Without it, dask
        workers are started on this machine.

    Raises
    ------
    InputError
        If the backend does not exist, is not installed, or needs a program started with MPI.

    Examples
    --------
    >>> from operator import add
    >>> def square(item, worker):
    ...     return item * item
    >>> with Pool("serial") as pool:
    ...     list(pool.map(square, [1, 2, 3]))
    [1, 4, 9]
    """

    def __init__(
        self,
        backend: str = "processes",
        workers: int | None = None,
        *,
        memory_limit: float | None = None,
        address: str | None = None,
    ):
        self._make_backend = lambda: make_backend(backend, workers, address)
        self._backend: Backend | None = None
        self._memory_limit = math.inf if memory_limit is None else memory_limit
        self._numbers = itertools.count()
        self._workers: dict[int, _KnownWorker] = {}
        self._running: dict[int, tuple[_Batch, Task]] = {}
        self._events: deque[Event] = deque()
        self._definitions: dict[str, Packed] = {}
        self._dead_maps: list[int] = []
        self._busy = 0.0

    def __enter__(self) -> Self:
        self._backend = self._make_backend()
        self._read_ahead = ReadAhead()
        # more threads change the last bits of sums; workers have one thread each, forks inherit it
        self._one_thread = threadpool_limits(1)
        try:
            self._backend.start()
        except BaseException:
            self._one_thread.restore_original_limits()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        backend, self._backend = self._backend, None
        self._read_ahead.stop()
        try:
            backend.close(abort=kind is not None or bool(self._running))
        finally:
            self._one_thread.restore_original_limits()
        self._read_ahead.wait()
        self._workers.clear()
        self._running.clear()
        self._events.clear()
        self._definitions.clear()

    @property
    def processes(self) -> dict[int, int]:
        """Process ids of the workers that are ready, by the number of the worker."""
        return {number: worker.process for number, worker in self._workers.items()}

    @property
    def traffic(self) -> Traffic:
        """What the master has sent and received so far."""
        return self._open_backend().traffic

    @property
    def busy(self) -> float:
        """Seconds that all workers together have spent on items so far."""
        return self._busy

    def broadcast(self, **constants: Any) -> None:
        """Send constants to all workers, once to each.

        Functions find them by name in `Worker.constants`. Arrays in them are read-only, and are
        in memory once for all worker processes of a machine.

        Parameters
        ----------
        **constants : object
            The constants. They replace earlier ones of the same names.

        Raises
        ------
        CannotPickle
            If a constant cannot be pickled.
        """
        for name, value in constants.items():
            self._define(name, value)

    def map(
        self,
        function: Function,
        items: Iterable[Any],
        *,
        cost: Callable[[Any], float] | None = None,
        memory: Callable[[Any], float] | None = None,
        label: Callable[[Any], str] | None = None,
        files: Files | None = None,
        progress: Progress | None = None,
    ) -> Results:
        """Call a function on all items, each on any worker.

        Parameters
        ----------
        function : callable
            ``function(item, worker)``.
        items : iterable
            The items. A `Failure` among them is not processed but returned.
        cost : callable, optional
            How long an item takes, in any unit: the longest are done first.
        memory : callable, optional
            Bytes that an item needs while it is processed.
        label : callable, optional
            Name of an item in messages.
        files : callable, optional
            Returns the parts of files that an item reads. Where workers are processes of this
            machine they are read ahead, for as many waiting items as there are workers. It is
            called in a thread, must change nothing, and what it raises is not seen.
        progress : callable, optional
            Called with the number of finished items, the number of items, and the label of the
            last finished one.

        Returns
        -------
        Results
            One result or `Failure` per item, in their order.

        Raises
        ------
        CannotPickle
            If the function cannot be pickled.
        PoolError
            If no workers are left.
        """
        items = list(items)
        labels = [label(item) if label else f"item {i}" for i, item in enumerate(items)]
        states = self._new_states()
        tasks = self._tasks(items, labels, cost, memory)
        return self._gather(function, items, labels, tasks, states, progress, files)

    def map_again(
        self,
        held: Results,
        function: Function,
        items: Iterable[Any] | None = None,
        *,
        cost: Callable[[Any], float] | None = None,
        memory: Callable[[Any], float] | None = None,
        files: Files | None = None,
        progress: Progress | None = None,
    ) -> Results:
        """Return to the items of an earlier map, each on the worker that holds its state.

        `Worker.state` contains what the function of the earlier map has put there for the item.
        An item that failed stays failed. An item whose worker has died since then fails with type
        `StateLost`. An item without a state may run on any worker.

        Parameters
        ----------
        held : Results
            What the earlier `map` or `map_again` returned.
        function : callable
            ``function(item, worker)``.
        items : iterable, optional
            New items, one for each earlier one; None for each by default.
        cost, memory, files, progress : callable, optional
            As in `map`.

        Returns
        -------
        Results
            As `map`.

        Raises
        ------
        ValueError
            If the number of items differs from that of the earlier map.
        CannotPickle, PoolError
            As `map`.
        """
        items = [None] * len(held) if items is None else list(items)
        items = [
            before if isinstance(before, Failure) else item
            for before, item in zip(held, items, strict=True)
        ]
        states = held._states
        tasks = self._tasks(items, held.labels, cost, memory, states.owners)
        return self._gather(function, items, held.labels, tasks, states, progress, files)

    def reduce(
        self,
        combine: Callable[[Any, Any], Any],
        function: Function,
        items: Iterable[Any],
        *,
        cost: Callable[[Any], float] | None = None,
        memory: Callable[[Any], float] | None = None,
        label: Callable[[Any], str] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Any, list[Failure]]:
        """Call a function on all items and combine the results in the order of the items.

        The order does not depend on which item ends first, so that sums have the same bits. A
        result is combined and dropped as soon as those before it have been.

        Parameters
        ----------
        combine : callable
            ``combine(total, result)``, called here; the first result is the first total.
        function, items, cost, memory, label, progress
            As in `map`.

        Returns
        -------
        total : object
            None if no item succeeded.
        failures : list of Failure
            The items that failed, which are not in the total.
        """
        items = list(items)
        labels = [label(item) if label else f"item {i}" for i, item in enumerate(items)]
        arrived = {i: item for i, item in enumerate(items) if isinstance(item, Failure)}
        total: list[Any] = []
        failures: list[Failure] = []
        following = 0

        def receive(index: int, result: Any) -> None:
            nonlocal following
            arrived[index] = result
            while following in arrived:
                ready = arrived.pop(following)
                following += 1
                if isinstance(ready, Failure):
                    failures.append(ready)
                else:
                    total[:] = [combine(total[0], ready) if total else ready]

        tasks = self._tasks(items, labels, cost, memory)
        self._work(function, tasks, self._new_states(), receive, progress)
        return total[0] if total else None, [*failures, *arrived.values()]

    def forget(self, results: Results) -> None:
        """Let the workers drop the states of a map, as they do when its results are deleted."""
        self._dead_maps.append(results._states.number)
        results._states.owners.clear()
        self._send_forgotten()

    def _gather(
        self,
        function: Function,
        items: Sequence[Any],
        labels: Sequence[str],
        tasks: list[Task],
        states: _States,
        progress: Progress | None,
        files: Files | None = None,
    ) -> Results:
        """Do tasks; return the items with their results in place."""
        results = Results(items, labels, states)  # items without a task are failures, and stay
        self._work(function, tasks, states, results.__setitem__, progress, files)
        return results

    def _new_states(self) -> _States:
        states = _States(next(self._numbers))
        weakref.finalize(states, self._dead_maps.append, states.number).atexit = False
        return states

    def _tasks(
        self,
        items: Sequence[Any],
        labels: Sequence[str],
        cost: Callable[[Any], float] | None,
        memory: Callable[[Any], float] | None,
        owners: dict[int, int] | None = None,
    ) -> list[Task]:
        """Return a task for each item that has not failed before."""
        return [
            Task(
                index=index,
                item=item,
                label=labels[index],
                cost=float(cost(item)) if cost else 0.0,
                memory=int(memory(item)) if memory else 0,
                owner=(owners or {}).get(index),
            )
            for index, item in enumerate(items)
            if not isinstance(item, Failure)
        ]

    def _open_backend(self) -> Backend:
        if self._backend is None:
            raise PoolError("the pool is not open: use it in a `with` block")
        return self._backend

    def _work(
        self,
        function: Function,
        tasks: list[Task],
        states: _States,
        receive: Callable[[int, Any], None],
        progress: Progress | None,
        files: Files | None = None,
    ) -> None:
        """Do tasks; results are received in the order in which the tasks end."""
        self._open_backend()
        self._send_forgotten()
        name = f"function {next(self._numbers)}"
        self._define(name, function)
        files = files if self._backend.reads_ahead else None
        batch = _Batch(name, TaskQueue(tasks), states, receive, progress, len(tasks), files)
        for worker in set(states.owners.values()) - set(self._workers):
            self._lose_states(batch, worker)
        try:
            while batch.n_done < batch.n_tasks:
                self._give_out(batch)
                if batch.n_done < batch.n_tasks:
                    self._take(self._next_event(), batch)
        finally:
            batch.begun.update(task.index for task in tasks)
            del self._definitions[name]

    def _next_event(self) -> Event:
        """Wait for the next event; none is lost if `map` is left by an exception."""
        if not self._events:
            self._events.extend(self._backend.wait())
        return self._events.popleft()

    def _give_out(self, batch: _Batch) -> None:
        """Give tasks to all idle workers."""
        for number in sorted(set(self._workers) - set(self._running)):
            while number not in self._running:
                task = batch.queue.take(number, self._room())
                if task is None:
                    break
                self._give(number, task, batch)
        if batch.files is not None:
            self._ask_for_files(batch)

    def _ask_for_files(self, batch: _Batch) -> None:
        """Let the files of the tasks be read that the workers will get next."""
        for task in batch.queue.following(len(self._workers)):
            if task.index not in batch.asked_for:
                batch.asked_for.add(task.index)
                self._read_ahead.ask(
                    partial(batch.files, task.item),
                    lambda index=task.index: index not in batch.begun,
                )

    def _room(self) -> float:
        """Return the memory that is left for the next task, bytes."""
        if not self._running:
            return math.inf
        return self._memory_limit - sum(task.memory for _, task in self._running.values())

    def _give(self, number: int, task: Task, batch: _Batch) -> None:
        """Send a task to a worker, with the constants that it does not have yet."""
        try:
            body = pack(task.item, task.label)
        except CannotPickle as error:
            batch.finish(task, failure_of(error, None, task.index, task.label))
            return
        worker = self._workers[number]
        self._running[number] = (batch, task)
        batch.begun.add(task.index)
        worker.has_worked = True
        for name, packed in self._definitions.items():
            if name not in worker.defined:
                self._backend.send(number, Message(Define(name), packed))
                worker.defined.add(name)
        state = (batch.states.number, task.index)
        level = logging.getLogger().getEffectiveLevel()
        run = Run(batch.function, state, task.label, level, active_fence())
        self._backend.send(number, Message(run, body))

    def _take(self, event: Event, batch: _Batch) -> None:
        """Handle an event."""
        if isinstance(event, Joined):
            self._workers[event.worker] = _KnownWorker(event.process, event.host)
        elif isinstance(event, Lost):
            self._lose(event, batch)
        else:
            self._receive(event.worker, event.message, batch)

    def _receive(self, number: int, message: Message, batch: _Batch) -> None:
        """Take the answer of a worker; drop it if its map was abandoned."""
        asked, task = self._running.pop(number)
        reply = message.head
        self._busy += reply.seconds
        _repeat_log(reply.log, task.label)
        if asked is not batch:
            return
        batch.states.owners.pop(task.index, None)
        if reply.failure is not None:
            batch.finish(task, replace(reply.failure, index=task.index, label=task.label))
            return
        if reply.holds_state:
            batch.states.owners[task.index] = number
        try:
            result = unpack(message.body)
        except Exception as error:
            result = failure_of(error, number, task.index, task.label)
        batch.finish(task, result)

    def _lose(self, lost: Lost, batch: _Batch) -> None:
        """Let the tasks of a dead worker fail."""
        worker = self._workers.pop(lost.worker)
        asked, task = self._running.pop(lost.worker, (None, None))
        what = f"worker {lost.worker} (process {worker.process} on {worker.host}) {lost.reason}"
        _LOG.warning("%s%s", what, f" at {task.label}" if task else "")
        if asked is batch:
            batch.states.owners.pop(task.index, None)
            error = WorkerDied(what)
            batch.finish(task, failure_of(error, lost.worker, task.index, task.label))
        self._lose_states(batch, lost.worker)

    @staticmethod
    def _lose_states(batch: _Batch, worker: int) -> None:
        for task in batch.queue.take_all_of(worker):
            error = StateLost(f"worker {worker}, which held the state of {task.label}, is gone")
            batch.finish(task, failure_of(error, worker, task.index, task.label))

    def _define(self, name: str, value: Any) -> None:
        """Register a constant or function; it is sent to each worker with its next item."""
        backend = self._open_backend()
        if callable(value) and not backend.in_this_process:
            _check_importable(value)
        self._definitions[name] = backend.prepare(pack(value, name))
        for worker in self._workers.values():
            worker.defined.discard(name)

    def _send_forgotten(self) -> None:
        """Tell idle workers what they can drop; busy ones are told before a later map.

        They also give back the memory that they have freed: others may do what follows.
        """
        while self._dead_maps:
            dead = self._dead_maps.pop()
            for worker in self._workers.values():
                worker.forgotten_maps.append(dead)
        for number in set(self._workers) - set(self._running):
            worker = self._workers[number]
            functions = worker.defined - set(self._definitions)
            if worker.forgotten_maps or functions or worker.has_worked:
                forget = Forget(tuple(worker.forgotten_maps), tuple(functions))
                worker.forgotten_maps.clear()
                worker.has_worked = False
                worker.defined -= functions
                self._backend.send(number, Message(forget))


def _check_importable(function: Callable[..., Any]) -> None:
    """Raise CannotPickle if a function is defined in the script, which workers do not run."""
    target = getattr(function, "func", function)
    if getattr(target, "__module__", None) == "__main__":
        name = getattr(target, "__qualname__", repr(target))
        raise CannotPickle(
            f"the function {name!r} is defined in the script itself, which workers do not run "
            "again: define it in a module"
        )


def _repeat_log(records: Iterable[dict[str, Any]], label: str) -> None:
    """Repeat here what was logged in a worker."""
    for entries in records:
        record = logging.makeLogRecord(entries)
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            record.msg = f"{label}: {record.msg}"
            logger.handle(record)
