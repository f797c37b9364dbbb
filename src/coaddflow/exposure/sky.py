"""The sky of a whole exposure: one smooth surface over the focal plane.

The mesh of a CCD (`measure.background`) follows everything larger than a superpixel or two: the
outskirts of a galaxy of this size are subtracted as sky. Here the superpixels of all CCDs, which
are means of sky pixels with their variance and number, are joined, and the sky is a surface that
varies only on scales much larger than galaxies:

    sky of CCD k at (x, y) = (1 + r_k) S(x, y)

S is a tensor product of quadratic B-splines on the focal plane [1]_ with knots every
``settings.scale`` (a quadratic surface if the field is not larger), weakly constrained by second
differences of its coefficients where no CCD has data [2]_. r_k is the response of a CCD relative to
the mean of all: each CCD has its own normalisation of the flat field, so that the sky in electrons
has steps between CCDs. It is one factor per CCD; its prior is as wide as the scatter of the CCDs
(`coaddflow.exposure.group_scatter`).

Superpixels brighter than the sky are excluded in two steps. The first fit has a loss that is
bounded on the side of sources (Huber's, with a much smaller constant for positive residuals
[3]_), so that even a CCD mostly covered by a galaxy constrains the level by its remaining part.
Then superpixels that are outliers by themselves are excluded, and regions where most of a
neighbourhood, or its mean, is high; these are grown over the focal plane, also across gaps between
CCDs. The fit is repeated until the set is stable.

The approach (superpixels of the focal plane, a large scale first) is that of HSC and LSST [4]_
[5]_. Patterns common to all exposures of a band (pupil ghosts, fringes) need templates from many
exposures [6]_, which are not made here; structure in them below the scale remains in the image.

References
----------
.. [1] de Boor 2001, A Practical Guide to Splines, chapters IX and XVII.
.. [2] Eilers & Marx 1996, Statistical Science 11, 89 (penalised B-splines).
.. [3] Huber 1964, Ann. Math. Stat. 35, 73.
.. [4] Aihara et al. 2019, PASJ 71, 114, section 4.1 (global sky subtraction).
.. [5] LSST Science Pipelines, `SkyCorrectionTask`, `FocalPlaneBackground`.
.. [6] Bernstein et al. 2017, PASP 129, 114502, section 5 (sky templates by principal components).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray
from scipy import interpolate, sparse
from scipy.spatial import cKDTree

from coaddflow.calexp.model import MeasuredCcd
from coaddflow.exposure.group_scatter import group_scatter, prior_variance
from coaddflow.image.masked_image import MaskedImage
from coaddflow.image.statistics import mad_sigma
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.measure.background import Background
from coaddflow.settings.sky_correction import SkyCorrectionSettings

_LOG = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_DEGREE = 2
_SUPERPIXELS_PER_KNOT = 8
"""Smallest spacing of knots, whatever the scale: a galaxy of 2 superpixels must survive."""

_BEND = 0.05
"""Expected second difference of neighbouring coefficients, as a fraction of the sky."""

_FLATNESS = 2e-4
"""Scatter of superpixels beyond their noise, as a fraction of the sky: flats, faint sources."""

_BOUND_ABOVE, _BOUND_BELOW = 1.0, 10.0
"""Residuals in sigma beyond which a source, or a defect, loses weight in the first fit."""

_COVERED = 5.0
"""Rms residual of a CCD in sigma above which it does not show sky."""

_LOWEST = 0.1
"""Smallest fraction of the superpixels of a CCD that constrain its response."""

_LEAST_RESPONSE = 1e-4
"""Smallest scatter of the responses."""

_MODE_WIDTH, _MODE_FRACTION = 3.0, 0.15
"""Width of the mode of the superpixels of a CCD in sigma, and the fraction that must be in it."""

_BOUNDED_FITS, _CLIPPED_FITS = 20, 12

_ROOM = 5.0
"""How far the sky of a CCD may always lie from that of the others, in units of a pixel's noise."""

_CONVERGED = 0.02
"""Largest change between two fits, in sigma, at convergence."""

_NEIGHBOURHOOD = 2.3
"""Radius in superpixels of the means that find faint halos: 21 superpixels."""

_NEIGHBOUR_GAP = 1e-6


@dataclass(frozen=True)
class FocalPlaneSky:
    """The sky of an exposure.

    Attributes
    ----------
    knots_x, knots_y : ndarray of float64, shape (n,)
        Knots of the B-splines, mm in the focal plane, those at the ends repeated.
    coefficients : ndarray of float64, shape (ky, kx)
        Of the B-splines, in the unit of the images.
    response : dict of int to float
        1 + r for each CCD of the fit; 1 for others.
    scatter : float
        Standard deviation of the means of the superpixels in the fit (those without sources) about
        the sky, in the unit of the images.
    own : frozenset of int
        CCDs that keep their own sky: it has nothing to do with that of the others.
    """

    knots_x: FloatArray
    knots_y: FloatArray
    coefficients: FloatArray
    response: dict[int, float]
    scatter: float
    own: frozenset[int] = frozenset()

    def smooth(self, x_mm: ArrayLike, y_mm: ArrayLike) -> FloatArray:
        """Return S at focal-plane positions, mm, in the shape of the positions."""
        x, y = np.broadcast_arrays(np.asarray(x_mm, float), np.asarray(y_mm, float))
        basis = _tensor_basis(x.ravel(), y.ravel(), self.knots_x, self.knots_y)
        return (basis @ self.coefficients.ravel()).reshape(x.shape)

    def of_ccd(self, camera: Camera, detector: Detector, own: Background) -> Background:
        """Return the sky of one CCD as the background of a calexp.

        Parameters
        ----------
        camera, detector : Camera, Detector
            Where the CCD is.
        own : Background
            The CCD's own sky, of which superpixels and noise are kept.

        Returns
        -------
        Background
            `Background.model` is the sky to subtract, `Background.level` its median, and
            `Background.noise` that of ``own``.
        """
        x, y = camera.pixel_to_focal(detector, *_centres(own))
        return own.with_sky(self.response.get(detector.id, 1.0) * self.smooth(x, y))


def fit_focal_plane_sky(
    backgrounds: Mapping[int, Background], camera: Camera, settings: SkyCorrectionSettings
) -> FocalPlaneSky | None:
    """Fit the sky of an exposure to the superpixels of its CCDs.

    Parameters
    ----------
    backgrounds : mapping of int to Background
        The own sky of each measured CCD.
    camera : Camera
        For the place of the CCDs in the focal plane.
    settings : SkyCorrectionSettings
        Scale, clipping, prior of the response.

    Returns
    -------
    FocalPlaneSky or None
        None, with a warning in the log, if too few superpixels show sky; the CCDs then keep their
        own.
    """
    limits = _plausible_levels(backgrounds, settings.max_level_ratio)
    levels = {ccd: _level(own) for ccd, own in backgrounds.items()}
    # a CCD without any sky still gets that of the others
    strange = frozenset(c for c in levels if levels[c] < limits[0] or levels[c] > limits[1])
    for ccd in sorted(strange):
        _LOG.warning(
            "CCD %d has a sky of %.3g, unlike the other CCDs: it keeps its own sky",
            *(ccd, levels[ccd]),
        )
    backgrounds = {ccd: own for ccd, own in backgrounds.items() if ccd not in strange}
    pixels = _superpixels(backgrounds, camera, limits)
    if pixels is None:
        _LOG.warning("no CCD has a superpixel of sky; the CCDs keep their own sky")
        return None
    spacing = settings.scale * 60.0 / camera.pixel_scale * camera.pixel_size
    spacing = max(spacing, _SUPERPIXELS_PER_KNOT * pixels.size)
    knots_x, knots_y = (_knots(c, spacing, pixels.size) for c in (pixels.x, pixels.y))
    fit = _Fit.of(pixels, knots_x, knots_y, settings.response_sigma)
    try:
        used, residual = _fit_without_sources(fit, pixels, settings)
    except np.linalg.LinAlgError as error:
        _LOG.warning("no sky of the focal plane (%s); the CCDs keep their own sky", error)
        return None
    n_used, n_needed = np.count_nonzero(used), fit.coefficients.size
    if n_used < max(settings.min_fraction * used.size, 2 * n_needed):
        least = max(int(settings.min_fraction * used.size), 2 * n_needed)
        _LOG.warning(
            "%d of %d superpixels of the focal plane show sky, and %d are needed for %d "
            "coefficients; the CCDs keep their own sky",
            *(n_used, used.size, least, n_needed),
        )
        return None
    scatter = float(np.sqrt(np.average(residual[used] ** 2, weights=pixels.error[used] ** -2)))
    _LOG.info(
        "sky of the focal plane: %d x %d coefficients, %d of %d superpixels, scatter %.3g",
        *(*fit.shape, n_used, used.size, scatter),
    )
    return FocalPlaneSky(
        knots_x,
        knots_y,
        fit.coefficients.reshape(fit.shape) + fit.level,
        {ccd: float(1.0 + r) for ccd, r in zip(pixels.ccds, fit.response, strict=True)},
        scatter,
        strange,
    )


def _plausible_levels(
    backgrounds: Mapping[int, Background], max_ratio: float
) -> tuple[float, float]:
    """Return the lowest and highest sky that CCDs of one exposure can have.

    The median of the medians of CCDs cannot be moved by a few of them. Where the sky is subtracted
    already (levels around 0) there is no ratio: the limit is then in terms of the noise.
    """
    skies = [own for own in backgrounds.values() if np.isfinite(_level(own))]
    if not skies:
        return -np.inf, np.inf
    middle = float(np.median([_level(own) for own in skies]))
    room = _ROOM * float(np.median([own.noise for own in skies]))
    low, high = sorted((middle / max_ratio, middle * max_ratio))
    return low - room, high + room


def _level(background: Background) -> float:
    """Return the median of the superpixels of a CCD, NaN without any."""
    known = background.mean[(background.count > 0) & np.isfinite(background.mean)]
    return float(np.median(known)) if known.size else np.nan


def apply_focal_plane_sky(
    measured: MeasuredCcd, camera: Camera, detector: Detector, sky: FocalPlaneSky | None
) -> MeasuredCcd:
    """Replace the CCD's own sky by that of the focal plane.

    The image becomes image + own sky - sky of the focal plane; its variance, which includes the
    photons of the sky, its mask and the repair of saturated stars are kept. Sources keep the fluxes
    measured above the CCD's own sky: the flux of a star in the outskirts of a galaxy or in the halo
    of a bright star is its excess over its surroundings. Fluxes of empty positions differ by the
    area of an aperture times the error of a superpixel's mean.

    Parameters
    ----------
    measured : MeasuredCcd
        The CCD; it is not changed.
    camera, detector : Camera, Detector
        Where it is.
    sky : FocalPlaneSky or None
        None leaves the CCD as it is.

    Returns
    -------
    MeasuredCcd
        With the sky of the focal plane as ``background``: image + background.model() is the
        detrended image to rounding, as before.
    """
    if sky is None or detector.id in sky.own:
        return measured
    own = measured.background
    background = sky.of_ccd(camera, detector, own)
    before = measured.masked_image
    image = before.image + (own.model() - background.model())
    return replace(
        measured,
        masked_image=MaskedImage(image, before.variance, before.mask),
        background=background,
    )


def sky_cards(sky: FocalPlaneSky | None, ccd: int) -> fits.Header:
    """Return the cards that describe the sky subtracted from a calexp.

    ``SKYMODEL`` is ``focal plane`` or ``CCD``, ``SKYRESP`` the response of the CCD relative to the
    others, ``SKYSCAT`` `FocalPlaneSky.scatter`.
    """
    header = fits.Header()
    is_own = sky is None or ccd in sky.own
    header["SKYMODEL"] = ("CCD" if is_own else "focal plane", "whose sky was subtracted")
    if not is_own:
        header["SKYRESP"] = (sky.response.get(ccd, 1.0), "response of the CCD to the sky")
        header["SKYSCAT"] = (sky.scatter, "[electron] scatter of superpixels")
    return header


class _Superpixels(NamedTuple):
    """The n superpixels of sky of all CCDs: focal-plane position, mean, its error, index of CCD."""

    x: FloatArray
    y: FloatArray
    mean: FloatArray
    error: FloatArray
    index: NDArray[np.intp]
    ccds: tuple[int, ...]
    size: float

    def near(self, radius: float) -> sparse.csr_array:
        """Return the matrix that sums over all superpixels within a radius in superpixels."""
        tree = cKDTree(np.column_stack([self.x, self.y]))
        pairs = tree.query_pairs(radius * self.size * (1.0 + _NEIGHBOUR_GAP), output_type="ndarray")
        own = np.arange(self.x.size)
        rows = np.concatenate([own, pairs[:, 0], pairs[:, 1]])
        columns = np.concatenate([own, pairs[:, 1], pairs[:, 0]])
        return sparse.csr_array((np.ones(rows.size), (rows, columns)), shape=(own.size,) * 2)


def _superpixels(
    backgrounds: Mapping[int, Background], camera: Camera, limits: tuple[float, float]
) -> _Superpixels | None:
    """Join the superpixels of all CCDs, in the order of the CCDs; None if there are none.

    Means above the limits count as at them, which stay sources; those below are no sky.
    Those with much less sky than is typical are left out: their remaining pixels lie between the
    wings of sources.
    """
    ccds = tuple(sorted(backgrounds))
    parts, sizes = [], []
    fractions = {ccd: _fraction(backgrounds[ccd]) for ccd in ccds}
    if not any((fraction > 0).any() for fraction in fractions.values()):
        return None
    typical = np.median(np.concatenate([f[f > 0] for f in fractions.values()]))
    for number, ccd in enumerate(ccds):
        own, fraction = backgrounds[ccd], fractions[ccd]
        # a single pixel has no variance
        known = (own.count > 1) & (fraction >= own.min_fraction * typical)
        known &= np.isfinite(own.mean) & (own.variance >= 0) & (own.mean >= limits[0])
        x, y = camera.pixel_to_focal(camera.detector(ccd), *_centres(own))
        error = np.sqrt(own.variance[known] / own.count[known])
        index = np.full(error.size, number)
        parts.append((x[known], y[known], np.minimum(own.mean[known], limits[1]), error, index))
        sizes.append(np.sqrt(np.prod(own.shape) / own.mean.size) * camera.pixel_size)
    x, y, mean, error, index = (np.concatenate(c) for c in zip(*parts, strict=True))
    if x.size == 0:
        return None
    error = np.hypot(error, max(_FLATNESS * abs(float(np.median(mean))), 1e-12))
    return _Superpixels(x, y, mean, error, index, ccds, float(np.median(sizes)))


def _fraction(background: Background) -> FloatArray:
    """Return the fraction of the pixels of each superpixel that are sky."""
    return background.count / np.outer(np.diff(background.y_edges), np.diff(background.x_edges))


def _centres(background: Background) -> tuple[FloatArray, FloatArray]:
    """Return the pixel positions x, y of the centres of all superpixels, each (my, mx)."""
    x, y = (0.5 * (e[:-1] + e[1:] - 1.0) for e in (background.x_edges, background.y_edges))
    return tuple(np.meshgrid(x, y))


def _knots(positions: FloatArray, spacing: float, margin: float) -> FloatArray:
    """Return knots with about the given spacing that reach a margin beyond all positions."""
    low, high = positions.min() - margin, positions.max() + margin
    n = max(1, round((high - low) / spacing))
    inner = np.linspace(low, high, n + 1)
    return np.concatenate([[low] * _DEGREE, inner, [high] * _DEGREE])


def _tensor_basis(
    x: FloatArray, y: FloatArray, knots_x: FloatArray, knots_y: FloatArray
) -> sparse.csr_array:
    """Return the values of all products of B-splines at n positions, shape (n, ky kx)."""
    of_x, of_y = (
        interpolate.BSpline.design_matrix(np.clip(c, t[0], t[-1]), t, _DEGREE)
        for c, t in ((x, knots_x), (y, knots_y))
    )
    n, kx, ky = x.size, of_x.shape[1], of_y.shape[1]
    per_row = (_DEGREE + 1) ** 2
    values = of_y.data.reshape(n, -1, 1) * of_x.data.reshape(n, 1, -1)
    columns = of_y.indices.reshape(n, -1, 1) * kx + of_x.indices.reshape(n, 1, -1)
    starts = np.arange(n + 1) * per_row
    return sparse.csr_array((values.ravel(), columns.ravel(), starts), shape=(n, kx * ky))


def _roughness(shape: tuple[int, int]) -> FloatArray:
    """Return the matrix of the sum of squared second differences along rows and columns."""
    ky, kx = shape
    along_y, along_x = (np.diff(np.eye(n), 2, axis=0) for n in (ky, kx))
    return np.kron(along_y.T @ along_y, np.eye(kx)) + np.kron(np.eye(ky), along_x.T @ along_x)


@dataclass
class _Fit:
    """Least squares for coefficients and responses, around the current surface.

    The product (1 + r) S is linearised around the last S; this converges in a few steps, fewer
    than the repeated clipping takes.
    """

    basis: sparse.csr_array
    by_ccd: sparse.csr_array
    shape: tuple[int, int]
    response_sigma: float
    response_limit: float
    level: float
    bend: float
    coefficients: FloatArray
    response: FloatArray

    @classmethod
    def of(
        cls, pixels: _Superpixels, knots_x: FloatArray, knots_y: FloatArray, response_sigma: float
    ) -> "_Fit":
        """Return the start: a constant sky and equal responses."""
        n, n_ccds = pixels.x.size, len(pixels.ccds)
        ones = (np.ones(n), (np.arange(n), pixels.index))
        shape = (knots_y.size - _DEGREE - 1, knots_x.size - _DEGREE - 1)
        # the response of a single CCD is not defined
        fitted = response_sigma > 0 and n_ccds > 1
        level, error = float(np.median(pixels.mean)), float(np.median(pixels.error))
        return cls(
            basis=_tensor_basis(pixels.x, pixels.y, knots_x, knots_y),
            by_ccd=sparse.csr_array(ones, shape=(n, n_ccds)),
            shape=shape,
            response_sigma=response_sigma if fitted else 0.0,
            response_limit=response_sigma,
            level=level,
            # a sky that is already subtracted has no level to compare with
            bend=max(_BEND * abs(level), error),
            coefficients=np.zeros(shape[0] * shape[1]),
            response=np.zeros(n_ccds),
        )

    def model(self) -> FloatArray:
        """Return the sky at all superpixels."""
        smooth = self.level + self.basis @ self.coefficients
        return smooth * (1.0 + self.by_ccd @ self.response)

    def solve(self, mean: FloatArray, weight: FloatArray) -> None:
        """Fit to the means of the superpixels, with their weights."""
        n, n_ccds = self.coefficients.size, self.response.size
        gain = 1.0 + self.by_ccd @ self.response
        smooth = self.level + self.basis @ self.coefficients
        matrix, data = self.basis * gain[:, None], mean - self.level * gain
        if self.response_sigma > 0:
            matrix = sparse.hstack([matrix, self.by_ccd * smooth[:, None]], format="csr")
            data = data + (gain - 1.0) * smooth
        weighted = matrix * weight[:, None]
        normal = (matrix.T @ weighted).toarray()
        normal[:n, :n] += self.bend**-2 * (_roughness(self.shape) + 1e-6 * np.eye(n))
        if self.response_sigma > 0:
            prior = prior_variance(self.response, self.response_sigma)
            # the mean response of all CCDs belongs to the surface
            common = np.full((n_ccds, n_ccds), np.trace(normal[n:, n:]) / n_ccds)
            normal[n:, n:] += np.diag(1.0 / prior) + common
        covariance = np.linalg.inv(normal)
        found = covariance @ (weighted.T @ data)
        if not np.isfinite(found).all():
            raise np.linalg.LinAlgError("the fit diverged")
        self.coefficients = found[:n]
        if self.response_sigma > 0:
            self.response = found[n:]
            limits = min(_LEAST_RESPONSE, self.response_limit), self.response_limit
            self.response_sigma = group_scatter(
                self.response, np.diag(covariance)[n:], prior, limits
            )


def _fit_without_sources(
    fit: _Fit, pixels: _Superpixels, settings: SkyCorrectionSettings
) -> tuple[BoolArray, FloatArray]:
    """Fit until the same superpixels are excluded.

    Returns the superpixels used in the last fit, and means minus sky of all, both shape (n,).
    """
    weight = pixels.error**-2.0
    fit.solve(pixels.mean, weight)
    before = np.full(pixels.mean.shape, np.inf)
    for _ in range(_BOUNDED_FITS):
        z = (pixels.mean - fit.model()) / pixels.error
        if np.abs(z - before).max() < _CONVERGED:
            break
        fit.solve(pixels.mean, weight * _bounded(z / _negative_sigma(z), _BOUND_ABOVE))
        before = z
    near, around = pixels.near(_NEIGHBOURHOOD), pixels.near(settings.grow)
    used = np.zeros(pixels.x.size, dtype=bool)
    for _ in range(_CLIPPED_FITS):
        z = (pixels.mean - fit.model()) / pixels.error
        unknown = _in_ccds_with_little(used, pixels)
        z = z - np.where(unknown, _levels(z, pixels), 0.0)
        kept = _shows_sky(z, near, around, settings.clip_sigma)
        kept &= ~_in_covered_ccds(z, kept, pixels) | (z < -settings.clip_sigma)
        unchanged, used = np.array_equal(kept, used), kept
        if unchanged or np.count_nonzero(used) < fit.coefficients.size:
            break
        z = z / _negative_sigma(z)
        part = np.where(used, _bounded(z), 0.0)
        lowest = _lowest(z, pixels) & _in_ccds_with_little(used, pixels)
        part[lowest] = np.maximum(part, _bounded(z, _BOUND_ABOVE))[lowest]
        fit.solve(pixels.mean, weight * part)
    return used, pixels.mean - fit.model()


def _bounded(z: FloatArray, above: float = np.inf) -> FloatArray:
    """Return the fraction of its weight that a residual of z sigma keeps in a bounded loss [3]_."""
    bound = np.where(z > 0, above, _BOUND_BELOW)
    return np.minimum(1.0, bound / np.maximum(np.abs(z), 1e-9))


def _levels(z: FloatArray, pixels: _Superpixels) -> FloatArray:
    """Return, for all superpixels, the mode of the residuals of their CCD, in sigma.

    However much of a CCD a galaxy covers, its superpixels differ by far more than the noise, while
    those that show the sky do not. Without such a mode it is 0.
    """
    level, width = np.zeros(z.size), _MODE_WIDTH * _negative_sigma(z)
    for number in range(len(pixels.ccds)):
        own = np.flatnonzero(pixels.index == number)
        sorted_z = np.sort(z[own])
        ends = np.searchsorted(sorted_z, sorted_z + width, side="right")
        number_inside = ends - np.arange(own.size)
        if own.size and number_inside.max() > max(_MODE_FRACTION * own.size, 3):
            begin = int(np.argmax(number_inside))
            level[own] = sorted_z[begin : ends[begin]].mean()
    return level


def _shows_sky(
    z: FloatArray, near: sparse.csr_array, around: sparse.csr_array, clip_sigma: float
) -> BoolArray:
    """Return the superpixels without sources that are not next to extended ones.

    A superpixel that is high by itself (a star, a small galaxy) is excluded alone: in a crowded
    field nothing would remain if each were grown. Where most of a neighbourhood is high, or its
    mean without these, there is an extended source, which is grown. A superpixel far below the
    sky is never a source; it shows that the sky is too high.
    """
    z = z / _negative_sigma(z)
    peak = z > clip_sigma
    number, total = near @ (~peak).astype(float), near.sum(axis=1)
    mean = near @ np.where(peak, 0.0, z) / np.sqrt(np.maximum(number, 1.0))
    # faint sources are everywhere
    mean -= max(0.0, float(np.median(mean)))
    mean /= _negative_sigma(mean)
    crowded = number < 0.5 * total
    extended = (around @ ((mean > clip_sigma) | crowded).astype(float)) > 0.5
    return ~(peak | extended) | (np.minimum(z, mean) < -clip_sigma)


def _in_covered_ccds(z: FloatArray, kept: BoolArray, pixels: _Superpixels) -> BoolArray:
    """Return the superpixels of CCDs on which even the apparent sky is not sky.

    If a galaxy covers a CCD, its mean surface brightness is absorbed by the response, and its
    structure remains: such a CCD must not determine its own response.
    """
    n = len(pixels.ccds)
    number = np.bincount(pixels.index, kept, n)
    mean2 = np.bincount(pixels.index, np.where(kept, z**2, 0.0), n) / np.maximum(number, 1.0)
    return (mean2 > _COVERED**2)[pixels.index]


def _in_ccds_with_little(kept: BoolArray, pixels: _Superpixels) -> BoolArray:
    """Return the superpixels of CCDs of which hardly any are kept."""
    n = len(pixels.ccds)
    number, all_of_it = np.bincount(pixels.index, kept, n), np.bincount(pixels.index, None, n)
    return (number < _LOWEST * all_of_it)[pixels.index]


def _lowest(z: FloatArray, pixels: _Superpixels) -> BoolArray:
    """Return the lowest superpixels of each CCD.

    On a covered CCD they are not sky, but closest to it. They help if the responses are poorly
    known; otherwise they have little influence, since their loss is bounded.
    """
    lowest = np.zeros(z.size, dtype=bool)
    for number in range(len(pixels.ccds)):
        own = np.flatnonzero(pixels.index == number)
        n_least = int(np.ceil(_LOWEST * own.size))
        lowest[own[np.argsort(z[own], kind="stable")[:n_least]]] = True
    return lowest


def _negative_sigma(z: FloatArray) -> float:
    """Return the standard deviation from the negative values, at least 1: sources are positive."""
    negative = z[z < 0]
    return max(1.0, mad_sigma(negative, 0.0)) if negative.size else 1.0
