"""One thread for numerical libraries: the workers run in parallel."""

from collections.abc import Mapping

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def single_threaded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which numerical libraries start one thread."""
    return {**environment, **dict.fromkeys(THREAD_VARIABLES, "1")}
