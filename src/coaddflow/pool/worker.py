"""A worker: what functions see of it, and how it handles the messages of the master."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from coaddflow.fence import fenced_by
from coaddflow.pool.failure import failure_of
from coaddflow.pool.messages import Define, Done, Forget, Message, Run
from coaddflow.pool.packing import Packed, pack, read_only, unpack
from coaddflow.runtime.allocator import give_back_freed_memory, keep_freed_memory


@dataclass(frozen=True)
class Worker:
    """What a function that runs on the pool sees of its worker."""

    id: int
    """Number of the worker. A worker that replaces a dead one has a new number."""
    constants: Mapping[str, Any]
    """What was broadcast; arrays in it are read-only."""
    state: dict[str, Any]
    """Belongs to this item and stays with the worker: empty in `Pool.map`; `Pool.map_again` finds
    in it what the function has put there for the same item."""
    cache: dict[str, Any]
    """Belongs to the worker, as long as it lives. No result may depend on it: which items a worker
    gets is a matter of timing."""


class WorkerLoop:
    """Handles the messages to the worker of a number, in whatever process that is.

    With ``capture_log``, log records are sent with the answer: the master is another process.
    """

    def __init__(self, worker: int, capture_log: bool):
        self.id = worker
        self._capture_log = capture_log
        self._packed: dict[str, Packed] = {}
        self._defined: dict[str, Any] = {}
        self._states: dict[tuple[int, int], dict[str, Any]] = {}
        self._cache: dict[str, Any] = {}
        self._keeps_memory = capture_log and keep_freed_memory()  # in a process of its own

    def handle(self, message: Message) -> Message | None:
        """Do what a message asks; return the answer, if there is one."""
        head = message.head
        if isinstance(head, Run):
            return self._run(head, message.body)
        if isinstance(head, Define):
            self._defined.pop(head.name, None)
            self._packed[head.name] = read_only(message.body)
        elif isinstance(head, Forget):
            self._states = {
                key: state for key, state in self._states.items() if key[0] not in head.maps
            }
            for name in head.functions:
                self._defined.pop(name, None)
                self._packed.pop(name, None)
            if self._keeps_memory:
                # the next round may be done by others
                give_back_freed_memory()
        return None

    def _run(self, run: Run, body: Packed) -> Message:
        """Run a function on an item; what it raises becomes the answer."""
        state, packed, failure = self._states.pop(run.state, {}), None, None
        begin = time.monotonic()
        with _records(run.log_level, self._capture_log) as log, fenced_by(run.fence):
            try:
                worker = Worker(self.id, _Constants(self), state, self._cache)
                result = self._value(run.function)(unpack(body), worker)
                packed = pack(result, f"the result of {run.label}")
            except (Exception, SystemExit) as error:
                failure = failure_of(error, self.id)
        if state and failure is None:
            self._states[run.state] = state
        seconds = time.monotonic() - begin
        return Message(Done(seconds, bool(state), failure, tuple(log)), packed)

    def _value(self, name: str) -> Any:
        """Return a constant or function, unpacked at first use: an error then fails one item."""
        if name not in self._defined:
            self._defined[name] = unpack(self._packed[name])
        return self._defined[name]


class _Constants(Mapping[str, Any]):
    """The constants of a worker, unpacked at first use."""

    def __init__(self, loop: WorkerLoop):
        self._loop = loop

    def __getitem__(self, name: str) -> Any:
        return self._loop._value(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._loop._packed if name.isidentifier())

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Recorder(logging.Handler):
    """Collects log records in a form that can be pickled."""

    def __init__(self, records: list[dict[str, Any]]):
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        entries = dict(record.__dict__, msg=record.getMessage(), args=None, exc_info=None)
        if record.exc_info and record.exc_info[0] is not None:
            entries["exc_text"] = logging.Formatter().formatException(record.exc_info)
        known = logging.makeLogRecord({}).__dict__  # extra entries may be anything
        self._records.append({key: entries[key] for key in known if key in entries})


@contextlib.contextmanager
def _records(level: int, capture: bool) -> Iterator[list[dict[str, Any]]]:
    """Collect what is logged and warned in a block."""
    records: list[dict[str, Any]] = []
    if not capture:
        yield records
        return
    root = logging.getLogger()
    old_level, handler = root.level, _Recorder(records)
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    try:
        yield records
    finally:
        logging.captureWarnings(False)
        root.setLevel(old_level)
        root.removeHandler(handler)
