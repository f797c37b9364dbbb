"""PSF models against stars that they were not made of.

References
----------
.. [1] Rowe 2010, MNRAS 404, 350 (residual sizes and ellipticities).
.. [2] Bernstein & Jarvis 2002, AJ 123, 583, section 3 (adaptive moments).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coaddflow.measure.psf_model import adaptive_moments


class Shapes(NamedTuple):
    """Sizes and ellipticities of images of stars; arrays of shape (n,)."""

    size: NDArray[np.float64]
    """Root of the mean second moment, pixels."""
    e1: NDArray[np.float64]
    e2: NDArray[np.float64]
    """Along the axes and the diagonals."""


def shapes_of(stamps: NDArray) -> Shapes:
    """Return the shapes of images, shape (n, k, k), by adaptive moments [2]_; NaN if none."""
    mxx, myy, mxy = adaptive_moments(stamps).T
    trace = mxx + myy
    return Shapes(np.sqrt(trace / 2.0), (mxx - myy) / trace, 2.0 * mxy / trace)


def shape_residuals(stars: NDArray, models: NDArray) -> Shapes:
    """Return the residuals of a PSF model [1]_: (star - model) / model in size, star - model in e.

    Parameters
    ----------
    stars, models : ndarray, shape (n, k, k)
        Images of stars without their sky, and of the model at their places, with the same
        positions within the pixel.
    """
    star, model = shapes_of(stars), shapes_of(models)
    return Shapes(star.size / model.size - 1.0, star.e1 - model.e1, star.e2 - model.e2)
