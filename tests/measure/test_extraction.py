import numpy as np
import pytest
import sep
from starfield import add_stars, observed, random_field

from coaddflow.measure.extraction import extract, find_objects
from coaddflow.settings.detection import DetectionSettings

SETTINGS = DetectionSettings()
PROFILE = np.exp(-0.5 * (np.arange(-3, 4) / 1.7) ** 2)
SKY = 500.0
THRESHOLD = 5.0


def field(shape=(420, 500), n=150, seed=1, flux=(300.0, 3e5), margin=0):
    image, *_ = random_field(
        shape, n, np.random.default_rng(seed), sky=SKY, flux=flux, margin=margin
    )
    return image.image - np.float32(SKY), image.variance


def whole_image(image, variance, clean=False):
    """What sep finds if it filters the whole image."""
    kernel = np.outer(PROFILE / PROFILE.sum(), PROFILE / PROFILE.sum())
    options = {"minarea": SETTINGS.min_pixels, "filter_type": "matched", "clean": clean}
    options |= {"deblend_nthresh": 32, "deblend_cont": 0.005, "segmentation_map": True}
    return extract(image, THRESHOLD, var=variance, filter_kernel=kernel, **options)


def by_peak(objects):
    return {(int(o["ycpeak"]), int(o["xcpeak"])): o for o in objects}


@pytest.fixture
def all_survive(monkeypatch):
    monkeypatch.setattr(
        "coaddflow.measure.extraction._stand_alone", lambda *a: np.ones(len(a[2].objects), bool)
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_objects_are_those_of_the_whole_image(all_survive, seed):
    # stars everywhere, also on the border, and a corner without variance
    image, variance = field(seed=seed)
    variance[:30, :40] = 0.0
    found = find_objects(image, variance, PROFILE, THRESHOLD, SETTINGS)
    expected, segments = whole_image(image, variance)
    ours, theirs = by_peak(found.objects), by_peak(expected)
    assert set(ours) == set(theirs)
    for place, one in theirs.items():
        if not one["flag"] & sep.OBJ_MERGED:  # some pixels of blends are given away by chance
            for name in ("npix", "flux", "cflux", "peak", "xmin", "xmax", "ymin", "ymax"):
                assert ours[place][name] == one[name], name
            for name in ("x", "y", "a", "b", "theta"):
                assert ours[place][name] == pytest.approx(one[name], abs=1e-4), name
    marked = np.zeros(image.shape, bool)
    marked[found.y, found.x] = True
    assert np.array_equal(marked, segments > 0)
    counts = np.bincount(found.index, minlength=len(found.objects))
    assert np.array_equal(counts, found.objects["npix"])


def test_in_a_crowded_field_the_atlas_is_the_image(all_survive):
    image, variance = field(shape=(200, 200), n=1500, seed=5, flux=(2e3, 3e4))
    found = find_objects(image, variance, PROFILE, THRESHOLD, SETTINGS)
    expected, _ = whole_image(image, variance)
    assert np.array_equal(found.objects["flux"], expected["flux"])
    assert np.array_equal(found.objects["x"], expected["x"])


def test_false_objects_in_the_wings_of_bright_stars_are_removed():
    stars = np.zeros((600, 600))
    add_stars(stars, [150.0, 440.0], [300.0, 280.0], [3e7, 1e7], 4.0, beta=2.5, radius=120)
    add_stars(stars, [300.0, 60.0], [520.0, 560.0], [1e4, 2e4], 4.0)
    image = observed(stars, SKY, np.random.default_rng(3))
    sky = image.image - np.float32(SKY)
    everything, _ = whole_image(sky, image.variance)
    cleaned, _ = whole_image(sky, image.variance, clean=True)
    found = find_objects(sky, image.variance, PROFILE, THRESHOLD, SETTINGS)
    assert len(cleaned) < len(everything)
    assert set(by_peak(found.objects)) == set(by_peak(cleaned))


def test_real_objects_survive_as_they_do_in_sep():
    image, variance = field(shape=(900, 900), n=500, seed=9)
    expected = by_peak(whole_image(image, variance, clean=True)[0])
    found = by_peak(find_objects(image, variance, PROFILE, THRESHOLD, SETTINGS).objects)
    # sep also removes what is in the wings of an object that is itself removed later
    assert set(expected) <= set(found)
    assert len(found) <= 1.05 * len(expected)


def test_an_empty_image_has_no_objects():
    found = find_objects(
        np.zeros((50, 60), np.float32), np.ones((50, 60), np.float32), PROFILE, 5.0, SETTINGS
    )
    assert len(found.objects) == len(found.y) == len(found.x) == len(found.index) == 0


@pytest.mark.parametrize(("below", "last"), [(-15.0, 12.0), (-30.0, 20.0), (-50.0, 30.0)])
def test_nothing_is_found_outside_the_image(all_survive, below, last):
    """A bright last row above a dark one peaks, once filtered, beyond the border."""
    image = np.random.default_rng(1).normal(0.0, 1.0, (100, 100)).astype(np.float32)
    y, x = np.mgrid[:100, :100]
    for place in (15, 40, 65, 90):
        image += 400.0 * np.exp(-0.5 * ((x - place) ** 2 + (y - 92) ** 2)).astype(np.float32)
    image[-2, 10:20] += below
    image[-1, 10:20] += last
    found = find_objects(image, np.ones_like(image), PROFILE, THRESHOLD, SETTINGS)
    assert set(by_peak(found.objects)) == set(by_peak(whole_image(image, np.ones_like(image))[0]))
    assert found.y.min() >= 0 and found.y.max() < 100
