"""The state of a job, in the words that Snakemake's executor knows."""

import sys

from coaddflow.cluster.pbs import outcome, server


def main(job_id):
    """Return "running", "success" or "failed"; print to standard error why a job failed.

    A job counts as running whenever that is in doubt: the server is away, its answer makes no
    sense, the job has just vanished.
    """
    word, reason = outcome.settle(job_id, server.setting("POLL", 10))
    if word == "failed" and reason:
        print(f"PBS job {job_id}: {reason}", file=sys.stderr)
    return word if word in ("success", "failed") else "running"
