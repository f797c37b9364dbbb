"""The prediction misses nothing within its margin, is not wasteful, and is fast."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from regions import patches_touching, tracts_touching

from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.instrument.camera import load_camera
from coaddflow.instrument.footprint import check_footprint_within_prediction, predicted_footprints
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.coverage import predicted_overlaps, predicted_overlaps_of_images
from coaddflow.skymap.maps import make_skymap

MARGIN = 0.05
PLACES = [(150.0, 2.2), (0.01, -0.5), (359.98, 45.0), (80.0, 89.9), (5.0, -90.0), (211.0, 88.51)]


@pytest.fixture(scope="module")
def camera():
    """Return the demo camera with pixels so large that its field is 1.1 x 0.7 degrees."""
    demo = load_camera("demo")
    return demo.model_copy(update={"pixel_scale": 2.0, "distortion": (0.02, 0.01)})


@pytest.fixture(scope="module")
def skymap():
    return make_skymap(SkymapSettings())


def pointing(exposure, ra, dec, rotation=0.0):
    return SimpleNamespace(exposure=exposure, ra=ra, dec=dec, rotation=rotation)


@pytest.mark.parametrize("name", ["decam", "hsc", "demo"])
def test_without_a_margin_an_exposure_touches_what_it_touches(name, skymap):
    """Sides of the outline of such a camera have no length."""
    real = load_camera(name)
    rows = [pointing(str(i), 150.0 + 0.37 * i, 2.0 + 0.21 * i) for i in range(5)]
    without = predicted_overlaps(rows, real, skymap, 0.0)
    planned = predicted_overlaps(rows, real, skymap, 1e-4)
    for row in rows:
        centres = [real.footprint(d, row.ra, row.dec, 0.0, 1) for d in real.detectors]
        ra, dec = np.concatenate(centres, axis=1)
        for tract, patches in patches_hit(skymap, ra, dec).items():
            assert patches <= set(without[row.exposure][tract])
        for tract, patches in without[row.exposure].items():
            assert set(patches) <= set(planned[row.exposure][tract])


def image(exposure, ra, dec, half_size=0.1):
    xi, eta = half_size * np.array([[1, -1, -1, 1], [-1, -1, 1, 1]])
    corners = sphere.tan_deproject(xi, eta, ra, dec)
    return SimpleNamespace(exposure=exposure, footprint_ra=corners[0], footprint_dec=corners[1])


def turn(vectors, axis, angle):
    """Turn vectors about an axis by an angle in degrees (Rodrigues' formula)."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    along = (vectors @ axis)[:, None] * axis
    return along + cos * (vectors - along) + sin * np.cross(axis, vectors)


def patches_hit(skymap, ra, dec):
    """Return {tract: {patch}} of the outer boxes on which positions lie."""
    hit = {}
    tracts = np.unique(skymap.find_tract(ra, dec)).tolist()
    near = {i for t in tracts for i in skymap.tracts_near(skymap._ra[t], skymap._dec[t], 0.5)}
    for tract_id in sorted(near):
        tract = skymap.tract(tract_id)
        x, y = tract.sky_to_pixel(ra, dec)
        for patch in tract.patches():
            x0, y0, x1, y1 = (edge - 0.5 for edge in patch.outer_box)
            if ((x > x0) & (x < x1) & (y > y0) & (y < y1)).any():
                hit.setdefault(tract_id, set()).add(patch.id)
    return hit


def points_of(camera, exposure, rng, n=300):
    """Return random sky positions on the CCDs of an exposure, and all their corners."""
    ra, dec = [], []
    for detector in camera.detectors:
        x = np.append(rng.uniform(-0.5, 639.5, n), [-0.5, 639.5, 639.5, -0.5])
        y = np.append(rng.uniform(-0.5, 639.5, n), [-0.5, -0.5, 639.5, 639.5])
        sky = camera.pixel_to_sky(detector, x, y, exposure.ra, exposure.dec, exposure.rotation)
        ra.append(sky[0])
        dec.append(sky[1])
    return np.concatenate(ra), np.concatenate(dec)


@pytest.mark.parametrize(("ra", "dec"), PLACES)
@pytest.mark.parametrize("rotation", [0.0, 137.0])
def test_nothing_within_the_margin_is_missed(camera, skymap, ra, dec, rotation):
    rng = np.random.default_rng(4)
    planned = pointing("1", ra, dec, rotation)
    overlaps = predicted_overlaps([planned], camera, skymap, MARGIN)["1"]
    points = sphere.to_vector(*points_of(camera, planned, rng, 100))
    for _ in range(4):
        # turn the sky by just less than the margin, about an axis 90 degrees from the pointing
        axis = np.cross(sphere.to_vector(ra, dec), rng.normal(size=3))
        moved = turn(points, axis / np.linalg.norm(axis), 0.999 * MARGIN)
        hit = patches_hit(skymap, *sphere.from_vector(moved))
        assert len(hit) >= 1
        for tract_id, patches in hit.items():
            assert patches <= set(overlaps[tract_id])


def test_no_patch_is_planned_far_from_the_exposure(camera, skymap):
    """A planned patch is nearer to the field's convex outline than margin plus a rounding."""
    rng = np.random.default_rng(2)
    for ra, dec in PLACES:
        planned = pointing("1", ra, dec, rng.uniform(0, 360))
        overlaps = predicted_overlaps([planned], camera, skymap, MARGIN)["1"]
        (outline,) = predicted_footprints([planned], camera, 1.1 * MARGIN)
        shape = np.stack(sphere.tan_project(*outline, ra, dec), axis=-1)
        for tract_id, patches in overlaps.items():
            tract = skymap.tract(tract_id)
            for patch_id in patches:
                x0, y0, x1, y1 = tract.patch(patch_id).outer_box
                # a patch that holds none of the points must at least hold a vertex
                x, y = np.meshgrid(np.linspace(x0, x1 - 1, 40), np.linspace(y0, y1 - 1, 40))
                at = sphere.tan_project(*tract.pixel_to_sky(x, y), ra, dec)
                vertex_x, vertex_y = tract.sky_to_pixel(*outline)
                holds = (vertex_x > x0) & (vertex_x < x1) & (vertex_y > y0) & (vertex_y < y1)
                assert polygon.contains(shape, *at).any() or holds.any()


def test_agrees_with_clipping_each_outline(camera, skymap):
    """The test of all patches at once gives what clipping one polygon after the other gives."""
    rng = np.random.default_rng(9)
    exposures = [
        pointing(f"e{i}", *place, rng.uniform(0, 360))
        for i, place in enumerate(PLACES + [(rng.uniform(149, 151), 2.0) for _ in range(10)])
    ]
    overlaps = predicted_overlaps(exposures, camera, skymap, MARGIN)
    assert list(overlaps) == [exposure.exposure for exposure in exposures]
    outlines = predicted_footprints(exposures, camera, MARGIN)
    for exposure, outline in zip(exposures, outlines, strict=True):
        expected = {
            tract_id: patches_touching(skymap.tract(tract_id), *outline)
            for tract_id in tracts_touching(skymap, *outline)
        }
        assert overlaps[exposure.exposure] == expected


def test_rotation_is_that_of_the_camera(camera):
    """The predicted outline holds every CCD of the camera closely, at any rotation."""
    for rotation in (0.0, 30.0, 211.0):
        planned = pointing("1", 40.0, -35.0, rotation)
        (outline,) = predicted_footprints([planned], camera)
        shape = np.stack(sphere.tan_project(*outline, 40.0, -35.0), axis=-1)
        xi, eta = sphere.tan_project(
            *points_of(camera, planned, np.random.default_rng(1)), 40.0, -35.0
        )
        # shrunk by a millionth, so that corners on the outline are inside
        assert polygon.contains(shape, xi * (1 - 1e-6), eta * (1 - 1e-6)).all()
        hull_area = polygon.area(shape)
        extent = 6 * (640 * 2.0 / 3600) ** 2
        assert extent < hull_area < 1.35 * extent


def test_an_exposure_on_two_tracts_and_one_off_the_map(camera):
    skymap = make_skymap(
        SkymapSettings(kind="tangent", tangent={"ra": 10, "dec": 0, "width": 2, "height": 2})
    )
    overlaps = predicted_overlaps(
        [pointing("on", 10.0, 0.0), pointing("off", 200.0, 0.0)], camera, skymap, MARGIN
    )
    assert set(overlaps["on"]) == {0}
    assert overlaps["off"] == {}
    assert predicted_overlaps([], camera, skymap, MARGIN) == {}
    hsc = make_skymap(SkymapSettings())
    edge = hsc.tract(9813).ra + 180.0 / 242
    both = predicted_overlaps([pointing("1", edge, 2.23)], camera, hsc, MARGIN)["1"]
    assert {9813, 9814} == set(both)


def test_images_with_a_wcs(skymap):
    """Each image counts by itself: what lies between two images of an exposure is not planned."""
    images = [
        image("a", 150.0, 2.0),
        image("b", 359.99, 0.0),
        image("a", 153.0, 2.0),
        image("c", 10.0, 89.99),
    ]
    overlaps = predicted_overlaps_of_images(images, skymap)
    assert list(overlaps) == ["a", "b", "c"]
    for name, members in {"a": [0, 2], "b": [1], "c": [3]}.items():
        expected: dict[int, set[str]] = {}
        for i in members:
            corners = images[i].footprint_ra, images[i].footprint_dec
            for tract_id in tracts_touching(skymap, *corners):
                patches = patches_touching(skymap.tract(tract_id), *corners)
                expected.setdefault(tract_id, set()).update(patches)
        assert {tract_id: set(patches) for tract_id, patches in overlaps[name].items()} == expected
    far = sphere.tan_deproject(0.0, 0.0, 151.5, 2.0)
    between = skymap.tract(skymap.find_tract(*far))
    assert between.find_patch(*far) not in overlaps["a"].get(between.id, [])
    wide = predicted_overlaps_of_images(images, skymap, margin=0.2)
    assert sum(map(len, wide["a"].values())) > sum(map(len, overlaps["a"].values()))
    assert predicted_overlaps_of_images([], skymap) == {}


class TestCheck:
    def test_a_fitted_ccd_within_the_margin_passes(self, camera):
        planned = pointing("1", 0.0, 89.7, 20.0)
        for detector in camera.detectors:
            fitted = camera.footprint(detector, 0.0, 89.7 + 0.98 * MARGIN, 20.0, 8)
            check_footprint_within_prediction(planned, camera, MARGIN, *fitted, ccd=detector.id)

    def test_a_fitted_ccd_outside_names_exposure_distance_and_remedy(self, camera):
        planned = pointing("x17", 359.9, 30.0, 20.0)
        with pytest.raises(InputError) as caught:
            for detector in camera.detectors:
                fitted = camera.footprint(detector, 359.9, 30.0 + 0.4, 20.0, 8)
                check_footprint_within_prediction(planned, camera, MARGIN, *fitted, ccd=detector.id)
        message = str(caught.value)
        assert "exposure x17: CCD" in message
        assert "prediction.margin" in message
        assert "Correct the pointing of this exposure" in message
        off = float(message.split(" lies ")[1].split(maxsplit=1)[0])
        assert 0.05 < off <= 0.41

    def test_says_by_how_much(self, camera):
        planned = pointing("1", 10.0, 0.0)
        corners = [camera.footprint(d, 10.0, 0.0, 0.0, 8) for d in camera.detectors]
        top = max(c[1].max() for c in corners)
        northern = max(corners, key=lambda c: c[1].max())
        with pytest.raises(InputError, match=r"lies 0\.30\d degrees"):
            check_footprint_within_prediction(
                planned, camera, MARGIN, northern[0], northern[1] + 0.3
            )
        assert top > 0.3

    def test_the_other_side_of_the_sky(self, camera):
        with pytest.raises(InputError, match="more than 90 degrees"):
            check_footprint_within_prediction(
                pointing("1", 10.0, 0.0), camera, MARGIN, [190.0, 190.1, 190.1], [0.0, 0.0, 0.1]
            )

    def test_what_passes_was_planned(self, camera, skymap):
        """No footprint that passes the check touches a patch that was not planned."""
        rng = np.random.default_rng(6)
        planned = pointing("1", 0.0, 0.7, 77.0)
        overlaps = predicted_overlaps([planned], camera, skymap, MARGIN)["1"]
        passed = 0
        for _ in range(60):
            ra, dec = rng.uniform(-0.1, 0.1), 0.7 + rng.uniform(-0.1, 0.1)
            detector = camera.detectors[rng.integers(6)]
            fitted = camera.footprint(detector, ra, dec, 77.0 + rng.uniform(-5, 5), 8)
            try:
                check_footprint_within_prediction(planned, camera, MARGIN, *fitted)
            except InputError:
                continue
            passed += 1
            for tract_id in tracts_touching(skymap, *fitted):
                touched = patches_touching(skymap.tract(tract_id), *fitted)
                assert set(touched) <= set(overlaps[tract_id])
        assert 10 < passed < 55


def test_a_thousand_exposures_are_planned_in_seconds(camera, skymap):
    rng = np.random.default_rng(7)
    exposures = [
        pointing(str(i), ra, dec, 0.0)
        for i, (ra, dec) in enumerate(
            zip(rng.uniform(140, 160, 1000), rng.uniform(-5, 5, 1000), strict=True)
        )
    ]
    start = time.process_time()
    assert len(predicted_overlaps(exposures, camera, skymap, MARGIN)) == 1000
    assert time.process_time() - start < 2.0
