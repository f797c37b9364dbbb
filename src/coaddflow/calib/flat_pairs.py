"""Pairs of flats: level and noise of each amplifier.

Two flats with the same light differ by noise alone: what the pixels of a CCD do to the light, and
the shape of the illumination, cancel in their difference. For each amplifier and pair:

- counts are those above the overscan, of amplifiers as they stand in the file; what is left of the
  bias there, a mean of bias exposures, is subtracted;
- the second frame is scaled to the level of the first. Half of the variance of the difference is
  the variance of a frame; the noise that the levels of the overscan bring into it is subtracted;
- pixels of a response far from that of their surroundings (defects) and differences of more than
  five standard deviations (cosmic rays) are left out.

References
----------
.. [1] Janesick 2007, "Photon Transfer", SPIE Press, chapter 5.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coaddflow.errors import CcdFailure
from coaddflow.image.statistics import iqr_sigma
from coaddflow.instrument.camera import Camera
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.isr.detrend import PartlyDetrendedCcd, counts_above_overscan
from coaddflow.pool import Pool, Worker
from coaddflow.settings.detrend import DetrendSettings
from coaddflow.tables.exposures import ExposureRow, file_of

_LOG = logging.getLogger(__name__)

_BLOCK = 32
"""Pixels on a side of what counts as the surroundings of a pixel."""

_STRANGE = 0.2
"""Pixels whose counts differ by more from their surroundings, as a fraction, are left out."""

_CLIP = 5.0
_CLIPPED_VARIANCE = 0.9999850
"""Variance of a normal distribution without what is farther off than `_CLIP`."""

_ROUNDING = 0.3
"""Noise that the converter makes, counts."""

_MOST_DIFFERENT = 0.1
"""Frames whose levels differ by a larger fraction are no pair."""

_SAME_TIME = 1e-3
"""Exposure times that differ by a smaller fraction are the same."""

_MIN_PIXELS = 1000

_MOST_BIASES = 5
"""Bias exposures that are averaged: only their level counts."""

AmplifierId = tuple[int, str]
"""CCD and amplifier."""


class FlatPair(NamedTuple):
    """What two flats of the same light say of an amplifier; counts above the overscan."""

    exposure_time: float
    """Mean of the two, s."""
    level: float
    """Mean counts of a frame."""
    variance: float
    """Variance of a frame, squared counts."""
    read_variance: float
    """The same of overscan pixels; NaN without overscan."""
    n_pixels: int
    """Pixels that it rests on."""
    lamp: float
    """By which fraction the light of the second frame differs."""
    bias_level: float = 0.0
    """Counts without light, as they stand in the file."""


class PairOfFrames(NamedTuple):
    """An amplifier of two flats.

    Attributes
    ----------
    first, second : ndarray of float32, shape (ny, nx)
        Counts above the overscan; NaN where there is no value.
    overscan : tuple of two ndarray, or None
        Pixels of the overscan of both, raw counts.
    level_error : float
        Error of the overscan level of a row, counts.
    bias_level : float
        Counts without light, as they stand in the file.
    exposure_times : tuple of float
        Of both, s.
    """

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    overscan: tuple[NDArray, NDArray] | None
    level_error: float
    bias_level: float
    exposure_times: tuple[float, float]


def measure_pair(frames: PairOfFrames) -> FlatPair | None:
    """Return what a pair of flats says of an amplifier; None if they are no pair.

    They are none if their levels differ by more than a tenth, or too few pixels have a value.
    """
    first, second = frames.first.astype(np.float64), frames.second.astype(np.float64)
    good = np.isfinite(first) & np.isfinite(second)
    if np.count_nonzero(good) < _MIN_PIXELS:
        return None
    good &= _is_ordinary(first, good) & _is_ordinary(second, good)
    if np.count_nonzero(good) < _MIN_PIXELS:
        return None
    for _ in range(2):
        means = first[good].mean(), second[good].mean()
        if min(means) <= 0:
            return None
        ratio = means[0] / means[1]
        difference = first - ratio * second
        centre = difference[good].mean()
        good &= np.abs(difference - centre) <= _CLIP * max(iqr_sigma(difference[good]), _ROUNDING)
    if abs(ratio - 1.0) > _MOST_DIFFERENT:
        return None
    # of photons, the second frame has 1/ratio of the first one's, whose variance counts ratio^2
    variance = difference[good].var() / _CLIPPED_VARIANCE / 2.0
    variance -= frames.level_error**2 * (1.0 + ratio**2) / 2.0
    return FlatPair(
        float(np.mean(frames.exposure_times)),
        means[0] * (1.0 + ratio) / 2.0,
        variance,
        _read_variance(frames.overscan),
        int(np.count_nonzero(good)),
        1.0 / ratio - 1.0,
        frames.bias_level,
    )


def _is_ordinary(frame: NDArray[np.float64], good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return where pixels have about the counts of their surroundings."""
    middle = np.median(frame[good])
    filled = np.where(good, frame, middle)
    ny, nx = frame.shape
    blocks = [
        [np.median(filled[y : y + _BLOCK, x : x + _BLOCK]) for x in range(0, nx, _BLOCK)]
        for y in range(0, ny, _BLOCK)
    ]
    around = np.repeat(np.repeat(np.array(blocks), _BLOCK, axis=0), _BLOCK, axis=1)[:ny, :nx]
    return np.abs(frame - around) <= _STRANGE * np.abs(around) + _CLIP * iqr_sigma(
        (frame - around)[good]
    )


def _read_variance(overscan: tuple[NDArray, NDArray] | None) -> float:
    """Return the variance of overscan pixels about the level of their rows."""
    if overscan is None:
        return np.nan
    first, second = (np.asarray(one, np.float64) for one in overscan)
    difference = first - second
    away = np.abs(difference - np.nanmedian(difference, axis=1, keepdims=True))
    finite = away[np.isfinite(away)]
    if finite.size < _MIN_PIXELS // 10:
        return np.nan
    good = away <= _CLIP * max(iqr_sigma(difference[np.isfinite(difference)]), _ROUNDING)
    number = good.sum(axis=1, keepdims=True)
    total = np.where(good, difference, 0.0).sum(axis=1, keepdims=True)
    about_rows = np.where(good, difference - total / np.maximum(number, 1), 0.0)
    freedom = number.sum() - np.count_nonzero(number)
    return float((about_rows**2).sum() / max(freedom, 1) / 2.0)


# Files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FlatExposures:
    """What is read of each CCD."""

    pairs: tuple[tuple[ExposureRow, ExposureRow], ...]
    """Flats of the same light, with paths as they are opened."""
    biases: tuple[ExposureRow, ...]
    """Bias exposures; may be empty."""


def find_pairs(rows: Sequence[ExposureRow], table: str) -> FlatExposures:
    """Return the pairs of flats of a table of exposures, and bias exposures.

    Flats of one band and exposure time that follow each other are a pair; each is in one pair.

    Parameters
    ----------
    rows : sequence of ExposureRow
        The exposures; those of other kinds are left out.
    table : str
        The table, which their paths are relative to.
    """
    rows = [row.model_copy(update={"path": str(file_of(row.path, table))}) for row in rows]
    flats = [row for row in rows if row.kind == "flat" and row.exposure_time > 0]
    flats.sort(key=lambda row: (row.band, round(math.log(row.exposure_time), 2), row.mjd or 0.0))
    pairs, taken = [], set()
    for one, other in pairwise(flats):
        same = math.isclose(one.exposure_time, other.exposure_time, rel_tol=_SAME_TIME)
        if one.band == other.band and same and one.exposure not in taken:
            pairs.append((one, other))
            taken.add(other.exposure)
    biases = [row for row in rows if row.kind == "bias"][:_MOST_BIASES]
    return FlatExposures(tuple(pairs), tuple(biases))


def measure_pairs(
    flats: FlatExposures,
    camera: Camera,
    ccds: Sequence[int],
    detrend: DetrendSettings,
    workers: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[AmplifierId, list[FlatPair]]:
    """Measure all pairs of flats, CCD by CCD.

    A pair that cannot be read on a CCD is left out there, with a warning.

    Parameters
    ----------
    flats : FlatExposures
        From `find_pairs`.
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
        pool.broadcast(flats=flats, camera=camera, detrend=detrend)
        results = pool.map(
            _pairs_of_ccd,
            ccds,
            label="CCD {}".format,
            progress=progress,
        )
    for failure in results.failures:
        failure.raise_again()
    return {
        (ccd, amplifier): pairs
        for ccd, of_ccd in zip(ccds, results, strict=True)
        for amplifier, pairs in of_ccd.items()
    }


def _pairs_of_ccd(ccd: int, worker: Worker) -> dict[str, list[FlatPair]]:
    """Measure all pairs on a CCD."""
    flats: FlatExposures = worker.constants["flats"]

    def read(row: ExposureRow) -> tuple[PartlyDetrendedCcd, tuple[NDArray, ...]] | None:
        camera, detrend = worker.constants["camera"], worker.constants["detrend"]
        try:
            raw = read_raw_ccd(row.path, camera, camera.detector(ccd), detrend.check_raw)
            return counts_above_overscan(raw, detrend), raw.arrays
        except CcdFailure as failure:
            _LOG.warning("exposure %s is left out: %s", row.exposure, failure)
            return None

    offsets = _bias_offsets([one[0] for row in flats.biases if (one := read(row))])
    found: dict[str, list[FlatPair]] = {
        one.name: [] for one in worker.constants["camera"].detector(ccd).amplifiers
    }
    for rows in flats.pairs:
        frames = [read(row) for row in rows]
        if None in frames:
            continue
        times = rows[0].exposure_time, rows[1].exposure_time
        for name, pair in _amplifiers_of(*frames, offsets, times):
            measured = measure_pair(pair)
            if measured is None:
                names = " and ".join(row.exposure for row in rows)
                _LOG.warning("amplifier %s: %s are no pair of flats", name, names)
            else:
                found[name].append(measured)
    return found


def _bias_offsets(biases: Sequence[PartlyDetrendedCcd]) -> Mapping[str, float]:
    """Return by amplifier the median counts of bias exposures above their overscan."""
    offsets: dict[str, list[float]] = {}
    for ccd in biases:
        for amplifier, counts in zip(ccd.detector.amplifiers, ccd.amplifiers, strict=True):
            if np.isfinite(counts).any():
                offsets.setdefault(amplifier.name, []).append(_middle(counts))
    return {name: float(np.mean(values)) for name, values in offsets.items()}


def _middle(counts: NDArray[np.float32]) -> float:
    """Return the mean of counts without outliers."""
    finite = counts[np.isfinite(counts)].astype(np.float64)
    limit = _CLIP * max(iqr_sigma(finite), _ROUNDING)
    return float(finite[np.abs(finite - np.median(finite)) <= limit].mean())


def _amplifiers_of(
    first: tuple[PartlyDetrendedCcd, tuple[NDArray, ...]],
    second: tuple[PartlyDetrendedCcd, tuple[NDArray, ...]],
    offsets: Mapping[str, float],
    times: tuple[float, float],
) -> Iterator[tuple[str, PairOfFrames]]:
    """Yield name and pixels of each amplifier of two frames."""
    (one, arrays), (other, other_arrays) = first, second
    for i, amplifier in enumerate(one.detector.amplifiers):
        overscan, section = None, amplifier.overscan
        if section is not None and amplifier.name in one.overscan:
            x0, y0, x1, y1 = section
            overscan = arrays[i][y0:y1, x0:x1], other_arrays[i][y0:y1, x0:x1]
        level, _, error = one.overscan.get(amplifier.name, (one.settings.pedestal, 0.0, 0.0))
        offset = np.float32(offsets.get(amplifier.name, 0.0))
        counts = one.amplifiers[i] - offset, other.amplifiers[i] - offset
        yield amplifier.name, PairOfFrames(*counts, overscan, error, level + float(offset), times)
