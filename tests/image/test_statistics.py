import numpy as np
import pytest

from coaddflow.image.statistics import iqr_sigma, mad_sigma, weighted_median


@pytest.mark.parametrize("sigma", [mad_sigma, iqr_sigma])
def test_robust_sigma_is_that_of_normal_noise_and_forgets_outliers(sigma):
    values = np.random.default_rng(4).normal(10.0, 3.0, 200_000)
    assert sigma(values) == pytest.approx(3.0, rel=0.01)
    values[:1000] = 1e9
    assert sigma(values) == pytest.approx(3.0, rel=0.02)


def test_deviations_count_from_the_centre_that_is_given():
    residual = np.array([-1.0, 1.0, 2.0, 3.0])
    assert mad_sigma(residual, 0.0) == pytest.approx(1.4826 * 1.5)
    assert mad_sigma(residual) == pytest.approx(1.4826 * 1.0)


def test_weighted_median_is_that_of_repeated_values():
    values, weights = np.array([5.0, 1.0, 3.0]), np.array([1, 2, 2])
    assert weighted_median(values, weights) == np.median(np.repeat(values, weights)) == 3.0
