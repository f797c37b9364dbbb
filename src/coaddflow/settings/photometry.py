"""Settings of fluxes and zero-points."""

from typing import Literal

from pydantic import Field, model_validator

from coaddflow.settings.base import Section


class PhotometrySettings(Section):
    """Fluxes, aperture correction and zero-point."""

    radii: tuple[float, ...] = Field((1.0, 1.5, 2.5), min_length=1)
    """Radii of the apertures, in FWHM."""
    standard: int = Field(1, ge=0)
    """Aperture, counted from 0, to which the aperture correction applies."""
    total_radius: float = Field(5.0, gt=0)
    """Radius that contains the total flux of a star, in FWHM."""
    zero_point_flux: Literal["psf", "aperture"] = "psf"
    """Flux used for the zero-point; both are corrected to total."""
    clip_sigma: float = Field(3.0, gt=0)
    """Stars farther than this many sigma from the zero-point are rejected."""
    min_zero_point_stars: int = Field(3, ge=1)
    """Fewest stars of known magnitude; with fewer the CCD fails."""
    error_floor: float = Field(0.005, ge=0)
    """Added in quadrature to the error of every magnitude, mag."""

    @model_validator(mode="after")
    def _check(self) -> "PhotometrySettings":
        if self.standard >= len(self.radii):
            raise ValueError(f"standard: there are only {len(self.radii)} apertures")
        if max(self.radii) >= self.total_radius or list(self.radii) != sorted(set(self.radii)):
            raise ValueError("radii must increase and stay below total_radius")
        return self
