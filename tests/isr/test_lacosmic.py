"""The pixels found are those of astroscrappy, all of them and no others."""

import astroscrappy
import numpy as np
import pytest

from coaddflow.isr import lacosmic
from coaddflow.isr.lacosmic import laplacian_outliers

OPTIONS = [(5.0, 0.3, 3.0), (3.0, 1.0, 0.3), (8.0, 0.1, 5.0), (0.5, 0.3, 1.0)]
"""Limit in sigma, fraction for neighbours, contrast."""


def scene(seed, shape=None):
    """Sky of any level, stars, tracks, a variance with or without them, and a mask."""
    rng = np.random.default_rng(seed)
    ny, nx = rng.integers(15, 160, 2) if shape is None else shape
    sky = rng.choice([0.5, 10.0, 300.0, 5000.0])
    light = np.full((ny, nx), sky)
    y, x = np.mgrid[:ny, :nx]
    for _ in range(ny * nx // 800):
        y0, x0, flux = rng.uniform(-2, ny + 2), rng.uniform(-2, nx + 2), 10 ** rng.uniform(2, 6)
        sigma = rng.uniform(0.6, 1.7)
        light += flux * np.exp(-((y - y0) ** 2 + (x - x0) ** 2) / 2 / sigma**2)
    image = rng.poisson(light) + rng.normal(0, 3, light.shape)
    n = rng.integers(1, max(2, ny * nx // 40))
    hit = rng.integers(0, ny, n), rng.integers(0, nx, n)
    image[hit] += rng.exponential(sky + 100, n)
    for j, i in zip(*hit, strict=True):  # some of them are tracks
        image[j : j + 1, i : i + rng.integers(1, 9)] += rng.choice([0, 3 * sky + 200])
    variance = np.maximum(image, 0) + 9 if seed % 2 else (light + 9) * rng.uniform(0.5, 2, (ny, nx))
    if seed % 5 == 0:
        variance[rng.random((ny, nx)) < 0.3] = 0
    ignored = rng.random((ny, nx)) < rng.choice([0, 0.01, 0.1, 0.4])
    return image.astype(np.float32), variance.astype(np.float32), ignored


def by_astroscrappy(image, variance, ignored, sigma, neighbour_fraction, contrast, iterations):
    found, _ = astroscrappy.detect_cosmics(
        image,
        inmask=ignored,
        invar=variance,
        sigclip=sigma,
        sigfrac=neighbour_fraction,
        objlim=contrast,
        readnoise=0.0,
        satlevel=1e30,
        niter=iterations,
        sepmed=True,
        cleantype="medmask",
    )
    return found


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_pixels_with_all_options(options, iterations):
    number = 0
    for seed in range(8):
        image = scene(seed)
        found = laplacian_outliers(*image, *options, iterations)
        np.testing.assert_array_equal(found, by_astroscrappy(*image, *options, iterations))
        number += found.sum()
    assert number > 100


@pytest.mark.parametrize("shape", [(5, 5), (5, 40), (40, 6), (7, 7), (7, 30), (8, 9), (13, 11)])
def test_the_same_pixels_in_tiny_images(shape):
    number = 0
    for seed in range(12):
        image, variance, ignored = scene(seed, shape)
        y, x = shape[0] // 2, shape[1] // 2
        image[y, x] += 1e6
        ignored[y - 1 : y + 2, x - 1 : x + 2] = False
        args = image, variance, ignored, 2.0, 0.3, 0.5, 1 + seed % 3
        found, expected = laplacian_outliers(*args), by_astroscrappy(*args)
        np.testing.assert_array_equal(found, expected)
        number += found.sum()
    assert (number > 0) == (min(shape) >= 7)


def test_the_same_pixels_near_the_borders():
    """Many of them in the outermost pixels: rims of the medians, of growth and of cleaning."""
    number = 0
    for seed in range(20):
        image, variance, ignored = scene(seed, (40, 43))
        rng = np.random.default_rng(seed)
        edge = np.ones(image.shape, bool)
        edge[8:-8, 8:-8] = False
        hit = edge & (rng.random(image.shape) < 0.1)
        image[hit] += rng.uniform(200, 60000, hit.sum()).astype(np.float32)
        for iterations in (1, 3):
            args = image, variance, ignored, 4.0, 0.3, 2.0, iterations
            found = laplacian_outliers(*args)
            np.testing.assert_array_equal(found, by_astroscrappy(*args))
            number += found[edge].sum()
    assert number > 500


def test_the_same_pixels_where_nothing_good_is_near():
    """Then the median of the image is what a cosmic ray is cleaned with."""
    image, variance, ignored = scene(3, (60, 60))
    image[20:34, 20:34] += np.random.default_rng(0).choice([500, 9000], (14, 14))
    for seed in range(4):
        ignored = np.random.default_rng(seed).random(image.shape) < 0.1
        args = image, variance, ignored, 0.3, 0.3, 0.1, 4
        np.testing.assert_array_equal(laplacian_outliers(*args), by_astroscrappy(*args))


def test_a_quiet_and_a_hidden_image_have_none():
    image = np.full((50, 60), 100, np.float32)
    nothing = np.zeros(image.shape, bool)
    assert not laplacian_outliers(image, image, nothing, 5.0, 0.3, 3.0, 3).any()
    image[20, 30] = 5000
    assert laplacian_outliers(image, image, nothing, 5.0, 0.3, 3.0, 3)[20, 30]
    assert not laplacian_outliers(image, image, ~nothing, 5.0, 0.3, 3.0, 3).any()
    with pytest.raises(ValueError, match="too small"):
        laplacian_outliers(image[:4], image[:4], nothing[:4], 5.0, 0.3, 3.0)


def test_the_input_is_not_changed():
    image, variance, ignored = scene(3)
    copies = image.copy(), variance.copy(), ignored.copy()
    laplacian_outliers(image, variance, ignored, 3.0, 0.3, 1.0, 3)
    for plane, copy in zip((image, variance, ignored), copies, strict=True):
        np.testing.assert_array_equal(plane, copy)


@pytest.mark.parametrize("box", [(3, 90, 3, 117), (30, 46, 3, 60), (50, 51, 70, 71)])
def test_a_part_of_an_image_is_searched_alike(box):
    image, variance, ignored = scene(7, (93, 120))
    limits = np.array([1.0, 3.0, 1.0], np.float32)
    whole, part = np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint8)
    lacosmic._search(image, variance, ignored, limits, whole, 3, 90, 3, 117)
    y0, y1, x0, x1 = box
    lacosmic._search(image, variance, ignored, limits, part, y0, y1, x0, x1)
    np.testing.assert_array_equal(part[y0:y1, x0:x1], whole[y0:y1, x0:x1])
    part[y0:y1, x0:x1] = 0
    assert not part.any()
    assert len(np.unique(whole)) > 3


@pytest.mark.parametrize("n", [3, 5, 7, 9])
def test_networks_are_medians(n):
    """A network that is right for all sequences of 0 and 1 is right for all numbers."""
    median = getattr(lacosmic, f"_median_{n}")
    for number in range(2**n):
        values = [np.float32(number >> bit & 1) for bit in range(n)]
        assert median(*values) == np.median(values)
