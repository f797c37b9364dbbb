"""Settings of the PSF model."""

from pydantic import Field

from coaddflow.settings.base import Section


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
