"""How the cost of planning grows, as a picture: the table of docs/scale.md.

    python benchmarks/planning_growth.py

Reads the measured exposures, CPU times and peak memories from the page, and writes
docs/images/planning-growth.svg. Needs matplotlib (``pip install 'coaddflow[science]'``).
"""

import re
from pathlib import Path

import matplotlib as mpl
import numpy as np

mpl.use("svg")

from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"
ROW = re.compile(r"\| ([\d,]+) \| ([\d,]+) \| ([\d,.]+) \| ([\d,.]+) \| ([\d,]+) \|")
"""A row of the table: exposures, jobs, CPU seconds, wall seconds, MB."""


def measured(page: str) -> np.ndarray:
    """Return the rows of the table of a page: exposures, jobs, CPU s, wall s, MB."""
    rows = [ROW.fullmatch(line) for line in page.splitlines()]
    return np.array(
        [[float(cell.replace(",", "")) for cell in row.groups()] for row in rows if row]
    )


def draw(rows: np.ndarray, path: Path) -> None:
    """Draw CPU time and memory against exposures, with lines of a constant cost each."""
    exposures = rows[:, 0]
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axis, values, name in zip(
        axes, (rows[:, 2], rows[:, 4]), ("CPU time, s", "peak memory, MB"), strict=True
    ):
        axis.loglog(exposures, values, "o", color="C0")
        # from the largest survey: what it costs to begin is in the small ones
        axis.loglog(exposures, values[-1] * exposures / exposures[-1], "--", color="C1", lw=1)
        axis.set(xlabel="exposures of 104 CCDs", ylabel=name)
        axis.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw the picture."""
    mpl.rcParams.update({"svg.hashsalt": "coaddflow", "svg.fonttype": "none"})
    path = DOCS / "images" / "planning-growth.svg"
    draw(measured((DOCS / "scale.md").read_text(encoding="utf-8")), path)
    print(path)


if __name__ == "__main__":
    main()
