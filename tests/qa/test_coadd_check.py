"""What is measured on a coadd: offsets and fluxes of known stars, noise of empty sky."""

import numpy as np
import pytest
from scipy import ndimage
from skyscene import draw_star

from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.qa.coadd_check import check_stars, empty_sky, sky_chi, sky_covariance, sky_noise

NOISE = 3.0
SHAPE = (400, 400)


@pytest.fixture(scope="module")
def stars():
    """Positions and fluxes of stars on a grid, 60 pixels apart."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[50:360:60, 50:360:60].reshape(2, -1) + rng.uniform(-0.5, 0.5, (2, 36))
    return x, y, rng.uniform(2e4, 6e4, x.size)


def coadd_with(stars=None, noise=None):
    """Return a coadd of stars of FWHM 4 pixels with the noise that its variance plane states."""
    image = np.random.default_rng(4).normal(0.0, NOISE, SHAPE) if noise is None else noise.copy()
    for x, y, flux in zip(*(stars or [()] * 3), strict=True):
        image += draw_star(SHAPE, x, y, flux, 4.0)
    variance = np.full(SHAPE, NOISE**2, np.float32)
    return MaskedImage(image.astype(np.float32), variance, np.zeros(SHAPE, np.int32))


def test_stars_are_found_where_they_are_with_the_flux_that_they_have(stars):
    found = check_stars(coadd_with(stars), *stars)
    assert sorted(found.index) == list(range(36))
    assert found.fwhm == pytest.approx(4.0, rel=0.03)
    assert found.position_rms() < 0.02
    bias, error = found.flux_bias()
    assert abs(bias) < 0.005
    assert error < 0.002


def test_a_wrong_scale_and_a_shift_of_the_coadd_are_seen(stars):
    x, y, flux = stars
    found = check_stars(coadd_with(stars), x + 0.3, y - 0.4, flux / 1.02)
    assert found.flux_bias()[0] == pytest.approx(0.02, abs=0.005)
    assert np.mean(found.dx) == pytest.approx(-0.3, abs=0.01)
    assert np.mean(found.dy) == pytest.approx(0.4, abs=0.01)
    # of one axis: the root of (0.3^2 + 0.4^2) / 2
    assert found.position_rms() == pytest.approx(0.354, abs=0.01)


def test_empty_sky_is_measured_and_far_from_stars(stars):
    image = coadd_with(stars)
    image.mask[:, 380:] |= np.int32(MaskPlane.NO_DATA)
    empty = empty_sky(image)
    y, x = np.nonzero(empty)
    nearest = np.hypot(x[:, None] - stars[0], y[:, None] - stars[1]).min(axis=1)
    assert nearest.min() > 10.0
    assert not empty[:, 380:].any()
    assert empty.mean() > 0.4


def test_the_noise_of_empty_sky_is_that_between_the_stars(stars):
    image = coadd_with(stars)
    image.image += np.linspace(0.0, 5 * NOISE, SHAPE[1], dtype=np.float32)  # a rest of the sky
    assert sky_noise(image, mesh_size=64, grow=8) == pytest.approx(NOISE, rel=0.03)


@pytest.mark.parametrize("stated", [0.5, 1.0, 2.0])
def test_chi_compares_the_noise_with_the_variance_plane(stars, stated):
    image = coadd_with(stars)
    image.variance *= stated**2
    assert sky_chi(image) == pytest.approx(1.0 / stated, rel=0.03)


def test_covariance_is_what_neighbours_have_in_common():
    rng = np.random.default_rng(6)
    assert sky_covariance(coadd_with()) == pytest.approx(1.0, abs=0.12)
    # the mean of 3 x 3 pixels, with the noise of a pixel brought back to what is stated
    smooth = ndimage.uniform_filter(rng.normal(0.0, 3.0 * NOISE, SHAPE), 3)
    # along an axis of a block of 12: 1 + 2 (11/12 * 2/3 + 10/12 * 1/3)
    expected = (1.0 + 2.0 * (11 / 12 * 2 / 3 + 10 / 12 / 3)) ** 2
    # the highest maxima of the noise are left out as sources
    assert 0.8 < sky_covariance(coadd_with(noise=smooth)) / expected < 1.0
