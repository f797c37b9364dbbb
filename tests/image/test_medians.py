"""Medians by counting and by sorting networks are those of NumPy and SciPy, to the bit."""

import numpy as np
import pytest
from scipy import ndimage

from coaddflow.image.medians import (
    masked_median,
    medians_of_pieces,
    middle_values,
    running_median,
)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 100, 1001, 30_000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e7, 1e37])
def test_the_median_of_what_counts(n, scale):
    rng = np.random.default_rng(n)
    values = (scale * rng.normal(rng.choice([0, 5, -5]), 1, n)).astype(np.float32)
    left_out = rng.random(n) < 0.3
    left_out[0] = False
    assert masked_median(values, left_out) == np.median(values[~left_out])
    ordered = np.sort(values[~left_out])
    m = len(ordered)
    assert middle_values(values, left_out) == (ordered[(m - 1) // 2], ordered[m // 2])


def test_ties_infinities_and_both_signs():
    values = np.array([[0, -1, 1, 1, 1], [np.inf, -np.inf, -2, -2, 3]], np.float32)
    for bits in range(2**10 - 1):
        left_out = (bits >> np.arange(10) & 1).astype(bool).reshape(2, 5)
        kept = values[~left_out]
        if not (np.isinf(kept).all() and len(kept) == 2):
            assert masked_median(values, left_out) == np.median(kept)


def test_nothing_left():
    assert np.isnan(masked_median(np.ones(3, np.float32), np.ones(3, bool)))


@pytest.mark.parametrize("shape", [(5, 5), (6, 400), (161, 7), (64, 128)])
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9, 15, 21])
def test_running_medians(shape, size):
    image = np.random.default_rng(size).normal(0, 1, shape).astype(np.float32)
    image[2:4] = np.round(image[2:4])
    for axis, window in enumerate([(size, 1), (1, size)]):
        plain = ndimage.median_filter(image, size=window, mode="nearest")
        np.testing.assert_array_equal(running_median(image, size, axis), plain)
    if size == 3:  # then both modes are the same
        plain = ndimage.median_filter(image, size=(1, 3), mode="reflect")
        np.testing.assert_array_equal(running_median(image, 3, 1), plain)


@pytest.mark.parametrize("size", [1, 2, 7, 13, 64, 100])
@pytest.mark.parametrize("shape", [(64, 30), (129, 300), (50, 5)])
def test_medians_of_pieces_of_columns(shape, size):
    image = np.random.default_rng(size).normal(0, 1, shape).astype(np.float32)
    plain = [np.median(image[y : y + size], axis=0) for y in range(0, len(image), size)]
    np.testing.assert_array_equal(medians_of_pieces(image, size), plain)
