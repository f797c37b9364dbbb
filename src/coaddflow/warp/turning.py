"""Turning a CCD so that its rows run along those of the tract.

Resampling walks along the rows of the tract. Where these run along the columns of a CCD, each
pixel needs other rows of it, which are far apart in memory; where they run backwards, windows of
neighbouring pixels are not side by side in the order in which they are summed together
(`coaddflow.warp.windows`). To copy the CCD costs less than either.
"""

import numpy as np
from numpy.typing import NDArray

from coaddflow.image.masked_image import MaskedImage
from coaddflow.warp.mapping import PixelGrid

_BLOCK = 64
"""Rows and columns that are transposed together, in the cache."""

_LARGEST_SLOPE = 0.5
"""Of rows of the tract against columns of the CCD; in between, turning gains nothing."""

_LARGEST_DIFFERENCE = 0.2
"""Of neighbouring tract pixels from neighbouring pixels of the CCD: four of five are."""


def turn(pixels: MaskedImage, grid: PixelGrid) -> tuple[MaskedImage, PixelGrid]:
    """Turn a CCD and its mapping, if it pays, to rows that run along those of the tract.

    Parameters
    ----------
    pixels : MaskedImage
        Pixels of the CCD, shape (ny, nx).
    grid : PixelGrid
        Its pixels on the tract.

    Returns
    -------
    pixels : MaskedImage
        Those given, or a copy of shape (ny, nx) or (nx, ny).
    grid : PixelGrid
        The mapping to its pixels.
    """
    dx, dy = (float(np.nanmedian(np.diff(p, axis=1))) / grid.step for p in (grid.x, grid.y))
    is_transposed = abs(dx) < _LARGEST_SLOPE * abs(dy)
    along, across = (dy, dx) if is_transposed else (dx, dy)
    is_alike = abs(abs(along) - 1.0) + abs(across) <= _LARGEST_DIFFERENCE
    is_reversed = along < 0 and (is_transposed or is_alike)
    if not is_transposed and not is_reversed:
        return pixels, grid
    x, y = (grid.y, grid.x) if is_transposed else (grid.x, grid.y)
    if is_reversed:
        x = pixels.shape[0 if is_transposed else 1] - 1.0 - x
    planes = (pixels.image, pixels.variance, pixels.mask)
    turned = (_turned(plane, is_transposed, is_reversed) for plane in planes)
    return MaskedImage(*turned), grid._replace(x=x, y=y)


def _turned(plane: NDArray, is_transposed: bool, is_reversed: bool) -> NDArray:
    """Return a plane with rows and columns exchanged, or the order of columns, or both."""
    turned = np.empty(plane.shape[::-1] if is_transposed else plane.shape, plane.dtype)
    target = turned[:, ::-1] if is_reversed else turned
    if not is_transposed:
        target[:] = plane
        return turned
    for y in range(0, plane.shape[0], _BLOCK):
        rows = slice(y, y + _BLOCK)
        for x in range(0, plane.shape[1], _BLOCK):
            columns = slice(x, x + _BLOCK)
            target[columns, rows] = plane[rows, columns].T
    return turned
