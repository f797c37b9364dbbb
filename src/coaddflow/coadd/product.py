"""Coadds on disk."""

from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table

from coaddflow.coadd.mean import Coadd
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


def write_coadd(
    path: str | Path,
    coadd: Coadd,
    tract: Tract,
    cards: fits.Header | None = None,
    compression: Compression = "none",
) -> str:
    """Write a coadd: PRIMARY, IMAGE, MASK, VARIANCE, NINPUTS, INPUTS.

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

    Returns
    -------
    str
        SHA-256 checksum of the file.
    """
    header = part_header(tract, coadd.box)
    primary = fits.PrimaryHDU(header=cards)
    primary.header["TRACT"] = tract.id
    primary.header["NEXP"] = (int(np.count_nonzero(coadd.inputs["n_used"])), "exposures used")
    table = fits.table_to_hdu(coadd.inputs)
    table.name = "INPUTS"
    stored = coadd.masked_image
    if compression == "quantized":  # infinity cannot be quantised, NaN can
        variance = np.where(np.isinf(stored.variance), np.nan, stored.variance)
        stored = MaskedImage(stored.image, variance, stored.mask)
    images = masked_image_hdus(stored, header, "nJy", compression)
    counts = image_hdu("NINPUTS", coadd.n_inputs, header, compression)
    return write_fits(path, [primary, *images, counts, table])


def read_coadd(path: str | Path) -> tuple[Coadd, fits.Header]:
    """Read a coadd written by `write_coadd`, with the header of its image.

    Raises
    ------
    InputError
        If the file is missing, damaged or no coadd.
    """
    remedy = coadd_remedy(path)
    with opened_fits(path, "coadd", remedy) as (stream, hdus):
        masked_image, header = read_planes(stream, hdus)
        masked_image.variance[np.isnan(masked_image.variance)] = np.inf
        box = part_box(header, masked_image.shape)
        n_inputs = np.asarray(hdus["NINPUTS"].data, np.int16)
        inputs = Table(hdus["INPUTS"].data)
    return Coadd(box, masked_image, n_inputs, inputs), header
