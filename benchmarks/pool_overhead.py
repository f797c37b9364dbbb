"""What the pool costs: starting it, an item that does nothing, and pixels there and back.

    python benchmarks/pool_overhead.py
    python benchmarks/pool_overhead.py --backends serial processes --items 1000 --megabytes 64
    mpirun -n 3 python -m coaddflow.pool benchmarks/pool_overhead.py --backends mpi

Prints one line per backend: seconds until the first answer of all workers, wall and CPU time of
the master per empty item, wall time per array that goes to a worker and comes back (median), and
how much of it went through pipes or sockets.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from coaddflow.errors import InputError
from coaddflow.pool import Pool


def nothing(_item, _worker):
    """Do nothing."""


def there_and_back(pixels, _worker):
    """Give back what came."""
    return pixels


def measure(backend: str, workers: int, n_items: int, megabytes: float) -> str:
    """Return the figures of one backend as a line of the table."""
    import pool_overhead as functions  # workers do not know functions of the script

    began = time.perf_counter()
    with Pool(backend, workers) as pool:
        pool.map(functions.nothing, range(workers))
        start = time.perf_counter() - began
        wall, cpu = time.perf_counter(), time.process_time()
        pool.map(functions.nothing, range(n_items))
        wall = (time.perf_counter() - wall) / n_items
        cpu = (time.process_time() - cpu) / n_items
        pixels = np.ones(int(megabytes * 1e6 / 4), np.float32)
        pool.map(functions.there_and_back, [pixels])
        piped, seconds = pool.traffic.piped, []
        for _ in range(5):
            began = time.perf_counter()
            pool.map(functions.there_and_back, [pixels])
            seconds.append(time.perf_counter() - began)
        piped = (pool.traffic.piped - piped) / 5
    return (
        f"{backend:<10} {start:8.2f} {1e3 * wall:9.3f} {1e3 * cpu:9.3f} "
        f"{1e3 * statistics.median(seconds):9.1f} {piped / 1e6:9.3f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["serial", "processes", "dask"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--megabytes", type=float, default=32.0)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    print(f"{'backend':<10} {'start':>8} {'item':>9} {'item CPU':>9} {'array':>9} {'piped':>9}")
    print(f"{'':<10} {'s':>8} {'ms':>9} {'ms':>9} {'ms':>9} {'MB':>9}")
    for backend in options.backends:
        try:
            print(measure(backend, options.workers, options.items, options.megabytes))
        except InputError as error:
            print(f"{backend:<10} {error}")


if __name__ == "__main__":
    main()
