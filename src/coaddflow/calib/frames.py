"""Master bias, dark and flat from calibration exposures, and the map of bad pixels.

All masters are clipped means with a variance for each pixel from the scatter of the frames that
were used [1]_; what is noise in them is shrunk (`calib.shrinkage`). A job sees one CCD, so a flat
is normalised for each CCD by itself: the relative response of the CCDs goes into their zero-points.
Frames come one by one, each of shape (ny, nx); they are stacked in memory or in a scratch file
(`calib.combine.stacked`).

References
----------
.. [1] Howell 2006, "Handbook of CCD Astronomy", 2nd edition, chapter 4.
.. [2] Newberry 1991, PASP 103, 122 (weights and signal-to-noise of calibration frames).
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from coaddflow.calib.combine import clipped_mean, stacked
from coaddflow.calib.shrinkage import without_noise
from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.image.fits_hdus import as_plane
from coaddflow.image.masked_image import (
    Compression,
    MaskedImage,
    MaskPlane,
    masked_image_hdus,
    opened_fits,
    read_planes,
    write_fits,
)
from coaddflow.image.medians import masked_median, medians_of_pieces, running_median
from coaddflow.image.statistics import iqr_sigma
from coaddflow.instrument.undefined import without_undefined
from coaddflow.isr.detrend import CcdCalibs
from coaddflow.settings.calibs import CalibsSettings, DefectsSettings

CalibKind = Literal["bias", "dark", "flat", "defects"]

_CARD = 72
"""Characters in a HISTORY card."""

_UNITS = {"bias": "adu", "dark": "electron/s", "flat": "", "defects": ""}
_UNUSABLE = MaskPlane.SAT | MaskPlane.NO_DATA | MaskPlane.BAD

_NEIGHBOURHOOD = 7
"""Pixels along rows and columns that a pixel is compared with."""

_INCOMPLETE = 0.01
"""A flat exposure that lost this fraction of the CCD more than others is scaled to them."""

_PIECE = 64
"""Rows of a piece of a column that is judged as a whole."""


def combine_bias(
    frames: Iterable[MaskedImage], n_frames: int, settings: CalibsSettings
) -> MaskedImage:
    """Return the master bias in counts; pixels without a value are NO_DATA.

    Parameters
    ----------
    frames : iterable of MaskedImage
        Bias exposures in counts, detrended up to assembly.
    n_frames : int
        How many there are.
    settings : CalibsSettings
        Clipping, memory and least number of frames.

    Raises
    ------
    InputError
        If there are fewer frames than ``settings.bias.min_frames``.
    """
    check_number("master bias", "bias", n_frames, settings.bias.min_frames)
    with stacked(map(usable_pixels, frames), n_frames, settings.memory) as stack:
        mean = _mean(stack, None, settings)
    return _without_noise(mean, n_frames, settings)


def combine_dark(
    frames: Iterable[MaskedImage], exposure_times: Sequence[float], settings: CalibsSettings
) -> MaskedImage:
    """Return the master dark, in electrons per second.

    Exposures are weighted by the square of their time, since read noise dominates a dark [2]_.

    Parameters
    ----------
    frames : iterable of MaskedImage
        Dark exposures in electrons, detrended up to the gain.
    exposure_times : sequence of float
        Seconds, all above 0.
    settings : CalibsSettings
        See `combine_bias`.

    Raises
    ------
    InputError
        If there are fewer frames than ``settings.dark.min_frames``, or one has no exposure time.
    """
    times = np.asarray(exposure_times, dtype=float)
    check_number("master dark", "dark", len(times), settings.dark.min_frames)
    if not (times > 0).all():
        raise InputError(
            "a dark exposure has an exposure time of 0 s",
            remedy="correct the exposure table, or name the good ones in calibs.dark.exposures",
        )

    def rate(frame: MaskedImage, time: float) -> NDArray[np.float32]:
        return usable_pixels(frame) / np.float32(time)

    with stacked(map(rate, frames, times), len(times), settings.memory) as stack:
        mean = _mean(stack, times**2, settings)
    return _without_noise(mean, len(times), settings)


def combine_flat(
    frames: Iterable[MaskedImage], n_frames: int, settings: CalibsSettings
) -> MaskedImage:
    """Return the flat of one band; its median is 1.

    Parameters
    ----------
    frames : iterable of MaskedImage
        Flat exposures in electrons, detrended up to the dark. Each is divided by its median over
        the CCD, and weighted by this level, as its photons are.
    n_frames, settings
        See `combine_bias`.

    Raises
    ------
    InputError
        If there are fewer frames than ``settings.flat.min_frames``.
    CcdFailure
        ``dark_flat`` if an exposure has no light.
    """
    check_number("flat", "flat", n_frames, settings.flat.min_frames)
    levels: list[float] = []

    def normalised(frame: MaskedImage) -> NDArray[np.float32]:
        pixels = usable_pixels(frame)
        level = median_level(pixels)
        if not level > 0:
            raise CcdFailure(
                Reason.DARK_FLAT,
                f"flat exposure number {len(levels) + 1} has no unsaturated light "
                f"(median {level:g}). Leave it out with calibs.flat.exposures",
            )
        levels.append(level)
        pixels /= np.float32(level)
        return pixels

    with stacked(map(normalised, frames), n_frames, settings.memory) as stack:
        weights = np.array(levels) * _rescale_incomplete(stack)
        mean = _mean(stack, weights, settings)
    return unit_median(_without_noise(mean, n_frames, settings))


def _rescale_incomplete(stack: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale frames of which a part is missing to the most complete one, in place.

    The median of a frame without one of its amplifiers is not that of the whole CCD. Returned is
    what each frame was divided by. One that has no pixel of the most complete one says nothing.
    """
    factors = np.ones(len(stack))
    seen = np.array([np.mean(np.isfinite(frame)) for frame in stack])
    fullest = int(np.argmax(seen))
    for number in np.flatnonzero(seen < seen[fullest] - _INCOMPLETE):
        common = np.isfinite(stack[number]) & np.isfinite(stack[fullest])
        factor = np.median(stack[number][common] / stack[fullest][common]) if common.any() else 0.0
        if factor > 0:
            factors[number] = factor
            stack[number] /= np.float32(factor)
        else:
            stack[number] = np.nan
    return factors


def find_defects(
    dark: MaskedImage | None,
    flats: Sequence[MaskedImage],
    settings: DefectsSettings,
    both_signs: bool = False,
) -> NDArray[np.bool_]:
    """Return where a CCD has hot pixels, hot columns, or pixels of strange response.

    Parameters
    ----------
    dark : MaskedImage, optional
        Master dark, electrons per second, or additive pattern of the night sky. Hot pixels and
        hot pieces of columns are bad.
    flats : sequence of MaskedImage
        Flats, of any bands. Pixels that differ from their neighbourhood by more than
        ``settings.response`` are bad, and so are pixels that are unknown in any frame.
    settings : DefectsSettings
        Limits beyond which a pixel counts as bad.
    both_signs : bool
        Pixels of the dark below their neighbourhood are bad as well: dead ones, in a pattern of
        the night sky.

    Raises
    ------
    InputError
        If there is neither dark nor flat.
    """
    frames = [*flats, *([dark] if dark is not None else [])]
    if not frames:
        raise InputError(
            "defects cannot be found without a dark or a flat",
            remedy="set calibs.defects.source to `none`, `given` or `night_sky`",
        )
    bad = np.zeros(frames[0].shape, bool)
    for frame in frames:
        bad |= frame.has_any(_UNUSABLE) | ~np.isfinite(frame.image)
    if dark is not None:
        bad |= _hot_pixels(dark, settings, both_signs)
        bad |= _hot_columns(dark, settings.column_sigma)
    for flat in flats:
        image = np.where(np.isfinite(flat.image), flat.image, np.float32(0))
        typical = np.maximum(local_median(image), np.float32(1e-3))
        bad |= np.abs(image / typical - 1) > settings.response
    return bad


def _hot_pixels(
    dark: MaskedImage, settings: DefectsSettings, both_signs: bool
) -> NDArray[np.bool_]:
    """Return where a dark differs from its neighbourhood by more than the settings allow."""
    known = np.isfinite(dark.image)
    image = np.where(known, dark.image, masked_median(dark.image, ~known))
    excess = image - local_median(image)
    signed = excess[known]
    if both_signs:
        excess = np.abs(excess)
    # where few values were used the error of the pixel itself is larger than the typical one
    error = np.where(np.isfinite(dark.variance), np.sqrt(dark.variance), np.float32(0))
    limit = settings.hot_sigma * max(iqr_sigma(signed), _error_of_structure(excess, error))
    hot = (excess > limit) & (excess > 3 * error)
    return hot if settings.hot_rate is None else hot & (excess > settings.hot_rate)


def _error_of_structure(excess: NDArray[np.float32], error: NDArray[np.float32]) -> float:
    """Return the typical error of pixels that differ from their neighbours.

    In a master whose noise was shrunk these alone scatter as they were measured.
    """
    stands_out = (np.abs(excess) > 3 * error) & (error > 0)
    return float(np.median(error[stands_out])) if stands_out.any() else 0.0


def _hot_columns(dark: MaskedImage, sigma: float) -> NDArray[np.bool_]:
    """Return the pieces of columns that as a whole differ from the columns beside them.

    They must do so by ``sigma`` times the scatter of such pieces, and by more than the scatter of
    single pixels: weaker ones do no harm once the dark is subtracted.
    """
    known = np.isfinite(dark.image)
    image = np.where(known, dark.image, masked_median(dark.image, ~known))
    excess = image - running_median(image, 2 * _NEIGHBOURHOOD + 1, axis=1)
    starts = np.arange(0, len(image), _PIECE)
    pieces = medians_of_pieces(excess, _PIECE)
    whole = np.stack([known[y : y + _PIECE].mean(axis=0) > 0.5 for y in starts])
    error = np.where(np.isfinite(dark.variance), np.sqrt(dark.variance), np.float32(0))
    single = max(iqr_sigma(excess[known]), _error_of_structure(excess, error))
    bad = np.abs(pieces) > max(sigma * iqr_sigma(pieces[whole]), single)
    return np.repeat(bad, _PIECE, axis=0)[: len(image)]


def local_median(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the medians along rows of the medians along columns."""
    return running_median(running_median(image, _NEIGHBOURHOOD, axis=0), _NEIGHBOURHOOD, axis=1)


def defects_frame(bad: NDArray[np.bool_]) -> MaskedImage:
    """Return a map of bad pixels, shape (ny, nx), as a frame: BAD in the mask, 1 in the image."""
    return MaskedImage(bad, np.zeros(bad.shape), np.where(bad, int(MaskPlane.BAD), 0))


def write_master(
    path: str | Path,
    master: MaskedImage,
    kind: CalibKind,
    n_frames: int,
    header: fits.Header | None = None,
    compression: Compression = "none",
) -> None:
    """Write a calibration frame: IMAGE, MASK and VARIANCE after the primary header.

    The kind gives the unit (BUNIT): adu for a bias, electron/s for a dark, none for others. The
    primary header has the cards of ``header``, the kind (CFKIND), and the number of exposures that
    the frame was made from (CFNFRAME). Calibration frames are never quantised.
    """
    primary = fits.PrimaryHDU(header=header)
    primary.header["CFKIND"] = (kind, "kind of calibration frame")
    primary.header["CFNFRAME"] = (n_frames, "number of exposures it was made from")
    lossless = "none" if compression == "none" else "lossless"
    write_fits(path, [primary, *masked_image_hdus(master, None, _UNITS[kind], lossless)])


def write_failed_master(path: str | Path, kind: CalibKind, failure: CcdFailure) -> None:
    """Write instead of a calibration frame why there is none, for this CCD alone.

    The CCD then fails in every exposure, with this reason, and the other CCDs go on.
    """
    primary = fits.PrimaryHDU()
    primary.header["CFKIND"] = (kind, "kind of calibration frame")
    primary.header["CFFAILED"] = (failure.reason, "why there is none")
    text = failure.message.encode("ascii", "replace").decode()
    # only a word that goes on fills a card
    for line in textwrap.wrap(text, _CARD - 1, break_long_words=False, break_on_hyphens=False):
        for start in range(0, len(line), _CARD):
            primary.header.add_history(line[start : start + _CARD])
    write_fits(path, [primary])


def read_calibs(paths: Mapping[str, str | Path], threads: int = 1) -> CcdCalibs:
    """Read the calibration frames of a CCD, files by kind; the rest as `read_master`."""
    return CcdCalibs(**{kind: read_master(path, kind, threads) for kind, path in paths.items()})


def read_master(path: str | Path, kind: CalibKind, threads: int = 1) -> MaskedImage:
    """Read one calibration frame, made here or given; ``threads`` share the pixels.

    A file that was not made here may have nothing but one image, in the unit of its kind (see
    `write_master`): it is taken to be free of errors, pixels that are not finite are BAD, and in
    a map of defects all that are not 0.

    Raises
    ------
    InputError
        If the file is missing or is no image.
    CcdFailure
        ``no_calibration`` if the frame could not be made for this CCD.
    """
    remedy = f"remove it to have it made again, or correct calibs.{kind}.path"
    with opened_fits(path, "calibration frame", remedy) as (stream, hdus):
        failed = hdus[0].header.get("CFFAILED")
        if failed is not None:
            lines = (str(line) for line in hdus[0].header.get("HISTORY", []))
            why = "".join(line if len(line) == _CARD else f"{line} " for line in lines).strip()
            raise CcdFailure(Reason.NO_CALIBRATION, f"{path}: no {kind} ({failed}: {why})")
        if "IMAGE" not in hdus:
            pixels = next((plane for hdu in hdus if (plane := _plane_of(hdu)) is not None), None)
            if pixels is None:
                raise ValueError("it has no image")
            return _bare_image(pixels, kind)
        return read_planes(stream, hdus, threads)[0]


def _plane_of(hdu: fits.hdu.base._BaseHDU) -> NDArray | None:
    """Return the image of an HDU, of two dimensions; None if it has none."""
    pixels = as_plane(hdu.data) if hdu.is_image and hdu.data is not None else None
    if pixels is None or pixels.ndim != 2:
        return None
    return without_undefined(pixels, hdu.header)


def _bare_image(pixels: NDArray, kind: CalibKind) -> MaskedImage:
    image = pixels.astype(np.float32)
    bad = ~np.isfinite(image) if kind != "defects" else image != 0
    return MaskedImage(image, np.zeros(image.shape), np.where(bad, int(MaskPlane.BAD), 0))


def check_number(what: str, section: str, n_frames: int, least: int) -> None:
    """Raise InputError if there are too few exposures for a calibration frame."""
    if n_frames < least:
        raise InputError(
            f"a {what} needs at least {least} exposures, there are {n_frames}",
            remedy=f"take more, lower calibs.{section}.min_frames, or choose another source of "
            "this calibration frame",
        )


def usable_pixels(frame: MaskedImage) -> NDArray[np.float32]:
    """Return the values of a frame, NaN where they mean nothing."""
    return np.where(frame.has_any(_UNUSABLE), np.float32(np.nan), frame.image)


def unit_median(flat: MaskedImage) -> MaskedImage:
    """Return a flat divided by its median."""
    scale = masked_median(flat.image, np.isnan(flat.image))
    return MaskedImage(flat.image / scale, flat.variance / scale**2, flat.mask)


def median_level(pixels: NDArray[np.float32]) -> float:
    """Return the median of a frame, NaN if none of its pixels is usable."""
    return float(masked_median(pixels, np.isnan(pixels))) if np.isfinite(pixels).any() else np.nan


def _without_noise(mean: MaskedImage, n_frames: int, settings: CalibsSettings) -> MaskedImage:
    return without_noise(mean, n_frames) if settings.shrink_noise else mean


def _mean(
    stack: NDArray[np.float32], weights: NDArray[np.float64] | None, settings: CalibsSettings
) -> MaskedImage:
    mean, variance, number = clipped_mean(
        stack, weights, settings.clip_sigma, settings.clip_iterations
    )
    mask = np.zeros(number.shape, np.int32)
    mask[number == 0] = MaskPlane.NO_DATA
    # one value alone has no scatter: nothing is known about it either
    mask[number == 1] = MaskPlane.BAD
    return MaskedImage(mean, variance, mask)
