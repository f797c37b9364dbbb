"""A damaged product is found, named, and told with what to remove."""

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from PIL import Image
from test_status import ccd_row, plan_of  # noqa: F401 - a fixture

from coaddflow.cli import main
from coaddflow.corners import connections
from coaddflow.errors import InputError
from coaddflow.files import sha256_of
from coaddflow.image.masked_image import MaskedImage, read_masked_image
from coaddflow.tables.coadds import CoaddRow, write_coadd_table
from coaddflow.tables.manifest import write_manifest, write_row
from coaddflow.tables.warps import WarpRow, WarpTable, write_warp_table
from coaddflow.workflow import verify
from coaddflow.workflow.verify import VERIFIED, verify_survey


def image(name):
    """Write a product with checksums, and return its SHA-256."""
    path = Path("results", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = MaskedImage.empty((20, 30))
    pixels.image[:] = np.arange(600.0).reshape(20, 30)
    hdus = [fits.PrimaryHDU(), *pixels_hdus(pixels)]
    fits.HDUList(hdus).writeto(path, checksum=True)
    return sha256_of(path)


def pixels_hdus(pixels):
    names = {"IMAGE": pixels.image, "VARIANCE": pixels.variance, "MASK": pixels.mask}
    return [fits.ImageHDU(data, name=name) for name, data in names.items()]


@pytest.fixture
def survey(plan_of, request):  # noqa: F811
    """Leave a finished survey of one exposure of two CCDs."""
    whole_tract = getattr(request, "param", False)
    changes = {"parallel": {"coadd": "tract"}} if whole_tract else {}
    plan = plan_of("a", exclude_ccds=[2, 3, 4, 5], **changes)
    rows = []
    for ccd in (0, 1):
        path = f"results/calexp/a/{ccd}.fits"
        checksum = image(f"calexp/a/{ccd}.fits")
        rows.append(ccd_row("a", ccd).model_copy(update={"path": path, "sha256": checksum}))
        write_row(f"results/calexp/a/{ccd}.json", rows[-1])
    write_manifest("results/summary/a.ecsv", rows)
    warp = WarpRow("0_0", "a/0_0.fits", 0, 0, 30, 20, "0,1", 600, image("warp/0/a/0_0.fits"))
    write_warp_table("results/warp/0/a.ecsv", WarpTable("a", 0, (warp,)))
    coadd = CoaddRow("0_0", "0/0_0.fits", image("coadd/r/0/0_0.fits"), 1, 0, 1.0, 1)
    if whole_tract:
        write_coadd_table("results/coadd/r/0.ecsv", [coadd], "r", 0)
    image("depth/r/0/0_0.fits")
    Path("results/depth/0.ecsv").write_text("band patch\nr 0_0\nr 0_1\n")
    Image.fromarray(np.zeros((50, 50), np.uint8)).save("results/coadd/0.png")
    for name in ("corners.sqlite", "corners/r/0.sqlite"):
        Path("results", name).parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(Path("results", name)) as database:
            database.execute("CREATE TABLE t (x)")
            database.executemany("INSERT INTO t VALUES (?)", [(i,) for i in range(2000)])
        database.close()
    return plan


def flip(name):
    """Change one bit in the middle of a file."""
    path = Path("results", name)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_whole_survey_is_good_and_not_read_twice(survey):
    found = verify_survey(survey)
    assert found.n_products == 9 and (found.n_known, found.bad) == (0, ())
    assert verify_survey(survey).n_known == 9
    assert verify_survey(survey, again=True).n_known == 0


PRODUCTS = {
    "calexp/a/1.fits": ("results/calexp/a/1.json", "results/summary/a.ecsv"),
    "warp/0/a/0_0.fits": ("results/warp/0/a.ecsv",),
    "coadd/r/0/0_0.fits": ("results/coadd/r/0/0_0.fits",),
    "depth/r/0/0_0.fits": ("results/depth/0.ecsv",),
}


@pytest.mark.parametrize(("name", "removed"), PRODUCTS.items())
def test_one_flipped_bit_is_found_with_what_to_remove(survey, name, removed):
    verify_survey(survey)
    flip(name)
    (bad,) = verify_survey(survey).bad
    assert bad.product.path == f"results/{name}" and bad.product.remove == removed
    assert "rm " + " ".join(removed) in bad.remedy


@pytest.mark.parametrize("survey", [True], indirect=True)
def test_a_coadd_of_a_tract_job_is_made_again_without_its_list(survey):
    flip("coadd/r/0/0_0.fits")
    (bad,) = verify_survey(survey).bad
    assert bad.product.remove == ("results/coadd/r/0.ecsv",)


@pytest.mark.parametrize(
    "name",
    [
        "calexp/a/0.fits",
        "warp/0/a.ecsv",
        "summary/a.ecsv",
        "coadd/r/0/0_0.fits",
        "coadd/0.png",
        "corners.sqlite",
        "corners/r/0.sqlite",
        "depth/0.ecsv",
    ],
)
def test_what_is_cut_off_is_found(survey, name):
    path = Path("results", name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    bad = verify_survey(survey).bad
    assert [one.product.path for one in bad] == [f"results/{name}"]


@pytest.mark.parametrize("when", ["at the opening", "at the check", "half changed"])
def test_a_database_that_cannot_be_had_is_not_to_be_removed(survey, monkeypatch, when):
    name = "results/corners.sqlite"
    monkeypatch.setattr(connections, "READ_PATIENCE", 0.1)
    other = sqlite3.connect(name)
    if when == "at the check":
        monkeypatch.setattr(verify, "open_for_reading", lambda path: sqlite3.connect(path, 0.1))
    if when == "half changed":
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY_ROLLBACK

        def fail(_):
            raise error

        monkeypatch.setattr(connections, "_read_something", fail)
        monkeypatch.setattr(connections, "_mend", lambda _: None)
    else:
        other.execute("BEGIN EXCLUSIVE")
    try:
        bad = {one.product.path: one for one in verify_survey(survey).bad}
    finally:
        other.close()
    said = "half changed" if when == "half changed" else "another process has had it"
    assert said in bad[name].cause
    assert bad[name].remedy and "rm " not in bad[name].remedy


def test_a_calexp_that_is_gone_is_found(survey):
    Path("results/calexp/a/1.fits").unlink()
    (bad,) = verify_survey(survey).bad
    assert "not there" in bad.cause


def test_an_interrupted_verification_goes_on_where_it_was(survey):
    verify_survey(survey)
    lines = VERIFIED.read_text().splitlines()
    VERIFIED.write_text("\n".join(lines[:4]) + "\n" + lines[4][:10])
    assert verify_survey(survey).n_known == 4


def test_the_command_has_an_exit_code_and_json(survey, capsys, tmp_path):
    settings = survey.settings.model_dump(mode="json", exclude_defaults=True)
    Path("config.yaml").write_text(json.dumps(settings))
    assert main(["verify", "--workers", "2"]) == 0
    flip("coadd/r/0/0_0.fits")
    assert main(["verify", "--workers", "1"]) == 1
    assert "rm results/coadd/r/0/0_0.fits; then run" in capsys.readouterr().out
    assert main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["bad"][0]["path"] == "results/coadd/r/0/0_0.fits"


def test_a_reader_takes_a_flipped_bit_unless_it_is_asked_to_verify(survey):
    path = "results/calexp/a/0.fits"
    pixels, _ = read_masked_image(path, verify=True)
    content = bytearray(Path(path).read_bytes())
    start = content.index(pixels.image.astype(">f4").tobytes()[:40])
    content[start + 20] ^= 1
    Path(path).write_bytes(content)
    read_masked_image(path)
    with pytest.raises(InputError, match=r"0.fits: is damaged: .*DATASUM.*coaddflow verify"):
        read_masked_image(path, verify=True)
