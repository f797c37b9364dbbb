"""Cosmic rays are found, and stars survive, however sharp they are."""

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import cKDTree
from scipy.special import erf

import coaddflow.isr.cosmic_rays as module
from coaddflow.errors import CcdFailure
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.isr.cosmic_rays import find_cosmic_rays, star_sharpness
from coaddflow.settings.detrend import CosmicsSettings

SIZE, SKY, READ_NOISE = 500, 300.0, 5.0
SQUARE = np.ones((3, 3), bool)


def star(x, y, flux, fwhm):
    """Gaussian integrated over pixels, on the whole image; ``fwhm`` of both axes, or along y, x."""
    edges = np.arange(SIZE + 1) - 0.5
    scales = np.sqrt(2) * np.broadcast_to(fwhm, 2) / 2.3548
    places = zip((y, x), scales, strict=True)
    profile = [np.diff(erf((edges - center) / scale)) / 2 for center, scale in places]
    return flux * np.outer(*profile)


def track(rng):
    """Charge along a straight line, spread over the pixels it crosses."""
    charge = np.zeros((SIZE, SIZE))
    length, angle = min(30.0, 2 + rng.exponential(5)), rng.uniform(0, np.pi)
    x0, y0 = rng.uniform(40, SIZE - 40, 2)
    t = np.arange(0, length, 0.2)
    x, y = x0 + t * np.cos(angle), y0 + t * np.sin(angle)
    np.add.at(charge, (y.round().astype(int), x.round().astype(int)), 0.2 * rng.uniform(300, 3000))
    return charge


def scene(fwhm, n_tracks=40, seed=1, faintest=3.0):
    rng = np.random.default_rng(seed)
    light, charge = np.full((SIZE, SIZE), SKY), np.zeros((SIZE, SIZE))
    positions = rng.uniform(10, SIZE - 10, (150, 2))
    for x, y in positions:
        light += star(x, y, 10 ** rng.uniform(faintest, 5.7), fwhm)
    for _ in range(n_tracks):
        charge += track(rng)
    counts = rng.poisson(light + charge) + rng.normal(0, READ_NOISE, light.shape)
    variance = np.maximum(counts, 0) + READ_NOISE**2
    image = MaskedImage(counts, variance, np.zeros(light.shape))
    significance = charge / np.sqrt(light + READ_NOISE**2)
    return image, charge, significance, positions


@pytest.mark.parametrize("fwhm", [2.0, 2.5, 4.0])
def test_cosmic_rays_are_found_and_star_cores_are_not(fwhm):
    image, charge, significance, positions = scene(fwhm)
    found = find_cosmic_rays(image, CosmicsSettings())
    labels, n = ndimage.label(significance > 3, SQUARE)
    index = np.arange(1, n + 1)
    bright = ndimage.maximum(significance, labels, index) > 8
    seen = ndimage.maximum(found, labels, index).astype(bool)
    assert bright.sum() > 30
    assert seen[bright].mean() > 0.95
    assert charge[found].sum() / charge.sum() > 0.97
    untouched = ~ndimage.binary_dilation(charge > 0, SQUARE, iterations=3)
    y, x = positions[:, 1].round().astype(int), positions[:, 0].round().astype(int)
    alone = untouched[y, x]
    assert alone.sum() > 80
    assert not found[y[alone], x[alone]].any()
    assert found[untouched].mean() < 3e-4


def test_a_field_of_stars_alone_loses_none():
    image, _, _, positions = scene(1.9, n_tracks=0, seed=4)
    found = find_cosmic_rays(image, CosmicsSettings())
    y, x = positions[:, 1].round().astype(int), positions[:, 0].round().astype(int)
    assert not found[y, x].any()


def test_the_laplacian_alone_would_take_sharp_stars(monkeypatch):
    image, _, _, positions = scene(2.0)
    monkeypatch.setattr(
        "coaddflow.isr.cosmic_rays._sharper_than_star", lambda *given: np.ones(len(given[3]), bool)
    )
    found = find_cosmic_rays(image, CosmicsSettings())
    y, x = positions[:, 1].round().astype(int), positions[:, 0].round().astype(int)
    assert found[y, x].sum() > 15


def test_sharpness_of_stars_is_measured_with_cosmic_rays_among_them():
    image, *_ = scene(2.5, n_tracks=60)
    ignored = np.zeros(image.shape, bool)
    clean, *_ = scene(2.5, n_tracks=0)
    np.testing.assert_allclose(
        star_sharpness(image.image, ignored, 2.0),
        star_sharpness(clean.image, ignored, 2.0),
        atol=0.04,
    )


@pytest.mark.parametrize("fwhm", [1.8, 2.5, 4.0, (1.25, 2.5)])
@pytest.mark.parametrize(("n_tracks", "n_galaxies"), [(60, 0), (400, 0), (400, 60)])
def test_sharpness_of_stars_is_measured_among_many_others(fwhm, n_tracks, n_galaxies):
    """Also where most sources are cosmic rays: few stars, and a long exposure."""
    clean, *_ = scene(fwhm, n_tracks=0)
    light = clean.image.astype(float)
    rng = np.random.default_rng(8)
    for _ in range(n_tracks):
        # charge spreads while it drifts through a thick CCD
        light += ndimage.gaussian_filter(track(rng), 0.4)
    for x, y in rng.uniform(10, SIZE - 10, (n_galaxies, 2)):
        light += star(x, y, 10 ** rng.uniform(4.5, 5.7), np.hypot(fwhm, rng.uniform(2.0, 6.0)))
    ignored = np.zeros(clean.shape, bool)
    np.testing.assert_allclose(
        star_sharpness(light.astype(np.float32), ignored, 2.0),
        star_sharpness(clean.image, ignored, 2.0),
        rtol=0.1,
    )


def test_rays_that_are_alike_are_no_stars_unless_sharp_in_all_directions():
    image, *_ = scene(3.0, n_tracks=0)
    ignored = np.zeros(image.shape, bool)
    before = star_sharpness(image.image, ignored, 2.0)
    for y, x in np.random.default_rng(5).integers(20, SIZE - 20, (25, 2)):
        image.image[y : y + 3, x : x + 9] += np.array([[1000], [4000], [1000]])
    after = star_sharpness(image.image, ignored, 2.0)
    np.testing.assert_allclose(after, before, rtol=0.1)


def test_astigmatic_stars_survive_among_many_cosmic_rays():
    """Rays along the rows are sharper than the stars in one direction only."""
    rng = np.random.default_rng(3)
    image, _, _, positions = scene((1.25, 2.5), n_tracks=0, faintest=4.0)
    charge = sum(track(rng) for _ in range(300))
    image.image += rng.poisson(charge)
    image.variance += charge
    found = find_cosmic_rays(image, CosmicsSettings())
    untouched = ~ndimage.binary_dilation(charge > 0, SQUARE, iterations=3)
    y, x = positions[:, 1].round().astype(int), positions[:, 0].round().astype(int)
    alone = untouched[y, x]
    assert alone.sum() > 50
    assert not found[y[alone], x[alone]].any()
    assert found[charge > 300].mean() > 0.95


def test_undersampled_stars_of_a_psf_that_varies_survive():
    """As from a small telescope: no two stars are quite alike."""
    rng = np.random.default_rng(9)
    light = np.full((SIZE, SIZE), SKY)
    y, x = rng.uniform(10, SIZE - 10, (2, 200))
    for one_y, one_x in zip(y, x, strict=True):
        fwhm = 1.2 + 0.8 * one_x / SIZE, 1.6 + 0.8 * one_y / SIZE
        light += star(one_x, one_y, 10 ** rng.uniform(4.0, 5.5), fwhm)
    counts = rng.poisson(light) + rng.normal(0, READ_NOISE, light.shape)
    image = MaskedImage(counts, np.maximum(counts, 0) + READ_NOISE**2, np.zeros(light.shape))
    found = find_cosmic_rays(image, CosmicsSettings())
    assert not found[y.round().astype(int), x.round().astype(int)].any()


def test_without_stars_the_given_seeing_counts():
    rng = np.random.default_rng(2)
    empty = rng.normal(SKY, 17, (SIZE, SIZE)).astype(np.float32)
    ratios = star_sharpness(empty, np.zeros(empty.shape, bool), 2.3548)
    np.testing.assert_allclose(ratios, np.exp([-0.5, -0.5, -1, -1]), rtol=1e-4)


def test_masked_pixels_are_neither_found_nor_do_they_make_others_found():
    rng = np.random.default_rng(3)
    image, *_ = scene(2.5, n_tracks=0)
    y, x = rng.integers(5, SIZE - 5, (2, 500))
    image.image[y, x] = 30000.0
    image.mask[y, x] = MaskPlane.BAD
    image.image[100:140, 200] = np.nan
    image.variance[100:140, 200] = np.inf
    image.mask[100:140, 200] = MaskPlane.NO_DATA
    image.image[200:260, 300:302] = 60000.0
    image.mask[200:260, 300:302] = MaskPlane.SAT
    image.image[300, 400:402] = 5000.0  # a cosmic ray beside a bad pixel
    image.mask[300, 401] = MaskPlane.BAD
    found = find_cosmic_rays(image, CosmicsSettings())
    assert found[300, 400]
    assert not found[image.mask != 0].any()
    assert found.mean() < 3e-4


def test_switched_off_and_with_a_wrong_gain():
    image, *_ = scene(2.5, n_tracks=5)
    assert not find_cosmic_rays(image, CosmicsSettings(enabled=False)).any()
    image.variance /= 400.0  # a gain that is wrong by far
    with pytest.raises(CcdFailure, match="too_many_cosmic_rays"):
        find_cosmic_rays(image, CosmicsSettings(max_fraction=0.01))
    nothing = MaskedImage.empty((50, 50))
    assert not find_cosmic_rays(nothing, CosmicsSettings()).any()


# --- what was made faster, beside the plain formula -------------------------------------------


def test_sources_that_are_alike_are_counted():
    rng = np.random.default_rng(5)
    points = np.concatenate([rng.normal(0.5, 0.05, (150, 8)), rng.uniform(0, 1, (150, 8))])
    points[10:20] = points[0] + 0.1 * rng.choice([-1, 0, 1], (10, 8))
    tree = cKDTree(points)
    expected = [
        tree.query_ball_point(points, reach, p=np.inf, return_length=True) for reach in (0.1, 0.2)
    ]
    numbers = module._numbers_in_cubes(np.ascontiguousarray(points.T), 0.1)
    np.testing.assert_array_equal(numbers, expected)


@pytest.mark.parametrize("shape", [(5, 6), (11, 40), (80, 12)])
def test_the_level_around_is_a_quantile_of_a_frame_of_pixels(shape):
    image = np.random.default_rng(6).normal(0, 1, shape).astype(np.float32)
    y, x = (axis.ravel() for axis in np.mgrid[: shape[0], : shape[1]])
    padded = np.pad(image, 5, mode="reflect")
    frame = np.ones((11, 11), bool)
    frame[1:-1, 1:-1] = False
    plain = [
        np.percentile(padded[j : j + 11, i : i + 11][frame], 30) for j, i in zip(y, x, strict=True)
    ]
    np.testing.assert_array_equal(module._local_level(image, y, x), np.float32(plain))


@pytest.mark.parametrize("growth", [0, 1, 3])
def test_growth_is_that_of_squares(growth):
    rng = np.random.default_rng(7)
    seeds = rng.random((40, 50)) < 0.01
    seeds[0, 0] = seeds[-1, 20] = True
    hits = np.zeros(seeds.shape, bool)
    module._set_squares(hits, *np.nonzero(seeds), growth)
    plain = ndimage.binary_dilation(seeds, SQUARE, iterations=growth) if growth else seeds
    np.testing.assert_array_equal(hits, plain)


def test_holes_are_filled_from_neighbours_or_with_the_median():
    image, *_ = scene(2.5, n_tracks=5)
    rng = np.random.default_rng(8)
    image.mask[rng.random(image.shape) < 0.02] = MaskPlane.BAD
    image.mask[100:130, 200:260] = MaskPlane.NO_DATA
    image.mask[300:310, 300:303] = MaskPlane.SAT | MaskPlane.BAD
    image.mask[50, 60] = MaskPlane.CROSSTALK
    ignored = image.has_any(MaskPlane.BAD | MaskPlane.NO_DATA | MaskPlane.SAT)
    before = image.image.copy()
    pixels, variance, holes = module._without_holes(image, ignored)
    np.testing.assert_array_equal(image.image, before)
    assert holes[105:125, 205:255].all() and holes[300:310, 300:303].all()
    assert not holes[~ignored].any() and holes.sum() < ignored.sum()
    np.testing.assert_array_equal(pixels[~ignored], before[~ignored])
    assert (pixels[holes] == np.median(before[~ignored])).all()
    assert (variance[holes] == np.median(image.variance[~ignored])).all()


def test_what_is_sharper_than_a_star_follows_the_plain_formula():
    rng = np.random.default_rng(12)
    shape, limits = (40, 50), np.array([0.8, 0.75, 0.6, 0.55])
    image = rng.normal(0.0, 10.0, shape).astype(np.float32)
    image[rng.random(shape) < 0.1] += 200.0
    variance = rng.uniform(50.0, 150.0, shape).astype(np.float32)
    ignored = rng.random(shape) < 0.05
    y, x = (index.ravel() for index in np.indices(shape))
    level = rng.normal(0.0, 5.0, len(y))
    found = module._sharper_than_star(
        image, variance, ignored, y, x, level, limits, module._DIRECTIONS
    )
    expected = np.zeros(shape, bool)
    level = level.reshape(shape)
    wide_image = np.pad(image.astype(float), 1)
    wide_variance = np.pad(variance.astype(float), 1)
    known = np.pad(~ignored, 1)
    for limit, (dy, dx) in zip(limits, module._DIRECTIONS, strict=True):
        sides = [
            (slice(1 + s * dy, 1 + s * dy + shape[0]), slice(1 + s * dx, 1 + s * dx + shape[1]))
            for s in (-1, 1)
        ]
        pair = sum(wide_image[side] for side in sides) / 2 - level
        noise = sum(wide_variance[side] for side in sides) / 4 + limit**2 * variance
        below = pair + module._MARGIN * np.sqrt(noise) < limit * (image - level)
        expected |= below & known[sides[0]] & known[sides[1]]
    assert 20 < expected.sum() < expected.size / 2
    np.testing.assert_array_equal(found.reshape(shape), expected)
