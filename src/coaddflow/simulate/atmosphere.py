"""What the air does to positions and to the PSF: turbulence, refraction, dispersion.

References
----------
.. [1] Bernstein et al. 2017, PASP 129, 074503 (turbulence moves stars by 10 to 30 mas in 30 s,
   coherently over 5 to 10 arcmin; it has no curl).
.. [2] Heymans et al. 2012, MNRAS 421, 381 (ellipticity by the atmosphere, on scales of arcmin).
.. [3] Filippenko 1982, PASP 94, 715 (refraction and dispersion).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from coaddflow.geometry import sphere
from coaddflow.simulate.observations import Observation
from coaddflow.simulate.settings import SimulationSettings
from coaddflow.simulate.streams import stream

FloatArray = NDArray[np.float64]

_WAVELENGTHS = (4.0, 60.0)
"""Shortest and longest wave, arcmin."""

_N_WAVES = 100
_REFRACTION = 58.3
"""Arcsec at a zenith distance of 45 degrees."""


@dataclass(frozen=True)
class Waves:
    """A smooth random field on the tangent plane: a sum of waves, the long ones the stronger."""

    vector: FloatArray
    """Angular wave numbers, radians per degree; shape (2, n)."""
    phase: FloatArray
    strength: FloatArray
    """Of each wave, so that the field has an rms of 1; shape (n,)."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Waves":
        """Draw a field; its power falls as that of Kolmogorov's turbulence."""
        wavelength = np.exp(rng.uniform(*np.log(_WAVELENGTHS), _N_WAVES)) / 60.0
        angle, phase = rng.uniform(0.0, 2.0 * np.pi, (2, _N_WAVES))
        strength = rng.normal(size=_N_WAVES) * wavelength ** (5.0 / 6.0)
        strength /= np.sqrt(np.sum(strength**2) / 2.0)
        return cls(
            2.0 * np.pi / wavelength * np.stack([np.cos(angle), np.sin(angle)]), phase, strength
        )

    def value(self, plane: FloatArray) -> FloatArray:
        """Return the field at points of the plane (2, ...), degrees; its rms is 1."""
        return self._sum(plane, self.strength)

    def flow(self, plane: FloatArray) -> FloatArray:
        """Return a vector field without curl at points (2, ...); its rms in each axis is 1."""
        direction = self.vector / np.hypot(*self.vector)
        along = np.sqrt(2.0) * direction * self.strength
        return np.stack([self._sum(plane, one) for one in along])

    def _sum(self, plane: FloatArray, strength: FloatArray) -> FloatArray:
        waves = np.sin(np.tensordot(np.moveaxis(plane, 0, -1), self.vector, 1) + self.phase)
        return waves @ strength


@dataclass(frozen=True)
class Atmosphere:
    """The air above one exposure."""

    settings: SimulationSettings
    observation: Observation

    def apparent(
        self, ra: ArrayLike, dec: ArrayLike, color: ArrayLike | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Return where sources appear: displaced by turbulence, refraction and dispersion.

        The displacement of the pointing itself is left out: the telescope follows it.

        Parameters
        ----------
        ra, dec : array_like, shape (n,)
            ICRS, degrees.
        color : array_like, optional
            Colours of the sources; that of an average star if not given.
        """
        air, seen = self.settings.atmosphere, self.observation
        if not (air.turbulence or air.zenith_distance):
            return np.asarray(ra, float), np.asarray(dec, float)
        plane = np.stack(sphere.tan_project(ra, dec, seen.ra, seen.dec))
        moved = plane + air.turbulence / 3.6e6 * self._waves("turbulence").flow(plane)
        if air.zenith_distance:
            moved += self._refraction(plane, color)
        return sphere.tan_deproject(*moved, seen.ra, seen.dec)

    def _refraction(self, plane: FloatArray, color: ArrayLike | None) -> FloatArray:
        """Return how far sources are lifted more than the pointing, degrees, shape (2, ...)."""
        distance, angle = np.radians(self.observation.zenith)
        up = np.array([np.sin(angle), np.cos(angle)])
        height = np.radians(np.tensordot(up, plane, 1))
        lift = _REFRACTION * (np.tan(distance - height) - np.tan(distance))
        if color is not None:
            red = np.asarray(color, float) - self.settings.stars.color
            lift = lift - self.settings.atmosphere.dispersion / 1000.0 * np.tan(distance) * red
        return np.multiply.outer(up, lift / 3600.0)

    def seeing(self, plane: FloatArray) -> FloatArray:
        """Return the factor of the FWHM at points of the focal plane (2, ...), degrees."""
        amount = self.settings.atmosphere.seeing_structure
        return (
            1.0 + amount * self._waves("seeing").value(plane) if amount else np.ones_like(plane[0])
        )

    def shear(self, plane: FloatArray) -> FloatArray:
        """Return the shear (g1 + i g2) of the PSF at points of the focal plane (2, ...)."""
        amount = self.settings.atmosphere.shear_structure
        if not amount:
            return np.zeros_like(plane[0], dtype=complex)
        first, second = (self._waves(f"shear {axis}").value(plane) for axis in (1, 2))
        return amount * (first + 1j * second)

    def _waves(self, what: str) -> Waves:
        seen = self.observation
        return Waves.draw(stream(self.settings.seed, what, seen.kind, seen.exposure))
