"""A coadd takes what the corner database selects, and says what it left out and why."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from skyscene import make_tract, write_done_ccd

from coaddflow.coadd.patch import make_coadd
from coaddflow.coadd.picture import make_picture, reddest_first
from coaddflow.corners.build import build_tract_database
from coaddflow.corners.survey import make_survey_database
from coaddflow.errors import InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.settings import Settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables.manifest import read_manifest, write_manifest
from coaddflow.warp.job import make_warps

TRACT = make_tract(size=200)
LEVELS = {("a", 0): 10.0, ("a", 1): 20.0, ("b", 0): 12.0, ("b", 1): 22.0}
"""CCD 0 covers the left half of the tract, CCD 1 the right half."""


@pytest.fixture
def survey(tmp_path, monkeypatch):
    """Calexps, manifests, warps and database of two exposures with two CCDs each."""
    monkeypatch.chdir(tmp_path)
    for exposure in "ab":
        rows = [_calexp(exposure, ccd, seeing=2.0 if exposure == "b" else 1.0) for ccd in (0, 1)]
        if exposure == "b":
            rows[1] = rows[1].model_copy(update={"seeing": 1.0})
        write_manifest(f"{exposure}.ecsv", rows)
        make_warps(f"warp/{exposure}.ecsv", f"{exposure}.ecsv", TRACT, Settings())
    build_tract_database("corners.sqlite", ["a.ecsv", "b.ecsv"], TRACT)
    return tmp_path


def _calexp(exposure, ccd, seeing):
    """Write a CCD of constant brightness on the pixel grid of the tract; return its row."""
    wcs = TRACT.wcs()
    wcs.wcs.crpix = [wcs.wcs.crpix[0] - 100 * ccd, wcs.wcs.crpix[1]]
    wcs.pixel_shape = (100, 200)
    shape = (200, 100)
    pixels = MaskedImage(
        np.full(shape, LEVELS[exposure, ccd]), np.ones(shape), np.zeros(shape, np.int32)
    )
    figures = {"zero_point": 31.4, "sky_noise": 1.0, "seeing": seeing}
    return write_done_ccd(f"{exposure}{ccd}.fits", exposure, ccd, pixels, wcs, **figures)


def coadd(**settings):
    settings = {"coadd": {"weight": "sky"}} | settings
    warps = ["warp/a.ecsv", "warp/b.ecsv"]
    make_coadd("r/7/0_0.fits", "corners.sqlite", warps, TRACT, "r", "0_0", Settings(**settings))
    with fits.open("r/7/0_0.fits") as hdus:
        return hdus["IMAGE"].data.copy(), hdus["NINPUTS"].data.copy(), Table(hdus["INPUTS"].data)


@pytest.mark.usefixtures("survey")
def test_all_ccds_go_in_where_nothing_is_selected():
    image, n_inputs, inputs = coadd()
    assert image[100, 50] == pytest.approx(11.0, rel=1e-5)
    assert image[100, 150] == pytest.approx(21.0, rel=1e-5)
    assert n_inputs[100, 50] == n_inputs[100, 150] == 2
    assert list(inputs["exposure"]) == ["a", "b"]
    assert list(inputs["ccds"]) == ["0,1", "0,1"]


@pytest.mark.usefixtures("survey")
def test_a_ccd_that_is_not_selected_gives_no_pixel_and_is_named_with_the_reason():
    image, n_inputs, inputs = coadd(selection={"max_seeing": 1.5})
    left, right = image[10:190, 10:90], image[10:190, 110:190]
    np.testing.assert_allclose(left, 10.0, rtol=1e-5)
    np.testing.assert_allclose(right, 21.0, rtol=1e-5)
    assert (n_inputs[10:190, 10:95] == 1).all()
    assert (n_inputs[10:190, 105:190] == 2).all()
    assert [tuple(row) for row in inputs["exposure", "ccds", "reason"]] == [
        ("a", "0,1", ""),
        ("b", "1", ""),
        ("b", "0", "seeing 2 > 1.5 arcsec"),
    ]
    assert inputs["weight"][2] == 0.0
    assert inputs["n_used"][2] == 0


@pytest.mark.usefixtures("survey")
def test_a_selection_that_leaves_nothing_is_an_error_that_names_the_settings():
    selection = {"exclude_exposures": ["a"], "max_seeing": 0.5, "max_ellipticity": 0.9}
    with pytest.raises(InputError) as raised:
        coadd(selection=selection)
    assert str(raised.value).startswith(
        "corners.sqlite: the selection leaves out all 4 CCDs of band r on tract 7 (CCDs by "
        "setting: selection.max_seeing 4, selection.max_ellipticity 4, selection.exclude_exposures "
        "2). Relax selection.max_seeing"
    )
    assert not Path("r/7/0_0.fits").exists()


@pytest.mark.usefixtures("survey")
def test_a_band_without_calexps_has_coadds_without_data():
    """Nothing was selected away: an edge of the survey, or exposures that failed."""
    failed = [
        read_manifest(f"{exposure}.ecsv")[ccd].model_copy(
            update={"state": "failed", "reason": "no_stars"}
        )
        for exposure in "ab"
        for ccd in (0, 1)
    ]
    for exposure in "ab":
        write_manifest(f"{exposure}.ecsv", [row for row in failed if row.exposure == exposure])
    build_tract_database("corners.sqlite", ["a.ecsv", "b.ecsv"], TRACT)
    image, n_inputs, _ = coadd()
    assert np.isnan(image).all()
    assert (n_inputs == 0).all()
    with fits.open("r/7/0_0.fits") as hdus:
        assert (hdus["MASK"].data & int(MaskPlane.NO_DATA)).all()


@pytest.mark.usefixtures("survey")
def test_weights_follow_the_seeing_and_what_is_far_from_the_median_is_left_out():
    weights = {}
    for kind in ("sky", "point_source"):
        _, _, inputs = coadd(coadd={"weight": kind})
        weights[kind] = np.asarray(inputs["weight"])
    np.testing.assert_allclose(weights["sky"], 1.0)
    # the median of the CCDs: 1.0 and 1.5 arcsec
    assert weights["point_source"][0] / weights["point_source"][1] == pytest.approx(2.25)
    _, _, inputs = coadd(selection={"max_seeing_ratio": 1.9})
    assert list(inputs["reason"]) == ["", "", "seeing 2 times the median > 1.9"]


def test_warps_that_are_made_again_remove_the_coadds_made_of_them(survey):
    hanging, others = f"coadd/r/{TRACT.id}/0_0.fits", f"coadd/g/{TRACT.id}/0_0.fits"
    for path in (hanging, others):
        (survey / path).parent.mkdir(parents=True)
        (survey / path).touch()
    make_warps(f"warp/{TRACT.id}/a.ecsv", "a.ecsv", TRACT, Settings())
    assert [path.as_posix() for path in Path("coadd").rglob("*.fits")] == [others]


@pytest.mark.usefixtures("survey")
def test_what_was_covered_without_being_planned_is_an_error():
    tangent = {"ra": 150.0, "dec": 2.2, "width": 0.02, "height": 0.02}
    settings = SkymapSettings(kind="tangent", pixel_scale=0.2, tangent=tangent)
    skymap = make_skymap(settings)
    planned = {"a": {0: ["0_0"]}, "b": {0: ["0_0"]}}
    update = make_survey_database("survey.sqlite", ["a.ecsv", "b.ecsv"], skymap, planned)
    assert update.added == ["a", "b"]
    message = r"1 patches.*patch 0_0 of tract 0 by exposure b.*prediction\.margin"
    with pytest.raises(InputError, match=message):
        make_survey_database("survey.sqlite", ["a.ecsv", "b.ecsv"], skymap, planned | {"b": {}})


@pytest.mark.usefixtures("survey")
def test_the_picture_takes_the_bands_from_the_folders(tmp_path):
    coadd()
    make_picture("7.png", TRACT, ["r/7/0_0.fits"])
    assert (tmp_path / "7.png").read_bytes().startswith(b"\x89PNG")
    assert reddest_first(["g", "z", "clear", "i2", "r"]) == ["z", "i2", "r", "g", "clear"]
