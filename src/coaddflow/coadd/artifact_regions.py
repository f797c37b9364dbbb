"""Artifacts by comparison: regions that single exposures show and the static sky does not have.

The method is that of [1]_. All warps of a band are matched to a common PSF
(`coaddflow.warp.psf_matching`), and the static sky is the median of them at each pixel. The
difference of an exposure from it is reduced by a part of the light nearby, for what is left of
stars where PSF models and positions are not perfect, and divided by its noise. Pixels above a
threshold in this map, smoothed over the PSF and more, are candidates, with those connected to them
above a lower one. A candidate that more epochs show than artifacts can explain is a source that
varies or moves slowly, and stays. Others are rejected, as whole regions: where the exposures of a
coadd do not change from pixel to pixel, its PSF is defined.

Of two epochs nobody knows which is right: of what is different nothing is rejected, and it is
flagged in the epoch in which it is brighter. Of three and more epochs the median is not changed
much by one artifact. An epoch that is darker than the median is then an artifact too.

Smoothing and connected regions need whole patches: one exposure at a time is compared with the
static sky, which is kept. That is made pixel by pixel, so that it can come from blocks of rows.

References
----------
.. [1] AlSayyad 2019, DMTN-080; LSST Science Pipelines, ``CompareWarpAssembleCoadd``.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from coaddflow.coadd.clipping import max_outliers
from coaddflow.coadd.trails import bin_significance, find_trails, trail_mask
from coaddflow.compiled import njit
from coaddflow.image.medians import sort_together, sorting_network
from coaddflow.image.statistics import mad_sigma
from coaddflow.settings.artifacts import ArtifactSettings

_SIGMA_PER_FWHM = 1.0 / np.sqrt(8.0 * np.log(2.0))

_AT_A_TIME = 256
"""Pixels of a row of which the median is taken together."""

_EVEN, _ODD = 2.5, 1.14
"""The median of n normal values has the variance pi / (2 n + one of these), within 4 %."""

_LIGHT_SIGMA = 3.0
"""What the static sky shows less than this is noise."""

_LIGHT_REACH = 5
"""Side of the square in which the brightest pixel counts as light nearby."""

_NOISE_STEP = 5
"""Every so many pixels along each axis tell the noise of a map."""

_EMPTY = 0.5
"""Where the light explains less than this, in units of the noise, there is empty sky."""

_NOT_NOISE = 5.0
"""Values beyond this, in units of the noise, are of artifacts, and say nothing about the noise."""

_WITHIN_THREE_SIGMA = 0.9973
"""Part of the values of a normal distribution."""

_TRUNCATE = 3.0
"""Reach of the smoothing in standard deviations."""

_TOUCHING = np.ones((3, 3), int)
"""Pixels touch also by a corner."""

_LEAST_WEIGHT = 0.3
"""Part of the smoothing kernel that must have data."""


class StaticSky(NamedTuple):
    """What all epochs have in common, planes of shape (ny, nx)."""

    median: NDArray[np.float32]
    """Median of the epochs; NaN where there is none."""
    variance: NDArray[np.float32]
    """Median of their variances."""
    n_epochs: NDArray[np.int16]
    """Number of epochs."""


class Difference(NamedTuple):
    """An epoch minus the static sky, planes of shape (ny, nx); NaN where nothing is compared."""

    significance: NDArray[np.float32]
    """In units of its noise."""
    tolerance: NDArray[np.float32]
    """What the light nearby explains of it, in the same units."""

    def unexplained(self) -> NDArray[np.float32]:
        """Return the significance without the part that the light explains."""
        return _reduced(self.significance, self.tolerance)

    def without(self, pixels: NDArray[np.bool_]) -> "Difference":
        """Return the difference with some pixels not compared."""
        return Difference(np.where(pixels, np.float32(np.nan), self.significance), self.tolerance)


def _reduced(values: NDArray[np.float32], by: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return values that are nearer to 0 by some amount, or 0."""
    return np.copysign(np.maximum(np.abs(values) - by, np.float32(0.0)), values)


class EpochArtifacts(NamedTuple):
    """What is wrong with an exposure, planes of shape (ny, nx)."""

    rejected: NDArray[np.bool_]
    """Not to be used."""
    flagged: NDArray[np.bool_]
    """Differs, but there are too few epochs to tell which of them is right."""
    streak: NDArray[np.bool_]
    """Part of a trail; rejected or flagged."""


# The static sky ---------------------------------------------------------------------------------


def static_sky(
    image: NDArray[np.float32], variance: NDArray[np.float32], usable: NDArray[np.bool_]
) -> StaticSky:
    """Return the median of matched epochs.

    Parameters
    ----------
    image, variance : ndarray of float32, shape (n, ny, nx)
        Warps with a common PSF, sky subtracted, on a common flux scale: whole, or a block of rows.
        Exposures that are not matched to the common target are left out.
    usable : ndarray of bool, shape (n, ny, nx)
        Pixels that take part.
    """
    medians, variances = (
        _medians(np.ascontiguousarray(p, np.float32), usable, sorting_network(len(image)))
        for p in (image, variance)
    )
    return StaticSky(medians, variances, usable.sum(axis=0, dtype=np.int16))


@njit(nogil=True)
def _medians(stack, usable, network):
    """Return medians of the usable values; NaN where there are none."""
    n, ny, nx = stack.shape
    medians = np.empty((ny, nx), np.float32)
    values, counts = np.empty((n, _AT_A_TIME), np.float32), np.empty(_AT_A_TIME, np.int64)
    for y in range(ny):
        for start in range(0, nx, _AT_A_TIME):
            size = min(_AT_A_TIME, nx - start)
            counts[:] = 0
            for k in range(n):
                for x in range(size):
                    there = usable[k, y, start + x]
                    values[k, x] = stack[k, y, start + x] if there else np.float32(np.inf)
                    counts[x] += there
            sort_together(values, network)
            for x in range(size):
                count = counts[x]
                middle = np.float32(0.5) * (values[(count - 1) // 2, x] + values[count // 2 % n, x])
                if count % 2 == 1:
                    middle = values[count // 2, x]
                medians[y, start + x] = middle if count > 0 else np.float32(np.nan)
    return medians


# Differences ------------------------------------------------------------------------------------


def difference_variance(
    variance: NDArray[np.float32], sky: StaticSky, taking_part: bool = True
) -> NDArray[np.float32]:
    """Return the variance of an epoch minus the median of all.

    Parameters
    ----------
    variance : ndarray of float32, shape (ny, nx)
        That of the epoch.
    sky : StaticSky
        The static sky.
    taking_part : bool
        Whether the epoch is one of those of which the static sky is the median.

    Returns
    -------
    ndarray of float32
        For normal noise, within 4 % if it is the same in all epochs: then the covariance of the
        median of n with one of them is that of their mean, 1 / n of its variance.
    """
    n = np.maximum(sky.n_epochs, 1).astype(np.float32)
    of_median = np.pi / (2.0 * n + np.where(n % 2 == 0, _EVEN, _ODD))
    own = np.maximum(1.0 - 2.0 / n, 0.0) if taking_part else 1.0
    return (variance * own + sky.variance * of_median).astype(np.float32)


def difference_of_epoch(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    usable: NDArray[np.bool_],
    sky: StaticSky,
    settings: ArtifactSettings,
    taking_part: bool = True,
) -> Difference:
    """Compare an epoch with the static sky.

    Parameters
    ----------
    image, variance : ndarray of float32, shape (ny, nx)
        The warp of the epoch, with the PSF of the static sky.
    usable : ndarray of bool, shape (ny, nx)
        Its pixels that count.
    sky : StaticSky
        The static sky.
    settings : ArtifactSettings
        For ``relative``, the part of the light nearby by which they may differ.
    taking_part : bool
        See `difference_variance`.
    """
    # missing values have an infinite variance
    spread = difference_variance(np.where(usable, variance, np.nan), sky, taking_part)
    compared = usable & (sky.n_epochs >= (2 if taking_part else 1)) & (spread > 0)
    noise = np.sqrt(np.where(compared, spread, np.nan))
    light = np.nan_to_num(sky.median - _LIGHT_SIGMA * np.sqrt(sky.variance))
    light = ndimage.maximum_filter(np.maximum(light, np.float32(0.0)), _LIGHT_REACH)
    return Difference(
        ((image - sky.median) / noise).astype(np.float32),
        (settings.relative * light / noise).astype(np.float32),
    )


def smoothed(difference: Difference, sigma: float) -> NDArray[np.float32]:
    """Return a difference smoothed by a Gaussian, without what the light explains.

    Pixels are correlated by the resampling and by the matching of the PSFs, so that the noise of
    the smoothed map is taken from it: from its absolute values in empty sky.

    Parameters
    ----------
    difference : Difference
        From `difference_of_epoch`.
    sigma : float
        Standard deviation of the Gaussian, pixels.

    Returns
    -------
    ndarray of float32, shape (ny, nx)
        In units of its noise; NaN where the difference is, and where too little is known around.
    """
    known = np.isfinite(difference.significance)
    values, tolerance, weight = (
        ndimage.gaussian_filter(
            np.where(known, plane, np.float32(0.0)), sigma, mode="constant", truncate=_TRUNCATE
        )
        for plane in (*difference, np.ones_like(difference.significance))
    )
    # the noise of a sum over a part of the Gaussian goes with the root of that part
    noise = np.sqrt(np.maximum(weight, _LEAST_WEIGHT)) * np.float32(_white_noise(sigma))
    values, tolerance = values / noise, tolerance / noise
    enough = known & (weight > _LEAST_WEIGHT)
    scale = np.float32(_noise_of(values, enough & (tolerance < _EMPTY)))
    return np.where(enough, _reduced(values, tolerance) / scale, np.float32(np.nan))


def _noise_of(values: NDArray[np.float32], counted: NDArray[np.bool_]) -> float:
    """Return the noise of a map relative to what white noise would give; at least 1.

    Differences from the median of few epochs are not normal: they have more large values than
    their median tells, so that those of 3 standard deviations count if they are farther out.
    """
    every = slice(None, None, _NOISE_STEP)
    sample = np.abs(values[every, every][counted[every, every]])
    if sample.size == 0:
        return 1.0
    noise = max(mad_sigma(sample, 0.0), 1.0)
    without_artifacts = sample[sample < _NOT_NOISE * noise]
    return max(noise, float(np.quantile(without_artifacts, _WITHIN_THREE_SIGMA)) / 3.0)


def _white_noise(sigma: float) -> float:
    """Return the noise of white noise of unit variance that is smoothed."""
    return 1.0 / (2.0 * np.sqrt(np.pi) * sigma)


# Candidates -------------------------------------------------------------------------------------


def find_candidates(
    difference: Difference,
    n_epochs: NDArray[np.integer],
    psf_sigma: float,
    settings: ArtifactSettings,
) -> NDArray[np.bool_]:
    """Return the pixels of an epoch that differ, connected to one that differs much.

    Parameters
    ----------
    difference : Difference
        From `difference_of_epoch`, of a whole patch.
    n_epochs : ndarray of int, shape (ny, nx)
        Epochs of the static sky. Where there are two, only what is brighter is a candidate: it is
        darker in the other epoch.
    psf_sigma : float
        Width of the common PSF, pixels.
    settings : ArtifactSettings
        Thresholds and scales.

    Returns
    -------
    ndarray of bool, shape (ny, nx)
        False where there is nothing to compare.
    """
    some = n_epochs > 2
    found = _connected(smoothed(difference, psf_sigma), some, settings)
    # what is bright in a few pixels is not wide, though it is seen in bins around
    bins, known = bin_significance(difference.without(found).significance, settings.coarse)
    tolerance, _ = bin_significance(difference.tolerance, settings.coarse)
    bins[~known] = np.nan
    fewest = some[:: settings.coarse, :: settings.coarse]
    coarse = _connected(smoothed(Difference(bins, tolerance), psf_sigma), fewest, settings)
    found |= _enlarged(coarse, settings.coarse, found.shape)
    return found & np.isfinite(difference.significance)


def _enlarged(bins: NDArray[np.bool_], side: int, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the pixels of some bins, which have so many on a side."""
    return bins.repeat(side, axis=0).repeat(side, axis=1)[: shape[0], : shape[1]]


def _connected(
    values: NDArray[np.float32], both_signs: NDArray[np.bool_], settings: ArtifactSettings
) -> NDArray[np.bool_]:
    """Return the pixels beyond the lower threshold that are connected to one beyond the higher.

    Values below zero count only where ``both_signs`` is set.
    """
    found = np.zeros(values.shape, bool)
    for sign, counted in ((np.float32(1.0), True), (np.float32(-1.0), both_signs)):
        above = (sign * values > settings.sigma) & counted  # NaN is not
        if above.any():
            beyond = (sign * values > settings.grow_sigma) & counted
            labels, n = ndimage.label(beyond, _TOUCHING)
            chosen = np.zeros(n + 1, bool)
            chosen[labels[above]] = True
            found |= chosen[labels]
    return found


# The temporal rule ------------------------------------------------------------------------------


def sort_regions(
    candidates: NDArray[np.bool_],
    counts: NDArray[np.integer],
    n_epochs: NDArray[np.integer],
    settings: ArtifactSettings,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the regions of an epoch to reject, and those to flag.

    Parameters
    ----------
    candidates : ndarray of bool, shape (ny, nx)
        Of the epoch.
    counts : ndarray of int, shape (ny, nx)
        How many epochs have a candidate at each pixel.
    n_epochs : ndarray of int, shape (ny, nx)
        How many epochs there are.
    settings : ArtifactSettings
        How many epochs may show an artifact.

    Returns
    -------
    rejected, flagged : ndarray of bool, shape (ny, nx)
        A region is rejected if at most ``max_persistent`` of its pixels are shown by more epochs
        than the rule allows. It is flagged if one epoch shows most of it and the rule allows none.
    """
    labels, n = ndimage.label(candidates, _TOUCHING)
    allowed = _allowed(n_epochs, settings.max_fraction)
    size = np.bincount(labels.ravel(), minlength=n + 1)
    rejected, flagged = (
        np.bincount(labels[candidates & (counts > limit)], minlength=n + 1)
        <= settings.max_persistent * size
        for limit in (allowed, np.maximum(allowed, 1))
    )
    rejected[0] = flagged[0] = False
    return rejected[labels], (flagged & ~rejected)[labels]


def _allowed(n_epochs: NDArray[np.integer], max_fraction: float) -> NDArray[np.int64]:
    """Return how many epochs may show an artifact, for each number of epochs."""
    table = np.array([max_outliers(n, max_fraction) for n in range(int(n_epochs.max()) + 1)])
    return table[n_epochs]


def grow_regions(regions: NDArray[np.bool_], radius: float) -> NDArray[np.bool_]:
    """Return the pixels within a radius of some regions, pixels."""
    grown = regions.copy()
    reach = int(radius)
    spans = np.sqrt(radius**2 - np.arange(-reach, reach + 1) ** 2.0).astype(np.int64)
    _grow(regions, spans, grown)
    return grown


@njit(nogil=True)
def _grow(regions, spans, grown):
    """Set the pixels in discs, of rows of so many pixels on each side, around all of a region."""
    ny, nx = regions.shape
    reach = len(spans) // 2
    for y in range(ny):
        for x in range(nx):
            if regions[y, x]:
                for j in range(max(y - reach, 0), min(y + reach + 1, ny)):
                    span = spans[j - y + reach]
                    grown[j, max(x - span, 0) : x + span + 1] = True


def compare_epochs(
    differences: Iterable[Difference],
    n_epochs: NDArray[np.integer],
    fwhm: float,
    settings: ArtifactSettings,
) -> Iterator[EpochArtifacts]:
    """Yield what is wrong with each epoch of a patch.

    Parameters
    ----------
    differences : iterable of Difference
        From `difference_of_epoch`, for each epoch in turn: only one is kept at a time, and two bits
        a pixel of those before.
    n_epochs : ndarray of int, shape (ny, nx)
        Epochs of the static sky.
    fwhm : float
        FWHM of the common PSF, pixels. Regions are grown by it: they end where they are not
        significant, the light that the PSF has spread does not.
    settings : ArtifactSettings
        Thresholds, scales, temporal rule and trails.

    Yields
    ------
    EpochArtifacts
        In the order of the epochs. A trail is an artifact by its form: it is rejected where the
        rule allows to reject anything.
    """
    counts = np.zeros(n_epochs.shape, np.uint16)
    found = []
    for difference in differences:
        streak = trail_mask(find_trails(difference.unexplained(), settings.trails), counts.shape)
        rest = difference.without(streak)
        candidates = find_candidates(rest, n_epochs, fwhm * _SIGMA_PER_FWHM, settings)
        counts += candidates | streak
        found.append(tuple(np.packbits(plane, axis=1) for plane in (candidates, streak)))
    enough = _allowed(n_epochs, settings.max_fraction) > 0
    for packed in found:
        candidates, streak = (
            np.unpackbits(plane, axis=1, count=counts.shape[1]).view(bool) for plane in packed
        )
        rejected, flagged = (
            grow_regions(regions, fwhm)
            for regions in sort_regions(candidates, counts, n_epochs, settings)
        )
        rejected |= streak & enough
        yield EpochArtifacts(rejected, (flagged | streak) & ~rejected, streak)
