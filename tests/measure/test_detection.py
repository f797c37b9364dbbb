import numpy as np
import pytest
import sep
from scipy import ndimage
from scipy.spatial import cKDTree
from starfield import add_stars, observed, random_field

from coaddflow.errors import CcdFailure
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure import extraction
from coaddflow.measure.detection import (
    Detection,
    SourceFlag,
    _without_holes,
    detect_sources,
    measure_seeing,
    set_detected,
    unusable_pixels,
)
from coaddflow.settings.detection import DetectionSettings

SETTINGS = DetectionSettings()
SKY = 500.0


def field_without_sky(stars, seed=1, sky=SKY):
    image = observed(stars, sky, np.random.default_rng(seed))
    image.image -= np.float32(sky)
    return image


def stars_at(x, y, flux, shape=(200, 200), fwhm=4.0, **kwargs):
    stars = np.zeros(shape)
    add_stars(stars, x, y, flux, fwhm, **kwargs)
    return stars


def has(sources, flag):
    return (np.asarray(sources["flags"]) & int(flag)) != 0


@pytest.fixture(scope="module")
def grid_of_stars():
    """Stars of equal flux at all pixel phases, and what was detected."""
    rng = np.random.default_rng(11)
    y, x = np.mgrid[40:580:40, 40:580:40].astype(float)
    x, y = x.ravel() + rng.uniform(-0.5, 0.5, x.size), y.ravel() + rng.uniform(-0.5, 0.5, x.size)
    image = field_without_sky(stars_at(x, y, 4e5, (600, 600)), seed=12)
    return x, y, detect_sources(image, 4.5, SETTINGS)


def test_every_star_is_found_once(grid_of_stars):
    x, y, detection = grid_of_stars
    assert len(detection.sources) == x.size
    distance, _ = cKDTree(np.column_stack([x, y])).query(
        np.column_stack([detection.sources["x"], detection.sources["y"]])
    )
    assert distance.max() < 0.05
    assert not detection.sources["flags"].any()


def test_positions_of_bright_stars_are_good_to_a_hundredth_of_a_pixel(grid_of_stars):
    x, y, detection = grid_of_stars
    sources = detection.sources
    _, truth = cKDTree(np.column_stack([x, y])).query(np.column_stack([sources["x"], sources["y"]]))
    dx, dy = sources["x"] - x[truth], sources["y"] - y[truth]
    assert np.sqrt(np.mean(dx**2)) < 0.01
    assert np.sqrt(np.mean(dy**2)) < 0.01
    assert abs(dx.mean()) < 0.002
    assert np.median(sources["x_error"]) == pytest.approx(np.std(dx), rel=0.35)


def test_segments_carry_the_ids(grid_of_stars):
    _, _, detection = grid_of_stars
    sources = detection.sources
    row, column = (np.rint(np.asarray(sources[name])).astype(int) for name in ("y", "x"))
    assert np.array_equal(detection.segments[row, column], sources["id"])
    counts = np.bincount(detection.segments.ravel())[1:]
    assert np.array_equal(counts, sources["n_pixels"])
    assert (np.diff(sources["flux_isophotal"]) <= 0).all()


def test_empty_sky_has_no_sources():
    with pytest.raises(CcdFailure) as failure:
        detect_sources(field_without_sky(np.zeros((400, 400))), 4.0, SETTINGS)
    assert failure.value.reason == "no_stars"


def test_threshold_follows_the_variance_plane():
    stars = stars_at([60.0, 140.0], [100.0, 100.0], 3000.0)
    rng = np.random.default_rng(3)
    variance = np.full(stars.shape, 525.0)
    variance[:, 100:] *= 100.0
    image = MaskedImage(rng.normal(stars, np.sqrt(variance)), variance, np.zeros(stars.shape, int))
    sources = detect_sources(image, 4.0, SETTINGS).sources
    assert len(sources) == 1
    assert sources["x"][0] == pytest.approx(60.0, abs=0.5)


def test_faintest_star_found_is_the_one_expected():
    # a matched filter sees the noise of 4 pi sigma^2 pixels
    noise = np.sqrt(525.0 * 4.0 * np.pi * (4.0 / 2.355) ** 2)
    y, x = (a.ravel().astype(float) for a in np.mgrid[30:570:30, 30:570:30])
    found = {}
    for signal in (3.0, 12.0):
        image = field_without_sky(stars_at(x, y, signal * noise, (600, 600)), seed=4)
        try:
            found[signal] = len(detect_sources(image, 4.0, SETTINGS).sources) / x.size
        except CcdFailure:
            found[signal] = 0.0
    assert found[3.0] < 0.1
    assert found[12.0] > 0.97


def test_close_pair_is_two_blended_sources():
    image = field_without_sky(stars_at([96.0, 104.5], [100.0, 100.0], [6e4, 4e4]))
    sources = detect_sources(image, 4.0, SETTINGS).sources
    assert len(sources) == 2
    assert has(sources, SourceFlag.BLENDED).all()


def test_flags_tell_saturation_edges_and_bad_pixels_near_the_centre():
    x = np.array([50.0, 100.0, 150.0, 1.0])
    y = np.array([50.0, 100.0, 150.0, 100.0])
    image = field_without_sky(stars_at(x, y, 5e5))
    image.mask[50, 50] |= MaskPlane.SAT
    image.mask[101, 101] |= MaskPlane.CR | MaskPlane.INTRP
    image.mask[150, 157] |= MaskPlane.BAD | MaskPlane.INTRP
    sources = detect_sources(image, 4.0, SETTINGS).sources
    nearest = cKDTree(np.column_stack([sources["x"], sources["y"]])).query(np.c_[x, y])[1]
    sources = sources[nearest]
    assert has(sources, SourceFlag.SATURATED).tolist() == [True, False, False, False]
    assert has(sources, SourceFlag.BAD_PIXELS).tolist() == [False, True, False, False]
    assert has(sources, SourceFlag.EDGE).tolist() == [False, False, False, True]
    assert sources["mask"][2] & MaskPlane.BAD


def test_pixels_without_value_are_not_sources():
    image = field_without_sky(stars_at([100.0], [100.0], [1e5]))
    image.image[20:23, 20:23] = np.nan
    image.image[60:63, 60:63] = 1e5
    image.mask[60:63, 60:63] = MaskPlane.BAD
    image.image[150:153, 30:33] = 1e5
    image.variance[150:153, 30:33] = np.inf
    sources = detect_sources(image, 4.0, SETTINGS).sources
    assert len(sources) == 1


def test_detected_plane_covers_the_stars_and_nothing_else():
    image = field_without_sky(stars_at([100.0], [100.0], [1e5]))
    image.mask[10, 10] = MaskPlane.DETECTED | MaskPlane.BAD
    detection = detect_sources(image, 4.0, SETTINGS)
    set_detected(image, detection, 4.0, SETTINGS)
    inside = image.has_any(MaskPlane.DETECTED)
    assert inside[92:109, 92:109].any(axis=0).all()
    assert inside[detection.segments > 0].all()
    assert not inside[:80].any() and not inside[:, 125:].any()
    assert image.mask[10, 10] == MaskPlane.BAD


@pytest.mark.parametrize("fwhm", [2.0, 4.0, 9.0])
def test_seeing_is_measured_whatever_it_is(fwhm):
    image, *_ = random_field(
        (500, 500), 60, np.random.default_rng(8), fwhm=fwhm, sky=SKY, flux=(3e4, 4e5)
    )
    image.image -= np.float32(SKY)
    # twice the half-light radius of a Moffat profile with beta = 3.5 is 1.2 FWHM
    assert measure_seeing(image, SETTINGS) == pytest.approx(1.2 * fwhm, rel=0.07)


def test_seeing_is_that_of_the_stars_among_more_cosmic_rays():
    rng = np.random.default_rng(9)
    image, *_ = random_field((500, 500), 50, rng, fwhm=4.0, sky=SKY, flux=(3e4, 4e5))
    image.image -= np.float32(SKY)
    for _ in range(80):
        x, y, length = rng.integers(20, 480), rng.integers(20, 480), rng.integers(2, 9)
        image.image[y, x : x + length] += 3000.0
        image.image[y + 1, x : x + length] += rng.uniform(0, 3000.0)
    assert measure_seeing(image, SETTINGS) == pytest.approx(4.72, rel=0.06)


def test_no_star_has_no_seeing():
    with pytest.raises(CcdFailure) as failure:
        measure_seeing(field_without_sky(np.zeros((300, 300))), SETTINGS)
    assert failure.value.reason == "no_stars"


def test_crowded_frames_get_the_buffer_they_need(monkeypatch):
    image, *_ = random_field((300, 300), 400, np.random.default_rng(10), sky=SKY, flux=(1e4, 1e5))
    image.image -= np.float32(SKY)
    roomy = detect_sources(image, 4.0, SETTINGS).sources
    monkeypatch.setattr(extraction, "_FIRST_PIXEL_STACK", 100)
    tight = detect_sources(image, 4.0, SETTINGS).sources
    assert np.array_equal(roomy["x"], tight["x"])


def test_trouble_in_the_extraction_is_a_failure_of_the_ccd(monkeypatch):
    def overflow(*args, **kwargs):
        raise Exception("object deblending overflow: limit of 4096 sub-objects reached")

    monkeypatch.setattr(sep, "extract", overflow)
    with pytest.raises(CcdFailure) as failure:
        detect_sources(field_without_sky(np.zeros((50, 50))), 4.0, SETTINGS)
    assert failure.value.reason == "detection_failed"
    assert "sub-objects" in failure.value.message


def test_unusable_pixels_are_those_without_a_value():
    image = MaskedImage(np.ones((4, 5)), np.ones((4, 5)), np.zeros((4, 5), int))
    image.mask[0] = MaskPlane.BAD, MaskPlane.CR, MaskPlane.NO_DATA, MaskPlane.SAT, MaskPlane.EDGE
    image.mask[1] = image.mask[0] | int(MaskPlane.INTRP)
    image.image[2, :3] = np.nan, np.inf, -np.inf
    image.variance[3] = np.nan, np.inf, 0.0, -1.0, 1e-30
    assert unusable_pixels(image).tolist() == [
        [True, True, True, False, False],
        [False, False, True, False, False],
        [True, True, True, False, False],
        [True, True, True, True, False],
    ]


def test_holes_are_filled_with_the_mean_around_them_and_are_sky_inside():
    image = field_without_sky(np.zeros((80, 80)), seed=4)
    image.mask[20:40, 30:50] = MaskPlane.BAD
    image.mask[60, 0] = MaskPlane.NO_DATA
    hole = unusable_pixels(image)
    pixels, variance = _without_holes(image, 4.0)
    reach = np.arange(-2, 3)
    weight = np.exp(-(reach[:, None] ** 2 + reach**2) / 2.0)
    good = np.pad(~hole, 2).astype(float)
    for y, x in ((20, 35), (21, 48), (39, 49), (60, 0)):
        around = good[y : y + 5, x : x + 5] * weight
        for filled, plane in ((pixels, image.image), (variance, image.variance)):
            values = np.pad(plane, 2)[y : y + 5, x : x + 5]
            assert filled[y, x] == pytest.approx((values * around).sum() / around.sum())
    assert (pixels[22:38, 32:48] == 0).all()
    assert (variance[22:38, 32:48] == np.median(image.variance[~hole])).all()
    assert np.array_equal(pixels[~hole], image.image[~hole])


def test_detected_plane_is_the_segments_grown_by_a_square():
    image = field_without_sky(np.zeros((60, 70)))
    image.mask[:] = MaskPlane.DETECTED | MaskPlane.EDGE
    segments = (np.random.default_rng(6).random(image.shape) > 0.99).astype(np.int32)
    set_detected(image, Detection(None, segments), 3.1, SETTINGS)
    grown = ndimage.maximum_filter(segments, size=7) > 0
    assert np.array_equal(image.has_any(MaskPlane.DETECTED), grown)
    assert image.has_any(MaskPlane.EDGE).all()
