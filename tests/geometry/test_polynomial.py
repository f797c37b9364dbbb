import numpy as np

from coaddflow.geometry.polynomial import design_matrix, evaluate, fit_polynomial, term_powers


def test_terms_of_a_design_matrix_are_those_of_the_polynomial():
    u, v = np.random.default_rng(1).uniform(-1.0, 1.0, (2, 50))
    coefficients = np.zeros((4, 4))
    values = np.arange(1.0, 11.0)
    for (p, q), value in zip(term_powers(3), values, strict=True):
        coefficients[p, q] = value
    assert np.allclose(design_matrix(u, v, 3) @ values, evaluate(coefficients, u, v))
    assert np.allclose(fit_polynomial(u, v, evaluate(coefficients, u, v), 3), coefficients)
