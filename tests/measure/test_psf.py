import warnings

import numpy as np
import pytest
from astropy.io import fits
from starfield import add_stars, moffat_stamp, observed

from coaddflow.errors import CcdFailure, InputError
from coaddflow.image.masked_image import MaskPlane
from coaddflow.image.stamps import cut_stamps
from coaddflow.measure.detection import detect_sources
from coaddflow.measure.psf_fit import _scatter, _shared_product, fit_psf
from coaddflow.measure.psf_model import (
    PsfModel,
    adaptive_moments,
    kernels,
    psf_from_hdu,
    psf_hdu,
    render,
)
from coaddflow.measure.stars import is_isolated, select_stars
from coaddflow.settings.detection import DetectionSettings
from coaddflow.settings.psf import PsfSettings

SETTINGS = PsfSettings()
SIZE = 800
SKY = 400.0


def shape_of(x, y, fwhm):
    """The true PSF: its width changes along x, its ellipticity along x and y."""
    u, v = 2.0 * x / (SIZE - 1) - 1.0, 2.0 * y / (SIZE - 1) - 1.0
    return {"fwhm": fwhm * (1.0 + 0.05 * u), "e1": 0.04 * u, "e2": 0.03 * v}


def true_image(model, x, y, fwhm):
    reach = np.arange(-model.half, model.half + 1)
    image = moffat_stamp(reach[None, :], reach[:, None], **shape_of(x, y, fwhm))
    return image / image.sum()


def star_positions(rng, spacing=60):
    y, x = np.mgrid[40 : SIZE - 35 : spacing, 40 : SIZE - 35 : spacing].astype(float)
    return (c.ravel() + rng.uniform(-5, 5, c.size) for c in (x, y))


def observe(x, y, flux, fwhm, seed=1, varying=True):
    stars = np.zeros((SIZE, SIZE))
    shape = shape_of(x, y, fwhm) if varying else {"fwhm": fwhm}
    add_stars(stars, x, y, flux, **shape)
    image = observed(stars, SKY, np.random.default_rng(seed))
    image.image -= np.float32(SKY)
    return image


def measure(image, fwhm, settings=SETTINGS):
    detection = detect_sources(image, 1.2 * fwhm, DetectionSettings())
    stars = select_stars(detection.sources, settings)
    return detection, stars, *fit_psf(image, detection, stars, settings)


@pytest.fixture(scope="module")
def varying():
    rng = np.random.default_rng(21)
    x, y = star_positions(rng)
    image = observe(x, y, np.exp(rng.uniform(np.log(3e4), np.log(5e5), x.size)), 4.0)
    return x.size, measure(image, 4.0)


CORNERS = [(60.0, 60.0), (740.0, 60.0), (60.0, 740.0), (740.0, 740.0), (400.0, 400.0)]


def test_width_and_ellipticity_are_recovered_all_over_the_ccd(varying):
    model = varying[1][2]
    assert model.order == 2
    for x, y in CORNERS:
        truth = shape_of(x, y, 4.0)
        assert model.fwhm_at(x, y) == pytest.approx(truth["fwhm"], rel=0.015)
        e1, e2 = model.shape_at(x, y)
        assert e1 == pytest.approx(truth["e1"], abs=0.006)
        assert e2 == pytest.approx(truth["e2"], abs=0.006)


def test_model_gives_the_flux_of_a_star_without_bias(varying):
    model = varying[1][2]
    bias, residual = [], []
    for x, y in np.random.default_rng(27).uniform(30, SIZE - 30, (50, 2)):
        image, truth = model.image_at(x, y).astype(float), true_image(model, x, y, 4.0)
        bias.append((image * truth).sum() / (image**2).sum() - 1.0)
        residual.append((image - truth) / truth.max())
    assert np.abs(residual).max() < 0.02
    assert np.abs(np.mean(residual, axis=0)).max() < 0.005
    assert abs(np.mean(bias)) < 0.002
    assert np.std(bias) < 0.003


def test_quality_figures_are_right(varying):
    n_stars, (_, stars, model, quality, used) = varying
    assert quality.n_stars == used.sum() <= stars.sum() <= n_stars
    assert quality.n_stars > 0.9 * n_stars
    assert quality.fwhm == model.fwhm_at((SIZE - 1) / 2, (SIZE - 1) / 2)
    assert quality.fwhm == pytest.approx(4.0, rel=0.01)


def test_images_have_sum_one_and_the_phase_of_the_position(varying):
    model = varying[1][2]
    centred = model.image_at(300.4, 200.7)
    moved = model.image_at(300.4, 200.7, sub_pixel=True)
    assert centred.dtype == np.float32
    assert centred.shape == moved.shape == (2 * model.half + 1,) * 2
    reach = np.arange(-model.half, model.half + 1)
    window = np.exp(-(reach[:, None] ** 2 + reach**2) / 2.0 / 4.0**2)
    for image, dx, dy in ((centred, 0.0, 0.0), (moved, 0.4, -0.3)):
        assert image.sum() == pytest.approx(1.0, abs=1e-5)
        weight = image * np.roll(window, 0)
        # a window that stays put sees a part of the shift; fold it back by the known widths
        x = (weight * reach).sum() / weight.sum()
        y = (weight * reach[:, None]).sum() / weight.sum()
        gain = 4.0**2 / (4.0**2 + 1.9**2)
        assert x == pytest.approx(gain * dx, abs=0.03)
        assert y == pytest.approx(gain * dy, abs=0.03)


def test_undersampled_psf_is_right_at_all_phases():
    rng = np.random.default_rng(22)
    x, y = star_positions(rng, 55)
    image = observe(x, y, np.exp(rng.uniform(np.log(3e4), np.log(3e5), x.size)), 2.0)
    _, _, model, quality, _ = measure(image, 2.0)
    assert model.step < 0.6
    assert quality.fwhm == pytest.approx(2.0, rel=0.015)
    reach = np.arange(-model.half, model.half + 1)
    bias = []
    for x0, y0 in rng.uniform(50, 750, (40, 2)):
        dx, dy = x0 - np.rint(x0), y0 - np.rint(y0)
        truth = moffat_stamp(reach[None] - dx, reach[:, None] - dy, **shape_of(x0, y0, 2.0))
        image = model.image_at(x0, y0, sub_pixel=True).astype(float)
        bias.append((image * truth).sum() / (image**2).sum() / truth.sum() - 1.0)
    assert abs(np.mean(bias)) < 0.003
    assert np.std(bias) < 0.006


def test_binary_stars_do_not_spoil_the_model():
    rng = np.random.default_rng(23)
    x, y = star_positions(rng, 90)
    image = observe(x, y, np.full(x.size, 2e5), 4.0)
    pairs = np.zeros(image.shape)
    double = np.arange(x.size) % 6 == 0
    add_stars(pairs, x[double] + 1.5, y[double] + 1.0, 5e4, 4.0)
    image.image += pairs.astype(np.float32)
    detection = detect_sources(image, 4.8, DetectionSettings())
    assert len(detection.sources) == x.size
    everything = np.ones(x.size, dtype=bool)
    model, quality, used = fit_psf(image, detection, everything, SETTINGS)
    ids = detection.segments[np.rint(y).astype(int), np.rint(x).astype(int)]
    assert not used[ids[double] - 1].any()
    assert used[ids[~double] - 1].mean() > 0.95
    assert quality.n_stars == used.sum()
    assert model.fwhm_at(400, 400) == pytest.approx(4.0, rel=0.01)


def test_neighbours_and_bad_pixels_have_no_weight():
    rng = np.random.default_rng(24)
    x, y = star_positions(rng, 90)
    image = observe(x, y, np.full(x.size, 3e5), 4.0)
    neighbours = np.zeros(image.shape)
    add_stars(neighbours, x + 14.0, y, 1.4e4, 4.0)
    image.image += neighbours.astype(np.float32)
    row, column = np.rint(y).astype(int) - 6, np.rint(x).astype(int) - 3
    image.image[row, column] += 3e4
    image.mask[row, column] = MaskPlane.CR
    _, _, model, quality, _ = measure(image, 4.0)
    truth = true_image(model, 400.0, 400.0, 4.0)
    assert np.abs(model.image_at(400.0, 400.0) - truth).max() < 0.01 * truth.max()
    assert quality.n_stars > 0.9 * x.size


@pytest.mark.parametrize(("n_stars", "order"), [(1, 0), (4, 0), (17, 1), (40, 2)])
def test_fewer_stars_make_a_simpler_model(n_stars, order):
    x, y = (
        c[:: max(1, 64 // n_stars)][:n_stars] for c in star_positions(np.random.default_rng(25), 90)
    )
    image = observe(x, y, 2e5, 4.0, varying=False)
    settings = SETTINGS.model_copy(update={"min_stars": 1})
    _, _, model, quality, _ = measure(image, 4.0, settings)
    assert model.order == order
    assert quality.fwhm == pytest.approx(4.0, rel=0.04)


def test_too_few_stars_are_a_failure_of_the_ccd():
    image = observe(np.array([400.0, 500.0]), np.array([400.0, 500.0]), 1e5, 4.0)
    with pytest.raises(CcdFailure) as failure:
        measure(image, 4.0)
    assert failure.value.reason == "no_psf_stars"


def test_galaxies_saturated_stars_and_blends_are_no_psf_stars():
    rng = np.random.default_rng(26)
    x, y = star_positions(rng, 75)
    kind = np.arange(x.size) % 6
    fwhm = np.where(kind == 1, rng.uniform(5.5, 9.0, x.size), 4.0)
    image = observe(x, y, 2e5, fwhm, varying=False)
    close = np.zeros(image.shape)
    add_stars(close, x[kind == 2] + 9.0, y[kind == 2], 1e5, 4.0)
    image.image += close.astype(np.float32)
    saturated = np.rint(y[kind == 3]).astype(int), np.rint(x[kind == 3]).astype(int)
    image.mask[saturated] |= MaskPlane.SAT
    detection = detect_sources(image, 4.5, DetectionSettings())
    stars = select_stars(detection.sources, SETTINGS)
    ids = detection.segments[np.rint(y).astype(int), np.rint(x).astype(int)]
    chosen = stars[ids - 1]
    assert not chosen[(kind >= 1) & (kind <= 3)].any()
    assert chosen[(kind == 0) | (kind > 3)].mean() > 0.95


def test_brightest_stars_are_taken_where_there_are_many(varying):
    detection = varying[1][0]
    few = select_stars(detection.sources, SETTINGS.model_copy(update={"max_stars": 20}))
    assert few.sum() == 20
    flux = np.asarray(detection.sources["flux_isophotal"])
    many = select_stars(detection.sources, SETTINGS)
    assert flux[few].min() >= np.sort(flux[many])[-20]


def test_isolation_counts_neighbours_by_flux(varying):
    sources = varying[1][0].sources[:3].copy()
    sources["x"], sources["y"] = [100.0, 108.0, 300.0], [100.0, 100.0, 100.0]
    sources["flux_isophotal"] = [1e5, 1e3, 1e4]
    assert is_isolated(sources, 15.0, 0.05).tolist() == [True, False, True]


def test_adaptive_moments_of_a_gaussian_are_its_own():
    y, x = np.mgrid[-20:21, -20:21]
    inverse = np.linalg.inv([[5.0, 1.2], [1.2, 3.0]])
    images = [
        np.exp(-0.5 * (inverse[0, 0] * u**2 + inverse[1, 1] * v**2 + 2 * inverse[0, 1] * u * v))
        for u, v in ((x, y), (x - 0.4, y + 0.3))
    ]
    moments = adaptive_moments(np.array(images))
    assert moments == pytest.approx(np.array([[5.0, 3.0, 1.2]] * 2), rel=1e-3)


def test_stamps_are_centred_on_the_pixel_of_the_position():
    plane = np.arange(30.0).reshape(5, 6)
    stamps, inside = cut_stamps(plane, [2.4, 0.0], [1.6, 0.0], 1)
    assert np.array_equal(stamps[0], plane[1:4, 1:4])
    assert inside[0].all()
    assert inside[1].tolist() == [[False] * 3, [False, True, True], [False, True, True]]


def test_model_survives_its_file(varying, tmp_path):
    model = varying[1][2]
    fits.HDUList([fits.PrimaryHDU(), psf_hdu(model)]).writeto(tmp_path / "psf.fits", checksum=True)
    with fits.open(tmp_path / "psf.fits") as hdus:
        again = psf_from_hdu(hdus["PSF_DATA"])
    x, y = np.array([10.3, 700.9]), np.array([500.2, 3.3])
    images = model.images_at(x, y)
    assert again.images_at(x, y) == pytest.approx(images, abs=2e-7 * float(images.max()))
    assert (again.order, again.step, again.half) == (model.order, model.step, model.half)
    assert (again.center, again.scale) == (model.center, model.scale)


def test_header_says_how_to_evaluate_the_model(varying):
    """The samples follow from the planes by the rule that `psf_hdu` documents."""
    model = varying[1][2]
    hdu = psf_hdu(model)
    u, v = (
        (pixel - hdu.header[f"POLZERO{axis}"]) / hdu.header[f"POLSCAL{axis}"]
        for axis, pixel in ((1, 34.0), (2, 801.0))
    )
    terms = (1.0, u, u * u, v, u * v, v * v)
    by_hand = sum(plane * term for plane, term in zip(hdu.data["PSF_MASK"][0], terms, strict=True))
    samples = model.samples_at(33.0, 800.0)[0] / (model.basis[0].sum() * model.step**2)
    assert by_hand == pytest.approx(samples, abs=1e-6 * float(samples.max()))


def test_galsim_draws_the_model(varying):
    """GalSim interpolates samples with Lanczos 3, so that it differs by less than a percent."""
    galsim = pytest.importorskip("galsim")
    des = pytest.importorskip("galsim.des")
    model = varying[1][2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        psf = des.DES_PSFEx(psf_hdu(model)).getPSF(galsim.PositionD(701.9, 501.3))
        side = 2 * model.half + 1
        drawn = psf.drawImage(nx=side, ny=side, scale=1.0, method="no_pixel").array
    image = model.image_at(700.9, 500.3)
    assert drawn / drawn.sum() == pytest.approx(image, abs=1e-2 * float(image.max()))


@pytest.mark.parametrize("shape", [(3, 11, 13), (1, 7, 7), (1, 12, 12), (2, 11, 11)])
def test_another_extension_is_not_a_psf(shape):
    hdu = psf_hdu(PsfModel(np.ones((1, 11, 11)), 0, 1.0, 5, (0.0, 0.0), (1.0, 1.0)))
    psf_from_hdu(hdu)
    size, dim = np.prod(shape), ",".join(map(str, reversed(shape)))
    column = fits.Column("PSF_MASK", f"{size}E", dim=f"({dim})", array=np.zeros((1, *shape)))
    other = fits.BinTableHDU.from_columns([column], hdu.header, name="PSF_DATA")
    with pytest.raises(InputError, match="not a model of coaddflow"):
        psf_from_hdu(other)
    del hdu.header["PSF_SAMP"]
    with pytest.raises(InputError, match="not a model of coaddflow"):
        psf_from_hdu(hdu)


def test_constant_model_does_not_vary():
    samples = moffat_stamp(*np.meshgrid(np.arange(-12, 13), np.arange(-12, 13)), 4.0)
    model = PsfModel(samples[None], 0, 1.0, 8, (0.0, 0.0), (100.0, 100.0))
    assert np.array_equal(model.image_at(0.0, 0.0), model.image_at(90.0, -50.0))
    assert model.fwhm_at(5.0, 5.0) == pytest.approx(4.0, rel=0.01)


def plain_kernels(model, offset):
    """Lanczos-4 weights as matrices, shape (n, pixels, samples), by their formula."""
    n_samples = model.basis.shape[-1]
    pixel = np.arange(-model.half, model.half + 1) - offset[:, None]
    place = pixel / model.step + n_samples // 2
    distance = place[..., None] - np.arange(n_samples)
    near = np.floor(distance) == np.clip(np.floor(distance), -4, 3)
    weight = np.where(near, np.sinc(distance) * np.sinc(distance / 4), 0.0)
    return weight / weight.sum(axis=2, keepdims=True)


@pytest.mark.parametrize(
    ("step", "half", "k"), [(0.63, 9, 31), (1.0, 6, 13), (1.3, 7, 11), (3.0, 6, 9)]
)
def test_compiled_images_and_equations_are_those_of_the_plain_formula(step, half, k):
    rng = np.random.default_rng(5)
    n, n_terms = 4, 3
    model = PsfModel(rng.normal(size=(n_terms, k, k)), 1, step, half, (0.0, 0.0), (1.0, 1.0))
    dx, dy = np.append(rng.uniform(-0.5, 0.5, (2, n - 1)), [[0.0], [0.0]], axis=1)
    samples, images = rng.normal(size=(n, k, k)), rng.normal(size=(n, 2 * half + 1, 2 * half + 1))
    rows, columns = plain_kernels(model, dy), plain_kernels(model, dx)
    rows_t, columns_t = rows.transpose(0, 2, 1), columns.transpose(0, 2, 1)
    assert render(model, samples, dx, dy) == pytest.approx(rows @ samples @ columns_t, abs=1e-12)
    back = np.zeros((n, k, k))
    sparse = kernels(model, dy), kernels(model, dx)
    _scatter(images, *sparse, back)
    assert back == pytest.approx(rows_t @ images @ columns, abs=1e-12)
    terms, weight = rng.normal(size=(n, n_terms)), rng.random(images.shape)
    product = _shared_product(model.basis, terms, *sparse, weight, threads=1)
    same = _shared_product(model.basis, terms, *sparse, weight, threads=2)
    np.testing.assert_array_equal(same, product)
    predicted = rows @ np.tensordot(terms, model.basis, axes=1) @ columns_t
    expected = np.tensordot(terms, rows_t @ (weight * predicted) @ columns, axes=(0, 0))
    assert product == pytest.approx(expected, abs=1e-11)


def test_a_coarse_model_has_enough_samples_for_its_kernel():
    rng = np.random.default_rng(3)
    x, y = star_positions(rng, spacing=100)
    image = observe(x, y, np.full(x.size, 1e5), 4.0, varying=False)
    coarse = PsfSettings(radius=2.0, samples_per_fwhm=2.0)
    _, _, model, *_ = measure(image, 4.0, coarse)
    assert model.basis.shape[-1] >= 9
    assert model.image_at(400.0, 400.0).sum() == pytest.approx(1.0, abs=0.02)
