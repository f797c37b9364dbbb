from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from starfield import add_stars, observed, random_field

from coaddflow.astrometry.ccd import CcdStars, solve_ccd
from coaddflow.calexp.ccd import calibrate_ccd, measure_ccd
from coaddflow.calexp.model import CcdId
from coaddflow.calexp.product import read_calexp, read_sources, write_calexp
from coaddflow.errors import CcdFailure, InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.settings import Settings
from coaddflow.tables.manifest import CcdRow

SETTINGS = Settings()
CCD = CcdId("e1000", 7, "r", 60000.25, 30.0)
SHAPE = (600, 700)
SCALE, ZERO_POINT, SKY, FWHM = 0.2, 27.0, 500.0, 4.0


def true_wcs():
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval = [150.0, 2.0]
    wcs.wcs.crpix = [350.5, 300.5]
    wcs.wcs.cd = np.array([[-SCALE, 0.0], [0.0, SCALE]]) / 3600.0
    wcs.wcs.radesys = "ICRS"
    wcs.pixel_shape = SHAPE[::-1]
    wcs.wcs.set()
    return wcs


def predicted_wcs():
    wcs = true_wcs()
    wcs.wcs.crval = [150.002, 1.999]
    wcs.wcs.set()
    return wcs


class Scene:
    """A CCD with stars, and the catalogue of its brighter ones."""

    def __init__(self, n_stars=140, seed=41):
        rng = np.random.default_rng(seed)
        self.x, self.y = (
            rng.uniform(5, SHAPE[1] - 6, n_stars),
            rng.uniform(5, SHAPE[0] - 6, n_stars),
        )
        self.flux = np.exp(rng.uniform(np.log(2e3), np.log(4e5), n_stars))
        stars = np.zeros(SHAPE)
        add_stars(stars, self.x, self.y, self.flux, FWHM)
        self.image = observed(stars, SKY, rng)
        bright = self.flux > 1e4
        ra, dec = true_wcs().all_pix2world(self.x[bright], self.y[bright], 0)
        magnitude = rng.normal(ZERO_POINT - 2.5 * np.log10(self.flux[bright]), 0.01)
        self.refcat = Table({"ra": ra, "dec": dec, "mag": magnitude, "mag_err": 0.01 + 0 * ra})


@pytest.fixture(scope="module")
def scene():
    return Scene()


def process(image, refcat, settings=SETTINGS):
    """Make the calexp of a detrended CCD."""
    return calibrate_ccd(measure_ccd(image, settings), CCD, predicted_wcs(), refcat, settings)


@pytest.fixture(scope="module")
def calexp(scene):
    return process(scene.image, scene.refcat)


def test_every_figure_of_the_quality_is_the_true_one(scene, calexp):
    figures = calexp.figures
    assert figures["seeing"] == pytest.approx(FWHM * SCALE, rel=0.02)
    assert figures["pixel_scale"] == pytest.approx(SCALE, rel=1e-4)
    assert figures["zero_point"] == pytest.approx(ZERO_POINT, abs=0.006)
    assert figures["zero_point_error"] < 0.004
    assert figures["zero_point_scatter"] == pytest.approx(0.012, abs=0.006)
    assert figures["sky_level"] == pytest.approx(SKY, abs=1.0)
    assert figures["sky_noise"] == pytest.approx(np.sqrt(SKY + 25.0), rel=0.02)
    assert figures["ellipticity"] < 0.01
    assert figures["pointing_offset"] == pytest.approx(3600 * np.hypot(0.002, 0.001), rel=0.02)
    assert figures["astrometry_rms"] < 0.02
    assert figures["n_matched"] > 0.8 * len(scene.refcat)
    assert figures["n_zero_point"] > 0.6 * len(scene.refcat)


def test_quality_fits_into_the_manifest(calexp):
    row = CcdRow(**CCD._asdict(), state="done", nx=SHAPE[1], ny=SHAPE[0], **calexp.figures)
    not_of_the_pixels = {"reason", "message", "flags", "path", "sha256"}
    not_of_the_pixels |= {"footprint_ra", "footprint_dec"}
    identity = {*CCD._fields, "state", "nx", "ny"}
    assert set(calexp.figures) == set(CcdRow.model_fields) - not_of_the_pixels - identity
    assert row.n_psf_stars > 20


def test_positions_and_magnitudes_are_those_of_the_stars(scene, calexp):
    sources = calexp.sources[calexp.sources["signal_to_noise"] > 100]
    sources = sources[sources["flags"] == 0]
    ra, dec = true_wcs().all_pix2world(scene.x, scene.y, 0)
    east = (sources["ra"][:, None] - ra) * np.cos(np.radians(2.0)) * 3600.0
    north = (sources["dec"][:, None] - dec) * 3600.0
    nearest = np.hypot(east, north).argmin(axis=1)
    rows = np.arange(len(sources))
    assert np.sqrt(np.mean(east[rows, nearest] ** 2)) < 0.01
    magnitude = ZERO_POINT - 2.5 * np.log10(scene.flux[nearest])
    assert abs(np.median(sources["magnitude"] - magnitude)) < 0.006
    assert np.median(np.abs(sources["magnitude"] - magnitude)) < 0.01


def test_aperture_and_psf_fluxes_agree_once_corrected(calexp):
    sources = calexp.sources[calexp.sources["is_psf_star"]]
    total = sources["flux_aperture"][:, 1] * calexp.figures["aperture_correction"]
    assert np.median(total / sources["flux_psf"]) == pytest.approx(1.0, abs=2e-3)


def test_fluxes_are_total_also_where_the_psf_model_is_small(scene, calexp):
    """A model that ends at 2 FWHM lacks part of the light, which the correction gives back."""
    small = SETTINGS.psf.model_copy(update={"radius": 2.0})
    measured = measure_ccd(scene.image, SETTINGS.model_copy(update={"psf": small}))
    assert measured.psf_correction > 1.003
    stars = calexp.sources["is_psf_star"]
    ratio = measured.sources["flux_psf"][stars] / calexp.sources["flux_psf"][stars]
    assert np.median(ratio) == pytest.approx(1.0, abs=2e-3)


def test_star_at_the_depth_has_a_signal_to_noise_of_five(calexp):
    sources = calexp.sources[calexp.sources["flux_psf"] < 3e3]
    error = np.median(sources["flux_psf_error"])
    flux = 10 ** (-0.4 * (calexp.figures["depth"] - calexp.figures["zero_point"]))
    # its own photons add to the noise of the faintest stars of this field
    assert flux / error == pytest.approx(5.0, rel=0.12)


def test_sky_is_gone_and_sources_are_marked(scene, calexp):
    image = calexp.masked_image
    empty = ~image.has_any(MaskPlane.DETECTED)
    assert abs(np.median(image.image[empty])) < 0.03 * calexp.figures["sky_noise"]
    assert 0.02 < 1.0 - empty.mean() < 0.3
    assert np.array_equal(image.variance, scene.image.variance)


def test_input_is_left_as_it_was(scene):
    again = Scene()
    assert np.array_equal(scene.image.image, again.image.image)
    assert np.array_equal(scene.image.mask, again.image.mask)


def test_measuring_and_calibrating_apart_is_the_same(scene, calexp):
    measured = measure_ccd(scene.image, SETTINGS)
    assert "ra" not in measured.sources.colnames
    apart = calibrate_ccd(measured, CCD, predicted_wcs(), scene.refcat, SETTINGS)
    assert apart.figures == calexp.figures
    assert np.array_equal(apart.sources["ra"], calexp.sources["ra"])


def test_matched_stars_are_marked_among_the_sources(scene, calexp):
    sources = calexp.sources
    stars = CcdStars.of(sources, SHAPE)
    solution = solve_ccd(stars, scene.refcat, predicted_wcs(), SETTINGS.astrometry)
    assert np.array_equal(np.flatnonzero(sources["is_astrometric"]), np.sort(solution.source_index))
    rms_per_axis = np.sqrt(np.mean(solution.residual_x**2 + solution.residual_y**2) / 2) * SCALE
    assert calexp.figures["astrometry_rms"] == pytest.approx(rms_per_axis, rel=1e-3)
    assert sources["is_photometric"].sum() == calexp.figures["n_zero_point"]
    assert not (sources["is_photometric"] & ~sources["is_astrometric"]).any()


@pytest.mark.parametrize("flux", ["psf", "aperture"])
def test_zero_point_does_not_depend_on_the_kind_of_flux(scene, flux):
    photometry = SETTINGS.photometry.model_copy(update={"zero_point_flux": flux})
    settings = SETTINGS.model_copy(update={"photometry": photometry})
    result = process(scene.image, scene.refcat, settings)
    assert result.figures["zero_point"] == pytest.approx(ZERO_POINT, abs=0.006)


@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_files_hold_the_calexp_to_the_bit(calexp, tmp_path, compression):
    provenance = fits.Header([("CFVERS", "0.1.0", "version of coaddflow")])
    path, sources_path = tmp_path / "7.fits", tmp_path / "7_sources.fits"
    write_calexp(path, sources_path, calexp, provenance, compression)
    again = read_calexp(path)
    for plane in ("image", "variance", "mask"):
        assert np.array_equal(
            getattr(again.masked_image, plane), getattr(calexp.masked_image, plane)
        )
    x, y = np.array([3.2, 400.9]), np.array([500.0, 20.4])
    images = calexp.psf.images_at(x, y)  # its samples are rounded to float32
    assert np.abs(again.psf.images_at(x, y) - images).max() < 2e-7 * images.max()
    assert np.array_equal(again.background.model(), calexp.background.model())
    back = again.wcs.all_world2pix(*calexp.wcs.all_pix2world(x, y, 0), 0)
    assert np.abs(np.array(back) - [x, y]).max() < 1e-5
    sources = read_sources(sources_path)
    assert sources.colnames == calexp.sources.colnames
    for name in sources.colnames:
        assert np.array_equal(sources[name], calexp.sources[name], equal_nan=name != "is_psf_star")


def test_quantized_pixels_stay_within_a_sixteenth_of_the_noise(calexp, tmp_path):
    path = tmp_path / "7.fits"
    write_calexp(path, tmp_path / "7_sources.fits", calexp, None, "quantized")
    again = read_calexp(path).masked_image
    difference = again.image - calexp.masked_image.image
    assert np.std(difference) < calexp.figures["sky_noise"] / 16.0 / np.sqrt(12.0) * 1.2
    assert np.array_equal(again.mask, calexp.masked_image.mask)


def test_header_has_what_other_programs_need(calexp, tmp_path):
    path = tmp_path / "7.fits"
    write_calexp(path, tmp_path / "7_sources.fits", calexp)
    with fits.open(path, checksum=True) as hdus:
        assert [hdu.name for hdu in hdus[1:]] == [
            *("IMAGE", "MASK", "VARIANCE", "PSF_DATA", "BACKGROUND")
        ]
        header = hdus["IMAGE"].header
        assert all("CHECKSUM" in hdu.header for hdu in hdus)
        wcs = WCS(header)
    assert header["CTYPE1"] == "RA---TPV"
    sky, truth = (w.all_pix2world([10.0, 690.0], [20.0, 500.0], 0) for w in (wcs, true_wcs()))
    assert np.abs(np.array(sky) - truth).max() * 3600.0 < 0.05
    assert header["BUNIT"] == "electron"
    assert header["PHOTZP"] == calexp.figures["zero_point"]
    assert header["SEEING"] == calexp.figures["seeing"]
    assert header["GAIN"] == 1.0
    assert (header["EXPOSURE"], header["CCD"], header["FILTER"]) == ("e1000", 7, "r")
    assert (header["TIMESYS"], header["MJD-OBS"]) == ("TAI", 60000.25)
    assert header["DATE-OBS"] == "2023-02-25T06:00:00.000"


def test_every_keyword_is_documented(calexp):
    table = (Path(__file__).parents[2] / "docs/products.md").read_text().splitlines()
    rows = [line.split("|")[1] for line in table if line.startswith("| ")]
    documented = {keyword.strip() for row in rows for keyword in row.split(",")}
    assert set(calexp.header) <= documented


def test_ccd_without_stars_fails_with_its_reason(scene):
    rng = np.random.default_rng(42)
    with pytest.raises(CcdFailure) as failure:
        process(observed(np.zeros(SHAPE), SKY, rng), scene.refcat)
    assert failure.value.reason == "no_stars"


@pytest.mark.parametrize("seed", [2, 7, 9])
def test_three_stars_are_enough_to_measure_a_ccd(seed):
    rng = np.random.default_rng(seed)
    image, x, y, flux = random_field((700, 600), 3, rng, flux=(2e4, 3e5), margin=40)
    measured = measure_ccd(image, SETTINGS)
    assert measured.psf.order == 0
    assert measured.psf_quality.n_stars == 3
    assert measured.psf_quality.fwhm == pytest.approx(4.0, rel=0.05)
    order, sources = np.argsort(-flux), measured.sources
    for name, true in (("x", x), ("y", y)):
        assert np.asarray(sources[name]) == pytest.approx(true[order], abs=0.1)
    assert sources["flux_psf"][0] == pytest.approx(flux.max(), rel=0.04)


def test_ccd_without_pixels_fails_with_its_reason(scene):
    with pytest.raises(CcdFailure) as failure:
        process(MaskedImage.empty(SHAPE), scene.refcat)
    assert failure.value.reason == "no_data"


def test_catalogue_without_magnitudes_fails_with_its_reason(scene):
    blind = scene.refcat.copy()
    blind["mag"] = np.where(np.arange(len(blind)) < 1, blind["mag"], np.nan)
    measured = measure_ccd(scene.image, SETTINGS)
    with pytest.raises(CcdFailure) as failure:
        calibrate_ccd(measured, CCD, predicted_wcs(), blind, SETTINGS)
    assert failure.value.reason == "no_photometric_match"


def test_saturated_stars_do_not_make_the_zero_point(scene):
    """Stars that lost half of their light to saturation are flagged, and so left out."""
    image = MaskedImage(scene.image.image.copy(), scene.image.variance, scene.image.mask.copy())
    bright = image.image > 4000.0
    image.image[bright] = 4000.0
    image.mask[bright] |= MaskPlane.SAT
    result = process(image, scene.refcat)
    assert result.figures["zero_point"] == pytest.approx(ZERO_POINT, abs=0.015)
    assert result.figures["n_zero_point"] < 0.8 * len(scene.refcat)


def test_damaged_files_name_themselves(calexp, tmp_path):
    path, sources_path = tmp_path / "7.fits", tmp_path / "7_sources.fits"
    write_calexp(path, sources_path, calexp)
    for whole in (path, sources_path):
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(InputError, match=r"7\.fits"):
        read_calexp(path)
    with pytest.raises(InputError, match=r"7_sources\.fits"):
        read_sources(sources_path)
    with pytest.raises(InputError, match="missing"):
        read_calexp(tmp_path / "missing.fits")
