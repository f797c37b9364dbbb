"""Verifying the products of a survey: every byte against the checksums that were written with it.

Calexps, warps and coadds of a tract job are compared with the SHA-256 in manifests and tables,
other FITS files with the DATASUM and CHECKSUM in their headers; tables, databases and pictures are
read. What was found good is recorded with size and time, so that an interrupted verification goes
on where it was, and the next one looks at what is new.
"""

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coaddflow.corners.connections import UnavailableError, open_for_reading, reading_failed
from coaddflow.errors import InputError
from coaddflow.files import sha256_of
from coaddflow.image.checksum import wrong_sums
from coaddflow.pool import Pool, Worker
from coaddflow.tables import ecsv, paths
from coaddflow.tables.coadds import read_coadd_table
from coaddflow.tables.manifest import read_manifest
from coaddflow.tables.warps import read_warp_table
from coaddflow.workflow.plan import Plan
from coaddflow.workflow.stages import CALIB_STAGES, STAGES

VERIFIED = Path(".snakemake") / "coaddflow" / "verified.jsonl"
"""What was found good, a line each: file, size, time of change, SHA-256 that it should have."""

_AT_ONCE = 32
"""Files of each worker after which what was found is recorded."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Product:
    """A file to verify."""

    path: str
    """Relative to the working folder."""
    remove: tuple[str, ...]
    """What must be removed before a run makes it again."""
    sha256: str = ""
    """Its checksum in a manifest or table; empty: there is none."""


@dataclass(frozen=True)
class BadProduct:
    """A product that is not what was written, or could not be verified, and what to do."""

    product: Product
    cause: str
    advice: str = ""
    """What to do about one that could not be verified."""

    @property
    def remedy(self) -> str:
        """What to do, as commands where it is to be made again."""
        return self.advice or f"rm {' '.join(self.product.remove)}; then run the workflow again"


@dataclass(frozen=True)
class Verification:
    """What came out."""

    n_products: int
    """Products that are there, or that a table names."""
    n_known: int
    """Those that were found good earlier and have not changed."""
    bad: tuple[BadProduct, ...]


def verify_survey(
    plan: Plan,
    workers: int = 1,
    again: bool = False,
    record: Path = VERIFIED,
    progress: Progress | None = None,
) -> Verification:
    """Verify all products of a run that are there; call it in the survey's folder.

    Parameters
    ----------
    plan : Plan
        What the run makes.
    workers : int
        Processes that read files.
    again : bool
        Also read what was found good earlier and has the same size and time.
    record : Path
        Where to keep what was found good.
    progress : callable, optional
        Called with the number of files done and their total.
    """
    products, bad = _products(plan)
    known = {} if again else _recorded(record)
    todo = [product for product in products if known.get(product.path) != _state(product)]
    record.parent.mkdir(parents=True, exist_ok=True)
    n_done, step = 0, _AT_ONCE * workers
    with (
        record.open("w" if again else "a", encoding="utf-8") as stream,
        Pool("processes" if workers > 1 else "serial", workers) as pool,
    ):
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            states = [_state(product) for product in part]
            results = pool.map(_problem_of, part, label=lambda product: product.path)
            for failure in results.failures:
                failure.raise_again()
            for product, state, problem in zip(part, states, results, strict=True):
                if problem is not None:
                    bad.append(problem)
                else:
                    stream.write(json.dumps([product.path, *state]) + "\n")
            stream.flush()
            n_done += len(part)
            if progress is not None:
                progress(n_done, len(todo))
    n_products = len(products) + len({one.product.path for one in bad} - {p.path for p in products})
    return Verification(n_products, len(products) - len(todo), tuple(bad))


def _state(product: Product) -> list[Any]:
    """Return what is recorded of a product that is good."""
    try:
        state = Path(product.path).stat()
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns, product.sha256]


def _recorded(record: Path) -> dict[str, list[Any]]:
    """Return what was found good earlier; the last line of a killed run may be cut off."""
    found: dict[str, list[Any]] = {}
    with contextlib.suppress(OSError):
        for line in record.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                path, *state = json.loads(line)
                found[path] = state
    return found


def _products(plan: Plan) -> tuple[list[Product], list[BadProduct]]:
    """Return what is to be read, and tables that cannot be."""
    found: list[Product] = []
    bad: list[BadProduct] = []
    for part in (_of_calibs, _of_exposures, _of_warps, _of_tracts):
        for one in part(plan):
            (bad if isinstance(one, BadProduct) else found).append(one)
    return list({product.path: product for product in found}.values()), bad


def _of_calibs(plan: Plan) -> Iterator[Product]:
    for name in ("frame_table", *CALIB_STAGES, "calib_table"):
        yield from _there(STAGES[name].files(plan))


def _of_exposures(plan: Plan) -> Iterator[Product | BadProduct]:
    for exposure in plan.exposures:
        manifest = paths.MANIFEST.format(exposure=exposure)
        if not Path(manifest).exists():
            continue
        try:
            rows = read_manifest(manifest)
        except InputError as error:
            yield BadProduct(Product(manifest, (manifest,)), error.cause)
            continue
        for row in rows:
            if row.state != "done":
                continue
            own_row = paths.ROW.format(exposure=exposure, ccd=row.ccd)
            remove = (own_row, manifest) if Path(own_row).exists() else (manifest,)
            yield Product(row.path, remove, row.sha256)
            sources = paths.SOURCES.format(exposure=exposure, ccd=row.ccd)
            yield from (Product(path.path, remove) for path in _there([sources]))


def _of_warps(plan: Plan) -> Iterator[Product | BadProduct]:
    for table in STAGES["warp"].files(plan):
        if not Path(table).exists():
            continue
        try:
            warps = read_warp_table(table).warps
        except InputError as error:
            yield BadProduct(Product(table, (table,)), error.cause)
            continue
        for warp in warps:
            yield Product(str(Path(table).parent / warp.path), (table,), warp.sha256)


def _of_tracts(plan: Plan) -> Iterator[Product | BadProduct]:
    if STAGES["coadd"].is_planned(plan):
        yield from _there(STAGES["coadd"].files(plan))
    else:
        for table in _names(STAGES["tract"].products[0].files(plan)):
            try:
                rows = read_coadd_table(table)
            except InputError as error:
                yield BadProduct(Product(table, (table,)), error.cause)
                continue
            for row in rows:
                yield Product(str(Path(table).parent / row.path), (table,), row.sha256)
    tables, maps = STAGES["depth"].products
    yield from _there(tables.files(plan))
    for units in maps.units(plan):
        table = tables.path.format(tract=units["tract"])
        yield from (Product(one.path, (table,)) for one in _there([maps.path.format(**units)]))
    for name in ("tract_corners", "survey_corners", "picture"):
        yield from _there(STAGES[name].files(plan))


def _names(files: Iterable[str]) -> list[str]:
    return [name for name in files if Path(name).exists()]


def _there(files: Iterable[str]) -> Iterator[Product]:
    """Yield the files that are there, as products that are removed to be made again."""
    return (Product(name, (name,)) for name in _names(files))


def _problem_of(product: Product, worker: Worker) -> BadProduct | None:
    """Return a product with what is wrong with it; None if it is good."""
    try:
        cause = _damage(product)
    except UnavailableError as error:
        return BadProduct(product, error.cause, error.remedy or "")
    except (InputError, ValueError, SyntaxError, sqlite3.DatabaseError) as error:
        cause = getattr(error, "cause", None) or f"it is damaged ({error})"
    except OSError as error:
        if error.errno is not None:
            raise
        cause = f"it is damaged ({error})"
    return BadProduct(product, cause) if cause else None


def _damage(product: Product) -> str:
    """Return the damage of a product, or raise what its reader says; empty if it is good."""
    path = Path(product.path)
    if not path.is_file():
        return "it is not there, although its table names it"
    if path.suffix == ".fits":
        return _problem_of_fits(path, product.sha256)
    if path.suffix == ".sqlite":
        return _problem_of_database(path)
    if path.suffix == ".ecsv":
        ecsv.read_rows(path)
    elif path.suffix == ".png":
        _read_picture(path)
    return ""


def _problem_of_fits(path: Path, sha256: str) -> str:
    if sha256 and sha256_of(path) == sha256:
        return ""
    wrong = wrong_sums(path)
    if wrong:
        return wrong[0]
    return "it is not the file whose SHA-256 its table has" if sha256 else ""


def _problem_of_database(path: Path) -> str:
    with contextlib.closing(open_for_reading(path)) as database:
        try:
            (answer,) = database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            raise reading_failed(path, error) from error
    return "" if answer == "ok" else f"it is damaged ({answer})"


def _read_picture(path: Path) -> None:
    from PIL import Image

    # a survey's picture may be larger than what PIL takes for an attack
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as picture:
        picture.load()
