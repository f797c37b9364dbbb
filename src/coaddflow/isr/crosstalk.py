"""Crosstalk between the amplifiers of a camera.

All amplifiers are read out in step. While one of them (the aggressor) reads a bright pixel, a
small fraction of its signal leaks into what the others (the victims) read at the same moment, and
leaves a faint ghost there, sometimes a negative one, mirrored where the readout runs the other
way [1]_. So pixels belong together that have the same position in the order of readout, on one CCD
or on two, and all arrays of this module are in that order, in counts above the bias level. The
correction is the sum of the aggressors, each times its coefficient; signals are taken as measured,
since ghosts of ghosts are of second order in the coefficients [2]_.

Crosstalk arises before the analogue-to-digital converter: of a saturated pixel only the clipped
signal is known, so the correction of its ghost is a lower limit. It is applied all the same, and
the ghost is flagged where it exceeds a fraction of the noise instead of the noise itself: a pixel
holds no more than a few times what the converter can register, so that unflagged residuals are
below the noise.

References
----------
.. [1] Freyhammer et al. 2001, Experimental Astronomy 12, 147 (crosstalk of CCDs with several
   readout ports).
.. [2] Bernstein et al. 2017, PASP 129, 114502 (detrending of DECam), section 2.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from coaddflow.image.row_blocks import over_rows
from coaddflow.instrument.camera import Crosstalk

_ROWS = 64
"""Rows that are corrected at once: what they need stays in the cache."""


@dataclass(frozen=True)
class AmplifierSignal:
    """The signal that one amplifier measured.

    Attributes
    ----------
    counts : ndarray of float32, shape (ny, nx)
        Counts above the bias level, not corrected for crosstalk, in the order of readout. NaN is
        taken for no signal.
    saturated : ndarray of int, shape (n,)
        Positions in the flattened ``counts`` where the converter or the pixel was full.
    """

    counts: NDArray[np.float32]
    saturated: NDArray[np.intp]


class Aggressor(NamedTuple):
    """An amplifier of another CCD whose signal leaks into one of this CCD.

    Attributes
    ----------
    victim : str
        Amplifier of this CCD.
    source : tuple of (int, str)
        CCD and amplifier of the aggressor.
    coefficient : float
        Fraction of the aggressor's counts.
    signal : AmplifierSignal or None
        None where the other CCD could not be read.
    """

    victim: str
    source: tuple[int, str]
    coefficient: float
    signal: AmplifierSignal | None


class VictimNoise(NamedTuple):
    """The noise of an amplifier: gain in electrons per count, read noise in electrons."""

    gain: float
    read_noise: float

    def of(self, counts: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the standard deviation of pixels, counts."""
        photons = np.maximum(counts, 0.0) / self.gain
        return np.sqrt(photons + (self.read_noise / self.gain) ** 2)


def collect_aggressors(
    links: Sequence[Crosstalk], signals: Mapping[tuple[int, str], AmplifierSignal]
) -> tuple[Aggressor, ...]:
    """Return the aggressors of a CCD with their signals.

    ``links`` are those that end on the CCD (`Camera.crosstalk_into`), ``signals`` those of the
    exposure by CCD and amplifier; CCDs that could not be read are not among them.
    """
    return tuple(
        Aggressor(link.victim[1], link.aggressor, link.coefficient, signals.get(link.aggressor))
        for link in links
    )


def subtract_ghosts(
    counts: Sequence[NDArray[np.float32]],
    sources: Sequence[Sequence[tuple[float, int | AmplifierSignal]]],
    noise: Sequence[VictimNoise],
    saturated: Sequence[NDArray[np.intp]],
    saturated_part: float,
    threads: int = 1,
) -> list[NDArray[np.bool_]]:
    """Subtract the ghosts of all aggressors from the amplifiers of a CCD, in place.

    Amplifiers may differ in size: a pixel without a partner in the order of readout gets no ghost.

    Parameters
    ----------
    counts : sequence of ndarray of float32, each of shape (ny, nx)
        Counts of the amplifiers above their bias level, in the order of readout (views will
        do). Changed.
    sources : sequence of sequence of (float, int or AmplifierSignal)
        For every amplifier its aggressors: coefficient, and the position of the aggressor in
        ``counts`` or, for one of another CCD, its signal.
    noise : sequence of VictimNoise
        Gain and read noise of the amplifiers.
    saturated : sequence of ndarray of int
        Positions of saturated pixels in the flattened ``counts`` of the amplifiers.
    saturated_part : float
        Ghosts of saturated pixels are flagged above this fraction of the noise.
    threads : int
        Number of threads that share the rows.

    Returns
    -------
    list of ndarray of bool, of the shapes of ``counts``
        Pixels whose correction is larger than their noise, or not known well enough.
    """
    strong = [np.zeros(victim.shape, bool) for victim in counts]

    def work(first: int, last: int) -> None:
        for start in range(first, last, _ROWS):
            rows = slice(start, min(start + _ROWS, last))
            _subtract_in_rows(rows, counts, sources, noise, strong)

    over_rows(work, max(len(victim) for victim in counts), threads)
    for victim, links in enumerate(sources):
        for coefficient, aggressor in links:
            signal = aggressor
            if isinstance(aggressor, int):
                signal = AmplifierSignal(counts[aggressor], saturated[aggressor])
            y, x, ghost = _clipped_ghosts(coefficient, signal, counts[victim].shape)
            limit = saturated_part * noise[victim].of(counts[victim][y, x])
            strong[victim][y, x] |= np.abs(ghost) > limit
    return strong


def _subtract_in_rows(
    rows: slice,
    counts: Sequence[NDArray[np.float32]],
    sources: Sequence[Sequence[tuple[float, int | AmplifierSignal]]],
    noise: Sequence[VictimNoise],
    strong: Sequence[NDArray[np.bool_]],
) -> None:
    """Subtract the ghosts in some rows, and mark where they are larger than the noise."""
    within = {one for links in sources for _, one in links if isinstance(one, int)}
    # as measured: victims are aggressors as well
    measured = {i: np.nan_to_num(counts[i][rows], nan=0.0) for i in within}
    for victim, links in enumerate(sources):
        pixels = counts[victim][rows]
        if not links or not pixels.size:
            continue
        ghost = np.zeros(pixels.shape, np.float32)
        for coefficient, one in links:
            signal = measured[one] if isinstance(one, int) else one.counts[rows]
            ny, nx = np.minimum(ghost.shape, signal.shape)
            ghost[:ny, :nx] += np.float32(coefficient) * signal[:ny, :nx]
        pixels -= ghost
        strong[victim][rows] = np.abs(ghost) > noise[victim].of(pixels)


def _clipped_ghosts(
    coefficient: float, signal: AmplifierSignal, shape: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """Return where the ghosts of saturated pixels are on an amplifier, and their lower limits."""
    y, x = np.unravel_index(signal.saturated, signal.counts.shape)
    inside = (y < shape[0]) & (x < shape[1])
    y, x = y[inside], x[inside]
    return y, x, np.float32(coefficient) * signal.counts[y, x]
