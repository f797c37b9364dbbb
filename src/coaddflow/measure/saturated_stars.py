"""Saturated stars: their cores restored from their wings.

A plateau of full wells rings in every resampling kernel, and bleeding, which runs down the columns,
shifts a star from its place. The wings are intact, though: the PSF fitted to them tells where the
star is and what its core would look like [1]_. The PSF model itself is good for its core only; far
out it is noise. There the profile of the wings is measured, on the bright stars that are not
saturated, and then on the saturated ones themselves, whose wings are the brightest. What the PSF
does not reach (bleeding, the largest stars) is bridged along the rows, across the direction of
bleeding [2]_. All these pixels stay flagged SAT, and get INTRP: they are for the eye and for the
kernels, not for measurement.

References
----------
.. [1] Magnier et al. 2020, ApJS 251, 5 (wings of saturated stars in Pan-STARRS).
.. [2] Juric et al. 2017, ASP Conf. Ser. 512, 279 (interpolation over saturated pixels, LSST).
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from coaddflow.geometry.box import common_box, part_of
from coaddflow.image.fill import fill_saturated
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import mad_sigma, weighted_median
from coaddflow.measure.psf_model import PsfModel

_PROFILE_ERROR = 0.05
"""Relative error of the PSF's wings, so that the brightest pixel does not decide alone."""

_CORE_ERROR = 0.3
"""Relative error of a core that was drawn from its wings."""

_CORE_SIGMA = 30.0
"""The model of the PSF is used where its profile exceeds its noise so many times."""

_OUTER = 0.7
"""The noise of the model is its scatter beyond this part of its half width."""

_RING = 1.0 / 3.0
"""Width of the rings of the profile, in FWHM."""

_SMALLEST_CORE = 5
"""Rows of fewer full pixels are no core, but bleed."""

_RIM = 2
"""Width of the rim around a core, pixels."""

_MOST_STARS = 100
"""Number of brightest stars that the wings are measured on."""

_MIN_PIXELS = 12
_NOT_WINGS = MaskPlane.SAT | MaskPlane.BAD | MaskPlane.CR | MaskPlane.NO_DATA | MaskPlane.INTRP


_KEPT_STAMPS = 16
_PER_PIXEL = 32


class _Stamps(NamedTuple):
    """Pixels and variances around a star, which of them measure its wings, and which are full."""

    pixels: NDArray[np.float64]
    variance: NDArray[np.float64]
    wings: NDArray[np.bool_]
    full: NDArray[np.bool_]


@dataclass
class _Wings:
    """The mean profile of stars far from their centres, per unit of the PSF's flux.

    ``level`` and ``error`` are those of rings of the width ``ring`` (pixels); ``noise`` is that of
    a pixel of the PSF model far from its centre.
    """

    ring: float
    level: NDArray[np.float64]
    error: NDArray[np.float64]
    noise: float

    @cached_property
    def _table(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Profile and relative error at radii of 0, 1, 2, ... / _PER_PIXEL pixels."""
        radius = np.arange(int(len(self.level) * self.ring * _PER_PIXEL) + 1) / _PER_PIXEL
        middle = (np.arange(len(self.level)) + 0.5) * self.ring
        known = np.flatnonzero(self.level > 0)
        if not len(known):
            return np.zeros(radius.shape), np.ones(radius.shape)
        log_radius = np.log(np.maximum(radius, 0.5 * self.ring))
        level = np.exp(np.interp(log_radius, np.log(middle[known]), np.log(self.level[known])))
        return level, np.interp(radius, middle[known], (self.error / self.level)[known])

    def at(self, radius: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return profile and its relative error at radii in pixels: power laws between rings."""
        level, relative = self._table
        place = np.minimum((radius * _PER_PIXEL + 0.5).astype(int), len(level) - 1)
        return level[place], relative[place]


@dataclass(frozen=True)
class _View:
    """An image with its PSF, and the sources that its pixels belong to."""

    masked_image: MaskedImage
    psf: PsfModel
    segments: NDArray[np.int32] | None
    last: dict[tuple[int, int], _Stamps] = field(default_factory=dict)

    def stamps(self, x: float, y: float) -> _Stamps:
        """Return what is around a star."""
        place = int(np.rint(x)), int(np.rint(y))
        if place not in self.last:  # a star that is fitted stays near its first place
            if len(self.last) >= _KEPT_STAMPS:
                self.last.clear()
            self.last[place] = self._cut(x, y)
        return self.last[place]

    def _cut(self, x: float, y: float) -> _Stamps:
        image, half = self.masked_image, self.psf.half
        pixels, inside = (plane[0] for plane in cut_stamps(image.image, x, y, half))
        variance, mask = (
            cut_stamps(plane, x, y, half)[0][0] for plane in (image.variance, image.mask)
        )
        use = inside & ((mask & np.int32(_NOT_WINGS)) == 0)
        use &= np.isfinite(pixels) & np.isfinite(variance) & (variance > 0)
        if self.segments is not None:
            segments = cut_stamps(self.segments, x, y, half)[0][0]
            use &= (segments == 0) | (segments == segments[half, half])
        full = inside & ((mask & np.int32(MaskPlane.SAT)) != 0) & np.isfinite(pixels)
        return _Stamps(pixels.astype(float), variance.astype(float), use, full)


@dataclass(frozen=True)
class _Star:
    """A saturated star: position in pixels, and flux in units of the PSF's sum."""

    x: float
    y: float
    flux: float


def repair_saturated(
    masked_image: MaskedImage,
    psf: PsfModel,
    max_gap: int = 100,
    stars: tuple[NDArray, NDArray] | None = None,
    segments: NDArray[np.int32] | None = None,
) -> int:
    """Fill saturated pixels of an image without its sky from the wings of their stars, in place.

    Image, variance, and the plane INTRP beside SAT are changed. Where no star could be fitted,
    saturated runs along a row of up to ``max_gap`` pixels are bridged.

    Parameters
    ----------
    masked_image : MaskedImage
        The image, electrons.
    psf : PsfModel
        Its PSF.
    max_gap : int
        Longest run along a row that is bridged, pixels.
    stars : tuple of ndarray, optional
        Positions (x, y) of stars that are not saturated, the brightest first: on them the wings are
        measured. Without them the wings are those of the PSF model.
    segments : ndarray of int32, shape (ny, nx), optional
        Source that each pixel belongs to, 0 for the sky: pixels of neighbours are left out.

    Returns
    -------
    int
        Number of stars that were fitted.
    """
    saturated = masked_image.has_any(MaskPlane.SAT)
    view = _View(masked_image, psf, segments)
    labels, _ = ndimage.label(saturated, structure=np.ones((3, 3)))
    regions = ndimage.find_objects(labels)
    if not regions:
        return 0
    wings = _wings_of_psf(psf, masked_image.shape)
    if stars is not None:
        wings = _wings_of_stars(view, wings, *stars)
    fits = {}
    for number, region in enumerate(regions, start=1):
        fit = _fit_star(view, wings, region, labels[region] == number)
        if fit is not None:
            fits[number] = fit
    wings = _with_saturated(view, wings, list(fits.values()))
    fits = {number: _with_flux(view, wings, fit) for number, fit in fits.items()}
    fill_saturated(masked_image, max_gap)
    light = np.zeros(masked_image.shape, np.float32)
    reached = {}
    for number, star in fits.items():
        model, place = _light_of(view, wings, star)
        light[place] += model
        reached[number] = place, (labels[place] == number) & (model > 0)
    for number, region in enumerate(regions, start=1):
        if number in fits:
            _draw(masked_image, fits[number], *reached[number], light, wings.ring / _RING)
        else:
            _level(masked_image, region, labels[region] == number, light[region])
    return len(fits)


def _radii(psf: PsfModel, x: float, y: float) -> NDArray[np.float64]:
    """Return the distances of the pixels of a stamp from a position."""
    reach = np.arange(-psf.half, psf.half + 1)
    return np.hypot(reach[:, None] - (y - np.rint(y)), reach - (x - np.rint(x)))


def _wings_of_psf(psf: PsfModel, shape: tuple[int, int]) -> _Wings:
    """Return the profile of the PSF model at the centre of the CCD."""
    image = psf.image_at((shape[1] - 1) / 2, (shape[0] - 1) / 2).astype(float)
    fwhm = 2 * np.sqrt(np.count_nonzero(image > image.max() / 2) / np.pi)
    ring = max(1.0, _RING * fwhm)
    radius = _radii(psf, 0.0, 0.0)
    outer = image[(radius > _OUTER * psf.half) & (radius <= psf.half)]
    noise = mad_sigma(outer) if outer.size else 0.0
    index = (radius / ring).astype(int)
    number = np.bincount(index.ravel())
    level = np.bincount(index.ravel(), image.ravel()) / number
    error = np.hypot(noise / np.sqrt(number), _PROFILE_ERROR * level)
    return _Wings(ring, level, error, noise)


def _ring_medians(
    pixels: NDArray, variance: NDArray, use: NDArray[np.bool_], radius: NDArray, wings: _Wings
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the median of each ring and its error; NaN where less than half of it is usable."""
    index = (radius / wings.ring).astype(int)
    level = np.full(len(wings.level), np.nan)
    error = np.full(len(wings.level), np.nan)
    for ring in range(len(level)):
        inside = index == ring
        some = inside & use
        number = np.count_nonzero(some)
        if number >= 4 and number > 0.5 * np.count_nonzero(inside):
            level[ring] = np.median(pixels[some])
            error[ring] = 1.2533 * np.sqrt(np.median(variance[some]) / number)
    return level, error


def _wings_of_stars(view: _View, wings: _Wings, x: NDArray, y: NDArray) -> _Wings:
    """Return the profile as stars that are not saturated have it."""
    levels, errors = [], []
    for one_x, one_y in zip(x[:_MOST_STARS], y[:_MOST_STARS], strict=True):
        pixels, variance, use, _ = view.stamps(one_x, one_y)
        model = view.psf.image_at(one_x, one_y, sub_pixel=True).astype(float)
        radius = _radii(view.psf, one_x, one_y)
        core = use & (model > 0.02 * model.max())
        if np.count_nonzero(core) < _MIN_PIXELS:
            continue
        flux = (model * pixels)[core].sum() / (model**2)[core].sum()
        if flux > 0:
            level, error = _ring_medians(pixels, variance, use, radius, wings)
            levels.append(level / flux)
            errors.append(error / flux)
    return _averaged(wings, levels, errors)


def _with_saturated(view: _View, wings: _Wings, stars: list[_Star]) -> _Wings:
    """Return the profile with what the saturated stars themselves say about it.

    Each has the error of its own flux, which is that of the profile where it was fitted.
    """
    levels, errors = [], []
    for star in stars:
        pixels, variance, use, _ = view.stamps(star.x, star.y)
        level, error = _ring_medians(pixels, variance, use, _radii(view.psf, star.x, star.y), wings)
        level, error = level / star.flux, error / star.flux
        levels.append(level)
        errors.append(np.hypot(error, 2 * _PROFILE_ERROR * np.abs(level)))
    return _averaged(wings, levels, errors)


def _averaged(
    wings: _Wings, levels: list[NDArray[np.float64]], errors: list[NDArray[np.float64]]
) -> _Wings:
    """Return the weighted median of profiles in each ring, with the one before among them."""
    if not levels:
        return wings
    level, error = np.array([wings.level, *levels]), np.array([wings.error, *errors])
    result = replace(wings, level=wings.level.copy(), error=wings.error.copy())
    for ring in range(level.shape[1]):
        known = np.isfinite(level[:, ring]) & (error[:, ring] > 0)
        if np.count_nonzero(known) < 2:
            continue
        weight = error[known, ring] ** -2
        result.level[ring] = weighted_median(level[known, ring], weight)
        result.error[ring] = (
            1.2533 * np.sqrt((weight**2 * error[known, ring] ** 2).sum()) / weight.sum()
        )
    return result


def _model_at(
    psf: PsfModel, wings: _Wings, x: float, y: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the image of a star of flux 1 on a stamp, and its relative error.

    Inside it is the PSF model, outside, where that is noise, the profile of the wings.
    """
    model, radius = psf.image_at(x, y, sub_pixel=True).astype(float), _radii(psf, x, y)
    level, relative = wings.at(radius)
    outside = level < _CORE_SIGMA * wings.noise
    border = radius[outside].min() if outside.any() else np.inf
    core = radius < border
    # the error of a ring is common to its pixels, as that of the model is not
    relative = relative * np.sqrt(np.maximum(2 * np.pi * radius * wings.ring, 1.0))
    error = np.where(core, wings.noise / np.maximum(model, wings.noise + 1e-30), relative)
    return np.where(core, model, level), np.hypot(error, _PROFILE_ERROR)


def _fit_star(
    view: _View,
    wings: _Wings,
    region: tuple[slice, slice],
    inside: NDArray[np.bool_],
) -> _Star | None:
    """Fit position and flux of a star to what is not saturated of it.

    ``region`` is the box (rows, columns) around the saturated pixels, and ``inside`` marks them.
    None if the PSF's images are too small to show wings, or the fit makes no sense.
    """
    columns = np.nonzero(inside)[1]
    x = region[1].start + float(np.median(columns))
    if np.ptp(columns) + 1 > 1.5 * view.psf.half:
        return None

    def cost(place: tuple[float, float]) -> float:
        return -_light_explained(view, wings, place)

    # bleeding may go either way: the star is in one of the rows
    tried = np.arange(region[0].start, region[0].stop, max(1.0, view.psf.half / 4))
    y = min(tried, key=lambda row: cost((x, row)))
    start = np.array([x, y])
    solution = optimize.minimize(
        cost,
        start,
        method="Nelder-Mead",
        options={
            "initial_simplex": start + np.array([[0.0, 0.0], [0.7, 0.0], [0.0, 0.7]]),
            "xatol": 0.01,
            "fatol": 0.1,
            "maxfev": 120,
        },
    )
    x, y = (float(value) for value in solution.x)
    near_x = region[1].start - 1 <= x <= region[1].stop
    near_y = region[0].start - 1 <= y <= region[0].stop
    star = _with_flux(view, wings, _Star(x, y, 0.0))
    return star if near_x and near_y and star.flux > 0 else None


def _light_explained(view: _View, wings: _Wings, place: tuple[float, float]) -> float:
    """Return how much of its light a star at a position explains, in units of errors.

    Full pixels are lower limits of the light: what the star gives them counts for it, up to this
    limit. What it does not give them does not count against it, since bleeding fills them as well.
    """
    model, relative = _model_at(view.psf, wings, *place)
    stamps = view.stamps(*place)
    flux, use, error = _wing_flux(stamps, model, relative)
    if not flux > 0:
        return 0.0
    pixels = stamps.pixels[use]
    explained = np.sum((np.abs(pixels) - np.abs(pixels - flux * model[use])) / error)
    limit = np.maximum(stamps.pixels[stamps.full], 0.0)
    given = np.minimum(flux * model[stamps.full], limit)
    return float(explained + np.sum(given / (_CORE_ERROR * limit + 1e-9)))


def _with_flux(view: _View, wings: _Wings, star: _Star) -> _Star:
    """Return a star with the flux that fits its wings; that which it has if none does."""
    model, relative = _model_at(view.psf, wings, star.x, star.y)
    flux = _wing_flux(view.stamps(star.x, star.y), model, relative)[0]
    return _Star(star.x, star.y, flux if flux > 0 else star.flux)


def _wing_flux(
    stamps: _Stamps, model: NDArray[np.float64], relative: NDArray[np.float64]
) -> tuple[float, NDArray[np.bool_], NDArray[np.float64]]:
    """Return the flux that fits the wings best, their pixels, and the errors of these."""
    use = stamps.wings & (model > 0)
    pixels = stamps.pixels[use]
    error = np.sqrt(stamps.variance[use] + (relative[use] * pixels) ** 2)
    if len(pixels) < _MIN_PIXELS:
        return 0.0, use, error
    # neighbours only add light: the weighted median of the ratios does not follow them
    return weighted_median(pixels / model[use], model[use] / error), use, error


def _light_of(
    view: _View, wings: _Wings, star: _Star
) -> tuple[NDArray[np.float32], tuple[slice, slice]]:
    """Return the light of a star as far as the PSF reaches, and its place in the image."""
    half = view.psf.half
    model = (star.flux * _model_at(view.psf, wings, star.x, star.y)[0]).astype(np.float32)
    x0, y0 = round(star.x) - half, round(star.y) - half
    stamp = x0, y0, x0 + model.shape[1], y0 + model.shape[0]
    ccd = 0, 0, *view.masked_image.shape[::-1]
    box = common_box(stamp, ccd)
    return np.maximum(model[part_of(stamp, box)], 0.0), part_of(ccd, box)


def _draw(
    masked_image: MaskedImage,
    star: _Star,
    place: tuple[slice, slice],
    take: NDArray[np.bool_],
    light: NDArray[np.float32],
    fwhm: float,
) -> None:
    """Replace the saturated pixels of a star by the light of the PSF, as far as that reaches.

    These are the pixels ``take`` of the box ``place``; ``light`` is that of all saturated stars
    together.
    """
    model = light[place]
    # a full pixel has more light than any that is not full: no core is lower than its rim
    y, x = (np.arange(part.start, part.stop) for part in place)
    radius = np.hypot(y[:, None] - star.y, x - star.x) / fwhm
    full = (masked_image.mask[place] & np.int32(MaskPlane.SAT)) != 0
    rim = masked_image.image[place][(radius < 1.5) & ~full]
    rim = rim[np.isfinite(rim)]
    centre = take & (radius < 0.5)
    if rim.size and centre.any() and model[centre].max() < rim.max():
        bridge = np.nan_to_num(masked_image.image[place])
        model = np.where(centre, np.maximum(model, rim.max()), np.maximum(model, bridge))
    masked_image.image[place][take] = model[take]
    # beside that of the bridge, which is that of the pixels around
    masked_image.variance[place][take] += model[take] + (_CORE_ERROR * model[take]) ** 2
    masked_image.mask[place][take] |= np.int32(MaskPlane.INTRP)


def _level(
    masked_image: MaskedImage,
    region: tuple[slice, slice],
    inside: NDArray[np.bool_],
    light: NDArray[np.float32],
) -> None:
    """Raise the core of a star that was only bridged to its rim, and to the light of others.

    The core is where the rows are widest. What bleeds is as wide everywhere, and stays bridged.
    """
    image, variance = masked_image.image[region], masked_image.variance[region]
    filled = inside & ((masked_image.mask[region] & np.int32(MaskPlane.INTRP)) != 0)
    width = filled.sum(axis=1)
    widest = int(width.max(initial=0))
    rows = width > 0.5 * widest
    level = np.zeros(image.shape, np.float32)
    if widest >= _SMALLEST_CORE and rows.sum() <= 2 * widest:
        core = filled & rows[:, None]
        level[core] = max(image[core].max(), _brightest_of_rim(masked_image, region, core))
    raised = np.maximum(np.maximum(image, level), light)
    variance[filled] += np.square(raised - image)[filled]
    image[filled] = raised[filled]


def _brightest_of_rim(
    masked_image: MaskedImage, region: tuple[slice, slice], core: NDArray[np.bool_]
) -> float:
    """Return the brightest pixel around a core that is not full."""
    place = tuple(slice(max(part.start - _RIM, 0), part.stop + _RIM) for part in region)
    inside = np.zeros(masked_image.image[place].shape, bool)
    y0, x0 = (part.start - around.start for part, around in zip(region, place, strict=True))
    inside[y0 : y0 + core.shape[0], x0 : x0 + core.shape[1]] = core
    around = ndimage.binary_dilation(inside, np.ones((3, 3)), iterations=_RIM)
    around &= (masked_image.mask[place] & np.int32(MaskPlane.SAT)) == 0
    rim = masked_image.image[place][around]
    return float(np.max(rim, initial=-np.inf, where=np.isfinite(rim)))
