"""Simulated surveys: every effect shows in the pixels as its setting says."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.io import fits
from astropy.table import Table

from coaddflow.errors import InputError
from coaddflow.geometry import sphere
from coaddflow.ingest.raw_exposures import ingest
from coaddflow.instrument.camera import load_camera
from coaddflow.settings.document import model_tables
from coaddflow.simulate.artifacts import cosmic_rays
from coaddflow.simulate.drawing import draw_sources
from coaddflow.simulate.frames import Exposing, expose_ccd, incoming_light, read_out
from coaddflow.simulate.observations import Observation, plan_observations
from coaddflow.simulate.optics import field_radius
from coaddflow.simulate.readout import linear_counts, measured_counts
from coaddflow.simulate.settings import (
    CosmicRaysSimulation,
    SimulationSettings,
    load_simulation_settings,
)
from coaddflow.simulate.silicon import bleed, make_silicon
from coaddflow.simulate.sky import reference_catalogue, sky_around
from coaddflow.simulate.streams import stream
from coaddflow.simulate.survey import run_simulation

pytest.importorskip("galsim", reason="the simulator's extra is not installed")

QUIET = {
    "camera": "mini",
    "bands": {"r": {"exposures": 1, "exposure_time": 100.0, "zero_point": 26.0, "sky": 21.0}},
    "survey": {"dither": 0, "pointing_error": 0, "rotation_error": 0},
    "stars": {"density": 0},
    "galaxies": {"density": 0},
    "psf": {
        "seeing": 0.8,
        "seeing_scatter": 0,
        "field_size": 0,
        "ellipticity": 0,
        "field_ellipticity": 0,
    },
    "optics": {
        "scale_error": 0,
        "distortion_error": 0,
        "ccd_shift": 0,
        "ccd_rotation": 0,
        "vignetting": 0,
        "pixel_area": False,
    },
    "sky": {"enabled": False, "scatter": 0, "gradient": 0, "clouds": 0, "cloud_structure": 0},
    "detector": {
        "shot_noise": False,
        "read_noise": False,
        "saturation": False,
        "linearity": False,
        "crosstalk": False,
        "defects": False,
        "extra_bad_columns": 0,
        "pixel_response": 0,
        "large_response": 0,
        "gain_error": 0,
        "dark": 0,
        "hot_pixels": 0,
        "bias_level": 1000,
        "bias_structure": 0,
        "bias_drift": 0,
        "row_drift": 0,
    },
    "cosmic_rays": {"rate": 0},
    "satellites": {"every": 0},
    "calibration": {"bias": 0, "dark": 0, "flat": 0},
}


def quiet(**changes):
    """Return settings with all effects off but those given (section: {key: value})."""
    content = {
        key: {**value, **changes.get(key, {})} if isinstance(value, dict) else value
        for key, value in QUIET.items()
    }
    return SimulationSettings.model_validate({**changes, **content})


def first(settings, kind="science"):
    """Return the first exposure of a kind, ready to be exposed."""
    camera = load_camera(settings.camera)
    plan = plan_observations(settings, camera, field_radius(camera))
    return Exposing.prepare(settings, camera, next(one for one in plan if one.kind == kind))


def frame(settings, ccd=0, kind="science"):
    """Return the raw array of a CCD."""
    exposing = first(settings, kind)
    return read_out(exposing, expose_ccd(exposing, ccd))[None].astype(float)


def sections(detector, raw):
    """Return data sections and bias levels (medians of the overscan) of the amplifiers."""
    data = [raw[a.data[1] : a.data[3], a.data[0] : a.data[2]] for a in detector.amplifiers]
    level = [
        np.median(raw[a.overscan[1] : a.overscan[3], a.overscan[0] : a.overscan[2]])
        for a in detector.amplifiers
    ]
    return data, level


def assembled(detector, raw):
    """Return the electrons of a CCD without noise and other effects."""
    image = np.zeros(detector.shape)
    for amplifier, data, level in zip(detector.amplifiers, *sections(detector, raw), strict=True):
        x0, y0, x1, y1 = amplifier.target
        turned = data[:, ::-1] if amplifier.flip_x else data
        image[y0:y1, x0:x1] = (turned - level) * amplifier.gain
    return image


def star_on(settings, ccd, x, y, magnitude, **more):
    """Return the settings with a source at a pixel of a CCD."""
    exposing = first(settings)
    seen, camera = exposing.observation, exposing.optics.camera
    ra, dec = camera.pixel_to_sky(camera.detector(ccd), x, y, seen.ra, seen.dec, seen.rotation)
    source = {"ra": float(ra), "dec": float(dec), "magnitude": magnitude, **more}
    return SimulationSettings.model_validate(
        {**settings.model_dump(), "sources": [*settings.sources, source]}
    )


def moments(image):
    """Return flux, centroid and second moments (xx, xy, yy) of an image without noise."""
    y, x = np.indices(image.shape, dtype=float)
    total = image.sum()
    cx, cy = (image * x).sum() / total, (image * y).sum() / total
    x, y = x - cx, y - cy
    return total, cx, cy, *((image * product).sum() / total for product in (x * x, x * y, y * y))


def centroid(image, x, y):
    """Return the centroid in a Gaussian window of 2 pixels, which does not see cut wings."""
    rows, columns = np.indices(image.shape, dtype=float)
    for _ in range(30):
        window = image * np.exp(-0.5 * ((columns - x) ** 2 + (rows - y) ** 2) / 2.0**2)
        # the window halves the step for a star of its own width
        x += 2.0 * ((window * columns).sum() / window.sum() - x)
        y += 2.0 * ((window * rows).sum() / window.sum() - y)
    return x, y


# --- sources ---------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["moffat", "kolmogorov"])
@pytest.mark.parametrize("magnitude", [16.0, 22.0])
@pytest.mark.parametrize(("ccd", "x", "y"), [(0, 150.0, 160.5), (3, 163.37, 141.81)])
def test_star_is_at_its_pixel_with_its_flux(profile, magnitude, ccd, x, y):
    settings = quiet(psf={"profile": profile, "ellipticity": 0.05, "field_ellipticity": 0.05})
    settings = star_on(settings, ccd, x, y, magnitude)
    exposing = first(settings)
    detector = exposing.optics.camera.detector(ccd)
    image = incoming_light(exposing, detector).astype(float)
    flux = image.sum()
    expected = 100.0 * 10.0 ** (0.4 * (26.0 - magnitude))
    # the wings of the Kolmogorov profile go on beyond the stamp
    assert flux == pytest.approx(expected, rel=1e-3 if profile == "moffat" else 5e-3)
    assert centroid(image, x + 0.3, y - 0.3) == pytest.approx((x, y), abs=0.0005)


def test_faint_star_cut_by_the_edge_keeps_its_place():
    settings = star_on(quiet(), 0, -1.0, 100.0, 18.0)
    exposing = first(settings)
    image = incoming_light(exposing, exposing.optics.camera.detector(0))
    assert np.argmax(image[100]) == 0
    assert image[100, 0] == pytest.approx(image[101, 0], rel=0.3)
    assert image[100, 0] > image[100, 1] > image[100, 3] > 0


def test_seeing_is_the_fwhm():
    exposing = first(star_on(quiet(), 0, 160.0, 160.0, 18.0))
    image = incoming_light(exposing, exposing.optics.camera.detector(0))
    profile = image[160, 160:175]
    radius = np.interp(-0.5 * profile[0], -profile, np.arange(15))
    # a pixel widens a star of 4 pixels by 4 percent
    assert 2 * radius * 0.2 == pytest.approx(0.8, rel=0.06)


@pytest.mark.parametrize("ccd", [0, 2])
@pytest.mark.parametrize("angle", [0.0, 30.0, 110.0])
def test_galaxies_point_along_their_position_angle(ccd, angle):
    settings = quiet(survey={"rotation": 25.0})
    settings = star_on(
        settings, ccd, 160.2, 158.7, 17.0, half_light_radius=2.0, axis_ratio=0.4, angle=angle
    )
    exposing = first(settings)
    detector = exposing.optics.camera.detector(ccd)
    flux, cx, cy, xx, xy, yy = moments(incoming_light(exposing, detector).astype(float))
    assert flux == pytest.approx(100.0 * 10.0 ** (0.4 * 9.0), rel=3e-3)
    assert (cx, cy) == pytest.approx((160.2, 158.7), abs=0.01)
    direction = np.linalg.eigh([[xx, xy], [xy, yy]])[1][:, 1]
    east, north = exposing.optics.jacobian(detector, cx, cy) @ direction
    found = np.degrees(np.arctan2(east, north))
    assert (found - angle + 90.0) % 180.0 - 90.0 == pytest.approx(0.0, abs=0.5)


def test_large_galaxy_reaches_beyond_its_ccd():
    settings = star_on(quiet(), 0, 300.0, 160.0, 15.0, half_light_radius=20.0)
    exposing = first(settings)
    camera = exposing.optics.camera
    own, neighbour = (incoming_light(exposing, camera.detector(ccd)) for ccd in (0, 1))
    # surface brightness goes on where the next CCD begins
    assert neighbour[160, 0] == pytest.approx(own[160, 319], rel=0.3)


def test_clouds_dim_stars():
    plain = star_on(quiet(), 0, 160.0, 160.0, 19.0)
    cloudy = star_on(quiet(sky={"clouds": 0.5}), 0, 160.0, 160.0, 19.0)
    clear, dimmed = (
        incoming_light(one, one.optics.camera.detector(0)).sum()
        for one in (first(plain), first(cloudy))
    )
    extinction = first(cloudy).observation.extinction[0]
    assert extinction > 0.01
    assert dimmed / clear == pytest.approx(10 ** (-0.4 * extinction), rel=1e-3)


def test_number_counts_follow_the_power_law():
    settings = quiet(stars={"density": 20.0, "slope": 0.2, "faintest": 24.0, "brightest": 14.0})
    sky = sky_around(settings, 150.0, 2.0, 0.3)
    counts = [np.sum(sky.magnitude < limit) for limit in (24.0, 22.0)]
    assert counts[0] / counts[1] == pytest.approx(10**0.4, rel=0.05)
    area = np.sum(sphere.separation(sky.ra, sky.dec, 150.0, 2.0) < 0.3)
    assert area == pytest.approx(20 * np.pi * 18**2, rel=0.03)


def test_sky_is_the_same_seen_from_another_place():
    settings = quiet(stars={"density": 5.0}, galaxies={"density": 5.0})
    here, there = sky_around(settings, 0.02, -89.9, 0.1), sky_around(settings, 200.0, -89.95, 0.15)
    both, i, j = np.intersect1d(here.id, there.id, return_indices=True)
    assert len(both) > 100
    assert len(np.unique(here.id)) == len(here)
    for field in dataclasses.fields(here):
        np.testing.assert_array_equal(getattr(here, field.name)[i], getattr(there, field.name)[j])


def test_reference_catalogue_has_the_errors_it_says():
    settings = quiet(
        stars={"density": 20.0},
        refcat={"position_error": 30.0, "magnitude_error": 0.03, "completeness": 0.8},
    )
    sky = sky_around(settings, 150.0, 40.0, 0.3)
    refcat = reference_catalogue(settings, sky)
    _, i, j = np.intersect1d(sky.id, refcat["id"], return_indices=True)
    assert len(j) == len(refcat)
    limits = (sky.magnitude > settings.refcat.brightest) & (sky.magnitude < 21.5)
    assert len(refcat) / np.sum(limits) == pytest.approx(0.8, abs=0.03)
    east = (refcat["ra"][j] - sky.ra[i]) * np.cos(np.radians(40.0)) * 3.6e6
    assert np.std(east) == pytest.approx(30.0, rel=0.05)
    assert np.std(refcat["mag_r"][j] - sky.magnitude[i]) == pytest.approx(0.03, rel=0.05)


def test_proper_motion_moves_a_star():
    settings = quiet(stars={"density": 5.0, "proper_motion": 100.0})
    sky = sky_around(settings, 10.0, 60.0, 0.1)
    # MJD 55197.5 is J2010.0
    ra, dec = sky.position_at(55197.5, 2000.0)
    moved = sphere.separation(ra, dec, sky.ra, sky.dec) * 3.6e6
    np.testing.assert_allclose(moved, 10.0 * np.hypot(sky.pm_ra, sky.pm_dec), rtol=1e-3)


# --- detector --------------------------------------------------------------------------------


def test_with_everything_off_only_the_bias_level_is_left():
    raw = frame(quiet())
    detector = load_camera("mini").detector(0)
    for data, level in zip(*sections(detector, raw), strict=True):
        assert 900 <= level <= 1100
        assert np.all(data == level)


def test_sky_gives_the_electrons_of_its_brightness():
    settings = quiet(sky={"enabled": True})
    image = assembled(load_camera("mini").detector(0), frame(settings))
    # 21 mag per square arcsec, 26 mag per electron per second, 100 s, pixels of 0.2 arcsec
    assert image.mean() == pytest.approx(100.0 * 0.04 * 10.0**2, rel=2e-3)


def test_shot_noise_is_poisson_and_gain_is_that_of_photon_transfer():
    settings = quiet(
        detector={"shot_noise": True, "gain_error": 0.1}, calibration={"flat": 1}, camera="mini"
    )
    detector = load_camera("mini").detector(1)
    silicon = make_silicon(settings, detector)
    for data, level, gain, amplifier in zip(
        *sections(detector, frame(settings, 1, "flat")),
        silicon.gains,
        detector.amplifiers,
        strict=True,
    ):
        assert gain != amplifier.gain
        assert (data - level).mean() / data.var() == pytest.approx(gain, rel=0.03)


def test_read_noise_of_a_bias():
    settings = quiet(detector={"read_noise": True}, calibration={"bias": 1})
    detector = load_camera("mini").detector(0)
    data, _ = sections(detector, frame(settings, 0, "bias"))
    for pixels, amplifier in zip(data, detector.amplifiers, strict=True):
        rounding = 1.0 / 12.0
        expected = np.sqrt((amplifier.read_noise / amplifier.gain) ** 2 + rounding)
        assert pixels.std() == pytest.approx(expected, rel=0.02)


def test_overscan_follows_the_drift_of_the_data():
    settings = quiet(detector={"row_drift": 20.0, "bias_drift": 30.0}, calibration={"bias": 2})
    detector = load_camera("mini").detector(0)
    raw = frame(settings, 0, "bias")
    for amplifier in detector.amplifiers:
        overscan = raw[:, amplifier.overscan[0]]
        assert np.ptp(overscan) > 20
        np.testing.assert_array_equal(raw[:, amplifier.data[0]], overscan)


def test_bias_structure_is_the_same_in_every_frame():
    settings = quiet(detector={"bias_structure": 5.0, "bias_drift": 10.0}, calibration={"bias": 2})
    detector = load_camera("mini").detector(0)
    camera = load_camera("mini")
    plan = plan_observations(settings, camera, field_radius(camera))
    frames = []
    for seen in plan[:2]:
        exposing = Exposing.prepare(settings, camera, seen)
        raw = read_out(exposing, expose_ccd(exposing, 0))[None].astype(float)
        frames.append(assembled(detector, raw))
    assert frames[0].std() > 1.0
    assert np.abs(frames[0] - frames[1]).max() <= 2 * 1.8  # rounding of level and of pixel


def assert_ghost(ghost, expected):
    """Ghost and expectation in electrons of amplifiers B and A of mini."""
    ghost, expected = ghost / 1.8, expected / 1.7
    # level and pixel are rounded to counts
    assert np.abs(ghost - expected).max() <= 1.01
    seen = expected > 1.5
    assert seen.sum() > 10
    assert (ghost * expected)[seen].sum() / (expected[seen] ** 2).sum() == pytest.approx(1, abs=0.1)


def test_crosstalk_within_a_ccd_is_mirrored_and_has_its_coefficient():
    settings = star_on(quiet(), 0, 60.0, 200.0, 15.5)
    on = SimulationSettings.model_validate(
        {**settings.model_dump(), "detector": {**settings.detector.model_dump(), "crosstalk": True}}
    )
    detector = load_camera("mini").detector(0)
    difference = assembled(detector, frame(on)) - assembled(detector, frame(settings))
    image = assembled(detector, frame(settings))
    ghost = difference[:, 160:]
    # amplifier A is read from the left, B from the right: column 60 meets column 319 - 60
    assert np.unravel_index(np.argmax(ghost), ghost.shape) == (200, 259 - 160)
    assert_ghost(ghost, detector.crosstalk[1][0] * image[:, :160][:, ::-1])


def test_crosstalk_between_ccds(tmp_path):
    settings = star_on(quiet(), 0, 60.0, 200.0, 15.5)
    ghosted = SimulationSettings.model_validate(
        {**settings.model_dump(), "detector": {**settings.detector.model_dump(), "crosstalk": True}}
    )
    run_simulation(settings, tmp_path / "off")
    run_simulation(ghosted, tmp_path / "on")
    off, on = (fits.getdata(tmp_path / one / "raw/1001.fits", "CCD1") for one in ("off", "on"))
    aggressor = assembled(
        load_camera("mini").detector(0), fits.getdata(tmp_path / "off/raw/1001.fits", "CCD0") * 1.0
    )
    victim = load_camera("mini").detector(1)
    ghost = (assembled(victim, on * 1.0) - assembled(victim, off * 1.0))[:, 160:]
    assert_ghost(ghost, 3.0e-4 * aggressor[:, :160][:, ::-1])


def test_bleeding_keeps_the_charge_and_runs_along_columns():
    image = np.full((100, 20), 100.0, dtype=np.float32)
    image[50, 10] = 50_000.0
    bleed(image, 10_000.0)
    assert image.sum() == pytest.approx(1999 * 100.0 + 50_000.0, rel=1e-6)
    assert image.max() == 10_000.0
    full = np.argwhere(image >= 10_000.0)
    assert set(full[:, 1]) == {10}
    # 40,000 electrons go to both sides, two full pixels and a rest on each
    assert list(full[:, 0]) == [48, 49, 50, 51, 52]
    assert np.all(np.delete(image, 10, axis=1) == 100.0)


def test_bleeding_off_the_end_loses_charge():
    image = np.full((30, 3), 0.0, dtype=np.float32)
    image[1, 1] = 101_000.0
    bleed(image, 1000.0)
    assert image[0, 1] == 1000.0
    assert image.sum() == 30 * 1000.0


def test_saturated_star_bleeds_in_the_frame():
    settings = star_on(quiet(detector={"saturation": True}), 0, 60.0, 150.0, 13.0)
    detector = load_camera("mini").detector(0)
    raw = frame(settings)
    saturated = raw >= detector.amplifiers[0].saturation
    y, x = np.nonzero(saturated)
    assert np.ptp(y) > 3 * np.ptp(x) > 0
    assert abs(np.mean(y) - 150) < 1
    free = frame(
        SimulationSettings.model_validate(
            {
                **settings.model_dump(),
                "detector": {**settings.detector.model_dump(), "saturation": False},
            }
        )
    )
    assert free.max() > raw.max()


def test_linearity_is_undone_by_the_polynomial_of_the_camera_file():
    true = np.linspace(0.0, 60_000.0, 50)
    measured = measured_counts(true, (4.0e-7, 1.0e-12))
    assert measured[-1] < 0.98 * true[-1]
    np.testing.assert_allclose(linear_counts(measured, (4.0e-7, 1.0e-12)), true, rtol=1e-6)
    settings = star_on(quiet(detector={"linearity": True}), 0, 60.0, 150.0, 15.5)
    detector = load_camera("mini").detector(0)
    bent = assembled(detector, frame(settings)).max()
    peak = incoming_light(first(settings), first(settings).optics.camera.detector(0)).max()
    counts = bent / detector.amplifiers[0].gain
    assert (counts + 4.0e-7 * counts**2) * detector.amplifiers[0].gain == pytest.approx(
        peak, rel=1e-4
    )
    assert bent < 0.995 * peak


def test_dark_current_and_hot_pixels_grow_with_time():
    settings = quiet(
        detector={"dark": 0.1, "hot_pixels": 2e-3, "hot_rate": 10.0},
        calibration={"dark": 1, "dark_time": 500.0},
    )
    detector = load_camera("mini").detector(0)
    dark = assembled(detector, frame(settings, 0, "dark"))
    short = assembled(detector, frame(settings, 0, "science"))
    silicon = make_silicon(settings, detector)
    assert np.median(dark) == pytest.approx(50.0, rel=0.1)
    # below the end of the converter's range
    hot = (silicon.dark > 3.0) & (silicon.dark < 200.0)
    assert 100 < hot.sum() < 300
    np.testing.assert_allclose(dark[hot], 500.0 * silicon.dark[hot], atol=2.0)
    np.testing.assert_allclose(short[hot], 100.0 * silicon.dark[hot], atol=2.0)


def test_bad_columns_are_dark():
    settings = quiet(sky={"enabled": True}, detector={"defects": True})
    detector = load_camera("mini").detector(0)
    image = assembled(detector, frame(settings))
    ((x0, y0, x1, y1),) = detector.defects
    assert image[y0:y1, x0:x1].max() < 0.1 * np.median(image)
    assert np.delete(image, np.s_[x0:x1], axis=1).min() > 0.9 * np.median(image)


def test_flat_shows_response_vignetting_and_pixel_area():
    settings = quiet(
        detector={"pixel_response": 0.02, "large_response": 0.05},
        optics={"vignetting": 0.3, "pixel_area": True},
        calibration={"flat": 1, "flat_level": 20_000.0},
    )
    exposing = first(settings, "flat")
    detector = exposing.optics.camera.detector(0)
    image = assembled(detector, frame(settings, 0, "flat"))
    silicon = make_silicon(settings, detector)
    area, light = exposing.optics.pixel_area(detector), exposing.optics.transmission(detector)
    np.testing.assert_allclose(image, 20_000.0 * silicon.response * area * light / 0.04, atol=2.0)
    assert silicon.response.std() > 0.02
    # the outer corner loses the light that the setting says, the centre nothing
    assert light[0, 0] == pytest.approx(0.7, abs=0.01)
    assert light[-1, -1] == pytest.approx(1.0, abs=0.001)
    # 1 + 4 a t^2 is the area of a pixel under t (1 + a t^2)
    t = 2**0.5 * 325 * 0.2 / 3600
    assert area[0, 0] / area[-1, -1] == pytest.approx(1 + 4 * 2.0 * t**2, rel=2e-4)


def test_cosmic_rays_have_their_rate_and_charge():
    settings = CosmicRaysSimulation(rate=2.0)
    detector = load_camera("mini").detector(0)
    x, y, electrons = cosmic_rays(settings, detector, 0.015, 400.0, stream(1, "test"))
    area = 0.48**2
    # 80 electrons per micrometre through 200 micrometres, longer for slanted tracks
    assert electrons.sum() / (2.0 * area * 400.0) == pytest.approx(16_000 * 1.33, rel=0.15)
    assert len(np.unique(y * 320 + x)) == len(x)
    none = cosmic_rays(CosmicRaysSimulation(rate=0.0), detector, 0.015, 400.0, stream(1, "test"))
    assert all(len(column) == 0 for column in none)


def test_vignetting_and_gradient_shape_the_sky():
    settings = quiet(
        sky={"enabled": True, "gradient": 0.2, "scatter": 0.3}, optics={"vignetting": 0.3}
    )
    exposing = first(settings)
    camera = exposing.optics.camera
    level, along_x, along_y = exposing.observation.sky
    assert abs(level - 1) > 0.01
    assert np.hypot(along_x, along_y) > 0.02
    for detector in camera.detectors:
        image = assembled(detector, frame(settings, detector.id))
        x, y = np.array([10, 300, 300]), np.array([20, 30, 310])
        u, v = np.array(camera.pixel_to_focal(detector, x, y)) / exposing.optics.radius
        expected = level * (1 + along_x * u + along_y * v) * (1 - 0.3 * (u**2 + v**2) ** 2)
        np.testing.assert_allclose(image[y, x], 400.0 * expected, atol=2.0)


def test_psf_changes_over_the_field_and_not_with_the_ccd_that_sees_it():
    settings = quiet(psf={"field_size": 0.1, "field_ellipticity": 0.1})
    optics = first(settings).optics
    camera = optics.camera
    upright = camera.detector(0)
    corners = np.array([0.0, 319.0, 0.0]), np.array([0.0, 0.0, 319.0])
    fwhm, g1, g2 = optics.psf_at(upright, *corners)
    assert np.ptp(fwhm) / fwhm[0] > 0.01
    assert np.ptp(g1) > 0.01
    assert np.ptp(g2) > 0.01
    # a CCD turned by 45 degrees at the same place sees the same ellipse turned back
    turned = upright.model_copy(update={"rotation": 45.0})
    place = camera.focal_to_pixel(turned, *camera.pixel_to_focal(upright, 0.0, 0.0))
    seen = optics.psf_at(turned, *place)
    assert np.array(seen) == pytest.approx([fwhm[0], g2[0], -g1[0]])


def test_tracks_of_cosmic_rays_are_as_long_as_the_silicon_is_thick():
    detector = load_camera("mini").detector(0)
    sizes = []
    for thickness in (0.02, 0.2):
        settings = CosmicRaysSimulation(rate=2.0, thickness=thickness, diffusion=0.0)
        x, _, _ = cosmic_rays(settings, detector, 0.015, 200.0, stream(1, "test"))
        sizes.append(len(x) / (2.0 * 0.48**2 * 200.0))
    # the mean of tan(zenith angle) is 0.59 on a plane; 13 pixels of silicon, tracks in all
    # directions cross 4 / pi as many pixels as they are long
    assert sizes[0] == pytest.approx(1 + 0.59 * 1.33 * 4 / np.pi, rel=0.25)
    assert sizes[1] == pytest.approx(1 + 0.59 * 13.3 * 4 / np.pi, rel=0.2)


def test_cosmic_rays_of_the_truth_are_on_the_frame(tmp_path):
    clean = quiet()
    dirty = quiet(cosmic_rays={"rate": 0.5}, truth_pixels=True)
    run_simulation(clean, tmp_path / "clean")
    run_simulation(dirty, tmp_path / "dirty")
    detector = load_camera("mini").detector(2)
    images = [
        assembled(detector, fits.getdata(tmp_path / name / "raw/1001.fits", "CCD2") * 1.0)
        for name in ("clean", "dirty")
    ]
    truth = Table.read(tmp_path / "dirty/truth/cosmic_rays/1001.fits")
    truth = truth[truth["ccd"] == 2]
    charge = np.zeros(detector.shape)
    charge[truth["y"], truth["x"]] = truth["electrons"]
    assert len(truth) > 20
    np.testing.assert_allclose(images[1] - images[0], charge, atol=2.0)


def test_trail_runs_where_the_truth_says():
    settings = quiet(satellites={"every": 1, "brightness": 2000.0, "width": 1.6})
    exposing = first(settings)
    camera, trail = exposing.optics.camera, exposing.observation.trail
    hit = 0
    for detector in camera.detectors:
        image = incoming_light(exposing, detector)
        along = np.linspace(0.0, 1.0, 2000)
        x, y = camera.focal_to_pixel(
            detector,
            trail[0] + along * (trail[2] - trail[0]),
            trail[1] + along * (trail[3] - trail[1]),
        )
        on = (x > 0) & (x < 319) & (y > 0) & (y < 319)
        hit += on.sum()
        sigma = 1.6 / 0.2 / 2.3548
        peak = 2000.0 / (np.sqrt(2 * np.pi) * sigma)
        values = image[np.rint(y[on]).astype(int), np.rint(x[on]).astype(int)]
        np.testing.assert_allclose(values, peak, rtol=0.05)
    assert hit > 100


# --- exposures -------------------------------------------------------------------------------


def test_errors_of_the_header_have_their_size():
    settings = quiet(
        survey={"pointing_error": 30.0, "rotation_error": 0.2, "dither": 60.0},
        psf={"seeing_scatter": 0.2},
    )
    settings = settings.model_copy(
        update={"bands": {"r": settings.bands["r"].model_copy(update={"exposures": 300})}}
    )
    camera = load_camera("mini")
    plan = plan_observations(settings, camera, field_radius(camera))
    dec = np.array([one.header_dec - one.dec for one in plan]) * 3600
    assert dec.std() == pytest.approx(30.0, rel=0.15)
    rotation = np.array([one.header_rotation - one.rotation for one in plan])
    assert rotation.std() == pytest.approx(0.2, rel=0.15)
    dither = np.array([sphere.separation(one.ra, one.dec, 150.1, 2.2) for one in plan]) * 3600
    assert 55 < dither.max() <= 60.0 + 1e-6
    assert np.std(np.log([one.seeing for one in plan])) == pytest.approx(0.2, rel=0.15)


def test_camera_without_rotation_keyword_has_its_default():
    settings = quiet(survey={"rotation": 179.0, "rotation_error": 1.0})
    settings = settings.model_copy(update={"camera": "microobservatory"})
    assert first(settings).observation.header_rotation == 179.6


def test_displaced_ccds_and_changed_distortion_are_in_the_true_camera():
    settings = quiet(optics={"ccd_shift": 3.0, "distortion_error": 0.2, "scale_error": 1e-3})
    camera, true = load_camera("mini"), first(settings).optics.camera
    shifts = [
        np.hypot(*np.subtract(a.center, b.center)) / camera.pixel_size
        for a, b in zip(camera.detectors, true.detectors, strict=True)
    ]
    assert 1.0 < np.sqrt(np.mean(np.square(shifts)) / 2) < 6.0
    assert true.distortion != camera.distortion
    assert true.pixel_scale != camera.pixel_scale
    assert true.detector(3).center == true.detectors[3].center


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survey")
    settings = load_simulation_settings(Path(__file__).parents[2] / "configs/test-survey.yaml")
    settings = SimulationSettings.model_validate(
        {**settings.model_dump(), "calibration": {"bias": 1, "dark": 1, "flat": 1}}
    )
    return settings, folder / "two", run_simulation(settings, folder / "two", processes=2)


def test_number_of_processes_changes_nothing(survey, tmp_path):
    settings, folder, _ = survey
    seen = []
    run_simulation(settings, tmp_path / "one", progress=lambda *what: seen.append(what))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 10 + 5
    for path in files:
        assert (folder / path).read_bytes() == (tmp_path / "one" / path).read_bytes(), path
    assert [done for done, *_ in seen] == list(range(1, 11))
    assert seen[-1] == (10, 10, "exposure 1006")


def test_another_exposure_leaves_the_others_as_they_are(survey, tmp_path):
    settings, folder, _ = survey
    more = settings.model_copy(
        update={
            "bands": {
                "g": settings.bands["g"].model_copy(update={"exposures": 4}),
                "r": settings.bands["r"],
            },
            "ccds": (0,),
        }
    )
    run_simulation(more, tmp_path / "more")
    names = {path.name for path in (tmp_path / "more/raw").iterdir()}
    assert names - {path.name for path in (folder / "raw").iterdir()} == {"1007.fits"}
    for name in ("101.fits", "1002.fits"):
        ours, theirs = (
            fits.getdata(one / "raw" / name, "CCD0") for one in (tmp_path / "more", folder)
        )
        np.testing.assert_array_equal(ours, theirs)


def test_another_seed_is_another_survey():
    noises = [
        frame(
            SimulationSettings.model_validate(
                {**QUIET, "seed": seed, "detector": {**QUIET["detector"], "read_noise": True}}
            )
        )
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(noises[0], noises[1])
    assert np.any(noises[0] != noises[2])


def test_survey_that_is_there_is_left_alone(survey):
    settings, folder, done = survey
    assert done.n_files == 10
    assert run_simulation(settings, folder).n_files == 0
    other = settings.model_copy(update={"seed": 8})
    with pytest.raises(InputError, match="simulated with other settings"):
        run_simulation(other, folder)


def test_survey_made_before_there_was_an_effect_is_still_the_same(survey, tmp_path):
    settings, folder, _ = survey
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = yaml.safe_load((copy / "simulation.yaml").read_text())
    del record["atmosphere"]
    (copy / "simulation.yaml").write_text(yaml.safe_dump(record))
    assert run_simulation(settings, copy).n_files == 0


def test_headers_are_read_as_the_camera_file_says(survey, tmp_path):
    _, folder, done = survey
    report = ingest([folder / "raw"], load_camera("mini"), tmp_path / "exposures.ecsv")
    assert not report.skipped
    rows = {str(row["exposure"]): row for row in Table.read(tmp_path / "exposures.ecsv")}
    assert len(rows) == len(done.observations)
    for seen in done.observations:
        row = rows[seen.exposure]
        assert row["kind"] == seen.kind
        assert row["exposure_time"] == seen.exposure_time
        assert row["mjd"] == pytest.approx(seen.mjd, abs=1e-8)
        if seen.kind == "science":
            assert row["band"] == seen.band
            assert 3600 * abs(row["ra"] - seen.header_ra) < 0.001
            assert 3600 * abs(row["dec"] - seen.header_dec) < 0.001
            assert abs((row["rotation"] - seen.header_rotation + 180) % 360 - 180) < 1e-6


def test_truth_and_reference_catalogue_cover_every_ccd(survey):
    _, folder, done = survey
    refcat, truth = Table.read(folder / "refcat.fits"), Table.read(folder / "truth/sources.fits")
    assert set(refcat["id"]) <= set(truth["id"][truth["type"] == "star"])
    camera = load_camera("mini")
    for seen in done.observations:
        if seen.kind != "science":
            continue
        for detector in camera.detectors:
            x, y = camera.sky_to_pixel(
                detector, refcat["ra"], refcat["dec"], seen.ra, seen.dec, seen.rotation
            )
            assert np.sum((x > 0) & (x < 319) & (y > 0) & (y < 319)) >= 15


# --- files -----------------------------------------------------------------------------------


def camera_file(tmp_path, **layout):
    """Return the path of a camera like mini with another layout."""
    content = yaml.safe_load(
        (Path(__file__).parents[2] / "src/coaddflow/instrument/cameras/mini.yaml").read_text()
    )
    content["layout"] = layout
    del content["crosstalk"]
    for detector in content["detectors"]:
        detector["extension"] = 100 + detector["id"]
    content["header"]["exposure"] = {"keyword": "EXP-ID", "form": "HSCA{}00", "pattern": r"(\d{6})"}
    content["header"]["ra"]["unit"] = "hourangle"
    content["header"]["mjd"] = {"keyword": "DATE", "unit": "iso", "scale": "utc"}
    content["header"]["rotation"] |= {"factor": -1.0, "offset": 270.0}
    content["header"]["band"]["values"] = {"r long name": "r"}
    path = tmp_path / "camera.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_one_file_per_ccd_with_running_numbers(tmp_path):
    path = camera_file(
        tmp_path,
        files="ccd",
        ccd_pattern=r"HSCA(?P<ccd>\d{8})",
        numbers_per_exposure=200,
        name_form="HSCA{ccd+{exposure}00}.fits.gz",
    )
    settings = SimulationSettings.model_validate(
        {**QUIET, "camera": str(path), "numbers": {"science": 1002, "form": "{:06d}"}}
    )
    assert run_simulation(settings, tmp_path / "out").n_files == 4
    names = sorted(file.name for file in (tmp_path / "out/raw").iterdir())
    assert names == [f"HSCA0010030{ccd}.fits.gz" for ccd in range(4)]
    with fits.open(tmp_path / "out/raw" / names[2]) as hdus:
        assert hdus[0].data.shape == (320, 368)
        assert hdus[0].header["EXP-ID"] == "HSCA00100200"
        assert hdus[0].header["FILTER"] == "r long name"
        assert hdus[0].header["ROTPA"] == 270.0
        assert hdus[0].header["CCDID"] == 2


@pytest.mark.parametrize("compression", ["gzip", "fpack"])
def test_compressed_files_hold_the_same_pixels(tmp_path, compression):
    settings = quiet(detector={"read_noise": True})
    run_simulation(settings, tmp_path / "plain")
    packed = settings.model_copy(update={"compression": compression})
    run_simulation(packed, tmp_path / "packed")
    run_simulation(packed, tmp_path / "again")
    name = {"gzip": "1001.fits.gz", "fpack": "1001.fits.fz"}[compression]
    for ccd in range(4):
        pixels = fits.getdata(tmp_path / "packed/raw" / name, f"CCD{ccd}")
        assert pixels.dtype == np.uint16
        np.testing.assert_array_equal(
            pixels, fits.getdata(tmp_path / "plain/raw/1001.fits", f"CCD{ccd}")
        )
    files = [(tmp_path / one / "raw" / name).read_bytes() for one in ("packed", "again")]
    assert files[0] == files[1]
    with fits.open(tmp_path / "packed/raw" / name, checksum=True) as hdus:
        assert hdus[0].header["EXPID"] == "1001"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("starz: {}", "starz: Extra inputs are not permitted"),
        ("stars: {density: -1}", "stars.density: .*greater than or equal to 0"),
        ("bands: {}", "bands: .*at least 1"),
        ("bands: {'a b': {}}", "is not a valid band id"),
        ("numbers: {form: '{:d}/x'}", "numbers: .*form must be like"),
        ("stars: [", "is not YAML"),
        ("just text", "settings: "),
    ],
)
def test_mistakes_in_the_settings_are_named(tmp_path, text, message):
    path = tmp_path / "survey.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_simulation_settings(path)


def test_folders_with_other_things_are_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other things \(notes.txt\)"):
        run_simulation(quiet(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_ids_that_would_meet(tmp_path):
    settings = quiet(calibration={"bias": 2, "dark": 2}, numbers={"bias": 1, "dark": 2})
    with pytest.raises(InputError, match="exposure id '2' would occur twice"):
        run_simulation(settings, tmp_path / "out")


def test_missing_galsim_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "galsim", None)
    with pytest.raises(InputError, match=r"pip install 'coaddflow\[simulate\]'"):
        run_simulation(quiet(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_survey_is_made_whole(tmp_path):
    settings = quiet(calibration={"bias": 2})
    run_simulation(settings, tmp_path / "out")
    whole = (tmp_path / "out/raw/1001.fits").read_bytes()
    (tmp_path / "out/simulation.yaml").unlink()
    (tmp_path / "out/raw/1001.fits").write_bytes(b"half")
    assert run_simulation(settings, tmp_path / "out").n_files == 3
    assert (tmp_path / "out/raw/1001.fits").read_bytes() == whole


def test_drawing_nothing_leaves_the_image(monkeypatch):
    settings = quiet()
    exposing = first(settings)
    image = np.ones((320, 320), dtype=np.float32)
    sky = sky_around(settings, 150.1, 2.2, 0.01)
    draw_sources(image, exposing.optics, exposing.optics.camera.detector(0), sky, np.zeros(0), 1.0)
    assert np.all(image == 1)
    assert isinstance(exposing.observation, Observation)


def test_the_page_about_simulations_lists_every_setting():
    page = (Path(__file__).parents[2] / "docs/simulation.md").read_text()
    assert page.endswith("\n" + model_tables(SimulationSettings, "All settings"))
