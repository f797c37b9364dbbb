"""Pixels without a measurement are NaN in raw arrays, and pixels with one are as in the file."""

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.instrument.camera import load_camera
from coaddflow.instrument.raw import read_raw_ccd

CAMERA = load_camera("mini")
SHAPE = (320, 368)


@pytest.fixture
def pixels():
    return np.random.default_rng(1).normal(2000.0, 8.0, SHAPE).round().astype(np.uint16)


def read(tmp_path, pixels, compressed=False, **cards):
    kind = fits.CompImageHDU if compressed else fits.ImageHDU
    hdu = kind(pixels, name="CCD0")
    hdu.header.update(cards)
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "a.fits")
    raw = read_raw_ccd(tmp_path / "a.fits", CAMERA, CAMERA.detector(0), check=False)
    return raw.arrays[0]


def assert_lost(found, pixels, lost):
    np.testing.assert_array_equal(np.isnan(found), lost)
    np.testing.assert_array_equal(found[~lost], pixels[~lost])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.uint32])
def test_blank_pixels_are_undefined_whatever_the_type(tmp_path, pixels, dtype, compressed):
    pixels = pixels.astype(dtype)
    info = np.iinfo(dtype)
    lost = np.zeros(SHAPE, bool)
    lost[50:90:2, 10:40:3] = True
    pixels[lost] = info.min
    stored = int(np.iinfo(f"i{pixels.itemsize}").min)
    assert_lost(read(tmp_path, pixels, compressed, BLANK=stored), pixels, lost)


def test_an_image_without_undefined_pixels_stays_as_it_is(tmp_path, pixels):
    found = read(tmp_path, pixels, BLANK=-32768)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize("value", [0, 2000, 65535])
def test_the_rest_of_a_frame_whose_readout_stopped_is_undefined(tmp_path, pixels, value):
    pixels[250:] = value
    found = read(tmp_path, pixels)
    assert np.isnan(found[250:, 4:184]).all()
    assert not np.isnan(found[:250]).any()


def test_a_lost_block_and_a_dead_column_are_undefined(tmp_path, pixels):
    lost = np.zeros(SHAPE, bool)
    lost[100:132, 20:60] = lost[:, 120] = True
    pixels[lost] = 0
    assert_lost(read(tmp_path, pixels), pixels, lost)


def test_saturated_stars_and_trails_are_light(tmp_path, pixels):
    pixels[100:140, 50:90] = 65535
    pixels[:, 70] = 65535
    assert read(tmp_path, pixels).dtype == np.uint16


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5, 1.0, 3.0])
def test_frames_with_little_noise_are_not_taken_for_filled_ones(tmp_path, noise):
    rng = np.random.default_rng(2)
    for number, level in enumerate((1000.0, 1000.5)):
        pixels = level + rng.normal(0.0, noise, SHAPE) + 5.0 * (np.arange(SHAPE[1]) % 7 == 0)
        pixels = pixels.round().astype(np.uint16)
        (tmp_path / str(number)).mkdir()
        assert read(tmp_path / str(number), pixels).dtype == np.uint16
