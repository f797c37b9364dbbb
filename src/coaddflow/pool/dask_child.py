"""A dask worker process that is started by the master, and ends with it."""

import asyncio
import json
import logging
import os
import signal
import sys
import tempfile

import dask
import distributed

from coaddflow.pool.dask import WORKER_SETTINGS, WithoutPages
from coaddflow.pool.lifeline import end_when, pipe_has_ended


class _Worker(WithoutPages, distributed.Worker):
    pass


def main(scheduler: str, lifeline: str, certificate: str) -> None:
    """Run a dask worker with one thread.

    ``lifeline`` is as in `coaddflow.pool.child`; ``certificate`` is the file descriptor of a pipe
    that holds the certificate of the scheduler and its key, as JSON.
    """
    with os.fdopen(int(certificate), "rb") as stream:
        cert, key = json.load(stream)
    security = distributed.Security(
        require_encryption=True, tls_ca_file=cert, tls_worker_cert=cert, tls_worker_key=key
    )
    sys.argv[1:] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with (
        dask.config.set(WORKER_SETTINGS),
        tempfile.TemporaryDirectory(prefix="coaddflow-dask-") as folder,
    ):
        asyncio.run(_work(scheduler, security, folder, int(lifeline)))
    # the item in progress cannot be interrupted: do not wait for its thread
    os._exit(0)


async def _work(scheduler: str, security: distributed.Security, folder: str, lifeline: int) -> None:
    """Run a worker until SIGTERM, or until the scheduler is gone."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    end_when(pipe_has_ended(lifeline))
    worker = _Worker(
        scheduler, security=security, nthreads=1, memory_limit=None, local_directory=folder
    )
    await worker
    ends = [asyncio.ensure_future(one) for one in (stop.wait(), worker.finished())]
    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    await worker.close(timeout=1, executor_wait=False)
    ends[0].cancel()
