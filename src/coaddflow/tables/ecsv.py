"""ECSV, the text tables that link the stages: one light reader and one writer.

ECSV (Astropy Proposal for Enhancement 6, version 1.0) is CSV below a YAML comment that says the
type, unit and meaning of each column. `astropy.table.Table.read` understands what is written
here. Planning reads the manifest of every exposure; hence this module imports only `csv`, and
YAML where a header is written or asked for.
"""

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, get_args, get_origin

from coaddflow.errors import InputError
from coaddflow.files import atomic_text

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Record = TypeVar("Record")

_DATATYPES = {int: "int64", float: "float64", str: "string"}

_HEADER_WIDTH = 130  # where astropy breaks the lines of a header


@dataclass(frozen=True)
class Column:
    """What the header of a table says about a column."""

    name: str
    """Its name, without blanks."""
    kind: type
    """``int``, ``float`` or ``str``."""
    length: int | None = None
    """Number of floats in each cell, which are written as a JSON list."""
    unit: str = ""
    """Unit in the FITS convention; empty if there is none."""
    description: str = ""
    """Its meaning; empty if the header need not say it."""


def read_rows(path: str | Path, delimiter: str = " ") -> list[dict[str, str]]:
    """Read the rows of a table as text, by the names of the columns; its header is not looked at.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is not text, or a row has more or fewer cells than there are columns.
    """
    return rows_of(Path(path).read_text(encoding="utf-8"), delimiter)


def rows_of(text: str, delimiter: str = " ") -> list[dict[str, str]]:
    """Return the rows of the text of a table as `read_rows` does."""
    lines = [line for _, line in _numbered(text)]
    if not lines or not text.endswith("\n"):
        raise ValueError("it is cut off" if lines else "it is empty")
    try:
        names, *rows = csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    for number, row in enumerate(rows, start=1):
        if len(row) != len(names):
            raise ValueError(f"row {number} has {len(row)} cells for {len(names)} columns")
    return [dict(zip(names, row, strict=True)) for row in rows]


def cells_of(line: str, delimiter: str = ",") -> list[str]:
    """Return the cells of one line; ValueError if it cannot be divided into cells."""
    try:
        return next(csv.reader([line], delimiter=delimiter))
    except (csv.Error, StopIteration) as error:
        raise ValueError(str(error)) from error


def numbered_lines(path: str | Path) -> list[tuple[int, str]]:
    """Return the lines that are neither comments nor empty, with their numbers from 1."""
    return _numbered(Path(path).read_text(encoding="utf-8"))


def _numbered(text: str) -> list[tuple[int, str]]:
    # not `splitlines`, to which some letters of other scripts are ends of lines
    lines = enumerate(text.split("\n"), start=1)
    return [(n, line) for n, line in lines if line.strip() and not line.startswith("#")]


def write_rows(
    path: str | Path,
    columns: Sequence[Column],
    rows: Iterable[Iterable[object]],
    meta: Mapping[str, str | int] | None = None,
) -> None:
    """Write a table whose cells are separated by blanks, byte for byte as astropy would.

    Parameters
    ----------
    path : str or Path
        The file, which is whole or not there.
    columns, rows : iterable
        The columns, and for each row a value for each of them; see `row_line`.
    meta : mapping, optional
        What the header says about the whole table.
    """
    lines = [*header_lines(columns, meta), *map(row_line, rows)]
    atomic_text(path, "\n".join(lines) + "\n")


def read_records(path: str | Path, record: type[Record], what: str) -> list[Record]:
    """Read a table whose columns are the fields of a dataclass.

    Parameters
    ----------
    path : str or Path
        A table written by `write_records`.
    record : type
        The dataclass; its fields are texts, integers and floats.
    what : str
        What the table is, with its article, for the message.

    Raises
    ------
    InputError
        If it is missing or damaged.
    """
    kinds = {field.name: field.type for field in fields(record)}
    try:
        rows = read_rows(path)
        return [record(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in rows]
    except (OSError, ValueError, LookupError, ArithmeticError) as error:
        raise damaged(path, what, error) from error


def write_records(
    path: str | Path, record: type[Record], rows: Iterable[Record], meta: Mapping[str, str | int]
) -> None:
    """Write a table whose columns are the fields of a dataclass; see `write_rows`."""
    columns = [Column(field.name, field.type) for field in fields(record)]
    write_rows(path, columns, map(astuple, rows), meta)


def model_columns(model: "type[BaseModel]") -> list[Column]:
    """Return the columns of a table whose rows are models of pydantic.

    Units stand in ``json_schema_extra`` of a field. Tuples of floats are columns of lists; lists,
    whose lengths may differ, are texts to astropy.
    """
    return [_model_column(name, field) for name, field in model.model_fields.items()]


def damaged(path: str | Path, what: str, error: Exception) -> InputError:
    """Return the error for a table of the workflow that cannot be read."""
    return InputError(
        f"is not {what} ({error})", path=path, remedy="remove it and run the workflow again"
    )


def header_lines(
    columns: Sequence[Column], meta: Mapping[str, str | int] | None = None, delimiter: str = " "
) -> list[str]:
    """Return everything above the first row: the YAML comment and the names of the columns.

    Tables with commas are also edited by hand: each column has a line of the comment to itself.
    """
    lines = ["%ECSV 1.0", "---"]
    if delimiter == ",":
        # JSON is YAML too
        cards = [f"- {json.dumps(_card(column))}" for column in columns]
        lines += [f"delimiter: '{delimiter}'", "datatype:", *cards]
    else:
        lines += _yaml_lines({"datatype": [_card(column) for column in columns]})
    if meta:
        lines += ["meta: !!omap", *_yaml_lines([{key: meta[key]} for key in meta])]
    lines.append("schema: astropy-2.0")
    names = delimiter.join(column.name for column in columns)
    return [*(f"# {line}" for line in lines), names]


def row_line(values: Iterable[object], delimiter: str = " ") -> str:
    """Return a row as a line: None as an empty cell, lists of numbers as JSON."""
    return delimiter.join(_quoted(_cell(value), delimiter) for value in values)


def read_meta(path: str | Path) -> dict[str, str | int]:
    """Return what the header says about the whole table.

    Raises ValueError if it says nothing, or is damaged.
    """
    import yaml

    lines = Path(path).read_text(encoding="utf-8").splitlines()
    header = [line.removeprefix("# ") for line in lines if line.startswith("# ")]
    try:
        start = header.index("meta: !!omap")
        return dict(yaml.safe_load("\n".join(header[start:]))["meta"])
    except (yaml.YAMLError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"its header is damaged: {error}") from error


def _model_column(name: str, field: "FieldInfo") -> Column:
    members = get_args(field.annotation) or (field.annotation,)
    kind = next((kind for kind in (int, float) if kind in members), str)
    kind = str if get_origin(field.annotation) is list else kind
    length = len(members) if get_origin(field.annotation) is tuple else None
    extra = field.json_schema_extra
    unit = str(extra["unit"]) if isinstance(extra, dict) else ""
    return Column(name, kind, length, unit, field.description or "")


def _card(column: Column) -> dict[str, str]:
    """Return the header's entry for a column."""
    card = {"name": column.name, "datatype": _DATATYPES[column.kind]}
    if column.length:
        card |= {"datatype": "string", "subtype": f"float64[{column.length}]"}
    texts = {"unit": column.unit, "description": column.description}
    return card | {key: text for key, text in texts.items() if text}


def _yaml_lines(content: object) -> list[str]:
    import yaml

    # mappings in braces, lists line by line
    style = {"default_flow_style": None, "sort_keys": False, "width": _HEADER_WIDTH}
    # that of libyaml writes the same in a fifth of the time
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return yaml.dump(content, Dumper=dumper, **style).splitlines()


def _cell(value: object) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list | tuple) else str(value)


def _quoted(cell: str, delimiter: str) -> str:
    """Return a cell in quotes if it needs them; among blanks, an empty cell does."""
    is_plain = cell or delimiter != " "
    if is_plain and not (delimiter in cell or '"' in cell or "\n" in cell or "\r" in cell):
        return cell
    return '"' + cell.replace('"', '""') + '"'
