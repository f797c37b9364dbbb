"""Masters of few exposures: noise goes, and structure of the detector stays."""

import numpy as np
import pytest
from scipy import ndimage

from coaddflow.calib import shrinkage
from coaddflow.calib.shrinkage import without_noise
from coaddflow.image.masked_image import MaskedImage, MaskPlane

SHAPE = (300, 260)
NOISE, N = 4.0, 5
Y, X = np.indices(SHAPE)


def master(structure, seed=1):
    frames = structure + np.random.default_rng(seed).normal(0.0, NOISE, (N, *SHAPE))
    return MaskedImage(frames.mean(0), frames.var(0, ddof=1) / N, np.zeros(SHAPE))


def pattern(kind):
    rng = np.random.default_rng(3)
    return {
        "nothing": np.zeros(SHAPE),
        "gradients": 5.0 * np.sin(X / 40.0) + 0.02 * Y,
        "columns": np.broadcast_to(rng.normal(0.0, 3.0, SHAPE[1]), SHAPE),
        "rows": np.broadcast_to(rng.normal(0.0, 3.0, SHAPE[0])[:, None], SHAPE),
        "amplifiers": 20.0 * (X > 130) + 15.0 * (Y > 150),
        "pixels": rng.normal(0.0, 2.0, SHAPE),
    }[kind]


@pytest.mark.parametrize("kind", ["nothing", "gradients", "columns", "rows", "amplifiers"])
def test_noise_of_the_mean_goes_and_structure_stays(kind):
    truth = pattern(kind)
    found = without_noise(master(truth), N)
    error = found.image - truth
    assert np.var(error) < 0.1 * NOISE**2 / N
    assert np.mean(found.variance) == pytest.approx(np.var(error), rel=1.5)
    # whole columns and rows are right as well
    assert np.std(error.mean(axis=0)) < 0.4
    assert np.std(error.mean(axis=1)) < 0.4


def test_structure_of_single_pixels_is_weighed_against_the_noise():
    """The best estimate of amplitude t in noise n has the variance t^2 n^2 / (t^2 + n^2)."""
    truth = pattern("pixels")
    found = without_noise(master(truth), N)
    noise2 = NOISE**2 / N
    best = 4.0 * noise2 / (4.0 + noise2)
    assert np.var(found.image - truth) == pytest.approx(best, rel=0.05)
    assert np.mean(found.variance) == pytest.approx(best, rel=0.1)


def test_hot_pixels_and_pieces_of_columns_keep_their_values():
    truth = np.zeros(SHAPE)
    hot = np.random.default_rng(4).integers(0, SHAPE[0] * SHAPE[1], 200)
    truth.flat[hot] = 50.0
    truth[100:, 77] = 12.0
    truth[40, 50:53] = 1e5
    mean = master(truth)
    found = without_noise(mean, N)
    kept = truth > 20
    np.testing.assert_allclose(found.image[kept], mean.image[kept], atol=1.5)
    assert found.image[120:, 77].mean() == pytest.approx(12.0, abs=0.5)
    assert np.median(found.variance[kept]) == pytest.approx(NOISE**2 / N, rel=0.3)
    far = np.ones(SHAPE, bool)
    far[:, 60:95] = far[30:50] = far[kept] = False
    assert np.var(found.image[far]) < 0.15 * NOISE**2 / N


def test_cosmic_rays_in_one_of_three_frames_do_not_shift_their_columns():
    """Three frames cannot clip them, and their own error is large."""
    rng = np.random.default_rng(6)
    frames = rng.normal(0.0, NOISE, (3, *SHAPE))
    y, x = np.array([40, 110, 180, 250]), np.array([30, 90, 150, 210])
    frames[0, y, x] += 120 * NOISE
    hit = MaskedImage(frames.mean(0), frames.var(0, ddof=1) / 3, np.zeros(SHAPE))
    found = without_noise(hit, 3).image
    found[y, x] = 0.0
    lines = [np.median(found[a - 30 : a + 31, b]) for a, b in zip(y, x, strict=True)]
    assert np.abs(lines).max() < 0.3 * NOISE / np.sqrt(3)


def test_pixels_without_a_value_stay_and_change_no_others():
    mean = master(pattern("columns"))
    mean.image[:, 130:] = np.nan
    mean.variance[:, 130:] = np.inf
    mean.mask[:, 130:] = MaskPlane.NO_DATA
    found = without_noise(mean, N)
    assert np.isnan(found.image[:, 130:]).all()
    assert np.var(found.image[:, :130] - pattern("columns")[:, :130]) < 0.12 * NOISE**2 / N


# --- what was made fast, beside the plain formula ---------------------------------------------


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("size", [9, 65, 129])
@pytest.mark.parametrize("shape", [(150, 140), (40, 300), (130, 20)])
@pytest.mark.parametrize("whole", [True, False])
def test_means_of_good_pixels_are_those_of_scipy(shape, size, axis, whole):
    rng = np.random.default_rng(size)
    good = np.ones(shape, bool) if whole else rng.random(shape) > 0.1
    good[5:25, 7] = whole
    values = np.where(good, rng.normal(100, 5, shape), 0).astype(np.float32)
    total, weight = values, good.astype(np.float32)
    for one in (0, 1) if axis is None else (axis,):
        total = ndimage.uniform_filter1d(total, size, axis=one, output=float, mode="reflect")
        weight = ndimage.uniform_filter1d(weight, size, axis=one, output=float, mode="reflect")
    means = np.empty_like(values)
    shrinkage._mean(values, good, size, means, axis)
    plain = (total / np.maximum(1.0 if whole else weight, 1e-6)).astype(np.float32)
    np.testing.assert_array_equal(means, plain)


def test_the_histogram_is_that_of_numpy():
    rng = np.random.default_rng(6)
    edges = np.linspace(0.0, 12.0, 241)
    values = rng.normal(0, 5, (200, 241)).astype(np.float32)
    values[0], values[1, 0] = edges, -12.0  # on the edges
    variance = rng.uniform(0.5, 2, values.shape).astype(np.float32)
    variance[0] = variance[1, 0] = 1
    good = rng.random(values.shape) > 0.1
    for size in (1, 9):
        z = np.abs(values / (np.sqrt(variance) / np.float32(size)))
        plain, _ = np.histogram(z[good], edges)
        found = shrinkage._histogram(values, variance, good, np.float32(size), edges)
        np.testing.assert_array_equal(found, plain)


def test_tables_are_interpolated_as_by_numpy():
    rng = np.random.default_rng(7)
    middle = np.linspace(0.025, 11.975, 240)
    factor, factor_of_spread = np.sort(rng.random((2, 240)))
    values = rng.normal(0, 5, (200, 240)).astype(np.float32)
    variance = rng.uniform(0.5, 2, values.shape).astype(np.float32)
    values[0], variance[0] = middle, 1
    error = np.sqrt(variance) / np.float32(3)
    z = np.abs(values / error)
    plain = values * np.interp(z, middle, factor, right=1.0).astype(np.float32)
    plain_spread = np.interp(z, middle, factor_of_spread, right=1.0).astype(np.float32) * error**2
    spread = np.empty_like(values)
    tables = middle, factor, factor_of_spread
    shrinkage._interpolate(values, variance, np.float32(3), *tables, spread)
    np.testing.assert_array_equal(values, plain)
    np.testing.assert_array_equal(spread, plain_spread)
