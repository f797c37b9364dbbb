"""Polygons: clipping keeps the right area, outlines enclose, caps hold their points."""

import numpy as np
import pytest

from coaddflow.geometry import polygon, sphere

SQUARE = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])


def test_area_does_not_depend_on_sense_or_origin():
    assert polygon.area(SQUARE) == pytest.approx(4.0)
    assert polygon.area(SQUARE[::-1] + np.array([1e6, -3e6])) == pytest.approx(4.0)
    assert polygon.area(SQUARE[:2]) == 0.0


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-1, -1, 3, 3), 4.0),  # the box holds the square
        ((0.5, 0.5, 1.0, 1.5), 0.5),  # the square holds the box
        ((1, 1, 5, 5), 1.0),  # corners overlap
        ((2, 0, 4, 2), 0.0),  # a common edge only
        ((3, 3, 4, 4), 0.0),
    ],
)
def test_clipped_area(box, expected):
    assert polygon.area_in_box(SQUARE, box) == pytest.approx(expected, abs=1e-12)


def test_clip_of_a_shape_that_is_not_convex():
    # a U of three unit-wide bars; the box holds the inside of the U and half of each side bar
    u = np.array([[0, 0], [3, 0], [3, 3], [2, 3], [2, 1], [1, 1], [1, 3], [0, 3]], dtype=float)
    assert polygon.area(u) == pytest.approx(7.0)
    assert polygon.area_in_box(u, (0.5, 1.0, 2.5, 3.0)) == pytest.approx(2.0)
    # only the gap between the bars: nothing
    assert polygon.area_in_box(u, (1.2, 1.2, 1.8, 5.0)) == pytest.approx(0.0)


def test_clipped_area_against_counting():
    rng = np.random.default_rng(5)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
    shape = rng.uniform(1, 3, 9)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    box = (-1.0, -2.0, 1.7, 0.8)
    x, y = rng.uniform(box[0], box[2], 40000), rng.uniform(box[1], box[3], 40000)
    counted = polygon.contains(shape, x, y).mean() * 2.7 * 2.8
    assert polygon.area_in_box(shape, box) == pytest.approx(counted, abs=0.06)


def test_contains():
    x = np.array([1.0, 3.0, -0.1, 1.999, np.nan])
    y = np.array([1.0, 1.0, 1.0, 1.999, 1.0])
    assert polygon.contains(SQUARE, x, y).tolist() == [True, False, False, True, False]


def test_enclosing_outline_keeps_the_margin_and_is_exact_for_a_rectangle():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 4, 50))
    outline = np.stack(polygon.enclosing_outline(x, y, 0.3), axis=-1)
    for points_x, points_y, vertices in zip(x, y, outline, strict=True):
        for angle in np.linspace(0, 2 * np.pi, 40):
            moved = points_x + 0.2999 * np.cos(angle), points_y + 0.2999 * np.sin(angle)
            assert polygon.contains(vertices, *moved).all()
    box_x, box_y = np.array([-1.0, 1.0, 1.0, -1.0]), np.array([-2.0, -2.0, 2.0, 2.0])
    exact = np.stack(polygon.enclosing_outline(box_x, box_y, 0.0), axis=-1)
    assert polygon.area(exact) == pytest.approx(8.0)
    # rotated by 0.2 rad: exact again if the outline is told so, larger if not
    turned_x = np.cos(0.2) * box_x - np.sin(0.2) * box_y
    turned_y = np.sin(0.2) * box_x + np.cos(0.2) * box_y
    told = np.stack(polygon.enclosing_outline(turned_x, turned_y, 0.0, start=0.2), axis=-1)
    untold = np.stack(polygon.enclosing_outline(turned_x, turned_y, 0.0), axis=-1)
    assert polygon.area(told) == pytest.approx(8.0)
    assert 8.01 < polygon.area(untold) < 8.6


@pytest.mark.parametrize(("ra", "dec"), [(0.0, 0.0), (359.95, -30.0), (12.0, 90.0), (0.0, -89.9)])
def test_bounding_cap(ra, dec):
    xi, eta = np.array([-0.3, 0.3, 0.3, -0.3]), np.array([-0.4, -0.4, 0.4, 0.4])
    corners = sphere.tan_deproject(xi, eta, ra, dec)
    axis, radius = polygon.bounding_cap(sphere.to_vector(*corners))
    assert sphere.separation(*sphere.from_vector(axis), ra, dec) == pytest.approx(0, abs=1e-9)
    assert radius == pytest.approx(0.5, rel=1e-4)
