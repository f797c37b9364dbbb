"""Fluxes and cores of stars that are too faint, too bright, or have a hole."""

import numpy as np
import pytest
from skyscene import draw_star

from coaddflow.qa.psf_check import shape_residuals, shapes_of
from coaddflow.qa.star_fluxes import by_bin, core_over_rim, flux_deviation, typical

SHAPE = (200, 200)
X, Y = np.array([50.3, 120.7, 198.0]), np.array([60.2, 140.1, 100.0])


def stars(factor=1.0, fwhm=4.0):
    return factor * sum(draw_star(SHAPE, x, y, 1e4, fwhm) for x, y in zip(X, Y, strict=True))


def test_missing_light_is_found_and_stars_at_the_border_are_not_measured():
    residual = stars(0.97) - stars()
    deviation = flux_deviation(residual, X, Y, 12.0, np.full(3, 1e4))
    assert deviation[:2] == pytest.approx(-0.03, abs=1e-4)
    assert np.isnan(deviation[2])
    residual[60, 50] = np.nan
    assert np.isnan(flux_deviation(residual, X, Y, 12.0, np.full(3, 1e4))[0])


def test_the_typical_deviation_has_an_error_and_needs_some_stars():
    values = np.random.default_rng(1).normal(0.01, 0.1, 10_000)
    bias = typical(values)
    assert bias.value == pytest.approx(0.01, abs=4.0 * bias.error)
    assert bias.error == pytest.approx(0.00125, rel=0.05)
    assert np.isnan(typical(values[:4]).value)
    assert typical(np.array([np.nan] * 10)).n == 0


def test_bins_hold_what_is_in_them():
    magnitude = np.repeat([16.5, 17.5, 19.0], 10)
    found = by_bin(magnitude / 100.0, magnitude, [16.0, 17.0, 18.0, 20.0])
    assert {name: round(bias.value, 3) for name, bias in found.items()} == {
        "16-17": 0.165,
        "17-18": 0.175,
        "18-20": 0.19,
    }


def test_a_hole_in_a_star_is_seen():
    image = stars()
    whole = core_over_rim(image, X, Y, 8.0)
    assert (whole[:2] > 1.2).all()
    assert np.isnan(whole[2])
    image[58:63, 48:53] *= 0.1
    assert core_over_rim(image, X, Y, 8.0)[0] < 0.5


def test_shapes_and_their_residuals():
    grid = np.arange(-20, 21)
    x, y = np.meshgrid(grid, grid)

    def star(sigma_x, sigma_y):
        return np.exp(-0.5 * ((x / sigma_x) ** 2 + (y / sigma_y) ** 2))[None]

    shape = shapes_of(star(3.0, 3.0))
    assert shape.size[0] == pytest.approx(3.0, rel=1e-3)
    residual = shape_residuals(star(3.06, 3.06), star(3.0, 3.0))
    assert residual.size[0] == pytest.approx(0.02, abs=1e-3)
    residual = shape_residuals(star(3.15, 2.85), star(3.0, 3.0))
    # (a^2 - b^2) / (a^2 + b^2)
    assert residual.e1[0] == pytest.approx(0.0998, abs=1e-3)
    assert residual.e2[0] == pytest.approx(0.0, abs=1e-6)
