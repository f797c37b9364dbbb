"""Calibration frames hold the detector's truth, with honest errors, and nothing of the sky."""

import tempfile

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.calib.combine import _typical_scatter, clipped_mean, median, stacked
from coaddflow.calib.frames import (
    combine_bias,
    combine_dark,
    combine_flat,
    defects_frame,
    find_defects,
    read_calibs,
    read_master,
    write_failed_master,
    write_master,
)
from coaddflow.calib.night_sky import hot_pixel_map, night_sky_dark, night_sky_flat
from coaddflow.errors import CcdFailure, InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.settings.calibs import CalibsSettings, DefectsSettings

SHAPE = (160, 180)
SETTINGS = CalibsSettings()


@pytest.fixture
def rng():
    return np.random.default_rng(21)


def frame(pixels, mask=0):
    return MaskedImage(pixels, np.ones(SHAPE), np.full(SHAPE, mask))


def y_x():
    return np.mgrid[: SHAPE[0], : SHAPE[1]].astype(float)


# --- combination ------------------------------------------------------------------------------


def test_variance_of_the_master_is_scatter_over_n_without_the_outlier_frame(rng):
    stack = rng.normal(100, 6, (12, *SHAPE)).astype(np.float32)
    stack[7] += 60
    mean, variance, number = clipped_mean(stack, None, 4.0, 3)
    assert (number == 11).mean() > 0.99
    assert mean.mean() == pytest.approx(100, abs=0.05)
    assert mean.var() == pytest.approx(36 / 11, rel=0.03)
    assert variance.mean() == pytest.approx(36 / 11, rel=0.02)


def test_cosmic_rays_on_single_frames_leave_no_trace(rng):
    stack = rng.normal(10, 3, (9, *SHAPE)).astype(np.float32)
    hit = rng.random(stack.shape) < 0.01
    stack[hit] += rng.uniform(50, 5000, hit.sum())
    mean, _, number = clipped_mean(stack, None, 4.0, 3)
    assert np.abs(mean - 10).max() < 6
    assert mean.mean() == pytest.approx(10, abs=0.05)
    np.testing.assert_allclose(number.sum(), (~hit).sum(), rtol=2e-3)


def test_weights_make_the_mean_of_least_variance(rng):
    sigma = np.array([1, 1, 2, 2, 4, 4, 8, 8.0])
    stack = (rng.normal(0, 1, (8, *SHAPE)) * sigma[:, None, None]).astype(np.float32)
    mean, variance, _ = clipped_mean(stack, sigma**-2, 5.0, 3)
    best = 1 / (sigma**-2).sum()
    assert mean.var() == pytest.approx(best, rel=0.03)
    assert variance.mean() == pytest.approx(best, rel=0.03)


def test_missing_values_are_left_out(rng):
    stack = rng.normal(5, 1, (4, *SHAPE)).astype(np.float32)
    stack[:, 3, 4] = np.nan
    stack[1:, 5, 6] = np.nan
    mean, variance, number = clipped_mean(stack, None, 4.0, 3)
    assert np.isnan(mean[3, 4]) and np.isinf(variance[3, 4]) and number[3, 4] == 0
    assert mean[5, 6] == stack[0, 5, 6] and np.isinf(variance[5, 6])
    assert np.isfinite(np.delete(mean.ravel(), 3 * SHAPE[1] + 4)).all()


def plain_clipped_mean(values, weights, limit, clip_sigma, iterations):
    """Of one pixel: what `clipped_mean` says, word by word."""
    kept = np.isfinite(values)
    values, weights = values[kept].astype(float), weights[kept]
    if len(values) == 0:
        return np.nan, np.inf, 0
    center, root = np.median(values), np.sqrt(weights)
    deviation = np.abs(values - center) * root
    kept = np.ones(len(values), bool)
    if len(values) > 2 and deviation.max() > limit:
        limit = max(limit, clip_sigma * 1.4826 * np.median(deviation))
        for _ in range(iterations):
            keep = np.abs(values - center) * root <= limit
            if not keep.any():
                break
            kept = keep
            center = sum((values * weights)[kept]) / sum(weights[kept])
    values, weights = values[kept], weights[kept]
    mean = sum(values * weights) / sum(weights)
    squares = sum(weights * ((values - mean) * (values - mean)))
    if len(values) == 1:
        return mean, np.inf, 1
    return mean, squares / (len(values) - 1) / sum(weights), len(values)


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 13])
def test_the_clipped_mean_is_that_of_each_pixel_by_itself(rng, n, weighted, iterations):
    stack = rng.normal(100, 6, (n, 40, 50)).astype(np.float32)
    hit = rng.random(stack.shape) < 0.03
    stack[hit] += rng.uniform(-200, 300, hit.sum())
    stack[rng.random(stack.shape) < 0.01] = np.nan
    stack[rng.random(stack.shape) < 0.003] = np.inf
    stack[:, 3, 4:7], stack[:, 5] = np.nan, np.round(stack[:, 5], -1)
    weights = rng.uniform(0.2, 3, n) if weighted else np.ones(n)
    found = clipped_mean(stack, weights if weighted else None, 3.0, iterations)
    weights = weights / np.mean(weights)
    limit = 3.0 * _typical_scatter(stack, weights)
    plain = [
        plain_clipped_mean(values, weights, limit, 3.0, iterations)
        for values in stack.reshape(n, -1).T
    ]
    for plane, expected in zip(found, zip(*plain, strict=True), strict=True):
        np.testing.assert_array_equal(plane.ravel(), np.array(expected, plane.dtype))


def test_a_stack_on_disk_gives_the_same_bits(rng, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    frames = rng.normal(5, 1, (6, *SHAPE)).astype(np.float32)
    results = []
    for memory in (1.0, 1e-6):
        with stacked(iter(frames), 6, memory) as stack:
            assert isinstance(stack, np.memmap) == (memory < 1)
            results.append((*clipped_mean(stack, None, 4.0, 3), median(stack)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not list(tmp_path.iterdir())


# --- bias, dark, flat -------------------------------------------------------------------------


def test_bias_structure_is_found(rng):
    truth = 4 * np.sin(y_x()[1] / 11) + rng.normal(0, 1, SHAPE)
    frames = [frame(rng.normal(truth, 3.0)) for _ in range(16)]
    bias = combine_bias(iter(frames), 16, SETTINGS)
    error = (bias.image - truth) / np.sqrt(bias.variance)
    # pixels of scatter 1, measured with an error of 3/4: the best estimate has an error of 3/5
    assert (bias.image - truth).std() == pytest.approx(3 / 5, rel=0.03)
    assert np.median(np.abs(error)) == pytest.approx(0.69, abs=0.04)
    plain = SETTINGS.model_copy(update={"shrink_noise": False})
    mean = combine_bias(iter(frames), 16, plain)
    assert (mean.image - truth).std() == pytest.approx(3 / 4, rel=0.03)


def test_dark_current_of_different_exposure_times(rng):
    rate = np.full(SHAPE, 0.05)
    rate[10, 20], rate[50, 60:62] = 30.0, 5.0
    times = [60.0, 300.0, 300.0, 600.0, 600.0]
    frames = [frame(rng.poisson(rate * t) + rng.normal(0, 5, SHAPE)) for t in times]
    dark = combine_dark(frames, times, SETTINGS)
    assert dark.image[rate < 1].mean() == pytest.approx(0.05, abs=1e-3)
    np.testing.assert_allclose(dark.image[rate > 1], rate[rate > 1], rtol=0.05)
    best = 1 / sum(t**2 / (0.05 * t + 25) for t in times)
    assert dark.image[rate < 1].var() < 0.15 * best
    assert dark.variance[rate > 1].mean() > best
    bad = find_defects(dark, [], DefectsSettings())
    np.testing.assert_array_equal(bad, rate > 1)


def test_flat_of_frames_of_different_levels(rng):
    y, x = y_x()
    truth = (1 - 0.1 * ((x - 80) ** 2 + (y - 90) ** 2) / 1e4) * rng.normal(1, 0.01, SHAPE)
    truth[30, 40], truth[100:102, 100] = 0.4, 0.0
    truth /= np.median(truth)
    levels = [5000.0, 20000.0, 40000.0, 40000.0]
    frames = [frame(rng.poisson(truth * level)) for level in levels]
    frames[1].mask[60, 60] |= MaskPlane.SAT
    frames[1].image[60, 60] = 1e9
    flat = combine_flat(frames, len(frames), SETTINGS)
    assert np.median(flat.image) == pytest.approx(1, abs=1e-6)
    good = truth > 0.5
    assert (flat.image[good] / truth[good]).std() == pytest.approx(
        1 / np.sqrt(sum(levels)), rel=0.05
    )
    assert flat.variance[good].mean() == pytest.approx(1 / sum(levels), rel=0.1)
    bad = find_defects(None, [flat], DefectsSettings())
    np.testing.assert_array_equal(bad, ~good)


def test_a_flat_without_a_part_counts_for_the_rest_as_its_light_does():
    """Three flats of the same light, one without the fainter part, which is most of the CCD."""
    truth = np.full(SHAPE, 0.6)
    truth[:, 100:] = 1.2
    frames = [frame(1000 * truth) for _ in range(3)]
    frames[0].mask[:, :100] = MaskPlane.BAD
    # where that one has 3 % more light the mean has a third of it more
    frames[0].image[50:60, 150:160] *= 1.03
    flat = combine_flat(frames, 3, CalibsSettings(clip_iterations=0, shrink_noise=False))
    assert flat.image[10, 150] / flat.image[10, 50] == pytest.approx(2.0)
    assert flat.image[55, 155] / flat.image[10, 150] == pytest.approx(1.01)


def test_a_flat_that_has_only_what_the_others_lack_spoils_none(rng):
    frames = [frame(rng.poisson(np.full(SHAPE, 1000.0))) for _ in range(4)]
    for number, one in enumerate(frames):
        part = np.s_[:, :100] if number else np.s_[:, 100:]
        lost = np.ones(SHAPE, bool)
        lost[part] = False
        one.mask[lost] = MaskPlane.BAD
    flat = combine_flat(frames, 4, SETTINGS)
    np.testing.assert_allclose(flat.image[:, :100], 1.0, atol=0.1)
    assert flat.has_any(MaskPlane.NO_DATA)[:, 100:].all()


def test_hot_columns_are_defects_and_faint_structure_is_not(rng):
    dark = frame(rng.normal(0.02, 0.005, SHAPE))
    dark.image += 0.01 * np.sin(y_x()[0] / 20).astype(np.float32)
    dark.image[64:, 90] += 0.02
    bad = find_defects(dark, [], DefectsSettings())
    assert bad[64:, 90].all()
    assert bad.sum() < 1.1 * bad[64:, 90].sum()


def test_too_few_or_dark_frames_are_refused(rng):
    frames = [frame(rng.normal(5, 1, SHAPE)) for _ in range(2)]
    with pytest.raises(InputError, match="a master bias needs at least 3 exposures, there are 2"):
        combine_bias(frames, 2, SETTINGS)
    with pytest.raises(InputError, match="exposure time of 0 s"):
        combine_dark(frames * 2, [10, 0, 10, 10], SETTINGS)
    with pytest.raises(CcdFailure, match="dark_flat"):
        combine_flat([frame(rng.normal(-1, 1, SHAPE))] * 3, 3, SETTINGS)
    with pytest.raises(InputError, match="without a dark or a flat"):
        find_defects(None, [], DefectsSettings())


# --- from the night sky -----------------------------------------------------------------------

SKY, TIME, N_FRAMES = 900.0, 60.0, 10


class Detector:
    """A detector without calibration frames, and the sky that drifts over it."""

    def __init__(self, rng, drift=13.0, fwhm=2.2):
        y, x = y_x()
        self.rng, self.drift, self.sigma = rng, drift, fwhm / 2.3548
        self.warm = np.zeros(SHAPE)
        where = rng.integers(3, 150, (2, 200))
        self.warm[tuple(where)] = rng.uniform(150, 3000, 200)
        self.ramp = -40 * np.exp(-y / 6) + 6 * np.sin(x / 30)
        self.flat = (1 - 0.08 * ((x - 80) ** 2 + (y - 90) ** 2) / 1e4) * rng.normal(1, 0.01, SHAPE)
        self.flat /= np.median(self.flat)
        self.stars = rng.uniform(-150, 330, (900, 2)), 10 ** rng.uniform(1.5, 5, 900)

    def light(self, i):
        image = np.zeros(SHAPE)
        y, x = np.mgrid[-7:8, -7:8]
        positions = self.stars[0] + i * self.drift * np.array([1, 0.4])
        for (x0, y0), flux in zip(positions, self.stars[1], strict=True):
            ix, iy = round(x0), round(y0)
            if 8 <= ix < SHAPE[1] - 8 and 8 <= iy < SHAPE[0] - 8:
                r2 = (x + ix - x0) ** 2 + (y + iy - y0) ** 2
                profile = np.exp(-r2 / 2 / self.sigma**2) / (2 * np.pi * self.sigma**2)
                image[iy - 7 : iy + 8, ix - 7 : ix + 8] += flux * profile
        return image

    def frames(self, additive=True, multiplicative=False):
        for i in range(N_FRAMES):
            image = self.light(i) + SKY * (1 + 0.05 * np.cos(i))
            image = image * self.flat if multiplicative else image
            image = self.rng.poisson(image + (self.warm if additive else 0))
            image = image + self.rng.normal(0, 8, SHAPE) + (self.ramp if additive else 0)
            yield frame(image)


def test_the_drift_of_the_sky_distinguishes_hot_pixels_from_stars(rng):
    detector = Detector(rng)
    pattern = night_sky_dark(detector.frames(), [TIME] * N_FRAMES, SETTINGS)
    found = hot_pixel_map(pattern, SETTINGS.defects)
    hot = detector.warm > 0
    strong = detector.warm > 300
    assert found[strong].mean() > 0.97
    assert found[~hot].mean() < 2e-4


def test_the_additive_pattern_is_the_detector_without_stars(rng):
    detector = Detector(rng)
    pattern = night_sky_dark(detector.frames(), [TIME] * N_FRAMES, SETTINGS)
    truth = detector.warm + detector.ramp
    truth -= np.median(truth)
    error = pattern.image * TIME - truth
    error -= np.median(error)
    noise = np.sqrt(SKY + 64)
    assert 1.4826 * np.median(np.abs(error)) < 1.25 * noise / np.sqrt(N_FRAMES)
    # what is left of stars is below the noise of one exposure
    assert np.percentile(np.abs(error[detector.warm == 0]), 99.9) < 1.4 * noise
    # subtracting it does not hurt: its errors drift with the stars and average out
    assert np.median(pattern.variance) ** 0.5 * TIME < 0.5 * noise


def test_flat_from_the_sky(rng):
    detector = Detector(rng)
    flat = night_sky_flat(detector.frames(False, True), N_FRAMES, SETTINGS)
    error = flat.image / detector.flat - 1
    assert np.median(flat.image) == pytest.approx(1, abs=1e-6)
    expected = np.sqrt(SKY + 64) / SKY / np.sqrt(N_FRAMES)
    assert 1.4826 * np.median(np.abs(error - np.median(error))) < 1.3 * expected
    blocks = error.reshape(10, 16, 10, 18).mean(axis=(1, 3))
    assert blocks.std() < 0.003


@pytest.mark.parametrize("scales", ["large", "small"])
def test_scales_of_the_flat_are_split(rng, scales):
    detector = Detector(rng)
    settings = SETTINGS.model_copy(
        update={"flat": SETTINGS.flat.model_copy(update={"scales": scales, "smoothing": 20})}
    )
    flat = night_sky_flat(detector.frames(False, True), N_FRAMES, settings).image
    smooth = flat.reshape(10, 16, 10, 18).mean(axis=(1, 3))
    truth = detector.flat.reshape(10, 16, 10, 18).mean(axis=(1, 3))
    if scales == "large":
        assert np.corrcoef(smooth.ravel(), truth.ravel())[0, 1] > 0.95
        assert np.abs(np.diff(flat, axis=1)).max() < 0.01
    else:
        assert smooth.std() < 0.2 * truth.std()
        assert np.diff(flat, axis=1).std() > 0.014


def test_exposures_that_do_not_move_are_refused(rng):
    detector = Detector(rng, drift=0.0)
    with pytest.raises(InputError, match="not dithered enough"):
        night_sky_dark(detector.frames(), [TIME] * N_FRAMES, SETTINGS)
    with pytest.raises(InputError, match="not dithered enough"):
        night_sky_flat(Detector(rng, drift=0.15).frames(False, True), N_FRAMES, SETTINGS)


def test_too_few_exposures_and_a_sky_below_zero_are_refused(rng):
    detector = Detector(rng)
    with pytest.raises(InputError, match="at least 5 exposures, there are 4"):
        night_sky_dark(detector.frames(), [TIME] * 4, SETTINGS)
    below = (frame(f.image - 2 * SKY) for f in detector.frames())
    with pytest.raises(CcdFailure, match="no_sky"):
        night_sky_flat(below, N_FRAMES, SETTINGS)


# --- files ------------------------------------------------------------------------------------


def test_masters_come_back_from_their_files(rng, tmp_path):
    bias = MaskedImage(rng.normal(0, 1, SHAPE), np.full(SHAPE, 0.1), np.zeros(SHAPE))
    bad = rng.random(SHAPE) < 0.01
    write_master(tmp_path / "bias.fits", bias, "bias", 12, compression="quantized")
    write_master(tmp_path / "defects.fits", defects_frame(bad), "defects", 12)
    calibs = read_calibs({"bias": tmp_path / "bias.fits", "defects": tmp_path / "defects.fits"})
    np.testing.assert_array_equal(calibs.bias.image, bias.image)
    np.testing.assert_array_equal(calibs.bias.variance, bias.variance)
    np.testing.assert_array_equal(calibs.defects.has_any(MaskPlane.BAD), bad)
    assert calibs.dark is None and calibs.flat is None
    header = fits.getheader(tmp_path / "bias.fits")
    assert (header["CFKIND"], header["CFNFRAME"]) == ("bias", 12)
    assert fits.getheader(tmp_path / "bias.fits", "IMAGE")["BUNIT"] == "adu"
    write_master(tmp_path / "dark.fits", bias, "dark", 3)
    assert fits.getheader(tmp_path / "dark.fits", "IMAGE")["BUNIT"] == "electron/s"


def test_a_plain_image_serves_as_a_given_frame(rng, tmp_path):
    flat = rng.normal(1, 0.01, SHAPE)
    flat[3, 4] = np.nan
    fits.PrimaryHDU(flat).writeto(tmp_path / "flat.fits")
    given = read_master(tmp_path / "flat.fits", "flat")
    np.testing.assert_array_equal(given.image, flat.astype(np.float32))
    assert given.mask[3, 4] == MaskPlane.BAD and np.count_nonzero(given.mask) == 1
    bad = rng.random(SHAPE) < 0.01
    fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(bad.astype(np.uint8))]).writeto(
        tmp_path / "bad.fits"
    )
    np.testing.assert_array_equal(read_master(tmp_path / "bad.fits", "defects").mask > 0, bad)


def test_a_master_that_could_not_be_made_fails_its_ccd_only(tmp_path):
    words = "too early, and a remedy that says in many words what to do about it, and"
    path = "/a/path/" + 12 * "of/many/folders/" + "raw.fits"
    why = CcdFailure("truncated_file", f"{words} {path} {words}")
    write_failed_master(tmp_path / "a.fits", "bias", why)
    with pytest.raises(CcdFailure) as failure:
        read_calibs({"bias": tmp_path / "a.fits"})
    assert f"{words} {path} {words}" in str(failure.value), "no word is broken"
    write_failed_master(tmp_path / "a.fits", "bias", CcdFailure("truncated_file", "b.fits ends °"))
    with pytest.raises(CcdFailure, match=r"no_calibration.*truncated_file: b.fits ends"):
        read_calibs({"bias": tmp_path / "a.fits"})


def test_files_that_are_no_calibration_frames(tmp_path):
    with pytest.raises(InputError, match="not a readable calibration frame"):
        read_master(tmp_path / "missing.fits", "flat")
    (tmp_path / "text.fits").write_text("no FITS")
    with pytest.raises(InputError, match="not a readable calibration frame"):
        read_master(tmp_path / "text.fits", "flat")
    fits.PrimaryHDU().writeto(tmp_path / "empty.fits")
    with pytest.raises(InputError, match="it has no image"):
        read_master(tmp_path / "empty.fits", "flat")


def test_a_path_belongs_to_given_frames():
    with pytest.raises(ValueError, match="path belongs to source"):
        CalibsSettings(bias={"source": "given"})
    with pytest.raises(ValueError, match="path belongs to source"):
        CalibsSettings(flat={"path": "flats/{band}/{ccd}.fits"})
    assert CalibsSettings(bias={"source": "given", "path": "b/{ccd}.fits"}).bias.path
