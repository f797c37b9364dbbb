"""A dask worker process that is started by the master, and ends with it."""

import asyncio
import logging
import os
import signal
import sys
import tempfile

import dask
import distributed

from coaddflow.pool.dask import WORKER_SETTINGS
from coaddflow.pool.lifeline import end_when, pipe_has_ended


def main(scheduler: str, lifeline: str) -> None:
    """Run a dask worker with one thread; ``lifeline`` is as in `coaddflow.pool.child`."""
    sys.argv[1:] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with (
        dask.config.set(WORKER_SETTINGS),
        tempfile.TemporaryDirectory(prefix="coaddflow-dask-") as folder,
    ):
        asyncio.run(_work(scheduler, folder, int(lifeline)))
    # the item in progress cannot be interrupted: do not wait for its thread
    os._exit(0)


async def _work(scheduler: str, folder: str, lifeline: int) -> None:
    """Run a worker until SIGTERM, or until the scheduler is gone."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    end_when(pipe_has_ended(lifeline))
    worker = distributed.Worker(
        scheduler, nthreads=1, memory_limit=None, local_directory=folder, dashboard=False
    )
    await worker
    ends = [asyncio.ensure_future(one) for one in (stop.wait(), worker.finished())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    await worker.close(timeout=1, executor_wait=False)
    ends[0].cancel()
