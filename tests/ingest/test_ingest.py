"""Raw folder to exposure table, by the header map of a camera."""

import gzip
import io
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.time import Time

from coaddflow.errors import InputError
from coaddflow.geometry.angles import parse_declination, parse_right_ascension
from coaddflow.ingest import raw_exposures
from coaddflow.ingest.raw_exposures import find_raw_files, ingest, repoint
from coaddflow.instrument.camera import load_camera
from coaddflow.instrument.file_layout import FileLayout, HeaderKey
from coaddflow.instrument.header_values import (
    FileHeaders,
    HeaderValueError,
    header_mjd,
    header_number,
    header_text,
    read_headers,
)
from coaddflow.tables.exposures import file_of, read_exposures
from coaddflow.tables.manifest import FOOTPRINT_POINTS_PER_EDGE, CcdRow, write_manifest, write_row

HATP32 = Path(__file__).parents[3] / "shared/data/hatp32"


@pytest.fixture(scope="module")
def camera():
    return load_camera("demo")


def cards(name, **changes):
    header = {
        "EXPID": name,
        "OBSTYPE": "OBJECT",
        "FILTER": "r",
        "RA": 10.0,
        "DEC": -2.25,
        "ROTPA": 12.0,
        "MJD-OBS": 60000.0,
        "EXPTIME": 30.0,
    }
    header |= {key.replace("_", "-"): value for key, value in changes.items()}
    return {key: value for key, value in header.items() if value is not None}


def raw_file(folder, name, file=None, n_ccds=1, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    primary = fits.PrimaryHDU()
    primary.header.update(cards(name, **changes))
    ccds = [fits.ImageHDU(np.zeros((4, 6), np.uint16), name=f"CCD{n}") for n in range(n_ccds)]
    path = folder / (file or f"{name}.fits")
    fits.HDUList([primary, *ccds]).writeto(path)
    return path


def described(file="x.fits", **values):
    return FileHeaders(Path(file), (fits.Header(values),))


def skipped(report):
    return {Path(skip.file).name: (skip.reason, skip.message) for skip in report.skipped}


# values of headers


def test_right_ascension_in_hours_and_in_degrees_is_the_same_place():
    hours = HeaderKey(keyword="RA", unit="hourangle")
    degrees = HeaderKey(keyword="RA", unit="degree")
    assert header_number(hours, "ra", described(RA="07:20:54.24")) == pytest.approx(110.226)
    assert header_number(hours, "ra", described(RA=7.3484)) == pytest.approx(110.226)
    assert header_number(degrees, "ra", described(RA=110.226)) == pytest.approx(110.226)


def test_hours_where_the_map_says_degrees_are_noticed_and_the_other_way_round():
    with pytest.raises(HeaderValueError, match="set its unit to hourangle"):
        header_number(HeaderKey(keyword="RA", unit="degree"), "ra", described(RA="07:20:54"))
    with pytest.raises(HeaderValueError, match="set its unit to degree"):
        header_number(HeaderKey(keyword="RA", unit="hourangle"), "ra", described(RA=110.2))


def test_a_declination_just_south_of_the_equator_keeps_its_sign():
    key = HeaderKey(keyword="DEC", unit="degree")
    assert header_number(key, "dec", described(DEC="-00:30:00")) == -0.5
    assert parse_declination("-00 30 00") == -0.5
    assert parse_declination("-0d30m") == -0.5
    assert parse_declination("\N{MINUS SIGN}0d30\N{PRIME}") == -0.5


@pytest.mark.parametrize(
    ("text", "degrees"),
    [("150.25", 150.25), ("10:01:00", 150.25), ("10h01m00s", 150.25), ("150d15m00s", 150.25)],
)
def test_people_write_right_ascensions_in_these_ways(text, degrees):
    assert parse_right_ascension(text) == pytest.approx(degrees)


@pytest.mark.parametrize(
    "text",
    ["25:00:00", "-1", "360.1", "10:61:00", "abc", "", "nan", "1:2:3:4"],
)
def test_what_is_no_right_ascension_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        parse_right_ascension(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ({"unit": "mjd", "scale": "utc"}, 58107.0),
        ({"unit": "jd", "scale": "utc"}, 2458107.5),
        ({"unit": "iso", "scale": "utc"}, "2017-12-20T00:00:00"),
        ({"unit": "iso", "scale": "utc"}, "2017-12-19T17:00:00-0700"),
        ({"unit": "iso", "scale": "tai"}, "2017-12-20T00:00:37"),
        ({"unit": "mjd", "scale": "tt"}, 58107.0 + (37 + 32.184) / 86400),
    ],
)
def test_every_way_to_write_a_moment_gives_the_same_tai(key, value):
    # 37 s between UTC and TAI since 2017 (IERS Bulletin C 52)
    mjd = header_mjd(HeaderKey(keyword="T", **key), "mjd", described(T=value))
    assert mjd == pytest.approx(58107.0 + 37 / 86400, abs=2e-9)


def test_a_julian_date_in_the_place_of_an_mjd_is_noticed():
    with pytest.raises(HeaderValueError, match="is not a time of 'mjd'"):
        header_mjd(HeaderKey(keyword="T", unit="mjd"), "mjd", described(T=2458107.5))


def test_a_part_of_a_value_its_replacement_and_its_default():
    key = HeaderKey(keyword="FILTER", pattern=r"^(\w+) DECam", values={"N964": "n"}, default="none")
    assert header_text(key, "band", described(FILTER="z DECam SDSS c0004 9260.0")) == "z"
    assert header_text(key, "band", described(FILTER="N964 DECam")) == "n"
    assert header_text(key, "band", described()) == "none"
    assert (
        header_text(HeaderKey(pattern=r"_(\d+)\."), "exposure", described("a_0042.fits")) == "0042"
    )
    with pytest.raises(HeaderValueError, match="does not match the pattern"):
        header_text(key, "band", described(FILTER="open"))


def test_factor_and_offset_act_on_degrees_and_seconds():
    key = HeaderKey(keyword="PA", unit="radian", factor=-1.0, offset=90.0)
    assert header_number(key, "rotation", described(PA=np.pi / 2)) == pytest.approx(0.0)
    key = HeaderKey(keyword="MS", unit="second", factor=1e-3)
    assert header_number(key, "exposure_time", described(MS=1500)) == 1.5


@pytest.mark.parametrize(
    ("keys", "what", "value", "number"),
    [
        ({"unit": "second"}, "exposure_time", "30 s", 30.0),
        ({"unit": "second"}, "exposure_time", "0,5 min", 30.0),
        ({"unit": "second"}, "exposure_time", "3.0D1", 30.0),
        ({"unit": "second"}, "exposure_time", "500 ms", 0.5),
        ({"unit": "second"}, "exposure_time", "00:01:30", 90.0),
        ({}, "exposure_time", "'30'", 30.0),
        ({"unit": "hourangle"}, "ra", "10h 00m 24.1s", 150.10041666667),
        ({"unit": "degree"}, "ra", "10h00m24.1s", 150.10041666667),
        ({"unit": "hourangle"}, "ra", "10 00 24,1", 150.10041666667),
        ({"unit": "hourangle"}, "ra", "150.1 deg", 150.1),
        ({"unit": "degree"}, "dec", "-02d 13m 30s", -2.225),
        ({"unit": "degree"}, "ra", "1.501D2", 150.1),
        ({"unit": "degree"}, "dec", "-02:13:30", -2.225),
        ({"unit": "degree"}, "rotation", "1.5707963267948966 rad", 90.0),
        ({}, "gain", "1.6 e-/ADU", 1.6),
        ({}, "gain", "1.6 electrons / count", 1.6),
    ],
)
def test_numbers_in_many_dialects(keys, what, value, number):
    key = HeaderKey(keyword="X", **keys)
    assert header_number(key, what, described(X=value)) == pytest.approx(number, rel=1e-11)


@pytest.mark.parametrize(
    ("keys", "what", "value", "said"),
    [
        ({"unit": "degree"}, "ra", 1e300, "between -180 and 360"),
        ({"unit": "degree"}, "ra", 361.0, "between -180 and 360"),
        ({"unit": "degree"}, "dec", 95.0, "between -90 and 90"),
        ({"unit": "degree"}, "dec", "-90:30:00", "between -90 and 90"),
        ({"unit": "degree"}, "rotation", 1e20, "between -1080 and 1080"),
        ({"unit": "second"}, "exposure_time", 1e30, "between 0 and"),
        ({"unit": "second"}, "exposure_time", -1.0, "between 0 and"),
        ({"unit": "second"}, "exposure_time", "30,000", "thousand"),
        ({"unit": "second"}, "exposure_time", "30 parsec", "'parsec' is not known"),
        ({"unit": "second"}, "exposure_time", "01:30", "not a number"),
        ({"unit": "second"}, "exposure_time", True, "not a number"),
        ({}, "gain", "1.6 ADU/e-", "unit 'ADU/e-' is not known"),
        ({}, "zero_point", 1e9, "between -100 and 100"),
        ({}, "seeing", "-1 arcsec", "between 0"),
    ],
)
def test_impossible_values_are_refused_with_their_keyword(keys, what, value, said):
    with pytest.raises(HeaderValueError, match=said) as caught:
        header_number(HeaderKey(keyword="X-CARD", **keys), what, described(**{"X-CARD": value}))
    assert f"{what} (X-CARD)" in str(caught.value)


@pytest.mark.parametrize(
    ("cards", "moment"),
    [
        ({"DATE-OBS": "2017-12-20T01:02:03.5"}, "2017-12-20T01:02:03.5"),
        ({"DATE-OBS": "2017-12-20 01:02:03,5"}, "2017-12-20T01:02:03.5"),
        ({"DATE-OBS": "2017-12-20T01:02:03.5Z"}, "2017-12-20T01:02:03.5"),
        ({"DATE-OBS": "2017/12/20 01:02:03.5"}, "2017-12-20T01:02:03.5"),
        ({"DATE-OBS": "2017-12-20T00:61:03"}, None),
        ({"DATE-OBS": "2017-12-20T01:01:60.0"}, "2017-12-20T01:02:00"),
        ({"DATE-OBS": "2017-12-20", "UT": "01:02:03.5"}, "2017-12-20T01:02:03.5"),
        ({"DATE-OBS": "2017-12-20", "TIME-OBS": "01:02:03.5"}, "2017-12-20T01:02:03.5"),
        ({"DATE-OBS": "20/12/97", "UTC-OBS": "1 2 3.5"}, "1997-12-20T01:02:03.5"),
        ({"DATE-OBS": "20/12/2017", "UT": "01:02:03.5"}, "2017-12-20T01:02:03.5"),
        ({"DATE-OBS": "20/12/17"}, None),  # 1917 in FITS
        ({"DATE-OBS": "11/12/2017"}, None),
        ({"DATE-OBS": "2017-13-20"}, None),
        ({"DATE-OBS": "yesterday"}, None),
    ],
)
def test_dates_in_many_dialects(cards, moment):
    key = HeaderKey(keyword="DATE-OBS", unit="iso")
    if moment is None:
        with pytest.raises(HeaderValueError, match=r"mjd \(DATE-OBS\).*is not a time"):
            header_mjd(key, "mjd", described(**cards))
        return
    truth = Time(moment, scale="utc").tai.mjd
    assert header_mjd(key, "mjd", described(**cards)) == pytest.approx(truth, abs=2e-9)


@pytest.mark.parametrize("date", ["2017-12-20", "2017-12-20T00:00:00", "2017-12-20T01:02:03.5"])
def test_two_cards_are_joined_to_a_time(date):
    key = HeaderKey(keyword="DATE", join=["START"], unit="iso", scale="utc")
    found = header_mjd(key, "mjd", described(DATE=date, START="01:02:03.5"))
    assert found == pytest.approx(Time("2017-12-20T01:02:03.5", scale="utc").tai.mjd, abs=2e-9)
    with pytest.raises(HeaderValueError, match="no keyword START"):
        header_mjd(key, "mjd", described(DATE=date))


def test_a_date_without_any_time_is_midnight_and_said():
    image = described(DATE="2017-12-20")
    found = header_mjd(HeaderKey(keyword="DATE", unit="iso"), "mjd", image)
    assert found == pytest.approx(Time("2017-12-20T00:00:00", scale="utc").tai.mjd, abs=2e-9)
    assert "midnight" in image.notes[0]


@pytest.mark.parametrize(
    ("system", "shift"),
    [("UTC", 37.0), ("TAI", 0.0), ("TT", -32.184), ("TDB", -32.184), ("GPS", 19.0), ("UT1", 37.0)],
)
def test_timesys_is_the_scale_of_times_unless_the_camera_file_says_one(system, shift):
    image = described(T=58107.0, TIMESYS=system)
    found = header_mjd(HeaderKey(keyword="T", unit="mjd"), "mjd", image)
    assert found == pytest.approx(58107.0 + shift / 86400, abs=2e-9) and not image.notes
    key = HeaderKey(keyword="T", unit="mjd", scale="utc")
    assert header_mjd(key, "mjd", image) == pytest.approx(58107.0 + 37 / 86400, abs=2e-9)
    assert bool(image.notes) == (system not in ("UTC", "UT1"))


def test_a_jd_and_an_mjd_are_told_apart():
    with pytest.raises(HeaderValueError, match="set its unit to jd"):
        header_mjd(HeaderKey(keyword="T", unit="mjd"), "mjd", described(T=2458107.5))
    with pytest.raises(HeaderValueError, match="set its unit to mjd"):
        header_mjd(HeaderKey(keyword="T", unit="jd"), "mjd", described(T=58107.0))


@pytest.mark.parametrize("value", [True, "T", "yes", "Y", 1, "true"])
def test_logical_values_in_many_dialects(value):
    for words in ({"T": "science", "F": "dark"}, {True: "science", False: "dark"}):
        key = HeaderKey(keyword="SHUTTER", values=words)
        assert header_text(key, "kind", described(SHUTTER=value)) == "science"
        assert header_text(key, "kind", described(SHUTTER="no")) == "dark"


# folders


def test_a_night_becomes_a_table_in_the_order_of_time(tmp_path, camera):
    raw_file(tmp_path / "raw/a", "e2", MJD_OBS=60000.5)
    raw_file(tmp_path / "raw/b", "e1", n_ccds=2)
    raw_file(tmp_path / "raw", "b1", OBSTYPE="ZERO", FILTER=None, RA=None, DEC=None, EXPTIME=None)
    raw_file(tmp_path / "raw", "f1", OBSTYPE="FLAT", RA=None, MJD_OBS=59999.0)
    report = ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    rows = read_exposures(tmp_path / "e.ecsv")
    assert [row.exposure for row in rows] == ["f1", "b1", "e1", "e2"]
    assert [row.kind for row in rows] == ["flat", "bias", "science", "science"]
    assert sorted(report.added) == ["b1", "e1", "e2", "f1"] and not report.skipped
    science = rows[2]
    assert (science.ra, science.dec, science.rotation, science.band) == (150.0, -2.25, 12.0, "r")
    assert science.mjd == pytest.approx(Time(60000.0, format="mjd", scale="utc").tai.mjd, abs=1e-9)
    assert file_of(science.path, tmp_path / "e.ecsv") == tmp_path / "raw/b/e1.fits"


def test_gzip_and_fpack_are_read_as_they_are(tmp_path, camera):
    plain = raw_file(tmp_path, "g1")
    with gzip.open(tmp_path / "g1.fits.gz", "wb") as stream:
        stream.write(plain.read_bytes())
    plain.unlink()
    hdu = fits.CompImageHDU(np.zeros((8, 8), np.int16))
    hdu.header.update(cards("p1"))
    # fpack says so of an image that was the primary HDU
    packed = fits.HDUList([fits.PrimaryHDU(), hdu])
    packed.writeto(tmp_path / "p1.fits.fz")
    with fits.open(tmp_path / "p1.fits.fz", disable_image_compression=True, mode="update") as hdus:
        hdus[1].header["ZSIMPLE"] = True
    report = ingest([tmp_path], camera, tmp_path / "e.ecsv")
    assert sorted(report.added) == ["g1", "p1"], report.skipped


def test_what_cannot_be_used_is_skipped_with_its_reason_and_the_rest_comes_in(tmp_path, camera):
    raw = tmp_path / "raw"
    good = raw_file(raw, "good")
    raw_file(raw, "twin", file="zz_twin.fits", EXPID="good")
    raw_file(raw, "a/b", file="slash.fits")
    raw_file(raw, "a b", file="space.fits")
    raw_file(raw, "a;rm", file="shell.fits")
    raw_file(raw, "-x", file="dash.fits")
    raw_file(raw, "focus", OBSTYPE="FOCUS")
    raw_file(raw, "nora", RA=None)
    raw_file(raw, "nan", DEC="NaN")
    raw_file(raw, "south", DEC=-91.0)
    raw_file(raw, "unread", file="cut.fits").write_bytes(good.read_bytes()[:1000])
    (raw / "cut.fits.gz").write_bytes(gzip.compress(good.read_bytes())[:40])
    (raw / "empty.fits").write_bytes(b"")
    (raw / "text.fits").write_text("this is no FITS file")
    (raw / "notes.txt").write_text("clear night")
    (raw / ".hidden.fits").write_text("being copied")
    report = ingest([raw], camera, tmp_path / "e.ecsv")
    assert report.added == ["good"]
    reasons = skipped(report)
    assert {name: reason for name, (reason, _) in reasons.items()} == {
        "zz_twin.fits": "duplicate_id",
        "slash.fits": "bad_id",
        "space.fits": "bad_id",
        "shell.fits": "bad_id",
        "dash.fits": "bad_id",
        "focus.fits": "other_kind",
        "nora.fits": "missing_keyword",
        "nan.fits": "bad_value",
        "south.fits": "bad_value",
        "cut.fits": "truncated",
        "cut.fits.gz": "truncated",
        "empty.fits": "empty_file",
        "text.fits": "not_fits",
        "notes.txt": "other_name",
    }
    assert str(good) in reasons["zz_twin.fits"][1]
    assert "RA" in reasons["nora.fits"][1]
    assert "header.exposure" in reasons["slash.fits"][1]


def test_all_that_is_wrong_with_a_file_is_said_at_once(tmp_path, camera):
    raw_file(tmp_path / "raw", "good")
    raw_file(tmp_path / "raw", "bad", RA=None, EXPTIME=None, FILTER=None, DEC=95.0)
    report = ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    ((_, message),) = skipped(report).values()
    assert "no keyword RA (ra), FILTER (band), EXPTIME (exposure_time)" in message
    assert "dec (DEC): '95' is not between -90 and 90" in message


def test_bias_and_flat_need_no_date_and_no_pointing(tmp_path, camera):
    none = {"RA": None, "DEC": None, "ROTPA": None, "MJD_OBS": None}
    raw_file(tmp_path / "raw", "b1", OBSTYPE="ZERO", FILTER=None, EXPTIME=None, **none)
    raw_file(tmp_path / "raw", "f1", OBSTYPE="flat", **none)
    raw_file(tmp_path / "raw", "e1", MJD_OBS=None)
    raw_file(tmp_path / "raw", "d1", OBSTYPE="DARK", EXPTIME=0.0, **none)
    report = ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    assert sorted(report.added) == ["b1", "f1"]
    assert "MJD-OBS (mjd)" in skipped(report)["e1.fits"][1]
    assert "exposure_time (EXPTIME) is 0" in skipped(report)["d1.fits"][1]
    assert [row.mjd for row in read_exposures(tmp_path / "e.ecsv")] == [None, None]


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz"])
@pytest.mark.parametrize("part", [0.03, 0.5, 0.95])
def test_a_file_is_compared_with_all_its_headers(tmp_path, camera, suffix, part):
    primary = fits.PrimaryHDU()
    primary.header.update(cards("e1"))
    ccds = [fits.ImageHDU(np.arange(10000).reshape(100, 100), name=f"CCD{n}") for n in range(6)]
    fits.HDUList([primary, *ccds]).writeto(tmp_path / "whole.fit")
    whole = (tmp_path / "whole.fit").read_bytes()
    packed = gzip.compress(whole) if suffix.endswith("gz") else whole
    (tmp_path / f"cut{suffix}").write_bytes(packed[: int(part * len(packed))])
    (tmp_path / "good.fits").write_bytes(whole.replace(b"'e1 ", b"'e2 "))
    report = ingest([tmp_path], camera, tmp_path / "e.ecsv")
    assert report.added == ["e2"]
    assert skipped(report)[f"cut{suffix}"][0] == "truncated"


def test_a_last_hdu_without_its_padding_is_whole(tmp_path, camera):
    path = raw_file(tmp_path, "e1", n_ccds=1)
    path.write_bytes(path.read_bytes()[: -2880 + 2 * 4 * 6])
    assert ingest([tmp_path], camera, tmp_path / "e.ecsv").added == ["e1"]


def test_what_is_not_as_the_camera_file_says_is_said(tmp_path, camera):
    raw_file(tmp_path, "e1", n_ccds=6)
    report = ingest([tmp_path], camera, tmp_path / "e.ecsv")
    assert report.added == ["e1"]
    (doubt,) = report.doubtful
    assert "CCD 0 has 6 x 4 raw pixels" in doubt.message and "(and 5 more)" in doubt.message


def test_a_file_that_ends_between_two_ccds_is_doubted(tmp_path, camera):
    primary = fits.PrimaryHDU()
    primary.header.update(cards("e1"))
    ccds = [fits.ImageHDU(np.zeros((640, 704), np.uint16), name=f"CCD{n}") for n in range(6)]
    fits.HDUList([primary, *ccds[:4]]).writeto(tmp_path / "e1.fits")
    report = ingest([tmp_path], camera, tmp_path / "e.ecsv")
    assert [doubt.message for doubt in report.doubtful] == [
        "CCD 4 is not in it: it will fail (and 1 more)"
    ]


@pytest.mark.parametrize(
    ("keyword", "card", "said"),
    [
        ("GAINA", 17.0, "GAINA is 17, which counts, and the camera file says 1.7"),
        ("GAINA", 1.6, ""),
        ("GAINA", "high", "it will fail with missing_keyword"),
        (None, 1.0, "GAIN is 1, and the camera file, which counts, says 1.7"),
        (None, 1.72, ""),
        ("NAMPS", 2, "CCD 0: NAMPS is 2, and the camera file has 1"),
        ("NAMPS", 1, ""),
    ],
)
def test_gains_and_amplifiers_are_compared_with_the_camera_file(
    tmp_path, camera, keyword, card, said
):
    own = keyword if keyword == "GAINA" else None
    amplifier = camera.detectors[0].amplifiers[0]
    amplifier = amplifier.model_copy(update={"gain_keyword": own, "gain": 1.7})
    one = camera.detectors[0].model_copy(update={"amplifiers": (amplifier,)})
    primary = fits.PrimaryHDU()
    primary.header.update(cards("e1") | {keyword or "GAIN": card})
    ccd = fits.ImageHDU(np.zeros((640, 352), np.uint16), name="CCD0")
    ccd.header[keyword or "GAIN"] = card
    fits.HDUList([primary, ccd]).writeto(tmp_path / "e1.fits")
    only = camera.model_copy(update={"detectors": (one,)})
    report = ingest([tmp_path], only, tmp_path / "e.ecsv")
    assert [said in doubt.message for doubt in report.doubtful] == [True] * bool(said)


def test_a_pipe_is_not_waited_for(tmp_path, camera):
    raw_file(tmp_path, "e1")
    os.mkfifo(tmp_path / "pipe.fits")
    report = ingest([tmp_path], camera, tmp_path / "e.ecsv")
    assert report.added == ["e1"] and skipped(report)["pipe.fits"][0] == "unreadable"


def test_fpack_is_seen_by_the_content_and_not_by_the_name(tmp_path, camera):
    hdu = fits.CompImageHDU(np.zeros((8, 8), np.int16))
    hdu.header.update(cards("p1"))
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "p1.fits.fz")
    with fits.open(tmp_path / "p1.fits.fz", disable_image_compression=True, mode="update") as hdus:
        hdus[1].header["ZSIMPLE"] = True
    (tmp_path / "p1.fits.fz").rename(tmp_path / "p1.fits")
    raw_file(tmp_path, "e1").rename(tmp_path / "e1.fits.gz")
    report = ingest([tmp_path], camera, tmp_path / "e.ecsv")
    assert sorted(report.added) == ["e1", "p1"], report.skipped


def test_an_unknown_filter_names_the_key_of_the_camera_file(tmp_path):
    camera = load_camera("microobservatory")
    hdu = fits.PrimaryHDU(np.zeros((4, 4), np.int16))
    hdu.header.update(
        {"FILTER": "H-beta", "RA": 31.3, "DEC": 46.8, "UT-OBS": "2017-12-20T01:33:43.317-0000"}
    )
    hdu.header["EXPTIME"] = 60.0
    hdu.writeto(tmp_path / "X171220013343.FITS")
    with pytest.raises(InputError, match=r"'H-beta'.*header\.band\.values"):
        ingest([tmp_path], camera, tmp_path / "e.ecsv")
    assert not (tmp_path / "e.ecsv").exists()


@pytest.mark.parametrize("content", ["nothing", "other", "absent"])
def test_a_folder_without_raw_files_says_how_they_are_named(tmp_path, camera, content):
    folder = tmp_path / "raw"
    if content != "absent":
        folder.mkdir()
    if content == "other":
        (folder / "readme.md").write_text("x")
    with pytest.raises(InputError) as caught:
        ingest([folder], camera, tmp_path / "e.ecsv")
    assert str(folder) in str(caught.value) and caught.value.remedy
    assert not (tmp_path / "e.ecsv").exists()


def test_a_second_ingest_changes_nothing(tmp_path, camera):
    raw_file(tmp_path / "raw", "e1")
    ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    stamp = (tmp_path / "e.ecsv").stat().st_mtime_ns
    report = ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    assert report.unchanged == ["e1"] and not report.written
    assert (tmp_path / "e.ecsv").stat().st_mtime_ns == stamp


def test_a_new_exposure_does_not_disturb_the_rows_of_the_others(tmp_path, camera):
    raw_file(tmp_path / "raw", "e1")
    raw_file(tmp_path / "raw", "e3", MJD_OBS=60003.0)
    ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    before = (tmp_path / "e.ecsv").read_text().splitlines()
    raw_file(tmp_path / "raw", "e2", MJD_OBS=60002.0)
    report = ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    after = (tmp_path / "e.ecsv").read_text().splitlines()
    assert report.added == ["e2"] and sorted(report.unchanged) == ["e1", "e3"]
    assert [line for line in after if not line.startswith("e2,")] == before


def test_facts_put_right_by_hand_stay_unless_replacing_is_asked_for(tmp_path, camera):
    raw_file(tmp_path / "raw", "e1")
    table = tmp_path / "e.ecsv"
    ingest([tmp_path / "raw"], camera, table)
    table.write_text(table.read_text().replace(",150.0,", ",151.5,"))
    assert ingest([tmp_path / "raw"], camera, table).kept == ["e1"]
    assert read_exposures(table)[0].ra == 151.5
    assert ingest([tmp_path / "raw"], camera, table, replace_rows=True).replaced == ["e1"]
    assert read_exposures(table)[0].ra == 150.0


def test_another_file_with_the_id_of_a_known_exposure_waits_for_replace(tmp_path, camera):
    table = tmp_path / "e.ecsv"
    old = raw_file(tmp_path / "one", "e1")
    ingest([tmp_path / "one"], camera, table)
    raw_file(tmp_path / "two", "e1", RA=11.0)
    report = ingest([tmp_path / "two"], camera, table)
    ((reason, message),) = skipped(report).values()
    assert reason == "duplicate_id" and str(old) in message and "--replace" in message
    assert read_exposures(table)[0].ra == 150.0
    assert ingest([tmp_path / "two"], camera, table, replace_rows=True).replaced == ["e1"]
    assert read_exposures(table)[0].ra == 165.0


# one file per CCD


@pytest.fixture(scope="module")
def split_camera(camera):
    layout = FileLayout(files="ccd", ccd_pattern=r"_(?P<ccd>CCD\d+)\.")
    return camera.model_copy(update={"layout": layout})


def test_files_of_the_ccds_of_an_exposure_become_one_row(tmp_path, split_camera):
    for ccd in (0, 1, 2):
        raw_file(tmp_path / "raw", "e1", file=f"e1_CCD{ccd}.fits")
    raw_file(tmp_path / "raw", "e1", file="e1_CCD9.fits")
    raw_file(tmp_path / "raw", "e1", file="e1.fits")
    report = ingest([tmp_path / "raw"], split_camera, tmp_path / "e.ecsv")
    (row,) = read_exposures(tmp_path / "e.ecsv")
    assert row.path == "raw/e1_{ccd}.fits" and row.n_files == 3
    assert file_of(row.path, tmp_path / "e.ecsv", "CCD2").is_file()
    assert {name: reason for name, (reason, _) in skipped(report).items()} == {
        "e1_CCD9.fits": "other_ccd",
        "e1.fits": "no_ccd_in_name",
    }


def test_running_file_numbers_tell_exposure_and_ccd(tmp_path, camera):
    layout = FileLayout(files="ccd", ccd_pattern=r"(?P<ccd>\d{8})\.", numbers_per_exposure=100)
    detectors = tuple(d.model_copy(update={"extension": str(d.id)}) for d in camera.detectors)
    running = camera.model_copy(update={"layout": layout, "detectors": detectors})
    for exposure in (37301, 37302):
        for ccd in (0, 5):
            raw_file(tmp_path / "raw", f"e{exposure}", file=f"H{exposure:06d}{ccd:02d}.fits")
    ingest([tmp_path / "raw"], running, tmp_path / "e.ecsv")
    rows = {row.exposure: row for row in read_exposures(tmp_path / "e.ecsv")}
    assert rows["e37302"].n_files == 2
    assert file_of(rows["e37302"].path, tmp_path / "e.ecsv", "5").name == "H03730205.fits"


def test_a_damaged_file_of_one_ccd_does_not_lose_the_exposure(tmp_path, split_camera):
    for ccd in (0, 1):
        raw_file(tmp_path / "raw", "e1", file=f"e1_CCD{ccd}.fits")
    (tmp_path / "raw/e1_CCD0.fits").write_bytes(b"broken")
    report = ingest([tmp_path / "raw"], split_camera, tmp_path / "e.ecsv")
    assert report.added == ["e1"]


def test_folders_that_link_to_each_other_are_searched_once(tmp_path, camera):
    raw_file(tmp_path / "raw/night", "e1")
    (tmp_path / "raw/night/again").symlink_to(tmp_path / "raw")
    raw, _ = find_raw_files([tmp_path / "raw"], camera)
    assert len(raw) == 1


def test_headers_are_read_at_hundreds_a_second(tmp_path, camera):
    original = raw_file(tmp_path / "raw", "e0").read_bytes()
    for n in range(1, 300):
        content = original.replace(b"'e0      '", f"'e{n:<7}'".encode(), 1)
        (tmp_path / "raw" / f"e{n}.fits").write_bytes(content)
    start = time.process_time()
    assert len(ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv").added) == 300
    assert time.process_time() - start < 3.0


# pointings


def fitted_row(camera, ccd, ra, dec, rotation):
    detector = camera.detector(ccd)
    outline = camera.footprint(detector, ra, dec, rotation, FOOTPRINT_POINTS_PER_EDGE)
    return CcdRow(
        exposure="e1",
        ccd=ccd,
        band="r",
        mjd=60000.0,
        exposure_time=30.0,
        state="done",
        footprint_ra=list(outline[0]),
        footprint_dec=list(outline[1]),
    )


@pytest.mark.parametrize("as_manifest", [True, False])
@pytest.mark.parametrize("dec", [-2.25, 89.99])
def test_the_pointing_of_the_fitted_ccds_replaces_that_of_the_header(
    tmp_path, camera, dec, as_manifest
):
    raw_file(tmp_path / "raw", "e1", DEC=dec)
    raw_file(tmp_path / "raw", "e2")
    table = tmp_path / "e.ecsv"
    ingest([tmp_path / "raw"], camera, table)
    truth = (150.4, dec + 0.005, 200.0)
    rows = [fitted_row(camera, ccd, *truth) for ccd in (0, 4)]
    results = tmp_path / "results"
    if as_manifest:
        write_manifest(results / "summary/e1.ecsv", rows)
    else:
        for row in rows:
            write_row(results / f"calexp/e1/{row.ccd}.json", row)
    if as_manifest:
        # it passed: a better pointing would only redo it, and is not taken unasked
        before = table.read_bytes()
        assert not repoint(table, results / "summary", camera)[0]
        assert table.read_bytes() == before
    pointings, skips = repoint(table, results / "summary", camera, also_passed=as_manifest)
    by_id = {row.exposure: row for row in read_exposures(table)}
    found = by_id["e1"]
    assert (found.ra, found.dec) == pytest.approx(truth[:2], abs=1e-7)
    assert found.rotation == pytest.approx(truth[2], abs=1e-5)
    assert pointings["e1"].rms < 1e-3
    assert by_id["e2"].ra == 150.0 and [skip.reason for skip in skips] == ["not_fitted"]


def test_a_camera_of_the_other_parity_is_not_taken_for_a_pointing(tmp_path, camera):
    raw_file(tmp_path / "raw", "e1")
    ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    mirrored = camera.model_copy(update={"flip_x": not camera.flip_x})
    rows = [fitted_row(mirrored, ccd, 150.0, -2.25, 12.0) for ccd in range(6)]
    write_manifest(tmp_path / "results/summary/e1.ecsv", rows)
    _, skips = repoint(tmp_path / "e.ecsv", tmp_path / "results", camera, also_passed=True)
    assert [skip.reason for skip in skips] == ["camera_does_not_fit"]
    assert read_exposures(tmp_path / "e.ecsv")[0].ra == 150.0


# real frames


@pytest.mark.skipif(not HATP32.is_dir(), reason="../shared/data/hatp32 is not there")
def test_the_real_frames_come_in_with_their_times_and_pointing(tmp_path):
    table = tmp_path / "e.ecsv"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = ingest([HATP32], load_camera("microobservatory"), table)
    rows = read_exposures(table)
    assert len(rows) == 12 and {row.band for row in rows} == {"clear"}
    assert {Path(skip.file).name for skip in report.skipped} == {"refstars.csv"}
    assert {(row.ra, row.dec, row.exposure_time) for row in rows} == {(31.312099, 46.769087, 60.0)}
    # the names of the files tell the second at which each frame began
    first = Time("2017-12-20T01:33:43.317", scale="utc").tai.mjd
    assert rows[0].mjd == pytest.approx(first, abs=2e-9)
    assert np.all(np.diff([row.mjd for row in rows]) > 0.02)


def test_headers_of_extensions_fall_back_on_the_primary_header(tmp_path):
    primary = fits.PrimaryHDU()
    primary.header["RA"] = 1.0
    second = fits.ImageHDU(np.zeros((1500, 2), np.float64), name="TWO")
    second.header["RA"] = 2.0
    hdus = [primary, fits.ImageHDU(np.zeros((50, 50))), second, fits.ImageHDU(name="LAST")]
    fits.HDUList(hdus).writeto(tmp_path / "x.fits")
    key = HeaderKey(keyword="RA")
    path = tmp_path / "x.fits"
    found = [header_text(key, "ra", FileHeaders(path, read_headers(path, hdu))) for hdu in range(4)]
    assert found == ["1", "1", "2", "1"]
    with pytest.raises(HeaderValueError, match="has no HDU 4"):
        read_headers(path, 4)
    path.write_bytes(path.read_bytes()[:30000])
    with pytest.raises(HeaderValueError, match="is cut off") as caught:
        read_headers(path, 3)
    assert caught.value.reason == "truncated"


def test_progress_is_shown_on_a_terminal_and_on_long_work_only(tmp_path, camera, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def said(stream):
        monkeypatch.setattr(sys, "stderr", stream)
        ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
        return stream.getvalue()

    for number in range(5):
        raw_file(tmp_path / "raw", f"e{number}")
    assert said(Terminal()) == ""
    monkeypatch.setattr(raw_exposures, "PROGRESS_DELAY", 0)
    assert "reading headers" in said(Terminal())
    assert said(io.StringIO()) == ""


def test_raw_files_may_be_links_into_an_archive(tmp_path, camera):
    archive = raw_file(tmp_path / "archive", "e1", file="0001.fits")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/e1.fits").symlink_to(archive)
    ingest([tmp_path / "raw"], camera, tmp_path / "e.ecsv")
    assert read_exposures(tmp_path / "e.ecsv")[0].path == "raw/e1.fits"
    shutil.rmtree(tmp_path / "archive")
    with pytest.raises(InputError, match="none of 1 raw files"):
        ingest([tmp_path / "raw"], camera, tmp_path / "other.ecsv")
