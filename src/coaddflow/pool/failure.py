"""Failures of items, which are values, and the errors of the pool itself."""

import pickle
import traceback
from dataclasses import dataclass, field

from coaddflow.errors import CoaddflowError, is_lasting


class PoolError(CoaddflowError):
    """The pool cannot continue, or was used wrongly."""

    lasting = False


class CannotPickle(PoolError):  # noqa: N818 - says what is wrong with an item
    """Something cannot be pickled; the message names it."""


class WorkerDied(PoolError):  # noqa: N818
    """The worker died while it was processing an item."""


class StateLost(PoolError):  # noqa: N818
    """The worker that held the state of an item is gone."""


@dataclass(frozen=True)
class Failure:
    """Takes the place of a result when an item has failed."""

    index: int
    """Position of the item among the items."""
    label: str
    """Name of the item in messages."""
    type: str
    """Name of the class of the exception; `WorkerDied`, `StateLost` if the item is not at fault."""
    message: str
    """Text of the exception."""
    traceback: str = field(repr=False)
    """Where in the worker it happened; empty if no exception was raised there."""
    worker: int | None
    """Number of the worker; None if the item was not given to any."""
    error: Exception | None = field(repr=False, compare=False)
    """The exception itself, without its frames, if it can be pickled."""

    def __str__(self) -> str:
        where = "" if self.worker is None else f" (worker {self.worker})"
        return f"{self.label}: {self.type}: {self.message}{where}"

    def raise_again(self) -> None:
        """Raise the exception, for failures that must end the job.

        Raises
        ------
        Exception
            ``error``, with item, worker and traceback as a note; `PoolError` if there is none.
        """
        error = self.error or PoolError(str(self))
        error.add_note(f"{self}\n{self.traceback}".rstrip())
        raise error


def failure_of(
    error: BaseException, worker: int | None, index: int = 0, label: str = ""
) -> Failure:
    """Return an exception as a value that can be pickled."""
    text = "".join(traceback.format_exception(error)) if error.__traceback__ else ""
    kind, message = type(error).__name__, str(error)
    return Failure(index, label, kind, message, text, worker, _pickled_and_back(error))


def _pickled_and_back(error: BaseException) -> Exception | None:
    """Return an exception without its frames; None if it does not survive pickling."""
    error.__traceback__ = None
    if isinstance(error, CoaddflowError):
        # is_lasting looks at its cause, which is not pickled
        error.lasting = is_lasting(error)
    try:
        # what was pickled a moment ago in this process
        copy = pickle.loads(pickle.dumps(error, protocol=5))  # noqa: S301
    except Exception:
        return None
    return copy if isinstance(copy, Exception) and type(copy) is type(error) else None
