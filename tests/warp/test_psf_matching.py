"""Warps that are matched have the PSF of the target, the same fluxes, and the noise they state."""

import numpy as np
import pytest
from starfield import add_stars, moffat_stamp

from coaddflow.errors import InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.psf_model import adaptive_moments
from coaddflow.settings.artifacts import PsfMatchingSettings
from coaddflow.warp.psf_matching import (
    PsfStamps,
    choose_target,
    fit_kernels,
    kernel_between,
    largest_width,
    match_psf,
    wider_target,
)

SETTINGS = PsfMatchingSettings()
HALF = 30
Y, X = np.mgrid[-HALF : HALF + 1, -HALF : HALF + 1]


def stamps_of(fwhm, e1=0.0, e2=0.0, beta=3.5, x=0.0, y=0.0):
    """PSFs with these shapes, one for each position."""
    shapes = np.broadcast_arrays(fwhm, e1, e2, x, y)
    images = [moffat_stamp(X, Y, f, beta, a, b) for f, a, b, *_ in zip(*shapes, strict=True)]
    return PsfStamps(shapes[3], shapes[4], np.array(images))


def without_noise(image):
    return MaskedImage(image, np.ones(image.shape), np.zeros(image.shape, int))


def widths_of(image, x, y, half=22):
    """Geometric mean of the widths of stars, their ellipticities, and their fluxes."""
    cuts = np.array(
        [image[j - half : j + half + 1, i - half : i + half + 1] for i, j in zip(x, y, strict=True)]
    )
    xx, yy, xy = adaptive_moments(cuts).T
    shape = np.hypot(xx - yy, 2.0 * xy) / (xx + yy)
    return (xx * yy - xy**2) ** 0.25, shape, cuts.sum(axis=(1, 2))


@pytest.mark.parametrize(
    ("fwhm", "e1", "e2", "beta"),
    [
        (6.0, 0.0, 0.0, 3.5),
        (5.7, 0.06, -0.04, 3.5),
        (5.0, 0.1, 0.0, 2.5),
        (4.0, 0.0, 0.15, 4.5),
        (3.0, -0.2, 0.1, 3.0),
    ],
)
def test_a_matched_star_has_the_width_of_the_target(fwhm, e1, e2, beta):
    target = wider_target(largest_width(stamps_of([6.0], 0.02).images), SETTINGS)
    stamps = stamps_of([fwhm], e1, e2, beta)
    kernels = fit_kernels(stamps, target, SETTINGS)
    star = np.zeros((161, 161))
    star[50:111, 50:111] = 1e4 * stamps.known().images[0]
    matched = match_psf(without_noise(star), (0, 0), kernels, SETTINGS)
    width, shape, _ = widths_of(matched.image, [80], [80])
    wanted, *_ = widths_of(target.image(HALF), [HALF], [HALF])
    assert width[0] / wanted[0] == pytest.approx(1.0, abs=1.5e-3)
    assert shape[0] < 1e-3
    assert kernels.at(3.0, 7.0).sum() == pytest.approx(1.0, abs=1e-10)
    assert np.nansum(matched.image) == pytest.approx(1e4, rel=1e-4)


def test_a_psf_that_varies_over_a_ccd_is_matched_everywhere():
    def shape_at(x, y):
        u, v = (x - 500) / 400, (y - 470) / 400
        return 4.2 + 0.3 * u - 0.2 * v + 0.2 * u**2, 0.08 * v, 0.06 * u * v

    at = np.meshgrid(np.linspace(100, 900, 5), np.linspace(70, 870, 5))
    x, y = (p.ravel() for p in at)
    stamps = stamps_of(*shape_at(x, y), x=x, y=y)
    target = wider_target(largest_width(stamps.images), SETTINGS)
    kernels = fit_kernels(stamps, target, SETTINGS)
    x, y = (p.ravel() for p in np.meshgrid(np.arange(60, 850, 86), np.arange(55, 810, 83)))
    image = np.zeros((870, 900))
    fwhm, e1, e2 = shape_at(x + 40, y + 13)
    for number in range(x.size):
        add_stars(image, x[number], y[number], 1e5, fwhm[number], e1=e1[number], e2=e2[number])
    matched = match_psf(without_noise(image), (40, 13), kernels, SETTINGS).image
    width, shape, _ = widths_of(matched, x, y)
    wanted, *_ = widths_of(target.image(HALF), [HALF], [HALF])
    assert np.abs(width / wanted - 1.0).max() < 5e-3
    assert np.abs(np.median(width / wanted) - 1.0) < 1e-3
    assert shape.max() < 0.01
    before, *_ = widths_of(image, x, y)
    assert np.ptp(before / wanted) > 0.15
    for position in ((0.0, 0.0), (333.0, 777.0), (5000.0, -900.0)):
        assert kernels.at(*position).sum() == pytest.approx(1.0, abs=1e-10)


def test_overlapping_patches_have_the_same_pixels_in_common():
    rng = np.random.default_rng(5)
    image = rng.normal(0.0, 1.0, (400, 640)).astype(np.float32)
    x, y = (p.ravel() for p in np.meshgrid([0.0, 300, 640], [0.0, 200, 400]))
    stamps = stamps_of(3.5 + 0.001 * x, x=x, y=y)
    kernels = fit_kernels(stamps, wider_target(2.2, SETTINGS), SETTINGS)
    whole = match_psf(without_noise(image), (90, 70), kernels, SETTINGS)
    cut = match_psf(without_noise(image[33:, 251:]), (341, 103), kernels, SETTINGS)
    common = (slice(kernels.half, -kernels.half),) * 2
    for one, other in ((cut.image, whole.image), (cut.variance, whole.variance)):
        np.testing.assert_allclose(one[common], other[33:, 251:][common], rtol=1e-6, atol=1e-6)


def test_the_variance_is_that_of_the_matched_noise():
    rng = np.random.default_rng(8)
    sigma = np.linspace(1.0, 3.0, 900)[:, None] * np.ones((900, 900))
    noise = MaskedImage(rng.normal(0.0, sigma), sigma**2, np.zeros(sigma.shape, int))
    kernels = fit_kernels(stamps_of([4.0]), wider_target(2.0, SETTINGS), SETTINGS)
    matched = match_psf(noise, (0, 0), kernels, SETTINGS)
    inside = slice(kernels.half, -kernels.half)
    scaled = (matched.image / np.sqrt(matched.variance))[inside, inside]
    # about 50,000 independent values
    assert scaled.std() == pytest.approx(1.0, abs=0.01)
    assert matched.variance[450, 450] < 0.3 * 4.0


def test_missing_pixels_are_bridged_or_spread_and_flags_go_where_their_pixels_go():
    image = np.full((200, 200), 7.0)
    image[60, 60] = np.nan
    image[130:150, 130:150] = np.nan
    pixels = without_noise(image)
    pixels.mask[60, 140] = MaskPlane.SAT
    pixels.mask[140:150, 50:60] = MaskPlane.SAT
    pixels.image[60, 140] = 7.0
    kernels = fit_kernels(stamps_of([3.0]), wider_target(3.0, SETTINGS), SETTINGS)
    matched = match_psf(pixels, (0, 0), kernels, SETTINGS)
    lost = matched.mask & MaskPlane.NO_DATA != 0
    # the others are normalised: a constant stays
    np.testing.assert_allclose(matched.image[~lost], 7.0, rtol=1e-6)
    assert np.isnan(matched.image[lost]).all()
    assert np.isinf(matched.variance[lost]).all()
    assert not lost[60, 60]
    assert matched.mask[60, 60] == MaskPlane.EDGE
    assert matched.mask[60 + kernels.half + 1, 60] == 0
    assert lost[130:150, 130:150].all()
    assert lost[:, 0].all()
    assert lost.sum() < 26**2 + 4 * 200 * kernels.half
    # a single pixel has less of the kernel than the threshold, a square has it all
    flagged = matched.mask & MaskPlane.SAT != 0
    assert not flagged[40:80, 120:160].any()
    assert flagged[140:150, 50:60].all()
    assert flagged[145, 61]
    assert not flagged[145, 60 + kernels.half]


def test_a_much_wider_psf_is_not_what_the_others_are_matched_to():
    widths = [1.5, 1.7, 1.6, 3.1, 1.9, np.nan]
    target, matched = choose_target(widths, SETTINGS)
    assert matched.tolist() == [True, True, True, False, True, False]
    assert largest_width(target.image(40)[None]) == pytest.approx(1.05 * 1.9, rel=1e-4)
    # of two or three nobody knows which is unusual
    target, matched = choose_target([1.5, 3.1], SETTINGS)
    assert matched.all()
    assert largest_width(target.image(40)[None]) == pytest.approx(1.05 * 3.1, rel=1e-4)
    with pytest.raises(InputError, match="calibrated elsewhere"):
        choose_target([np.nan], SETTINGS)


def test_the_width_of_a_psf_is_that_of_its_major_axis():
    xx, yy, xy = adaptive_moments(stamps_of([5.0], 0.2, 0.1).images)[0]
    along = np.linalg.eigvalsh([[xx, xy], [xy, yy]])
    assert largest_width(stamps_of([5.0, 4.0], 0.2, 0.1).images) == pytest.approx(along[1] ** 0.5)
    assert np.isnan(largest_width(np.full((2, 9, 9), np.nan)))


def test_the_model_of_the_sky_is_matched_to_an_exposure_that_is_worse():
    narrow, wide = wider_target(2.0, SETTINGS), wider_target(3.2, SETTINGS)
    kernels = kernel_between(narrow, wide, SETTINGS)
    sky = np.zeros((201, 201))
    sky[60:141, 60:141] = narrow.image(40)
    matched = match_psf(without_noise(sky), (0, 0), kernels, SETTINGS).image
    error = matched[80:121, 80:121] - wide.image(60)[40:81, 40:81]
    assert np.abs(error).max() < 5e-3 * wide.image(40).max()


def test_a_psf_that_is_known_at_few_positions_varies_less():
    x = np.array([0.0, 50.0, 100.0])
    stamps = stamps_of([3.0, 3.2, 3.4], x=x)
    stamps.images[1, 0, 0] = np.nan
    kernels = fit_kernels(stamps, wider_target(2.0, SETTINGS), SETTINGS)
    assert kernels.order == 0
    stamps.images[:] = np.nan
    with pytest.raises(InputError, match="Leave it out"):
        fit_kernels(stamps, wider_target(2.0, SETTINGS), SETTINGS)
