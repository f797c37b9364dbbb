"""Overlaps of many footprints with many tracts at once, against clipping one after the other."""

import numpy as np
import pytest
from regions import overlaps_by_clipping

from coaddflow.geometry import polygon, sphere
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.skymap.tract import footprint_overlaps


def outlines(rng, n, around, spread, half):
    """Return (ra, dec), shape (n, 32), of bowed quadrangles around a position, degrees."""
    t = np.arange(8) / 8
    bow = 1.0 + 0.08 * rng.uniform(-1, 1, (n, 1)) * t * (1 - t)
    x = np.concatenate([np.broadcast_to(2 * t - 1, (n, 8)), bow], axis=1)
    y = np.concatenate([-bow, np.broadcast_to(2 * t - 1, (n, 8))], axis=1)
    x, y = half * np.concatenate([x, -x], axis=1), half * np.concatenate([y, -y], axis=1)
    turn = rng.uniform(0, 2 * np.pi, (n, 1))
    centre = rng.uniform(-spread, spread, (2, n, 1))
    xi = np.cos(turn) * x - np.sin(turn) * y + centre[0]
    eta = np.sin(turn) * x + np.cos(turn) * y + centre[1]
    return sphere.tan_deproject(xi, eta, *around)


@pytest.mark.parametrize(
    ("around", "spread", "half"),
    [
        ((150.1, 2.2), 1.5, 0.1),  # around a corner of tracts
        ((0.0, 0.0), 1.5, 0.02),
        ((10.0, -89.9), 1.0, 0.3),
        ((200.0, 45.0), 20.0, 2.0),  # larger than tracts
    ],
)
def test_all_at_once_are_those_of_clipping_one_by_one(around, spread, half):
    rng = np.random.default_rng(11)
    skymap = make_skymap(SkymapSettings())
    ra, dec = outlines(rng, 25, around, spread, half)
    vectors = sphere.to_vector(ra, dec)
    axis, radius = polygon.bounding_cap(vectors.reshape(-1, 3))
    near = skymap.tracts_near(*map(float, sphere.from_vector(axis)), float(radius))
    tracts = [skymap.tract(number) for number in rng.permutation(near)[:40]]
    found = footprint_overlaps(vectors, tracts)
    assert len(found.patch) > 20
    rows = list(zip(*(part.tolist() for part in found), strict=True))
    for footprint in range(len(ra)):
        for number, tract in enumerate(tracts):
            expected = overlaps_by_clipping(tract, ra[footprint], dec[footprint])
            mine = [row[2:] for row in rows if row[:2] == (footprint, number)]
            assert [tract.patch_ids()[patch] for patch, *_ in mine] == [one[0] for one in expected]
            fractions = np.array([one[1:] for one in mine]).ravel()
            # areas of 1e6 square pixels have errors of 1e-8
            by_clipping = np.array([one[1:] for one in expected]).ravel()
            np.testing.assert_allclose(fractions, by_clipping, rtol=1e-10, atol=1e-12)
            # alone or with others: the same bits, in the databases of tracts and of the survey
            assert tract.patch_overlaps(ra[footprint], dec[footprint]) == [
                (tract.patch_ids()[patch], *rest) for patch, *rest in mine
            ]


def test_footprints_behind_the_tangent_point_are_cut_off():
    settings = SkymapSettings(
        kind="tangent",
        tangent={"ra": 40.0, "dec": 70.0, "width": 20, "height": 20},
        patch_inner_size=20000,
        pixel_scale=1.0,
    )
    tract = make_skymap(settings).tract(0)
    ra = np.array([[0.0, 80.0, 100.0, 350.0], [30.0, 50.0, 50.0, 30.0], [219.0, 221.0, 221.0, 219]])
    dec = np.array([[60.0, 60.0, 1.0, -40.0], [69.0, 69.0, 71.0, 71.0], [-71.0, -71, -69, -69]])
    found = footprint_overlaps(sphere.to_vector(ra, dec), [tract])
    for footprint in range(3):
        mine = found.footprint == footprint
        expected = overlaps_by_clipping(tract, ra[footprint], dec[footprint])
        assert [tract.patch_ids()[patch] for patch in found.patch[mine]] == [o[0] for o in expected]
        np.testing.assert_allclose(found.patch_fraction[mine], [o[1] for o in expected], rtol=1e-9)
    assert set(found.footprint.tolist()) == {0, 1}


def test_no_footprints_and_no_tracts():
    skymap = make_skymap(SkymapSettings())
    none = footprint_overlaps(np.empty((0, 32, 3)), [skymap.tract(9813)])
    assert [len(part) for part in none] == [0] * 5
    vectors = sphere.to_vector(*outlines(np.random.default_rng(1), 2, (150.1, 2.2), 0.1, 0.1))
    assert [len(part) for part in footprint_overlaps(vectors, [])] == [0] * 5
