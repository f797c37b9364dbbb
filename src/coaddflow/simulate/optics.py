"""What the optics of an exposure do: true positions, PSF over the field, illumination.

References
----------
.. [1] Moffat 1969, A&A 3, 455.
.. [2] Fried 1966, JOSA 56, 1372 (Kolmogorov turbulence).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import RectBivariateSpline

from coaddflow.geometry import sphere
from coaddflow.instrument.camera import Camera, Detector, outline
from coaddflow.simulate.atmosphere import Atmosphere
from coaddflow.simulate.observations import Observation
from coaddflow.simulate.settings import SimulationSettings
from coaddflow.simulate.streams import stream

FloatArray = NDArray[np.float64]
Surface = Callable[[FloatArray, FloatArray], FloatArray]

_GRID = 9
"""Points in each direction of the coarse grid on which smooth functions are computed."""


def field_radius(camera: Camera) -> float:
    """Return the distance of the outermost corner of a CCD from the centre of the field, mm."""
    corners = [camera.pixel_to_focal(d, *outline(d.size, 1)) for d in camera.detectors]
    return float(max(np.hypot(x, y).max() for x, y in corners))


def true_camera(
    camera: Camera, settings: SimulationSettings, observation: Observation | None = None
) -> Camera:
    """Return the camera as it really is, which its file describes only nearly.

    CCDs are displaced; scale and distortion are those of an exposure, if one is given. With this
    camera, pixels and sky of the simulated exposure belong together exactly.
    """
    scale = observation.scale if observation else 0.0
    factor = (1.0 + observation.distortion) if observation else 1.0
    distortion = [a * factor for a in camera.distortion] if settings.optics.distortion else []
    return Camera.model_validate(
        {
            **dict(camera),
            "pixel_scale": camera.pixel_scale * (1.0 + scale),
            "distortion": distortion,
            "detectors": [_displaced(camera, settings, one) for one in camera.detectors],
        }
    )


def _displaced(camera: Camera, settings: SimulationSettings, detector: Detector) -> Detector:
    rng = stream(settings.seed, "mount", detector.id)
    shift = settings.optics.ccd_shift * camera.pixel_size * rng.normal(size=2)
    center = (detector.center[0] + float(shift[0]), detector.center[1] + float(shift[1]))
    rotation = detector.rotation + settings.optics.ccd_rotation * float(rng.normal())
    return detector.model_copy(update={"center": center, "rotation": rotation})


@dataclass(frozen=True)
class Optics:
    """The optics of one exposure, with the `true_camera`; ``radius`` of the field in mm."""

    camera: Camera
    settings: SimulationSettings
    observation: Observation
    radius: float

    @cached_property
    def atmosphere(self) -> Atmosphere:
        """The air above the exposure."""
        return Atmosphere(self.settings, self.observation)

    def sky_to_pixel(
        self, detector: Detector, ra: ArrayLike, dec: ArrayLike, color: ArrayLike | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Return the true pixels of sources (of a colour); NaN far outside the field."""
        seen = self.observation
        ra, dec = self.atmosphere.apparent(ra, dec, color)
        return self.camera.sky_to_pixel(detector, ra, dec, seen.ra, seen.dec, seen.rotation)

    def jacobian(self, detector: Detector, x: ArrayLike, y: ArrayLike) -> FloatArray:
        """Return d(east, north)/d(x, y) in arcsec per pixel, shape (..., 2, 2)."""
        seen = self.observation
        x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
        columns = []
        for dx, dy in ((0.5, 0.0), (0.0, 0.5)):
            a, b = (
                sphere.to_vector(
                    *self.camera.pixel_to_sky(
                        detector, x + s * dx, y + s * dy, seen.ra, seen.dec, seen.rotation
                    )
                )
                for s in (-1, 1)
            )
            columns.append(b - a)
        ra, dec = self.camera.pixel_to_sky(detector, x, y, seen.ra, seen.dec, seen.rotation)
        east = sphere.to_vector(ra + 90.0, np.zeros_like(dec))
        north = np.cross(sphere.to_vector(ra, dec), east)
        rows = [
            np.stack([np.sum(axis * column, axis=-1) for column in columns], axis=-1)
            for axis in (east, north)
        ]
        return np.degrees(np.stack(rows, axis=-2)) * 3600.0

    def psf_at(
        self, detector: Detector, x: ArrayLike, y: ArrayLike
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return FWHM (arcsec) and shear (g1, g2, along the pixel axes) of the PSF."""
        u, v = self._field(detector, x, y)
        seen = self.observation
        size = seen.psf_size
        fwhm = seen.seeing * (1.0 + size[0] * u + size[1] * v + size[2] * (u**2 + v**2))
        g1, g2, g1_x, g1_y, g2_x, g2_y = seen.psf_shear
        g1, g2 = g1 + g1_x * u + g1_y * v, g2 + g2_x * u + g2_y * v
        plane = np.stack([u, v]) * self.radius * self.camera.degrees_per_mm
        fwhm = fwhm * self.atmosphere.seeing(plane)
        # from the axes of the focal plane to those of the CCD
        turn = np.exp(-2j * np.radians(detector.rotation)) * (
            g1 + 1j * g2 + self.atmosphere.shear(plane)
        )
        strength = np.minimum(1.0, 0.3 / np.maximum(np.abs(turn), 1e-9))
        return np.maximum(fwhm, 0.3 * seen.seeing), turn.real * strength, turn.imag * strength

    def transmission(self, detector: Detector) -> NDArray[np.float32]:
        """Return the part of the light that arrives at each pixel through vignetting alone."""
        return self._on_pixels(
            detector,
            lambda x, y: (
                1.0 - self.settings.optics.vignetting * np.hypot(*self._field(detector, x, y)) ** 4
            ),
        )

    def clouds_at(self, detector: Detector, x: ArrayLike, y: ArrayLike) -> FloatArray:
        """Return the part of the light that clouds let through."""
        u, v = self._field(detector, x, y)
        a, b, c = self.observation.extinction
        return 10.0 ** (-0.4 * np.maximum(a + b * u + c * v, 0.0))

    def pixel_area(self, detector: Detector) -> NDArray[np.float32]:
        """Return the solid angle of each pixel, square arcsec."""
        if not self.settings.optics.pixel_area:
            return np.full(detector.shape, self.camera.pixel_scale**2, dtype=np.float32)
        return self._on_pixels(
            detector, lambda x, y: np.abs(np.linalg.det(self.jacobian(detector, x, y)))
        )

    def sky_factor(self, detector: Detector) -> NDArray[np.float32]:
        """Return the sky's brightness relative to that of the band's settings."""
        level, along_x, along_y = self.observation.sky

        def brightness(x: FloatArray, y: FloatArray) -> FloatArray:
            u, v = self._field(detector, x, y)
            return level * np.maximum(1.0 + along_x * u + along_y * v, 0.05)

        return self._on_pixels(detector, brightness)

    def _field(
        self, detector: Detector, x: ArrayLike, y: ArrayLike
    ) -> tuple[FloatArray, FloatArray]:
        """Return positions in the focal plane in units of the field's radius."""
        x_mm, y_mm = self.camera.pixel_to_focal(detector, x, y)
        return x_mm / self.radius, y_mm / self.radius

    def _on_pixels(self, detector: Detector, function: Surface) -> NDArray[np.float32]:
        """Return a smooth function of (x, y) on all pixels."""
        nx, ny = detector.size
        x, y = np.linspace(-0.5, nx - 0.5, _GRID), np.linspace(-0.5, ny - 0.5, _GRID)
        values = function(*np.meshgrid(x, y))
        spline = RectBivariateSpline(y, x, values, kx=3, ky=3)
        return spline(np.arange(ny), np.arange(nx)).astype(np.float32)
