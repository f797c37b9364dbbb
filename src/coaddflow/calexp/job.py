"""The job of one CCD: from raw frame, or image calibrated elsewhere, to calexp and row.

Here files are read and written; the steps between (`calexp.ccd`) know none. The job of an exposure
uses the same pieces.

A CCD that fails for reasons of its own gets a row that says so, and no calexp. What is not the
CCD's fault (a setting, a full disk, no memory, a mistake in the program) ends the job.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from astropy.io import fits

from coaddflow.astrometry.prediction import predicted_wcs, reference_stars
from coaddflow.calexp.ccd import calibrate_ccd, detrend_ccd, measure_ccd
from coaddflow.calexp.imported import import_image
from coaddflow.calexp.model import Calexp, CcdId
from coaddflow.calexp.product import done_row, failed_row, write_calexp
from coaddflow.calib.frames import read_calibs
from coaddflow.errors import CcdFailure, CoaddflowError, UnexpectedError
from coaddflow.files import remove_partial
from coaddflow.image.provenance import provenance_header
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow
from coaddflow.tables.manifest import CcdRow, write_row

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


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
    UnexpectedError
        If there is a mistake in the program.
    """
    return _with_row(
        CcdId.of(exposure, ccd), files, lambda: calexp_row(exposure, ccd, files, camera, settings)
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
    InputError, UnexpectedError
        As `make_calexp`.
    """
    return _with_row(
        CcdId.of(image, image.ccd), files, lambda: imported_image_row(image, files, settings)
    )


def _with_row(ccd: CcdId, files: CcdFiles, make_row: Callable[[], CcdRow]) -> CcdRow:
    """Remove old products, make new ones and write the row, also that of a failure."""
    remove_products(files)
    row = result_or_failed_row(ccd, files, make_row)
    write_row(files.row, row)
    return row


def result_or_failed_row(
    ccd: CcdId, files: CcdFiles, step: Callable[[], Result]
) -> Result | CcdRow:
    """Do a step of a CCD; if the CCD fails, remove its products and return the row that says why.

    Parameters
    ----------
    ccd : CcdId
        The CCD.
    files : CcdFiles
        Its files.
    step : callable
        What to do.

    Raises
    ------
    CoaddflowError, OSError, MemoryError
        What is not the CCD's fault: a setting, a full disk, no memory.
    UnexpectedError
        A mistake in the program, with the exception as its cause.
    """
    try:
        return step()
    except CcdFailure as failure:
        _LOG.warning("CCD %d fails: %s", ccd.ccd, failure)
        remove_products(files)
        return failed_row(ccd, failure)
    except (CoaddflowError, OSError, MemoryError):
        raise
    except Exception as error:
        # what odd data make a library raise has a reason where it is called: this is our mistake
        where = f"exposure {ccd.exposure}, CCD {ccd.ccd}"
        raise UnexpectedError(where, f"{type(error).__name__}: {error}") from error


def imported_image_row(image: ImageRow, files: CcdFiles, settings: Settings) -> CcdRow:
    """Make the calexp of an image calibrated elsewhere and write it."""
    calexp = import_image(image, settings)
    inputs = [path for path in (image.path, image.weight_path, image.mask_path) if path]
    provenance = provenance_header(settings.provenance(), dict.fromkeys(inputs))
    compression = settings.products.compression
    write_calexp(files.calexp, files.sources, calexp, provenance, compression)
    return done_row(calexp, files.calexp)


def remove_products(files: CcdFiles) -> None:
    """Remove what an earlier run made of a CCD, and the manifest of its exposure first."""
    Path(files.manifest).unlink(missing_ok=True)
    for path in (files.row, files.calexp, files.sources):
        Path(path).unlink(missing_ok=True)
        remove_partial(path)


def calexp_row(
    exposure: ExposureRow, ccd: int, files: CcdFiles, camera: Camera, settings: Settings
) -> CcdRow:
    """Make the calexp of a CCD and write it."""
    detector = camera.detector(ccd)
    _LOG.info("calibrate CCD %d of %s", ccd, files.raw)
    detrended = detrend_ccd(
        read_raw_ccd(files.raw, camera, detector, settings.detrend.check_raw),
        read_calibs(files.calibs),
        exposure.exposure_time,
        settings,
    )
    refcat = reference_stars(exposure, camera, detector, settings)
    initial_wcs = predicted_wcs(camera, detector, exposure.ra, exposure.dec, exposure.rotation)
    measured = measure_ccd(detrended.masked_image, settings)
    calexp = calibrate_ccd(measured, CcdId.of(exposure, ccd), initial_wcs, refcat, settings)
    return write_products(calexp, detrended.header, files, settings)


def write_products(
    calexp: Calexp,
    cards: fits.Header,
    files: CcdFiles,
    settings: Settings,
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
        The sections of the stage (see `Settings.only`).
    """
    for path in (files.calexp, files.sources):
        remove_partial(path)  # of a worker that died in the middle of it
    calexp.header.update(cards)
    provenance = provenance_header(settings.provenance(), [files.raw, *files.calibs.values()])
    write_calexp(files.calexp, files.sources, calexp, provenance, settings.products.compression)
    return done_row(calexp, files.calexp)
