"""Background matching: what the skies of the exposures of a tract differ by.

Each calexp had its own sky subtracted, and what is left of it differs from exposure to exposure.
Where exposures overlap they see the same sky, so the difference there is an error of their
backgrounds. It is formed only of the same places: the tract is cut into small cells, a cell counts
for an exposure that covers it whole, and two exposures are compared in the cells that count for
both. (Medians over larger squares of which each exposure fills another part would take structure
of the sky for a difference.) Sources are the same in both as well and are not masked: a mask would
cut them at another level in each exposure. Where pixels are bad, the value of a cell is that of a
plane through the others, at its centre. Cells with structure that no plane describes, stars above
all, have less weight.

With v_ep the sky of exposure e in cell p, w_ep its weight, and c_e the correction of e,

    sum_(e<f) sum_p (w_ep w_fp / W_p) (v_ep - v_fp - c_e(p) + c_f(p))^2,   W_p = sum_e w_ep

is made smallest: the pairwise rectification of [1]_ for all pairs of overlapping exposures at
once, weighted as if one common sky were solved for in each cell (the simultaneous solution of
[2]_). [3]_ match each exposure to a reference instead, which needs one that covers all. Cells of an
overlap that deviate from its own constant or plane are rejected before.

Differences do not tell what is common to all exposures. Of all solutions the smallest in
sum_e g_e c_e^2 is taken, g_e = sum_p w_ep: the weighted mean of the corrections is zero in every
group of exposures that overlaps link, so that the coadd keeps its mean level, and an
exposure that overlaps no other is left as it is. Slopes that the overlaps hardly determine are held
to zero.

The steps that are left are measured in all cells of the overlaps, also the rejected ones; a
solution that leaves larger steps than there were is not applied.

References
----------
.. [1] Berriman et al. 2008, Montage: Algorithms, background modelling (mFitplane, mBgModel).
.. [2] Padmanabhan et al. 2008, ApJ 674, 1217, section 2 (the same algebra for zero-points).
.. [3] LSST Science Pipelines, ``MatchBackgroundsTask``; Huff et al. 2014, MNRAS 440, 1296.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.geometry.box import Box
from coaddflow.image.masked_image import MaskPlane, planes_from_names
from coaddflow.image.statistics import mad_sigma
from coaddflow.settings.coadd import BackgroundMatchingSettings
from coaddflow.warp.files import Warp

_LOG = logging.getLogger(__name__)

_MOST_MISSING = 0.1
"""Part of a cell without data up to which it is covered: dead pixels, but not the border."""

_STRUCTURE_ERROR = 0.05
"""Error of a cell relative to the scatter of its pixels about a plane beyond their noise: stars at
its border under different seeing, zero-points."""

_MAX_DIFFERENCES = 1_000_000
"""Differences that are solved for at a time; of larger overlaps a part of the cells is taken."""

_FEWEST_OF_PAIR, _SEGMENTS = 16, 8
_MAX_ROUNDS = 10
_NO_DATA = np.int32(MaskPlane.NO_DATA)
_NOT_DETERMINED = 1e-9
"""Eigenvalues of the scaled normal matrix, relative to the largest, that count as zero."""


@dataclass(frozen=True)
class SkyBins:
    """The sky in cells of the tract."""

    index: NDArray[np.int32]
    """Number of the cell along x and y, from the origin of the tract, shape (n, 2)."""
    value: NDArray[np.float32]
    """Sky at the centre of the cell, nJy per pixel, shape (n,)."""
    weight: NDArray[np.float32]
    """Its inverse variance, shape (n,)."""


@dataclass(frozen=True)
class SkyCorrection:
    """What is subtracted from a warp: a constant or a plane."""

    coefficients: tuple[float, ...]
    """nJy per pixel at the centre; and with planes the slopes along x and y, per ``size``."""
    centre: tuple[float, float] = (0.0, 0.0)
    """Middle of the exposure on the tract, pixels."""
    size: float = 1.0
    """Half of the extent of the exposure, pixels."""

    def on_box(self, box: Box) -> NDArray[np.float32] | np.float32:
        """Return the correction on a box of tract pixels: an image, or one number."""
        if len(self.coefficients) == 1:
            return np.float32(self.coefficients[0])
        constant, along_x, along_y = self.coefficients
        x = (np.arange(box[0], box[2]) - self.centre[0]) / self.size
        y = (np.arange(box[1], box[3]) - self.centre[1]) / self.size
        return (constant + along_x * x[None, :] + along_y * y[:, None]).astype(np.float32)

    def at(self, x: float, y: float) -> float:
        """Return the correction at a pixel of the tract."""
        place = (1.0, (x - self.centre[0]) / self.size, (y - self.centre[1]) / self.size)
        return float(np.dot(self.coefficients, place[: len(self.coefficients)]))


# The cells of one exposure -----------------------------------------------------------------------


def bin_sky(
    warp: Warp, bad_planes: Sequence[str], settings: BackgroundMatchingSettings, thin: int = 1
) -> SkyBins:
    """Measure the sky of a warp in cells.

    Parameters
    ----------
    warp : Warp
        Pixels on the tract.
    bad_planes : sequence of str
        Mask planes with which a pixel is not used.
    settings : BackgroundMatchingSettings
        Size of the cells, and the part of one that must be usable.
    thin : int
        Only one in so many cells is measured, the same ones in all exposures.
    """
    size, image = settings.bin_size, warp.masked_image
    x0, y0, x1, y1 = warp.box
    columns, rows = np.arange(x0 // size, -(-x1 // size)), np.arange(y0 // size, -(-y1 // size))
    # spread without a pattern, so that also a narrow overlap has some
    chosen = ((columns[None, :] * 73856093) ^ (rows[:, None] * 19349663)) % thin == 0
    place = np.argwhere(chosen) + np.array([rows[0], columns[0]])
    planes = (image.image, image.variance, image.mask)
    bad = np.int32(planes_from_names(tuple(bad_planes)))
    found = _measure_cells(planes, (x0, y0), place, size, bad, settings.min_fraction)
    good = found[:, 1] > 0
    value, weight = found[good].astype(np.float32).T
    return SkyBins(place[good, ::-1].astype(np.int32), value, weight)


@njit(nogil=True)
def _measure_cells(planes, origin, place, size, bad, min_fraction):
    """Return value and weight (0: not usable) of the cells, shape (n, 2)."""
    found = np.zeros((len(place), 2))
    fewest = max(min_fraction * size * size, 4.0)
    for k in range(len(place)):
        corner = place[k, 0] * size - origin[1], place[k, 1] * size - origin[0]
        sums, n_missing = _sum_cell(planes, corner, size, bad)
        if n_missing <= _MOST_MISSING * size * size and sums[0] >= fewest:
            found[k] = _value_at_centre(sums)
    return found


@njit(nogil=True)
def _sum_cell(planes, corner, size, bad):
    """Return the sums that the fit of a plane needs, and the number of pixels without data."""
    image, variance, mask = planes
    ny, nx = image.shape
    sums, n_missing = np.zeros(11), 0
    for j in range(size):
        for i in range(size):
            y, x = corner[0] + j, corner[1] + i
            if not (0 <= y < ny and 0 <= x < nx) or (mask[y, x] & _NO_DATA) != 0:
                n_missing += 1
                continue
            value, noise = np.float64(image[y, x]), np.float64(variance[y, x])
            if (mask[y, x] & bad) != 0 or not (np.isfinite(value) and 0.0 < noise < np.inf):
                continue
            u, v = i - (size - 1) / 2.0, j - (size - 1) / 2.0
            terms = (1.0, u, v, u * u, u * v, v * v, value, value * u, value * v, value**2, noise)
            for t in range(11):
                sums[t] += terms[t]
    return sums, n_missing


@njit(nogil=True)
def _value_at_centre(sums):
    """Return value and inverse variance at the centre of a plane through the pixels of a cell."""
    n, u, v, uu, uv, vv, s, su, sv, ss, noise = sums
    # of the inverse of the symmetric matrix of the fit, times its determinant
    a, b, c = uu * vv - uv * uv, uv * v - u * vv, u * uv - uu * v
    d, e, f = n * vv - v * v, u * v - n * uv, n * uu - u * u
    determinant = n * a + u * b + v * c
    if determinant <= 1e-6 * n * uu * vv:
        return 0.0, 0.0
    value = (a * s + b * su + c * sv) / determinant
    slope_u = (b * s + d * su + e * sv) / determinant
    slope_v = (c * s + e * su + f * sv) / determinant
    scatter = (ss - value * s - slope_u * su - slope_v * sv) / n
    structure = max(scatter - noise / n, 0.0)
    return value, 1.0 / (a / determinant * noise / n + _STRUCTURE_ERROR**2 * structure)


def merge_bins(parts: Sequence[SkyBins]) -> SkyBins:
    """Return the sky of an exposure from that of its CCDs; in common cells that of the first."""
    index = np.concatenate([one.index for one in parts])
    _, first = np.unique(_cell_numbers(index), return_index=True)
    value = np.concatenate([one.value for one in parts])
    weight = np.concatenate([one.weight for one in parts])
    return SkyBins(index[first], value[first], weight[first])


def _cell_numbers(index: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return one number for each cell."""
    x, y = index.astype(np.int64).T
    return (y << 32) + x


# The differences of all pairs --------------------------------------------------------------------


@dataclass(frozen=True)
class _Overlap:
    """The cells that count for two exposures."""

    first: int
    second: int
    difference: NDArray[np.float64]
    """First less second, nJy per pixel, shape (n,)."""
    weight: NDArray[np.float64]
    """See the sum in the module's docstring; for all cells, where only a part of them is here."""
    place: NDArray[np.float64]
    """Centres of the cells on the tract, pixels, shape (n, 2)."""
    n_cells: int
    """How many there are in all."""


def match_backgrounds(
    skies: Mapping[str, SkyBins], settings: BackgroundMatchingSettings
) -> dict[str, SkyCorrection]:
    """Solve for the corrections of all exposures of a tract.

    Parameters
    ----------
    skies : mapping of str to SkyBins
        The sky of each exposure.
    settings : BackgroundMatchingSettings
        Constants or planes, and the threshold for cells that deviate.

    Returns
    -------
    dict of str to SkyCorrection
        For each exposure, also those without overlap (zero). All are zero, and a warning is
        logged, if the solution would leave larger steps in the overlaps than there were.
    """
    exposures = sorted(skies)
    cells = [skies[exposure] for exposure in exposures]
    frames = [_Frame.of(sky, settings) for sky in cells]
    overlaps = list(_overlaps(cells, settings.bin_size))
    _report_groups(exposures, overlaps)
    hold = np.array([sky.weight.sum(dtype=float) for sky in cells])
    kept = [_without_outliers(one, settings) for one in overlaps]
    coefficients = _if_better(_solve(kept, frames, hold), overlaps, frames)
    return {
        exposure: SkyCorrection(tuple(map(float, c)), frame.centre, frame.size)
        for exposure, c, frame in zip(exposures, coefficients, frames, strict=True)
    }


def _if_better(
    coefficients: NDArray[np.float64], overlaps: Sequence["_Overlap"], frames: Sequence["_Frame"]
) -> NDArray[np.float64]:
    """Return a solution, or none if the steps between exposures would not become smaller by it."""
    if not overlaps:
        return coefficients
    none = np.zeros_like(coefficients)
    before, after = (_steps(overlaps, frames, one) for one in (none, coefficients))
    if after < before:
        _LOG.info(
            "skies of %d exposures matched; steps in their %d overlaps: rms %.3g nJy before, "
            "%.3g nJy after",
            *(len(frames), len(overlaps), before, after),
        )
        return coefficients
    _LOG.warning(
        "background matching is not applied: it would leave steps of %.3g nJy (rms) in the %d "
        "overlaps, where there are %.3g without it",
        *(after, len(overlaps), before),
    )
    return none


@dataclass(frozen=True)
class _Frame:
    """Where an exposure is on the tract, for the terms of its correction."""

    centre: tuple[float, float]
    size: float
    n_terms: int

    @classmethod
    def of(cls, sky: SkyBins, settings: BackgroundMatchingSettings) -> "_Frame":
        """Return the frame of an exposure."""
        n_terms, side = {"constant": 1, "plane": 3}[settings.model], settings.bin_size
        if not len(sky.index):
            return cls((0.0, 0.0), float(side), n_terms)
        low, high = sky.index.min(axis=0), sky.index.max(axis=0)
        middle = ((low + high + 1.0) * side - 1.0) / 2.0
        return cls(
            tuple(middle.tolist()), float(max((high - low).max() / 2.0, 1.0) * side), n_terms
        )

    def terms(self, place: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the terms at places on the tract, shape (n, n_terms)."""
        terms = np.ones((len(place), self.n_terms))
        if self.n_terms > 1:
            terms[:, 1:] = (place - self.centre) / self.size
        return terms


def _overlaps(cells: Sequence[SkyBins], bin_size: int) -> Iterator[_Overlap]:
    """Yield the overlaps of all pairs of exposures that have some."""
    numbers = [_cell_numbers(sky.index) for sky in cells]
    known, place = np.unique(np.concatenate([*numbers, np.zeros(0, np.int64)]), return_inverse=True)
    places = np.split(place.reshape(-1), np.cumsum([len(n) for n in numbers])[:-1])
    total = np.zeros(len(known))
    for sky, where in zip(cells, places, strict=True):
        total[where] += sky.weight
    most = max(_FEWEST_OF_PAIR, _MAX_DIFFERENCES // max(len(cells) * (len(cells) - 1) // 2, 1))
    found = np.full(len(known), -1, np.int64)
    for e, sky in enumerate(cells):
        found[places[e]] = np.arange(len(places[e]))
        for f in range(e + 1, len(cells)):
            ours = found[places[f]]
            theirs = np.flatnonzero(ours >= 0)
            if theirs.size:
                chosen = theirs[:: -(-theirs.size // most)]
                part = ours[chosen], chosen
                yield _overlap(e, f, sky, cells[f], part, total, places, theirs.size, bin_size)
        found[places[e]] = -1


def _overlap(e, f, first, second, part, total, places, n_cells, bin_size) -> _Overlap:
    """Return the overlap of two exposures in some of its cells."""
    ours, theirs = part
    weight = first.weight[ours].astype(float) * second.weight[theirs]
    weight *= n_cells / len(theirs) / total[places[f][theirs]]
    return _Overlap(
        e,
        f,
        first.value[ours].astype(float) - second.value[theirs],
        weight,
        (second.index[theirs] + 0.5) * bin_size - 0.5,
        n_cells,
    )


def _without_outliers(overlap: _Overlap, settings: BackgroundMatchingSettings) -> _Overlap:
    """Leave out the cells that deviate from the constant or plane of their overlap.

    Where the others deviate by more than their noise, their weights are reduced.
    """
    frame = _Frame(
        tuple(overlap.place.mean(axis=0).tolist()),
        float(max(np.ptp(overlap.place, axis=0).max() / 2.0, settings.bin_size)),
        {"constant": 1, "plane": 3}[settings.model],
    )
    terms, root = frame.terms(overlap.place), np.sqrt(overlap.weight)
    left = (overlap.difference - np.median(overlap.difference)) * root
    kept = np.ones(len(left), np.bool_)
    for _ in range(_MAX_ROUNDS):
        noise = mad_sigma(left[kept], centre=0.0)
        good = np.abs(left) <= settings.sigma * noise if noise > 0 else kept
        weighted = terms[good].T * overlap.weight[good]
        normal, right = weighted @ terms[good], weighted @ overlap.difference[good]
        fit = np.linalg.pinv(normal, rcond=1e-9, hermitian=True) @ right
        left = (overlap.difference - terms @ fit) * root
        if np.array_equal(good, kept):
            break
        kept = good
    chi = np.sqrt(np.mean(left[kept] ** 2) * overlap.n_cells / len(left))
    return replace(
        overlap,
        difference=overlap.difference[kept],
        weight=overlap.weight[kept] / max(chi, 1.0) ** 2,
        place=overlap.place[kept],
    )


def _solve(
    overlaps: Sequence[_Overlap], frames: Sequence[_Frame], hold: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the coefficients that make the weighted differences smallest, shape (n, terms).

    ``hold``: of each exposure, the weight g in what the differences leave open.
    """
    n, n_terms = len(frames), frames[0].n_terms if frames else 1
    normal, right = np.zeros((n, n_terms, n, n_terms)), np.zeros((n, n_terms))
    for one in overlaps:
        sides = {one.first: 1.0, one.second: -1.0}
        terms = {e: sign * frames[e].terms(one.place) for e, sign in sides.items()}
        for e in sides:
            weighted = terms[e] * one.weight[:, None]
            right[e] += weighted.T @ one.difference
            for f in sides:
                normal[e, :, f] += weighted.T @ terms[f]
    normal, right = normal.reshape(n * n_terms, -1), right.reshape(-1)
    if n_terms > 1 and overlaps:
        # a slope is not expected to be larger than the differences are
        typical = np.mean([np.mean(one.difference**2) for one in overlaps])
        slopes = np.flatnonzero(np.arange(n * n_terms) % n_terms)
        normal[slopes, slopes] += 1.0 / max(typical, 1e-300)
    hold = np.repeat(np.where(hold > 0, hold, 1.0), n_terms)
    return _smallest_solution(normal, right, hold).reshape(n, n_terms)


def _smallest_solution(normal: NDArray, right: NDArray, hold: NDArray) -> NDArray[np.float64]:
    """Return of all solutions of the normal equations the smallest in sum(hold * solution^2)."""
    scale = 1.0 / np.sqrt(hold)
    eigenvalues, vectors = np.linalg.eigh(normal * scale * scale[:, None])
    known = eigenvalues > _NOT_DETERMINED * max(eigenvalues.max(initial=0.0), 1e-300)
    vectors = vectors[:, known]
    return scale * (vectors @ ((vectors.T @ (scale * right)) / eigenvalues[known]))


def _steps(
    overlaps: Sequence[_Overlap], frames: Sequence[_Frame], coefficients: NDArray[np.float64]
) -> float:
    """Return the steps between corrected exposures, rms over parts of their overlaps.

    Of each overlap all cells count, in up to eight parts along its longer side: the median of each.
    """
    steps, weights = [], []
    for one in overlaps:
        e, f = one.first, one.second
        left = one.difference - frames[e].terms(one.place) @ coefficients[e]
        left += frames[f].terms(one.place) @ coefficients[f]
        along = one.place[:, np.argmax(np.ptp(one.place, axis=0))]
        parts = np.array_split(left[np.argsort(along, kind="stable")], min(_SEGMENTS, len(left)))
        steps += [np.median(part) for part in parts]
        weights += [one.n_cells * len(part) / len(left) for part in parts]
    return float(np.sqrt(np.average(np.square(steps), weights=weights))) if steps else 0.0


def _report_groups(exposures: Sequence[str], overlaps: Sequence[_Overlap]) -> None:
    """Warn of exposures that cannot be compared."""
    groups = overlap_groups(len(exposures), [(one.first, one.second) for one in overlaps])
    alone = [exposures[group[0]] for group in groups if len(group) == 1]
    if len(groups) > 1:
        _LOG.warning(
            "the exposures form %d groups that do not overlap in usable sky; the levels of "
            "different groups are not matched. Alone: %s",
            len(groups),
            ", ".join(alone) or "none",
        )


def overlap_groups(n_exposures: int, pairs: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return the groups of exposures that are linked by overlaps.

    Parameters
    ----------
    n_exposures : int
        How many there are.
    pairs : sequence of (int, int)
        Those that overlap.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    links = coo_array((np.ones(len(first)), (first, second)), shape=(n_exposures, n_exposures))
    n_groups, group = connected_components(links, directed=False)
    return [np.flatnonzero(group == k).tolist() for k in range(n_groups)]
