"""Fluxes, what they miss of the total light, and the zero-point of one CCD.

Images are those without their sky; positions (x, y) are in pixels, 0-based, arrays of shape (n,).

References
----------
.. [1] Barbary 2016, JOSS 1, 58 (sep: exact overlap of circles and pixels).
.. [2] Naylor 1998, MNRAS 296, 339 (PSF-weighted sums).
.. [3] Howell 1989, PASP 101, 616 (growth curves as aperture correction).
.. [4] Stetson 1990, PASP 102, 932 (growth curves from the ratios of successive apertures).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import sep
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import CcdFailure, Reason, failing_ccd
from coaddflow.image.masked_image import MaskedImage
from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import mad_sigma
from coaddflow.measure.background import NOT_MEASURED
from coaddflow.measure.detection import unusable_pixels
from coaddflow.measure.psf_model import PsfModel
from coaddflow.settings.photometry import PhotometrySettings

_GROWTH_APERTURES = 12

_STAR_TO_STAR = 0.002
"""Real scatter of flux ratios, which keeps the brightest star from deciding alone."""


@dataclass(frozen=True)
class Fluxes:
    """Fluxes of n sources in the unit of the image.

    Attributes
    ----------
    flux, error : ndarray of float64, shape (n,) or (n, n apertures)
        Fluxes and their standard deviations from the variance plane. NaN where there is no
        pixel to measure.
    incomplete : ndarray of bool, shape (n,)
        True where an aperture or the PSF reaches over the border or over pixels without value.
    """

    flux: NDArray[np.float64]
    error: NDArray[np.float64]
    incomplete: NDArray[np.bool_]


@dataclass(frozen=True)
class ZeroPoint:
    """Magnitude of a source of one electron in total.

    Attributes
    ----------
    value, error, scatter : float
        Zero-point, its error, and the standard deviation of its stars, mag.
    n_stars : int
        Stars that were not clipped.
    used : ndarray of bool, shape (n,)
        Which they were.
    """

    value: float
    error: float
    scatter: float
    n_stars: int
    used: NDArray[np.bool_]


class MatchedStars(NamedTuple):
    """Stars of a CCD that are in the reference catalogue.

    Attributes
    ----------
    source_index : ndarray of int, shape (n,)
        Rows of the sources.
    x, y : ndarray of float64, shape (n,)
        Positions, pixels, 0-based.
    flux, flux_error : ndarray of float64, shape (n,)
        Total fluxes, electrons.
    magnitude, magnitude_error : ndarray of float64, shape (n,)
        Catalogue magnitudes; NaN where there is none, or where the star is not whole.
    """

    source_index: NDArray[np.intp]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    flux: NDArray[np.float64]
    flux_error: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    magnitude_error: NDArray[np.float64]


def aperture_fluxes(
    masked_image: MaskedImage, x: ArrayLike, y: ArrayLike, radii: Sequence[float]
) -> Fluxes:
    """Sum the pixels in circles, with exact overlaps [1]_.

    Pixels without any value are replaced by the mean of the others in the circle. The fluxes have
    the shape (n, n radii); radii are in pixels.
    """
    n, unusable = len(np.atleast_1d(x)), unusable_pixels(masked_image)
    grid = np.broadcast_arrays(np.reshape(x, (-1, 1)), np.reshape(y, (-1, 1)), radii)
    measured = sep.sum_circle(
        np.ascontiguousarray(masked_image.image),
        *(np.asarray(column, dtype=float).ravel() for column in grid),
        var=np.ascontiguousarray(masked_image.variance),
        mask=unusable,
        subpix=0,
    )
    flux, error, flag = (column.reshape(n, -1) for column in measured)
    empty = (flag & sep.APER_ALLMASKED) != 0
    flux, error = np.where(empty, np.nan, flux), np.where(empty, np.nan, error)
    incomplete = (flag & (sep.APER_TRUNC | sep.APER_HASMASKED | sep.APER_ALLMASKED)) != 0
    return Fluxes(flux, error, incomplete.any(axis=1))


def psf_fluxes(
    masked_image: MaskedImage, psf: PsfModel, x: ArrayLike, y: ArrayLike, block: int = 1000
) -> Fluxes:
    """Fit the PSF to sources whose positions are known [2]_.

    All pixels weigh as the sky does, which makes the flux linear in the pixels and its bias the
    same for faint and bright stars, whatever is wrong with the PSF. The error follows from the
    variance plane, with the photon noise of the source. Neighbours are not fitted. So many sources
    as ``block`` says are worked on at a time, which bounds the memory.
    """
    x, y = np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float))
    flux, error = np.full(x.size, np.nan), np.full(x.size, np.nan)
    incomplete = np.zeros(x.size, dtype=bool)
    for start in range(0, x.size, block):
        part = slice(start, start + block)
        model = psf.images_at(x[part], y[part]).astype(float)
        place = x[part], y[part], psf.half
        pixels, inside = cut_stamps(masked_image.image, *place)
        variance, mask = (
            cut_stamps(plane, *place)[0] for plane in (masked_image.variance, masked_image.mask)
        )
        usable = inside & _measured(pixels, variance, mask)
        weight = np.where(usable, model, 0.0)
        norm = (weight * model).sum(axis=(1, 2))
        enough = norm > 0.1 * (model**2).sum(axis=(1, 2))
        norm = np.where(enough, norm, np.nan)
        flux[part] = (weight * np.where(usable, pixels, 0.0)).sum(axis=(1, 2)) / norm
        noise2 = (weight**2 * np.where(usable, variance, 0.0)).sum(axis=(1, 2))
        error[part] = np.sqrt(noise2) / norm
        incomplete[part] = (weight.sum(axis=(1, 2)) < 0.98) | ~enough
    return Fluxes(flux, error, incomplete)


def _measured(
    pixels: NDArray[np.float32], variance: NDArray[np.float32], mask: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Return which pixels have a value of their own, on stamps of the planes of an image."""
    known = np.isfinite(pixels) & np.isfinite(variance) & (variance > 0)
    return known & ((mask & np.int32(NOT_MEASURED)) == 0)


def growth_curve(
    masked_image: MaskedImage, x: ArrayLike, y: ArrayLike, radii: Sequence[float]
) -> NDArray[np.float64]:
    """Return the fraction of a star's light inside circles, 1 in the largest [3]_ [4]_.

    The ratio of the fluxes in each pair of successive apertures is the median over the stars,
    with weights: a neighbour or the noise of the sky in a large aperture of one star does not
    spoil the inner ones, nor those of other stars. The stars should be bright and isolated; the
    radii (pixels) increase.

    Raises
    ------
    CcdFailure
        ``no_aperture_correction`` if no star is whole in the largest aperture.
    """
    measured = aperture_fluxes(masked_image, x, y, radii)
    whole = ~measured.incomplete & (measured.flux > 0).all(axis=1)
    if not whole.any():
        raise CcdFailure(
            Reason.NO_APERTURE_CORRECTION, "no bright star is whole in the largest aperture"
        )
    flux, error = measured.flux[whole], measured.error[whole]
    fraction = np.ones(len(radii))
    for outer in range(len(radii) - 1, 0, -1):
        ratio = flux[:, outer - 1] / flux[:, outer]
        # the noise of the ratio is that of the ring between the circles
        ring2 = np.maximum(error[:, outer] ** 2 - error[:, outer - 1] ** 2, 0.0)
        noise = np.hypot(np.sqrt(ring2) / flux[:, outer], _STAR_TO_STAR)
        fraction[outer - 1] = fraction[outer] * _weighted_median(ratio, 1.0 / noise)
    return fraction


def aperture_correction(
    masked_image: MaskedImage, x: ArrayLike, y: ArrayLike, radius: float, total_radius: float
) -> float:
    """Return the total flux of a star over the flux in a circle, from bright, isolated stars.

    ``radius`` is that of the circle, ``total_radius`` that of the circle that by definition holds
    the total flux, both in pixels. Errors are those of `growth_curve`.
    """
    radii = np.geomspace(radius, total_radius, _GROWTH_APERTURES)
    return float(1.0 / growth_curve(masked_image, x, y, radii)[0])


def psf_correction(psf_flux: ArrayLike, psf_error: ArrayLike, total_flux: ArrayLike) -> float:
    """Return total flux over PSF flux: the weighted median over bright, isolated stars.

    Their total flux is the aperture flux times the aperture correction; arrays of shape (n,).

    Raises
    ------
    CcdFailure
        ``no_aperture_correction`` if no star has both fluxes.
    """
    psf_flux, psf_error, total = (np.asarray(a, float) for a in (psf_flux, psf_error, total_flux))
    good = np.isfinite(psf_flux) & np.isfinite(total) & (psf_flux > 0) & (total > 0)
    if not good.any():
        raise CcdFailure(Reason.NO_APERTURE_CORRECTION, "no bright star has a PSF flux")
    noise = np.hypot((psf_error / psf_flux)[good], _STAR_TO_STAR)
    return _weighted_median((total / psf_flux)[good], 1.0 / noise)


def zero_point(stars: MatchedStars, settings: PhotometrySettings) -> ZeroPoint:
    """Compare the fluxes of stars with their known magnitudes.

    Weighted mean of magnitude + 2.5 log10(flux) after iterated clipping around the median, in
    units of each star's error, or of the median absolute deviation if that is larger. The error
    is scaled up where the scatter of the stars is larger than their errors say.

    Parameters
    ----------
    stars : MatchedStars
        Fluxes and magnitudes, with their errors.
    settings : PhotometrySettings
        `clip_sigma`, `error_floor` and `min_zero_point_stars` are used.

    Raises
    ------
    CcdFailure
        ``no_photometric_match`` if fewer than ``settings.min_zero_point_stars`` stars have a
        flux and a magnitude.
    """
    known, offset, variance = magnitude_offsets(stars, settings.error_floor)
    if np.count_nonzero(known) < settings.min_zero_point_stars:
        raise CcdFailure(
            Reason.NO_PHOTOMETRIC_MATCH,
            f"{np.count_nonzero(known)} stars have a flux and a reference magnitude, "
            f"{settings.min_zero_point_stars} are needed",
        )
    used = known
    for _ in range(20):
        deviation = np.abs(offset - np.median(offset[used])) / np.sqrt(variance)
        scatter = mad_sigma(deviation[used], 0.0)
        kept = known & (deviation <= settings.clip_sigma * max(1.0, scatter))
        if np.array_equal(kept, used):
            break
        used = kept
    weight = 1.0 / variance[used]
    what = "the weights of the stars for the zero-point sum to zero"
    with failing_ccd(Reason.NO_PHOTOMETRIC_MATCH, what, ZeroDivisionError):
        value = float(np.average(offset[used], weights=weight))
    residual2 = (offset[used] - value) ** 2
    n = int(np.count_nonzero(used))
    chi2 = float((residual2 * weight).sum() / max(n - 1, 1))
    error = float(np.sqrt(max(1.0, chi2) / weight.sum()))
    scatter = float(np.sqrt(residual2.sum() / max(n - 1, 1)))
    return ZeroPoint(value, error, scatter, n, used)


def magnitude_offsets(
    stars: MatchedStars, error_floor: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Return the zero-point that each star alone gives.

    Returns
    -------
    known : ndarray of bool, shape (n,)
        Stars that have a positive flux with an error, and a magnitude.
    offset, variance : ndarray of float64, shape (n,)
        Magnitude + 2.5 log10(flux) of these (of no meaning for others), and its variance, mag^2,
        to which the square of ``error_floor`` is added.
    """
    flux, magnitude = stars.flux, stars.magnitude
    known = np.isfinite(magnitude) & np.isfinite(flux) & (flux > 0) & (stars.flux_error > 0)
    offset = np.where(known, magnitude, 0.0) + 2.5 * np.log10(np.where(known, flux, 1.0))
    relative = np.where(known, stars.flux_error, 0.0) / np.where(known, flux, 1.0)
    reference = np.where(np.isfinite(stars.magnitude_error), stars.magnitude_error, 0.0)
    variance = (2.5 / np.log(10.0) * relative) ** 2 + reference**2 + error_floor**2
    return known, offset, variance


def _weighted_median(values: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Return the weighted median, interpolated between values."""
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    return float(np.interp(0.5 * cumulated[-1], cumulated - 0.5 * weights[order], values[order]))
