"""Smooth random fields over an exposure as sums of waves: a Gaussian process on a periodic box.

What the air leaves in positions is the gradient of a potential [1]_: it has no curl, and each of
its waves moves stars along its own wave vector. What thin clouds leave in magnitudes is a scalar.
A field is a sum of waves on the lattice of a box that is larger than the field of view by a margin,

    f(x) = sum_k d_k [a_k cos(k x) + b_k sin(k x)],   d_k = k / |k| or 1,

whose amplitudes are independent and normal with the variance P(k) = A (1 + k^2 / k0^2)^-n: the
spectrum of von Karman [2]_ with a free slope, since wind averages the short waves of a long
exposure more. This is the Gaussian process with the covariance that belongs to P, but for what is
shorter than the shortest wave, and repeats with the box [3]_.

The normal equations of irregular points are sums of cos((k - l) x) and cos((k + l) x) over them:
two small matrix products give these sums for all vectors of a twice as large lattice, and the
matrix is looked up in them. A, k0 and n are fitted by expectation maximisation [4]_.

References
----------
.. [1] Fortino et al. 2021, AJ 162, 106, arXiv:2010.13742 (curl-free Gaussian process, 7 -> 2 mas).
.. [2] Leget et al. 2021, A&A 650, A81 (von Karman kernels of astrometric residuals).
.. [3] Hensman, Durrande & Solin 2018, JMLR 18, 151 (Fourier features as a basis of the process).
.. [4] Dempster, Laird & Rubin 1977, J. R. Stat. Soc. B 39, 1.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, optimize

from coaddflow.settings.solution import WaveSettings
from coaddflow.solution.excess import MOST_LEVERAGE

FloatArray = NDArray[np.float64]

_FIRST_SPECTRUM = 3.0, 11.0 / 6.0
"""k0 and slope n of the first spectrum."""
_SCALES, _SLOPES = (0.3, 30.0), (5.0 / 6.0, 2.0)
"""Limits of both: power falls with k^(-5/3) in still air, and with k^(-11/3) in wind."""
_EXPECTATIONS = 3

_LEAST_NOISE = 1e-3
"""Part of the variance of a detection that remains noise whatever its exposure's scatter is."""


@dataclass(frozen=True)
class WaveField:
    """A field without curl on a plane (two components), or a scalar one.

    Attributes
    ----------
    origin : ndarray of float64, shape (2,)
        Where all phases are zero, degrees on the plane.
    box : float
        Period, degrees.
    waves : ndarray of int64, shape (m, 2)
        Numbers of waves in the box along both axes: half of the lattice.
    cosine, sine : ndarray of float64, shape (m,)
        Amplitudes, in the unit of the field.
    is_gradient : bool
        Whether the field has two components.
    spectrum : tuple of float
        A (unit of the field squared), k0 (waves in the box), n.
    error : float
        Root mean square of the formal errors at the stars, one axis, in the unit of the field.
    """

    origin: FloatArray
    box: float
    waves: NDArray[np.int64]
    cosine: FloatArray
    sine: FloatArray
    is_gradient: bool
    spectrum: tuple[float, float, float]
    error: float

    def value(self, plane: FloatArray) -> FloatArray:
        """Return the field at points (n, 2) of the plane, degrees; shape (n, 2) or (n, 1)."""
        reach = int(np.abs(self.waves).max())
        x, y = _phases(self.origin, self.box, reach, plane)
        amplitudes = np.zeros((2 if self.is_gradient else 1, reach + 1, 2 * reach + 1), complex)
        for component, direction in enumerate(self._directions.T):
            of_wave = direction * (self.cosine - 1j * self.sine)
            amplitudes[component, self.waves[:, 0], self.waves[:, 1] + reach] = of_wave
        found = [np.einsum("nk,nk->n", x[:, reach:] @ one, y).real for one in amplitudes]
        return np.stack(found, axis=1)

    @property
    def _directions(self) -> FloatArray:
        return _directions(self.waves, self.is_gradient)


def fit_waves(
    plane: FloatArray,
    values: FloatArray,
    variance: FloatArray,
    shortest: float,
    margin: float,
    spectrum: tuple[float, float, float] | None = None,
) -> WaveField:
    """Fit a field to values at irregular points.

    Parameters
    ----------
    plane : ndarray of float64, shape (n, 2)
        Points, degrees.
    values : ndarray of float64, shape (n, 2) or (n, 1)
        Values in any unit; two components make a field without curl.
    variance : ndarray of float64, shape (n,)
        Of one component.
    shortest : float
        Shortest wavelength, degrees.
    margin : float
        By how much the box is larger than the extent of the points, degrees.
    spectrum : tuple of float, optional
        A, k0, n of an earlier fit in the same box; fitted if not given.
    """
    low, high = plane.min(axis=0), plane.max(axis=0)
    origin, box = 0.5 * (low + high), float((high - low).max()) + margin
    waves = _half_lattice(int(box / shortest))
    is_gradient = values.shape[1] == 2
    matrix, right = _normal_equations(plane, values, 1.0 / variance, origin, box, waves)
    number = np.hypot(*waves.T)
    if spectrum is None:
        spectrum = _first_spectrum(values, variance, number)
        for _ in range(_EXPECTATIONS):
            amplitude, own = _posterior(matrix, right, _power(spectrum, number))
            moments = 0.5 * (amplitude**2 + own).reshape(2, -1).sum(axis=0)
            spectrum = _fit_spectrum(moments, number, spectrum)
    power = _power(spectrum, number)
    amplitude, own = _posterior(matrix, right, power)
    # the trace of covariance times normal matrix is the sum of the weighted variances at the points
    freedom = own.size - np.sum(own / np.tile(power, 2))
    known = max(freedom, 0.0) / np.sum(1.0 / variance) / values.shape[1]
    error = np.sqrt(known + _power_beyond(spectrum, int(box / shortest)) / values.shape[1])
    cosine, sine = amplitude.reshape(2, -1)
    return WaveField(origin, box, waves, cosine, sine, is_gradient, spectrum, float(error))


def fit_residuals(
    points: FloatArray,
    residual: FloatArray,
    weight: FloatArray,
    leverage: FloatArray,
    excess: float,
    before: WaveField | None,
    settings: WaveSettings,
) -> WaveField | None:
    """Fit the field that residuals of an exposure show, relative to its stars' other detections.

    Parameters
    ----------
    points : ndarray of float64, shape (n, 2)
        Positions, degrees.
    residual : ndarray of float64, shape (n, axes)
        Measured minus star, the field of ``before`` being added to the measured.
    weight : ndarray of float64, shape (n,)
        Inverse variances with which the stars were solved; 0: not used.
    leverage : ndarray of float64, shape (n,)
        Part of the detection in its star.
    excess : float
        Scatter of the exposure that is in the weights beyond the errors.
    before : WaveField or None
        Field of an earlier round.
    settings : WaveSettings
        Waves, and fewest stars.
    """
    used = (weight > 0) & (leverage < MOST_LEVERAGE)
    if np.count_nonzero(used) < settings.min_stars:
        return None
    # the star without this detection: its error does not depend on what is fitted
    others = 1.0 - leverage[used].astype(float)
    wanted = -residual[used] / others[:, None]
    variance = 1.0 / (weight[used].astype(float) * others)
    if before is None:
        # what the first fit finds is its signal, not noise
        variance = np.maximum(variance - excess**2, _LEAST_NOISE * variance)
    else:
        wanted = wanted + before.value(points[used])
    sizes = settings.shortest_wave / 60.0, settings.margin / 60.0
    spectrum = None if before is None else before.spectrum
    return fit_waves(points[used], wanted, variance, *sizes, spectrum)


def _half_lattice(reach: int) -> NDArray[np.int64]:
    """Return the wave vectors up to a length, one of each pair k and -k, without zero."""
    x, y = np.meshgrid(np.arange(reach + 1), np.arange(-reach, reach + 1), indexing="ij")
    chosen = ((x > 0) | (y > 0)) & (np.hypot(x, y) <= reach)
    return np.stack([x[chosen], y[chosen]], axis=1)


def _directions(waves: NDArray[np.int64], is_gradient: bool) -> FloatArray:
    """Return d of each wave, shape (m, components)."""
    if not is_gradient:
        return np.ones((len(waves), 1))
    return waves / np.hypot(*waves.T)[:, None]


def _phases(
    origin: FloatArray, box: float, reach: int, plane: FloatArray
) -> tuple[NDArray[np.complex128], ...]:
    """Return exp(i k x) of both axes at points (n, 2) for k = -reach to reach, (n, 2 reach + 1)."""
    angle = 2.0 * np.pi * (plane - origin) / box
    found = []
    for along in angle.T:
        positive = np.exp(1j * along[:, None] * np.arange(reach + 1))
        found.append(np.hstack([positive[:, :0:-1].conj(), positive]))
    return tuple(found)


def _normal_equations(
    plane: FloatArray,
    values: FloatArray,
    weight: FloatArray,
    origin: FloatArray,
    box: float,
    waves: NDArray[np.int64],
) -> tuple[FloatArray, FloatArray]:
    """Return the normal matrix (2m, 2m) and the right side (2m,) of cosine and sine amplitudes."""
    reach = int(np.abs(waves).max())
    x, y = _phases(origin, box, 2 * reach, plane)
    directions = _directions(waves, values.shape[1] == 2)
    sums = (x * weight[:, None]).T @ y
    minus, plus = (
        sums[tuple(np.moveaxis(waves[:, None] + sign * waves[None] + 2 * reach, -1, 0))]
        for sign in (-1, 1)
    )
    common = 0.5 * directions @ directions.T
    cosine, sine = common * (minus + plus).real, common * (minus - plus).real
    mixed = common * (plus - minus).imag
    matrix = np.block([[cosine, mixed], [mixed.T, sine]])
    right = np.zeros(len(waves), complex)
    for component, direction in zip(values.T, directions.T, strict=True):
        moment = (x * (weight * component)[:, None]).T @ y
        right += direction * moment[waves[:, 0] + 2 * reach, waves[:, 1] + 2 * reach]
    return matrix, np.concatenate([right.real, right.imag])


def _posterior(
    matrix: FloatArray, right: FloatArray, power: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return means and variances of the amplitudes, shape (2m,), for a spectrum at the waves."""
    factor = linalg.cholesky(matrix + np.diag(1.0 / np.tile(power, 2)), lower=True)
    inverse, _ = linalg.lapack.dtrtri(factor, lower=1)
    return inverse.T @ (inverse @ right), np.einsum("ij,ij->j", inverse, inverse)


def _power(spectrum: tuple[float, float, float], number: FloatArray) -> FloatArray:
    """Return the variance of the amplitudes of waves of these numbers."""
    strength, outer, slope = spectrum
    return strength * (1.0 + (number / outer) ** 2) ** -slope


def _power_beyond(spectrum: tuple[float, float, float], reach: int) -> float:
    """Return the variance of the waves that are too short for the lattice, all directions."""
    number = np.arange(reach + 1, 16 * reach)
    return float(np.sum(np.pi * number * _power(spectrum, number)))


def _first_spectrum(
    values: FloatArray, variance: FloatArray, number: FloatArray
) -> tuple[float, float, float]:
    """Return a spectrum with the variance that the values have beyond their errors."""
    found = float(np.mean(values**2))
    wanted = max(found - float(np.mean(variance)), 0.01 * found)
    # a component of a field without curl has half of the variance of all waves
    share = _power((1.0, *_FIRST_SPECTRUM), number).sum() / values.shape[1]
    return wanted / share, *_FIRST_SPECTRUM


def _fit_spectrum(
    moments: FloatArray, number: FloatArray, start: tuple[float, float, float]
) -> tuple[float, float, float]:
    """Return the spectrum under which the mean squares of amplitudes are most likely."""

    def shape(logarithms: FloatArray) -> FloatArray:
        return _power((1.0, *np.exp(logarithms)), number)

    def cost(logarithms: FloatArray) -> float:
        expected = shape(logarithms)
        return float(np.log(expected).mean() + np.log(np.mean(moments / expected)))

    limits = np.log([_SCALES, _SLOPES])
    found = optimize.minimize(cost, np.log(start[1:]), bounds=limits, method="L-BFGS-B").x
    outer, slope = np.exp(found)
    return float(np.mean(moments / shape(found))), float(outer), float(slope)
