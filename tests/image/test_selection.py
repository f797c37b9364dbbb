"""Medians by counting are those of NumPy, to the bit."""

import numpy as np
import pytest

from coaddflow.image.selection import masked_median, middle_values


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
