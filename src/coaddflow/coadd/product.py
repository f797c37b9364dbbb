"""Coadds on disk."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from astropy.io import fits
from astropy.table import Table
from astropy.time import Time

from coaddflow.coadd.mean import Coadd, coadd_seeing, effective_area
from coaddflow.coadd.point_sources import depth_of
from coaddflow.coadd.psf import CoaddPsf, psf_hdus
from coaddflow.image.masked_image import (
    Compression,
    MaskedImage,
    image_hdu,
    masked_image_hdus,
    opened_fits,
    read_planes,
    write_fits,
)
from coaddflow.skymap.tract import Tract
from coaddflow.tables.coadds import coadd_remedy
from coaddflow.warp.files import part_box, part_header


def coadd_figures(
    coadd: Coadd, psf: CoaddPsf, pixel_scale: float, covariance: float
) -> fits.Header:
    """Return what a coadd is as a whole: EXPTIME, dates, SEEING, DEPTH and COVFACT.

    Those that are not known are left out.

    Parameters
    ----------
    coadd : Coadd
        The coadd.
    psf : CoaddPsf
        Its PSF; without one SEEING is that of the inputs.
    pixel_scale : float
        Arcsec per pixel.
    covariance : float
        Covariance factor of its pixels.
    """
    inputs = coadd.inputs[np.asarray(coadd.inputs["n_used"]) > 0]
    time, start, weight = (
        np.asarray(inputs[name], float) for name in ("exposure_time", "mjd", "weight")
    )
    middle = start + np.nan_to_num(time) / 2.0 / 86400.0
    dated = np.isfinite(middle)
    mjd = float(np.average(middle[dated], weights=weight[dated])) if dated.any() else np.nan
    seeing = coadd_seeing(coadd.inputs)
    area = float(effective_area(seeing, pixel_scale))
    if psf.grid is not None:
        seeing = psf.grid.fwhm() * pixel_scale
        area = float(np.nanmedian(psf.grid.areas()))
    variance = coadd.masked_image.variance
    measured = variance[np.isfinite(variance)]
    depth = np.nan
    if measured.size:
        depth = float(depth_of(np.median(measured), area, covariance))
    values = {
        "EXPTIME": (float(np.nansum(time)), "[s] sum over the exposures"),
        "TIMESYS": ("TAI", "time scale of DATE-AVG and MJD-AVG"),
        "DATE-AVG": (_date(mjd), "weighted mean of mid-exposures"),
        "MJD-AVG": (mjd, "[d] the same"),
        "SEEING": (seeing, "[arcsec] FWHM of the PSF"),
        "DEPTH": (depth, "[mag] AB, median, point source at 5 sigma"),
        "COVFACT": (covariance, "variance of a pixel over that of white noise"),
    }
    cards = (fits.Card(key, *card) for key, card in values.items() if card[0] == card[0])
    return fits.Header(list(cards))


def _date(mjd: float) -> str | float:
    """Return a date as FITS writes it; NaN if it is not known."""
    return Time(mjd, format="mjd", scale="tai").isot if np.isfinite(mjd) else np.nan


def write_coadd(
    path: str | Path,
    coadd: Coadd,
    tract: Tract,
    cards: fits.Header | None = None,
    compression: Compression = "none",
    psf: CoaddPsf | None = None,
    figures: fits.Header | None = None,
) -> str:
    """Write a coadd: PRIMARY, IMAGE, MASK, VARIANCE, NINPUTS, INPUTS, and what says its PSF.

    Of a coadd with a PSF, the extensions INPUTMAP, INPUTSETS and CCD_PSFS give it exactly
    (`coaddflow.coadd.psf`), PSF_GRID on a grid and PSF_DATA as a smooth model.

    Parameters
    ----------
    path : str or Path
        Final name.
    coadd : Coadd
        Pixels, numbers of exposures and table of inputs.
    tract : Tract
        For the WCS.
    cards : astropy.io.fits.Header, optional
        Cards of the primary header (provenance).
    compression : {"none", "lossless", "quantized"}
        See `coaddflow.image.masked_image.image_hdu`.
    psf : CoaddPsf, optional
        Its PSF.
    figures : astropy.io.fits.Header, optional
        Cards of the primary header and of the image (`coadd_figures`).

    Returns
    -------
    str
        SHA-256 checksum of the file.
    """
    header = part_header(tract, coadd.box)
    primary = fits.PrimaryHDU(header=cards)
    figures = fits.Header() if figures is None else figures
    primary.header.update(figures)
    primary.header["TRACT"] = tract.id
    primary.header["NEXP"] = (int(np.count_nonzero(coadd.inputs["n_used"])), "exposures used")
    table = fits.table_to_hdu(coadd.inputs)
    table.name = "INPUTS"
    stored = coadd.masked_image
    if compression == "quantized":  # infinity cannot be quantised, NaN can
        variance = np.where(np.isinf(stored.variance), np.nan, stored.variance)
        stored = MaskedImage(stored.image, variance, stored.mask)
    images = masked_image_hdus(stored, header, "nJy", compression)
    images[0].header.update(figures)
    counts = image_hdu("NINPUTS", coadd.n_inputs, header, compression)
    psf_parts = psf_hdus(psf, header, compression) if psf is not None else []
    return write_fits(path, [primary, *images, counts, table, *psf_parts])


def read_coadd(path: str | Path) -> tuple[Coadd, fits.Header]:
    """Read a coadd written by `write_coadd`, with the header of its image.

    Raises
    ------
    InputError
        If the file is missing, damaged or no coadd.
    """
    with opened_fits(path, "coadd", coadd_remedy(path)) as (stream, hdus):
        return stored_coadd(stream, hdus)


def stored_coadd(stream: BinaryIO, hdus: fits.HDUList) -> tuple[Coadd, fits.Header]:
    """Return the coadd in an open file (`opened_fits`), with the header of its image."""
    masked_image, header = read_planes(stream, hdus)
    masked_image.variance[np.isnan(masked_image.variance)] = np.inf
    box = part_box(header, masked_image.shape)
    n_inputs = np.asarray(hdus["NINPUTS"].data, np.int16)
    return Coadd(box, masked_image, n_inputs, Table(hdus["INPUTS"].data)), header
