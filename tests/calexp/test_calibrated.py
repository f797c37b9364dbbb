"""Images calibrated elsewhere: what their pixels, weights, masks and zero-points become."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.io import fits
from astropy.table import Table
from pydantic import ValidationError
from scipy import ndimage

from coaddflow.calexp.imported import import_image, mask_planes, variance_from_weight
from coaddflow.calexp.product import done_row, read_calexp, write_calexp
from coaddflow.errors import CcdFailure, InputError
from coaddflow.geometry import sphere
from coaddflow.geometry.wcs import sky_to_pixel
from coaddflow.image.masked_image import MaskPlane
from coaddflow.ingest.calibrated_images import electrons_per, ingest_calibrated
from coaddflow.settings import Settings
from coaddflow.settings.calibrated import MaskSettings
from coaddflow.tables.exposures import read_images

DECAM = Path(__file__).parents[3] / "shared/data/decam-calibrated"
CONFIG = Path(__file__).parents[2] / "configs/decam-calibrated.yaml"

SHAPE = (64, 80)
STARS = [(20.0, 15.0, 4000.0), (61.3, 40.6, 9000.0), (30.5, 50.2, 2500.0)]
SKY = 100.0
SCALE = 0.5 / 3600.0


def tan_header(projection="TAN"):
    header = fits.Header()
    header["CTYPE1"], header["CTYPE2"] = f"RA---{projection}", f"DEC--{projection}"
    header["CRVAL1"], header["CRVAL2"] = 359.999, -30.0
    header["CRPIX1"], header["CRPIX2"] = 40.0, 30.0
    header["CD1_1"], header["CD1_2"] = -SCALE, 0.1 * SCALE
    header["CD2_1"], header["CD2_2"] = 0.1 * SCALE, SCALE
    return header


def wcs_header(kind):
    header = tan_header({"SIP": "TAN-SIP"}.get(kind, kind))
    if kind == "SIP":
        header["A_ORDER"] = header["B_ORDER"] = 2
        header["A_2_0"], header["B_0_2"] = 1e-4, -2e-4
    if kind == "TPV":
        header["PV1_1"], header["PV2_1"], header["PV1_4"] = 1.01, 0.99, 0.8
    return header


def sky_of(kind, x, y):
    """Return where a pixel is by the definition of each projection, without astropy."""
    header = wcs_header(kind)
    u, v = x + 1 - header["CRPIX1"], y + 1 - header["CRPIX2"]
    if kind == "SIP":
        u, v = u + 1e-4 * u**2, v - 2e-4 * v**2
    xi = header["CD1_1"] * u + header["CD1_2"] * v
    eta = header["CD2_1"] * u + header["CD2_2"] * v
    if kind == "TPV":
        xi, eta = 1.01 * xi + 0.8 * xi**2, 0.99 * eta
    if kind == "SIN":
        # orthographic: (xi, eta) = sin of the distance; tangent plane: tan of it
        r = np.radians(np.hypot(xi, eta))
        stretch = np.tan(np.arcsin(r)) / r
        xi, eta = xi * stretch, eta * stretch
    return sphere.tan_deproject(xi, eta, header["CRVAL1"], header["CRVAL2"])


def scene(seed=1):
    """Return electrons of three stars of FWHM 3 pixels on a sky with its noise."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(SHAPE)
    sigma = 3.0 / 2.3548
    image = np.full(SHAPE, SKY)
    for x0, y0, flux in STARS:
        shape = np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * sigma**2))
        image += flux * shape / shape.sum()
    return image + rng.normal(0, 10.0, SHAPE)


BASE = {
    "EXPNUM": 7,
    "CCDNUM": 3,
    "FILTER": "r DECam",
    "MJD-OBS": 58000.0,
    "EXPTIME": 20.0,
    "MAGZERO": 30.0,
}
SETTINGS = {
    "names": ["*_i.fits"],
    "exposure": {"keyword": "EXPNUM"},
    "ccd": {"keyword": "CCDNUM"},
    "band": {"keyword": "FILTER", "pattern": r"^(\w+)"},
    "zero_point": {"keyword": "MAGZERO"},
}


def image_file(folder, pixels=None, name="a_i.fits", kind="TAN", **cards):
    hdu = fits.ImageHDU((scene() if pixels is None else pixels).astype(np.float32), name="SCI")
    hdu.header.update(wcs_header(kind))
    primary = fits.PrimaryHDU()
    primary.header.update(BASE)
    primary.header.update({key.replace("_", "-"): value for key, value in cards.items()})
    fits.HDUList([primary, hdu]).writeto(folder / name)
    return folder / name


def companion_file(folder, name, pixels, header=None):
    hdu = fits.ImageHDU(pixels, name="SCI")
    hdu.header.update(header or {})
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(folder / name)


def settings_of(**changes):
    return Settings(calibrated=SETTINGS | changes)


def ingested(folder, settings):
    report = ingest_calibrated([folder], settings.calibrated, folder / "images.ecsv")
    assert [skip for skip in report.skipped if skip.reason != "other_name"] == []
    return read_images(folder / "images.ecsv")


def relative_to(folder, row):
    """Return the row of an image with paths relative to the working folder."""
    names = ("path", "weight_path", "mask_path")
    paths = {name: getattr(row, name) and str(folder / getattr(row, name)) for name in names}
    return row.model_copy(update=paths)


def imported(folder, **changes):
    settings = settings_of(**changes)
    (row,) = ingested(folder, settings)
    return import_image(relative_to(folder, row), settings)


def written_row(calexp, folder):
    """Write a calexp and return its row."""
    path = str(folder / "calexp.fits")
    return done_row(calexp, path, write_calexp(path, None, calexp))


def aperture_magnitude(result, star, radius=8.0):
    y, x = np.indices(SHAPE)
    inside = np.hypot(x - star[0], y - star[1]) < radius
    flux = result.masked_image.image[inside].sum(dtype=float)
    return result.figures["zero_point"] - 2.5 * np.log10(flux)


# WCS


@pytest.mark.parametrize("kind", ["TAN", "SIN", "SIP", "TPV"])
def test_pixels_are_where_the_definition_of_the_projection_puts_them(tmp_path, kind):
    image_file(tmp_path, kind=kind)
    result = imported(tmp_path)
    x, y = np.array([0.0, 79.0, 40.0]), np.array([0.0, 10.0, 63.0])
    back = sky_to_pixel(result.wcs, *sky_of(kind, x, y))
    assert np.abs(np.array(back) - [x, y]).max() < 1e-4
    # and so are the corners of the table and of the manifest, over RA 0
    corners = sky_of(kind, np.array([-0.5, 79.5, 79.5, -0.5]), np.array([-0.5, -0.5, 63.5, 63.5]))
    (row,) = read_images(tmp_path / "images.ecsv")
    apart = sphere.separation(row.footprint_ra, row.footprint_dec, *corners)
    assert apart.max() * 3600 < 1e-4
    outline = written_row(result, tmp_path)
    assert len(outline.footprint_ra) == 32
    apart = sphere.separation(outline.footprint_ra[::8], outline.footprint_dec[::8], *corners)
    assert apart.max() * 3600 < 1e-4


def test_the_written_calexp_has_the_same_wcs_in_keywords_that_swarp_reads(tmp_path):
    image_file(tmp_path, kind="SIP")
    result = imported(tmp_path)
    written_row(result, tmp_path)
    stored = read_calexp(tmp_path / "calexp.fits")
    assert stored.header["CTYPE1"] == "RA---TPV"
    x, y = np.array([3.0, 70.0]), np.array([60.0, 5.0])
    back = sky_to_pixel(stored.wcs, *sky_of("SIP", x, y))
    assert np.abs(np.array(back) - [x, y]).max() < 1e-3
    assert np.array_equal(stored.masked_image.mask, result.masked_image.mask)
    assert stored.header["PHOTZP"] == 30.0 and stored.header["BUNIT"] == "electron"


# units and zero-points


def test_a_star_has_the_same_magnitude_in_all_units(tmp_path):
    truth = 30.0 - 2.5 * np.log10(STARS[1][2])
    electrons, time, gain = scene(), 20.0, 1.6
    cases = {
        "electron": (1.0, 30.0),
        "electron_per_second": (1 / time, 30.0 - 2.5 * np.log10(time)),
        "adu": (1 / gain, 30.0 - 2.5 * np.log10(gain)),
        "adu_per_second": (1 / gain / time, 30.0 - 2.5 * np.log10(gain * time)),
        "nanojansky": (10 ** (0.4 * (31.4 - 30.0)), None),
        "nanomaggy": (10 ** (0.4 * (22.5 - 30.0)), None),
    }
    for unit, (factor, zero_point) in cases.items():
        folder = tmp_path / unit
        folder.mkdir()
        image_file(folder, electrons * factor)
        fact = {"zero_point": None if zero_point is None else {"value": zero_point}}
        constant = {"gain": {"value": gain}} if zero_point is not None else {}
        result = imported(folder, unit=unit, **fact, **constant)
        assert aperture_magnitude(result, STARS[1]) == pytest.approx(truth, abs=0.02), unit
        if zero_point is not None:
            assert result.figures["zero_point"] == pytest.approx(30.0, abs=1e-5)
            assert np.ptp(result.masked_image.image - electrons) < 20.0


def test_a_zero_point_per_second_is_combined_with_the_exposure_time(tmp_path):
    image_file(tmp_path, scene() / 1.6)
    imported(
        tmp_path,
        unit="adu",
        gain={"value": 1.6},
        zero_point={"value": 25.0},
        zero_point_unit="adu_per_second",
    )
    # one count per second over 20 s is 20 counts, of 1.6 electrons each
    (row,) = read_images(tmp_path / "images.ecsv")
    assert row.zero_point == pytest.approx(25.0 + 2.5 * np.log10(20.0 * 1.6))


def test_how_many_electrons_a_unit_is():
    units = ("electron", "electron_per_second", "adu", "adu_per_second", "nanojansky")
    assert [electrons_per(unit, 2.0, 30.0) for unit in units] == [1.0, 30.0, 2.0, 60.0, 2.0]


FACTS = {"expnum": {"keyword": "EXPNUM"}, "ccdname": {"keyword": "EXTNAME"}}


@pytest.mark.parametrize("suffix", ["facts.fits.gz", "facts.ecsv", "facts.csv"])
def test_facts_are_joined_from_a_table_by_its_key_columns(tmp_path, suffix):
    image_file(tmp_path)
    table = Table(
        {
            "expnum": [7, 7, 8],
            "ccdname": ["S4", "SCI", "SCI"],
            "zp": [20.0, 24.5, 21.0],
            "fwhm": [9.0, 3.0, 9.0],
            "sky": [1.0, 5.0, 1.0],
        }
    )
    table.write(tmp_path / suffix)
    result = imported(
        tmp_path,
        facts={"path": str(tmp_path / suffix), "match": FACTS},
        zero_point={"column": "zp"},
        zero_point_unit="electron_per_second",
        seeing={"column": "fwhm"},
        seeing_unit="pixel",
        sky={"column": "sky"},
        sky_unit="electron_per_second",
        subtract_sky="given",
    )
    (row,) = read_images(tmp_path / "images.ecsv")
    assert row.zero_point == pytest.approx(24.5 + 2.5 * np.log10(20.0))
    assert row.seeing == pytest.approx(3.0 * 0.5 * np.sqrt(1.01), rel=1e-5)
    assert row.sky_level == pytest.approx(100.0)
    assert np.median(result.masked_image.image) == pytest.approx(0.0, abs=1.0)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [([8], "not_in_table"), ([7, 7], "ambiguous_in_table")],
)
def test_an_image_without_its_row_in_the_table_is_skipped(tmp_path, rows, reason):
    image_file(tmp_path)
    Table({"expnum": rows, "zp": [25.0] * len(rows)}).write(tmp_path / "facts.csv")
    facts = {"path": str(tmp_path / "facts.csv"), "match": {"expnum": {"keyword": "EXPNUM"}}}
    settings = settings_of(facts=facts, zero_point={"column": "zp"})
    with pytest.raises(InputError, match="expnum = 7"):
        ingest_calibrated([tmp_path], settings.calibrated, tmp_path / "images.ecsv")
    image_file(tmp_path, name="b_i.fits", EXPNUM=9)
    Table({"expnum": [*rows, 9], "zp": [25.0] * (len(rows) + 1)}).write(
        tmp_path / "facts.csv", overwrite=True
    )
    report = ingest_calibrated([tmp_path], settings.calibrated, tmp_path / "images.ecsv")
    assert report.added == ["9/3"]
    assert reason in [skip.reason for skip in report.skipped]


def test_a_table_of_facts_without_a_key_column_names_setting_and_file(tmp_path):
    image_file(tmp_path)
    Table({"zp": [25.0]}).write(tmp_path / "facts.csv")
    settings = settings_of(facts={"path": str(tmp_path / "facts.csv"), "match": FACTS})
    with pytest.raises(InputError, match=r"facts\.csv: has no column 'expnum'.*facts\.match"):
        ingest_calibrated([tmp_path], settings.calibrated, tmp_path / "images.ecsv")


# weights


def test_a_weight_of_zero_is_no_data_whatever_the_kind_of_map():
    for kind, values in {
        "inverse_variance": [0.25, 0.0, -1.0, np.nan, 4.0],
        "variance": [4.0, 0.0, -1.0, np.nan, 0.25],
        "rms": [2.0, 0.0, -1.0, np.nan, 0.5],
    }.items():
        variance, known = variance_from_weight(np.array([values]), kind)
        assert known.tolist() == [[True, False, False, False, True]]
        assert variance[0, [0, 4]] == pytest.approx([4.0, 0.25])
        assert np.all(np.isinf(variance[0, 1:4]))


def test_pixels_of_weight_zero_are_masked_and_the_others_keep_their_variance(tmp_path):
    image_file(tmp_path, scene() / 2.0)
    weight = np.full(SHAPE, 1 / 25.0, np.float32)
    weight[10:12, 5:9] = 0.0
    companion_file(tmp_path, "a_w.fits", weight)
    result = imported(
        tmp_path,
        unit="adu",
        gain={"value": 2.0},
        weight={"kind": "inverse_variance", "replace": ["_i.", "_w."], "zero_planes": ["BAD"]},
    )
    bad = result.masked_image.has_any(MaskPlane.BAD)
    assert bad.sum() == 8 and bad[10:12, 5:9].all()
    # 5 counts of noise are 10 electrons
    assert result.masked_image.variance[~bad] == pytest.approx(100.0, rel=1e-5)
    assert np.all(np.isinf(result.masked_image.variance[bad]))


def test_saturated_pixels_of_weight_zero_keep_a_lower_limit_and_others_do_not(tmp_path):
    pixels = scene()
    pixels[20:22, 20:30] = 60000.0
    image_file(tmp_path, pixels)
    weight = np.full(SHAPE, 0.01, np.float32)
    weight[20:23, 20:30] = 0.0
    companion_file(tmp_path, "a_w.fits", weight)
    flags = np.zeros(SHAPE, np.int16)
    flags[20:22, 20:30] = 3
    companion_file(tmp_path, "a_m.fits", flags)
    image = imported(
        tmp_path,
        weight={"kind": "inverse_variance", "replace": ["_i.", "_w."]},
        mask={"kind": "codes", "replace": ["_i.", "_m."], "planes": {3: "SAT"}},
    ).masked_image
    assert image.has_any(MaskPlane.SAT).sum() == 20
    assert image.variance[20, 25] == pytest.approx(60000.0, rel=0.01)
    no_data = image.has_any(MaskPlane.NO_DATA)
    assert no_data.sum() == 10 and no_data[22, 20:30].all()
    assert np.all(np.isinf(image.variance[no_data]))


def test_without_a_weight_map_the_variance_is_that_of_the_sky_and_the_photons(tmp_path):
    image_file(tmp_path)
    result = imported(tmp_path)
    variance = result.masked_image.variance
    assert np.median(variance) == pytest.approx(100.0, rel=0.1)
    x, y, _ = STARS[1]
    peak = result.masked_image.image[round(y), round(x)]
    assert variance[round(y), round(x)] == pytest.approx(100.0 + peak, rel=0.05)


def test_weight_and_mask_may_be_extensions_of_the_image_file(tmp_path):
    path = image_file(tmp_path)
    flags = np.zeros(SHAPE, np.int32)
    flags[0, :3] = 1
    with fits.open(path, mode="append") as hdus:
        hdus.append(fits.ImageHDU(np.full(SHAPE, 10.0, np.float32), name="ERR"))
        hdus.append(fits.ImageHDU(flags, name="DQ"))
    result = imported(
        tmp_path,
        weight={"kind": "rms", "hdu": "ERR"},
        mask={"kind": "bits", "hdu_offset": 2, "planes": {0: "CR"}},
    )
    (row,) = read_images(tmp_path / "images.ecsv")
    assert (row.hdu, row.weight_hdu, row.mask_hdu) == (1, 2, 3)
    assert np.median(result.masked_image.variance) == pytest.approx(100.0)
    assert result.masked_image.has_any(MaskPlane.CR).sum() == 3


# masks


def test_the_same_numbers_mean_one_thing_as_bits_and_another_as_codes():
    values = np.array([[0, 1, 2, 3, 4]], np.int16)
    header = fits.Header()
    bits = MaskSettings(kind="bits", planes={0: "BAD", 1: "SAT", 2: "CR"})
    codes = MaskSettings(kind="codes", planes={1: "BAD", 3: "SAT", 4: "SAT"}, unlisted=["SUSPECT"])
    bad, sat, cr, suspect = (int(MaskPlane[n]) for n in ("BAD", "SAT", "CR", "SUSPECT"))
    assert mask_planes(values, header, bits, "m.fits").tolist() == [[0, bad, sat, bad | sat, cr]]
    assert mask_planes(values, header, codes, "m.fits").tolist() == [[0, bad, suspect, sat, sat]]


def test_a_bit_that_is_not_listed_is_bad_and_one_that_is_listed_as_nothing_is_nothing():
    values = np.array([[1 << 5, 1 << 9, (1 << 5) | (1 << 9)]], np.int64)
    settings = MaskSettings(kind="bits", planes={5: []})
    found = mask_planes(values, fits.Header(), settings, "m.fits")
    bad = int(MaskPlane.BAD)
    assert found.tolist() == [[0, bad, bad]]


def test_bits_are_known_by_the_names_in_the_header():
    header = fits.Header({"MP_BAD": 3, "MP_SAT": 0, "HIERARCH MP_DETECTED": 4})
    settings = MaskSettings(
        kind="named_bits", planes={"SAT": "SAT", "BAD": "BAD", "DETECTED": []}, unlisted=["CR"]
    )
    found = mask_planes(np.array([[1, 8, 16, 2]]), header, settings, "m.fits")
    assert found.tolist() == [[int(MaskPlane.SAT), int(MaskPlane.BAD), 0, int(MaskPlane.CR)]]


@pytest.mark.parametrize(
    ("cards", "cause"),
    [
        ({"MP_SAT": "one"}, "MP_SAT is not the number of a bit"),
        ({"MP_SAT": None}, "MP_SAT is not the number of a bit"),
        ({"NAXIS": 2}, "names no bits"),
    ],
)
def test_a_header_that_does_not_name_the_bits_fails_the_ccd_with_the_file_of_the_mask(cards, cause):
    settings = MaskSettings(kind="named_bits", planes={"SAT": "SAT"})
    with pytest.raises(CcdFailure, match=f"^damaged_file: masks/m.fits: .*{cause}"):
        mask_planes(np.ones((1, 1), int), fits.Header(cards), settings, "masks/m.fits")


def test_a_mask_plane_that_does_not_exist_is_refused(tmp_path):
    image_file(tmp_path)
    companion_file(tmp_path, "a_m.fits", np.ones(SHAPE, np.int16))
    with pytest.raises(InputError, match="'SATUR' is not a mask plane"):
        imported(
            tmp_path, mask={"kind": "codes", "replace": ["_i.", "_m."], "planes": {1: "SATUR"}}
        )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask": {"kind": "bits", "planes": {"SAT": "SAT"}}}, "'SAT' is not a number"),
        ({"zero_point": {"value": 25.0, "keyword": "ZP"}}, "one of keyword, column and value"),
        ({"zero_point": None, "table": "x.ecsv"}, "zero_point is needed for images in electron"),
        ({"subtract_sky": "given", "table": "x.ecsv"}, "given, but sky is not"),
        ({"wieght": {}}, "wieght"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        settings_of(**changes)


# quality and bad input


def test_seeing_sky_and_noise_are_measured_where_they_are_not_given(tmp_path):
    image_file(tmp_path)
    figures = imported(tmp_path).figures
    assert figures["sky_level"] == pytest.approx(SKY, abs=2.0)
    assert figures["sky_noise"] == pytest.approx(10.0, rel=0.1)
    assert figures["pixel_scale"] == pytest.approx(0.5 * np.sqrt(1.01), rel=1e-6)
    assert figures["seeing"] == pytest.approx(1.5, rel=0.1)
    assert figures["n_sources"] == 3
    # 5 sigma in the noise of 4 pi sigma^2 pixels
    area = 4 * np.pi * (figures["seeing"] / figures["pixel_scale"] / 2.3548) ** 2
    limit = 5 * figures["sky_noise"] * np.sqrt(area)
    assert figures["depth"] == pytest.approx(30.0 - 2.5 * np.log10(limit), abs=1e-6)


def test_undefined_pixels_and_filled_areas_are_no_data(tmp_path):
    pixels = scene().round().astype(np.uint16)
    lost = np.zeros(SHAPE, bool)
    lost[10:13, 40:46] = lost[58:, :] = True
    pixels[10:13, 40:46] = 0  # the value BLANK, in the file -32768
    pixels[58:, :] = 7
    hdu = fits.ImageHDU(pixels, name="SCI")
    hdu.header.update(wcs_header("TAN"))
    hdu.header["BLANK"] = -32768
    primary = fits.PrimaryHDU()
    primary.header.update(BASE)
    fits.HDUList([primary, hdu]).writeto(tmp_path / "a_i.fits")
    result = imported(tmp_path)
    no_data = result.masked_image.has_any(MaskPlane.NO_DATA)
    np.testing.assert_array_equal(no_data, lost)
    assert result.figures["lost_fraction"] == 0.0, "the image has this shape; nothing was lost"
    assert result.figures["sky_level"] == pytest.approx(SKY, abs=2.0)


def test_an_image_without_stars_can_be_used(tmp_path):
    noise = np.random.default_rng(2).normal(50, 10, SHAPE)
    image_file(tmp_path, noise)
    result = imported(tmp_path)
    assert result.figures["n_sources"] == 0 and result.figures["seeing"] is None
    row = written_row(result, tmp_path)
    assert (row.state, row.depth, row.zero_point) == ("done", None, 30.0)


def spoil_missing(folder):
    (folder / "a_w.fits").unlink()


def spoil_cut(folder):
    content = (folder / "a_i.fits").read_bytes()
    (folder / "a_i.fits").write_bytes(content[: len(content) // 2])


def spoil_text(folder):
    (folder / "a_i.fits").write_text("no FITS")


def spoil_shape(folder):
    (folder / "a_i.fits").unlink()
    image_file(folder, np.ones((10, 10)))


def spoil_zero(folder):
    (folder / "a_i.fits").unlink()
    image_file(folder, np.zeros(SHAPE))


def spoil_nan(folder):
    (folder / "a_i.fits").unlink()
    image_file(folder, np.full(SHAPE, np.nan))


def spoil_weight(folder):
    (folder / "a_w.fits").unlink()
    companion_file(folder, "a_w.fits", np.zeros(SHAPE))


@pytest.mark.parametrize(
    ("spoil", "reason", "file"),
    [
        (spoil_missing, "missing_file", "a_w.fits"),
        (spoil_cut, "damaged_file", "a_i.fits"),
        (spoil_text, "damaged_file", "a_i.fits"),
        (spoil_shape, "changed_file", "a_i.fits"),
        (spoil_zero, "no_data", "a_i.fits"),
        (spoil_nan, "no_data", "a_i.fits"),
        (spoil_weight, "no_data", "a_w.fits"),
    ],
)
def test_an_image_that_went_bad_after_ingest_is_a_failed_ccd_with_its_file(
    tmp_path, spoil, reason, file
):
    image_file(tmp_path)
    companion_file(tmp_path, "a_w.fits", np.ones(SHAPE, np.float32))
    weight = {"kind": "inverse_variance", "replace": ["_i.", "_w."]}
    settings = settings_of(weight=weight)
    (row,) = ingested(tmp_path, settings)
    spoil(tmp_path)
    with pytest.raises(CcdFailure) as caught:
        import_image(relative_to(tmp_path, row), settings)
    assert caught.value.reason == reason and file in caught.value.message


def test_images_that_cannot_be_used_are_skipped_with_their_reason(tmp_path):
    weight = {"kind": "inverse_variance", "replace": ["_i.", "_w."]}
    names = ["good", "nowcs", "noweight", "shape", "filter", "nozero", "galactic"]
    for number, name in enumerate(names):
        cards = {"FILTER": "r/2"} if name == "filter" else {}
        path = image_file(tmp_path, name=f"{name}_i.fits", EXPNUM=number, **cards)
        shape = (5, 5) if name == "shape" else SHAPE
        if name != "noweight":
            companion_file(tmp_path, f"{name}_w.fits", np.ones(shape, np.float32))
        with fits.open(path, mode="update") as hdus:
            if name == "nowcs":
                del hdus[1].header["CTYPE1"]
            if name == "galactic":
                hdus[1].header["CTYPE1"], hdus[1].header["CTYPE2"] = "GLON-TAN", "GLAT-TAN"
            if name == "nozero":
                del hdus[0].header["MAGZERO"]
    (tmp_path / "cut_i.fits").write_bytes((tmp_path / "good_i.fits").read_bytes()[:3000])
    (tmp_path / "text_i.fits").write_text("x")
    settings = settings_of(weight=weight, band={"keyword": "FILTER", "pattern": r"^(\S+)"})
    report = ingest_calibrated([tmp_path], settings.calibrated, tmp_path / "images.ecsv")
    assert report.added == ["0/3"]
    found = {Path(skip.file).name.split("_")[0]: skip.reason for skip in report.skipped}
    assert found == {
        "nowcs": "no_wcs",
        "galactic": "no_wcs",
        "noweight": "missing_weight",
        "shape": "other_shape",
        "filter": "bad_id",
        "nozero": "missing_keyword",
        "cut": "not_readable",
        "text": "not_readable",
    }


@pytest.mark.parametrize(
    ("bunit", "unit", "outcome"),
    [
        ("ELECTRONS/S", "electron", "skipped"),
        ("electron s-1", "electron_per_second", "added"),
        ("e-/sec", "adu_per_second", "doubted"),
        ("adu", "electron", "doubted"),
        ("DN", "adu_per_second", "skipped"),
        ("nJy", "electron", "skipped"),
        ("electrons", "nanojansky", "skipped"),
        ("nJy", "nanojansky", "added"),
        ("counts", "adu", "added"),
        ("furlongs", "electron", "added"),
        ("", "electron", "added"),
    ],
)
def test_bunit_is_compared_with_the_setting(tmp_path, bunit, unit, outcome):
    image_file(tmp_path, EXPNUM=1, name="other_i.fits")
    path = image_file(tmp_path, EXPNUM=2)
    fits.setval(path, "BUNIT", value=bunit, ext=1)
    settings = settings_of(unit=unit).calibrated
    report = ingest_calibrated([tmp_path], settings, tmp_path / "images.ecsv")
    assert ("2/3" in report.added) == (outcome != "skipped")
    assert [skip.reason for skip in report.skipped] == ["other_unit"] * (outcome == "skipped")
    assert len(report.doubtful) == (outcome == "doubted")
    for text in [item.message for item in [*report.skipped, *report.doubtful]]:
        assert f"BUNIT is {bunit!r}" in text and f"calibrated.unit is {unit}" in text
    ignored = settings.model_copy(update={"check_unit": False})
    report = ingest_calibrated([tmp_path], ignored, tmp_path / "all.ecsv")
    assert len(report.added) == 2 and not report.doubtful


def test_one_broken_header_does_not_stop_the_others_and_is_described_at_once(tmp_path):
    for number in (1, 2, 3):
        path = image_file(tmp_path, name=f"{number}_i.fits", EXPNUM=number)
        content = path.read_bytes()
        if number == 2:
            for key in (b"EXPTIME ", b"MAGZERO "):
                at = content.index(key + b"=")
                content = content[:at] + (key + b"=   NaN").ljust(80) + content[at + 80 :]
            path.write_bytes(content)
    report = ingest_calibrated([tmp_path], settings_of().calibrated, tmp_path / "images.ecsv")
    assert report.added == ["1/3", "3/3"]
    (skip,) = report.skipped
    assert "2_i.fits" in skip.file and "EXPTIME" in skip.message


def test_contradictions_of_the_wcs_are_reported_by_ingest(tmp_path):
    path = image_file(tmp_path)
    fits.setval(path, "A_ORDER", value=2, ext=1)
    report = ingest_calibrated([tmp_path], settings_of().calibrated, tmp_path / "images.ecsv")
    assert ["SIP cards" in doubt.message for doubt in report.doubtful] == [True]


def test_cubes_of_one_plane_are_images(tmp_path):
    pixels = scene()
    image_file(tmp_path, pixels=pixels[None, None])
    result = imported(tmp_path, subtract_sky="none")
    assert np.array_equal(result.masked_image.image, pixels.astype(np.float32))


def test_checksums_of_images_are_verified_where_they_stand_in_the_header(tmp_path):
    path = image_file(tmp_path)
    with fits.open(path) as hdus:
        hdus.writeto(tmp_path / "sums.fits", checksum=True)
    (tmp_path / "sums.fits").rename(path)
    settings = settings_of()
    (row,) = ingested(tmp_path, settings)
    row = relative_to(tmp_path, row)
    import_image(row, settings)
    content = bytearray(path.read_bytes())
    content[-5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CcdFailure, match=r"differ from their DATASUM.*check_sums"):
        import_image(row, settings)
    import_image(row, settings_of(check_sums=False))


@pytest.mark.parametrize(("given", "is_doubted"), [(SKY, False), (2 * SKY, True), (0.0, False)])
def test_a_given_sky_above_the_image_is_doubted(tmp_path, caplog, given, is_doubted):
    image_file(tmp_path)
    imported(tmp_path, subtract_sky="given", sky={"value": given})
    assert any("the given sky is" in text for text in caplog.messages) == is_doubted


def test_every_extension_with_an_image_becomes_a_ccd(tmp_path):
    path = image_file(tmp_path)
    with fits.open(path, mode="append") as hdus:
        second = hdus[1].copy()
        second.name, second.header["CCDNUM"] = "TWO", 4
        hdus.append(second)
        hdus.append(fits.BinTableHDU.from_columns([fits.Column("x", "E", array=[1.0])]))
    rows = ingested(tmp_path, settings_of())
    assert [(row.exposure, row.ccd, row.hdu) for row in rows] == [("7", 3, 1), ("7", 4, 2)]


# the real cutouts


def decam_settings():
    content = yaml.safe_load(CONFIG.read_text())["calibrated"]
    facts = content["facts"] | {"path": str(DECAM / "survey-ccds-1.fits.gz")}
    return Settings(calibrated=content | {"facts": facts})


@pytest.mark.skipif(not DECAM.is_dir(), reason="../shared/data/decam-calibrated is not there")
def test_the_decam_cutouts_are_what_their_headers_and_the_ccd_table_say(tmp_path):
    settings = decam_settings()
    report = ingest_calibrated([DECAM], settings.calibrated, tmp_path / "images.ecsv")
    rows = {row.exposure: row for row in read_images(tmp_path / "images.ecsv")}
    assert len(rows) == 6 and {skip.reason for skip in report.skipped} == {"other_name"}
    assert sorted((row.band, row.ccd) for row in rows.values()) == [
        ("g", 20),
        ("g", 28),
        ("r", 20),
        ("r", 28),
        ("z", 20),
        ("z", 28),
    ]
    # magnitude of one count per second, exposure time and gain, as the two files give them
    row = rows["396388"]
    assert row.zero_point == pytest.approx(24.927883 + 2.5 * np.log10(150.0 * 3.872514), abs=1e-4)
    result = import_image(relative_to(tmp_path, row), settings)
    saturated = result.masked_image.has_any(MaskPlane.SAT)
    usable = ~saturated
    # the weight map is that of the photons, which only holds if gain and unit are right
    photons = (result.masked_image.image + row.sky_level)[usable]
    assert np.median(result.masked_image.variance[usable] / photons) == pytest.approx(1.0, abs=0.05)
    # code 3 is saturation; taken for bits it would be two defects
    assert saturated.sum() > 500
    assert not result.masked_image.has_any(MaskPlane.CR | MaskPlane.BAD).any()


def symmetric_centre(image, usable, x, y, radius=20.0):
    """Return the centre of a star whose core is saturated: where its halo is symmetric."""
    rows, columns = np.indices(image.shape)
    slope_y, slope_x = np.gradient(image)
    for _ in range(60):
        where = [2 * y - rows, 2 * x - columns]
        mirrored = ndimage.map_coordinates(np.where(usable, image, 0.0), where, order=1)
        both = usable & (ndimage.map_coordinates(usable * 1.0, where, order=1, cval=0.0) > 0.999)
        weight = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * radius**2)) * both
        odd = np.where(both, image - mirrored, 0.0)
        slopes = [np.where(both, slope, 0.0) for slope in (slope_x, slope_y)]
        matrix = [[np.sum(weight * a * b) for b in slopes] for a in slopes]
        step = -np.linalg.solve(matrix, [np.sum(weight * a * odd) for a in slopes]) / 2
        x, y = x + step[0], y + step[1]
        if np.hypot(*step) < 1e-4:
            break
    return x, y


@pytest.mark.skipif(not DECAM.is_dir(), reason="../shared/data/decam-calibrated is not there")
def test_the_bright_star_of_the_decam_cutouts_is_where_gaia_says(tmp_path):
    settings = decam_settings()
    ingest_calibrated([DECAM], settings.calibrated, tmp_path / "images.ecsv")
    stars = Table.read(DECAM / "gaia/chunk-03687.fits")
    (star,) = stars[sphere.separation(stars["ra"], stars["dec"], 110.312, 23.92) < 8 / 3600]
    for row in read_images(tmp_path / "images.ecsv"):
        result = import_image(relative_to(tmp_path, row), settings)
        years = 2000.0 + (row.mjd - 51544.5) / 365.25 - star["ref_epoch"]
        dec = star["dec"] + star["pmdec"] * years / 3.6e6
        ra = star["ra"] + star["pmra"] * years / 3.6e6 / np.cos(np.radians(dec))
        x, y = (float(value[0]) for value in sky_to_pixel(result.wcs, [ra], [dec]))
        spoilt = result.masked_image.has_any(MaskPlane.SAT | MaskPlane.NO_DATA)
        usable = ~ndimage.binary_dilation(spoilt, iterations=2)
        image = result.masked_image.image.astype(float)
        found = symmetric_centre(image, usable, x + 2.0, y - 1.0)
        # the star is saturated over 25 pixels: its centre is known to about a pixel only
        assert np.hypot(found[0] - x, found[1] - y) < 1.5, row.exposure


def test_an_image_with_stars_gets_their_psf(tmp_path):
    """Stars of FWHM 3 pixels, their pixels included."""
    rng = np.random.default_rng(5)
    y, x = np.indices((200, 200))
    image = np.full(x.shape, SKY) + rng.normal(0, 10.0, x.shape)
    sigma = 3.0 / 2.3548
    for column, row in np.stack(np.meshgrid(*[np.arange(30, 190, 45)] * 2), -1).reshape(-1, 2):
        x0, y0 = column + rng.uniform(-0.5, 0.5), row + rng.uniform(-0.5, 0.5)
        star = np.exp(-((x - x0) ** 2 + (y - y0) ** 2) / (2 * sigma**2))
        image += 60000.0 * star / star.sum()
    image_file(tmp_path, image)
    calexp = imported(tmp_path)
    assert calexp.psf.fwhm_at(100.0, 100.0) == pytest.approx(3.0, rel=0.02)
    written_row(calexp, tmp_path)
    assert read_calexp(tmp_path / "calexp.fits").psf.fwhm_at(9, 9) == pytest.approx(3.0, rel=0.02)
