import numpy as np
import pytest
from solved_tract import solve

from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix
from coaddflow.qa.repeatability import distance_repeatability
from coaddflow.solution.detections import MAS
from coaddflow.solution.linking import Links


def sky_errors(solved, rows):
    """Return solved minus true positions of detections in mas, shape (n, 2), in the frame."""
    simulated, solution, links = solved.simulated, solved.solution, solved.links
    errors = np.zeros((len(rows), 2))
    detections, exposures = solved.detections, simulated.exposures
    for number in range(len(exposures)):
        of_exposure, place = solution.of_exposure(number), np.zeros((len(rows), 2))
        here = detections.exposure[rows] == number
        for ccd in np.unique(detections.ccd[rows][here]):
            one = here & (detections.ccd[rows] == ccd)
            star = links.star[rows[one]]
            sky = of_exposure.to_sky(
                *(int(simulated.maps.ccd[ccd]), detections.x[rows[one]], detections.y[rows[one]]),
                solved.color[star] - solution.median_color,
            )
            place[one] = np.stack(simulated.frame.of_sky(*sky), axis=1)
        true = solved.true[links.star[rows[here]]]
        years, factors = exposures.year[number] - 2016.0, solution.times[1][number]
        moved = simulated.motion[true] * years + simulated.parallax[true][:, None] * factors
        cos = np.cos(np.radians(simulated.latitude[true]))
        there = np.stack([simulated.longitude[true], simulated.latitude[true]], axis=1)
        moved[:, 0] /= cos
        errors[here] = (place[here] - there) * MAS - moved
    return errors


def centroid_noise(solved, rows):
    """Return the noise of detections, one axis, mas."""
    return solved.detections.error[rows] * solved.simulated.maps.pixel_scale.mean() * MAS


def good_rows(solved, faintest=0.005):
    """Return rows of detections with small centroid errors (pixels) that are no outliers."""
    odd = solved.simulated.is_outlier[solved.links.rows]
    return np.flatnonzero((solved.detections.error < faintest) & ~odd)


def test_maps_are_as_good_as_photons_allow(tract):
    rows = good_rows(tract)
    errors = sky_errors(tract, rows)
    # 1.5 mas or less is the noise of these stars; maps from 1200 stars of 2 axes x 28 terms add
    # little, and at the start positions were off by 20 mas
    noise = centroid_noise(tract, rows)
    assert np.median(noise) < 1.0
    scatter = 1.4826 * np.median(np.abs(errors), axis=0)
    assert np.all(scatter < 1.6 * np.median(noise))
    assert np.all(np.abs(np.median(errors, axis=0)) < 0.3)


def test_outliers_are_rejected_and_others_are_kept(tract):
    odd = tract.simulated.is_outlier[tract.links.rows]
    kept = tract.solution.kept
    assert np.count_nonzero(odd) > 50
    # outliers are uniform within 2 pixels: some are near enough
    assert np.mean(kept[odd]) < 0.1
    # a star with two detections of which one is an outlier loses both
    assert np.mean(kept[~odd]) > 0.98


def test_scatter_beyond_the_errors_is_none_without_turbulence(tract):
    assert np.median(tract.solution.excess) < 0.5


def test_refraction_by_colour_is_found(tract):
    np.testing.assert_allclose(tract.solution.dispersion * MAS, 20.0, atol=0.4)


def test_stars_have_their_positions_and_motions_within_their_errors(tract):
    stars, simulated = tract.solution.stars, tract.simulated
    seen = np.flatnonzero(stars.covariance[:, 0, 0] > 0)
    true = tract.true[seen]
    error = np.sqrt(np.einsum("sii->si", stars.covariance[seen])) * MAS
    motion = (stars.parameters[seen, 2:4] * MAS - simulated.motion[true]) / error[:, 2:4]
    assert 0.8 < np.std(motion) < 1.25
    place = np.stack(stars.at(seen, 0.0, (0.0, 0.0)), axis=1)
    there = np.stack([simulated.longitude[true], simulated.latitude[true]], axis=1)
    assert 0.8 < np.std((place - there) * MAS / error[:, :2]) < 1.3
    # the motions of bright stars without an entry in the catalogue are solved, not assumed: the a
    # priori value has an error of 10 mas/yr
    faint = error[:, 2] < 3.0
    assert np.count_nonzero(faint & (tract.links.reference[seen] < 0)) > 30


def test_parallaxes_are_solved(tract):
    # a priori 0 +- 1 mas for stars without an entry in the catalogue; bright ones are known better
    stars, simulated = tract.solution.stars, tract.simulated
    seen = np.flatnonzero((stars.covariance[:, 0, 0] > 0) & (tract.links.reference < 0))
    error = np.sqrt(stars.covariance[seen, 4, 4]) * MAS
    found, true = stars.parameters[seen, 4] * MAS, simulated.parallax[tract.true[seen]]
    known = error < 0.8
    assert np.count_nonzero(known) > 20
    assert 0.7 < np.sqrt(np.mean(((found - true) / error)[known] ** 2)) < 1.4


def test_catalogue_motions_are_kept_if_asked(tract):
    solution = solve(tract, motions="catalogue").solution
    reference = tract.links.reference
    none = reference < 0
    assert np.all(solution.stars.parameters[none, 2:] == 0.0)
    found = np.hypot(*solution.stars.parameters[~none, 2:4].T) * MAS
    given = np.hypot(*tract.simulated.references.motion[reference[~none]].T)
    np.testing.assert_allclose(found, given, rtol=1e-6)


def test_detectors_keep_the_gauge(tract):
    # the sum of the shared distortions has no part that exposures' polynomials can describe
    solution, maps = tract.solution, tract.simulated.maps
    change = solution.detectors.coefficients - maps.coefficients
    nodes = np.linspace(-0.9995, 0.9995, 60)
    points = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    field = maps.at(points) / maps.radius
    moved = np.einsum("kat,kpt->kap", change, _terms(maps, points))
    size = np.sqrt(np.mean(moved**2)) / maps.pixel_scale.mean()
    assert size > 0.1
    for p, q in ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 3), (4, 0)):
        product = np.mean(moved * (field[:, 0] ** p * field[:, 1] ** q)[:, None], axis=(0, 2))
        assert np.all(np.abs(product) < 0.01 * np.sqrt(np.mean(moved**2)))
    assert np.abs(solution.constants.sum(axis=0)).max() < 1e-9
    shifts = solution.constants[0] / maps.pixel_scale.mean()
    assert 0.02 < shifts.std() < 0.1


def _terms(maps, points):
    share = maps.size / maps.size.max(axis=1, keepdims=True)
    places = points[None] * share[:, None]
    return design_matrix(places[..., 0], places[..., 1], maps.order)


def test_turbulence_is_removed_also_for_withheld_stars(turbulent_tract):
    withheld = np.random.default_rng(3).random(len(turbulent_tract.links)) < 0.2
    without = solve(turbulent_tract, withheld=withheld)
    with_field = solve(turbulent_tract, turbulence=True, withheld=withheld)
    scatters = []
    for solved in (without, with_field):
        rows = good_rows(solved, 0.01)
        rows = rows[withheld[solved.links.star[rows]]]
        assert len(rows) > 150
        scatters.append(1.4826 * np.median(np.abs(sky_errors(solved, rows))))
    assert scatters[0] > 2.5
    assert scatters[1] < 2.2
    # what is said of it: the formal error of the field is that of the stars that are not used
    stated = np.median([field.error for field in with_field.solution.fields])
    noise = np.median(centroid_noise(with_field, rows))
    assert 0.6 < scatters[1] / np.hypot(stated, noise) < 1.5


def test_relative_astrometry_between_exposures(tract):
    # AM1 of stars with a signal-to-noise ratio above 200, without atmosphere
    rows = good_rows(tract, 0.0086)
    errors = sky_errors(tract, rows) / MAS
    star, exposure = tract.links.star[rows], tract.detections.exposure[rows]
    true = tract.true[star]
    _, seen = np.unique(star, return_inverse=True)
    shape = len(tract.simulated.exposures), seen.max() + 1
    place, limit = np.full((2, *shape), np.nan), np.full((2, *shape), np.nan)
    noise = np.random.default_rng(1).normal(size=errors.shape) * (
        centroid_noise(tract, rows)[:, None] / MAS
    )
    there = np.stack([tract.simulated.longitude[true], tract.simulated.latitude[true]], axis=1)
    place[:, exposure, seen] = (there + errors).T
    limit[:, exposure, seen] = (there + noise).T
    found, photons = (distance_repeatability(*of, 5.0 / 60.0, 1.0 / 60.0) for of in (place, limit))
    assert found.n > 1000
    assert found.value < 1.5 or found.value < 1.1 * photons.value


def test_solution_without_catalogue_stars_is_refused(tract):
    links, none = tract.links, np.full(len(tract.links), -1, np.int32)
    without = Links(links.rows, links.star, links.longitude, links.latitude, none)
    with pytest.raises(InputError, match="no star of the tract is in the reference catalogue"):
        solve(tract._replace(links=without))


def test_exposure_without_enough_stars_is_named(tract):
    few = (tract.detections.exposure != 3) | (np.arange(len(tract.detections)) % 400 == 0)
    rows = np.flatnonzero(few)
    links = tract.links
    sparse = Links(
        *(links.rows[rows], links.star[rows], links.longitude, links.latitude, links.reference)
    )
    with pytest.raises(InputError, match=r"exposure 1004 has \d stars .*exclude"):
        solve(tract._replace(links=sparse, detections=tract.detections.take(rows)))
