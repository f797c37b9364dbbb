"""Photon transfer curves: gain, read noise, linearity and full well of amplifiers, from flats.

The noise of photons tells how many electrons a count is: pairs of flats (`calib.flat_pairs`) give
level and variance of each amplifier.

The curve of variance against level is that of [1]_, equation 16, for pixels whose charge repels
further charge (the brighter-fatter effect): V(m) = (exp(2 a g m) - 1) / (2 a g^2) + n, m in
counts, with the gain g, the coefficient a (a00 there, below 0, 1/electron) and the noise n at no
light, which is that of the overscan. A straight line would make gains some percent too large.

Before, counts are made proportional to exposure times: r (t + t0) = z + c2 z^2 + c3 z^3, with a
rate r and an offset t0 of the shutter for each band, and the terms that are significant against the
scatter of the lamp. The full well is the level up to which the variance follows its curve: beyond
it charge spreads over neighbours, or the converter ends.

References
----------
.. [1] Astier et al. 2019, A&A 629, A36 (the shape of the photon transfer curve).
.. [2] Janesick 2007, "Photon Transfer", SPIE Press.
.. [3] Bernstein et al. 2017, PASP 129, 114502, section 3 (linearity from flats).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from coaddflow.calib.flat_pairs import FlatPair
from coaddflow.instrument.camera import AmplifierId, Camera

_MIN_LEVELS = 4
"""Levels that a curve needs; they differ by a twentieth at least."""
_LEVEL_STEP = 0.05

_MIN_RANGE = 3.0
"""Levels, and exposure times for the linearity, must differ by this factor."""

_SYSTEMATIC = 3e-3
"""Scatter of variances beside that of their pixels, a fraction."""

_READ_NOISE_ERROR = 0.05
"""Error of the variance of the overscan as that at no light, a fraction."""

_AGREES = 0.03
"""Variances within this fraction of the curve, or five errors, follow it."""

_STANDS_OUT = 0.5
"""Least variance of the light at the highest level, in that without light."""

_GOOD_GAIN = 0.05
"""Largest error of a gain, a fraction."""

_SIGNIFICANT = 6.3e-5
"""Chance of a term of the linearity by scatter alone: four errors of a normal distribution."""
_MIN_FREEDOM = 4

_STEADY = 0.01
"""A lamp that scatters by more, rms, does not show linearity."""

_GOOD_LINEARITY = 3e-3
"""Largest error of the linearity at the highest level, a fraction, that replaces what was known."""

_LEVELS_FOR_OFFSET = 6
"""Exposure times from which the offset of the shutter is fitted as well."""

_NARROW = 1.15
"""The full well is known if the next level above it is higher by no more than this factor."""


class Linearity(NamedTuple):
    """How counts depend on the light.

    Attributes
    ----------
    terms : tuple of float
        c2, c3, ...: true = z + c2 z^2 + c3 z^3 for z counts above the bias; empty if none is
        significant.
    deviation : float
        Largest correction, or without terms the largest deviation, a fraction; NaN if the flats do
        not show linearity.
    is_good : bool
        Whether it is known well enough to replace what the camera file says.
    """

    terms: tuple[float, ...]
    deviation: float
    is_good: bool


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
        Electrons; NaN if there is neither overscan nor two bias exposures.
    linearity : Linearity
        How counts depend on the light.
    full_well : float
        Counts above the bias that 99 % of the pixels do not reach at the highest level that
        follows the curve.
    next_level : float
        The same at the next level, which does not follow it; infinite if there is none.
    bias_level : float
        Counts without light, as they stand in the file.
    scatter : float
        Scatter of the variances about the curve, a fraction, outliers included.
    n_pairs : int
        Pairs up to the full well.
    """

    gain: float
    gain_error: float
    brighter_fatter: float
    read_noise: float
    linearity: Linearity
    full_well: float
    next_level: float
    bias_level: float
    scatter: float
    n_pairs: int

    @property
    def is_full_well_known(self) -> bool:
        """Whether a level little above it does not follow the curve."""
        return self.next_level <= _NARROW * self.full_well


class _Curve(NamedTuple):
    """The parameters of `curve`, and the error of the gain, a fraction, for a scatter of 1."""

    gain: float
    coefficient: float
    noise: float
    gain_error: float

    def at(self, level: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return variances."""
        return curve(level, self.gain, self.coefficient, self.noise)


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


def fit_photon_transfer(
    pairs: Sequence[FlatPair], known_linearity: Sequence[float] = ()
) -> PhotonTransfer | str:
    """Return what the pairs of an amplifier say, or why they say nothing.

    Parameters
    ----------
    pairs : sequence of FlatPair
        In any order, of any levels; those beyond the full well are recognised.
    known_linearity : sequence of float
        `Linearity.terms` of the camera file, which count where the flats do not show linearity.
    """
    pairs = sorted(pairs, key=lambda pair: pair.level)
    level, variance, error = _columns(pairs)
    if n_levels(level) < _MIN_LEVELS:
        return f"there are {n_levels(level)} levels of light, {_MIN_LEVELS} are needed"
    read = _read_variance(pairs)
    follows = _up_to_full_well(level, variance, error, read)
    if n_levels(level[follows]) < _MIN_LEVELS:
        return f"only {n_levels(level[follows])} levels of light follow a curve"
    if level[follows].max() < _MIN_RANGE * level[follows].min():
        return f"the levels differ by less than a factor of {_MIN_RANGE:g}"
    used = [pair for pair, one in zip(pairs, follows, strict=True) if one]
    linearity = fit_linearity(used)
    true, slope = _linearised(level, linearity.terms if linearity.is_good else known_linearity)
    of_curve = (true[follows], (variance * slope**2)[follows], error[follows])
    found = _fit_curve(*of_curve, read)
    deviation = of_curve[1] / found.at(true[follows]) - 1.0
    scatter = float(np.sqrt(np.sum(deviation**2) / max(len(used) - 3, 1)))
    gain_error = found.gain * found.gain_error * max(1.0, scatter / float(np.median(of_curve[2])))
    of_light = found.at(true[follows]).max() - found.noise
    if of_light < _STANDS_OUT * found.noise:
        return "the noise of the light does not stand out of the other noise"
    if gain_error > _GOOD_GAIN * found.gain:
        return f"the gain would have an error of {100 * gain_error / found.gain:.0f} %"
    beyond = [pair.bright for pair, one in zip(pairs, follows, strict=True) if not one]
    full_well = max(pair.bright for pair in used)
    return PhotonTransfer(
        gain=found.gain,
        gain_error=float(gain_error),
        brighter_fatter=found.coefficient,
        read_noise=float(np.sqrt(read) * found.gain),
        linearity=linearity,
        full_well=full_well,
        next_level=min((one for one in beyond if one > full_well), default=np.inf),
        bias_level=float(np.median([pair.bias_level for pair in pairs])),
        scatter=scatter,
        n_pairs=len(used),
    )


def _columns(
    pairs: Sequence[FlatPair],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return levels, variances, and the errors of these, fractions."""
    level = np.array([pair.level for pair in pairs])
    variance = np.array([pair.variance for pair in pairs])
    error = np.sqrt([_SYSTEMATIC**2 + 2.0 / pair.n_pixels for pair in pairs])
    return level, variance, error


def n_levels(level: NDArray[np.float64]) -> int:
    """Return how many of levels, in ascending order, differ by a twentieth from the one before."""
    number, last = 0, 0.0
    for one in level:
        if one > (1.0 + _LEVEL_STEP) * last:
            number, last = number + 1, one
    return number


def _read_variance(pairs: Sequence[FlatPair]) -> float:
    """Return the variance without light: of the lower levels, which leave no trail behind them."""
    known = [pair.read_variance for pair in pairs if np.isfinite(pair.read_variance)]
    return float(np.median(known[: max(len(known) // 3, 3)])) if known else np.nan


def _fit_curve(
    level: NDArray[np.float64],
    variance: NDArray[np.float64],
    error: NDArray[np.float64],
    read: float,
) -> _Curve:
    """Fit the curve to variances above 0 with errors (fractions); outliers count little.

    ``read`` is the variance without light, NaN if it is not known.
    """
    noise_scale = read if read > 0 else max(float(variance.min()), 1e-3)
    scale = np.array([float(np.median(variance / level)), 1e-6, noise_scale])

    def deviations(unknown: NDArray[np.float64]) -> NDArray[np.float64]:
        per_gain, coefficient, noise = unknown * scale
        model = curve(level, 1.0 / max(per_gain, 1e-9), coefficient, noise)
        off = np.log(variance / np.maximum(model, 1e-9 * variance)) / error
        prior = (noise / read - 1.0) / _READ_NOISE_ERROR if read > 0 else 0.0
        return np.append(off, prior)

    start = np.array([1.0, -1.0, 1.0 if read > 0 else 0.1])
    found = optimize.least_squares(deviations, start, loss="soft_l1", f_scale=3.0)
    per_gain, coefficient, noise = found.x * scale
    covariance = np.linalg.pinv(found.jac.T @ found.jac)
    gain_error = np.sqrt(covariance[0, 0]) / max(found.x[0], 1e-9)
    return _Curve(1.0 / max(per_gain, 1e-9), float(coefficient), float(noise), float(gain_error))


def _up_to_full_well(
    level: NDArray[np.float64],
    variance: NDArray[np.float64],
    error: NDArray[np.float64],
    read: float,
) -> NDArray[np.bool_]:
    """Return which pairs, in the order of their levels, follow one curve.

    The curve of the lower part of the levels before the largest variance is followed upwards as
    long as levels agree with it. One pair alone that does not is an outlier, and left out, unless
    it is the highest and its variance is too low.
    """
    possible = variance > max(0.5 * read if read > 0 else 0.0, 0.0)
    if not possible.any():
        return possible
    top = level[possible][np.argmax(variance[possible])]
    lower = possible & (level <= 0.6 * top)
    if n_levels(level[lower]) < _MIN_LEVELS:
        lower = possible & (level <= top)
    reached = level[lower].max(initial=0.0)
    follows = lower
    for _ in range(len(level)):
        if n_levels(level[follows]) < _MIN_LEVELS:
            return follows
        model = _fit_curve(level[follows], variance[follows], error[follows], read).at(level)
        limit = np.maximum(_AGREES, 5.0 * error)
        agrees = possible & (np.abs(variance / model - 1.0) <= limit)
        ends = ~agrees & np.append(~agrees[1:], variance[-1] < model[-1]) & (level > reached)
        end = level[ends].min(initial=np.inf)
        # a step at a time, since the curve bends, and over an outlier
        last = level[follows].max()
        step = max(1.3 * last, *level[level > last][:2], last)
        new = agrees & (level < end) & (level <= step)
        if (new == follows).all():
            break
        follows = new
    return follows


def fit_linearity(pairs: Sequence[FlatPair]) -> Linearity:
    """Return how counts depend on the exposure time.

    Parameters
    ----------
    pairs : sequence of FlatPair
        Below the full well. Each band has its own rate.
    """
    unknown = Linearity((), np.nan, False)
    if not pairs:
        return unknown
    time = np.array([pair.exposure_time for pair in pairs])
    level = np.array([pair.level for pair in pairs])
    bands = sorted({pair.band for pair in pairs})
    n_times = n_levels(np.sort(time))
    if n_times < _MIN_LEVELS or time.min() <= 0 or time.max() < _MIN_RANGE * time.min():
        return unknown
    lamp = [np.where([pair.band == band for pair in pairs], time, 0.0) for band in bands]
    if n_times >= _LEVELS_FOR_OFFSET:
        lamp += [np.where(one > 0, 1.0, 0.0) for one in lamp]
    fits = [_fit_terms(lamp, level, order) for order in range(3)]
    possible = [fit for fit in fits if fit is not None]
    if len(possible) < 2 or min(fit.scatter for fit in possible) > _STEADY:
        return unknown
    chosen = next((one for one in reversed(possible[1:]) if one.is_significant), possible[0])
    true, _ = _linearised(level, chosen.terms)
    deviation = np.abs(true / level - 1.0) if chosen.terms else np.abs(chosen.left)
    # of a term that is not there the error counts as well
    error = (chosen if chosen.terms else possible[1]).error_at(float(level.max()))
    return Linearity(chosen.terms, float(deviation.max()), bool(error <= _GOOD_LINEARITY))


class _Terms(NamedTuple):
    """Terms of the linearity, the covariance of their errors, and what they leave, fractions."""

    terms: tuple[float, ...]
    covariance: NDArray[np.float64]
    left: NDArray[np.float64]
    freedom: int

    @property
    def scatter(self) -> float:
        return float(np.sqrt(np.sum(self.left**2) / self.freedom))

    @property
    def is_significant(self) -> bool:
        """Whether scatter does not make such a highest term."""
        limit = stats.t.isf(_SIGNIFICANT / 2.0, self.freedom)
        return bool(abs(self.terms[-1]) > limit * np.sqrt(self.covariance[-1, -1]))

    def error_at(self, level: float) -> float:
        """Return the error of the correction at a level, a fraction."""
        powers = level ** np.arange(1, len(self.terms) + 1)
        return float(np.sqrt(powers @ self.covariance @ powers))


def _fit_terms(
    lamp: Sequence[NDArray[np.float64]], level: NDArray[np.float64], order: int
) -> _Terms | None:
    """Fit a number of terms, beside the columns of the lamp; None without freedom for that."""
    columns = [*lamp, *(-(level ** (2 + k)) for k in range(order))]
    freedom = len(level) - len(columns)
    if freedom < _MIN_FREEDOM:
        return None
    matrix = np.stack(columns, axis=1) / level[:, None]
    size = np.abs(matrix).max(axis=0)
    matrix /= size
    solution, *_ = np.linalg.lstsq(matrix, np.ones(len(level)), rcond=None)
    left = matrix @ solution - 1.0
    noise = max(float(np.sum(left**2)) / freedom, 1e-12)
    covariance = noise * np.linalg.pinv(matrix.T @ matrix) / np.outer(size, size)
    first = len(lamp)
    terms = tuple(float(one) for one in (solution / size)[first:])
    return _Terms(terms, covariance[first:, first:], left, freedom)


def _linearised(
    level: NDArray[np.float64], terms: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return true counts, and their derivative."""
    true, slope = level.copy(), np.ones_like(level)
    for k, term in enumerate(terms, start=2):
        true += term * level**k
        slope += k * term * level ** (k - 1)
    return true, slope


def camera_with(camera: Camera, measured: Mapping[AmplifierId, PhotonTransfer]) -> Camera:
    """Return a camera with the measured gains, read noise, linearity and saturation.

    Header keywords that would override them are dropped from these amplifiers. What was not
    measured well stays as it is.
    """
    detectors = []
    for detector in camera.detectors:
        amplifiers = []
        for amplifier in detector.amplifiers:
            found = measured.get((detector.id, amplifier.name))
            changes = {} if found is None else _keys_of(found)
            amplifiers.append({**dict(amplifier), **changes})
        detectors.append({**dict(detector), "amplifiers": tuple(amplifiers)})
    return Camera.model_validate({**dict(camera), "detectors": tuple(detectors)})


def _keys_of(found: PhotonTransfer) -> dict[str, object]:
    """Return the keys of an amplifier in the camera file."""
    keys: dict[str, object] = {"gain": float(f"{found.gain:.5g}"), "gain_keyword": None}
    if found.read_noise > 0:
        keys |= {"read_noise": float(f"{found.read_noise:.4g}"), "read_noise_keyword": None}
    if found.linearity.is_good:
        keys["linearity"] = tuple(float(f"{one:.4g}") for one in found.linearity.terms)
    if found.is_full_well_known:
        keys["saturation"] = float(np.floor(found.bias_level + found.full_well))
        keys["saturation_keyword"] = None
    return keys
