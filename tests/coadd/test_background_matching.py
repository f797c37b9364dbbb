"""Skies that differ are brought to one level, compared in places that both exposures see."""

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
    """The sky of an exposure in some cells, with an error of its background."""
    index = np.array([(x, y) for y in rows for x in columns], np.int32)
    value = true_sky(index) + error(index) + rng.normal(0.0, weight**-0.5, len(index))
    return SkyBins(index, value, np.full(len(index), weight))


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def read(reader, box):
    """The pixels of a box."""
    pixels = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
    reader.read_into(box, pixels, (0, 0))
    return pixels


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
    assert np.ptp(list(level.values())) < 0.15  # noise of the cells: 0.05 to 0.14
    mean = sum(skies[e].weight.sum() * found[e].coefficients[0] for e in errors)
    assert mean == pytest.approx(0.0, abs=1e-6 * sum(s.weight.sum() for s in skies.values()))


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
    assert overlap_groups(4, [(0, 1)]) == [[0, 1], [2], [3]]


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


@pytest.mark.parametrize("settings", [CONSTANT, PLANE], ids=["constant", "plane"])
def test_one_exposure_that_sees_something_else_in_some_cells_does_not_matter(rng, settings):
    def ghost(index):
        return np.where((index[:, 0] < 3) & (index[:, 1] < 4), 500.0, 6.0)

    skies = {e: exposure(range(10), range(10), rng) for e in "abc"}
    skies["d"] = exposure(range(10), range(10), rng, error=ghost)
    found = match_backgrounds(skies, settings)
    assert found["d"].coefficients[0] - found["a"].coefficients[0] == pytest.approx(6.0, abs=0.1)


def test_a_solution_that_is_not_better_than_none_is_not_applied(rng, caplog):
    """Half of an overlap differs one way and half the other: no constant helps."""

    def split(index):
        return np.where(index[:, 1] % 8 < 5, 10.0, -12.0)

    skies = {
        "a": exposure(range(8), range(32), rng),
        "b": exposure(range(8), range(32), rng, error=split),
    }
    # the cells that differ by -12 are taken for outliers, but the steps there count
    with caplog.at_level(logging.INFO):
        found = match_backgrounds(skies, CONSTANT)
    assert [one.coefficients for one in found.values()] == [(0.0,), (0.0,)]
    assert "background matching is not applied" in caplog.text


def nebula(shape, rng, slope=-1.5):
    """Structure at all scales, of rms 1: a power law of the amplitudes."""
    ky, kx = np.meshgrid(np.fft.fftfreq(shape[0]), np.fft.rfftfreq(shape[1]), indexing="ij")
    k = np.hypot(kx, ky)
    k[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=shape)) * k**slope
    plane = np.fft.irfft2(spectrum, shape)
    return plane / plane.std()


@pytest.mark.parametrize("settings", [CONSTANT, PLANE], ids=["constant", "plane"])
def test_tiles_that_overlap_little_on_a_nebula_leave_no_steps(rng, settings, caplog):
    """Each fills another part of a square: what it sees there is another part of the nebula."""
    side, overlap, sky = 500, 60, 40.0 * nebula((1024, 1024), rng)
    boxes, images = {}, {}
    for j in range(2):
        for i in range(2):
            x0, y0 = i * (side - overlap), j * (side - overlap)
            box = boxes[f"{i}{j}"] = (x0, y0, x0 + side, y0 + side)
            y, x = np.mgrid[:side, :side] / side - 0.5
            error = rng.uniform(-5, 5)
            if settings is PLANE:
                error = error + rng.uniform(-5, 5) * x + rng.uniform(-5, 5) * y
            image = sky[box[1] : box[3], box[0] : box[2]] + error + rng.normal(0, 1, (side, side))
            images[f"{i}{j}"] = image.astype(np.float32)
    skies = {}
    for name, image in images.items():
        # the brightest part is detected, and not quite the same part by all
        mask = np.where(image > 45.0, np.int32(MaskPlane.DETECTED), 0)
        warp = Warp(boxes[name], MaskedImage(image, np.ones_like(image), mask))
        skies[name] = bin_sky(warp, ("BAD",), settings)
    with caplog.at_level(logging.INFO):
        found = match_backgrounds(skies, settings)
    assert "4 exposures matched; steps in their 6 overlaps" in caplog.text
    steps = []
    for name, other in (("00", "10"), ("00", "01"), ("10", "11"), ("01", "11")):
        a, b = boxes[name], boxes[other]
        common = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
        left = []
        for one in (name, other):
            warp = Warp(boxes[one], MaskedImage(images[one], np.ones_like(images[one]), 0 * mask))
            left.append(read(CorrectedWarp(warp, found[one]), common).image)
        steps.append(np.mean(left[0] - left[1]))
    assert np.abs(steps).max() < 0.04  # noise of the mean of an overlap: 0.008


def test_cells_are_covered_whole_and_weigh_less_with_stars_in_them(rng):
    shape = (64, 96)
    image = rng.normal(20.0, 1.0, shape).astype(np.float32)
    mask = np.zeros(shape, np.int32)
    image[30:38, 28:36] += 100.0
    image[5] = 1e6
    mask[5] = int(MaskPlane.CR)
    mask[:, 90:] = int(MaskPlane.NO_DATA)
    image[:, 90:] = np.nan
    warp = Warp((8, 4, 104, 68), MaskedImage(image, np.ones(shape), mask))
    sky = bin_sky(warp, ("CR",), CONSTANT)
    places = [tuple(place) for place in sky.index.tolist()]
    # columns 16 to 96 of the tract, rows 16 to 64
    assert set(places) == {(x, y) for x in range(1, 6) for y in range(1, 4)}
    star = np.array([place == (2, 2) for place in places])
    np.testing.assert_allclose(sky.value[~star], 20.0, atol=0.4)
    assert sky.weight[star].max() < 0.02 * sky.weight[~star].min()
    np.testing.assert_allclose(sky.weight[~star], 256.0, rtol=0.25)
    thin = bin_sky(warp, ("CR",), CONSTANT, thin=4).index.tolist()
    assert 0 < len(thin) < 0.5 * len(places)
    assert {tuple(place) for place in thin} < set(places)


def test_bad_pixels_do_not_move_the_value_of_a_cell_on_a_slope(rng):
    y, x = np.mgrid[:64, :64]
    image = (0.5 * x - 0.2 * y).astype(np.float32)
    mask = np.where(rng.random((64, 64)) < 0.3, np.int32(MaskPlane.CR), 0)
    mask[:, 40:44] = int(MaskPlane.BAD)
    warp = Warp((0, 0, 64, 64), MaskedImage(image, np.ones_like(image), mask))
    sky = bin_sky(warp, ("BAD", "CR"), CONSTANT)
    assert len(sky.index) == 16
    np.testing.assert_allclose(sky.value, ((sky.index + 0.5) * 16 - 0.5) @ [0.5, -0.2], atol=1e-4)


def test_ccds_of_an_exposure_share_cells():
    one = SkyBins(np.array([[0, 0], [1, 0]]), np.array([1.0, 2.0]), np.array([1.0, 1.0]))
    two = SkyBins(np.array([[1, 0], [2, 0]]), np.array([5.0, 7.0]), np.array([3.0, 1.0]))
    merged = merge_bins([one, two])
    assert merged.index.tolist() == [[0, 0], [1, 0], [2, 0]]
    assert merged.value.tolist() == [1.0, 2.0, 7.0]
    assert merged.weight.tolist() == [1.0, 1.0, 1.0]


def test_a_correction_is_subtracted_where_it_belongs():
    pixels = MaskedImage(np.zeros((6, 8)), np.ones((6, 8)), np.zeros((6, 8), np.int32))
    warp = Warp((100, 200, 108, 206), pixels)
    correction = SkyCorrection((1.0, 2.0, -4.0), (104.0, 202.0), 10.0)
    part = read(CorrectedWarp(warp, correction), (102, 201, 105, 203))
    assert part.image[0, 0] == pytest.approx(-(1.0 - 0.4 + 0.4))
    assert part.image[1, 2] == pytest.approx(-correction.at(104, 202)) == -1.0
    assert not pixels.image.any()
    flat = read(CorrectedWarp(warp, SkyCorrection((3.0,))), warp.box)
    assert (flat.image == -3.0).all()
