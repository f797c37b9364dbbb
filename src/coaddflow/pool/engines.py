"""The backends by name; their packages are imported when one is chosen."""

import importlib
from types import ModuleType

from coaddflow.errors import InputError
from coaddflow.pool.backend import Backend, available_cores

BACKENDS = ("serial", "processes", "mpi", "dask")


def make_backend(name: str, workers: int | None, address: str | None) -> Backend:
    """Return a backend for the arguments of `Pool`, not started.

    Raises
    ------
    InputError
        If there is no such backend, its packages are not installed, or it does not take these
        arguments.
    """
    if name not in BACKENDS:
        raise InputError(
            f"there is no pool backend {name!r}", remedy=f"choose one of {', '.join(BACKENDS)}"
        )
    if workers is not None and workers < 1:
        raise InputError(f"a pool cannot have {workers} workers", remedy="give 1 or more")
    if address is not None and name != "dask":
        raise InputError(f"the pool backend {name!r} takes no address", remedy="leave it out")
    if name == "serial":
        return load(name).SerialBackend()
    if name == "processes":
        return load(name).ProcessBackend(workers or available_cores())
    if name == "mpi":
        return load(name).MpiBackend(workers)
    return load(name).DaskBackend(workers, address)


def load(name: str) -> ModuleType:
    """Return the module of a backend.

    Raises
    ------
    InputError
        If what it needs is not installed: mpi4py and an MPI library, or distributed.
    """
    try:
        return importlib.import_module(f"coaddflow.pool.{name}")
    except (ImportError, RuntimeError) as error:  # mpi4py without MPI library: RuntimeError
        raise InputError(
            f"the pool backend {name!r} cannot be loaded: {error}",
            remedy=f"install what it needs: pip install 'coaddflow[{name}]'",
        ) from error
