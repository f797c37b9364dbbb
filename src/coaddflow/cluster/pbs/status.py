"""The state of a job, in the words that Snakemake's executor knows."""

import sys
import time

from coaddflow.cluster.pbs import outcome, records, server


def main(job_id):
    """Return "running", "success" or "failed"; print to standard error why a job failed.

    A job counts as running whenever that is in doubt: the server is away, its answer makes no
    sense, the job has just vanished.
    """
    word, reason = outcome.settle(job_id, server.setting("POLL", 10))
    if word == "failed" and reason:
        print(f"PBS job {job_id}: {reason}", file=sys.stderr)
    elif word == outcome.RUNNING:
        tell_why_it_waits(job_id)
    return word if word in ("success", "failed") else "running"


def tell_why_it_waits(job_id):
    """Print, once, that a job does not start by itself, or has been in the queue for long."""
    job = (records.last_answer()["jobs"] or {}).get(job_id)
    waits = outcome.waits(job)
    if not waits:
        return
    if job.state == "Q":
        submitted = (records.FOLDER / "ids" / job_id).stat().st_mtime
        if not job.comment or time.time() - submitted < server.setting("WAIT", 1800):
            return
        waits = server.WAITING_STATES["Q"]  # the comment changes: it is told once
    if records.tell(job_id, waits):
        name = records.name_of(records.label_of(job_id))
        print(f"PBS job {job_id}: {name} {outcome.waits(job)}", file=sys.stderr)
