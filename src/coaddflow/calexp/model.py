"""The calibrated image of one CCD: the order of its steps, and its files.

`measure_ccd` does what a CCD can do by itself, `calibrate_ccd` solves for WCS and zero-point and
applies them with `apply_calibration`. A solution for a whole exposure takes the measured CCDs of
all its detectors and applies its own.

The calexp file has the extensions IMAGE (electrons, sky subtracted), MASK, VARIANCE, PSF (see
`psf.psf_hdu`) and BACKGROUND (see `background.background_hdu`). IMAGE, MASK and VARIANCE carry
the WCS (TPV) and these keywords:

========  ==========  ===========================================================================
keyword   unit        meaning
========  ==========  ===========================================================================
EXPOSURE              exposure id
CCD                   number of the CCD
FILTER                band
EXPTIME   s           exposure time
DATE-OBS              start of the exposure, in the time system TIMESYS
MJD-OBS   d           the same as modified Julian date
TIMESYS               TAI
BUNIT                 electron (of VARIANCE: electron**2)
GAIN                  1: electrons per unit of the image
PHOTZP    mag         zero-point: magnitude = -2.5 log10(total electrons) + PHOTZP
PHOTZPE   mag         its error
FLXSCALE  nJy         nJy per electron; SWarp multiplies by it by itself
PHOTZPS   mag         scatter of its stars
NPHOT                 number of its stars
SEEING    arcsec      FWHM of the PSF at the centre of the CCD
PSFE1                 ellipticity of the PSF there, along the axes of the CCD
PSFE2                 likewise, along the diagonals
NPSF                  stars of the PSF model
SKYLEVEL  electron    median of the sky that was subtracted
SKYNOISE  electron    standard deviation of a pixel of empty sky
APRADIUS  pixel       radius of the standard aperture
APCORR                total flux of a star over its flux in the standard aperture
DEPTH     mag         magnitude of a point source that stands 5 sigma out of the sky
NASTROM               stars of this CCD in the astrometric fit
ASTRMS    arcsec      root mean square of its residuals, one axis
PIXSCALE  arcsec      size of a pixel at the centre of the CCD
========  ==========  ===========================================================================
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS

from coaddflow.astrometry.ccd import AstrometrySolution, solve_ccd
from coaddflow.errors import InputError
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.geometry.wcs_header import read_wcs, wcs_to_header
from coaddflow.image.masked_image import (
    Compression,
    MaskedImage,
    flux_scale,
    masked_image_hdus,
    read_masked_image,
    write_fits,
)
from coaddflow.measure.background import (
    Background,
    background_from_hdu,
    background_hdu,
    estimate_background,
)
from coaddflow.measure.detection import SourceFlag, detect_sources, measure_seeing, set_detected
from coaddflow.measure.photometry import (
    MatchedStars,
    ZeroPoint,
    aperture_correction,
    aperture_fluxes,
    psf_correction,
    psf_fluxes,
    zero_point,
)
from coaddflow.measure.psf_fit import PsfQuality, fit_psf
from coaddflow.measure.psf_model import PsfModel, psf_from_hdu, psf_hdu
from coaddflow.measure.saturated_stars import repair_saturated
from coaddflow.measure.stars import is_isolated, select_stars
from coaddflow.settings import Settings
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.photometry import PhotometrySettings

_NO_MAGNITUDE = (
    SourceFlag.SATURATED
    | SourceFlag.EDGE
    | SourceFlag.BAD_PIXELS
    | SourceFlag.SUSPECT
    | SourceFlag.BAD_FLUX
)
"""Stars that say nothing about the zero-point."""

_NEIGHBOUR_IN_TOTAL, _ENOUGH_ALONE = 0.01, 5
"""Stars of the growth curve have no neighbour brighter than 1 % of them, if 5 are so alone."""

_MAGNITUDE = 2.5 / np.log(10.0)


class CcdFacts(NamedTuple):
    """What is known about an image before it is looked at.

    Attributes
    ----------
    exposure : str
        Exposure id.
    ccd : int
        Number of the CCD.
    band : str
        Band.
    mjd : float
        Start of the exposure, MJD TAI.
    exposure_time : float
        Exposure time, s.
    """

    exposure: str
    ccd: int
    band: str
    mjd: float
    exposure_time: float


@dataclass
class MeasuredCcd:
    """A CCD whose stars are measured in pixels and electrons.

    Attributes
    ----------
    masked_image : MaskedImage
        Electrons, sky subtracted, DETECTED set.
    background : Background
        The sky that was subtracted.
    psf : PsfModel
        Its PSF.
    psf_quality : PsfQuality
        How good that is.
    sources : astropy.table.Table
        See `measure_ccd`.
    aperture_radius : float
        Radius of the standard aperture, pixels.
    aperture_correction, psf_correction : float
        Total flux of a star over its flux in the standard aperture, and over the plain PSF flux.
    """

    masked_image: MaskedImage
    background: Background
    psf: PsfModel
    psf_quality: PsfQuality
    sources: Table
    aperture_radius: float
    aperture_correction: float
    psf_correction: float


@dataclass
class Calexp:
    """A calibrated CCD.

    Attributes
    ----------
    facts : CcdFacts
        What it is an image of.
    masked_image : MaskedImage
        Electrons, sky subtracted.
    wcs : astropy.wcs.WCS
        The fitted WCS.
    psf : PsfModel
        Its PSF.
    background : Background
        The sky that was subtracted.
    sources : astropy.table.Table
        See `measure_ccd` and `apply_calibration`.
    quality : dict
        Figures under the names of `manifest.CcdRow`.
    header : astropy.io.fits.Header
        The keywords of the table above, without the WCS.
    """

    facts: CcdFacts
    masked_image: MaskedImage
    wcs: WCS
    psf: PsfModel
    background: Background
    sources: Table
    quality: dict[str, float | int]
    header: fits.Header


@dataclass
class StoredCalexp:
    """What `read_calexp` finds in a file: as `Calexp`, with the header as it stands there.

    PSF and background are None where an image was calibrated elsewhere.
    """

    masked_image: MaskedImage
    wcs: WCS
    header: fits.Header
    psf: PsfModel | None
    background: Background | None


def process_ccd(
    masked_image: MaskedImage,
    facts: CcdFacts,
    initial_wcs: WCS,
    refcat: Table,
    settings: Settings,
) -> Calexp:
    """Make the calexp of a CCD that is calibrated by itself: `measure_ccd`, `calibrate_ccd`.

    Parameters
    ----------
    masked_image : MaskedImage
        Detrended, electrons, cosmic rays masked and filled. It is not changed.
    facts : CcdFacts
        What it is an image of.
    initial_wcs : astropy.wcs.WCS
        The predicted WCS.
    refcat : astropy.table.Table
        Reference stars of the field: columns ra, dec, mag, mag_err.
    settings : Settings
        Sections background, detection, psf, photometry and astrometry.

    Raises
    ------
    CcdFailure
        If a step fails for reasons that lie in this CCD.
    """
    measured = measure_ccd(masked_image, settings)
    return calibrate_ccd(measured, facts, initial_wcs, refcat, settings)


def measure_ccd(masked_image: MaskedImage, settings: Settings) -> MeasuredCcd:
    """Subtract the sky, find and measure the sources, model the PSF, repair saturated stars.

    Parameters
    ----------
    masked_image : MaskedImage
        Detrended, electrons. It is not changed.
    settings : Settings
        Sections background, detection, psf, photometry and interpolation.

    Returns
    -------
    MeasuredCcd
        Its sources have the columns of `detect.detect_sources`, and ``is_psf_star``,
        ``flux_psf`` and ``flux_psf_error`` (electrons, corrected to the total), and
        ``flux_aperture`` and ``flux_aperture_error`` (one column an aperture, electrons, not
        corrected; the radii in pixels are in the table's meta as ``APRAD0``...).

    Raises
    ------
    CcdFailure
        ``no_data``, ``no_stars``, ``no_psf_stars``, ``detection_failed`` or
        ``no_aperture_correction``.
    """
    background = estimate_background(masked_image, settings.background)
    image = MaskedImage(
        masked_image.image - background.model(), masked_image.variance, masked_image.mask.copy()
    )
    seeing = measure_seeing(image, settings.detection)
    detection = detect_sources(image, seeing, settings.detection)
    set_detected(image, detection, seeing, settings.detection)
    stars = select_stars(detection.sources, settings.psf)
    psf, quality, stars = fit_psf(image, detection, stars, settings.psf)
    sources = detection.sources
    sources["is_psf_star"] = stars
    to_total = _add_fluxes(sources, image, psf, quality.fwhm, settings.photometry)
    radius = settings.photometry.radii[settings.photometry.standard] * quality.fwhm
    repair_saturated(image, psf, settings.interpolation.saturated_gap)
    return MeasuredCcd(image, background, psf, quality, sources, radius, *to_total)


def calibrate_ccd(
    measured: MeasuredCcd,
    facts: CcdFacts,
    initial_wcs: WCS,
    refcat: Table,
    settings: Settings,
) -> Calexp:
    """Solve for WCS and zero-point of a CCD by itself, and apply them.

    Parameters are those of `process_ccd`.

    Raises
    ------
    CcdFailure
        ``too_few_stars``, ``no_astrometric_match``, ``astrometry_rms`` or
        ``no_photometric_match``.
    """
    solution = solve_astrometry(measured, initial_wcs, refcat, settings.astrometry)
    photometric, zero = measure_zero_point(measured, solution, refcat, settings.photometry)
    mark_stars(measured.sources, solution, photometric)
    return apply_calibration(measured, facts, solution, zero)


def solve_astrometry(
    measured: MeasuredCcd, initial_wcs: WCS, refcat: Table, settings: AstrometrySettings
) -> AstrometrySolution:
    """Solve for the WCS of a CCD by itself; parameters and failures as `calibrate_ccd`."""
    sources = measured.sources
    # saturated stars, the best known ones, have an isophotal flux but may have no PSF flux
    return solve_ccd(
        np.asarray(sources["x"]),
        np.asarray(sources["y"]),
        np.asarray(sources["flux_isophotal"]),
        refcat,
        initial_wcs,
        measured.masked_image.shape,
        settings,
        centroid_error=np.asarray(sources["x_error"]),
    )


def mark_stars(sources: Table, solution: AstrometrySolution, photometric: np.ndarray) -> None:
    """Mark in the sources which stars WCS and zero-point rest on; in place."""
    sources["is_astrometric"] = np.isin(np.arange(len(sources)), solution.source_index)
    sources["is_photometric"] = photometric


def measure_zero_point(
    measured: MeasuredCcd,
    solution: AstrometrySolution,
    refcat: Table,
    settings: PhotometrySettings,
) -> tuple[np.ndarray, ZeroPoint]:
    """Compare the total fluxes of the stars of an astrometric match with the catalogue.

    Returns
    -------
    used : ndarray of bool, shape (n sources,)
        The stars that the zero-point rests on.
    zero_point : ZeroPoint
        See `photometry.zero_point`.

    Raises
    ------
    CcdFailure
        ``no_photometric_match`` if too few stars are whole and have a magnitude.
    """
    stars = matched_stars(measured, solution, refcat, settings)
    zero = zero_point(
        stars.flux, stars.flux_error, stars.magnitude, stars.magnitude_error, settings
    )
    used = np.zeros(len(measured.sources), dtype=bool)
    used[stars.source_index[zero.used]] = True
    return used, zero


def matched_stars(
    measured: MeasuredCcd,
    solution: AstrometrySolution,
    refcat: Table,
    settings: PhotometrySettings,
) -> MatchedStars:
    """Return the stars of an astrometric match, with fluxes and catalogue magnitudes.

    Stars whose flux is not the whole one (saturated, at the edge, on bad pixels) have no magnitude.
    """
    sources = measured.sources[solution.source_index]
    clean = (np.asarray(sources["flags"]) & int(_NO_MAGNITUDE)) == 0
    if settings.zero_point_flux == "psf":
        flux, error = np.asarray(sources["flux_psf"]), np.asarray(sources["flux_psf_error"])
    else:
        flux = sources["flux_aperture"][:, settings.standard] * measured.aperture_correction
        error = sources["flux_aperture_error"][:, settings.standard]
        error = error * measured.aperture_correction
    magnitude = np.ma.filled(refcat["mag"], np.nan)[solution.reference_index]
    magnitude_error = np.ma.filled(refcat["mag_err"], np.nan)[solution.reference_index]
    return MatchedStars(
        solution.source_index,
        np.asarray(sources["x"], dtype=float),
        np.asarray(sources["y"], dtype=float),
        np.asarray(flux, dtype=float),
        np.asarray(error, dtype=float),
        np.where(clean, magnitude, np.nan),
        np.asarray(magnitude_error, dtype=float),
    )


def apply_calibration(
    measured: MeasuredCcd, facts: CcdFacts, solution: AstrometrySolution, zero: ZeroPoint
) -> Calexp:
    """Apply a WCS and a zero-point to a measured CCD.

    The sources get the columns ``ra``, ``dec`` (ICRS degrees), ``magnitude`` and
    ``magnitude_error`` (of the PSF flux; NaN where that is not positive).
    """
    sources = measured.sources
    sources["ra"], sources["dec"] = pixel_to_sky(solution.wcs, sources["x"], sources["y"])
    flux, error = np.asarray(sources["flux_psf"]), np.asarray(sources["flux_psf_error"])
    positive = np.where(flux > 0, flux, np.nan)
    sources["magnitude"] = zero.value - 2.5 * np.log10(positive)
    sources["magnitude_error"] = _MAGNITUDE * error / positive
    for name, unit in (("ra", "deg"), ("dec", "deg"), ("magnitude", "mag")):
        sources[name].unit = unit
    sources["magnitude_error"].unit = "mag"
    quality = _quality(measured, solution, zero)
    return Calexp(
        facts=facts,
        masked_image=measured.masked_image,
        wcs=solution.wcs,
        psf=measured.psf,
        background=measured.background,
        sources=sources,
        quality=quality,
        header=_header(measured, facts, quality),
    )


def write_calexp(
    path: str | Path,
    sources_path: str | Path,
    calexp: Calexp,
    provenance: fits.Header | None = None,
    compression: Compression = "none",
) -> None:
    """Write a calexp and its sources, each file whole or not at all.

    Parameters
    ----------
    path, sources_path : str or Path
        Where to; the calexp is written last.
    calexp : Calexp
        What.
    provenance : astropy.io.fits.Header, optional
        Cards for the primary headers: version, settings, inputs.
    compression : {"none", "lossless", "quantized"}
        See `image.image_hdu`.
    """
    header = calexp.header.copy()
    header.update(wcs_to_header(calexp.wcs))
    table = fits.table_to_hdu(calexp.sources)
    table.name = "SOURCES"
    table.header.update(calexp.header)
    write_fits(sources_path, [fits.PrimaryHDU(header=provenance), table])
    hdus = [
        fits.PrimaryHDU(header=provenance),
        *masked_image_hdus(calexp.masked_image, header, "electron", compression),
        psf_hdu(calexp.psf),
        background_hdu(calexp.background),
    ]
    write_fits(path, hdus)


def read_calexp(path: str | Path) -> StoredCalexp:
    """Read a calexp.

    Raises
    ------
    InputError
        If the file is missing, damaged, or no calexp.
    """
    masked_image, header = read_masked_image(path)
    try:
        with fits.open(path, memmap=False) as hdus:
            psf = psf_from_hdu(hdus["PSF"]) if "PSF" in hdus else None
            background = background_from_hdu(hdus["BACKGROUND"]) if "BACKGROUND" in hdus else None
    except (InputError, OSError) as error:
        raise InputError(str(error), path, "remove it and run the workflow again") from error
    return StoredCalexp(masked_image, read_wcs(header, path), header, psf, background)


def read_sources(path: str | Path) -> Table:
    """Read the sources of a calexp; raise InputError if the file is missing or damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", AstropyUserWarning)
            return Table.read(path, hdu="SOURCES")
    except (OSError, KeyError, ValueError, TypeError, AstropyUserWarning) as error:
        raise InputError(
            f"is not a readable source catalogue ({error})",
            path,
            "remove it and run the workflow again",
        ) from error


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


def _quality(
    measured: MeasuredCcd, solution: AstrometrySolution, zero: ZeroPoint
) -> dict[str, float | int]:
    """Return the figures that `manifest.CcdRow` has columns for."""
    psf = measured.psf_quality
    ny, nx = measured.masked_image.shape
    image = measured.psf.image_at((nx - 1) / 2.0, (ny - 1) / 2.0).astype(float)
    noise = measured.background.noise
    point_source_noise = noise / np.sqrt((image**2).sum()) * measured.psf_correction
    return {
        "n_sources": len(measured.sources),
        "n_psf_stars": psf.n_stars,
        "n_matched": solution.n_matched,
        "astrometry_rms": solution.rms_arcsec / np.sqrt(2.0),
        "pointing_offset": solution.pointing_error * 60.0,
        "n_zero_point": zero.n_stars,
        "zero_point": zero.value,
        "zero_point_error": zero.error,
        "zero_point_scatter": zero.scatter,
        "seeing": psf.fwhm * solution.pixel_scale,
        "ellipticity": float(np.hypot(psf.e1, psf.e2)),
        "sky_level": measured.background.level,
        "sky_noise": noise,
        "aperture_correction": measured.aperture_correction,
        "depth": float(zero.value - 2.5 * np.log10(5.0 * point_source_noise)),
        "pixel_scale": solution.pixel_scale,
    }


def _header(measured: MeasuredCcd, facts: CcdFacts, quality: dict[str, float | int]) -> fits.Header:
    """Return the keywords of the table at the top, without BUNIT and the WCS."""
    cards = [
        ("EXPOSURE", facts.exposure, "exposure id"),
        ("CCD", facts.ccd, "number of the CCD"),
        ("FILTER", facts.band, "band"),
        ("EXPTIME", facts.exposure_time, "[s] exposure time"),
        ("TIMESYS", "TAI", "time scale of DATE-OBS and MJD-OBS"),
        ("DATE-OBS", Time(facts.mjd, format="mjd", scale="tai").isot, "start of the exposure"),
        ("MJD-OBS", facts.mjd, "[d] start of the exposure"),
        ("GAIN", 1.0, "electrons per unit of the image"),
        ("PHOTZP", quality["zero_point"], "[mag] mag = -2.5 log10(electrons) + PHOTZP"),
        ("PHOTZPE", quality["zero_point_error"], "[mag] error of PHOTZP"),
        ("FLXSCALE", flux_scale(quality["zero_point"]), "[nJy] of one electron"),
        ("PHOTZPS", quality["zero_point_scatter"], "[mag] scatter of the stars of PHOTZP"),
        ("NPHOT", quality["n_zero_point"], "stars of PHOTZP"),
        ("SEEING", quality["seeing"], "[arcsec] FWHM of the PSF at the centre"),
        ("PSFE1", measured.psf_quality.e1, "ellipticity of the PSF at the centre"),
        ("PSFE2", measured.psf_quality.e2, "ellipticity along the diagonals"),
        ("NPSF", quality["n_psf_stars"], "stars of the PSF model"),
        ("SKYLEVEL", quality["sky_level"], "[electron] median of the subtracted sky"),
        ("SKYNOISE", quality["sky_noise"], "[electron] noise of a pixel of empty sky"),
        ("APRADIUS", measured.aperture_radius, "[pixel] radius of the standard aperture"),
        ("APCORR", quality["aperture_correction"], "total flux over that in the aperture"),
        ("DEPTH", quality["depth"], "[mag] point source at 5 sigma"),
        ("NASTROM", quality["n_matched"], "stars of this CCD in the astrometric fit"),
        ("ASTRMS", quality["astrometry_rms"], "[arcsec] rms of its residuals, one axis"),
        ("PIXSCALE", quality["pixel_scale"], "[arcsec] size of a pixel at the centre"),
    ]
    header = fits.Header()
    for keyword, value, comment in cards:
        header[keyword] = (value, comment)
    return header
