"""Where pixels are in the field of the camera: a polynomial for each detector.

The field has the axes of the tangent plane at rotation 0, in degrees from the optical axis. The
polynomials begin with what the camera file, or the WCS of one exposure, says; the solution adds
the distortion that all exposures share, and the shifts of the CCDs in an epoch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix, term_powers
from coaddflow.instrument.camera import Camera

FloatArray = NDArray[np.float64]

_ORDER = 5
"""Order of the polynomials: with it those of DECam follow its camera file to 1e-4 pixel."""

_NODES = 12


@dataclass(frozen=True)
class DetectorMaps:
    """Polynomials from the pixels of detectors to the field.

    Attributes
    ----------
    ccd : ndarray of int64, shape (n,)
        Numbers of the detectors in the camera; elsewhere they are counted in this order.
    size : ndarray of int64, shape (n, 2)
        Pixels (nx, ny).
    coefficients : ndarray of float64, shape (n, 2, n terms)
        Degrees; of both axes of the field, terms as in `term_powers`, in the positions of `unit`.
    """

    ccd: NDArray[np.int64]
    size: NDArray[np.int64]
    coefficients: FloatArray

    def __len__(self) -> int:
        return len(self.ccd)

    @classmethod
    def fit(
        cls,
        mappings: Mapping[int, Callable[[FloatArray, FloatArray], tuple[FloatArray, FloatArray]]],
        sizes: Mapping[int, tuple[int, int]],
    ) -> "DetectorMaps":
        """Fit the polynomials to given mappings.

        Parameters
        ----------
        mappings : mapping of int to callable
            For each detector, from pixels x, y (0-based) to the field, degrees. Those of an
            exposure at rotation 0 are `tan_project` of its WCS about the pointing.
        sizes : mapping of int to tuple of int
            Pixels (nx, ny) of each.
        """
        nodes = np.cos(np.pi * (np.arange(_NODES) + 0.5) / _NODES)
        s, t = (grid.ravel() for grid in np.meshgrid(nodes, nodes))
        coefficients = []
        for ccd, to_field in mappings.items():
            nx, ny = sizes[ccd]
            x, y = (nx - 1) / 2.0 + s * nx / 2.0, (ny - 1) / 2.0 + t * ny / 2.0
            half = max(nx, ny) / 2.0
            design = design_matrix(s * nx / 2.0 / half, t * ny / 2.0 / half, _ORDER)
            field = np.stack(to_field(x, y), axis=1)
            coefficients.append(np.linalg.lstsq(design, field, rcond=None)[0].T)
        size = np.array([sizes[ccd] for ccd in mappings])
        return cls(np.array(list(mappings)), size, np.array(coefficients))

    @classmethod
    def of_camera(cls, camera: Camera) -> "DetectorMaps":
        """Take the places of the detectors and the distortion from a camera file."""

        def to_field(detector):
            return lambda x, y: camera.focal_to_tangent(
                *camera.pixel_to_focal(detector, x, y), -camera.rotation_offset
            )

        detectors = camera.detectors
        mappings = {detector.id: to_field(detector) for detector in detectors}
        return cls.fit(mappings, {detector.id: detector.size for detector in detectors})

    @property
    def order(self) -> int:
        """Order of the polynomials."""
        return order_of(self.coefficients.shape[-1])

    @property
    def radius(self) -> float:
        """Largest distance of a corner from the optical axis, degrees."""
        return float(np.hypot(*np.moveaxis(self.corners, 1, 0)).max())

    @property
    def corners(self) -> FloatArray:
        """Field positions of the corners of all detectors, degrees, shape (n, 2, 4)."""
        return self.at(np.array([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]))

    @property
    def pixel_scale(self) -> FloatArray:
        """Degrees per pixel at the centres, shape (n,)."""
        linear = self.coefficients[:, :, 1:3] / self.half[:, None, None]
        return np.sqrt(np.abs(np.linalg.det(linear)))

    @property
    def half(self) -> FloatArray:
        """Half of the longer sides, pixels, shape (n,): the unit of `unit`."""
        return self.size.max(axis=1) / 2.0

    def unit(self, index: NDArray, x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return pixels relative to the centre of their detector, in units of `half`.

        ``index`` is the number of each pixel's detector here.
        """
        centre, half = (self.size - 1) / 2.0, self.half[index]
        return (x - centre[index, 0]) / half, (y - centre[index, 1]) / half

    def place(self, index: NDArray, u: FloatArray, v: FloatArray) -> FloatArray:
        """Return the field positions, degrees, shape (n, 2), of positions of `unit`."""
        return np.einsum("nt,nat->na", design_matrix(u, v, self.order), self.coefficients[index])

    def locate(
        self, ccd: int, x: ArrayLike, y: ArrayLike, exposure: str
    ) -> tuple[int, tuple[FloatArray, FloatArray], FloatArray]:
        """Return the number of a CCD here, and its pixels as by `unit` and by `place`.

        Parameters
        ----------
        ccd : int
            Number of the CCD in the camera.
        x, y : array_like, shape (n,)
            Pixels, 0-based.
        exposure : str
            The exposure, for the message.

        Raises
        ------
        InputError
            If there is no such CCD.
        """
        index = self.index_of(ccd, exposure)
        unit = self.unit(np.full(np.shape(x), index), np.asarray(x, float), np.asarray(y, float))
        return index, unit, design_matrix(*unit, self.order) @ self.coefficients[index].T

    def index_of(self, ccd: int, exposure: str) -> int:
        """Return the number of a CCD here; raise InputError, which names the exposure, if none."""
        found = np.flatnonzero(self.ccd == ccd)
        if len(found) == 0:
            raise InputError(
                f"the solution of exposure {exposure} has no CCD {ccd}",
                remedy="solve it again with this CCD, or leave the CCD out",
            )
        return int(found[0])

    def at(self, corner: FloatArray) -> FloatArray:
        """Return the field positions of points of all detectors, shape (n, 2, n points).

        ``corner``, shape (n points, 2), is in half sides from the centre, -1 to 1.
        """
        share = self.size / self.size.max(axis=1, keepdims=True)
        points = corner[None] * share[:, None]
        design = design_matrix(points[..., 0], points[..., 1], self.order)
        return np.einsum("kat,kpt->kap", self.coefficients, design)

    def moved(self, terms: FloatArray) -> "DetectorMaps":
        """Return the maps with polynomials (n, 2, n terms) of the same or a lower order added."""
        coefficients = self.coefficients.copy()
        coefficients[..., : terms.shape[-1]] += terms
        return replace(self, coefficients=coefficients)


def order_of(n_terms: int) -> int:
    """Return the order of the polynomials with this number of terms."""
    order = int(np.sqrt(2 * n_terms)) - 1
    if len(term_powers(order)) != n_terms:
        raise ValueError(f"no order has {n_terms} terms")
    return order
