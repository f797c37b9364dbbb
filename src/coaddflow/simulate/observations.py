"""What is observed when: the exposures of a simulated survey, with all that is peculiar to each."""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
from astropy.table import Table

from coaddflow.files import check_id
from coaddflow.geometry import sphere
from coaddflow.instrument.camera import Camera
from coaddflow.simulate.settings import SimulationSettings
from coaddflow.simulate.streams import stream

KINDS = ("bias", "dark", "flat", "science")


@dataclass(frozen=True)
class Observation:
    """One exposure: what the header says of it, and what is true."""

    exposure: str
    kind: str
    band: str
    """Id; science, bias, dark or flat; band, empty for bias and dark."""
    mjd: float
    """Start, MJD TAI."""
    exposure_time: float
    """Seconds."""
    ra: float
    dec: float
    rotation: float
    """True pointing and rotation, degrees."""
    header_ra: float
    header_dec: float
    header_rotation: float
    """What the header says."""
    seeing: float = 1.0
    """FWHM of the PSF at the centre of the field, arcsec."""
    psf_size: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Relative change of the FWHM with x, y and r^2 (in units of the field's radius)."""
    psf_shear: tuple[float, ...] = (0.0,) * 6
    """Shear (g1, g2) at the centre, and its change with x, y: g1, g2, g1_x, g1_y, g2_x, g2_y."""
    extinction: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Extinction by clouds at the centre and its change with x and y, mag."""
    sky: tuple[float, ...] = (1.0, 0.0, 0.0)
    """Factor on the sky's brightness, and its relative change with x and y."""
    zenith: tuple[float, ...] = (0.0, 0.0)
    """Zenith distance, and the position angle of the zenith, degrees."""
    scale: float = 0.0
    distortion: float = 0.0
    """Relative changes of the camera's scale and distortion."""
    trail: tuple[float, ...] | None = None
    """Two points (x, y, x, y) of a satellite's trail in the focal plane, mm."""


def plan_observations(
    settings: SimulationSettings, camera: Camera, radius: float
) -> list[Observation]:
    """Return all exposures of a survey: biases, darks, flats, science exposures.

    ``radius`` is that of the field, mm. Raises InputError if an id would not be valid.
    """
    return _calibration(settings) + _science(settings, camera, radius)


def _id(settings: SimulationSettings, kind: str, count: int) -> str:
    numbers = settings.numbers
    number = getattr(numbers, kind) + numbers.step * count
    return check_id(numbers.form.format(number), "exposure")


def _calibration(settings: SimulationSettings) -> list[Observation]:
    """Return biases, darks and flats, taken in the afternoon before the first science exposure."""
    frames = settings.calibration
    wanted = [("bias", "", 0.0)] * frames.bias
    wanted += [("dark", "", frames.dark_time)] * frames.dark
    wanted += [
        ("flat", band, frames.flat_time) for _ in range(frames.flat) for band in settings.bands
    ]
    mjd = settings.survey.start - 0.25
    counts = dict.fromkeys(KINDS, 0)
    pointing = _pointing(settings.ra, settings.dec, 0.0)
    observations = []
    for kind, band, time in wanted:
        exposure = _id(settings, kind, counts[kind])
        observations.append(Observation(exposure, kind, band, mjd, time, **pointing))
        counts[kind] += 1
        mjd += (time + settings.survey.overhead) / 86400.0
    return observations


def _pointing(ra: float, dec: float, rotation: float) -> dict[str, float]:
    """Return a pointing that the header knows exactly."""
    true = {"ra": ra, "dec": dec, "rotation": rotation}
    return {**true, **{f"header_{name}": value for name, value in true.items()}}


def _science(settings: SimulationSettings, camera: Camera, radius: float) -> list[Observation]:
    """Return the science exposures; the bands take turns, so that more can be appended."""
    survey = settings.survey
    n_exposures = max(band.exposures for band in settings.bands.values())
    turns = itertools.product(
        range(n_exposures), range(survey.pointings[0] * survey.pointings[1]), settings.bands.items()
    )
    mjd = survey.start
    observations = []
    for count, (index, pointing, (band, exposing)) in enumerate(turns):
        time = exposing.exposure_time
        if index < exposing.exposures:
            where = _pointing(*_pointing_centre(settings, pointing), survey.rotation)
            exposure = _id(settings, "science", count)
            plain = Observation(exposure, "science", band, mjd, time, **where)
            observations.append(
                _with_peculiarities(settings, camera, radius, plain, index, pointing)
            )
        mjd += (time + survey.overhead) / 86400.0
    return observations


def _pointing_centre(settings: SimulationSettings, pointing: int) -> tuple[float, float]:
    """Return ra and dec of a pointing of the grid."""
    survey = settings.survey
    i, j = pointing % survey.pointings[0], pointing // survey.pointings[0]
    xi = (i - (survey.pointings[0] - 1) / 2.0) * survey.spacing[0]
    eta = (j - (survey.pointings[1] - 1) / 2.0) * survey.spacing[1]
    ra, dec = sphere.tan_deproject(xi, eta, settings.ra, settings.dec)
    return float(ra), float(dec)


def _with_peculiarities(
    settings: SimulationSettings,
    camera: Camera,
    radius: float,
    plain: Observation,
    index: int,
    pointing: int,
) -> Observation:
    """Return the exposure with dither, errors, weather and PSF of its own."""
    survey, psf, sky, optics = settings.survey, settings.psf, settings.sky, settings.optics
    rng = stream(settings.seed, "exposure", plain.band, pointing, index)
    ra, dec = _offset(plain.ra, plain.dec, survey.dither / 3600.0 * _in_unit_circle(rng))
    rotation = plain.rotation + survey.rotation_step * index
    header_ra, header_dec = _offset(ra, dec, survey.pointing_error / 3600.0 * rng.normal(size=2))
    header_rotation = rotation + survey.rotation_error * rng.normal()
    if camera.header.rotation.keyword is None:
        header_rotation = float(camera.header.rotation.default or 0.0)
    seeing = psf.seeing * np.exp(psf.seeing_scatter * rng.normal())
    shear = np.concatenate(
        [psf.ellipticity * rng.normal(size=2), psf.field_ellipticity * rng.normal(size=4)]
    )
    clouds = np.append(rng.exponential(sky.clouds), sky.cloud_structure * rng.normal(size=2))
    brightness = np.append(
        max(0.2, 1.0 + sky.scatter * rng.normal()), sky.gradient * rng.normal(size=2)
    )
    scale, distortion = rng.normal(size=2) * [optics.scale_error, optics.distortion_error]
    every = settings.satellites.every
    return dataclasses.replace(
        plain,
        ra=ra,
        dec=dec,
        rotation=rotation,
        header_ra=header_ra,
        header_dec=header_dec,
        header_rotation=header_rotation,
        seeing=float(seeing),
        psf_size=_floats(psf.field_size * rng.normal(size=3)),
        psf_shear=_floats(shear),
        extinction=_floats(clouds),
        sky=_floats(brightness),
        zenith=_zenith(settings, plain.band, pointing, index),
        scale=float(scale),
        distortion=float(distortion),
        trail=_trail(rng, radius) if every and index % every == every // 2 else None,
    )


def _zenith(
    settings: SimulationSettings, band: str, pointing: int, index: int
) -> tuple[float, float]:
    """Draw the zenith distance of an exposure and the position angle of the zenith, degrees."""
    rng = stream(settings.seed, "zenith", band, pointing, index)
    distance = settings.atmosphere.zenith_distance * rng.uniform(0.5, 1.0)
    return float(distance), float(rng.uniform(0.0, 360.0))


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _in_unit_circle(rng: np.random.Generator) -> np.ndarray:
    """Return a point, uniform in the unit circle."""
    angle, r = 2.0 * np.pi * rng.uniform(), np.sqrt(rng.uniform())
    return r * np.array([np.cos(angle), np.sin(angle)])


def _offset(ra: float, dec: float, offset: np.ndarray) -> tuple[float, float]:
    """Return a position moved by an offset (east, north) in degrees."""
    new_ra, new_dec = sphere.tan_deproject(offset[0], offset[1], ra, dec)
    return float(new_ra), float(new_dec)


def _trail(rng: np.random.Generator, radius: float) -> tuple[float, ...]:
    """Return two points of a line through the inner half of the field, beyond its edges."""
    angle = np.pi * rng.uniform()
    along, across = np.array([np.cos(angle), np.sin(angle)]), rng.uniform(-0.5, 0.5) * radius
    foot = across * np.array([-along[1], along[0]])
    return _floats(np.concatenate([foot - 1.5 * radius * along, foot + 1.5 * radius * along]))


def exposure_table(observations: list[Observation]) -> Table:
    """Return the truth about the exposures, one row each.

    The columns are the attributes of `Observation`; those with several values are vectors. The
    trail is NaN where there is none.
    """
    table = Table()
    for field in dataclasses.fields(Observation):
        values = [getattr(observation, field.name) for observation in observations]
        if field.name == "trail":
            values = [(np.nan,) * 4 if value is None else value for value in values]
        table[field.name] = values
    return table
