"""Squares of pixels around n positions on any plane of an image."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def cut_stamps(
    plane: NDArray, x: ArrayLike, y: ArrayLike, half: int
) -> tuple[NDArray, NDArray[np.bool_]]:
    """Return squares of 2 half + 1 pixels on a side, centred on (round(x), round(y)).

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
