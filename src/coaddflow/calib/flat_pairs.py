"""Pairs of flats: level and noise of each amplifier.

Two flats with the same light differ by noise alone: what the pixels of a CCD do to the light, and
the shape of the illumination, cancel in their difference. For each amplifier and pair:

- counts are those above the overscan, of amplifiers as they stand in the file; what is left of the
  bias there, the mean level of bias exposures, is subtracted;
- both frames are scaled to the geometric mean of their levels: half of the variance of the
  difference then is that of a frame at the arithmetic mean, for photons exactly. It is taken about
  the means of blocks, so that light which has changed its shape does not count, and without the
  noise that the levels of the overscan bring into it;
- pixels far from the counts of their surroundings (defects) and differences of more than five
  standard deviations (cosmic rays) are left out.

Saturation as the camera states it is not believed here: it is to be measured.

References
----------
.. [1] Janesick 2007, "Photon Transfer", SPIE Press, chapter 5.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coaddflow.errors import CcdFailure
from coaddflow.image.statistics import iqr_sigma
from coaddflow.instrument.camera import AmplifierId, Camera, Detector
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.isr.detrend import PartlyDetrendedCcd, counts_above_overscan
from coaddflow.isr.overscan import without_trail
from coaddflow.pool import Pool, Worker
from coaddflow.settings.detrend import DetrendSettings
from coaddflow.tables.exposures import ExposureRow, file_of

_LOG = logging.getLogger(__name__)

_BLOCK = 32
"""Pixels on a side of what counts as the surroundings of a pixel."""

_DEFECT_FRACTION = 0.2
"""Pixels whose counts differ by more from their surroundings, as a fraction, are left out."""

_CLIP = 5.0
_CLIPPED_VARIANCE = 0.9999850
"""Variance of a normal distribution without what is farther off than `_CLIP`."""

_ROUNDING = 0.3
"""Noise that the converter makes, counts."""

_MOST_DIFFERENT = 0.1
"""Frames whose levels differ by a larger fraction are no pair."""

_SAME_TIME = 0.01
"""Exposure times that differ by a smaller fraction are the same."""

_SAME_SESSION = 0.5
"""Days between frames of a pair at most."""

_MIN_PIXELS = 1000
_MIN_OVERSCAN = 100

_MOST_BIASES = 5
"""Bias exposures that are averaged: only their level and noise count."""


class FlatPair(NamedTuple):
    """What two flats of the same light say of an amplifier; counts above the bias."""

    band: str
    """Band of both."""
    exposure_time: float
    """Mean of the two, s."""
    level: float
    """Mean counts of the two frames."""
    variance: float
    """Variance of a frame at this level, squared counts."""
    read_variance: float
    """The same without light, of overscan or bias exposures; NaN if there are none."""
    bright: float
    """Counts that 99 % of the pixels do not reach."""
    n_pixels: int
    """Pixels that it rests on."""
    level_difference: float
    """By which fraction the level of the second frame is higher."""
    bias_level: float
    """Counts without light, as they stand in the file."""


class PairOfFrames(NamedTuple):
    """An amplifier of two flats.

    Attributes
    ----------
    first, second : ndarray of float32, shape (ny, nx)
        Counts above the bias; NaN where there is no value.
    read_variance : float
        Variance of pixels without light, squared counts; NaN if it is not known.
    level_errors : tuple of float
        Errors of the overscan level of a row of both, counts.
    bias_level : float
        Counts without light, as they stand in the file.
    exposure_times : tuple of float
        Of both, s.
    band : str
        Band of both.
    """

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    read_variance: float
    level_errors: tuple[float, float]
    bias_level: float
    exposure_times: tuple[float, float]
    band: str = ""


def measure_pair(frames: PairOfFrames) -> FlatPair | str:
    """Return what a pair of flats says of an amplifier, or why it says nothing."""
    first, second = frames.first.astype(np.float64), frames.second.astype(np.float64)
    good = np.isfinite(first) & np.isfinite(second)
    if np.count_nonzero(good) < _MIN_PIXELS:
        return "too few pixels have a value"
    good &= _is_near_surroundings(first, good) & _is_near_surroundings(second, good)
    if np.count_nonzero(good) < _MIN_PIXELS:
        return "too few pixels have about the counts of their surroundings"
    for _ in range(2):
        means = first[good].mean(), second[good].mean()
        if min(means) <= 0:
            return "there is no light"
        scale = math.sqrt(means[1] / means[0])
        difference = _without_block_means(first * scale - second / scale, good)
        good &= np.abs(difference) <= _CLIP * max(iqr_sigma(difference[good]), _ROUNDING)
    level_difference = means[1] / means[0] - 1.0
    if abs(math.log(means[1] / means[0])) > _MOST_DIFFERENT:
        return f"their levels differ by {100 * abs(level_difference):.0f} %"
    n_blocks = math.prod(-(-n // _BLOCK) for n in first.shape)
    freedom = np.count_nonzero(good) - n_blocks
    variance = (difference[good] ** 2).sum() / max(freedom, 1) / _CLIPPED_VARIANCE / 2.0
    errors = frames.level_errors
    variance -= ((errors[0] * scale) ** 2 + (errors[1] / scale) ** 2) / 2.0
    return FlatPair(
        frames.band,
        float(np.mean(frames.exposure_times)),
        float(np.mean(means)),
        float(variance),
        frames.read_variance,
        float(np.percentile((first[good] + second[good]) / 2.0, 99.0)),
        int(np.count_nonzero(good)),
        level_difference,
        frames.bias_level,
    )


def _is_near_surroundings(frame: NDArray[np.float64], good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where pixels have about the counts of their block."""
    filled = np.where(good, frame, np.median(frame[good]))
    (ny, nx), size = frame.shape, _BLOCK
    medians = [
        [np.median(filled[y : y + size, x : x + size]) for x in range(0, nx, size)]
        for y in range(0, ny, size)
    ]
    around = np.repeat(np.repeat(np.array(medians), size, axis=0), size, axis=1)[:ny, :nx]
    away = frame - around
    return np.abs(away) <= _DEFECT_FRACTION * np.abs(around) + _CLIP * iqr_sigma(away[good])


def _without_block_means(
    difference: NDArray[np.float64], good: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return a difference of frames without its mean in each block."""
    y, x = (np.arange(n) // _BLOCK for n in difference.shape)
    block = y[:, None] * (x[-1] + 1) + x
    number = np.bincount(block[good], minlength=block[-1, -1] + 1)
    total = np.bincount(block[good], difference[good], minlength=block[-1, -1] + 1)
    return difference - (total / np.maximum(number, 1))[block]


def read_variance(first: NDArray, second: NDArray) -> float:
    """Return the variance of pixels without light about the level of their rows.

    Parameters
    ----------
    first, second : ndarray, shape (ny, nx)
        The same pixels of two frames, counts.

    Returns
    -------
    float
        Of one frame, squared counts; NaN with fewer than 100 pixels.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    finite = np.isfinite(difference)
    if np.count_nonzero(finite) < _MIN_OVERSCAN:
        return np.nan
    rows = [
        np.median(row[one]) if one.any() else 0.0
        for row, one in zip(difference, finite, strict=True)
    ]
    away = np.abs(difference - np.array(rows)[:, None])
    good = away <= _CLIP * max(iqr_sigma(difference[finite]), _ROUNDING)
    number = good.sum(axis=1, keepdims=True)
    total = np.where(good, difference, 0.0).sum(axis=1, keepdims=True)
    about_rows = np.where(good, difference - total / np.maximum(number, 1), 0.0)
    freedom = number.sum() - np.count_nonzero(number)
    return float((about_rows**2).sum() / max(freedom, 1) / 2.0)


# Files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlatExposures:
    """What is read of each CCD, with paths as they are opened."""

    groups: tuple[tuple[ExposureRow, ...], ...]
    """Flats of one band, exposure time and night, two or more, in the order of time."""
    biases: tuple[ExposureRow, ...]
    """Bias exposures; may be empty."""


def find_flats(rows: Sequence[ExposureRow], table: str) -> FlatExposures:
    """Return the flats of a table of exposures among which there may be pairs, and its biases.

    Parameters
    ----------
    rows : sequence of ExposureRow
        The exposures; those of other kinds are left out.
    table : str
        The table, which their paths are relative to.
    """
    rows = [row.model_copy(update={"path": str(file_of(row.path, table))}) for row in rows]
    flats = [row for row in rows if row.kind == "flat" and row.exposure_time > 0]
    flats.sort(key=lambda row: (row.band, row.exposure_time))
    groups = [
        tuple(night)
        for light in _split(flats, _has_same_light)
        for night in _split(sorted(light, key=_start), _is_same_session)
        if len(night) > 1
    ]
    biases = [row for row in rows if row.kind == "bias"][:_MOST_BIASES]
    return FlatExposures(tuple(groups), tuple(biases))


def _split(
    rows: Sequence[ExposureRow], belong: Callable[[ExposureRow, ExposureRow], bool]
) -> list[list[ExposureRow]]:
    """Return the runs of rows of which each belongs to the one before it."""
    runs: list[list[ExposureRow]] = []
    for row in rows:
        if runs and belong(runs[-1][-1], row):
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs


def _has_same_light(one: ExposureRow, other: ExposureRow) -> bool:
    same_time = math.isclose(one.exposure_time, other.exposure_time, rel_tol=_SAME_TIME)
    return same_time and one.band == other.band


def _is_same_session(one: ExposureRow, other: ExposureRow) -> bool:
    return _start(other) - _start(one) <= _SAME_SESSION


def _start(row: ExposureRow) -> float:
    return row.mjd or 0.0


def measure_pairs(
    flats: FlatExposures,
    camera: Camera,
    ccds: Sequence[int],
    detrend: DetrendSettings,
    workers: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[AmplifierId, list[FlatPair]]:
    """Measure all pairs of flats, CCD by CCD.

    Flats that follow each other are a pair; if that is none on any amplifier of a CCD, the second
    is tried with the one after it. A frame that cannot be read is left out, with a warning.

    Parameters
    ----------
    flats : FlatExposures
        From `find_flats`.
    camera : Camera
        The camera; only its sections are used.
    ccds : sequence of int
        The CCDs.
    detrend : DetrendSettings
        How the level of the overscan is found.
    workers : int
        Processes that share the CCDs.
    progress : callable, optional
        See `Pool.map`.

    Raises
    ------
    InputError
        If the camera has no such CCD, or the overscan does not suit the chosen method.
    """
    for ccd in ccds:
        camera.detector(ccd)
    backend = "processes" if min(workers, len(ccds)) > 1 else "serial"
    with Pool(backend, min(workers, len(ccds)) if backend == "processes" else None) as pool:
        pool.broadcast(
            flats=flats, camera=camera, detrend=detrend.model_copy(update={"saturation": False})
        )
        results = pool.map(_pairs_of_ccd, ccds, label="CCD {}".format, progress=progress)
    for failure in results.failures:
        failure.raise_again()
    return {
        (ccd, amplifier): pairs
        for ccd, of_ccd in zip(ccds, results, strict=True)
        for amplifier, pairs in of_ccd.items()
    }


class _Frame(NamedTuple):
    """A CCD of an exposure: counts above the overscan, and its raw arrays."""

    row: ExposureRow
    ccd: PartlyDetrendedCcd
    arrays: tuple[NDArray, ...]


def _pairs_of_ccd(ccd: int, worker: Worker) -> dict[str, list[FlatPair]]:
    """Measure all pairs on a CCD."""
    flats: FlatExposures = worker.constants["flats"]
    camera, detrend = worker.constants["camera"], worker.constants["detrend"]

    def read(row: ExposureRow) -> _Frame | None:
        try:
            return _read_unlimited(row, camera, camera.detector(ccd), detrend)
        except CcdFailure as failure:
            _LOG.warning("exposure %s is left out: %s", row.exposure, failure)
            return None

    light_off = _without_light([one.ccd for row in flats.biases if (one := read(row))])
    found: dict[str, list[FlatPair]] = {one.name: [] for one in camera.detector(ccd).amplifiers}
    for group in flats.groups:
        before = None
        for row in group:
            frame = read(row)
            pairs = _measured(before, frame, light_off) if before and frame else {}
            for name, pair in pairs.items():
                found[name].append(pair)
            before = None if pairs else frame or before
    return found


def _read_unlimited(
    row: ExposureRow, camera: Camera, detector: Detector, detrend: DetrendSettings
) -> _Frame:
    """Read a CCD, whatever the camera says of its saturation."""
    raw = read_raw_ccd(row.path, camera, detector, detrend.check_raw, full_at_maximum=True)
    never = [one.model_copy(update={"saturation": np.inf}) for one in raw.detector.amplifiers]
    unlimited = raw.detector.model_copy(update={"amplifiers": tuple(never)})
    raw = dataclasses.replace(raw, detector=unlimited)
    return _Frame(row, counts_above_overscan(raw, detrend), raw.arrays)


def _measured(
    first: _Frame, second: _Frame, light_off: Mapping[str, tuple[float, float]]
) -> dict[str, FlatPair]:
    """Return by amplifier what a pair of frames says; say why others say nothing."""
    found: dict[str, FlatPair] = {}
    reasons: dict[str, list[str]] = {}
    for name, frames in _amplifiers_of(first, second, light_off):
        measured = measure_pair(frames)
        if isinstance(measured, str):
            reasons.setdefault(measured, []).append(name)
        else:
            found[name] = measured
    for why, names in reasons.items():
        _LOG.warning(
            "CCD %d, amplifiers %s: flats %s and %s are no pair: %s",
            first.ccd.detector.id,
            ", ".join(names),
            first.row.exposure,
            second.row.exposure,
            why,
        )
    return found


def _amplifiers_of(
    first: _Frame, second: _Frame, light_off: Mapping[str, tuple[float, float]]
) -> Iterator[tuple[str, PairOfFrames]]:
    """Yield name and pixels of each amplifier of two frames."""
    times = first.row.exposure_time, second.row.exposure_time
    settings = first.ccd.settings
    for i, amplifier in enumerate(first.ccd.detector.amplifiers):
        offset, noise = light_off.get(amplifier.name, (0.0, np.nan))
        if amplifier.name in first.ccd.overscan:
            x0, y0, x1, y1 = without_trail(amplifier, settings.overscan_skip)
            noise = read_variance(*(one.arrays[i][y0:y1, x0:x1] for one in (first, second)))
        nothing = settings.pedestal, 0.0, 0.0
        levels = [one.ccd.overscan.get(amplifier.name, nothing) for one in (first, second)]
        counts = (one.ccd.amplifiers[i] - np.float32(offset) for one in (first, second))
        errors = levels[0][2], levels[1][2]
        bias = levels[0][0] + offset
        yield amplifier.name, PairOfFrames(*counts, noise, errors, bias, times, first.row.band)


def _without_light(biases: Sequence[PartlyDetrendedCcd]) -> Mapping[str, tuple[float, float]]:
    """Return by amplifier mean level above the overscan and variance of bias exposures, counts."""
    found = {}
    for i, amplifier in enumerate(biases[0].detector.amplifiers if biases else ()):
        frames = [ccd.amplifiers[i] for ccd in biases if np.isfinite(ccd.amplifiers[i]).any()]
        if frames:
            noise = read_variance(*frames[:2]) if len(frames) > 1 else np.nan
            found[amplifier.name] = float(np.mean([_clipped_mean(one) for one in frames])), noise
    return found


def _clipped_mean(counts: NDArray[np.float32]) -> float:
    """Return the mean of counts without outliers."""
    finite = counts[np.isfinite(counts)].astype(np.float64)
    limit = _CLIP * max(iqr_sigma(finite), _ROUNDING)
    return float(finite[np.abs(finite - np.median(finite)) <= limit].mean())
