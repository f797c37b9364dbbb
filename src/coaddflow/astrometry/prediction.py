"""Where a CCD is expected: its predicted WCS, and the reference stars that may be on it."""

from collections.abc import Iterable

from astropy.table import Table
from astropy.wcs import WCS

from coaddflow.astrometry.refcat import ccd_cone, exposure_cone, load_refcat
from coaddflow.geometry.wcs import fit_tan_sip
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow


def predicted_wcs(
    camera: Camera, detector: Detector, ra: float, dec: float, rotation: float
) -> WCS:
    """Return the TAN-SIP WCS that the camera's geometry predicts for a CCD of an exposure.

    ``ra``, ``dec`` and ``rotation`` are the pointing and rotation of the exposure, degrees.
    """
    return fit_tan_sip(
        lambda x, y: camera.pixel_to_sky(detector, x, y, ra, dec, rotation), detector.shape
    )


def reference_stars(
    exposure: ExposureRow, camera: Camera, detector: Detector, settings: Settings
) -> Table:
    """Return the reference stars that may be on a CCD, within the largest pointing error."""
    cone = ccd_cone(camera, detector, *_pointing(exposure, settings))
    return load_refcat(settings.refcat, *cone, exposure.band, exposure.mjd)


def reference_stars_of_exposure(
    exposure: ExposureRow, camera: Camera, ccds: Iterable[int], settings: Settings
) -> Table:
    """Return the reference stars that may be on any of these CCDs.

    Those of one CCD are `refcat.stars_in_cone` of its `refcat.ccd_cone`: the same rows in the same
    order as `reference_stars` reads for it.
    """
    detectors = [camera.detector(ccd) for ccd in ccds]
    cone = exposure_cone(camera, detectors, *_pointing(exposure, settings))
    return load_refcat(settings.refcat, *cone, exposure.band, exposure.mjd)


def _pointing(exposure: ExposureRow, settings: Settings) -> tuple[float, float, float, float]:
    """Return RA, Dec, rotation and the largest error of the pointing, degrees."""
    margin = settings.astrometry.max_pointing_error / 60.0
    return exposure.ra, exposure.dec, exposure.rotation, margin
