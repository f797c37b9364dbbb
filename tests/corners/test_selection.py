"""Cuts on quality: each figure in its own units, unknown figures do not pass."""

import pytest

from coaddflow.corners.selection import (
    BandMedians,
    band_medians,
    reasons_against,
    sky_brightness,
    zero_point_per_second,
)
from coaddflow.settings.selection import SelectionSettings
from coaddflow.tables.manifest import CcdRow


def row(**kwargs):
    values = {
        "exposure": "e1",
        "ccd": 4,
        "band": "r",
        "mjd": 58000.0,
        "exposure_time": 100.0,
        "state": "done",
        "seeing": 0.8,
        "ellipticity": 0.05,
        "zero_point": 32.0,
        "zero_point_scatter": 0.02,
        "sky_level": 400.0,
        "sky_noise": 10.0,
        "pixel_scale": 0.2,
        "astrometry_rms": 0.03,
        "n_matched": 50,
        "n_zero_point": 40,
        "n_psf_stars": 30,
        "depth": 25.0,
    }
    return CcdRow(**(values | kwargs))


def test_figures_do_not_depend_on_exposure_time_and_pixel_scale():
    assert zero_point_per_second(row()) == pytest.approx(27.0)
    longer = row(exposure_time=200.0, zero_point=32.0 + 0.752575)
    assert zero_point_per_second(longer) == pytest.approx(27.0, abs=1e-5)
    assert sky_brightness(row()) == pytest.approx(100.0)
    assert sky_brightness(row(pixel_scale=0.4, sky_level=3200.0, exposure_time=200.0)) == (
        pytest.approx(100.0)
    )
    assert zero_point_per_second(row(exposure_time=0.0)) is None
    assert sky_brightness(row(pixel_scale=None)) is None


@pytest.mark.parametrize(
    ("setting", "passes", "fails", "figure"),
    [
        ("max_seeing", 0.8, 0.79, "seeing"),
        ("max_ellipticity", 0.05, 0.04, "ellipticity"),
        ("min_zero_point", 27.0, 27.01, "zero_point"),
        ("max_zero_point_scatter", 0.02, 0.01, "zero_point_scatter"),
        ("max_sky", 100.1, 99.9, "sky_level"),
        ("max_astrometry_rms", 0.03, 0.02, "astrometry_rms"),
        ("min_matched", 50, 51, "n_matched"),
        ("min_zero_point_stars", 40, 41, "n_zero_point"),
        ("min_psf_stars", 30, 31, "n_psf_stars"),
        ("min_depth", 25.0, 25.1, "depth"),
    ],
)
def test_each_cut(setting, passes, fails, figure):
    assert reasons_against(row(), SelectionSettings(**{setting: passes})) == ()
    (reason,) = reasons_against(row(), SelectionSettings(**{setting: fails}))
    assert f"{fails:.4g}" in reason
    unknown = row(**{figure: None})
    (reason,) = reasons_against(unknown, SelectionSettings(**{setting: passes}))
    assert reason.endswith("is not known")
    assert reasons_against(unknown, SelectionSettings()) == ()


def test_every_setting_has_a_cut():
    """A setting that does nothing would be a trap."""
    tried = {
        "max_seeing": 0.01,
        "max_ellipticity": 0.0,
        "min_zero_point": 99.0,
        "max_zero_point_loss": 0.0,
        "max_seeing_ratio": 1.5,
        "max_noise_ratio": 1.5,
        "max_zero_point_scatter": 0.0,
        "max_sky": 0.0,
        "max_astrometry_rms": 1e-6,
        "min_matched": 10**6,
        "min_zero_point_stars": 10**6,
        "min_psf_stars": 10**6,
        "min_depth": 99.0,
        "exclude_exposures": ("e1",),
        "exclude_ccds": (4,),
        "exclude_flags": ("own_sky",),
    }
    assert set(tried) == set(SelectionSettings.model_fields)
    medians = BandMedians(zero_point=28.0, seeing=0.5, noise=1.0)
    flagged = row(flags="own_sky")
    for name, value in tried.items():
        settings = SelectionSettings(max_seeing_ratio=None, max_noise_ratio=None)
        settings = settings.model_copy(update={name: value})
        assert len(reasons_against(flagged, settings, medians)) == 1
    assert len(reasons_against(flagged, SelectionSettings(**tried), medians)) == len(tried)


def test_zero_point_against_the_median_of_the_band():
    rows = [row(zero_point=z) for z in (32.0, 32.1, 32.2, 30.0)] + [row(zero_point=None)]
    reference = band_medians(rows)
    assert reference.zero_point == pytest.approx(27.05)
    settings = SelectionSettings(max_zero_point_loss=0.3)
    assert [bool(reasons_against(r, settings, reference)) for r in rows] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert band_medians([row(zero_point=None)]).zero_point is None
    assert reasons_against(rows[0], settings, None) == ("zero-point is not known",)


def test_a_failed_ccd_keeps_its_own_reason():
    failed = row(state="failed", reason="no_stars", seeing=None)
    assert reasons_against(failed, SelectionSettings(max_seeing=1.0)) == ("failed: no_stars",)


def test_what_is_far_from_the_median_of_the_band_is_left_out_by_default():
    rows = [row(seeing=s) for s in (0.9, 1.0, 1.1, 1.9, 4.7)] + [row(seeing=None)]
    medians = band_medians(rows)
    assert [reasons_against(r, SelectionSettings(), medians) for r in rows] == [
        *[()] * 4,
        ("seeing 4.273 times the median > 2",),
        (),
    ]
    # through clouds of three magnitudes; the unit is flux: more exposure time is not more noise
    rows = [row(), row(zero_point=34.0, sky_noise=63.0), row(zero_point=29.0), row(sky_noise=None)]
    medians = band_medians(rows)
    assert [len(reasons_against(r, SelectionSettings(), medians)) for r in rows] == [0, 0, 1, 0]
    assert reasons_against(rows[0], SelectionSettings()) == ()
