"""Catalogues of the stars of many exposures of one tract, without pixels, and the truth of them.

What is simulated: a mosaic of equal CCDs whose places and distortions the camera file does not
know, which shift between epochs; exposures with a pointing, rotation and distortion of their own;
turbulence without curl, refraction by colour; proper motions and parallaxes; thin clouds with
structure, an illumination error, colour terms; photon noise; a reference catalogue with errors.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from coaddflow.geometry.polynomial import design_matrix, term_powers
from coaddflow.geometry.sphere import tan_project
from coaddflow.simulate.atmosphere import Waves
from coaddflow.simulate.streams import stream
from coaddflow.solution.detections import MAS, Detections, Exposures, ReferenceStars, TractFrame
from coaddflow.solution.detector_maps import DetectorMaps

FloatArray = NDArray[np.float64]

_CATALOGUE_YEAR = 2016.0
_FIRST_MJD = 58000.0
_SEEING_PIXELS = 4.0
_ZERO_POINT = 25.0


@dataclass(frozen=True)
class TractSimulation:
    """What is simulated; angles in the units that the names end with.

    ``stars_per_ccd`` are those with ``faintest`` magnitude or brighter, whose signal-to-noise
    ratio there is ``faintest_sn``. ``structure_mag`` is the rms of the clouds' structure,
    ``illumination_mag`` that of the illumination error.
    """

    seed: int = 1
    n_exposures: int = 20
    grid: tuple[int, int] = (4, 3)
    size: tuple[int, int] = (2048, 4096)
    scale_arcsec: float = 0.26
    ra: float = 359.9
    dec: float = -35.0
    dither_deg: float = 0.1
    rotation_deg: float = 5.0
    stars_per_ccd: float = 100.0
    magnitudes: tuple[float, float] = (16.0, 21.0)
    faintest_sn: float = 30.0
    bands: tuple[str, ...] = ("g", "r")
    n_epochs: int = 2
    years: float = 5.0
    distortion_pixels: float = 1.0
    shift_pixels: float = 0.05
    turbulence_mas: float = 0.0
    dispersion_mas: float = 0.0
    motion_mas: float = 5.0
    parallax_mas: float = 0.5
    reference_fraction: float = 0.4
    reference_mas: float = 0.5
    start_mas: float = 20.0
    cloud_mag: float = 0.0
    structure_mag: float = 0.0
    illumination_mag: float = 0.0
    color_terms: tuple[float, ...] = (0.05, -0.03)
    reference_mag: float = 0.01
    outliers: float = 0.0


@dataclass(frozen=True)
class SimulatedTract:
    """Catalogues, and the truth.

    Attributes
    ----------
    detections, exposures, references, maps, frame
        What a solution takes.
    star : ndarray of int32, shape (n detections,)
        True star of each detection.
    color : ndarray of float64, shape (n stars,)
        True colours.
    longitude, latitude : ndarray of float64, shape (n stars,)
        True positions at 2016.0 in the frame.
    motion : ndarray of float64, shape (n stars, 2)
        mas/yr, along the axes of the frame.
    parallax : ndarray of float64, shape (n stars,)
        mas.
    magnitude : ndarray of float64, shape (n stars, n bands)
        True magnitudes in the bands of the camera.
    is_outlier : ndarray of bool, shape (n detections,)
        Detections that something else has moved.
    """

    detections: Detections
    exposures: Exposures
    references: ReferenceStars
    maps: DetectorMaps
    frame: TractFrame
    star: NDArray[np.int32]
    color: FloatArray
    longitude: FloatArray
    latitude: FloatArray
    motion: FloatArray
    parallax: FloatArray
    magnitude: FloatArray
    is_outlier: NDArray[np.bool_]


def simulate_tract(simulation: TractSimulation) -> SimulatedTract:
    """Simulate the catalogues of a tract."""
    sky = _Sky(simulation)
    instrument = _Instrument(simulation)
    exposures = _exposures(simulation)
    frame = TractFrame(simulation.ra, simulation.dec)
    found = [
        _observe(number, exposures, frame, sky, instrument) for number in range(len(exposures))
    ]
    parts, stars, outliers = zip(*found, strict=True)
    return SimulatedTract(
        *(Detections.join(parts), exposures, sky.references(frame), instrument.maps, frame),
        *(np.concatenate(stars), sky.color, *sky.place.T, sky.motion, sky.parallax, sky.magnitude),
        is_outlier=np.concatenate(outliers),
    )


class _Instrument:
    """The mosaic as it is: the way from the field to the pixels of the CCDs."""

    def __init__(self, simulation: TractSimulation):
        self.simulation = simulation
        rng = stream(simulation.seed, "instrument")
        self.scale = simulation.scale_arcsec / 3600.0
        columns, rows = simulation.grid
        self.pitch = np.array(simulation.size) * self.scale * 1.03
        place = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1).reshape(-1, 2)
        self.centre = (place - (np.array(simulation.grid) - 1) / 2.0) * self.pitch
        self.radius = float(np.hypot(*(self.pitch * simulation.grid / 2.0)))
        n, terms = len(self.centre), len(term_powers(4))
        self.bend = rng.normal(0.0, simulation.distortion_pixels, (n, 2, terms)) * np.where(
            np.arange(terms) < 3, 1.0, 0.3
        )
        shifts = rng.normal(0.0, simulation.shift_pixels, (simulation.n_epochs, n, 2))
        self.shift = shifts - shifts.mean(axis=0)
        n_bands = len(simulation.bands)
        smooth, steps = (
            rng.normal(size=(n_bands, len(term_powers(4)))),
            rng.normal(size=(n_bands, n)),
        )
        self.illumination = (
            simulation.illumination_mag * 0.5 * smooth,
            (simulation.illumination_mag * 0.5 * steps),
        )

    @cached_property
    def maps(self) -> DetectorMaps:
        """What the camera file says."""
        middle = (np.array(self.simulation.size) - 1) / 2.0

        def to_field(centre):
            return lambda x, y: (
                centre[0] + (x - middle[0]) * self.scale,
                centre[1] + (y - middle[1]) * self.scale,
            )

        numbers = range(1, len(self.centre) + 1)
        mappings = {ccd: to_field(c) for ccd, c in zip(numbers, self.centre, strict=True)}
        return DetectorMaps.fit(mappings, dict.fromkeys(numbers, self.simulation.size))

    def pixels(self, field: FloatArray, epoch: int) -> tuple[NDArray, FloatArray]:
        """Return the CCD (-1: none) and pixels of field positions (n, 2)."""
        size = np.array(self.simulation.size)
        cell = np.floor(field / self.pitch + np.array(self.simulation.grid) / 2.0).astype(int)
        inside = np.all((cell >= 0) & (cell < self.simulation.grid), axis=1)
        ccd = np.where(inside, cell[:, 1] * self.simulation.grid[0] + cell[:, 0], 0)
        pixel = (field - self.centre[ccd]) / self.scale
        unit = pixel / (size.max() / 2.0)
        design = design_matrix(*unit.T, 4)
        pixel = pixel + np.einsum("nt,nat->na", design, self.bend[ccd]) + self.shift[epoch, ccd]
        pixel += (size - 1) / 2.0
        inside &= np.all((pixel > 0) & (pixel < size - 1), axis=1)
        return np.where(inside, ccd, -1), pixel

    def illumination_at(self, band: int, field: FloatArray, ccd: NDArray) -> FloatArray:
        """Return the illumination error, mag."""
        smooth, steps = self.illumination
        return design_matrix(*(field / self.radius).T, 4) @ smooth[band] + steps[band, ccd]


class _Sky:
    """The stars."""

    def __init__(self, simulation: TractSimulation):
        self.simulation = simulation
        rng = stream(simulation.seed, "stars")
        size = np.array(simulation.size) * simulation.scale_arcsec / 3600.0
        half = size * simulation.grid / 2.0 * 1.1 + 3.0 * simulation.dither_deg
        half = np.full(2, half.max() if simulation.rotation_deg > 10.0 else 1.1 * half.max())
        n = rng.poisson(simulation.stars_per_ccd * 4.0 * np.prod(half) / np.prod(size))
        self.place = rng.uniform(-half, half, (n, 2))
        bright, faint = simulation.magnitudes
        # three times as many stars for each magnitude fainter would leave few bright ones: 1.6
        slope = np.log(1.6)
        self.color = rng.normal(0.8, 0.4, n)
        base = (
            faint + np.log(1.0 - rng.random(n) * (1.0 - np.exp(slope * (bright - faint)))) / slope
        )
        self.catalogue = base[:, None] - self.color[:, None] * np.arange(len(simulation.bands))
        terms = np.resize(simulation.color_terms, len(simulation.bands))
        self.magnitude = self.catalogue + terms * (self.color[:, None] - 0.8)
        self.motion = rng.normal(0.0, simulation.motion_mas, (n, 2))
        self.parallax = np.abs(rng.normal(0.0, simulation.parallax_mas, n))
        self.in_catalogue = rng.random(n) < simulation.reference_fraction

    def references(self, frame: TractFrame) -> ReferenceStars:
        """Return the reference catalogue."""
        simulation, chosen = self.simulation, self.in_catalogue
        rng = stream(simulation.seed, "catalogue")
        n = int(chosen.sum())
        error = simulation.reference_mas * rng.uniform(0.5, 1.5, n)
        place = self.place[chosen] + rng.normal(size=(n, 2)) * error[:, None] / MAS
        sky = frame.to_sky(*place.T)
        motion = self.motion[chosen] + rng.normal(size=(n, 2)) * error[:, None]
        # along the axes of the catalogue: the turn back is the turn by the opposite angle
        axes = frame.turned(*sky, np.tile([1.0, 0.0], (n, 1)))
        motion = np.stack(
            [np.sum(motion * axes, axis=1), motion[:, 1] * axes[:, 0] - motion[:, 0] * axes[:, 1]],
            axis=1,
        )
        shape = (n, len(simulation.bands))
        magnitude_error = np.full(shape, simulation.reference_mag)
        return ReferenceStars(
            *(*sky, error, motion, error),
            parallax=self.parallax[chosen] + rng.normal(size=n) * error,
            parallax_error=error,
            magnitude=self.catalogue[chosen] + rng.normal(size=shape) * magnitude_error,
            magnitude_error=magnitude_error,
            year=_CATALOGUE_YEAR,
        )


def _exposures(simulation: TractSimulation) -> Exposures:
    """Return pointings, times and zeniths."""
    rng = stream(simulation.seed, "exposures")
    n = simulation.n_exposures
    frame = TractFrame(simulation.ra, simulation.dec)
    pointing = frame.to_sky(*rng.normal(0.0, simulation.dither_deg, (2, n)))
    time = np.sort(rng.uniform(0.0, 1.0, n))
    angle, distance = rng.uniform(0, 2 * np.pi, n), rng.uniform(0.3, 1.2, n)
    return Exposures(
        *(tuple(f"{1001 + number}" for number in range(n)), *pointing),
        mjd=_FIRST_MJD + time * simulation.years * 365.25,
        band=(np.arange(n) % len(simulation.bands)).astype(np.int32),
        epoch=np.minimum(time * simulation.n_epochs, simulation.n_epochs - 1).astype(np.int32),
        zenith=np.stack([np.sin(angle), np.cos(angle)], axis=1) * distance[:, None],
        bands=simulation.bands,
    )


def _observe(
    number: int, exposures: Exposures, frame: TractFrame, sky: _Sky, instrument: _Instrument
) -> tuple[Detections, NDArray, NDArray]:
    """Return the detections of an exposure, their stars, and which are outliers."""
    simulation = sky.simulation
    rng = stream(simulation.seed, "exposure", number)
    pointing = frame.of_sky(exposures.ra[number], exposures.dec[number])
    years = exposures.year[number] - _CATALOGUE_YEAR
    factors = frame.parallax_factors(exposures.mjd[[number]], *np.array(pointing)[:, None])[0]
    moved = (sky.motion * years + sky.parallax[:, None] * factors) / MAS
    moved[:, 0] /= np.cos(np.radians(sky.place[:, 1]))
    place = sky.place + moved
    plane = np.stack(tan_project(*place.T, *pointing), axis=1)
    near = np.flatnonzero(np.hypot(*plane.T) < 1.1 * instrument.radius)
    plane = plane[near]
    seen = plane + _air(number, exposures, frame, sky, near, plane, rng)
    field = _telescope(simulation, instrument, seen, rng)
    ccd, pixel = instrument.pixels(field, int(exposures.epoch[number]))
    row = np.flatnonzero(ccd >= 0)
    row = row[np.argsort(ccd[row], kind="stable")]
    star, ccd, plane, field, pixel = (values[row] for values in (near, ccd, plane, field, pixel))
    band = int(exposures.band[number])
    faint = simulation.magnitudes[1]
    noise = 10.0 ** (0.4 * (sky.magnitude[star, band] - faint)) / simulation.faintest_sn
    # between the noise of the sky and that of the star itself
    noise = np.minimum(noise, np.sqrt(noise / simulation.faintest_sn))
    error = np.hypot(_SEEING_PIXELS / 2.355 * noise, 0.001)
    measured = pixel + rng.normal(size=(len(star), 2)) * error[:, None]
    odd = rng.random(len(star)) < simulation.outliers
    measured[odd] += rng.uniform(-2.0, 2.0, (odd.sum(), 2))
    start = place[star] + rng.normal(size=(len(star), 2)) * (error * instrument.scale)[:, None]
    shift = rng.normal(0.0, simulation.start_mas / MAS, (len(instrument.centre), 2))
    ra, dec = frame.to_sky(*(start + shift[ccd]).T)
    magnitude = sky.magnitude[star, band] - _ZERO_POINT
    magnitude += _extinction(number, exposures, instrument, plane, field, ccd, rng)
    magnitude_error = np.hypot(1.0857 * noise, 1e-4)
    magnitude += rng.normal(size=len(star)) * magnitude_error
    magnitude[odd] += rng.uniform(-1.0, 1.0, odd.sum())
    found = Detections(
        *(np.full(len(star), number, np.int32), ccd.astype(np.int32), *measured.T),
        *(error.astype(np.float32), ra, dec),
        *(magnitude.astype(np.float32), magnitude_error.astype(np.float32)),
    )
    return found, star.astype(np.int32), odd


def _air(
    number: int,
    exposures: Exposures,
    frame: TractFrame,
    sky: _Sky,
    star: NDArray[np.intp],
    plane: FloatArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Return how the air displaces stars on the plane, degrees."""
    simulation = sky.simulation
    moved = np.zeros_like(plane)
    if simulation.turbulence_mas:
        moved += simulation.turbulence_mas / MAS * Waves.draw(rng).flow(plane.T).T
    zenith = frame.turned(
        exposures.ra[[number]], exposures.dec[[number]], exposures.zenith[[number]]
    )
    lift = simulation.dispersion_mas / MAS * (sky.color[star] - 0.8)
    return moved + lift[:, None] * zenith


def _telescope(
    simulation: TractSimulation,
    instrument: _Instrument,
    plane: FloatArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Return the field positions of points of the tangent plane, with an own distortion."""
    angle = np.radians(rng.normal(0.0, simulation.rotation_deg))
    cos, sin = np.cos(angle), np.sin(angle)
    # east to the left: a reflection, as in most cameras
    field = plane @ np.array([[-cos, sin], [sin, cos]]).T
    bend = rng.normal(0.0, simulation.distortion_pixels, (2, len(term_powers(4))))
    near = np.clip(field / instrument.radius, -1.3, 1.3)
    return field + design_matrix(*near.T, 4) @ bend.T * instrument.scale


def _extinction(
    number: int,
    exposures: Exposures,
    instrument: _Instrument,
    plane: FloatArray,
    field: FloatArray,
    ccd: NDArray,
    rng: np.random.Generator,
) -> FloatArray:
    """Return by how much stars are fainter, mag."""
    simulation = instrument.simulation
    extinction = 0.1 * exposures.airmass[number] + simulation.cloud_mag * rng.random()
    if simulation.structure_mag:
        extinction = extinction + simulation.structure_mag * Waves.draw(rng).value(plane.T)
    band = int(exposures.band[number])
    return extinction + instrument.illumination_at(band, field, ccd)
