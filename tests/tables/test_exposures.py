"""The tables that a survey starts from."""

import time

import pytest
from astropy import units
from astropy.table import Table

from coaddflow.errors import InputError
from coaddflow.tables.exposures import (
    ExposureRow,
    ImageRow,
    file_of,
    path_in_table,
    read_exposures,
    read_images,
    write_exposures,
    write_images,
)


def exposure(name="a1", **changes):
    row = {
        "exposure": name,
        "kind": "science",
        "band": "r",
        "ra": 150.1,
        "dec": -2.25,
        "rotation": 12.0,
        "mjd": 60000.125,
        "exposure_time": 30.0,
        "path": "raw/a1.fits",
        "n_files": 1,
    }
    return ExposureRow(**(row | changes))


def image(name="a1", ccd=3, **changes):
    row = {
        "exposure": name,
        "ccd": ccd,
        "band": "g",
        "mjd": 60000.0,
        "exposure_time": 10.0,
        "path": "i.fits",
        "hdu": 1,
        "nx": 20,
        "ny": 10,
        "footprint_ra": (1.0, 2.0, 2.0, 1.0),
        "footprint_dec": (1.0, 1.0, 2.0, 2.0),
        "electrons_per_unit": 1.5,
        "zero_point": 30.0,
    }
    return ImageRow(**(row | changes))


BIAS = {"kind": "bias", "band": "", "ra": None, "dec": None, "rotation": None}


def test_a_table_comes_back_as_it_was_written_ordered_by_time(tmp_path):
    rows = [exposure("late", mjd=60001.1), exposure("early"), exposure("zero", **BIAS)]
    path = tmp_path / "exposures.ecsv"
    assert write_exposures(path, rows)
    assert read_exposures(path) == [rows[1], rows[2], rows[0]]


def test_images_come_back_with_their_corners_and_absent_facts(tmp_path):
    rows = [image(ccd=1), image(ccd=2, seeing=0.8, weight_path="w.fits", weight_hdu=1)]
    write_images(tmp_path / "images.ecsv", rows)
    assert read_images(tmp_path / "images.ecsv") == rows


def test_astropy_reads_the_tables_with_units_types_and_corners(tmp_path):
    write_exposures(tmp_path / "e.ecsv", [exposure("000123"), exposure("b", **BIAS)])
    table = Table.read(tmp_path / "e.ecsv")
    assert list(table["exposure"]) == ["000123", "b"]
    assert table["ra"].unit == units.deg and table["mjd"].unit == units.d
    assert table["dec"][0] == -2.25 and table["dec"].mask[1]
    write_images(tmp_path / "i.ecsv", [image()])
    assert Table.read(tmp_path / "i.ecsv")["footprint_ra"].shape == (1, 4)


def test_a_plain_csv_made_by_hand_is_read(tmp_path):
    path = tmp_path / "hand.csv"
    path.write_text(
        "exposure,kind,band,ra,dec,rotation,mjd,exposure_time,path\n"
        'x,science,r,10,-20.5,0,60000,30,"raw, old/x.fits"\n'
    )
    (row,) = read_exposures(path)
    assert (row.ra, row.dec, row.path, row.n_files) == (10.0, -20.5, "raw, old/x.fits", 1)


def test_adding_an_exposure_leaves_the_lines_of_the_others_byte_for_byte(tmp_path):
    path = tmp_path / "e.ecsv"
    write_exposures(path, [exposure("a"), exposure("c", mjd=60002.0)])
    # a person has written 150.1 as 150.10
    path.write_text(path.read_text().replace("150.1,", "150.10,"))
    before = path.read_text().splitlines()
    write_exposures(path, [*read_exposures(path), exposure("b", mjd=60001.0)])
    after = path.read_text().splitlines()
    added = [line for line in after if line.startswith("b,")]
    assert len(added) == 1 and "150.1," in added[0]
    assert [line for line in after if line not in added] == before


def test_a_table_that_does_not_change_is_not_touched(tmp_path):
    path = tmp_path / "e.ecsv"
    rows = [exposure("a"), exposure("b")]
    assert write_exposures(path, rows)
    stamp = path.stat().st_mtime_ns
    assert not write_exposures(path, rows[::-1])
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("a1,", "a/1,", "'a/1' is not a valid exposure id"),
        ("a1,", "a 1,", "'a 1' is not a valid exposure id"),
        ("a1,", "$(rm),", "is not a valid exposure id"),
        ("a1,", "-a1,", "is not a valid exposure id"),
        (",science,", ",focus,", "kind: Input should be 'science', 'bias', 'dark' or 'flat'"),
        (",r,", ",r/i,", "is not a valid band id"),
        (",150.1,", ",10:00:00,", "ra: "),
        (",150.1,", ",361,", "ra: Input should be less than 360"),
        (",-2.25,", ",-92.25,", "dec: "),
        (",-2.25,", ",nan,", "dec: "),
        (",150.1,", ",,", "needs ra, dec and rotation"),
        (",60000.125,", ",,", "mjd: "),
        (",raw/a1.fits,", ",,", "path: a path is one line of text"),
        (",raw/a1.fits,", ",raw,a1.fits,", "11 values for 10 columns"),
    ],
)
def test_a_bad_value_is_named_with_file_and_line(tmp_path, old, new, said):
    path = tmp_path / "e.ecsv"
    write_exposures(path, [exposure()])
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    line = len(text.splitlines())
    with pytest.raises(InputError) as caught:
        read_exposures(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{path}, line {line}: ")
    assert "coaddflow ingest" in caught.value.remedy


def test_an_exposure_that_occurs_twice_is_named_with_both_lines(tmp_path):
    path = tmp_path / "e.ecsv"
    write_exposures(path, [exposure("a"), exposure("b")])
    text = path.read_text()
    path.write_text(text + text.splitlines()[-2] + "\n")
    last = len(path.read_text().splitlines())
    with pytest.raises(InputError, match=f"'a' occurs twice, in lines {last - 2} and {last}"):
        read_exposures(path)


def test_a_missing_column_and_an_unknown_one_are_named(tmp_path):
    path = tmp_path / "e.ecsv"
    write_exposures(path, [exposure()])
    path.write_text(path.read_text().replace(",rotation,", ",rotaton,"))
    with pytest.raises(InputError, match=r"unknown column 'rotaton'; missing column 'rotation'"):
        read_exposures(path)


@pytest.mark.parametrize("content", [None, b"", b"# %ECSV 1.0\n", b"\xff\xfe\x00"])
def test_a_table_that_is_not_there_or_empty_names_itself(tmp_path, content):
    path = tmp_path / "e.ecsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"e\.ecsv"):
        read_exposures(path)


def test_paths_survive_a_move_of_the_project_with_its_data(tmp_path, monkeypatch):
    (tmp_path / "project/tables").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    table = "tables/e.ecsv"
    assert path_in_table("tables/raw/x.fits", table) == "raw/x.fits"
    assert path_in_table(tmp_path / "project/tables/raw/x.fits", table) == "raw/x.fits"
    assert path_in_table("../data/x.fits", table) == "../../data/x.fits"
    assert path_in_table("/archive/x.fits", table) == "/archive/x.fits"
    for file in ("tables/raw/x.fits", "../data/x.fits", "/archive/x.fits"):
        assert file_of(path_in_table(file, table), table) == (tmp_path / "project" / file).resolve()


def test_a_table_behind_a_symbolic_link_still_finds_its_files(tmp_path, monkeypatch):
    for name in ("far/away/tables", "project", "project/raw"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "project/tables").symlink_to(tmp_path / "far/away/tables")
    (tmp_path / "project/raw/x.fits").write_text("x")
    monkeypatch.chdir(tmp_path / "project")
    text = path_in_table("raw/x.fits", "tables/e.ecsv")
    assert file_of(text, "tables/e.ecsv").read_text() == "x"


def test_one_file_per_ccd_is_found_by_what_stands_for_the_ccd(tmp_path):
    file = file_of("raw/x_{ccd}.fits", tmp_path / "e.ecsv", ccd="S4")
    assert file == (tmp_path / "raw/x_S4.fits").resolve()
    running = file_of("raw/HSCA{ccd+03730100}.fits", tmp_path / "e.ecsv", ccd="57")
    assert running.name == "HSCA03730157.fits"


def test_the_images_of_an_exposure_are_of_one_band(tmp_path):
    rows = [image(ccd=1), image(ccd=2, band="r")]
    with pytest.raises(InputError, match="'a1' has images in g and in r"):
        write_images(tmp_path / "i.ecsv", rows)


def test_five_thousand_exposures_are_read_in_about_a_second(tmp_path):
    rows = [exposure(f"e{n}", mjd=60000.0 + n) for n in range(5000)]
    write_exposures(tmp_path / "e.ecsv", rows)
    start = time.process_time()
    read_exposures(tmp_path / "e.ecsv")
    assert time.process_time() - start < 1.0
