"""The astrometric solution: stars land where the catalogue says, all over the CCD."""

import numpy as np
import pytest
from astropy.table import Table

from coaddflow.astrometry.ccd import CcdStars, fit_ccd, match_ccd, solve_ccd
from coaddflow.errors import CcdFailure
from coaddflow.geometry import sphere
from coaddflow.geometry.wcs import make_tan_sip, pixel_to_sky, sky_to_pixel
from coaddflow.settings.astrometry import AstrometrySettings

SHAPE = (2000, 1000)
SCALE = 0.25 / 3600.0
SETTINGS = AstrometrySettings(max_pointing_error=10.0)


def ccd_wcs(ra=150.0, dec=2.0, angle=0.0, order=3, flip=False, scale=SCALE, strength=4.0):
    """Return a WCS whose distortion moves the corners by some pixels.

    ``angle`` is the position angle of +y; ``flip`` turns east to the right.
    """
    rng = np.random.default_rng(8)
    a, b = np.zeros((2, order + 1, order + 1))
    for n in range(2, order + 1):
        for q in range(n + 1):
            a[n - q, q], b[n - q, q] = rng.normal(0.0, strength, 2) / 1118.0**n
    angle = np.radians(angle)
    # columns: where +x and +y point, (east, north)
    up = np.array([np.sin(angle), np.cos(angle)])
    right = np.array([-np.cos(angle), np.sin(angle)]) * (-1.0 if flip else 1.0)
    cd = scale * np.stack([right, up], axis=1)
    centre = (SHAPE[1] - 1) / 2.0, (SHAPE[0] - 1) / 2.0
    return make_tan_sip((ra, dec), centre, cd, a, b, SHAPE)


def observe(wcs, n_stars, n_spurious=0, noise=0.0, seed=1, radius=0.3, density=1.0):
    """Return the sources (x, y, flux), the catalogue, and which reference star each source is.

    The catalogue covers a circle of ``radius`` degrees around the CCD, with as many stars per
    area as the CCD has (times ``density``); the stars of the CCD are its first rows.
    """
    rng = np.random.default_rng(seed)
    x, y = rng.random((2, n_stars)) * np.array([[SHAPE[1] - 1], [SHAPE[0] - 1]])
    ra, dec = pixel_to_sky(wcs, x, y)
    mag = rng.uniform(12.0, 18.0, n_stars)
    n = int(density * n_stars * np.pi * radius**2 / (SHAPE[0] * SHAPE[1] * SCALE**2))
    distance, angle = radius * np.sqrt(rng.random(n)), 2 * np.pi * rng.random(n)
    plane = distance * np.cos(angle), distance * np.sin(angle)
    around = np.stack(sphere.tan_deproject(*plane, *wcs.wcs.crval))
    around = around[:, np.isnan(sky_to_pixel(wcs, *around, margin=0.0)[0])]
    refcat = Table(
        {
            "ra": np.append(ra, around[0]),
            "dec": np.append(dec, around[1]),
            "mag": np.append(mag, rng.uniform(12.0, 18.0, around.shape[1])),
        }
    )
    x = np.append(x + rng.normal(0, noise, n_stars), rng.random(n_spurious) * SHAPE[1])
    y = np.append(y + rng.normal(0, noise, n_stars), rng.random(n_spurious) * SHAPE[0])
    flux = 10 ** (-0.4 * np.append(mag, rng.uniform(12.0, 18.0, n_spurious)))
    return x, y, flux, refcat


def shifted(wcs, arcmin, angle=0.0, **changes):
    """Return a prediction whose pointing is off to the north-east."""
    step = arcmin / 60.0 / np.sqrt(2.0)
    ra, dec = sphere.tan_deproject(step, step, *wcs.wcs.crval)
    return ccd_wcs(float(ra), float(dec), angle, **changes)


def solve(x, y, flux, refcat, wcs, settings=SETTINGS):
    """Solve a CCD whose positions are all equally well known."""
    return solve_ccd(CcdStars(x, y, flux, np.zeros(x.size), SHAPE), refcat, wcs, settings)


def error_in_pixels(wcs, truth):
    """Return the distance of two WCS, on a grid over the CCD."""
    y, x = np.mgrid[0 : SHAPE[0] - 1 : 9j, 0 : SHAPE[1] - 1 : 9j]
    return sphere.separation(*pixel_to_sky(wcs, x, y), *pixel_to_sky(truth, x, y)) / SCALE


def test_distortion_is_recovered_to_a_milliarcsecond():
    truth = ccd_wcs(angle=30.0)
    linear = shifted(truth, 0.3, 30.3, strength=0.0)
    # what is to be found is a distortion of several pixels
    assert error_in_pixels(ccd_wcs(angle=30.0, strength=0.0), truth).max() > 8.0
    x, y, flux, refcat = observe(truth, 150)
    solution = solve(x, y, flux, refcat, linear)
    assert solution.order == 3
    assert solution.n_matched == 150
    assert error_in_pixels(solution.wcs, truth).max() * SCALE * 3.6e6 < 1.0
    assert solution.rms_pixel < 1e-4
    assert solution.pixel_scale == pytest.approx(0.25, rel=1e-2)
    assert solution.rotation == pytest.approx(30.0, abs=1.0)
    assert solution.pointing_error == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("ra", "dec", "angle", "flip"),
    [
        (0.0, 0.0, 180.0, False),
        (359.99, 60.0, -75.0, True),
        (100.0, 90.0, 10.0, False),
        (17.0, -89.95, 140.0, True),
    ],
)
def test_wrong_pointing_rotation_parity_and_scale(ra, dec, angle, flip):
    truth = ccd_wcs(ra, dec, angle, flip=flip, scale=1.02 * SCALE)
    # at the pole a shift turns north around as well, but any rotation is allowed
    prediction = shifted(truth, 8.0)
    x, y, flux, refcat = observe(truth, 60, 60, noise=0.1)
    solution = solve(x, y, flux, refcat, prediction)
    assert solution.n_matched >= 55
    assert error_in_pixels(solution.wcs, truth).max() < 0.5
    assert solution.pixel_scale == pytest.approx(0.255, rel=1e-3)
    assert np.linalg.det(solution.wcs.wcs.cd) * (1 if flip else -1) > 0
    assert solution.pointing_error == pytest.approx(8.0, abs=0.1)
    # +y points to this position angle at the centre
    near = pixel_to_sky(solution.wcs, [499.5, 499.5], [999.5, 1009.5])
    xi, eta = (c[1] - c[0] for c in sphere.tan_project(*near, near[0][0], near[1][0]))
    assert np.hypot(xi, eta) > 0
    found = np.degrees(np.arctan2(xi, eta))
    assert (found - solution.rotation + 180.0) % 360.0 - 180.0 == pytest.approx(0.0, abs=0.05)


def test_errors_shrink_with_the_number_of_stars():
    truth = ccd_wcs()
    x, y, flux, refcat = observe(truth, 200, 100, noise=0.1)
    solution = solve(x, y, flux, refcat, shifted(truth, 0.5))
    # 10 coefficients an axis from 200 stars of 0.1 pixel: 0.02 pixel in the middle
    error = error_in_pixels(solution.wcs, truth)
    assert np.sqrt(np.mean(error**2)) < 0.06
    assert solution.rms_pixel == pytest.approx(0.1 * np.sqrt(2.0), rel=0.1)
    assert solution.rms_arcsec == pytest.approx(0.25 * solution.rms_pixel, rel=0.05)


def test_residuals_are_measured_minus_catalogue():
    truth = ccd_wcs(angle=77.0)
    x, y, flux, refcat = observe(truth, 40, 20, noise=0.2)
    x[3] = np.nan
    solution = solve(x, y, flux, refcat, shifted(truth, 0.5, 77.0))
    i, k = solution.source_index, solution.reference_index
    assert 3 not in i
    assert np.array_equal(i, k)  # the stars of the CCD come first in both
    x_catalogue, y_catalogue = sky_to_pixel(solution.wcs, refcat["ra"][k], refcat["dec"][k])
    assert solution.residual_x == pytest.approx(x[i] - x_catalogue, abs=0.01)
    assert solution.residual_y == pytest.approx(y[i] - y_catalogue, abs=0.01)
    assert solution.n_matched == i.size == solution.residual_x.size


@pytest.mark.parametrize(("n_stars", "order"), [(7, 0), (12, 1), (22, 2), (80, 3)])
def test_few_stars_keep_the_known_distortion(n_stars, order):
    truth = ccd_wcs(angle=10.0)
    x, y, flux, refcat = observe(truth, n_stars, 5, noise=0.02, seed=5)
    known = solve(x, y, flux, refcat, shifted(truth, 2.0, 11.0))
    assert known.order == order
    assert error_in_pixels(known.wcs, truth).max() < 0.15
    if order < 3:
        # without that knowledge, the stars are too few to measure it
        blind = shifted(truth, 2.0, 11.0, strength=0.0)
        assert error_in_pixels(blind, truth).max() > 1.0


def test_order_is_lowered_where_stars_leave_corners_empty():
    truth = ccd_wcs()
    x, y, flux, refcat = observe(truth, 150, noise=0.1)
    corner = (x < 500) & (y < 1000)
    assert corner.sum() > 30
    solution = solve(x[corner], y[corner], flux[corner], refcat, shifted(truth, 0.5))
    assert solution.order < 3
    assert error_in_pixels(solution.wcs, truth).max() < 1.0


def test_outliers_are_clipped():
    truth = ccd_wcs()
    x, y, flux, refcat = observe(truth, 100, noise=0.05)
    wrong = np.arange(0, 100, 10)
    x[wrong] += 0.4
    solution = solve(x, y, flux, refcat, shifted(truth, 0.5))
    assert not np.isin(wrong, solution.source_index).any()
    assert solution.n_matched >= 85
    assert solution.n_matched + solution.n_clipped == 100
    assert error_in_pixels(solution.wcs, truth).max() < 0.15


def test_centroid_errors_weight_the_fit():
    truth = ccd_wcs()
    rng = np.random.default_rng(5)
    x, y, flux, refcat = observe(truth, 120)
    error = np.where(np.arange(120) % 4 == 0, 0.01, 0.6)
    x, y = x + error * rng.normal(size=120), y + error * rng.normal(size=120)
    error[5] = np.nan
    settings = SETTINGS.model_copy(update={"max_rms_pixels": 2.0})
    stars, prediction = CcdStars(x, y, flux, error, SHAPE), shifted(truth, 0.5)
    weighted = solve_ccd(stars, refcat, prediction, settings)
    plain = solve(x, y, flux, refcat, prediction, settings)
    assert error_in_pixels(weighted.wcs, truth).max() < 0.05
    assert error_in_pixels(plain.wcs, truth).max() > 0.1
    # a position without an error is no measurement
    assert 5 in plain.source_index
    assert 5 not in weighted.source_index


def test_deep_catalogue_and_stars_without_magnitude():
    truth = ccd_wcs()
    x, y, flux, refcat = observe(truth, 150, 50, noise=0.1)
    # of the 150 sources, 50 bright ones are detected; a quarter of all magnitudes is missing
    bright = np.argsort(-flux[:150])[:50]
    keep = np.append(bright, np.arange(150, 200))
    refcat["mag"][::4] = np.nan
    prediction = shifted(truth, 5.0, 100.0)
    solution = solve(x[keep], y[keep], flux[keep], refcat, prediction)
    assert np.mean(keep[solution.source_index] == solution.reference_index) > 0.95
    assert error_in_pixels(solution.wcs, truth).max() < 0.5


def test_inverse_polynomials_are_good_over_the_ccd():
    truth = ccd_wcs()
    x, y, flux, refcat = observe(truth, 100)
    wcs = solve(x, y, flux, refcat, shifted(truth, 0.5)).wcs
    pixels = np.stack(np.meshgrid([0.0, 400.0, 999.0], [0.0, 1100.0, 1999.0]), -1).reshape(-1, 2)
    back = wcs.sip_foc2pix(wcs.sip_pix2foc(pixels, 0), 0)
    assert np.abs(back - pixels).max() < 1e-3
    assert wcs.array_shape == SHAPE


def test_match_alone_gives_a_start_for_another_fit():
    truth = ccd_wcs(angle=-20.0)
    x, y, flux, refcat = observe(truth, 60, 40, noise=0.1)
    stars = CcdStars(x, y, flux, np.zeros(x.size), SHAPE)
    matched = match_ccd(stars, refcat, shifted(truth, 6.0, 130.0), SETTINGS)
    assert error_in_pixels(matched, truth).max() < 1.0
    fit = fit_ccd(stars, refcat, matched, SETTINGS)
    assert np.array_equal(fit.source_index, fit.reference_index)
    assert error_in_pixels(fit.wcs, truth).max() < 0.4


def test_failures_say_why():
    truth = ccd_wcs()
    x, y, flux, refcat = observe(truth, 40, noise=0.1)
    with pytest.raises(CcdFailure, match="at least 5") as failure:
        solve(x[:4], y[:4], flux[:4], refcat, truth)
    assert failure.value.reason == "too_few_stars"
    with pytest.raises(CcdFailure) as failure:
        solve(x, y, flux, refcat[:3], truth)
    assert failure.value.reason == "too_few_stars"
    with pytest.raises(CcdFailure, match="check the pointing") as failure:
        solve(y / 2, x * 2, flux, refcat, truth)
    assert failure.value.reason == "no_astrometric_match"
    with pytest.raises(CcdFailure, match="check the pointing") as failure:
        solve(x, y, flux, refcat, shifted(truth, 60.0))
    assert failure.value.reason == "no_astrometric_match"
    strict = SETTINGS.model_copy(update={"max_rms_pixels": 0.01})
    with pytest.raises(CcdFailure, match=r"max_rms_pixels = 0\.01") as failure:
        solve(x, y, flux, refcat, truth, strict)
    assert failure.value.reason == "astrometry_rms"


def test_solution_does_not_depend_on_the_order_of_rows():
    truth = ccd_wcs()
    x, y, flux, refcat = observe(truth, 60, 40, noise=0.1)
    prediction = shifted(truth, 0.5)
    first = solve(x, y, flux, refcat, prediction)
    order = np.random.default_rng(2).permutation(100)
    rows = np.random.default_rng(3).permutation(len(refcat))
    second = solve(x[order], y[order], flux[order], refcat[rows], prediction)
    assert sorted(order[second.source_index]) == sorted(first.source_index)
    assert error_in_pixels(second.wcs, first.wcs).max() < 1e-8
