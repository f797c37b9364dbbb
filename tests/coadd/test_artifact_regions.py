"""What single epochs show is found as a whole; what the sky has, or changes often, stays."""

import numpy as np
import pytest
from scipy import ndimage
from starfield import add_stars, moffat_stamp

from coaddflow.coadd.artifact_regions import (
    Difference,
    StaticSky,
    compare_epochs,
    difference_of_epoch,
    difference_variance,
    find_candidates,
    grow_regions,
    smoothed,
    sort_regions,
    static_sky,
)
from coaddflow.settings.artifacts import ArtifactSettings

SETTINGS = ArtifactSettings()
FWHM = 5.0
SHAPE = (500, 520)
Y, X = np.mgrid[: SHAPE[0], : SHAPE[1]]


def correlated_noise(rng, shape=SHAPE):
    """Noise of unit variance that has been smoothed, as by the matching of PSFs."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 1.2)
    return noise * 2.0 * np.sqrt(np.pi) * 1.2


def star(x, y, peak, fwhm=FWHM):
    image = np.zeros(SHAPE)
    add_stars(image, x, y, peak / moffat_stamp(0.0, 0.0, FWHM), fwhm)
    return image


def make_epochs(n, rng, added=None, stars=60):
    """Matched epochs: stars up to 3000 sigma, with errors of 0.5 % in width and 0.04 in position.

    ``added`` has what is special of some epochs.
    """
    x, y = rng.uniform(20, 480, (2, stars))
    peak = 10 ** rng.uniform(0.5, 3.5, stars)
    epochs = []
    for number in range(n):
        away = rng.normal(0.0, 0.04, (2, stars))
        width = FWHM * (1.0 + rng.normal(0.0, 0.005))
        light = np.zeros(SHAPE)
        add_stars(light, x + away[0], y + away[1], peak / moffat_stamp(0.0, 0.0, FWHM), width)
        light += (added or {}).get(number, 0.0)
        variance = 1.0 + 0.02 * np.maximum(light, 0.0)
        epochs.append((light + np.sqrt(variance) * correlated_noise(rng), variance))
    image, variance = (np.array(p, np.float32) for p in zip(*epochs, strict=True))
    return image, variance, (x, y, peak)


def compared(image, variance, usable=None, settings=SETTINGS):
    usable = np.ones(image.shape, bool) if usable is None else usable
    sky = static_sky(image, variance, usable)
    differences = (
        difference_of_epoch(*epoch, sky, settings)
        for epoch in zip(image, variance, usable, strict=True)
    )
    return list(compare_epochs(differences, sky.n_epochs, FWHM, settings))


def near(x, y, radius):
    return np.hypot(X - x, Y - y) <= radius


def trail(peak):
    """A trail, and its distance."""
    distance = (X - 240) * np.cos(0.9) + (Y - 260) * np.sin(0.9)
    return peak * np.exp(-0.5 * (distance / 2.1) ** 2), np.abs(distance)


@pytest.mark.parametrize("n", [2, 3, 6, 20])
def test_a_trail_of_three_sigma_is_found_in_its_epoch(n):
    light, distance = trail(3.0)
    image, variance, _ = make_epochs(n, np.random.default_rng(n), {1: light})
    results = compared(image, variance)
    found = results[1].flagged if n == 2 else results[1].rejected
    assert found[distance < 4.0].mean() > 0.99
    assert results[1].streak[distance < 4.0].mean() > 0.99
    for number, one in enumerate(results):
        if number != 1:
            assert not one.streak.any()
            assert (one.rejected | one.flagged)[distance < 4.0].mean() < 0.02
        if n == 2:
            assert not one.rejected.any()


@pytest.mark.parametrize("n", [3, 6, 20])
def test_spots_are_rejected_whole_whether_bright_or_dark(n):
    bright, dark = star(200, 200, 30.0), -star(350, 150, 20.0)
    image, variance, _ = make_epochs(n, np.random.default_rng(40 + n), {0: bright, 2: dark}, 20)
    results = compared(image, variance)
    assert results[0].rejected[near(200, 200, 1.3 * FWHM)].all()
    assert results[2].rejected[near(350, 150, 1.3 * FWHM)].all()
    # the median of three is that of two here, and nothing else is wrong
    assert not results[1].rejected[near(200, 200, 6.0)].any()
    assert not results[1].rejected[near(350, 150, 6.0)].any()


def test_what_is_wide_and_faint_is_found():
    ghost = 1.1 * near(260, 250, 50.0)
    image, variance, _ = make_epochs(6, np.random.default_rng(5), {3: ghost}, 20)
    results = compared(image, variance)
    assert results[3].rejected[near(260, 250, 45.0)].mean() > 0.98
    assert results[2].rejected[near(260, 250, 45.0)].mean() < 0.02


def test_what_is_bright_and_narrow_is_not_rejected_far_around():
    hit = 300.0 * near(200, 200, 3.0)
    image, variance, _ = make_epochs(6, np.random.default_rng(13), {3: hit}, 20)
    rejected = compared(image, variance)[3].rejected
    assert rejected[near(200, 200, 8.0)].all()
    assert not rejected[~near(200, 200, 16.0)].any()


def test_of_two_epochs_a_spot_is_flagged_in_the_brighter_and_nothing_is_rejected():
    image, variance, _ = make_epochs(2, np.random.default_rng(6), {1: star(200, 200, 30.0)}, 20)
    results = compared(image, variance)
    assert results[1].flagged[near(200, 200, 5.0)].all()
    assert not results[0].flagged[near(200, 200, 8.0)].any()
    assert not any(one.rejected.any() for one in results)


@pytest.mark.parametrize("n", [3, 6, 20])
def test_cores_of_stars_are_not_lost(n):
    image, variance, (x, y, _) = make_epochs(n, np.random.default_rng(70 + n), stars=120)
    rejected = np.array([one.rejected for one in compared(image, variance)])
    core = np.any([near(a, b, 0.5 * FWHM) for a, b in zip(x, y, strict=True)], axis=0)
    assert rejected[:, core].mean() <= 5e-4
    assert rejected.mean() < 1e-3


def test_a_star_that_varies_stays_and_a_nova_of_one_epoch_does_not():
    changes = {number: star(200, 200, 40.0 * (number % 3)) for number in range(6)}
    changes[4] = changes[4] + star(350, 350, 40.0)
    image, variance, _ = make_epochs(6, np.random.default_rng(8), changes, 20)
    results = compared(image, variance)
    for one in results:
        assert not one.rejected[near(200, 200, 5.0)].any()
        assert not one.flagged[near(200, 200, 5.0)].any()
    assert results[4].rejected[near(350, 350, 5.0)].all()


def test_a_trail_across_a_variable_star_is_rejected_whole():
    light, distance = trail(3.0)
    changes = {number: star(240, 260, 40.0 * (number % 2)) for number in range(6)}
    changes[3] = changes[3] + light
    image, variance, _ = make_epochs(6, np.random.default_rng(9), changes, 20)
    assert compared(image, variance)[3].rejected[distance < 4.0].mean() > 0.99


def test_an_artifact_beside_missing_pixels_is_found_and_they_are_not():
    image, variance, _ = make_epochs(4, np.random.default_rng(10), {2: star(200, 200, 30.0)}, 20)
    usable = np.ones(image.shape, bool)
    usable[:, :, 202:260] = False
    usable[0, :100] = False
    image[~usable] = np.nan
    results = compared(image, variance, usable)
    assert results[2].rejected[near(200, 200, 5.0) & (X < 202)].all()
    assert not results[2].rejected[~near(200, 200, 30.0)].any()
    assert not any(results[number].rejected.any() for number in (0, 1, 3))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 20])
def test_the_static_sky_is_the_median_and_differences_have_the_noise_stated(n):
    rng = np.random.default_rng(n)
    image = rng.normal(0.0, 2.0, (n, 120, 300)).astype(np.float32)
    variance = np.full_like(image, 4.0)
    usable = rng.random(image.shape) < 0.8
    sky = static_sky(image, variance, usable)
    expected = np.ma.median(np.ma.array(image, mask=~usable), axis=0)
    np.testing.assert_allclose(np.ma.filled(expected, np.nan), sky.median, rtol=1e-6)
    np.testing.assert_array_equal(sky.n_epochs, usable.sum(axis=0))
    np.testing.assert_array_equal(
        static_sky(image[:, 50:60], variance[:, 50:60], usable[:, 50:60]).median, sky.median[50:60]
    )
    whole = static_sky(image, variance, np.ones(image.shape, bool))
    difference = image[0] - whole.median
    stated = difference_variance(variance[0], whole).mean()
    assert stated == pytest.approx(difference.var(), rel=0.05, abs=0.1 if n > 1 else 4.1)
    other = rng.normal(0.0, 2.0, difference.shape) - whole.median
    stated = difference_variance(variance[0], whole, taking_part=False).mean()
    assert stated == pytest.approx(other.var(), rel=0.05)


def test_there_is_nothing_to_compare_with_a_single_epoch():
    image, variance, _ = make_epochs(1, np.random.default_rng(11), stars=5)
    (one,) = compared(image, variance)
    assert not (one.rejected | one.flagged | one.streak).any()


def test_smoothed_maps_have_unit_noise_also_where_pixels_are_correlated_or_missing():
    rng = np.random.default_rng(12)
    for noise in (rng.normal(size=SHAPE), correlated_noise(rng)):
        noise[:, 300:310] = np.nan
        significance = noise.astype(np.float32)
        smooth = smoothed(Difference(significance, np.zeros_like(significance)), 2.0)
        np.testing.assert_array_equal(np.isnan(smooth), np.isnan(noise))
        assert np.nanstd(smooth) == pytest.approx(1.0, abs=0.05)
        assert np.nanstd(smooth[:, 299]) == pytest.approx(1.0, abs=0.2)


def test_a_region_is_connected_down_to_the_lower_threshold():
    significance = np.zeros(SHAPE, np.float32)
    significance[100:103, 100:200] = 1.0
    significance[100:103, 150] = 9.0
    significance[300:303, 100:200] = 1.0
    difference = Difference(significance, np.zeros_like(significance))
    found = find_candidates(difference, np.full(SHAPE, 5), 1.0, SETTINGS)
    assert found[101, 103:197].all()
    assert not found[280:].any()


def test_regions_follow_the_temporal_rule():
    # min(0.4 n, 2 + 0.03 n): of 3 epochs 1, of 5 2, of 100 5
    candidates = np.zeros((40, 40), bool)
    candidates[5:10, 5:10] = candidates[20:30, 20:30] = True
    for n, allowed in ((2, 0), (3, 1), (4, 1), (5, 2), (34, 3), (100, 5)):
        epochs = np.full(candidates.shape, n)
        for count in range(1, 7):
            rejected, flagged = sort_regions(candidates, count * candidates, epochs, SETTINGS)
            assert rejected.any() == (count <= allowed)
            assert flagged.any() == (allowed == 0 and count == 1)
    counts = 1 * candidates
    counts[20:30, 20:24] = 4  # less than half of the second region
    rejected, _ = sort_regions(candidates, counts, np.full(candidates.shape, 4), SETTINGS)
    np.testing.assert_array_equal(rejected, candidates)
    counts[20:30, 20:26] = 4
    rejected, _ = sort_regions(candidates, counts, np.full(candidates.shape, 4), SETTINGS)
    assert rejected[7, 7]
    assert not rejected[20:30].any()


def test_regions_grow_by_discs():
    regions = np.zeros((50, 60), bool)
    regions[20, 30] = regions[0, 59] = True
    distance = ndimage.distance_transform_edt(~regions)
    np.testing.assert_array_equal(grow_regions(regions, 6.3), distance <= 6.3)


def test_light_nearby_lets_a_star_differ_by_a_part():
    light = star(100, 100, 1000.0).astype(np.float32)
    sky = StaticSky(light, np.ones_like(light), np.full(light.shape, 9, np.int16))
    for factor, differs in ((1.04, False), (1.08, True)):
        difference = difference_of_epoch(
            factor * light, np.ones_like(light), np.ones(light.shape, bool), sky, SETTINGS
        )
        assert (difference.unexplained()[100, 100] > 5.0) == differs
