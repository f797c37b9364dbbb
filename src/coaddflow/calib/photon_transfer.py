"""Photon transfer curves: gain, read noise, linearity and full well of amplifiers, from flats.

The noise of photons tells how many electrons a count is: pairs of flats (`calib.flat_pairs`) give
level and variance of each amplifier.

The curve of variance against level is that of [1]_, equation 16, for pixels whose charge repels
further charge (the brighter-fatter effect): V(m) = (exp(2 a g m) - 1) / (2 a g^2) + n, m in
counts, with the gain g, the coefficient a (a00 there, below 0, 1/electron) and the noise n at no
light. A straight line instead makes gains 2 to 10 % too large at half of the full well.

Before, counts are made proportional to the exposure time: t = r (z + c2 z^2 + c3 z^3), where the
terms are significant against the scatter of the lamp, with an offset of the exposure time, which
shutters have. The full well is the level up to which the variance follows its curve: beyond it
charge spreads over neighbours, or the converter ends.

References
----------
.. [1] Astier et al. 2019, A&A 629, A36 (the shape of the photon transfer curve).
.. [2] Janesick 2007, "Photon Transfer", SPIE Press.
.. [3] Bernstein et al. 2017, PASP 129, 114502, section 3 (linearity from flats).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, optimize

from coaddflow.calib.flat_pairs import AmplifierId, FlatPair
from coaddflow.instrument.camera import Camera

_MIN_LEVELS = 4
"""Levels that a curve needs."""

_TYPICAL = 3e-3
"""Scatter of variances, a fraction; three times as much is an outlier."""

_AGREES = 0.03
"""Variances within this fraction of the curve follow it."""

_CURVED = 4.0
"""Errors by which a term of the linearity must differ from 0."""

_MIN_RANGE = 3.0
"""Linearity needs exposure times that differ by this factor."""

_LEVELS_FOR_OFFSET = 6
"""Exposure times from which their offset is fitted as well."""


@dataclass(frozen=True)
class PhotonTransfer:
    """The photon transfer curve of an amplifier, and what it says.

    Attributes
    ----------
    gain, gain_error : float
        Electrons per count.
    brighter_fatter : float
        Coefficient a of the curve, 1/electron; below 0.
    read_noise : float
        Electrons; of the overscan, or, where there is none, of the curve at no light.
    linearity : tuple of float
        c2, c3, ...: true = z + c2 z^2 + c3 z^3 for z counts above the bias. Empty if none is
        significant or exposure times do not tell.
    nonlinearity : float
        Largest deviation of the levels from proportionality to the exposure time, a fraction; NaN
        if exposure times do not tell.
    full_well : float
        Highest level that follows the curve, counts above the bias.
    bias_level : float
        Counts without light, as they stand in the file.
    is_full : bool
        Whether a higher level does not: else the full well is at least that.
    scatter : float
        Standard deviation of the measured variances about the curve, a fraction.
    n_pairs : int
        Pairs up to the full well.
    """

    gain: float
    gain_error: float
    brighter_fatter: float
    read_noise: float
    linearity: tuple[float, ...]
    nonlinearity: float
    full_well: float
    bias_level: float
    is_full: bool
    scatter: float
    n_pairs: int


def curve(
    level: NDArray[np.float64], gain: float, coefficient: float, noise: float
) -> NDArray[np.float64]:
    """Return the variance of flats [1]_.

    Parameters
    ----------
    level : ndarray
        Counts.
    gain : float
        Electrons per count.
    coefficient : float
        Of the brighter-fatter effect, 1/electron.
    noise : float
        Variance at no light, squared counts.
    """
    exponent = 2.0 * coefficient * gain * np.asarray(level, float)
    growth = np.divide(
        np.expm1(exponent), exponent, out=np.ones_like(exponent), where=exponent != 0
    )
    return level / gain * growth + noise


def fit_photon_transfer(pairs: Sequence[FlatPair]) -> PhotonTransfer | None:
    """Return what the pairs of an amplifier say; None if there are fewer than four levels.

    Parameters
    ----------
    pairs : sequence of FlatPair
        In any order, of any levels; those beyond the full well are recognised.
    """
    pairs = sorted(pairs, key=lambda pair: pair.level)
    level = np.array([pair.level for pair in pairs])
    variance = np.array([pair.variance for pair in pairs])
    if _n_levels(level) < _MIN_LEVELS:
        return None
    follows = _up_to_full_well(level, variance)
    if follows is None:
        return None
    used = [pair for pair, one in zip(pairs, follows, strict=True) if one]
    linearity, nonlinearity = fit_linearity(used)
    true, slope = _linearised(level, linearity)
    level_used, variance_used = true[follows], (variance * slope**2)[follows]
    found, errors = _fit_curve(level_used, variance_used)
    gain, coefficient, noise = found
    deviation = variance_used / curve(level_used, *found) - 1.0
    scatter = float(np.sqrt(np.sum(deviation**2) / max(len(deviation) - len(found), 1)))
    error = gain * max(scatter, _photon_scatter(used)) * errors[0]
    of_overscan = np.array([pair.read_variance for pair in used])
    known = of_overscan[np.isfinite(of_overscan)]
    read_variance = float(np.median(known)) if known.size else max(noise, 0.0)
    full_well = float(level[follows].max())
    return PhotonTransfer(
        gain=gain,
        gain_error=float(error),
        brighter_fatter=coefficient,
        read_noise=float(np.sqrt(read_variance) * gain),
        linearity=linearity,
        nonlinearity=nonlinearity,
        full_well=full_well,
        bias_level=float(np.median([pair.bias_level for pair in pairs])),
        is_full=bool((level > full_well).any()),
        scatter=scatter,
        n_pairs=len(used),
    )


def _n_levels(level: NDArray[np.float64]) -> int:
    """Return how many levels differ by more than a twentieth."""
    return 0 if not level.size else 1 + int(np.count_nonzero(np.diff(np.log(level)) > 0.05))


def _photon_scatter(pairs: Sequence[FlatPair]) -> float:
    """Return the error that the variance of a pair has at least, a fraction."""
    return float(np.sqrt(2.0 / np.median([pair.n_pixels for pair in pairs])))


def _fit_curve(
    level: NDArray[np.float64], variance: NDArray[np.float64]
) -> tuple[tuple[float, float, float], NDArray[np.float64]]:
    """Return gain, coefficient and noise of the curve, and their errors; outliers count little.

    Errors are for variances that scatter by themselves (a fraction of 1), that of the gain is a
    fraction too.
    """
    slope = float(np.median(variance / level))
    scale = np.array([slope, 1e-6, max(float(variance.min()), 1e-3)])

    def deviations(unknown: NDArray[np.float64]) -> NDArray[np.float64]:
        per_gain, coefficient, noise = unknown * scale
        gain = 1.0 / max(per_gain, 1e-9)
        return (curve(level, gain, coefficient, noise) / variance - 1.0) / _TYPICAL

    start = np.array([1.0, -1.0, 0.1])
    found = optimize.least_squares(deviations, start, loss="soft_l1", f_scale=3.0)
    per_gain, coefficient, noise = found.x * scale
    errors = np.sqrt(np.diag(np.linalg.pinv(found.jac.T @ found.jac))) / _TYPICAL * scale
    return (1.0 / per_gain, float(coefficient), float(noise)), errors / [per_gain, 1.0, 1.0]


def _up_to_full_well(
    level: NDArray[np.float64], variance: NDArray[np.float64]
) -> NDArray[np.bool_] | None:
    """Return which pairs, in the order of their levels, follow one curve; None if none does.

    The curve of the lower half of the levels before the largest variance is followed upwards, as
    long as the next levels agree with it.
    """
    top = int(np.argmax(ndimage.median_filter(variance, 3, mode="nearest")))
    begun = level <= 0.6 * level[top]
    if _n_levels(level[begun]) < _MIN_LEVELS:
        begun = level <= level[top]
    if _n_levels(level[begun]) < _MIN_LEVELS:
        return None
    follows = begun
    for _ in range(len(level)):
        agrees = np.abs(
            variance / curve(level, *_fit_curve(level[follows], variance[follows])[0]) - 1
        )
        beyond = np.flatnonzero((agrees > _AGREES) & (level > level[begun].max()))
        end = beyond[0] if beyond.size else len(level)
        new = np.arange(len(level)) < end
        if (new == follows).all():
            break
        # one step at a time: the curve bends
        last = level[follows].max()
        follows = new & (level <= max(1.3 * last, level[level > last].min(initial=np.inf)))
    return follows & (np.abs(agrees) < 5 * _AGREES)


def fit_linearity(pairs: Sequence[FlatPair]) -> tuple[tuple[float, ...], float]:
    """Return coefficients that make levels proportional to exposure times, and the largest effect.

    Parameters
    ----------
    pairs : sequence of FlatPair
        Below the full well.

    Returns
    -------
    coefficients : tuple of float
        As `PhotonTransfer.linearity`.
    deviation : float
        Largest deviation that they mend or, if none is significant, that is left, a fraction; NaN
        if exposure times do not differ by a factor of 3, or there are too few.
    """
    time = np.array([pair.exposure_time for pair in pairs])
    level = np.array([pair.level for pair in pairs])
    n_times = len(np.unique(np.round(np.log(np.maximum(time, 1e-9)), 2)))
    if n_times < _MIN_LEVELS or time.min() <= 0 or time.max() < _MIN_RANGE * time.min():
        return (), np.nan
    has_offset = n_times >= _LEVELS_FOR_OFFSET
    deviation = np.nan
    for order in range(min(2, n_times - 2 - has_offset), -1, -1):
        columns = [time, *([np.ones_like(time)] if has_offset else [])]
        n_fixed = len(columns)
        columns += [-(level ** (2 + k)) for k in range(order)]
        matrix = np.stack(columns, axis=1) / level[:, None]
        size = np.abs(matrix).max(axis=0)
        unknown, *_ = np.linalg.lstsq(matrix / size, np.ones(len(level)), rcond=None)
        left = matrix / size @ unknown - 1.0
        freedom = max(len(level) - len(size), 1)
        noise = np.sqrt(max(np.sum(left**2) / freedom, 1e-12))
        error = noise * np.sqrt(np.diag(np.linalg.pinv((matrix / size).T @ (matrix / size))))
        unknown, error = unknown / size, error / size
        terms = unknown[n_fixed:]
        if order == 0:
            return (), float(np.abs(left).max())
        if abs(terms[-1]) > _CURVED * error[n_fixed:][-1]:
            true, _ = _linearised(level, tuple(terms))
            deviation = float(np.abs(true / level - 1.0).max())
            return tuple(float(one) for one in terms), deviation
    return (), deviation


def _linearised(
    level: NDArray[np.float64], linearity: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return true counts, and their derivative."""
    true, slope = level.copy(), np.ones_like(level)
    for k, term in enumerate(linearity, start=2):
        true += term * level**k
        slope += k * term * level ** (k - 1)
    return true, slope


def camera_with(camera: Camera, measured: Mapping[AmplifierId, PhotonTransfer]) -> Camera:
    """Return a camera with the measured gains, read noise, linearity and saturation.

    Header keywords that would override them are dropped from these amplifiers. Saturation is kept
    where no flat is beyond the full well, and linearity where exposure times do not tell.
    """
    detectors = []
    for detector in camera.detectors:
        amplifiers = []
        for amplifier in detector.amplifiers:
            found = measured.get((detector.id, amplifier.name))
            changes = {} if found is None else _keys_of(found)
            amplifiers.append(amplifier.model_copy(update=changes))
        detectors.append(detector.model_copy(update={"amplifiers": tuple(amplifiers)}))
    return camera.model_copy(update={"detectors": tuple(detectors)})


def _keys_of(found: PhotonTransfer) -> dict[str, object]:
    """Return the keys of an amplifier in the camera file."""
    keys: dict[str, object] = {
        "gain": float(f"{found.gain:.5g}"),
        "read_noise": float(f"{found.read_noise:.4g}"),
        "gain_keyword": None,
        "read_noise_keyword": None,
    }
    if np.isfinite(found.nonlinearity):
        keys["linearity"] = tuple(float(f"{one:.4g}") for one in found.linearity)
    if found.is_full:
        keys["saturation"] = float(np.floor(found.bias_level + found.full_well))
        keys["saturation_keyword"] = None
    return keys
