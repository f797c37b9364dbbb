"""Saturated stars: their cores restored from their wings.

A plateau of full wells rings in every resampling kernel, and bleeding, which runs down the columns,
shifts a star from its place. The wings are intact, though: the PSF fitted to them tells where the
star is and what its core would look like [1]_. What the PSF does not reach (bleeding, the largest
stars) is bridged along the rows, across the direction of bleeding [2]_. All these pixels stay
flagged SAT, and get INTRP: they are for the eye and for the kernels, not for measurement.

References
----------
.. [1] Magnier et al. 2020, ApJS 251, 5 (wings of saturated stars in Pan-STARRS).
.. [2] Juric et al. 2017, ASP Conf. Ser. 512, 279 (interpolation over saturated pixels, LSST).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from coaddflow.geometry.box import common_box, part_of
from coaddflow.image.fill import fill_saturated
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import weighted_median
from coaddflow.measure.psf_model import PsfModel

_PROFILE_ERROR = 0.05
"""Relative error of the PSF's wings, so that the brightest pixel does not decide alone."""

_CORE_ERROR = 0.3
"""Relative error of a core that was drawn from its wings."""

_MIN_PIXELS = 12
_NOT_WINGS = MaskPlane.SAT | MaskPlane.BAD | MaskPlane.CR | MaskPlane.NO_DATA


def repair_saturated(masked_image: MaskedImage, psf: PsfModel, max_gap: int = 100) -> int:
    """Fill saturated pixels of an image without its sky from the wings of their stars, in place.

    Image, variance, and the plane INTRP beside SAT are changed. Where no star could be fitted,
    saturated runs along a row of up to ``max_gap`` pixels are bridged. The number of stars that
    were fitted is returned.
    """
    saturated = masked_image.has_any(MaskPlane.SAT)
    labels, _ = ndimage.label(saturated, structure=np.ones((3, 3)))
    fits = [
        _fit_wings(masked_image, psf, region, labels[region] == number)
        for number, region in enumerate(ndimage.find_objects(labels), start=1)
    ]
    fill_saturated(masked_image, max_gap)
    stars = [fit for fit in fits if fit is not None]
    for star in stars:
        _draw(masked_image, psf, star, saturated)
    return len(stars)


def _fit_wings(
    masked_image: MaskedImage, psf: PsfModel, region: tuple[slice, slice], inside: NDArray[np.bool_]
) -> tuple[float, float, float] | None:
    """Fit the PSF to what is not saturated of a star: position (pixels) and total flux.

    ``region`` is the box (rows, columns) around the saturated pixels, and ``inside`` marks them.
    None if the PSF's images are too small to show wings, or the fit makes no sense.
    """
    columns = np.nonzero(inside)[1]
    x = region[1].start + float(np.median(columns))
    if np.ptp(columns) + 1 > 1.5 * psf.half:
        return None
    # bleeding may go either way: the star is in one of the rows
    tried = np.arange(region[0].start, region[0].stop, max(1.0, psf.half / 4))
    y = max(tried, key=lambda row: _light_explained(masked_image, psf, (x, row)))
    start = np.array([x, y])
    solution = optimize.minimize(
        lambda place: -_light_explained(masked_image, psf, place),
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
    flux = _wing_flux(masked_image, psf, x, y)[0]
    return (x, y, flux) if near_x and near_y and flux > 0 else None


def _light_explained(masked_image: MaskedImage, psf: PsfModel, place: tuple[float, float]) -> float:
    """Return how much of the wings a star at a position explains, in units of their errors."""
    flux, model, pixels, error = _wing_flux(masked_image, psf, *place)
    if not flux > 0:
        return 0.0
    return float(np.sum((np.abs(pixels) - np.abs(pixels - flux * model)) / error))


def _wing_flux(
    masked_image: MaskedImage, psf: PsfModel, x: float, y: float
) -> tuple[float, NDArray, NDArray, NDArray]:
    """Return the flux that fits the wings best, and model, pixels and errors of the wings."""
    model = psf.image_at(x, y, sub_pixel=True).astype(float)
    pixels, inside = (plane[0] for plane in cut_stamps(masked_image.image, x, y, psf.half))
    variance, mask = (
        cut_stamps(plane, x, y, psf.half)[0][0]
        for plane in (masked_image.variance, masked_image.mask)
    )
    use = inside & ((mask & np.int32(_NOT_WINGS)) == 0) & np.isfinite(pixels) & (variance > 0)
    use &= model > 0
    if np.count_nonzero(use) < _MIN_PIXELS:
        return 0.0, model, pixels, variance
    model, pixels = model[use], pixels[use].astype(float)
    error = np.sqrt(variance[use] + (_PROFILE_ERROR * pixels) ** 2)
    # neighbours only add light: the weighted median of the ratios does not follow them
    return weighted_median(pixels / model, model / error), model, pixels, error


def _draw(
    masked_image: MaskedImage,
    psf: PsfModel,
    star: tuple[float, float, float],
    saturated: NDArray[np.bool_],
) -> None:
    """Replace the saturated pixels of a star by its PSF, as far as that reaches."""
    x, y, flux = star
    model = flux * psf.image_at(x, y, sub_pixel=True)
    x0, y0 = round(x) - psf.half, round(y) - psf.half
    stamp = x0, y0, x0 + model.shape[1], y0 + model.shape[0]
    ccd = 0, 0, *masked_image.shape[::-1]
    box = common_box(stamp, ccd)
    model, place = model[part_of(stamp, box)], part_of(ccd, box)
    take = saturated[place] & (model > 0)
    masked_image.image[place][take] = model[take]
    # beside that of the bridge, which is that of the pixels around
    masked_image.variance[place][take] += model[take] + (_CORE_ERROR * model[take]) ** 2
    masked_image.mask[place][take] |= np.int32(MaskPlane.INTRP)
