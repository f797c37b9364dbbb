"""Small gaps are filled with what was there, within their stated error; large holes stay."""

import numpy as np
import pytest

from coaddflow.image.fill import fill_masked, fill_saturated
from coaddflow.image.masked_image import MaskedImage, MaskPlane

SHAPE = (120, 150)


def scene(rng, sigma=3.0, level=400.0, stars=0, noise=True):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    truth = level + 0.8 * x - 0.5 * y
    for _ in range(stars):
        xs, ys = rng.uniform(10, 140), rng.uniform(10, 110)
        truth += rng.uniform(500, 5000) * np.exp(-((x - xs) ** 2 + (y - ys) ** 2) / 2 / sigma**2)
    image = truth + rng.normal(0, np.sqrt(truth)) if noise else truth
    return truth, MaskedImage(image, truth, np.zeros(SHAPE))


def sprinkle(masked_image, rng, plane=MaskPlane.BAD, number=400):
    masked = np.zeros(SHAPE, bool)
    for _ in range(number):
        y, x = rng.integers(5, SHAPE[0] - 8), rng.integers(5, SHAPE[1] - 8)
        masked[y : y + rng.integers(1, 3), x : x + rng.integers(1, 3)] = True
    masked[10:90, 70] = True
    masked_image.mask[masked] |= plane
    masked_image.image[masked] = 1e6
    return masked


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_a_plane_is_filled_exactly(rng):
    truth, image = scene(rng, noise=False)
    masked = sprinkle(image, rng)
    assert fill_masked(image, MaskPlane.BAD) == masked.sum()
    np.testing.assert_allclose(image.image, truth, rtol=1e-6)
    np.testing.assert_array_equal(image.has_any(MaskPlane.INTRP), masked)
    np.testing.assert_array_equal(image.has_any(MaskPlane.BAD), masked)


@pytest.mark.parametrize("stars", [0, 60])
def test_errors_are_within_the_stated_variance(rng, stars):
    truth, image = scene(rng, sigma=2.0, stars=stars)
    masked = sprinkle(image, rng)
    before = image.variance.copy()
    fill_masked(image, MaskPlane.BAD)
    chi = ((image.image - truth) / np.sqrt(image.variance))[masked]
    assert np.sqrt(np.mean(chi**2)) < 1.0
    assert np.mean(np.abs(chi) > 3) < 0.01
    assert abs(chi.mean()) < 0.2
    assert (image.variance[masked] > before[masked]).mean() > 0.95
    assert np.median((image.variance / before)[masked]) < 2.0
    np.testing.assert_array_equal(image.variance[~masked], before[~masked])


def test_the_missing_peak_of_a_sharp_star_is_declared_uncertain():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    truth = 100 + 10000 * np.exp(-((x - 70) ** 2 + (y - 50) ** 2) / 2 / 0.9**2)
    image = MaskedImage(truth, truth, np.zeros(SHAPE))
    image.mask[50, 70] = MaskPlane.CR
    fill_masked(image, MaskPlane.CR)
    error = truth[50, 70] - image.image[50, 70]
    assert error > 3000
    assert error < 2 * np.sqrt(image.variance[50, 70])


def test_nothing_is_invented_in_large_holes(rng):
    _, image = scene(rng)
    image.mask[40:60, 40:60] = MaskPlane.BAD
    image.mask[:3, 10] = MaskPlane.BAD
    image.mask[0, 100] = MaskPlane.BAD
    image.mask[100:108, 100:108] = MaskPlane.BAD
    image.image[40:60, 40:60] = 1e6
    assert fill_masked(image, MaskPlane.BAD, max_gap=5) == 4  # at the border along rows
    assert (image.image[40:60, 40:60] == 1e6).all()
    assert not image.has_any(MaskPlane.INTRP)[40:60, 40:60].any()
    assert image.has_any(MaskPlane.INTRP)[:3, 10].all()
    assert image.has_any(MaskPlane.INTRP)[0, 100]


def test_untrustworthy_pixels_fill_nothing(rng):
    truth, image = scene(rng, noise=False)
    image.mask[50, 49] = MaskPlane.BAD
    image.mask[50, 50] = MaskPlane.SAT
    image.mask[50, 48] = MaskPlane.CR
    image.mask[49, 49] = MaskPlane.NO_DATA
    image.image[50, [48, 50]] = 1e6
    image.image[49, 49] = np.nan
    image.variance[49, 49] = np.inf
    fill_masked(image, MaskPlane.BAD)
    assert image.image[50, 49] == pytest.approx(truth[50, 49], rel=1e-6)
    assert image.image[50, 50] == 1e6
    assert not image.has_any(MaskPlane.INTRP)[50, 50]


def test_nothing_masked_is_nothing_done(rng):
    _, image = scene(rng)
    before = image.image.copy()
    assert fill_masked(image, MaskPlane.BAD | MaskPlane.CR) == 0
    np.testing.assert_array_equal(image.image, before)


def test_bleeding_does_not_move_a_star():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)
    truth = 100 + 50000 * (1 + ((x - 70.3) ** 2 + (y - 50.2) ** 2) / 9.0) ** -2.5
    image = MaskedImage(np.minimum(truth, 8000.0), truth, np.zeros(SHAPE))
    image.image[20:55, 69:72] = 8000.0
    image.mask[image.image >= 8000.0] = MaskPlane.SAT

    def centroid():
        flux = image.image[30:71, 50:91] - 100.0
        return (flux * x[30:71, 50:91]).sum() / flux.sum(), (
            flux * y[30:71, 50:91]
        ).sum() / flux.sum()

    assert abs(centroid()[1] - 50.2) > 1.0
    n = fill_saturated(image)
    assert n == image.has_any(MaskPlane.SAT).sum()
    assert centroid() == pytest.approx((70.3, 50.2), abs=0.1)
    assert image.has_any(MaskPlane.INTRP)[image.has_any(MaskPlane.SAT)].all()
    assert image.image[22, 70] == pytest.approx(truth[22, 70], rel=0.05)


def test_saturation_wider_than_the_gap_or_at_the_border_stays():
    image = MaskedImage(np.full(SHAPE, 5.0), np.ones(SHAPE), np.zeros(SHAPE))
    image.mask[10, 20:40] = image.mask[12, :3] = MaskPlane.SAT
    image.image[image.mask != 0] = 99.0
    assert fill_saturated(image, max_gap=10) == 0
    assert (image.image[image.mask != 0] == 99.0).all()
