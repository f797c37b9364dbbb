#!/usr/bin/env python3
"""Cancel PBS jobs: cancel.py JOBID ...; without ids, all jobs of the survey in this folder."""

import sys
from pathlib import Path

# the package of this checkout; it needs nothing else, so that any Python from 3.6 on will do
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from coaddflow.cluster.pbs.cancel import main

if __name__ == "__main__":
    main(sys.argv[1:])
