"""Hits whose places are known, on masks and images."""

import numpy as np

from coaddflow.qa.artifacts import group_hits, seen_at, touched, unmasked

SHAPE = (50, 60)


def test_pixels_that_touch_are_one_hit():
    x, y = np.array([10, 11, 12, 30, 40]), np.array([5, 6, 6, 20, 20])
    hits = group_hits(x, y, np.array([100.0, 900.0, 50.0, 70.0, 80.0]), SHAPE)
    assert sorted(zip(hits.x, hits.y, hits.peak, strict=True)) == [
        (11, 6, 900.0),
        (30, 20, 70.0),
        (40, 20, 80.0),
    ]
    assert len(group_hits(x[:0], y[:0], np.zeros(0), SHAPE).x) == 0


def test_strong_pixels_without_a_mask_are_left():
    x, y = np.array([10, 20, 30]), np.array([10, 20, 30])
    noise, masked = np.full(SHAPE, 10.0), np.zeros(SHAPE, bool)
    masked[20, 20] = True
    # 100 is masked, 60 is left, 40 is below 5 sigma
    assert unmasked(x, y, np.array([60.0, 100.0, 40.0]), noise, masked) == (1, 2)


def test_what_stands_out_at_a_place_is_seen():
    significance, usable = np.zeros(SHAPE), np.ones(SHAPE, bool)
    significance[11, 10] = 8.0
    significance[30, 30] = 8.0
    significance[40, 40] = 4.0
    usable[30, 30] = False
    x, y = np.array([10.4, 30.0, 40.0, 500.0]), np.array([10.2, 30.0, 40.0, 10.0])
    # the second is not usable, the third too faint, the fourth outside
    assert seen_at(x, y, significance, usable) == (1, 2)


def test_places_near_a_pixel_are_touched():
    plane = np.zeros(SHAPE, bool)
    plane[20, 20] = True
    x, y = np.array([18.0, 17.0, 20.3, -5.0]), np.array([22.0, 20.0, 19.8, 20.0])
    assert touched(x, y, plane, 2).tolist() == [True, False, True, False]
