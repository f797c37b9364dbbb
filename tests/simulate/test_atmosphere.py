"""What the air does to positions and PSF: sizes, directions, and independence of exposures."""

import numpy as np
import pytest

from coaddflow.geometry import sphere
from coaddflow.instrument.camera import load_camera
from coaddflow.simulate.frames import Exposing
from coaddflow.simulate.observations import plan_observations
from coaddflow.simulate.optics import field_radius
from coaddflow.simulate.settings import SimulationSettings

FIELD = np.meshgrid(np.linspace(-0.5, 0.5, 41), np.linspace(-0.5, 0.5, 41))


def optics_of(index=0, **air):
    """The optics of an exposure under some air."""
    settings = SimulationSettings.model_validate({"seed": 3, "camera": "mini", "atmosphere": air})
    camera = load_camera("mini")
    plan = plan_observations(settings, camera, field_radius(camera))
    science = [one for one in plan if one.kind == "science"]
    return Exposing.prepare(settings, camera, science[index]).optics


def displacement(optics, color=None):
    """Displacements to east and north at points of a degree, in mas."""
    seen = optics.observation
    ra, dec = sphere.tan_deproject(*FIELD, seen.ra, seen.dec)
    moved = optics.atmosphere.apparent(ra, dec, color)
    return (np.stack(sphere.tan_project(*moved, seen.ra, seen.dec)) - np.stack(FIELD)) * 3.6e6


def test_without_air_nothing_moves():
    assert np.abs(displacement(optics_of())).max() < 1e-6
    optics = optics_of()
    detector = optics.camera.detectors[0]
    fwhm, *_ = optics.psf_at(detector, [10.0], [10.0])
    assert fwhm[0] > 0
    assert np.all(optics.atmosphere.seeing(np.zeros((2, 3))) == 1)


def test_turbulence_has_its_size_is_smooth_and_new_in_each_exposure():
    fields = [displacement(optics_of(index, turbulence=10.0)) for index in range(8)]
    assert np.sqrt(np.mean(np.square(fields))) == pytest.approx(10.0, rel=0.3)
    # points of the grid are 1.5 arcmin apart
    steps = [np.diff(field, axis=2).std() for field in fields]
    assert np.mean(steps) < 4.0
    assert abs(np.corrcoef(fields[0].ravel(), fields[1].ravel())[0, 1]) < 0.5


def test_refraction_compresses_the_field_along_the_direction_to_the_zenith():
    optics = optics_of(zenith_distance=60.0)
    distance, angle = optics.observation.zenith
    assert 30.0 <= distance <= 60.0
    east, north = displacement(optics)
    up = np.array([np.sin(np.radians(angle)), np.cos(np.radians(angle))])
    along = up[0] * east + up[1] * north
    across = up[1] * east - up[0] * north
    assert np.abs(across).max() < 1.0
    height = up[0] * FIELD[0] + up[1] * FIELD[1]
    slope = np.polyfit(height.ravel(), along.ravel(), 1)[0]
    # R = 58.3 arcsec tan z: a degree higher is lifted by 58.3 / cos^2 z times a degree less
    expected = -58300.0 * np.radians(1.0) / np.cos(np.radians(distance)) ** 2
    assert slope == pytest.approx(expected, rel=0.01)


def test_red_stars_are_refracted_less():
    optics = optics_of(zenith_distance=45.0, dispersion=30.0)
    distance, angle = optics.observation.zenith
    mean = optics.settings.stars.color
    shift = displacement(optics, np.full(FIELD[0].shape, mean + 1.0)) - displacement(optics)
    expected = -30.0 * np.tan(np.radians(distance))
    assert np.allclose(shift[0], expected * np.sin(np.radians(angle)), atol=0.01)
    assert np.allclose(shift[1], expected * np.cos(np.radians(angle)), atol=0.01)


def test_psf_varies_over_the_field_by_what_is_set():
    still, moving = optics_of(), optics_of(seeing_structure=0.02, shear_structure=0.01)
    plane = np.stack(FIELD)
    assert moving.atmosphere.seeing(plane).std() == pytest.approx(0.02, rel=0.5)
    shear = moving.atmosphere.shear(plane)
    assert shear.real.std() == pytest.approx(0.01, rel=0.5)
    assert shear.imag.std() == pytest.approx(0.01, rel=0.5)
    detector = still.camera.detectors[0]
    x, y = np.array([0.0, 319.0]), np.array([0.0, 319.0])
    fwhm, g1, _ = (
        m - s
        for m, s in zip(moving.psf_at(detector, x, y), still.psf_at(detector, x, y), strict=True)
    )
    assert 0 < np.abs(fwhm).max() < 0.1
    assert 0 < np.abs(g1).max() < 0.05
