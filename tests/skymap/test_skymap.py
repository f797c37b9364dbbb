"""Sky maps: the published numbers, no gaps, no missed tracts or patches."""

import math
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError
from regions import patches_touching, touches, tracts_touching

from coaddflow.errors import InputError
from coaddflow.geometry import polygon, sphere
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.skymap.tangent import fit_tangent
from coaddflow.skymap.tract import Tract


def rings(**kwargs):
    """Return a rings map; without arguments that of HSC."""
    version = {k: kwargs.pop(k) for k in list(kwargs) if k in ("num_rings", "ra_start", "version")}
    return make_skymap(SkymapSettings(rings=version, **kwargs))


def tangent(ra, dec, width=1.0, height=0.6, **kwargs):
    kwargs.setdefault("pixel_scale", 0.5)
    return make_skymap(
        SkymapSettings(
            kind="tangent",
            tangent={"ra": ra, "dec": dec, "width": width, "height": height},
            **kwargs,
        )
    )


@pytest.fixture(scope="module")
def hsc():
    return rings()


def random_sky(n, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))


def square(ra, dec, half_size, turn=0.0):
    """Return a square region (ra, dec of its corners) with the sides turned by some degrees."""
    angle = np.radians(turn + np.array([45.0, 135.0, 225.0, 315.0]))
    radius = half_size * np.sqrt(2)
    return sphere.tan_deproject(radius * np.cos(angle), radius * np.sin(angle), ra, dec)


class TestPublishedNumbers:
    """The sky map of the HSC survey, as its paper and the tests of lsst/skymap state it."""

    def test_number_of_tracts(self, hsc):
        assert hsc.n_tracts == 18938
        assert rings(num_rings=3).n_tracts == 26

    def test_cosmos_tract(self, hsc):
        tract = hsc.tract(9813)
        assert tract.ra == pytest.approx(150.2479338842975, abs=1e-10)
        assert tract.dec == pytest.approx(2.2314049586776834, abs=1e-10)
        assert tract.n_patches == (9, 9)
        assert (tract.width, tract.height) == (36000, 36000)
        assert tract.reference_pixel == (17999.0, 17999.0)

    def test_patches_of_the_cosmos_tract(self, hsc):
        tract = hsc.tract("9813")
        assert tract.patch("4_5").inner_box == (16000, 20000, 20000, 24000)
        assert tract.patch("4_5").outer_box == (15900, 19900, 20100, 24100)
        assert tract.patch("0_8").outer_box == (0, 31900, 4100, 36000)
        # COSMOS (RA 150.1162, Dec 2.2058): 0.1316 deg = 2820 pixels west, 548 south of the centre
        assert tract.find_patch(150.1162, 2.2058) == "5_4"
        assert [p.id for p in tract.patches()[:10]] == [*(f"{i}_0" for i in range(9)), "0_1"]

    def test_both_versions_of_the_tract_at_ra_0(self, hsc):
        old = rings(version=0)
        assert old.n_tracts == 18938
        assert (old.tract(9712).ra, old.tract(9712).dec) == pytest.approx((0.0, 0.7438016528925696))
        assert old.find_tract(10 / 3600, 0.7438) == old.find_tract(360 - 10 / 3600, 0.7438) == 9712
        assert hsc.tract(9712).dec == pytest.approx(2.2314049586776834)
        # tract 11 repeats tract 1, and the northernmost ring has no tract at RA 0
        assert (old.tract(11).ra, old.tract(11).dec) == (old.tract(1).ra, old.tract(1).dec)
        assert not old.tract(old.find_tract(0.0, 88.5)).contains(0.0, 88.5)
        assert hsc.tract(hsc.find_tract(0.0, 88.5)).contains(0.0, 88.5)

    def test_versions_agree_away_from_ra_0(self, hsc):
        ra, dec = random_sky(20000)
        away = (ra > 40) & (ra < 320) & (np.abs(dec) < 88)
        new, old = (
            hsc.find_tract(ra[away], dec[away]),
            rings(version=0).find_tract(ra[away], dec[away]),
        )
        np.testing.assert_array_equal(new, old)

    @pytest.mark.parametrize("version", [0, 1])
    def test_every_centre_is_found_in_its_own_tract(self, version):
        skymap = rings(num_rings=12, version=version, pixel_scale=10.0, ra_start=234.0)
        tracts = [skymap.tract(i) for i in range(skymap.n_tracts)]
        found = skymap.find_tract([t.ra for t in tracts], [t.dec for t in tracts])
        wrong = np.flatnonzero(found != np.arange(skymap.n_tracts))
        assert wrong.tolist() == ([11] if version == 0 else [])  # repeats tract 1


class TestTiling:
    def test_inner_regions_leave_no_gap(self, hsc):
        """Every direction lies on the pixels of the tract to which it belongs, with room."""
        ra, dec = random_sky(3000)
        ra = np.concatenate([ra, np.tile([0.0, 359.9999999, 123.4, 180.0], 6)])
        dec = np.concatenate([dec, np.repeat([90.0, -90.0, 89.2561, -89.2561, 88.5, 0.0], 4)])
        found = hsc.find_tract(ra, dec)
        assert found.min() == 0
        assert found.max() == hsc.n_tracts - 1
        for one_ra, one_dec, tract_id in zip(ra, dec, found, strict=True):
            tract = hsc.tract(tract_id)
            x, y = tract.sky_to_pixel(one_ra, one_dec)
            # the overlap of 1/60 degree is 357 pixels; the rest of the room is padding
            assert 357 < x < tract.width - 357
            assert 357 < y < tract.height - 357
            assert tract.find_patch(one_ra, one_dec) is not None

    @pytest.mark.parametrize("ra_start", [0.0, 234.0])
    def test_borders_between_tracts(self, ra_start):
        """A step over the border of an inner region changes the tract to the neighbour."""
        skymap = rings(ra_start=ra_start)
        tract = skymap.tract(skymap.find_tract(ra_start, 0.1))
        assert tract.ra == pytest.approx(ra_start)
        count = 243  # tracts in the ring north of the equator
        border = 180.0 / count
        inside = [skymap.find_tract(ra_start + s * (border - 1e-6), 0.1) for s in (-1, 1)]
        assert inside == [tract.id, tract.id]
        outside = [skymap.find_tract(ra_start + s * (border + 1e-6), 0.1) for s in (-1, 1)]
        assert outside == [tract.id + count - 1, tract.id + 1]
        ring = 180.0 / 121
        assert skymap.find_tract(ra_start, ring - 1e-6) == tract.id
        assert skymap.find_tract(ra_start, ring + 1e-6) == tract.id + count

    def test_scalars_arrays_and_ra_beyond_360(self, hsc):
        assert isinstance(hsc.find_tract(150.0, 2.0), int)
        assert hsc.find_tract(np.zeros((2, 3)), 2.0).shape == (2, 3)
        assert hsc.find_tract(-0.3, 10.0) == hsc.find_tract(359.7, 10.0)
        assert hsc.find_tract(360.0, 10.0) == hsc.find_tract(0.0, 10.0)

    def test_inner_boxes_tile_the_tract_once(self):
        tract = tangent(10.0, 20.0, patch_inner_size=1000).tract(0)
        count = np.zeros((tract.height, tract.width), np.uint8)
        for patch in tract.patches():
            x0, y0, x1, y1 = patch.inner_box
            count[y0:y1, x0:x1] += 1
        assert (count == 1).all()

    @pytest.mark.parametrize("dec", [90.0, -90.0, 0.0, 45.0])
    def test_find_patch_agrees_with_the_inner_boxes(self, hsc, dec):
        tract = hsc.tract(hsc.find_tract(0.0, dec))
        rng = np.random.default_rng(2)
        for x, y in rng.uniform(-0.4, 35999.4, (50, 2)):
            patch_id = tract.find_patch(*tract.pixel_to_sky(x, y))
            x0, y0, x1, y1 = tract.patch(patch_id).inner_box
            assert x0 <= round(x) < x1
            assert y0 <= round(y) < y1
        # half a pixel from the border: the pixel counts whose centre is nearest
        assert tract.find_patch(*tract.pixel_to_sky(3999.4, 7999.6)) == "0_2"
        assert tract.find_patch(*tract.pixel_to_sky(3999.6, 7999.4)) == "1_1"
        assert tract.find_patch(*tract.pixel_to_sky(-1.0, 5.0)) is None
        assert tract.find_patch(180.0, -dec) is None


class TestProjection:
    @pytest.mark.parametrize(
        ("ra", "dec"), [(150.25, 2.23), (0.0, 0.0), (359.99, -60.0), (0.0, 90.0), (0.0, -90.0)]
    )
    def test_agrees_with_astropy(self, ra, dec):
        tract = tangent(ra, dec).tract(0)
        rng = np.random.default_rng(0)
        x, y = rng.uniform(0, tract.width, 50), rng.uniform(0, tract.height, 50)
        sky = tract.pixel_to_sky(x, y)
        expected = tract.wcs().all_pix2world(x, y, 0)
        assert sphere.separation(*sky, *expected).max() * 3600 < 1e-6
        np.testing.assert_allclose(tract.sky_to_pixel(*sky), (x, y), atol=1e-6)
        # and through a header, as other programs see it
        from astropy.wcs import WCS

        read = WCS(tract.wcs().to_header())
        assert sphere.separation(*sky, *read.all_pix2world(x, y, 0)).max() * 3600 < 1e-5

    def test_orientation_and_scale(self):
        tract = tangent(30.0, -10.0).tract(0)
        x, y = tract.sky_to_pixel([30.0, 30.01, 30.0], [-10.0, -10.0, -9.99])
        middle = (tract.width - 1) / 2, (tract.height - 1) / 2
        assert (x[0], y[0]) == pytest.approx(middle)
        assert x[1] - x[0] == pytest.approx(-36 * np.cos(np.radians(10)) / 0.5, rel=1e-4)
        assert y[2] - y[0] == pytest.approx(36 / 0.5, rel=1e-4)

    def test_far_side_has_no_pixels(self, hsc):
        x, y = hsc.tract(9813).sky_to_pixel([330.0], [-2.0])
        assert np.isnan(x).all()
        assert np.isnan(y).all()
        assert not hsc.tract(9813).contains(330.0, -2.0)

    def test_matrix_is_the_same_projection(self, hsc):
        tract = hsc.tract(12345)
        ra, dec = tract.pixel_to_sky([0.0, 35000.0], [100.0, 20000.0])
        homogeneous = sphere.to_vector(ra, dec) @ tract.vector_to_pixel.T
        pixels = homogeneous[:, :2] / homogeneous[:, 2:]
        np.testing.assert_allclose(pixels.T, tract.sky_to_pixel(ra, dec), atol=1e-6)


class TestTouching:
    @pytest.mark.parametrize(
        ("ra", "dec"),
        [(150.0, 2.0), (0.0, 0.0), (359.8, 60.0), (77.0, 89.9), (10.0, 90.0), (200.0, -89.3)],
    )
    def test_same_tracts_as_asking_all_of_them(self, hsc, ra, dec):
        region = square(ra, dec, 0.9, turn=20.0)
        found = tracts_touching(hsc, *region)
        near = np.flatnonzero(sphere.separation(hsc._ra, hsc._dec, ra, dec) < 5.0)
        expected = [i for i in near.tolist() if touches(hsc.tract(i), *region)]
        assert found == expected
        assert len(found) >= 4

    def test_no_tract_or_patch_is_missed(self, hsc):
        """Wherever a point of a region lies on a tract or patch, that is among those found."""
        rng = np.random.default_rng(8)
        for ra, dec in [(0.02, 0.0), (150.98, 1.49), (45.0, 89.25), (12.0, -89.5), (250.0, -45.0)]:
            region = square(ra, dec, 0.8, turn=rng.uniform(0, 90))
            outline = np.stack(sphere.tan_project(*region, ra, dec), axis=-1)
            xi, eta = rng.uniform(-1.2, 1.2, (2, 4000))
            inside = polygon.contains(outline, xi, eta)
            points = sphere.tan_deproject(xi[inside], eta[inside], ra, dec)
            found = tracts_touching(hsc, *region)
            assert set(hsc.find_tract(*points)) <= set(found)
            for tract_id in found:
                tract = hsc.tract(tract_id)
                x, y = tract.sky_to_pixel(*points)
                touched = set(patches_touching(tract, *region))
                hit = {
                    p.id
                    for p in tract.patches()
                    if (
                        (x > p.outer_box[0] - 0.5)
                        & (x < p.outer_box[2] - 0.5)
                        & (y > p.outer_box[1] - 0.5)
                        & (y < p.outer_box[3] - 0.5)
                    ).any()
                }
                assert hit <= touched
                assert touched

    def test_a_region_across_two_tracts(self, hsc):
        """A survey on the common border of two tracts touches both, and no third."""
        centre = hsc.tract(9813)
        border = centre.ra + 180.0 / 242
        found = tracts_touching(hsc, *square(border, centre.dec, 0.2))
        assert found == [9813, 9814]
        assert patches_touching(hsc.tract(9813), *square(border, centre.dec, 0.02)) == ["0_4"]
        assert patches_touching(hsc.tract(9814), *square(border, centre.dec, 0.02)) == ["8_4"]

    def test_the_corner_of_a_tract_is_not_its_bounding_circle(self, hsc):
        tract = hsc.tract(9813)
        outside = tract.pixel_to_sky(18000.0, 36000.0 + 500.0)
        assert 9813 not in tracts_touching(hsc, *square(*outside, 0.01))
        assert 9813 in hsc.tracts_near(*outside, 0.01)

    @pytest.mark.parametrize("tract_id", [0, 1, 9712, 9813, 18937])
    @pytest.mark.parametrize(("x", "y"), [(5, 5), (35995, 5), (5, 35995), (35995, 35995)])
    def test_the_last_pixels_in_the_corners(self, hsc, tract_id, x, y):
        tract = hsc.tract(tract_id)
        region = square(*tract.pixel_to_sky(x, y), 1e-4)
        assert tract_id in tracts_touching(hsc, *region)
        assert patches_touching(tract, *region) == [f"{8 * (x > 9)}_{8 * (y > 9)}"]

    def test_borders_belong_to_both_patches(self, hsc):
        tract = hsc.tract(9813)

        def patches(x, y):
            return patches_touching(tract, *square(*tract.pixel_to_sky(x, y), 1e-5))

        assert patches(3950, 2000) == patches(4050, 2000) == ["0_0", "1_0"]
        assert patches(2000, 7950) == patches(2000, 8050) == ["0_1", "0_2"]
        assert patches(3850, 2000) == ["0_0"]
        assert patches(4150, 2000) == ["1_0"]
        assert patches(4000, 4000) == ["0_0", "1_0", "0_1", "1_1"]

    def test_the_tract_that_version_0_has_twice_is_used_once(self):
        skymap = rings(version=0)
        region = square(0.0, -88.5, 0.1)
        assert 1 in tracts_touching(skymap, *region)
        assert 11 not in tracts_touching(skymap, *region)

    def test_region_larger_than_a_patch_and_larger_than_the_tract(self):
        tract = tangent(40.0, 70.0, patch_inner_size=1000).tract(0)
        assert patches_touching(tract, *square(40.0, 70.0, 5.0)) == [p.id for p in tract.patches()]
        assert patches_touching(tract, *square(60.0, 70.0, 0.3)) == []
        # a region that reaches behind the tangent plane
        assert touches(tract, [0.0, 80.0, 100.0, 350.0], [60.0, 60.0, 89.0, 89.0])
        assert not touches(tract, *square(220.0, -70.0, 5.0))

    def test_areas_add_up(self, hsc):
        """Inner boxes tile, so with no border the parts of a region sum to the whole."""
        tract, outline = rings(patch_border=0).tract(9813), square(150.3, 2.3, 0.3, turn=33.0)
        parts = tract.patch_overlaps(*outline)
        assert len(parts) > 9
        assert sum(of_outline for _, _, of_outline in parts) == pytest.approx(1.0, rel=1e-9)
        area = sum(of_patch for _, of_patch, _ in parts) * math.prod(tract.patch_inner_size)
        assert area == pytest.approx(polygon.area(tract.footprint_pixels(*outline)), rel=1e-9)
        with_border = hsc.tract(9813).patch_overlaps(*outline)
        assert sum(of_outline for _, _, of_outline in with_border) > 1.05


class TestTangent:
    def test_given_centre_and_size(self):
        skymap = tangent(359.9, 0.0, width=1.0, height=0.6)
        tract = skymap.tract(0)
        assert skymap.n_tracts == 1
        assert 7200 <= tract.width <= 7202
        assert 4320 <= tract.height <= 4322
        assert tract.n_patches == (2, 2)
        assert skymap.find_tract([0.35, 359.45, 0.45], [0.0, 0.0, 0.0]).tolist() == [0, 0, -1]
        assert skymap.find_tract(359.9, 0.2) == 0
        assert tracts_touching(skymap, *square(0.4, 0.0, 0.1)) == [0]
        assert tracts_touching(skymap, *square(0.6, 0.0, 0.1)) == []

    def test_small_field_is_one_patch_of_its_own_size(self):
        tract = tangent(10.0, 0.0, width=0.05, height=0.02).tract(0)
        assert tract.n_patches == (1, 1)
        assert tract.patch("0_0").outer_box == tract.patch("0_0").inner_box == (0, 0, 360, 144)

    @pytest.mark.parametrize(
        ("ra", "dec"), [(0.0, 0.0), (359.99, 40.0), (120.0, 89.9), (33.0, -90.0), (200.0, -60.0)]
    )
    def test_fitted_to_footprints(self, ra, dec):
        settings = SkymapSettings(kind="tangent", pixel_scale=1.0)
        offsets = [(-0.5, 0.0), (0.3, 0.2), (0.4, -0.3)]
        footprints = [square(*sphere.tan_deproject(*o, ra, dec), 0.2, turn=10.0) for o in offsets]
        skymap = make_skymap(settings, footprints)
        tract = skymap.tract(0)
        corners = np.concatenate([np.stack(f) for f in footprints], axis=1)
        assert tract.contains(*corners).all()
        # and it fits closely
        x, y = tract.sky_to_pixel(*corners)
        assert min(x.min(), y.min(), tract.width - x.max(), tract.height - y.max()) < 8
        fixed = fit_tangent(settings, footprints)
        assert make_skymap(fixed).tract(0) == tract
        assert fit_tangent(fixed) is fixed

    def test_half_given(self):
        settings = SkymapSettings(kind="tangent", tangent={"ra": 10.0, "dec": 5.0})
        tract = make_skymap(settings, [square(10.2, 5.0, 0.1)]).tract(0)
        assert (tract.ra, tract.dec) == (10.0, 5.0)
        assert tract.contains(*square(10.2, 5.0, 0.1)).all()

    def test_nothing_to_fit_to(self):
        with pytest.raises(InputError, match="no exposures"):
            make_skymap(SkymapSettings(kind="tangent"))

    @pytest.mark.parametrize("away", [10.0, 29.9, 120.0])
    def test_a_stray_pointing_is_named_and_does_not_stretch_the_tract(self, away):
        settings = SkymapSettings(kind="tangent", pixel_scale=0.2)
        good = [square(150.1 + 0.002 * n, 2.2, 0.02) for n in range(5)]
        names = [*(f"good{n}" for n in range(5)), "stray7"]
        with pytest.raises(InputError, match=r"1 of 6 exposures.*stray7.*exclude"):
            stray = square(150.1 + away, 2.2 + away / 9, 0.02)
            make_skymap(settings, [*good, stray], names=names)
        assert make_skymap(settings, good).tract(0).width < 1000

    def test_two_fields_and_a_large_one_are_no_strays(self, caplog):
        settings = SkymapSettings(kind="tangent", pixel_scale=1.0)
        two = [square(10.0 + 3.0 * (n % 2), 3.0 * (n % 2), 0.05) for n in range(6)]
        strip = [square(10.0 + 0.2 * n, 2.2, 0.1) for n in range(60)]
        for footprints in (two, strip):
            assert make_skymap(settings, footprints).tract(0).width > 9000
        assert not caplog.messages

    def test_exposures_over_half_the_sky(self):
        with pytest.raises(InputError, match="too far apart"):
            make_skymap(
                SkymapSettings(kind="tangent"), [square(0.0, 0.0, 0.1), square(90.0, 0.0, 0.1)]
            )
        with pytest.raises(InputError, match="too far apart"):
            make_skymap(
                SkymapSettings(kind="tangent", tangent={"ra": 0.0, "dec": 0.0}),
                [square(180.0, 0.0, 0.1)],
            )


class TestBadInput:
    @pytest.mark.parametrize("tract_id", [-1, 18938, "x", 2.5, None, "1e3", "²"])
    def test_unknown_tract(self, hsc, tract_id):
        with pytest.raises(InputError, match="from 0 to 18937"):
            hsc.tract(tract_id)

    @pytest.mark.parametrize(("ra", "dec"), [(0.0, 90.1), (np.nan, 0.0), (0.0, [1.0, np.nan])])
    def test_not_a_position(self, hsc, ra, dec):
        for skymap in (hsc, tangent(0.0, 0.0)):
            with pytest.raises(InputError, match="not a position"):
                skymap.find_tract(ra, dec)

    @pytest.mark.parametrize("patch_id", ["9_0", "0_9", "-1_0", "4,4", "04_4", "1_", "", "1_1\n"])
    def test_unknown_patch(self, hsc, patch_id):
        with pytest.raises(InputError, match="'0_0' to '8_8'"):
            hsc.tract(9813).patch(patch_id)

    @pytest.mark.parametrize(
        "values",
        [
            {"kind": "healpix"},
            {"patch_border": 5000},
            {"tangent": {"ra": 10.0}},
            {"tangent": {"width": 1.0}},
            {"rings": {"numRings": 3}},
            {"rings": {"ra_start": 360.0}},
        ],
    )
    def test_settings_are_checked(self, values):
        with pytest.raises(ValidationError):
            SkymapSettings(**values)


def test_tracts_compare_by_value():
    assert rings().tract(9813) == rings().tract(9813)
    assert isinstance(rings().tract(5), Tract)


def test_import_needs_numpy_and_pydantic_only():
    """The Snakefile imports the sky map in every job."""
    code = (
        "import sys, coaddflow.skymap.maps; "
        "sys.exit([m for m in ('astropy', 'scipy', 'numba', 'sep') if m in sys.modules] != [])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
