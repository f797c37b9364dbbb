"""Noise and depth of images whose noise is known."""

import numpy as np
import pytest
from scipy import ndimage
from skyscene import draw_star

from coaddflow.qa.noise import (
    aperture_noise_ratio,
    best_filter,
    depth_ratio,
    moffat_filter,
    pixel_noise_ratio,
)

SHAPE, NOISE = (600, 600), 2.0
EVERYWHERE = np.ones(SHAPE, bool)
VARIANCE = np.full(SHAPE, NOISE**2)


@pytest.fixture(scope="module")
def white():
    """White noise of the stated variance."""
    return np.random.default_rng(1).normal(0.0, NOISE, SHAPE)


def test_white_noise_has_the_variance_that_is_stated(white):
    assert pixel_noise_ratio(white, VARIANCE, EVERYWHERE).value == pytest.approx(1.0, abs=0.01)
    ratio = aperture_noise_ratio(white, VARIANCE, EVERYWHERE, 4.0)
    assert ratio.value == pytest.approx(1.0, abs=4.0 * ratio.error)


def test_a_variance_that_is_half_is_seen(white):
    ratio = pixel_noise_ratio(white, VARIANCE / 2.0, EVERYWHERE)
    assert ratio.value == pytest.approx(2.0, abs=0.02)
    assert ratio.n == white.size


def test_pixels_that_are_not_empty_do_not_count(white):
    spoilt, empty = white.copy(), EVERYWHERE.copy()
    spoilt[:, :300], empty[:, :300] = 1e6, False
    assert pixel_noise_ratio(spoilt, VARIANCE, empty).value == pytest.approx(1.0, abs=0.02)
    assert aperture_noise_ratio(spoilt, VARIANCE, empty, 4.0).value < 1.3
    assert np.isnan(aperture_noise_ratio(spoilt, VARIANCE, ~EVERYWHERE, 4.0).value)


def test_correlated_noise_is_seen_by_apertures_and_not_by_pixels(white):
    smooth = ndimage.uniform_filter(white, 3, mode="wrap")
    variance = VARIANCE / 9.0
    assert pixel_noise_ratio(smooth, variance, EVERYWHERE).value == pytest.approx(1.0, abs=0.03)
    # a mean of 3 x 3 has a ninth of the variance in a pixel and all of it in a large aperture
    assert aperture_noise_ratio(smooth, variance, EVERYWHERE, 15.0).value > 6.0


def test_the_best_filter_is_that_of_the_stars():
    places = np.array([[100.0, 100.0], [300.0, 200.0], [450.0, 500.0]])
    stars = sum(draw_star(SHAPE, x, y, 1e5, 5.0) for x, y in places)
    found = best_filter(stars, *places.T, 4.2, 3.5)
    # for Gaussian stars a Moffat profile of nearly their width
    assert found.sum() == pytest.approx(1.0)
    signal = (draw_star(found.shape, *(n // 2 for n in found.shape), 1.0, 5.0) * found).sum()
    ideal = np.sqrt((draw_star((61, 61), 30, 30, 1.0, 5.0) ** 2).sum())
    assert signal / np.sqrt((found**2).sum()) / ideal > 0.98


def test_depth_is_that_of_a_matched_filter_and_falls_with_noise(white):
    profile = moffat_filter(5.0, 3.5)
    response = float((profile**2).sum())
    information = np.full(SHAPE, response / NOISE**2)
    ratio = depth_ratio(white, EVERYWHERE, profile, response, information)
    assert ratio.value == pytest.approx(1.0, abs=4.0 * ratio.error)
    worse = depth_ratio(1.1 * white, EVERYWHERE, profile, response, information)
    assert worse.value == pytest.approx(ratio.value / 1.1)
    # the wrong filter loses
    wide = moffat_filter(10.0, 3.5)
    lost = depth_ratio(
        white, EVERYWHERE, wide, float((wide * _padded(profile, wide)).sum()), information
    )
    assert lost.value < 0.95


def _padded(small, large):
    width = (large.shape[0] - small.shape[0]) // 2
    return np.pad(small, width)
