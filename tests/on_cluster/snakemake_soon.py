"""Snakemake, but it looks at its jobs on Slurm every few seconds.

The executor waits 10 s longer after each look at which nothing had ended, which is right for jobs
that take an hour. In a test it is most of the time, and no setting changes it.
"""

import sys

from snakemake.cli import main
from snakemake_executor_plugin_slurm import Executor

SECONDS = 3

if __name__ == "__main__":
    Executor.next_seconds_between_status_checks = property(lambda _: SECONDS, lambda _, value: None)
    sys.exit(main())
