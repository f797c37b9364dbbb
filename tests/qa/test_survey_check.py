"""Coadds against the truth of a simulated sky, and against the exposures that they are made of."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from skyscene import draw_star, make_tract

from coaddflow.coadd.mean import Coadd
from coaddflow.coadd.product import read_coadd, write_coadd
from coaddflow.image.masked_image import AB_ZERO_POINT, MaskedImage
from coaddflow.instrument.camera import camera_file
from coaddflow.qa.survey_check import check_band, noise_gain, reference_stars_found, trail_left
from coaddflow.warp.files import Warp, write_warp

SIZE = 400
N_EXPOSURES = 4
NOISE = 8.0
"""Noise of an exposure, nJy; of the coadd it is half of that."""

FWHM = 4.0


@pytest.fixture(scope="module")
def tract():
    return make_tract(size=SIZE)


@pytest.fixture(scope="module")
def truth(tract, tmp_path_factory):
    """A folder with the true sky: stars on a grid, 60 pixels apart."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[50:360:60, 50:360:60].reshape(2, -1) + rng.uniform(-0.5, 0.5, (2, 36))
    ra, dec = tract.wcs().all_pix2world(x, y, 0)
    sky = Table({"ra": ra, "dec": dec, "mag_r": rng.uniform(19.0, 20.5, x.size)})
    sky["type"], sky["pm_ra"], sky["pm_dec"] = "star", 0.0, 0.0
    folder = tmp_path_factory.mktemp("truth")
    sky.write(folder / "sources.fits")
    return folder


def stars_of(truth, tract):
    """Return the noiseless image of the true sky, nJy."""
    sky = Table.read(truth / "sources.fits")
    x, y = tract.wcs().all_world2pix(sky["ra"], sky["dec"], 0)
    flux = 10.0 ** (-0.4 * (sky["mag_r"] - AB_ZERO_POINT))
    return sum(draw_star((SIZE, SIZE), *star, FWHM) for star in zip(x, y, flux, strict=True))


def write_results(folder, tract, images):
    """Write the warps of exposures and their coadd, which is their mean."""
    box = (0, 0, SIZE, SIZE)
    for number, image in enumerate(images):
        variance = np.full(image.shape, NOISE**2, np.float32)
        planes = MaskedImage(image.astype(np.float32), variance, np.zeros(image.shape, np.int32))
        path = folder / f"warp/{tract.id}/{number}/0_0.fits"
        write_warp(path, Warp(box, planes), tract, fits.Header())
    write_coadd_of(folder, tract, np.mean(images, axis=0))


def write_coadd_of(folder, tract, mean):
    variance = np.full(mean.shape, NOISE**2 / N_EXPOSURES, np.float32)
    planes = MaskedImage(mean.astype(np.float32), variance, np.zeros(mean.shape, np.int32))
    inputs = Table({"exposure": ["0"], "n_used": [1], "weight": [1.0], "seeing": [0.8]})
    n_inputs = np.full(mean.shape, N_EXPOSURES, np.int16)
    coadd = Coadd((0, 0, SIZE, SIZE), planes, n_inputs, inputs)
    write_coadd(folder / f"coadd/r/{tract.id}/0_0.fits", coadd, tract)


def exposures(sky, seed=2):
    rng = np.random.default_rng(seed)
    return [sky + rng.normal(0.0, NOISE, sky.shape) for _ in range(N_EXPOSURES)]


@pytest.fixture(scope="module")
def results(tract, truth, tmp_path_factory):
    """The folder of the products."""
    folder = tmp_path_factory.mktemp("results")
    write_results(folder, tract, exposures(stars_of(truth, tract)))
    return folder


def test_a_coadd_that_shows_the_true_sky_has_no_faults(results, truth):
    figures = check_band(results, truth, "r")
    assert figures.n_stars == 36
    assert figures.position_rms < 5.0  # mas
    assert abs(figures.flux_bias) < 0.003
    assert figures.chi == (pytest.approx(1.0, abs=0.03),)
    assert figures.covariance == pytest.approx(1.0, abs=0.15)
    assert figures.n_spurious == 0
    assert figures.n_sources >= 36


def test_what_is_not_on_the_true_sky_is_spurious_and_wrong_fluxes_are_a_bias(
    tract, truth, tmp_path
):
    ghost = draw_star((SIZE, SIZE), 80.0, 80.0, 5000.0, FWHM)
    write_results(tmp_path, tract, exposures(1.03 * stars_of(truth, tract) + ghost))
    figures = check_band(tmp_path, truth, "r")
    assert figures.n_spurious == 1
    assert figures.flux_bias == pytest.approx(0.03, abs=0.003)


def test_the_noise_falls_with_the_root_of_the_number_of_exposures(results, tract):
    coadd, _ = read_coadd(results / f"coadd/r/{tract.id}/0_0.fits")
    warps = sorted(results.glob("warp/*/*/0_0.fits"))
    assert len(warps) == N_EXPOSURES
    assert noise_gain(coadd, warps) == pytest.approx(np.sqrt(N_EXPOSURES), rel=0.03)


def test_reference_stars_are_looked_for_where_the_coadd_is_deep(results, truth, tract):
    coadd, header = read_coadd(results / f"coadd/r/{tract.id}/0_0.fits")
    sky, window = Table.read(truth / "sources.fits"), FWHM / 2.355
    apart = reference_stars_found(coadd, header, sky, 3, window)
    assert apart.size == 36
    assert np.max(apart) < 0.1
    sky["dec"] += 0.5 * tract.pixel_scale / 3600.0
    shifted = reference_stars_found(coadd, header, sky, 3, window)
    assert np.median(shifted) == pytest.approx(0.5, abs=0.05)
    coadd.n_inputs[:, : SIZE // 2] = 2
    assert reference_stars_found(coadd, header, sky, 3, window).size == 18


def test_a_trail_is_measured_along_its_line_on_its_exposure_and_on_the_coadd(
    tract, truth, tmp_path
):
    (truth / "camera.yaml").write_bytes(camera_file("demo").read_bytes())
    # through the middle of the tract, where the focal plane has its origin
    line = {"trail": [[-2.0, 0.0, 2.0, 0.0]], "ra": [tract.ra], "dec": [tract.dec]}
    row = {"exposure": ["0"], "band": ["r"], "rotation": [0.0], **line}
    Table(row).write(truth / "exposures.ecsv", overwrite=True)
    trail = np.zeros((SIZE, SIZE))
    trail[SIZE // 2 - 3 : SIZE // 2 + 3] = 1.0
    images = exposures(stars_of(truth, tract))
    write_results(tmp_path, tract, [images[0] + 50.0 * trail, *images[1:]])
    on_coadds = []
    for left in (0.0, 1.0):  # clipping has taken it from the coadd, or has left something
        write_coadd_of(tmp_path, tract, np.mean(images, axis=0) + left * trail)
        on_warp, on_coadd = trail_left(tmp_path, truth, "0")
        # the error of the mean of 250 pixels
        assert on_warp == pytest.approx(50.0, abs=4 * NOISE / np.sqrt(250))
        on_coadds.append(on_coadd)
    assert abs(on_coadds[0]) < 3 * NOISE / 2 / np.sqrt(250)
    # its brightest pieces are not empty sky
    assert 0.5 < on_coadds[1] - on_coadds[0] < 1.0
