"""A known signal that went through a model of the detector comes back, with the right errors."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.calexp.ccd import detrend_ccd
from coaddflow.calib.frames import combine_bias, combine_dark
from coaddflow.calib.masters import detrend_frame
from coaddflow.errors import InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.instrument.camera import Detector
from coaddflow.instrument.raw import RawCcd
from coaddflow.isr.detrend import (
    CcdCalibs,
    _add_times,
    _divide,
    _flag_where,
    counts_above_overscan,
    fit_dark_scale,
    grow_bleeding,
    join_amplifiers,
)
from coaddflow.settings import Settings
from coaddflow.settings.calibs import CalibsSettings
from coaddflow.settings.detrend import DetrendSettings

NX, NY, EXPOSURE_TIME = 200, 150, 100.0
SATURATION = 50000.0
CROSSTALK = [[0.0, 2e-3], [3e-3, 0.0]]
LINEARITY = [4e-7, 1.5e-6]


def make_detector(**keys):
    amplifier = {
        "prescan": [0, 0, 4, NY],
        "data": [4, 0, 4 + NX // 2, NY],
        "overscan": [4 + NX // 2, 0, 4 + NX // 2 + 30, NY],
        "saturation": SATURATION,
    }
    return Detector.model_validate(
        {
            "id": 7,
            "name": "S7",
            "extension": "CCD7",
            "center": [0.0, 0.0],
            "size": [NX, NY],
            "crosstalk": CROSSTALK,
            "amplifiers": [
                {
                    **amplifier,
                    "name": "A",
                    "target": [0, 0, NX // 2, NY],
                    "gain": 1.5,
                    "read_noise": 5.0,
                    "linearity": [LINEARITY[0]],
                },
                {
                    **amplifier,
                    "name": "B",
                    "target": [NX // 2, 0, NX, NY],
                    "flip_x": True,
                    "flip_y": True,
                    "gain": 1.9,
                    "read_noise": 7.0,
                    "linearity": [LINEARITY[1]],
                },
            ],
            **keys,
        }
    )


def structures(rng):
    """Bias in counts, dark in electrons per second, and flat."""
    y, x = np.mgrid[:NY, :NX]
    bias = 3.0 * np.sin(x / 9.0) + rng.normal(0, 1.0, (NY, NX))
    dark = 0.02 + 0.01 * (y / NY)
    dark[rng.integers(0, NY, 150), rng.integers(0, NX, 150)] = 5.0
    flat = (1.05 - 0.2 * ((x - 90) ** 2 + (y - 70) ** 2) / 1e4) * rng.normal(1, 0.01, (NY, NX))
    return bias, dark, flat


def detrend(raw, calibs, exposure_time, settings):
    return detrend_ccd(raw, calibs, exposure_time, Settings(detrend=settings))


def frame(pixels, variance=0.0):
    return MaskedImage(pixels, np.full(pixels.shape, variance), np.zeros(pixels.shape))


def turned(amplifier, pixels):
    pixels = pixels[:, ::-1] if amplifier.flip_x else pixels
    return pixels[::-1] if amplifier.flip_y else pixels


def expose(detector, light, rng=None, bias=0.0, dark=0.0, flat=1.0, crosstalk=True):
    """Send electrons of light (ny, nx) through the detector; without rng free of noise."""
    charge = light * flat + dark * EXPOSURE_TIME
    if rng is not None:
        charge = rng.poisson(charge).astype(float)
    counts = []
    for amplifier in detector.amplifiers:
        x0, y0, x1, y1 = amplifier.target
        true = charge[y0:y1, x0:x1] / amplifier.gain
        c2 = amplifier.linearity[0] if amplifier.linearity else 0.0
        z = (np.sqrt(1 + 4 * c2 * true) - 1) / (2 * c2) if c2 else true  # inverts z + c2 z^2
        counts.append(turned(amplifier, z + np.broadcast_to(bias, (NY, NX))[y0:y1, x0:x1]))
    arrays = []
    for i, amplifier in enumerate(detector.amplifiers):
        level = 1000.0 + 20 * i + 8.0 * np.sin(np.arange(NY) / 40.0) + 0.05 * np.arange(NY)
        raw = np.zeros((NY, NX // 2 + 34)) + level[:, None]
        ghost = sum(CROSSTALK[i][j] * counts[j] for j in range(2)) if crosstalk else 0.0
        raw[:, 4 : 4 + NX // 2] += counts[i] + ghost
        if rng is not None:
            raw = np.round(raw + rng.normal(0, amplifier.read_noise / amplifier.gain, raw.shape))
        arrays.append(np.minimum(raw, SATURATION))
    return RawCcd(detector, tuple(arrays), fits.Header(), fits.Header(), Path("a.fits"))


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def test_a_known_signal_comes_back(rng):
    detector = make_detector()
    bias, dark, flat = structures(rng)
    light = rng.uniform(500, 40000, (NY, NX))
    raw = expose(detector, light, None, bias, dark, flat)
    calibs = CcdCalibs(frame(bias), frame(dark), frame(flat))
    result = detrend(raw, calibs, EXPOSURE_TIME, DetrendSettings(overscan_smoothing=1))
    error = result.masked_image.image / light - 1
    assert np.abs(error).max() < 1e-3
    assert abs(error.mean()) < 1e-5


@pytest.mark.parametrize("step", ["bias", "linearity", "crosstalk", "dark", "flat"])
def test_every_step_is_needed_and_can_be_switched_off(rng, step):
    detector = make_detector()
    bias, dark, flat = structures(rng)
    light = rng.uniform(500, 40000, (NY, NX))
    raw = expose(detector, light, None, bias, dark, flat)
    calibs = CcdCalibs(frame(bias), frame(dark), frame(flat))
    settings = DetrendSettings(overscan_smoothing=1, **{step: False})
    result = detrend(raw, calibs, EXPOSURE_TIME, settings)
    assert np.abs(result.masked_image.image / light - 1).max() > 2e-3
    done = {"linearity": "CFLINEAR", "crosstalk": "CFXTALK"}.get(step, f"CF{step.upper()}")
    assert done not in result.header
    assert "CFOVERSC" in result.header


@pytest.mark.parametrize("method", ["rows", "polynomial"])
def test_overscan_drift_is_followed_and_read_noise_measured(rng, method):
    detector = make_detector(crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 1000.0), rng, crosstalk=False)
    settings = DetrendSettings(overscan=method, overscan_order=6, linearity=False)
    result = detrend(raw, CcdCalibs(), EXPOSURE_TIME, settings)
    rows = result.masked_image.image[:, :100].mean(axis=1)
    # 1000 electrons in 100 columns: 3.2; the drift of 8 counts would show
    assert np.abs(rows - rows.mean()).max() < 4 * 3.3
    for number, amplifier in enumerate(detector.amplifiers, start=1):
        noise = result.header[f"CFOVN{number}"]
        assert noise == pytest.approx(amplifier.read_noise, rel=0.05)


def test_overscan_ignores_trailing_charge(rng):
    detector = make_detector(crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 1000.0), rng, crosstalk=False)
    clean = detrend(raw, CcdCalibs(), 0.0, DetrendSettings()).masked_image.image
    raw.arrays[0][:, 104:106] += 6.0  # less than outliers are clipped at
    spoilt = detrend(raw, CcdCalibs(), 0.0, DetrendSettings()).masked_image.image
    np.testing.assert_array_equal(spoilt, clean)


def test_overscan_ignores_rows_that_bleeding_reaches(rng):
    detector = make_detector(crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 1000.0), rng, crosstalk=False)
    clean = detrend(raw, CcdCalibs(), 0.0, DetrendSettings()).masked_image.image
    raw.arrays[0][70:73, 104:] += 3000.0
    spoilt = detrend(raw, CcdCalibs(), 0.0, DetrendSettings()).masked_image.image
    assert np.abs(spoilt - clean).max() < 3.0


def test_variance_plane_is_the_scatter_of_many_exposures(rng):
    detector = make_detector()
    bias, dark, flat = structures(rng)
    dark *= 10
    light = np.broadcast_to(np.linspace(20, 5000, NX), (NY, NX))
    calibs = CcdCalibs(frame(bias), frame(dark), frame(flat))
    results = [
        detrend(expose(detector, light, rng, bias, dark, flat), calibs, 100.0, DetrendSettings())
        for _ in range(30)
    ]
    scatter = np.var([r.masked_image.image for r in results], axis=0, ddof=1)
    variance = np.mean([r.masked_image.variance for r in results], axis=0)
    for columns in (np.s_[:50], np.s_[50:100], np.s_[100:150], np.s_[150:]):
        ratio = scatter[:, columns].mean() / variance[:, columns].mean()
        assert ratio == pytest.approx(1.0, abs=0.02)


def test_errors_of_the_calibration_frames_enter_the_variance(rng):
    detector = make_detector(crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 10000.0), rng, crosstalk=False)
    zero, one = np.zeros((NY, NX)), np.ones((NY, NX))
    ideal = CcdCalibs(frame(zero), frame(zero), frame(one))
    noisy = CcdCalibs(frame(zero, 4.0), frame(zero, 0.01), frame(one, 1e-6))
    a = detrend(raw, ideal, 100.0, DetrendSettings()).masked_image
    b = detrend(raw, noisy, 100.0, DetrendSettings()).masked_image
    gain = np.where(np.arange(NX) < NX // 2, 1.5, 1.9)
    expected = 4.0 * gain**2 + 0.01 * 100.0**2 + a.image**2 * 1e-6
    np.testing.assert_allclose(b.variance - a.variance, expected, rtol=1e-3)


def test_saturation_bleeding_and_suspect_pixels_are_masked(rng):
    detector = make_detector(crosstalk=None)
    light = np.full((NY, NX), 1000.0)
    light[60:90, 140] = 2e5
    light[20, 30] = 2e5
    light[120, 50] = 0.965 * SATURATION * 1.5
    raw = expose(detector, light, None, crosstalk=False)
    settings = DetrendSettings(saturation_growth=1, bleed_growth=4, linearity=False)
    image = detrend(raw, CcdCalibs(), 1.0, settings).masked_image
    saturated = np.zeros((NY, NX), bool)
    saturated[55:95, 139:142] = True
    saturated[19:22, 29:32] = True
    np.testing.assert_array_equal(image.has_any(MaskPlane.SAT), saturated)
    suspect = image.has_any(MaskPlane.SUSPECT) & ~saturated
    assert suspect[120, 50]
    assert suspect.sum() == 1


def test_bleeding_at_the_border_stays_inside():
    saturated = np.zeros((40, 10), bool)
    saturated[30:, 9] = True
    y, x = grow_bleeding(saturated, 4, 5)
    assert (y.min(), y.max(), set(x.tolist())) == (25, 39, {9})


def test_crosstalk_of_a_bright_star_leaves_no_ghost_in_the_other_amplifier(rng):
    detector = make_detector()
    light = np.full((NY, NX), 200.0)
    light[30:33, 20:23] = 60000.0
    raw = expose(detector, light, None)
    with_ghost = detrend(raw, CcdCalibs(), 1.0, DetrendSettings(crosstalk=False)).masked_image
    image = detrend(raw, CcdCalibs(), 1.0, DetrendSettings()).masked_image
    # read at the same moment: B runs from the right and from the top
    ghost = np.s_[NY - 33 : NY - 30, NX - 23 : NX - 20]
    assert (with_ghost.image[ghost] > 300).all()
    assert np.abs(image.image[ghost] - 200).max() < 1.0
    assert image.has_any(MaskPlane.CROSSTALK)[ghost].all()
    assert image.has_any(MaskPlane.CROSSTALK).sum() == 9


def test_crosstalk_follows_the_corner_that_is_read_first(rng):
    # the same detector, but B stands in the file in the order of the CCD
    detector = make_detector()
    light = np.full((NY, NX), 200.0)
    light[30:33, 20:23] = 60000.0
    raw = expose(detector, light, None)
    second = detector.amplifiers[1].model_copy(
        update={"flip_x": False, "flip_y": False, "read_from": "ur"}
    )
    array = raw.arrays[1].copy()
    array[:, 4:104] = array[::-1, 4:104][:, ::-1]
    array[:, 104:] = array[::-1, 104:]
    other = RawCcd(
        detector.model_copy(update={"amplifiers": (detector.amplifiers[0], second)}),
        (raw.arrays[0], array),
        raw.header,
        raw.exposure_header,
        raw.path,
    )
    settings = DetrendSettings(overscan_smoothing=1)
    np.testing.assert_allclose(
        detrend(raw, CcdCalibs(), 1.0, settings).masked_image.image,
        detrend(other, CcdCalibs(), 1.0, settings).masked_image.image,
        rtol=1e-6,
    )


def test_unusable_pixels_are_masked(rng):
    detector = make_detector(defects=[[10, 20, 12, 60]], crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 1000.0), rng, crosstalk=False)
    raw.arrays[0][5, 4 + 50] = np.nan
    flat, defects = frame(np.ones((NY, NX))), frame(np.zeros((NY, NX)))
    flat.image[100, 100], flat.image[101, 100], flat.image[102, 100] = 0.05, np.nan, 0.5
    defects.mask[7, 9] = MaskPlane.BAD
    calibs = CcdCalibs(flat=flat, defects=defects)
    image = detrend(raw, calibs, 1.0, DetrendSettings(edge=3)).masked_image
    bad = np.zeros((NY, NX), bool)
    bad[20:60, 10:12] = True
    bad[[100, 101, 7], [100, 100, 9]] = True
    np.testing.assert_array_equal(image.has_any(MaskPlane.BAD), bad)
    no_data = image.has_any(MaskPlane.NO_DATA)
    assert no_data[5, 50]
    assert no_data.sum() == 1
    assert np.isnan(image.image[5, 50])
    assert np.isinf(image.variance[5, 50])
    np.testing.assert_array_equal(np.isfinite(image.image), ~no_data)
    inner = np.zeros((NY, NX), bool)
    inner[3:-3, 3:-3] = True
    np.testing.assert_array_equal(image.has_any(MaskPlane.EDGE), ~inner)


def test_pixels_that_no_amplifier_reads_are_no_data(rng):
    detector = make_detector(crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 1000.0), rng, crosstalk=False)
    one = detector.model_copy(update={"amplifiers": detector.amplifiers[:1]})
    raw = RawCcd(one, raw.arrays[:1], raw.header, raw.exposure_header, raw.path)
    image = detrend(raw, CcdCalibs(), 1.0, DetrendSettings()).masked_image
    assert image.has_any(MaskPlane.NO_DATA)[:, NX // 2 :].all()
    assert not image.has_any(MaskPlane.NO_DATA)[:, : NX // 2].any()


def test_the_dark_of_a_warmer_detector_is_scaled_by_its_hot_pixels(rng):
    _, dark, _ = structures(rng)
    electrons = (dark * 100.0).astype(np.float32)
    image = rng.poisson(1000 + 1.17 * electrons).astype(np.float32)
    mask = np.zeros((NY, NX), np.int32)
    assert fit_dark_scale(image, electrons, mask) == pytest.approx(1.17, abs=0.02)
    no_hot_pixels = np.full_like(electrons, 3.0)
    assert fit_dark_scale(image, no_hot_pixels, mask) == 1.0


def test_steps_can_end_early_and_are_named_in_the_header(rng):
    detector = make_detector()
    raw = expose(detector, np.full((NY, NX), 1000.0), None)
    counts = counts_above_overscan(raw, DetrendSettings())
    join_amplifiers(counts)
    assert counts.masked_image.image[75, 50] == pytest.approx(1000 / 1.5, rel=1e-3)
    assert "CFGAIN" not in counts.header
    full = detrend(raw, CcdCalibs(), 1.0, DetrendSettings())
    assert full.header["CFGAIN"] == "electrons"
    assert (full.header["CFAMP2"], full.header["CFGAIN2"], full.header["CFRDN2"]) == ("B", 1.9, 7.0)


def test_unfitting_frames_and_overscans_are_input_errors(rng):
    detector = make_detector()
    raw = expose(detector, np.full((NY, NX), 1000.0), None)
    with pytest.raises(InputError, match="bias of CCD 7 has shape"):
        detrend(raw, CcdCalibs(bias=frame(np.zeros((5, 5)))), 1.0, DetrendSettings())
    amplifier = detector.amplifiers[0].model_copy(update={"overscan": (4, 0, 104, 20)})
    short = detector.model_copy(update={"amplifiers": (amplifier, detector.amplifiers[1])})
    raw = RawCcd(short, raw.arrays, raw.header, raw.exposure_header, raw.path)
    with pytest.raises(InputError, match="does not cover all rows"):
        detrend(raw, CcdCalibs(), 1.0, DetrendSettings())


def test_a_camera_without_overscan_has_a_pedestal():
    detector = make_detector(crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 1500.0), None, crosstalk=False)
    bare = tuple(a.model_copy(update={"overscan": None}) for a in detector.amplifiers)
    raw = RawCcd(
        detector.model_copy(update={"amplifiers": bare}),
        raw.arrays,
        raw.header,
        raw.exposure_header,
        raw.path,
    )
    settings = DetrendSettings(pedestal=1000.0, linearity=False)
    image = detrend(raw, CcdCalibs(), 1.0, settings).masked_image.image
    assert image[0, 0] == pytest.approx(1500.0, abs=1.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_stay_where_they_are(rng, value):
    detector = make_detector(crosstalk=None)
    raw = expose(detector, np.full((NY, NX), 3000.0), rng, crosstalk=False)
    clean = detrend(raw, CcdCalibs(), 1.0, DetrendSettings()).masked_image
    raw.arrays[0][60:70, 20:30] = value
    raw.arrays[1][90, 110:] = value  # in the overscan
    spoilt = detrend(raw, CcdCalibs(), 1.0, DetrendSettings()).masked_image
    lost = np.zeros((NY, NX), bool)
    lost[60:70, 16:26] = True
    np.testing.assert_array_equal(spoilt.has_any(MaskPlane.NO_DATA), lost)
    assert np.isnan(spoilt.image[lost]).all()
    assert np.abs(spoilt.image - clean.image)[~lost].max() < 1.0


def test_masters_of_five_frames_and_the_overscan_add_almost_no_noise(rng):
    """Frames as they come: five biases, five darks, overscan; a sky of 300 electrons."""
    detector = make_detector(crosstalk=None)
    settings = DetrendSettings(linearity=False)
    y, x = np.mgrid[:NY, :NX]
    bias = 3.0 * np.sin(x / 9.0) + 0.02 * y
    dark = np.full((NY, NX), 0.02)

    def frames(light, dark):
        for _ in range(5):
            yield expose(detector, np.full((NY, NX), light), rng, bias, dark, crosstalk=False)

    def calib(kind, light, dark, calibs=CcdCalibs()):  # noqa: B008 - it is never changed
        return [
            detrend_frame(raw, calibs, EXPOSURE_TIME, settings, kind) for raw in frames(light, dark)
        ]

    options = CalibsSettings()
    master_bias = combine_bias(iter(calib("bias", 0.0, 0.0)), 5, options)
    darks = calib("dark", 0.0, dark, CcdCalibs(bias=master_bias))
    master_dark = combine_dark(iter(darks), [EXPOSURE_TIME] * 5, options)
    ideal = CcdCalibs(frame(bias), frame(dark))
    made = CcdCalibs(master_bias, master_dark)
    added, noise, stated = [], [], []
    for raw in frames(300.0, dark):
        with_made = detrend(raw, made, EXPOSURE_TIME, settings).masked_image
        with_ideal = detrend(raw, ideal, EXPOSURE_TIME, settings).masked_image
        added.append(with_made.image - with_ideal.image)
        noise.append(with_ideal.image - 300.0)
        stated.append(with_made.variance - with_ideal.variance)
    # unsmoothed masters added 2 / 5 of the read noise: 3 % here
    assert np.var(added) < 0.005 * np.var(noise)
    assert np.mean(stated) < 0.01 * np.var(noise)
    rows = np.mean(noise, axis=2)
    assert np.var(rows) < 1.15 * np.var(noise) / NX


def test_frames_are_applied_as_the_plain_formulas_say(rng):
    """Also where they are not finite, which counts as nothing known."""
    shape = (60, 70)

    def plane(mean, scatter):
        pixels = rng.normal(mean, scatter, shape).astype(np.float32)
        pixels[rng.random(shape) < 0.02] = np.nan
        pixels[rng.random(shape) < 0.02] = np.inf
        return pixels

    def or_zero(pixels):
        return np.where(np.isfinite(pixels), pixels, np.float32(0))

    image, variance, flat, error = plane(100, 30), plane(60, 5), plane(1, 0.4), plane(0.01, 1e-3)
    mask = rng.integers(0, 8, shape).astype(np.int32)
    added, expected = image.copy(), image + np.float32(0.3) * or_zero(flat)
    _add_times(added, flat, np.float32(0.3))
    np.testing.assert_array_equal(added, expected)

    usable = (flat > 0.5) & (flat < 1.5)
    response = np.where(usable, flat, np.float32(1))
    divided = image / response
    relative = np.where(usable, or_zero(error), np.float32(0)) / response**2
    expected_variance = variance / response**2 + or_zero(divided) ** 2 * relative
    expected_mask = np.where(usable, mask, mask | MaskPlane.BAD)
    _divide(image, variance, mask, flat, error, (np.float32(0.5), np.float32(1.5)))
    np.testing.assert_array_equal(image, divided)
    np.testing.assert_array_equal(variance, expected_variance)
    np.testing.assert_array_equal(mask, expected_mask)

    other = rng.integers(0, 64, shape).astype(np.int32)
    expected_mask = np.where(other & 33, mask | 1, mask)
    _flag_where(mask, other, np.int32(33), np.int32(1))
    np.testing.assert_array_equal(mask, expected_mask)
