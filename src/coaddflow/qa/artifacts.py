"""What is left of cosmic rays and hot pixels whose true places are known."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

BoolArray = NDArray[np.bool_]


class Hits(NamedTuple):
    """Groups of neighbouring pixels of a CCD that something hit; arrays of shape (n,)."""

    x: NDArray[np.intp]
    y: NDArray[np.intp]
    """The strongest pixel of each."""
    peak: NDArray[np.float64]
    """Charge in that pixel."""


class Left(NamedTuple):
    """How much of something is left."""

    n_left: int
    n: int


def group_hits(
    x: NDArray[np.intp], y: NDArray[np.intp], charge: NDArray[np.float64], shape: tuple[int, int]
) -> Hits:
    """Join pixels that touch, also by a corner, to hits.

    Parameters
    ----------
    x, y, charge : ndarray, shape (n,)
        Pixels and the charge in them.
    shape : tuple of int
        That of the CCD, (ny, nx).
    """
    plane = np.zeros(shape)
    np.add.at(plane, (y, x), charge)
    labels, n = ndimage.label(plane > 0, np.ones((3, 3)))
    if n == 0:
        return Hits(np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0))
    places = np.array(ndimage.maximum_position(plane, labels, np.arange(1, n + 1)), np.intp)
    rows, columns = places.T
    return Hits(columns, rows, plane[rows, columns])


def unmasked(x: NDArray, y: NDArray, charge: NDArray, noise: NDArray, masked: BoolArray) -> Left:
    """Count the pixels hit by more than five times the noise, and those of them not masked.

    Parameters
    ----------
    x, y, charge : ndarray, shape (n,)
        Pixels and the charge in them.
    noise, masked : ndarray, shape (ny, nx)
        Noise of the pixels in the unit of the charge, and whether they are masked.
    """
    strong = charge > 5.0 * noise[y, x]
    return Left(int(np.count_nonzero(~masked[y[strong], x[strong]])), int(strong.sum()))


def seen_at(x: NDArray, y: NDArray, significance: NDArray, usable: BoolArray) -> Left:
    """Count the places at which an image shows more than five sigma in one of 3 x 3 pixels.

    Parameters
    ----------
    x, y : ndarray, shape (n,)
        Places, pixels.
    significance : ndarray, shape (ny, nx)
        Image without the light of the sky's sources, over its noise.
    usable : ndarray of bool, shape (ny, nx)
        Pixels that count; places on others are left out.
    """
    ny, nx = significance.shape
    column, row = np.rint(x).astype(int), np.rint(y).astype(int)
    inside = (column >= 0) & (column < nx) & (row >= 0) & (row < ny)
    column, row = column[inside], row[inside]
    near = ndimage.maximum_filter(np.where(usable, significance, -np.inf), 3)
    counted = usable[row, column]
    return Left(int(np.count_nonzero(near[row, column][counted] > 5.0)), int(counted.sum()))


def touched(x: NDArray, y: NDArray, plane: BoolArray, radius: int) -> BoolArray:
    """Return which places have a pixel of a plane within some pixels in each axis."""
    near = ndimage.maximum_filter(plane, 2 * radius + 1, mode="constant")
    ny, nx = plane.shape
    column, row = np.rint(x).astype(int), np.rint(y).astype(int)
    inside = (column >= 0) & (column < nx) & (row >= 0) & (row < ny)
    found = np.zeros(len(column), bool)
    found[inside] = near[row[inside], column[inside]]
    return found
