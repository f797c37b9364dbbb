"""`python -m coaddflow` is the command `coaddflow`."""

import sys

from coaddflow.cli import main

if __name__ == "__main__":
    sys.exit(main())
