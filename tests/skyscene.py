"""Small CCDs with stars at known places on the sky, for the tests of warps and coadds."""

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from coaddflow.geometry.wcs_header import wcs_to_header
from coaddflow.image.masked_image import MaskedImage, masked_image_hdus, write_fits
from coaddflow.measure.psf_model import PsfModel, psf_hdu
from coaddflow.skymap.tract import Tract
from coaddflow.tables.manifest import CcdRow

RA, DEC = 150.0, 2.2


def make_tract(size=400, pixel_scale=0.2, patches=1, border=0):
    """A tract about (RA, DEC) of patches x patches patches."""
    inner = size // patches
    middle = (inner * patches - 1) / 2.0
    return Tract(
        id=7,
        ra=RA,
        dec=DEC,
        reference_pixel=(middle, middle),
        n_patches=(patches, patches),
        patch_inner_size=(inner, inner),
        patch_border=border,
        pixel_scale=pixel_scale,
    )


def make_wcs(shape=(300, 300), pixel_scale=0.2, rotation=0.0, shift=(0.0, 0.0), sip=None):
    """A CCD centred on (RA, DEC), north up and east left, then rotated and shifted (pixels)."""
    wcs = WCS(naxis=2)
    angle = np.radians(rotation)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.crval = [RA, DEC]
    wcs.wcs.crpix = [(shape[1] + 1) / 2.0 + shift[0], (shape[0] + 1) / 2.0 + shift[1]]
    wcs.wcs.cd = np.diag([-1.0, 1.0]) @ turn * pixel_scale / 3600.0
    if sip is not None:
        header = wcs.to_header()
        header["CTYPE1"], header["CTYPE2"] = "RA---TAN-SIP", "DEC--TAN-SIP"
        for (i, j), cd in np.ndenumerate(wcs.wcs.cd):
            header[f"CD{i + 1}_{j + 1}"] = cd
        for card in ("PC1_1", "PC1_2", "PC2_1", "PC2_2", "CDELT1", "CDELT2"):
            header.remove(card, ignore_missing=True)
        header["A_ORDER"] = header["B_ORDER"] = 3
        for name, value in sip.items():
            header[name] = value
        wcs = WCS(header)
    wcs.pixel_shape = (shape[1], shape[0])
    return wcs


def make_tpv(shape, pixel_scale, terms):
    """A CCD in TPV with the given PV terms, such as {"PV1_4": 0.1}."""
    header = fits.Header()
    header["CTYPE1"], header["CTYPE2"] = "RA---TPV", "DEC--TPV"
    header["CRVAL1"], header["CRVAL2"] = RA, DEC
    header["CRPIX1"], header["CRPIX2"] = (shape[1] + 1) / 2.0, (shape[0] + 1) / 2.0
    header["CD1_1"], header["CD1_2"] = -pixel_scale / 3600.0, 0.0
    header["CD2_1"], header["CD2_2"] = 0.0, pixel_scale / 3600.0
    for name, value in {"PV1_1": 1.0, "PV2_1": 1.0, **terms}.items():
        header[name] = value
    return WCS(header)


def draw_star(shape, x, y, flux, fwhm):
    """A round Gaussian of total flux ``flux`` centred on pixel (x, y)."""
    sigma = fwhm / 2.35482
    ny, nx = shape
    column = np.exp(-0.5 * ((np.arange(nx) - x) / sigma) ** 2)
    row = np.exp(-0.5 * ((np.arange(ny) - y) / sigma) ** 2)
    return flux / (2.0 * np.pi * sigma**2) * np.outer(row, column)


def make_ccd(image, variance=100.0):
    """Pixels without flags."""
    image = np.asarray(image, np.float32)
    return MaskedImage(image, np.full_like(image, variance), np.zeros(image.shape, np.int32))


def write_done_ccd(path, exposure, ccd, pixels, wcs, **figures):
    """Write a calexp of band r whose WCS is known; return its row in the manifest.

    No two CCDs of an exposure have the same PSF.
    """
    ny, nx = pixels.shape
    star = draw_star((25, 25), 12.0, 12.0, 1.0, 4.0 + 0.1 * ccd)
    psf = PsfModel(star[None], 0, 0.8, 8, (nx / 2.0, ny / 2.0), (nx / 2.0, ny / 2.0))
    write_fits(path, [*masked_image_hdus(pixels, wcs_to_header(wcs), "electron"), psf_hdu(psf)])
    corners = np.array([(0, 0), (nx, 0), (nx, ny), (0, ny)]) - 0.5
    ra, dec = wcs.all_pix2world(corners, 0).T
    return CcdRow(
        exposure=exposure,
        ccd=ccd,
        band="r",
        mjd=60000.0,
        exposure_time=30.0,
        state="done",
        path=path,
        nx=nx,
        ny=ny,
        footprint_ra=ra.tolist(),
        footprint_dec=dec.tolist(),
        **figures,
    )


def measure_star(image, x, y, radius=15):
    """Flux and centre (x, y) of a lone star on a blank sky, by moments with a Gaussian weight."""
    j, i = np.mgrid[: image.shape[0], : image.shape[1]]
    near = np.hypot(i - x, j - y) <= radius
    flux = float(np.sum(image[near], dtype=float))
    values, i, j = image[near].astype(float), i[near].astype(float), j[near].astype(float)
    sigma2 = 6.0
    for _ in range(50):
        weight = values * np.exp(-((i - x) ** 2 + (j - y) ** 2) / (2.0 * sigma2))
        x += 2.0 * np.sum(weight * (i - x)) / np.sum(weight)
        y += 2.0 * np.sum(weight * (j - y)) / np.sum(weight)
    return flux, x, y
