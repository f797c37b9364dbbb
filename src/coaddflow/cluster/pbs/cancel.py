"""Cancel jobs. Called by Snakemake, which waits 2 s at most: cancel.py JOBID [JOBID ...].

A person calls it without ids, in the folder of the survey: then all its jobs are cancelled, and
listed. Jobs that have not begun will do nothing, even if the server is away and cannot be told.
"""

import contextlib
import subprocess

from coaddflow.cluster.pbs import records

PATIENCE = 1.2


def main(job_ids):
    """Start qdel for the jobs and leave it running when it takes long."""
    labels = [records.label_of(job_id) for job_id in job_ids]
    if not job_ids:
        job_ids, labels = all_jobs()
    qdel = start(["qdel", *job_ids]) if job_ids else None
    with contextlib.suppress(OSError):
        for label in filter(None, labels):
            records.withdraw(label)
        for job_id in job_ids:
            records.cancel(job_id)
    if qdel:
        with contextlib.suppress(subprocess.TimeoutExpired):
            qdel.wait(PATIENCE)


def all_jobs():
    """List the jobs of the survey; return their ids and the labels of those that may not begin."""
    by_id = {job_id: records.label_of(job_id) for job_id in records.names("ids")}
    ours = {job_id: label for job_id, label in by_id.items() if records.is_ours(label)}
    tickets = [label for label in records.names("tickets") if records.is_ours(label)]
    for job_id, label in ours.items():
        print(f"{job_id} {records.name_of(label)}: deleted")
    for label in tickets:
        if label not in by_id.values():
            print(f"{records.name_of(label)}: will do nothing; its id is not known")
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
