"""Images calibrated elsewhere become calexps: electrons, variance, mask planes, WCS, zero-point.

What the pixels, weights and masks mean is in the settings `calibrated`; the facts of each image
(electrons per unit, zero-point, seeing, sky) are in its row of the table of images.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.io.fits.verify import VerifyError
from astropy.time import Time
from astropy.utils.exceptions import AstropyUserWarning
from astropy.wcs import WCS
from numpy.typing import NDArray

from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.geometry.wcs_header import read_wcs, wcs_to_header
from coaddflow.image.masked_image import (
    Compression,
    MaskedImage,
    MaskPlane,
    flux_scale,
    masked_image_hdus,
    planes_from_names,
    write_fits,
)
from coaddflow.ingest.calibrated_images import pixel_scale_of
from coaddflow.instrument.camera import outline
from coaddflow.measure.background import Background, background_hdu, estimate_background
from coaddflow.measure.detection import detect_sources, measure_seeing, set_detected
from coaddflow.settings import Settings
from coaddflow.settings.calibrated import FLUX_ZERO_POINTS, MaskSettings
from coaddflow.tables.exposures import ImageRow, file_of
from coaddflow.tables.manifest import FOOTPRINT_POINTS_PER_EDGE, CcdRow

_NO_STARS = {"no_stars", "detection_failed"}


@dataclass
class ImportedImage:
    """An image calibrated elsewhere, in the form of a calexp.

    Attributes
    ----------
    row : ImageRow
        What it is an image of.
    masked_image : MaskedImage
        Electrons, sky subtracted.
    wcs : astropy.wcs.WCS
        Its WCS, as its header has it.
    background : Background or None
        The sky that was measured and subtracted.
    quality : dict
        Figures under the names of `manifest.CcdRow`.
    """

    row: ImageRow
    masked_image: MaskedImage
    wcs: WCS
    background: Background | None
    quality: dict[str, float | int | None]


def import_image(
    row: ImageRow, settings: Settings, table: str | Path | None = None
) -> ImportedImage:
    """Read an image that was calibrated elsewhere.

    Parameters
    ----------
    row : ImageRow
        Its row in the table of images.
    settings : Settings
        Sections calibrated (weight, mask, unit, subtract_sky), background and detection.
    table : path, optional
        The table that the paths of the row are relative to; None: the working folder.

    Raises
    ------
    CcdFailure
        ``missing_file``, ``damaged_file``, ``changed_file``, ``no_wcs`` or ``no_data``.
    InputError
        If the settings name a mask plane that does not exist.
    """
    own = settings.calibrated
    files = _Files(row, table)
    pixels, header = _read_pixels(files.image, row.hdu, (row.ny, row.nx))
    mask = _read_mask(files.mask, row, own.mask)
    to_electrons = np.float32(row.electrons_per_unit)
    image = pixels.astype(np.float32) * to_electrons
    if not np.any(np.nan_to_num(image)):
        raise CcdFailure(Reason.NO_DATA, f"{files.image}: all pixels are zero or NaN")
    mask[~np.isfinite(image)] |= int(MaskPlane.NO_DATA)
    variance = np.ones_like(image)
    if own.weight.kind != "none":
        weight, _ = _read_pixels(files.weight, row.weight_hdu, (row.ny, row.nx))
        variance, known = variance_from_weight(weight, own.weight.kind)
        variance *= to_electrons**2
        if not known.any():
            raise CcdFailure(Reason.NO_DATA, f"{files.weight}: all weights are zero")
        saturated = ~known & ((mask & int(MaskPlane.SAT)) != 0) & np.isfinite(image)
        variance[saturated] = _saturated_variance(image, variance, known)[saturated]
        mask[~known & ~saturated] |= int(planes_from_names(own.weight.zero_planes))
    masked_image = MaskedImage(image, variance, mask)
    return _finish(masked_image, _wcs(header, files.image), row, settings)


def _finish(
    masked_image: MaskedImage, wcs: WCS, row: ImageRow, settings: Settings
) -> ImportedImage:
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
        masked_image.image -= np.float32(row.sky_level)
    pixel_scale = pixel_scale_of(wcs, (row.nx, row.ny))
    quality = _quality(masked_image, row, background, pixel_scale)
    _mark_sources(masked_image, quality, settings)
    subtracted = background if own.subtract_sky == "measured" else None
    return ImportedImage(row, masked_image, wcs, subtracted, quality)


def variance_from_weight(
    weight: NDArray, kind: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return variances for a weight map, and where it tells one.

    Parameters
    ----------
    weight : ndarray, shape (ny, nx)
        The map.
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
    safe = np.where(known, weight, 1.0)
    variance = {"inverse_variance": lambda: 1.0 / safe, "rms": lambda: safe**2}.get(
        kind, lambda: safe
    )()
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
    values: NDArray[np.integer], header: fits.Header, settings: MaskSettings
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

    Returns
    -------
    ndarray of int32, shape (ny, nx)
        Bits of `MaskPlane`.
    """
    planes = {key: int(planes_from_names(names)) for key, names in settings.planes.items()}
    unlisted = int(planes_from_names(settings.unlisted))
    if settings.kind == "codes":
        return _translate(values, lambda code: planes.get(str(code), unlisted if code else 0))
    names = _bit_names(header) if settings.kind == "named_bits" else {}

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


def _bit_names(header: fits.Header) -> dict[int, str]:
    """Return the names that cards MP_<name> give to the bits of a mask."""
    names = {int(header[key]): key[3:] for key in header if key.startswith("MP_")}
    if not names:
        raise CcdFailure(Reason.DAMAGED_FILE, "the header of the mask names no bits (MP_<name>)")
    return names


def write_imported(
    path: str | Path,
    imported: ImportedImage,
    provenance: fits.Header | None = None,
    compression: Compression = "none",
) -> None:
    """Write an image calibrated elsewhere as a calexp (without PSF), whole or not at all.

    Parameters
    ----------
    path : str or Path
        Where to.
    imported : ImportedImage
        What.
    provenance : astropy.io.fits.Header, optional
        Cards for the primary header: version, settings, inputs.
    compression : {"none", "lossless", "quantized"}
        See `image.image_hdu`.
    """
    header = _header(imported)
    header.update(wcs_to_header(imported.wcs))
    hdus = [
        fits.PrimaryHDU(header=provenance),
        *masked_image_hdus(imported.masked_image, header, "electron", compression),
    ]
    if imported.background is not None:
        hdus.append(background_hdu(imported.background))
    write_fits(path, hdus)


def imported_row(imported: ImportedImage, path: str, sha256: str) -> CcdRow:
    """Return the manifest row of an image calibrated elsewhere.

    Parameters
    ----------
    imported : ImportedImage
        The image.
    path : str
        Its calexp, relative to the working folder.
    sha256 : str
        Checksum of that file.
    """
    ny, nx = imported.masked_image.shape
    ra, dec = pixel_to_sky(imported.wcs, *outline((nx, ny), FOOTPRINT_POINTS_PER_EDGE))
    row = imported.row
    return CcdRow(
        exposure=row.exposure,
        ccd=row.ccd,
        band=row.band,
        mjd=row.mjd,
        exposure_time=row.exposure_time,
        state="done",
        path=path,
        sha256=sha256,
        nx=nx,
        ny=ny,
        footprint_ra=[float(value) for value in ra],
        footprint_dec=[float(value) for value in dec],
        **imported.quality,
    )


class _Files:
    """The files of an image."""

    def __init__(self, row: ImageRow, table: str | Path | None):
        def path_of(name: str) -> Path:
            return Path(name) if table is None else file_of(name, table)

        self.image = path_of(row.path)
        self.weight = path_of(row.weight_path)
        self.mask = path_of(row.mask_path)


def _read_pixels(path: Path, hdu: int, shape: tuple[int, int]) -> tuple[NDArray, fits.Header]:
    """Return an image as it stands in its file, and its header."""
    try:
        with warnings.catch_warnings():
            # headers of others are often not to the letter of the standard
            warnings.simplefilter("ignore", AstropyUserWarning)
            with fits.open(path, memmap=False) as hdus:
                pixels, header = hdus[hdu].data, hdus[hdu].header.copy()
    except FileNotFoundError:
        raise CcdFailure(
            Reason.MISSING_FILE, f"{path}: the file is not there: ingest again"
        ) from None
    except (OSError, ValueError, TypeError, IndexError, EOFError, VerifyError) as error:
        # trouble of the machine (a disk, a network) is no fault of the file: the job fails
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CcdFailure(
            Reason.DAMAGED_FILE, f"{path}: cannot be read ({error}): copy it"
        ) from error
    if pixels is None or pixels.shape != shape:
        found = "no image" if pixels is None else f"shape {pixels.shape}"
        raise CcdFailure(
            Reason.CHANGED_FILE,
            f"{path}[{hdu}]: has {found}, not {shape} as the table says: ingest it again with "
            "--replace",
        )
    return pixels, header


def _read_mask(path: Path, row: ImageRow, settings: MaskSettings) -> NDArray[np.int32]:
    if settings.kind == "none":
        return np.zeros((row.ny, row.nx), np.int32)
    values, header = _read_pixels(path, row.mask_hdu, (row.ny, row.nx))
    if values.dtype.kind == "f" and np.array_equal(values, np.round(values)):
        values = values.astype(np.int64)
    if values.dtype.kind not in "iub":
        raise CcdFailure(Reason.DAMAGED_FILE, f"{path}: the mask is not of whole numbers")
    return mask_planes(values, header, settings)


def _wcs(header: fits.Header, path: Path) -> WCS:
    try:
        return read_wcs(header, path)
    except InputError as error:
        raise CcdFailure(Reason.NO_WCS, str(error)) from error


def _quality(
    masked_image: MaskedImage,
    row: ImageRow,
    background: Background | None,
    pixel_scale: float,
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
        "pixel_scale": pixel_scale,
    }


def _mark_sources(
    masked_image: MaskedImage, quality: dict[str, float | int | None], settings: Settings
) -> None:
    """Set DETECTED; measure the seeing if it is not known, and with it the depth.

    An image without stars stays without: it was calibrated elsewhere, and can be used.
    """
    scale = quality["pixel_scale"]
    try:
        fwhm = (
            quality["seeing"] / scale
            if quality["seeing"] is not None
            else measure_seeing(masked_image, settings.detection)
        )
        quality["seeing"] = float(fwhm * scale)
        detection = detect_sources(masked_image, fwhm, settings.detection)
        set_detected(masked_image, detection, fwhm, settings.detection)
        quality["n_sources"] = len(detection.sources)
    except CcdFailure as failure:
        if failure.reason not in _NO_STARS:
            raise
        quality["n_sources"] = 0
    if quality["seeing"] is not None:
        # noise-equivalent area of a Gaussian: 4 pi sigma^2
        sigma = quality["seeing"] / scale / 2.3548
        noise = quality["sky_noise"] * np.sqrt(4.0 * np.pi) * sigma
        quality["depth"] = float(quality["zero_point"] - 2.5 * np.log10(5.0 * noise))


def _header(imported: ImportedImage) -> fits.Header:
    """Return the keywords of a calexp (see `calexp`) as far as they are known."""
    row, quality = imported.row, imported.quality
    cards = [
        ("EXPOSURE", row.exposure, "exposure id"),
        ("CCD", row.ccd, "number of the CCD"),
        ("FILTER", row.band, "band"),
        ("EXPTIME", row.exposure_time, "[s] exposure time"),
        ("TIMESYS", "TAI", "time scale of DATE-OBS and MJD-OBS"),
        ("DATE-OBS", Time(row.mjd, format="mjd", scale="tai").isot, "start of the exposure"),
        ("MJD-OBS", row.mjd, "[d] start of the exposure"),
        ("GAIN", 1.0, "electrons per unit of the image"),
        ("PHOTZP", row.zero_point, "[mag] mag = -2.5 log10(electrons) + PHOTZP"),
        ("FLXSCALE", flux_scale(row.zero_point), "[nJy] of one electron"),
        ("PHOTZPE", row.zero_point_error, "[mag] error of PHOTZP"),
        ("SEEING", quality["seeing"], "[arcsec] FWHM of the PSF"),
        ("SKYLEVEL", quality["sky_level"], "[electron] sky level"),
        ("SKYNOISE", quality["sky_noise"], "[electron] noise of a pixel of empty sky"),
        ("DEPTH", quality.get("depth"), "[mag] point source at 5 sigma"),
        ("PIXSCALE", quality["pixel_scale"], "[arcsec] size of a pixel at the centre"),
    ]
    header = fits.Header()
    for keyword, value, comment in cards:
        if value is not None:
            header[keyword] = (value, comment)
    return header
