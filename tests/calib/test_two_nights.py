"""A survey of two nights between which bias and flat change, from raw frames to calexps."""

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.calib.frames import read_master
from coaddflow.image.masked_image import read_masked_image
from coaddflow.instrument.camera import load_camera
from coaddflow.tables.exposures import read_exposures, write_exposures
from coaddflow.tables.manifest import read_manifest

CCD, BAND = 0, "r"

TABLE = "data/exposures.ecsv"

DETECTOR = load_camera("mini").detector(CCD)

TRANSMISSION = 0.8
"""Of the second night, in front of the first amplifier."""

STRIPES = 40
"""Counts that every other column of the second night has above the bias of the first."""

CALIBS = {"dark": {"source": "none"}, "defects": {"source": "none"}}
"""Calibration frames that do not matter here."""

SETS = {"longitude": 0.0, "sets": {"gap": 0}}


def second_night(path, copy, has_light):
    """Write a raw file as it would have been taken in the second night."""
    with fits.open(path) as hdus:
        image = hdus[DETECTOR.extension].data.astype(float)
        for number, amplifier in enumerate(DETECTOR.amplifiers):
            x0, y0, x1, y1 = amplifier.overscan
            level = np.median(image[y0:y1, x0:x1])
            x0, y0, x1, y1 = amplifier.data
            if has_light and number == 0:
                image[y0:y1, x0:x1] = level + TRANSMISSION * (image[y0:y1, x0:x1] - level)
            image[y0:y1, x0:x1:2] += STRIPES
        hdus[DETECTOR.extension].data = image.round().clip(0, 65535).astype(np.uint16)
        hdus.writeto(copy, checksum=True)


@pytest.fixture(scope="module")
def two_nights(raw_survey, tmp_path_factory):
    """The simulated survey with its frames of one band again, taken three nights later.

    The first exposure of the band on the sky is the only one, in both nights.
    """
    survey = raw_survey.copy_to(tmp_path_factory.mktemp("nights") / "survey")
    table = survey / TABLE
    rows = [row for row in read_exposures(table) if row.band in ("", BAND)]
    first = next(row for row in rows if row.kind == "science")
    rows = [row for row in rows if row.kind in ("bias", "flat")] + [first]
    again = []
    for row in rows:
        new = row.model_copy(
            update={
                "exposure": f"{row.exposure}b",
                "mjd": row.mjd + 3,
                "path": f"raw/{row.exposure}b.fits",
            }
        )
        second_night(survey / f"data/{row.path}", survey / f"data/{new.path}", row.kind != "bias")
        again.append(new)
    table.unlink()
    write_exposures(table, [*rows, *again])
    return survey, first.exposure


OTHERS = [detector.id for detector in load_camera("mini").detectors if detector.id != CCD]


def stripes_of(image, known):
    """Return by how much every other column of the first amplifier is above the others."""
    x0, y0, x1, y1 = DETECTOR.amplifiers[0].target
    image, known = image[y0:y1, x0:x1], known[y0:y1, x0:x1]
    columns = [np.median(image[:, i::2][known[:, i::2]]) for i in (0, 1)]
    return columns[0] - columns[1]


def calexps(two_nights, folder, **calibs):
    """Return the calexps of the first and of the second night, and the run that made them."""
    survey, exposure = two_nights
    survey = survey.copy_to(folder)
    survey.write_settings(exclude_ccds=OTHERS, calibs=CALIBS | calibs)
    names = (exposure, f"{exposure}b")
    run = survey.run("--", *(f"results/summary/{name}.ecsv" for name in names))
    assert run.returncode == 0, run.text
    for name in names:
        (row,) = read_manifest(survey / f"results/summary/{name}.ecsv")
        assert row.state == "done", row
    images = [read_masked_image(survey / f"results/calexp/{name}/{CCD}.fits")[0] for name in names]
    return *images, run


def measured(first, second):
    """Return by which factor stars differ between the amplifiers, and the stripes, electrons."""
    clean = (first.mask == 0) & (second.mask == 0)
    bright = (first.image > 20 * np.sqrt(np.median(first.variance))) & (
        second.image > 20 * np.sqrt(np.median(second.variance))
    )
    ratios = []
    for amplifier in DETECTOR.amplifiers:
        x0, y0, x1, y1 = amplifier.target
        half = np.zeros_like(bright)
        half[y0:y1, x0:x1] = True
        here = half & bright
        assert here.sum() > 50
        ratios.append(second.image[here].sum() / first.image[here].sum())
    return ratios[0] / ratios[1], stripes_of(second.image, clean)


def test_with_sets_the_pixels_of_both_nights_are_right(two_nights, tmp_path):
    first, second, run = calexps(two_nights, tmp_path / "s", **SETS)
    assert run.rules["master_bias"] == run.rules["master_flat"] == 2
    ratio, stripes = measured(first, second)
    assert ratio == pytest.approx(1.0, abs=0.003)
    assert abs(stripes) < 1.0


def test_with_one_set_they_are_wrong(two_nights, tmp_path):
    first, second, run = calexps(two_nights, tmp_path / "s")
    assert run.rules["master_bias"] == run.rules["master_flat"] == 1
    ratio, stripes = measured(first, second)
    assert ratio < 0.9
    assert stripes > 20.0


def test_a_flat_of_both_nights_takes_the_bias_of_each(two_nights, tmp_path):
    survey, _ = two_nights
    survey = survey.copy_to(tmp_path / "s")
    biases = [row.exposure for row in read_exposures(survey / TABLE) if row.kind == "bias"]
    of_first = {"bias": {"exposures": [name for name in biases if not name.endswith("b")]}}
    of_both = f"results/calibs/flat/{BAND}/{CCD}.fits"
    flats = {
        "first": (SETS, f"results/calibs/flat/20231231/{BAND}/{CCD}.fits"),
        "both": (SETS | {"flat": {"sets": {}}}, of_both),
        "both with the first bias": (of_first, of_both),
    }
    stripes = {}
    for name, (calibs, path) in flats.items():
        survey.write_settings(exclude_ccds=OTHERS, calibs=CALIBS | calibs)
        run = survey.run("--", path)
        assert run.returncode == 0, run.text
        flat = read_master(survey / path, "flat")
        stripes[name] = stripes_of(flat.image, flat.mask == 0)
    # the pixels themselves differ in response
    assert stripes["both"] == pytest.approx(stripes["first"], abs=2e-4)
    assert abs(stripes["both with the first bias"] - stripes["first"]) > 1e-3


def test_ingest_shows_the_sets_of_new_exposures_and_keeps_them(raw_survey, tmp_path):
    survey = raw_survey.copy_to(tmp_path / "survey")
    table = survey / TABLE
    survey.write_settings(calibs=SETS)
    survey.coaddflow("ingest", "data/raw")
    rows = read_exposures(table)
    night = "bias=20231231 dark=20231231 flat=20231231"  # they begin at 2:24 UTC of the next day
    assert {row.sets for row in rows if row.kind == "science"} == {night}
    content = table.read_bytes()
    told = survey.coaddflow("ingest", "data/raw").text
    assert f"0 added, {len(rows)} unchanged" in told, told
    assert "differ from their headers" not in told
    assert table.read_bytes() == content
    # without sets the column goes
    survey.write_settings()
    survey.coaddflow("ingest", "data/raw")
    assert table.read_bytes() == (raw_survey / TABLE).read_bytes()
