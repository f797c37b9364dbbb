"""Errors of sums over correlated pixels are the scatter of such sums over resampled noise."""

import numpy as np
import pytest

from coaddflow.warp.kernels import covariance_factor, kernel_weights
from coaddflow.warp.noise import aperture_error, noise_correlation

SIZE = 700


def resampled_noise(kernel, step, seed):
    """Return white noise of variance 1 at places whose phases take all values."""
    rows = rng_rows = np.random.default_rng(seed).normal(0.0, 1.0, (SIZE, SIZE))
    for _ in range(2):
        place = 8.0 + step * 1.0013 * np.arange(int((SIZE - 20) / step / 1.0013))
        first = np.floor(place).astype(int)
        weights = kernel_weights(kernel, place - first)
        half = weights.shape[1] // 2
        taps = first[:, None] + np.arange(1 - half, half + 1)
        rows = np.einsum("ptx,pt->px", rng_rows[taps], weights)
        rng_rows = rows = rows.T
    return rows * step**2


def circle(radius, half=12, sub=10):
    fine = (np.arange((2 * half + 1) * sub) + 0.5) / sub - half - 0.5
    inside = (np.hypot(fine[:, None], fine) < radius).astype(float)
    return inside.reshape(2 * half + 1, sub, 2 * half + 1, sub).mean(axis=(1, 3))


@pytest.mark.parametrize("kernel", ["lanczos3", "bilinear"])
@pytest.mark.parametrize("step", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("radius", [1.0, 3.0, 6.0])
def test_error_is_the_scatter_of_sums(kernel, step, radius):
    noise = np.concatenate([resampled_noise(kernel, step, seed) for seed in range(3)])
    weights = circle(radius)
    windows = np.lib.stride_tricks.sliding_window_view(noise, weights.shape)[::5, ::5]
    scatter = np.einsum("yxij,ij->yx", windows, weights).std()
    error = aperture_error(np.full(weights.shape, noise.var()), weights, kernel, step**2)
    # some 5000 apertures, which overlap
    assert error == pytest.approx(scatter, rel=0.05)


def test_the_sum_of_variances_over_the_factor_is_too_large_for_small_apertures():
    factor = covariance_factor("lanczos3")
    excess = []
    for radius in (1.0, 3.0, 6.0):
        weights = circle(radius)
        plain = np.sqrt(weights.sum() / factor)
        excess.append(plain / aperture_error(np.ones(weights.shape), weights) - 1)
    assert excess == pytest.approx([0.31, 0.07, 0.03], abs=0.01)
    large = circle(200.0, half=210, sub=2)
    error = aperture_error(np.ones(large.shape), large)
    assert error == pytest.approx(np.sqrt((large**2).sum() / factor), rel=0.01)


def test_a_single_pixel_has_its_own_variance_and_a_missing_one_no_error():
    weights = np.zeros((9, 9))
    weights[4, 4] = 2.0
    variance = np.full((9, 9), 4.0)
    variance[0, 0] = np.inf
    assert aperture_error(variance, weights) == pytest.approx(4.0)
    weights[0, 0] = 1.0
    assert aperture_error(variance, weights) == np.inf
    assert noise_correlation()[len(noise_correlation()) // 2] == 1.0
