"""Jobs that the tests of `coaddflow.pool.launch` run."""

import logging
import os
import signal
import time
import warnings

from coaddflow.errors import InputError
from coaddflow.fence import Fence, begin
from coaddflow.files import atomic_path

LOG = logging.getLogger("coaddflow.work")


def run(pool, spec):
    """Double some numbers, or fail as asked."""
    LOG.info("there are %d numbers", len(spec["numbers"]))
    warnings.warn("the master is odd", RuntimeWarning, stacklevel=1)
    if "mistake" in spec:
        raise InputError("is no number", path="numbers.txt", remedy="count again")
    if "files" in spec:
        return write_beside_a_newer_job(pool, spec)
    if "bug" in spec:
        raise ZeroDivisionError("by nothing")
    results = pool.map(double, spec["numbers"], label=lambda item: f"number {item}")
    return {"doubled": results, "n_failed": len(results.failures)}


def write_beside_a_newer_job(pool, spec):
    """Write files on the workers, with the token, and after a newer job has taken it."""
    first = pool.map(write, spec["files"][:2])
    begin(Fence(spec["token"], "a newer job"))
    second = pool.map(write, spec["files"][2:])
    return [[failure.type for failure in results.failures] for results in (first, second)]


def write(path, _worker):
    with atomic_path(path) as temporary:
        temporary.write_text("x")


def double(item, _worker):
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "sleep":
        time.sleep(60)
    LOG.info("doubling")
    return 2 * item
