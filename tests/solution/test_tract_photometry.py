import numpy as np
import pytest
from solved_tract import SETTINGS

from coaddflow.errors import InputError
from coaddflow.solution.photometry import solve_photometry


def solve(linked, clouds=True, references=None, **changes):
    simulated = linked.simulated
    return solve_photometry(
        *(linked.detections, linked.links, simulated.exposures),
        *(references or simulated.references, linked.color, simulated.maps),
        SETTINGS.photometry.model_copy(update=changes),
        SETTINGS.clouds.model_copy(update={"enabled": clouds}),
    )


@pytest.fixture(scope="module")
def solved(cloudy_tract):
    return solve(cloudy_tract)


def zero_points(linked, solution, rows):
    """Return the zero-points at detections, mag."""
    detections, simulated = linked.detections, linked.simulated
    found = np.zeros(len(rows))
    for number in range(len(simulated.exposures)):
        of_exposure = solution.of_exposure(number)
        here = detections.exposure[rows] == number
        for ccd in np.unique(detections.ccd[rows][here]):
            one = here & (detections.ccd[rows] == ccd)
            found[one] = of_exposure.zero_point(
                int(simulated.maps.ccd[ccd]), detections.x[rows[one]], detections.y[rows[one]]
            )
    return found


def errors(linked, solution, rows):
    """Return calibrated minus true magnitudes of detections, minus the mean of each band."""
    star, band = linked.links.star[rows], linked.simulated.exposures.band
    of_row = band[linked.detections.exposure[rows]]
    true = linked.simulated.magnitude[linked.true[star], of_row]
    found = linked.detections.magnitude[rows] + zero_points(linked, solution, rows) - true
    return found - np.array([np.median(found[of_row == one]) for one in range(2)])[of_row]


def test_clouds_and_illumination_leave_less_than_a_millimagnitude(solved):
    # 0.3 mag of clouds with structure, 2 % of illumination error; stars that were not used
    assert np.count_nonzero(solved.withheld) > 100
    assert np.all(solved.withheld_excess < 1e-3)


def test_zero_points_are_those_of_the_exposures(cloudy_tract, solved):
    simulated = cloudy_tract.simulated
    odd = simulated.is_outlier[cloudy_tract.links.rows]
    bright = cloudy_tract.detections.magnitude_error < 0.003
    rows = np.flatnonzero(bright & ~odd)
    found = errors(cloudy_tract, solved, rows)
    # before, exposures differ by 0.1 mag, and CCDs by 0.01; what all exposures have in common on
    # the sky is known from the catalogue, whose stars are good to 0.014 mag each
    assert 1.4826 * np.median(np.abs(found)) < 0.004


def test_magnitudes_are_those_of_the_catalogue_and_colour_terms_are_found(cloudy_tract, solved):
    # 0.01 mag each of a thousand stars
    true = cloudy_tract.simulated.magnitude[cloudy_tract.true]
    assert np.all(np.abs(np.nanmedian(solved.magnitude - true, axis=0)) < 0.0015)
    np.testing.assert_allclose(solved.color_terms, [0.05, -0.03], atol=0.003)
    np.testing.assert_allclose(solved.color_extinction, 0.0, atol=0.002)


def test_given_colour_terms_are_kept(cloudy_tract):
    solution = solve(cloudy_tract, clouds=False, color_terms={"g": 0.04})
    assert solution.color_terms[0] == 0.04
    assert solution.color_terms[1] == pytest.approx(-0.03, abs=0.003)


def test_clouds_with_more_structure_need_the_field(cloudy_tract, solved):
    without = solve(cloudy_tract, clouds=False, order=1)
    assert np.all(without.withheld_excess > 2.0 * solved.withheld_excess)
    assert np.all(without.withheld_excess > 1e-3)


def test_illumination_correction_is_found(cloudy_tract, solved):
    # steps between CCDs: the difference of two CCDs' constants is not left to the exposures
    assert solved.illumination[:, :, 0].std() > 0.004
    single = solve(cloudy_tract, clouds=False, illumination_order=0)
    assert np.all(single.withheld_excess > solved.withheld_excess)


def test_outliers_are_rejected(cloudy_tract, solved):
    odd = cloudy_tract.simulated.is_outlier[cloudy_tract.links.rows]
    used = ~solved.withheld[cloudy_tract.links.star]
    assert np.mean(solved.kept[odd & used]) < 0.15
    assert np.mean(solved.kept[~odd & used]) > 0.97


def test_band_without_reference_magnitudes_is_named(cloudy_tract):
    references = cloudy_tract.simulated.references
    magnitude = references.magnitude.copy()
    magnitude[:, 1] = np.nan
    fields = {**vars(references), "magnitude": magnitude}
    with pytest.raises(InputError, match=r"no star has a reference magnitude in band r.*bands"):
        solve(cloudy_tract, references=type(references)(**fields))
