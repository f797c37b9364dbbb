"""From the pixels of a tract to those of a CCD, on a coarse grid.

A WCS costs far more per position than a resampling kernel costs per pixel, and is smooth. The
mapping is therefore solved for about every 32nd pixel and interpolated with cubics [1]_, which is
accurate to 1e-3 pixel for all but extreme distortions; `map_ccd` checks this and halves the step
otherwise. The grid depends on the CCD and the tract, not on the patch: a tract pixel is always
computed from the same numbers.

References
----------
.. [1] Bertin et al. 2002, ASP Conf. Ser. 281, 228 (SWarp: approximation of the projection on a
   grid).
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.polynomial import polynomial
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.box import Box
from coaddflow.skymap.tract import Tract

if TYPE_CHECKING:
    from astropy.wcs import WCS

_MARGIN_STEPS = 5
"""Nodes beyond the CCD: 2 for the cubics, 2 for the derivatives there, 1 for rounding."""

_INVERSE_ORDER = 5
_MAX_ITERATIONS = 12
_CONVERGED = 1e-6
"""Pixels; the step after the last would be smaller by orders of magnitude."""

_MIN_STEP = 4


class PixelGrid(NamedTuple):
    """CCD pixel positions of the pixels of a tract, on the nodes of a grid."""

    x0: int
    """Tract column of the first node, a multiple of ``step``."""
    y0: int
    """Tract row of the first node, a multiple of ``step``."""
    step: int
    """Distance of the nodes in tract pixels."""
    x: NDArray[np.float64]
    """Column of the CCD at each node, 0-based, shape (rows, columns); NaN far outside the CCD."""
    y: NDArray[np.float64]
    """Row of the CCD at each node, likewise."""
    area: NDArray[np.float64]
    """Area of a tract pixel in CCD pixels, shape (rows, columns); NaN one or two nodes earlier."""


def map_ccd(
    ccd_wcs: "WCS", shape: tuple[int, int], tract: Tract, step: int = 32, tolerance: float = 1e-3
) -> PixelGrid:
    """Map the tract's pixels around a CCD to pixels of the CCD, on a grid that covers it.

    The WCS is evaluated only from pixels to sky, on the CCD and a narrow margin: far outside the
    CCD the polynomials of TPV and SIP fold back.

    Parameters
    ----------
    ccd_wcs, shape : astropy.wcs.WCS, tuple of int
        WCS of the CCD, any projection and distortion, and its shape (ny, nx).
    tract : Tract
        The tract.
    step : int
        Spacing of the nodes, tract pixels; smaller for small CCDs.
    tolerance : float
        Largest error of the interpolated mapping, CCD pixels.

    Raises
    ------
    InputError
        If the WCS cannot be inverted on the CCD.
    """
    step = max(_MIN_STEP, min(step, min(shape) // 8))
    while True:
        grid = _solve_grid(ccd_wcs, shape, tract, step)
        error = mapping_error(grid, ccd_wcs, shape, tract)
        if error <= tolerance:
            return grid
        if step <= _MIN_STEP:
            raise InputError(
                "the WCS of a CCD cannot be inverted on all of its pixels "
                f"(error of the mapping {error:.2g} pixels)",
                remedy="look at the astrometric solution of this CCD, or leave the CCD out",
            )
        step = max(_MIN_STEP, step // 2)


def interpolate(grid: PixelGrid, x: ArrayLike, y: ArrayLike) -> tuple[NDArray, NDArray, NDArray]:
    """Return CCD pixel (x, y) and pixel area at any tract pixels, shape (n,).

    Cubic polynomials through four nodes in each direction, as `coaddflow.warp.resample` uses them;
    NaN outside of the grid.
    """
    u = (np.asarray(x, float) - grid.x0) / grid.step
    v = (np.asarray(y, float) - grid.y0) / grid.step
    column, row = np.floor(u), np.floor(v)
    rows, columns = grid.x.shape
    inside = (column >= 1) & (column < columns - 2) & (row >= 1) & (row < rows - 2)
    column = np.where(inside, column, 1).astype(int)
    row = np.where(inside, row, 1).astype(int)
    weight_x, weight_y = cubic_weights(u - column), cubic_weights(v - row)
    values = []
    for plane in (grid.x, grid.y, grid.area):
        total = np.zeros(u.shape)
        for j in range(4):
            line = sum(weight_x[i] * plane[row + j - 1, column + i - 1] for i in range(4))
            total += weight_y[j] * line
        values.append(np.where(inside, total, np.nan))
    return tuple(values)


def cubic_weights(t: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Return the weights of the values at -1, 0, 1, 2 in the cubic through them at ``t``."""
    return (
        -t * (t - 1.0) * (t - 2.0) / 6.0,
        (t + 1.0) * (t - 1.0) * (t - 2.0) / 2.0,
        -(t + 1.0) * t * (t - 2.0) / 2.0,
        (t + 1.0) * t * (t - 1.0) / 6.0,
    )


def mapping_error(
    grid: PixelGrid, ccd_wcs: "WCS", shape: tuple[int, int], tract: Tract, n: int = 23
) -> float:
    """Return the largest error of an interpolated mapping on a CCD.

    Parameters
    ----------
    grid : PixelGrid
        The grid to check.
    ccd_wcs, shape, tract
        The input of `map_ccd`.
    n : int
        The check is made at n x n positions, incommensurate with the grid.

    Returns
    -------
    float
        CCD pixels; infinite if a pixel of the CCD is not covered.
    """
    ny, nx = shape
    x, y = np.meshgrid(np.linspace(-0.5, nx - 0.5, n), np.linspace(-0.5, ny - 0.5, n))
    x, y = x.ravel(), y.ravel()
    x_found, y_found, area = interpolate(grid, *_to_tract(ccd_wcs, tract, x, y))
    error = np.hypot(x_found - x, y_found - y)
    return float(error.max()) if np.all(np.isfinite(error) & np.isfinite(area)) else float("inf")


def _to_tract(ccd_wcs: "WCS", tract: Tract, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """Return the tract pixels of CCD pixels."""
    return tract.sky_to_pixel(*ccd_wcs.all_pix2world(x, y, 0))


def _solve_grid(ccd_wcs: "WCS", shape: tuple[int, int], tract: Tract, step: int) -> PixelGrid:
    """Solve the mapping on the nodes around a CCD."""
    ny, nx = shape
    margin = _MARGIN_STEPS * step / _smallest_scale(ccd_wcs, shape, tract)
    x, y = np.meshgrid(
        np.linspace(-margin, nx - 1 + margin, 41), np.linspace(-margin, ny - 1 + margin, 41)
    )
    lattice = _lattice(ccd_wcs, tract, x.ravel(), y.ravel())
    low = [int(np.floor(np.min(position) / step)) for position in lattice]
    high = [int(np.ceil(np.max(position) / step)) for position in lattice]
    node_x, node_y = np.meshgrid(
        np.arange(low[0], high[0] + 1) * float(step), np.arange(low[1], high[1] + 1) * float(step)
    )
    guess = _guess_inverse(lattice, (x.ravel(), y.ravel()), (node_x, node_y))
    solved = _refine(ccd_wcs, tract, (node_x, node_y), guess, (nx, ny, margin), step)
    area = _determinant(*solved, step)
    return PixelGrid(low[0] * step, low[1] * step, step, solved[0], solved[1], area)


def _lattice(ccd_wcs: "WCS", tract: Tract, x: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """Return the tract pixels of CCD pixels; raise InputError unless all have one."""
    positions = _to_tract(ccd_wcs, tract, x, y)
    if not np.all(np.isfinite(positions)):
        raise InputError(
            "the WCS of a CCD puts it far outside of the tract",
            remedy="look at the astrometric solution of this CCD, or leave the CCD out",
        )
    return positions


def _smallest_scale(ccd_wcs: "WCS", shape: tuple[int, int], tract: Tract) -> float:
    """Return the smallest extent of a CCD pixel in tract pixels, along rows or columns."""
    x, y = np.meshgrid(np.linspace(0.0, shape[1], 17), np.linspace(0.0, shape[0], 17))
    u, v = (p.reshape(x.shape) for p in _lattice(ccd_wcs, tract, x.ravel(), y.ravel()))
    lengths = [
        np.hypot(np.diff(u, axis=axis), np.diff(v, axis=axis)).min() / (size / 16.0)
        for axis, size in enumerate(shape)
    ]
    return float(max(min(lengths), 0.1))


def _guess_inverse(
    tract_pixels: tuple[NDArray, NDArray],
    ccd_pixels: tuple[NDArray, NDArray],
    nodes: tuple[NDArray, NDArray],
) -> tuple[NDArray, NDArray]:
    """Return CCD pixels of the nodes from a polynomial fit to a lattice of CCD pixels."""
    scaled_fit, scaled_nodes = [], []
    for position, node in zip(tract_pixels, nodes, strict=True):
        centre, half = 0.5 * (position.max() + position.min()), 0.5 * np.ptp(position)
        scaled_fit.append((position - centre) / half)
        scaled_nodes.append((node - centre) / half)
    powers = np.arange(_INVERSE_ORDER + 1)
    keep = np.add.outer(powers, powers) <= _INVERSE_ORDER
    design = polynomial.polyvander2d(*scaled_fit, (_INVERSE_ORDER,) * 2)[:, keep.ravel()]
    coefficients = np.zeros((*keep.shape, 2))
    coefficients[keep] = np.linalg.lstsq(design, np.stack(ccd_pixels, axis=1), rcond=None)[0]
    x, y = (polynomial.polyval2d(*scaled_nodes, coefficients[..., k]) for k in (0, 1))
    return x, y


def _refine(
    ccd_wcs: "WCS",
    tract: Tract,
    nodes: tuple[NDArray, NDArray],
    guess: tuple[NDArray, NDArray],
    limits: tuple[int, int, float],
    step: int,
) -> tuple[NDArray, NDArray]:
    """Improve the guess with the exact WCS, along the derivative of the guess (chord method)."""
    nx, ny, margin = limits
    near = (guess[0] >= -margin - 1) & (guess[0] <= nx + margin)
    near &= (guess[1] >= -margin - 1) & (guess[1] <= ny + margin)
    dx_dv, dx_du = (slope[near] / step for slope in np.gradient(guess[0]))
    dy_dv, dy_du = (slope[near] / step for slope in np.gradient(guess[1]))
    x, y = guess[0][near], guess[1][near]
    change = np.full(x.shape, np.inf)
    for _ in range(_MAX_ITERATIONS):
        u, v = _to_tract(ccd_wcs, tract, x, y)
        u, v = nodes[0][near] - u, nodes[1][near] - v
        step_x, step_y = dx_du * u + dx_dv * v, dy_du * u + dy_dv * v
        x, y = x + step_x, y + step_y
        change = np.hypot(step_x, step_y)
        if np.all(change < _CONVERGED):
            break
    good = change < _CONVERGED
    solved = np.full((2, *nodes[0].shape), np.nan)
    solved[0][near] = np.where(good, x, np.nan)
    solved[1][near] = np.where(good, y, np.nan)
    return solved[0], solved[1]


def _determinant(x: NDArray, y: NDArray, step: int) -> NDArray[np.float64]:
    """Return the area of a tract pixel in CCD pixels, by differences of fourth order."""

    def slope(values: NDArray, axis: int) -> NDArray:
        result = np.full(values.shape, np.nan)
        moved, target = np.moveaxis(values, axis, 0), np.moveaxis(result, axis, 0)
        target[2:-2] = (moved[:-4] - moved[4:] + 8.0 * (moved[3:-1] - moved[1:-3])) / (12.0 * step)
        return result

    return np.abs(slope(x, 1) * slope(y, 0) - slope(x, 0) * slope(y, 1))


def footprint_box(ccd_wcs: "WCS", shape: tuple[int, int], tract: Tract) -> Box:
    """Return the box of tract pixels around a CCD, with a margin of two pixels."""
    ny, nx = shape
    along_x, along_y = np.linspace(-0.5, nx - 0.5, 65), np.linspace(-0.5, ny - 0.5, 65)
    low, high = np.full(65, -0.5), np.full(65, 1.0)
    x = np.concatenate([along_x, along_x, low, high * nx - 0.5])
    y = np.concatenate([low, high * ny - 0.5, along_y, along_y])
    u, v = _lattice(ccd_wcs, tract, x, y)
    return (
        int(np.floor(u.min())) - 2,
        int(np.floor(v.min())) - 2,
        int(np.ceil(u.max())) + 3,
        int(np.ceil(v.max())) + 3,
    )
