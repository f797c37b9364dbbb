"""The light reader and writer of ECSV agree with astropy."""

import subprocess
import sys

import pytest
from astropy.table import Column as TableColumn
from astropy.table import MaskedColumn, Table

from coaddflow.tables import ecsv

COLUMNS = [
    ecsv.Column("patch", str, description="A meaning so long that YAML breaks its line: " * 5),
    ecsv.Column("n", int),
    ecsv.Column("value", float, description="May be absent"),
]
ROWS = [
    ("1_2", 3, 0.1),
    ("", -4, None),
    ('a "quoted", long text', 0, 1e-300),
    ("é", 2**60, 1e16),
    ("5", 5, -0.0),
]
META = {"exposure": "0123", "tract": 7, "band": "on"}


def table_of(rows):
    table = Table(meta=META)
    for column, values in zip(COLUMNS, zip(*rows, strict=True), strict=True):
        if column.kind is float:
            absent = [value is None for value in values]
            filled = [0.0 if value is None else value for value in values]
            table[column.name] = MaskedColumn(filled, mask=absent)
        else:
            table[column.name] = TableColumn(values)
        table[column.name].description = column.description or None
    return table


def test_a_table_is_written_byte_for_byte_as_astropy_writes_it(tmp_path):
    ecsv.write_rows(tmp_path / "own.ecsv", COLUMNS, ROWS, META)
    table_of(ROWS).write(tmp_path / "astropy.ecsv", format="ascii.ecsv")
    assert (tmp_path / "own.ecsv").read_text() == (tmp_path / "astropy.ecsv").read_text()


@pytest.mark.parametrize("rows", [ROWS, []])
def test_cells_and_meta_come_back(tmp_path, rows):
    path = tmp_path / "t.ecsv"
    ecsv.write_rows(path, COLUMNS, rows, META)
    cells = [["" if value is None else str(value) for value in row] for row in rows]
    assert [list(row.values()) for row in ecsv.read_rows(path)] == cells
    assert ecsv.read_meta(path) == META


@pytest.mark.parametrize("line", ["1_2 3", "1_2 3 0.1 4"])
def test_a_row_of_another_length_is_an_error(tmp_path, line):
    path = tmp_path / "t.ecsv"
    path.write_text(f"patch n value\n{line}\n")
    with pytest.raises(ValueError, match="cells for 3 columns"):
        ecsv.read_rows(path)


@pytest.mark.parametrize("text", ["", "# %ECSV 1.0\n", "# meta: !!omap\n# - {a: [1\na\n"])
def test_a_header_without_meta_is_an_error(tmp_path, text):
    path = tmp_path / "t.ecsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"meta|damaged"):
        ecsv.read_meta(path)


def test_planning_pays_for_neither_astropy_nor_numpy():
    code = (
        "import sys, coaddflow.tables.exposures, coaddflow.tables.manifest; "
        "print({'astropy', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("letter", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_a_line_feed_ends_a_line(tmp_path, letter):
    path = tmp_path / "t.ecsv"
    ecsv.write_rows(path, COLUMNS[:2], [(f"a{letter}b", 1)])
    assert ecsv.read_rows(path) == [{"patch": f"a{letter}b", "n": "1"}]


def test_what_csv_cannot_divide_is_a_value_error(tmp_path):
    path = tmp_path / "t.ecsv"
    path.write_text('a b\n1 "' + "x" * 200_000 + '"\n')
    with pytest.raises(ValueError, match="field larger"):
        ecsv.read_rows(path)
