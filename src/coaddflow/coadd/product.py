"""Coadds on disk."""

from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.table import Table

from coaddflow.coadd.mean import Coadd
from coaddflow.errors import InputError
from coaddflow.image.masked_image import (
    Compression,
    MaskedImage,
    image_hdu,
    masked_image_hdus,
    read_masked_image,
    write_fits,
)
from coaddflow.skymap.tract import Tract
from coaddflow.warp.files import part_header


def write_coadd(
    path: str | Path,
    coadd: Coadd,
    tract: Tract,
    cards: fits.Header | None = None,
    compression: Compression = "none",
) -> None:
    """Write a coadd: PRIMARY, IMAGE, MASK, VARIANCE, NINPUTS, INPUTS.

    Parameters
    ----------
    path : str or Path
        Final name.
    coadd : Coadd
        The product.
    tract : Tract
        For the WCS.
    cards : astropy.io.fits.Header, optional
        Cards of the primary header (provenance).
    compression : {"none", "lossless", "quantized"}
        See `coaddflow.image.masked_image.image_hdu`.
    """
    header = part_header(tract, coadd.box)
    primary = fits.PrimaryHDU(header=cards)
    primary.header["TRACT"] = tract.id
    primary.header["NEXP"] = (int(np.count_nonzero(coadd.inputs["n_used"])), "exposures used")
    table = fits.table_to_hdu(coadd.inputs)
    table.name = "INPUTS"
    stored = _storable(coadd.masked_image, compression)
    images = masked_image_hdus(stored, header, "nJy", compression)
    counts = image_hdu("NINPUTS", coadd.n_inputs, header, compression)
    write_fits(path, [primary, *images, counts, table])


def _storable(masked_image: MaskedImage, compression: Compression) -> MaskedImage:
    """Return an image that survives the compression: infinity cannot be quantised, NaN can."""
    if compression != "quantized":
        return masked_image
    variance = np.where(np.isinf(masked_image.variance), np.nan, masked_image.variance)
    return MaskedImage(masked_image.image, variance, masked_image.mask)


def read_coadd(path: str | Path) -> tuple[Coadd, fits.Header]:
    """Read a coadd written by `write_coadd`, with the header of its image.

    Raises
    ------
    InputError
        If the file is missing, damaged or no coadd.
    """
    masked_image, header = read_masked_image(path)
    masked_image.variance[np.isnan(masked_image.variance)] = np.inf
    try:
        x0, y0 = round(-header["LTV1"]), round(-header["LTV2"])
        with fits.open(path, memmap=False) as hdus:
            n_inputs = np.asarray(hdus["NINPUTS"].data, np.int16)
            inputs = Table(hdus["INPUTS"].data)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"is not a readable coadd ({error})",
            path=path,
            remedy="remove it and run the workflow again",
        ) from error
    ny, nx = masked_image.shape
    return Coadd((x0, y0, x0 + nx, y0 + ny), masked_image, n_inputs, inputs), header
