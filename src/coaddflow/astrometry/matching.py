"""Pattern match of detected sources with a reference catalogue, without trust in the pointing.

Every transformation that lays one pair of sources onto one pair of reference stars is a vote for
a place in the space of similarity transformations; true correspondences vote for the same place,
chance ones for any. Pairs, and not triangles [1]_ [2]_ [3]_, because the scale is known to a few
per cent: that prunes pairs as well as shape prunes triangles, and k common stars among many
spurious sources give k (k - 1) / 2 votes. SCAMP votes with pairs as well, first for scale and
rotation and then for the shift [4]_; here all four are voted for at once, which keeps the
background of chance votes low when half of the sources have no counterpart.

No vote is believed. Each candidate is tested with all stars: how many of them should, by chance,
fall as near to a reference star in any of the hypotheses that were tried? This is the same
question that the odds ratio of [5]_ asks, answered with an upper bound on the false-alarm rate.

Positions are complex numbers x + iy in the plane. A transformation takes z to
``a * z + b``, or ``a * conj(z) + b`` if it is flipped.

References
----------
.. [1] Groth 1986, AJ 91, 1244.
.. [2] Valdes et al. 1995, PASP 107, 1119.
.. [3] Tabur 2007, PASA 24, 189.
.. [4] Bertin 2006, ADASS XV, ASP Conf. 351, 112.
.. [5] Lang et al. 2010, AJ 139, 1782, section 2.4.
.. [6] Hoeffding 1956, Ann. Math. Stat. 27, 713 (the binomial bounds sums of unequal trials).
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree
from scipy.special import betainc

ComplexArray = NDArray[np.complex128]
IndexArray = NDArray[np.intp]

_MAX_VOTES = 2_000_000
_CANDIDATES = 40
_CERTAIN = 1e-12
_PAIR_STEPS = ((15, 1.0), (25, 1.0), (25, 2.0), (40, 1.0), (40, 2.0), (60, 1.5), (100, 1.5))


@dataclass(frozen=True)
class SearchWindow:
    """Which transformations are looked for; lengths in the unit of the positions.

    Attributes
    ----------
    shift : float
        Largest distance between the image of the origin and the origin.
    rotation : float
        Largest rotation to either side, degrees; 180 for any.
    scale : float
        Largest deviation of the scale from 1.
    either_parity : bool
        Also look for mirror images (at any rotation).
    """

    shift: float
    rotation: float = 180.0
    scale: float = 0.03
    either_parity: bool = True

    def contains(self, similarity: "Similarity", slack: float) -> bool:
        """Return whether a transformation is in the window, enlarged by a relative ``slack``."""
        if similarity.flipped and not self.either_parity:
            return False
        rotation_limit = 180.0 if similarity.flipped else self.rotation + math.degrees(slack)
        return (
            abs(similarity.b) <= self.shift * (1.0 + slack)
            and abs(similarity.scale - 1.0) <= self.scale + slack
            and abs(similarity.rotation) <= rotation_limit
        )


@dataclass(frozen=True)
class Similarity:
    """Shift, rotation and scale, and perhaps a reflection, of the plane."""

    a: complex
    b: complex
    flipped: bool = False

    def __call__(self, z: ComplexArray) -> ComplexArray:
        """Apply it to positions."""
        return self.a * (np.conj(z) if self.flipped else z) + self.b

    @property
    def scale(self) -> float:
        """Length in the reference plane per length in the source plane."""
        return abs(self.a)

    @property
    def rotation(self) -> float:
        """Rotation (after the reflection, if there is one) in degrees, -180 to 180."""
        return math.degrees(math.atan2(self.a.imag, self.a.real))


@dataclass(frozen=True)
class PatternMatch:
    """A verified match.

    Attributes
    ----------
    source_index, reference_index : ndarray of int, shape (n,)
        Matched pairs, as indices into the lists given to `match_pattern`.
    similarity : Similarity
        From the source plane to the reference plane.
    chance : float
        Upper bound of the expected number of hypotheses, among all that were tried, that would
        match as many stars by chance.
    """

    source_index: IndexArray
    reference_index: IndexArray
    similarity: Similarity
    chance: float


def match_pattern(
    sources: ArrayLike,
    references: ArrayLike,
    near: SearchWindow,
    wide: SearchWindow,
    tolerance: float,
    max_chance: float = 1e-4,
    min_matches: int = 5,
) -> PatternMatch | None:
    """Find the similarity transformation that lays sources onto reference stars.

    First the neighbourhood of the expected place is searched with votes for the shift alone
    (cheap, and good for as few as `min_matches` stars), then the wide window with votes of pairs,
    of few bright stars first. Where no match passes the test, None is returned.

    Parameters
    ----------
    sources : array_like, shape (n, 2)
        Positions, brightest first, with the origin near the middle of the image. May contain
        any fraction of spurious ones.
    references : array_like, shape (m, 2)
        Predicted positions of the reference stars, brightest first, over all of the area that
        the wide window can reach.
    near, wide : SearchWindow
        Where to look first, and where to look if nothing is found there.
    tolerance : float
        Typical distance of matching stars after the best similarity transformation (errors of
        the centroids, and distortion that is not in the prediction).
    max_chance : float
        A match is accepted if fewer chance matches than this are expected.
    min_matches : int
        Smallest number of matched stars.
    """
    z, w = _as_complex(sources), _as_complex(references)
    if min(z.size, w.size) < min_matches or np.abs(z).max() <= 4.0 * tolerance:
        return None
    test = _Verifier(z, w, tolerance, min_matches)
    match = test.best(_offset_votes(z, w, near, tolerance), near, stars_used=1)
    if match is not None and match.chance < max_chance:
        return match
    for votes in _pair_searches(z, w, wide, tolerance):
        match = test.best(votes, wide, stars_used=2)
        if match is not None and match.chance < max_chance:
            return match
    return None


@dataclass(frozen=True)
class _Votes:
    """Votes for transformations.

    ``place`` has one row per vote, in units of the cells of a grid; ``pairs`` says which sources
    and reference stars would correspond: shape (votes, correspondences, 2).
    """

    place: NDArray[np.float64]
    pairs: IndexArray
    flipped: bool

    def candidates(self, z: ComplexArray, w: ComplexArray, tolerance: float) -> Iterator:
        """Yield the transformations of the most crowded places."""
        for group in _crowded_places(self.place):
            pairs, counts = np.unique(self.pairs[group].reshape(-1, 2), axis=0, return_counts=True)
            similarity = _similarity_of_votes(z, w, pairs, counts, self.flipped, tolerance)
            if similarity is not None:
                yield similarity


def _crowded_places(place: NDArray[np.float64]) -> Iterator[IndexArray]:
    """Yield the votes in the fullest cells, each with its neighbours, the fullest first."""
    if len(place) == 0:
        return
    cells = np.floor(place).astype(np.int64)
    cells -= cells.min(axis=0) - 1
    strides = np.cumprod(np.concatenate([[1], cells.max(axis=0)[:-1] + 2]))
    keys = cells @ strides
    order = np.argsort(keys, kind="stable")
    cell_keys, starts, counts = np.unique(keys[order], return_index=True, return_counts=True)
    steps = np.array(list(itertools.product((-1, 0, 1), repeat=cells.shape[1]))) @ strides
    n_top = min(_CANDIDATES, cell_keys.size)
    top = np.argpartition(-counts, n_top - 1)[:n_top]
    # cells with equal counts in the order of their keys: the same result on every machine
    top = top[np.lexsort((cell_keys[top], -counts[top]))]
    seen = np.zeros(cell_keys.size, bool)
    for cell in top:
        if seen[cell]:
            continue
        seen[cell] = True
        at = np.searchsorted(cell_keys, cell_keys[cell] + steps)
        at = at[at < cell_keys.size]
        at = at[np.isin(cell_keys[at], cell_keys[cell] + steps)]
        yield np.concatenate([order[starts[c] : starts[c] + counts[c]] for c in np.unique(at)])


def _similarity_of_votes(
    z: ComplexArray,
    w: ComplexArray,
    pairs: IndexArray,
    counts: IndexArray,
    flipped: bool,
    tolerance: float,
) -> Similarity | None:
    """Fit the correspondences that got most votes, each star taken once, outliers left out."""
    order = np.argsort(-counts, kind="stable")
    pairs, counts = pairs[order], counts[order]
    _, first_source = np.unique(pairs[:, 0], return_index=True)
    _, first_reference = np.unique(pairs[:, 1], return_index=True)
    chosen = np.intersect1d(first_source, first_reference)
    chosen = chosen[counts[chosen] >= 0.3 * counts[0]]
    i, k = pairs[chosen].T
    for _ in range(4):
        if i.size < 2:
            return None
        similarity = fit_similarity(z[i], w[k], flipped)
        distance = np.abs(similarity(z[i]) - w[k])
        keep = distance <= max(2.0 * np.median(distance), tolerance)
        if keep.all():
            break
        i, k = i[keep], k[keep]
    return similarity


def fit_similarity(z: ComplexArray, w: ComplexArray, flipped: bool = False) -> Similarity:
    """Return the similarity transformation from z to w, shape (n,), by least squares.

    With one pair only the shift is fitted; ``flipped`` fits a transformation with a reflection.
    """
    source = np.conj(z) if flipped else z
    centre, target = source.mean(), w.mean()
    spread = np.sum(np.abs(source - centre) ** 2)
    a = np.sum((w - target) * np.conj(source - centre)) / spread if spread > 0 else 1.0
    return Similarity(complex(a), complex(target - a * centre), flipped)


def _offset_votes(
    z: ComplexArray, w: ComplexArray, window: SearchWindow, tolerance: float
) -> _Votes:
    """Vote for the shift with all pairs (source, reference), at a few small rotations."""
    half_size = np.abs(z).max()
    z = z[:200]
    cell = 4.0 * tolerance
    # a step in rotation moves the edge of the image by one cell
    n_steps = math.ceil(math.radians(window.rotation) * half_size / cell)
    rotations = np.radians(window.rotation) * np.linspace(-1.0, 1.0, 2 * n_steps + 1)
    reach = window.shift + (math.radians(window.rotation) + window.scale) * half_size
    near = cKDTree(_xy(w)).query_ball_point(_xy(z), reach)
    i = np.repeat(np.arange(z.size), [len(k) for k in near])
    k = np.fromiter(itertools.chain.from_iterable(near), np.intp, i.size)
    places, pairs = [], []
    for step, rotation in enumerate(rotations):
        b = w[k] - np.exp(1j * rotation) * z[i]
        inside = np.abs(b) <= window.shift
        b = b[inside] / cell
        places.append(np.stack([np.full(b.size, step + 0.5), b.real, b.imag], axis=1))
        pairs.append(np.stack([i[inside], k[inside]], axis=1)[:, None, :])
    return _Votes(np.concatenate(places), np.concatenate(pairs), False)


def _pair_searches(
    z: ComplexArray, w: ComplexArray, window: SearchWindow, tolerance: float
) -> Iterator[_Votes]:
    """Yield the votes of pairs of ever more stars, as long as they are not too many.

    As many reference stars are taken as have the same surface density as the sources, or twice
    that: the brightest sources have their counterparts among the brightest reference stars.
    """
    half_size = np.abs(z).max()
    reach = window.shift + half_size * (1.0 + window.scale)
    reachable = np.flatnonzero(np.abs(w) <= reach)
    box_area = float(np.ptp(z.real) * np.ptp(z.imag))
    area_ratio = max(1.0, np.pi * reach**2 / max(box_area, 1e-30))
    done = set()
    for n_sources, density in _PAIR_STEPS:
        n = min(n_sources, z.size)
        m = min(int(n * density * area_ratio) + 1, reachable.size)
        if (n, m) in done:
            continue
        done.add((n, m))
        if m**2 / 2 * min(1.0, (2.0 * half_size / reach) ** 2) > _MAX_VOTES:
            continue
        lengths = _PairLengths(z[:n], w[reachable[:m]], 0.25 * half_size, window.scale)
        for flipped in (False, True) if window.either_parity else (False,):
            if lengths.n_votes <= _MAX_VOTES:
                votes = _pair_votes(lengths, window, tolerance, flipped)
                votes.pairs[..., 1] = reachable[votes.pairs[..., 1]]
                yield votes


class _PairLengths:
    """Pairs of sources with the pairs of reference stars that are as long, within the scale."""

    def __init__(self, z: ComplexArray, w: ComplexArray, shortest: float, scale: float):
        self.z, self.w = z, w
        self.i, self.j = np.triu_indices(z.size, 1)
        long_enough = np.abs(z[self.j] - z[self.i]) >= shortest
        self.i, self.j = self.i[long_enough], self.j[long_enough]
        length = np.abs(z[self.j] - z[self.i])
        longest = (1.0 + scale) * length.max(initial=0.0)
        pairs = cKDTree(_xy(w)).query_pairs(longest, output_type="ndarray")
        self.k, self.l = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))].T
        reference_length = np.abs(w[self.l] - w[self.k])
        order = np.argsort(reference_length, kind="stable")
        self.k, self.l = self.k[order], self.l[order]
        reference_length = reference_length[order]
        self.first = np.searchsorted(reference_length, length * (1.0 - scale))
        self.count = np.searchsorted(reference_length, length * (1.0 + scale)) - self.first
        self.n_votes = 2 * int(self.count.sum())

    def expand(self) -> tuple[IndexArray, IndexArray]:
        """Return the indices of the pairs of sources and of reference stars of every vote."""
        source_pair = np.repeat(np.arange(self.i.size), self.count)
        before = np.repeat(np.cumsum(self.count) - self.count, self.count)
        reference_pair = np.arange(source_pair.size) - before + self.first[source_pair]
        return source_pair, reference_pair


def _pair_votes(
    lengths: _PairLengths, window: SearchWindow, tolerance: float, flipped: bool
) -> _Votes:
    """Vote for the transformation with all pairs of equal length, both ways round."""
    z = np.conj(lengths.z) if flipped else lengths.z
    w = lengths.w
    half_size = np.abs(z).max()
    source_pair, reference_pair = lengths.expand()
    places, pairs = [], []
    for begin, end in ((lengths.k, lengths.l), (lengths.l, lengths.k)):
        i, j = lengths.i[source_pair], lengths.j[source_pair]
        k, l = begin[reference_pair], end[reference_pair]  # noqa: E741 - beside i, j, k
        a = (w[l] - w[k]) / (z[j] - z[i])
        b = w[k] - a * z[i]
        keep = np.abs(b) <= window.shift
        if window.rotation < 180.0 and not flipped:
            keep &= np.abs(np.angle(a, deg=True)) <= window.rotation
        a, b = a[keep] / (4.0 * tolerance / half_size), b[keep] / (4.0 * tolerance)
        places.append(np.stack([a.real, a.imag, b.real, b.imag], axis=1))
        both = np.stack([np.stack([i, k], axis=1), np.stack([j, l], axis=1)], axis=1)
        pairs.append(both[keep])
    return _Votes(np.concatenate(places), np.concatenate(pairs), flipped)


class _Verifier:
    """Tests candidates with all stars; keeps count of all hypotheses that were tried."""

    def __init__(self, z: ComplexArray, w: ComplexArray, tolerance: float, min_matches: int):
        self.z, self.w = z, w
        self.tree = cKDTree(_xy(w))
        self.tolerance = tolerance
        self.min_matches = min_matches
        self.n_hypotheses = 0

    def best(self, votes: _Votes, window: SearchWindow, stars_used: int) -> PatternMatch | None:
        """Return the least improbable match within a window, of the candidates that votes give.

        Each vote is a hypothesis; ``stars_used`` is the number of stars that define it (and so
        prove nothing): 1 for a shift, 2 for a pair.
        """
        self.n_hypotheses += len(votes.place)
        slack = self.tolerance / float(np.abs(self.z).max())
        best = None
        for candidate in votes.candidates(self.z, self.w, self.tolerance):
            match = self._test(candidate, stars_used)
            if match is None or not window.contains(match.similarity, slack):
                continue
            if best is None or match.chance < best.chance:
                best = match
            if best.chance < _CERTAIN:
                break
        return best

    def _test(self, similarity: Similarity, stars_used: int) -> PatternMatch | None:
        """Refine a candidate and return it as a match, however improbable it is."""
        radius = 4.0 * self.tolerance
        before = np.array([], np.intp)
        for _ in range(8):
            i, k, distance = match_nearest(self.tree, similarity(self.z), radius)
            if i.size < self.min_matches:
                return None
            # half of a two-dimensional Gaussian lies within 1.18 sigma
            sigma = np.partition(distance, i.size // 2)[i.size // 2] / 1.18
            limit = max(4.0 * sigma, 0.3 * self.tolerance)
            if limit >= radius and np.array_equal(i, before):
                break
            similarity = fit_similarity(self.z[i], self.w[k], similarity.flipped)
            radius, before = min(radius, limit), i
        i, k, _ = match_nearest(self.tree, similarity(self.z), radius)
        if i.size < self.min_matches:
            return None
        chance = self._chance(similarity, radius, i.size, stars_used)
        return PatternMatch(i, k, similarity, chance)

    def _chance(self, similarity: Similarity, radius: float, n: int, stars_used: int) -> float:
        """Return how many of the tried hypotheses would match n stars by chance.

        A hypothesis is defined by the stars that voted for it, so they are not counted. All
        others have the local density of reference stars around them as their chance; unequal
        chances are bounded by the binomial of their mean [6]_. The radius is doubled, since the
        fit to all stars can have moved by that much from the hypothesis.
        """
        moved = similarity(self.z)
        wide = max(20.0 * radius, 0.3 * np.abs(self.z).max())
        neighbours = self.tree.query_ball_point(_xy(moved), wide, return_length=True)
        # where there are few neighbours the density is not known better than to one star
        p = float(np.mean(np.minimum((neighbours + 1) * (2.0 * radius / wide) ** 2, 1.0)))
        free, trials = n - stars_used, self.z.size - stars_used
        return self.n_hypotheses * float(betainc(free, trials - free + 1, p))


def match_nearest(
    tree: cKDTree, positions: ComplexArray, radius: float
) -> tuple[IndexArray, IndexArray, NDArray[np.float64]]:
    """Match each position with the nearest point of the tree, each point with one position.

    Returned are the indices of matched positions and points, in the order of the positions, and
    their distances, which are at most ``radius``.
    """
    distance, k = tree.query(_xy(positions), distance_upper_bound=radius)
    i = np.flatnonzero(np.isfinite(distance))
    # the nearest position of each point comes first
    i = i[np.lexsort((distance[i], k[i]))]
    first = np.diff(k[i], prepend=-1) != 0
    i = np.sort(i[first])
    return i, k[i], distance[i]


def _as_complex(positions: ArrayLike) -> ComplexArray:
    positions = np.asarray(positions, float).reshape(-1, 2)
    return positions[:, 0] + 1j * positions[:, 1]


def _xy(z: ComplexArray) -> NDArray[np.float64]:
    return np.stack([z.real, z.imag], axis=-1)
