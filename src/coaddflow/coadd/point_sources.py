"""How faint a point source a coadd shows: noise of a flux that is fitted with its PSF.

The flux of a point source that is fitted with the PSF has the variance V * A, where V is the
variance of a pixel whose noise is independent of its neighbours, and A the noise-equivalent area of
the PSF in pixels [1]_, 4 pi sigma^2 for a Gaussian. The pixels of a coadd are correlated: V is the
VARIANCE plane divided by the covariance factor of the warps (`warp.kernels.covariance_factor`).

References
----------
.. [1] King 1983, PASP 95, 163 (noise-equivalent area).
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from coaddflow.coadd.psf import PsfGrid
from coaddflow.image.masked_image import AB_ZERO_POINT

_DEPTH_SIGMA = 5.0

_ROWS_AT_A_TIME = 256


def depth_of(variance: ArrayLike, area: ArrayLike, covariance: float) -> NDArray[np.float32]:
    """Return the AB magnitude of a point source at 5 sigma.

    Parameters
    ----------
    variance : array_like
        Variance of the pixels, nJy^2. Where it is not finite or not positive there is no data, and
        the result is NaN.
    area : array_like
        Noise-equivalent area of the PSF, pixels; one, or one for each pixel.
    covariance : float
        Covariance factor of the pixels.
    """
    variance = np.asarray(variance)
    usable = np.isfinite(variance) & (variance > 0)
    noise = np.sqrt(np.where(usable, variance, np.nan) * (np.asarray(area) / covariance))
    return np.asarray(AB_ZERO_POINT - 2.5 * np.log10(_DEPTH_SIGMA * noise), np.float32)


def area_map(grid: PsfGrid, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return the noise-equivalent area of the PSF at each pixel of a coadd, in pixels.

    Linear between the points of the grid, constant beyond the last ones. A point without a PSF has
    the area of the nearest one that has one.

    Parameters
    ----------
    grid : PsfGrid
        The PSF on a grid, of which at least one point has one.
    shape : tuple of int
        Shape (ny, nx) of the coadd.
    """
    areas = grid.areas()
    nearest = ndimage.distance_transform_edt(
        np.isnan(areas), return_distances=False, return_indices=True
    )
    areas = areas[tuple(nearest)]
    column, row = (
        np.interp(np.arange(length), points, np.arange(points.size))
        for length, points in ((shape[1], grid.x), (shape[0], grid.y))
    )
    result = np.empty(shape, np.float32)
    for first in range(0, shape[0], _ROWS_AT_A_TIME):
        rows = slice(first, first + _ROWS_AT_A_TIME)
        places = np.meshgrid(row[rows], column, indexing="ij")
        ndimage.map_coordinates(areas, places, result[rows], order=1, mode="nearest")
    return result
