"""Sources of one CCD: matched-filter detection, deblending, shapes and windowed positions.

References
----------
.. [1] Bertin & Arnouts 1996, A&AS 117, 393 (thresholding, deblending, shapes).
.. [2] Barbary 2016, JOSS 1, 58 (sep: this algorithm as a library).
.. [3] Irwin 1985, MNRAS 214, 575 (matched filter).
.. [4] Source Extractor's manual, "Windowed positional parameters" (XWIN_IMAGE).
"""

import enum
import math
from dataclasses import dataclass

import numpy as np
import sep
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray

from coaddflow.compiled import njit
from coaddflow.errors import CcdFailure, Reason
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.row_blocks import on_rows
from coaddflow.measure.extraction import Found, find_objects
from coaddflow.settings.detection import DetectionSettings

_FWHM_PER_SIGMA = 2.0 * math.sqrt(2.0 * math.log(2.0))

_SHAPE_RADIUS = 2.5
"""Aperture that the half-light radius is of, in FWHM of the seeing."""

_SMALL_PROFILE = np.array([1.0, 2.0, 1.0])
"""Filter of the first look, when the seeing is not known."""

_SEEING_ITERATIONS = 4
_SIZE_SMOOTHING = 0.05


class SourceFlag(enum.IntFlag):
    """Conditions that limit the use of a source; bits of the column ``flags``."""

    BLENDED = 1 << 0
    "Was deblended from a neighbour."
    EDGE = 1 << 1
    "Touches the border of the CCD."
    SATURATED = 1 << 2
    "Has saturated pixels."
    BAD_PIXELS = 1 << 3
    "Has defects, cosmic rays, trails, interpolated or missing pixels within a FWHM."
    SUSPECT = 1 << 4
    "Has pixels in a range where the detector is not to be trusted."
    NO_CENTROID = 1 << 5
    "The windowed position did not converge; x and y are those of the isophote."
    BAD_FLUX = 1 << 6
    "An aperture or the PSF fit reaches over the border or has no pixel."


_FLAG_OF_PLANES = {
    SourceFlag.SATURATED: MaskPlane.SAT,
    SourceFlag.SUSPECT: MaskPlane.SUSPECT,
    SourceFlag.BAD_PIXELS: MaskPlane.BAD
    | MaskPlane.CR
    | MaskPlane.NO_DATA
    | MaskPlane.INTRP
    | MaskPlane.STREAK,
}

_NO_GOOD_CENTROID = SourceFlag.SATURATED | SourceFlag.BAD_PIXELS | SourceFlag.NO_CENTROID
_TORN_CENTROID = 0.02
"""Error of the position of a source that misses pixels, in FWHM."""


@dataclass
class Detection:
    """Sources and the pixels that belong to them.

    Attributes
    ----------
    sources : astropy.table.Table
        One row a source, see `detect_sources`.
    segments : ndarray of int32, shape (ny, nx)
        ``id`` of the source that a pixel belongs to; 0 for the sky.
    """

    sources: Table
    segments: NDArray[np.int32]


def measure_seeing(
    masked_image: MaskedImage, settings: DetectionSettings, threads: int = 1
) -> float:
    """Return the FWHM of stars in pixels, from a first look at an image without its sky.

    It is the size at which bright, whole sources gather, see `common_size`. Of the settings,
    `initial_fwhm` and `seeing_threshold` count. ``threads`` share the rows.

    Raises
    ------
    CcdFailure
        ``no_stars`` if fewer than two sources are bright enough.
    """
    image, variance = _without_holes(masked_image, settings.initial_fwhm, threads)
    threshold = settings.seeing_threshold
    found = find_objects(image, variance, _SMALL_PROFILE, threshold, settings, threads)
    sources = _source_table(found, masked_image, settings.initial_fwhm)
    spoilt = SourceFlag.EDGE | SourceFlag.SATURATED | SourceFlag.BAD_PIXELS
    sources = sources[(sources["flags"] & int(spoilt)) == 0]
    sources = sources[np.argsort(-np.asarray(sources["flux_isophotal"]), kind="stable")]
    fwhm = settings.initial_fwhm
    # the aperture must hold the stars, whatever their true size is
    for _ in range(_SEEING_ITERATIONS if len(sources) > 1 else 0):
        _add_sizes(sources, image, fwhm)
        sources = sources[np.asarray(sources["fwhm"]) > 0]
        if len(sources) < 2:
            break
        before, fwhm = fwhm, common_size(sources["fwhm"])
        if abs(fwhm - before) < 0.05 * fwhm:
            break
    if len(sources) < 2:
        raise CcdFailure(
            Reason.NO_STARS,
            f"only {len(sources)} sources are {settings.seeing_threshold:g} sigma above the sky: "
            "check shutter, clouds and guiding",
        )
    return fwhm


def detect_sources(
    masked_image: MaskedImage, fwhm: float, settings: DetectionSettings, threads: int = 1
) -> Detection:
    """Find sources in an image without its sky [1]_ [2]_ [3]_.

    Parameters
    ----------
    masked_image : MaskedImage
        Image whose sky has been subtracted, electrons. Its variance plane sets the threshold.
    fwhm : float
        FWHM of the PSF in pixels: the matched filter is a Gaussian of this width.
    settings : DetectionSettings
        Threshold and deblending.
    threads : int
        Number of threads that share the rows.

    Returns
    -------
    Detection
        Sources in the order of decreasing flux. Columns: ``id`` (from 1), ``x``, ``y`` (windowed
        position [4]_, pixels, 0-based), ``x_error``, ``y_error`` (of a star in this noise,
        pixels; larger where pixels are missing), ``flux_isophotal`` and its error (electrons
        inside the segment), ``peak`` (electrons), ``signal_to_noise`` (of the isophotal flux),
        ``a``, ``b`` (rms along the axes, pixels), ``theta`` (radians from +x to +y),
        ``half_light_radius`` and ``fwhm`` = 2 half-light radii (pixels; exact for a Gaussian),
        ``n_pixels``, ``flags`` (`SourceFlag`), ``mask`` (union of the mask planes inside the
        segment).

    Raises
    ------
    CcdFailure
        ``no_stars`` if there is no source; ``detection_failed`` if the image is so crowded, or
        so full of defects, that the extraction fails.
    """
    image, variance = _without_holes(masked_image, fwhm, threads)
    profile = _profile(fwhm)
    found = find_objects(image, variance, profile, settings.threshold, settings, threads)
    if len(found.objects) == 0:
        raise CcdFailure(
            Reason.NO_STARS, f"no source is {settings.threshold:g} sigma above the sky"
        )
    order = np.argsort(-found.objects["flux"], kind="stable")
    rank = np.empty(order.size, dtype=np.int32)
    rank[order] = np.arange(order.size)
    found = found._replace(objects=found.objects[order], index=rank[found.index])
    segments = np.zeros(image.shape, np.int32)
    segments[found.y, found.x] = found.index + 1
    sources = _source_table(found, masked_image, fwhm)
    _add_sizes(sources, image, fwhm)
    _add_windowed_positions(sources, image, fwhm)
    return Detection(sources, segments)


def set_detected(
    masked_image: MaskedImage, detection: Detection, fwhm: float, settings: DetectionSettings
) -> None:
    """Set the DETECTED plane of an image, in place, on the segments of all sources and around them.

    Segments grow by ``settings.grow`` times the FWHM (pixels).
    """
    masked_image.mask &= ~np.int32(MaskPlane.DETECTED)
    reach, plane = round(settings.grow * fwhm), np.int32(MaskPlane.DETECTED)
    _set_around(masked_image.mask, detection.segments, reach, plane)


def unusable_pixels(masked_image: MaskedImage, threads: int = 1) -> NDArray[np.bool_]:
    """Return the pixels that have no value at all, neither measured nor interpolated.

    Saturated pixels count as measured: stars are to be found, if not measured, through them.
    """
    planes = [
        np.ascontiguousarray(plane)
        for plane in (masked_image.image, masked_image.variance, masked_image.mask)
    ]
    bits = MaskPlane.BAD | MaskPlane.CR, MaskPlane.INTRP, MaskPlane.NO_DATA
    unusable = np.empty(masked_image.shape, bool)
    on_rows(_find_unusable, (*planes, unusable), *map(np.int32, bits), threads=threads)
    return unusable


def common_size(sizes: ArrayLike) -> float:
    """Return the size at which most sources gather: that of stars.

    The peak of the density of log(size), smoothed by 5 %. Cosmic rays and galaxies may be many,
    but are of all sizes.

    Parameters
    ----------
    sizes : array_like, shape (n,)
        Positive sizes, brightest source first; only the first thousand are looked at.
    """
    log_size = np.log(np.asarray(sizes, dtype=float)[:1000])
    distance = (log_size[:, None] - log_size) / _SIZE_SMOOTHING
    density = np.exp(-0.5 * distance**2)
    peak = int(np.argmax(density.sum(axis=1)))
    return float(np.exp(np.average(log_size, weights=density[peak])))


def _without_holes(
    masked_image: MaskedImage, fwhm: float, threads: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return image and variance with finite values everywhere.

    A pixel that sep is told to ignore has an infinite threshold, which the source that it is part
    of inherits: neighbours would not be deblended. So holes are filled, from the good pixels
    within half a FWHM, and are empty sky farther inside.
    """
    image = np.ascontiguousarray(masked_image.image)
    variance = np.ascontiguousarray(masked_image.variance)
    hole = unusable_pixels(masked_image, threads)
    y, x = np.nonzero(hole)
    if not len(y):
        return image, variance
    half = max(1, round(0.5 * fwhm))
    profile = np.exp(-(np.arange(-half, half + 1) ** 2) / (2.0 * (0.5 * half) ** 2))
    weight, *values = _means_around(image, variance, hole, y, x, profile)
    deep = weight == 0
    sky_variance = 1.0
    if deep.any() and not hole.all():
        sky_variance = np.median(variance[~hole])
    filled = image.copy(), variance.copy()
    for plane, value, empty in zip(filled, values, (0.0, sky_variance), strict=True):
        plane[y, x] = np.where(deep, empty, value)
    return filled


@njit(nogil=True)
def _find_unusable(image, variance, mask, unusable, holes, filled, no_data):
    ny, nx = image.shape
    for y in range(ny):
        for x in range(nx):
            is_hole = ((mask[y, x] & holes) != 0) & ((mask[y, x] & filled) == 0)
            is_hole |= (mask[y, x] & no_data) != 0
            # infinity minus itself is NaN, as NaN minus itself
            known = (image[y, x] - image[y, x] == 0) & (variance[y, x] - variance[y, x] == 0)
            unusable[y, x] = is_hole | (not known) | (not variance[y, x] > 0)


@njit(nogil=True)
def _means_around(image, variance, hole, y, x, profile):
    """Return sum of the weights, and weighted means of two planes, of the pixels around holes."""
    ny, nx = image.shape
    half = len(profile) // 2
    weight, value, noise2 = np.zeros(len(y)), np.zeros(len(y)), np.zeros(len(y))
    for i in range(len(y)):
        for j in range(max(0, y[i] - half), min(ny, y[i] + half + 1)):
            for k in range(max(0, x[i] - half), min(nx, x[i] + half + 1)):
                if not hole[j, k]:
                    w = profile[j - y[i] + half] * profile[k - x[i] + half]
                    weight[i] += w
                    value[i] += w * image[j, k]
                    noise2[i] += w * variance[j, k]
        if weight[i] > 0:
            value[i] /= weight[i]
            noise2[i] /= weight[i]
    return weight, value, noise2


@njit(nogil=True)
def _set_around(mask, segments, reach, plane):
    """Set a plane of a mask within squares around the pixels of segments."""
    ny, nx = mask.shape
    for y in range(ny):
        for x in range(nx):
            if segments[y, x] == 0:
                continue
            for j in range(max(0, y - reach), min(ny, y + reach + 1)):
                for i in range(max(0, x - reach), min(nx, x + reach + 1)):
                    mask[j, i] |= plane


def _profile(fwhm: float) -> NDArray[np.float64]:
    """Return the profile of the Gaussian of this FWHM (pixels) at an odd number of pixels.

    It reaches 1.7 sigma: what lies outside would add 2 % to the signal over noise at several times
    the cost.
    """
    sigma = fwhm / _FWHM_PER_SIGMA
    half = max(1, round(1.7 * sigma))
    return np.exp(-0.5 * (np.arange(-half, half + 1) / sigma) ** 2)


def _source_table(detected: Found, masked_image: MaskedImage, fwhm: float) -> Table:
    """Return the table of what sep measured, with flags from the mask planes."""
    found, n = detected.objects, len(detected.objects)
    labels, inside = detected.index, (detected.y, detected.x)
    bits, variance = masked_image.mask[inside], masked_image.variance[inside]
    near = np.hypot(inside[0] - found["y"][labels], inside[1] - found["x"][labels]) < fwhm
    planes, planes_near = np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int32)
    np.bitwise_or.at(planes, labels, bits)
    np.bitwise_or.at(planes_near, labels[near], bits[near])
    noise = np.sqrt(np.bincount(labels, np.where(np.isfinite(variance), variance, 0.0), n))
    ny, nx = masked_image.shape
    at_edge = (found["xmin"] == 0) | (found["ymin"] == 0)
    at_edge |= (found["xmax"] == nx - 1) | (found["ymax"] == ny - 1)
    flags = np.where(found["flag"] & sep.OBJ_MERGED, int(SourceFlag.BLENDED), 0)
    flags |= np.where(at_edge, int(SourceFlag.EDGE), 0)
    for flag, members in _FLAG_OF_PLANES.items():
        found_in = planes_near if flag == SourceFlag.BAD_PIXELS else planes
        flags |= np.where(found_in & int(members), int(flag), 0)
    sources = Table()
    sources["id"] = np.arange(1, n + 1, dtype=np.int32)
    for name in ("x", "y"):
        sources[name] = found[name].astype(float)
    sources["flux_isophotal"] = found["flux"].astype(float)
    sources["flux_isophotal_error"] = noise
    sources["signal_to_noise"] = found["flux"] / np.where(noise > 0, noise, np.inf)
    for name in ("peak", "a", "b", "theta"):
        sources[name] = found[name].astype(float)
    sources["n_pixels"] = found["npix"].astype(np.int32)
    sources["flags"] = flags.astype(np.int32)
    sources["mask"] = planes
    for name in ("x", "y", "a", "b"):
        sources[name].unit = "pixel"
    sources["theta"].unit = "rad"
    return sources


def _add_sizes(sources: Table, image: NDArray, fwhm: float) -> None:
    """Add the half-light radius of a fixed aperture, and twice this as FWHM."""
    x, y = np.asarray(sources["x"]), np.asarray(sources["y"])
    radius = np.full(x.size, _SHAPE_RADIUS * fwhm)
    half, _ = sep.flux_radius(image, x, y, radius, 0.5, subpix=5)
    half = np.where(np.isfinite(half), half, 0.0)
    sources["half_light_radius"] = half
    sources["fwhm"] = 2.0 * half
    sources["half_light_radius"].unit = sources["fwhm"].unit = "pixel"


def _add_windowed_positions(sources: Table, image: NDArray, fwhm: float) -> None:
    """Replace isophotal by windowed positions where these converge [4]_."""
    x, y = np.asarray(sources["x"]), np.asarray(sources["y"])
    half = np.asarray(sources["half_light_radius"])
    sigma = np.clip(2.0 * half, 0.7 * fwhm, 3.0 * fwhm) / _FWHM_PER_SIGMA
    xw, yw, flag = sep.winpos(image, x, y, sigma, subpix=11)
    shift = np.hypot(xw - x, yw - y)
    converged = flag == 0
    converged &= np.isfinite(shift) & (shift < np.maximum(1.0, 0.5 * fwhm))
    sources["x"] = np.where(converged, xw, x)
    sources["y"] = np.where(converged, yw, y)
    sources["flags"][~converged] |= int(SourceFlag.NO_CENTROID)
    # photon noise of the centroid of a Gaussian star
    error = sigma / np.maximum(np.asarray(sources["signal_to_noise"]), 1e-3)
    torn = (np.asarray(sources["flags"]) & int(_NO_GOOD_CENTROID)) != 0
    error = np.where(torn, np.hypot(error, _TORN_CENTROID * fwhm), error)
    for name in ("x_error", "y_error"):
        sources[name] = error
    for name in ("x", "y", "x_error", "y_error"):
        sources[name].unit = "pixel"
