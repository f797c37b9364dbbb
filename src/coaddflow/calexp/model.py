"""What the image of a CCD is on its way from measured to calibrated, and in its file."""

from dataclasses import dataclass
from typing import NamedTuple, Self

from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS

from coaddflow.image.masked_image import MaskedImage
from coaddflow.measure.background import Background
from coaddflow.measure.psf_fit import PsfQuality
from coaddflow.measure.psf_model import PsfModel
from coaddflow.tables.exposures import ExposureRow, ImageRow


class CcdId(NamedTuple):
    """Which CCD of which exposure an image is of, and how that was taken.

    ``mjd`` is the start of the exposure, MJD TAI; the exposure time is in seconds.
    """

    exposure: str
    ccd: int
    band: str
    mjd: float
    exposure_time: float

    @classmethod
    def of(cls, row: ExposureRow | ImageRow, ccd: int) -> Self:
        """Take it from the row of an exposure, or of an image calibrated elsewhere."""
        return cls(row.exposure, ccd, row.band, row.mjd, row.exposure_time)


class DetrendedCcd(NamedTuple):
    """A CCD in electrons, with its sky, and with defects masked.

    The header says what was done: one card for each step, and gain, read noise and overscan of the
    amplifiers.
    """

    masked_image: MaskedImage
    header: fits.Header


@dataclass
class MeasuredCcd:
    """A CCD whose stars are measured in pixels and electrons.

    Attributes
    ----------
    masked_image : MaskedImage
        Electrons, sky subtracted, DETECTED set.
    background : Background
        The sky that was subtracted.
    psf : PsfModel
        Its PSF.
    psf_quality : PsfQuality
        How good that is.
    sources : astropy.table.Table
        See `calexp.ccd.measure_ccd`.
    aperture_radius : float
        Radius of the standard aperture, pixels.
    aperture_correction, psf_correction : float
        Total flux of a star over its flux in the standard aperture, and over the plain PSF flux.
    """

    masked_image: MaskedImage
    background: Background
    psf: PsfModel
    psf_quality: PsfQuality
    sources: Table
    aperture_radius: float
    aperture_correction: float
    psf_correction: float


@dataclass
class Calexp:
    """A calibrated CCD.

    Attributes
    ----------
    id : CcdId
        What it is an image of.
    masked_image : MaskedImage
        Electrons, sky subtracted.
    wcs : astropy.wcs.WCS
        The fitted WCS.
    psf : PsfModel or None
        Its PSF; None for an image that was calibrated elsewhere and has too few stars.
    background : Background or None
        The sky that was subtracted; None if it was not measured here.
    sources : astropy.table.Table or None
        See `calexp.ccd.measure_ccd` and `calexp.ccd.apply_calibration`; None for an image that
        was calibrated elsewhere.
    figures : dict
        What was measured, under the names of `manifest.CcdRow`.
    header : astropy.io.fits.Header
        The keywords of `calexp.product`, without the WCS.
    flags : tuple of str
        What it lacks (`tables.manifest.Flag`).
    """

    id: CcdId
    masked_image: MaskedImage
    wcs: WCS
    psf: PsfModel | None
    background: Background | None
    sources: Table | None
    figures: dict[str, float | int | None]
    header: fits.Header
    flags: tuple[str, ...] = ()


@dataclass
class StoredCalexp:
    """What `read_calexp` finds in a file: as `Calexp`, with the header of the file.

    PSF and background may be None where an image was calibrated elsewhere.
    """

    masked_image: MaskedImage
    wcs: WCS
    header: fits.Header
    psf: PsfModel | None
    background: Background | None
