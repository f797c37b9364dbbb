"""Least squares for thousands of exposures that share stars and detectors.

A detection of star s on CCD k of exposure e measures, in one axis (magnitude) or two (position),

    r = E_e(u) + L (D_k(p) + c_gk) + h_e q_s b - Z_e a_s + noise

E_e is a polynomial of the exposure over the field, D_k one of the detector that all exposures
share, c_gk a constant of the detector in epoch g, b a coefficient of the star's colour q_s for each
band, and a_s the parameters of the star. L turns the axes of the field into those of the exposure.

The stars are eliminated: for given other parameters their best ones follow from each star's own
normal equations. What is left (the Schur complement [1]_) couples all exposures, and is never
made: conjugate gradients [2]_ need its product with a vector only, which is two passes over the
detections. The preconditioner is the inverse of the equations for stars that do not couple
exposures. Memory is a few numbers per detection and the blocks.

Gauge: a polynomial over the field that is added to all detectors and taken from all exposures
changes nothing. The detectors' part is kept free of what any polynomial that all exposures and all
detectors have can describe: steps stay in the null space of these conditions [3]_. Polynomials of
higher orders than the detectors have are all but gauge on small CCDs, and held by the prior of the
detectors: without it they grow until nothing is linear. The constants of a detector have a mean of
zero over the epochs; what the constants of an epoch have in common with the polynomials of its
exposures is decided by their prior.

References
----------
.. [1] Triggs et al. 2000, Bundle Adjustment - A Modern Synthesis, LNCS 1883, 298, section 6.
.. [2] Hestenes & Stiefel 1952, J. Res. NBS 49, 409.
.. [3] Gould, Hribar & Nocedal 2001, SIAM J. Sci. Comput. 23, 1376 (projected preconditioner).
"""

import contextlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from coaddflow.compiled import njit
from coaddflow.geometry.polynomial import design_matrix
from coaddflow.solution.detector_maps import DetectorMaps, order_of

FloatArray = NDArray[np.float64]
SingleArray = NDArray[np.float32]
IndexArray = NDArray[np.int32]

_LEAST_SINGULAR = 1e-6
"""Conditions on the detectors that others imply to this precision are left out."""

_STIFF = 1e3
"""How much more expensive steps against the conditions are than others."""

_LEAST_MOTION = 0.002
"""Of detections, rms, in units of their errors: less does not matter."""

_TOGETHER = 16
"""Exposures that are eliminated in one matrix product."""

_RIDGE = 1e-9
"""Relative to the diagonal of a block: terms that no detection determines stay what they are."""

_RIDGES = (1e-9, 1e-7, 1e-5, 1e-3)
"""The same for shared polynomials, of which some combinations are all but gauge: the smallest that
rounding errors allow. It only costs conjugate gradients some steps."""


@dataclass(frozen=True)
class Cells:
    """The CCDs of all exposures: each is a run of detections.

    Attributes
    ----------
    start : ndarray of int64, shape (n cells + 1,)
        First detection of each cell, and the number of all.
    exposure, detector, epoch : ndarray of int32, shape (n cells,)
        What each belongs to; ``detector`` counts the blocks of the shared polynomials, ``epoch``
        the constants (epoch times detector).
    """

    start: NDArray[np.int64]
    exposure: IndexArray
    detector: IndexArray
    epoch: IndexArray

    @classmethod
    def of(
        cls, exposure: IndexArray, ccd: IndexArray, group: IndexArray, epoch: IndexArray, n: int
    ) -> "Cells":
        """Find the cells of sorted detections.

        Parameters
        ----------
        exposure, ccd : ndarray of int32, shape (n detections,)
            Sorted.
        group, epoch : ndarray of int32, shape (n exposures,)
            Which shared polynomials (band), and which constants, each exposure has.
        n : int
            Number of CCDs.
        """
        first = np.ones(len(exposure), dtype=bool)
        first[1:] = (exposure[1:] != exposure[:-1]) | (ccd[1:] != ccd[:-1])
        start = np.append(np.flatnonzero(first), len(exposure))
        number, own = exposure[start[:-1]], ccd[start[:-1]]
        detector, constants = group[number] * n + own, epoch[number] * n + own
        return cls(start, number, detector.astype(np.int32), constants.astype(np.int32))


@dataclass(frozen=True)
class Parameters:
    """Values of everything but the stars, or of their changes.

    Attributes
    ----------
    exposures : ndarray of float64, shape (n exposures, axes, terms)
        Coefficients of the polynomials over the field.
    detectors : ndarray of float64, shape (n detectors, axes, terms)
        Of the shared polynomials, in the axes of the field.
    constants : ndarray of float64, shape (n epochs times detectors, axes)
        The same for the constants.
    colors : ndarray of float64, shape (n bands,)
        Coefficients of the colour.
    """

    exposures: FloatArray
    detectors: FloatArray
    constants: FloatArray
    colors: FloatArray

    def parts(self) -> tuple[FloatArray, ...]:
        """Return the arrays in this order."""
        return self.exposures, self.detectors, self.constants, self.colors

    def combined(self, other: "Parameters", scale: float) -> "Parameters":
        """Return this plus ``scale`` times the other."""
        pairs = zip(self.parts(), other.parts(), strict=True)
        return Parameters(*(one + scale * two for one, two in pairs))

    def dot(self, other: "Parameters") -> float:
        """Return the scalar product."""
        return float(sum(np.vdot(a, b) for a, b in zip(self.parts(), other.parts(), strict=True)))


@dataclass(frozen=True)
class BlockSystem:
    """The equations of all detections; see the module.

    Attributes
    ----------
    cells : Cells
        Of m cells.
    u, v : ndarray of float32, shape (n,)
        Field positions over the radius of the field.
    s, t : ndarray of float32, shape (n,)
        Positions on the detector (`DetectorMaps.unit`).
    star : ndarray of int32, shape (n,)
        Star of each detection.
    weight : ndarray of float32, shape (n,)
        Inverse variance of one axis; 0: not used.
    color : ndarray of float32, shape (n stars,)
        Colours of the stars relative to a mean one.
    turn : ndarray of float32, shape (m, axes, axes)
        L of each cell.
    color_vector : ndarray of float64, shape (n exposures, axes)
        h of each exposure.
    color_index : ndarray of int32, shape (n exposures,)
        Its coefficient b.
    star_design : ndarray of float64, shape (n exposures, axes, parameters)
        Z of each exposure.
    star_prior : ndarray of float64, shape (n stars, parameters)
        Inverse variances of the a priori values of the stars.
    n_terms : ndarray of int64, shape (n exposures,)
        Terms of each exposure's polynomial; the others stay what they are.
    shape : Parameters
        Any values: only their shapes count.
    n_ccds : int
        Detectors of a group (all bands, or one), and constants of an epoch.
    detector_prior, constant_prior : float
        Inverse variances of the coefficients of detectors and of the constants.
    fixed : ndarray of float64, shape (conditions, n CCDs, terms)
        Gauge conditions of the detectors' polynomials of a group, in each axis, orthonormal.
    """

    cells: Cells
    u: SingleArray
    v: SingleArray
    s: SingleArray
    t: SingleArray
    star: IndexArray
    weight: SingleArray
    color: SingleArray
    turn: SingleArray
    color_vector: FloatArray
    color_index: IndexArray
    star_design: FloatArray
    star_prior: FloatArray
    n_terms: NDArray[np.int64]
    shape: Parameters
    n_ccds: int
    detector_prior: float
    constant_prior: float
    fixed: FloatArray

    @cached_property
    def orders(self) -> tuple[int, int]:
        """Orders of the polynomials of exposures and of detectors."""
        return order_of(self.shape.exposures.shape[-1]), order_of(self.shape.detectors.shape[-1])

    @cached_property
    def star_covariance(self) -> FloatArray:
        """Covariances of the stars for given other parameters, (n stars, parameters, parameters).

        Zero for stars that neither detections nor prior determine.
        """
        n_stars, n_own = self.star_prior.shape
        products = np.einsum("eas,eat->est", self.star_design, self.star_design)
        matrix = np.zeros((n_stars, n_own, n_own))
        _add_star_normals(
            self.cells.start, self.cells.exposure, self.star, self.weight, products, matrix
        )
        matrix[:, range(n_own), range(n_own)] += self.star_prior
        known = matrix[:, 0, 0] > 0
        matrix[~known] = np.eye(n_own)
        # parameters have different units
        scale = 1.0 / np.sqrt(np.einsum("sii->si", matrix))
        scaled = np.linalg.inv(matrix * scale[:, :, None] * scale[:, None, :])
        covariance = scaled * scale[:, :, None] * scale[:, None, :]
        covariance[~known] = 0.0
        return covariance

    @cached_property
    def leverage(self) -> SingleArray:
        """Part of each detection in its own star, mean of the axes, shape (n,), 0 to 1."""
        result = np.zeros(len(self.star), np.float32)
        cells = self.cells
        _leverages(
            *(cells.start, cells.exposure, self.star, self.weight),
            *(self.star_design, self.star_covariance, result),
        )
        return result

    def star_step(self, residual: FloatArray, pull: FloatArray | None = None) -> FloatArray:
        """Return the best changes of the stars for given residuals, (n stars, parameters).

        Parameters
        ----------
        residual : ndarray of float64, shape (n, axes)
            Measured minus computed from the stars.
        pull : ndarray of float64, shape (n stars, parameters), optional
            A priori values minus present values.
        """
        sums = np.zeros(self.star_prior.shape)
        cells = self.cells
        _add_star_sums(
            *(cells.start, cells.exposure, self.star, self.weight),
            *(self.star_design, residual, sums),
        )
        if pull is not None:
            sums += self.star_prior * pull
        return np.einsum("sij,sj->si", self.star_covariance, sums)

    def displacement(self, change: Parameters) -> FloatArray:
        """Return what a change of the parameters does to each detection, shape (n, axes)."""
        cells = self.cells
        moved = np.zeros((len(self.star), change.constants.shape[1]))
        _displace(
            *(cells.start, cells.exposure, cells.detector, cells.epoch, self.turn),
            *(self.u, self.v, self.s, self.t, self.star, self.weight, self.color),
            *(self.orders[0], self.orders[1]),
            *change.parts()[:3],
            self.color_vector * change.colors[self.color_index, None],
            moved,
        )
        return moved

    @property
    def n_used(self) -> int:
        """Number of detections that have a weight."""
        return np.count_nonzero(self.weight)

    def size_of(self, change: Parameters) -> float:
        """Return by how many of their errors a change moves the detections, rms of one axis."""
        moved = self.displacement(change)
        total = np.sum(self.weight[:, None] * moved**2)
        return float(np.sqrt(total / (moved.shape[1] * self.n_used)))

    def gradient(self, residual: FloatArray, stars: FloatArray) -> Parameters:
        """Return the transposed equations times weighted residuals.

        ``residual``, shape (n, axes), is reduced by what the changes of stars, shape (n stars,
        parameters), account for.
        """
        cells = self.cells
        found = Parameters(*(np.zeros(part.shape) for part in self.shape.parts()))
        of_color = np.zeros(len(self.color_index))
        _gather(
            *(cells.start, cells.exposure, cells.detector, cells.epoch, self.turn),
            *(self.u, self.v, self.s, self.t, self.star, self.weight, self.color),
            *(self.orders[0], self.orders[1], self.star_design),
            *(self.color_vector, residual, stars),
            *(found.exposures, found.detectors, found.constants, of_color),
        )
        found.exposures[~self.has_term] = 0.0
        np.add.at(found.colors, self.color_index, of_color)
        return found

    @cached_property
    def has_term(self) -> NDArray[np.bool_]:
        """Which terms the exposures have, in the shape of their coefficients."""
        shape = self.shape.exposures.shape
        used = np.arange(shape[-1]) < self.n_terms[:, None]
        return np.broadcast_to(used[:, None], shape)

    def reduced(self, change: Parameters) -> Parameters:
        """Return the reduced normal equations (stars eliminated) times a change."""
        moved = self.displacement(change)
        found = self.gradient(moved, self.star_step(moved))
        found.detectors[:] += self.detector_prior * change.detectors
        found.constants[:] += self.constant_prior * change.constants
        return found


class Preconditioner:
    """An approximate inverse of the reduced equations that keeps the gauge conditions.

    It is the exact inverse but for the coupling of different exposures by their stars, and for
    turns of the field that differ between the CCDs of an exposure: exposures are eliminated, and
    detectors and constants of a group are solved together. Polynomials of exposures and detectors
    almost can take each other's place; with blocks that do not know of each other, conjugate
    gradients need twenty times as many iterations.
    """

    def __init__(self, system: BlockSystem):
        self._system = system
        cells, shape = system.cells, system.shape
        n_terms, n_own = shape.exposures.shape[-1], shape.detectors.shape[-1]
        exposures = np.zeros((len(system.n_terms), n_terms, n_terms))
        detectors = np.zeros((len(cells.exposure), n_own, n_own))
        self._cross = np.zeros((len(cells.exposure), n_terms, n_own))
        colors = np.zeros(len(system.color_index))
        _add_normals(
            *(cells.start, cells.exposure, system.u, system.v, system.s, system.t, system.star),
            *(system.weight, system.leverage, system.color, *system.orders),
            *(exposures, detectors, self._cross, colors),
        )
        used = system.has_term[:, 0]
        exposures *= used[:, :, None] & used[:, None, :]
        self._cross *= used[cells.exposure][:, :, None]
        self._exposures = _inverse(exposures)
        self._turn = _rotations(system)
        self._conditions = _conditions(system)
        self._shared = [self._factor(matrix) for matrix in self._shared_matrices(detectors)]
        of_color = np.zeros(len(shape.colors))
        strength = np.sum(system.color_vector**2, axis=1)
        np.add.at(of_color, system.color_index, colors * strength)
        self._colors = np.divide(1.0, of_color, out=np.zeros_like(of_color), where=of_color > 0)

    def _shared_matrices(self, detectors: FloatArray) -> FloatArray:
        """Return the equations of detectors and constants of each group, exposures eliminated.

        ``detectors`` are the normal matrices of the cells' own polynomials.
        """
        system, cells = self._system, self._system.cells
        n_ccds, n_own = system.n_ccds, detectors.shape[-1]
        n, n_first = self._conditions.shape[1], n_ccds * n_own
        n_groups = len(system.shape.detectors) // n_ccds
        own = np.zeros((n_groups * n_ccds, n_own, n_own))
        np.add.at(own, cells.detector, detectors)
        mixed = np.zeros((len(system.shape.constants), n_own))
        np.add.at(mixed, cells.epoch, detectors[:, 0])
        matrices = np.zeros((n_groups, n, n))
        of_ccd = np.arange(n_first).reshape(n_ccds, n_own)
        constant = np.arange(n_first, n)
        for group, matrix in enumerate(matrices):
            blocks = own[group * n_ccds : (group + 1) * n_ccds]
            matrix[of_ccd[:, :, None], of_ccd[:, None, :]] = blocks
            part = mixed.reshape(n_groups, -1, n_own)[group]
            columns = of_ccd[np.arange(len(part)) % n_ccds]
            matrix[constant[:, None], columns] = part
            matrix[columns, constant[:, None]] = part
            matrix[constant, constant] = part[:, 0] + system.constant_prior
            matrix[np.arange(n_first), np.arange(n_first)] += system.detector_prior
            self._eliminate_exposures(group, matrix)
        return matrices

    def _eliminate_exposures(self, group: int, matrix: FloatArray) -> None:
        """Subtract what the exposures of a group take up from its equations, some at a time."""
        cells, n_ccds = self._system.cells, self._system.n_ccds
        n_own = self._cross.shape[2]
        mine = np.flatnonzero(cells.detector // n_ccds == group)
        numbers, first = np.unique(cells.exposure[mine], return_index=True)
        ends = np.append(first, len(mine))
        for start in range(0, len(numbers), _TOGETHER):
            some = range(start, min(start + _TOGETHER, len(numbers)))
            cross = np.zeros((len(some), self._cross.shape[1], len(matrix)))
            for place, index in enumerate(some):
                rows = mine[ends[index] : ends[index + 1]]
                ccd = cells.detector[rows] % n_ccds
                of_cell = np.moveaxis(self._cross[rows], 1, 0)
                own = cross[place, :, : n_ccds * n_own].reshape(-1, n_ccds, n_own)
                own[:, ccd] = of_cell
                constant = n_ccds * n_own + cells.epoch[rows] % (len(matrix) - n_ccds * n_own)
                cross[place, :, constant] = of_cell[:, :, 0].T
            taken = self._exposures[numbers[some.start : some.stop]] @ cross
            matrix -= cross.reshape(-1, len(matrix)).T @ taken.reshape(-1, len(matrix))

    def _factor(self, matrix: FloatArray) -> tuple[FloatArray, bool]:
        """Return the factor of a matrix in which steps against the conditions are expensive."""
        diagonal = np.diag(matrix)
        stiff = _STIFF * max(float(diagonal.max()), 1e-300)
        held = matrix + stiff * self._conditions.T @ self._conditions
        for ridge in _RIDGES:
            held[np.diag_indices_from(held)] += ridge * np.maximum(diagonal, _RIDGE * stiff)
            with contextlib.suppress(linalg.LinAlgError):
                return linalg.cho_factor(held, lower=True, check_finite=False)
        raise linalg.LinAlgError("the shared polynomials have no positive normal matrix")

    def __call__(self, residual: Parameters) -> Parameters:
        """Return an approximate solution that keeps the gauge conditions."""
        cells = self._system.cells
        turned = np.einsum("eba,ebt->eat", self._turn, residual.exposures)
        exposures = np.einsum("est,eat->eas", self._exposures, turned)
        detectors, constants = residual.detectors.copy(), residual.constants.copy()
        taken = exposures[cells.exposure] @ self._cross
        np.subtract.at(detectors, cells.detector, taken)
        np.subtract.at(constants, cells.epoch, taken[:, :, 0])
        detectors, constants = self._solve_shared(detectors, constants)
        moved = detectors[cells.detector]
        moved[:, :, 0] += constants[cells.epoch]
        follow = np.zeros_like(turned)
        of_cell = self._cross @ np.moveaxis(moved, 1, 2)
        np.add.at(follow, cells.exposure, np.moveaxis(of_cell, 1, 2))
        exposures -= np.einsum("est,eat->eas", self._exposures, follow)
        exposures = np.einsum("eab,ebt->eat", self._turn, exposures)
        return Parameters(exposures, detectors, constants, self._colors * residual.colors)

    def _solve_shared(
        self, detectors: FloatArray, constants: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Solve for detectors and constants, group by group."""
        n_groups, n_axes = len(self._shared), detectors.shape[1]
        first = np.moveaxis(detectors, 1, 2).reshape(n_groups, -1, n_axes)
        right = np.concatenate([first, constants.reshape(n_groups, -1, n_axes)], axis=1)
        found = np.empty_like(right)
        for group, factor in enumerate(self._shared):
            solved = linalg.cho_solve(factor, self._allowed(right[group]), check_finite=False)
            found[group] = self._allowed(solved)
        own, rest = np.split(found, [first.shape[1]], axis=1)
        shape = len(detectors), detectors.shape[2], n_axes
        return np.moveaxis(own.reshape(shape), 1, 2), rest.reshape(constants.shape)

    def _allowed(self, values: FloatArray) -> FloatArray:
        """Return the part of values (n, axes) that keeps the conditions."""
        return values - self._conditions.T @ (self._conditions @ values)


def _conditions(system: BlockSystem) -> FloatArray:
    """Return the gauge conditions of detectors and constants of a group, orthonormal rows."""
    n_groups = len(system.shape.detectors) // system.n_ccds
    n_epochs = len(system.shape.constants) // (n_groups * system.n_ccds)
    of_detectors = system.fixed.reshape(len(system.fixed), -1)
    of_constants = np.tile(np.eye(system.n_ccds), n_epochs) / np.sqrt(n_epochs)
    return linalg.block_diag(of_detectors, of_constants)


def _rotations(system: BlockSystem) -> FloatArray:
    """Return the rotation (or reflection) from the field to the plane of each exposure."""
    n_exposures, n_axes = len(system.n_terms), system.turn.shape[1]
    total = np.zeros((n_exposures, n_axes, n_axes))
    np.add.at(total, system.cells.exposure, system.turn)
    left, _, right = np.linalg.svd(total)
    return left @ right


def solve_step(
    system: BlockSystem,
    residual: FloatArray,
    present: tuple[FloatArray, FloatArray],
    tolerance: float,
    limit: int,
    least_motion: float = _LEAST_MOTION,
) -> tuple[Parameters, int]:
    """Return the change of the parameters that minimises the residuals, the stars following.

    Parameters
    ----------
    system : BlockSystem
        The equations.
    residual : ndarray of float64, shape (n, axes)
        Present residuals (model minus stars), the stars being the best for them.
    present : tuple of ndarray of float64
        Present values of the detectors and of the constants, which have a prior.
    tolerance : float
        Relative to the norm of the first step.
    limit : int
        Most iterations.
    least_motion : float
        Steps that move detections by less than this part of their errors, rms, are not taken.

    Returns
    -------
    change : Parameters
        To be added.
    iterations : int
        Conjugate gradient iterations.
    """
    left = system.gradient(-residual, np.zeros(system.star_prior.shape))
    left.detectors[:] -= system.detector_prior * present[0]
    left.constants[:] -= system.constant_prior * present[1]
    precondition = Preconditioner(system)
    step = precondition(left)
    change = Parameters(*(np.zeros(part.shape) for part in system.shape.parts()))
    norm = left.dot(step)
    # what is left of the sum of squares, by the preconditioner
    smallest = least_motion**2 * system.n_used * residual.shape[1]
    enough = max(tolerance**2 * norm, smallest)
    iteration = 0
    while iteration < limit and norm > enough:
        iteration += 1
        product = system.reduced(step)
        curvature = step.dot(product)
        if curvature <= 0.0:  # rounding: nothing is left to gain
            break
        length = norm / curvature
        change = change.combined(step, length)
        left = left.combined(product, -length)
        better = precondition(left)
        previous, norm = norm, left.dot(better)
        step = better.combined(step, norm / previous)
    return change, iteration


def gauge_conditions(maps: DetectorMaps, order: int, detector_order: int) -> FloatArray:
    """Return conditions that keep the detectors' polynomials free of those of the exposures.

    The scalar products, over the areas of all detectors, of a sum of polynomials of the detectors
    with every polynomial of the field up to an order are zero.

    Parameters
    ----------
    maps : DetectorMaps
        Where the detectors are.
    order : int
        Order that the polynomials of exposures and detectors both have: what detectors have of
        higher orders, exposures can describe almost only.
    detector_order : int
        Order of the detectors' polynomials.

    Returns
    -------
    ndarray of float64, shape (conditions, n detectors, terms)
        Orthonormal; conditions that the others imply are left out.
    """
    nodes, weights = np.polynomial.legendre.leggauss(max(order, detector_order) + 1)
    points = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel()
    field = maps.at(points) / maps.radius
    share = maps.size / maps.size.max(axis=1, keepdims=True)
    own = design_matrix(*np.moveaxis(points * share[:, None], -1, 0), detector_order)
    common = design_matrix(field[:, 0], field[:, 1], order)
    conditions = np.einsum("kpc,kpt,p->ckt", common, own, weight)
    shape = conditions.shape
    *_, singular, rows = np.linalg.svd(conditions.reshape(shape[0], -1), full_matrices=False)
    return rows[singular > _LEAST_SINGULAR * singular[0]].reshape(-1, *shape[1:])


def _inverse(matrices: FloatArray) -> FloatArray:
    """Return the inverses of symmetric blocks (n, k, k); 0 for rows without a value."""
    diagonal = np.einsum("nii->ni", matrices)
    empty = diagonal <= 0
    scale = 1.0 / np.sqrt(np.where(empty, 1.0, diagonal))
    scaled = matrices * scale[:, :, None] * scale[:, None, :]
    index = np.arange(matrices.shape[-1])
    scaled[:, index, index] = 1.0 + _RIDGE
    inverse = np.linalg.inv(scaled) * scale[:, :, None] * scale[:, None, :]
    inverse[:, index, index] *= ~empty
    return inverse


@njit(nogil=True, fastmath=True, error_model="numpy")
def fill_terms(u, v, order, terms):
    """Fill in the terms of `geometry.polynomial.term_powers` at a point."""
    terms[0] = 1.0
    before = 0
    for degree in range(1, order + 1):
        start = before + degree
        for q in range(degree):
            terms[start + q] = u * terms[before + q]
        terms[start + degree] = v * terms[start - 1]
        before = start


@njit(nogil=True, fastmath=True, error_model="numpy")
def _displace(  # noqa: PLR0913, PLR0917
    start, exposure, detector, epoch, turn, u, v, s, t, star, weight, color, order, own_order,
    of_exposure, of_detector, constant, of_color, moved,
):  # fmt: skip
    n_axes, n_terms, n_own = turn.shape[1], of_exposure.shape[2], of_detector.shape[2]
    terms, own = np.empty(n_terms), np.empty(n_own)
    turned = np.empty((n_axes, n_own))
    for cell in range(len(exposure)):
        e, k, g = exposure[cell], detector[cell], epoch[cell]
        for a in range(n_axes):
            turned[a, :] = 0.0
            for b in range(n_axes):
                for j in range(n_own):
                    turned[a, j] += turn[cell, a, b] * of_detector[k, b, j]
                turned[a, 0] += turn[cell, a, b] * constant[g, b]
        for i in range(start[cell], start[cell + 1]):
            if weight[i] == 0.0:
                continue
            fill_terms(float(u[i]), float(v[i]), order, terms)
            fill_terms(float(s[i]), float(t[i]), own_order, own)
            for a in range(n_axes):
                value = of_color[e, a] * color[star[i]]
                for j in range(n_terms):
                    value += of_exposure[e, a, j] * terms[j]
                for j in range(n_own):
                    value += turned[a, j] * own[j]
                moved[i, a] = value


@njit(nogil=True, fastmath=True, error_model="numpy")
def _gather(  # noqa: C901, PLR0913, PLR0917
    start, exposure, detector, epoch, turn, u, v, s, t, star, weight, color, order, own_order,
    star_design, color_vector, residual, stars, of_exposure, of_detector, constant, of_color,
):  # fmt: skip
    n_axes, n_terms, n_own = turn.shape[1], of_exposure.shape[2], of_detector.shape[2]
    terms, own = np.empty(n_terms), np.empty(n_own)
    sums, own_sums = np.empty((n_axes, n_terms)), np.empty((n_axes, n_own))
    for cell in range(len(exposure)):
        e, k, g = exposure[cell], detector[cell], epoch[cell]
        sums[:] = 0.0
        own_sums[:] = 0.0
        for i in range(start[cell], start[cell + 1]):
            if weight[i] == 0.0:
                continue
            fill_terms(float(u[i]), float(v[i]), order, terms)
            fill_terms(float(s[i]), float(t[i]), own_order, own)
            for a in range(n_axes):
                value = residual[i, a]
                for j in range(stars.shape[1]):
                    value -= star_design[e, a, j] * stars[star[i], j]
                value *= weight[i]
                of_color[e] += color_vector[e, a] * value * color[star[i]]
                for j in range(n_terms):
                    sums[a, j] += value * terms[j]
                for j in range(n_own):
                    own_sums[a, j] += value * own[j]
        for a in range(n_axes):
            for j in range(n_terms):
                of_exposure[e, a, j] += sums[a, j]
            for b in range(n_axes):
                for j in range(n_own):
                    of_detector[k, b, j] += turn[cell, a, b] * own_sums[a, j]
                constant[g, b] += turn[cell, a, b] * own_sums[a, 0]


@njit(nogil=True, fastmath=True, error_model="numpy")
def _add_star_sums(start, exposure, star, weight, star_design, residual, sums):
    for cell in range(len(exposure)):
        e = exposure[cell]
        for i in range(start[cell], start[cell + 1]):
            for j in range(sums.shape[1]):
                value = 0.0
                for a in range(star_design.shape[1]):
                    value += star_design[e, a, j] * residual[i, a]
                sums[star[i], j] += weight[i] * value


@njit(nogil=True, fastmath=True, error_model="numpy")
def _add_star_normals(start, exposure, star, weight, products, matrix):
    n = matrix.shape[1]
    for cell in range(len(exposure)):
        e = exposure[cell]
        for i in range(start[cell], start[cell + 1]):
            for j in range(n):
                for k in range(n):
                    matrix[star[i], j, k] += weight[i] * products[e, j, k]


@njit(nogil=True, fastmath=True, error_model="numpy")
def _leverages(start, exposure, star, weight, star_design, covariance, result):
    n_axes, n = star_design.shape[1], star_design.shape[2]
    for cell in range(len(exposure)):
        e = exposure[cell]
        for i in range(start[cell], start[cell + 1]):
            total = 0.0
            for a in range(n_axes):
                for j in range(n):
                    for k in range(n):
                        part = covariance[star[i], j, k] * star_design[e, a, k]
                        total += star_design[e, a, j] * part
            result[i] = weight[i] * total / n_axes


@njit(nogil=True, fastmath=True, error_model="numpy")
def _add_normals(  # noqa: PLR0913, PLR0917
    start, exposure, u, v, s, t, star, weight, leverage, color, order, own_order,
    of_exposure, of_detector, cross, of_color,
):  # fmt: skip
    n_terms, n_own = of_exposure.shape[2], of_detector.shape[2]
    terms, own = np.empty(n_terms), np.empty(n_own)
    sums = np.empty((n_terms, n_terms))
    for cell in range(len(exposure)):
        e = exposure[cell]
        sums[:] = 0.0
        for i in range(start[cell], start[cell + 1]):
            if weight[i] == 0.0:
                continue
            fill_terms(float(u[i]), float(v[i]), order, terms)
            fill_terms(float(s[i]), float(t[i]), own_order, own)
            # of an exposure, which has each star once, this is the block of the reduced matrix
            reduced = weight[i] * (1.0 - leverage[i])
            for j in range(n_terms):
                value = reduced * terms[j]
                for m in range(n_terms):
                    sums[j, m] += value * terms[m]
                for m in range(n_own):
                    cross[cell, j, m] += value * own[m]
            for j in range(n_own):
                value = reduced * own[j]
                for m in range(n_own):
                    of_detector[cell, j, m] += value * own[m]
            of_color[e] += reduced * color[star[i]] ** 2
        of_exposure[e] += sums


@njit(nogil=True, fastmath=True, error_model="numpy")
def evaluate_polynomials(start, index, u, v, coefficients, values):
    """Add polynomials at the points of runs to values.

    Parameters
    ----------
    start : ndarray of int64, shape (m + 1,)
        First point of each run, and the number of all.
    index : ndarray of int32, shape (m,)
        Which polynomial a run has.
    u, v : ndarray of float64, shape (n,)
        Points.
    coefficients : ndarray of float64, shape (n polynomials, axes, terms)
        In the order of `geometry.polynomial.term_powers`.
    values : ndarray of float64, shape (n, axes)
        Changed.
    """
    n_axes, n_terms = coefficients.shape[1], coefficients.shape[2]
    order = int(np.sqrt(2.0 * n_terms)) - 1
    terms = np.empty(n_terms)
    for run in range(len(index)):
        for i in range(start[run], start[run + 1]):
            fill_terms(u[i], v[i], order, terms)
            for a in range(n_axes):
                total = 0.0
                for j in range(n_terms):
                    total += coefficients[index[run], a, j] * terms[j]
                values[i, a] += total
