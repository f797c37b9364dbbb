"""The CCDs themselves: response, dark current, defects, full wells.

What is the same in all exposures (`make_silicon`) comes from the seed and the CCD's number.

References
----------
.. [1] Janesick 2001, Scientific Charge-Coupled Devices, SPIE.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline

from coaddflow.instrument.camera import Detector
from coaddflow.simulate.settings import DetectorSimulation, SimulationSettings
from coaddflow.simulate.streams import stream

_DEAD = 0.05
"""Response of bad columns and spots."""


@dataclass(frozen=True)
class Silicon:
    """Properties of one CCD that stay."""

    response: NDArray[np.float32]
    """Relative response of the pixels, about 1, nearly 0 in defects; shape (ny, nx)."""
    dark: NDArray[np.float32]
    """Dark current, electrons per second; shape (ny, nx)."""
    gains: tuple[float, ...]
    """True electrons per count of the amplifiers."""


def make_silicon(settings: SimulationSettings, detector: Detector) -> Silicon:
    """Return the properties of a CCD, which follow from the seed and its number."""
    physics = settings.detector
    rng = stream(settings.seed, "silicon", detector.id)
    gains = tuple(
        amplifier.gain * float(np.exp(physics.gain_error * rng.normal()))
        for amplifier in detector.amplifiers
    )
    response = 1.0 + physics.large_response * _smooth_pattern(rng, detector.shape)
    response *= 1.0 + physics.pixel_response * rng.standard_normal(detector.shape, np.float32)
    dark = physics.dark * (1.0 + 0.3 * _smooth_pattern(rng, detector.shape))
    _add_hot_pixels(dark, physics, rng)
    _spoil(response, detector, physics, rng)
    return Silicon(
        np.maximum(response, 0.0).astype(np.float32),
        np.maximum(dark, 0.0).astype(np.float32),
        gains,
    )


def _smooth_pattern(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return a smooth random surface of mean 0 and of order 1."""
    knots = rng.normal(size=(6, 6))
    knots -= knots.mean()
    y, x = (np.linspace(0.0, 5.0, n) for n in shape)
    spline = RectBivariateSpline(np.arange(6), np.arange(6), knots, kx=3, ky=3)
    return spline(y, x).astype(np.float32)


def _add_hot_pixels(
    dark: NDArray[np.float32], physics: DetectorSimulation, rng: np.random.Generator
) -> None:
    ny, nx = dark.shape
    n = rng.poisson(physics.hot_pixels * dark.size)
    y, x = rng.integers(ny, size=n), rng.integers(nx, size=n)
    dark[y, x] += (physics.hot_rate * np.exp(rng.normal(size=n))).astype(np.float32)


def _spoil(
    response: NDArray[np.float32],
    detector: Detector,
    physics: DetectorSimulation,
    rng: np.random.Generator,
) -> None:
    """Let the bad columns and spots lose their response."""
    boxes = list(detector.defects) if physics.defects else []
    nx, ny = detector.size
    for _ in range(rng.poisson(physics.extra_bad_columns)):
        x, y = int(rng.integers(nx)), int(rng.integers(ny // 2))
        boxes.append((x, y, x + 1, ny))
    for x0, y0, x1, y1 in boxes:
        response[y0:y1, x0:x1] *= _DEAD


def bias_pattern(settings: SimulationSettings, detector: Detector) -> NDArray[np.float32]:
    """Return the fixed pattern of the bias, counts, shape (ny, nx).

    It is a slope along the columns as they are read, and columns.
    """
    rng = stream(settings.seed, "bias pattern", detector.id)
    pattern = np.zeros(detector.shape, dtype=np.float32)
    for amplifier in detector.amplifiers:
        x0, y0, x1, y1 = amplifier.target
        ramp = np.exp(-np.arange(y1 - y0) / (0.2 * (y1 - y0)))
        columns = 0.3 * rng.normal(size=x1 - x0)
        if amplifier.read_reversed[1]:
            ramp = ramp[::-1]
        pattern[y0:y1, x0:x1] = settings.detector.bias_structure * (
            ramp[:, None] + columns[None, :]
        )
    return pattern


def bleed(electrons: NDArray[np.float32], full_well: float) -> None:
    """Let full wells of an amplifier's pixels spill along their columns, in place; electrons.

    The excess of each run of full pixels goes in equal parts to both sides, where it fills one
    pixel after the other; what reaches the end of the column is lost.
    """
    for x in np.flatnonzero((electrons > full_well).any(axis=0)):
        column = electrons[:, x].astype(float)
        full = np.concatenate([[False], column > full_well, [False]])
        edges = np.flatnonzero(full[1:] != full[:-1])
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            excess = np.sum(np.maximum(column[start:end] - full_well, 0.0))
            column[start:end] = full_well
            _fill(column[end:], excess / 2.0, full_well)
            _fill(column[:start][::-1], excess / 2.0, full_well)
        electrons[:, x] = np.minimum(column, full_well)


def _fill(pixels: NDArray[np.float64], charge: float, full_well: float) -> None:
    """Fill pixels one after the other up to the full well, in place."""
    room = np.maximum(full_well - pixels, 0.0)
    before = np.concatenate([[0.0], np.cumsum(room)[:-1]])
    pixels += np.clip(charge - before, 0.0, room)
