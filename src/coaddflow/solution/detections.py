"""What a solution is made from: detections of stars, exposures, and the reference catalogue.

References
----------
.. [1] Kovalevsky & Seidelmann 2004, Fundamentals of Astrometry, section 6.2 (parallax).
.. [2] Filippenko 1982, PASP 94, 715 (atmospheric dispersion).
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
from astropy.coordinates import get_body_barycentric
from astropy.time import Time
from numpy.typing import ArrayLike, NDArray

from coaddflow.geometry.sphere import from_vector, to_vector

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int32]

MAS = 3.6e6
"""Milliarcseconds in a degree."""

_J2000, _DAYS_PER_YEAR = 51544.5, 365.25


def rows_between(ends: NDArray[np.int64]) -> list[slice]:
    """Return the rows of each exposure, from those with which they begin (`Detections.ends`)."""
    return [slice(*pair) for pair in itertools.pairwise(ends.tolist())]


def relative_colors(color: FloatArray) -> tuple[FloatArray, float]:
    """Return colours relative to the median one, 0 where they are NaN (not known); and that one."""
    known = np.isfinite(color)
    median = float(np.median(color[known])) if known.any() else 0.0
    return np.where(known, color - median, 0.0), median


@dataclass(frozen=True)
class Detections:
    """Stars as the exposures have them, sorted by exposure, then by CCD.

    Attributes
    ----------
    exposure, ccd : ndarray of int32, shape (n,)
        Numbers in `Exposures` and in `DetectorMaps`.
    x, y : ndarray of float64, shape (n,)
        Pixels, 0-based.
    error : ndarray of float32, shape (n,)
        Centroid error, mean of both axes, pixels.
    ra, dec : ndarray of float64, shape (n,)
        ICRS positions by the WCS of the calexp, degrees.
    magnitude, magnitude_error : ndarray of float32, shape (n,)
        Instrumental: -2.5 log10 of electrons per second.
    """

    exposure: IndexArray
    ccd: IndexArray
    x: FloatArray
    y: FloatArray
    error: NDArray[np.float32]
    ra: FloatArray
    dec: FloatArray
    magnitude: NDArray[np.float32]
    magnitude_error: NDArray[np.float32]

    def __post_init__(self):
        """Refuse detections that are not sorted."""
        cell = self.exposure.astype(np.int64) << 32 | self.ccd
        if np.any(cell[1:] < cell[:-1]):
            raise ValueError("detections must be sorted by exposure and CCD")

    def __len__(self) -> int:
        return len(self.exposure)

    @classmethod
    def join(cls, parts: Iterable["Detections"]) -> "Detections":
        """Return the detections of several parts, which follow each other in this order."""
        columns = zip(*(part.columns() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    def columns(self) -> list[NDArray]:
        """Return the arrays in the order of the attributes."""
        return [getattr(self, field.name) for field in fields(self)]

    def ends(self, n_exposures: int) -> NDArray[np.int64]:
        """Return the first detection of each exposure, and the number of all."""
        return np.searchsorted(self.exposure, np.arange(n_exposures + 1))

    def take(self, rows: NDArray | slice) -> "Detections":
        """Return some of the detections."""
        return Detections(*(column[rows] for column in self.columns()))


@dataclass(frozen=True)
class Exposures:
    """Facts of the exposures of a solution.

    Attributes
    ----------
    name : tuple of str
        Ids.
    ra, dec : ndarray of float64, shape (n,)
        Tangent points of their maps, ICRS degrees: the pointings.
    mjd : ndarray of float64, shape (n,)
        Middle, MJD TAI.
    band : ndarray of int32, shape (n,)
        Number of the band in ``bands``.
    epoch : ndarray of int32, shape (n,)
        Number of the epoch of the instrument, in which its CCDs do not move: it ends when the
        camera is warmed up or opened.
    zenith : ndarray of float64, shape (n, 2)
        Direction to the zenith (east, north) times the tangent of the zenith distance; zeros
        where not known, which leaves out the refraction by colour.
    bands : tuple of str
        Names of the bands.
    """

    name: tuple[str, ...]
    ra: FloatArray
    dec: FloatArray
    mjd: FloatArray
    band: IndexArray
    epoch: IndexArray
    zenith: FloatArray
    bands: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.name)

    @property
    def airmass(self) -> FloatArray:
        """Secant of the zenith distance."""
        return np.hypot(1.0, np.hypot(*self.zenith.T))

    @property
    def year(self) -> FloatArray:
        """Julian year."""
        return 2000.0 + (self.mjd - _J2000) / _DAYS_PER_YEAR

    def only(self, number: int) -> "Exposures":
        """Return one of the exposures."""
        one = slice(number, number + 1)
        arrays = (self.ra, self.dec, self.mjd, self.band, self.epoch, self.zenith)
        return Exposures(self.name[one], *(array[one] for array in arrays), self.bands)


@dataclass(frozen=True)
class ReferenceStars:
    """Stars of the reference catalogue. NaN stands for what it does not know.

    Attributes
    ----------
    ra, dec : ndarray of float64, shape (n,)
        ICRS degrees at ``year``.
    error : ndarray of float64, shape (n,)
        Of one axis, mas.
    motion : ndarray of float64, shape (n, 2)
        Proper motion in right ascension, times cos(dec), and in declination, mas/yr.
    motion_error : ndarray of float64, shape (n,)
        mas/yr.
    parallax, parallax_error : ndarray of float64, shape (n,)
        mas.
    magnitude, magnitude_error : ndarray of float64, shape (n, n bands)
        AB magnitudes in the bands of the catalogue.
    year : float
        Epoch of the positions, Julian year.
    """

    ra: FloatArray
    dec: FloatArray
    error: FloatArray
    motion: FloatArray
    motion_error: FloatArray
    parallax: FloatArray
    parallax_error: FloatArray
    magnitude: FloatArray
    magnitude_error: FloatArray
    year: float

    def __len__(self) -> int:
        return len(self.ra)


@dataclass(frozen=True)
class TractFrame:
    """Longitude and latitude around the tract: its centre is (0, 0), north stays up.

    Near its equator the axes of all tangent planes are parallel to 1e-3 on a field of 2 degrees,
    and there are no poles: derivatives of positions by parameters of stars are 1.

    Attributes
    ----------
    ra, dec : float
        Centre, ICRS degrees.
    """

    ra: float
    dec: float

    def of_sky(self, ra: ArrayLike, dec: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Return longitude (-180 to 180) and latitude of ICRS positions, all in degrees."""
        vector = to_vector(np.asarray(ra, float) - self.ra, dec)
        longitude, latitude = from_vector(self._tilted(vector, -1.0))
        return (longitude + 180.0) % 360.0 - 180.0, latitude

    def to_sky(self, longitude: ArrayLike, latitude: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """Invert `of_sky`."""
        ra, dec = from_vector(self._tilted(to_vector(longitude, latitude), 1.0))
        return (ra + self.ra) % 360.0, dec

    def turned(self, ra: ArrayLike, dec: ArrayLike, vectors: FloatArray) -> FloatArray:
        """Return small vectors (east, north), shape (n, 2), at ICRS positions along these axes."""
        step = 1e-4
        low, high = (self.of_sky(ra, np.asarray(dec) + sign * step) for sign in (-0.5, 0.5))
        # towards the north: the difference of both ends, well within the poles' reach of `of_sky`
        north = np.stack([(high[0] - low[0]) * np.cos(np.radians(low[1])), high[1] - low[1]])
        x, y = north / np.hypot(*north)
        east, up = vectors.T
        return np.stack([east * y + up * x, -east * x + up * y], axis=1)

    def parallax_factors(self, mjd: FloatArray, longitude: FloatArray, latitude: FloatArray):
        """Return the displacement of a star by its parallax of 1, along both axes, shape (n, 2).

        Parameters
        ----------
        mjd : ndarray of float64, shape (n,)
            MJD TAI.
        longitude, latitude : ndarray of float64, shape (n,)
            Direction in this frame, degrees.
        """
        earth = get_body_barycentric("earth", Time(mjd, format="mjd", scale="tai"))
        place = np.stack([axis.to_value("AU") for axis in earth.xyz], axis=-1)
        angle = np.radians(self.ra)
        turn = np.array([[np.cos(angle), np.sin(angle), 0], [-np.sin(angle), np.cos(angle), 0]])
        place = self._tilted(np.concatenate([place @ turn.T, place[:, 2:]], axis=1), -1.0)
        longitude, latitude = np.radians(longitude), np.radians(latitude)
        east = np.stack([-np.sin(longitude), np.cos(longitude), 0.0 * longitude], axis=1)
        north = np.stack(
            [
                -np.sin(latitude) * np.cos(longitude),
                -np.sin(latitude) * np.sin(longitude),
                np.cos(latitude),
            ],
            axis=1,
        )
        return -np.stack([np.sum(place * east, axis=1), np.sum(place * north, axis=1)], axis=1)

    def _tilted(self, vector: FloatArray, sign: float) -> FloatArray:
        """Return vectors (n, 3) turned about the second axis by the declination of the centre."""
        cos, sin = np.cos(np.radians(self.dec)), sign * np.sin(np.radians(self.dec))
        x, y, z = np.moveaxis(vector, -1, 0)
        return np.stack([cos * x - sin * z, y, sin * x + cos * z], axis=-1)
