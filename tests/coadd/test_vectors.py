"""The loops that work on rows of pixels against the plain formulas, pixel by pixel."""

import numpy as np
import pytest
from scipy import ndimage

from coaddflow.coadd import clipping, mean
from coaddflow.coadd.clipping import BIN, FILLABLE, GROWN, MISSING, OUTLIER, USABLE
from coaddflow.coadd.input_sets import set_keys
from coaddflow.image.masked_image import MaskPlane
from coaddflow.image.medians import sorting_network
from coaddflow.settings.coadd import ClipSettings


def make_stack(n=5, shape=(16, 43), states=(MISSING, FILLABLE, USABLE, OUTLIER, GROWN)):
    rng = np.random.default_rng(4)
    chances = np.array([2.0, 1.0, 4.0, 1.0, 1.0])[: len(states)]
    state = rng.choice(states, (n, *shape), p=chances / chances.sum()).astype(np.uint8)
    image = rng.normal(5.0, 3.0, (n, *shape)).astype(np.float32)
    image[state == MISSING] = np.nan
    variance = rng.uniform(1.0, 2.0, (n, *shape)).astype(np.float32)
    mask = rng.integers(0, 16, (n, *shape), np.int32)
    return image, variance, mask, state


def plain_mean(values, variances, masks, states, weights, fill_error):
    """The coadd of one pixel: value, variance, mask and number of values."""
    wanted = USABLE if (states == USABLE).any() else FILLABLE
    use = states == wanted
    if not use.any():
        return np.nan, np.inf, int(MaskPlane.NO_DATA), 0
    w = weights[use]
    value = np.sum(w * values[use]) / w.sum()
    noise = np.sum(w**2 * variances[use]) / w.sum() ** 2
    noise += (fill_error * value) ** 2 if wanted == FILLABLE else 0.0
    bits = np.bitwise_or.reduce(masks[use])
    clipped = (states >= OUTLIER).any()
    return value, noise, bits | (int(MaskPlane.CLIPPED) if clipped else 0), use.sum()


def test_a_row_of_weighted_means_is_that_of_its_pixels():
    stack, weights = make_stack(), np.array([1.0, 2.0, 0.5, 3.0, 1.5])
    image, variance, mask, state = stack
    shape, block = (12, 40), (2, 1, 38, 11)
    target = (
        np.full(shape, np.nan, np.float32),
        np.full(shape, np.inf, np.float32),
        np.full(shape, MaskPlane.NO_DATA, np.int32),
        np.zeros(shape, np.int16),
    )
    counts = np.zeros((5, 2), np.int64)
    # the stack begins at column -3 and row -2 of the target
    keys, signature = set_keys(5), np.zeros((10, 36), np.uint64)
    sets = (keys, signature)
    mean._combine(stack, weights, np.float32(0.1), (-3, -2), block, target, counts, sets)
    expected = np.zeros((5, 2), np.int64)
    for y in range(block[1], block[3]):
        for x in range(block[0], block[2]):
            place = (slice(None), y + 2, x + 3)
            states = state[place]
            found = plain_mean(
                *(image[place].astype(float), variance[place].astype(float), mask[place]),
                *(states, weights, np.float32(0.1)),
            )
            np.testing.assert_allclose([plane[y, x] for plane in target], found, rtol=1e-6)
            if found[3]:
                wanted = USABLE if (states == USABLE).any() else FILLABLE
                expected[:, 0] += states == wanted
                expected[:, 1] += states >= OUTLIER
                used = keys[:5][states == wanted]
                filled = keys[5:] if wanted == FILLABLE else keys[:0]
                assert signature[y - 1, x - 2] == np.bitwise_xor.reduce([*used, *filled])
            else:
                assert signature[y - 1, x - 2] == 0
    np.testing.assert_array_equal(counts, expected)
    outside = np.ones(shape, bool)
    outside[block[1] : block[3], block[0] : block[2]] = False
    assert (target[3][outside] == 0).all()


@pytest.mark.parametrize("x_offset", [0, 1, 3])
def test_maxima_and_means_of_bins_are_those_of_their_pixels(x_offset):
    image, variance, _, state = make_stack()
    maxima = clipping._bin_maxima(image, state, x_offset)
    means, noises = clipping._bin_means(image, variance, state, np.float32(0.8), x_offset)
    columns = (np.arange(43) + x_offset) // BIN
    assert maxima.shape == means.shape == (5, 4, columns[-1] + 1)
    for k, row, column in np.ndindex(maxima.shape):
        place = (k, slice(row * BIN, (row + 1) * BIN), columns == column)
        use = state[place] == USABLE
        values = image[place][use].astype(float)
        assert np.isnan(maxima[k, row, column]) == (use.sum() == 0)
        if use.any():
            assert maxima[k, row, column] == np.float32(values.max())
        assert np.isnan(means[k, row, column]) == (use.sum() < BIN * BIN // 2)
        if use.sum() >= BIN * BIN // 2:
            noise = np.sqrt(np.sum(variance[place][use], dtype=float) / 0.8) / use.sum()
            assert means[k, row, column] == pytest.approx(values.mean(), rel=1e-5)
            assert noises[k, row, column] == pytest.approx(noise, rel=1e-5)


def test_bins_that_need_no_closer_look_have_no_outlier():
    rng = np.random.default_rng(3)
    means = rng.normal(0.0, 1.0, (5, 40, 50)).astype(np.float32)
    means[rng.random(means.shape) < 0.3] = np.nan
    means[:, :3] = np.nan
    means[rng.random(means.shape) < 0.02] += 7.0
    noises = rng.uniform(0.5, 1.0, means.shape).astype(np.float32)
    wings = np.zeros((40, 50), np.float32)
    sharpness, leeway = rng.uniform(1.0, 2.0, (2, 5)).astype(np.float32)
    limits = clipping._Limits(*(np.float32(one) for one in (2.5, 0.3, 0.3, 0.03)))
    medians = clipping._median_plane(means, sorting_network(5))
    flagged = clipping._flag_bins(means, noises, medians, wings, (sharpness, leeway), limits)
    expected = np.zeros_like(flagged)
    for k, y, x in np.argwhere(~np.isnan(means)):
        typical = np.median(sharpness[~np.isnan(means[:, y, x])])
        difference = float(means[k, y, x]) - medians[y, x]
        sharper = sharpness[k] * leeway[k] / typical - 1.0
        part = 0.3 + max(sharper, 0.0) if difference > 0 else 0.3
        expected[k, y, x] = abs(difference) > 2.5 * noises[k, y, x] + part * abs(medians[y, x])
    assert flagged.any()
    np.testing.assert_array_equal(flagged, expected)


@pytest.mark.parametrize("n", [1, 2, 5, 12, 40])
def test_medians_of_epochs_are_those_of_numpy(n):
    rng = np.random.default_rng(n)
    means = rng.normal(0.0, 1.0, (n, 3, 1100)).astype(np.float32)
    means[rng.random(means.shape) < 0.4] = np.nan
    known = ~np.isnan(means).all(axis=0)
    found = clipping._median_plane(means, sorting_network(n))
    np.testing.assert_array_equal(found[known], np.nanmedian(means[:, known], axis=0))
    assert (found[~known] == 0).all()


def plain_outliers(image, variance, use, epochs, sigma, relative):
    """Where the values of a stack deviate, by the formula of the module; and the medians."""
    known = np.where(use, image, np.nan).astype(float)
    median = np.nanmedian(known, axis=0)
    sharpness = np.where(use, epochs.sharpness[:, None, None], np.nan)
    typical = np.nanmedian(sharpness, axis=0)
    sharper = sharpness * epochs.leeway[:, None, None] / typical - 1.0
    difference = known - median
    part = np.where(difference > 0, relative + np.maximum(sharper, 0.0), epochs.below)
    limit = sigma * np.sqrt(variance) + part * np.abs(median)
    return use & (np.abs(difference) > limit), median


def test_outliers_of_single_pixels_and_their_neighbours_are_those_of_the_formula():
    rng = np.random.default_rng(8)
    n, shape, radius = 9, (24, 1030), 2
    image = rng.normal(5.0, 1.0, (n, *shape)).astype(np.float32)
    variance = rng.uniform(0.8, 1.2, image.shape).astype(np.float32)
    state = np.full(image.shape, USABLE, np.uint8)
    state[rng.random(image.shape) < 0.1] = MISSING
    state[rng.random(image.shape) < 0.1] = FILLABLE
    hit = rng.random(image.shape) < 0.003
    for shift in (0, 1):  # a bright pixel, and one beside it that is not as bright
        image[np.roll(hit, shift, axis=2)] += np.float32(30.0 - 23.5 * shift)
    image[state == MISSING] = np.nan
    settings = ClipSettings(relative=0.2, wings=0.0, smooth_sigma=None, grow_radius=radius)
    epochs = clipping.describe_epochs(rng.uniform(0.9, 1.0, n), settings)
    usable = state == USABLE
    far, _ = plain_outliers(image, variance, usable, epochs, settings.sigma, 0.2)
    most = [clipping.max_outliers(count) for count in range(n + 1)]
    many = far.sum(axis=0) > np.take(most, usable.sum(axis=0))
    spared = ndimage.binary_dilation(many, np.ones((2 * radius + 3,) * 2))
    outliers = far & ~many & ~spared
    near = ndimage.binary_dilation(outliers, np.ones((1, 2 * radius + 1, 2 * radius + 1)))
    rather, _ = plain_outliers(image, variance, usable, epochs, settings.grow_sigma, 0.2)
    clipping.find_outliers(image, variance, state, epochs, settings, covariance=0.8)
    assert outliers.sum() > 100
    assert (near & rather & ~outliers).sum() > 100
    np.testing.assert_array_equal(state == OUTLIER, outliers)
    np.testing.assert_array_equal(state == GROWN, near & rather & ~outliers)


def test_wings_are_the_largest_of_all_peaks_around():
    rng = np.random.default_rng(8)
    peaks = rng.exponential(10.0, (7, 9)).astype(np.float32)
    wings = rng.uniform(0.0, 1.0, (4, 4)).astype(np.float32)
    found = clipping._spread_peaks(peaks, wings)
    for y, x in np.ndindex(peaks.shape):
        around = [
            wings[abs(j - y), abs(i - x)] * peaks[j, i]
            for j, i in np.ndindex(peaks.shape)
            if abs(j - y) < 4 and abs(i - x) < 4
        ]
        assert found[y, x] == max(around)
