"""A simulated survey with all effects on, from raw frames to coadds, against its truth.

Two bands with six exposures of six CCDs: the survey of `make demo`.
"""

import shutil

import numpy as np
import pytest
import sep
from astropy.io import fits
from scipy import ndimage
from survey_run import REPOSITORY, Survey

from coaddflow.coadd.product import read_coadd
from coaddflow.coadd.psf import read_psf_grid
from coaddflow.image.masked_image import (
    AB_ZERO_POINT,
    MaskPlane,
)
from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import mad_sigma
from coaddflow.qa.coadd_check import detect_on, empty_sky
from coaddflow.qa.survey_check import check_band, coadds_of_band, trail_left
from coaddflow.qa.swarp import find_swarp, run_swarp, write_weights
from coaddflow.tables.manifest import read_manifest

BANDS = ("g", "r")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The finished demo survey."""
    pytest.importorskip("galsim", reason="the simulator needs the extra `simulate`")
    survey = Survey(tmp_path_factory.mktemp("demo") / "survey")
    survey.folder.mkdir()
    shutil.copy(REPOSITORY / "config.yaml", survey.folder)
    settings = str(REPOSITORY / "configs" / "demo-survey.yaml")
    for arguments in (["simulate", settings, "data/demo"], ["ingest", "data/demo/raw"]):
        ended = survey.coaddflow(*arguments)
        assert ended.returncode == 0, ended.text
    run = survey.run()
    assert run.returncode == 0, run.text
    return survey


@pytest.fixture(scope="module")
def figures(demo):
    """What the coadds of each band are like."""
    return {band: check_band(demo / "results", demo / "data/demo/truth", band) for band in BANDS}


def test_every_ccd_is_solved(demo):
    rows = [
        row for path in (demo / "results/summary").glob("*.ecsv") for row in read_manifest(path)
    ]
    assert len(rows) == 72
    assert all(row.state == "done" for row in rows)
    assert max(row.astrometry_rms for row in rows) < 0.05


@pytest.mark.parametrize("band", BANDS)
def test_bright_stars_are_at_their_true_places(figures, band):
    assert figures[band].n_stars >= 30
    assert figures[band].position_rms < 20.0


@pytest.mark.parametrize("band", BANDS)
def test_fluxes_are_unbiased(figures, band):
    assert abs(figures[band].flux_bias) < 0.01
    assert figures[band].flux_bias_error < 0.003


@pytest.mark.parametrize("band", BANDS)
def test_the_variance_plane_tells_the_noise_of_empty_sky(figures, band):
    assert figures[band].chi
    assert all(0.9 < chi < 1.1 for chi in figures[band].chi)


@pytest.mark.parametrize("band", BANDS)
def test_fluxes_of_empty_sky_scatter_by_a_fifth_of_the_flux_at_the_stated_depth(demo, band):
    signal_to_noise = []
    for path in sorted((demo / "results/depth" / band).glob("*/*.fits")):
        coadd_path = demo / "results/coadd" / band / path.parent.name / path.name
        grid = read_psf_grid(coadd_path)
        if grid is not None:
            flux, x, y = fluxes_of_empty_sky(read_coadd(coadd_path)[0], grid)
            depth = fits.getdata(path, "DEPTH")[y, x]
            signal_to_noise.append(5.0 * flux / 10.0 ** (-0.4 * (depth - AB_ZERO_POINT)))
    signal_to_noise = np.concatenate(signal_to_noise)
    # so that the scatter is known to 0.012 mag; without the covariance of pixels it is 0.12 off,
    # and with a Gaussian in place of the PSF, which has wings, 0.2
    assert signal_to_noise.size > 5000
    assert abs(2.5 * np.log10(mad_sigma(signal_to_noise))) < 0.05


def fluxes_of_empty_sky(coadd, grid):
    """Return the fluxes of the fitted PSF on separate stamps of empty sky, and their places.

    Where at least three exposures overlap: with fewer nothing is clipped. The PSF is that of the
    nearest point of the grid.
    """
    image, radius = coadd.masked_image, 6
    pixels = np.where(np.isfinite(image.image), image.image, 0.0).astype(float)
    empty = empty_sky(image, grow=4) & (coadd.n_inputs >= 3)
    whole = ndimage.minimum_filter(empty, 2 * radius + 1, mode="constant")
    whole[np.arange(whole.shape[0]) % (2 * radius + 1) != 0] = False
    whole[:, np.arange(whole.shape[1]) % (2 * radius + 1) != 0] = False
    y, x = np.nonzero(whole)
    stamps, _ = cut_stamps(pixels, x, y, radius)
    row, column = (
        np.abs(place[:, None] - points).argmin(axis=1)
        for place, points in ((y, grid.y), (x, grid.x))
    )
    profiles = grid.images[row, column].astype(float)
    profiles /= profiles.sum(axis=(1, 2), keepdims=True)
    middle = profiles.shape[-1] // 2
    part = slice(middle - radius, middle + radius + 1)
    profiles = profiles[:, part, part]
    flux = (stamps * profiles).sum(axis=(1, 2)) / (profiles**2).sum(axis=(1, 2))
    known = np.isfinite(flux)
    return flux[known], x[known], y[known]


@pytest.mark.parametrize("band", BANDS)
def test_nothing_is_detected_that_is_not_on_the_sky(figures, band):
    """Six exposures have some thousand cosmic rays, hot pixels and a satellite between them."""
    assert figures[band].n_sources > 100
    assert figures[band].n_spurious <= 0.01 * figures[band].n_sources


@pytest.mark.parametrize("exposure", ["1005", "1006"])
def test_the_trail_is_gone(demo, exposure):
    on_warp, on_coadd = trail_left(demo / "results", demo / "data/demo/truth", exposure)
    assert on_warp > 100.0
    # a mean of six exposures would keep a sixth
    assert abs(on_coadd) < 0.02 * on_warp


@pytest.mark.skipif(find_swarp() is None, reason="SWarp is not installed (Debian: swarp)")
def test_swarp_makes_the_same_coadd_of_the_calexps(demo, tmp_path):
    coadd, header = max(coadds_of_band(demo / "results", "r"), key=lambda c: c[0].n_inputs.sum())
    theirs = swarp_of_calexps(demo, coadd, header, tmp_path)
    image = coadd.masked_image
    # where no exposure has masked pixels on the star: there the programs fill in differently
    sources, fwhm = detect_on(image)
    calm = []
    for x, y in zip(sources["x"], sources["y"], strict=True):
        near = (slice(int(y) - 10, int(y) + 11), slice(int(x) - 10, int(x) + 11))
        whole = np.ptp(coadd.n_inputs[near]) == 0 if coadd.n_inputs[near].size == 441 else False
        calm.append(
            whole
            and not image.has_any(MaskPlane.CLIPPED)[near].any()
            # coadds fill pixels that no exposure has with repaired ones; SWarp leaves a hole
            and np.isfinite(theirs[near]).all()
        )
    clean = np.array(calm) & (np.asarray(sources["flags"]) & ~1 == 0)
    clean &= np.asarray(sources["signal_to_noise"]) > 50
    stars = sources[clean]
    assert len(stars) >= 10
    x, y = np.asarray(stars["x"]), np.asarray(stars["y"])
    window = np.full(x.size, fwhm / 2.355)
    ours = np.nan_to_num(image.image)
    x_ours, y_ours, _ = sep.winpos(ours, x, y, window)
    theirs = np.nan_to_num(theirs)
    x_theirs, y_theirs, _ = sep.winpos(theirs, x, y, window)
    assert np.hypot(x_ours - x_theirs, y_ours - y_theirs).max() < 0.02
    flux = [sep.sum_circle(plane, x, y, 1.5 * fwhm, subpix=0)[0] for plane in (ours, theirs)]
    assert np.median(flux[1] / flux[0]) == pytest.approx(1.0, abs=3e-3)
    assert np.abs(flux[1] / flux[0] - 1.0).max() < 3e-3


def swarp_of_calexps(demo, coadd, header, folder):
    """Coadd the calexps of a coadd's inputs with SWarp, with the same weights and masks.

    NaN where all weights are 0.
    """
    head = header.copy()
    head["NAXIS"] = 2
    head["NAXIS2"], head["NAXIS1"] = coadd.masked_image.shape
    calexps, weight_of = [], {}
    for row in coadd.inputs[coadd.inputs["n_used"] > 0]:
        exposure = str(row["exposure"])
        weight_of[exposure] = row["weight"]
        for ccd in str(row["ccds"]).split(","):
            calexps.append(demo / f"results/calexp/{exposure}/{ccd.strip()}.fits")
    weights = write_weights(calexps, weight_of, folder)
    return run_swarp(calexps, weights, head, "WEIGHTED", folder).image
