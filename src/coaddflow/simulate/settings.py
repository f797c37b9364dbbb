"""Settings of a simulated survey. Every effect is switched off by false or by an amount of 0."""

import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from coaddflow.errors import InputError
from coaddflow.files import check_id
from coaddflow.settings.base import Section


class BandSimulation(Section):
    """One band: how bright the sky is in it, and how long it is exposed."""

    exposures: int = Field(6, ge=0, description="Exposures on each pointing.")
    exposure_time: float = Field(120.0, gt=0, description="Exposure time, s.")
    zero_point: float = Field(
        25.6, description="AB magnitude that gives one electron per second, without clouds."
    )
    sky: float = Field(21.0, description="Brightness of the sky, AB mag per square arcsecond.")
    color: float = Field(
        0.0, description="A source's magnitude in this band is its own plus this times its colour."
    )


class SurveySimulation(Section):
    """Where and when the telescope points, and how well it knows it."""

    pointings: tuple[int, int] = Field(
        (1, 1), description="Pointings from west to east and from south to north."
    )
    spacing: tuple[float, float] = Field(
        (0.1, 0.1), description="Distance of neighbouring pointings, degrees."
    )
    dither: float = Field(
        40.0, ge=0, description="Radius in which the exposures of a pointing are offset, arcsec."
    )
    rotation: float = Field(0.0, description="Position angle of the focal plane's +y, degrees.")
    rotation_step: float = Field(
        0.0, description="Added to it from one exposure of a band to the next, degrees."
    )
    start: float = Field(60310.1, description="Start of the first science exposure, MJD TAI.")
    overhead: float = Field(30.0, ge=0, description="Time between two exposures, s.")
    pointing_error: float = Field(
        20.0, ge=0, description="Error of the header's pointing in each axis, arcsec (1 sigma)."
    )
    rotation_error: float = Field(
        0.05, ge=0, description="Error of the header's rotation, degrees (1 sigma)."
    )


class StarsSimulation(Section):
    """Stars with a power law of number counts: N(< m) proportional to 10^(slope m)."""

    density: float = Field(20.0, ge=0, description="Stars per square arcminute.")
    brightest: float = Field(13.0, description="Magnitude of the brightest.")
    faintest: float = Field(24.0, description="Magnitude of the faintest.")
    slope: float = Field(0.2, gt=0, description="Slope of the counts.")
    color: float = Field(0.7, description="Mean colour.")
    color_scatter: float = Field(0.4, ge=0, description="Scatter of the colour.")
    proper_motion: float = Field(
        0.0, ge=0, description="Proper motion in each axis, mas per year (1 sigma)."
    )


class GalaxiesSimulation(Section):
    """Galaxies with Sersic profiles."""

    density: float = Field(20.0, ge=0, description="Galaxies per square arcminute.")
    brightest: float = Field(17.5, description="Magnitude of the brightest.")
    faintest: float = Field(24.5, description="Magnitude of the faintest.")
    slope: float = Field(0.35, gt=0, description="Slope of the counts.")
    color: float = Field(0.6, description="Mean colour.")
    color_scatter: float = Field(0.3, ge=0, description="Scatter of the colour.")
    size: float = Field(0.5, gt=0, description="Median half-light radius at magnitude 22, arcsec.")
    size_slope: float = Field(
        -0.13, description="Change of the logarithm of the size with magnitude."
    )
    size_scatter: float = Field(0.4, ge=0, description="Scatter of the natural log of the size.")
    axis_ratio: float = Field(0.2, gt=0, le=1, description="Smallest axis ratio.")


class ExtraSource(Section):
    """A source put at a place, such as a galaxy larger than a CCD's background mesh."""

    ra: float = Field(ge=0, lt=360, description="ICRS, degrees.")
    dec: float = Field(ge=-90, le=90, description="ICRS, degrees.")
    magnitude: float = Field(description="AB magnitude, in bands whose `color` is 0.")
    color: float = Field(0.0, description="Colour, see `bands.*.color`.")
    half_light_radius: float = Field(0.0, ge=0, description="Arcsec; 0: a star.")
    sersic: Literal[1.0, 1.5, 2.5, 4.0] = Field(1.0, description="Sersic index.")
    axis_ratio: float = Field(1.0, gt=0, le=1, description="Minor over major axis.")
    angle: float = Field(0.0, description="Position angle of the major axis, degrees.")


class PsfSimulation(Section):
    """The PSF: over the field, and from exposure to exposure."""

    profile: Literal["moffat", "kolmogorov"] = Field("moffat", description="Radial profile.")
    beta: float = Field(3.5, gt=1.1, description="Moffat's beta.")
    seeing: float = Field(0.85, gt=0, description="Median FWHM, arcsec.")
    seeing_scatter: float = Field(
        0.12, ge=0, description="Scatter of the natural log of the FWHM from exposure to exposure."
    )
    field_size: float = Field(
        0.05, ge=0, description="Relative change of the FWHM over the field (1 sigma)."
    )
    ellipticity: float = Field(
        0.015, ge=0, description="Shear that an exposure's PSF has everywhere (1 sigma)."
    )
    field_ellipticity: float = Field(
        0.02, ge=0, description="Change of the shear over the field (1 sigma)."
    )


class OpticsSimulation(Section):
    """What the optics do to positions and brightness."""

    distortion: bool = Field(True, description="The distortion of the camera file.")
    scale_error: float = Field(
        5e-5, ge=0, description="Relative change of the scale with the exposure (1 sigma)."
    )
    distortion_error: float = Field(
        0.01, ge=0, description="Relative change of the distortion with the exposure (1 sigma)."
    )
    ccd_shift: float = Field(
        1.0, ge=0, description="Pixels by which CCDs are not where the camera file says (1 sigma)."
    )
    ccd_rotation: float = Field(
        0.01,
        ge=0,
        description="Degrees by which CCDs are rotated against the camera file (1 sigma).",
    )
    vignetting: float = Field(
        0.1, ge=0, lt=1, description="Light lost at the edge of the field, as radius^4."
    )
    pixel_area: bool = Field(
        True, description="Sky and flat field follow the solid angle of the pixels."
    )


class SkySimulation(Section):
    """The sky and the clouds."""

    enabled: bool = Field(True, description="The sky has a brightness.")
    scatter: float = Field(
        0.1, ge=0, description="Relative change of the brightness with the exposure (1 sigma)."
    )
    gradient: float = Field(
        0.03, ge=0, description="Relative change from centre to edge of the field (1 sigma)."
    )
    clouds: float = Field(0.08, ge=0, description="Mean extinction by clouds, mag (exponential).")
    cloud_structure: float = Field(
        0.005, ge=0, description="Change of the extinction from centre to edge, mag (1 sigma)."
    )


class DetectorSimulation(Section):
    """What the CCDs and their electronics do."""

    shot_noise: bool = Field(True, description="Poisson noise of all electrons.")
    read_noise: bool = Field(True, description="Read noise of the camera file.")
    saturation: bool = Field(True, description="Full wells that bleed along columns.")
    linearity: bool = Field(True, description="Non-linearity of the camera file.")
    crosstalk: bool = Field(True, description="Crosstalk of the camera file.")
    defects: bool = Field(True, description="Bad columns and spots of the camera file.")
    extra_bad_columns: float = Field(
        0.5, ge=0, description="Mean number of bad columns on a CCD that the camera file misses."
    )
    pixel_response: float = Field(
        0.006, ge=0, lt=0.2, description="Scatter of the response from pixel to pixel."
    )
    large_response: float = Field(
        0.015, ge=0, lt=0.5, description="Smooth variation of the response over a CCD."
    )
    gain_error: float = Field(
        0.005, ge=0, lt=0.5, description="Relative error of the camera file's gains (1 sigma)."
    )
    dark: float = Field(0.02, ge=0, description="Dark current, electrons per second and pixel.")
    hot_pixels: float = Field(2e-4, ge=0, lt=0.1, description="Part of the pixels that is hot.")
    hot_rate: float = Field(
        5.0, ge=0, description="Median current of hot pixels, electrons per second."
    )
    bias_level: float = Field(1200.0, ge=0, description="Mean bias level, counts.")
    bias_structure: float = Field(
        3.0, ge=0, description="Fixed pattern of the bias within an amplifier, counts."
    )
    bias_drift: float = Field(
        8.0, ge=0, description="Change of the level with the exposure, counts (1 sigma)."
    )
    row_drift: float = Field(3.0, ge=0, description="Change of the level during readout, counts.")
    bits: int = Field(16, ge=8, le=16, description="Bits of the converter.")


class CosmicRaysSimulation(Section):
    """Cosmic rays: straight tracks through the silicon."""

    rate: float = Field(0.1, ge=0, description="Hits per second and square centimetre.")
    thickness: float = Field(
        0.2, gt=0, description="Thickness of the silicon, mm; a particle frees 80 electrons per um."
    )
    diffusion: float = Field(0.25, ge=0, description="Spread of the charge, pixels.")


class SatellitesSimulation(Section):
    """Trails of satellites, straight lines across the whole field."""

    every: int = Field(
        5, ge=0, description="One in so many exposures of a band has a trail; 0: none."
    )
    brightness: float = Field(
        1500.0, gt=0, description="Electrons per pixel of the trail's length."
    )
    width: float = Field(1.6, gt=0, description="FWHM of the trail, arcsec.")


class CalibrationSimulation(Section):
    """Calibration frames."""

    bias: int = Field(5, ge=0, description="Bias frames.")
    dark: int = Field(3, ge=0, description="Dark frames.")
    dark_time: float = Field(300.0, gt=0, description="Exposure time of a dark, s.")
    flat: int = Field(5, ge=0, description="Flats in each band.")
    flat_time: float = Field(5.0, gt=0, description="Exposure time of a flat, s.")
    flat_level: float = Field(25000.0, gt=0, description="Mean of a flat, electrons.")


class RefcatSimulation(Section):
    """The reference catalogue: stars of the truth with errors."""

    brightest: float = Field(12.0, description="Brighter stars are missing.")
    faintest: float = Field(21.5, description="Fainter stars are missing.")
    completeness: float = Field(0.95, ge=0, le=1, description="Part of the others that is there.")
    position_error: float = Field(
        5.0, ge=0, description="Error of the position in each axis, mas (1 sigma)."
    )
    magnitude_error: float = Field(0.01, ge=0, description="Error of the magnitudes (1 sigma).")
    epoch: float = Field(2016.0, description="Epoch of the positions, Julian year.")


class NumbersSimulation(Section):
    """Numbers and ids of the exposures."""

    bias: int = Field(101, ge=0, description="Number of the first bias.")
    dark: int = Field(201, ge=0, description="Number of the first dark.")
    flat: int = Field(301, ge=0, description="Number of the first flat.")
    science: int = Field(1001, ge=0, description="Number of the first science exposure.")
    step: int = Field(1, ge=1, description="Difference of two numbers.")
    form: str = Field("{:d}", description="How a number becomes an id, such as '{:06d}'.")

    @model_validator(mode="after")
    def _check(self) -> "NumbersSimulation":
        if not re.fullmatch(r"[A-Za-z0-9_-]*\{:0?\d*d\}[A-Za-z0-9_-]*", self.form):
            raise ValueError("form must be like '{:d}', 'x{:06d}'")
        return self


class SimulationSettings(Section):
    """A simulated survey."""

    seed: int = Field(1, ge=0, description="Another seed, another survey.")
    camera: str = Field("demo", description="Name or file of the camera.")
    ra: float = Field(150.1, ge=0, lt=360, description="Centre of the survey, ICRS degrees.")
    dec: float = Field(2.2, ge=-90, le=90, description="Centre of the survey, ICRS degrees.")
    bands: dict[str, BandSimulation] = Field(
        default_factory=lambda: {
            "g": BandSimulation(zero_point=25.6, sky=21.8, color=1.0),
            "r": BandSimulation(zero_point=25.6, sky=21.0),
        },
        min_length=1,
        description="The bands.",
    )
    ccds: tuple[int, ...] | None = Field(
        None, description="CCDs that are simulated; null: all. For quick looks at large cameras."
    )
    survey: SurveySimulation = Field(default_factory=SurveySimulation)
    stars: StarsSimulation = Field(default_factory=StarsSimulation)
    galaxies: GalaxiesSimulation = Field(default_factory=GalaxiesSimulation)
    sources: tuple[ExtraSource, ...] = Field((), description="Sources at given places.")
    psf: PsfSimulation = Field(default_factory=PsfSimulation)
    optics: OpticsSimulation = Field(default_factory=OpticsSimulation)
    sky: SkySimulation = Field(default_factory=SkySimulation)
    detector: DetectorSimulation = Field(default_factory=DetectorSimulation)
    cosmic_rays: CosmicRaysSimulation = Field(default_factory=CosmicRaysSimulation)
    satellites: SatellitesSimulation = Field(default_factory=SatellitesSimulation)
    calibration: CalibrationSimulation = Field(default_factory=CalibrationSimulation)
    refcat: RefcatSimulation = Field(default_factory=RefcatSimulation)
    numbers: NumbersSimulation = Field(default_factory=NumbersSimulation)
    compression: Literal["none", "gzip", "fpack"] | None = Field(
        None, description="Of the raw files; null: as the names in the camera file say."
    )
    truth_pixels: bool = Field(
        False, description="Write the pixels of cosmic rays, with their electrons."
    )

    @model_validator(mode="after")
    def _check(self) -> "SimulationSettings":
        for band in self.bands:
            try:
                check_id(band, "band")
            except InputError as error:
                raise ValueError(str(error)) from None
        return self


def load_simulation_settings(path: str | Path) -> SimulationSettings:
    """Read the settings of a simulation from a YAML file.

    Raises
    ------
    InputError
        If the file cannot be read, a key is unknown or a value is not allowed.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        return SimulationSettings.model_validate(content)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", path=path) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"is not YAML ({error})", path=path) from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, p['loc'])) or 'settings'}: {p['msg']}" for p in error.errors()
        ]
        raise InputError(
            "; ".join(problems), path=path, remedy="docs/simulation.md lists the settings"
        ) from error
