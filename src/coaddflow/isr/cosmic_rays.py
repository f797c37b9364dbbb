"""Cosmic rays on a single exposure.

A cosmic ray has edges sharper than the atmosphere and the optics allow. Candidates come from the
Laplacian [1]_ (`isr.lacosmic`); a candidate counts if at least one of its pixels stands
out from its neighbours more than the centre of a star could [2]_. The second test is what keeps
the cores of stars in good seeing: the Laplacian alone takes an undersampled star for a cosmic
ray. What is missed here is clipped when exposures are coadded.

References
----------
.. [1] van Dokkum 2001, PASP 113, 1420.
.. [2] Lupton et al. 2001, ASP Conf. Ser. 238, 269 (SDSS: neighbours in four directions).
"""

import logging
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import sep
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.errors import CcdFailure, Reason
from coaddflow.image.fill import fill_masked
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.medians import masked_median, running_median
from coaddflow.isr.lacosmic import SMALLEST, laplacian_outliers
from coaddflow.measure.extraction import extract
from coaddflow.settings.detrend import CosmicsSettings

_LOG = logging.getLogger(__name__)

_FWHM_PER_SIGMA = 2.354820045
_IGNORED = MaskPlane.BAD | MaskPlane.NO_DATA | MaskPlane.SAT

_DIRECTIONS = np.array([(0, 1), (1, 0), (1, 1), (1, -1)])
"""Steps (dy, dx) along row, column and both diagonals."""

_MARGIN = 2.5
"""Sigma of the noise by which a pixel must be sharper than a star."""

_SOURCE_SIGMA, _MOST_SOURCES = 10.0, 3000
_ALIKE = 0.1
"""Difference of the ratios of most stars: it depends on where in a pixel their centres are."""

_MIN_STARS = 10
_SHARPER = 0.9
_FEWEST_SHARPER, _SHARE_OF_SHARPER = 7, 0.08
"""Number and share of those that are alike, with which sources sharper than others are stars. Of
stars 0.7 to 1 are alike, of galaxies about 0.5, of cosmic rays 0.02 where they are many."""

_SHARE_OF_STARS, _NARROW = 0.3, 0.8
"""Share of all sources in a larger cube that only stars can have, and the share of these that is in
the smaller one if that has all stars."""

_SHARPEST_STARS = 3.0
"""Percentile of the stars: those whose centre falls on the centre of a pixel."""


def find_cosmic_rays(
    masked_image: MaskedImage, settings: CosmicsSettings, threads: int = 1
) -> NDArray[np.bool_]:
    """Return the pixels hit by cosmic rays, shape (ny, nx), grown by ``settings.growth`` pixels.

    Parameters
    ----------
    masked_image : MaskedImage
        Detrended, in electrons, with its sky. Pixels that are BAD, SAT or NO_DATA are left out, and
        never used to judge others.
    settings : CosmicsSettings
        Thresholds. The seeing is used where the image has too few stars to show how sharp they are
        (see `star_sharpness`).
    threads : int
        Number of threads that share the rows.

    Raises
    ------
    CcdFailure
        ``too_many_cosmic_rays`` if more than ``settings.max_fraction`` of the pixels are hit;
        ``wrong_shape`` if the image is smaller than 5 pixels; ``detection_failed`` if
        stars cannot be detected in it.
    """
    ignored = masked_image.has_any(_IGNORED)
    ignored |= ~np.isfinite(masked_image.image) | ~np.isfinite(masked_image.variance)
    if not settings.enabled or ignored.all():
        return np.zeros(masked_image.shape, bool)
    if min(masked_image.shape) < SMALLEST:
        raise CcdFailure(
            Reason.WRONG_SHAPE,
            f"an image of shape {masked_image.shape} is too small to be searched",
        )
    image, variance, holes = _without_holes(masked_image, ignored)
    candidates, sharpness = _candidates_and_sharpness(
        image, variance, holes, ignored, settings, threads
    )
    limits = settings.psf_sharpness * sharpness
    y, x = np.nonzero(candidates)
    level, hits = _local_level(image, y, x), np.zeros(image.shape, bool)
    sharp = _sharper_than_star(image, variance, ignored, y, x, level, limits, _DIRECTIONS)
    _set_squares(hits, y[sharp], x[sharp], settings.growth)
    hits &= ~ignored
    fraction = float(hits.mean())
    if fraction > settings.max_fraction:
        raise CcdFailure(
            Reason.TOO_MANY_COSMIC_RAYS,
            f"{100 * fraction:.1f} % of the pixels look like cosmic rays: gain or read noise are "
            "wrong. Check the camera file, or raise cosmics.sigma",
        )
    return hits


def _candidates_and_sharpness(
    image: NDArray[np.float32],
    variance: NDArray[np.float32],
    holes: NDArray[np.bool_],
    ignored: NDArray[np.bool_],
    settings: CosmicsSettings,
    threads: int,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return the `laplacian_outliers` and the `star_sharpness`; with threads, side by side."""

    def candidates(threads: int) -> NDArray[np.bool_]:
        return laplacian_outliers(
            image,
            variance,
            holes,
            settings.sigma,
            settings.neighbour_fraction,
            settings.contrast,
            settings.iterations,
            threads,
        )

    if threads == 1:
        return candidates(1), star_sharpness(image, ignored, settings.seeing)
    with ThreadPoolExecutor(1) as pool:
        # sep, which takes most of the time of the sharpness, keeps to one thread
        beside = pool.submit(candidates, threads - 1)
        sharpness = star_sharpness(image, ignored, settings.seeing, threads)
        return beside.result(), sharpness


def _without_holes(
    masked_image: MaskedImage, ignored: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Return image and variance without extremes, and where nothing better than sky was found.

    Single bad pixels are filled from their neighbours. Left to be masked, they would hide the
    cosmic rays beside them; filled with sky, they would make the star sharp in which they are.
    """
    mask = ignored.astype(np.int32)
    mask *= np.int32(MaskPlane.BAD)
    mask[masked_image.has_any(MaskPlane.SAT)] = MaskPlane.SAT
    filled = MaskedImage(masked_image.image.copy(), masked_image.variance.copy(), mask)
    fill_masked(filled, MaskPlane.BAD)
    holes = ignored & ~filled.has_any(MaskPlane.INTRP)
    if holes.any():
        filled.image[holes] = masked_median(masked_image.image, ignored)
        filled.variance[holes] = masked_median(masked_image.variance, ignored)
    return filled.image, filled.variance, holes


def star_sharpness(
    image: NDArray[np.float32], ignored: NDArray[np.bool_], seeing: float, threads: int = 1
) -> NDArray[np.float64]:
    """Return how bright the neighbours of the centre of the sharpest stars are, shape (4,).

    Along row, column and both diagonals: the mean of the two neighbours over the central pixel,
    all above the local sky. It is measured on the sources of the image (electrons, with sky) that
    are left after running medians of 3 pixels along rows and columns, which remove thin tracks and
    hot pixels. Many of them may still be cosmic rays, and most galaxies; but only stars are alike:
    where these four numbers crowd most, there the stars are, and if those that are sharper crowd
    as well, these are the stars, and the others galaxies. So trailed and astigmatic stars are
    described as they are. Where nothing crowds it is that of a Gaussian whose FWHM is ``seeing``
    (pixels). ``ignored`` pixels are not used. ``threads`` share the rows of the medians.
    """
    ratios = _ratios_of_sources(image, ignored, threads)
    stars = _most_alike(ratios, _MIN_STARS, 0.0)
    if stars is None:
        _LOG.info("stars cannot be told from cosmic rays: a seeing of %g pixels is assumed", seeing)
        sigma = seeing / _FWHM_PER_SIGMA
        return np.exp(-(_DIRECTIONS**2).sum(axis=1) / (2 * sigma**2))
    while True:
        sharpest = np.maximum(np.percentile(ratios[stars, 1], _SHARPEST_STARS, axis=0), 0.0)
        sharper = ratios[(ratios[:, 1] < _SHARPER * sharpest).all(axis=1)]
        stars = _most_alike(sharper, _FEWEST_SHARPER, _SHARE_OF_SHARPER)
        if stars is None or len(sharper) == len(ratios):
            return sharpest
        ratios = sharper


def _ratios_of_sources(
    image: NDArray[np.float32], ignored: NDArray[np.bool_], threads: int
) -> NDArray[np.float64]:
    """Return ratios of neighbours to pixel, shape (n, 2, 4): at the centre, and least in the core.

    Both are the same in stars, and seldom in cosmic rays.
    """
    sky = sep.Background(image, mask=ignored, bw=64, bh=64)
    residual = sky.back()
    np.subtract(image, residual, out=residual)
    residual[ignored] = 0
    quiet = running_median(residual, 3, axis=1, threads=threads)
    quiet = running_median(quiet, 3, axis=0, threads=threads)
    sources = extract(quiet, _SOURCE_SIGMA * sky.globalrms, mask=ignored, minarea=5)
    y, x = sources["ypeak"], sources["xpeak"]
    ny, nx = image.shape
    inside = (y >= 3) & (y < ny - 3) & (x >= 3) & (x < nx - 3)
    y, x = _brightest_around(residual, y[inside], x[inside])
    dy, dx = np.mgrid[-2:3, -2:3].reshape(2, -1)
    clean = ~ignored[y[:, None] + dy, x[:, None] + dx].any(axis=1)
    # enough of all parts of a large CCD
    every = -(-int(clean.sum()) // _MOST_SOURCES) or 1
    y, x = y[clean][::every], x[clean][::every]
    level = _local_level(image, y, x)
    pairs = [(image[y + j, x + i] + image[y - j, x - i]) / 2 - level for j, i in _DIRECTIONS]
    centre = np.stack(pairs, axis=1) / (image[y, x] - level)[:, None]
    return np.stack([centre, _core_ratios(image, y, x)], axis=1)


def _most_alike(
    ratios: NDArray[np.float64], fewest: int, least_share: float
) -> NDArray[np.intp] | None:
    """Return which sources are in the fullest cube of ratios; None if none stands out.

    A cube stands out with ``fewest`` sources and this share of all, and if it has half of those in
    the cube of twice the size, whose volume is 256 times as large, or if this has more of all
    sources than there could be cosmic rays: undersampled stars of a PSF that varies fill it.
    """
    if len(ratios) < fewest:
        return None
    points = ratios.reshape(len(ratios), -1)
    number, around = _numbers_in_cubes(np.ascontiguousarray(points.T), _ALIKE)
    stands_out = number >= max(fewest, least_share * len(points))
    stands_out &= (number >= around / 2) | (around >= _SHARE_OF_STARS * len(points))
    if not stands_out.any():
        return None
    fullest = int(np.argmax(np.where(stands_out, number, 0)))
    of_stars = around[fullest] >= _SHARE_OF_STARS * len(points)
    reach = 2 * _ALIKE if of_stars and number[fullest] < _NARROW * around[fullest] else _ALIKE
    return np.flatnonzero(np.abs(points - points[fullest]).max(axis=1) <= reach)


@njit()
def _numbers_in_cubes(points, reach):
    """Return how many of n points are in the cubes around each, of this and of twice this reach.

    ``points`` has the shape (number of dimensions, n).
    """
    n_dimensions, n = points.shape
    number, around = np.zeros(n, np.int64), np.zeros(n, np.int64)
    farthest = np.empty(n)
    for i in range(n):
        farthest[:] = 0.0
        for k in range(n_dimensions):
            centre, line = points[k, i], points[k]
            for j in range(n):
                distance = abs(line[j] - centre)
                farthest[j] = distance if distance > farthest[j] else farthest[j]
        for j in range(n):
            number[i] += farthest[j] <= reach
            around[i] += farthest[j] <= 2 * reach
    return number, around


def _core_ratios(image: NDArray[np.float32], y: NDArray, x: NDArray) -> NDArray[np.float64]:
    """Return for each star and direction the least ratio of neighbours to pixel in its core.

    The core is the pixels above half of the central one: a star on the corner of four pixels is
    sharpest beside its brightest pixel.
    """
    level = _local_level(image, y, x)
    peak = image[y, x] - level
    least = np.full((len(y), len(_DIRECTIONS)), np.inf)
    for j, i in np.mgrid[-1:2, -1:2].reshape(2, -1).T:
        value = image[y + j, x + i] - level
        core = (value > 0.5 * peak) & (value > 0)
        for k, (dy, dx) in enumerate(_DIRECTIONS):
            pair = (image[y + j + dy, x + i + dx] + image[y + j - dy, x + i - dx]) / 2 - level
            ratio = np.divide(pair, value, out=np.full(len(y), np.inf), where=core)
            least[:, k] = np.minimum(least[:, k], ratio)
    return np.where(np.isfinite(least), least, 1.0)


def _brightest_around(image: NDArray, y: NDArray, x: NDArray) -> tuple[NDArray, NDArray]:
    """Move positions to the brightest of the 3 x 3 pixels around."""
    dy, dx = np.mgrid[-1:2, -1:2].reshape(2, -1)
    best = image[y[:, None] + dy, x[:, None] + dx].argmax(axis=1)
    return y + dy[best], x + dx[best]


def _local_level(image: NDArray[np.float32], y: NDArray, x: NDArray) -> NDArray[np.float32]:
    """Return a low quantile of the pixels around: the sky under star or cosmic ray."""
    reach = 5
    square = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1)
    dy, dx = square[:, np.abs(square).max(axis=0) == reach]
    ny, nx = image.shape
    around = image[_reflected(y[:, None] + dy, ny), _reflected(x[:, None] + dx, nx)]
    return np.percentile(around, 30, axis=1).astype(np.float32)


def _reflected(index: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    """Return indices within 0 to n - 1: those beyond are reflected at the outermost pixels."""
    index = index % (2 * (n - 1))
    return np.minimum(index, 2 * (n - 1) - index)


@njit()
def _set_squares(hits, y, x, reach):
    """Set squares of this many pixels around positions, as far as they are inside."""
    for i in range(len(y)):
        hits[max(y[i] - reach, 0) : y[i] + reach + 1, max(x[i] - reach, 0) : x[i] + reach + 1] = (
            True
        )


@njit()
def _sharper_than_star(image, variance, ignored, y, x, level, limits, directions):
    """Compare pixels with the means of opposite neighbours in four directions [2]_."""
    ny, nx = image.shape
    sharp = np.zeros(len(y), np.bool_)
    for i in range(len(y)):
        value = image[y[i], x[i]] - level[i]
        for k in range(len(limits)):
            dy, dx = directions[k]
            y0, x0, y1, x1 = y[i] - dy, x[i] - dx, y[i] + dy, x[i] + dx
            if min(y0, x0, x1) < 0 or max(x0, x1) >= nx or y1 >= ny:
                continue
            if ignored[y0, x0] or ignored[y1, x1]:
                continue
            pair = (image[y0, x0] + image[y1, x1]) / 2 - level[i]
            noise = (variance[y0, x0] + variance[y1, x1]) / 4 + limits[k] ** 2 * variance[
                y[i], x[i]
            ]
            if pair + _MARGIN * np.sqrt(noise) < limits[k] * value:
                sharp[i] = True
                break
    return sharp
