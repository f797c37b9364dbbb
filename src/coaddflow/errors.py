"""The two kinds of failure that coaddflow tells apart.

An `InputError` is a mistake in what the user gave (a file, a setting, an id): it ends the job
with one line that says what, where and what to do. A `CcdFailure` is a result: this CCD cannot
be processed for reasons of its own, and the exposure goes on without it.
"""

from pathlib import Path


class CoaddflowError(Exception):
    """Base class of all errors that coaddflow raises on purpose.

    Attributes
    ----------
    lasting : bool
        Whether another attempt would fail in the same way.
    """

    lasting = True


class InputError(CoaddflowError):
    """A file, setting or id given by the user is not usable.

    Parameters
    ----------
    cause : str
        What is wrong, in one sentence without a full stop.
    path : str or Path, optional
        The file that is at fault.
    remedy : str, optional
        What the user can do about it, in one sentence without a full stop.
    """

    def __init__(self, cause: str, path: str | Path | None = None, remedy: str | None = None):
        super().__init__(cause, path, remedy)
        self.cause = cause
        self.path = path
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path is not None else ""
        remedy = f". {self.remedy[0].upper()}{self.remedy[1:]}" if self.remedy else ""
        return f"{where}{self.cause}{remedy}"


class CcdFailure(CoaddflowError):  # noqa: N818 - a result that travels as an exception
    """One CCD cannot be processed; the rest of its exposure can.

    Parameters
    ----------
    reason : str
        Short code for tables, such as ``no_stars`` or ``truncated_file``.
    message : str
        One sentence for people, naming the file and the remedy where there is one.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


def is_lasting(error: BaseException | None) -> bool:
    """Return whether an error would come again: a mistake found in the data, no machine trouble."""
    if not isinstance(error, CoaddflowError):
        return False
    while error is not None:
        if isinstance(error, OSError | MemoryError) or not getattr(error, "lasting", True):
            return False
        error = error.__cause__
    return True
