"""Astrometry of all exposures of a tract: every star has one place on the sky.

A pixel of CCD k in exposure e goes to the field by the polynomial of the detector, which all
exposures share (and a constant in each epoch of the instrument), from there to the tangent plane of
the exposure by a polynomial of its own, and to the sky [1]_ [2]_. Stars have a position, a proper
motion and a parallax; those of the reference catalogue pull at theirs with their errors. All are
determined together, by Gauss and Newton's method with the stars eliminated (`blocks`), with
detections weighted by their errors and what the air adds in their exposure, and clipped. The
atmosphere's dispersion moves a star by its colour towards the zenith, with one coefficient for
each band [3]_. At last each exposure may have a field without curl (`waves`) for what turbulence
leaves [4]_, after which stars and maps are solved again.

Gauge freedoms, and what fixes them: the sky as a whole and all large scales, by the reference
stars; motion of all stars together, by the proper motions and parallaxes of the reference stars and
the a priori values of the others; detectors against exposures, and constants of epochs, see
`blocks`; colours are relative to their median.

References
----------
.. [1] Bernstein et al. 2017, PASP 129, 074503 (DECam: maps of instrument and exposures).
.. [2] Bosch et al. 2018, PASJ 70, S5, section 4.2 (mosaic: one degree-9 polynomial an exposure).
.. [3] Plazas & Bernstein 2012, PASP 124, 1113 (differential chromatic refraction).
.. [4] Fortino et al. 2021, AJ 162, 106 (turbulence as a curl-free Gaussian process).
"""

import logging
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coaddflow.astrometry.ccd import supported_order
from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix, term_powers
from coaddflow.geometry.sphere import tan_project
from coaddflow.settings.solution import TractAstrometrySettings, WaveSettings
from coaddflow.solution.blocks import (
    BlockSystem,
    Cells,
    Parameters,
    evaluate_polynomials,
    gauge_conditions,
    solve_step,
)
from coaddflow.solution.detections import (
    MAS,
    Detections,
    Exposures,
    ReferenceStars,
    TractFrame,
    relative_colors,
    rows_between,
)
from coaddflow.solution.detector_maps import DetectorMaps, order_of
from coaddflow.solution.excess import judge_residuals
from coaddflow.solution.linking import Links
from coaddflow.solution.positions import StarPositions, TractAstrometry
from coaddflow.solution.waves import WaveField, fit_residuals

_LOG = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_TOLERANCE, _MOST_STEPS = 1e-3, 200
"""Of the conjugate gradients of one linearisation, which need not be exact."""

_SETTLED = 0.03
"""The solution is settled when detections move by less than this part of their errors, rms."""

_TESTED_STARS = 2000
"""Of an exposure, to choose its order."""

_N_STAR = 5
"""Parameters of a star."""


def solve_astrometry(
    detections: Detections,
    links: Links,
    exposures: Exposures,
    references: ReferenceStars,
    color: FloatArray,
    maps: DetectorMaps,
    frame: TractFrame,
    settings: TractAstrometrySettings,
    turbulence: WaveSettings,
    withheld: BoolArray | None = None,
) -> TractAstrometry:
    """Solve the positions of all exposures of a tract together.

    Parameters
    ----------
    detections : Detections
        Those with a star: ``detections.take(links.rows)``.
    links : Links
        Their stars.
    exposures : Exposures
        What they belong to.
    references : ReferenceStars
        The reference catalogue.
    color : ndarray of float64, shape (n stars,)
        Colours, mag; NaN where not known, which counts as the median.
    maps : DetectorMaps
        Pixels to the field, to begin with.
    frame : TractFrame
        Centre of the tract.
    settings : TractAstrometrySettings
        Orders, priors, clipping.
    turbulence : WaveSettings
        What the air leaves.
    withheld : ndarray of bool, shape (n stars,), optional
        Stars that are not used, to judge the solution.

    Raises
    ------
    InputError
        If no star is in the reference catalogue, or an exposure has too few stars for a map.
    """
    data = _prepare(
        detections, links, exposures, references, color, maps, frame, settings, withheld
    )
    solution = _first_solution(data, detections, maps, settings)
    for _ in range(settings.max_iterations):
        solution, moved = _linearised(data, solution, settings)
        if moved < _SETTLED:
            break
    for _ in range(turbulence.rounds if turbulence.enabled else 0):
        solution, system, placed = _with_stars(data, solution, settings)
        fields = _fit_fields(data, solution, system, placed, turbulence)
        solution, _ = _linearised(data, replace(solution, fields=fields), settings)
    return _with_stars(data, solution, settings)[0]


class _Data(NamedTuple):
    """What stays the same during the iterations, for n detections and m stars."""

    star: NDArray[np.int32]
    cells: Cells
    ends: NDArray[np.int64]
    """First detections of the exposures, and the number of all."""
    s: FloatArray
    t: FloatArray
    variance: FloatArray
    """Of the centroids along one axis, degrees^2, (n,)."""
    usable: BoolArray
    color: NDArray[np.float32]
    """Relative to the median, (m,)."""
    median_color: float
    exposures: Exposures
    stars: StarPositions
    """At their a priori values."""
    prior: FloatArray
    """Inverse variances of these, (m, 5)."""
    has_motions: bool
    maps: DetectorMaps
    """Those at the start."""


class _Placed(NamedTuple):
    """Where the detections are for given parameters."""

    field: FloatArray
    """In units of its radius, (n, 2)."""
    plane: FloatArray
    """By the polynomials alone, degrees, (n, 2)."""
    residual: FloatArray
    """Position minus that of the star, degrees, (n, 2)."""


def _prepare(
    detections: Detections,
    links: Links,
    exposures: Exposures,
    references: ReferenceStars,
    color: FloatArray,
    maps: DetectorMaps,
    frame: TractFrame,
    settings: TractAstrometrySettings,
    withheld: BoolArray | None,
) -> _Data:
    relative, median = relative_colors(color)
    n_ccds, same = len(maps), np.zeros(len(exposures), np.int32)
    error = np.hypot(detections.error, settings.error_floor) * maps.pixel_scale[detections.ccd]
    usable = np.isfinite(error) & np.isfinite(detections.x + detections.y)
    if withheld is not None:
        usable &= ~withheld[links.star]
    stars, prior = _prior_stars(links, references, frame, settings)
    s, t = maps.unit(detections.ccd, detections.x, detections.y)
    return _Data(
        star=links.star,
        cells=Cells.of(detections.exposure, detections.ccd, same, exposures.epoch, n_ccds),
        ends=detections.ends(len(exposures)),
        s=s,
        t=t,
        variance=error**2,
        usable=usable,
        color=relative.astype(np.float32),
        median_color=median,
        exposures=exposures,
        stars=stars,
        prior=prior,
        has_motions=settings.motions == "solved",
        maps=maps,
    )


def _prior_stars(
    links: Links,
    references: ReferenceStars,
    frame: TractFrame,
    settings: TractAstrometrySettings,
) -> tuple[StarPositions, FloatArray]:
    """Return the stars at their a priori values, and the inverse variances of these."""
    rows = np.flatnonzero(links.reference >= 0)
    if len(rows) == 0:
        raise InputError(
            "no star of the tract is in the reference catalogue, which fixes the sky",
            remedy="check refcat.path and the epoch of the catalogue",
        )
    there = links.reference[rows]
    parameters = np.zeros((len(links), _N_STAR))
    motion = frame.turned(references.ra[there], references.dec[there], references.motion[there])
    known = np.isfinite(motion).all(axis=1)
    parameters[rows[known], 2:4] = motion[known] / MAS
    distance = references.parallax[there]
    parameters[rows, 4] = np.nan_to_num(distance) / MAS
    sigma = np.full((len(links), _N_STAR), np.inf)
    sigma[rows, :2] = np.hypot(references.error[there], settings.reference_floor)[:, None]
    sigma[:, 2:4], sigma[:, 4] = settings.motion_sigma, settings.parallax_sigma
    sigma[rows[known], 2:4] = references.motion_error[there[known], None]
    far = np.isfinite(distance)
    sigma[rows[far], 4] = references.parallax_error[there[far]]
    stars = StarPositions(
        *(frame, references.year, links.longitude, links.latitude, parameters),
        covariance=np.zeros((len(links), _N_STAR, _N_STAR)),
    )
    return stars, (MAS / sigma) ** 2


def _first_solution(
    data: _Data, detections: Detections, maps: DetectorMaps, settings: TractAstrometrySettings
) -> TractAstrometry:
    """Fit each exposure to the positions that its calexps have."""
    exposures, frame, radius = data.exposures, data.stars.frame, maps.radius
    most = len(term_powers(settings.order))
    solution = TractAstrometry(
        frame=frame,
        exposures=exposures,
        detectors=maps,
        radius=radius,
        constants=np.zeros((int(exposures.epoch.max()) + 1, len(maps), 2)),
        coefficients=np.zeros((len(exposures), 2, most)),
        n_terms=np.zeros(len(exposures), np.int64),
        dispersion=np.zeros(len(exposures.bands)),
        median_color=data.median_color,
        stars=data.stars,
        excess=np.zeros(len(exposures)),
        fields=(None,) * len(exposures),
        kept=data.usable,
    )
    field = _field(data, solution) / radius
    for number, rows in enumerate(rows_between(data.ends)):
        some = np.flatnonzero(data.usable[rows])
        some = rows.start + some[:: len(some) // _TESTED_STARS + 1]
        ccds, name = detections.ccd[some], exposures.name[number]
        order = supported_map_order(field[some], ccds, maps, name, settings)
        sky = frame.of_sky(detections.ra[some], detections.dec[some])
        plane = np.stack(tan_project(*sky, *solution.pointings[number]), axis=1)
        found = np.linalg.lstsq(design_matrix(*field[some].T, order), plane, rcond=None)[0]
        solution.n_terms[number] = len(found)
        solution.coefficients[number, :, : len(found)] = found.T
    return solution


def supported_map_order(
    field: FloatArray,
    ccds: NDArray,
    maps: DetectorMaps,
    name: str,
    settings: TractAstrometrySettings,
) -> int:
    """Return the order of an exposure's polynomial that its stars support on their CCDs.

    Parameters
    ----------
    field : ndarray of float64, shape (n, 2)
        Field positions of the stars, in units of its radius.
    ccds : ndarray of int, shape (n,)
        Their CCDs, as numbers in ``maps``.
    maps : DetectorMaps
        Pixels to the field.
    name : str
        The exposure, for the message.
    settings : TractAstrometrySettings
        Highest order and limits.

    Raises
    ------
    InputError
        If they do not support the first order.
    """
    edge = np.moveaxis(maps.corners[np.unique(ccds)], 1, 0).reshape(2, -1) / maps.radius
    order = supported_order(field.T, edge, settings.order, settings)
    if order == 0:
        raise InputError(
            f"exposure {name} has {len(field)} stars for a map of the sky, which are too few",
            remedy="leave it out of the solution (exclude)",
        )
    return order


def _field(data: _Data, solution: TractAstrometry) -> FloatArray:
    """Return the field positions of all detections, degrees, (n, 2)."""
    maps, constants = solution.detectors, solution.constants
    of_epochs = np.repeat(maps.coefficients[None], len(constants), axis=0)
    of_epochs[..., 0] += constants
    coefficients = of_epochs.reshape(-1, *maps.coefficients.shape[1:])
    field = np.zeros((len(data.star), 2))
    evaluate_polynomials(data.cells.start, data.cells.epoch, data.s, data.t, coefficients, field)
    return field


def _place(data: _Data, solution: TractAstrometry) -> _Placed:
    """Put all detections to the sky."""
    field = _field(data, solution) / solution.radius
    plane = np.zeros_like(field)
    every = np.arange(len(data.exposures), dtype=np.int32)
    evaluate_polynomials(data.ends, every, *field.T, solution.coefficients, plane)
    residual = plane.copy()
    years, factors = solution.times
    color_vector = solution.dispersion[data.exposures.band, None] * solution.zenith
    for number, rows in enumerate(rows_between(data.ends)):
        star = data.star[rows]
        sky = solution.stars.at(star, years[number], factors[number])
        residual[rows] -= np.stack(tan_project(*sky, *solution.pointings[number]), axis=1)
        residual[rows] -= np.multiply.outer(data.color[star], color_vector[number])
        if (waves := solution.fields[number]) is not None:
            residual[rows] += waves.value(plane[rows]) / MAS
    return _Placed(field, plane, residual)


def _system(
    data: _Data, solution: TractAstrometry, field: FloatArray, settings: TractAstrometrySettings
) -> BlockSystem:
    """Return the linear equations near a solution, with its weights."""
    exposures, maps = data.exposures, solution.detectors
    years, factors = solution.times
    design = np.zeros((len(exposures), 2, _N_STAR))
    design[:, [0, 1], [0, 1]] = 1.0
    if data.has_motions:
        design[:, [0, 1], [2, 3]] = years[:, None]
        design[:, :, 4] = factors
    variance = data.variance + np.repeat((solution.excess / MAS) ** 2, np.diff(data.ends))
    weight = np.divide(1.0, variance, out=np.zeros_like(variance), where=solution.kept)
    n_own = len(term_powers(settings.detector_order))
    n_epochs, n_ccds = solution.constants.shape[:2]
    order = min(_common_order(solution.n_terms), settings.detector_order)
    return BlockSystem(
        cells=data.cells,
        u=field[:, 0].astype(np.float32),
        v=field[:, 1].astype(np.float32),
        s=data.s.astype(np.float32),
        t=data.t.astype(np.float32),
        star=data.star,
        weight=weight.astype(np.float32),
        color=data.color,
        turn=_turns(data.cells, solution),
        color_vector=-solution.zenith * settings.dispersion,
        color_index=exposures.band,
        star_design=design,
        star_prior=data.prior,
        n_terms=solution.n_terms,
        shape=Parameters(
            solution.coefficients,
            np.zeros((n_ccds, 2, n_own)),
            np.zeros((n_epochs * n_ccds, 2)),
            solution.dispersion,
        ),
        n_ccds=n_ccds,
        detector_prior=float((settings.detector_sigma * maps.pixel_scale.mean()) ** -2),
        constant_prior=float((settings.shift_sigma * maps.pixel_scale.mean()) ** -2),
        fixed=gauge_conditions(maps, order, settings.detector_order),
    )


def _common_order(n_terms: NDArray[np.int64]) -> int:
    """Return the order that the polynomials of all exposures have."""
    return order_of(int(n_terms.min()))


def _turns(cells: Cells, solution: TractAstrometry) -> NDArray[np.float32]:
    """Return the derivative of the plane by the field at the centre of each cell, (m, 2, 2)."""
    step = 1e-3
    centre = solution.detectors.coefficients[:, :, 0][cells.detector] / solution.radius
    order = order_of(solution.coefficients.shape[-1])
    of_cell = solution.coefficients[cells.exposure]
    slopes = []
    for axis in np.eye(2):
        difference = design_matrix(*(centre + step * axis).T, order)
        difference -= design_matrix(*(centre - step * axis).T, order)
        slopes.append(np.einsum("mt,mat->ma", difference, of_cell))
    return (np.stack(slopes, axis=2) / (2.0 * step * solution.radius)).astype(np.float32)


def _with_stars(
    data: _Data, solution: TractAstrometry, settings: TractAstrometrySettings
) -> tuple[TractAstrometry, BlockSystem, _Placed]:
    """Solve the stars for given maps, reject outliers, and weigh the exposures by their scatter.

    Returned are also the equations with the new weights, and the detections.
    """
    placed = _place(data, solution)
    for is_last in (False, True):
        system = _system(data, solution, placed.field, settings)
        pull = data.stars.parameters - solution.stars.parameters
        change = system.star_step(placed.residual, pull)
        for number, rows in enumerate(rows_between(data.ends)):
            placed.residual[rows] -= change[data.star[rows]] @ system.star_design[number].T
        stars = replace(
            solution.stars,
            parameters=solution.stars.parameters + change,
            covariance=system.star_covariance,
        )
        solution = replace(solution, stars=stars)
        if not is_last:
            solution = _weighed(data, solution, system, placed, settings)
    return solution, system, placed


def _weighed(
    data: _Data,
    solution: TractAstrometry,
    system: BlockSystem,
    placed: _Placed,
    settings: TractAstrometrySettings,
) -> TractAstrometry:
    """Measure the scatter of each exposure and reject outliers, from residuals of all stars."""
    kept, excess = solution.kept.copy(), solution.excess.copy()
    for number, rows in enumerate(rows_between(data.ends)):
        extra, kept[rows] = judge_residuals(
            *(placed.residual[rows], data.variance[rows], system.leverage[rows]),
            *(kept[rows], data.usable[rows], settings.clip_sigma),
        )
        excess[number] = np.sqrt(extra) * MAS
    return replace(solution, kept=kept, excess=excess)


def _linearised(
    data: _Data, solution: TractAstrometry, settings: TractAstrometrySettings
) -> tuple[TractAstrometry, float]:
    """Return an improved solution, and by how many sigma detections have moved, rms."""
    solution, system, placed = _with_stars(data, solution, settings)
    n_own = system.shape.detectors.shape[-1]
    change, steps = solve_step(
        system,
        placed.residual,
        (
            solution.detectors.coefficients[..., :n_own] - data.maps.coefficients[..., :n_own],
            solution.constants.reshape(-1, 2),
        ),
        _TOLERANCE,
        _MOST_STEPS,
    )
    size = system.size_of(change)
    _LOG.info(
        "%d of %d detections, scatter beyond errors %.2f mas; moved by %.3f sigma (%d steps)",
        *(system.n_used, len(data.star), np.median(solution.excess), size, steps),
    )
    solution = replace(
        solution,
        coefficients=solution.coefficients + change.exposures,
        detectors=solution.detectors.moved(change.detectors),
        constants=solution.constants + change.constants.reshape(solution.constants.shape),
        dispersion=solution.dispersion + change.colors,
    )
    return solution, size


def _fit_fields(
    data: _Data,
    solution: TractAstrometry,
    system: BlockSystem,
    placed: _Placed,
    settings: WaveSettings,
) -> tuple[WaveField | None, ...]:
    """Fit what the air leaves in each exposure, relative to the other exposures of its stars."""
    return tuple(
        fit_residuals(
            *(placed.plane[rows], placed.residual[rows] * MAS, system.weight[rows] / MAS**2),
            *(system.leverage[rows], float(solution.excess[number]), solution.fields[number]),
            settings,
        )
        for number, rows in enumerate(rows_between(data.ends))
    )
