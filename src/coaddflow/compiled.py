"""Compiled functions: numba's `njit`, cached wherever there is room.

Numba keeps compiled functions beside their source or in the user's cache folder, and refuses to
cache at all if it can write to neither: the package may belong to an administrator, and HOME be
read-only on compute nodes. Then the folder of the survey is used, in which every job runs.
"""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_IN_SURVEY = Path(".snakemake") / "coaddflow" / "numba"


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function, and caches it if that is possible.

    Parameters
    ----------
    **options
        Those of `numba.njit`, without ``cache``.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # numba: no locator available
            if not numba.config.CACHE_DIR and (folder := _folder_in_survey()) is not None:
                numba.config.CACHE_DIR = str(folder)
                return decorate(function)
            return numba.njit(**options)(function)

    return decorate


def _folder_in_survey() -> Path | None:
    """Return a folder that only this user can write to, None if there cannot be one.

    What numba finds in its cache it executes.
    """
    if not _IN_SURVEY.parents[1].is_dir():
        return None  # this is not the folder of a survey
    try:
        _IN_SURVEY.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = _IN_SURVEY.lstat()
    except OSError:
        return None
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return None
    return _IN_SURVEY.absolute()
