import numpy as np
import pytest
from astropy.io import fits
from scipy import interpolate
from starfield import add_stars, observed, random_field

from coaddflow.errors import CcdFailure, InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.background import (
    Background,
    _block_sums,
    _sky_pixels,
    background_from_hdu,
    background_hdu,
    estimate_background,
)
from coaddflow.settings.background import BackgroundSettings

SETTINGS = BackgroundSettings(mesh_size=64)
SKY = 500.0
SIGMA = np.sqrt(SKY + 25.0)


def blank(shape, sky=SKY, seed=1):
    return observed(np.zeros(shape), sky, np.random.default_rng(seed))


def test_sky_is_unbiased_among_stars():
    image, *_ = random_field((768, 768), 250, np.random.default_rng(2), sky=SKY, flux=(300, 3e5))
    error = (estimate_background(image, SETTINGS).model() - SKY) / SIGMA
    assert abs(error.mean()) < 0.02
    assert error.std() < 0.04


def test_stars_bias_the_sky_if_they_are_not_masked():
    image, *_ = random_field((768, 768), 250, np.random.default_rng(2), sky=SKY, flux=(300, 3e5))
    unmasked = SETTINGS.model_copy(update={"mask_passes": 0})
    error = (estimate_background(image, unmasked).model() - SKY) / SIGMA
    assert error.mean() > 0.04


def test_crowded_fields_keep_most_of_their_sky():
    # a star in every 500 pixels: its neighbourhood is masked, not the whole block around it
    image, *_ = random_field((768, 768), 1200, np.random.default_rng(8), sky=SKY, flux=(500, 3e4))
    background = estimate_background(image, SETTINGS)
    assert background.count.sum() > 0.6 * image.image.size
    assert abs(background.level - SKY) < 0.06 * SIGMA


def test_halo_of_a_bright_galaxy_is_not_taken_for_sky():
    y, x = np.mgrid[:768, :768]
    radius = np.hypot(x - 384, y - 384)
    galaxy = 4000.0 * np.exp(-radius / 25.0)
    image = observed(galaxy, SKY, np.random.default_rng(3))
    error = (estimate_background(image, SETTINGS).model() - SKY) / SIGMA
    # 110 pixels from its centre the galaxy has twice the noise of the sky
    assert abs(error[radius < 110].mean()) < 0.1
    assert abs(error[radius > 250].mean()) < 0.02


def test_gradient_reaches_the_very_corner():
    y, x = np.mgrid[:512, :384]
    sky = 400.0 + 0.5 * x + 0.3 * y
    image = MaskedImage(sky, np.full(sky.shape, 500.0), np.zeros(sky.shape, int))
    model = estimate_background(image, SETTINGS).model()
    assert np.abs(model - sky).max() < 0.1


def test_noise_is_that_of_the_pixels():
    background = estimate_background(blank((512, 512)), SETTINGS)
    assert background.noise == pytest.approx(SIGMA, rel=0.01)
    assert background.rms() == pytest.approx(SIGMA, rel=0.1)
    assert background.level == pytest.approx(SKY, abs=0.01 * SIGMA)


def test_superpixels_tell_how_well_they_are_known():
    background = estimate_background(blank((1024, 1024)), SETTINGS)
    chi = (background.mean - SKY) / np.sqrt(background.variance / background.count)
    assert 0.85 < np.sqrt(np.mean(chi**2)) < 1.15
    assert background.count.sum() == pytest.approx(1024**2, rel=0.05)
    assert np.diff(background.x_edges).tolist() == [64] * 16


def test_superpixels_without_data_are_filled_from_their_neighbours():
    x = np.arange(512) + np.zeros((512, 1))
    image = observed(np.zeros((512, 512)), SKY + 0.1 * x, np.random.default_rng(4))
    hole = np.s_[128:256, 192:320]
    image.image[hole] = 1e5
    image.mask[hole] = MaskPlane.BAD
    image.image[300:310, 300:310] = np.nan
    background = estimate_background(image, SETTINGS)
    assert (background.count == 0).any()
    assert np.abs(background.model() - (SKY + 0.1 * x)).max() < 0.5 * SIGMA


def test_a_whole_image_in_one_superpixel():
    background = estimate_background(blank((40, 30)), BackgroundSettings())
    assert background.mean.shape == (1, 1)
    assert np.ptp(background.model()) < 1e-3
    assert background.level == pytest.approx(SKY, abs=5 * SIGMA / np.sqrt(1200))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_strip_of_single_superpixels_has_a_gradient_along_it_only(axis):
    sky = 400.0 + 0.5 * np.arange(512.0) + np.zeros((48, 1))
    sky = sky if axis else sky.T
    image = MaskedImage(sky, np.full(sky.shape, 500.0), np.zeros(sky.shape, int))
    background = estimate_background(image, SETTINGS)
    assert background.mean.shape[1 - axis] == 1
    model = background.model()
    assert np.abs(model - sky).max() < 0.1
    assert np.ptp(model, axis=1 - axis).max() < 1e-3


def test_image_without_noise_is_its_own_sky():
    image = MaskedImage(np.full((128, 128), 7.0), np.ones((128, 128)), np.zeros((128, 128), int))
    assert estimate_background(image, SETTINGS).model() == pytest.approx(7.0, abs=1e-5)


def test_no_usable_pixel_is_a_failure_of_the_ccd():
    with pytest.raises(CcdFailure) as failure:
        estimate_background(MaskedImage.empty((100, 100)), SETTINGS)
    assert failure.value.reason == "no_data"


def test_mesh_survives_its_file(tmp_path):
    stars = np.zeros((300, 400))
    add_stars(stars, [100.0], [100.0], [1e5], 4.0)
    background = estimate_background(
        observed(stars, SKY, np.random.default_rng(7)), BackgroundSettings(mesh_size=50)
    )
    fits.HDUList([fits.PrimaryHDU(), background_hdu(background)]).writeto(tmp_path / "b.fits")
    with fits.open(tmp_path / "b.fits") as hdus:
        again = background_from_hdu(hdus["BACKGROUND"])
    assert np.array_equal(again.model(), background.model())
    assert np.array_equal(again.rms(), background.rms())
    assert again.count.dtype == np.int64


def test_another_extension_is_not_a_mesh():
    with pytest.raises(InputError):
        background_from_hdu(fits.ImageHDU(np.zeros((3, 4, 4))))


def random_mesh(shape, mesh, rng):
    mean, variance = rng.normal(SKY, 9.0, mesh), rng.uniform(300.0, 700.0, mesh)
    return Background(shape, mean, variance, np.full(mesh, 4000), 0.0, 1)


def plain_surface(mesh, edges, degree):
    """The interpolating spline through the centres of superpixels and one ring around them."""
    padded = np.pad(mesh, 1, mode="reflect", reflect_type="odd")
    for axis, edge in enumerate(edges):
        centres = 0.5 * (edge[:-1] + edge[1:] - 1.0)
        first, last = edge[1] - edge[0], edge[-1] - edge[-2]
        nodes = np.concatenate([[centres[0] - first], centres, [centres[-1] + last]])
        spline = interpolate.make_interp_spline(nodes, padded, k=degree, axis=axis)
        padded = spline(np.arange(edge[-1]))
    return padded


@pytest.mark.parametrize(("shape", "mesh"), [((200, 320), (3, 5)), ((130, 130), (2, 2))])
def test_compiled_surfaces_are_the_splines(shape, mesh):
    background = random_mesh(shape, mesh, np.random.default_rng(1))
    edges = background.y_edges, background.x_edges
    model = plain_surface(background.mean, edges, 3)
    assert background.model() == pytest.approx(model, rel=2e-7)
    variance = np.maximum(
        plain_surface(background.variance, edges, 1), 0.25 * background.variance.min()
    )
    assert background.rms() == pytest.approx(np.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("size", [4, 7, 16])
def test_blocks_hold_the_sum_of_their_significance(size):
    rng = np.random.default_rng(2)
    background = random_mesh((150, 210), (2, 3), rng)
    image = rng.normal(SKY, 25.0, background.shape).astype(np.float32)
    use = rng.random(image.shape) > 0.3
    image[~use] = np.nan
    total, count = _block_sums(image, use, background._model(), *background._variance(), size)
    value = np.where(use, (image - background.model()) / background.rms(), 0.0)
    starts = [np.arange(0, n, size) for n in image.shape]

    def blocks(plane):
        return np.add.reduceat(np.add.reduceat(plane, starts[1], axis=1), starts[0], axis=0)

    assert total == pytest.approx(blocks(value.astype(float)), rel=1e-4, abs=1e-3)
    assert np.array_equal(count, blocks(use.astype(int)))


def test_blocks_of_sources_and_those_beside_them_are_no_sky():
    image = blank((256, 256)).image
    background = Background(
        image.shape, np.full((2, 2), SKY), np.full((2, 2), SIGMA**2), np.ones((2, 2), int)
    )
    image[100:104, 200:204] += 20 * SIGMA
    sky = _sky_pixels(image, np.ones(image.shape, bool), background, SETTINGS)
    assert not sky[96:108, 196:208].any()
    assert sky.mean() > 0.95
