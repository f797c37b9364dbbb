"""Catalogue files as archives hand them out: named columns of numbers, from any of five formats.

FITS tables, VOTable, Parquet and text (CSV, tab-separated as VizieR writes it, ECSV as Gaia's bulk
files have it), plain or gzip-compressed. The format shows in the first bytes of a file, not in its
name. What a file leaves out (masked cells, ``null``, empty fields) is NaN.

References
----------
.. [1] Ochsenbein et al. 2019, VOTable 1.4, IVOA Recommendation (sections 4 and 5).
.. [2] ESA, Gaia Archive documentation, bulk download: ECSV with ``null`` for missing values.
"""

import errno
import gzip
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from astropy.io import ascii as text_tables
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.errors import InputError, did_you_mean
from coaddflow.image.fits_hdus import open_fits, walk_hdus

FloatArray = NDArray[np.float64]

CatalogueFormat = Literal["fits", "votable", "parquet", "ecsv", "csv", "tsv"]

_MISSING = ("", "null", "NULL", "nan", "NaN", "NAN", "--", "N/A", "n/a", "None", "none", r"\N", "-")
"""Cells of text files that stand for a missing value."""

_MAX_TEXT = 8 << 30
"""Bytes of a decompressed text catalogue beyond which it is refused."""

_OF_THE_FILE = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EINVAL)
"""Numbers of an OSError for which the file is at fault, and not the machine."""


@dataclass(frozen=True)
class Column:
    """A column of numbers of a catalogue file."""

    name: str
    """Its name in the file."""
    values: FloatArray
    """Its values; NaN where missing."""
    unit: str
    """Its unit as the file has it; empty: the file does not say."""


def read_columns(
    path: Path, names: Iterable[str], file_format: CatalogueFormat | None = None
) -> dict[str, Column]:
    """Read columns of a catalogue file.

    Parameters
    ----------
    path : Path
        The file.
    names : iterable of str
        The columns, as the settings call them. A column that differs only in capitals is taken if
        it is the only one.
    file_format : str, optional
        Format of the file; None: what its first bytes say.

    Returns
    -------
    dict of str to Column
        By the names that were asked for.

    Raises
    ------
    InputError
        If the file is not readable, damaged or truncated, or a column is missing or not numeric;
        names the file.
    OSError, MemoryError
        If the machine cannot read it.
    """
    wanted = sorted(set(names))
    shown = file_format or "reference"
    try:
        shown = file_format or _format_of(path)
        with warnings.catch_warnings():
            # units and cells that do not follow the standard, of columns that are not used
            warnings.simplefilter("ignore")
            # astropy only warns of a file that ends too early, and then gives what there is
            warnings.filterwarnings("error", message=".*truncated.*")
            return _READERS[shown](path, wanted)
    except (InputError, MemoryError):
        raise
    except OSError as error:
        if error.errno not in _OF_THE_FILE:
            raise
        raise _unreadable(path, shown, error) from error
    except Exception as error:
        raise _unreadable(path, shown, error) from error


def _unreadable(path: Path, file_format: str, error: Exception) -> InputError:
    text = getattr(error, "strerror", None) or str(error).strip()
    cause = (text.splitlines() or [type(error).__name__])[0]
    if isinstance(error, EOFError):
        cause = f"truncated: {cause}"
    return InputError(
        f"is not a readable {file_format} catalogue ({cause})",
        path=path,
        remedy="get the file again, or check refcat.path and refcat.format",
    )


def _format_of(path: Path) -> CatalogueFormat:
    """Return the format of a file from its first bytes."""
    with path.open("rb") as stream:
        start = stream.read(4096)
    if start[:2] == b"\x1f\x8b":
        start = zlib.decompressobj(wbits=31).decompress(start, 4096)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start.startswith(b"SIMPLE  ="):
        return "fits"
    if start.startswith(b"PAR1"):
        return "parquet"
    if text[:5].lower() == b"<?xml" or text[:8].lower() == b"<votable":
        return "votable"
    if text.startswith(b"# %ECSV"):
        return "ecsv"
    if not text:
        raise ValueError("the file is empty")
    if b"\0" in start:
        raise ValueError("the file is neither FITS, VOTable, Parquet nor text")
    return "csv"


# ---------------------------------------------------------------------------------------------
# Names and numbers
# ---------------------------------------------------------------------------------------------


def _found(path: Path, wanted: Sequence[str], known: Sequence[str]) -> dict[str, str]:
    """Return the names in the file of the columns that are wanted."""
    by_small_letters: dict[str, list[str]] = {}
    for name in known:
        by_small_letters.setdefault(name.lower(), []).append(name)
    found = {}
    for name in wanted:
        alike = [name] if name in known else by_small_letters.get(name.lower(), [])
        if len(alike) != 1:
            listed = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
            raise InputError(
                f"the reference catalogue has no column {name!r}{did_you_mean(name, known)}; "
                f"it has {listed}",
                path=path,
                remedy="say in the settings, section refcat, which column means what",
            )
        found[name] = alike[0]
    return found


def _has_all(wanted: Sequence[str], known: Iterable[str]) -> bool:
    return {name.lower() for name in wanted} <= {name.lower() for name in known}


def _columns(
    path: Path,
    wanted: Sequence[str],
    units: Mapping[str, object],
    values_of: Callable[[str], Any],
) -> dict[str, Column]:
    """Return the columns that are wanted of a table whose columns have these names and units."""
    found = _found(path, wanted, list(units))
    return {
        asked: Column(name, _numbers(path, name, values_of(name)), _unit_text(units[name]))
        for asked, name in found.items()
    }


def _unit_text(unit: object) -> str:
    return "" if unit is None else str(unit).strip()


def _numbers(path: Path, name: str, values: Any) -> FloatArray:
    """Return a column as float64, NaN where it is masked; refuse what are no numbers."""
    mask = np.ma.getmaskarray(values) if np.ma.isMaskedArray(values) else None
    plain = np.ma.getdata(values)
    if mask is not None and mask.all():
        # of a column without any value text formats do not know the type
        return np.full(len(plain), np.nan)
    if plain.dtype.kind not in "fiu" or plain.ndim != 1:
        raise InputError(
            f"column {name!r} of the reference catalogue is not a column of numbers",
            path=path,
            remedy="angles must be decimal numbers and empty magnitudes NaN or left empty",
        )
    numbers = plain.astype(np.float64)
    if mask is not None:
        numbers[mask] = np.nan
    return numbers


# ---------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------


def _read_fits(path: Path, wanted: Sequence[str]) -> dict[str, Column]:
    """Read from the first table that has the columns: in FITS_LDAC files that is the second."""
    # opened here, once, since astropy leaves a broken file open
    with open_fits(path) as stream:
        for _ in walk_hdus(stream):
            pass  # a file that is shorter than its headers say is refused before a table is read
        stream.seek(0)
        with fits.open(stream, memmap=False) as hdus:
            tables = [hdu for hdu in hdus if isinstance(hdu, (fits.BinTableHDU, fits.TableHDU))]
            if not tables:
                raise ValueError("it has no table")
            table = next((hdu for hdu in tables if _has_all(wanted, hdu.columns.names)), tables[0])
            columns = {column.name: column for column in table.columns}
            units = {name: column.unit for name, column in columns.items()}
            return _columns(path, wanted, units, lambda name: _fits_values(table, columns[name]))


def _fits_values(table: Any, column: fits.Column) -> Any:
    values = table.data[column.name]
    null = column.null
    if null not in (None, "") and values.dtype.kind in "iu":
        return np.ma.masked_array(values, np.asarray(values) == int(null))
    return values


def _read_votable(path: Path, wanted: Sequence[str]) -> dict[str, Column]:
    """Read from the first table of a VOTable that has the columns [1]_."""
    from astropy.io.votable import parse

    content = _plain_bytes(path)
    # what the archive says about the query that this is the answer to
    status = re.search(
        rb"""name=["']QUERY_STATUS["'][^>]*value=["'](ERROR|OVERFLOW)["']""", content
    )
    if status:
        told = {b"ERROR": "the query failed", b"OVERFLOW": "the answer was cut at the row limit"}
        raise ValueError(f"the archive says that {told[status[1]]}")
    found = list(parse(BytesIO(content), verify="ignore").iter_tables())
    if not found:
        raise ValueError("it has no table")
    tables = [table.to_table(use_names_over_ids=True) for table in found]
    table = next((one for one in tables if _has_all(wanted, one.colnames)), tables[0])
    units = {column.name: column.unit for column in table.itercols()}
    return _columns(path, wanted, units, lambda name: _array(table[name]))


def _read_parquet(path: Path, wanted: Sequence[str]) -> dict[str, Column]:
    """Read columns of a Parquet file; units where astropy has written it."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(
            "reading Parquet catalogues needs the package pyarrow",
            path=path,
            remedy="install it: pip install 'coaddflow[parquet]'",
        ) from None

    with parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        found = _found(path, wanted, schema.names)
        table = file.read(columns=sorted(set(found.values())))
    written = (schema.metadata or {}).get(b"table_meta_yaml", b"").decode()
    units = dict.fromkeys(schema.names) | (_ecsv_header(written)[1] if written else {})

    def values_of(name: str) -> Any:
        column = table.column(name)
        missing = column.is_null().to_numpy()
        return np.ma.masked_array(column.fill_null(0).to_numpy(), missing)

    return _columns(path, wanted, units, values_of)


def _read_text(path: Path, wanted: Sequence[str]) -> dict[str, Column]:
    """Read a text table with its column names in the first line; lines with # are comments."""
    lines = _plain_bytes(path).decode("utf-8-sig").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    rows = [line for line in lines if line.strip() and not line.startswith("#")]
    if not rows:
        raise ValueError("the file has no rows")
    delimiter = _delimiter_of(rows[0])
    if comments and not _has_all(wanted, _cells(rows[0], delimiter)):
        # the line with the names is a comment too
        header = comments[-1].lstrip("# ")
        if _has_all(wanted, _cells(header, delimiter)):
            rows.insert(0, header)
    units: dict[str, object] = dict.fromkeys(_cells(rows[0], delimiter))
    # VizieR: names, units, dashes, and then the numbers
    if len(rows) > 2 and re.fullmatch(rf"[-\s{re.escape(delimiter)}]*-", rows[2].rstrip()):
        units = dict(zip(units, _cells(rows[1], delimiter), strict=False))
        del rows[1:3]
    return _text_columns(path, wanted, rows, delimiter, units)


def _read_ecsv(path: Path, wanted: Sequence[str]) -> dict[str, Column]:
    """Read ECSV: a YAML header in comments, then a text table [2]_."""
    lines = _plain_bytes(path).decode("utf-8").splitlines()
    header = [line[1:].removeprefix(" ") for line in lines if line.startswith("#")]
    rows = [line for line in lines if line.strip() and not line.startswith("#")]
    if not rows:
        raise ValueError("the file has no rows")
    delimiter, units = _ecsv_header("\n".join(line for line in header if line[:1] != "%"))
    names = _cells(rows[0], delimiter)
    return _text_columns(path, wanted, rows, delimiter, {n: units.get(n) for n in names})


def _text_columns(
    path: Path, wanted: Sequence[str], rows: list[str], delimiter: str, units: Mapping[str, object]
) -> dict[str, Column]:
    """Return columns of a text table: its lines, names first."""
    names = sorted(set(_found(path, wanted, list(units)).values()))
    if len(rows) == 1:
        return _columns(path, wanted, units, lambda name: np.empty(0))
    if delimiter == "\t":
        rows = [re.sub(r" *\t *", "\t", row).strip(" ") for row in rows]
    table = text_tables.read(
        rows,
        # the other formats take tabs at the end of a line, which are empty cells, for blanks
        **({"format": "tab"} if delimiter == "\t" else {"format": "basic", "delimiter": delimiter}),
        guess=False,
        fast_reader=True,
        names=list(units),
        include_names=names,
        fill_values=[(text, "0", *names) for text in _MISSING],
    )
    return _columns(path, wanted, units, lambda name: _array(table[name]))


def _array(column: Any) -> Any:
    """Return a column of a table as a NumPy array, masked where cells are missing."""
    masked = isinstance(column, Table.MaskedColumn)
    return np.ma.masked_array(column.data) if masked else np.asarray(column)


class _EcsvLoader(yaml.SafeLoader):
    """A YAML loader to which the objects of astropy are nothing."""


_EcsvLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _ecsv_header(text: str) -> tuple[str, dict[str, object]]:
    """Return the delimiter and the units of the columns of an ECSV header."""
    content = yaml.load(text, _EcsvLoader)  # noqa: S506 - a SafeLoader
    return content.get("delimiter", " "), {c["name"]: c.get("unit") for c in content["datatype"]}


def _delimiter_of(header: str) -> str:
    """Return what separates the names in the first line of a text table."""
    return next((character for character in "\t,;|" if character in header), ",")


def _cells(line: str, delimiter: str) -> list[str]:
    cells = line.split() if delimiter == " " else line.split(delimiter)
    return [cell.strip().strip('"').strip() for cell in cells]


def _plain_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed where its first bytes say so."""
    with path.open("rb") as plain:
        if plain.peek(2)[:2] != b"\x1f\x8b":
            return plain.read()
        with gzip.open(plain) as stream:
            content = stream.read(_MAX_TEXT)
            if stream.read(1):
                raise ValueError(f"it expands to more than {_MAX_TEXT >> 30} GiB")
            return content


_READERS: dict[str, Callable[[Path, Sequence[str]], dict[str, Column]]] = {
    "fits": _read_fits,
    "votable": _read_votable,
    "parquet": _read_parquet,
    "ecsv": _read_ecsv,
    "csv": _read_text,
    "tsv": _read_text,
}
