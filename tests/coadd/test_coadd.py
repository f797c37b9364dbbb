import dataclasses

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from skyscene import draw_star, make_ccd, make_tract, make_wcs

from coaddflow.coadd.clipping import max_outliers
from coaddflow.coadd.mean import (
    CoaddInput,
    _make_blocks,
    coadd_patch,
    effective_area,
    exposure_weight,
)
from coaddflow.coadd.product import read_coadd, write_coadd
from coaddflow.errors import InputError
from coaddflow.image.masked_image import MaskPlane
from coaddflow.settings.coadd import ClipSettings, CoaddSettings
from coaddflow.settings.warp import WarpSettings
from coaddflow.warp.ccds import CcdImage, warp_patches
from coaddflow.warp.files import Warp
from coaddflow.warp.kernels import covariance_factor

SETTINGS = CoaddSettings()
UNCLIPPED = CoaddSettings(clip=ClipSettings(enabled=False))
BOX = (100, 200, 220, 300)
SHAPE = (100, 120)
SCALE = 0.2


def make_inputs(images, sigma=10.0, seeing=None, box=BOX, weights=None):
    """Inputs that cover a box, with noise of the given sigma already in them."""
    sigma = np.broadcast_to(sigma, len(images))
    seeing = np.full(len(images), np.nan) if seeing is None else seeing
    return [
        CoaddInput(
            f"e{k:03d}",
            Warp(box, make_ccd(image, sigma[k] ** 2), (1,)),
            weight=sigma[k] ** -2.0 if weights is None else weights[k],
            seeing=seeing[k],
        )
        for k, image in enumerate(images)
    ]


def noisy(rng, n, sigma=10.0, signal=0.0, shape=SHAPE):
    return [signal + rng.normal(0.0, sigma, shape) for _ in range(n)]


def coadd(inputs, settings=SETTINGS, **keywords):
    return coadd_patch(inputs, BOX, settings, pixel_scale=SCALE, **keywords)


def test_mean_is_weighted_by_exposure_and_the_variance_is_right():
    rng = np.random.default_rng(1)
    sigma = np.array([5.0, 10.0, 20.0])
    inputs = make_inputs([rng.normal(30.0, s, SHAPE) for s in sigma], sigma)
    result = coadd(inputs)
    weights = sigma**-2.0
    expected = sum(w * i.reader.masked_image.image for w, i in zip(weights, inputs, strict=True))
    used = result.n_inputs == 3
    assert used.mean() > 0.999
    np.testing.assert_allclose(
        result.masked_image.image[used], (expected / weights.sum())[used], rtol=1e-5
    )
    np.testing.assert_allclose(result.masked_image.variance[used], 1.0 / weights.sum(), rtol=1e-5)
    chi = (result.masked_image.image - 30.0) / np.sqrt(result.masked_image.variance)
    assert np.std(chi) == pytest.approx(1.0, abs=0.02)


def test_weights_do_not_depend_on_the_flux_of_the_pixel():
    # the photon noise of a star is in the variance plane, but not in the weights
    star = draw_star(SHAPE, 60.0, 50.0, 1e5, 4.0)
    inputs = make_inputs([star, 1.2 * star], seeing=[0.8, 0.8])
    for k, one in enumerate(inputs):
        one.reader.masked_image.variance[:] += star * (1 + 9 * k)
    result = coadd(inputs, UNCLIPPED)
    np.testing.assert_allclose(result.masked_image.image, 1.1 * star, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(result.masked_image.variance, (200.0 + 11.0 * star) / 4.0, rtol=1e-5)


@pytest.mark.parametrize("n", [3, 4, 8])
def test_cosmic_ray_in_one_epoch_is_gone(n):
    rng = np.random.default_rng(2)
    images = noisy(rng, n)
    images[1][40, 50] += 400.0
    images[1][41, 51] += 300.0
    images[2 % n][80, 20] += 150.0
    result = coadd(make_inputs(images, seeing=[0.8] * n))
    for y, x, level in ((40, 50, 1), (41, 51, 1), (80, 20, 2)):
        assert result.n_inputs[y, x] == n - 1
        assert result.masked_image.mask[y, x] & MaskPlane.CLIPPED
        good = [image[y, x] for k, image in enumerate(images) if k != level]
        assert result.masked_image.image[y, x] == pytest.approx(np.mean(good), rel=1e-5)
        assert result.masked_image.variance[y, x] == pytest.approx(100.0 / (n - 1), rel=1e-5)
    assert 3 <= np.sum(result.inputs["n_clipped"]) < 30
    # nothing else is touched
    assert np.count_nonzero(result.masked_image.has_any(MaskPlane.CLIPPED)) < 30


def test_rim_of_an_outlier_goes_with_it():
    images = [np.zeros(SHAPE) for _ in range(5)]
    images[2][40, 50] = 400.0
    # 3.5 sigma: too little for an outlier of its own, enough beside one
    images[2][40, 52] = images[2][60, 60] = images[1][41, 50] = 35.0
    images[2][41, 51] = 15.0
    result = coadd(make_inputs(images, seeing=[0.8] * 5))
    assert list(map(tuple, np.argwhere(result.n_inputs < 5))) == [(40, 50), (40, 52)]


def test_two_epochs_do_not_tell_which_one_is_right():
    images = noisy(np.random.default_rng(2), 2)
    images[1][40, 50] += 400.0
    result = coadd(make_inputs(images))
    assert np.all(result.n_inputs == 2)


def test_allowed_outliers_follow_the_number_of_epochs():
    expected = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 33: 2, 34: 3, 100: 5}
    assert {n: max_outliers(n) for n in expected} == expected


def test_what_varies_in_more_epochs_is_kept():
    rng = np.random.default_rng(3)
    star = draw_star(SHAPE, 60.0, 50.0, 2e4, 4.0)
    images = [image + star * (k < 3) for k, image in enumerate(noisy(rng, 8))]
    result = coadd(make_inputs(images, seeing=[0.8] * 8))
    core = (slice(48, 53), slice(58, 63))
    assert np.all(result.n_inputs[core] == 8)
    images = [image + star * (k < 2) for k, image in enumerate(noisy(rng, 8))]
    result = coadd(make_inputs(images, seeing=[0.8] * 8))
    assert np.all(result.n_inputs[core] == 6)


@pytest.mark.parametrize("flux", [3e3, 3e4, 1e6])
@pytest.mark.parametrize("n", [3, 4, 6, 12])
@pytest.mark.parametrize("profile", ["gauss", "moffat"])
def test_star_under_mixed_seeing_is_not_clipped(flux, n, profile):
    rng = np.random.default_rng(4)
    seeing = {
        3: [0.6, 1.2, 1.2],
        4: [0.6, 1.2, 1.2, 1.1],
        6: [1.2, 0.6, 0.6, 0.7, 0.6, 0.6],
        12: np.linspace(0.6, 1.2, 12),
    }[n]
    images = []
    for fwhm, sky in zip(np.array(seeing) / SCALE, noisy(rng, n), strict=True):
        # positions scatter by the error of the astrometry
        x, y = 60.0 + rng.normal(0.0, 0.1), 50.0 + rng.normal(0.0, 0.1)
        if profile == "gauss":
            star = draw_star(SHAPE, x, y, flux, fwhm)
        else:
            j, i = np.mgrid[: SHAPE[0], : SHAPE[1]]
            alpha = fwhm / (2.0 * np.sqrt(2.0 ** (1.0 / 3.0) - 1.0))
            star = (1.0 + ((i - x) ** 2 + (j - y) ** 2) / alpha**2) ** -3.0
            star *= flux * 2.0 / (np.pi * alpha**2)
        images.append(sky + star)
    result = coadd(make_inputs(images, seeing=seeing))
    j, i = np.mgrid[: SHAPE[0], : SHAPE[1]]
    near = np.hypot(i - 60.0, j - 50.0) < 25
    clipped = result.masked_image.has_any(MaskPlane.CLIPPED)
    assert not clipped[near].any()
    # and where the seeing is not known
    result = coadd(make_inputs(images))
    if n == 12:
        assert not result.masked_image.has_any(MaskPlane.CLIPPED)[near].any()


def test_cosmic_ray_beside_a_star_is_found():
    rng = np.random.default_rng(5)
    seeing = [0.7, 0.9, 0.8, 0.8]
    images = [
        sky + draw_star(SHAPE, 60.0, 50.0, 3e4, fwhm / SCALE)
        for sky, fwhm in zip(noisy(rng, 4), seeing, strict=True)
    ]
    images[2][50, 66] += 700.0
    images[0][45, 54] += 1200.0
    result = coadd(make_inputs(images, seeing=seeing))
    assert list(np.argwhere(result.n_inputs == 3)[:, 0]).count(50) >= 1
    assert result.n_inputs[50, 66] == 3 and result.n_inputs[45, 54] == 3
    assert result.n_inputs[50, 60] == 4


def test_faint_trail_of_a_satellite_is_gone():
    # 1.5 sigma per pixel, 9 pixels wide: not seen in any single pixel
    rng = np.random.default_rng(6)
    images = noisy(rng, 5)
    j, i = np.mgrid[: SHAPE[0], : SHAPE[1]]
    trail = np.abs(j - 0.3 * i - 30.0) < 4.5
    images[3][trail] += 22.0
    result = coadd(make_inputs(images, seeing=[0.9] * 5), covariance=1.0)
    core = np.abs(j - 0.3 * i - 30.0) < 3.0
    left = np.mean(result.masked_image.image[core])
    without = np.mean(np.mean([image for k, image in enumerate(images) if k != 3], axis=0)[core])
    assert left - without < 0.35 * 22.0 / 5.0
    off = coadd(
        make_inputs(images, seeing=[0.9] * 5),
        CoaddSettings(clip=ClipSettings(smooth_sigma=None)),
        covariance=1.0,
    )
    assert np.mean(off.masked_image.image[core]) - without > 0.9 * 22.0 / 5.0


def test_bright_trail_and_moving_object_are_gone():
    rng = np.random.default_rng(7)
    images = noisy(rng, 6)
    j, i = np.mgrid[: SHAPE[0], : SHAPE[1]]
    distance = np.abs(j - 0.5 * i - 10.0) / np.hypot(1.0, 0.5)
    images[4] += 300.0 * np.exp(-0.5 * (distance / 2.0) ** 2)
    for k in range(6):
        images[k] += draw_star(SHAPE, 15.0 + 18.0 * k, 80.0, 8000.0, 4.0)
    result = coadd(make_inputs(images, seeing=[0.8] * 6))
    residual = result.masked_image.image
    assert np.abs(np.mean(residual[distance < 6.0])) < 2.0
    assert np.mean(np.mean(images, axis=0)[distance < 6.0]) > 15.0
    for k in range(6):
        place = (slice(74, 87), slice(9 + 18 * k, 22 + 18 * k))
        assert np.sum(residual[place]) < 0.08 * 8000.0 / 6.0 + 4.0 * 13.0 * 10.0 / np.sqrt(6.0)


def test_clean_noise_is_hardly_clipped_and_not_biased():
    rng = np.random.default_rng(8)
    images = noisy(rng, 5, shape=(100, 120))
    result = coadd(make_inputs(images), covariance=1.0)
    assert np.mean(result.n_inputs < 5) < 2e-3
    assert np.mean(result.masked_image.image) == pytest.approx(0.0, abs=4 * 10 / np.sqrt(5 * 12000))


def test_bad_planes_are_left_out_and_other_bits_are_kept():
    images = [np.full(SHAPE, 10.0), np.full(SHAPE, 40.0)]
    inputs = make_inputs(images, seeing=[0.8, 0.8])
    mask = inputs[1].reader.masked_image.mask
    mask[10, 10] = MaskPlane.CR | MaskPlane.INTRP
    mask[10, 20] = MaskPlane.BAD
    mask[10, 30] = MaskPlane.EDGE
    mask[10, 40] = MaskPlane.DETECTED
    result = coadd(inputs)
    assert list(result.masked_image.image[10, 10:50:10]) == [10.0, 10.0, 10.0, 25.0]
    assert list(result.n_inputs[10, 10:50:10]) == [1, 1, 1, 2]
    # no PSF of these exposures is known
    mask = result.masked_image.mask[10, 10:50:10] & ~int(MaskPlane.INEXACT_PSF)
    assert list(mask) == [0, 0, 0, int(MaskPlane.DETECTED)]


def test_core_saturated_everywhere_is_filled_with_a_large_variance():
    inputs = make_inputs([np.full(SHAPE, 5e4), np.full(SHAPE, 6e4)])
    for one in inputs:
        one.reader.masked_image.mask[20:23, 20:23] = MaskPlane.SAT
        one.reader.masked_image.mask[30, 30] = MaskPlane.EDGE
    inputs[0].reader.masked_image.mask[40, 40] = MaskPlane.SAT
    result = coadd(inputs)
    filled = result.masked_image
    assert filled.image[21, 21] == pytest.approx(5.5e4)
    assert filled.mask[21, 21] == MaskPlane.SAT | MaskPlane.INEXACT_PSF
    assert np.sqrt(filled.variance[21, 21]) == pytest.approx(5.5e4, rel=1e-3)
    assert np.isnan(filled.image[30, 30]) and filled.mask[30, 30] == MaskPlane.NO_DATA
    assert filled.image[40, 40] == pytest.approx(6e4)
    assert filled.mask[40, 40] == MaskPlane.INEXACT_PSF
    sets = result.sets
    for pixel, used, is_filled in (
        ((21, 21), [True, True], True),
        ((30, 30), [False, False], False),
        ((40, 40), [False, True], False),
        ((5, 5), [True, True], False),
    ):
        number = sets.index[pixel]
        assert (list(sets.used(number)), sets.filled[number]) == (used, is_filled)


def test_no_value_that_is_not_finite_comes_through():
    images = noisy(np.random.default_rng(9), 3)
    images[0][50, 50] = np.nan
    images[1][60, 60] = np.inf
    inputs = make_inputs(images)
    inputs[2].reader.masked_image.variance[70, 70] = 0.0
    for one in inputs:
        one.reader.masked_image.image[80, 80] = np.nan
    result = coadd(inputs)
    assert result.n_inputs[50, 50] == result.n_inputs[60, 60] == result.n_inputs[70, 70] == 2
    assert result.masked_image.mask[80, 80] == MaskPlane.NO_DATA
    assert np.isinf(result.masked_image.variance[80, 80])
    assert np.count_nonzero(~np.isfinite(result.masked_image.image)) == 1


def scattered_inputs(n=7):
    """Inputs on trimmed boxes of all sorts, with cosmic rays and flags."""
    rng = np.random.default_rng(10)
    inputs = []
    for k in range(n):
        x0, y0 = BOX[0] + 3 * k, BOX[1] + int(rng.integers(0, 20))
        x1, y1 = BOX[2] - int(rng.integers(0, 30)), BOX[3] - 2 * k
        image = rng.normal(0.0, 10.0, (y1 - y0, x1 - x0))
        image[rng.random(image.shape) < 0.01] += 300.0
        warp = make_ccd(image)
        warp.mask[rng.random(image.shape) < 0.02] = MaskPlane.CR
        inputs.append(
            CoaddInput(
                f"e{k}", Warp((x0, y0, x1, y1), warp), 0.01 + 0.001 * k, seeing=0.7 + 0.05 * k
            )
        )
    return inputs


def assert_same(one, other):
    for name in ("image", "variance", "mask"):
        np.testing.assert_array_equal(
            getattr(one.masked_image, name), getattr(other.masked_image, name)
        )
    np.testing.assert_array_equal(one.n_inputs, other.n_inputs)
    for name in one.inputs.colnames:
        np.testing.assert_array_equal(one.inputs[name], other.inputs[name])


def test_result_does_not_depend_on_order_threads_or_memory():
    inputs = scattered_inputs()
    one = coadd(inputs)
    assert np.sum(one.inputs["n_clipped"]) > 300
    assert_same(one, coadd(inputs[::-1]))
    assert_same(one, coadd(inputs, threads=2))
    assert_same(one, coadd(inputs, SETTINGS.model_copy(update={"memory_mb": 0})))


def test_exposures_elsewhere_do_not_change_what_is_clipped():
    """Which of them are in a block of rows depends on the memory."""
    rng = np.random.default_rng(21)
    # light that is an outlier in means of pixels, unless far sharper stars were expected there
    images = [100.0 + image for image in noisy(rng, 5)]
    images[4][4:12, 40:48] += 115.0
    inputs = make_inputs(images, seeing=[1.0, 1.0, 1.0, 1.0, 0.8])
    blurred = make_inputs(noisy(rng, 8, shape=(4, 120)), seeing=[2.0] * 8, box=(100, 296, 220, 300))
    others = [dataclasses.replace(one, exposure=f"f{k}") for k, one in enumerate(blurred)]
    settings = CoaddSettings(clip=ClipSettings(wings=0.0))
    large, small = (
        coadd([*inputs, *others], settings.model_copy(update={"memory_mb": mb})) for mb in (512, 0)
    )
    assert_same(large, small)


def test_blocks_bound_the_memory_whatever_the_number_of_inputs():
    read = []

    class Watched(Warp):
        def read_box(self, box):
            read.append((box[2] - box[0], box[3] - box[1]))
            return super().read_box(box)

    inputs = [
        CoaddInput(one.exposure, Watched(one.reader.box, one.reader.masked_image), one.weight)
        for one in scattered_inputs()
    ]
    coadd(inputs, SETTINGS.model_copy(update={"memory_mb": 0}))
    # 32 pixels and a halo of 32 on both sides
    assert max(max(shape) for shape in read) <= 96
    for n_inputs in (1, 10, 100, 1000):
        box = (1000, 3, 5201, 4203)
        blocks = _make_blocks(n_inputs, box, 32, 512, 1)
        pixels = [(x1 - x0 + 64) * (y1 - y0 + 64) for x0, y0, x1, y1 in blocks]
        if n_inputs > 1:
            assert max(pixels) * n_inputs * 13 < 1.1 * 512e6
        assert sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in blocks) == 4201 * 4200


def test_counts_say_what_each_exposure_gave():
    inputs = scattered_inputs()
    result = coadd(inputs)
    assert np.sum(result.inputs["n_used"]) == np.sum(result.n_inputs)
    assert list(result.inputs["exposure"]) == [f"e{k}" for k in range(7)]
    bad = [np.count_nonzero(one.reader.masked_image.mask) for one in inputs]
    total = [one.reader.masked_image.image.size for one in inputs]
    np.testing.assert_array_equal(
        result.inputs["n_used"] + result.inputs["n_clipped"], np.subtract(total, bad)
    )


def test_overlapping_patches_agree_to_the_bit():
    tract = make_tract(400, patches=2, border=40)
    rng = np.random.default_rng(11)
    shape = (300, 300)
    exposures = {}
    for k in range(4):
        image = rng.normal(0.0, 10.0, shape) + draw_star(shape, 150.0, 152.0, 1e5, 4.0)
        image[rng.random(shape) < 0.003] += 500.0
        wcs = make_wcs(shape, SCALE, rotation=3.0 * k, shift=(2.3 * k, -1.7 * k))
        exposures[f"e{k}"] = CcdImage(make_ccd(image), wcs, 1.0)
    patches = ("0_0", "1_0", "0_1", "1_1")
    warps = {
        e: dict(
            warp_patches(tract, dict.fromkeys(patches, (0,)), {0: one}.__getitem__, WarpSettings())
        )
        for e, one in exposures.items()
    }
    seen = np.full((400, 400), -1.0, np.float32)
    n_shared = 0
    for patch in patches:
        inputs = [CoaddInput(e, warps[e][patch], 0.01, seeing=0.8) for e in exposures]
        box = tract.patch(patch).outer_box
        result = coadd_patch(inputs, box, SETTINGS, pixel_scale=SCALE)
        assert np.sum(result.inputs["n_clipped"]) > 100
        # the rule for outliers looks around; beyond the patch it sees nothing
        x0, y0, x1, y1 = (b + d for b, d in zip(box, (24, 24, -24, -24), strict=True))
        part = seen[y0:y1, x0:x1]
        mine = result.masked_image.image[24:-24, 24:-24]
        both = part != -1.0
        n_shared += both.sum()
        np.testing.assert_array_equal(mine[both], part[both])
        part[:] = mine
    assert n_shared > 8000


def test_noise_of_a_coadd_of_warps_is_predicted():
    tract = make_tract(400)
    rng = np.random.default_rng(12)
    shape = (300, 300)
    inputs = []
    for k in range(5):
        ccd = CcdImage(
            make_ccd(rng.normal(0.0, 10.0, shape)),
            make_wcs(shape, SCALE, rotation=7.0 + 20.0 * k, shift=(0.37 * k, 0.21 * k)),
            1.0,
        )
        warp = dict(warp_patches(tract, {"0_0": (0,)}, {0: ccd}.__getitem__, WarpSettings()))["0_0"]
        inputs.append(CoaddInput(f"e{k}", warp, 0.01, seeing=0.8))
    result = coadd_patch(inputs, (0, 0, 400, 400), SETTINGS, pixel_scale=SCALE)
    full = result.n_inputs == 5
    image, variance = result.masked_image.image, result.masked_image.variance
    assert np.std(image[full] / np.sqrt(variance[full])) == pytest.approx(1.0, abs=0.02)
    assert np.mean(variance[full]) == pytest.approx(20.0 * covariance_factor("lanczos3"), rel=0.01)


def test_coadd_of_nothing():
    result = coadd([])
    assert np.all(result.masked_image.mask == MaskPlane.NO_DATA)
    assert np.all(np.isnan(result.masked_image.image)) and not result.n_inputs.any()
    assert len(result.inputs) == 0


@pytest.mark.parametrize("n", [0, 3])
def test_product_on_disk(tmp_path, n):
    tract = make_tract(400)
    images = noisy(np.random.default_rng(13), n)
    if n:
        images[0][:30] = np.nan
    result = coadd(make_inputs(images))
    for compression in ("none", "lossless", "quantized"):
        path = tmp_path / f"{compression}.fits"
        write_coadd(path, result, tract, compression=compression)
        back, header = read_coadd(path)
        assert back.box == BOX and len(back.inputs) == n
        if compression != "quantized":
            assert_same(back, result)
        x, y = tract.sky_to_pixel(*WCS(header).all_pix2world(0.0, 0.0, 0))
        np.testing.assert_allclose([x, y], BOX[:2], atol=1e-6)
        assert header["BUNIT"] == "nJy" and header["PHOTZP"] == 31.4
        with fits.open(path, checksum=True) as hdus:
            assert [hdu.name for hdu in hdus] == [
                "PRIMARY",
                "IMAGE",
                "MASK",
                "VARIANCE",
                "NINPUTS",
                "INPUTS",
            ]
    with pytest.raises(InputError, match="nothing"):
        read_coadd(tmp_path / "nothing.fits")


def test_many_epochs():
    rng = np.random.default_rng(14)
    box = (0, 0, 24, 36)
    images = [rng.normal(0.0, 10.0, (36, 24)) for _ in range(500)]
    for k in range(3):
        images[k][10, 10] += 500.0
    result = coadd_patch(make_inputs(images, box=box, seeing=[0.8] * 500), box, SETTINGS)
    assert result.n_inputs[10, 10] == 497
    chi = result.masked_image.image / np.sqrt(result.masked_image.variance)
    assert np.std(chi) == pytest.approx(1.0, abs=0.1)


def test_weight_of_an_exposure_is_its_inverse_sky_variance():
    # 10 electrons of noise at 10 nJy per electron
    assert exposure_weight([10.0, 12.0, 9.0], [28.9, 28.9, 28.9]) == pytest.approx(1e-4)
    assert exposure_weight([10.0, np.nan], [28.9, 28.9]) == pytest.approx(1e-4)
    with pytest.raises(InputError, match="no CCD"):
        exposure_weight([np.nan], [28.9])


def test_weight_of_an_exposure_counts_pixels_of_the_coadd_and_the_area_of_its_psf():
    # twice the side is four times the area, and twice the noise of a pixel
    assert exposure_weight([10.0], [28.9], 2.0) == pytest.approx(0.25e-4)
    assert exposure_weight([10.0], [28.9], [np.nan]) == pytest.approx(1e-4)
    assert effective_area(1.0, 0.2) == pytest.approx(4 * np.pi * (5.0 / 2.35482) ** 2, rel=1e-4)
    assert exposure_weight([10.0], [28.9], area=50.0) == pytest.approx(2e-6)


@pytest.mark.parametrize("flux", [2e3, 1e6])
def test_one_exposure_of_bad_seeing_costs_no_depth_and_no_flux(flux):
    """Three of 0.9 to 1.0 arcsec and one of 4.7."""
    seeing, sigma = np.array([0.9, 0.95, 1.0, 4.7]), np.array([10.0, 11.0, 9.0, 12.0])
    box, shape = (0, 0, 200, 200), (200, 200)
    stars = [draw_star(shape, 99.6, 100.3, 1.0, one / SCALE) for one in seeing]
    rng = np.random.default_rng(3)
    noise = [rng.normal(0.0, s, shape) for s in sigma]
    weights = {
        kind: [
            exposure_weight([s], [31.4], area=float(effective_area(fwhm, SCALE)) ** (kind != "sky"))
            for s, fwhm in zip(sigma, seeing, strict=True)
        ]
        for kind in ("sky", "point_source")
    }
    ideal = sum((star**2).sum() / s**2 for star, s in zip(stars, sigma, strict=True)) ** 0.5
    near = np.hypot(*(np.mgrid[:200, :200].T - (100.3, 99.6)).T) * SCALE < 3.0
    gain, lost = {}, {}
    for kind, chosen in weights.items():
        share = np.array(chosen) / np.sum(chosen)
        psf = np.tensordot(share, stars, 1)
        gain[kind] = np.sqrt((psf**2).sum() / np.sum(share**2 * sigma**2)) / ideal
        planes = [
            coadd_patch(
                make_inputs(images, sigma, seeing, box, chosen), box, SETTINGS, pixel_scale=SCALE
            ).masked_image.image
            for images in ([flux * p + n for p, n in zip(stars, noise, strict=True)], noise)
        ]
        lost[kind] = 1.0 - (planes[0] - planes[1])[near].sum() / flux
    assert gain["sky"] < 0.92
    assert gain["point_source"] > 0.99
    # the aperture misses the wings of the fourth exposure, in proportion to its weight
    assert lost["sky"] > 0.05
    assert abs(lost["point_source"]) < 0.004


def test_unusable_inputs_are_named():
    good = make_inputs(noisy(np.random.default_rng(1), 2))
    with pytest.raises(InputError, match="e000 has no usable weight"):
        coadd(make_inputs(noisy(np.random.default_rng(1), 1), weights=[0.0]))
    with pytest.raises(InputError, match="given twice"):
        coadd([good[0], good[0]])
