import logging

import numpy as np
import pytest
from astropy.table import Table

from coaddflow.calexp.model import MeasuredCcd
from coaddflow.exposure.photometry import flatten, map_cards, solve_zero_point
from coaddflow.image.masked_image import MaskedImage
from coaddflow.instrument.camera import load_camera
from coaddflow.measure.photometry import MatchedStars, zero_point
from coaddflow.settings.exposure_photometry import ExposurePhotometrySettings
from coaddflow.settings.photometry import PhotometrySettings

CAMERA = load_camera("decam")
CCDS = [detector.id for detector in CAMERA.detectors]
SETTINGS = ExposurePhotometrySettings(enabled=True)
PHOTOMETRY = PhotometrySettings()
ZERO_POINT = 27.3
ERROR = 0.01


def true_map(x_mm, y_mm):
    """A zero-point map of order 2 that spans about -0.05 to 0.05 mag over the focal plane."""
    u, v = np.asarray(x_mm) / 220.0, np.asarray(y_mm) / 220.0
    return 0.03 * u - 0.02 * v - 0.04 * u**2 + 0.02 * u * v + 0.01


def matched(x, y, flux, error, magnitude, magnitude_error):
    return MatchedStars(np.arange(len(x)), x, y, flux, error, magnitude, magnitude_error)


def exposure(n_stars, constants=None, seed=61, outliers=0.0, error=ERROR):
    """Return {ccd: MatchedStars} of stars with known magnitudes on all CCDs.

    n_stars: of each CCD, or a dictionary. constants: of CCDs, mag. Outliers, a fraction of the
    stars, are variable or wrongly matched: 0.3 to 1.5 mag brighter or fainter.
    """
    rng = np.random.default_rng(seed)
    stars = {}
    for ccd in CCDS:
        n = n_stars.get(ccd, 0) if isinstance(n_stars, dict) else n_stars
        detector = CAMERA.detector(ccd)
        x, y = (rng.uniform(0, size - 1, n) for size in detector.size)
        magnitude = rng.uniform(15.0, 19.0, n)
        zero = ZERO_POINT + true_map(*CAMERA.pixel_to_focal(detector, x, y))
        zero += (constants or {}).get(ccd, 0.0)
        instrumental = magnitude - zero + rng.normal(0.0, error, n)
        odd = rng.random(n) < outliers
        sign = rng.choice([-1.0, 1.0], n)
        instrumental += np.where(odd, sign * rng.uniform(0.3, 1.5, n), 0.0)
        flux = 10.0 ** (-0.4 * instrumental)
        stars[ccd] = matched(x, y, flux, 0.4 * np.log(10) * error * flux, magnitude, np.zeros(n))
    return stars


def errors_of(solution, constants=None):
    """Return solved minus true zero-points at the centres of all CCDs, and the stated errors."""
    zeros = [solution.of_ccd(CAMERA, detector)[0] for detector in CAMERA.detectors]
    true = [
        ZERO_POINT + true_map(*detector.center) + (constants or {}).get(detector.id, 0.0)
        for detector in CAMERA.detectors
    ]
    return np.array([z.value for z in zeros]) - true, np.array([z.error for z in zeros])


def test_a_map_over_the_focal_plane_is_recovered_in_spite_of_outliers():
    solution = solve_zero_point(exposure(20, outliers=0.15), CAMERA, SETTINGS, PHOTOMETRY)
    error, stated = errors_of(solution)
    assert np.sqrt(np.mean(error**2)) < 0.002
    assert np.abs(error).max() < 0.005
    assert solution.order == 2
    assert solution.scatter == pytest.approx(ERROR, rel=0.1)
    assert 0.3 < np.sqrt(np.mean((error / stated) ** 2)) < 2.0


def test_outliers_are_left_out_and_the_others_are_not():
    stars = exposure(20, outliers=0.15)
    solution = solve_zero_point(stars, CAMERA, SETTINGS, PHOTOMETRY)
    for ccd, own in stars.items():
        zero = ZERO_POINT + true_map(*CAMERA.pixel_to_focal(CAMERA.detector(ccd), own.x, own.y))
        odd = np.abs(own.magnitude + 2.5 * np.log10(own.flux) - zero) > 0.25
        assert not (solution.used[ccd] & odd).any()
    n_used = sum(np.count_nonzero(used) for used in solution.used.values())
    assert n_used > 0.82 * 20 * len(CCDS)


def test_a_ccd_with_three_stars_and_one_without_have_the_zero_point_of_the_exposure():
    poor, empty = CCDS[7], CCDS[30]
    n_stars = dict.fromkeys(CCDS, 20) | {poor: 3, empty: 0}
    solution = solve_zero_point(exposure(n_stars), CAMERA, SETTINGS, PHOTOMETRY)
    error, stated = errors_of(solution)
    for ccd, n in ((poor, 3), (empty, 0)):
        zero, _ = solution.of_ccd(CAMERA, CAMERA.detector(ccd))
        assert abs(error[CCDS.index(ccd)]) < 0.004
        assert zero.n_stars == n
        assert zero.scatter > 0
        assert stated[CCDS.index(ccd)] < 0.01


def test_a_ccd_that_was_not_given_has_a_zero_point_too():
    stars = exposure(20)
    del stars[CCDS[30]]
    solution = solve_zero_point(stars, CAMERA, SETTINGS, PHOTOMETRY)
    error, _ = errors_of(solution)
    assert abs(error[30]) < 0.004


def test_constants_of_ccds_are_found_where_there_are_stars_and_admitted_where_not():
    rng = np.random.default_rng(62)
    constants = dict(zip(CCDS, rng.normal(0.0, 0.03, len(CCDS)), strict=True))
    n_stars = dict.fromkeys(CCDS, 40) | {CCDS[7]: 3, CCDS[30]: 0}
    solution = solve_zero_point(exposure(n_stars, constants), CAMERA, SETTINGS, PHOTOMETRY)
    error, stated = errors_of(solution, constants)
    rich = [k for k, ccd in enumerate(CCDS) if n_stars[ccd] == 40]
    assert np.sqrt(np.mean(error[rich] ** 2)) < 0.005
    assert solution.ccd_sigma == pytest.approx(0.03, rel=0.35)
    assert stated[30] == pytest.approx(0.03, rel=0.4)
    assert stated[30] > 1.8 * stated[7] > 3.6 * np.median(stated)
    assert (np.abs(error) < 4.0 * stated).all()


@pytest.mark.parametrize("factor", [1e30, 1e-30, 3.0])
def test_one_ccd_with_absurd_fluxes_does_not_move_the_zero_points_of_the_others(factor):
    for ccds in (CCDS, CCDS[:4]):
        stars = {ccd: s for ccd, s in exposure(20).items() if ccd in ccds}
        without = solve_zero_point(
            {ccd: s for ccd, s in stars.items() if ccd != ccds[1]}, CAMERA, SETTINGS, PHOTOMETRY
        )
        strange = stars[ccds[1]]
        stars[ccds[1]] = strange._replace(
            flux=strange.flux * factor, flux_error=strange.flux_error * factor
        )
        solved = solve_zero_point(stars, CAMERA, SETTINGS, PHOTOMETRY)
        for ccd in ccds:
            if ccd != ccds[1]:
                one, other = (s.of_ccd(CAMERA, CAMERA.detector(ccd))[0] for s in (solved, without))
                assert one.value == pytest.approx(other.value, abs=0.002)


def test_few_stars_a_ccd_repeat_better_than_ccd_by_ccd():
    scatter = {"exposure": [], "ccd": []}
    for seed in range(5):
        stars = exposure(5, seed=70 + seed)
        solution = solve_zero_point(stars, CAMERA, SETTINGS, PHOTOMETRY)
        scatter["exposure"].append(errors_of(solution)[0])
        scatter["ccd"].append(
            [
                zero_point(own, PHOTOMETRY).value
                - ZERO_POINT
                - true_map(*CAMERA.detector(ccd).center)
                for ccd, own in stars.items()
            ]
        )
    by_exposure, by_ccd = (np.std(scatter[name], axis=0).mean() for name in ("exposure", "ccd"))
    assert by_exposure < 0.35 * by_ccd


def measured_ccd(detector, level=100.0):
    """A CCD with a flat image and one source on every 200th pixel."""
    ny, nx = detector.shape
    image = np.full((ny, nx), level)
    x, y = (c.ravel().astype(float) for c in np.meshgrid(range(0, nx, 200), range(0, ny, 200)))
    sources = Table({"x": x, "y": y})
    for name in ("flux_psf", "flux_isophotal", "peak"):
        sources[name] = np.full(x.size, 1e4)
    for name in ("flux_psf_error", "flux_isophotal_error"):
        sources[name] = np.full(x.size, 50.0)
    sources["flux_aperture"] = np.full((x.size, 3), 9e3)
    sources["flux_aperture_error"] = np.full((x.size, 3), 45.0)
    planes = MaskedImage(image, np.full((ny, nx), 25.0), np.zeros((ny, nx), dtype=np.int32))
    return MeasuredCcd(planes, None, None, None, sources, 6.0, 1.1, 1.0)


def test_a_star_has_one_flux_all_over_the_focal_plane_after_application():
    solution = solve_zero_point(exposure(40, error=0.005), CAMERA, SETTINGS, PHOTOMETRY)
    magnitudes = []
    for ccd in (CCDS[0], CCDS[25], CCDS[-1]):
        detector = CAMERA.detector(ccd)
        zero, zero_map = solution.of_ccd(CAMERA, detector)
        flat = flatten(measured_ccd(detector), zero_map)
        x, y = np.asarray(flat.sources["x"]), np.asarray(flat.sources["y"])
        # electrons of a star of magnitude 18 as the sky and camera give them
        counted = 10.0 ** (
            -0.4 * (18.0 - ZERO_POINT - true_map(*CAMERA.pixel_to_focal(detector, x, y)))
        )
        factor = flat.masked_image.image[y.astype(int), x.astype(int)] / 100.0
        magnitudes.append(zero.value - 2.5 * np.log10(counted * factor))
        assert np.asarray(flat.sources["flux_psf"]) / 1e4 == pytest.approx(factor, rel=1e-5)
        assert np.asarray(flat.sources["flux_aperture"])[:, 2] / 9e3 == pytest.approx(
            factor, rel=1e-5
        )
    magnitudes = np.concatenate(magnitudes)
    assert np.abs(magnitudes - 18.0).max() < 0.003
    before = true_map(*CAMERA.pixel_to_focal(CAMERA.detector(CCDS[0]), x, y))
    assert np.ptp(before) > 0.01


def test_signal_over_noise_stays_and_the_centre_is_untouched():
    detector = CAMERA.detector(CCDS[0])
    measured = measured_ccd(detector)
    solution = solve_zero_point(exposure(20), CAMERA, SETTINGS, PHOTOMETRY)
    flat = flatten(measured, solution.of_ccd(CAMERA, detector)[1])
    before, after = measured.masked_image, flat.masked_image
    ratio = after.image / np.sqrt(after.variance)
    assert np.allclose(ratio, before.image / np.sqrt(before.variance), rtol=1e-5)
    ny, nx = before.shape
    assert after.image[ny // 2, nx // 2] == pytest.approx(100.0, rel=1e-4)
    assert np.ptp(after.image) > 0.5
    assert (np.asarray(measured.sources["flux_psf"]) == 1e4).all()
    assert before.image.min() == before.image.max()


def test_header_says_what_was_applied_to_the_pixels():
    detector = CAMERA.detector(CCDS[12])
    solution = solve_zero_point(exposure(20), CAMERA, SETTINGS, PHOTOMETRY)
    _, zero_map = solution.of_ccd(CAMERA, detector)
    cards = map_cards(zero_map)
    x, y = 123.0, 3456.0
    u, v = ((c - cards[k]) / cards["ZPMHALF"] for c, k in ((x + 1, "ZPMX"), (y + 1, "ZPMY")))
    shift = sum(
        cards[f"ZPM{p}{q}"] * u**p * v**q for p, q in ((1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
    )
    factor = zero_map.flux_factor()[3456, 123]
    assert cards["ZPMAP"] is True
    assert factor == pytest.approx(10.0 ** (-0.4 * shift), rel=1e-6)
    assert abs(factor - 1.0) > 1e-3
    assert map_cards(None)["ZPMAP"] is False


def test_order_is_lowered_for_few_stars():
    for n, order in ((1, 2), (0.6, 1), (0.3, 0)):
        some = dict.fromkeys(CCDS[: int(n * len(CCDS))], 1)
        assert solve_zero_point(exposure(some), CAMERA, SETTINGS, PHOTOMETRY).order == order


@pytest.mark.parametrize("n_stars", [0, {CCDS[3]: 5, CCDS[9]: 4}])
def test_too_few_stars_in_all_leave_it_to_the_ccds(n_stars, caplog):
    with caplog.at_level(logging.WARNING):
        assert solve_zero_point(exposure(n_stars), CAMERA, SETTINGS, PHOTOMETRY) is None
    assert "10 are needed" in caplog.text
    assert solve_zero_point({}, CAMERA, SETTINGS, PHOTOMETRY) is None


def test_stars_without_magnitude_do_not_count():
    stars = exposure(20)
    odd = CCDS[5]
    stars[odd] = stars[odd]._replace(magnitude=np.full(20, np.nan))
    solution = solve_zero_point(stars, CAMERA, SETTINGS, PHOTOMETRY)
    assert solution.of_ccd(CAMERA, CAMERA.detector(odd))[0].n_stars == 0
    assert abs(errors_of(solution)[0][5]) < 0.004


def test_a_camera_of_one_ccd():
    camera = load_camera("microobservatory")
    rng = np.random.default_rng(63)
    x, y, magnitude = rng.uniform(0, 649, 60), rng.uniform(0, 499, 60), rng.uniform(8, 12, 60)
    flux = 10.0 ** (-0.4 * (magnitude - 20.0 - 0.05 * (x - 324.5) / 325.0))
    stars = {0: matched(x, y, flux, 1e-3 * flux, magnitude, np.zeros(60))}
    solution = solve_zero_point(stars, camera, SETTINGS, PHOTOMETRY)
    zero, zero_map = solution.of_ccd(camera, camera.detector(0))
    assert zero.value == pytest.approx(20.0, abs=0.002)
    assert zero_map.magnitude(649.0, 250.0) == pytest.approx(0.05, abs=0.004)
