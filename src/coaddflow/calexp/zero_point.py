"""The zero-point of one CCD, from the stars of its astrometric match."""

import numpy as np
from astropy.table import Table

from coaddflow.astrometry.ccd import AstrometrySolution
from coaddflow.calexp.model import MeasuredCcd
from coaddflow.measure.detection import SourceFlag
from coaddflow.measure.photometry import MatchedStars, ZeroPoint, zero_point
from coaddflow.settings.photometry import PhotometrySettings

_NO_MAGNITUDE = (
    SourceFlag.SATURATED
    | SourceFlag.EDGE
    | SourceFlag.BAD_PIXELS
    | SourceFlag.SUSPECT
    | SourceFlag.BAD_FLUX
)
"""Stars that say nothing about the zero-point."""


def measure_zero_point(
    measured: MeasuredCcd, solution: AstrometrySolution, refcat: Table, settings: PhotometrySettings
) -> tuple[np.ndarray, ZeroPoint]:
    """Compare the total fluxes of the stars of an astrometric match with the catalogue.

    Returns the stars that the zero-point rests on as flags of the sources, shape (n,), and the
    zero-point (see `photometry.zero_point`).

    Raises
    ------
    CcdFailure
        ``no_photometric_match`` if too few stars are whole and have a magnitude.
    """
    stars = matched_stars(measured, solution, refcat, settings)
    zero = zero_point(stars, settings)
    used = np.zeros(len(measured.sources), dtype=bool)
    used[stars.source_index[zero.used]] = True
    return used, zero


def matched_stars(
    measured: MeasuredCcd, solution: AstrometrySolution, refcat: Table, settings: PhotometrySettings
) -> MatchedStars:
    """Return the stars of an astrometric match, with fluxes and catalogue magnitudes.

    Stars whose flux is not the whole one (saturated, at the edge, on bad pixels) have no magnitude.
    """
    sources = measured.sources[solution.source_index]
    clean = (np.asarray(sources["flags"]) & int(_NO_MAGNITUDE)) == 0
    if settings.zero_point_flux == "psf":
        flux, error = np.asarray(sources["flux_psf"]), np.asarray(sources["flux_psf_error"])
    else:
        flux = sources["flux_aperture"][:, settings.standard] * measured.aperture_correction
        error = sources["flux_aperture_error"][:, settings.standard]
        error = error * measured.aperture_correction
    magnitude = np.ma.filled(refcat["mag"], np.nan)[solution.reference_index]
    magnitude_error = np.ma.filled(refcat["mag_err"], np.nan)[solution.reference_index]
    return MatchedStars(
        solution.source_index,
        np.asarray(sources["x"], dtype=float),
        np.asarray(sources["y"], dtype=float),
        np.asarray(flux, dtype=float),
        np.asarray(error, dtype=float),
        np.where(clean, magnitude, np.nan),
        np.asarray(magnitude_error, dtype=float),
    )
