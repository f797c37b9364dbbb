"""Settings of a simulated survey; every effect is switched off by false or an amount of 0."""

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from coaddflow.errors import InputError
from coaddflow.files import check_id
from coaddflow.settings.base import Section


def _amount(default: float, description: str, **limits: float) -> Any:
    """Return the field of an effect's size; 0 switches the effect off."""
    return Field(default, ge=0, description=description, **limits)


class BandSimulation(Section):
    """One band: exposures, zero-point and sky."""

    exposures: int = Field(6, ge=0, description="Exposures per pointing.")
    exposure_time: float = Field(120.0, gt=0, description="Exposure time, s.")
    zero_point: float = Field(
        25.6, description="AB magnitude of one electron per second without clouds."
    )
    sky: float = Field(21.0, description="Sky brightness, AB mag per square arcsecond.")
    color: float = Field(0.0, description="Added to the magnitude of a source, times its colour.")


class SurveySimulation(Section):
    """Pointings, their times, and the errors of the header."""

    pointings: tuple[int, int] = Field(
        (1, 1), description="Numbers of pointings from west to east and from south to north."
    )
    spacing: tuple[float, float] = Field(
        (0.1, 0.1), description="Spacing of neighbouring pointings, degrees."
    )
    dither: float = _amount(
        40.0, "Radius within which exposures of a pointing are dithered, arcsec."
    )
    rotation: float = Field(0.0, description="Position angle of the focal plane's +y, degrees.")
    rotation_step: float = Field(
        0.0, description="Rotation added from one exposure of a band to the next, degrees."
    )
    start: float = Field(60310.1, description="Start of the first science exposure, MJD TAI.")
    overhead: float = _amount(30.0, "Time between two exposures, s.")
    pointing_error: float = _amount(
        20.0, "Pointing error of the header in each axis, arcsec (1 sigma)."
    )
    rotation_error: float = _amount(0.05, "Rotation error of the header, degrees (1 sigma).")


class StarsSimulation(Section):
    """Stars, with power-law number counts: N(< m) proportional to 10^(slope m)."""

    density: float = _amount(20.0, "Stars per square arcminute.")
    brightest: float = Field(13.0, description="Brightest magnitude.")
    faintest: float = Field(24.0, description="Faintest magnitude.")
    slope: float = Field(0.2, gt=0, description="Slope of the number counts.")
    color: float = Field(0.7, description="Mean colour.")
    color_scatter: float = _amount(0.4, "Scatter of the colour.")
    proper_motion: float = _amount(0.0, "Proper motion in each axis, mas per year (1 sigma).")


class GalaxiesSimulation(Section):
    """Galaxies with Sersic profiles."""

    density: float = _amount(20.0, "Galaxies per square arcminute.")
    brightest: float = Field(17.5, description="Brightest magnitude.")
    faintest: float = Field(24.5, description="Faintest magnitude.")
    slope: float = Field(0.35, gt=0, description="Slope of the number counts.")
    color: float = Field(0.6, description="Mean colour.")
    color_scatter: float = _amount(0.3, "Scatter of the colour.")
    size: float = Field(0.5, gt=0, description="Median half-light radius at magnitude 22, arcsec.")
    size_slope: float = Field(-0.13, description="Slope of log10(size) with magnitude.")
    size_scatter: float = _amount(0.4, "Scatter of ln(size).")
    axis_ratio: float = Field(0.2, gt=0, le=1, description="Smallest axis ratio.")


class ExtraSource(Section):
    """A source at a given position, such as a galaxy larger than the background mesh of a CCD."""

    ra: float = Field(ge=0, lt=360, description="Position, ICRS degrees.")
    dec: float = Field(ge=-90, le=90, description="Position, ICRS degrees.")
    magnitude: float = Field(description="AB magnitude in bands with `color` 0.")
    color: float = Field(0.0, description="Colour; see `bands.<name>.color`.")
    half_light_radius: float = _amount(0.0, "Half-light radius, arcsec; 0: a star.")
    sersic: Literal[1.0, 1.5, 2.5, 4.0] = Field(1.0, description="Sersic index.")
    axis_ratio: float = Field(1.0, gt=0, le=1, description="Minor over major axis.")
    angle: float = Field(0.0, description="Position angle of the major axis, degrees.")


class PsfSimulation(Section):
    """The PSF, its variation over the field and between exposures."""

    profile: Literal["moffat", "kolmogorov"] = Field("moffat", description="Radial profile.")
    beta: float = Field(3.5, gt=1.1, description="Beta of the Moffat profile.")
    seeing: float = Field(0.85, gt=0, description="Median FWHM, arcsec.")
    seeing_scatter: float = _amount(0.12, "Scatter of ln(FWHM) between exposures.")
    field_size: float = _amount(0.05, "Relative variation of the FWHM over the field (1 sigma).")
    ellipticity: float = _amount(0.015, "Shear of the PSF common to the whole exposure (1 sigma).")
    field_ellipticity: float = _amount(0.02, "Variation of the shear over the field (1 sigma).")


class OpticsSimulation(Section):
    """Effects of the optics on positions and brightness."""

    distortion: bool = Field(True, description="Distortion of the camera file.")
    scale_error: float = _amount(
        5e-5, "Relative variation of the scale between exposures (1 sigma)."
    )
    distortion_error: float = _amount(
        0.01, "Relative variation of the distortion between exposures (1 sigma)."
    )
    ccd_shift: float = _amount(1.0, "Displacement of CCDs from the camera file, pixels (1 sigma).")
    ccd_rotation: float = _amount(
        0.01, "Rotation of CCDs relative to the camera file, degrees (1 sigma)."
    )
    vignetting: float = _amount(
        0.1, "Fraction of light lost at the edge of the field, as radius^4.", lt=1
    )
    pixel_area: bool = Field(
        True, description="Sky and flat field follow the solid angle of the pixels."
    )


class SkySimulation(Section):
    """Sky brightness and clouds."""

    enabled: bool = Field(True, description="Simulate the sky brightness.")
    scatter: float = _amount(
        0.1, "Relative variation of the brightness between exposures (1 sigma)."
    )
    gradient: float = _amount(0.03, "Relative gradient from centre to edge of the field (1 sigma).")
    clouds: float = _amount(0.08, "Mean cloud extinction, mag (exponential distribution).")
    cloud_structure: float = _amount(
        0.005, "Gradient of the extinction from centre to edge, mag (1 sigma)."
    )


class AtmosphereSimulation(Section):
    """What the air does to positions and PSF, in each exposure anew."""

    turbulence: float = _amount(
        0.0, "Displacement of stars in each axis by turbulence, smooth over arcminutes, mas (rms)."
    )
    zenith_distance: float = _amount(
        0.0,
        "Largest zenith distance, degrees; exposures are at half of it to all of it. Differences "
        "of refraction in the field, and dispersion; 0: none.",
        lt=75,
    )
    dispersion: float = _amount(
        20.0,
        "Displacement away from the zenith for a colour larger by 1, at a zenith distance of 45 "
        "degrees, mas.",
    )
    seeing_structure: float = _amount(
        0.0, "Relative variation of the FWHM over arcminutes (rms).", lt=0.2
    )
    shear_structure: float = _amount(
        0.0, "Variation of each component of the PSF's shear over arcminutes (rms).", lt=0.1
    )


class DetectorSimulation(Section):
    """CCDs and electronics."""

    shot_noise: bool = Field(True, description="Poisson noise of all electrons.")
    read_noise: bool = Field(True, description="Read noise of the camera file.")
    saturation: bool = Field(True, description="Full wells that bleed along columns.")
    linearity: bool = Field(True, description="Non-linearity of the camera file.")
    crosstalk: bool = Field(True, description="Crosstalk of the camera file.")
    defects: bool = Field(True, description="Bad columns and spots of the camera file.")
    extra_bad_columns: float = _amount(
        0.5, "Mean number of bad columns per CCD not listed in the camera file."
    )
    pixel_response: float = _amount(0.006, "Pixel-to-pixel scatter of the response.", lt=0.2)
    large_response: float = _amount(0.015, "Smooth variation of the response over a CCD.", lt=0.5)
    gain_error: float = _amount(
        0.005, "Relative error of the gains in the camera file (1 sigma).", lt=0.5
    )
    dark: float = _amount(0.02, "Dark current, electrons per second per pixel.")
    hot_pixels: float = _amount(2e-4, "Fraction of hot pixels.", lt=0.1)
    hot_rate: float = _amount(5.0, "Median current of hot pixels, electrons per second.")
    bias_level: float = _amount(1200.0, "Mean bias level, counts.")
    bias_structure: float = _amount(3.0, "Fixed bias pattern within an amplifier, counts.")
    bias_drift: float = _amount(8.0, "Variation of the level between exposures, counts (1 sigma).")
    row_drift: float = _amount(3.0, "Drift of the level during readout, counts.")
    bits: int = Field(16, ge=8, le=16, description="Bits of the converter.")


class CosmicRaysSimulation(Section):
    """Cosmic rays: straight tracks through the silicon."""

    rate: float = _amount(0.1, "Hits per second per square centimetre.")
    thickness: float = Field(
        0.2, gt=0, description="Thickness of the silicon, mm; a hit frees 80 electrons per um."
    )
    diffusion: float = _amount(0.25, "Charge diffusion, pixels.")


class SatellitesSimulation(Section):
    """Satellite trails: straight lines across the whole field."""

    every: int = Field(
        5, ge=0, description="Every how many exposures of a band there is a trail; 0: never."
    )
    brightness: float = Field(1500.0, gt=0, description="Electrons per pixel length of the trail.")
    width: float = Field(1.6, gt=0, description="FWHM of the trail, arcsec.")


class CalibrationSimulation(Section):
    """Calibration frames."""

    bias: int = Field(5, ge=0, description="Number of bias frames.")
    dark: int = Field(3, ge=0, description="Number of dark frames.")
    dark_time: float = Field(300.0, gt=0, description="Exposure time of a dark, s.")
    flat: int = Field(5, ge=0, description="Number of flats in each band.")
    flat_time: float = Field(5.0, gt=0, description="Exposure time of a flat, s.")
    flat_level: float = Field(25000.0, gt=0, description="Mean level of a flat, electrons.")


class RefcatSimulation(Section):
    """The reference catalogue: true stars with errors."""

    brightest: float = Field(12.0, description="Magnitude of the brightest star included.")
    faintest: float = Field(21.5, description="Magnitude of the faintest star included.")
    completeness: float = _amount(0.95, "Fraction of stars in this range that are included.", le=1)
    position_error: float = _amount(5.0, "Position error in each axis, mas (1 sigma).")
    magnitude_error: float = _amount(0.01, "Error of the magnitudes, mag (1 sigma).")
    epoch: float = Field(2016.0, description="Epoch of the positions, Julian year.")


class NumbersSimulation(Section):
    """Exposure numbers and ids."""

    bias: int = Field(101, ge=0, description="Number of the first bias.")
    dark: int = Field(201, ge=0, description="Number of the first dark.")
    flat: int = Field(301, ge=0, description="Number of the first flat.")
    science: int = Field(1001, ge=0, description="Number of the first science exposure.")
    step: int = Field(1, ge=1, description="Increment of the numbers.")
    form: str = Field("{:d}", description="Format of an id, such as '{:06d}'.")

    @model_validator(mode="after")
    def _check(self) -> "NumbersSimulation":
        if not re.fullmatch(r"[A-Za-z0-9_-]*\{:0?\d*d\}[A-Za-z0-9_-]*", self.form):
            raise ValueError("form must be like '{:d}', 'x{:06d}'")
        return self


class SimulationSettings(Section):
    """A simulated survey."""

    seed: int = Field(1, ge=0, description="Seed of all random numbers.")
    camera: str = Field("demo", description="Name of a shipped camera, or path of a camera file.")
    ra: float = _amount(150.1, "Centre of the survey, ICRS degrees.", lt=360)
    dec: float = Field(2.2, ge=-90, le=90, description="Centre of the survey, ICRS degrees.")
    bands: dict[str, BandSimulation] = Field(
        default_factory=lambda: {
            "g": BandSimulation(zero_point=25.6, sky=21.8, color=1.0),
            "r": BandSimulation(zero_point=25.6, sky=21.0),
        },
        min_length=1,
        description="Bands of the survey.",
    )
    ccds: tuple[int, ...] | None = Field(
        None, description="CCDs to simulate, for quick looks at large cameras; null: all."
    )
    survey: SurveySimulation = Field(default_factory=SurveySimulation)
    stars: StarsSimulation = Field(default_factory=StarsSimulation)
    galaxies: GalaxiesSimulation = Field(default_factory=GalaxiesSimulation)
    sources: tuple[ExtraSource, ...] = Field(
        (), description="Additional sources at given positions."
    )
    psf: PsfSimulation = Field(default_factory=PsfSimulation)
    optics: OpticsSimulation = Field(default_factory=OpticsSimulation)
    sky: SkySimulation = Field(default_factory=SkySimulation)
    atmosphere: AtmosphereSimulation = Field(default_factory=AtmosphereSimulation)
    detector: DetectorSimulation = Field(default_factory=DetectorSimulation)
    cosmic_rays: CosmicRaysSimulation = Field(default_factory=CosmicRaysSimulation)
    satellites: SatellitesSimulation = Field(default_factory=SatellitesSimulation)
    calibration: CalibrationSimulation = Field(default_factory=CalibrationSimulation)
    refcat: RefcatSimulation = Field(default_factory=RefcatSimulation)
    numbers: NumbersSimulation = Field(default_factory=NumbersSimulation)
    compression: Literal["none", "gzip", "fpack"] | None = Field(
        None,
        description="Compression of the raw files; null: as the file names in the camera file "
        "imply.",
    )
    truth_pixels: bool = Field(
        False, description="Write the pixels hit by cosmic rays, with their electrons."
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
    """Read the settings of a simulation; raise InputError that names the key at fault."""
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
