"""Submit a job to Slurm as sbatch does, but wait for a controller that is away; see bin/sbatch."""

import sys
from pathlib import Path

# the package of this checkout; this module of it needs nothing else
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from coaddflow.cluster.sbatch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], wrapper=Path(__file__).resolve().parent / "bin"))
