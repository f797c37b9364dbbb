import numpy as np
import pytest
from astropy.io import fits
from solved_tract import SETTINGS, solve

from coaddflow.errors import InputError
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.instrument.camera import load_camera
from coaddflow.solution.detector_maps import DetectorMaps
from coaddflow.solution.photometry import solve_photometry
from coaddflow.solution.product import (
    ExposureSolution,
    exposure_wcs,
    read_exposure_solution,
    write_exposure_solution,
)


@pytest.fixture(scope="module")
def exposure(turbulent_tract):
    """The parts of an exposure, with both fields of waves."""
    simulated = turbulent_tract.simulated
    photometry = solve_photometry(
        *(turbulent_tract.detections, turbulent_tract.links, simulated.exposures),
        *(simulated.references, turbulent_tract.color, simulated.maps),
        *(SETTINGS.photometry, SETTINGS.clouds),
    )
    astrometry = solve(turbulent_tract, turbulence=True).solution
    return ExposureSolution(astrometry.of_exposure(2), photometry.of_exposure(2))


def test_what_is_read_is_what_was_written(tmp_path, exposure):
    path = tmp_path / "1003.fits"
    write_exposure_solution(path, exposure)
    positions, calibration = read_exposure_solution(path)
    assert positions.name == calibration.name == "1003"
    x, y = np.array([10.0, 2000.0]), np.array([4000.0, 5.0])
    for color in (None, np.array([0.3, -0.5])):
        expected = exposure.positions.to_sky(5, x, y, color)
        np.testing.assert_array_equal(positions.to_sky(5, x, y, color), expected)
    expected = exposure.calibration.zero_point(5, x, y)
    # the zero-points are written with the CCDs where astrometry has put them, a pixel away
    np.testing.assert_allclose(calibration.zero_point(5, x, y), expected, atol=1e-5)
    assert positions.excess == exposure.positions.excess
    assert positions.field.error == exposure.positions.field.error


def test_exposure_without_fields_and_photometry(tmp_path, exposure):
    path = tmp_path / "1003.fits"
    plain = type(exposure.positions)(**{**vars(exposure.positions), "field": None})
    write_exposure_solution(path, ExposureSolution(plain, None))
    found = read_exposure_solution(path)
    assert found.calibration is None
    assert found.positions.field is None


def test_wcs_of_a_ccd_follows_the_map(exposure):
    # turbulence included: 0.01 pixel are 2.6 mas, and waves are 8 arcmin long at least
    wcs = exposure_wcs(exposure.positions, 5)
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0.0, [[2047.0], [4095.0]], (2, 200))
    ra, dec = pixel_to_sky(wcs, x, y)
    there = exposure.positions.to_sky(5, x, y)
    cos = np.cos(np.radians(dec))
    off = np.hypot(((ra - there[0] + 180.0) % 360.0 - 180.0) * cos, dec - there[1]) * 3.6e6
    assert off.max() < 1.0
    assert wcs.array_shape == (4096, 2048)


def test_unknown_ccd_is_named(exposure):
    for part in (exposure.positions.to_sky, exposure.calibration.zero_point):
        with pytest.raises(InputError, match="exposure 1003 has no CCD 99"):
            part(99, np.zeros(1), np.zeros(1))


@pytest.mark.parametrize("damage", ["no map", "short polynomial", "nan", "cut"])
def test_damaged_files_are_named(tmp_path, exposure, damage):
    path = tmp_path / "1003.fits"
    write_exposure_solution(path, exposure)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2880])
    else:
        with fits.open(path) as hdus:
            if damage == "no map":
                del hdus["MAP"]
            elif damage == "short polynomial":
                hdus["MAP"].data = hdus["MAP"].data[:, :-1]
            else:
                hdus["MAP"].data[0, 0] = np.nan
            hdus.writeto(tmp_path / "damaged.fits")
        path = tmp_path / "damaged.fits"
    with pytest.raises(InputError, match=rf"{path.name}: .*[Ss]olve the tract again"):
        read_exposure_solution(path)


def test_detectors_of_a_camera_are_where_its_file_says():
    camera = load_camera("decam")
    maps = DetectorMaps.of_camera(camera)
    x, y = np.array([0.0, 1500.0, 2047.0]), np.array([4095.0, 100.0, 0.0])
    for index in (0, 30, 59):
        detector = camera.detectors[index]
        unit = maps.unit(np.full(3, index), x, y)
        point = np.stack(unit, axis=1) / (maps.size[index] / maps.size[index].max())
        found = maps.at(point)[index]
        focal = camera.pixel_to_focal(detector, x, y)
        expected = camera.focal_to_tangent(*focal, -camera.rotation_offset)
        np.testing.assert_allclose(found, expected, atol=1e-4 * 0.26 / 3600.0)
    assert maps.pixel_scale.mean() * 3600.0 == pytest.approx(camera.pixel_scale, rel=0.02)
    assert 1.0 < maps.radius < 1.2
