"""Directions and the tangent plane, where it is easy and where it is not."""

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.wcs import WCS

from coaddflow.geometry import sphere


def test_vectors_and_back():
    rng = np.random.default_rng(1)
    ra, dec = rng.uniform(0, 360, 100), np.degrees(np.arcsin(rng.uniform(-1, 1, 100)))
    ra2, dec2 = sphere.from_vector(3.0 * sphere.to_vector(ra, dec))
    np.testing.assert_allclose(ra2, ra, atol=1e-11)
    np.testing.assert_allclose(dec2, dec, atol=1e-11)


@pytest.mark.parametrize(
    ("a", "b"), [((0, 90), (180, 90)), ((359.999999, 0), (1e-6, 0)), ((10, 20), (190, -20))]
)
def test_separation_agrees_with_astropy(a, b):
    expected = SkyCoord(*a, unit="deg").separation(SkyCoord(*b, unit="deg")).to_value(u.deg)
    assert sphere.separation(*a, *b) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("ra0", "dec0"), [(0.0, 0.0), (359.9, -30.0), (77.0, 90.0), (12.0, -89.9)])
def test_tangent_plane_agrees_with_wcslib_and_inverts(ra0, dec0):
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.crval, wcs.wcs.crpix, wcs.wcs.cdelt = [ra0, dec0], [1, 1], [1, 1]
    wcs.wcs.lonpole = 180  # the FITS default turns the plane round at the pole itself
    xi, eta = (grid.ravel() for grid in np.meshgrid([-1.5, -0.2, 0.0, 0.7], [-1.0, 0.0, 0.3]))
    ra, dec = sphere.tan_deproject(xi, eta, ra0, dec0)
    expected = wcs.all_pix2world(xi, eta, 0)
    assert np.all(sphere.separation(ra, dec, *expected) < 1e-10)
    np.testing.assert_allclose(sphere.tan_project(ra, dec, ra0, dec0), (xi, eta), atol=1e-10)


def test_direction_behind_the_plane_has_no_image():
    assert np.all(np.isnan(sphere.tan_project(180.0, 0.0, 0.0, 0.0)))
