"""Cancel jobs: those that Snakemake names, or all jobs of the survey in this folder.

Jobs that have not begun will do nothing, even if the server is away and cannot be told.
"""

import contextlib
import subprocess

from coaddflow.cluster.pbs import outcome, records

PATIENCE = 1.2
"""Seconds to wait for qdel: Snakemake ends this program after 2 s."""


def main(job_ids):
    """Cancel jobs, all if none are named; a qdel that takes long goes on by itself."""
    labels = [records.label_of(job_id) for job_id in job_ids]
    if not job_ids:
        job_ids, labels = list_all()
    qdel = start(["qdel", *job_ids]) if job_ids else None
    with contextlib.suppress(OSError):
        for label in filter(None, labels):
            records.withdraw(label)
        for job_id in job_ids:
            records.note_deletion(job_id, outcome.CANCELLED)
    if qdel:
        with contextlib.suppress(subprocess.TimeoutExpired):
            qdel.wait(PATIENCE)


def list_all():
    """Print the jobs of the survey; return their ids and the labels of those that may not begin."""
    by_id = {job_id: records.label_of(job_id) for job_id in records.names("ids")}
    ours = {job_id: label for job_id, label in by_id.items() if records.is_ours(label)}
    tickets = [label for label in records.names("tickets") if records.is_ours(label)]
    for job_id, label in ours.items():
        print(f"{job_id} {records.name_of(label)}: deleted")
    for label in tickets:
        if label not in by_id.values():
            print(f"{records.name_of(label)}: will end as soon as it starts; its id is not known")
    others = len(by_id) - len(ours)
    if others:
        print(f"{others} jobs of the survey of which this is a copy: left alone")
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
