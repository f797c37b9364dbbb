"""Skies that differ are brought to one level, which is the mean of them."""

import logging

import numpy as np
import pytest

from coaddflow.coadd.background_matching import (
    SkyBins,
    SkyCorrection,
    bin_sky,
    match_backgrounds,
    merge_bins,
    overlap_groups,
)
from coaddflow.coadd.readers import CorrectedWarp
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.settings.coadd import BackgroundMatchingSettings
from coaddflow.warp.files import Warp

CONSTANT = BackgroundMatchingSettings(enabled=True, bin_size=16)
PLANE = BackgroundMatchingSettings(enabled=True, bin_size=16, model="plane")


def true_sky(index):
    """Light that is really there, such as cirrus: the same in all exposures."""
    return 3.0 * np.sin(index[:, 0]) + 2.0 * np.cos(2.0 * index[:, 1])


def exposure(columns, rows, rng, weight=100.0, error=lambda index: 0.0):
    """The sky of an exposure on some squares, with an error of its background."""
    index = np.array([(x, y) for y in rows for x in columns])
    value = true_sky(index) + error(index) + rng.normal(0.0, weight**-0.5, len(index))
    return SkyBins(index, value, np.full(len(index), weight))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def corrected(sky, correction):
    """The sky of an exposure after the correction."""
    middles = (sky.index + 0.5) * 16 - 0.5
    return sky.value - np.array([correction.at(x, y) for x, y in middles])


def test_constants_vanish_and_the_weighted_mean_stays(rng):
    errors = {"a": 10.0, "b": -4.0, "c": 1.0, "d": 50.0}
    reach = {"a": range(8), "b": range(4, 12), "c": range(10, 20), "d": range(2, 18)}
    weights = {"a": 100.0, "b": 400.0, "c": 50.0, "d": 100.0}
    skies = {
        e: exposure(reach[e], range(6), rng, weights[e], lambda index, e=e: errors[e])
        for e in errors
    }
    found = match_backgrounds(skies, CONSTANT)
    level = {e: errors[e] - found[e].coefficients[0] for e in errors}
    assert np.ptp(list(level.values())) < 0.15  # noise of the squares: 0.05 to 0.14
    mean = sum(skies[e].weight.sum() * found[e].coefficients[0] for e in errors)
    assert mean == pytest.approx(0.0, abs=1e-6 * sum(s.weight.sum() for s in skies.values()))
    # as if nothing had been there to correct
    again = match_backgrounds(
        {e: SkyBins(s.index, corrected(s, found[e]), s.weight) for e, s in skies.items()}, CONSTANT
    )
    assert max(abs(one.coefficients[0]) for one in again.values()) < 1e-9


def test_groups_without_overlap_keep_their_own_mean_and_are_logged(rng, caplog):
    skies = {
        "a": exposure(range(5), range(5), rng, error=lambda index: 8.0),
        "b": exposure(range(3, 8), range(5), rng, error=lambda index: -8.0),
        "c": exposure(range(20, 25), range(5), rng, error=lambda index: 100.0),
        "d": exposure(range(22, 27), range(5), rng, error=lambda index: 104.0),
        "e": exposure(range(40, 45), range(5), rng, error=lambda index: 7.0),
    }
    with caplog.at_level(logging.WARNING):
        found = match_backgrounds(skies, CONSTANT)
    c = {e: one.coefficients[0] for e, one in found.items()}
    assert (c["a"], c["b"]) == (pytest.approx(8.0, abs=0.1), pytest.approx(-8.0, abs=0.1))
    assert (c["c"], c["d"]) == (pytest.approx(-2.0, abs=0.1), pytest.approx(2.0, abs=0.1))
    assert c["e"] == 0.0
    assert "3 groups" in caplog.text and "Alone: e" in caplog.text
    grid = np.array([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]], float)
    assert overlap_groups(grid) == [[0, 1], [2], [3]]


def test_planes_are_found_and_a_constant_is_not_enough_for_them(rng):
    def tilt(index):
        return 5.0 + 0.8 * index[:, 0] - 0.5 * index[:, 1]

    skies = {
        "a": exposure(range(12), range(12), rng),
        "b": exposure(range(12), range(12), rng, error=tilt),
        "c": exposure(range(3, 15), range(12), rng),
    }
    for settings in (PLANE, CONSTANT):
        found = match_backgrounds(skies, settings)
        both = [corrected(skies[e], found[e]) for e in "ab"]
        assert (np.std(both[0] - both[1]) < 0.2) == (settings is PLANE)


def test_one_exposure_that_sees_something_else_in_some_squares_does_not_matter(rng):
    def ghost(index):
        return np.where((index[:, 0] < 3) & (index[:, 1] < 4), 500.0, 6.0)

    skies = {e: exposure(range(10), range(10), rng) for e in "abc"}
    skies["d"] = exposure(range(10), range(10), rng, error=ghost)
    found = match_backgrounds(skies, CONSTANT)
    assert found["d"].coefficients[0] - found["a"].coefficients[0] == pytest.approx(6.0, abs=0.1)


def test_sources_and_flaws_are_no_sky(rng):
    shape = (40, 70)
    image = rng.normal(20.0, 1.0, shape).astype(np.float32)
    mask = np.zeros(shape, np.int32)
    image[:, 30:40] += 1000.0
    mask[:, 30:40] = int(MaskPlane.DETECTED)
    image[5] = 1e6
    mask[5] = int(MaskPlane.CR)
    mask[:, 60:] = int(MaskPlane.NO_DATA)
    image[:, 60:] = np.nan
    warp = Warp((8, 4, 78, 44), MaskedImage(image, np.ones(shape), mask))
    sky = bin_sky(warp, ("CR",), CONSTANT)
    np.testing.assert_allclose(sky.value, 20.0, atol=1.0)
    places = {tuple(place) for place in sky.index.tolist()}
    assert (1, 1) in places
    # columns 64 to 80 of the tract: four columns of sky only; 32 to 48: ten are a source
    assert (4, 1) in places and (5, 1) not in places
    strict = CONSTANT.model_copy(update={"min_fraction": 0.9})
    assert {x for x, _ in bin_sky(warp, ("CR",), strict).index.tolist()} == {1, 3}


def test_ccds_of_an_exposure_share_squares():
    one = SkyBins(np.array([[0, 0], [1, 0]]), np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    two = SkyBins(np.array([[1, 0], [2, 0]]), np.array([5.0, 7.0]), np.array([3.0, 1.0]))
    merged = merge_bins([one, two])
    assert merged.index.tolist() == [[0, 0], [1, 0], [2, 0]]
    assert merged.value.tolist() == [1.0, 4.25, 7.0]
    assert merged.weight.tolist() == [1.0, 4.0, 1.0]


def test_a_correction_is_subtracted_where_it_belongs():
    pixels = MaskedImage(np.zeros((6, 8)), np.ones((6, 8)), np.zeros((6, 8), np.int32))
    warp = Warp((100, 200, 108, 206), pixels)
    correction = SkyCorrection((1.0, 2.0, -4.0), (104.0, 202.0), 10.0)
    part = CorrectedWarp(warp, correction).read_box((102, 201, 105, 203))
    assert part.image[0, 0] == pytest.approx(-(1.0 - 0.4 + 0.4))
    assert part.image[1, 2] == pytest.approx(-correction.at(104, 202)) == -1.0
    assert not pixels.image.any()
    flat = CorrectedWarp(warp, SkyCorrection((3.0,))).read_box(warp.box)
    assert (flat.image == -3.0).all()
