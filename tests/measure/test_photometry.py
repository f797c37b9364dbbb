import numpy as np
import pytest
from starfield import add_stars, moffat_stamp, observed

from coaddflow.errors import CcdFailure
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.photometry import (
    MatchedStars,
    aperture_correction,
    aperture_fluxes,
    growth_curve,
    psf_correction,
    psf_fluxes,
    zero_point,
)
from coaddflow.measure.psf_model import PsfModel
from coaddflow.settings.photometry import PhotometrySettings

SETTINGS = PhotometrySettings()
SKY = 400.0
FWHM = 4.0


def field(flux, n=12, spacing=50, seed=31, noise=True):
    """Return (MaskedImage without sky, x, y, flux) of n x n stars at all pixel phases."""
    rng = np.random.default_rng(seed)
    y, x = (c.ravel() * spacing + 40.0 for c in np.mgrid[:n, :n])
    x, y = x + rng.uniform(-0.5, 0.5, x.size), y + rng.uniform(-0.5, 0.5, x.size)
    flux = np.broadcast_to(flux, x.shape)
    stars = np.zeros((spacing * n + 40,) * 2)
    add_stars(stars, x, y, flux, FWHM)
    image = observed(stars, SKY, rng)
    image.image = stars.astype(np.float32) if not noise else image.image - np.float32(SKY)
    return image, x, y, flux


def true_psf(half=20):
    """A model with the true PSF of `field`, fine enough to interpolate without error."""
    step = 0.5
    reach = step * np.arange(-2 * half - 6, 2 * half + 7)
    samples = moffat_stamp(reach[None, :], reach[:, None], FWHM)
    return PsfModel(samples[None], 0, step, half, (0.0, 0.0), (1.0, 1.0))


def moffat_fraction(radius, beta=3.5):
    """Light of a Moffat profile inside a radius (by integration of the profile)."""
    alpha = FWHM / 2.0 / np.sqrt(2.0 ** (1.0 / beta) - 1.0)
    return 1.0 - (1.0 + (radius / alpha) ** 2) ** (1.0 - beta)


def test_aperture_fluxes_are_the_light_inside():
    image, x, y, flux = field(1e5, noise=False)
    radii = [4.0, 8.0, 16.0]
    measured = aperture_fluxes(image, x, y, radii)
    assert measured.flux.shape == (x.size, 3)
    for column, radius in zip(measured.flux.T, radii, strict=True):
        # light is taken as spread evenly inside a pixel, which matters in small circles
        tolerance = 8e-3 if radius < 6.0 else 2e-3
        assert column / flux == pytest.approx(moffat_fraction(radius), rel=tolerance)
    assert not measured.incomplete.any()


def test_aperture_errors_are_those_of_the_pixels():
    image, x, y, _ = field(2e4)
    clean, *_ = field(2e4, noise=False)
    chi = (aperture_fluxes(image, x, y, [6.0]).flux - aperture_fluxes(clean, x, y, [6.0]).flux)[
        :, 0
    ] / aperture_fluxes(image, x, y, [6.0]).error[:, 0]
    assert np.std(chi) == pytest.approx(1.0, abs=0.15)
    assert abs(np.mean(chi)) < 0.3


def test_apertures_over_border_or_holes_are_flagged():
    image, x, y, _ = field(1e5, n=3)
    image.mask[round(y[0]), round(x[0]) + 3] = MaskPlane.NO_DATA
    image.image[round(y[0]), round(x[0]) + 3] = np.nan
    x = np.append(x, 1.0)
    y = np.append(y, 60.0)
    measured = aperture_fluxes(image, x, y, [6.0])
    assert measured.incomplete.tolist() == [True] + [False] * 8 + [True]
    assert np.isfinite(measured.flux).all()
    nothing = aperture_fluxes(MaskedImage.empty((40, 40)), [20.0], [20.0], [5.0])
    assert np.isnan(nothing.flux).all()
    assert nothing.incomplete.all()


def test_aperture_correction_gives_the_total_flux_of_a_moffat_star():
    image, x, y, flux = field(3e5)
    correction = aperture_correction(image, x, y, 1.5 * FWHM, 5.0 * FWHM)
    total = aperture_fluxes(image, x, y, [1.5 * FWHM]).flux[:, 0] * correction
    assert np.mean(total / flux) == pytest.approx(moffat_fraction(5.0 * FWHM), rel=2e-3)
    assert np.mean(total / flux) == pytest.approx(1.0, rel=3e-3)
    assert correction > 1.04


def test_growth_curve_survives_neighbours_of_some_stars():
    image, x, y, _ = field(3e5)
    spoilt = np.zeros(image.shape)
    few = np.arange(0, x.size, 5)
    add_stars(spoilt, x[few] + 14.0, y[few], 1e5, FWHM)
    radii = np.array([4.0, 8.0, 16.0, 20.0])
    alone = growth_curve(image, x, y, radii)
    image.image += spoilt.astype(np.float32)
    assert growth_curve(image, x, y, radii) == pytest.approx(alone, abs=2e-3)
    assert alone[-1] == 1.0
    assert (np.diff(alone) > 0).all()


def test_no_whole_star_has_no_aperture_correction():
    image, *_ = field(1e5, n=3)
    with pytest.raises(CcdFailure) as failure:
        aperture_correction(image, [3.0], [3.0], 4.0, 20.0)
    assert failure.value.reason == "no_aperture_correction"


def test_psf_fluxes_are_unbiased_from_bright_to_faint():
    psf = true_psf()
    for level, tolerance in ((3e5, 2e-3), (3e4, 4e-3), (3e3, 3e-2)):
        image, x, y, flux = field(level)
        ratio = psf_fluxes(image, psf, x, y).flux / flux
        assert np.mean(ratio) == pytest.approx(1.0, abs=tolerance)


def test_psf_flux_errors_are_those_of_the_pixels():
    image, x, y, flux = field(5e3, n=14)
    measured = psf_fluxes(image, true_psf(), x, y, block=60)
    chi = (measured.flux - flux) / measured.error
    assert np.std(chi) == pytest.approx(1.0, abs=0.12)
    # a matched filter on sky noise, and the photons of the star
    best = np.sqrt((SKY + 25.0) / (true_psf().image_at(0, 0).astype(float) ** 2).sum())
    assert best < np.median(measured.error) < 1.2 * best


def test_masked_pixels_do_not_change_psf_fluxes():
    image, x, y, flux = field(3e5)
    row, column = np.rint(y).astype(int), np.rint(x).astype(int)
    image.image[row + 1, column - 1] = 1e6
    image.mask[row + 1, column - 1] = MaskPlane.CR | MaskPlane.INTRP
    image.image[row, column + 3] = np.nan
    image.mask[row, column + 3] = MaskPlane.NO_DATA
    measured = psf_fluxes(image, true_psf(), x, y)
    assert np.mean(measured.flux / flux) == pytest.approx(1.0, abs=2e-3)
    assert measured.incomplete.all()


def test_psf_flux_at_the_border_is_flagged_and_outside_is_nan():
    image, *_ = field(1e5, n=3)
    measured = psf_fluxes(image, true_psf(), [1.0, -30.0, 40.0], [60.0, 60.0, 40.0])
    assert measured.incomplete.tolist() == [True, True, False]
    assert np.isnan(measured.flux).tolist() == [False, True, False]


def test_psf_correction_is_the_ratio_of_the_totals():
    rng = np.random.default_rng(32)
    total = np.exp(rng.uniform(8, 12, 60))
    psf = total / 1.03 * rng.normal(1.0, 0.005, 60)
    psf[:6] *= 3.0
    psf[10] = np.nan
    assert psf_correction(psf, 0.005 * total, total) == pytest.approx(1.03, rel=3e-3)
    with pytest.raises(CcdFailure):
        psf_correction([np.nan], [1.0], [1.0])


def photometry(seed, n=60, outliers=12):
    """Fluxes of stars of zero-point 27.5, with wrong magnitudes for some."""
    rng = np.random.default_rng(seed)
    magnitude = rng.uniform(15.0, 18.0, n)
    true_flux = 10 ** (-0.4 * (magnitude - 27.5))
    flux_error = np.sqrt(true_flux + 1e4)
    flux = rng.normal(true_flux, flux_error)
    catalogue_error = np.full(n, 0.02)
    magnitude = rng.normal(magnitude, catalogue_error)
    magnitude[:outliers] += rng.uniform(0.3, 2.0, outliers)
    return flux, flux_error, magnitude, catalogue_error


def zero_point_of(flux, flux_error, magnitude, catalogue_error):
    place = np.zeros(len(flux))
    index = np.arange(len(flux))
    stars = MatchedStars(index, place, place, flux, flux_error, magnitude, catalogue_error)
    return zero_point(stars, SETTINGS)


def test_zero_point_is_recovered_among_outliers_within_its_error():
    chi = []
    for seed in range(60):
        result = zero_point_of(*photometry(seed))
        chi.append((result.value - 27.5) / result.error)
        assert not result.used[:12].any()
        assert result.n_stars >= 40
    assert np.std(chi) == pytest.approx(1.0, abs=0.3)
    assert abs(np.mean(chi)) < 0.5


def test_zero_point_has_the_scatter_of_its_stars():
    flux, flux_error, magnitude, catalogue_error = photometry(70, n=400, outliers=0)
    result = zero_point_of(flux, flux_error, magnitude, catalogue_error)
    assert result.scatter == pytest.approx(0.022, rel=0.1)
    # errors that are too small by far do not make the zero-point better than its stars allow
    brave = zero_point_of(flux, 1e-3 * flux_error, magnitude, 1e-3 * catalogue_error)
    assert brave.error > 0.7 * result.scatter / np.sqrt(result.n_stars)


def test_bright_stars_weigh_more_in_the_zero_point():
    flux = np.array([1e6, 1e6, 1e3, 1e3])
    error = np.array([1e3, 1e3, 2e2, 2e2])
    magnitude = 25.0 - 2.5 * np.log10(flux) + np.array([0.0, 0.0, 0.1, 0.1])
    result = zero_point_of(flux, error, magnitude, np.zeros(4))
    assert result.value == pytest.approx(25.0, abs=2e-3)


def test_good_magnitudes_weigh_more_in_the_zero_point():
    flux, error = np.full(4, 1e5), np.full(4, 1e2)
    magnitude = 25.0 - 2.5 * np.log10(flux) + np.array([0.0, 0.0, 0.1, 0.1])
    catalogue_error = np.array([0.002, 0.002, 0.1, 0.1])
    result = zero_point_of(flux, error, magnitude, catalogue_error)
    assert result.value == pytest.approx(25.0, abs=2e-3)


@pytest.mark.parametrize("n_known", [0, 2])
def test_stars_without_magnitudes_have_no_zero_point(n_known):
    magnitude = np.full(20, np.nan)
    magnitude[:n_known] = 18.0
    with pytest.raises(CcdFailure) as failure:
        zero_point_of(np.full(20, 1e4), np.full(20, 1e2), magnitude, np.full(20, 0.01))
    assert failure.value.reason == "no_photometric_match"
