#!/usr/bin/env python3
"""Cancel jobs. Called by Snakemake, which waits 2 s at most: cancel.py JOBID [JOBID ...]."""

import contextlib
import subprocess
import sys

PATIENCE = 1.5


def main(job_ids):
    """Start qdel for all jobs and leave it running when it takes long."""
    qdel = subprocess.Popen(  # noqa: S603 - a list, no shell
        ["qdel", *job_ids],  # noqa: S607 - of the user's PATH
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        qdel.wait(PATIENCE)


if __name__ == "__main__":
    main(sys.argv[1:])
