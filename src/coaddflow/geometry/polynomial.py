"""Polynomials in two variables: arrays c[p, q], the coefficients of u**p * v**q, as in SIP."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def term_powers(order: int) -> list[tuple[int, int]]:
    """Return the powers (p, q) of the terms up to a total order: 1, u, v, u^2, uv, v^2, ..."""
    return [(n - q, q) for n in range(order + 1) for q in range(n + 1)]


def design_matrix(u: NDArray, v: NDArray, order: int) -> NDArray[np.float64]:
    """Return the terms of `term_powers` at points of shape (...), shape (..., terms)."""
    return np.stack([u**p * v**q for p, q in term_powers(order)], axis=-1)


def substitute(coefficients: NDArray, matrix: NDArray, offset: ArrayLike = (0.0, 0.0)) -> NDArray:
    """Return c(matrix @ (s, t) + offset) as a polynomial of the same order in (s, t)."""
    order = coefficients.shape[0] - 1
    powers = []
    for row, constant in zip(matrix, offset, strict=True):
        form = np.array([[constant, row[1]], [row[0], 0.0]])
        series = [np.ones((1, 1))]
        for _ in range(order):
            series.append(_multiply(series[-1], form))
        powers.append(series)
    result = np.zeros((order + 1, order + 1))
    for p, q in np.argwhere(coefficients):
        term = coefficients[p, q] * _multiply(powers[0][p], powers[1][q])
        size = min(order + 1, term.shape[0])
        result[:size, :size] += term[:size, :size]
    return result


def _multiply(a: NDArray, b: NDArray) -> NDArray:
    """Return the product of two polynomials."""
    product = np.zeros((a.shape[0] + b.shape[0] - 1, a.shape[1] + b.shape[1] - 1))
    for p, q in np.argwhere(a):
        product[p : p + b.shape[0], q : q + b.shape[1]] += a[p, q] * b
    return product


def evaluate(coefficients: NDArray, u: ArrayLike, v: ArrayLike) -> NDArray[np.float64]:
    """Evaluate the polynomial at points of any shape."""
    u, v = np.asarray(u, float), np.asarray(v, float)
    return np.polynomial.polynomial.polyval2d(u, v, coefficients)


def trim(*polynomials: NDArray) -> list[NDArray]:
    """Cut polynomials to their common order, at least 1."""
    order = max(int(np.argwhere(c).sum(axis=1).max(initial=1)) for c in polynomials)
    return [np.ascontiguousarray(c[: order + 1, : order + 1]) for c in polynomials]


def fit_polynomial(u: NDArray, v: NDArray, values: NDArray, order: int) -> NDArray[np.float64]:
    """Return the polynomial c[p, q] in u and v that fits values best, shape (order + 1,) * 2."""
    scale = max(np.abs(u).max(), np.abs(v).max(), 1.0)
    # not in the order of `term_powers`: another order of the columns would round differently
    powers = [(p, q) for p in range(order + 1) for q in range(order + 1 - p)]
    design = np.stack([(u / scale) ** p * (v / scale) ** q for p, q in powers], axis=1)
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    coefficients = np.zeros((order + 1, order + 1))
    for (p, q), value in zip(powers, solution, strict=True):
        coefficients[p, q] = value / scale ** (p + q)
    return coefficients
