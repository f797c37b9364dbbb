"""Real frames become coadds: raw ones of a small telescope, and DECam's calibrated elsewhere.

The images lie beside the project, in ``../shared/data``, and are not part of it.
"""

import csv

import numpy as np
import pytest
from astropy.table import Table
from survey_run import REPOSITORY, Survey

from coaddflow.coadd.product import read_coadd
from coaddflow.geometry.wcs import sky_to_pixel
from coaddflow.geometry.wcs_header import read_wcs
from coaddflow.image.masked_image import read_masked_image
from coaddflow.qa.coadd_check import detect_on
from coaddflow.qa.survey_check import noise_gain, reference_stars_found
from coaddflow.tables.manifest import read_manifest

SHARED = REPOSITORY.parent / "shared"
pytestmark = pytest.mark.skipif(
    not (SHARED / "data" / "hatp32").is_dir(),
    reason="the real frames (../shared/data) are not on this machine",
)


def run(tmp_path_factory, name, *ingest):
    """Run a configuration of configs/ in a folder of its own."""
    parent = tmp_path_factory.mktemp(name)
    (parent / "shared").symlink_to(SHARED)
    survey = Survey(parent / "project")
    survey.folder.mkdir()
    settings = str(REPOSITORY / "configs" / f"{name}.yaml")
    ingested = survey.coaddflow("ingest", "--config", settings, *ingest, f"../shared/data/{name}")
    assert ingested.returncode == 0, ingested.text
    ended = survey.run("--configfile", settings)
    assert ended.returncode == 0, ended.text
    return survey


@pytest.fixture(scope="module")
def hatp32(tmp_path_factory):
    return run(tmp_path_factory, "hatp32")


@pytest.fixture(scope="module")
def hatp32_coadd(hatp32):
    return read_coadd(hatp32 / "results/coadd/clear/0/0_0.fits")


@pytest.fixture(scope="module")
def decam(tmp_path_factory):
    return run(tmp_path_factory, "decam-calibrated", "--calibrated")


def test_all_raw_frames_are_solved(hatp32):
    rows = [read_manifest(path)[0] for path in sorted((hatp32 / "results/summary").glob("*.ecsv"))]
    assert len(rows) == 12
    assert all(row.state == "done" for row in rows)
    both_axes = [np.sqrt(2) * row.astrometry_rms / row.pixel_scale for row in rows]
    assert max(both_axes) < 0.4
    # the headers name one pointing for a night of drift
    assert max(row.pointing_offset for row in rows) > 20 * 60


def test_sky_noise_falls_as_twelve_frames_let_it(hatp32, hatp32_coadd):
    coadd, _ = hatp32_coadd
    assert np.count_nonzero(coadd.n_inputs == 12) > 90_000
    warps = sorted((hatp32 / "results/warp/0").glob("*/0_0.fits"))
    assert len(warps) == 12
    assert noise_gain(coadd, warps) > 2.8


def test_hot_pixels_are_gone(hatp32, hatp32_coadd):
    """They stay on the chip: without correction each leaves a chain of twelve dots."""
    coadd, _ = hatp32_coadd
    defects, _ = read_masked_image(hatp32 / "results/calibs/defects/0.fits")
    assert 1000 < np.count_nonzero(defects.mask) < 6000
    image = coadd.masked_image.image
    deep = coadd.n_inputs >= 9
    neighbours = [np.roll(image, s, a) for s in (-1, 1) for a in (0, 1)]
    excess = (image - np.max(neighbours, axis=0)) / np.sqrt(coadd.masked_image.variance)
    # no star is so sharp that its neighbours have less than a tenth of its peak
    sharp = deep & (excess > 10) & (np.max(neighbours, axis=0) < 0.1 * image)
    assert np.count_nonzero(sharp) <= 2


def test_reference_stars_are_at_their_places(hatp32_coadd):
    coadd, header = hatp32_coadd
    with (SHARED / "data/hatp32/refstars.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    stars = Table({name: [float(line[name]) for line in lines] for name in ("ra", "dec")})
    # nearly all of these stars are saturated: a window of one FWHM has their wings in it
    fwhm = detect_on(coadd.masked_image)[1]
    distance = reference_stars_found(coadd, header, stars, min_inputs=2, window=fwhm)
    assert distance.size > 40
    assert np.mean(distance < 0.5) >= 0.95
    assert np.nanmedian(distance) < 0.2


def test_cutouts_become_coadds_in_their_bands(decam):
    for band in ("g", "r", "z"):
        paths = list((decam / "results/coadd" / band).glob("*/*.fits"))
        assert len(paths) == 1
        coadd, _ = read_coadd(paths[0])
        assert coadd.n_inputs.max() == 2
        assert np.isfinite(coadd.masked_image.image).mean() > 0.5


def test_the_star_of_the_cutouts_is_where_gaia_says(decam):
    """One star of G = 10.5 is on them, its core saturated in all images: its halo is centred."""
    gaia = Table.read(SHARED / "data/decam-calibrated/gaia/chunk-03687.fits")
    for band in ("g", "r", "z"):
        path = next((decam / "results/coadd" / band).glob("*/*.fits"))
        coadd, header = read_coadd(path)
        x, y = sky_to_pixel(read_wcs(header), gaia["ra"], gaia["dec"])
        ny, nx = coadd.masked_image.shape
        with np.errstate(invalid="ignore"):
            inside = (x > 10) & (x < nx - 10) & (y > 10) & (y < ny - 10)
        brightest = np.flatnonzero(inside)[np.argmin(gaia["phot_g_mean_mag"][inside])]
        offset = halo_centre(coadd.masked_image, x[brightest], y[brightest])
        # 1.5 pixels are 0.4 arcsec: bleeding and ghosts of the core shift what is left of it
        assert np.hypot(*offset) < 1.5


def halo_centre(image, x0, y0, inner=9.0, outer=22.0):
    """Return the shift of a star's halo against a place, by symmetry about it."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    best = []
    shifts = np.arange(-4.0, 4.01, 0.25)
    for dy in shifts:
        for dx in shifts:
            radius = np.hypot(x - x0 - dx, y - y0 - dy)
            ring = (radius > inner) & (radius < outer) & ~image.has_any(2 | 32)
            ring &= np.isfinite(image.image)
            value, bins = np.log(np.maximum(image.image[ring], 1.0)), radius[ring].astype(int)
            mean = np.bincount(bins, value) / np.maximum(np.bincount(bins), 1)
            best.append((np.median(np.abs(value - mean[bins])), dx, dy))
    return min(best)[1:]
