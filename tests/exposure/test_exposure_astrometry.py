"""One solution for a mosaic: every CCD lands where the sky is, also those with few stars."""

import dataclasses
import logging

import numpy as np
import pytest
from astropy.table import Table

from coaddflow.astrometry.ccd import CcdStars, solve_ccd
from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.astrometry.refcat import ccd_cone, exposure_cone, stars_in_cone
from coaddflow.errors import CcdFailure
from coaddflow.exposure.astrometry import solve_exposure
from coaddflow.geometry import sphere
from coaddflow.geometry.wcs import pixel_to_sky, sky_to_pixel
from coaddflow.instrument.camera import Camera, load_camera
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings

NX, NY = 1000, 1600
SETTINGS = AstrometrySettings(max_pointing_error=10.0)
FIELD = ExposureAstrometrySettings(enabled=True)
POINTING = (150.0, 2.0, 30.0)


def mosaic(columns=3, rows=3):
    """Return a camera of ``columns`` x ``rows`` CCDs with gaps, 0.3 arcsec per pixel."""
    base = load_camera("mini").model_dump()
    box = (0, 0, NX, NY)
    amplifier = {"name": "A", "data": box, "target": box, "gain": 1.0, "read_noise": 5.0}
    base["detectors"] = [
        {
            "id": number,
            "name": f"C{number}",
            "extension": number,
            "size": (NX, NY),
            "center": (
                (number % columns - (columns - 1) / 2) * (NX + 60) * 0.015,
                (number // columns - (rows - 1) / 2) * (NY + 80) * 0.015,
            ),
            "amplifiers": [{**amplifier, "saturation": 6e4}],
        }
        for number in range(columns * rows)
    ]
    return Camera.model_validate(
        {**base, "pixel_size": 0.015, "pixel_scale": 0.3, "distortion": (0.02,), "crosstalk": ()}
    )


def built(camera, seed=1, offset=3.0, turn=1.0, distortion=(0.08,), moved=None):
    """Return the camera as it really is: CCDs misplaced by pixels and turned, more distortion.

    ``turn`` is in pixels at the middle of the short edge; ``moved`` adds pixels to single CCDs.
    """
    rng = np.random.default_rng(seed)
    content = camera.model_dump()
    for detector in content["detectors"]:
        step = rng.normal(0.0, offset, 2) + (moved or {}).get(detector["id"], 0.0)
        detector["center"] = tuple(np.array(detector["center"]) + step * camera.pixel_size)
        angle = rng.normal(0.0, turn) / (max(detector["size"]) / 2.0)
        detector["rotation"] += float(np.degrees(angle))
    content["distortion"] = distortion
    return Camera.model_validate(content)


class Exposure:
    """A simulated exposure: what is measured, the catalogue, and the truth."""

    def __init__(
        self,
        truth,
        n_stars=40,
        few=None,
        noise=0.03,
        wrong=0.0,
        arcmin=0.5,
        turned=0.3,
        seed=3,
        pointing=POINTING,
    ):
        rng = np.random.default_rng(seed)
        self.truth, self.header = truth, pointing
        step = arcmin / 60.0 / np.sqrt(2.0)
        true = sphere.tan_deproject(step, step, *pointing[:2])
        self.pointing = (float(true[0]), float(true[1]), pointing[2] + turned)
        self.stars, sky = {}, []
        for detector in truth.detectors:
            nx, ny = detector.size
            n = (few or {}).get(detector.id, n_stars)
            x, y = rng.random((2, n)) * np.array([[nx - 1], [ny - 1]])
            mag = rng.uniform(14.0, 20.0, n)
            sky.append(np.stack([*truth.pixel_to_sky(detector, x, y, *self.pointing), mag]))
            spurious = round(wrong * n)
            x = np.append(x + rng.normal(0, noise, n), rng.random(spurious) * nx)
            y = np.append(y + rng.normal(0, noise, n), rng.random(spurious) * ny)
            flux = 10 ** (-0.4 * np.append(mag, rng.uniform(14.0, 20.0, spurious)))
            error = np.full(x.size, noise)
            self.stars[detector.id] = CcdStars(x, y, flux, error, detector.shape)
        sky.append(self._around(rng, n_stars, wrong))
        self.refcat = Table(np.concatenate(sky, axis=1).T, names=("ra", "dec", "mag"))

    def _around(self, rng, n_stars, wrong):
        """Return stars beside the CCDs, as dense as on them, and wrong ones everywhere."""
        detectors = self.truth.detectors
        *centre, radius = exposure_cone(self.truth, detectors, *self.header, 10.0 / 60.0)
        nx, ny = detectors[0].size
        density = n_stars / (nx * ny * (self.truth.pixel_scale / 3600.0) ** 2)
        parts = []
        for part, everywhere in ((1.0, False), (wrong, True)):
            n = int(part * density * np.pi * radius**2)
            r, angle = radius * np.sqrt(rng.random(n)), 2.0 * np.pi * rng.random(n)
            sky = np.stack(sphere.tan_deproject(r * np.cos(angle), r * np.sin(angle), *centre))
            beside = np.ones(n, bool)
            for detector in detectors:
                x, y = self.truth.sky_to_pixel(detector, *sky, *self.pointing)
                beside &= ~((x > -0.5) & (x < nx - 0.5) & (y > -0.5) & (y < ny - 0.5))
            keep = beside | everywhere
            parts.append(np.vstack([sky, rng.uniform(14.0, 20.0, n)])[:, keep])
        return np.concatenate(parts, axis=1)

    def solve(self, camera, settings=SETTINGS, field=FIELD):
        """Solve it with a camera file."""
        return solve_exposure(self.stars, camera, *self.header, self.refcat, settings, field)

    def alone(self, camera, ccd):
        """Solve one CCD by itself."""
        detector, stars = camera.detector(ccd), self.stars[ccd]
        cone = ccd_cone(camera, detector, *self.header, SETTINGS.max_pointing_error / 60.0)
        rows = stars_in_cone(self.refcat, *cone)
        initial = predicted_wcs(camera, detector, *self.header)
        return rows, solve_ccd(stars, self.refcat[rows], initial, SETTINGS)

    def errors(self, wcs, ccd):
        """Return the distances of a WCS from the truth on a grid over a CCD, pixels."""
        y, x = np.mgrid[0 : NY - 1 : 9j, 0 : NX - 1 : 9j]
        true = self.truth.pixel_to_sky(self.truth.detector(ccd), x, y, *self.pointing)
        return sphere.separation(*pixel_to_sky(wcs, x, y), *true) * 3600.0 / 0.3


def largest_errors(exposure, result):
    """Return the largest error of each solved CCD."""
    return {ccd: exposure.errors(s.wcs, ccd).max() for ccd, s in result.solutions.items()}


@pytest.fixture(scope="module")
def camera():
    """Return the camera file of nine CCDs."""
    return mosaic()


def test_misplaced_turned_ccds_and_unknown_distortion(camera):
    truth = built(camera)
    exposure = Exposure(truth)
    # what the camera file does not know moves stars by several pixels, beside a wrong pointing
    blind = truth.model_copy(update={"distortion": camera.distortion})
    corner = [c.pixel_to_sky(c.detector(0), 0, 0, *exposure.pointing) for c in (truth, blind)]
    assert sphere.separation(*corner[0], *corner[1]) * 3600.0 / 0.3 > 3.0
    result = exposure.solve(camera)
    assert not result.fallbacks
    assert not result.failures
    errors = largest_errors(exposure, result)
    assert sorted(errors) == list(range(9))
    assert max(errors.values()) < 0.1
    fit = result.fit
    assert fit.pointing_error == pytest.approx(0.5, abs=0.03)
    assert fit.rotation == pytest.approx(30.3, abs=0.05)
    assert fit.n_stars + fit.n_clipped == 360
    assert fit.rms_pixel == pytest.approx(0.03 * np.sqrt(2.0), rel=0.1)
    assert fit.n_stars == sum(s.n_matched for s in result.solutions.values())


def test_terms_of_the_ccds_say_how_they_are_displaced(camera):
    truth = built(camera, distortion=camera.distortion)
    result = Exposure(truth, 100).solve(camera)
    known, found = [], []
    for ccd, terms in result.fit.ccds.items():
        before, after = camera.detector(ccd), truth.detector(ccd)
        known.append((np.array(after.center) - before.center) / camera.pixel_size)
        found.append(terms.offset)
        turned = terms.rotation - (after.rotation - before.rotation)
        # what all CCDs have in common is in the pointing and the rotation of the exposure
        assert turned == pytest.approx(0.0, abs=0.1)
    known, found = np.array(known), np.array(found)
    assert np.corrcoef(known.ravel(), found.ravel())[0, 1] > 0.9
    assert 0.5 < result.fit.offset_sigma / np.std(known) < 2.0


def test_three_stars_are_enough_for_a_ccd_in_its_exposure(camera):
    exposure = Exposure(built(camera), few={4: 3}, seed=4)
    with pytest.raises(CcdFailure, match="at least 5"):
        exposure.alone(camera, 4)
    result = exposure.solve(camera)
    assert not result.fallbacks
    solution = result.solutions[4]
    assert solution.n_matched == 3
    assert exposure.errors(solution.wcs, 4).max() < 0.1
    assert result.fit.ccds[4].formal_error < 0.2


def test_no_ccd_needs_to_be_found_by_itself(camera):
    few = {ccd: 4 for ccd in range(9)}
    truth = built(camera, offset=0.5, turn=0.1, distortion=camera.distortion)
    exposure = Exposure(truth, few=few, arcmin=6.0, turned=70.0)
    for ccd in few:
        with pytest.raises(CcdFailure):
            exposure.alone(camera, ccd)
    result = exposure.solve(camera)
    assert sorted(result.solutions) == list(few)
    assert max(largest_errors(exposure, result).values()) < 0.2


def test_wrong_stars_pointing_and_rotation(camera):
    exposure = Exposure(built(camera), wrong=0.3, few={7: 3}, arcmin=8.0, turned=-117.0, seed=6)
    result = exposure.solve(camera)
    assert not result.fallbacks
    errors = largest_errors(exposure, result)
    assert max(errors.values()) < 0.15
    assert result.fit.rotation == pytest.approx(273.0, abs=0.05)
    assert result.fit.pointing_error == pytest.approx(8.0, abs=0.03)


@pytest.mark.parametrize("pointing", [(359.99, 89.9, 0.0), (0.01, -60.0, 200.0)])
def test_near_the_pole_and_at_ra_0(camera, pointing):
    exposure = Exposure(built(camera), arcmin=5.0, pointing=pointing)
    result = exposure.solve(camera)
    assert not result.fallbacks
    assert max(largest_errors(exposure, result).values()) < 0.1


def test_a_mirrored_camera_file(camera):
    truth = built(camera)
    mirrored = camera.model_copy(update={"flip_x": True, "rotation_offset": 10.0})
    exposure = Exposure(truth, arcmin=2.0)
    result = exposure.solve(mirrored)
    assert not result.failures
    assert max(largest_errors(exposure, result).values()) < 0.15


def test_a_ccd_far_from_its_place_is_solved_alone_with_a_warning(camera, caplog):
    exposure = Exposure(built(camera, moved={2: 50.0}))
    with caplog.at_level(logging.WARNING):
        result = exposure.solve(camera)
    assert list(result.fallbacks) == [2]
    assert "CCD 2 is solved by itself: it is" in caplog.text
    rows, alone = exposure.alone(camera, 2)
    solution = result.solutions[2]
    assert solution.wcs.to_header(relax=True) == alone.wcs.to_header(relax=True)
    assert np.array_equal(solution.reference_index, rows[alone.reference_index])
    others = largest_errors(exposure, result)
    del others[2]
    assert max(others.values()) < 0.1


def test_a_ccd_of_bad_positions_does_not_spoil_the_others(camera):
    exposure = Exposure(built(camera))
    rng = np.random.default_rng(1)
    bad = exposure.stars[0]
    exposure.stars[0] = dataclasses.replace(bad, x=bad.x + rng.normal(0, 0.4, bad.x.size))
    result = exposure.solve(camera)
    errors = largest_errors(exposure, result)
    assert max(errors[ccd] for ccd in range(1, 9)) < 0.1


def test_too_few_stars_and_no_stars_fail(camera):
    exposure = Exposure(built(camera), few={1: 1, 5: 0})
    result = exposure.solve(camera)
    assert sorted(result.failures) == sorted(result.fallbacks) == [1, 5]
    assert {f.reason for f in result.failures.values()} == {"too_few_stars"}
    assert sorted(result.solutions) == [0, 2, 3, 4, 6, 7, 8]


def test_a_ccd_without_enough_stars_takes_the_solution_of_its_exposure(camera):
    """Where CCDs are at their places the others tell where one without stars is."""
    truth = built(camera, offset=0.2, turn=0.02, distortion=camera.distortion)
    exposure = Exposure(truth, few={1: 1, 5: 0}, seed=4)
    result = exposure.solve(camera)
    assert not result.failures
    predicted = {ccd for ccd, solution in result.solutions.items() if solution.is_predicted}
    assert predicted == {1, 5}
    for ccd in predicted:
        solution = result.solutions[ccd]
        assert solution.n_matched == 0
        assert exposure.errors(solution.wcs, ccd).max() < 2.0 * solution.rms_pixel < 1.0
    never = exposure.solve(camera, field=FIELD.model_copy(update={"max_predicted_error": 0.0}))
    assert sorted(never.failures) == [1, 5]


@pytest.mark.parametrize("factor", [1.0, 1e30])
def test_a_ccd_whose_stars_contradict_its_exposure_does_not_take_its_solution(camera, factor):
    """Nor does it move that of the others, however bright its stars are said to be."""
    truth = built(camera, offset=0.2, turn=0.02, distortion=camera.distortion)
    exposure = Exposure(truth, seed=4)
    rng = np.random.default_rng(1)
    stars = exposure.stars[4]
    x, y = rng.random((2, stars.x.size)) * np.array([[NX], [NY]])
    exposure.stars[4] = dataclasses.replace(stars, x=x, y=y, flux=stars.flux * factor)
    result = exposure.solve(camera)
    assert list(result.failures) == [4]
    assert max(largest_errors(exposure, result).values()) < 0.2


@pytest.mark.parametrize("seed", [8, 9])
def test_two_reference_stars_on_one_of_four_ccds(seed):
    """Three CCDs tell where the fourth is, as well as two of them tell where the third is."""
    few = mosaic(columns=2, rows=2)
    truth = built(few, offset=0.2, turn=0.02, distortion=few.distortion)
    exposure = Exposure(truth, seed=seed)
    sky = np.asarray(exposure.refcat["ra"]), np.asarray(exposure.refcat["dec"])
    x, y = truth.sky_to_pixel(truth.detector(3), *sky, *exposure.pointing)
    on_it = np.flatnonzero((np.abs(x - NX / 2) < NX / 2 + 50) & (np.abs(y - NY / 2) < NY / 2 + 50))
    exposure.refcat.remove_rows(on_it[2:])
    result = exposure.solve(few)
    assert result.fit.rms_pixel < 0.05
    solution = result.solutions[3]
    assert solution.is_predicted
    assert exposure.errors(solution.wcs, 3).max() < solution.rms_pixel < 0.5


def test_an_exposure_of_one_ccd_is_solved_as_that_ccd(camera, caplog):
    exposure = Exposure(built(camera))
    exposure.stars = {3: exposure.stars[3]}
    with caplog.at_level(logging.WARNING):
        result = exposure.solve(camera)
    assert result.fit is None
    assert "the exposure is not solved as a whole" in caplog.text
    _, alone = exposure.alone(camera, 3)
    assert np.array_equal(result.solutions[3].residual_x, alone.residual_x)


def test_a_wrong_sky_gives_no_solution(camera):
    exposure = Exposure(built(camera), few={ccd: 12 for ccd in range(9)}, n_stars=12)
    exposure.refcat["ra"] = exposure.refcat["ra"][::-1].copy()
    result = exposure.solve(camera)
    assert result.fit is None
    assert not result.solutions
    assert {f.reason for f in result.failures.values()} == {"no_astrometric_match"}


def test_the_exposure_is_better_than_its_ccds_alone(camera):
    errors = []
    for seed in range(4):
        truth = built(camera, turn=0.3, distortion=(0.03,))
        exposure = Exposure(truth, 8, noise=0.1, turned=0.0, seed=seed)
        result = exposure.solve(camera)
        assert len(result.solutions) == 9
        for ccd, solution in result.solutions.items():
            alone = exposure.alone(camera, ccd)[1].wcs
            pair = (solution.wcs, alone)
            errors.append([np.mean(exposure.errors(wcs, ccd) ** 2) for wcs in pair])
    together, alone = np.sqrt(np.mean(errors, axis=0))
    assert together < 0.8 * alone


def test_solution_of_a_ccd_describes_itself(camera):
    exposure = Exposure(built(camera), wrong=0.2)
    solution = exposure.solve(camera).solutions[8]
    i, k = solution.source_index, solution.reference_index
    x, y = sky_to_pixel(solution.wcs, exposure.refcat["ra"][k], exposure.refcat["dec"][k])
    stars = exposure.stars[8]
    assert solution.residual_x == pytest.approx(stars.x[i] - x, abs=1e-3)
    assert solution.residual_y == pytest.approx(stars.y[i] - y, abs=1e-3)
    assert solution.wcs.array_shape == (NY, NX)
    assert tuple(solution.wcs.wcs.crpix) == (NX / 2 + 0.5, NY / 2 + 0.5)
    assert solution.pixel_scale == pytest.approx(0.3, rel=0.01)
    assert solution.rotation == pytest.approx(30.3, abs=0.2)
    assert solution.pointing_error == pytest.approx(0.5, abs=0.1)


def test_order_of_rows_and_of_ccds_does_not_matter(camera):
    exposure = Exposure(built(camera), wrong=0.2)
    first = exposure.solve(camera)
    exposure.stars = dict(reversed(exposure.stars.items()))
    rows = np.random.default_rng(3).permutation(len(exposure.refcat))
    exposure.refcat = exposure.refcat[rows]
    second = exposure.solve(camera)
    for ccd, solution in first.solutions.items():
        other = second.solutions[ccd]
        assert np.array_equal(solution.source_index, other.source_index)
        assert np.array_equal(solution.reference_index, rows[other.reference_index])
        assert solution.residual_x == pytest.approx(other.residual_x, abs=1e-9)


@pytest.mark.parametrize("name", ["decam", "hsc"])
def test_real_focal_planes(name):
    camera = load_camera(name)
    # every other CCD keeps it cheap
    part = camera.model_copy(update={"detectors": camera.detectors[::8]})
    content = {**part.model_dump(), "crosstalk": ()}  # with CCDs that are left out
    rng = np.random.default_rng(2)
    for detector in content["detectors"]:
        step = rng.normal(0.0, 2.0, 2) * camera.pixel_size
        detector["center"] = tuple(np.array(detector["center"]) + step)
    content["distortion"] = (camera.distortion[0] + 1e-4, *camera.distortion[1:])
    truth = Camera.model_validate(content)
    few = truth.detectors[3].id
    exposure = Exposure(truth, 25, few={few: 3}, arcmin=2.0)
    result = exposure.solve(part)
    assert not result.fallbacks
    for ccd, solution in result.solutions.items():
        detector = truth.detector(ccd)
        nx, ny = detector.size
        y, x = np.mgrid[0 : ny - 1 : 9j, 0 : nx - 1 : 9j]
        true = truth.pixel_to_sky(detector, x, y, *exposure.pointing)
        error = sphere.separation(*pixel_to_sky(solution.wcs, x, y), *true) * 3600.0
        assert error.max() / camera.pixel_scale < (0.2 if ccd == few else 0.1)


def test_two_ccds_of_three_stars_on_a_line_do_not_make_an_exposure(camera):
    exposure = Exposure(
        built(camera, offset=0.1, turn=0.0, distortion=camera.distortion), n_stars=3
    )
    exposure.stars = {ccd: exposure.stars[ccd] for ccd in (0, 1)}
    result = exposure.solve(camera)
    assert sorted([*result.solutions, *result.failures]) == [0, 1]
    for ccd, solution in result.solutions.items():
        error = exposure.errors(solution.wcs, ccd).max()
        assert error < 3.0 * result.fit.ccds[ccd].formal_error
