"""The job of one CCD: from raw frame, or image calibrated elsewhere, to calexp and row.

Here files are read and written; the steps between (`calexp.ccd`) know none. The job of an exposure
uses the same pieces.

A CCD that fails for reasons of its own gets a row that says so, and no calexp. What is not the
CCD's fault (a setting, a full disk, no memory, a mistake in the program) ends the job.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from coaddflow.astrometry.prediction import predicted_wcs, reference_stars
from coaddflow.calexp.ccd import calibrate_ccd, detrend_ccd, measure_ccd, remove_cosmic_rays
from coaddflow.calexp.imported import import_image
from coaddflow.calexp.model import Calexp, CcdId
from coaddflow.calexp.product import done_row, failed_row, write_calexp
from coaddflow.calib.frames import read_calibs
from coaddflow.errors import CcdFailure, UnusableData, working_on
from coaddflow.files import remove, remove_partial
from coaddflow.image.fits_hdus import open_fits
from coaddflow.image.provenance import provenance_header
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.raw import OpenFile, read_raw_ccd
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow
from coaddflow.tables.manifest import FOOTPRINT_POINTS_PER_EDGE, CcdRow, write_row
from coaddflow.tables.paths import set_aside_path, sources_path

_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True)
class CcdFiles:
    """Where the files of one CCD are; products name them by these paths.

    Attributes
    ----------
    raw : str
        The raw file (or image calibrated elsewhere), whether it is there or not.
    calibs : mapping of str to str
        Calibration frames that are applied: bias, dark, flat, defects.
    row : str
        The row that is written last. The calexp and its sources are beside it.
    manifest : str
        The manifest of the exposure.
    """

    raw: str
    calibs: Mapping[str, str]
    row: str
    manifest: str

    @property
    def calexp(self) -> str:
        """The image, variance and mask of the calexp."""
        return str(Path(self.row).with_suffix(".fits"))

    @property
    def sources(self) -> str:
        """The catalogue of its sources."""
        return sources_path(self.calexp)


def make_calexp(
    row: ExposureRow | ImageRow,
    ccd: int,
    files: CcdFiles,
    camera: Camera | None,
    settings: Settings,
    threads: int = 1,
) -> CcdRow:
    """Do the whole job of one CCD: raw frame or calibrated image to calexp, sources and row.

    The row of an earlier run, the calexp that it names and the exposure's manifest are removed
    first: where a manifest stands, the calexps that it names are whole.

    Parameters
    ----------
    row : ExposureRow or ImageRow
        What the table says about the exposure, or about the image calibrated elsewhere.
    ccd : int
        Number of the CCD.
    files : CcdFiles
        What it is made from, and where its products go.
    camera : Camera or None
        The camera; None for an image calibrated elsewhere.
    settings : Settings
        The sections of the stage.
    threads : int
        Number of threads that share the work on a raw frame; products do not depend on it.

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
    remove_products(files)
    made = result_or_failed_row(
        row, ccd, files, camera, lambda: calexp_row(row, ccd, files, camera, settings, threads)
    )
    write_row(files.row, made)
    return made


def remove_products(*ccds: CcdFiles) -> None:
    """Remove what an earlier run made of CCDs, and the manifest of their exposure first."""
    products = [path for files in ccds for path in (files.row, files.calexp, files.sources)]
    aside = [set_aside_path(path) for one in ccds for path in (one.calexp, one.sources)]
    remove(*dict.fromkeys(files.manifest for files in ccds), *products, *aside)
    remove_partial(*products)


def remove_partial_products(*ccds: CcdFiles) -> None:
    """Remove what workers that died have left of the products of CCDs, which stay."""
    remove_partial(*(path for files in ccds for path in (files.calexp, files.sources)))


def result_or_failed_row(
    row: ExposureRow | ImageRow,
    ccd: int,
    files: CcdFiles,
    camera: Camera | None,
    step: Callable[[], Result],
) -> Result | CcdRow:
    """Do a step of a CCD; if the CCD fails, remove its products and return the row that says why.

    Parameters are those of `make_calexp`.

    Raises
    ------
    CoaddflowError, OSError, MemoryError
        What is not the CCD's fault: a setting, a full disk, no memory.
    UnexpectedError
        A mistake in the program, with the exception as its cause.
    """
    try:
        with working_on(f"exposure {row.exposure}, CCD {ccd}"):
            return step()
    except CcdFailure as failure:
        return row_of_failure(row, ccd, files, camera, failure)


def row_of_failure(
    row: ExposureRow | ImageRow,
    ccd: int,
    files: CcdFiles,
    camera: Camera | None,
    failure: CcdFailure,
) -> CcdRow:
    """Remove the products of a CCD that has failed, and return the row that says why.

    Its footprint is where the tables say that the CCD is: coadds name what they lack.
    """
    if isinstance(failure, UnusableData):
        # the reason can only be found in the pixels
        failure = CcdFailure(failure.reason, f"{files.raw}: {failure.message}")
    _LOG.warning("CCD %d fails: %s", ccd, failure)
    remove_products(files)
    return failed_row(CcdId.of(row, ccd), failure, _predicted_footprint(row, ccd, camera))


def _predicted_footprint(
    row: ExposureRow | ImageRow, ccd: int, camera: Camera | None
) -> tuple[list[float], list[float]]:
    """Return the vertices (ra, dec) of a CCD as the tables have it, degrees."""
    if isinstance(row, ImageRow):
        return list(row.footprint_ra), list(row.footprint_dec)
    pointing = row.ra, row.dec, row.rotation
    ra, dec = camera.footprint(camera.detector(ccd), *pointing, FOOTPRINT_POINTS_PER_EDGE)
    return ra.tolist(), dec.tolist()


def calexp_row(
    row: ExposureRow | ImageRow,
    ccd: int,
    files: CcdFiles,
    camera: Camera | None,
    settings: Settings,
    threads: int = 1,
    open_raw: OpenFile = open_fits,
) -> CcdRow:
    """Make the calexp of a CCD and write it; parameters as `make_calexp` and `read_raw_ccd`."""
    if isinstance(row, ImageRow):
        inputs = [path for path in (row.path, row.weight_path, row.mask_path) if path]
        return write_products(import_image(row, settings), files, settings, dict.fromkeys(inputs))
    detector = camera.detector(ccd)
    _LOG.info("calibrate CCD %d of %s", ccd, files.raw)
    detrended = detrend_ccd(
        read_raw_ccd(files.raw, camera, detector, settings.detrend.check_raw, open_raw),
        read_calibs(files.calibs, threads),
        row.exposure_time,
        settings,
        threads,
    )
    remove_cosmic_rays(detrended.masked_image, settings, threads)
    refcat = reference_stars(row, camera, detector, settings)
    initial_wcs = predicted_wcs(camera, detector, row.ra, row.dec, row.rotation)
    measured = measure_ccd(detrended.masked_image, settings, threads)
    calexp = calibrate_ccd(measured, CcdId.of(row, ccd), initial_wcs, refcat, settings)
    calexp.header.update(detrended.header)
    return write_products(calexp, files, settings, [files.raw, *files.calibs.values()], threads)


def write_products(
    calexp: Calexp, files: CcdFiles, settings: Settings, inputs: Iterable[str], threads: int = 1
) -> CcdRow:
    """Write a calexp, with its sources if it has any, made from these inputs; return its row."""
    provenance = provenance_header(settings.provenance(), inputs)
    compression = settings.products.compression
    sha256 = write_calexp(files.calexp, files.sources, calexp, provenance, compression, threads)
    return done_row(calexp, files.calexp, sha256)
