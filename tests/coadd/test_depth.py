"""Depth maps: a star of that magnitude is measured at 5 sigma, also on correlated pixels."""

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from skyscene import make_tract

from coaddflow.coadd.depth import make_depth
from coaddflow.coadd.mean import Coadd, coadd_seeing, effective_area
from coaddflow.coadd.point_sources import depth_of
from coaddflow.coadd.product import write_coadd
from coaddflow.image.masked_image import AB_ZERO_POINT, MaskedImage
from coaddflow.settings import Settings
from coaddflow.tables.depths import read_depth_table

SIGMA_PER_FWHM = 1.0 / np.sqrt(8.0 * np.log(2.0))


def gaussian(fwhm, size=41):
    """Return a Gaussian star of flux 1; the FWHM in pixels."""
    y, x = np.mgrid[:size, :size] - size // 2
    profile = np.exp(-0.5 * (x**2 + y**2) / (fwhm * SIGMA_PER_FWHM) ** 2)
    return profile / profile.sum()


def test_fitted_fluxes_scatter_by_a_fifth_of_the_flux_at_this_depth():
    rng = np.random.default_rng(5)
    fwhm, noise, scale = 4.0, 3.0, 0.2
    (depth,) = depth_of([noise**2], effective_area(fwhm * scale, scale), 1.0)
    flux = 10 ** (-0.4 * (depth - AB_ZERO_POINT))
    star = gaussian(fwhm)
    pixels = rng.normal(0.0, noise, (4000, *star.shape))
    fitted = (pixels * star).sum(axis=(1, 2)) / (star**2).sum()
    assert flux / np.std(fitted) == pytest.approx(5.0, rel=0.04)


def test_correlated_pixels_state_less_noise_and_the_factor_gives_it_back():
    """Half of a pixel's variance is in its neighbours, so the fluxes are as noisy as before."""
    plain = depth_of(4.0, 200.0, 1.0)
    correlated = depth_of(2.0, 200.0, 0.5)
    np.testing.assert_allclose(correlated, plain, atol=1e-5)


def test_there_is_no_depth_without_data():
    variance = np.array([[1.0, np.nan], [np.inf, 0.0]])
    assert np.isnan(depth_of(variance, 300.0, 0.8)).tolist() == [[False, True], [True, True]]


def test_the_seeing_of_a_coadd_is_that_of_the_exposures_used_by_weight():
    inputs = Table({"seeing": [1.0, 2.0, 9.0, np.nan], "weight": [3.0, 1.0, 5.0, 7.0]})
    inputs["n_used"] = [10, 10, 0, 10]
    assert coadd_seeing(inputs) == pytest.approx(np.sqrt((3 * 1 + 4) / 4))
    inputs["n_used"] = 0
    assert np.isnan(coadd_seeing(inputs))


@pytest.fixture
def tract():
    return make_tract(patches=2)


def write_patch(folder, tract, patch, variance, seeing, left_out=()):
    """Write a coadd with a constant variance; its left half has no data."""
    box = tract.patch(patch).outer_box
    shape = (box[3] - box[1], box[2] - box[0])
    planes = np.full(shape, variance, np.float32)
    planes[:, : shape[1] // 2] = np.inf
    image = MaskedImage(np.zeros(shape, np.float32), planes, np.zeros(shape, np.int32))
    inputs = Table({"exposure": ["1"], "seeing": [seeing], "weight": [1.0], "n_used": [5]})
    inputs["ccds"], inputs["reason"] = "4", ""
    for exposure, ccd, reason in left_out:
        inputs.add_row((exposure, 3.0, 0.0, 0, ccd, ""))
        inputs["reason"] = [*inputs["reason"][:-1], reason]
    path = folder / "coadd" / "r" / str(tract.id) / f"{patch}.fits"
    coadd = Coadd(box, image, np.ones(shape, np.int16), inputs)
    figures = fits.Header({"SEEING": seeing, "COVFACT": 0.8})
    write_coadd(path, coadd, tract, figures=figures)
    return path


def test_maps_without_a_coadd_are_removed_and_other_files_stay(tmp_path, tract):
    patch, other_patch = tract.patch_ids()[:2]
    coadds = [write_patch(tmp_path, tract, patch, 1.0, 0.8)]
    folder, table = tmp_path / "depth", tmp_path / "depth" / f"{tract.id}.ecsv"
    stale = [f"r/{tract.id}/{other_patch}.fits", f"g/{tract.id}/{patch}.fits"]
    others = [f"r/{tract.id + 1}/{other_patch}.fits", f"r/{tract.id}/mine.fits", "r/notes.txt"]
    for name in (*stale, *others):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    make_depth(table, coadds, tract, Settings().only("products"))
    assert not [name for name in stale if (folder / name).exists()]
    assert [name for name in others if (folder / name).exists()] == others
    assert (folder / "r" / str(tract.id) / f"{patch}.fits").exists()


def test_maps_and_table_of_a_tract(tmp_path, tract):
    patches = tract.patch_ids()[:2]
    too_wide = "seeing 3 times the median > 2"
    left_out = (
        [("3", "1", too_wide), ("3", "2", too_wide), ("2", "1", "failed: no_stars")],
        [("1", "5", "CCD is excluded by the settings")],
    )
    coadds = [
        write_patch(tmp_path, tract, patch, variance, 0.8, left)
        for patch, variance, left in zip(patches, (4.0, 1.0), left_out, strict=True)
    ]
    settings = Settings().only("products")
    table = tmp_path / "depth" / f"{tract.id}.ecsv"
    make_depth(table, coadds, tract, settings)
    rows = read_depth_table(table)
    assert [(row.band, row.patch) for row in rows] == [
        ("r", patches[0]),
        ("r", patches[1]),
        ("r", "all"),
    ]
    # four times the variance is 0.75 mag less deep
    assert rows[1].depth - rows[0].depth == pytest.approx(2.5 * np.log10(2.0), abs=2e-4)
    assert min(row.depth for row in rows) <= rows[2].depth <= max(row.depth for row in rows)
    assert rows[2].n_pixels == rows[0].n_pixels + rows[1].n_pixels
    assert [(row.n_exposures, row.n_left_out, row.left_out) for row in rows] == [
        (1, 2, "3"),
        (1, 1, ""),
        (1, 3, "3"),
    ]
    with fits.open(tmp_path / "depth" / "r" / str(tract.id) / f"{patches[0]}.fits") as hdus:
        assert [hdu.name for hdu in hdus] == ["PRIMARY", "DEPTH"]
        depth, header = hdus["DEPTH"].data, hdus["DEPTH"].header
        assert header["BUNIT"] == "mag"
        place = [header[key] for key in ("FILTER", "TRACT", "PATCH")]
        assert place == ["r", tract.id, patches[0]]
        assert header["SEEING"] == 0.8
        assert np.isnan(depth).sum() == depth.shape[0] * (depth.shape[1] // 2)
        assert np.nanmedian(depth) == pytest.approx(rows[0].depth, abs=1e-3)
    with fits.open(coadds[0]) as hdus:
        for key in ("CRPIX1", "CRVAL1", "LTV1", "CTYPE1"):
            assert hdus["IMAGE"].header[key] == header[key]
