"""An exposure that comes later, fitted to the stars of a solution."""

import numpy as np
import pytest
from solved_tract import SETTINGS, solve

from coaddflow.errors import InputError
from coaddflow.solution.detections import MAS
from coaddflow.solution.frozen import calibrate_exposure, fit_exposure
from coaddflow.solution.linking import Links
from coaddflow.solution.photometry import solve_photometry

LATE = 7


@pytest.fixture(scope="module")
def frozen(turbulent_tract):
    """The solution of all exposures but one; returned with the turbulent tract as it was."""
    links = turbulent_tract.links
    rows = np.flatnonzero(turbulent_tract.detections.exposure != LATE)
    detections = turbulent_tract.detections.take(rows)
    detections.exposure[detections.exposure > LATE] -= 1
    exposures = turbulent_tract.simulated.exposures
    others = np.arange(len(exposures)) != LATE
    arrays = (getattr(exposures, name)[others] for name in ("ra", "dec", "mjd", "band", "epoch"))
    names = tuple(np.array(exposures.name)[others].tolist())
    fewer = type(exposures)(names, *arrays, exposures.zenith[others], exposures.bands)
    simulated = type(turbulent_tract.simulated)(
        **{**vars(turbulent_tract.simulated), "exposures": fewer}
    )
    kept = Links(
        *(links.rows[rows], links.star[rows], links.longitude, links.latitude, links.reference)
    )
    early = turbulent_tract._replace(simulated=simulated, links=kept, detections=detections)
    return solve(early, turbulence=True)


def late(turbulent_tract):
    detections = turbulent_tract.simulated.detections
    one = detections.take(np.flatnonzero(detections.exposure == LATE))
    one.exposure[:] = 0
    return one, turbulent_tract.simulated.exposures.only(LATE)


def test_late_exposure_has_the_sky_of_the_solution(turbulent_tract, frozen):
    detections, exposure = late(turbulent_tract)
    settings = SETTINGS
    found, star = fit_exposure(detections, exposure, frozen.solution, frozen.color, settings)
    assert found.name == "1008"
    assert found.field is not None
    simulated, solution = frozen.simulated, frozen.solution
    used = np.flatnonzero((star >= 0) & (detections.error < 0.006))
    assert len(used) > 100
    true = frozen.true[star[used]]
    years = exposure.year[0] - 2016.0
    factors = solution.frame.parallax_factors(exposure.mjd, *found.pointing[:, None])[0]
    moved = simulated.motion[true] * years + simulated.parallax[true][:, None] * factors
    errors = np.zeros((len(used), 2))
    for ccd in np.unique(detections.ccd[used]):
        rows = np.flatnonzero(detections.ccd[used] == ccd)
        number, one = int(simulated.maps.ccd[ccd]), used[rows]
        sky = found.to_sky(number, detections.x[one], detections.y[one])
        place = np.stack(solution.frame.of_sky(*sky), axis=1)
        there = np.stack([simulated.longitude, simulated.latitude], axis=1)[true[rows]]
        errors[rows] = (place - there) * MAS
    errors[:, 0] -= moved[:, 0] / np.cos(np.radians(simulated.latitude[true]))
    errors[:, 1] -= moved[:, 1]
    # of 7 mas of turbulence, and 20 mas of error at the start
    assert 1.4826 * np.median(np.abs(errors)) < 2.5


def test_fit_does_not_change_the_solution(turbulent_tract, frozen):
    before = frozen.solution.stars.parameters.copy(), frozen.solution.coefficients.copy()
    detections, exposure = late(turbulent_tract)
    fit_exposure(detections, exposure, frozen.solution, frozen.color, SETTINGS)
    np.testing.assert_array_equal(frozen.solution.stars.parameters, before[0])
    np.testing.assert_array_equal(frozen.solution.coefficients, before[1])


def test_exposure_elsewhere_is_refused(turbulent_tract, frozen):
    detections, exposure = late(turbulent_tract)
    detections.dec[:] += 10.0
    with pytest.raises(InputError, match="exposure 1008 has no star of the solution"):
        fit_exposure(detections, exposure, frozen.solution, frozen.color, SETTINGS)


def test_late_exposure_has_the_magnitudes_of_the_solution(cloudy_tract):
    # the stars of a solution, and one of its exposures by itself: 0.3 mag of clouds with structure
    simulated, links = cloudy_tract.simulated, cloudy_tract.links
    solution = solve_photometry(
        *(cloudy_tract.detections, links, simulated.exposures, simulated.references),
        *(cloudy_tract.color, simulated.maps, SETTINGS.photometry, SETTINGS.clouds),
    )
    rows = np.flatnonzero(cloudy_tract.detections.exposure == LATE)
    detections, star = cloudy_tract.detections.take(rows), links.star[rows]
    detections.exposure[:] = 0
    exposure = simulated.exposures.only(LATE)
    found = calibrate_exposure(detections, star, exposure, solution, cloudy_tract.color, SETTINGS)
    for ccd in (0, 7):
        here = detections.ccd == ccd
        number, place = int(simulated.maps.ccd[ccd]), (detections.x[here], detections.y[here])
        expected = solution.of_exposure(LATE).zero_point(number, *place)
        # stars that were withheld from the solution are not among its stars
        difference = found.zero_point(number, *place) - expected
        assert np.abs(difference).max() < 0.003
        assert expected.std() > 0.002
    with pytest.raises(InputError, match="no star with a magnitude"):
        calibrate_exposure(
            *(detections, np.full_like(star, -1), exposure, solution, cloudy_tract.color, SETTINGS)
        )
