import math

import numpy as np
import pytest

from coaddflow.image.clipped import clipped_mesh, clipped_statistics
from coaddflow.image.statistics import mad_sigma


def plain_formula(values, clip_sigma, iterations=4):
    """Mean, variance and number after clipping, as they are defined."""
    density = math.exp(-0.5 * clip_sigma**2) / math.sqrt(2.0 * math.pi)
    tail = 2.0 * clip_sigma * density / math.erf(clip_sigma / math.sqrt(2.0))
    centre = float(np.median(values))
    sigma = mad_sigma(values, centre)
    kept, variance = values, sigma**2
    for _ in range(iterations):
        inside = values[np.abs(values - centre) <= clip_sigma * sigma]
        if inside.size < 2 or sigma == 0.0:
            break
        unchanged = inside.size == kept.size
        kept = inside
        centre = float(kept.mean(dtype=np.float64))
        variance = float(kept.var(dtype=np.float64)) / (1.0 - tail)
        sigma = np.sqrt(variance)
        if unchanged:
            break
    return centre, float(variance), kept.size


def samples(rng):
    """Values of all sizes: noise, noise with outliers, whole numbers, one value, two values."""
    for n in (1, 2, 3, 10, 399, 401, 1000, 16001, 16384):
        noise = rng.normal(500.0, 20.0, n).astype(np.float32)
        skewed = noise.copy()
        skewed[: n // 10] += rng.exponential(500.0, n // 10).astype(np.float32)
        # a sample in steps sees other values than the rest has
        striped = np.where(np.arange(n) % 64 == 0, np.float32(1e5), noise)
        yield from (noise, skewed, striped, np.round(skewed / 30), np.full(n, np.float32(7)))
        yield np.where(np.arange(n) % 3 == 0, np.float32(-1), np.float32(2))


@pytest.mark.parametrize("clip_sigma", [1.5, 3.0])
def test_compiled_statistics_are_those_of_the_plain_formula(clip_sigma):
    for values in samples(np.random.default_rng(3)):
        found, expected = clipped_statistics(values, clip_sigma), plain_formula(values, clip_sigma)
        assert found[2] == expected[2]
        assert found[:2] == pytest.approx(expected[:2], rel=1e-9, abs=1e-9)


def test_cells_of_a_mesh_have_the_statistics_of_their_own_values():
    rng = np.random.default_rng(7)
    image = rng.normal(100.0, 5.0, (90, 130)).astype(np.float32)
    use = rng.random(image.shape) > 0.2
    use[:30, 50:] = False
    use[0, 60] = True
    image[~use] = np.nan
    y_edges, x_edges = np.array([0, 30, 61, 90]), np.array([0, 50, 130])
    mean, variance, count = clipped_mesh(image, use, y_edges, x_edges, 2.5)
    for j, i in np.ndindex(3, 2):
        box = np.s_[y_edges[j] : y_edges[j + 1], x_edges[i] : x_edges[i + 1]]
        values = image[box][use[box]]
        if values.size < 2:
            assert count[j, i] == 0
            assert np.isnan(mean[j, i])
            assert np.isnan(variance[j, i])
        else:
            found = mean[j, i], variance[j, i], count[j, i]
            assert found == pytest.approx(plain_formula(values, 2.5), rel=1e-9)


def test_clipping_does_not_shrink_the_variance_of_normal_noise():
    values = np.random.default_rng(5).normal(10.0, 3.0, 200_000).astype(np.float32)
    mean, variance, count = clipped_statistics(values, 2.5)
    assert mean == pytest.approx(10.0, abs=0.03)
    assert variance == pytest.approx(9.0, rel=0.01)
    assert count < values.size


def test_outliers_are_clipped():
    values = np.random.default_rng(6).normal(10.0, 3.0, 2000).astype(np.float32)
    values[:100] = 1e4
    mean, variance, count = clipped_statistics(values, 3.0)
    assert mean == pytest.approx(10.0, abs=0.3)
    assert variance == pytest.approx(9.0, rel=0.1)
    assert 1880 <= count <= 1900


def test_values_that_are_none_give_none():
    assert np.isnan(clipped_statistics(np.full(700, np.nan, np.float32), 3.0)[0])
