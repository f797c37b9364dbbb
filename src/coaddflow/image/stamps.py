"""Squares of pixels around positions."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cut_stamps(
    plane: NDArray, x: ArrayLike, y: ArrayLike, half: int
) -> tuple[NDArray, NDArray[np.bool_]]:
    """Return squares of pixels around positions.

    Parameters
    ----------
    plane : ndarray, shape (ny, nx)
        Any plane of an image.
    x, y : array_like, shape (n,)
        Positions; the central pixel of a square is (round(x), round(y)).
    half : int
        Squares have 2 half + 1 pixels on a side.

    Returns
    -------
    stamps : ndarray, shape (n, 2 half + 1, 2 half + 1)
        Pixels; beyond the border those of the border are repeated.
    inside : ndarray of bool, of the same shape
        False beyond the border.
    """
    ny, nx = plane.shape
    reach = np.arange(-half, half + 1)
    rows = np.rint(np.atleast_1d(y)).astype(int)[:, None] + reach
    columns = np.rint(np.atleast_1d(x)).astype(int)[:, None] + reach
    inside = ((rows >= 0) & (rows < ny))[:, :, None] & ((columns >= 0) & (columns < nx))[:, None]
    rows, columns = np.clip(rows, 0, ny - 1), np.clip(columns, 0, nx - 1)
    return plane[rows[:, :, None], columns[:, None, :]], inside
