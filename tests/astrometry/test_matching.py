"""Pattern match: true fields are found wherever they are, and random ones never."""

import numpy as np
import pytest
from scipy.spatial import cKDTree

from coaddflow.astrometry.matching import (
    SearchWindow,
    Similarity,
    fit_similarity,
    match_nearest,
    match_pattern,
)

NX, NY = 650, 500
SHIFT = 300.0
NEAR = SearchWindow(30.0, 1.5, 0.005, False)
WIDE = SearchWindow(SHIFT)
TOLERANCE = 2.0


def xy(z):
    return np.stack([z.real, z.imag], axis=1)


def in_circle(rng, n, radius):
    return radius * np.sqrt(rng.random(n)) * np.exp(2j * np.pi * rng.random(n))


def in_image(rng, n):
    return (rng.random(n) - 0.5) * NX + 1j * (rng.random(n) - 0.5) * NY


def reach(shift=SHIFT):
    return shift + 1.03 * np.hypot(NX, NY) / 2


def field(seed, truth, n_stars, n_spurious, density, noise=0.3, rank_noise=0.5):
    """Return sources and reference stars, brightest first, and which reference star each source is.

    ``density`` is the number of reference stars on the area of the image; the catalogue covers all
    that can be reached. Magnitudes of the sources are those of the catalogue with errors.
    """
    rng = np.random.default_rng(seed)
    n = int(density * np.pi * reach() ** 2 / NX / NY)
    w = in_circle(rng, n, reach())
    w = np.append(w, truth(in_image(rng, n_stars)))  # so that there are enough in the image
    magnitude = np.sort(rng.power(3.0, w.size))[rng.permutation(w.size)] * 8.0
    order = np.argsort(magnitude)
    w, magnitude = w[order], magnitude[order]
    z = (w - truth.b) / truth.a
    z = np.conj(z) if truth.flipped else z
    seen = np.flatnonzero((np.abs(z.real) < NX / 2) & (np.abs(z.imag) < NY / 2))
    brightness = magnitude[seen] + rng.normal(0.0, rank_noise, seen.size)
    seen, brightness = (values[np.argsort(brightness)[:n_stars]] for values in (seen, brightness))
    stars = z[seen] + rng.normal(0.0, noise, seen.size) + 1j * rng.normal(0.0, noise, seen.size)
    z = np.append(stars, in_image(rng, n_spurious))
    brightness = np.append(brightness, rng.choice(brightness, n_spurious))
    identity = np.append(seen, np.full(n_spurious, -1))
    order = np.argsort(brightness)
    return xy(z[order]), xy(w), identity[order]


def true_similarity(seed):
    """Return a transformation anywhere in the wide window."""
    rng = np.random.default_rng(100 + seed)
    a = rng.uniform(0.975, 1.025) * np.exp(2j * np.pi * rng.random())
    return Similarity(a, 0.95 * SHIFT * np.exp(2j * np.pi * rng.random()), bool(seed % 2))


def assert_found(match, truth, identity, n_least):
    assert match is not None
    right = identity[match.source_index] == match.reference_index
    assert right.sum() >= n_least
    assert np.mean(right) > 0.9
    assert match.similarity.flipped == truth.flipped
    corners = np.array([1, 1j, -1, -1j]) * NX / 2
    assert np.abs(match.similarity(corners) - truth(corners)).max() < 2.0
    assert match.chance < 1e-4


@pytest.mark.parametrize("seed", range(12))
def test_any_rotation_parity_and_shift_with_two_of_three_sources_spurious(seed):
    truth = true_similarity(seed)
    sources, references, identity = field(seed, truth, 25, 50, density=25)
    match = match_pattern(sources, references, NEAR, WIDE, TOLERANCE)
    assert_found(match, truth, identity, 15)


@pytest.mark.parametrize("seed", range(4))
def test_crowded_field_with_errors_of_a_magnitude(seed):
    truth = true_similarity(seed)
    sources, references, identity = field(
        seed, truth, 100, 100, density=400, noise=0.2, rank_noise=1.0
    )
    assert len(references) > 1500
    match = match_pattern(sources, references, NEAR, WIDE, TOLERANCE)
    assert_found(match, truth, identity, 80)


@pytest.mark.parametrize("seed", range(6))
def test_six_stars_among_twelve_sources_are_enough(seed):
    truth = true_similarity(seed)
    sources, references, identity = field(seed, truth, 6, 6, density=10, noise=0.2)
    match = match_pattern(sources, references, NEAR, WIDE, TOLERANCE)
    assert_found(match, truth, identity, 5)


@pytest.mark.parametrize("seed", range(4))
def test_good_prior_is_found_by_offsets_alone(seed):
    truth = Similarity(1.002 * np.exp(1j * np.radians(1.0)), 20.0 * 1j**seed)
    sources, references, identity = field(seed, truth, 25, 50, density=100)
    nowhere = SearchWindow(0.0, 0.0, 0.0, False)
    match = match_pattern(sources, references, NEAR, nowhere, TOLERANCE)
    assert_found(match, truth, identity, 20)


def test_a_match_is_found_where_brightness_says_nothing():
    truth = true_similarity(3)
    sources, references, identity = field(3, truth, 30, 30, density=30, rank_noise=100.0)
    match = match_pattern(sources, references, NEAR, WIDE, TOLERANCE)
    assert_found(match, truth, identity, 20)


@pytest.mark.parametrize(
    ("changes", "truth"),
    [
        ({"shift": 100.0}, Similarity(1.0, 150.0)),
        ({"rotation": 20.0}, Similarity(np.exp(1j * np.radians(25.0)), 100.0)),
        ({"scale": 0.01}, Similarity(1.02, 100.0)),
        ({"either_parity": False}, Similarity(1.0, 100.0, True)),
    ],
)
def test_nothing_is_found_outside_of_the_window(changes, truth):
    sources, references, identity = field(7, truth, 25, 10, density=25)
    wide = SearchWindow(SHIFT)
    assert_found(match_pattern(sources, references, NEAR, wide, TOLERANCE), truth, identity, 15)
    narrow = SearchWindow(**{**vars(wide), **changes})
    assert match_pattern(sources, references, NEAR, narrow, TOLERANCE) is None


def random_field(seed, clumped):
    """Return sources and reference stars that have nothing to do with each other."""
    rng = np.random.default_rng(10_000 + seed)
    n_sources, density = ((10, 12), (25, 20), (16, 30))[seed % 3]
    w = in_circle(rng, int(density * np.pi * reach() ** 2 / NX / NY), reach())
    z = in_image(rng, n_sources)
    if clumped:
        # half of all stars within a few pixels of another one, as fragments and clusters are
        for stars in (z, w):
            half = stars.size // 2
            clump = rng.normal(0.0, 10.0, (2, half))
            stars[half : 2 * half] = stars[:half] + clump[0] + 1j * clump[1]
            rng.shuffle(stars)
    return xy(z), xy(w)


@pytest.mark.parametrize("clumped", [False, True])
def test_no_random_field_matches(clumped):
    for seed in range(100):
        sources, references = random_field(seed, clumped)
        # the bound on chance matches is honest: even one a field is hardly ever claimed
        match = match_pattern(sources, references, NEAR, SearchWindow(80.0), TOLERANCE, 0.1)
        assert match is None


def test_wrong_field_with_the_same_number_of_stars_is_refused():
    truth = true_similarity(0)
    sources, _, _ = field(0, truth, 25, 10, density=25)
    _, references, _ = field(1, truth, 25, 10, density=25)
    assert match_pattern(sources, references, NEAR, WIDE, TOLERANCE) is None


def test_chance_falls_with_every_further_star():
    truth = Similarity(1.0, 5.0)
    chances = []
    for n_stars in (6, 8, 12):
        sources, references, _ = field(2, truth, n_stars, 0, density=20, noise=0.2)
        match = match_pattern(sources, references, NEAR, WIDE, TOLERANCE, 1.0)
        chances.append(match.chance)
    assert chances[0] > 100 * chances[1] > 10_000 * chances[2]


def test_too_few_stars_are_no_match():
    sources = xy(in_image(np.random.default_rng(1), 4))
    assert match_pattern(sources, sources, NEAR, WIDE, TOLERANCE) is None
    assert match_pattern(np.empty((0, 2)), sources, NEAR, WIDE, TOLERANCE) is None


def test_all_sources_at_one_place_are_no_match():
    sources = np.zeros((20, 2))
    references = xy(in_image(np.random.default_rng(1), 50))
    assert match_pattern(sources, references, NEAR, WIDE, TOLERANCE) is None


def test_similarity_is_fitted():
    truth = Similarity(1.01 * np.exp(1j * np.radians(150.0)), 3 - 4j, True)
    z = in_image(np.random.default_rng(1), 5)
    fitted = fit_similarity(z, truth(z), flipped=True)
    assert fitted.a == pytest.approx(truth.a)
    assert fitted.b == pytest.approx(truth.b)
    assert fitted.scale == pytest.approx(1.01)
    assert fitted.rotation == pytest.approx(150.0)


def test_nearest_match_takes_each_star_once():
    tree = cKDTree([[0.0, 0.0], [10.0, 0.0]])
    i, k, distance = match_nearest(tree, np.array([0.4, 0.1, 9.0, 30.0], complex), 2.0)
    assert i.tolist() == [1, 2]
    assert k.tolist() == [0, 1]
    assert distance.tolist() == pytest.approx([0.1, 1.0])
