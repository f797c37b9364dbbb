import numpy as np
import pytest
from skyscene import make_tpv, make_tract, make_wcs

from coaddflow.errors import InputError
from coaddflow.warp.mapping import footprint_box, interpolate, map_ccd, mapping_error

SHAPE = (300, 240)


def test_mapping_is_the_inverse_of_the_wcs():
    tract = make_tract(pixel_scale=0.17)
    wcs = make_wcs(SHAPE, 0.2, rotation=33.0)
    grid = map_ccd(wcs, SHAPE, tract)
    x, y = np.array([0.0, 10.3, 239.0, 120.7]), np.array([299.0, 0.0, 150.2, 77.7])
    found_x, found_y, area = interpolate(grid, *tract.sky_to_pixel(*wcs.all_pix2world(x, y, 0)))
    np.testing.assert_allclose(found_x, x, atol=1e-5)
    np.testing.assert_allclose(found_y, y, atol=1e-5)
    np.testing.assert_allclose(area, (0.17 / 0.2) ** 2, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sip", "tpv"])
def test_strong_distortion_is_interpolated_to_a_thousandth_of_a_pixel(kind):
    shape = (1024, 512)
    if kind == "sip":
        # the edge of the CCD is displaced by some 25 pixels
        sip = {"A_2_0": 8e-5, "A_1_2": 8e-8, "B_0_2": -5e-5, "B_0_3": 5e-8, "B_3_0": 4e-8}
        wcs = make_wcs(shape, 0.2, rotation=70.0, sip=sip)
    else:
        wcs = make_tpv(shape, 0.2, {"PV1_4": 1.5, "PV1_7": 40.0, "PV2_5": -1.0, "PV2_9": 30.0})
    tract = make_tract(1200)
    coarse = map_ccd(wcs, shape, tract, step=64, tolerance=1e-3)
    assert mapping_error(coarse, wcs, shape, tract, n=101) < 1e-3
    straight = make_wcs(shape, 0.2, rotation=70.0 if kind == "sip" else 0.0)
    edge = np.array([0.0, 511.0, 0.0]), np.array([0.0, 1023.0, 1023.0])
    there, here = (tract.sky_to_pixel(*w.all_pix2world(*edge, 0)) for w in (wcs, straight))
    assert np.hypot(there[0] - here[0], there[1] - here[1]).max() > 5.0


def test_step_is_halved_where_the_distortion_needs_it():
    shape = (600, 600)
    sip = {"A_3_0": 1.5e-6, "B_0_3": -1.2e-6}
    wcs = make_wcs(shape, 0.2, sip=sip)
    tract = make_tract(900)
    coarse = map_ccd(wcs, shape, tract, step=64, tolerance=0.1)
    fine = map_ccd(wcs, shape, tract, step=64, tolerance=1e-3)
    assert mapping_error(coarse, wcs, shape, tract, n=101) > 1e-3
    assert fine.step < coarse.step
    assert mapping_error(fine, wcs, shape, tract, n=101) < 1e-3


def test_area_of_pixels_is_the_jacobian():
    shape = (400, 400)
    wcs = make_wcs(shape, 0.2, sip={"A_2_0": 5e-5, "B_1_1": 3e-5})
    tract = make_tract(500)
    grid = map_ccd(wcs, shape, tract)
    x, y, d = 300.0, 90.0, 0.5

    def forward(i, j):
        return np.array(tract.sky_to_pixel(*wcs.all_pix2world(i, j, 0)))

    slope_x = forward(x + d, y) - forward(x - d, y)
    slope_y = forward(x, y + d) - forward(x, y - d)
    ccd_to_tract = abs(slope_x[0] * slope_y[1] - slope_x[1] * slope_y[0])
    area = interpolate(grid, *forward(np.array([x]), np.array([y])))[2]
    np.testing.assert_allclose(area, 1.0 / ccd_to_tract, rtol=1e-6)


def test_footprint_box_holds_the_ccd_and_little_more():
    tract = make_tract(500)
    wcs = make_wcs(SHAPE, 0.2, sip={"A_0_2": 2e-4})
    box = footprint_box(wcs, SHAPE, tract)
    x, y = np.meshgrid(np.linspace(-0.5, 239.5, 50), np.linspace(-0.5, 299.5, 50))
    u, v = tract.sky_to_pixel(*wcs.all_pix2world(x.ravel(), y.ravel(), 0))
    assert box[0] <= u.min() - 1 and u.min() - 4 < box[0]
    assert box[3] >= v.max() + 1 and v.max() + 4 > box[3]


def test_wcs_that_folds_on_the_ccd_is_refused():
    wcs = make_wcs(SHAPE, 0.2, sip={"A_2_0": 1e-2})
    with pytest.raises(InputError, match="cannot be inverted"):
        map_ccd(wcs, SHAPE, make_tract(500))


def test_ccd_on_the_other_side_of_the_sky_is_refused():
    wcs = make_wcs(SHAPE, 0.2)
    wcs.wcs.crval = [330.0, -2.0]
    with pytest.raises(InputError, match="far outside"):
        map_ccd(wcs, SHAPE, make_tract(500))
