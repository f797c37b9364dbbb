import numpy as np
import pytest

from coaddflow.simulate.atmosphere import Waves
from coaddflow.solution.waves import fit_waves

RMS, NOISE, N = 7.0, 4.0, 4000
SHORTEST, MARGIN = 8.0 / 60.0, 20.0 / 60.0


@pytest.fixture(scope="module")
def stars():
    """Points on a field of 1.6 degrees, the field of turbulence there (mas), and test points."""
    rng = np.random.default_rng(2)
    flow, plane = Waves.draw(rng), rng.uniform(-0.8, 0.8, (N, 2))
    test = rng.uniform(-0.75, 0.75, (1000, 2))
    return plane, RMS * flow.flow(plane.T).T, test, RMS * flow.flow(test.T).T


@pytest.fixture(scope="module")
def fitted(stars):
    plane, true, *_ = stars
    noise = np.random.default_rng(12).normal(0.0, NOISE, true.shape)
    return fit_waves(plane, true + noise, np.full(N, NOISE**2), SHORTEST, MARGIN)


def test_turbulence_between_the_stars_is_predicted(stars, fitted):
    # 7 mas with the power of Kolmogorov: 2 mas remain from stars with errors of 4 mas
    *_, test, true = stars
    left = fitted.value(test) - true
    assert true.std() > 5.0
    assert left.std() < 2.0


def test_formal_error_is_what_is_left(stars, fitted):
    *_, test, true = stars
    assert 0.7 < (fitted.value(test) - true).std() / fitted.error < 1.4


def test_field_has_no_curl(fitted):
    rng, step = np.random.default_rng(13), 1e-5
    plane = rng.uniform(-0.7, 0.7, (50, 2))
    slopes = [
        (fitted.value(plane + step * axis) - fitted.value(plane - step * axis)) / (2.0 * step)
        for axis in np.eye(2)
    ]
    curl, divergence = slopes[0][:, 1] - slopes[1][:, 0], slopes[0][:, 0] + slopes[1][:, 1]
    assert np.abs(curl).max() < 1e-5 * np.abs(divergence).max()


def test_spectrum_is_that_of_the_turbulence(fitted):
    # power of the displacement falls with k^(-11/3), which is 2 n (docstring of `Waves.draw`)
    assert fitted.spectrum[2] == pytest.approx(11.0 / 6.0, abs=0.5)


def test_noise_alone_makes_no_field():
    rng = np.random.default_rng(14)
    plane, noise = rng.uniform(-0.8, 0.8, (N, 2)), rng.normal(0.0, NOISE, (N, 2))
    fitted = fit_waves(plane, noise, np.full(N, NOISE**2), SHORTEST, MARGIN)
    assert fitted.value(plane).std() < 0.15 * NOISE


def test_scalar_field(stars):
    # the first component alone, as if it were extinction
    plane, true, test, there = stars
    noisy = true[:, :1] + np.random.default_rng(15).normal(0.0, NOISE, (N, 1))
    fitted = fit_waves(plane, noisy, np.full(N, NOISE**2), SHORTEST, MARGIN)
    found = fitted.value(test)
    assert found.shape == (len(test), 1)
    assert (found[:, 0] - there[:, 0]).std() < 2.2


def test_spectrum_of_an_earlier_fit_gives_the_same_field(stars, fitted):
    plane, true, test, _ = stars
    noise = np.random.default_rng(12).normal(0.0, NOISE, true.shape)
    variance = np.full(N, NOISE**2)
    again = fit_waves(plane, true + noise, variance, SHORTEST, MARGIN, fitted.spectrum)
    np.testing.assert_allclose(again.value(test), fitted.value(test), atol=1e-9)


def test_normal_equations_are_those_of_the_waves(stars):
    # a fit with hardly any prior is the least-squares fit to the waves themselves
    plane, true, *_ = stars
    fitted = fit_waves(plane, true, np.ones(N), 0.4, MARGIN, (1e9, 3.0, 1.0))
    angle = 2.0 * np.pi * (plane - fitted.origin) @ fitted.waves.T / fitted.box
    direction = fitted.waves / np.hypot(*fitted.waves.T)[:, None]
    design = np.concatenate(
        [np.hstack([np.cos(angle), np.sin(angle)]) * np.tile(d, 2) for d in direction.T]
    )
    expected = np.linalg.lstsq(design, true.T.ravel(), rcond=None)[0]
    found = np.concatenate([fitted.cosine, fitted.sine])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
