"""The bias level follows what the overscan shows: drifts, jumps, noisy rows; and nothing else."""

import numpy as np
import pytest

from coaddflow.instrument.camera import load_camera
from coaddflow.isr.overscan import overscan_level
from coaddflow.settings.detrend import DetrendSettings

AMPLIFIER = load_camera("mini").detectors[0].amplifiers[0]
NOISE = 3.0
SETTINGS = DetrendSettings()


def amplifier(columns, rows):
    """Return an amplifier with so many columns of overscan behind 160 of data."""
    sections = {"data": (4, 0, 164, rows), "overscan": (164, 0, 164 + columns, rows)}
    return AMPLIFIER.model_copy(update=sections)


def frame(level, columns=20, shared=None, seed=1):
    """Return a raw array with this level in each row; that of the data may differ."""
    rng = np.random.default_rng(seed)
    raw = 1000.0 + rng.normal(0.0, NOISE, (len(level), 164 + columns))
    raw[:, :164] += (level if shared is None else shared)[:, None] + 500.0
    raw[:, 164:] += level[:, None]
    return np.round(raw)


def measured(level, columns=20, shared=None, seed=1, **settings):
    raw = frame(level, columns, shared, seed)
    return overscan_level(raw, amplifier(columns, len(level)), DetrendSettings(**settings))


def errors(level, **keys):
    return measured(level, **keys).level - 1000.0 - level


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 6, 20])
def test_a_narrow_overscan_has_a_level_in_each_row(columns):
    for seed in range(20):
        found = measured(np.zeros(1000), columns, seed=seed)
        assert found.known.all()
        assert np.abs(found.level - 1000.0).max() < 1.5
        assert found.noise == pytest.approx(NOISE, rel=0.12)
        assert found.remark == ""


def test_a_constant_level_adds_no_noise_to_speak_of():
    """Nine rows of an overscan of 18 columns would leave 0.24 counts in whole rows."""
    error = np.concatenate([errors(np.zeros(2000), seed=seed) for seed in range(10)])
    assert np.std(error) < 0.06
    stated = measured(np.zeros(2000)).error
    assert stated == pytest.approx(np.std(error), rel=1.0)


@pytest.mark.parametrize("period", [60.0, 300.0, 2000.0])
def test_a_drift_is_followed(period):
    level = 8.0 * np.sin(2 * np.pi * np.arange(2000) / period) + 0.01 * np.arange(2000)
    error = errors(level)
    assert np.abs(error).max() < 1.0
    assert np.std(error) < 0.3


@pytest.mark.parametrize("step", [25.0, -25.0, 6.0])
@pytest.mark.parametrize("row", [20, 700, 985])
def test_a_jump_leaves_no_rows_behind(step, row):
    level = np.where(np.arange(1000) < row, 0.0, step)
    error = errors(level)
    assert np.abs(error).max() < 1.0
    assert "1 jumps" in measured(level).remark


def test_a_cosmic_ray_in_the_overscan_changes_nothing():
    for columns in (4, 20):
        raw = frame(np.zeros(320), columns)
        before = overscan_level(raw, amplifier(columns, 320), SETTINGS).level
        raw[100, -1] += 80.0
        after = overscan_level(raw, amplifier(columns, 320), SETTINGS)
        assert after.known.all()
        assert np.abs(after.level - before).max() < 0.5


def test_noise_of_rows_that_the_data_share_is_subtracted():
    level = np.random.default_rng(2).normal(0.0, 3.0, 2000)
    found = measured(level, columns=34)
    error = found.level - 1000.0 - level
    assert np.std(error) < 0.2 * np.std(level)
    assert found.error == pytest.approx(np.std(error), rel=0.2)
    assert found.is_followed
    assert "rows scatter by 3." in found.remark


def test_noise_of_rows_that_the_data_do_not_share_is_not_added_to_them():
    rng = np.random.default_rng(2)
    found = measured(rng.normal(0.0, 3.0, 2000), columns=34, shared=np.zeros(2000))
    assert np.std(found.level) < 0.5
    assert not found.is_followed


@pytest.mark.parametrize(("method", "order"), [("constant", 0), ("polynomial", 3)])
def test_a_method_that_does_not_follow_the_overscan_says_so(method, order):
    row = np.arange(1000)
    settings = {"overscan": method, "overscan_order": order}
    good = measured(0.0 * row, **settings)
    assert good.is_followed
    assert np.abs(good.level - 1000.0).max() < 0.3
    jumps = measured(np.where(row < 500, 0.0, 25.0), **settings)
    assert not jumps.is_followed
    assert "rows differ" in jumps.remark


def test_rows_without_an_overscan_are_interpolated_near_others_and_unknown_farther_away():
    level = 0.01 * np.arange(1000)
    raw = frame(level)
    raw[300:306, 164:] = np.nan
    raw[800:, 164:] = np.nan
    found = overscan_level(raw, amplifier(20, 1000), SETTINGS)
    assert np.isfinite(found.level).all()
    assert found.known[:800].all()
    assert not found.known[815:].any()
    assert np.abs(found.level - 1000.0 - level)[:800].max() < 0.5
    for method in ("polynomial", "constant"):
        found = overscan_level(raw, amplifier(20, 1000), DetrendSettings(overscan=method))
        assert np.isfinite(found.level).all()


@pytest.mark.parametrize("value", [0.0, 65535.0, np.nan])
@pytest.mark.parametrize("method", ["rows", "polynomial", "constant"])
def test_an_overscan_that_was_not_read_tells_nothing(value, method):
    raw = frame(np.zeros(400))
    raw[:, 164:] = value
    found = overscan_level(raw, amplifier(20, 400), DetrendSettings(overscan=method))
    assert not found.known.any()
    assert np.isfinite(found.level).all()
