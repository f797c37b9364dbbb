"""Jobs that the tests of `coaddflow.pool.launch` run."""

import logging
import os
import signal
import time
import warnings

from coaddflow.errors import InputError

LOG = logging.getLogger("coaddflow.work")


def run(pool, spec):
    """Double some numbers, or fail as asked."""
    LOG.info("there are %d numbers", len(spec["numbers"]))
    warnings.warn("the master is odd", RuntimeWarning, stacklevel=1)
    if "mistake" in spec:
        raise InputError("is no number", path="numbers.txt", remedy="count again")
    if "bug" in spec:
        raise ZeroDivisionError("by nothing")
    results = pool.map(double, spec["numbers"], label=lambda item: f"number {item}")
    return {"doubled": results, "n_failed": len(results.failures)}


def double(item, _worker):
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "sleep":
        time.sleep(60)
    LOG.info("doubling")
    return 2 * item
