"""Work scattered over processes inside a job, and gathered again (docs/pool.md).

Modules: `pool` (map, map_again, broadcast, reduce), `rounds` (several rounds on the same items,
which are restarted when their worker dies), `worker` (what a function sees, and how it is run),
`failure` (failures as values), `queue` (which item next), `read_ahead` (its files), `messages` and
`packing` (what is sent), `backend`, `engines` and one module per backend: `serial`, `processes`,
`mpi`, `dask`; `launch` (the pool of a job of the workflow).

Nothing is ever pickled to disk or unpickled from it.
"""

from coaddflow.pool.failure import CannotPickle, Failure, PoolError, StateLost, WorkerDied
from coaddflow.pool.pool import Pool, Results
from coaddflow.pool.read_ahead import FilePart
from coaddflow.pool.rounds import Rounds
from coaddflow.pool.worker import Worker

__all__ = [
    "CannotPickle",
    "Failure",
    "FilePart",
    "Pool",
    "PoolError",
    "Results",
    "Rounds",
    "StateLost",
    "Worker",
    "WorkerDied",
]
