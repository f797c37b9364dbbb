"""A manifest gives back what was put into it, also what could not be measured."""

import pytest

from coaddflow.errors import InputError
from coaddflow.tables.manifest import (
    CcdRow,
    ccd_states,
    ccds_failed_with,
    fraction_lost,
    read_manifest,
    read_row,
    write_manifest,
    write_row,
)

FACTS = {"band": "g", "mjd": 57000.123456789, "exposure_time": 30.0}


@pytest.fixture
def rows():
    done = CcdRow(
        exposure="0123",
        ccd=1,
        state="done",
        path="results/calexp/0123/1.fits",
        footprint_ra=[359.9999999, 0.1],
        footprint_dec=[-1.0 / 3.0, 2.0],
        seeing=0.7123456789,
        n_sources=12,
        lost_fraction=0.02,
        **FACTS,
    )
    failed = CcdRow(
        exposure="0123",
        ccd=0,
        state="failed",
        reason="no_stars",
        message='raw/0123.fits: no "stars", none',
        **FACTS,
    )
    return [done, failed]


def test_manifest_round_trip_in_the_order_of_the_ccds(tmp_path, rows):
    write_manifest(tmp_path / "0123.ecsv", rows)
    assert read_manifest(tmp_path / "0123.ecsv") == rows[::-1]


def test_all_failed_round_trip(tmp_path, rows):
    write_manifest(tmp_path / "m.ecsv", rows[1:])
    assert read_manifest(tmp_path / "m.ecsv") == rows[1:]


def test_row_round_trip(tmp_path, rows):
    for row in rows:
        write_row(tmp_path / "row.json", row)
        assert read_row(tmp_path / "row.json") == row


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "1.json").write_text('{"exposure": "1"')
    (tmp_path / "1.ecsv").write_text("exposure ccd\n1 2\n")
    with pytest.raises(InputError, match=r"1\.json: is not a row"):
        read_row(tmp_path / "1.json")
    with pytest.raises(InputError, match=r"1\.ecsv: is not a manifest"):
        read_manifest(tmp_path / "1.ecsv")


def test_a_ccd_is_once_in_a_manifest(tmp_path, rows):
    with pytest.raises(ValueError, match="once"):
        write_manifest(tmp_path / "m.ecsv", [rows[0], rows[0]])
    assert not list(tmp_path.iterdir())


def test_states_are_read_without_the_rest(tmp_path, rows):
    path = tmp_path / "0123.ecsv"
    assert ccd_states(path) is None
    assert ccds_failed_with(path, "no_stars") is None
    write_manifest(path, rows)
    message = 'raw/0123.fits: no "stars", none'
    assert ccd_states(path) == {
        0: ("failed", "no_stars", message, 0.0, ""),
        1: ("done", "", "", 0.02, ""),
    }
    assert fraction_lost(ccd_states(path).values()) == 0.5
    assert ccds_failed_with(path, "no_stars") == {0}
    assert ccds_failed_with(path, "missing_file") == set()
    half = CcdRow(**{**rows[0].model_dump(), "lost_fraction": 0.5})
    write_manifest(path, [half, rows[1]])
    assert fraction_lost(ccd_states(path).values()) == 0.75
    path.write_text("damaged\n1 2\n")
    assert ccd_states(path) == {}


def test_nan_is_not_a_quality(rows):
    with pytest.raises(ValueError, match="finite"):
        CcdRow(**{**rows[0].model_dump(), "seeing": float("nan")})


def test_a_message_of_many_lines_does_not_spoil_the_manifest(tmp_path, rows):
    message = 'raw/a\nb.fits: TypingError: no\n\n# "x" é\t\x00\x1b[1m\u2028end\n'
    strange = CcdRow(**{**rows[1].model_dump(), "message": message})
    write_row(tmp_path / "0.json", strange)
    write_manifest(tmp_path / "m.ecsv", [rows[0], read_row(tmp_path / "0.json")])
    assert read_manifest(tmp_path / "m.ecsv") == [strange, rows[0]]
    assert strange.message == 'raw/a b.fits: TypingError: no # "x" é [1m end'
