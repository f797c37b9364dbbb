"""A CCD that cannot be calibrated by itself takes what its exposure knows, and says so."""

from types import SimpleNamespace

import numpy as np
import pytest

from coaddflow.errors import CcdFailure, Reason
from coaddflow.exposure import solution
from coaddflow.exposure.solution import CcdAstrometry, _solve_photometry
from coaddflow.instrument.camera import load_camera
from coaddflow.measure.photometry import ZeroPoint
from coaddflow.settings import Settings

CAMERA = load_camera("demo")
SOLVED = {"exposure": {"astrometry": {"enabled": True}}, "parallel": {"calexp": "exposure"}}


@pytest.fixture
def solved(monkeypatch):
    """Return a function that solves for zero-points; some CCDs have none of their own."""

    def measure(summary, own, refcat, settings):
        if summary.value is None:
            raise CcdFailure(Reason.NO_PHOTOMETRIC_MATCH, "2 stars")
        return np.ones(4, bool), ZeroPoint(summary.value, 0.003, 0.02, 4, np.ones(4, bool))

    monkeypatch.setattr(solution, "measure_zero_point", measure)

    def solve(values, settings):
        summaries = {
            ccd: SimpleNamespace(sources=range(4), value=value) for ccd, value in values.items()
        }
        own = {
            ccd: CcdAstrometry(SimpleNamespace(is_predicted=values[ccd] is None), None)
            for ccd in values
        }
        return _solve_photometry(CAMERA, summaries, own, Settings(**settings))

    return solve


def test_a_ccd_without_a_zero_point_takes_that_of_its_exposure_with_a_flag(solved):
    values = {0: 27.31, 1: 27.29, 2: None, 3: 27.30, 4: 35.0}
    ccds, failures = solved(values, SOLVED)
    assert not failures
    assert list(ccds) == [0, 1, 2, 3, 4]
    zero = ccds[2].zero_point
    assert zero.value == pytest.approx(27.30, abs=0.02), "an odd CCD does not move it"
    assert zero.n_stars == 0
    assert 0.005 < zero.error < 0.03, "the scatter of the CCDs"
    assert not ccds[2].photometric.any()
    assert ccds[2].flags == ("predicted_wcs", "exposure_zero_point")
    assert ccds[0].flags == ()


def test_two_ccds_or_ccds_by_themselves_tell_nothing_of_another(solved):
    for values, settings in (({0: 27.3, 1: 27.3, 2: None}, SOLVED), ({0: 27.3, 2: None}, {})):
        ccds, failures = solved(values, settings)
        assert list(failures) == [2]
        assert 2 not in ccds
