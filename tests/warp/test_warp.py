import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from scipy import ndimage
from skyscene import draw_star, make_ccd, make_tract, make_wcs, measure_star

from coaddflow.errors import InputError
from coaddflow.geometry.box import part_of
from coaddflow.image.masked_image import MaskedImage, MaskPlane, flux_scale
from coaddflow.settings.warp import WarpSettings
from coaddflow.tables.warps import read_warp_table
from coaddflow.warp import resample as resample_module
from coaddflow.warp import turning, windows
from coaddflow.warp.ccds import CcdImage, order_patches, warp_patches
from coaddflow.warp.files import Warp, WarpFile, write_warp, write_warps
from coaddflow.warp.kernels import covariance_factor, kernel_weights, make_kernel, stretch_of
from coaddflow.warp.mapping import interpolate, map_ccd

SHAPE = (240, 200)
SETTINGS = WarpSettings()


def warp_ccd(ccd, wcs, tract, settings=SETTINGS, scale=1.0, threads=1):
    """Warp one CCD to a tract of one patch; return the pixels of the whole tract."""
    image = CcdImage(ccd, wcs, scale)
    ((_, warp),) = warp_patches(tract, {"0_0": (1,)}, lambda _: image, settings, threads)
    whole = MaskedImage.empty((tract.height, tract.width))
    part = part_of((0, 0, tract.width, tract.height), warp.box)
    for name in ("image", "variance", "mask"):
        getattr(whole, name)[part] = getattr(warp.masked_image, name)
    return whole


@pytest.mark.parametrize("kernel", ["lanczos3", "lanczos5", "bilinear"])
@pytest.mark.parametrize(("pixel_scale", "rotation"), [(0.2, 0.0), (0.2, 33.0), (0.168, 121.0)])
def test_flux_of_a_star_is_conserved(kernel, pixel_scale, rotation):
    tract = make_tract(400, pixel_scale)
    wcs = make_wcs(SHAPE, 0.2, rotation, shift=(0.3, -0.2))
    ccd = make_ccd(draw_star(SHAPE, 110.3, 120.8, 1e6, fwhm=4.5))
    warp = warp_ccd(ccd, wcs, tract, WarpSettings(kernel=kernel), scale=2.5)
    x, y = tract.sky_to_pixel(*wcs.all_pix2world(110.3, 120.8, 0))
    flux, _, _ = measure_star(warp.image, x, y, radius=20)
    assert flux == pytest.approx(2.5e6, rel=5e-4 if kernel == "bilinear" else 2e-4)


@pytest.mark.parametrize("fwhm", [2.5, 4.0, 6.0])
def test_star_lands_where_the_wcs_says_for_any_phase_of_the_kernel(fwhm):
    tract = make_tract(300)
    errors = []
    for phase in (0.0, 0.12, 0.23, 0.4, 0.5, 0.77, 0.9):
        # a pure shift: all pixels of the star have the same phase, the worst case
        wcs = make_wcs(SHAPE, 0.2, shift=(phase, 0.0))
        ccd = make_ccd(draw_star(SHAPE, 100.0, 120.0, 1e5, fwhm))
        warp = warp_ccd(ccd, wcs, tract)
        x, y = tract.sky_to_pixel(*wcs.all_pix2world(100.0, 120.0, 0))
        _, x_found, y_found = measure_star(warp.image, x, y)
        errors.append(np.hypot(x_found - x, y_found - y))
    assert max(errors) < 0.005


def test_star_lands_where_a_distorted_wcs_says():
    tract = make_tract(400, 0.17)
    sip = {"A_2_0": 1e-4, "A_0_2": -6e-5, "B_1_1": 9e-5, "B_0_3": 2e-7}
    wcs = make_wcs(SHAPE, 0.2, rotation=200.0, sip=sip)
    places = [(40.2, 30.9), (150.6, 40.1), (60.3, 200.7), (170.0, 210.4)]
    ccd = make_ccd(sum(draw_star(SHAPE, x, y, 1e5, 4.0) for x, y in places))
    warp = warp_ccd(ccd, wcs, tract)
    for place in places:
        x, y = tract.sky_to_pixel(*wcs.all_pix2world(*place, 0))
        _, x_found, y_found = measure_star(warp.image, x, y)
        # the distortion turns and shears the star: its weighted centre moves by a little
        assert np.hypot(x_found - x, y_found - y) < 0.005


def test_lanczos_is_sharper_than_bilinear():
    tract = make_tract(300)
    wcs = make_wcs(SHAPE, 0.2, shift=(0.5, 0.5))
    ccd = make_ccd(draw_star(SHAPE, 100.0, 120.0, 1e5, 3.0))
    peaks = {
        kernel: np.nanmax(warp_ccd(ccd, wcs, tract, WarpSettings(kernel=kernel)).image)
        for kernel in ("lanczos3", "lanczos5", "bilinear")
    }
    # a star of the same flux centred between pixels
    true = draw_star(SHAPE, 100.5, 120.5, 1e5, 3.0).max()
    assert peaks["lanczos3"] == pytest.approx(true, rel=0.02)
    assert peaks["lanczos5"] == pytest.approx(true, rel=0.01)
    assert peaks["bilinear"] < 0.9 * true


def test_constant_and_slope_are_reproduced():
    tract = make_tract(300)
    wcs = make_wcs(SHAPE, 0.2, rotation=20.0, shift=(0.1, 0.7))
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    ccd = make_ccd(500.0 + 2.0 * x - 3.0 * y)
    warp = warp_ccd(ccd, wcs, tract)
    good = warp.mask == 0
    v, u = np.nonzero(good)
    i, j = wcs.all_world2pix(*tract.pixel_to_sky(u, v), 0)
    # a slope is shifted by no more than 0.01 pixel
    np.testing.assert_allclose(warp.image[good], 500.0 + 2.0 * i - 3.0 * j, atol=0.06)
    flat = warp_ccd(make_ccd(np.full(SHAPE, 500.0)), wcs, tract)
    np.testing.assert_allclose(flat.image[good], 500.0, rtol=2e-6)


@pytest.mark.parametrize("kernel", ["lanczos3", "bilinear"])
def test_noise_is_what_the_variance_plane_and_the_covariance_factor_say(kernel):
    pixel_scale = 0.18
    tract = make_tract(500, pixel_scale)
    shape = (400, 400)
    wcs = make_wcs(shape, 0.2, rotation=10.0)
    rng = np.random.default_rng(5)
    ccd = make_ccd(rng.normal(0.0, 10.0, shape), variance=100.0)
    warp = warp_ccd(ccd, wcs, tract, WarpSettings(kernel=kernel), scale=3.0)
    good = warp.mask == 0
    chi = warp.image[good] / np.sqrt(warp.variance[good])
    assert np.std(chi) == pytest.approx(1.0, abs=0.02)
    # sums over boxes much larger than the kernel have the white-noise variance
    side = 20
    inner = warp.image[150:350, 150:350]
    sums = inner.reshape(200 // side, side, 200 // side, side).sum(axis=(1, 3))
    predicted = warp.variance[150:350, 150:350].mean() * side**2
    ratio = (0.18 / 0.2) ** 2
    predicted /= covariance_factor(kernel, ratio)
    # 100 boxes: the variance is known to 14 %
    assert np.var(sums) == pytest.approx(predicted, rel=0.35)
    expected = 9.0 * 100.0 * ratio
    assert predicted / side**2 == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("pixel_scale", "kernel"), [(0.4, "lanczos3"), (0.8, "lanczos3"), (0.3, "bilinear")]
)
def test_a_coarse_grid_uses_all_photons(pixel_scale, kernel):
    """White noise of 1 per pixel of 0.2 arcsec: a coarse pixel is the sum of ``ratio`` of them."""
    shape, rng, ratio = (320, 320), np.random.default_rng(1), (pixel_scale / 0.2) ** 2
    tract, wcs = make_tract(int(90 / pixel_scale), pixel_scale), make_wcs(shape, 0.2, rotation=13.0)
    settings = WarpSettings(kernel=kernel)
    warp = warp_ccd(make_ccd(rng.normal(0.0, 1.0, shape), 1.0), wcs, tract, settings)
    good = warp.mask == 0
    assert good.sum() > 0.8 * 320**2 / ratio
    assert np.std(warp.image[good]) < 1.02 * ratio**0.5
    chi = warp.image[good] / np.sqrt(warp.variance[good])
    assert np.std(chi) == pytest.approx(1.0, abs=0.05)
    of_large_apertures = np.mean(warp.variance[good]) / covariance_factor(kernel, ratio)
    assert of_large_apertures == pytest.approx(ratio, rel=0.005)
    fluxes = []
    for x, y in rng.uniform(110.0, 210.0, (8, 2)):
        star = warp_ccd(make_ccd(draw_star(shape, x, y, 1.0, 3.5)), wcs, tract, settings)
        fluxes.append(np.nansum(star.image))
    np.testing.assert_allclose(fluxes, 1.0, atol=0.01)


def test_flags_on_a_coarse_grid_go_where_their_pixels_have_weight_together():
    tract, wcs = make_tract(100, 0.8), make_wcs((320, 320), 0.2)
    ccd = make_ccd(np.full((320, 320), 50.0))
    ccd.mask[160:164, 160:164] = MaskPlane.CR
    ccd.mask[100, 100] = MaskPlane.INTRP  # a hundredth of the weight of any coarse pixel, or so
    ccd.mask[:, 220:224] = MaskPlane.BAD | MaskPlane.NO_DATA
    ccd.image[:, 220:224] = 1e9
    warp = warp_ccd(ccd, wcs, tract)
    v, u = np.nonzero(warp.has_any(MaskPlane.CR))
    x, y = tract.sky_to_pixel(*wcs.all_pix2world(161.5, 161.5, 0))
    assert 4 <= len(u) <= 16
    assert max(abs(u - x).max(), abs(v - y).max()) < 2.6
    assert warp.has_any(MaskPlane.INTRP).sum() <= 4
    data = ~warp.has_any(MaskPlane.NO_DATA)
    np.testing.assert_allclose(warp.image[data], 50.0 * 16, rtol=1e-5)
    # a coarse pixel has no data, and those beside it say so
    row = warp.mask[50]
    x, _ = tract.sky_to_pixel(*wcs.all_pix2world(221.5, 160.0, 0))
    near = row[int(x) - 4 : int(x) + 6]
    assert 1 <= np.count_nonzero(near & MaskPlane.NO_DATA) <= 3
    assert 2 <= np.count_nonzero(near & MaskPlane.EDGE) <= 6


def test_a_stretched_kernel_is_continuous_and_sums_to_one():
    phase = np.linspace(0.0, 1.0, 101)
    for kernel, stretch in (("lanczos3", 1.125), ("lanczos3", 2.0), ("bilinear", 3.5)):
        weights = kernel_weights(kernel, phase, stretch)
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-12)
        np.testing.assert_allclose(weights[::-1], weights[:, ::-1], atol=1e-12)
        assert np.abs(np.diff(weights, axis=0)).max() < 0.02
    assert [stretch_of(area) for area in (0.5, 1.0, 1.1, 4.0, 15.9)] == [1.0, 1.0, 1.0, 2.0, 4.0]


def test_a_saturated_core_has_no_black_rim():
    """Where the pixels in the core are lower than its rim, as wells that overflowed may be."""
    tract = make_tract(200)
    wcs = make_wcs((100, 100), 0.2, rotation=20.0, shift=(0.4, 0.3))
    image = draw_star((100, 100), 50.0, 50.0, 1e7, 8.0)
    ccd = make_ccd(image)
    saturated = image > 60000.0
    ccd.mask[saturated] = int(MaskPlane.SAT)
    ccd.image[saturated] = 100.0
    lowest = ndimage.minimum_filter(ccd.image, 5)
    warp = warp_ccd(ccd, wcs, tract)
    v, u = np.nonzero(warp.has_any(MaskPlane.SAT))
    assert len(u) > 40
    x, y = (np.rint(p).astype(int) for p in wcs.all_world2pix(*tract.pixel_to_sky(u, v), 0))
    assert (warp.image[v, u] >= 0.99 * lowest[y, x]).all()
    assert warp.image[v, u].min() > 90.0


def test_kernels_sum_to_one_and_hit_the_pixels():
    phase = np.linspace(0.0, 1.0, 101)
    for kernel in ("lanczos3", "lanczos5", "bilinear"):
        weights = kernel_weights(kernel, phase)
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, atol=1e-12)
        here = weights.shape[1] // 2 - 1
        np.testing.assert_allclose(weights[0], np.eye(weights.shape[1])[here], atol=1e-12)
        np.testing.assert_allclose(weights[::-1], weights[:, ::-1], atol=1e-12)


def test_identity_returns_the_pixels():
    tract = make_tract(200)
    rng = np.random.default_rng(1)
    ccd = make_ccd(rng.normal(0.0, 10.0, (100, 120)))
    ccd.mask[:] = rng.integers(0, 4, ccd.shape) * 4
    wcs = tract.wcs()
    wcs.wcs.crpix -= [30.0, 50.0]
    wcs.wcs.set()
    warp = warp_ccd(ccd, wcs, tract)
    inner = warp.image[53:147, 33:147]
    np.testing.assert_allclose(inner, ccd.image[3:-3, 3:-3], rtol=0, atol=2e-3)
    np.testing.assert_array_equal(warp.mask[53:147, 33:147], ccd.mask[3:-3, 3:-3])


@pytest.mark.parametrize("kind", ["nan", "inf", "no_data", "zero_variance", "nan_variance"])
def test_unusable_pixel_never_spreads(kind):
    tract = make_tract(200)
    wcs = make_wcs((100, 100), 0.2, rotation=27.0, shift=(0.3, 0.4))
    _, x = np.mgrid[:100, :100]
    image = 100.0 + 0.5 * x
    clean = warp_ccd(make_ccd(image), wcs, tract)
    ccd = make_ccd(image)
    if kind in ("nan", "inf"):
        ccd.image[50, 50] = {"nan": np.nan, "inf": np.inf}[kind]
    elif kind == "no_data":
        ccd.image[50, 50] = 1e9
        ccd.mask[50, 50] = MaskPlane.NO_DATA
    else:
        ccd.image[50, 50] = 1e9
        ccd.variance[50, 50] = 0.0 if kind == "zero_variance" else np.nan
    warp = warp_ccd(ccd, wcs, tract)
    x0, y0 = tract.sky_to_pixel(*wcs.all_pix2world(50, 50, 0))
    hole = warp.has_any(MaskPlane.NO_DATA) & ~clean.has_any(MaskPlane.NO_DATA)
    v, u = np.nonzero(hole)
    assert 1 <= hole.sum() <= 16
    assert np.hypot(u - x0, v - y0).max() < 2.5
    touched = warp.has_any(MaskPlane.EDGE) & ~clean.has_any(MaskPlane.EDGE)
    v, u = np.nonzero(touched)
    assert 4 <= touched.sum() <= 40
    assert max(abs(u - x0).max(), abs(v - y0).max()) < 4.5
    # with part of the weights missing the value is still right to a small part of the slope
    data = ~warp.has_any(MaskPlane.NO_DATA)
    np.testing.assert_allclose(warp.image[data], clean.image[data], atol=0.5)
    same = data & ~touched
    np.testing.assert_array_equal(warp.image[same], clean.image[same])
    assert np.all(np.isfinite(warp.image[data]) & np.isfinite(warp.variance[data]))
    assert np.all(np.isnan(warp.image[~data]) & np.isinf(warp.variance[~data]))
    assert np.all(warp.mask[~data] == MaskPlane.NO_DATA)


def test_mask_bits_go_where_the_pixel_has_weight_and_no_farther():
    tract = make_tract(200)
    wcs = make_wcs((100, 100), 0.2, shift=(0.5, 0.5))
    ccd = make_ccd(np.full((100, 100), 50.0))
    ccd.mask[40, 60] = MaskPlane.CR | MaskPlane.INTRP
    ccd.mask[70:75, 20:25] |= MaskPlane.DETECTED
    warp = warp_ccd(ccd, wcs, tract)
    x, y = tract.sky_to_pixel(*wcs.all_pix2world(60, 40, 0))
    v, u = np.nonzero(warp.has_any(MaskPlane.CR))
    # between four pixels: their four weights of 0.37, and eight of -0.08
    assert len(u) == 12
    assert np.hypot(u - x, v - y).max() < 1.7
    np.testing.assert_array_equal(warp.has_any(MaskPlane.CR), warp.has_any(MaskPlane.INTRP))
    np.testing.assert_allclose(warp.image[warp.has_any(MaskPlane.CR)], 50.0, rtol=1e-5)
    x, y = tract.sky_to_pixel(*wcs.all_pix2world(22, 72, 0))
    v, u = np.nonzero(warp.has_any(MaskPlane.DETECTED))
    assert max(abs(u - x).max(), abs(v - y).max()) < 4.5


def test_edge_of_the_ccd_is_flagged_and_beyond_is_nothing():
    tract = make_tract(200)
    wcs = make_wcs((100, 100), 0.2, shift=(0.5, 0.5))
    warp = warp_ccd(make_ccd(np.full((100, 100), 50.0)), wcs, tract)
    data = ~warp.has_any(MaskPlane.NO_DATA)
    edge = warp.has_any(MaskPlane.EDGE)
    columns, rows = np.flatnonzero(data.any(axis=0)), np.flatnonzero(data.any(axis=1))
    # of the 99 positions between pixels, one at each side misses a large weight
    assert (len(columns), len(rows)) == (97, 97)
    assert np.all(edge[data].reshape(97, 97)[[0, -1]])
    assert not np.any(edge[data].reshape(97, 97)[1:-1, 1:-1])


def test_two_threads_give_the_same_bits_as_one():
    tract = make_tract(400)
    shape = (300, 300)
    rng = np.random.default_rng(2)
    ccd = make_ccd(rng.normal(0.0, 10.0, shape))
    ccd.image[100:105, 100] = np.nan
    wcs = make_wcs(shape, 0.2, rotation=40.0)
    one, two = (warp_ccd(ccd, wcs, tract, threads=n) for n in (1, 2))
    for name in ("image", "variance", "mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def make_exposure():
    """Two CCDs side by side (with a little overlap) on a tract of 2 x 2 overlapping patches."""
    tract = make_tract(400, patches=2, border=20)
    rng = np.random.default_rng(3)
    shape = (240, 150)
    sip = {"A_2_0": 2e-5, "B_1_1": 1e-5}
    return tract, {
        ccd: CcdImage(
            make_ccd(rng.normal(0.0, 10.0, shape) + 100.0 * ccd),
            make_wcs(shape, 0.2, rotation=5.0, shift=(side, 0.0), sip=sip),
            scale=2.0,
        )
        for ccd, side in ((4, 73.0), (9, -73.0))
    }


ALL = ("0_0", "1_0", "0_1", "1_1")


def test_overlapping_patches_agree_to_the_bit():
    tract, ccds = make_exposure()
    warps = dict(warp_patches(tract, dict.fromkeys(ALL, (9, 4)), ccds.__getitem__, SETTINGS))
    full = {name: np.full((400, 400), -1.0) for name in ("image", "variance", "mask")}
    n_shared = 0
    for warp in warps.values():
        x0, y0, x1, y1 = warp.box
        for name, plane in full.items():
            part = plane[y0:y1, x0:x1]
            seen = part != -1.0
            mine = getattr(warp.masked_image, name)
            np.testing.assert_array_equal(mine[seen], part[seen].astype(mine.dtype))
            n_shared += seen.sum()
            part[:] = mine
    assert n_shared > 3 * 20 * 200


def test_first_ccd_wins_where_two_overlap():
    tract, ccds = make_exposure()
    warps = dict(warp_patches(tract, {"0_0": (4,), "1_0": (9,)}, ccds.__getitem__, SETTINGS))
    both = dict(warp_patches(tract, {"0_0": (9, 4)}, ccds.__getitem__, SETTINGS))["0_0"]
    assert warps["0_0"].ccds == (4,) and both.ccds == (4, 9)
    x0, y0, x1, y1 = warps["0_0"].box
    dx, dy = x0 - both.box[0], y0 - both.box[1]
    part = both.masked_image.image[dy : dy + y1 - y0, dx : dx + x1 - x0]
    alone = warps["0_0"].masked_image
    data = ~alone.has_any(MaskPlane.NO_DATA)
    np.testing.assert_array_equal(part[data], alone.image[data])
    assert both.n_covered > np.count_nonzero(data)


def test_ccd_that_cannot_be_mapped_is_named():
    tract, ccds = make_exposure()
    ccds[9].wcs.wcs.crval = [330.0, -2.0]
    with pytest.raises(InputError, match="CCD 9: the WCS"):
        list(warp_patches(tract, {"0_0": (4, 9)}, ccds.__getitem__, SETTINGS))


def test_flags_do_not_change_values():
    tract = make_tract(200)
    wcs = make_wcs((100, 100), 0.2, rotation=31.0)
    image = np.random.default_rng(6).normal(0.0, 10.0, (100, 100))
    plain, flagged = make_ccd(image), make_ccd(image)
    flagged.mask[:] = MaskPlane.DETECTED
    one, other = (warp_ccd(ccd, wcs, tract) for ccd in (plain, flagged))
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.variance, other.variance)
    data = ~other.has_any(MaskPlane.NO_DATA)
    assert np.all(other.has_any(MaskPlane.DETECTED)[data])


def test_every_calexp_is_read_once_and_few_are_held():
    # 6 x 6 CCDs over 3 x 3 patches; a CCD reaches one or two patches in each direction
    reach = {0: (0, 1, 2), 1: (1, 2, 3, 4), 2: (3, 4, 5)}
    patch_ccds = {
        f"{x}_{y}": [6 * j + i for j in reach[y] for i in reach[x]] for y in reach for x in reach
    }
    order = order_patches(patch_ccds)
    assert sorted(order) == sorted(patch_ccds)
    alive, loaded, most = set(), [], 0
    for k, patch in enumerate(order):
        loaded += [c for c in patch_ccds[patch] if c not in alive]
        alive |= set(patch_ccds[patch])
        most = max(most, len(alive))
        alive &= {c for later in order[k + 1 :] for c in patch_ccds[later]}
    assert len(loaded) == len(set(loaded))
    assert most <= 24
    tract, ccds = make_exposure()
    calls = []

    def load(ccd):
        calls.append(ccd)
        return ccds[ccd]

    list(warp_patches(tract, dict.fromkeys(ALL, (4, 9)), load, SETTINGS))
    assert sorted(calls) == [4, 9]


def read(reader, region):
    """Image, variance and mask of a region."""
    pixels = MaskedImage.empty((region[3] - region[1], region[2] - region[0]))
    reader.read_into(region, pixels, (0, 0))
    return pixels.image, pixels.variance, pixels.mask


def test_exposure_on_disk(tmp_path):
    tract, ccds = make_exposure()
    stale = tmp_path / "7" / "e1" / "5_5.fits"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"old")
    path = tmp_path / "7" / "e1.ecsv"
    patch_ccds = {"0_0": (4, 9), "1_0": (4, 9), "1_1": (4, 9)}
    warps = warp_patches(tract, patch_ccds, ccds.__getitem__, SETTINGS)
    write_warps(path, "e1", tract, warps, SETTINGS)
    assert not stale.exists()
    rows = read_warp_table(path).warps
    assert [row.patch for row in rows] == ["0_0", "1_0", "1_1"]
    assert sorted(p.name for p in stale.parent.iterdir()) == [f"{r.patch}.fits" for r in rows]
    warps = dict(warp_patches(tract, patch_ccds, ccds.__getitem__, SETTINGS))
    for row in rows:
        warp, name = warps[row.patch], tmp_path / "7" / row.path
        reader = WarpFile(name)
        assert reader.box == warp.box == (row.x0, row.y0, row.x1, row.y1)
        region = (warp.box[0] + 2, warp.box[1] + 3, warp.box[2] - 1, warp.box[3] - 5)
        for one, other in zip(read(reader, region), read(warp, region), strict=True):
            np.testing.assert_array_equal(one, other)
        assert row.n_covered == warp.n_covered
        assert warp.n_covered == np.sum(~warp.masked_image.has_any(MaskPlane.NO_DATA))
        with fits.open(name) as hdus:
            wcs = WCS(hdus["IMAGE"].header)
            ra, dec = wcs.all_pix2world(10.0, 20.0, 0)
            x, y = tract.sky_to_pixel(ra, dec)
            np.testing.assert_allclose([x, y], [warp.box[0] + 10.0, warp.box[1] + 20.0], atol=1e-6)
            assert hdus["IMAGE"].header["BUNIT"] == "nJy"


def test_exposure_beside_the_tract_gives_an_empty_table(tmp_path):
    tract = make_tract()
    warps = warp_patches(tract, {}, None, SETTINGS)
    write_warps(tmp_path / "e2.ecsv", "e2", tract, warps, SETTINGS)
    table = read_warp_table(tmp_path / "e2.ecsv")
    assert (table.exposure, table.tract, table.warps) == ("e2", tract.id, ())


@pytest.mark.parametrize("compression", ["none", "lossless", "quantized"])
def test_compressed_warp_reads_the_same(tmp_path, compression):
    tract, ccds = make_exposure()
    warp = dict(warp_patches(tract, {"0_0": (4,)}, ccds.__getitem__, SETTINGS))["0_0"]
    write_warp(tmp_path / "w.fits", warp, tract, fits.Header(), compression)
    region = (warp.box[0], warp.box[1] + 10, warp.box[2] - 3, warp.box[3])
    image, variance, mask = read(WarpFile(tmp_path / "w.fits"), region)
    true_image, true_variance, true_mask = read(warp, region)
    np.testing.assert_array_equal(mask, true_mask)
    np.testing.assert_array_equal(image, true_image)
    np.testing.assert_array_equal(variance, true_variance)


def test_damaged_warp_is_an_error_with_its_name(tmp_path):
    tract = make_tract()
    warp = Warp((3, 4, 33, 44), MaskedImage.empty((40, 30)))
    path = tmp_path / "w.fits"
    write_warp(path, warp, tract, fits.Header())
    whole_file = path.read_bytes()
    reader = WarpFile(path)
    path.write_bytes(whole_file[: len(whole_file) // 2])
    with pytest.raises(InputError, match=r"w\.fits"):
        read(reader, (3, 4, 33, 44))
    path.write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"w\.fits"):
        WarpFile(path)
    with pytest.raises(InputError, match=r"none\.fits"):
        WarpFile(tmp_path / "none.fits")
    with pytest.raises(InputError, match="not a table of warps"):
        read_warp_table(tmp_path / "none.ecsv")


def test_flux_scale():
    assert flux_scale(31.4) == pytest.approx(1.0)
    assert flux_scale(28.9) == pytest.approx(10.0)


@pytest.mark.parametrize("rotation", [3.0, 93.0, 183.0, 268.0])
@pytest.mark.parametrize("pixel_scale", [0.2, 0.26])
def test_a_ccd_lies_on_the_tract_whichever_way_it_is_read_out(rotation, pixel_scale):
    """Rows for columns, and columns in reverse order, are the same CCD with another WCS."""
    rng = np.random.default_rng(9)
    shape, tract = (170, 130), make_tract(300)
    ccd = make_ccd(rng.normal(0.0, 10.0, shape))
    ccd.variance[:] = rng.uniform(50.0, 200.0, shape)
    ccd.image[rng.random(shape) < 1e-3] = np.nan
    ccd.mask[rng.random(shape) < 3e-3] = int(MaskPlane.SAT)
    wcs = make_wcs(shape, pixel_scale, rotation=rotation)
    expected = warp_ccd(ccd, wcs, tract)
    assert np.mean((expected.mask & int(MaskPlane.NO_DATA)) == 0) > 0.15
    planes = (ccd.image, ccd.variance, ccd.mask)
    (x, y), matrix = wcs.wcs.crpix, wcs.pixel_scale_matrix
    swapped, reversed_ = WCS(naxis=2), WCS(naxis=2)
    for one in (swapped, reversed_):
        one.wcs.ctype, one.wcs.crval = wcs.wcs.ctype, wcs.wcs.crval
    swapped.wcs.crpix, swapped.wcs.cd = (y, x), matrix[:, ::-1]
    reversed_.wcs.crpix, reversed_.wcs.cd = (shape[1] + 1 - x, y), matrix * [[-1.0, 1.0]]
    others = (
        (MaskedImage(*(plane.T for plane in planes)), swapped),
        (MaskedImage(*(plane[:, ::-1] for plane in planes)), reversed_),
    )
    for other, other_wcs in others:
        found = warp_ccd(other, other_wcs, tract)
        np.testing.assert_array_equal(found.mask, expected.mask)
        np.testing.assert_allclose(found.image, expected.image, rtol=0, atol=2e-3)
        np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-3)


@pytest.mark.parametrize(
    ("rotation", "turns"), [(2.0, False), (92.0, True), (182.0, True), (272.0, True), (45.0, False)]
)
def test_rows_of_a_ccd_are_turned_to_those_of_the_tract(rotation, turns):
    shape, tract = (170, 130), make_tract(300)
    ccd = make_ccd(np.random.default_rng(10).normal(0.0, 10.0, shape))
    grid = map_ccd(make_wcs(shape, 0.2, rotation=rotation), shape, tract)
    pixels, turned = turning.turn(ccd, grid)
    assert (pixels is not ccd) == turns
    slopes = [np.nanmedian(np.diff(plane, axis=1)) / turned.step for plane in turned[3:5]]
    if turns:
        assert slopes[0] > 0.99
        assert abs(slopes[1]) < 0.05
    # the same pixel of the CCD, at any node of the mapping
    for x, y, x_turned, y_turned in zip(
        *(p.ravel() for p in (*grid[3:5], *turned[3:5])), strict=True
    ):
        if 0 <= x < 129 and 0 <= y < 169:
            place, place_turned = (
                np.round([y, x]).astype(int),
                np.round([y_turned, x_turned]).astype(int),
            )
            assert ccd.image[tuple(place)] == pixels.image[tuple(place_turned)]


@pytest.mark.parametrize("n_taps", [2, 4, 6, 8, 10])
def test_windows_side_by_side_are_summed_to_the_same_bits_as_one_by_one(n_taps):
    """As far as the end of the image, beyond which no vector may be read."""
    rng = np.random.default_rng(n_taps)
    stride, lanes = 90, (1, 61)
    image = rng.normal(0.0, 10.0, 20 * stride).astype(np.float32)
    variance = rng.uniform(1.0, 2.0, image.size).astype(np.float32)
    image[:stride] = np.float32(-0.0)
    room = n_taps - 1 if n_taps in {2, 4, 8} else 15  # of the vector that one window is read by
    for start in (0, 700, image.size - (n_taps - 1) * stride - room - 61):
        starts = np.zeros(windows.LANES, np.int32)
        starts[1:61] = np.arange(start, start + 60)
        weights = rng.normal(size=(2, n_taps, windows.ROOM)).astype(np.float32)
        kinds, found = np.zeros(windows.LANES, np.uint8), []
        for link in (0, 1):
            links = np.full(windows.LANES, link, np.uint8)
            sums = np.zeros((2, windows.ROOM), np.float32)
            taps = tuple(range(n_taps))
            windows.sum_clean(
                *(image, variance, stride, starts, *weights, kinds, links, lanes, taps, *sums)
            )
            found.append(sums[:, 1:61].view(np.int32))
        np.testing.assert_array_equal(found[0], found[1])
        assert len(np.unique(found[0])) > 60


@pytest.mark.parametrize("kernel", ["lanczos3", "lanczos5", "bilinear"])
@pytest.mark.parametrize(("pixel_scale", "is_grouped"), [(0.2, True), (0.26, False)])
def test_pixels_do_not_depend_on_how_many_are_worked_on_together(kernel, pixel_scale, is_grouped):
    """In a target of three columns too few windows are side by side to be summed together."""
    rng = np.random.default_rng(8)
    shape, tract = (150, 130), make_tract(240)
    ccd = make_ccd(rng.normal(0.0, 10.0, shape), rng.uniform(50.0, 200.0, shape))
    ccd.image[rng.random(shape) < 1e-3] = np.nan
    ccd.mask[rng.random(shape) < 1e-3] = int(MaskPlane.DETECTED)
    grid = map_ccd(make_wcs(shape, pixel_scale, rotation=2.0), shape, tract)
    made = make_kernel(kernel, stretch_of(float(np.nanmedian(grid.area))))
    source = resample_module.prepare_source(ccd, made)
    rules = resample_module.Rules(1.5, 0.1, 0.1)
    whole = MaskedImage.empty((240, 240))
    n_whole = resample_module.resample(source, grid, made, whole, (0, 0), (0, 240), rules)
    n_strips = 0
    for x0 in range(0, 240, 3):
        strip = MaskedImage.empty((240, 3))
        n_strips += resample_module.resample(source, grid, made, strip, (x0, 0), (0, 240), rules)
        for name in ("image", "variance", "mask"):
            expected = getattr(whole, name)[:, x0 : x0 + 3]
            np.testing.assert_array_equal(getattr(strip, name), expected)
    assert n_strips == n_whole > 0.8 * 150 * 130 * (pixel_scale / 0.2) ** 2
    x, y, _ = interpolate(grid, np.arange(100, 140), np.full(40, 120))
    steps = np.diff(np.floor(x)) + 1000 * np.diff(np.floor(y))
    assert (np.count_nonzero(steps == 1) > 35) == is_grouped


@pytest.mark.parametrize("kernel", ["lanczos3", "lanczos5", "bilinear"])
@pytest.mark.parametrize("stretch", [1.0, 1.125, 1.5, 2.0])
def test_polynomial_weights_are_those_of_the_kernel(kernel, stretch):
    """The error of a resampled pixel of white noise is that of its weights, added in squares."""
    made = make_kernel(kernel, stretch)
    n_phases = windows.LANES
    phases = np.linspace(0.0, 1.0, n_phases)
    found = np.empty((len(made.taps), n_phases), np.float32)
    windows.set_weights((phases - 0.5).astype(np.float32), made.coefficients, found)
    expected = kernel_weights(kernel, phases, stretch).T
    error = np.sqrt(np.sum((found - expected) ** 2, axis=0))
    assert error.max() < 5e-7
    assert error.max() < 1e-6 * np.sqrt(np.sum(expected**2, axis=0)).min()


@pytest.mark.parametrize(
    ("kernel", "pixel_scale"),
    [("lanczos3", 0.2), ("lanczos5", 0.2), ("bilinear", 0.2), ("lanczos3", 0.3)],
)
def test_resampled_pixels_are_those_of_the_exact_kernel(kernel, pixel_scale):
    """Against sums in double precision, at the positions of the grid."""
    rng = np.random.default_rng(8)
    tract, shape = make_tract(150, pixel_scale), (180, 150)
    ccd = make_ccd(rng.normal(0.0, 1.0, shape))
    ccd.variance[:] = rng.uniform(0.5, 2.0, shape)
    wcs = make_wcs(shape, 0.2, rotation=31.0, shift=(0.2, 0.6))
    warp = warp_ccd(ccd, wcs, tract, WarpSettings(kernel=kernel))
    grid = map_ccd(wcs, shape, tract)
    stretch = stretch_of(float(np.nanmedian(grid.area)))
    v, u = np.nonzero(warp.mask == 0)
    x, y, area = interpolate(grid, u, v)
    # of windows that are not quite whole
    whole = (x > 9) & (x < shape[1] - 10) & (y > 9) & (y < shape[0] - 10)
    u, v, x, y, area = (one[whole] for one in (u, v, x, y, area))
    weights_x, weights_y = (kernel_weights(kernel, p - np.floor(p), stretch) for p in (x, y))
    n = weights_x.shape[1]
    rows, columns = (
        np.floor(p).astype(int)[:, None] + np.arange(1 - n // 2, n // 2 + 1) for p in (y, x)
    )
    windows = (rows[:, :, None], columns[:, None, :])
    weights = weights_y[:, :, None] * weights_x[:, None, :]
    value = area * np.sum(weights * ccd.image[windows].astype(float), axis=(1, 2))
    noise = area**2 * np.sum(weights**2 * ccd.variance[windows].astype(float), axis=(1, 2))
    assert len(u) > 5000
    assert np.abs(warp.image[v, u] - value).max() < 1e-5
    np.testing.assert_allclose(warp.variance[v, u], noise, rtol=1e-5)


def test_every_window_that_is_not_whole_is_known():
    """Against the largest state in each window, pixel by pixel."""
    rng = np.random.default_rng(2)
    ccd = make_ccd(np.ones((40, 60)))
    ccd.image[rng.random((40, 60)) < 0.01] = np.nan
    ccd.variance[rng.random((40, 60)) < 0.01] = np.inf
    ccd.mask[rng.random((40, 60)) < 0.02] = int(MaskPlane.DETECTED)
    ccd.mask[rng.random((40, 60)) < 0.01] = int(MaskPlane.NO_DATA)
    usable = np.isfinite(ccd.image) & np.isfinite(ccd.variance) & ~ccd.has_any(MaskPlane.NO_DATA)
    worst = np.pad(np.where(usable, ccd.mask != 0, 2), 3, constant_values=2)
    windows = np.lib.stride_tricks.sliding_window_view(worst, (6, 6))
    expected = windows.max(axis=(2, 3))
    found = resample_module.prepare_source(ccd, make_kernel("lanczos3")).state.reshape(41, 61)
    assert expected.shape == (41, 61)
    # in the last row vectors would reach beyond the last pixel
    np.testing.assert_array_equal(found[:-4], expected[:-4])
    assert np.all(found[-4:] >= expected[-4:])
