"""DATASUM and CHECKSUM, as astropy computes them."""

import gzip

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.errors import InputError
from coaddflow.image.checksum import fingerprint, wrong_sums
from coaddflow.image.fits_hdus import data_sum


@pytest.fixture
def path(tmp_path):
    rng = np.random.default_rng(1)
    table = fits.BinTableHDU.from_columns([fits.Column("a", "3A", array=["x", "yy", "zzz"])])
    hdus = [
        fits.PrimaryHDU(),
        fits.ImageHDU(rng.normal(size=(700, 501)).astype(np.float32), name="IMAGE"),
        fits.CompImageHDU(rng.integers(0, 99, (300, 200), dtype=np.int16), name="MASK"),
        table,
    ]
    fits.HDUList(hdus).writeto(tmp_path / "a.fits", checksum=True)
    return tmp_path / "a.fits"


def test_sums_are_those_of_astropy(path):
    with fits.open(path, disable_image_compression=True) as hdus:
        for hdu in hdus:
            raw = b"" if hdu.data is None else path.read_bytes()
            start, size = hdu.fileinfo()["datLoc"], hdu.fileinfo()["datSpan"]
            assert data_sum(raw[start : start + size] if raw else b"") == int(hdu.header["DATASUM"])
    assert data_sum(b"abcde") == data_sum(b"e", data_sum(b"abcd"))
    assert data_sum(b"\xff" * 4_000_000) == 0xFFFFFFFF


def test_a_whole_file_has_no_wrong_sums(path, tmp_path):
    assert wrong_sums(path) == []
    (tmp_path / "a.fits.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert wrong_sums(tmp_path / "a.fits.gz") == []


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("data", "HDU 1 (IMAGE) has data that differ from their DATASUM"),
        ("header", "HDU 1 (IMAGE) has a header or data that differ from their CHECKSUM"),
    ],
)
def test_a_changed_byte_is_found(path, what, said):
    content = bytearray(path.read_bytes())
    with fits.open(path) as hdus:
        info = hdus[1].fileinfo()
    place = info["datLoc"] + 1_000_003 if what == "data" else info["hdrLoc"] + 5 * 80 + 40
    content[place] ^= 1
    path.write_bytes(bytes(content))
    assert wrong_sums(path) == [said]


@pytest.mark.parametrize(
    ("keyword", "value", "is_wrong"),
    [
        ("CHECKSUM", "0", True),
        ("CHECKSUM", "1e300", True),
        ("CHECKSUM", "'short'", True),
        ("CHECKSUM", "T", True),
        ("CHECKSUM", "'0000000000000000'", False),
        ("CHECKSUM", "'                '", False),
        ("CHECKSUM", "", False),
        ("DATASUM", "-1", True),
        ("DATASUM", "'1.5'", True),
        ("DATASUM", "T", True),
        ("DATASUM", "'0       '", False),
        ("DATASUM", "''", False),
    ],
)
def test_a_value_that_is_no_sum_is_wrong_and_a_sum_not_taken_is_not(path, keyword, value, is_wrong):
    content = path.read_bytes()
    with fits.open(path) as hdus:
        header, start = hdus[1].header, hdus[1].fileinfo()["hdrLoc"]
    given = {keyword: f"{keyword:<8}= {value:<20}"}
    if keyword == "DATASUM":  # CHECKSUM covers its card
        given["CHECKSUM"] = "CHECKSUM="
    for name, card in given.items():
        place = start + 80 * list(header).index(name)
        content = content[:place] + card.encode().ljust(80) + content[place + 80 :]
    path.write_bytes(content)
    assert bool(wrong_sums(path)) == is_wrong


def test_files_that_are_cut_off_or_missing(path, tmp_path):
    path.write_bytes(path.read_bytes()[:100_000])
    for name in (path, tmp_path / "none.fits"):
        with pytest.raises(InputError, match=str(name)):
            wrong_sums(name)


def test_a_fingerprint_changes_with_the_content_of_a_file(tmp_path):
    pixels = np.arange(12.0).reshape(3, 4)
    path = tmp_path / "a.fits"

    def written(values, **options):
        hdus = fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(values)])
        hdus.writeto(path, overwrite=True, **options)
        return fingerprint(path)

    for options in ({"checksum": True}, {}):
        first = written(pixels, **options)
        assert written(pixels + 1, **options) != first
        assert written(pixels, **options) == first or options
    whole = path.read_bytes()
    path.write_bytes(whole[:-2880])
    with pytest.raises(InputError, match="not a whole FITS file"):
        fingerprint(path)


def test_a_fingerprint_changes_with_pixels_also_if_their_sum_does_not(path):
    before = fingerprint(path)
    content = bytearray(path.read_bytes())
    with fits.open(path) as hdus:
        place = hdus[1].fileinfo()["datLoc"]
    content[place : place + 8] = content[place + 4 : place + 8] + content[place : place + 4]
    path.write_bytes(content)
    assert wrong_sums(path) == []
    assert fingerprint(path) != before


def test_a_file_that_is_not_there_is_not_called_damaged(tmp_path):
    for read in (fingerprint, wrong_sums):
        with pytest.raises(
            InputError, match=r"nothing\.fits: cannot be read: No such file"
        ) as said:
            read(tmp_path / "nothing.fits", "look for it")
        assert "whole" not in str(said.value)
