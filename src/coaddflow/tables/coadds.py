"""The list of the coadds of a band on a tract: what the job of a tract promises.

It is written last: where it stands, all coadds that it names are whole, and of one job.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from coaddflow.tables import ecsv


@dataclass(frozen=True)
class CoaddRow:
    """One coadd."""

    patch: str
    "Patch id."
    path: str
    "The file, relative to the folder of the list."
    sha256: str
    "Its checksum."
    n_exposures: int
    "Exposures of which at least one pixel is used."
    n_left_out: int
    "CCDs that cover the patch and are left out by the selection."
    covered: float
    "Part of its pixels that have a value."
    most_inputs: int
    "Largest number of values at a pixel."


def coadd_table_path(coadd: str | Path) -> Path:
    """Return where the list stands that may name a coadd ``.../{band}/{tract}/{patch}.fits``."""
    folder = Path(coadd).parent
    return folder.with_name(f"{folder.name}.ecsv")


def coadd_remedy(coadd: str | Path) -> str:
    """Return what makes a coadd again that is damaged: the job of a tract promises the list."""
    table = coadd_table_path(coadd)
    removed = f"it and {table}" if table.exists() else "it"
    return f"remove {removed} and run the workflow again"


def write_coadd_table(path: str | Path, rows: Iterable[CoaddRow], band: str, tract: int) -> None:
    """Write the list, in the order of the rows."""
    ecsv.write_records(path, CoaddRow, rows, {"band": band, "tract": tract})


def read_coadd_table(path: str | Path) -> list[CoaddRow]:
    """Read the list; raise InputError if it is missing or damaged."""
    return ecsv.read_records(path, CoaddRow, "a list of coadds")


def coadd_files(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Yield coadds: files as they are, and those that lists name."""
    for path in map(Path, paths):
        if path.suffix == ".ecsv":
            yield from (path.parent / row.path for row in read_coadd_table(path))
        else:
            yield path
