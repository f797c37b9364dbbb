"""The PSF of a coadd is the image of a star in it."""

import dataclasses
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from astropy.io import fits
from astropy.time import Time
from astropy.wcs import WCS
from skyscene import make_ccd, make_tract, make_wcs
from starfield import moffat_stamp

from coaddflow.coadd.clipping import USABLE
from coaddflow.coadd.depth import make_depth
from coaddflow.coadd.input_sets import (
    add_key,
    join_sets,
    near_change,
    number_sets,
    set_keys,
)
from coaddflow.coadd.mean import CoaddInput, coadd_patch
from coaddflow.coadd.point_sources import area_map, depth_of
from coaddflow.coadd.product import coadd_figures, write_coadd
from coaddflow.coadd.psf import CoaddPsf, PsfInput, coadd_psf, read_coadd_psf, read_psf_grid
from coaddflow.errors import InputError
from coaddflow.image.masked_image import MaskPlane
from coaddflow.measure.psf_model import PsfModel
from coaddflow.settings import Settings
from coaddflow.settings.coadd import ClipSettings, CoaddSettings
from coaddflow.settings.warp import WarpSettings
from coaddflow.warp.ccd_psf import StarsOnTract
from coaddflow.warp.ccds import CcdImage, warp_patches

SCALE = 0.2
SHAPE = (560, 520)
SIDE = 700
BOX = (0, 0, SIDE, SIDE)
SETTINGS = CoaddSettings(clip=ClipSettings(enabled=False))
EXPOSURES = (
    # FWHM in pixels of the CCD, pixel scale, rotation, shift, weight
    (3.2, 0.2, 0.0, (0.0, 0.0), 1.0),
    (4.6, 0.2, 31.0, (114.3, -90.8), 0.7),
    (3.8, 0.17, 183.0, (-90.2, 25.5), 1.7),
    (4.0, 0.2, 90.0, (-60.5, 123.1), 0.4),
)


def make_psf(fwhm, half=16):
    """A PSF that becomes wider along x and elliptical along y."""
    y, x = np.mgrid[-24:25, -24:25]
    samples = moffat_stamp(x * 0.8, y * 0.8, fwhm)
    wider = moffat_stamp(x * 0.8, y * 0.8, 1.1 * fwhm) - samples
    askew = moffat_stamp(x * 0.85, y * 0.75, fwhm) - samples
    basis = np.stack([samples, wider, askew])
    ny, nx = SHAPE
    return PsfModel(basis, 1, 0.8, half, (nx / 2, ny / 2), (nx / 2, ny / 2))


def star_places():
    """Positions on the tract, far enough from each other for the stamps."""
    tract = make_tract(SIDE)
    x, y = np.meshgrid(np.linspace(70.2, 630.7, 9), np.linspace(68.9, 633.3, 9))
    shift = np.random.default_rng(3).uniform(-0.5, 0.5, (2, x.size))
    return tract.pixel_to_sky(x.ravel() + shift[0], y.ravel() + shift[1])


def make_exposure(fwhm, scale, rotation, shift, psf=True):
    """A CCD without noise, with stars of flux 1000 that are drawn by its PSF."""
    wcs = make_wcs(SHAPE, scale, rotation, shift)
    model = make_psf(fwhm)
    image = np.zeros((SHAPE[0] + 100, SHAPE[1] + 100), np.float32)
    x, y = wcs.all_world2pix(*star_places(), 0)
    for one, (column, row) in zip(
        model.images_at(x, y), np.rint([x, y]).astype(int).T + 50, strict=True
    ):
        if 20 < column < SHAPE[1] + 80 and 20 < row < SHAPE[0] + 80:
            image[row - 16 : row + 17, column - 16 : column + 17] += 1000.0 * one
    return CcdImage(make_ccd(image[50:-50, 50:-50], 25.0), wcs, 1.0, model if psf else None)


def make_coadd(tract, without_psf=(), flagged=None, exposures=EXPOSURES):
    """The coadd of exposures, and its PSF."""
    inputs = []
    for number, (*what, weight) in enumerate(exposures):
        ccd = make_exposure(*what, number not in without_psf)
        if flagged is not None and number == 1:
            ccd.masked_image.mask[flagged] = MaskPlane.CR
        (warp,) = (
            one
            for _, one in warp_patches(tract, {"0_0": (4,)}, {4: ccd}.__getitem__, WarpSettings())
        )
        time = (30.0, 40.0, np.nan, 60.0)[number]
        figures = {"mjd": 60000.0 + number, "exposure_time": time}
        seeing = what[0] * SCALE
        inputs.append(CoaddInput(f"e{number}", warp, weight, "4", seeing, **figures))
    coadd = coadd_patch(inputs, BOX, SETTINGS, pixel_scale=SCALE)
    psf_inputs = [PsfInput(one.exposure, one.weight, one.reader.read_psfs()) for one in inputs]
    return coadd, CoaddPsf(tract, BOX, coadd.sets, psf_inputs)


@pytest.fixture(scope="module")
def tract():
    return make_tract(SIDE)


@pytest.fixture(scope="module")
def stored(tract, tmp_path_factory):
    """A coadd, its PSF, and its file."""
    coadd, psf = make_coadd(tract)
    path = tmp_path_factory.mktemp("coadd") / "0_0.fits"
    write_coadd(path, coadd, tract, psf=psf, figures=coadd_figures(coadd, psf, SCALE, 0.8))
    return coadd, psf, path


def cut_out(plane, tract, ra, dec, half):
    x, y = (round(float(p)) for p in tract.sky_to_pixel(ra, dec))
    return plane[y - half : y + half + 1, x - half : x + half + 1]


def test_psf_is_the_image_of_a_star_to_a_millionth_of_its_peak(stored, tract):
    coadd, psf, path = stored
    places = star_places()
    whole = read_coadd_psf(path).images_at(*places)
    n_compared, kinds = 0, set()
    for ra, dec, image in zip(*places, whole, strict=True):
        index = cut_out(coadd.sets.index, tract, ra, dec, psf.half)
        if index.shape != image.shape or np.ptp(index) or not index.all():
            continue
        star = cut_out(coadd.masked_image.image, tract, ra, dec, psf.half)
        assert np.abs(star / 1000.0 - image).max() < 1e-6 * image.max()
        n_compared, kinds = n_compared + 1, kinds | {int(index[0, 0])}
    assert n_compared >= 12 and len(kinds) >= 3
    ra, dec = places[0][40], places[1][40]
    np.testing.assert_array_equal(coadd_psf(path, ra, dec), whole[40])


def test_fluxes_of_stars_are_those_of_the_psf(stored):
    _, _, path = stored
    sums = read_coadd_psf(path).images_at(*star_places()).sum(axis=(1, 2))
    assert np.nanmax(np.abs(sums - 1.0)) < 5e-3


def test_sets_are_the_exposures_that_cover_a_pixel(stored, tract):
    coadd, _, _ = stored
    y, x = np.mgrid[5:SIDE:37, 5:SIDE:37]
    for number, (_, scale, rotation, shift, _) in enumerate(EXPOSURES):
        wcs = make_wcs(SHAPE, scale, rotation, shift)
        on_ccd = wcs.all_world2pix(*tract.pixel_to_sky(x.ravel(), y.ravel()), 0)
        edge = np.min([*on_ccd, *(np.subtract(SHAPE[::-1], 1)[:, None] - on_ccd)], axis=0)
        used = coadd.sets.used(coadd.sets.index[y.ravel(), x.ravel()])[:, number]
        assert used[edge > 4].all() and not used[edge < -1].any()
        assert 20 < used.sum() < used.size
    np.testing.assert_array_equal(coadd.sets.used(coadd.sets.index).sum(axis=2), coadd.n_inputs)
    assert not coadd.sets.used(0).any() and not coadd.sets.filled.any()


def test_sets_do_not_depend_on_blocks_and_threads(stored, tract):
    coadd, _, _ = stored
    inputs = []
    for number, (*what, weight) in enumerate(EXPOSURES):
        ccd = make_exposure(*what)
        warps = warp_patches(tract, {"0_0": (4,)}, {4: ccd}.__getitem__, WarpSettings())
        inputs.append(CoaddInput(f"e{number}", next(warps)[1], weight, "4", seeing=what[0] * SCALE))
    small = SETTINGS.model_copy(update={"memory_mb": 16})
    other = coadd_patch(inputs[::-1], BOX, small, pixel_scale=SCALE, threads=3)
    for name in ("index", "members", "filled"):
        np.testing.assert_array_equal(getattr(other.sets, name), getattr(coadd.sets, name))
    np.testing.assert_array_equal(other.masked_image.mask, coadd.masked_image.mask)


def test_pixels_near_the_end_of_an_exposure_have_no_exact_psf(stored):
    coadd, _, _ = stored
    flagged = coadd.masked_image.has_any(MaskPlane.INEXACT_PSF)
    data = coadd.n_inputs > 0
    assert not flagged[~data].any()
    radius = 4  # of the FWHM, 3.8 pixels in the mean
    y, x = np.nonzero(data)
    for column, row in np.random.default_rng(1).choice(np.stack([x, y], axis=1), 400):
        rows, columns = (
            np.arange(max(p - radius, 0), min(p + radius, SIDE - 1) + 1) for p in (row, column)
        )
        distance = np.hypot(rows[:, None] - row, columns[None] - column)
        index = coadd.sets.index[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # the pixel beside a change is itself a change
        alike = (index == coadd.sets.index[row, column])[distance <= radius].all()
        if not alike:
            assert flagged[row, column]
        if np.all(index == coadd.sets.index[row, column]):
            near_edge = min(row, column, SIDE - 1 - row, SIDE - 1 - column) <= radius
            beyond = coadd.sets.index[
                max(row - radius - 1, 0) : row + radius + 2,
                max(column - radius - 1, 0) : column + radius + 2,
            ]
            assert near_edge or not flagged[row, column] or np.ptp(beyond)
    assert 0.05 < flagged[data].mean() < 0.5


def test_a_flagged_value_changes_the_psf_around_it(tract):
    coadd, psf = make_coadd(tract, flagged=(slice(200, 202), slice(190, 192)))
    wcs = make_wcs(SHAPE, *EXPOSURES[1][1:4])
    ra, dec = (p[0] for p in wcs.all_pix2world([190.5], [200.5], 0))
    assert cut_out(coadd.masked_image.has_any(MaskPlane.INEXACT_PSF), tract, ra, dec, 2).all()
    index = cut_out(coadd.sets.index, tract, ra, dec, 10)
    around, used = coadd.sets.used(index[[0, 10], [0, 10]])
    assert around.sum() == 3 and around[1] and not used[1]
    assert list(np.delete(used, 1)) == list(np.delete(around, 1))
    # the PSF at the pixel is that of those that are used there
    others = [one for number, one in enumerate(psf.inputs) if used[number]]
    parts = [
        StarsOnTract(one.ccd_psfs[0], tract).images_at([ra], [dec], psf.half)[0] for one in others
    ]
    mean = np.average(parts, axis=0, weights=[one.weight for one in others])
    assert psf.images_at(ra, dec)[0] == pytest.approx(mean, abs=1e-7)


def test_distance_to_a_change_is_round():
    index = np.zeros((41, 41), np.int32)
    index[20, 20] = 1
    y, x = np.mgrid[-20:21, -20:21]
    # the pixel and its four neighbours are changes
    distance = np.min(
        [np.hypot(x - dx, y - dy) for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))], axis=0
    )
    np.testing.assert_array_equal(near_change(index, 5), distance <= 5.0)
    assert not near_change(np.ones((7, 9), np.int32), 5).any()


@pytest.fixture(scope="module")
def smooth(tract, tmp_path_factory):
    """A coadd of one exposure, whose PSF is smooth as the model in the format of PSFEx is."""
    coadd, psf = make_coadd(tract, exposures=EXPOSURES[1:2])
    path = tmp_path_factory.mktemp("smooth") / "0_0.fits"
    write_coadd(path, coadd, tract, psf=psf)
    return psf, path


def test_psf_has_the_form_that_galsim_reads(smooth, tract):
    galsim = pytest.importorskip("galsim")
    des = pytest.importorskip("galsim.des")
    psf, path = smooth
    with warnings.catch_warnings(), fits.open(path) as hdus:
        warnings.simplefilter("ignore", DeprecationWarning)
        model = des.DES_PSFEx(hdus["PSF_DATA"])
        profile = model.getPSF(galsim.PositionD(381.0, 301.0))
        side = 2 * psf.half + 1
        drawn = profile.drawImage(nx=side, ny=side, scale=1.0, method="no_pixel").array
        # source-extractor takes a star of flux 1 to have this sum
        samples = hdus["PSF_DATA"].data["PSF_MASK"][0, 0]
        assert samples.sum() * hdus["PSF_DATA"].header["PSF_SAMP"] ** 2 == pytest.approx(1.0)
    image = coadd_psf(path, *tract.pixel_to_sky(380.0, 300.0))
    assert np.abs(drawn / drawn.sum() - image / image.sum()).max() < 0.01 * image.max()


def test_grid_and_header_say_the_psf(stored, tract):
    coadd, _, path = stored
    grid = read_psf_grid(path)
    n_points = 0
    for j, i in np.ndindex(grid.images.shape[:2]):
        column, row = int(grid.x[i]), int(grid.y[j])
        cell = coadd.sets.index[140 * j : 140 * (j + 1), 140 * i : 140 * (i + 1)]
        number = np.bincount(cell.ravel()).argmax()  # the set that most pixels have
        if number > 0 and number == coadd.sets.index[row, column]:
            centred = coadd_psf(path, *tract.pixel_to_sky(float(column), float(row)))
            np.testing.assert_allclose(grid.images[j, i], centred, atol=1e-8)
            n_points += 1
    assert n_points > 8
    with fits.open(path) as hdus:
        headers = hdus["PRIMARY"].header, hdus["IMAGE"].header
    variance = np.median(coadd.masked_image.variance[coadd.n_inputs > 0])
    sigma = np.sqrt(variance / 0.8 * np.nanmedian(grid.areas()))
    for header in headers:
        assert header["SEEING"] == pytest.approx(grid.fwhm() * SCALE)
        assert header["DEPTH"] == pytest.approx(31.4 - 2.5 * np.log10(5 * sigma), abs=1e-4)
        assert header["COVFACT"] == 0.8
        assert header["EXPTIME"] == 30.0 + 40.0 + 60.0  # that of the third is not known
        assert header["TIMESYS"] == "TAI"
    # the middles of the exposures with their weights
    middles = 60000.0 + np.arange(4) + np.array([30.0, 40.0, 0.0, 60.0]) / 2 / 86400
    weights = [one[-1] for one in EXPOSURES]
    assert headers[1]["MJD-AVG"] == pytest.approx(np.average(middles, weights=weights), abs=1e-9)
    assert Time(headers[1]["DATE-AVG"], scale="tai").mjd == pytest.approx(headers[1]["MJD-AVG"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WCS(headers[1])


def test_the_psf_of_the_grid_is_not_that_of_a_pixel_with_a_cosmic_ray(tract):
    coadd, psf = make_coadd(tract)
    index = coadd.sets.index.copy()
    point = psf.grid.y[2], psf.grid.x[2]
    index[point] = 0
    hit = CoaddPsf(tract, BOX, dataclasses.replace(coadd.sets, index=index), psf.inputs)
    np.testing.assert_array_equal(hit.grid.images, psf.grid.images)


def test_depth_counts_the_area_of_the_psf_at_each_place(stored):
    _, _, path = stored
    grid = read_psf_grid(path)
    areas = area_map(grid, (SIDE, SIDE))
    for j, i in np.ndindex(grid.images.shape[:2]):
        image = grid.images[j, i].astype(float)
        if np.isfinite(image).all():
            expected = image.sum() ** 2 / np.square(image).sum()
            assert areas[grid.y[j], grid.x[i]] == pytest.approx(expected, rel=1e-5)
    assert np.isfinite(areas).all()
    difference = depth_of(1.0, 2.0, 1.0) - depth_of(4.0, 8.0, 1.0)
    assert difference == pytest.approx(2.5 * np.log10(4.0), abs=1e-5)


def test_depth_maps_take_the_psf_of_the_coadd(tract, tmp_path):
    coadd, psf = make_coadd(tract)
    path = tmp_path / "coadd" / "r" / str(tract.id) / "0_0.fits"
    write_coadd(path, coadd, tract, psf=psf, figures=coadd_figures(coadd, psf, SCALE, 0.8))
    make_depth(tmp_path / "depth" / f"{tract.id}.ecsv", [path], tract, Settings().only("products"))
    depth = fits.getdata(tmp_path / "depth" / "r" / str(tract.id) / "0_0.fits", "DEPTH")
    n_points = 0
    for j, i in np.argwhere(np.isfinite(psf.grid.images[..., 0, 0])):
        place = psf.grid.y[j], psf.grid.x[i]
        variance = coadd.masked_image.variance[place]
        if np.isfinite(variance):
            image = psf.grid.images[j, i].astype(float) / psf.grid.images[j, i].sum()
            sigma = np.sqrt(variance / 0.8 / np.square(image).sum())
            assert depth[place] == pytest.approx(31.4 - 2.5 * np.log10(5 * sigma), abs=1e-4)
            n_points += 1
    assert n_points > 12


def test_where_a_psf_is_not_known(tract, tmp_path):
    coadd, psf = make_coadd(tract, without_psf=(0, 2))
    flagged = coadd.masked_image.has_any(MaskPlane.INEXACT_PSF)
    without = coadd.sets.used(coadd.sets.index)[..., [0, 2]].any(axis=2)
    assert flagged[without].all()
    image = psf.images_at(*tract.pixel_to_sky(350.0, 350.0))[0]
    assert image.sum() == pytest.approx(1.0, abs=2e-3)
    coadd, psf = make_coadd(tract, without_psf=(0, 1, 2, 3))
    path = tmp_path / "none.fits"
    write_coadd(path, coadd, tract, psf=psf, figures=coadd_figures(coadd, psf, SCALE, 0.8))
    with pytest.raises(InputError, match=r"none.fits: has no PSF at RA"):
        coadd_psf(path, *tract.pixel_to_sky(350.0, 350.0))
    assert read_psf_grid(path) is None
    with fits.open(path) as hdus:
        assert "PSF_DATA" not in hdus
        assert hdus["IMAGE"].header["SEEING"] == pytest.approx(3.8 * SCALE, rel=0.1)


def test_there_is_no_psf_beyond_the_coadd(stored, tract):
    _, _, path = stored
    with pytest.raises(InputError, match="NINPUTS"):
        coadd_psf(path, *tract.pixel_to_sky(-30.0, 350.0))
    with pytest.raises(InputError, match="NINPUTS"):
        coadd_psf(path, *tract.pixel_to_sky(1.0, 1.0))


def test_a_stretched_kernel_draws_the_star_that_it_makes():
    """Pixels of the tract that are twice as large: a star may be 1.4 pixels of the CCD off."""
    tract = make_tract(200, pixel_scale=0.42)
    ccd = make_exposure(*EXPOSURES[0][:4])
    ((_, warp),) = warp_patches(tract, {"0_0": (4,)}, {4: ccd}.__getitem__, WarpSettings())
    (psf,) = warp.read_psfs()
    assert psf.stretch > 2.0
    ra, dec = star_places()
    x, y = ccd.wcs.all_world2pix(ra, dec, 0)
    near = min(SHAPE) / 2 - 60 > np.max(np.abs([x - SHAPE[1] / 2, y - SHAPE[0] / 2]), axis=0)
    alone = np.flatnonzero(near)
    images = StarsOnTract(psf, tract).images_at(ra[alone], dec[alone], 9)
    x0, y0 = warp.box[:2]
    for star, image in zip(alone, images, strict=True):
        column, row = (round(float(p)) for p in tract.sky_to_pixel(ra[star], dec[star]))
        part = (slice(row - y0 - 9, row - y0 + 10), slice(column - x0 - 9, column - x0 + 10))
        seen = warp.masked_image.image[part] / 1000.0
        assert np.abs(seen - image).max() < 1e-6 * image.max()
    assert alone.size > 10


@pytest.mark.parametrize("compression", ["none", "lossless", "quantized"])
def test_the_psf_survives_every_form_of_the_file(stored, tract, tmp_path, compression):
    coadd, psf, path = stored
    other = tmp_path / "0_0.fits"
    write_coadd(other, coadd, tract, compression=compression, psf=psf)
    place = tract.pixel_to_sky(350.3, 349.6)
    np.testing.assert_array_equal(coadd_psf(other, *place), coadd_psf(path, *place))


def test_a_coadd_of_nothing_has_a_file_and_no_psf(tract, tmp_path):
    coadd = coadd_patch([], BOX, SETTINGS)
    psf = CoaddPsf(tract, BOX, coadd.sets, [])
    path = tmp_path / "0_0.fits"
    write_coadd(path, coadd, tract, psf=psf, figures=coadd_figures(coadd, psf, SCALE, 0.8))
    with pytest.raises(InputError, match="has no PSF"):
        coadd_psf(path, *tract.pixel_to_sky(350.0, 350.0))


def test_a_thousand_exposures_and_many_sets():
    """Each pixel is without another pair of exposures."""
    n, size = 1000, 260
    rng = np.random.default_rng(2)
    state = np.full((n, 1, size), USABLE, np.uint8)
    for x in range(size):
        state[rng.choice(n, 2, replace=False), 0, x] = 0
    keys = set_keys(n)
    signature = np.zeros((1, size), np.uint64)
    for k in range(n):
        add_key(state[k, 0], USABLE, keys[k], signature[0])
    index = np.zeros((1, size), np.int32)
    blocks = number_sets(signature, state, range(n), n, index)
    sets = join_sets(index, [(slice(None), slice(None))], [blocks], n)
    np.testing.assert_array_equal(sets.used(sets.index[0]), (state[:, 0] == USABLE).T)
    assert len(sets.members) == size + 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda hdus: hdus["CCD_PSFS"].columns.del_col("SAMPLES"), "CCD_PSFS is not one of"),
        (lambda hdus: hdus["INPUTMAP"].data.fill(99), "contradict each other"),
        (lambda hdus: hdus["INPUTSETS"].header.set("NINPUTS", 77), "contradict each other"),
        (lambda hdus: hdus["IMAGE"].header.remove("LTV1"), "not a readable coadd"),
    ],
)
def test_damaged_files_are_named_with_the_remedy(stored, tmp_path, change, said):
    path = tmp_path / "0_0.fits"
    with fits.open(stored[2]) as hdus:
        change(hdus)
        hdus.writeto(path)
    with pytest.raises(InputError, match=said) as caught:
        read_coadd_psf(path)
    assert str(path) in str(caught.value) and "run the workflow again" in str(caught.value)


def test_source_extractor_fits_the_psf_in_the_file(smooth, tmp_path):
    program = shutil.which("source-extractor") or shutil.which("sex")
    if program is None:
        pytest.skip("source-extractor is not installed")
    _, path = smooth
    (tmp_path / "columns").write_text("X_IMAGE\nY_IMAGE\nFLUX_PSF\nFLAGS\n")
    noisy = tmp_path / "noisy.fits"
    with fits.open(path) as hdus:
        image = np.nan_to_num(hdus["IMAGE"].data)
        hdus["IMAGE"].data = image + np.random.default_rng(1).normal(0, 0.05, image.shape)
        hdus.writeto(noisy)
    options = {
        "PARAMETERS_NAME": "columns",
        "CATALOG_NAME": "found.fits",
        "CATALOG_TYPE": "FITS_1.0",
        "BACK_TYPE": "MANUAL",
        "BACK_VALUE": "0",
        "FILTER": "N",
        "DETECT_THRESH": "20",
        "PSF_NAME": "noisy.fits",
        "PSF_NMAX": "1",
        "VERBOSE_TYPE": "QUIET",
    }
    arguments = [word for name, value in options.items() for word in (f"-{name}", value)]
    done = subprocess.run(
        [program, "noisy.fits[1]", "-c", "/dev/null", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with fits.open(tmp_path / "found.fits") as hdus:
        fluxes = hdus[1].data["FLUX_PSF"]
    assert len(fluxes) > 20
    assert np.median(fluxes) == pytest.approx(1000.0, rel=0.005)
