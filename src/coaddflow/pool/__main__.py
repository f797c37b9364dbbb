"""Run a script whose pools use MPI: ``mpirun -n RANKS python -m coaddflow.pool SCRIPT ...``."""

import sys

from coaddflow.errors import InputError
from coaddflow.pool.engines import load


def main() -> int:
    """Run the script on rank 0; the other ranks are workers."""
    if len(sys.argv) == 1:
        print("usage: mpirun -n RANKS python -m coaddflow.pool (SCRIPT | -m MODULE) [ARGUMENT ...]")
        return 2
    try:
        return load("mpi").run(sys.argv[1:])
    except InputError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
