"""Settings of the PSF model."""

from pydantic import Field

from coaddflow.settings.base import Section


class PsfSettings(Section):
    """PSF model and the stars that it is made from."""

    min_signal_to_noise: float = Field(50.0, gt=0)
    """Minimum signal-to-noise of the stars; lowered where there are few."""
    max_stars: int = Field(300, ge=1)
    """Number of brightest stars that are used."""
    min_stars: int = Field(3, ge=1)
    """Fewest stars; with fewer the CCD fails."""
    size_tolerance: float = Field(0.1, gt=0)
    """Largest relative deviation of a star's half-light radius."""
    order: int = Field(2, ge=0, le=4)
    """Order of the polynomial over the CCD; lowered for few stars."""
    stars_per_term: float = Field(5.0, ge=1)
    """Stars needed per term of the polynomial."""
    radius: float = Field(4.0, ge=2)
    """Half width of the model, in FWHM."""
    samples_per_fwhm: float = Field(5.0, ge=2)
    """Samples of the model per FWHM."""
    accuracy: float = Field(0.01, ge=0)
    """Relative error of the model assumed in the weights of pixels."""
    clip_sigma: float = Field(4.0, gt=0)
    """Stars that fit worse than this many robust sigma are rejected."""
