import threading
import time

import numpy as np
import pytest

from coaddflow.image.row_blocks import on_rows, over_rows


@pytest.mark.parametrize("n_rows", [1, 7, 64, 65, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_blocks_tile_the_rows_in_order(n_rows, threads):
    blocks = over_rows(lambda first, last: (first, last), n_rows, threads, least=10)
    assert [0, *(last for _, last in blocks)] == [*(first for first, _ in blocks), n_rows]
    assert len(blocks) <= max(n_rows // 10, 1)
    assert (len(blocks) > 1) == (threads > 1 and n_rows >= 20)


def test_one_thread_is_the_one_that_calls():
    assert over_rows(lambda *_: threading.get_ident(), 1000) == [threading.get_ident()]
    others = over_rows(lambda *_: threading.get_ident(), 1000, 2)
    assert threading.get_ident() not in others


def test_what_a_block_raises_is_raised():
    def work(first, last):
        if first > 0:
            raise ValueError("of a row")

    with pytest.raises(ValueError, match="of a row"):
        over_rows(work, 1000, 2)


def test_after_an_error_no_block_works_on():
    ended = []

    def work(first, last):
        if first == 0:
            raise ValueError("of a row")
        time.sleep(0.05)
        ended.append(first)

    with pytest.raises(ValueError, match="of a row"):
        over_rows(work, 1000, 2)
    assert sorted(ended) == [250, 500, 750]


@pytest.mark.parametrize("threads", [1, 3])
def test_planes_are_changed_row_by_row(threads):
    plane, other = np.zeros((150, 4)), np.arange(600.0).reshape(150, 4)

    def work(plane, other, factor):
        plane += factor * other

    on_rows(work, (plane, other), 2.0, threads=threads)
    np.testing.assert_array_equal(plane, 2.0 * other)
