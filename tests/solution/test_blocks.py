"""The reduced equations against dense ones."""

import numpy as np
import pytest

from coaddflow.geometry.polynomial import design_matrix
from coaddflow.solution.blocks import (
    BlockSystem,
    Cells,
    Parameters,
    evaluate_polynomials,
    fill_terms,
    gauge_conditions,
    solve_step,
)
from coaddflow.solution.detector_maps import DetectorMaps

N_EXPOSURES, N_CCDS, N_EPOCHS, N_STARS = 4, 3, 2, 60
ORDER, OWN_ORDER, N_STAR = 2, 1, 3


@pytest.fixture(scope="module")
def system():
    """A small system with two axes; exposure 0 has a first-order polynomial."""
    rng = np.random.default_rng(7)
    n_terms, n_own = 6, 3
    maps = DetectorMaps(
        np.arange(N_CCDS),
        np.full((N_CCDS, 2), 1000),
        np.array([[[k - 1.0, 0.5, 0.0], [0.0, 0.0, 0.5]] for k in range(N_CCDS)]),
    )
    exposure = np.repeat(np.arange(N_EXPOSURES, dtype=np.int32), N_STARS)
    ccd = np.tile(np.repeat(np.arange(N_CCDS, dtype=np.int32), N_STARS // N_CCDS), N_EXPOSURES)
    epoch = np.array([0, 0, 1, 1], np.int32)
    cells = Cells.of(exposure, ccd, np.zeros(N_EXPOSURES, np.int32), epoch, N_CCDS)
    s, t = rng.uniform(-1, 1, (2, exposure.size)).astype(np.float32)
    field = np.stack([ccd - 1.0 + 0.5 * s, 0.5 * t]) / maps.radius
    angle = rng.uniform(0, 6, N_EXPOSURES)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    star = np.concatenate([rng.permutation(N_STARS) for _ in range(N_EXPOSURES)])
    weight = rng.uniform(1.0, 3.0, exposure.size).astype(np.float32)
    weight[::17] = 0.0
    design = np.zeros((N_EXPOSURES, 2, N_STAR))
    design[:, 0, 0] = design[:, 1, 1] = 1.0
    design[:, :, 2] = rng.normal(size=(N_EXPOSURES, 2))
    shape = Parameters(
        np.zeros((N_EXPOSURES, 2, n_terms)),
        np.zeros((N_CCDS, 2, n_own)),
        np.zeros((N_EPOCHS * N_CCDS, 2)),
        np.zeros(2),
    )
    return BlockSystem(
        *(cells, field[0].astype(np.float32), field[1].astype(np.float32), s, t),
        *(star.astype(np.int32), weight, rng.normal(size=N_STARS).astype(np.float32)),
        turn=np.moveaxis(turn, 2, 0)[cells.exposure].astype(np.float32),
        color_vector=rng.normal(size=(N_EXPOSURES, 2)),
        color_index=np.array([0, 1, 0, 1], np.int32),
        star_design=design,
        star_prior=np.tile([0.5, 0.5, 1.0], (N_STARS, 1)),
        n_terms=np.array([3, 6, 6, 6]),
        shape=shape,
        n_ccds=N_CCDS,
        detector_prior=0.2,
        constant_prior=0.3,
        fixed=gauge_conditions(maps, 1, OWN_ORDER),
    )


def flat(parameters):
    return np.concatenate([part.ravel() for part in parameters.parts()])


def unflat(values, shape):
    parts, start = [], 0
    for part in shape.parts():
        parts.append(values[start : start + part.size].reshape(part.shape))
        start += part.size
    return Parameters(*parts)


@pytest.fixture(scope="module")
def dense(system):
    """The matrix of all parameters, that of the stars, weights, and the free parameters."""
    n = flat(system.shape).size
    columns = [system.displacement(unflat(row, system.shape)).ravel() for row in np.eye(n)]
    matrix = np.array(columns, dtype=float).T
    stars = np.zeros((len(system.star), 2, N_STARS, N_STAR))
    exposure = np.repeat(np.arange(N_EXPOSURES), N_STARS)
    every = np.arange(len(system.star))
    stars[every, :, system.star] = system.star_design[exposure]
    weight = np.repeat(system.weight.astype(float), 2)
    used = Parameters(
        system.has_term.astype(float), *(np.ones(part.shape) for part in system.shape.parts()[1:])
    )
    return matrix, stars.reshape(2 * len(system.star), -1), weight, flat(used) > 0


def reduced_matrix(system, dense):
    """Return the Schur complement by its definition."""
    matrix, stars, weight, used = dense
    prior = np.zeros(flat(system.shape).size)
    start = system.shape.exposures.size + system.shape.detectors.size
    prior[system.shape.exposures.size : start] = system.detector_prior
    prior[start : start + system.shape.constants.size] = system.constant_prior
    full = matrix.T @ (weight[:, None] * matrix) + np.diag(prior)
    mixed = stars.T @ (weight[:, None] * matrix)
    own = stars.T @ (weight[:, None] * stars) + np.diag(system.star_prior.ravel())
    complement = full - mixed.T @ np.linalg.solve(own, mixed)
    complement[~used] = 0.0
    return complement


def test_displacement_is_what_the_model_says(system):
    rng = np.random.default_rng(2)
    change = unflat(rng.normal(size=flat(system.shape).size), system.shape)
    moved = system.displacement(change)
    cells = system.cells
    cell = np.repeat(np.arange(len(cells.exposure)), np.diff(cells.start))
    exposure, ccd, epoch = cells.exposure[cell], cells.detector[cell], cells.epoch[cell]
    own = np.einsum("nt,nat->na", design_matrix(system.s, system.t, 1), change.detectors[ccd])
    expected = np.einsum("nab,nb->na", system.turn[cell], own + change.constants[epoch])
    terms = design_matrix(system.u, system.v, ORDER)
    expected += np.einsum("nt,nat->na", terms, change.exposures[exposure])
    color = change.colors[system.color_index[exposure]] * system.color[system.star]
    expected += color[:, None] * system.color_vector[exposure]
    used = system.weight > 0
    np.testing.assert_allclose(moved[used], expected[used], atol=1e-5)


def test_reduced_equations_are_the_schur_complement(system, dense):
    complement = reduced_matrix(system, dense)
    rng = np.random.default_rng(3)
    values = np.where(dense[3], rng.normal(size=len(complement)), 0.0)
    found = flat(system.reduced(unflat(values, system.shape)))
    expected = complement @ values
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_step_minimises_the_residuals_within_the_gauge(system, dense):
    matrix, _, weight, used = dense
    rng = np.random.default_rng(4)
    residual = rng.normal(size=(len(system.star), 2))
    # with the stars at their best for these residuals, as the solution has them
    stars = system.star_step(residual)
    for number in range(N_EXPOSURES):
        rows = slice(number * N_STARS, (number + 1) * N_STARS)
        residual[rows] -= stars[system.star[rows]] @ system.star_design[number].T
    start = system.shape.detectors, system.shape.constants
    change, steps = solve_step(system, residual, start, 1e-7, 200, 0.0)
    assert steps < 60
    assert np.abs(np.einsum("ckt,kat->ca", system.fixed, change.detectors)).max() < 1e-6
    mean = change.constants.reshape(N_EPOCHS, -1).mean(axis=0)
    assert np.abs(mean).max() < 1e-6
    # what is left of the gradient is along the conditions, which forbid to follow it
    right = -(matrix.T @ (weight * residual.ravel().astype(float)))
    gradient = np.where(used, right - reduced_matrix(system, dense) @ flat(change), 0.0)
    left = unflat(gradient, system.shape)
    scale = np.abs(right).max()
    assert np.abs(left.exposures).max() < 1e-4 * scale
    assert np.abs(left.colors).max() < 1e-4 * scale
    held = np.einsum("ckt,kat->ca", system.fixed, left.detectors)
    along = np.einsum("ckt,ca->kat", system.fixed, held)
    assert np.abs(left.detectors - along).max() < 1e-4 * scale


def test_terms_that_an_exposure_does_not_have_stay(system):
    residual = np.ones((len(system.star), 2))
    start = system.shape.detectors, system.shape.constants
    change, _ = solve_step(system, residual, start, 1e-5, 50)
    assert np.all(change.exposures[0, :, 3:] == 0.0)
    assert np.any(change.exposures[1, :, 3:] != 0.0)


def test_leverage_is_the_part_of_a_detection_in_its_star(system):
    # a unit change of one detection changes its star's computed value by the leverage
    row = 5
    residual = np.zeros((len(system.star), 2))
    parts = []
    for axis in range(2):
        residual[:] = 0.0
        residual[row, axis] = 1.0
        step = system.star_step(residual)[system.star[row]]
        parts.append(system.star_design[0, axis] @ step)
    assert system.leverage[row] == pytest.approx(np.mean(parts), rel=1e-5)


def test_polynomials_are_those_of_the_design_matrix():
    rng = np.random.default_rng(5)
    u, v = rng.uniform(-1, 1, (2, 20))
    coefficients = rng.normal(size=(2, 2, 28))
    start, index = np.array([0, 12, 20]), np.array([1, 0], np.int32)
    values = np.ones((20, 2))
    evaluate_polynomials(start, index, u, v, coefficients, values)
    which = np.repeat(index, np.diff(start))
    expected = 1.0 + np.einsum("nt,nat->na", design_matrix(u, v, 6), coefficients[which])
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    terms = np.empty(28)
    fill_terms(u[0], v[0], 6, terms)
    np.testing.assert_allclose(terms, design_matrix(u[0], v[0], 6), rtol=1e-12)
