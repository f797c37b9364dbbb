import numpy as np
import pytest
from PIL import Image
from skyscene import draw_star, make_ccd, make_tract

from coaddflow.coadd.mean import Coadd, coadd_patch
from coaddflow.coadd.picture import bin_patch, lupton_rgb, write_picture
from coaddflow.coadd.product import write_coadd
from coaddflow.errors import InputError
from coaddflow.settings.coadd import CoaddSettings


def write_patches(folder, tract, image, empty=()):
    """Write the coadds of all patches of a tract from one image of the tract."""
    folder.mkdir()
    files = {}
    for patch in tract.patches():
        x0, y0, x1, y1 = patch.outer_box
        part = make_ccd(image[y0:y1, x0:x1])
        files[patch.id] = folder / f"{patch.id}.fits"
        nothing = coadd_patch([], patch.outer_box, CoaddSettings())
        table = nothing.inputs.copy()
        table.add_row(["e1", "1", 0.0, 0.0, 0.0, 0.0, 1.0, 5, 0])
        coadd = Coadd(patch.outer_box, part, np.ones(part.shape, np.int16), table)
        write_coadd(files[patch.id], nothing if patch.id in empty else coadd, tract)
    return files


def test_bins_keep_the_sum_and_leave_nan_out():
    image = np.arange(70.0).reshape(7, 10)
    image[0, 0] = np.nan
    sums, counts, first = bin_patch(image, (5, 6), 4)
    assert first == (1, 1)
    assert sums.shape == (3, 3)
    # the first bin holds columns 5 to 7 and rows 6 and 7 of the tract
    assert sums[0, 0] == np.nansum(image[:2, :3]) and counts[0, 0] == 5
    assert sums.sum() == np.nansum(image) and counts.sum() == 69


def test_colours_are_kept_at_every_brightness_and_nothing_is_grey():
    rng = np.random.default_rng(1)
    shape = (60, 60)
    stars = sum(draw_star(shape, 10 + 20 * k, 30, 10.0 ** (2.5 + 0.7 * k), 4.0) for k in range(3))
    red, green, blue = (stars * factor + rng.normal(0.0, 1.0, shape) for factor in (2.0, 1.0, 0.5))
    red[:, :3] = green[:, :3] = blue[:, :3] = np.nan
    green[:, 3:5] = np.nan
    picture = lupton_rgb([red, green, blue])
    assert np.all(picture[:, :3] == picture[0, 0]) and np.ptp(picture[0, 0]) < 20
    # without green, the mean of the others stands for it
    partial = picture[:, 3:5].astype(int)
    partial = partial[partial.min(axis=2) > 0]
    assert len(partial) > 20
    assert np.abs(partial[..., 1] - (partial[..., 0] + partial[..., 2]) / 2).max() < 2
    ratios = []
    for k in range(3):
        r, g, b = picture[30, 10 + 20 * k].astype(float)
        ratios.append((r / g, g / b))
        assert r > g > b
    np.testing.assert_allclose(ratios, 2.0, rtol=0.2)
    # brighter stars are brighter
    assert picture[30, 10].sum() < picture[30, 30].sum() < picture[30, 50].sum()


def test_saturated_cores_have_the_colour_of_the_light_around_them_and_no_holes():
    shape = (60, 60)
    rng = np.random.default_rng(3)
    star = draw_star(shape, 30, 30, 1e6, 5.0)
    red, green, blue = (star * factor + rng.normal(0.0, 1.0, shape) for factor in (2.0, 1.0, 0.5))
    saturated = star > 3000.0
    red[saturated], green[saturated] = 500.0, 100.0
    without = lupton_rgb([red, green, blue])[30, 30].astype(float)
    assert without[2] > without[0]  # a blue hole in a red star
    picture = lupton_rgb([red, green, blue], saturated).astype(float)
    core = picture[saturated]
    np.testing.assert_allclose(core[:, 0] / core[:, 1], 2.0, rtol=0.15)
    np.testing.assert_allclose(core[:, 1] / core[:, 2], 2.0, rtol=0.15)
    assert core.sum(axis=1).min() > 0.99 * picture[~saturated].sum(axis=1).max()


def test_what_a_star_bled_into_is_no_brighter_than_its_light():
    y, x = np.mgrid[:81, :81] - 40.0
    star = 1e5 * np.exp(-np.hypot(x, y) / 4)
    saturated = (np.hypot(x, y) < 6) | (np.abs(x) < 2)
    picture = lupton_rgb([star, star], saturated).astype(int)
    clean = lupton_rgb([star, star]).astype(int)
    assert np.abs(picture - clean).max() <= 2


def test_north_is_up_and_east_is_left(tmp_path):
    tract = make_tract(200, patches=2, border=10)
    image = np.random.default_rng(2).normal(0.0, 1.0, (200, 200))
    # a star in the north-east
    x, y = tract.sky_to_pixel(tract.ra + 12.0 / 3600.0, tract.dec + 12.0 / 3600.0)
    image += draw_star((200, 200), x, y, 1e5, 6.0)
    files = write_patches(tmp_path / "r", tract, image)
    write_picture(tmp_path / "p.png", tract, {"r": files}, max_size=100)
    picture = np.asarray(Image.open(tmp_path / "p.png"))
    assert picture.shape == (100, 100, 3)
    row, column = np.unravel_index(picture.sum(axis=2).argmax(), (100, 100))
    assert abs(column - x / 2) < 2 and abs(row - (99 - y / 2)) < 2
    assert row < 40 and column < 40
    assert np.all(np.ptp(picture, axis=2) == 0)


def test_patches_join_without_a_seam_and_empty_ones_are_left_out(tmp_path):
    tract = make_tract(240, patches=3, border=10)
    image = np.add.outer(np.arange(240.0), np.zeros(240))
    files = write_patches(tmp_path / "r", tract, image, empty=("0_0", "0_1", "0_2", "1_0"))
    write_picture(tmp_path / "p.png", tract, {"r": files, "g": files}, max_size=35)
    picture = np.asarray(Image.open(tmp_path / "p.png")).astype(int)
    # two thirds of the columns remain: 160 pixels in bins of 7, which begin at multiples of 7
    assert picture.shape == (35, 24, 3)
    lit = picture[:, 12:, 0]
    assert np.all(np.diff(lit[::-1], axis=0) >= 0)
    assert np.all(picture[-11:, :11] == picture[-1, 0])


def test_four_bands_and_none_with_data(tmp_path):
    tract = make_tract(100)
    files = write_patches(tmp_path / "r", tract, np.zeros((100, 100)), empty=("0_0",))
    write_picture(tmp_path / "p.png", tract, dict.fromkeys("yzir", files))
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size == (100, 100)


def test_damaged_coadd_is_named(tmp_path):
    (tmp_path / "bad.fits").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"bad\.fits"):
        write_picture(tmp_path / "p.png", make_tract(100), {"r": {"0_0": tmp_path / "bad.fits"}})
    assert not (tmp_path / "p.png").exists()
