"""The CCDs of an exposure, from raw frame to calexp.

This is where the steps of a CCD are put into their order and where files are read and written;
the steps themselves know neither files nor each other. `make_calexp` is the whole job of one CCD.
A job that holds all CCDs of an exposure in memory uses the same pieces.

A CCD that fails for reasons of its own gets a row that says so, and no calexp. What is not the
CCD's fault (a setting, a full disk, no memory) ends the job.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from astropy.io import fits

from coaddflow.astrometry.prediction import predicted_wcs, reference_stars
from coaddflow.calexp.imported import import_image, imported_row, write_imported
from coaddflow.calexp.model import Calexp, CcdFacts, process_ccd, write_calexp
from coaddflow.calib.frames import read_calibs
from coaddflow.errors import CcdFailure, CoaddflowError, Reason
from coaddflow.files import remove_partial, sha256_of
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.image.fill import fill_masked
from coaddflow.image.masked_image import MaskedImage, MaskPlane, planes_from_names
from coaddflow.image.provenance import provenance_header
from coaddflow.instrument.camera import Camera, Detector, outline
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.isr.cosmic_rays import find_cosmic_rays
from coaddflow.isr.detrend import detrend
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow
from coaddflow.tables.manifest import FOOTPRINT_POINTS_PER_EDGE, CcdRow, write_row

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")

SECTIONS = (
    "detrend",
    "cosmics",
    "interpolation",
    "background",
    "detection",
    "psf",
    "astrometry",
    "photometry",
    "refcat",
)
"""Settings of which a calexp's header carries the checksum."""


@dataclass(frozen=True)
class CcdFiles:
    """Where the files of one CCD stand; paths as the products shall name them.

    Attributes
    ----------
    raw : str
        The raw file (or image calibrated elsewhere), whether it is there or not.
    calibs : mapping of str to str
        Calibration frames that are applied: bias, dark, flat, defects.
    row : str
        The row that is written last. The calexp and its sources stand beside it.
    manifest : str
        The manifest of the exposure.
    """

    raw: str
    calibs: Mapping[str, str]
    row: str
    manifest: str

    @property
    def calexp(self) -> str:
        """The calexp."""
        return str(Path(self.row).with_suffix(".fits"))

    @property
    def sources(self) -> str:
        """The source catalogue."""
        path = Path(self.row)
        return str(path.with_name(f"{path.stem}_sources.fits"))


def make_calexp(
    exposure: ExposureRow, ccd: int, files: CcdFiles, camera: Camera, settings: Settings
) -> CcdRow:
    """Do the whole job of one CCD: raw frame to calexp, sources and row.

    The row of an earlier run, the calexp that it names and the exposure's manifest are removed
    first: where a manifest stands, the calexps that it names are whole.

    Parameters
    ----------
    exposure : ExposureRow
        What the table says about the exposure.
    ccd : int
        The CCD.
    files : CcdFiles
        Its files.
    camera : Camera
        The camera.
    settings : Settings
        Sections detrend, cosmics, interpolation, background, detection, psf, astrometry,
        photometry, refcat and products.

    Returns
    -------
    CcdRow
        The row that was written.

    Raises
    ------
    InputError
        If a setting, a calibration frame or the reference catalogue is not usable, or a product
        cannot be written.
    """
    facts = facts_of(exposure, ccd)
    return _row_whatever_happens(
        facts, files, lambda: calexp_row(exposure, facts, files, camera, settings)
    )


def make_calexp_from_image(image: ImageRow, files: CcdFiles, settings: Settings) -> CcdRow:
    """Do the whole job of one image that was calibrated elsewhere: image to calexp and row.

    Parameters
    ----------
    image : ImageRow
        What the table says about it; paths relative to the working folder.
    files : CcdFiles
        Its files.
    settings : Settings
        Sections calibrated, background, detection and products.

    Returns
    -------
    CcdRow
        The row that was written.

    Raises
    ------
    InputError
        As `make_calexp`.
    """
    facts = facts_of(image, image.ccd)
    return _row_whatever_happens(facts, files, lambda: imported_image_row(image, files, settings))


def _row_whatever_happens(
    facts: CcdFacts, files: CcdFiles, make_row: Callable[[], CcdRow]
) -> CcdRow:
    """Remove old products, make new ones and write the row, also that of a failure."""
    remove_products(files)
    row = result_or_failed_row(facts, files, make_row)
    write_row(files.row, row)
    return row


def result_or_failed_row(
    facts: CcdFacts, files: CcdFiles, step: Callable[[], Result]
) -> Result | CcdRow:
    """Do a step of a CCD; if the CCD fails, remove its products and return the row that says why.

    Parameters
    ----------
    facts : CcdFacts
        The CCD.
    files : CcdFiles
        Its files.
    step : callable
        What to do.

    Raises
    ------
    CoaddflowError, OSError, MemoryError
        What is not the CCD's fault: a setting, a full disk, no memory.
    """
    try:
        return step()
    except CcdFailure as failure:
        _LOG.warning("the CCD fails: %s", failure)
        row = failed_row(facts, failure.reason, failure.message)
    except (CoaddflowError, OSError, MemoryError):
        raise
    except Exception as error:
        # one strange CCD must not stop a survey; what happened is in the log and in the row
        _LOG.exception("the CCD fails in a way that nobody foresaw")
        message = f"{files.raw}: {type(error).__name__}: {error}"
        row = failed_row(facts, Reason.UNEXPECTED_ERROR, message)
    remove_products(files)
    return row


def imported_image_row(image: ImageRow, files: CcdFiles, settings: Settings) -> CcdRow:
    """Make the calexp of an image calibrated elsewhere and write it."""
    imported = import_image(image, settings)
    inputs = [path for path in (image.path, image.weight_path, image.mask_path) if path]
    provenance = provenance_header(
        settings.section("calibrated", "background", "detection"), dict.fromkeys(inputs)
    )
    write_imported(files.calexp, imported, provenance, settings.products.compression)
    return imported_row(imported, files.calexp, sha256_of(files.calexp))


def failed_row(facts: CcdFacts, reason: Reason, message: str) -> CcdRow:
    """Return the row of a CCD that failed."""
    return CcdRow(**facts._asdict(), state="failed", reason=reason, message=message)


def done_row(facts: CcdFacts, calexp: Calexp, path: str | Path) -> CcdRow:
    """Return the row of a CCD whose calexp has been written."""
    ny, nx = calexp.masked_image.shape
    ra, dec = pixel_to_sky(calexp.wcs, *outline((nx, ny), FOOTPRINT_POINTS_PER_EDGE))
    return CcdRow(
        **facts._asdict(),
        state="done",
        path=str(path),
        sha256=sha256_of(path),
        nx=nx,
        ny=ny,
        footprint_ra=ra.tolist(),
        footprint_dec=dec.tolist(),
        **calexp.quality,
    )


def facts_of(row: ExposureRow | ImageRow, ccd: int) -> CcdFacts:
    """Return what the table says of a CCD before it is looked at."""
    return CcdFacts(row.exposure, ccd, row.band, row.mjd, row.exposure_time)


def remove_products(files: CcdFiles) -> None:
    """Remove what an earlier run made of a CCD, and the manifest of its exposure first."""
    Path(files.manifest).unlink(missing_ok=True)
    for path in (files.row, files.calexp, files.sources):
        Path(path).unlink(missing_ok=True)
        remove_partial(path)


def calexp_row(
    exposure: ExposureRow, facts: CcdFacts, files: CcdFiles, camera: Camera, settings: Settings
) -> CcdRow:
    """Make the calexp of a CCD and write it."""
    detector = camera.detector(facts.ccd)
    image, cards = detrended_image(files, camera, detector, facts.exposure_time, settings)
    refcat = reference_stars(exposure, camera, detector, settings)
    initial_wcs = predicted_wcs(camera, detector, exposure.ra, exposure.dec, exposure.rotation)
    calexp = process_ccd(image, facts, initial_wcs, refcat, settings)
    return write_products(calexp, cards, files, settings)


def write_products(
    calexp: Calexp,
    cards: fits.Header,
    files: CcdFiles,
    settings: Settings,
    solved: Mapping[str, Any] | None = None,
) -> CcdRow:
    """Write a calexp and its sources; return the row.

    Parameters
    ----------
    calexp : Calexp
        The calibrated CCD.
    cards : astropy.io.fits.Header
        What its detrending did.
    files : CcdFiles
        Where to, and what it was made from.
    settings : Settings
        `SECTIONS` and products.
    solved : mapping, optional
        Further settings that it was made with, as plain values.
    """
    for path in (files.calexp, files.sources):
        remove_partial(path)  # of a worker that died in the middle of it
    calexp.header.update(cards)
    provenance = provenance_header(
        settings.section(*SECTIONS) | dict(solved or {}), [files.raw, *files.calibs.values()]
    )
    write_calexp(files.calexp, files.sources, calexp, provenance, settings.products.compression)
    return done_row(calexp.facts, calexp, files.calexp)


def detrended_image(
    files: CcdFiles, camera: Camera, detector: Detector, exposure_time: float, settings: Settings
) -> tuple[MaskedImage, fits.Header]:
    """Return a CCD in electrons, with cosmic rays and defects masked and filled.

    Returns
    -------
    masked_image : MaskedImage
        Shape ``detector.shape``.
    cards : astropy.io.fits.Header
        What was done.
    """
    raw = read_raw_ccd(files.raw, camera, detector, settings.detrend.check_raw)
    _LOG.info("detrend %s", files.raw)
    result = detrend(raw, read_calibs(files.calibs), exposure_time, settings.detrend)
    clean(result.masked_image, settings)
    return result.masked_image, result.header


def clean(image: MaskedImage, settings: Settings) -> None:
    """Mask cosmic rays in a detrended CCD, and fill them and its defects; in place.

    Parameters
    ----------
    image : MaskedImage
        Electrons.
    settings : Settings
        Sections cosmics and interpolation.
    """
    _LOG.info("find cosmic rays")
    cosmic = find_cosmic_rays(image, settings.cosmics)
    image.mask[cosmic] |= np.int32(MaskPlane.CR)
    fill = settings.interpolation
    n_filled = fill_masked(image, planes_from_names(fill.planes), fill.max_gap)
    _LOG.info("%d pixels hit by cosmic rays; %d pixels filled", cosmic.sum(), n_filled)
