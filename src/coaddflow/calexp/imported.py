"""Images calibrated elsewhere become calexps: electrons, variance, mask planes, WCS, zero-point.

What the pixels, weights and masks mean is in the settings `calibrated`; electrons per unit,
zero-point, seeing and sky of each image are in its row of the table of images.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from numpy.typing import NDArray

from coaddflow.calexp.model import Calexp, CcdId
from coaddflow.calexp.product import KEYWORDS, calexp_header
from coaddflow.errors import CcdFailure, InputError, Reason, failing_ccd
from coaddflow.geometry.wcs_header import read_wcs
from coaddflow.image.checksum import wrong_sum
from coaddflow.image.fits_hdus import (
    HduHeader,
    data_sum,
    open_fits,
    problem_of,
    read_data,
    walk_hdus,
)
from coaddflow.image.masked_image import MaskedImage, MaskPlane, planes_from_names
from coaddflow.ingest.calibrated_images import pixel_scale_of
from coaddflow.instrument.raw import decode_image
from coaddflow.instrument.undefined import filled_with_constant, without_undefined
from coaddflow.measure.background import Background, estimate_background
from coaddflow.measure.detection import (
    Detection,
    detect_sources,
    measure_seeing,
    set_detected,
)
from coaddflow.measure.psf_fit import fit_psf
from coaddflow.measure.psf_model import PsfModel
from coaddflow.measure.stars import select_stars
from coaddflow.settings import Settings
from coaddflow.settings.calibrated import FLUX_ZERO_POINTS, MaskSettings
from coaddflow.tables.exposures import ImageRow

_LOG = logging.getLogger(__name__)

_NO_STARS = {Reason.NO_STARS, Reason.DETECTION_FAILED}
_NO_PSF = {Reason.NO_PSF_STARS, Reason.PSF_FIT_FAILED}

_INGEST_AGAIN = "ingest it again with --replace"

_LEAST_LIMIT = 1 << 28
"""Bytes that an HDU of a compressed file may have, however small the image is."""

_KNOWN = "PHOTZP", "FLXSCALE", "PHOTZPE", "SEEING", "SKYLEVEL", "SKYNOISE", "DEPTH", "PIXSCALE"
_KEYWORDS = {keyword: KEYWORDS[keyword] for keyword in _KNOWN} | {
    "SEEING": ("seeing", "[arcsec] FWHM of the PSF"),
    "SKYLEVEL": ("sky_level", "[electron] sky level"),
}


def import_image(row: ImageRow, settings: Settings) -> Calexp:
    """Read an image that was calibrated elsewhere, in the form of a calexp.

    Parameters
    ----------
    row : ImageRow
        Its row in the table of images; paths relative to the working folder.
    settings : Settings
        Sections calibrated (weight, mask, unit, subtract_sky), background, detection and psf.

    Returns
    -------
    Calexp
        Without sources, and without PSF if there are too few stars; its WCS is that of the image's
        header.

    Raises
    ------
    CcdFailure
        ``missing_file``, ``damaged_file``, ``changed_file``, ``no_wcs``, ``no_data`` or
        ``not_finite``.
    InputError
        If the settings name a mask plane that does not exist.
    """
    own = settings.calibrated
    pixels, header = _read_pixels(row.path, row.hdu, (row.ny, row.nx), own.check_sums)
    unread = f"{row.path}: BLANK, BSCALE or BZERO cannot be read"
    with failing_ccd(Reason.DAMAGED_FILE, unread, fits.VerifyError, TypeError):
        pixels = without_undefined(pixels, header)
    mask = _read_mask(row, own.mask, own.check_sums)
    to_electrons = np.float32(row.electrons_per_unit)
    image = pixels.astype(np.float32) * to_electrons
    filled = filled_with_constant(pixels)
    if filled is not None:
        image[filled] = np.nan
    if not np.any(np.nan_to_num(image)):
        raise CcdFailure(Reason.NO_DATA, f"{row.path}: all pixels are zero or NaN")
    mask[~np.isfinite(image)] |= int(MaskPlane.NO_DATA)
    variance = np.ones_like(image)
    if own.weight.kind != "none":
        weight, _ = _read_pixels(row.weight_path, row.weight_hdu, (row.ny, row.nx), own.check_sums)
        variance, known = variance_from_weight(weight, own.weight.kind)
        variance *= to_electrons**2
        if not known.any():
            raise CcdFailure(Reason.NO_DATA, f"{row.weight_path}: all weights are zero")
        saturated = ~known & ((mask & int(MaskPlane.SAT)) != 0) & np.isfinite(image)
        good = known & np.isfinite(image)
        if not good.any():
            raise CcdFailure(Reason.NO_DATA, f"{row.path}: no pixel has a value and a weight")
        variance[saturated] = _saturated_variance(image, variance, good)[saturated]
        mask[~known & ~saturated] |= int(planes_from_names(own.weight.zero_planes))
    try:
        wcs = read_wcs(header, row.path)
    except InputError as error:
        raise CcdFailure(Reason.NO_WCS, str(error)) from error
    return _finish(MaskedImage(image, variance, mask), wcs, row, settings)


def _finish(masked_image: MaskedImage, wcs: WCS, row: ImageRow, settings: Settings) -> Calexp:
    """Subtract the sky, estimate what is not known, and mark the sources."""
    own = settings.calibrated
    background = None
    if own.subtract_sky == "measured" or own.weight.kind == "none":
        background = estimate_background(masked_image, settings.background)
    if own.weight.kind == "none":
        # images in flux units with the gain left at 1: their photons cannot be counted
        photons = own.unit not in FLUX_ZERO_POINTS or row.electrons_per_unit != 1.0
        masked_image.variance = variance_from_sky(masked_image.image, background, photons)
    if own.subtract_sky == "measured":
        masked_image.image -= background.model()
    elif own.subtract_sky == "given":
        _compare_sky(masked_image, row)
        masked_image.image -= np.float32(row.sky_level)
    figures = _known_figures(masked_image, row, background)
    # where it has no data, the image has another shape; nothing was lost there
    measured = ~masked_image.has_any(MaskPlane.NO_DATA)
    bad = masked_image.has_any(MaskPlane.BAD | MaskPlane.SAT) & measured
    figures["lost_fraction"] = float(bad.sum() / max(measured.sum(), 1))
    figures["pixel_scale"] = pixel_scale_of(wcs, (row.nx, row.ny))
    psf = _mark_sources(masked_image, figures, settings)
    subtracted = background if own.subtract_sky == "measured" else None
    ccd = CcdId.of(row, row.ccd)
    header = calexp_header(ccd, figures, _KEYWORDS)
    return Calexp(ccd, masked_image, wcs, psf, subtracted, None, figures, header)


def _compare_sky(masked_image: MaskedImage, row: ImageRow) -> None:
    """Say so if the image is fainter than its given sky, which no object can make it."""
    known = np.isfinite(masked_image.image) & np.isfinite(masked_image.variance)
    median = float(np.median(masked_image.image[known]))
    noise = float(np.sqrt(np.median(masked_image.variance[known])))
    if median < row.sky_level - max(3.0 * noise, 0.1 * abs(row.sky_level)):
        _LOG.warning(
            "%s: the given sky is %.5g electrons, and the median of the image %.5g: correct "
            "calibrated.sky or sky_unit",
            row.path,
            row.sky_level,
            median,
        )


def variance_from_weight(
    weight: NDArray, kind: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return variances for a weight map, and where it tells one.

    Parameters
    ----------
    weight : ndarray, shape (ny, nx)
        Pixels of the weight map.
    kind : {"inverse_variance", "variance", "rms"}
        What its pixels are.

    Returns
    -------
    variance : ndarray of float32, shape (ny, nx)
        In the square of the image's unit; infinite where it is not known.
    known : ndarray of bool, shape (ny, nx)
        Where the weight is a positive number; elsewhere nothing was measured.
    """
    weight = weight.astype(np.float64)
    known = np.isfinite(weight) & (weight > 0.0)
    variance = np.where(known, weight, 1.0)
    if kind == "inverse_variance":
        variance = 1.0 / variance
    elif kind == "rms":
        variance = variance**2
    return np.where(known, variance, np.inf).astype(np.float32), known


def _saturated_variance(
    image: NDArray[np.float32], variance: NDArray[np.float32], known: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Return the noise of the sky and of the photons above it, where the weight map has none.

    Weight maps are zero where a star is saturated, but a lower limit of its light is there: the
    pixels keep it, flagged SAT, so that the cores of bright stars need not be holes.
    """
    above_sky = np.maximum(image - np.median(image[known]), 0.0)
    return np.median(variance[known]) + above_sky


def variance_from_sky(
    image: NDArray[np.float32], background: Background, photons: bool
) -> NDArray[np.float32]:
    """Return variances for an image without a weight map: the noise of its sky, as measured.

    Parameters
    ----------
    image : ndarray of float32, shape (ny, nx)
        The image, with its sky.
    background : Background
        The sky of the image.
    photons : bool
        The image is in electrons: add the photon noise of the sources that stand out of the sky.
    """
    variance = background.rms() ** 2
    if photons:
        variance += np.maximum(np.nan_to_num(image - background.model()), 0.0)
    return variance.astype(np.float32)


def mask_planes(
    values: NDArray[np.integer], header: fits.Header, settings: MaskSettings, path: str
) -> NDArray[np.int32]:
    """Translate a mask into the planes of `MaskPlane`.

    Parameters
    ----------
    values : ndarray of int, shape (ny, nx)
        Pixels of the mask.
    header : astropy.io.fits.Header
        Its header, for the names of bits.
    settings : MaskSettings
        What bits, codes or names mean.
    path : str
        Its file, for messages.

    Returns
    -------
    ndarray of int32, shape (ny, nx)
        Bits of `MaskPlane`.

    Raises
    ------
    CcdFailure
        ``damaged_file`` if bits have names and the header does not give them.
    """
    planes = {key: int(planes_from_names(names)) for key, names in settings.planes.items()}
    unlisted = int(planes_from_names(settings.unlisted))
    if settings.kind == "codes":
        return _translate(values, lambda code: planes.get(str(code), unlisted if code else 0))
    names = _bit_names(header, path) if settings.kind == "named_bits" else {}

    def of_bits(value: int) -> int:
        union = 0
        for bit in range(64):
            if value >> bit & 1:
                union |= planes.get(names.get(bit, str(bit)), unlisted)
        return union

    return _translate(values, of_bits)


def _translate(values: NDArray[np.integer], meaning: Callable[[int], int]) -> NDArray[np.int32]:
    """Apply a function to each different value once."""
    different, where = np.unique(values, return_inverse=True)
    meanings = np.array([meaning(int(value)) for value in different], dtype=np.int32)
    return meanings[where].reshape(values.shape)


def _bit_names(header: fits.Header, path: str) -> dict[int, str]:
    """Return the names that cards MP_<name> give to the bits of a mask."""
    names = {}
    for key in header:
        if key.startswith("MP_"):
            try:
                names[int(header[key])] = key[3:]
            except (ValueError, TypeError, fits.VerifyError) as error:
                cause = f"{path}: {key} is not the number of a bit of the mask ({error})"
                raise CcdFailure(Reason.DAMAGED_FILE, cause) from error
    if not names:
        cause = f"{path}: the header of the mask names no bits (MP_<name>)"
        raise CcdFailure(Reason.DAMAGED_FILE, cause)
    return names


def _read_pixels(
    path: str, number: int, shape: tuple[int, int], check: bool
) -> tuple[NDArray, fits.Header]:
    """Return the pixels of an image as they are stored, and its header.

    With ``check``, DATASUM and CHECKSUM are verified where they stand in the header.
    """
    try:
        with open_fits(Path(path)) as stream:
            for hdu in walk_hdus(stream, max(_LEAST_LIMIT, 32 * shape[0] * shape[1])):
                if hdu.index == number:
                    return _read_hdu(path, hdu, stream, shape, check)
    except CcdFailure:
        raise
    except Exception as error:
        # trouble of the machine (a disk, a network) is no fault of the file: the job fails
        found = problem_of(error)
        if found is None:
            raise
        if found[0] == Reason.MISSING_FILE:
            cause = f"{path}: the file is not there ({found[1]}): ingest again"
            raise CcdFailure(Reason.MISSING_FILE, cause) from error
        cause = f"{path}: cannot be read ({found[1]}): copy it"
        raise CcdFailure(Reason.DAMAGED_FILE, cause) from error
    raise CcdFailure(Reason.CHANGED_FILE, f"{path} has no HDU {number}: {_INGEST_AGAIN}")


def _read_hdu(
    path: str, hdu: HduHeader, stream: BinaryIO, shape: tuple[int, int], check: bool
) -> tuple[NDArray, fits.Header]:
    if hdu.shape != shape:
        found = f"shape {hdu.shape}" if hdu.is_image else "no image"
        raise CcdFailure(
            Reason.CHANGED_FILE,
            f"{path}[{hdu.index}]: has {found}, not {shape} as the table says: {_INGEST_AGAIN}",
        )
    body = read_data(stream, hdu)
    problem = wrong_sum(hdu, data_sum(body)) if check else None
    if problem:
        raise CcdFailure(
            Reason.DAMAGED_FILE,
            f"{path}[{hdu.index}] {problem}: copy it, or set "
            "calibrated.check_sums to false if the header was edited",
        )
    return decode_image(Path(path), hdu, body), hdu.header


def _read_mask(row: ImageRow, settings: MaskSettings, check: bool) -> NDArray[np.int32]:
    if settings.kind == "none":
        return np.zeros((row.ny, row.nx), np.int32)
    values, header = _read_pixels(row.mask_path, row.mask_hdu, (row.ny, row.nx), check)
    if values.dtype.kind == "f" and np.array_equal(values, np.round(values)):
        values = values.astype(np.int64)
    if values.dtype.kind not in "iub":
        raise CcdFailure(Reason.DAMAGED_FILE, f"{row.mask_path}: the mask is not of whole numbers")
    return mask_planes(values, header, settings, row.mask_path)


def _known_figures(
    masked_image: MaskedImage, row: ImageRow, background: Background | None
) -> dict[str, float | int | None]:
    """Return what is known before the sources are looked at."""
    noise = np.sqrt(np.median(masked_image.variance[np.isfinite(masked_image.variance)]))
    sky = row.sky_level
    if sky is None and background is not None:
        sky = background.level
    return {
        "zero_point": row.zero_point,
        "zero_point_error": row.zero_point_error,
        "seeing": row.seeing,
        "sky_level": sky,
        "sky_noise": float(background.noise if background is not None else noise),
    }


def _mark_sources(
    masked_image: MaskedImage, figures: dict[str, float | int | None], settings: Settings
) -> PsfModel | None:
    """Set DETECTED; measure the seeing if it is not known, and with it the depth; return the PSF.

    An image without stars stays without: it was calibrated elsewhere, and can be used.
    """
    scale, psf = figures["pixel_scale"], None
    try:
        if figures["seeing"] is None:
            fwhm = measure_seeing(masked_image, settings.detection)
        else:
            fwhm = figures["seeing"] / scale
        figures["seeing"] = float(fwhm * scale)
        detection = detect_sources(masked_image, fwhm, settings.detection)
        set_detected(masked_image, detection, fwhm, settings.detection)
        figures["n_sources"] = len(detection.sources)
        psf = _fit_psf(masked_image, detection, settings)
    except CcdFailure as failure:
        if failure.reason not in _NO_STARS:
            raise
        figures["n_sources"] = 0
    if figures["seeing"] is not None:
        # noise-equivalent area of a Gaussian: 4 pi sigma^2
        sigma = figures["seeing"] / scale / 2.3548
        noise = figures["sky_noise"] * np.sqrt(4.0 * np.pi) * sigma
        figures["depth"] = float(figures["zero_point"] - 2.5 * np.log10(5.0 * noise))
    return psf


def _fit_psf(
    masked_image: MaskedImage, detection: Detection, settings: Settings
) -> PsfModel | None:
    """Return the PSF of an image, for that of coadds; None if there are too few stars."""
    try:
        stars = select_stars(detection.sources, settings.psf)
        return fit_psf(masked_image, detection, stars, settings.psf)[0]
    except CcdFailure as failure:
        if failure.reason not in _NO_PSF:
            raise
        _LOG.info("no PSF: %s", failure.message)
        return None
