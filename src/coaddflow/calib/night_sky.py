"""Calibration from dithered science exposures, for cameras without calibration frames.

What stays on the CCD while the stars move belongs to the detector. Taken as additive it is a
dark (hot and warm pixels, bias structure); taken as proportional to the sky it is a flat. With
an unknown pedestal under the sky only the additive pattern makes sense; see
``docs/calibration.md``.

Both are made in two passes, as blank-field flats and sky frames in the infrared are [1]_ [2]_:
the median over all exposures gives a first pattern, sources are found on every exposure after
this pattern is taken off (so that hot pixels are no sources), and the clipped mean without
sources is the result.

References
----------
.. [1] Tyson 1988, AJ 96, 1 (dithered exposures calibrate themselves).
.. [2] Dickinson et al. 2002, XDIMSUM (two-pass masks for sky frames), NOAO.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import sep
from numpy.typing import NDArray
from scipy import ndimage

from coaddflow.calib.combine import clipped_mean, median, stacked
from coaddflow.calib.frames import (
    check_number,
    find_defects,
    local_median,
    median_level,
    unit_median,
    usable_pixels,
)
from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.statistics import iqr_sigma
from coaddflow.settings.calibs import CalibsSettings, DefectsSettings, NightSkySettings

_SMOOTHING = 1.2
"""Sigma in pixels of the smoothing before sources are looked for."""

_LEAST_AREA = 5
"""Pixels above the threshold that make a source."""

_ENOUGH_TO_JUDGE = 50
"""With fewer pixels of sources on a frame it does not matter whether they move."""


def night_sky_dark(
    frames: Iterable[MaskedImage], exposure_times: Sequence[float], settings: CalibsSettings
) -> MaskedImage:
    """Return the additive pattern of a CCD from dithered science exposures.

    Parameters
    ----------
    frames : iterable of MaskedImage, each of shape (ny, nx)
        Science exposures in electrons, detrended up to the gain. Asked for one by one.
    exposure_times : sequence of float
        Seconds, all above 0.
    settings : CalibsSettings
        Search for sources, clipping, memory and least number of frames.

    Returns
    -------
    MaskedImage
        Electrons per second, of median zero; used as a dark. Each exposure has its median sky
        subtracted, is divided by its exposure time, and is weighted by its noise. Pixels that
        were seen free of sources too rarely are filled from their neighbours and flagged INTRP.

    Raises
    ------
    InputError
        If the exposures are too few, have no exposure time, or are not dithered.
    """
    times = np.asarray(exposure_times, dtype=float)
    check_number("night-sky dark", "night_sky", len(times), settings.night_sky.min_frames)
    if not (times > 0).all():
        raise InputError("a science exposure has an exposure time of 0 s")
    rates = (
        (pixels - np.float32(np.nanmedian(pixels))) / np.float32(t)
        for pixels, t in zip(map(usable_pixels, frames), times, strict=True)
    )
    with stacked(rates, len(times), settings.memory) as stack:
        first, noise = _mask_sources(stack, settings.night_sky)
        for i in range(len(stack)):
            stack[i] -= np.nanmedian(stack[i] - first)
        return _combine(stack, noise, settings)


def night_sky_flat(
    frames: Iterable[MaskedImage], n_frames: int, settings: CalibsSettings
) -> MaskedImage:
    """Return the flat of a CCD, of median 1, from the sky of dithered exposures of one band.

    Parameters
    ----------
    frames : iterable of MaskedImage, each of shape (ny, nx)
        Science exposures in electrons, detrended up to the dark: what is left of the bias level
        is taken for sky.
    n_frames : int
        How many there are.
    settings : CalibsSettings
        See `night_sky_dark`; ``settings.flat.scales`` and ``smoothing`` choose the scales.

    Raises
    ------
    InputError
        If the exposures are too few or not dithered.
    CcdFailure
        ``no_sky`` if the median of an exposure is not positive.
    """
    check_number("night-sky flat", "night_sky", n_frames, settings.night_sky.min_frames)
    normalised = (_over_sky(i, usable_pixels(f)) for i, f in enumerate(frames, start=1))
    with stacked(normalised, n_frames, settings.memory) as stack:
        first, noise = _mask_sources(stack, settings.night_sky)
        for i in range(len(stack)):
            stack[i] /= np.nanmedian(stack[i] / np.where(first > 0.1, first, np.float32(np.nan)))
        flat = unit_median(_combine(stack, noise, settings))
    if settings.flat.scales == "all":
        return flat
    smooth = _illumination(flat.image, settings.flat.smoothing)
    if settings.flat.scales == "large":
        return MaskedImage(smooth, np.zeros_like(smooth), flat.mask)
    return MaskedImage(flat.image / smooth, flat.variance / smooth**2, flat.mask)


def hot_pixel_map(pattern: MaskedImage, settings: DefectsSettings) -> NDArray[np.bool_]:
    """Return the pixels that stay high (or low) while the stars move over the CCD.

    ``pattern`` is from `night_sky_dark`; the map has its shape, (ny, nx).
    """
    return find_defects(pattern, [], settings, both_signs=True)


def _illumination(flat: NDArray[np.float32], scale: int) -> NDArray[np.float32]:
    """Return the smooth part of a flat: medians on a mesh of ``scale`` pixels, and a spline."""
    filled = np.ascontiguousarray(np.where(np.isfinite(flat), flat, np.float32(1)))
    return sep.Background(filled, bw=scale, bh=scale).back().astype(np.float32)


def _over_sky(number: int, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    sky = median_level(pixels)
    if not sky > 0:
        raise CcdFailure(
            Reason.NO_SKY,
            f"science exposure number {number} has a sky of {sky:g} electrons, from which no "
            "flat can be made. Set calibs.flat.source to `none`, or correct detrend.pedestal",
        )
    return pixels / np.float32(sky)


def _mask_sources(
    stack: NDArray[np.float32], settings: NightSkySettings
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Set sources in the stack to NaN; return the first pattern, and the noise of each frame."""
    _check_dithers(stack, settings)
    first = median(stack)
    noise = np.empty(len(stack))
    for i, frame in enumerate(stack):
        frame[_source_mask(frame - first, settings)] = np.nan
        clear = (frame - first)[np.isfinite(frame)]
        noise[i] = iqr_sigma(clear) if len(clear) else np.nan
    if not np.isfinite(noise).all() or not (noise > 0).all():
        raise InputError(
            "a science exposure has no empty sky",
            remedy="raise calibs.night_sky.threshold, or use calibration exposures",
        )
    return first, noise


def _check_dithers(stack: NDArray[np.float32], settings: NightSkySettings) -> None:
    """Raise InputError if the sources do not move from frame to frame.

    A running median of 3 x 3 pixels takes away hot pixels, so that what is left are stars.
    """
    bright = settings.model_copy(update={"threshold": 3.0, "growth": 0})
    times = np.zeros(stack.shape[1:], np.int32)
    for frame in stack:
        filled = np.where(np.isfinite(frame), frame, np.float32(np.nanmedian(frame)))
        times += _source_mask(ndimage.median_filter(filled, size=3), bright)
    typical = times.sum() / len(stack)
    persistent = np.count_nonzero(times > len(stack) / 2)
    if typical >= _ENOUGH_TO_JUDGE and persistent > settings.max_persistence * typical:
        raise InputError(
            f"{100 * persistent / typical:.0f} % of the pixels with sources have them in more "
            f"than half of the {len(stack)} exposures: these are not dithered enough to separate "
            "the detector from the sky",
            remedy="choose dithered exposures (calibs.*.exposures), or use calibration exposures",
        )


def _source_mask(image: NDArray[np.float32], settings: NightSkySettings) -> NDArray[np.bool_]:
    """Return where a frame has sources of more than a few pixels; none where it is not finite."""
    missing = ~np.isfinite(image)
    filled = np.ascontiguousarray(np.where(missing, np.float32(0), image))
    sky = sep.Background(filled, mask=missing, bw=settings.mesh, bh=settings.mesh)
    smoothed = ndimage.gaussian_filter(np.where(missing, 0, filled - sky.back()), _SMOOTHING)
    labels, _ = ndimage.label(smoothed > settings.threshold * iqr_sigma(smoothed[~missing]))
    large = np.bincount(labels.ravel()) >= _LEAST_AREA
    large[0] = False
    sources = large[labels]
    if settings.growth:
        sources = ndimage.binary_dilation(sources, iterations=settings.growth)
    return sources


def _combine(
    stack: NDArray[np.float32], noise: NDArray[np.float64], settings: CalibsSettings
) -> MaskedImage:
    """Return the clipped mean, with pixels that were rarely clear filled from their neighbours."""
    mean, variance, number = clipped_mean(
        stack, noise**-2, settings.clip_sigma, settings.clip_iterations
    )
    rare = number < settings.night_sky.min_clear
    mask = np.where(rare, int(MaskPlane.INTRP), 0)
    if rare.all():
        raise InputError(
            "no pixel is free of sources in enough exposures",
            remedy="raise calibs.night_sky.threshold, or use more exposures",
        )
    if rare.any():
        nearest = ndimage.distance_transform_edt(rare, return_distances=False, return_indices=True)
        smooth = local_median(mean[tuple(nearest)])
        mean[rare] = smooth[rare]
        variance[rare] = float(np.median(variance[~rare])) + float(np.var(mean[~rare]))
    return MaskedImage(mean, variance, mask)
