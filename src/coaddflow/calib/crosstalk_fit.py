"""Coefficients of crosstalk, measured on science exposures.

Bright pixels of one amplifier (the aggressor) are looked up in another one (the victim), at the
same position in the order of readout: the ghost is what stands above the local sky there, and the
coefficient is the slope of the ghosts against the bright pixels. It is found as in [1]_ and [2]_,
for every ordered pair of amplifiers, on counts above the bias level that are not corrected for
crosstalk:

- the sky of each amplifier is a mesh from which sources are masked (`measure.background`), so that
  the sky itself, which all amplifiers see, is not taken for crosstalk;
- sources of the victim are left out: those that reach beyond the bright pixels, and pixels that
  are farther from the sky than noise and the largest conceivable coefficient allow;
- neighbouring bright pixels are taken together, as one group with one slope: a faint source
  of the victim spoils a group, not pixels that could be taken for independent;
- the slope of all groups begins with their weighted median and is then their weighted mean without
  those that are more than four errors off; its error is that of the pixels' noise, or of the
  scatter of the groups, whichever is larger;
- the same is done at eight places beside the ghosts, where nothing should be. Their mean is what
  the sources of the victim, which only add light, make of a slope of zero, and is subtracted.
  Their scatter shows by how much the errors are too small: a star that meets the same faint star
  of the victim in all exposures is no independent measurement in each (this happens if they have
  the same field, and both amplifiers the same direction of readout).

Only one CCD is in memory, and for every pair of amplifiers the sums of the groups with the
brightest pixels of all exposures.

References
----------
.. [1] Freyhammer et al. 2001, Experimental Astronomy 12, 147.
.. [2] Bernstein et al. 2017, PASP 129, 114502, section 2.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from coaddflow.errors import CcdFailure
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.statistics import mad_sigma, weighted_median
from coaddflow.instrument.camera import AmplifierId, Camera, Detector
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.isr.crosstalk import AmplifierSignal
from coaddflow.isr.detrend import PartlyDetrendedCcd, counts_above_overscan, grow
from coaddflow.measure.background import estimate_background
from coaddflow.settings.background import BackgroundSettings
from coaddflow.settings.detrend import DetrendSettings

_LOG = logging.getLogger(__name__)

_SKY = BackgroundSettings(mesh_size=64)
_OWN_SOURCE = 5.0
"""Noise above which a pixel of the victim is a source of its own."""

_SOURCE = 3.5
"""Noise above which the mean of 3 x 3 pixels of the victim is one."""

_BESIDE_SOURCE = 2
"""Pixels around sources of the victim that are not used."""

_BESIDE_SATURATION = 2
"""Pixels around saturated ones that are not used."""

_GROUP = 16
"""Bright pixels in a box of this size make a group."""

_ROUNDING = 0.3
"""Noise that the converter makes, counts."""

_BESIDE = tuple((j, i) for a, b in ((16, 36), (36, 16)) for j in (-a, a) for i in (-b, b))
"""Offsets of the places beside a ghost: neither in its wings, nor in its row or column."""

_CLIP = 4.0
_MIN_GROUPS = 5


@dataclass(frozen=True)
class MeasurementSettings:
    """How crosstalk is measured.

    Attributes
    ----------
    min_counts : float
        Counts above the sky from which a pixel is a bright one.
    max_coefficient : float
        Largest coefficient, of either sign, that is considered.
    max_groups : int
        Groups that are kept for each aggressor, those with the brightest pixels: 108 bytes for
        each of its victims, twice while an exposure is added.
    within : bool
        Only amplifiers of the same CCD.
    """

    min_counts: float = 2000.0
    max_coefficient: float = 5e-3
    max_groups: int = 500
    within: bool = False


class MeasuredCrosstalk(NamedTuple):
    """The coefficient of one ordered pair of amplifiers.

    Attributes
    ----------
    aggressor, victim : tuple of (int, str)
        CCD and amplifier.
    coefficient, error : float
        Fraction of the aggressor's counts; NaN where there were too few groups.
    n_groups, n_pixels : int
        Groups of bright pixels, and these pixels, that it rests on.
    """

    aggressor: AmplifierId
    victim: AmplifierId
    coefficient: float
    error: float
    n_groups: int
    n_pixels: int

    def is_significant(self, sigma: float) -> bool:
        """Return whether the coefficient is more than ``sigma`` errors off zero."""
        return abs(self.coefficient) > sigma * self.error


class SkySubtracted(NamedTuple):
    """An amplifier without its local sky, in the order of readout.

    Attributes
    ----------
    counts : ndarray of float32, shape (ny, nx)
        Counts above the sky; NaN at and beside saturated pixels.
    noise : float
        Standard deviation of pixels without sources, counts.
    source, beside_source : ndarray of int32, shape (ny, nx)
        Number of the source that a pixel belongs to, or 0; and the same with sources grown.
    n_pixels : ndarray of int
        Pixels of each source.
    """

    counts: NDArray[np.float32]
    noise: float
    source: NDArray[np.int32]
    beside_source: NDArray[np.int32]
    n_pixels: NDArray[np.intp]


class BrightPixels(NamedTuple):
    """The n bright pixels of an amplifier.

    Arrays, shape (n,), of the position in the order of readout, the counts above the sky, and the
    number of the group, from 0 to n_groups - 1.
    """

    y: NDArray[np.intp]
    x: NDArray[np.intp]
    counts: NDArray[np.float64]
    group: NDArray[np.intp]
    n_groups: int


class Slope(NamedTuple):
    """The slope that groups agree on (NaN with fewer than five), and what it rests on."""

    value: float
    error: float
    n_groups: int
    n_pixels: int


def measure_crosstalk(
    files: Iterable[str | Path],
    camera: Camera,
    ccds: Sequence[int],
    detrend: DetrendSettings,
    settings: MeasurementSettings,
    progress: Callable[[str | Path], None] | None = None,
) -> list[MeasuredCrosstalk]:
    """Measure the crosstalk between amplifiers on raw exposures.

    Parameters
    ----------
    files : iterable of str or Path
        Raw files, one an exposure (see `instrument.raw.read_raw_ccd`).
    camera : Camera
        The camera; its coefficients of crosstalk are not used.
    ccds : sequence of int
        CCDs whose amplifiers are looked at.
    detrend : DetrendSettings
        How the bias level is found.
    settings : MeasurementSettings
        How crosstalk is measured.
    progress : callable, optional
        Called with each file when it is done.

    Returns
    -------
    list of MeasuredCrosstalk
        All ordered pairs.

    Raises
    ------
    InputError
        If the camera has no such CCD, or the overscan does not suit the chosen method.
    """
    detrend = detrend.model_copy(update={"saturation": True})
    sums = CrosstalkSums([camera.detector(ccd) for ccd in ccds], settings)
    for path in files:

        def read(number: int, path: str | Path = path) -> PartlyDetrendedCcd:
            raw = read_raw_ccd(path, camera, camera.detector(number), detrend.check_raw)
            return counts_above_overscan(raw, detrend)

        sums.add_exposure(read)
        if progress is not None:
            progress(path)
    return sums.results()


def camera_keys(
    measured: Iterable[MeasuredCrosstalk], camera: Camera, sigma: float
) -> dict[str, object]:
    """Return the entries of a camera file for the coefficients that are significant.

    Coefficients of less than ``sigma`` errors are 0 in the matrices and not in the list.

    Returns
    -------
    dict
        ``detectors``: `id` and `crosstalk` of each CCD with a significant coefficient between
        its own amplifiers; ``crosstalk``: the list of those between CCDs.
    """
    matrices: dict[int, list[list[float]]] = {}
    links: list[dict[str, object]] = []
    for one in measured:
        if not one.is_significant(sigma):
            continue
        (ccd, aggressor), (other, victim) = one.aggressor, one.victim
        coefficient = float(f"{one.coefficient:.2e}")
        if ccd != other:
            link = {"aggressor": list(one.aggressor), "victim": list(one.victim)}
            links.append({**link, "coefficient": coefficient})
            continue
        names = [amplifier.name for amplifier in camera.detector(ccd).amplifiers]
        matrix = matrices.setdefault(ccd, [[0.0] * len(names) for _ in names])
        matrix[names.index(victim)][names.index(aggressor)] = coefficient
    detectors = [{"id": ccd, "crosstalk": matrix} for ccd, matrix in sorted(matrices.items())]
    return {"detectors": detectors, "crosstalk": links}


@dataclass
class CrosstalkSums:
    """The sums over exposures, for all pairs of amplifiers of some CCDs."""

    detectors: Sequence[Detector]
    settings: MeasurementSettings
    _sums: dict[AmplifierId, NDArray[np.float32]] = field(default_factory=dict)

    def add_exposure(self, read: Callable[[int], PartlyDetrendedCcd]) -> None:
        """Add an exposure.

        Parameters
        ----------
        read : callable
            Returns a CCD of the exposure, with its bias level subtracted and not more, or raises
            CcdFailure. Each CCD is read twice if crosstalk between CCDs is looked for: for its
            bright pixels, and as victim of those of all CCDs.
        """
        ccds = [detector.id for detector in self.detectors]
        if not self.settings.within:
            self._add_pairs(lambda: _amplifiers(ccds, read))
            return
        for ccd in ccds:
            one = list(_amplifiers([ccd], read))
            self._add_pairs(lambda one=one: one)

    def results(self) -> list[MeasuredCrosstalk]:
        """Return the coefficients of all pairs, those of each aggressor together."""
        measured, deviations = [], []
        for aggressor in self._ids:
            victims = self._victims(aggressor)
            nothing = np.zeros((len(victims), 1 + len(_BESIDE), 3, 0), np.float32)
            for victim, places in zip(victims, self._sums.get(aggressor, nothing), strict=True):
                slope, deviation = _above_zero([fit_slope(sums) for sums in places])
                measured.append(MeasuredCrosstalk(aggressor, victim, *slope))
                deviations.append(deviation)
        together = np.concatenate(deviations) if deviations else np.empty(0)
        if not together.size:
            return measured
        inflation = max(1.0, mad_sigma(together, 0.0))
        return [one._replace(error=one.error * inflation) for one in measured]

    @property
    def _ids(self) -> list[AmplifierId]:
        return [(one.id, amplifier.name) for one in self.detectors for amplifier in one.amplifiers]

    def _victims(self, aggressor: AmplifierId) -> list[AmplifierId]:
        return [
            victim
            for victim in self._ids
            if victim != aggressor and (victim[0] == aggressor[0] or not self.settings.within)
        ]

    def _add_pairs(
        self, amplifiers: Callable[[], Iterable[tuple[AmplifierId, SkySubtracted]]]
    ) -> None:
        """Add all pairs of some amplifiers of an exposure, which are asked for twice."""
        bright = {
            key: find_bright_pixels(amplifier, self.settings.min_counts, self.settings.max_groups)
            for key, amplifier in amplifiers()
        }
        places = {key: {v: i for i, v in enumerate(self._victims(key))} for key in bright}
        found = {
            key: np.zeros((len(places[key]), 1 + len(_BESIDE), 3, pixels.n_groups), np.float32)
            for key, pixels in bright.items()
        }
        for victim, amplifier in amplifiers():
            for key, pixels in bright.items():
                if key == victim:
                    continue
                for i, offset in enumerate(((0, 0), *_BESIDE)):
                    found[key][places[key][victim], i] = group_sums(
                        pixels, amplifier, self.settings.max_coefficient, offset
                    )
        for key, sums in found.items():
            self._keep_brightest(key, sums)

    def _keep_brightest(self, key: AmplifierId, sums: NDArray[np.float32]) -> None:
        """Take over the groups of an exposure, and let go those that say least."""
        if key in self._sums:
            sums = np.concatenate([self._sums[key], sums], axis=3)
        if sums.shape[3] > self.settings.max_groups:
            weight = sums[:, 0, 0].sum(axis=0)
            sums = sums[..., np.sort(np.argsort(-weight)[: self.settings.max_groups])]
        self._sums[key] = sums


def _amplifiers(
    ccds: Sequence[int], read: Callable[[int], PartlyDetrendedCcd]
) -> Iterator[tuple[AmplifierId, SkySubtracted]]:
    """Yield the amplifiers of CCDs one by one, without those that cannot be read."""
    for ccd in ccds:
        try:
            signals = read(ccd).signals()
            for name, signal in signals.items():
                if signal.counts.any():  # a dead amplifier would show that nothing leaks into it
                    yield (ccd, name), subtract_sky(signal)
        except CcdFailure as failure:
            _LOG.warning("CCD %d is left out: %s", ccd, failure)


def subtract_sky(signal: AmplifierSignal) -> SkySubtracted:
    """Subtract the local sky of an amplifier.

    Raises
    ------
    CcdFailure
        ``no_data`` if all pixels are saturated.
    """
    shape = signal.counts.shape
    mask = np.zeros(shape, np.int32)
    near = grow(*np.unravel_index(signal.saturated, shape), _BESIDE_SATURATION, shape)
    mask[near] = MaskPlane.SAT
    image = MaskedImage(signal.counts, np.ones(shape, np.float32), mask)
    sky = estimate_background(image, _SKY)
    counts = signal.counts - sky.model()
    noise = max(sky.noise, _ROUNDING)
    found = ndimage.uniform_filter(counts, 3) > _SOURCE * noise / 3
    source, _ = ndimage.label(found, np.ones((3, 3)))
    beside = ndimage.maximum_filter(source, 2 * _BESIDE_SOURCE + 1)
    counts[mask != 0] = np.nan
    return SkySubtracted(counts, noise, source, beside, np.bincount(source.ravel()))


def find_bright_pixels(
    amplifier: SkySubtracted, min_counts: float, max_groups: int | None = None
) -> BrightPixels:
    """Return the pixels of an aggressor above ``min_counts`` that are not saturated.

    Of more than ``max_groups`` groups those with the largest sums of squares are taken.
    """
    y, x = np.nonzero(amplifier.counts > min_counts)  # NaN is not
    counts = amplifier.counts[y, x].astype(float)
    columns = -(-amplifier.counts.shape[1] // _GROUP)
    boxes, group = np.unique(y // _GROUP * columns + x // _GROUP, return_inverse=True)
    if max_groups is not None and len(boxes) > max_groups:
        strength = np.bincount(group, counts**2)
        use = np.isin(group, np.argsort(-strength)[:max_groups])
        y, x, counts = y[use], x[use], counts[use]
        boxes, group = np.unique(group[use], return_inverse=True)
    return BrightPixels(y, x, counts, group, len(boxes))


def group_sums(
    bright: BrightPixels,
    victim: SkySubtracted,
    max_coefficient: float,
    offset: tuple[int, int] = (0, 0),
) -> NDArray[np.float32]:
    """Return the sums from which slopes of ghosts against bright pixels follow.

    The victim may have another size than the aggressor; ``offset`` is the number of rows and
    columns by which the places are beside those of the ghosts.

    Returns
    -------
    ndarray of float32, shape (3, n_groups)
        For each group: sum of bright^2 / noise^2, sum of bright x ghost / noise^2, number of
        pixels.
    """
    y, x = bright.y + offset[0], bright.x + offset[1]
    ny, nx = victim.counts.shape
    inside = (y >= 0) & (y < ny) & (x >= 0) & (x < nx)
    y, x, a, group = y[inside], x[inside], bright.counts[inside], bright.group[inside]
    v = victim.counts[y, x]
    good = np.abs(v) < _OWN_SOURCE * victim.noise + max_coefficient * a  # NaN is not
    good &= ~_is_own(victim, y, x)[victim.beside_source[y, x]]
    a, v, group = a[good], v[good], group[good]
    sums = [
        np.bincount(group, weights, bright.n_groups)
        for weights in (a * a / victim.noise**2, a * v / victim.noise**2, None)
    ]
    return np.array(sums, np.float32)


def _is_own(victim: SkySubtracted, y: NDArray[np.intp], x: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Return for each source of the victim whether most of it is not at the given pixels.

    A ghost above the noise has all its pixels where the aggressor is bright.
    """
    covered = np.bincount(victim.source[y, x], minlength=len(victim.n_pixels))
    own = covered < 0.5 * victim.n_pixels
    own[0] = False
    return own


def fit_slope(sums: NDArray[np.float32]) -> Slope:
    """Return the slope that groups agree on, from their `group_sums`, shape (3, n)."""
    weight, product, n_pixels = sums[:, sums[0] > 0].astype(float)
    if len(weight) < _MIN_GROUPS:
        return Slope(np.nan, np.nan, len(weight), int(n_pixels.sum()))
    slope = product / weight
    # least absolute deviations: a group with a star of the victim does not decide
    value = weighted_median(slope, np.sqrt(weight))
    keep = np.zeros(len(slope), bool)
    for _ in range(20):
        deviation = np.abs(slope - value) * np.sqrt(weight)
        before, keep = keep, deviation < _CLIP * max(1.0, mad_sigma(deviation, 0.0))
        value = float(product[keep].sum() / weight[keep].sum())
        if (keep == before).all():
            break
    n, total = int(keep.sum()), weight[keep].sum()
    scatter = ((weight[keep] * (slope[keep] - value)) ** 2).sum() / total**2 * n / max(n - 1, 1)
    error = float(np.sqrt(max(1.0 / total, scatter)))
    return Slope(value, error, n, int(n_pixels[keep].sum()))


def _above_zero(slopes: Sequence[Slope]) -> tuple[Slope, NDArray[np.float64]]:
    """Return the slope of the ghosts above the mean of the slopes beside them.

    The first slope is that of the ghosts. Also returned are the deviations of the others from
    their mean, in units of their errors.
    """
    ghost = slopes[0]
    beside = [slope for slope in slopes[1:] if np.isfinite(slope.value)]
    if len(beside) < 2 or not np.isfinite(ghost.value):
        return ghost._replace(value=np.nan, error=np.nan), np.empty(0)
    values = np.array([slope.value for slope in beside])
    errors = np.array([slope.error for slope in beside])
    zero, n = float(values.mean()), len(values)
    deviations = (values - zero) * np.sqrt(n / (n - 1)) / errors
    error = float(np.hypot(ghost.error, errors.mean() / np.sqrt(n)))
    return ghost._replace(value=ghost.value - zero, error=error), deviations
