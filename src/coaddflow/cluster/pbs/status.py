#!/usr/bin/env python3
"""Print what a job does: running, success or failed. Called by Snakemake: status.py JOBID.

Any other word, or an exit code, would abort the whole run, so in every doubt a job is running:
the server is away, the answer makes no sense, a job has just vanished. It has ended when it left
its exit code, when PBS says how it ended, or when PBS has not known it for a while.
"""

import signal
import sys
from pathlib import Path

# also where Python is told not to look there (PYTHONSAFEPATH)
sys.path.insert(0, str(Path(__file__).resolve().parent))


def main(job_id):
    """Print the state of a job, and on standard error why it failed."""
    # Ctrl-C reaches this process, too, but it is Snakemake that decides what follows
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    word, reason = "running", ""
    try:
        # in here, since they may be unreadable at this moment, or be damaged
        import pbs
        import verdict

        word, reason = verdict.settle(job_id, pbs.setting("POLL", 10))
    except Exception as error:  # in every doubt: running
        print(f"status of PBS job {job_id}: {type(error).__name__}: {error}", file=sys.stderr)
    if word == "failed" and reason:
        print(f"PBS job {job_id}: {reason}", file=sys.stderr)
    print(word if word in ("success", "failed") else "running")


if __name__ == "__main__":
    main(sys.argv[1])
