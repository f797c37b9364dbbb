"""Fluxes of stars on an image beside those that they have: faint, bright, and saturated."""

import itertools
from typing import NamedTuple

import numpy as np
import sep
from numpy.typing import NDArray

from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import mad_sigma

FloatArray = NDArray[np.float64]


class Bias(NamedTuple):
    """A mean deviation with its statistical error; NaN if there are too few stars."""

    value: float
    error: float
    n: int


def flux_deviation(
    residual: NDArray, x: FloatArray, y: FloatArray, radius: float, expected: FloatArray
) -> FloatArray:
    """Return flux / true flux - 1 of stars in a circle, NaN where a pixel has no value.

    Parameters
    ----------
    residual : ndarray, shape (ny, nx)
        Image without the light of the true sky, as the same exposures would show it.
    x, y : ndarray of float64, shape (n,)
        True positions, pixels.
    radius : float
        Of the circle, pixels.
    expected : ndarray of float64, shape (n,)
        True flux in the circle.
    """
    missing = ~np.isfinite(residual)
    excess, _, flags = sep.sum_circle(
        np.where(missing, 0.0, residual), x, y, radius, mask=missing, subpix=5
    )
    spoilt = (flags & (sep.APER_TRUNC | sep.APER_HASMASKED | sep.APER_ALLMASKED)) != 0
    return np.where(spoilt, np.nan, excess / expected)


def typical(deviation: FloatArray, least: int = 5) -> Bias:
    """Return the median of deviations, with its error; at least so many must be known."""
    known = deviation[np.isfinite(deviation)]
    if known.size < least:
        return Bias(np.nan, np.nan, known.size)
    middle = float(np.median(known))
    return Bias(middle, 1.2533 * mad_sigma(known, middle) / np.sqrt(known.size), known.size)


def by_bin(deviation: FloatArray, value: FloatArray, edges: list[float]) -> dict[str, Bias]:
    """Return `typical` deviations in bins of another quantity, by the name of the bin."""
    return {
        f"{low:g}-{high:g}": typical(deviation[(value >= low) & (value < high)])
        for low, high in itertools.pairwise(edges)
    }


def core_over_rim(image: NDArray, x: FloatArray, y: FloatArray, radius: float) -> FloatArray:
    """Return the mean of the 3 x 3 central pixels of stars over the largest value around them.

    The rim is the ring from 2 pixels to ``radius``, of which the 99th percentile is taken. For a
    star it is above 1; a core that was filled too low has less. NaN beyond the border.
    """
    half = int(np.ceil(radius))
    stamps, inside = cut_stamps(image, x, y, half)
    reach = np.arange(-half, half + 1)
    distance = np.hypot(reach[:, None], reach)
    ring = (distance > 2.0) & (distance <= radius)
    core = stamps[:, half - 1 : half + 2, half - 1 : half + 2].mean(axis=(1, 2))
    whole = inside.all(axis=(1, 2)) & np.isfinite(stamps).all(axis=(1, 2))
    rim = np.full(len(stamps), np.nan)
    rim[whole] = np.percentile(stamps[whole][:, ring], 99.0, axis=1)
    return np.where(whole, core / rim, np.nan)
