"""Which exposures each pixel of a coadd is made of.

Where CCDs end, or a value is flagged or clipped, the pixels of a coadd are means of other
exposures than their neighbours, and their PSF is another one. A pixel has the number of its set of
exposures; the sets, each once, are a table. They are told apart by a signature of 64 bits, the
exclusive or of one random number for each exposure [1]_.

References
----------
.. [1] Zobrist 1970, Univ. of Wisconsin Tech. Rep. 88 (hashing of sets by exclusive or).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.coadd.clipping import FILLABLE, USABLE
from coaddflow.compiled import njit

_EMPTY = np.uint64(0)
_FEWEST_SLOTS = 1 << 10
_FAR = np.uint8(255)


@dataclass(frozen=True)
class InputSets:
    """The exposures of each pixel of a coadd."""

    index: NDArray[np.int32]
    """Number of the set of each pixel, shape (ny, nx); 0 where there is nothing."""
    members: NDArray[np.uint8]
    """Which inputs of the coadd belong to each set, a bit for each, the first in the highest bit
    (`numpy.packbits`), shape (n_sets, n_bytes); none to the first set."""
    filled: NDArray[np.bool_]
    """Whether the pixels are filled with flagged values (`coadd.fill_planes`), shape (n_sets,)."""
    n_inputs: int
    """Inputs of the coadd."""

    def used(self, numbers: ArrayLike) -> NDArray[np.bool_]:
        """Return which inputs belong to some sets, shape (..., n_inputs)."""
        members = self.members[numbers]
        return np.unpackbits(members, axis=-1, count=self.n_inputs).astype(bool)


class BlockSets(NamedTuple):
    """The sets of a block of pixels."""

    signature: NDArray[np.uint64]
    """Of each set, shape (n_sets,)."""
    members: NDArray[np.uint8]
    """As in `InputSets`."""
    filled: NDArray[np.bool_]
    """Likewise."""


def set_keys(n_inputs: int) -> NDArray[np.uint64]:
    """Return the random number of each input, and one more for filled pixels.

    They are always the same, so that coadds are.
    """
    return np.random.Generator(np.random.PCG64(0)).integers(
        1, np.iinfo(np.uint64).max, n_inputs + 1, np.uint64
    )


def number_sets(
    signature: NDArray[np.uint64],
    state: NDArray[np.uint8],
    chosen: Sequence[int],
    n_inputs: int,
    index: NDArray[np.int32],
) -> BlockSets:
    """Give the sets of a block numbers, in the order in which they come.

    Parameters
    ----------
    signature : ndarray of uint64, shape (ny, nx)
        Signatures of the pixels; 0 where there is nothing.
    state : ndarray of uint8, shape (n chosen, ny, nx)
        States of the values (`coadd.clipping`).
    chosen : sequence of int
        Which inputs these are.
    n_inputs : int
        Inputs of the coadd.
    index : ndarray of int32, shape (ny, nx)
        Gets the number of the set of each pixel.
    """
    n_slots, found = _FEWEST_SLOTS, -1
    while found < 0:
        slots, numbers = np.zeros(n_slots, np.uint64), np.zeros(n_slots, np.int32)
        first = np.zeros(n_slots, np.int64)
        found = _number(signature, slots, numbers, first, index)
        n_slots *= 4
    y, x = np.divmod(first[:found], signature.shape[1])
    here = state[:, y, x]
    filled = (signature[y, x] != _EMPTY) & ~(here == USABLE).any(axis=0)
    used = np.zeros((n_inputs, found), bool)
    used[list(chosen)] = here == np.where(filled, FILLABLE, USABLE)
    return BlockSets(signature[y, x], np.packbits(used, axis=0).T, filled)


@njit(nogil=True)
def _number(signature, slots, numbers, first, index):
    """Return how many signatures there are, -1 if the table of slots is small; fill ``index``.

    ``first`` gets the first pixel of each.
    """
    mask = np.uint64(slots.size - 1)
    n_found, zero = np.int32(0), np.int32(-1)
    last, last_number = np.uint64(0), np.int32(-1)
    for y in range(signature.shape[0]):
        for x in range(signature.shape[1]):
            one = signature[y, x]
            if one == last and last_number >= 0:
                index[y, x] = last_number
                continue
            last = one
            if one == 0:
                if zero < 0:
                    zero, first[n_found] = n_found, y * signature.shape[1] + x
                    n_found += np.int32(1)
                last_number = zero
            else:
                slot = one & mask
                while slots[slot] != one and slots[slot] != 0:
                    slot = (slot + np.uint64(1)) & mask
                if slots[slot] == 0:
                    if 2 * n_found >= slots.size:
                        return -1
                    slots[slot], numbers[slot] = one, n_found
                    first[n_found] = y * signature.shape[1] + x
                    n_found += np.int32(1)
                last_number = numbers[slot]
            index[y, x] = last_number
    return n_found


def no_sets(n_inputs: int) -> BlockSets:
    """Return the sets of a block in which there is nothing."""
    nothing = np.zeros((1, -(-n_inputs // 8)), np.uint8)
    return BlockSets(np.zeros(1, np.uint64), nothing, np.zeros(1, bool))


def join_sets(
    index: NDArray[np.int32],
    places: Sequence[tuple[slice, slice]],
    blocks: Sequence[BlockSets],
    n_inputs: int,
) -> InputSets:
    """Give the sets of a whole coadd numbers, whatever the blocks were.

    Parameters
    ----------
    index : ndarray of int32, shape (ny, nx)
        Numbers within the blocks; changed in place.
    places : sequence of tuple of slice
        Rows and columns of each block.
    blocks : sequence of BlockSets
        Their sets.
    n_inputs : int
        Inputs of the coadd.
    """
    parts = zip(no_sets(n_inputs), *blocks, strict=True)
    signature, members, filled = (np.concatenate(part) for part in parts)
    # ascending, so that the empty set, whose signature is 0, is the first
    signature, where = np.unique(signature, return_index=True)
    for place, block in zip(places, blocks, strict=True):
        new = np.searchsorted(signature, block.signature).astype(np.int32)
        index[place] = new[index[place]]
    return InputSets(index, members[where], filled[where], n_inputs)


@njit(nogil=True)
def add_key(state, wanted, key, signature):
    """Add an exposure to the signatures of the pixels of a row at which it is in a state."""
    for x in range(state.size):
        signature[x] ^= key if state[x] == wanted else np.uint64(0)


def near_change(index: NDArray[np.int32], radius: int) -> NDArray[np.bool_]:
    """Return the pixels within a radius of which the set of exposures is another one.

    Parameters
    ----------
    index : ndarray of int32, shape (ny, nx)
        Number of the set of each pixel.
    radius : int
        Pixels; of more than 254 it is 254. The pixel beside a change has a distance of 1.
    """
    radius = min(radius, int(_FAR) - 1)
    away = np.empty(index.shape, np.uint8)
    _find_changes(index, away)
    near = np.zeros(index.shape, bool)
    rows = np.arange(-radius, radius + 1)
    # the largest distance along the row, for each distance between rows
    reach = np.floor(np.sqrt(radius**2 - rows.astype(float) ** 2)).astype(np.uint8)
    _spread(away, rows, reach, near)
    return near


@njit(nogil=True)
def _find_changes(index, away):
    """Find the distance along the row to the nearest pixel beside another set, at most 255."""
    ny, nx = index.shape
    for y in range(ny):
        above, below = max(y - 1, 0), min(y + 1, ny - 1)
        for x in range(nx):
            own = index[y, x]
            changes = (index[above, x] != own) | (index[below, x] != own)
            changes |= (index[y, max(x - 1, 0)] != own) | (index[y, min(x + 1, nx - 1)] != own)
            away[y, x] = np.uint8(0) if changes else _FAR
        for x in range(1, nx):
            before = away[y, x - 1]
            away[y, x] = min(away[y, x], before + np.uint8(before < _FAR))
        for x in range(nx - 2, -1, -1):
            after = away[y, x + 1]
            away[y, x] = min(away[y, x], after + np.uint8(after < _FAR))


@njit(nogil=True)
def _spread(away, rows, reach, near):
    """Mark the pixels that have a change within reach, row by row."""
    ny, nx = away.shape
    for y in range(ny):
        for k in range(rows.size):
            other = y + rows[k]
            if other < 0 or other >= ny:
                continue
            for x in range(nx):
                near[y, x] |= away[other, x] <= reach[k]
