"""From electrons to the numbers in the file: gain, linearity, crosstalk, bias, noise, converter."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from coaddflow.geometry.box import Box
from coaddflow.instrument.camera import Amplifier, Detector
from coaddflow.simulate.settings import DetectorSimulation

_MARGIN_COUNTS = 50.0
"""By so much a full pixel lies above the saturation that the camera file tells, at least."""


@dataclass(frozen=True)
class BiasLevels:
    """Bias level of each amplifier in one exposure."""

    mean: NDArray[np.float64]
    """Counts; shape (n_amplifiers,)."""
    rows: NDArray[np.float64]
    """Change with the row of the raw array, counts; shape (n_amplifiers, n_rows)."""


def bias_levels(
    physics: DetectorSimulation,
    detector: Detector,
    static: np.random.Generator,
    rng: np.random.Generator,
) -> BiasLevels:
    """Return the bias levels of an exposure: constant, drift with time, drift during readout.

    ``static`` and ``rng`` are the random numbers of the CCD and of the exposure.
    """
    n_rows, n = raw_shape(detector)[0], len(detector.amplifiers)
    mean = physics.bias_level * (1.0 + 0.1 * static.uniform(-1.0, 1.0, n))
    mean += physics.bias_drift * rng.normal(size=n)
    t = np.linspace(0.0, 1.0, n_rows)
    phase, speed = rng.uniform(0.0, 2.0 * np.pi, (n, 1)), rng.uniform(1.0, 2.0, (n, 1))
    rows = physics.row_drift * np.sin(phase + 2.0 * np.pi * speed * t)
    return BiasLevels(mean, rows)


def full_well(
    amplifier: Amplifier, gain: float, level: float, physics: DetectorSimulation
) -> float:
    """Return the electrons at which a pixel is full: a little above the file's saturation."""
    spread = 3.0 * physics.row_drift + 3.0 * physics.bias_structure + _MARGIN_COUNTS
    counts = amplifier.saturation - level + spread
    return gain * linear_counts(np.array(max(counts, 1.0)), _linearity(amplifier, physics)).item()


def linear_counts(counts: NDArray, linearity: Sequence[float]) -> NDArray:
    """Return what the camera file's polynomial makes of counts z: z + c2 z^2 + c3 z^3 ..."""
    total = np.zeros_like(counts)
    for coefficient in reversed(linearity):
        total = (total + coefficient) * counts
    return counts + total * counts


def measured_counts(linear: NDArray, linearity: Sequence[float]) -> NDArray:
    """Invert `linear_counts` (Newton's method; the polynomial is nearly linear)."""
    if not any(linearity):
        return linear
    counts = linear.copy()
    for _ in range(4):
        slope = np.ones_like(counts)
        for power, coefficient in enumerate(linearity, start=1):
            slope += (power + 1) * coefficient * counts**power
        counts -= (linear_counts(counts, linearity) - linear) / slope
    return counts


def _linearity(amplifier: Amplifier, physics: DetectorSimulation) -> Sequence[float]:
    return amplifier.linearity if physics.linearity else ()


def amplifier_counts(
    electrons: NDArray[np.float32],
    detector: Detector,
    gains: Sequence[float],
    physics: DetectorSimulation,
) -> list[NDArray[np.float32]]:
    """Return the counts above bias of each amplifier, in the order in which they are read.

    Parameters
    ----------
    electrons : ndarray of float32, shape (ny, nx)
        Charge of the assembled CCD.
    gains : sequence of float
        True electrons per count of its amplifiers.
    """
    counts = []
    for amplifier, gain in zip(detector.amplifiers, gains, strict=True):
        pixels = _cut(electrons, amplifier.target) / np.float32(gain)
        counts.append(
            read_order(measured_counts(pixels, _linearity(amplifier, physics)), amplifier)
        )
    return counts


def read_order(pixels: NDArray, amplifier: Amplifier) -> NDArray:
    """Turn an amplifier's pixels from the order of the CCD to that of readout, or back."""
    flip_x, flip_y = amplifier.read_reversed
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def ghosts(
    detector: Detector,
    own: Sequence[NDArray[np.float32]],
    others: Sequence[tuple[int, float, NDArray[np.float32]]],
) -> list[NDArray[np.float32]]:
    """Return the crosstalk that each amplifier of a CCD receives, in readout order.

    Parameters
    ----------
    own : sequence of ndarray
        Counts of the CCD's amplifiers (`amplifier_counts`).
    others : sequence of (int, float, ndarray)
        For aggressors on other CCDs: victim (position in ``detector.amplifiers``), coefficient, and
        the aggressor's counts.
    """
    received = [np.zeros_like(counts) for counts in own]
    if detector.crosstalk is not None:
        for victim, row in enumerate(detector.crosstalk):
            for aggressor, coefficient in enumerate(row):
                if aggressor != victim and coefficient:
                    _add_ghost(received[victim], coefficient, own[aggressor])
    for victim, coefficient, counts in others:
        _add_ghost(received[victim], coefficient, counts)
    return received


def _add_ghost(victim: NDArray[np.float32], coefficient: float, aggressor: NDArray) -> None:
    ny, nx = np.minimum(victim.shape, aggressor.shape)
    victim[:ny, :nx] += np.float32(coefficient) * aggressor[:ny, :nx]


def raw_shape(detector: Detector) -> tuple[int, int]:
    """Return the shape (rows, columns) of the CCD's raw arrays."""
    if detector.raw_size is not None:
        return detector.raw_size[1], detector.raw_size[0]
    boxes = [box for amplifier in detector.amplifiers for box in _boxes(amplifier)]
    return max(box[3] for box in boxes), max(box[2] for box in boxes)


def _boxes(amplifier: Amplifier) -> list[Box]:
    return [b for b in (amplifier.data, amplifier.overscan, amplifier.prescan) if b is not None]


def raw_arrays(
    detector: Detector,
    counts: Sequence[NDArray[np.float32]],
    gains: Sequence[float],
    pattern: NDArray[np.float32],
    levels: BiasLevels,
    physics: DetectorSimulation,
    rng: np.random.Generator,
) -> dict[str | int | None, NDArray[np.uint16]]:
    """Return the arrays of a CCD's file, by the extension of the amplifiers that they hold.

    Parameters
    ----------
    counts : sequence of ndarray of float32
        Counts above bias of each amplifier, with crosstalk, in readout order.
    gains : sequence of float
        True electrons per count of the amplifiers.
    pattern : ndarray of float32, shape (ny, nx)
        Fixed pattern of the bias, counts.

    Returns
    -------
    dict of ndarray of uint16
        One array under the key None if the amplifiers have no extensions of their own.
    """
    n_rows, n_columns = raw_shape(detector)
    arrays: dict[str | int | None, NDArray] = {}
    for i, amplifier in enumerate(detector.amplifiers):
        noise = amplifier.read_noise / gains[i] if physics.read_noise else 0.0
        level = levels.mean[i] + levels.rows[i][:, None]
        if amplifier.extension not in arrays:
            # also what no section names, such as rows beyond the overscan
            arrays[amplifier.extension] = np.zeros((n_rows, n_columns), np.float32) + level
            arrays[amplifier.extension] += noise * rng.standard_normal((n_rows, n_columns))
        raw = arrays[amplifier.extension]
        for box in _boxes(amplifier):
            pixels = _cut(raw, box)
            pixels[:] = level[box[1] : box[3]]
            pixels += noise * rng.standard_normal(pixels.shape, np.float32)
        signal = read_order(counts[i], amplifier) + _cut(pattern, amplifier.target)
        _cut(raw, amplifier.data)[:] += signal[
            :: -1 if amplifier.flip_y else 1, :: -1 if amplifier.flip_x else 1
        ]
    top = 2**physics.bits - 1
    return {key: np.clip(np.rint(raw), 0, top).astype(np.uint16) for key, raw in arrays.items()}


def _cut(array: NDArray, box: Box) -> NDArray:
    x0, y0, x1, y1 = box
    return array[y0:y1, x0:x1]
