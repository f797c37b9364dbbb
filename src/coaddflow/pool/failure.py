"""Failures of items, which are values, and the errors of the pool itself."""

import pickle
import traceback
from dataclasses import dataclass, field, replace

from coaddflow.errors import CoaddflowError, is_lasting


class PoolError(CoaddflowError):
    """The pool cannot go on, or was used wrongly."""

    lasting = False


class CannotPickle(PoolError):  # noqa: N818 - says what is wrong with an item
    """Something cannot be sent between processes; the message names it."""


class WorkerDied(PoolError):  # noqa: N818
    """The worker ended while it had an item."""


class StateLost(PoolError):  # noqa: N818
    """The worker that held the state of an item is gone."""


@dataclass(frozen=True)
class Failure:
    """What is in the place of a result when an item failed.

    Attributes
    ----------
    index : int
        Place of the item among the items.
    label : str
        Name of the item for people.
    type : str
        Name of the class of the exception; `WorkerDied` and `StateLost` if the item is not at
        fault.
    message : str
        The exception in words.
    traceback : str
        Where in the worker it happened; empty if no Python code could tell.
    worker : int or None
        Number of the worker; None if the item was not given to any.
    error : Exception or None
        The exception itself, without its frames, if it can be sent between processes.
    """

    index: int
    label: str
    type: str
    message: str
    traceback: str = field(repr=False)
    worker: int | None
    error: Exception | None = field(repr=False, compare=False)

    def __str__(self) -> str:
        where = "" if self.worker is None else f" (worker {self.worker})"
        return f"{self.label}: {self.type}: {self.message}{where}"

    def raise_again(self) -> None:
        """Raise the exception, for failures that shall end the job.

        Raises
        ------
        Exception
            ``error``, with item, worker and traceback as a note; `PoolError` if there is none.
        """
        error = self.error or PoolError(str(self))
        error.add_note(f"{self}\n{self.traceback}".rstrip())
        raise error

    def named(self, index: int, label: str) -> "Failure":
        """Return this failure as that of another item."""
        return replace(self, index=index, label=label)


def failure_of(
    error: BaseException, worker: int | None, index: int = 0, label: str = ""
) -> Failure:
    """Return an exception as a value that can be sent between processes."""
    text = "".join(traceback.format_exception(error)) if error.__traceback__ else ""
    return Failure(
        index=index,
        label=label,
        type=type(error).__name__,
        message=str(error),
        traceback=text,
        worker=worker,
        error=_that_travels(error),
    )


def _that_travels(error: BaseException) -> Exception | None:
    """Return an exception without its frames, if it survives pickling: not all classes do."""
    error.__traceback__ = None
    if isinstance(error, CoaddflowError):
        # what it was raised from stays behind
        error.lasting = is_lasting(error)
    try:
        # what was pickled a moment ago in this process
        copy = pickle.loads(pickle.dumps(error, protocol=5))  # noqa: S301
    except Exception:
        return None
    return copy if isinstance(copy, Exception) and type(copy) is type(error) else None
