import bz2
import gzip
import io
import os
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.files import sha256_of
from coaddflow.image.checksum import wrong_sums
from coaddflow.image.fits_hdus import KeptOpen
from coaddflow.image.fits_pixels import encode_checksum, read_pixels, write_hdus
from coaddflow.image.masked_image import image_hdu, opened_fits, write_fits

KINDS = ["f4", "f8", "i2", "i4", "i8", "u1", "u2", ">f4", ">i2"]


def pixels_of(kind, shape=(301, 203)):
    return np.random.default_rng(1).normal(0.0, 300.0, shape).clip(0).astype(kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(301, 203), (7,), (3, 50, 40), (1, 1)])
def test_files_are_those_that_astropy_writes(tmp_path, kind, shape):
    header = fits.Header({"BUNIT": "nJy"})
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(pixels_of(kind, shape), header, "IMAGE")]
    checksum = write_fits(tmp_path / "ours.fits", hdus)
    again = [fits.PrimaryHDU(), fits.ImageHDU(pixels_of(kind, shape), header, "IMAGE")]
    theirs = fits.HDUList(again)
    theirs.update_extend()
    for hdu in theirs:
        hdu.add_datasum(when="sum of the data")
        hdu.add_checksum(when="sum of header and data", override_datasum=True)
    theirs.writeto(tmp_path / "theirs.fits")
    assert (tmp_path / "ours.fits").read_bytes() == (tmp_path / "theirs.fits").read_bytes()
    assert checksum == sha256_of(tmp_path / "ours.fits")
    assert wrong_sums(tmp_path / "ours.fits") == []


def test_a_part_of_an_image_is_written_as_its_copy(tmp_path):
    whole = pixels_of("f4", (400, 900))
    first = write_fits(tmp_path / "a.fits", [image_hdu("IMAGE", whole[5:322, 3:601])])
    second = write_fits(tmp_path / "b.fits", [image_hdu("IMAGE", whole[5:322, 3:601].copy())])
    assert first == second
    np.testing.assert_array_equal(fits.getdata(tmp_path / "a.fits"), whole[5:322, 3:601])


@pytest.mark.parametrize("compression", ["none", "lossless"])
@pytest.mark.parametrize("kind", ["f4", "i4", "i2"])
def test_pixels_are_read_as_astropy_reads_them(tmp_path, kind, compression):
    path, pixels = tmp_path / "a.fits", pixels_of(kind, (700, 333))
    write_fits(path, [image_hdu("IMAGE", pixels, compression=compression)])
    with path.open("rb") as stream, fits.open(stream, memmap=False) as hdus:
        found = read_pixels(stream, hdus["IMAGE"])
        np.testing.assert_array_equal(found, pixels)
        if compression == "none":
            assert found.dtype == np.dtype(kind)
            assert found.dtype.isnative


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_pixels_of_packed_files_are_read(tmp_path, pack, threads):
    path, pixels = tmp_path / "a.fits", pixels_of("f4", (1900, 333))
    write_fits(path, [image_hdu("IMAGE", pixels)])
    path.write_bytes(pack(path.read_bytes()))
    with opened_fits(path, "image") as (stream, hdus):
        np.testing.assert_array_equal(read_pixels(stream, hdus["IMAGE"], threads), pixels)


def test_pixels_that_are_scaled_are_read(tmp_path):
    path = tmp_path / "a.fits"
    write_fits(path, [fits.ImageHDU(pixels_of("u2"), name="IMAGE")])
    with path.open("rb") as stream, fits.open(stream, memmap=False) as hdus:
        np.testing.assert_array_equal(read_pixels(stream, hdus["IMAGE"]), pixels_of("u2"))


def test_a_file_that_ends_in_its_pixels_is_an_error(tmp_path):
    path = tmp_path / "a.fits"
    write_fits(path, [image_hdu("IMAGE", pixels_of("f4"))])
    with path.open("rb") as stream, fits.open(stream, memmap=False) as hdus:
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(EOFError):
            read_pixels(stream, hdus["IMAGE"])


def test_a_table_is_written_with_its_sums():
    table = fits.BinTableHDU.from_columns([fits.Column("a", "E", array=np.arange(5.0))])
    stream = io.BytesIO()
    write_hdus(stream, fits.HDUList([fits.PrimaryHDU(), table]))
    stream.seek(0)
    with fits.open(stream, checksum=True) as hdus:
        np.testing.assert_array_equal(hdus[1].data["a"], np.arange(5.0))


@pytest.mark.parametrize("total", [0, 1, 0x3A3B3C3D, 868229149, 0xFFFFFFFF, 0x5B5C5D5E])
def test_a_checksum_is_encoded_as_the_standard_says(total):
    encoded = encode_checksum(total)
    assert encoded.isascii()
    assert encoded.isalnum()
    assert encoded == fits.PrimaryHDU()._char_encode(0xFFFFFFFF - total)


def test_the_checksum_of_the_standard_is_found():
    assert encode_checksum(868229149) == "hcHjjc9ghcEghc9g"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_file_that_is_kept_open_is_read_from_its_beginning_and_anew_when_it_is_replaced(
    tmp_path, pack
):
    path, keep = tmp_path / "raw.fits", KeptOpen()
    for content in (b"first" * 1000, b"second" * 1000):
        (tmp_path / "new").write_bytes(pack(content))
        (tmp_path / "new").replace(path)
        for _ in range(2):
            with keep(path) as stream:
                assert stream.read() == content
    path.unlink()
    with pytest.raises(FileNotFoundError), keep(path):
        pass
    assert not open_files_in(tmp_path)


def open_files_in(folder):
    """Return the files of a folder that this process has open."""
    links = [str(one.readlink()) for one in Path("/proc/self/fd").iterdir() if one.is_symlink()]
    return [link for link in links if link.startswith(str(folder))]
