"""Raw files in folders with odd names: the run reads them, or ingest says why not."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.io import fits

from coaddflow.errors import InputError
from coaddflow.ingest.raw_exposures import check_name, ingest
from coaddflow.instrument.camera import load_camera
from coaddflow.instrument.header_values import HeaderValueError
from coaddflow.tables.exposures import read_exposures

REPOSITORY = Path(__file__).parents[2]

ODD = (
    *("two words", "quo'te", 'quo"te', "star*", "what?", "[a-z]", "$HOME", "back\\slash", "a;b&c"),
    *("~", "#1", "a,b", "ärger", "夜", "{}", "{ ", "}{", "a{b c}d", "%s", "-n", "a=b", "a:b"),
)


def bias(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    primary = fits.PrimaryHDU()
    primary.header.update({"EXPID": name, "OBSTYPE": "ZERO"})
    pixels = np.random.default_rng(len(name)).normal(1000.0, 5.0, (320, 368)).round()
    hdus = fits.HDUList([primary, fits.ImageHDU(pixels.astype(np.uint16), name="CCD0")])
    hdus.writeto(folder / f"{name}.fits")


def test_snakemake_and_its_jobs_read_files_in_folders_with_odd_names(tmp_path):
    for number, name in enumerate(ODD):
        bias(tmp_path / "raw" / name, f"b{number}")
    report = ingest([tmp_path / "raw"], load_camera("mini"), tmp_path / "exposures.ecsv")
    assert len(report.added) == len(ODD) and not report.skipped
    rows = read_exposures(tmp_path / "exposures.ecsv")
    assert {Path(row.path).parent.name for row in rows} == set(ODD)
    # a bias needs no date and no pointing
    assert all(row.mjd is None and row.ra is None for row in rows)
    science = tmp_path / "exposures.ecsv"
    science.write_text(
        science.read_text() + "e1,science,r,150.0,2.2,0.0,60000.0,30.0,raw/e1.fits,1\n"
    )
    (tmp_path / "stars.csv").write_text("ra,dec,mag\n150,2.2,15\n")
    settings = {"camera": "mini", "exposures": "exposures.ecsv", "refcat": {"path": "stars.csv"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = ["-m", "snakemake", "--snakefile", REPOSITORY / "Snakefile", "--cores", "1"]
    run = subprocess.run(
        [sys.executable, *command, "results/calibs/bias/0.fits"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert fits.getheader(tmp_path / "results/calibs/bias/0.fits")["CFNFRAME"] == len(ODD)


@pytest.mark.parametrize("name", ["run{exposure}", "n{1}", "{ccd}", "a\nb", "a\u2028b", b"\xff"])
def test_names_that_a_table_or_snakemake_would_read_otherwise_are_refused(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    bias(folder, "b1")
    bias(tmp_path / "good", "b2")
    with pytest.raises(HeaderValueError, match="rename"):
        check_name(folder / "b1.fits")
    report = ingest([tmp_path], load_camera("mini"), tmp_path / "t.ecsv")
    assert report.added == ["b2"]
    assert [skip.reason for skip in report.skipped] == ["bad_name"]
    assert report.skipped[0].file.isprintable()


def test_a_wildcard_in_a_table_made_by_hand_is_refused(tmp_path):
    bias(tmp_path / "raw", "b1")
    table = tmp_path / "t.ecsv"
    ingest([tmp_path / "raw"], load_camera("mini"), table)
    table.write_text(table.read_text().replace("raw/b1", "raw{exposure}/b1"))
    with pytest.raises(InputError, match=r"path: Snakemake takes \{exposure\} for a wildcard"):
        read_exposures(table)
