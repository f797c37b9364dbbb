"""Settings of the steps that make the calibrated image of one CCD."""

from typing import Literal

from pydantic import Field, model_validator

from coaddflow.settings.base import Section


class BackgroundSettings(Section):
    """The sky: a mesh of superpixels in which sources are masked."""

    mesh_size: int = Field(
        128, ge=8, description="Approximate size of a superpixel, pixels (the CCD is tiled evenly)."
    )
    clip_sigma: float = Field(
        3.0, ge=1.5, description="Pixels farther than this from a superpixel's mean are left out."
    )
    mask_sigma: float = Field(
        3.0, gt=0, description="Significance from which small and large blocks are sources."
    )
    mask_passes: int = Field(
        3, ge=0, description="Times that sources are found, masked and the sky estimated again."
    )
    small_block: int = Field(4, ge=1, description="Block that finds stars, pixels.")
    large_block: int = Field(
        16, ge=1, description="Block that finds faint halos of stars and galaxies, pixels."
    )
    min_fraction: float = Field(
        0.4,
        ge=0,
        lt=1,
        description="Superpixels with less sky than this part of what the others have (median) "
        "are filled from their neighbours.",
    )
    filter_size: int = Field(
        3, ge=1, description="Width of the median filter over superpixels (odd; 1: none)."
    )

    @model_validator(mode="after")
    def _check(self) -> "BackgroundSettings":
        if self.filter_size % 2 == 0:
            raise ValueError("filter_size must be odd")
        return self


class DetectionSettings(Section):
    """Detection of sources with a matched filter."""

    threshold: float = Field(
        5.0, gt=0, description="Signal over noise in the filtered image, above which sources are."
    )
    min_pixels: int = Field(3, ge=1, description="Smallest number of pixels of a source.")
    deblend_levels: int = Field(32, ge=1, description="Levels of the deblending.")
    deblend_contrast: float = Field(
        0.005, ge=0, le=1, description="Smallest part of the flux that makes a source of its own."
    )
    initial_fwhm: float = Field(
        3.0, gt=0, description="FWHM assumed until the seeing is known, pixels."
    )
    seeing_threshold: float = Field(
        10.0, gt=0, description="Signal over noise of the sources that tell the seeing."
    )
    grow: float = Field(
        1.0, ge=0, description="Growth of the DETECTED plane around sources, in FWHM."
    )


class PsfSettings(Section):
    """The model of the PSF and the stars it is made from."""

    min_signal_to_noise: float = Field(
        50.0, gt=0, description="Signal over noise of the stars (lowered where there are few)."
    )
    max_stars: int = Field(300, ge=1, description="The brightest stars, at most so many.")
    min_stars: int = Field(3, ge=1, description="With fewer the CCD fails.")
    size_tolerance: float = Field(
        0.1, gt=0, description="Largest relative deviation of a star's half-light radius."
    )
    order: int = Field(
        2, ge=0, le=4, description="Order of the polynomial over the CCD (lowered for few stars)."
    )
    stars_per_term: float = Field(
        5.0, ge=1, description="Stars needed for each term of the polynomial."
    )
    radius: float = Field(4.0, ge=2, description="Half the width of the model, in FWHM.")
    samples_per_fwhm: float = Field(5.0, ge=2, description="Samples of the model per FWHM.")
    accuracy: float = Field(
        0.01, ge=0, description="Part of a star's light that the model is allowed to miss."
    )
    clip_sigma: float = Field(
        4.0, gt=0, description="Stars that fit worse than this are left out (in robust sigma)."
    )


class PhotometrySettings(Section):
    """Fluxes, aperture correction and zero-point."""

    radii: tuple[float, ...] = Field(
        (1.0, 1.5, 2.5), min_length=1, description="Radii of the apertures, in FWHM."
    )
    standard: int = Field(
        1, ge=0, description="Aperture (counted from 0) that the aperture correction is for."
    )
    total_radius: float = Field(
        5.0, gt=0, description="Radius that holds the total flux of a star, in FWHM."
    )
    zero_point_flux: Literal["psf", "aperture"] = Field(
        "psf", description="Fluxes that the zero-point rests on (both corrected to total)."
    )
    clip_sigma: float = Field(3.0, gt=0, description="Clipping of the zero-point's stars.")
    min_zero_point_stars: int = Field(
        3, ge=1, description="With fewer stars of known magnitude the CCD fails."
    )
    error_floor: float = Field(
        0.005, ge=0, description="Added to the error of every magnitude in quadrature, mag."
    )

    @model_validator(mode="after")
    def _check(self) -> "PhotometrySettings":
        if self.standard >= len(self.radii):
            raise ValueError(f"standard: there are only {len(self.radii)} apertures")
        if max(self.radii) >= self.total_radius or list(self.radii) != sorted(set(self.radii)):
            raise ValueError("radii must increase and stay below total_radius")
        return self


class CalexpSettings(Section):
    """What an exposure bears when some of its CCDs fail."""

    max_failed_fraction: float = Field(
        0.5, ge=0, le=1, description="An exposure fails if more of its CCDs than this failed."
    )
