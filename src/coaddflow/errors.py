"""The kinds of failure that coaddflow tells apart.

An `InputError` is a mistake in what the user gave (a file, a setting, an id): it ends the job
with one line that says what, where and what to do. A `CcdFailure` is a result: this CCD cannot
be processed for reasons of its own, and the exposure goes on without it. Anything else is a
mistake in the program (or trouble of the machine): it ends the job with a traceback, and as an
`UnexpectedError` names what was being worked on.
"""

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path


class Reason(StrEnum):
    """Why a CCD (or the calibration frame of one) fails: the codes in tables."""

    # the raw file, or the image calibrated elsewhere
    MISSING_FILE = "missing_file"
    MISSING_EXTENSION = "missing_extension"
    MISSING_KEYWORD = "missing_keyword"
    NOT_FITS = "not_fits"
    TRUNCATED_FILE = "truncated_file"
    DAMAGED_FILE = "damaged_file"
    CHANGED_FILE = "changed_file"
    WRONG_SHAPE = "wrong_shape"
    CONSTANT_IMAGE = "constant_image"
    ALL_ZERO = "all_zero"
    ALL_NAN = "all_nan"
    NO_WCS = "no_wcs"

    # its calibration frames
    NO_CALIBRATION = "no_calibration"
    MISSING_FRAMES = "missing_frames"
    BROKEN_FRAMES = "broken_frames"
    DARK_FLAT = "dark_flat"
    NO_SKY = "no_sky"

    # its pixels and sources
    BAD_OVERSCAN = "bad_overscan"
    NO_DATA = "no_data"
    TOO_MANY_COSMIC_RAYS = "too_many_cosmic_rays"
    DETECTION_FAILED = "detection_failed"
    NO_STARS = "no_stars"
    NO_PSF_STARS = "no_psf_stars"
    PSF_FIT_FAILED = "psf_fit_failed"
    NO_APERTURE_CORRECTION = "no_aperture_correction"

    # its place on the sky and its zero-point
    REFCAT_MISSES_FIELD = "refcat_misses_field"
    TOO_FEW_STARS = "too_few_stars"
    NO_ASTROMETRIC_MATCH = "no_astrometric_match"
    ASTROMETRIC_FIT_FAILED = "astrometric_fit_failed"
    ASTROMETRY_RMS = "astrometry_rms"
    NO_PHOTOMETRIC_MATCH = "no_photometric_match"
    NOT_FINITE = "not_finite"


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


class TooLittleMemory(InputError):  # noqa: N818 - of a job, which is tried again with more
    """A job has less memory than is of any use; another attempt asks for what it needs.

    Parameters
    ----------
    what : str
        What needs it.
    needed_mb : int
        Memory that the job needs, MB.
    memory_mb : float
        Memory that it has, MB.
    remedy : str
        What the user can do about it.
    """

    lasting = False

    def __init__(self, what: str, needed_mb: int, memory_mb: float, remedy: str):
        super().__init__(
            f"{what} need {needed_mb} MB, and the job has {memory_mb:.0f} MB", remedy=remedy
        )


class CcdFailure(CoaddflowError):  # noqa: N818 - a result that travels as an exception
    """One CCD cannot be processed; the rest of its exposure can.

    Parameters
    ----------
    reason : Reason
        Code for tables.
    message : str
        One sentence for people, naming the file and the remedy where there is one.
    """

    def __init__(self, reason: Reason, message: str):
        super().__init__(reason, message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class ReplacedError(CoaddflowError):
    """A newer job has taken over what this job makes: it must not change anything any more.

    Nothing is wrong with the data, and nobody waits for this job.
    """

    lasting = False


class UnusableData(CcdFailure):
    """A step that does not know files cannot work with the data of a CCD.

    The row of the CCD then names the raw file, or the image calibrated elsewhere.
    """


@contextlib.contextmanager
def failing_ccd(reason: Reason, what: str, *errors: type[Exception]) -> Iterator[None]:
    """Let what a library raises on odd data fail the CCD.

    Stands around the call of the library and nothing else, so that a mistake in the program does
    not pass for odd data.

    Parameters
    ----------
    reason : Reason
        Why the CCD fails.
    what : str
        What cannot be done, such as "the PSF model cannot be fitted to the stars".
    *errors : type of Exception
        What the library raises on data that it cannot work with.

    Raises
    ------
    UnusableData
        If one of these was raised; its message says ``what``, and what the library said.
    """
    try:
        yield
    except errors as error:
        raise UnusableData(reason, f"{what} ({type(error).__name__}: {error})") from error


class UnexpectedError(Exception):
    """A mistake in the program; its cause is what was raised.

    Parameters
    ----------
    where : str
        What was being worked on, such as "exposure 1001, CCD 3".
    cause : str
        Type and message of the exception.
    """

    def __init__(self, where: str, cause: str):
        super().__init__(where, cause)

    def __str__(self) -> str:
        return ": ".join(self.args)


@contextlib.contextmanager
def working_on(where: str) -> Iterator[None]:
    """Turn a mistake in the program into an `UnexpectedError` that names what was worked on.

    Results, errors that are raised on purpose, and trouble of the machine (a full disk, no memory)
    pass as they are.

    Parameters
    ----------
    where : str
        What is being worked on, such as "exposure 1001, CCD 3".
    """
    try:
        yield
    except (CoaddflowError, UnexpectedError, OSError, MemoryError):
        raise
    except Exception as error:
        raise UnexpectedError(where, f"{type(error).__name__}: {error}") from error


def is_lasting(error: BaseException | None) -> bool:
    """Return whether another attempt would fail in the same way.

    So it is with mistakes in the data and in the program, but not with trouble of the machine.
    """
    if not isinstance(error, CoaddflowError | UnexpectedError):
        return False
    while error is not None:
        if isinstance(error, OSError | MemoryError) or not getattr(error, "lasting", True):
            return False
        error = error.__cause__
    return True
