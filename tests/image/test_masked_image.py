"""Products hold the pixels that were put into them, and say what their mask bits mean."""

import time
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.errors import InputError
from coaddflow.image.masked_image import (
    MaskedImage,
    MaskPlane,
    masked_image_hdus,
    planes_from_names,
    read_masked_image,
    write_fits,
)


@pytest.fixture
def noise():
    rng = np.random.default_rng(5)
    image = rng.normal(100, 5, (70, 90))
    image[3, 4] = np.nan
    variance = np.full((70, 90), 25.0)
    variance[3, 4] = np.inf
    return MaskedImage(image, variance, rng.integers(0, 2048, (70, 90)))


@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_pixels_survive_to_the_bit(tmp_path, noise, compression):
    write_fits(tmp_path / "a.fits", masked_image_hdus(noise, compression=compression))
    back, header = read_masked_image(tmp_path / "a.fits")
    for plane in ("image", "variance", "mask"):
        np.testing.assert_array_equal(getattr(back, plane), getattr(noise, plane))
    assert header["BUNIT"] == "electron"


def test_quantisation_stays_below_the_noise_and_never_touches_the_mask(tmp_path, noise):
    write_fits(tmp_path / "a.fits", masked_image_hdus(noise, compression="quantized"))
    back, _ = read_masked_image(tmp_path / "a.fits")
    assert np.nanmax(np.abs(back.image - noise.image)) < 5.0 / 16
    assert np.isnan(back.image[3, 4])
    np.testing.assert_array_equal(back.mask, noise.mask)


@pytest.mark.parametrize("compression", ["none", "lossless", "quantized"])
def test_same_pixels_give_the_same_bytes(tmp_path, noise, compression):
    noise.image[20:30] = np.nan  # tiles that cannot be quantised are compressed with gzip
    noise.image[40] = 0.0
    for threads, name in enumerate(("a.fits", "b.fits"), start=1):
        write_fits(tmp_path / name, masked_image_hdus(noise, compression=compression), threads)
        time.sleep(1.01 * (name == "a.fits"))  # FITS and gzip write times in seconds
    assert (tmp_path / "a.fits").read_bytes() == (tmp_path / "b.fits").read_bytes()
    back, _ = read_masked_image(tmp_path / "a.fits")
    np.testing.assert_allclose(
        back.image, noise.image, atol=0.0 if compression != "quantized" else 0.4
    )


@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_checksums_and_mask_planes_are_in_the_headers(tmp_path, noise, compression):
    write_fits(tmp_path / "a.fits", masked_image_hdus(noise, compression=compression))
    with fits.open(tmp_path / "a.fits", disable_image_compression=True) as hdus:
        assert all(hdu.verify_datasum() == 1 and hdu.verify_checksum() == 1 for hdu in hdus)
    with fits.open(tmp_path / "a.fits", checksum=True) as hdus:
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "IMAGE", "MASK", "VARIANCE"]
        for plane in MaskPlane:
            assert 1 << hdus["MASK"].header[f"MP_{plane.name}"] == plane
        assert hdus["VARIANCE"].header["BUNIT"] == "electron**2"


def test_damaged_product_is_named(tmp_path, noise):
    path = tmp_path / "a.fits"
    write_fits(path, masked_image_hdus(noise))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"a\.fits: .*run the workflow again"):
        read_masked_image(path)


def test_planes_by_name():
    assert planes_from_names(["SAT", "CR"]) == MaskPlane.SAT | MaskPlane.CR
    with pytest.raises(InputError, match="'SATURATED' is not a mask plane"):
        planes_from_names(["SATURATED"])


def test_planes_of_different_shape_are_refused():
    with pytest.raises(ValueError, match="different shape"):
        MaskedImage(np.zeros((2, 2)), np.zeros((2, 3)), np.zeros((2, 2)))


def test_the_documentation_has_every_mask_plane():
    text = (Path(__file__).parents[2] / "docs/products.md").read_text(encoding="utf-8")
    for plane in MaskPlane:
        bit = int(plane).bit_length() - 1
        assert f"| {bit} | {int(plane)} | {plane.name} |" in text
