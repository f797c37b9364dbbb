"""Work on the rows of an image, shared among threads.

Compiled functions and most of numpy let other threads run meanwhile. What is made of a row does not
depend on the blocks in which rows are taken, so the bits are those of one thread.
"""

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

from numpy.typing import NDArray

Result = TypeVar("Result")

_LEAST_ROWS = 32
"""Rows that are worth a block of their own."""

_BLOCKS_PER_THREAD = 2
"""So that no thread waits long for one that got a slow block, or a busy core."""


def over_rows(
    work: Callable[[int, int], Result], n_rows: int, threads: int = 1, least: int = _LEAST_ROWS
) -> list[Result]:
    """Do some work on blocks of rows, with threads.

    Parameters
    ----------
    work : callable
        ``work(first, last)`` does rows ``first`` to ``last - 1``. It changes nothing but these
        rows, what it makes of them may not depend on which others are in its block, and it does
        not call this function.
    n_rows : int
        Number of rows.
    threads : int
        Number of threads; with one there is one block, in this thread.
    least : int
        Least number of rows of a block.

    Returns
    -------
    list
        The results, in the order of the rows.
    """
    n_blocks = 1 if threads <= 1 else min(_BLOCKS_PER_THREAD * threads, n_rows // least)
    if n_blocks <= 1:
        return [work(0, n_rows)]
    edges = [block * n_rows // n_blocks for block in range(n_blocks + 1)]
    blocks = [_pool(threads).submit(work, *block) for block in itertools.pairwise(edges)]
    wait(blocks)  # all of them: after an error none works on
    return [block.result() for block in blocks]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return threads that wait for work: to start them each time takes as long as some of it."""
    return ThreadPoolExecutor(threads, "rows")


def on_rows(
    work: Callable[..., None], planes: Sequence[NDArray], *constants: Any, threads: int = 1
) -> None:
    """Do some work that changes planes in place, or fills them, row by row.

    Parameters
    ----------
    work : callable
        ``work(*parts, *constants)``, where the parts are the same rows of all planes.
    planes : sequence of ndarray, shape (ny, nx)
        What it is done on.
    *constants : object
        What it needs besides.
    threads : int
        See `over_rows`.
    """

    def block(first: int, last: int) -> None:
        work(*(plane[first:last] for plane in planes), *constants)

    over_rows(block, len(planes[0]), threads)
