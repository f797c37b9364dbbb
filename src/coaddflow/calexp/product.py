"""The products of a CCD: its calexp and source catalogue, and its row of the manifest.

The calexp file has the extensions IMAGE (electrons, sky subtracted), MASK, VARIANCE, PSF_DATA (see
`psf_model.psf_hdu`) and BACKGROUND (see `background.background_hdu`). IMAGE, MASK and VARIANCE
carry the WCS (TPV) and the keywords that docs/products.md explains.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time
from astropy.utils.exceptions import AstropyUserWarning

from coaddflow.astrometry.ccd import AstrometrySolution
from coaddflow.calexp.model import Calexp, CcdId, MeasuredCcd, StoredCalexp
from coaddflow.errors import CcdFailure, Reason, UnusableData, failing_ccd
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.geometry.wcs_header import read_wcs, wcs_to_header
from coaddflow.image.masked_image import (
    Compression,
    flux_scale,
    masked_image_hdus,
    opened_fits,
    read_planes,
    reading,
    verify_sums,
    write_fits_files,
)
from coaddflow.instrument.camera import outline
from coaddflow.measure.background import background_from_hdu, background_hdu
from coaddflow.measure.photometry import ZeroPoint
from coaddflow.measure.psf_model import psf_hdu, stored_psf
from coaddflow.tables.manifest import FOOTPRINT_POINTS_PER_EDGE, CcdRow

KEYWORDS = {
    "PHOTZP": ("zero_point", "[mag] mag = -2.5 log10(electrons) + PHOTZP"),
    "PHOTZPE": ("zero_point_error", "[mag] error of PHOTZP"),
    "FLXSCALE": ("flux_scale", "[nJy] of one electron"),
    "PHOTZPS": ("zero_point_scatter", "[mag] scatter of the stars of PHOTZP"),
    "NPHOT": ("n_zero_point", "stars of PHOTZP"),
    "SEEING": ("seeing", "[arcsec] FWHM of the PSF at the centre"),
    "PSFE1": ("psf_e1", "ellipticity of the PSF at the centre"),
    "PSFE2": ("psf_e2", "ellipticity along the diagonals"),
    "NPSF": ("n_psf_stars", "stars of the PSF model"),
    "SKYLEVEL": ("sky_level", "[electron] median of the subtracted sky"),
    "SKYNOISE": ("sky_noise", "[electron] noise of a pixel of empty sky"),
    "APRADIUS": ("aperture_radius", "[pixel] radius of the standard aperture"),
    "APCORR": ("aperture_correction", "total flux over that in the aperture"),
    "DEPTH": ("depth", "[mag] point source at 5 sigma"),
    "NASTROM": ("n_matched", "stars of this CCD in the astrometric fit"),
    "ASTRMS": ("astrometry_rms", "[arcsec] rms of its residuals, one axis"),
    "PIXSCALE": ("pixel_scale", "[arcsec] size of a pixel at the centre"),
}
"""Figure and comment of each keyword, in the order of the header."""


def figures_of(
    measured: MeasuredCcd, solution: AstrometrySolution, zero: ZeroPoint
) -> dict[str, float | int]:
    """Return what was measured of a calibrated CCD, under the names of `manifest.CcdRow`."""
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
        "lost_fraction": measured.masked_image.lost_fraction,
    }


def calexp_header(
    ccd: CcdId,
    figures: Mapping[str, float | int | None],
    keywords: Mapping[str, tuple[str, str]] = KEYWORDS,
) -> fits.Header:
    """Return the keywords of a calexp, without BUNIT and the WCS.

    Parameters
    ----------
    ccd : CcdId
        What it is an image of.
    figures : mapping
        What was measured, by name; figures that are None have no card.
    keywords : mapping
        Which of them are written, in this order: name and comment by keyword.

    Raises
    ------
    CcdFailure
        ``not_finite`` if a figure is NaN or infinite.
    """
    for name, value in figures.items():
        if value is not None and not np.isfinite(value):
            raise UnusableData(
                Reason.NOT_FINITE,
                f"the measured {name} is {value}: check the pixels of the image and what it was "
                "calibrated with",
            )
    values = {**figures, "flux_scale": flux_scale(figures["zero_point"])}
    cards = [
        ("EXPOSURE", ccd.exposure, "exposure id"),
        ("CCD", ccd.ccd, "number of the CCD"),
        ("FILTER", ccd.band, "band"),
        ("EXPTIME", ccd.exposure_time, "[s] exposure time"),
        ("TIMESYS", "TAI", "time scale of DATE-OBS and MJD-OBS"),
        ("DATE-OBS", Time(ccd.mjd, format="mjd", scale="tai").isot, "start of the exposure"),
        ("MJD-OBS", ccd.mjd, "[d] start of the exposure"),
        ("GAIN", 1.0, "electrons per unit of the image"),
        *((keyword, values.get(name), comment) for keyword, (name, comment) in keywords.items()),
    ]
    header = fits.Header()
    for keyword, value, comment in cards:
        if value is not None:
            header[keyword] = (value, comment)
    return header


def write_calexp(
    path: str | Path,
    sources_path: str | Path,
    calexp: Calexp,
    provenance: fits.Header | None = None,
    compression: Compression = "none",
    threads: int = 1,
) -> str:
    """Write a calexp and its sources, each file whole or not at all (`write_fits_files`).

    Parameters
    ----------
    path, sources_path : str or Path
        Where to; the calexp is written last. An image without sources has one file only.
    calexp : Calexp
        The CCD; its WCS is written to the header too.
    provenance : astropy.io.fits.Header, optional
        Cards for the primary headers: version, settings, inputs.
    compression : {"none", "lossless", "quantized"}
        See `masked_image.image_hdu`.
    threads : int
        Number of threads that share the images that are compressed.

    Returns
    -------
    str
        The SHA-256 checksum of the calexp.

    Raises
    ------
    CcdFailure
        ``no_wcs`` if no FITS header can express the WCS.
    """
    header = calexp.header.copy()
    what = "the WCS cannot be written to a header"
    with failing_ccd(Reason.NO_WCS, what, ValueError, np.linalg.LinAlgError):
        header.update(wcs_to_header(calexp.wcs))
    files: dict[str | Path, list] = {}
    if calexp.sources is not None:
        table = fits.table_to_hdu(calexp.sources)
        table.name = "SOURCES"
        table.header.update(calexp.header)
        files[sources_path] = [fits.PrimaryHDU(header=provenance), table]
    hdus = [
        fits.PrimaryHDU(header=provenance),
        *masked_image_hdus(calexp.masked_image, header, "electron", compression),
    ]
    if calexp.psf is not None:
        hdus.append(psf_hdu(calexp.psf))
    if calexp.background is not None:
        hdus.append(background_hdu(calexp.background))
    return write_fits_files({**files, path: hdus}, threads)[-1]


def read_calexp(path: str | Path, verify: bool = False) -> StoredCalexp:
    """Read a calexp; if asked, verify its DATASUM and CHECKSUM first.

    Raises
    ------
    InputError
        If the file is missing, damaged, or no calexp.
    """
    remedy = (
        f"remove {Path(path).with_suffix('.json')}, if it exists, and the manifest of its "
        "exposure, and run the workflow again"
    )
    if verify:
        verify_sums(path, remedy)
    with opened_fits(path, "calexp", remedy) as (stream, hdus):
        masked_image, header = read_planes(stream, hdus)
        psf = stored_psf(hdus)
        background = background_from_hdu(hdus["BACKGROUND"]) if "BACKGROUND" in hdus else None
    return StoredCalexp(masked_image, read_wcs(header, path), header, psf, background)


def read_sources(path: str | Path) -> Table:
    """Read the sources of a calexp; raise InputError if the file is missing or damaged."""
    with reading(path, "source catalogue"), warnings.catch_warnings():
        warnings.simplefilter("error", AstropyUserWarning)
        return Table.read(path, hdu="SOURCES")


def done_row(calexp: Calexp, path: str, sha256: str) -> CcdRow:
    """Return the row of a CCD whose calexp has been written.

    Parameters
    ----------
    calexp : Calexp
        What was written.
    path : str
        Its file, relative to the working folder.
    sha256 : str
        The checksum of the file, as `write_calexp` returns it.
    """
    ny, nx = calexp.masked_image.shape
    ra, dec = pixel_to_sky(calexp.wcs, *outline((nx, ny), FOOTPRINT_POINTS_PER_EDGE))
    return CcdRow(
        **calexp.id._asdict(),
        state="done",
        flags=",".join(calexp.flags),
        path=path,
        sha256=sha256,
        nx=nx,
        ny=ny,
        footprint_ra=ra.tolist(),
        footprint_dec=dec.tolist(),
        **calexp.figures,
    )


def failed_row(
    ccd: CcdId, failure: CcdFailure, footprint: tuple[list[float], list[float]]
) -> CcdRow:
    """Return the row of a CCD that has failed; the footprint (ra, dec, degrees) is predicted."""
    ra, dec = footprint
    return CcdRow(
        **ccd._asdict(),
        state="failed",
        reason=failure.reason,
        message=failure.message,
        footprint_ra=ra,
        footprint_dec=dec,
    )
