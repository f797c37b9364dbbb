#!/usr/bin/env python3
"""Print the state of a PBS job for Snakemake, running, success or failed: status.py JOBID.

Anything else, or an exit code other than 0, would abort the run. If the package cannot be read at
this moment, the job therefore counts as running.
"""

import signal
import sys
from pathlib import Path

# Ctrl-C reaches this process too, but Snakemake decides what happens next
signal.signal(signal.SIGINT, signal.SIG_IGN)
# the package of this checkout; it needs nothing else, so that any Python from 3.6 on will do
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

try:
    from coaddflow.cluster.pbs.status import main

    state = main(sys.argv[1])
except Exception as error:
    print(f"state of PBS job {sys.argv[1]}: {type(error).__name__}: {error}", file=sys.stderr)
    state = "running"
print(state)
