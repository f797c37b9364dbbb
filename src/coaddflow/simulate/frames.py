"""One CCD of one exposure: from the sky to the raw arrays, with every effect in its place.

Light of the sources dims in the clouds; with the sky (or the lamp of a flat) it passes vignetting
and pixel response and becomes electrons, with Poisson noise; dark current, hot pixels, cosmic
rays and the satellite's trail are added; full wells bleed. Then each amplifier makes counts of
them (gain, linearity), amplifiers have crosstalk, and bias level, bias pattern
and read noise are added before the converter rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coaddflow.geometry import sphere
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.simulate.artifacts import add_trail, cosmic_rays
from coaddflow.simulate.drawing import draw_sources
from coaddflow.simulate.observations import Observation
from coaddflow.simulate.optics import Optics, field_radius, true_camera
from coaddflow.simulate.readout import (
    BiasLevels,
    amplifier_counts,
    bias_levels,
    full_well,
    ghosts,
    raw_arrays,
)
from coaddflow.simulate.settings import SimulationSettings
from coaddflow.simulate.silicon import bias_pattern, bleed, make_silicon
from coaddflow.simulate.sky import sky_around
from coaddflow.simulate.streams import stream

_EDGE = 500.0
"""Pixels around a CCD from which bright sources still reach it."""


@dataclass(frozen=True)
class Exposing:
    """One exposure of a survey, ready to expose its CCDs; its optics have the true camera."""

    settings: SimulationSettings
    observation: Observation
    optics: Optics

    @classmethod
    def prepare(
        cls, settings: SimulationSettings, camera: Camera, observation: Observation
    ) -> "Exposing":
        """Put an exposure together from the camera of the file."""
        true = true_camera(camera, settings, observation)
        return cls(settings, observation, Optics(true, settings, observation, field_radius(camera)))

    def rng(self, purpose: str, ccd: int) -> np.random.Generator:
        """Return the random numbers of a CCD of this exposure."""
        seen = self.observation
        return stream(self.settings.seed, purpose, seen.kind, seen.exposure, ccd)


@dataclass(frozen=True)
class ExposedCcd:
    """A CCD after its exposure, before readout."""

    detector: Detector
    """The CCD."""
    gains: tuple[float, ...]
    """True electrons per count of its amplifiers."""
    counts: list[NDArray[np.float32]]
    """Counts above bias of each amplifier, in readout order, without crosstalk."""
    levels: BiasLevels
    """Bias levels of the exposure."""
    cosmic_rays: tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]
    """Pixels x, y and electrons of cosmic rays."""


def expose_ccd(exposing: Exposing, ccd: int) -> ExposedCcd:
    """Expose one CCD: every effect from the sky to the counts of its amplifiers."""
    settings, seen = exposing.settings, exposing.observation
    detector = exposing.optics.camera.detector(ccd)
    silicon = make_silicon(settings, detector)
    physics = settings.detector
    electrons = incoming_light(exposing, detector)
    electrons *= silicon.response
    electrons += silicon.dark * np.float32(seen.exposure_time)
    if physics.shot_noise:
        electrons = exposing.rng("shot noise", ccd).poisson(electrons).astype(np.float32)
    hits = cosmic_rays(
        settings.cosmic_rays,
        detector,
        exposing.optics.camera.pixel_size,
        seen.exposure_time if seen.kind in ("science", "dark") else 0.0,
        exposing.rng("cosmic rays", ccd),
    )
    electrons[hits[1], hits[0]] += hits[2].astype(np.float32)
    levels = bias_levels(
        physics,
        detector,
        stream(settings.seed, "bias levels", ccd),
        exposing.rng("bias levels", ccd),
    )
    if physics.saturation:
        for amplifier, gain, level in zip(
            detector.amplifiers, silicon.gains, levels.mean, strict=True
        ):
            x0, y0, x1, y1 = amplifier.target
            bleed(electrons[y0:y1, x0:x1], full_well(amplifier, gain, level, physics))
    counts = amplifier_counts(electrons, detector, silicon.gains, physics)
    return ExposedCcd(detector, silicon.gains, counts, levels, hits)


def incoming_light(exposing: Exposing, detector: Detector) -> NDArray[np.float32]:
    """Return the light that reaches a CCD of the true camera, shape (ny, nx).

    In electrons of a perfect pixel, behind vignetting; zero for biases and darks.
    """
    settings, seen, optics = exposing.settings, exposing.observation, exposing.optics
    if seen.kind not in ("science", "flat"):
        return np.zeros(detector.shape, dtype=np.float32)
    area = optics.pixel_area(detector)
    if seen.kind == "flat":
        level = settings.calibration.flat_level / optics.camera.pixel_scale**2
        return np.float32(level) * area * optics.transmission(detector)
    band = settings.bands[seen.band]
    light = np.zeros(detector.shape, dtype=np.float32)
    if settings.sky.enabled:
        per_second = 10.0 ** (0.4 * (band.zero_point - band.sky))
        light = area * optics.sky_factor(detector) * np.float32(per_second * seen.exposure_time)
    _add_sources(light, exposing, detector)
    light *= optics.transmission(detector)
    add_trail(light, optics, detector)
    return light


def _add_sources(light: NDArray[np.float32], exposing: Exposing, detector: Detector) -> None:
    """Add the stars and galaxies of the field, behind the clouds."""
    settings, seen, optics = exposing.settings, exposing.observation, exposing.optics
    camera = optics.camera
    nx, ny = detector.size
    corner = camera.pixel_to_sky(
        detector, [(nx - 1) / 2, -_EDGE], [(ny - 1) / 2, -_EDGE], seen.ra, seen.dec, seen.rotation
    )
    (ra, ra_corner), (dec, dec_corner) = corner
    sky = sky_around(settings, ra, dec, float(sphere.separation(ra, dec, ra_corner, dec_corner)))
    magnitude = sky.band_magnitude(settings, seen.band)
    rate = 10.0 ** (0.4 * (settings.bands[seen.band].zero_point - magnitude))
    x, y = optics.sky_to_pixel(detector, sky.ra, sky.dec)
    electrons = rate * seen.exposure_time * optics.clouds_at(detector, x, y)
    # wings end where they are well below the noise of an empty pixel
    faint_level = 0.02 * np.sqrt(max(float(np.median(light)), 25.0))
    draw_sources(light, optics, detector, sky, np.nan_to_num(electrons), faint_level)


def read_out(
    exposing: Exposing,
    exposed: ExposedCcd,
    others: Sequence[tuple[int, float, NDArray[np.float32]]] = (),
) -> dict[str | int | None, NDArray[np.uint16]]:
    """Read a CCD out, with the ghosts of its own and of other CCDs' amplifiers (`readout.ghosts`).

    Returns
    -------
    dict of ndarray of uint16
        Raw arrays; see `readout.raw_arrays`.
    """
    physics = exposing.settings.detector
    counts = exposed.counts
    if physics.crosstalk:
        received = ghosts(exposed.detector, counts, others)
        counts = [own + ghost for own, ghost in zip(counts, received, strict=True)]
    return raw_arrays(
        exposed.detector,
        counts,
        exposed.gains,
        bias_pattern(exposing.settings, exposed.detector),
        exposed.levels,
        physics,
        exposing.rng("readout", exposed.detector.id),
    )
