#!/usr/bin/env python3
"""Submit a job script of Snakemake to PBS and print the job's id: submit.py JOBSCRIPT."""

import sys
from pathlib import Path

# the package of this checkout; it needs nothing else, so that any Python from 3.6 on will do
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from coaddflow.cluster.pbs.submit import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
