"""How well positions and magnitudes of stars repeat between exposures.

References
----------
.. [1] Ivezic et al. 2018, LSST Science Requirements Document, LPM-17, section 3.3 (PA1, AM1).
.. [2] Roby & Zoghbi, DMTN-008 (how `validate_drp` computes them).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from coaddflow.geometry import sphere
from coaddflow.image.statistics import mad_sigma

FloatArray = NDArray[np.float64]

_MAS = 3.6e6
_MIN_EPOCHS = 3
"""Stars and pairs that are seen less often say little about their scatter."""


@dataclass(frozen=True)
class Repeatability:
    """Scatter between exposures."""

    value: float | None
    """None if nothing was seen often enough."""
    n: int
    """Pairs or stars behind it."""


def distance_repeatability(
    ra: FloatArray, dec: FloatArray, distance: float, width: float
) -> Repeatability:
    """Return AM1 [1]_: the scatter of the distance of two stars, median over the pairs, mas.

    For each pair of stars whose distance is within ``width`` of ``distance``, the standard
    deviation of its distance over the exposures that have both; LSST's AM1 has 5 arcmin, and 1
    arcmin to both sides [2]_.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n exposures, n stars)
        Measured positions, degrees; NaN where a star was not measured.
    distance, width : float
        Degrees.
    """
    middle = np.nanmedian(ra, axis=0), np.nanmedian(dec, axis=0)
    known = np.isfinite(middle[0])
    if np.count_nonzero(known) < 2:
        return Repeatability(None, 0)
    ra, dec = ra[:, known], dec[:, known]
    vectors = sphere.to_vector(middle[0][known], middle[1][known])
    chord = 2.0 * np.sin(np.radians(distance + width) / 2.0)
    i, j = cKDTree(vectors).query_pairs(chord, output_type="ndarray").reshape(-1, 2).T
    far = sphere.separation(*(m[known][k] for k in (i, j) for m in middle)) >= distance - width
    i, j = i[far], j[far]
    distances = sphere.separation(ra[:, i], dec[:, i], ra[:, j], dec[:, j]) * _MAS
    often = np.isfinite(distances).sum(axis=0) >= min(_MIN_EPOCHS, len(ra))
    if len(ra) < 2 or not often.any():
        return Repeatability(None, 0)
    scatter = np.nanstd(distances[:, often], axis=0, ddof=1)
    return Repeatability(float(np.median(scatter)), int(often.sum()))


def magnitude_repeatability(
    magnitude: FloatArray, noise: FloatArray
) -> tuple[Repeatability, float | None, float | None]:
    """Return PA1 [1]_, the photon limit, and the excess over it, in the unit of the magnitudes.

    PA1 is the scatter of a star's magnitude around its mean over the exposures: 1.4826 times the
    median absolute deviation of all stars together, corrected for the mean that was fitted. The
    photon limit is that of the same measurements if each had its photon noise alone, and the excess
    the root of the difference of their squares (negative if PA1 is below the limit).

    Parameters
    ----------
    magnitude, noise : ndarray of float64, shape (n exposures, n stars)
        Measured magnitudes, and their photon noise; NaN where a star was not measured.
    """
    n = np.isfinite(magnitude).sum(axis=0)
    often = n >= min(_MIN_EPOCHS, len(magnitude))
    if len(magnitude) < 2 or not often.any():
        return Repeatability(None, 0), None, None
    magnitude, noise, n = magnitude[:, often], noise[:, often], n[often]
    growth = np.sqrt(n / (n - 1.0))
    deviation = (magnitude - np.nanmean(magnitude, axis=0)) * growth
    seen = np.isfinite(deviation)
    value = mad_sigma(deviation[seen], 0.0)
    # the scatter of a mixture of Gaussians of these widths, measured in the same way
    quantiles = np.random.default_rng(0).normal(size=(64, int(seen.sum())))
    limit = mad_sigma((quantiles * noise[seen]).ravel(), 0.0)
    difference = value**2 - limit**2
    excess = float(np.sign(difference) * np.sqrt(abs(difference)))
    return Repeatability(value, int(often.sum())), limit, excess
