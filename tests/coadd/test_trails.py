"""Trails are found from edge to edge; spikes, bleed columns, edges and stars are none."""

import numpy as np
import pytest

from coaddflow.coadd.trails import find_trails, trail_mask
from coaddflow.settings.artifacts import TrailSettings

SETTINGS = TrailSettings()
SHAPE = (900, 1100)
Y, X = np.mgrid[: SHAPE[0], : SHAPE[1]]


def noise(seed):
    return np.random.default_rng(seed).normal(0.0, 1.0, SHAPE).astype(np.float32)


def distance(angle, through):
    """Distance of pixels from the line through a pixel with a normal in this direction."""
    c, s = np.cos(angle), np.sin(angle)
    return (X - through[0]) * c + (Y - through[1]) * s


def trail(angle, through, peak, sigma=2.0):
    return (peak * np.exp(-0.5 * (distance(angle, through) / sigma) ** 2)).astype(np.float32)


def masked(significance):
    return trail_mask(find_trails(significance, SETTINGS), SHAPE)


@pytest.mark.parametrize("angle", [0.0, 0.02, 0.7, np.pi / 4, 1.2, np.pi / 2, 2.0, 3.0])
def test_a_trail_of_three_sigma_is_found_from_edge_to_edge(angle):
    through = (600.0, 400.0)
    found = masked(noise(1) + trail(angle, through, 3.0))
    assert found[np.abs(distance(angle, through)) < 4.0].mean() > 0.999
    assert not found[np.abs(distance(angle, through)) > 16.0].any()


def test_a_trail_of_a_third_of_the_noise_is_found():
    through = (500.0, 500.0)
    found = masked(noise(2) + trail(0.4, through, 0.35))
    assert found[np.abs(distance(0.4, through)) < 2.0].mean() > 0.99


def test_the_width_of_a_trail_is_measured():
    narrow, wide = (
        find_trails(noise(3) + trail(0.4, (500.0, 500.0), 3.0, sigma), SETTINGS)
        for sigma in (2.0, 14.0)
    )
    assert len(narrow) == len(wide) == 1
    # 3 sigma of the noise falls to 0.1 at 2.6 sigma of the profile
    assert 2.6 * 2.0 < narrow[0].half_width < 2.6 * 2.0 + 5.0
    assert 2.0 * 14.0 < wide[0].half_width < 2.6 * 14.0 + 5.0
    assert narrow[0].angle == pytest.approx(0.4, abs=1e-3)


def test_gaps_belong_to_a_trail():
    through = (500.0, 500.0)
    significance = noise(4) + trail(0.4, through, 3.0)
    significance[300:380] = np.nan
    significance[420:460] = noise(5)[420:460]  # a tumbling satellite
    found = masked(significance)
    assert found[np.abs(distance(0.4, through)) < 4.0].all()


def test_two_trails_and_one_across_a_corner():
    lines = [(0.4, (500.0, 500.0)), (1.9, (300.0, 500.0)), (-0.8, (940.0, 120.0))]
    found = masked(noise(6) + sum(trail(*line, 3.0) for line in lines))
    for line in lines:
        assert found[np.abs(distance(*line)) < 3.0].mean() > 0.99
    assert found.mean() < 0.06


def test_there_is_no_trail_in_noise_stars_and_sky():
    significance = noise(7)
    rng = np.random.default_rng(8)
    for x, y in rng.uniform(20, 880, (150, 2)):
        near = np.hypot(X - x, Y - y) < 4.0
        significance[near] += rng.normal(0.0, 40.0)
    significance += 0.5 * np.sin(X / 300.0) + 0.4 * (Y > 400)
    assert not find_trails(significance, SETTINGS)


def test_what_is_negative_is_no_trail():
    # it belongs to another exposure
    assert not find_trails(noise(9) - trail(0.4, (500.0, 500.0), 5.0), SETTINGS)


@pytest.mark.parametrize("angle", [0.0, 0.7, np.pi / 2])
def test_spikes_of_a_star_are_no_trails(angle):
    star = (520.0, 430.0)
    away = np.hypot(X - star[0], Y - star[1])
    spikes = sum(trail(a, star, 30.0) for a in (angle, angle + np.pi / 2))
    significance = noise(10) + spikes * np.exp(-away / 60.0) + 200.0 * np.exp(-away / 6.0)
    assert not find_trails(significance.astype(np.float32), SETTINGS)


@pytest.mark.parametrize("last", [500, 900])
def test_a_bleed_column_is_no_trail(last):
    significance = noise(11) + trail(0.0, (430.0, 0.0), 10.0, 6.0)
    significance[last:] = noise(11)[last:]
    # saturated pixels are not compared; the column may end within the image, or with it
    significance[:last, 425:436] = np.nan
    assert not find_trails(significance, SETTINGS)


def test_the_edge_of_a_ccd_is_no_trail():
    significance = noise(12)
    significance[:, 500:560] = np.nan
    significance[:, 490:500] += 2.0
    significance[:, 560:566] += 2.0
    significance[700:] = np.nan
    significance[692:700] += 2.0
    assert not find_trails(significance, SETTINGS)


def test_a_trail_that_runs_along_columns_beside_an_edge_is_found():
    significance = noise(13) + trail(0.003, (430.0, 450.0), 3.0)
    significance[:, 500:560] = np.nan
    found = masked(significance)
    assert found[np.abs(distance(0.003, (430.0, 450.0))) < 4.0].mean() > 0.99


def test_nothing_is_found_in_nothing():
    assert not find_trails(np.full(SHAPE, np.nan, np.float32), SETTINGS)
    assert not find_trails(noise(14)[:20, :20], SETTINGS)
