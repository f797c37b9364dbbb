"""The CCDs and stars of an exposure, made ready for matching and fitting."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.astrometry.ccd import (
    brightest_first,
)
from coaddflow.astrometry.refcat import ccd_cone
from coaddflow.exposure.focal_plane import (
    CcdPlace,
    FieldModel,
)
from coaddflow.instrument.camera import Camera
from coaddflow.settings.astrometry import AstrometrySettings

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.intp]


@dataclass(frozen=True)
class CcdStars:
    """The sources of a CCD, as far as astrometry needs them.

    Attributes
    ----------
    x, y : ndarray of float64, shape (n,)
        Positions, 0-based pixels.
    flux : ndarray of float64, shape (n,)
        Fluxes, any unit that is the same for all CCDs; only the order matters.
    centroid_error : ndarray of float64, shape (n,)
        Errors of the positions, one axis, pixels.
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    """

    x: FloatArray
    y: FloatArray
    flux: FloatArray
    centroid_error: FloatArray
    shape: tuple[int, int]

    @classmethod
    def of(cls, sources: Table, shape: tuple[int, int]) -> "CcdStars":
        """Take them from the sources of a measured CCD."""
        # saturated stars, the best known ones, have an isophotal flux but may have no PSF flux
        names = ("x", "y", "flux_isophotal", "x_error")
        return cls(*(np.array(sources[name], dtype=float) for name in names), shape)


@dataclass(frozen=True)
class CcdData:
    """A CCD with what is known before any match.

    ``sources`` are rows of the sources, the brightest first, ``place`` (2, n) and ``error`` (n,)
    belong to them; ``cone`` (degrees) has all reference stars that the CCD may see. ``near`` are
    the rows of those that are near it once it is known where the exposure points, the brightest
    first.
    """

    number: int
    stars: CcdStars
    where: CcdPlace
    sources: IndexArray
    place: FloatArray
    error: FloatArray
    cone: tuple[float, float, float]
    near: IndexArray = field(default_factory=lambda: np.array([], np.intp))

    @property
    def reach(self) -> float:
        """Distance of a corner from the centre, field pixels."""
        return float(np.hypot(*(self.where.edge - self.where.centre)).max())


@dataclass(frozen=True)
class Field:
    """The CCDs of an exposure and its reference stars; ``by_magnitude`` orders their rows."""

    camera: Camera
    ra: float
    dec: float
    rotation: float
    refcat: Table
    sky: FloatArray
    by_magnitude: IndexArray
    ccds: dict[int, CcdData]

    @classmethod
    def of(
        cls,
        stars: Mapping[int, CcdStars],
        camera: Camera,
        ra: float,
        dec: float,
        rotation: float,
        refcat: Table,
        settings: AstrometrySettings,
    ) -> "Field":
        """Put the sources into the field and the reference stars to their CCDs."""
        ccds = {}
        for number in sorted(stars):
            detector = camera.detector(number)
            cone = ccd_cone(camera, detector, ra, dec, rotation, settings.max_pointing_error / 60.0)
            ccds[number] = _prepare(
                stars[number],
                CcdPlace(camera, detector, rotation),
                cone,
                settings,
            )
        sky = np.stack([np.asarray(refcat[name], float) for name in ("ra", "dec")])
        magnitude = np.asarray(np.ma.filled(refcat["mag"], np.nan), float)
        return cls(
            camera, ra, dec, rotation, refcat, sky, np.argsort(magnitude, kind="stable"), ccds
        )

    def pointed(self, model: FieldModel, margin: float) -> "Field":
        """Return the field with the reference stars that are near its CCDs, in pixels."""
        catalogue = model.catalogue(self.sky[:, self.by_magnitude])
        ccds = {}
        for number, ccd in self.ccds.items():
            centre = model.expected(ccd.where, ccd.where.centre)
            # compared this way round, NaN is left out
            near = np.hypot(*(catalogue - centre)) <= 1.1 * ccd.reach + margin
            ccds[number] = replace(ccd, near=self.by_magnitude[near])
        return replace(self, ccds=ccds)

    @property
    def radius(self) -> float:
        """Distance of the farthest corner from the origin, field pixels."""
        return max(float(np.hypot(*ccd.where.edge).max()) for ccd in self.ccds.values())


def _prepare(
    stars: CcdStars, where: CcdPlace, cone: tuple[float, float, float], settings: AstrometrySettings
) -> CcdData:
    sources = brightest_first(stars.x, stars.y, stars.flux, settings.max_sources)
    error = np.hypot(stars.centroid_error, settings.centroid_floor)
    sources = sources[np.isfinite(error[sources])]
    place = where.field(stars.x[sources], stars.y[sources])
    number = where.detector.id
    return CcdData(number, stars, where, sources, place, error[sources], cone)
