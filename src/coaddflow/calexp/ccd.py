"""One CCD from raw counts to calibrated image: all its steps, in their order.

The job of a CCD makes them in one go: `detrend_ccd`, `remove_cosmic_rays`, `measure_ccd`,
`calibrate_ccd`. The job of an exposure, which holds all CCDs, interrupts twice: between
`begin_detrending` and `finish_detrending` the CCDs exchange the signals of their amplifiers, for
crosstalk, and instead of `calibrate_ccd` it applies the solution of the whole exposure
(`exposure.solution`) with `apply_calibration`. Nothing here reads or writes files.
"""

import logging
from collections.abc import Sequence

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from coaddflow.astrometry.ccd import AstrometrySolution, CcdStars, solve_ccd
from coaddflow.calexp.model import Calexp, CcdId, DetrendedCcd, MeasuredCcd
from coaddflow.calexp.product import calexp_header, figures_of
from coaddflow.calexp.zero_point import measure_zero_point
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.image.fill import fill_masked
from coaddflow.image.masked_image import MaskedImage, MaskPlane, planes_from_names
from coaddflow.instrument.raw import RawCcd
from coaddflow.isr.cosmic_rays import find_cosmic_rays
from coaddflow.isr.crosstalk import Aggressor
from coaddflow.isr.detrend import (
    CcdCalibs,
    PartlyDetrendedCcd,
    check_area,
    counts_above_overscan,
    counts_to_electrons,
    divide_flat,
    join_amplifiers,
    mask_defects,
    mask_edge,
    note_amplifiers,
    subtract_dark,
)
from coaddflow.measure.background import estimate_background
from coaddflow.measure.detection import SourceFlag, detect_sources, measure_seeing, set_detected
from coaddflow.measure.photometry import (
    ZeroPoint,
    aperture_correction,
    aperture_fluxes,
    psf_correction,
    psf_fluxes,
)
from coaddflow.measure.psf_fit import fit_psf
from coaddflow.measure.psf_model import PsfModel
from coaddflow.measure.saturated_stars import repair_saturated
from coaddflow.measure.stars import is_isolated, select_stars
from coaddflow.settings import Settings
from coaddflow.settings.photometry import PhotometrySettings

_LOG = logging.getLogger(__name__)

_NEIGHBOUR_IN_TOTAL, _ENOUGH_ALONE = 0.01, 5
"""Stars of the growth curve have no neighbour brighter than 1 % of them, if 5 are so alone."""

_MAGNITUDE = 2.5 / np.log(10.0)


def detrend_ccd(
    raw: RawCcd, calibs: CcdCalibs, exposure_time: float, settings: Settings, threads: int = 1
) -> DetrendedCcd:
    """Turn raw counts into electrons, with defects masked.

    Parameters
    ----------
    raw : RawCcd
        The raw pixels (see `raw.read_raw_ccd`).
    calibs : CcdCalibs
        Calibration frames.
    exposure_time : float
        Exposure time, s; for the dark.
    settings : Settings
        Section detrend.
    threads : int
        Number of threads that share the rows.

    Raises
    ------
    InputError
        If a calibration frame has another shape than the CCD, or the overscan does not suit
        the chosen method.
    CcdFailure
        ``bad_overscan`` or ``too_little_area``.
    """
    ccd = begin_detrending(raw, settings, threads)
    return finish_detrending(ccd, calibs, exposure_time, settings)


def begin_detrending(raw: RawCcd, settings: Settings, threads: int = 1) -> PartlyDetrendedCcd:
    """Make the steps that come before crosstalk between CCDs; see `detrend_ccd`."""
    return counts_above_overscan(raw, settings.detrend, threads)  # saturation, overscan


def finish_detrending(
    ccd: PartlyDetrendedCcd,
    calibs: CcdCalibs,
    exposure_time: float,
    settings: Settings,
    aggressors: Sequence[Aggressor] = (),
) -> DetrendedCcd:
    """Make the steps from crosstalk on; see `detrend_ccd`.

    Parameters
    ----------
    ccd : PartlyDetrendedCcd
        From `begin_detrending`. It is used up: its arrays are changed.
    calibs, exposure_time, settings
        See `detrend_ccd`.
    aggressors : sequence of Aggressor
        Amplifiers of other CCDs (see `crosstalk.collect_aggressors`).
    """
    join_amplifiers(ccd, aggressors)  # crosstalk, assembly
    counts_to_electrons(ccd, calibs.bias)  # bias, linearity, gain
    subtract_dark(ccd, calibs.dark, exposure_time)
    divide_flat(ccd, calibs.flat)
    mask_defects(ccd, calibs.defects)
    mask_edge(ccd)
    note_amplifiers(ccd)
    check_area(ccd)
    return DetrendedCcd(ccd.masked_image, ccd.header)


def remove_cosmic_rays(image: MaskedImage, settings: Settings, threads: int = 1) -> None:
    """Mask cosmic rays, and fill what is masked; by then the calibration frames are released.

    Parameters
    ----------
    image : MaskedImage
        Detrended, electrons. It is changed.
    settings : Settings
        Sections cosmics and interpolation.
    threads : int
        Number of threads that share the rows.

    Raises
    ------
    CcdFailure
        ``too_many_cosmic_rays`` or ``detection_failed``.
    """
    fill = settings.interpolation
    cosmic_rays = find_cosmic_rays(image, settings.cosmics, threads)
    image.mask[cosmic_rays] |= np.int32(MaskPlane.CR)
    n_filled = fill_masked(image, planes_from_names(fill.planes), fill.max_gap)
    _LOG.info("%d pixels hit by cosmic rays; %d pixels filled", cosmic_rays.sum(), n_filled)


def measure_ccd(masked_image: MaskedImage, settings: Settings, threads: int = 1) -> MeasuredCcd:
    """Subtract the sky, find and measure the sources, model the PSF, repair saturated stars.

    Parameters
    ----------
    masked_image : MaskedImage
        Detrended and without cosmic rays, electrons. It is not changed.
    settings : Settings
        Sections background, detection, psf, photometry and interpolation.
    threads : int
        Number of threads that share the rows, and the stars of the PSF.

    Returns
    -------
    MeasuredCcd
        Its sources have the columns of `detection.detect_sources`, and ``is_psf_star``,
        ``flux_psf`` and ``flux_psf_error`` (electrons, corrected to the total), and
        ``flux_aperture`` and ``flux_aperture_error`` (one column an aperture, electrons, not
        corrected; the radii in pixels are in the table's meta as ``APRAD0``...).

    Raises
    ------
    CcdFailure
        ``no_data``, ``no_stars``, ``detection_failed``, ``no_psf_stars``, ``psf_fit_failed`` or
        ``no_aperture_correction``.
    """
    background = estimate_background(masked_image, settings.background, threads)
    without_sky = masked_image.image - background.model(threads)
    image = MaskedImage(without_sky, masked_image.variance, masked_image.mask.copy())
    seeing = measure_seeing(image, settings.detection, threads)
    detection = detect_sources(image, seeing, settings.detection, threads)
    set_detected(image, detection, seeing, settings.detection)
    stars = select_stars(detection.sources, settings.psf)
    psf, quality, stars = fit_psf(image, detection, stars, settings.psf, threads)
    sources = detection.sources
    sources["is_psf_star"] = stars
    to_total = _add_fluxes(sources, image, psf, quality.fwhm, settings.photometry)
    radius = settings.photometry.radii[settings.photometry.standard] * quality.fwhm
    bright = np.flatnonzero(stars)  # in the order of their fluxes
    places = np.asarray(sources["x"])[bright], np.asarray(sources["y"])[bright]
    gap = settings.interpolation.saturated_gap
    repair_saturated(image, psf, gap, places, detection.segments)
    return MeasuredCcd(image, background, psf, quality, sources, radius, *to_total)


def calibrate_ccd(
    measured: MeasuredCcd, ccd: CcdId, initial_wcs: WCS, refcat: Table, settings: Settings
) -> Calexp:
    """Solve for WCS and zero-point of a CCD by itself, and apply them.

    Parameters
    ----------
    measured : MeasuredCcd
        The CCD; its sources get columns (see `apply_calibration`).
    ccd : CcdId
        Which CCD it is.
    initial_wcs : astropy.wcs.WCS
        The predicted WCS.
    refcat : astropy.table.Table
        Reference stars of the field: columns ra, dec, mag, mag_err.
    settings : Settings
        Sections astrometry and photometry.

    Raises
    ------
    CcdFailure
        ``too_few_stars``, ``no_astrometric_match``, ``astrometric_fit_failed``,
        ``astrometry_rms``, ``no_photometric_match`` or ``not_finite``.
    """
    stars = CcdStars.of(measured.sources, measured.masked_image.shape)
    solution = solve_ccd(stars, refcat, initial_wcs, settings.astrometry)
    photometric, zero = measure_zero_point(measured, solution, refcat, settings.photometry)
    return apply_calibration(measured, ccd, solution, photometric, zero)


def apply_calibration(
    measured: MeasuredCcd,
    ccd: CcdId,
    solution: AstrometrySolution,
    photometric: NDArray[np.bool_],
    zero: ZeroPoint,
) -> Calexp:
    """Apply a WCS and a zero-point to a measured CCD.

    The sources get the columns ``is_astrometric`` and ``is_photometric`` (stars that WCS and
    zero-point rest on), ``ra``, ``dec`` (ICRS degrees), ``magnitude`` and ``magnitude_error`` (of
    the PSF flux; NaN where that is not positive).

    Parameters
    ----------
    measured : MeasuredCcd
        The CCD; its sources are changed in place.
    ccd : CcdId
        Which CCD it is.
    solution : AstrometrySolution
        Its WCS.
    photometric : ndarray of bool, shape (n sources,)
        The stars that the zero-point rests on.
    zero : ZeroPoint
        Its zero-point.
    """
    sources = measured.sources
    sources["is_astrometric"] = np.isin(np.arange(len(sources)), solution.source_index)
    sources["is_photometric"] = photometric
    sources["ra"], sources["dec"] = pixel_to_sky(solution.wcs, sources["x"], sources["y"])
    flux, error = np.asarray(sources["flux_psf"]), np.asarray(sources["flux_psf_error"])
    positive = np.where(flux > 0, flux, np.nan)
    sources["magnitude"] = zero.value - 2.5 * np.log10(positive)
    sources["magnitude_error"] = _MAGNITUDE * error / positive
    for name, unit in (("ra", "deg"), ("dec", "deg"), ("magnitude", "mag")):
        sources[name].unit = unit
    sources["magnitude_error"].unit = "mag"
    figures, psf = figures_of(measured, solution, zero), measured.psf_quality
    further = {"psf_e1": psf.e1, "psf_e2": psf.e2, "aperture_radius": measured.aperture_radius}
    return Calexp(
        id=ccd,
        masked_image=measured.masked_image,
        wcs=solution.wcs,
        psf=measured.psf,
        background=measured.background,
        sources=sources,
        figures=figures,
        header=calexp_header(ccd, figures | further),
    )


def _add_fluxes(
    sources: Table, image: MaskedImage, psf: PsfModel, fwhm: float, settings: PhotometrySettings
) -> tuple[float, float]:
    """Add fluxes, and return the corrections to the total of aperture and PSF fluxes."""
    x, y = np.asarray(sources["x"]), np.asarray(sources["y"])
    stars = np.asarray(sources["is_psf_star"])
    radii = np.array(settings.radii) * fwhm
    standard = radii[settings.standard]
    aperture = aperture_fluxes(image, x, y, radii)
    fitted = psf_fluxes(image, psf, x, y)
    total_radius = settings.total_radius * fwhm
    alone = stars & is_isolated(sources, total_radius + fwhm, _NEIGHBOUR_IN_TOTAL)
    if np.count_nonzero(alone) < _ENOUGH_ALONE:
        alone = stars
    aperture_to_total = aperture_correction(image, x[alone], y[alone], standard, total_radius)
    psf_to_total = psf_correction(
        fitted.flux[stars],
        fitted.error[stars],
        aperture.flux[stars, settings.standard] * aperture_to_total,
    )
    sources["flux_psf"] = fitted.flux * psf_to_total
    sources["flux_psf_error"] = fitted.error * psf_to_total
    sources["flux_aperture"] = aperture.flux
    sources["flux_aperture_error"] = aperture.error
    incomplete = aperture.incomplete | fitted.incomplete
    sources["flags"] |= np.where(incomplete, int(SourceFlag.BAD_FLUX), 0).astype(np.int32)
    # FITS knows no unit "electron" that columns could have
    sources.meta["FLUXUNIT"] = "electron"
    for number, radius in enumerate(radii):
        sources.meta[f"APRAD{number}"] = float(radius)
    return aperture_to_total, psf_to_total
