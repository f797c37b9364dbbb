"""Settings of the solution of a tract: astrometry and photometry of all its exposures together."""

from typing import Literal

from pydantic import Field

from coaddflow.settings.base import Section


class LinkingSettings(Section):
    """Which detections of different exposures are the same star."""

    radius: float = Field(1.0, gt=0, le=10)
    """Largest distance of a detection from its star, arcsec."""
    isolation: float = Field(2.0, ge=1)
    """Stars with a neighbour within this many radii are not used: their detections may be swapped
    or blended."""
    min_detections: int = Field(2, ge=1)
    """Fewest exposures with a star that is not in the reference catalogue."""


class TractAstrometrySettings(Section):
    """Positions: maps of the exposures, distortion of the detectors, positions of the stars."""

    order: int = Field(6, ge=1, le=8)
    """Order of the polynomial of each exposure over the field; lowered for few stars."""
    detector_order: int = Field(4, ge=1, le=6)
    """Order of the polynomial of each detector, shared by all exposures."""
    stars_per_term: float = Field(3.0, ge=1.5)
    """Fewest stars of an exposure per coefficient of its polynomial in one axis."""
    max_corner_error: float = Field(2.5, gt=0)
    """The order of an exposure is lowered until the formal error of its polynomial, everywhere on
    its CCDs, is below this times the error of one star."""
    detector_sigma: float = Field(2.0, gt=0)
    """Expected size of the coefficients of the detectors beyond the camera file, pixels: of what
    exposures can describe almost as well."""
    shift_sigma: float = Field(0.1, gt=0)
    """Expected shift of a CCD between two epochs of the instrument, pixels."""
    error_floor: float = Field(0.003, ge=0)
    """Added in quadrature to all centroid errors, pixels."""
    reference_floor: float = Field(0.2, ge=0)
    """Added in quadrature to the errors of the reference positions, mas."""
    motions: Literal["solved", "catalogue"] = "solved"
    """Proper motions and parallaxes of the stars: solved, with those of the reference catalogue and
    their errors as a priori values, or taken from it (0 for stars that it does not have)."""
    motion_sigma: float = Field(10.0, gt=0)
    """Expected proper motion of a star without a known one, mas/yr."""
    parallax_sigma: float = Field(1.0, gt=0)
    """Expected parallax of a star without a known one, mas."""
    dispersion: bool = True
    """Solve the differential chromatic refraction, one coefficient for each band."""
    clip_sigma: float = Field(4.0, gt=1)
    """Detections farther than this many sigma from their star are rejected."""
    max_iterations: int = Field(6, ge=1)
    """Most linearisations of the solution."""


class WaveSettings(Section):
    """A smooth random field in each exposure (Gaussian process), as a sum of waves."""

    enabled: bool = True
    """Fit the field."""
    shortest_wave: float = Field(8.0, gt=0)
    """Shortest wavelength, arcmin: time grows with its sixth power."""
    margin: float = Field(20.0, gt=0)
    """Free space around the field, arcmin: the waves are periodic in the box with it."""
    min_stars: int = Field(200, ge=10)
    """Exposures with fewer stars have no field."""
    rounds: int = Field(2, ge=1)
    """Fits of field and stars in turn."""


class TractPhotometrySettings(Section):
    """Zero-points of the exposures, illumination correction, magnitudes of the stars."""

    order: int = Field(3, ge=0, le=8)
    """Order of the polynomial of each exposure over the field, which begins with its zero-point;
    lowered for few stars."""
    stars_per_term: float = Field(10.0, ge=1.5)
    """Fewest stars of an exposure per coefficient of its polynomial."""
    illumination_order: int = Field(3, ge=0, le=6)
    """Order of the polynomial of each CCD of a band, shared by all exposures."""
    illumination_sigma: float = Field(0.05, gt=0)
    """Expected size of the coefficients of the illumination correction, mag."""
    color_terms: dict[str, float] = Field(default_factory=dict)
    """Slope of (magnitude in the band of the camera - reference magnitude) with colour, by band;
    the slopes of other bands are fitted."""
    extinction_by_color: bool = True
    """Solve how the extinction per airmass changes with colour, one coefficient for each band."""
    error_floor: float = Field(0.001, ge=0)
    """Added in quadrature to all magnitude errors, mag."""
    reference_floor: float = Field(0.01, ge=0)
    """Added in quadrature to the errors of the reference magnitudes, mag."""
    clip_sigma: float = Field(4.0, gt=1)
    """Detections farther than this many sigma from their star are rejected."""
    max_iterations: int = Field(6, ge=1)
    """Most fits, each with the weights of the one before."""
    withheld: float = Field(0.1, ge=0, lt=1)
    """Fraction of the stars that are not used and judge the solution."""


class SolutionSettings(Section):
    """Calibration of all exposures of a tract together."""

    enabled: bool = False
    """Solve the exposures of a tract together."""
    linking: LinkingSettings = Field(default_factory=LinkingSettings)
    astrometry: TractAstrometrySettings = Field(default_factory=TractAstrometrySettings)
    turbulence: WaveSettings = Field(default_factory=WaveSettings)
    """What the atmosphere leaves in positions: a field without curl."""
    clouds: WaveSettings = Field(default_factory=WaveSettings)
    """What thin clouds leave in magnitudes."""
    photometry: TractPhotometrySettings = Field(default_factory=TractPhotometrySettings)
