import numpy as np

from coaddflow.settings.solution import LinkingSettings
from coaddflow.solution.detections import Detections, Exposures, ReferenceStars, TractFrame
from coaddflow.solution.linking import link_detections

FRAME = TractFrame(359.999, 40.0)
YEAR = 365.25
ARCSEC = 1.0 / 3600.0


def exposures(times):
    n = len(times)
    return Exposures(
        *(tuple(map(str, range(n))), np.full(n, FRAME.ra), np.full(n, FRAME.dec)),
        mjd=57388.5 + YEAR * np.asarray(times),
        band=np.zeros(n, np.int32),
        epoch=np.zeros(n, np.int32),
        zenith=np.zeros((n, 2)),
        bands=("r",),
    )


def detections(places):
    """Detections at frame positions in arcsec, one list of (x, y) for each exposure."""
    exposure = np.repeat(np.arange(len(places), dtype=np.int32), [len(one) for one in places])
    x, y = np.concatenate([np.reshape(one, (-1, 2)) for one in places]).T * ARCSEC
    none, zero = np.zeros(len(x)), np.zeros(len(x), np.float32)
    ra, dec = FRAME.to_sky(x, y)
    return Detections(exposure, exposure * 0, none, none, zero, ra, dec, zero, zero)


def catalogue(places, motion=(0.0, 0.0)):
    """Reference stars at frame positions in arcsec, 2016.0, with a proper motion in mas/yr."""
    place = np.reshape(places, (-1, 2)) * ARCSEC
    ra, dec = FRAME.to_sky(*place.T)
    n = len(place)
    some, bands = np.ones(n), np.ones((n, 1))
    return ReferenceStars(
        ra, dec, some, np.tile(motion, (n, 1)).astype(float), some, some, some, bands, bands, 2016.0
    )


def link(places, times, references, **settings):
    found = detections(places)
    links = link_detections(found, exposures(times), references, FRAME, LinkingSettings(**settings))
    star = np.full(len(found), -1)
    star[links.rows] = links.star
    return star.tolist(), links


def test_stars_on_both_sides_of_ra_zero_are_linked():
    places = [[(-30.0, 0.0), (30.0, 0.0)], [(-30.1, 0.1), (30.1, 0.0)]]
    star, links = link(places, [0.0, 0.1], catalogue([(-30.0, 0.0)]))
    assert star == [0, 1, 0, 1]
    assert links.reference.tolist() == [0, -1]
    np.testing.assert_allclose(links.longitude / ARCSEC, [-30.0, 30.05], atol=1e-6)


def test_proper_motion_of_the_catalogue_is_followed():
    # 500 mas/yr north: 5 arcsec in 10 years
    places = [[(0.0, 0.0)], [(0.0, 5.0)]]
    star, _ = link(places, [0.0, 10.0], catalogue([(0.0, 0.0)], (0.0, 500.0)))
    assert star == [0, 0]
    star, _ = link(places, [0.0, 10.0], catalogue([(0.0, 0.0)]))
    assert star == [0, -1]


def test_star_without_catalogue_entry_is_followed():
    # 500 mas/yr, seen twice a year for 10 years, the exposures in any order: 5 arcsec
    times = np.random.default_rng(1).permutation(np.arange(0.0, 10.0, 0.5)).tolist()
    places = [[(100.0 + 0.5 * time, 0.0)] for time in times]
    star, links = link(places, times, catalogue([(0.0, 0.0)]))
    assert star == [0] * 20
    assert links.reference.tolist() == [-1]


def test_nearest_detection_wins_and_the_other_begins_no_star():
    places = [[(0.1, 0.0), (0.6, 0.0)], [(0.0, 0.1), (-0.6, 0.0)]]
    star, _ = link(places, [0.0, 0.1], catalogue([(0.0, 0.0)]))
    assert star == [0, -1, 0, -1]


def test_close_pairs_are_left_out_but_not_for_single_noise_peaks():
    pair = [(0.0, 0.0), (1.5, 0.0), (60.0, 0.0)]
    star, _ = link([pair] * 20, np.arange(20) / 20.0, catalogue([(0.0, 0.0), (60.0, 0.0)]))
    assert star == [-1, -1, 0] * 20
    once = [[(0.0, 0.0), (1.5, 0.0)]] + [[(0.0, 0.0)]] * 19
    star, _ = link(once, np.arange(20) / 20.0, catalogue([(0.0, 0.0)]))
    assert star == [0, -1] + [0] * 19


def test_stars_seen_once_are_left_out():
    star, links = link([[(0.0, 0.0), (60.0, 0.0)], [(0.0, 0.0)]], [0.0, 0.1], catalogue([(0, 0)]))
    assert star == [0, -1, 0]
    assert len(links) == 1


def test_frame_is_a_rotation_of_the_sphere():
    frame, rng = TractFrame(12.0, -70.0), np.random.default_rng(1)
    ra, dec = 12.0 + rng.uniform(-5, 5, 50), -70.0 + rng.uniform(-2, 2, 50)
    longitude, latitude = frame.of_sky(ra, dec)
    np.testing.assert_allclose(frame.to_sky(longitude, latitude), (ra, dec), atol=1e-10)
    # a small step to the north-east keeps its length and its direction to the axes
    step = np.tile([3e-6, 4e-6], (50, 1))
    moved = frame.of_sky(ra + step[:, 0] / np.cos(np.radians(dec)), dec + step[:, 1])
    found = np.stack(
        [(moved[0] - longitude) * np.cos(np.radians(latitude)), moved[1] - latitude], axis=1
    )
    np.testing.assert_allclose(frame.turned(ra, dec, step), found, atol=2e-11)
    np.testing.assert_allclose(np.hypot(*found.T), 5e-6, rtol=1e-4)


def test_parallax_has_its_ellipse():
    # near the ecliptic pole a star moves on a circle of its parallax
    frame = TractFrame(270.0, 66.56)
    mjd, zero = 57388.5 + np.linspace(0.0, YEAR, 13), np.zeros(13)
    factors = frame.parallax_factors(mjd, zero, zero)
    np.testing.assert_allclose(np.hypot(*factors.T), 1.0, atol=0.03)
    # at the vernal equinox the Sun is at RA 0; a star at RA 6 h is seen displaced to the Sun: west
    frame = TractFrame(90.0, 0.0)
    factors = frame.parallax_factors(np.array([57467.2]), zero[:1], zero[:1])
    np.testing.assert_allclose(factors[0], [-1.0, 0.0], atol=0.05)
