"""The steps of a CCD give the same bits with any number of threads."""

import dataclasses

import numpy as np
import pytest
from astropy.table import Table
from starfield import add_stars

from coaddflow.calexp.ccd import detrend_ccd, measure_ccd, remove_cosmic_rays
from coaddflow.compiled import FUNCTIONS
from coaddflow.image.clipped import clipped_mesh
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.medians import running_median
from coaddflow.instrument.camera import Detector
from coaddflow.instrument.raw import RawCcd
from coaddflow.isr.cosmic_rays import find_cosmic_rays
from coaddflow.isr.crosstalk import VictimNoise, subtract_ghosts
from coaddflow.isr.detrend import CcdCalibs
from coaddflow.isr.lacosmic import laplacian_outliers
from coaddflow.measure.background import _block_sums, estimate_background
from coaddflow.measure.detection import detect_sources, measure_seeing, unusable_pixels
from coaddflow.measure.extraction import _all_runs_above
from coaddflow.measure.psf_fit import fit_psf
from coaddflow.measure.stars import select_stars
from coaddflow.settings import Settings

NX, NY, GAIN = 420, 470, 1.5
SETTINGS = Settings(background={"mesh_size": 40}, cosmics={"iterations": 3})
THREADS = [2, 3]


def same(one, other):
    """Fail unless two results have the same bits: arrays, tables, and what holds them."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    elif isinstance(one, Table):
        assert one.colnames == other.colnames
        for name in one.colnames:
            np.testing.assert_array_equal(one[name], other[name])
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        assert one == other


def make_detector():
    """A CCD with two amplifiers, one of them turned, and crosstalk between them."""
    half = NX // 2
    amplifier = {
        "data": [0, 0, half, NY],
        "overscan": [half, 0, half + 20, NY],
        "gain": GAIN,
        "read_noise": 5.0,
        "saturation": 60000.0,
    }
    turned = {"flip_x": True, "flip_y": True}
    return Detector.model_validate(
        {
            "id": 1,
            "name": "S1",
            "extension": "S1",
            "center": [0.0, 0.0],
            "size": [NX, NY],
            "crosstalk": [[0.0, 2e-3], [3e-3, 0.0]],
            "defects": [[99, 0, 100, NY], [200, 200, 207, 212]],
            "amplifiers": [
                {**amplifier, "name": "A", "target": [0, 0, half, NY]},
                {**amplifier, "name": "B", "target": [half, 0, NX, NY], **turned},
            ],
        }
    )


def make_raw():
    """Stars, one of them saturated, and cosmic rays."""
    rng = np.random.default_rng(3)
    light = np.full((NY, NX), 600.0)
    x, y = rng.uniform(15, NX - 15, 160), rng.uniform(15, NY - 15, 160)
    flux = np.exp(rng.uniform(np.log(3e3), np.log(4e5), 160))
    flux[0] = 1e7
    add_stars(light, x, y, flux, 4.0)
    for row, column in zip(rng.integers(0, NY, 60), rng.integers(0, NX - 5, 60), strict=True):
        light[row, column : column + 4] += 3000.0
    counts = rng.poisson(light) / GAIN + rng.normal(1000.0, 5.0 / GAIN, light.shape)
    arrays = []
    for half in (counts[:, : NX // 2], counts[::-1, : NX // 2 - 1 : -1]):
        overscan = rng.normal(1000.0, 5.0 / GAIN, (NY, 20))
        arrays.append(np.clip(np.hstack([half, overscan]), 0, 65535).astype(np.uint16))
    return RawCcd(make_detector(), tuple(arrays), None, None, None)


def make_calibs():
    """Calibration frames with some bad pixels."""
    rng = np.random.default_rng(4)

    def frame(level, scatter):
        mask = np.where(rng.random((NY, NX)) < 1e-3, int(MaskPlane.BAD), 0)
        pixels = rng.normal(level, scatter, (NY, NX))
        return MaskedImage(pixels, np.full((NY, NX), scatter**2 / 9), mask)

    return CcdCalibs(frame(0.0, 0.5), frame(0.02, 0.01), frame(1.0, 0.01), frame(0.0, 1.0))


def detrended(threads=1):
    return detrend_ccd(make_raw(), make_calibs(), 30.0, SETTINGS, threads).masked_image


@pytest.fixture(scope="module")
def without_sky():
    """A CCD without cosmic rays and sky, made by one thread."""
    image = detrended()
    remove_cosmic_rays(image, SETTINGS)
    model = estimate_background(image, SETTINGS.background).model()
    return MaskedImage(image.image - model, image.variance, image.mask)


@pytest.mark.parametrize("threads", THREADS)
def test_a_ccd_from_raw_counts_to_sources(threads):
    def whole(threads):
        image = detrended(threads)
        remove_cosmic_rays(image, SETTINGS, threads)
        return image, measure_ccd(image, SETTINGS, threads)

    one_thread = whole(1)
    compiled = {one: len(one.signatures) for one in FUNCTIONS if one.signatures}
    image, measured = whole(threads)
    assert {one: len(one.signatures) for one in compiled} == compiled
    assert len(measured.sources) > 80
    assert measured.psf_quality.n_stars > 20
    assert image.has_any(MaskPlane.CR).any() and image.has_any(MaskPlane.SAT).any()
    same((image, measured), one_thread)


@pytest.mark.parametrize("threads", THREADS)
def test_detrending(threads):
    same(detrended(threads), detrended())


@pytest.mark.parametrize("threads", THREADS)
def test_crosstalk_of_amplifiers_of_two_sizes(threads):
    def corrected(threads):
        rng = np.random.default_rng(5)
        counts = [rng.normal(100, 9, shape).astype(np.float32) for shape in ((310, 40), (190, 70))]
        sources, noise = [[(1e-2, 1)], [(3e-2, 0)]], [VictimNoise(1.0, 0.1)] * 2
        full = [np.array([0, 7000]), np.array([170 * 70])]
        return counts, subtract_ghosts(counts, sources, noise, full, 0.02, threads)

    same(corrected(threads), corrected(1))


@pytest.mark.parametrize("threads", THREADS)
def test_cosmic_rays(threads):
    image = detrended()
    options = 5.0, 0.3, 3.0, SETTINGS.cosmics.iterations
    ignored = image.has_any(MaskPlane.SAT)
    planes = np.nan_to_num(image.image), np.nan_to_num(image.variance, posinf=1.0), ignored
    candidates = laplacian_outliers(*planes, *options)
    assert candidates.any()
    same(laplacian_outliers(*planes, *options, threads), candidates)
    found = find_cosmic_rays(image, SETTINGS.cosmics)
    assert found.any()
    same(find_cosmic_rays(image, SETTINGS.cosmics, threads), found)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("axis", [0, 1])
def test_running_medians(threads, axis):
    image = np.random.default_rng(1).normal(0, 1, (201, 90)).astype(np.float32)
    same(running_median(image, 5, axis, threads), running_median(image, 5, axis))


@pytest.mark.parametrize("threads", THREADS)
def test_sky(threads, without_sky):
    image, sky = without_sky.image, np.isfinite(without_sky.image)
    edges = np.arange(0, NY, 52), np.arange(0, NX, 60)
    same(clipped_mesh(image, sky, *edges, 3.0, threads), clipped_mesh(image, sky, *edges, 3.0))
    background = estimate_background(without_sky, SETTINGS.background)
    same(estimate_background(without_sky, SETTINGS.background, threads), background)
    same(background.model(threads), background.model())
    surfaces = background._model(), *background._variance()
    for size in (4, 32):
        one_thread = _block_sums(image, sky, *surfaces, size)
        same(_block_sums(image, sky, *surfaces, size, threads), one_thread)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("half", [1, 4])
def test_places_above_a_threshold(threads, half, without_sky):
    profile = np.exp(-0.5 * (np.arange(-half, half + 1) / 1.7) ** 2)
    planes = np.nan_to_num(without_sky.image), np.ascontiguousarray(without_sky.variance)
    one_thread = _all_runs_above(*planes, profile, 5.0)
    assert one_thread[0].shape[1] > 1000
    rows, row_start = _all_runs_above(*planes, profile, 5.0, threads)
    same(rows[:3], one_thread[0][:3])  # numbers of groups come later
    same(row_start, one_thread[1])


@pytest.mark.parametrize("threads", THREADS)
def test_sources_and_psf(threads, without_sky):
    same(unusable_pixels(without_sky, threads), unusable_pixels(without_sky))
    settings = SETTINGS.detection
    fwhm = measure_seeing(without_sky, settings)
    assert measure_seeing(without_sky, settings, threads) == fwhm
    detection = detect_sources(without_sky, fwhm, settings)
    same(detect_sources(without_sky, fwhm, settings, threads), detection)
    stars = select_stars(detection.sources, SETTINGS.psf)
    one_thread = fit_psf(without_sky, detection, stars, SETTINGS.psf)
    same(fit_psf(without_sky, detection, stars, SETTINGS.psf, threads), one_thread)
