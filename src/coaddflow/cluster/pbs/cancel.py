#!/usr/bin/env python3
"""Cancel jobs. Called by Snakemake, which waits 2 s at most: cancel.py JOBID [JOBID ...].

A person calls it without ids, in the folder of the survey: then all its jobs are cancelled, and
listed. Jobs that have not begun will do nothing, even if the server is away and cannot be told.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

# also where Python is told not to look there (PYTHONSAFEPATH)
sys.path.insert(0, str(Path(__file__).resolve().parent))

import ledger

PATIENCE = 1.2


def main(job_ids):
    """Start qdel for the jobs and leave it running when it takes long."""
    labels = [ledger.label_of(job_id) for job_id in job_ids]
    if not job_ids:
        job_ids, labels = all_jobs()
    qdel = start(["qdel", *job_ids]) if job_ids else None
    with contextlib.suppress(OSError):
        for label in filter(None, labels):
            ledger.withdraw(label)
        for job_id in job_ids:
            ledger.cancel(job_id)
    if qdel:
        with contextlib.suppress(subprocess.TimeoutExpired):
            qdel.wait(PATIENCE)


def all_jobs():
    """List the jobs of the survey; return their ids and the labels of those that may not begin."""
    by_id = {job_id: ledger.label_of(job_id) for job_id in ledger.names("ids")}
    ours = {job_id: label for job_id, label in by_id.items() if ledger.is_ours(label)}
    tickets = [label for label in ledger.names("tickets") if ledger.is_ours(label)]
    for job_id, label in ours.items():
        print(f"{job_id} {ledger.name_of(label)}: deleted")
    for label in tickets:
        if label not in by_id.values():
            print(f"{ledger.name_of(label)}: will do nothing; its id is not known")
    kept = len(by_id) - len(ours)
    if kept:
        print(f"{kept} jobs of the survey of which this is a copy: left alone")
    return list(ours), tickets


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
