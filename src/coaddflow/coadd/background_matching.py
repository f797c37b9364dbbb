"""Background matching: what the skies of the exposures of a tract differ by.

Each calexp had its own sky subtracted, and what is left of it differs from exposure to exposure.
Where exposures overlap they see the same sky, so the difference there is an error of their
backgrounds. The skies are compared in squares of tract pixels without detected sources. With
v_ep the sky of exposure e in square p, w_ep its weight, and c_e the correction of e,

    sum_p sum_{e<f} (w_ep w_fp / W_p) (v_ep - v_fp - c_e(p) + c_f(p))^2,   W_p = sum_e w_ep

is made smallest: the pairwise rectification of [1]_ for all pairs of overlapping exposures at
once, weighted so that it is the same as solving for one common sky s_p in each square (the
simultaneous solution of [2]_). [3]_ match each exposure to a reference instead, which needs one
that covers all.

Differences do not tell what is common to all exposures. Of all solutions the smallest in
sum_e g_e c_e^2 is taken, g_e = sum_p w_ep: the weighted mean of the corrections is zero in every
group of exposures that overlaps link, so that the coadd keeps its mean level, and an
exposure that overlaps no other is left as it is.

References
----------
.. [1] Berriman et al. 2008, Montage: Algorithms, background modelling (mFitplane, mBgModel).
.. [2] Padmanabhan et al. 2008, ApJ 674, 1217, section 2 (the same algebra for zero-points).
.. [3] LSST Science Pipelines, ``MatchBackgroundsTask``; Huff et al. 2014, MNRAS 440, 1296.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coaddflow.geometry.box import Box
from coaddflow.image.masked_image import MaskPlane, planes_from_names
from coaddflow.image.statistics import mad_sigma
from coaddflow.settings.coadd import BackgroundMatchingSettings
from coaddflow.warp.files import Warp

_LOG = logging.getLogger(__name__)

_MAX_ROUNDS = 10
_NOT_DETERMINED = 1e-9
"""Eigenvalues of the scaled normal matrix, relative to the largest, that count as zero."""

_HOLD_OF_SLOPES = 1e-3
"""Weight with which slopes are held to zero, relative to that of the data."""


@dataclass(frozen=True)
class SkyBins:
    """The sky in squares of the tract."""

    index: NDArray[np.int64]
    """Number of the square along x and y, from the origin of the tract, shape (n, 2)."""
    value: NDArray[np.float64]
    """Median of its pixels without sources or flaws, nJy per pixel, shape (n,)."""
    weight: NDArray[np.float64]
    """Number of these pixels over their typical variance, shape (n,)."""


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


def bin_sky(warp: Warp, bad_planes: Sequence[str], settings: BackgroundMatchingSettings) -> SkyBins:
    """Measure the sky of a warp in squares.

    Parameters
    ----------
    warp : Warp
        Pixels on the tract; those of detected sources are flagged DETECTED.
    bad_planes : sequence of str
        Mask planes with which a pixel is not used.
    settings : BackgroundMatchingSettings
        Size of the squares, and the part of one that must be usable.
    """
    size = settings.bin_size
    planes = planes_from_names(tuple(bad_planes)) | MaskPlane.DETECTED | MaskPlane.NO_DATA
    usable = ~warp.masked_image.has_any(planes)
    x0, y0, x1, y1 = warp.box
    found = []
    for row in range(y0 // size, -(-y1 // size)):
        rows = slice(max(row * size - y0, 0), (row + 1) * size - y0)
        for column in range(x0 // size, -(-x1 // size)):
            part = rows, slice(max(column * size - x0, 0), (column + 1) * size - x0)
            good = usable[part]
            if np.count_nonzero(good) >= settings.min_fraction * size**2:
                image = warp.masked_image.image[part][good]
                variance = warp.masked_image.variance[part][good]
                found.append((column, row, np.median(image), image.size / np.median(variance)))
    table = np.array(found, dtype=np.float64).reshape(-1, 4)
    return SkyBins(table[:, :2].astype(np.int64), table[:, 2], table[:, 3])


def merge_bins(parts: Sequence[SkyBins]) -> SkyBins:
    """Return the sky of an exposure from that of its CCDs: weighted means in common squares."""
    index, place = _unique_squares(parts)
    weight = np.concatenate([one.weight for one in parts])
    value = np.concatenate([one.value for one in parts])
    total = np.bincount(place, weight, len(index))
    return SkyBins(index, np.bincount(place, weight * value, len(index)) / total, total)


def match_backgrounds(
    skies: Mapping[str, SkyBins], settings: BackgroundMatchingSettings
) -> dict[str, SkyCorrection]:
    """Solve for the corrections of all exposures of a tract.

    Parameters
    ----------
    skies : mapping of str to SkyBins
        The sky of each exposure.
    settings : BackgroundMatchingSettings
        Constants or planes, and the threshold for squares that deviate.

    Returns
    -------
    dict of str to SkyCorrection
        For each exposure, also those without overlap (zero).
    """
    exposures = sorted(skies)
    value, weight, places = _as_grid([skies[exposure] for exposure in exposures])
    middles = (places + 0.5) * settings.bin_size - 0.5
    centre, size = _extents(weight, middles, settings.bin_size)
    basis = _basis(middles, settings.model, centre, size)
    coefficients, used = _solve_robustly(value, weight, basis, settings.sigma)
    _report(exposures, value, used, basis, coefficients)
    return {
        exposure: SkyCorrection(
            tuple(float(c) for c in coefficients[k]), tuple(centre[k].tolist()), float(size[k])
        )
        for k, exposure in enumerate(exposures)
    }


def _as_grid(
    skies: Sequence[SkyBins],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return values and weights (0: none), shape (exposures, squares), and the squares."""
    places, place = _unique_squares(skies)
    owner = np.repeat(np.arange(len(skies)), [len(sky.value) for sky in skies])
    shape = (len(skies), len(places))
    value, weight = np.zeros(shape), np.zeros(shape)
    value[owner, place] = np.concatenate([sky.value for sky in skies])
    weight[owner, place] = np.concatenate([sky.weight for sky in skies])
    return value, weight, places


def _unique_squares(skies: Sequence[SkyBins]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the squares that some skies have, and for each of their values which one it is."""
    index = np.concatenate([sky.index for sky in skies])
    places, place = np.unique(index, axis=0, return_inverse=True)
    return places, place.reshape(-1)


def _extents(
    weight: NDArray[np.float64], middles: NDArray[np.float64], bin_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return centre (n, 2) and half extent (n,) of the exposures, pixels."""
    centre, size = np.zeros((len(weight), 2)), np.full(len(weight), float(bin_size))
    for k, covered in enumerate(weight > 0):
        if covered.any():
            low, high = middles[covered].min(axis=0), middles[covered].max(axis=0)
            centre[k], size[k] = (low + high) / 2, max((high - low).max() / 2, bin_size)
    return centre, size


def _basis(middles: NDArray, model: str, centre: NDArray, size: NDArray) -> NDArray[np.float64]:
    """Return the functions that a correction is made of, shape (terms, exposures, squares)."""
    constant = np.ones((1, len(centre), len(middles)))
    if model == "constant":
        return constant
    slopes = (middles.T[:, None, :] - centre.T[:, :, None]) / size[None, :, None]
    return np.concatenate([constant, slopes])


def _solve_robustly(
    value: NDArray, weight: NDArray, basis: NDArray, sigma: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve, leave out what deviates, and solve again; return coefficients and weights used."""
    used, hold = weight, weight.sum(axis=1)
    for _ in range(_MAX_ROUNDS):
        coefficients = _solve(value, used, basis, hold)
        deviation = np.abs(_residuals(value, weight, used, basis, coefficients))
        deviation *= np.sqrt(weight)
        shared = _shared(used)
        if not shared.any():
            break
        noise = mad_sigma(deviation[shared], centre=0.0)
        kept = np.where(deviation <= sigma * noise, weight, 0.0) if noise > 0 else used
        if np.array_equal(kept, used):
            break
        used = kept
    return coefficients, used


def _shared(used: NDArray) -> NDArray[np.bool_]:
    """Return which values are compared: alone in a square, an exposure agrees with itself."""
    return (used > 0) & (np.count_nonzero(used, axis=0) > 1)


def _solve(value: NDArray, weight: NDArray, basis: NDArray, hold: NDArray) -> NDArray[np.float64]:
    """Return the coefficients that make the weighted differences smallest, shape (n, terms).

    ``hold``: of each exposure, the weight g in what the differences leave open.
    """
    n_terms, n, _ = basis.shape
    total = weight.sum(axis=0)
    inverse = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    common = (weight * value).sum(axis=0) * inverse
    terms = weight * basis
    flat = terms.reshape(n_terms * n, -1)
    normal = -(flat * inverse) @ flat.T
    own = np.einsum("jep,lep->jle", terms, basis)
    for j in range(n_terms):
        for k in range(n_terms):
            block = normal[j * n : (j + 1) * n, k * n : (k + 1) * n]
            block[np.diag_indices(n)] += own[j, k]
    right = (terms * (value - common)).sum(axis=2).reshape(-1)
    hold = np.tile(np.where(hold > 0, hold, 1.0), n_terms)
    normal[np.arange(n, n_terms * n), np.arange(n, n_terms * n)] += _HOLD_OF_SLOPES * hold[n:]
    solution = _smallest_solution(normal, right, hold)
    return solution.reshape(n_terms, n).T


def _smallest_solution(normal: NDArray, right: NDArray, hold: NDArray) -> NDArray[np.float64]:
    """Return of all solutions of the normal equations the smallest in sum(hold * solution^2)."""
    scale = 1.0 / np.sqrt(hold)
    eigenvalues, vectors = np.linalg.eigh(normal * scale * scale[:, None])
    known = eigenvalues > _NOT_DETERMINED * max(eigenvalues.max(initial=0.0), 1e-300)
    vectors = vectors[:, known]
    return scale * (vectors @ ((vectors.T @ (scale * right)) / eigenvalues[known]))


def _residuals(
    value: NDArray, weight: NDArray, used: NDArray, basis: NDArray, coefficients: NDArray
) -> NDArray[np.float64]:
    """Return what is left of the differences to the common sky; 0 where there is no value."""
    left = value - np.einsum("jep,ej->ep", basis, coefficients)
    total = used.sum(axis=0)
    common = np.divide((used * left).sum(axis=0), total, out=np.zeros_like(total), where=total > 0)
    return np.where((weight > 0) & (total > 0), left - common, 0.0)


def _report(
    exposures: Sequence[str], value: NDArray, used: NDArray, basis: NDArray, coefficients: NDArray
) -> None:
    """Log what the matching did, and which exposures it could not compare."""
    shared = _shared(used)
    if shared.any():
        before = _residuals(value, used, used, basis, np.zeros_like(coefficients))[shared]
        after = _residuals(value, used, used, basis, coefficients)[shared]
        _LOG.info(
            "skies of %d exposures matched in %d squares: rms %.3g nJy before, %.3g nJy after",
            len(exposures),
            np.count_nonzero(shared.any(axis=0)),
            np.sqrt(np.mean(before**2)),
            np.sqrt(np.mean(after**2)),
        )
    groups = overlap_groups(used)
    alone = [exposures[group[0]] for group in groups if len(group) == 1]
    if len(groups) > 1:
        _LOG.warning(
            "the exposures form %d groups that do not overlap in sky without sources; the levels "
            "of different groups are not matched. Alone: %s",
            len(groups),
            ", ".join(alone) or "none",
        )


def overlap_groups(weight: NDArray[np.float64]) -> list[list[int]]:
    """Return the groups of exposures that are linked by common squares.

    Parameters
    ----------
    weight : ndarray, shape (exposures, squares)
        Positive where an exposure has a value.
    """
    from scipy.sparse.csgraph import connected_components

    covered = (weight > 0).astype(float)
    n_groups, group = connected_components(covered @ covered.T, directed=False)
    return [np.flatnonzero(group == k).tolist() for k in range(n_groups)]
