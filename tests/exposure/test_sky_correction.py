import dataclasses
import logging

import numpy as np
import pytest
from starfield import add_stars, observed

from coaddflow.calexp.model import MeasuredCcd
from coaddflow.exposure.sky import apply_focal_plane_sky, fit_focal_plane_sky, sky_cards
from coaddflow.instrument.camera import load_camera
from coaddflow.measure.background import (
    Background,
    background_from_hdu,
    background_hdu,
    estimate_background,
)
from coaddflow.settings.background import BackgroundSettings
from coaddflow.settings.sky_correction import SkyCorrectionSettings

SETTINGS = SkyCorrectionSettings(enabled=True)
DECAM = load_camera("decam")
SKY = 400.0
NOISE = 20.0
COUNT = 14_000
"""Pixels of sky in a superpixel of 128 x 128."""


def moonlit(x_mm, y_mm):
    """A sky with gradients of 20 % and curvature over the focal plane of DECam."""
    u, v = x_mm / 200.0, y_mm / 200.0
    return SKY * (1.0 + 0.10 * u + 0.05 * v + 0.05 * u**2 + 0.03 * u * v**2)


def centres(camera, ccd, background):
    x, y = (0.5 * (e[:-1] + e[1:] - 1.0) for e in (background.x_edges, background.y_edges))
    return camera.pixel_to_focal(camera.detector(ccd), *np.meshgrid(x, y))


def meshes(sky, light=None, response=0.0, seed=81, ccds=None, camera=DECAM):
    """Return the meshes that CCDs would measure, and the true sky on them, as dictionaries.

    sky, light: functions of the focal plane. response: its standard deviation, or {ccd: response}.
    A tenth of the superpixels has light of faint sources.
    """
    rng = np.random.default_rng(seed)
    measured, true = {}, {}
    for detector in camera.detectors:
        nx, ny = detector.size
        shape = round(ny / 128), round(nx / 128)
        blank = Background(
            (ny, nx), np.zeros(shape), np.full(shape, NOISE**2), np.full(shape, COUNT)
        )
        x, y = centres(camera, detector.id, blank)
        own = rng.normal(1.0, response) if np.isscalar(response) else response[detector.id]
        true[detector.id] = own * sky(x, y)
        mean = true[detector.id] + rng.normal(0.0, NOISE / np.sqrt(COUNT), shape)
        mean += (rng.random(shape) < 0.1) * rng.exponential(0.5, shape)
        if light is not None:
            mean += light(x, y)
        measured[detector.id] = dataclasses.replace(blank, mean=mean)
    if ccds is not None:
        measured = {ccd: measured[ccd] for ccd in ccds}
    return measured, true


def errors(sky, measured, true, camera=DECAM):
    """Return sky of the focal plane minus true sky on the superpixels of all CCDs."""
    return {
        ccd: sky.of_ccd(camera, camera.detector(ccd), own).mean - true[ccd]
        for ccd, own in measured.items()
    }


def joined(values):
    return np.concatenate([value.ravel() for value in values.values()])


def test_blank_sky_with_gradients_is_flat_to_a_small_part_of_the_noise():
    measured, true = meshes(moonlit)
    sky = fit_focal_plane_sky(measured, DECAM, SETTINGS)
    error = joined(errors(sky, measured, true))
    assert np.sqrt(np.mean(error**2)) < 0.003 * NOISE
    assert np.abs(error).max() < 0.01 * NOISE
    assert np.ptp(joined(true)) > 0.2 * SKY
    assert sky.scatter == pytest.approx(NOISE / np.sqrt(COUNT), rel=0.3)


def test_no_steps_between_ccds_that_respond_differently():
    measured, true = meshes(moonlit, response=0.02)
    sky = fit_focal_plane_sky(measured, DECAM, SETTINGS)
    steps = [error.mean() for error in errors(sky, measured, true).values()]
    assert np.std(steps) < 0.002 * NOISE
    without = fit_focal_plane_sky(measured, DECAM, SkyCorrectionSettings(response_sigma=0.0))
    assert without is None or max(
        abs(error.mean()) for error in errors(without, measured, true).values()
    ) > (0.1 * NOISE)


def test_ccds_that_failed_leave_a_hole_that_does_not_affect_the_others():
    ccds = [d.id for d in DECAM.detectors if d.id not in (5, 20, 33, 34)]
    measured, true = meshes(moonlit, response=0.01, ccds=ccds)
    sky = fit_focal_plane_sky(measured, DECAM, SETTINGS)
    assert np.abs(joined(errors(sky, measured, true))).max() < 0.01 * NOISE
    # and over the hole the sky is what it is there, but for the response that nobody knows
    whole, _ = meshes(moonlit)
    for ccd in (20, 33):
        there = sky.of_ccd(DECAM, DECAM.detector(ccd), whole[ccd]).mean
        assert np.abs(there / moonlit(*centres(DECAM, ccd, whole[ccd])) - 1.0).max() < 0.02


def galaxy(half_light_radius_mm, peak, x0=30.0, y0=20.0):
    """An exponential disc on the focal plane."""
    scale = half_light_radius_mm / 1.678
    return lambda x, y: peak * np.exp(-np.hypot(x - x0, y - y0) / scale)


@pytest.mark.parametrize("response", [0.0, 0.02])
def test_a_galaxy_that_fills_half_a_ccd_is_not_taken_for_its_response(response):
    light = galaxy(8.0, 200.0, *DECAM.detector(30).center)
    measured, true = meshes(moonlit, light, response)
    sky = fit_focal_plane_sky(measured, DECAM, SETTINGS)
    error = errors(sky, measured, true)
    inside = {ccd: light(*centres(DECAM, ccd, own)) > 5.0 for ccd, own in measured.items()}
    filled = [ccd for ccd, own in inside.items() if own.mean() > 0.4]
    assert filled
    assert max(np.abs(error[ccd]).max() for ccd in filled) < 0.02 * NOISE


@pytest.mark.parametrize("response", [0.0, 0.02])
def test_superpixels_of_a_galaxy_are_not_in_the_fit(response):
    light = galaxy(8.0, 200.0, *DECAM.detector(30).center)
    measured, _ = meshes(moonlit, light, response)
    brighter = {}
    for ccd, own in measured.items():
        disc = light(*centres(DECAM, ccd, own))
        more = np.where(disc > 5.0, 1.5 * disc, 0.0)
        brighter[ccd] = dataclasses.replace(own, mean=own.mean + more)
    sky, same = (fit_focal_plane_sky(each, DECAM, SETTINGS) for each in (measured, brighter))
    change = [
        sky.of_ccd(DECAM, DECAM.detector(ccd), own).mean
        - same.of_ccd(DECAM, DECAM.detector(ccd), own).mean
        for ccd, own in measured.items()
    ]
    assert np.abs(brighter[30].mean - measured[30].mean).max() > 10.0 * NOISE
    assert max(np.abs(each).max() for each in change) < 1e-4 * NOISE


def test_low_superpixels_are_not_left_above_the_sky():
    """A CCD without light (a filter's edge) must not end far below zero for lack of belief."""
    response = dict.fromkeys([d.id for d in DECAM.detectors], 1.0) | {30: 0.85}
    measured, true = meshes(moonlit, response=response)
    sky = fit_focal_plane_sky(measured, DECAM, SETTINGS)
    error = errors(sky, measured, true)
    assert sky.response[30] == pytest.approx(0.85 * sky.response[31], abs=0.002)
    assert np.abs(error[30]).max() < 0.02 * NOISE


def test_scale_decides_what_is_sky():
    """A ghost of the pupil, 3 % of the sky, goes with near knots and stays with far ones."""

    def ghostly(x, y):
        return moonlit(x, y) + 0.03 * SKY * np.exp(-0.5 * (x**2 + y**2) / 60.0**2)

    measured, true = meshes(ghostly)
    left = []
    for scale in (15.0, 120.0):
        sky = fit_focal_plane_sky(measured, DECAM, SkyCorrectionSettings(scale=scale))
        left.append(np.abs(joined(errors(sky, measured, true))).max())
    assert left[0] < 0.05 * NOISE < 5.0 * left[0] < left[1]


def mosaic(n, size, gap=40):
    """A camera of n x n CCDs of size x size pixels, every second turned by 180 degrees."""
    demo = load_camera("demo")
    pattern, pixel = demo.detectors[0], demo.pixel_size
    box = {"data": (0, 0, size, size), "target": (0, 0, size, size), "overscan": None}
    amplifier = pattern.amplifiers[0].model_copy(update=box | {"prescan": None})
    detectors = tuple(
        pattern.model_copy(
            update={
                "id": n * row + column,
                "name": f"{row}{column}",
                "rotation": 180.0 * ((row + column) % 2),
                "center": tuple((k - (n - 1) / 2) * (size + gap) * pixel for k in (column, row)),
                "size": (size, size),
                "amplifiers": (amplifier,),
            }
        )
        for row in range(n)
        for column in range(n)
    )
    return demo.model_copy(update={"detectors": detectors})


def measured_ccd(image, background):
    pixels = dataclasses.replace(image, image=image.image - background.model())
    return MeasuredCcd(pixels, background, None, None, None, 6.0, 1.1, 1.0)


@pytest.fixture(scope="module")
def exposure():
    """Four CCDs with a galaxy of 2 superpixels on one of them, stars and a gradient, in pixels."""
    camera, rng = mosaic(2, 1536), np.random.default_rng(82)
    half_light, pixel = 128.0, camera.pixel_size
    light = galaxy(half_light * pixel, 0.8 * SKY, *(700.0 * pixel for _ in range(2)))
    ccds = {}
    for detector in camera.detectors:
        y, x = np.indices(detector.shape)
        x_mm, y_mm = camera.pixel_to_focal(detector, x, y)
        stars = np.zeros(detector.shape)
        n = 150
        add_stars(
            stars,
            *(rng.uniform(0, size, n) for size in detector.size),
            np.exp(rng.uniform(5, 11, n)),
            4.0,
        )
        disc = light(x_mm, y_mm)
        sky = SKY * (1.0 + 0.004 * x_mm - 0.002 * y_mm + 1e-4 * x_mm * y_mm)
        sky *= 1.0 + rng.normal(0.0, 0.01)
        image = observed(stars + disc, sky, rng)
        radius = np.hypot(x_mm - 700 * pixel, y_mm - 700 * pixel) / pixel / half_light
        own = estimate_background(image, BackgroundSettings())
        ccds[detector.id] = (image, own, sky, disc, radius)
    sky = fit_focal_plane_sky({ccd: c[1] for ccd, c in ccds.items()}, camera, SETTINGS)
    return camera, ccds, sky


def annulus_flux(exposure, subtracted, inner, outer):
    """Return measured over true flux of the galaxy between two radii in half-light radii."""
    found = true = 0.0
    for ccd, (_, _, sky, disc, radius) in exposure[1].items():
        ring = (radius > inner) & (radius < outer)
        # photons that happen to fall there are not what is looked for
        found += float((disc + sky - subtracted(ccd))[ring].sum())
        true += float(disc[ring].sum())
    return found / true


def test_a_galaxy_of_two_superpixels_keeps_its_outskirts(exposure):
    camera, ccds, sky = exposure
    by_ccd = {
        "own": lambda ccd: ccds[ccd][1].model(),
        "focal": lambda ccd: sky.of_ccd(camera, camera.detector(ccd), ccds[ccd][1]).model(),
    }
    assert annulus_flux(exposure, by_ccd["focal"], 1.5, 3.0) == pytest.approx(1.0, abs=0.02)
    assert annulus_flux(exposure, by_ccd["focal"], 0.0, 1.5) == pytest.approx(1.0, abs=0.01)
    assert annulus_flux(exposure, by_ccd["own"], 1.5, 3.0) < 0.8


def test_steps_between_ccds_in_pixels_are_small(exposure):
    camera, ccds, sky = exposure
    for ccd, (_, own, true, *_) in ccds.items():
        error = sky.of_ccd(camera, camera.detector(ccd), own).model() - true
        assert abs(error.mean()) < 0.01 * NOISE
        assert np.abs(error).max() < 0.03 * NOISE


def test_image_and_sky_still_add_up_and_the_noise_stays(exposure):
    camera, ccds, sky = exposure
    image, own, *_ = ccds[3]
    before = measured_ccd(image, own)
    after = apply_focal_plane_sky(before, camera, camera.detector(3), sky)
    stored = background_from_hdu(background_hdu(after.background))
    assert np.allclose(after.masked_image.image + stored.model(), image.image, atol=2e-3)
    assert stored.noise == own.noise
    assert stored.level == pytest.approx(np.median(stored.model()), rel=1e-3)
    assert after.masked_image.variance is before.masked_image.variance
    assert np.abs(after.masked_image.image - before.masked_image.image).max() > 0.25 * NOISE
    cards = sky_cards(sky, 3)
    assert cards["SKYMODEL"] == "focal plane"
    assert cards["SKYRESP"] == sky.response[3]


def test_without_a_sky_of_the_focal_plane_the_ccd_keeps_its_own(exposure):
    camera, ccds, _ = exposure
    before = measured_ccd(*ccds[0][:2])
    assert apply_focal_plane_sky(before, camera, camera.detector(0), None) is before
    assert sky_cards(None, 0)["SKYMODEL"] == "CCD"


def test_a_camera_of_one_ccd_has_a_quadratic_surface():
    camera = load_camera("microobservatory")

    def sky(x, y):
        return SKY * (1.0 + 0.02 * x + 0.01 * y + 0.004 * x**2)

    measured, true = meshes(sky, camera=camera)
    solution = fit_focal_plane_sky(measured, camera, SETTINGS)
    assert solution.coefficients.shape == (3, 3)
    assert solution.response == {0: 1.0}
    assert np.abs(joined(errors(solution, measured, true, camera))).max() < 0.03 * NOISE


def test_too_little_sky_is_a_warning_and_no_sky(caplog):
    measured, _ = meshes(moonlit, ccds=[30])
    hidden = dataclasses.replace(measured[30], count=np.zeros_like(measured[30].count))
    few = np.zeros_like(measured[30].count)
    few[:4, :4] = COUNT
    for background in (hidden, dataclasses.replace(measured[30], count=few)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert fit_focal_plane_sky({30: background}, DECAM, SETTINGS) is None
        assert "keep their own sky" in caplog.text
    assert fit_focal_plane_sky({}, DECAM, SETTINGS) is None


@pytest.mark.parametrize("absurd", [1e30, -1e30, 1e4, 0.0])
def test_one_ccd_with_an_absurd_sky_does_not_move_the_sky_of_the_others(absurd, caplog):
    measured, true = meshes(moonlit, response=0.01)
    strange = dataclasses.replace(measured[30], mean=np.full_like(measured[30].mean, absurd))
    with caplog.at_level(logging.WARNING):
        sky = fit_focal_plane_sky(measured | {30: strange}, DECAM, SETTINGS)
    assert "CCD 30 has a sky of" in caplog.text
    assert sky.own == {30}
    others = {ccd: own for ccd, own in measured.items() if ccd != 30}
    assert np.abs(joined(errors(sky, others, true))).max() < 0.01 * NOISE
    assert sky_cards(sky, 30)["SKYMODEL"] == "CCD"
    assert sky_cards(sky, 31)["SKYMODEL"] == "focal plane"


@pytest.mark.parametrize("absurd", [1e30, -1e30, 1e4])
def test_absurd_superpixels_do_not_move_the_sky(absurd):
    measured, true = meshes(moonlit, response=0.01)
    for ccd in (10, 30, 50):
        measured[ccd].mean[3:5, 4] = absurd
    sky = fit_focal_plane_sky(measured, DECAM, SETTINGS)
    assert not sky.own
    assert np.abs(joined(errors(sky, measured, true))).max() < 0.01 * NOISE


def test_a_third_of_the_superpixels_is_not_enough(caplog):
    """The rest is hidden by sources with faint outskirts everywhere: the CCDs keep their sky."""
    measured, _ = meshes(moonlit)
    rng = np.random.default_rng(5)
    for own in measured.values():
        own.mean[rng.random(own.mean.shape) < 0.65] *= 1.5
    with caplog.at_level(logging.WARNING):
        assert fit_focal_plane_sky(measured, DECAM, SETTINGS) is None
    assert "the CCDs keep their own sky" in caplog.text


def test_an_image_whose_sky_is_gone_already():
    measured, true = meshes(lambda x, y: 0.002 * (x + y), response=0.0)
    sky = fit_focal_plane_sky(measured, DECAM, SETTINGS)
    assert np.abs(joined(errors(sky, measured, true))).max() < 0.02 * NOISE
