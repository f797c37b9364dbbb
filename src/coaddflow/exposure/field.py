"""The field of an exposure: the stars of all its CCDs and the reference stars, for matching."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from astropy.table import Table
from astropy.wcs import WCS
from numpy.typing import NDArray

from coaddflow.astrometry.ccd import CcdStars
from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.astrometry.refcat import ccd_cone, stars_in_cone
from coaddflow.exposure.focal_plane import CcdPairs, CcdPlace, FieldModel
from coaddflow.instrument.camera import Camera
from coaddflow.settings.astrometry import AstrometrySettings
from coaddflow.settings.exposure_astrometry import ExposureAstrometrySettings

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.intp]


@dataclass(frozen=True)
class FieldCcd:
    """A CCD with its stars in the field.

    Attributes
    ----------
    number : int
        CCD number.
    stars : CcdStars
        All its sources.
    where : CcdPlace
        Its position in the camera file.
    sources : ndarray of int, shape (n,)
        Rows of the sources to be matched, brightest first.
    place, error : ndarray of float64, shapes (2, n), (n,)
        Their positions and position errors, field pixels.
    cone : tuple of float
        Cone (ra, dec, radius) with all reference stars that may be on the CCD, degrees.
    near : ndarray of int, shape (m,)
        Rows of the reference stars near it, brightest first; empty until the exposure is located
        (`ExposureField.pointed`).
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
class ExposureField:
    """The CCDs of an exposure and its reference stars.

    Attributes
    ----------
    camera, ra, dec, rotation
        The camera; predicted pointing and rotation, degrees.
    refcat, sky, by_magnitude
        The reference stars; their positions (2, n), degrees; their rows, brightest first.
    settings, model_settings
        Limits of search, match and clipping; the model of the focal plane.
    ccds : dict of int to FieldCcd
        The CCDs in order of their numbers.
    """

    camera: Camera
    ra: float
    dec: float
    rotation: float
    refcat: Table
    sky: FloatArray
    by_magnitude: IndexArray
    settings: AstrometrySettings
    model_settings: ExposureAstrometrySettings
    ccds: dict[int, FieldCcd]

    @classmethod
    def of(
        cls,
        stars: Mapping[int, CcdStars],
        camera: Camera,
        pointing: tuple[float, float, float],
        refcat: Table,
        settings: AstrometrySettings,
        model_settings: ExposureAstrometrySettings,
    ) -> "ExposureField":
        """Make the field of measured stars; ``pointing`` is (ra, dec, rotation), degrees."""
        sky = np.stack([np.asarray(refcat[name], float) for name in ("ra", "dec")])
        magnitude = np.asarray(np.ma.filled(refcat["mag"], np.nan), float)
        by_magnitude = np.argsort(magnitude, kind="stable")
        ccds = {n: _field_ccd(stars[n], n, camera, pointing, settings) for n in sorted(stars)}
        return cls(camera, *pointing, refcat, sky, by_magnitude, settings, model_settings, ccds)

    @property
    def radius(self) -> float:
        """Distance of the farthest corner from the origin, field pixels."""
        return max(float(np.hypot(*ccd.where.edge).max()) for ccd in self.ccds.values())

    def pointed(self, model: FieldModel, margin: float) -> "ExposureField":
        """Return the field with the reference stars within a margin of its CCDs, field pixels."""
        catalogue = model.catalogue(self.sky[:, self.by_magnitude])
        ccds = {}
        for number, ccd in self.ccds.items():
            centre = model.expected(ccd.where, ccd.where.centre)
            # NaN compares as false
            near = np.hypot(*(catalogue - centre)) <= 1.1 * ccd.reach + margin
            ccds[number] = replace(ccd, near=self.by_magnitude[near])
        return replace(self, ccds=ccds)

    def predicted_wcs(self, ccd: FieldCcd) -> WCS:
        """Return the WCS of a CCD for the predicted pointing."""
        return predicted_wcs(self.camera, ccd.where.detector, self.ra, self.dec, self.rotation)

    def references_of(self, ccd: FieldCcd) -> IndexArray:
        """Return the rows of the reference stars that may be on a CCD."""
        return stars_in_cone(self.refcat, *ccd.cone)

    def pairs(self, ccd: FieldCcd, i: IndexArray, references: IndexArray) -> CcdPairs:
        """Pair elements ``i`` of the sources to be matched with rows of the reference stars."""
        return CcdPairs(
            ccd.where,
            ccd.place[:, i],
            self.sky[:, references],
            ccd.error[i],
            ccd.sources[i],
            references,
            np.ones(i.size, bool),
        )


def _field_ccd(
    stars: CcdStars,
    number: int,
    camera: Camera,
    pointing: tuple[float, float, float],
    settings: AstrometrySettings,
) -> FieldCcd:
    detector = camera.detector(number)
    where = CcdPlace(camera, detector, pointing[2])
    cone = ccd_cone(camera, detector, *pointing, settings.max_pointing_error / 60.0)
    sources = stars.brightest_first(settings.max_sources)
    error = np.hypot(stars.centroid_error, settings.centroid_floor)
    sources = sources[np.isfinite(error[sources])]
    place = where.field(stars.x[sources], stars.y[sources])
    return FieldCcd(number, stars, where, sources, place, error[sources], cone)
