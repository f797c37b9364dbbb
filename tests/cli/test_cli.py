"""The command line: what scripts and people can rely on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.io import fits

from coaddflow.cli import COMMANDS, main
from coaddflow.instrument.camera import load_camera
from coaddflow.tables.exposures import read_exposures
from coaddflow.tables.manifest import FOOTPRINT_POINTS_PER_EDGE, CcdRow, write_manifest

RINGS = {"kind": "rings"}
TANGENT = {
    "kind": "tangent",
    "pixel_scale": 0.2,
    "tangent": {"ra": 150.0, "dec": -2.25, "width": 0.2, "height": 0.2},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a project of two raw exposures of the demo camera, and stand in it."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("e1", "e2")):
        primary = fits.PrimaryHDU()
        primary.header.update(
            {
                "EXPID": name,
                "OBSTYPE": "OBJECT",
                "FILTER": "r",
                "RA": 10.0,
                "DEC": -2.25,
                "ROTPA": 0.0,
                "MJD-OBS": 60000.0 + number,
                "EXPTIME": 30.0,
            }
        )
        (tmp_path / "raw").mkdir(exist_ok=True)
        ccd = fits.ImageHDU(np.zeros((4, 4), np.uint16), name="CCD0")
        fits.HDUList([primary, ccd]).writeto(tmp_path / f"raw/{name}.fits")
    (tmp_path / "stars.csv").write_text("ra,dec,mag\n150,-2.25,15\n")
    write_config(tmp_path)
    return tmp_path


def write_config(folder, **changes):
    settings = {
        "camera": "demo",
        "exposures": "exposures.ecsv",
        "refcat": {"path": "stars.csv"},
        "skymap": TANGENT,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | changes))


def call(capsys, *arguments):
    """Return exit code, standard output and standard error of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as leave:
        code = leave.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def error_of(capsys, *arguments):
    """Return the one line that a command fails with."""
    code, _, err = call(capsys, *arguments)
    assert code == 2
    assert err.startswith("coaddflow: error: ") and err.count("\n") == 1
    return err


# the frame


def test_help_is_there_at_once():
    start = time.perf_counter()
    command = [sys.executable, "-X", "importtime", "-m", "coaddflow", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2.0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"numpy", "astropy", "pydantic", "yaml", "snakemake"}
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "command",
    [*([name] for name in COMMANDS), ["corners", "query"], ["corners", "patch"], ["skymap", "fit"]],
    ids=" ".join,
)
def test_every_command_has_help_with_an_example(capsys, command):
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0 and f"coaddflow {command[0]}" in out.partition("example")[2]


def test_every_exit_code_is_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    for name in COMMANDS:
        assert f"`coaddflow {name}" in page
    assert all(f"| {code} |" in page for code in (0, 1, 2, 3, 130))


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["status", "--colour"],
        ["corners"],
        ["corners", "query", "150"],
        ["corners", "query", "25:00:00", "2"],
        ["corners", "query", "150", "95"],
        ["corners", "patch", "nine", "1_1"],
        ["settings", "--yaml", "--schema"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exit_code_2(capsys, arguments):
    assert "--help" in error_of(capsys, *arguments)


def test_a_reader_that_has_enough_is_no_error(folder):
    command = f"{sys.executable} -m coaddflow settings | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("# Settings\n", "")


# settings files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "config.yaml: the settings cannot be read: No such file"),
        ("camera: [", "config.yaml: is not YAML"),
        ("- 1\n- 2\n", "config.yaml: has no settings in it"),
        ("camara: demo\n", "unknown setting 'camara' (did you mean 'camera'?)"),
        ("psf: {ordre: 2}\n", "unknown setting 'psf.ordre' (did you mean 'order'?)"),
        ("psf.order: 2\n", "unknown setting 'psf.order' (did you mean psf: {order: ...}?)"),
        ("detection: {max_seeing: 2}\n", "(did you mean 'selection.max_seeing'?)"),
        ("exposure: exposures.ecsv\n", "keys of its own (did you mean 'exposures'?)"),
        ("calibs: {dark: {exposure: [a]}}\n", "(did you mean 'exposures'?)"),
        ("psf:\n\torder: 2\n", "config.yaml: is not YAML in line 2: a tab. Indent with spaces"),
        ("psf: {order: two}\n", "config.yaml: setting 'psf.order': "),
        ("psf:\n  order: 1\n  order: 2\n", "duplicate key 'order' in lines 2 and 3"),
        ("camera: nosuch\nexposures: exposures.ecsv\n", "there is no camera 'nosuch'"),
        ("camera: demo\nexposures: nosuch.ecsv\n", "nosuch.ecsv: the table cannot be read"),
        ("camera: demo\n", "no exposures"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_file_and_key(folder, capsys, content, said):
    if content is None:
        Path("config.yaml").unlink()
    else:
        Path("config.yaml").write_text(content)
    code, _, err = call(capsys, "check-config")
    assert code == 2 and said in err
    assert all(line.startswith("coaddflow: error: ") for line in err.splitlines())


def test_all_problems_of_a_run_are_reported_together(folder, capsys):
    call(capsys, "ingest", "raw")
    write_config(folder, refcat={"path": "nosuch.csv"}, coadd={"bad_planes": ["SATUR"]})
    code, _, err = call(capsys, "check-config")
    assert code == 2 and len(err.splitlines()) == 2
    assert "nosuch.csv" in err and "'SATUR' is not a mask plane" in err


def test_good_settings_are_said_to_be_good(folder, capsys):
    call(capsys, "ingest", "raw")
    code, out, err = call(capsys, "check-config", "config.yaml")
    assert (code, err) == (0, "") and "2 exposures" in out and "are good" in out
    assert "e1  1 stars, 1 with a magnitude" in out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exclude": ["e11"]}, "'exclude': there is no exposure 'e11' (did you mean 'e1'?)"),
        ({"exclude": [1001]}, "there is no exposure '1001'"),
        ({"bands": ["g"]}, "'bands': there is no band 'g'"),
        ({"exclude_ccds": [77]}, "'exclude_ccds': there is no CCD 77"),
        ({"selection": {"exclude_exposures": ["E2"]}}, "(did you mean 'e2'?)"),
        ({"selection": {"exclude_ccds": [99]}}, "'selection.exclude_ccds': there is no CCD 99"),
        ({"calibs": {"dark": {"exposures": ["no-such"]}}}, "'calibs.dark.exposures': there is no"),
        ({"calibs": {"bias": {"exposures": ["e1"]}}}, "'e1' is a science exposure in the table"),
        (
            {"refcat": {"path": "stars.csv", "fallback": {"magnitude": "gmag"}}},
            "did you mean 'mag'",
        ),
        ({"refcat": {"path": "far.csv"}}, "far.csv: no star of the reference catalogue is in the"),
        ({"refcat": {"path": "nomag.csv"}}, "no star in the fields of band 'r' has a magnitude"),
        ({"refcat": {"path": "garbage.csv"}}, "garbage.csv: the reference catalogue has no column"),
        ({"refcat": {"path": "cut.fits"}}, "cut.fits: is not a readable fits catalogue"),
        ({"calibs": {"bias": {"source": "given", "path": "cut.fits"}}}, "cut.fits: is not a whole"),
    ],
)
def test_what_the_settings_name_is_opened_and_looked_for(folder, capsys, changes, said):
    call(capsys, "ingest", "raw")
    (folder / "far.csv").write_text("ra,dec,mag\n10,50,15\n")
    (folder / "nomag.csv").write_text("ra,dec,mag\n150,-2.25,-999\n")
    (folder / "garbage.csv").write_text("garbage")
    stars = fits.BinTableHDU.from_columns([fits.Column("ra", "D", array=np.zeros(1000))])
    stars.writeto("cut.fits")
    (folder / "cut.fits").write_bytes((folder / "cut.fits").read_bytes()[:9000])
    write_config(folder, **changes)
    code, _, err = call(capsys, "check-config")
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_exposures_without_a_reference_star_are_named(folder, capsys):
    call(capsys, "ingest", "raw")
    table = Path("exposures.ecsv")
    table.write_text(table.read_text().replace("e2,science,r,150.0", "e2,science,r,10.0"))
    code, out, _ = call(capsys, "check-config")
    assert code == 0 and "no reference star in the field of 1 of 2 exposures" in out


# ingest


def test_ingest_makes_the_table_that_the_settings_name(folder, capsys):
    (folder / "raw/notes.txt").write_text("clear")
    (folder / "raw/bad.fits").write_text("no FITS")
    code, out, err = call(capsys, "ingest", "raw")
    assert (code, err) == (0, "")
    assert "2 added, 2 files skipped; the table has 2 rows" in out
    assert "skipped, not_fits: 1\n  raw/bad.fits: is not a FITS file" in out
    assert [row.exposure for row in read_exposures("exposures.ecsv")] == ["e1", "e2"]
    assert call(capsys, "ingest", "raw", "--strict")[0] == 1
    (folder / "raw/bad.fits").unlink()
    assert call(capsys, "ingest", "raw", "--strict")[0] == 0


def test_ingest_without_settings_takes_camera_and_table(folder, capsys):
    (folder / "config.yaml").unlink()
    code, out, _ = call(
        capsys, "ingest", "--camera", "demo", "--table", "t.ecsv", "raw/e1.fits", "--json"
    )
    assert code == 0 and json.loads(out)["added"] == ["e1"]
    assert len(read_exposures("t.ecsv")) == 1
    assert "Give the file with --config" in error_of(capsys, "ingest", "--camera", "demo", "raw")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ingest"], "no folder is given"),
        (["ingest", "nosuch"], "nosuch: there is no such file or folder"),
        (["ingest", "empty"], "empty: no raw files of camera demo in it"),
        (["ingest", "--camera", "hubble", "raw"], "there is no camera 'hubble'"),
        (["ingest", "--calibrated", "raw"], "Set calibrated.table, or --table"),
    ],
)
def test_ingest_of_nothing_says_what_to_do(folder, capsys, arguments, said):
    (folder / "empty").mkdir()
    assert said in error_of(capsys, *arguments)


def write_bias(folder):
    """Write a bias exposure without a date."""
    primary = fits.PrimaryHDU()
    primary.header.update({"EXPID": "b1", "OBSTYPE": "ZERO"})
    ccd = fits.ImageHDU(np.zeros((4, 4), np.uint16), name="CCD0")
    fits.HDUList([primary, ccd]).writeto(folder / "raw/b1.fits")


def test_ingest_reports_although_sets_cannot_be_shown(folder, capsys):
    write_config(folder, calibs={"longitude": -70.8, "sets": {"gap": 0}})
    write_bias(folder)
    code, out, err = call(capsys, "ingest", "raw", "--json")
    assert code == 0 and sorted(json.loads(out)["added"]) == ["b1", "e1", "e2"]
    assert "note: the column `sets` is not written: " in err and "'b1' (bias) has no mjd" in err
    # it is an error where it was asked for, after the report
    code, out, err = call(capsys, "ingest", "raw", "--sets")
    assert code == 2 and "3 unchanged" in out and "'b1' (bias) has no mjd" in err


def test_ingest_of_sets_does_what_it_says_or_refuses(folder, capsys):
    nights = {"nights": [{"name": "old"}]}
    given = {"source": "given", "path": "{set}/{ccd}.fits"}
    write_config(folder, calibs={"longitude": -70.8, "sets": nights, "bias": given})
    for options in (["--calibrated", "raw"], ["--fitted", "results"]):
        said = error_of(capsys, "ingest", "--sets", *options)
        assert f"--sets has no effect with {options[0]}" in said
    call(capsys, "ingest", "--table", "t.ecsv", "raw/e1.fits")
    assert [row.sets for row in read_exposures("t.ecsv")] == [""]
    call(capsys, "ingest", "--table", "t.ecsv", "--sets", "raw/e1.fits")
    assert [row.sets for row in read_exposures("t.ecsv")] == ["bias=old"]
    # the column is emptied when sets are given up
    write_config(folder, exposures="t.ecsv")
    assert json.loads(call(capsys, "ingest", "--sets", "--json")[1]) == {"changed": ["e1"]}
    assert [row.sets for row in read_exposures("t.ecsv")] == [""]


def test_ingest_without_sets_does_not_look_for_them(folder, capsys, monkeypatch):
    monkeypatch.setattr("coaddflow.workflow.sets_shown.CalibSets", None)
    code, out, err = call(capsys, "ingest", "raw")
    assert (code, err) == (0, "") and "2 added" in out


def test_ingest_puts_fitted_pointings_into_the_table(folder, capsys):
    call(capsys, "ingest", "raw")
    camera = load_camera("demo")
    outline = camera.footprint(camera.detector(0), 150.01, -2.26, 1.0, FOOTPRINT_POINTS_PER_EDGE)
    row = CcdRow(
        exposure="e1",
        ccd=0,
        band="r",
        mjd=6e4,
        exposure_time=30,
        state="done",
        footprint_ra=list(outline[0]),
        footprint_dec=list(outline[1]),
    )
    write_manifest("results/summary/e1.ecsv", [row])
    code, out, _ = call(capsys, "ingest", "--fitted", "results", "--all")
    assert code == 0 and "1 pointings put into exposures.ecsv" in out
    assert "skipped, not_fitted: 1" in out
    found = read_exposures("exposures.ecsv")[0]
    assert (found.ra, found.dec, found.rotation) == pytest.approx((150.01, -2.26, 1.0), abs=1e-5)


# status


def test_status_before_the_first_run_is_incomplete(folder, capsys):
    call(capsys, "ingest", "raw")
    code, out, err = call(capsys, "status")
    assert (code, err) == (3, "") and "12 missing" in out
    code, out, _ = call(capsys, "status", "--json")
    assert code == 3 and json.loads(out)["ccds"]["missing"] == 12


# sky map


def test_the_published_tract_is_found_in_degrees_hours_and_json(folder, capsys):
    write_config(folder, skymap=RINGS)
    code, out, _ = call(capsys, "skymap", "find", "150.2479", "2.2314")
    assert code == 0 and out.startswith("tract 9813 patch ")
    sexagesimal = call(capsys, "skymap", "find", "10:00:59.496", "2:13:53.04", "--json")
    degrees = call(capsys, "skymap", "find", "150.2479", "2.2314", "--json")
    assert sexagesimal == degrees and json.loads(degrees[1])["tract"] == 9813


@pytest.mark.parametrize("dec", ["-2.25", "-2:15:00", "-02d15m00s", "-2.25e0"])
def test_a_southern_declination_is_no_option(folder, capsys, dec):
    code, out, _ = call(capsys, "skymap", "find", "150.0", dec, "--json")
    assert code == 0 and json.loads(out)["tract"] == 0


def test_off_the_sky_map_is_a_no(folder, capsys):
    assert call(capsys, "skymap", "find", "10", "50") == (1, "off the sky map\n", "")


def test_fitting_a_sky_map_of_rings_is_one_line(folder, capsys):
    write_config(folder, skymap=RINGS)
    assert "there is nothing to fit with skymap.kind: rings" in error_of(capsys, "skymap", "fit")


def test_a_fitted_tract_can_be_written_into_the_settings(folder, capsys):
    write_config(folder, skymap={"kind": "tangent", "pixel_scale": 0.2})
    call(capsys, "ingest", "raw")
    code, out, _ = call(capsys, "skymap", "fit")
    fitted = yaml.safe_load(out)
    assert code == 0
    assert fitted["skymap"]["tangent"]["ra"] == pytest.approx(150.0, abs=0.01)
    before = call(capsys, "skymap", "find", "150.01", "-2.25")
    write_config(folder, **fitted)
    assert call(capsys, "skymap", "find", "150.01", "-2.25") == before


# corners


@pytest.fixture
def database(folder):
    from coaddflow.corners.survey import build_survey_database
    from coaddflow.settings.skymap import SkymapSettings
    from coaddflow.skymap.maps import make_skymap

    row = CcdRow(
        exposure="e1",
        ccd=3,
        band="r",
        mjd=6e4,
        exposure_time=30,
        state="done",
        path="results/calexp/e1/3.fits",
        sha256="0" * 64,
        nx=640,
        ny=640,
        zero_point=31.25,
        seeing=0.75,
        footprint_ra=[150.02, 149.98, 149.98, 150.02],
        footprint_dec=[-2.27, -2.27, -2.23, -2.23],
    )
    write_manifest("results/summary/e1.ecsv", [row])
    skymap = make_skymap(SkymapSettings(**TANGENT))
    build_survey_database("results/corners.sqlite", ["results/summary/e1.ecsv"], skymap)


def test_the_ccds_on_a_position_are_reported(database, capsys):
    code, out, _ = call(capsys, "corners", "query", "10:00:00", "-2:15:00")
    assert code == 0 and out.splitlines()[1].split()[:3] == ["e1", "3", "r"]
    code, out, _ = call(capsys, "corners", "query", "150", "-2.25", "--band", "r", "--json")
    assert code == 0 and json.loads(out)[0]["seeing"] == 0.75
    assert call(capsys, "corners", "query", "150", "-2.25", "--band", "g")[0] == 1
    code, out, _ = call(capsys, "corners", "query", "150", "2.25")
    assert code == 1 and out.startswith("no CCD covers")


def test_the_ccds_on_a_patch_are_reported(database, capsys):
    code, out, _ = call(capsys, "corners", "patch", "0", "0_0")
    assert code == 0 and "patch_fraction" in out.splitlines()[0]
    assert "has no tract 7" in error_of(capsys, "corners", "patch", "7", "0_0")


def test_without_a_database_the_remedy_is_reported(folder, capsys):
    said = error_of(capsys, "corners", "query", "150", "2")
    assert "results/corners.sqlite" in said and "run the workflow" in said.lower()


# the others


def test_the_shipped_cameras_are_listed_and_one_of_ones_own_is_checked(folder, capsys):
    code, out, _ = call(capsys, "cameras")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} >= {"demo", "decam", "microobservatory"}
    Path("mine.yaml").write_text("name: mine\n")
    assert "mine.yaml: camera key" in error_of(capsys, "cameras", "mine.yaml")


def test_settings_are_printed_in_three_forms(capsys):
    assert call(capsys, "settings")[1].startswith("# Settings")
    assert yaml.safe_load(call(capsys, "settings", "--yaml")[1])["prediction"]["margin"] == 0.05
    assert "properties" in json.loads(call(capsys, "settings", "--schema")[1])


def test_a_wrong_setting_of_a_simulation_is_named(folder, capsys):
    Path("survey.yaml").write_text("seed: 1\nstras: {}\n")
    assert "survey.yaml: " in error_of(capsys, "simulate", "survey.yaml", "data")
    assert "stras" in error_of(capsys, "simulate", "survey.yaml", "data")
    assert "nosuch.yaml" in error_of(capsys, "simulate", "nosuch.yaml", "data")
    assert not Path("data").exists()
