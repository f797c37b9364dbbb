"""The astrometric solution of a tract, and the part of it that one exposure needs."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.geometry.polynomial import design_matrix
from coaddflow.geometry.sphere import tan_deproject
from coaddflow.solution.detections import MAS, Exposures, TractFrame
from coaddflow.solution.detector_maps import DetectorMaps, order_of
from coaddflow.solution.waves import WaveField

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class StarPositions:
    """Positions and motions of the stars.

    Attributes
    ----------
    frame : TractFrame
        Their coordinates.
    year : float
        Their epoch, Julian year.
    longitude, latitude : ndarray of float64, shape (n,)
        Where their parameters count from, degrees.
    parameters : ndarray of float64, shape (n, 5)
        Offset along both axes (degrees, true angle), proper motion (degrees/yr), parallax
        (degrees).
    covariance : ndarray of float64, shape (n, 5, 5)
        Formal, for given maps; zero for stars that have no detection that was used.
    """

    frame: TractFrame
    year: float
    longitude: FloatArray
    latitude: FloatArray
    parameters: FloatArray
    covariance: FloatArray

    def at(
        self, star: NDArray, years: ArrayLike, factors: ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """Return longitude and latitude of stars, degrees.

        Parameters
        ----------
        star : ndarray of int, shape (n,)
            Numbers of the stars.
        years : float
            Time since their epoch.
        factors : array_like, shape (2,)
            Displacement by a parallax of 1.
        """
        x, y, x_motion, y_motion, parallax = self.parameters[star].T
        x = x + x_motion * years + parallax * factors[0]
        y = y + y_motion * years + parallax * factors[1]
        latitude = self.latitude[star]
        return self.longitude[star] + x / np.cos(np.radians(latitude)), latitude + y


@dataclass(frozen=True)
class ExposureMap:
    """Pixels to the sky for one exposure: all that its warps need.

    Attributes
    ----------
    name : str
        Id of the exposure.
    frame : TractFrame
        Coordinates of the solution.
    pointing : ndarray of float64, shape (2,)
        Tangent point in the frame, degrees.
    detectors : DetectorMaps
        Pixels to the field, in the epoch of this exposure.
    radius : float
        Unit of the field, degrees.
    coefficients : ndarray of float64, shape (2, n terms)
        From the field to the tangent plane, degrees.
    color_vector : ndarray of float64, shape (2,)
        By how much the air displaces a star that is redder by 1 mag, degrees on the plane.
    field : WaveField or None
        What the air adds on the plane, mas.
    excess : float
        Scatter of positions beyond the errors of the detections, one axis, mas.
    """

    name: str
    frame: TractFrame
    pointing: FloatArray
    detectors: DetectorMaps
    radius: float
    coefficients: FloatArray
    color_vector: FloatArray
    field: WaveField | None
    excess: float

    def plane(
        self, ccd: int, x: ArrayLike, y: ArrayLike, color: ArrayLike | None = None
    ) -> FloatArray:
        """Return the tangent-plane positions in degrees of pixels (n,) of a CCD, shape (n, 2).

        Parameters
        ----------
        ccd : int
            Number of the CCD in the camera.
        x, y : array_like, shape (n,)
            Pixels, 0-based.
        color : array_like, shape (n,), optional
            Colours relative to the median one, whose displacement is taken back.

        Raises
        ------
        InputError
            If the solution does not have the CCD.
        """
        _, _, field = self.detectors.locate(ccd, x, y, self.name)
        order = order_of(self.coefficients.shape[1])
        plane = design_matrix(*field.T / self.radius, order) @ self.coefficients.T
        if self.field is not None:
            plane = plane + self.field.value(plane) / MAS
        if color is not None:
            plane = plane - np.multiply.outer(np.asarray(color), self.color_vector)
        return plane

    def to_sky(
        self, ccd: int, x: ArrayLike, y: ArrayLike, color: ArrayLike | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Return ICRS positions in degrees of pixels of a CCD; see `plane`."""
        plane = self.plane(ccd, x, y, color)
        return self.frame.to_sky(*tan_deproject(*plane.T, *self.pointing))


@dataclass(frozen=True)
class TractAstrometry:
    """The astrometric solution of a tract.

    Attributes
    ----------
    frame : TractFrame
        Its coordinates.
    exposures : Exposures
        What was solved.
    detectors : DetectorMaps
        Pixels to the field, mean of all epochs.
    radius : float
        Unit of the field, degrees.
    constants : ndarray of float64, shape (n epochs, n CCDs, 2)
        What an epoch adds to them, degrees of the field.
    coefficients : ndarray of float64, shape (n exposures, 2, n terms)
        Field to tangent plane, degrees.
    n_terms : ndarray of int64, shape (n exposures,)
        Terms that each exposure has.
    dispersion : ndarray of float64, shape (n bands,)
        Displacement by the air towards the zenith, for 1 mag of colour at a zenith distance of 45
        degrees, degrees.
    median_color : float
        Colour from which colours count.
    stars : StarPositions
        The stars.
    excess : ndarray of float64, shape (n exposures,)
        Scatter beyond the errors of the detections, one axis, mas.
    fields : tuple of WaveField or None
        Of each exposure, mas.
    kept : ndarray of bool, shape (n,)
        Detections that were used, of those with a star.
    """

    frame: TractFrame
    exposures: Exposures
    detectors: DetectorMaps
    radius: float
    constants: FloatArray
    coefficients: FloatArray
    n_terms: NDArray[np.int64]
    dispersion: FloatArray
    median_color: float
    stars: StarPositions
    excess: FloatArray
    fields: tuple[WaveField | None, ...]
    kept: BoolArray

    @cached_property
    def pointings(self) -> FloatArray:
        """Tangent points in the frame, shape (n exposures, 2), degrees."""
        return np.stack(self.frame.of_sky(self.exposures.ra, self.exposures.dec), axis=1)

    @cached_property
    def zenith(self) -> FloatArray:
        """`Exposures.zenith` along the axes of the frame."""
        exposures = self.exposures
        return self.frame.turned(exposures.ra, exposures.dec, exposures.zenith)

    @cached_property
    def times(self) -> tuple[FloatArray, FloatArray]:
        """Years since the epoch of the stars, (n,), and displacements by a parallax of 1, (n, 2).

        Those of the middle of an exposure are taken for all its stars.
        """
        factors = self.frame.parallax_factors(self.exposures.mjd, *self.pointings.T)
        return self.exposures.year - self.stars.year, factors

    def of_exposure(self, number: int) -> ExposureMap:
        """Return the part of one exposure, by its number."""
        exposures = self.exposures
        color = self.dispersion[exposures.band[number]] * self.zenith[number]
        return ExposureMap(
            name=exposures.name[number],
            frame=self.frame,
            pointing=self.pointings[number],
            detectors=self.detectors.moved(self.constants[exposures.epoch[number]][..., None]),
            radius=self.radius,
            coefficients=self.coefficients[number, :, : self.n_terms[number]],
            color_vector=color,
            field=self.fields[number],
            excess=float(self.excess[number]),
        )
