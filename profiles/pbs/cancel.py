#!/usr/bin/env python3
"""Cancel jobs. Called by Snakemake, which waits 2 s at most: cancel.py JOBID [JOBID ...].

A person calls it without ids, in the folder of the survey: then all its jobs are cancelled. Jobs
that have not begun will do nothing, even if the server is away and cannot be told.
"""

import contextlib
import subprocess
import sys

import ledger

PATIENCE = 1.2


def main(job_ids):
    """Start qdel for the jobs and leave it running when it takes long."""
    labels = [ledger.label_of(job_id) for job_id in job_ids]
    if not job_ids:
        job_ids, labels = ledger.names("ids"), ledger.names("tickets")
    qdel = start(["qdel", *job_ids]) if job_ids else None
    with contextlib.suppress(OSError):
        for label in filter(None, labels):
            ledger.remove(ledger.FOLDER / "tickets" / label)
        for job_id in job_ids:
            ledger.replace(ledger.FOLDER / "cancelled" / job_id, "")
    if qdel:
        with contextlib.suppress(subprocess.TimeoutExpired):
            qdel.wait(PATIENCE)


def start(command):
    """Start a command that goes on when this program ends."""
    return subprocess.Popen(  # noqa: S603 - a list, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
