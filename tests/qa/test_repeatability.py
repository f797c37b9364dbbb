"""Scatter between exposures of positions and magnitudes with known errors."""

import numpy as np
import pytest

from coaddflow.qa.repeatability import distance_repeatability, magnitude_repeatability

N_EXPOSURES, N_STARS = 12, 150
MAS = 1.0 / 3.6e6


@pytest.fixture(scope="module")
def field():
    """Positions of stars in 10 x 10 arcmin, repeated for each exposure."""
    rng = np.random.default_rng(1)
    ra, dec = 359.95 + rng.uniform(0, 10 / 60, N_STARS), rng.uniform(-5 / 60, 5 / 60, N_STARS)
    return np.tile(ra % 360.0, (N_EXPOSURES, 1)), np.tile(dec, (N_EXPOSURES, 1))


def test_distances_scatter_by_the_errors_of_both_stars(field):
    ra, dec = field
    rng = np.random.default_rng(2)
    error_ra, error_dec = rng.normal(0.0, 5.0 * MAS, (2, *ra.shape))
    am1 = distance_repeatability((ra + error_ra) % 360.0, dec + error_dec, 5 / 60, 1 / 60)
    # each star contributes 5 mas along the line between them
    assert am1.value == pytest.approx(5.0 * np.sqrt(2.0), rel=0.05)
    assert am1.n > 1000


def test_a_shift_of_a_whole_exposure_changes_no_distance(field):
    ra, dec = field
    shift = np.random.default_rng(3).normal(0.0, 1000.0 * MAS, (N_EXPOSURES, 1))
    am1 = distance_repeatability((ra + shift) % 360.0, dec, 5 / 60, 1 / 60)
    assert am1.value < 0.01


def test_pairs_are_those_at_the_distance_and_seen_often_enough(field):
    ra, dec = (plane[:, :2].copy() for plane in field)
    ra[:], dec[:] = [10.0, 10.0], [0.0, 5 / 60]
    assert distance_repeatability(ra, dec, 5 / 60, 1 / 60).n == 1
    assert distance_repeatability(ra, dec, 8 / 60, 1 / 60) == (None, 0) or (
        distance_repeatability(ra, dec, 8 / 60, 1 / 60).value is None
    )
    ra[2:, 0] = dec[2:, 0] = np.nan
    assert distance_repeatability(ra, dec, 5 / 60, 1 / 60).value is None


def test_magnitudes_repeat_with_photon_noise_and_what_is_added():
    rng = np.random.default_rng(4)
    noise = np.full((N_EXPOSURES, 2000), 0.003)
    true = rng.uniform(17.0, 19.0, 2000)
    alone = true + rng.normal(0.0, 0.003, noise.shape)
    pa1, limit, excess = magnitude_repeatability(alone, noise)
    assert pa1.value == pytest.approx(0.003, rel=0.03)
    assert limit == pytest.approx(0.003, rel=0.03)
    assert abs(excess) < 0.001
    more = alone + rng.normal(0.0, 0.004, noise.shape)
    pa1, limit, excess = magnitude_repeatability(more, noise)
    assert pa1.value == pytest.approx(0.005, rel=0.03)
    assert excess == pytest.approx(0.004, rel=0.05)


def test_three_exposures_give_the_same_scatter_as_many():
    noise = np.full((3, 20000), 0.01)
    magnitude = np.random.default_rng(5).normal(18.0, 0.01, noise.shape)
    assert magnitude_repeatability(magnitude, noise)[0].value == pytest.approx(0.01, rel=0.03)


def test_one_exposure_repeats_nothing():
    one = np.full((1, 5), 18.0)
    assert magnitude_repeatability(one, one)[0].value is None
