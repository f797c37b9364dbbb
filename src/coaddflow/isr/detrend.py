"""Detrending: from the raw counts of one CCD to electrons with variance and mask.

The steps and their order are those of the list `STEPS`: what happened last on the way of the
signal from the sky to the file is undone first, as in [1]_ and [2]_. Saturation is judged on the
raw counts, crosstalk is removed before amplifiers are turned and joined (it happens between
pixels that are read at the same moment), linearity needs counts above the bias, and the photon
noise is computed from electrons before the dark current is subtracted, since its electrons
fluctuate as well [3]_.

`detrend` does all for one CCD. Where a job holds the whole exposure it is done in two parts, so
that CCDs can take account of what shines into them from others, with no second look at the raw
file: `begin_detrend`, then `BegunCcd.signals` of all CCDs are exchanged, then `finish_detrend`.

References
----------
.. [1] Bernstein et al. 2017, PASP 129, 114502 (detrending of DECam), section 2.
.. [2] Plazas Malagon et al. 2025, JATIS 11, 011209 (ISR of the Rubin Observatory).
.. [3] Howell 2006, "Handbook of CCD Astronomy", 2nd edition, chapters 3 and 4.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.statistics import iqr_sigma
from coaddflow.instrument.camera import Amplifier, Detector
from coaddflow.instrument.raw import RawCcd
from coaddflow.isr.crosstalk import Aggressor, AmplifierSignal, VictimNoise, subtract_ghosts
from coaddflow.isr.overscan import overscan_level
from coaddflow.settings.detrend import DetrendSettings

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class CcdCalibs:
    """Calibration frames of one CCD; what is None is not applied.

    Attributes
    ----------
    bias : MaskedImage, optional
        In counts.
    dark : MaskedImage, optional
        In electrons per second.
    flat : MaskedImage, optional
        Relative response, about 1.
    defects : MaskedImage, optional
        Of which only the mask is used.
    """

    bias: MaskedImage | None = None
    dark: MaskedImage | None = None
    flat: MaskedImage | None = None
    defects: MaskedImage | None = None


@dataclass(frozen=True)
class AmplifierFacts:
    """What was found out about one amplifier.

    Attributes
    ----------
    name : str
        Name of the amplifier.
    overscan_level : float
        Mean level that was subtracted, counts; NaN without overscan.
    overscan_noise : float
        Scatter of the overscan pixels about it, electrons: the read noise; NaN without overscan.
    gain, read_noise : float
        Electrons per count, and electrons.
    n_saturated : int
        Pixels at or above saturation.
    """

    name: str
    overscan_level: float
    overscan_noise: float
    gain: float
    read_noise: float
    n_saturated: int


@dataclass(frozen=True)
class DetrendResult:
    """A detrended CCD.

    Attributes
    ----------
    masked_image : MaskedImage
        Electrons.
    amplifiers : tuple of AmplifierFacts
        In the order of the detector's amplifiers.
    header : astropy.io.fits.Header
        One card for each step that was made, and the facts about the amplifiers.
    """

    masked_image: MaskedImage
    amplifiers: tuple[AmplifierFacts, ...]
    header: fits.Header


@dataclass(repr=False, eq=False)
class BegunCcd:
    """A CCD between two steps of detrending.

    A job may hold many that wait for the signals of others, so nothing is kept that is not needed
    any more, and nothing is made before it is needed: until assembly 8 bytes a pixel.

    Attributes
    ----------
    detector : Detector
        The CCD, with the gains of its header.
    settings : DetrendSettings
        Which steps are made, and how.
    arrays : tuple of ndarray
        Those of the raw file; empty when the overscan has been subtracted.
    amplifiers : list of ndarray of float32
        Light-sensitive pixels of each amplifier in the order of the file, counts; empty after
        assembly.
    mask : ndarray of int32, shape (ny, nx)
        Of the assembled CCD.
    image, variance : ndarray of float32, shape (ny, nx)
        Likewise; not there before assembly.
    calibs, exposure_time, aggressors
        See `finish_detrend`.
    header : astropy.io.fits.Header
        What was done so far.
    overscan_level, overscan_noise, overscan_error : dict of str to float
        By amplifier: mean level, scatter of the pixels, error of the level of a row; counts.
    saturated : dict of str to ndarray of int
        By amplifier: positions of saturated pixels in the flattened amplifier, in the order of
        readout.
    """

    detector: Detector
    settings: DetrendSettings
    arrays: tuple[NDArray, ...]
    amplifiers: list[NDArray[np.float32]]
    mask: NDArray[np.int32]
    image: NDArray[np.float32] = field(init=False)
    variance: NDArray[np.float32] = field(init=False)
    calibs: CcdCalibs = CcdCalibs()
    exposure_time: float = 0.0
    aggressors: Sequence[Aggressor] = ()
    header: fits.Header = field(default_factory=fits.Header)
    overscan_level: dict[str, float] = field(default_factory=dict)
    overscan_noise: dict[str, float] = field(default_factory=dict)
    overscan_error: dict[str, float] = field(default_factory=dict)
    saturated: dict[str, NDArray[np.intp]] = field(default_factory=dict)

    def signals(self, names: Collection[str] | None = None) -> dict[str, AmplifierSignal]:
        """Return what amplifiers measured, for what they shine into.

        Parameters
        ----------
        names : collection of str, optional
            Amplifiers (see `Camera.crosstalk_aggressors`); default: all.

        Returns
        -------
        dict of str to AmplifierSignal
            Copies: they stay as they are when the CCD goes on.
        """
        found = {}
        for amplifier, counts in zip(self.detector.amplifiers, self.amplifiers, strict=True):
            if names is None or amplifier.name in names:
                in_order = np.ascontiguousarray(_in_read_order(amplifier, counts))
                found[amplifier.name] = AmplifierSignal(
                    np.nan_to_num(in_order, nan=0.0), self.saturated[amplifier.name]
                )
        return found

    def facts(self) -> Iterator[AmplifierFacts]:
        """Yield what was found out about each amplifier."""
        for amplifier in self.detector.amplifiers:
            noise = self.overscan_noise.get(amplifier.name, np.nan)
            yield AmplifierFacts(
                amplifier.name,
                self.overscan_level.get(amplifier.name, np.nan),
                noise * amplifier.gain,
                amplifier.gain,
                amplifier.read_noise,
                len(self.saturated[amplifier.name]),
            )

    def make_steps(self, names: Sequence[str]) -> None:
        """Make some of the `STEPS`, and tell of them in the header."""
        for name, step in STEPS:
            if name in names:
                done = step(self)
                if done:
                    self.header[_KEYWORDS[name]] = (done[:60], f"coaddflow step: {name}")


def detrend(
    raw: RawCcd,
    calibs: CcdCalibs,
    exposure_time: float,
    settings: DetrendSettings,
    last_step: str = "edge",
) -> DetrendResult:
    """Detrend one CCD by itself: `begin_detrend` and `finish_detrend`.

    Parameters
    ----------
    raw : RawCcd
        The raw pixels (see `raw.read_raw_ccd`).
    calibs, exposure_time, last_step
        See `finish_detrend`.
    settings : DetrendSettings
        Which steps are made, and how.

    Returns
    -------
    DetrendResult
        See `finish_detrend`.

    Raises
    ------
    InputError
        If a calibration frame has another shape than the CCD, or the overscan does not suit
        the chosen method.
    """
    begun = begin_detrend(raw, settings)
    return finish_detrend(begun, calibs, exposure_time, last_step=last_step)


def begin_detrend(raw: RawCcd, settings: DetrendSettings) -> BegunCcd:
    """Make the steps of detrending that come before crosstalk.

    Parameters
    ----------
    raw : RawCcd
        The raw pixels (see `raw.read_raw_ccd`).
    settings : DetrendSettings
        Which steps are made, and how; also those of the second part.

    Raises
    ------
    InputError
        If the overscan does not suit the chosen method.
    """
    amplifiers = [
        _cut(array, amplifier.data).astype(np.float32)
        for array, amplifier in zip(raw.arrays, raw.detector.amplifiers, strict=True)
    ]
    mask = np.zeros(raw.detector.shape, np.int32)
    begun = BegunCcd(raw.detector, settings, raw.arrays, amplifiers, mask)
    begun.make_steps(_FIRST_PART)
    begun.arrays = ()
    return begun


def finish_detrend(
    begun: BegunCcd,
    calibs: CcdCalibs,
    exposure_time: float,
    aggressors: Sequence[Aggressor] = (),
    last_step: str = "edge",
) -> DetrendResult:
    """Make the steps of detrending from crosstalk on.

    Parameters
    ----------
    begun : BegunCcd
        From `begin_detrend`. It is used up: its arrays are changed.
    calibs : CcdCalibs
        Calibration frames.
    exposure_time : float
        Exposure time, s; for the dark.
    aggressors : sequence of Aggressor
        Amplifiers of other CCDs (see `crosstalk.collect_aggressors`). Those without a signal
        are left out; a warning and the card CFXTKMIS tell of them.
    last_step : str
        Name of the last of `STEPS` to be made, from "assembly" on, for the making of calibration
        frames. The image is in counts up to "linearity", in electrons afterwards.

    Returns
    -------
    DetrendResult
        Image and variance of float32, mask of int32, shape ``begun.detector.shape``. Pixels that
        were not measured are NaN with infinite variance, and NO_DATA.

    Raises
    ------
    InputError
        If a calibration frame has another shape than the CCD.
    """
    second_part = [name for name, _ in STEPS if name not in _FIRST_PART]
    if last_step not in second_part[1:]:
        raise ValueError(f"no step {last_step!r}, only {second_part[1:]}")
    begun.calibs, begun.exposure_time, begun.aggressors = calibs, exposure_time, aggressors
    begun.make_steps(second_part[: second_part.index(last_step) + 1])
    facts, header = tuple(begun.facts()), begun.header
    for number, fact in enumerate(facts, start=1):
        header[f"CFAMP{number}"] = (fact.name, "amplifier")
        header[f"CFGAIN{number}"] = (fact.gain, "[electron/adu] gain")
        header[f"CFRDN{number}"] = (fact.read_noise, "[electron] read noise")
        if np.isfinite(fact.overscan_level):
            header[f"CFOVL{number}"] = (round(fact.overscan_level, 3), "[adu] overscan level")
            header[f"CFOVN{number}"] = (
                round(fact.overscan_noise, 3),
                "[electron] noise of the overscan",
            )
    return DetrendResult(MaskedImage(begun.image, begun.variance, begun.mask), facts, header)


def _mask_saturation(work: BegunCcd) -> str:
    """Flag saturated pixels, what they bleed into, and what is close to saturation."""
    settings = work.settings
    saturated = np.zeros(work.mask.shape, bool)
    for amplifier, counts in zip(work.detector.amplifiers, work.amplifiers, strict=True):
        work.saturated[amplifier.name] = np.empty(0, np.intp)
        if not settings.saturation:
            continue
        above = counts >= amplifier.saturation
        work.saturated[amplifier.name] = np.flatnonzero(_in_read_order(amplifier, above))
        _cut(saturated, amplifier.target)[:] = _turn(amplifier, above)
        suspect = counts >= settings.suspect_fraction * amplifier.saturation
        _cut(work.mask, amplifier.target)[_turn(amplifier, suspect)] |= MaskPlane.SUSPECT
    if not settings.saturation:
        return ""
    y, x = grow_bleeding(saturated, settings.bleed_length, settings.bleed_growth)
    y, x = grow(y, x, settings.saturation_growth, saturated.shape)
    work.mask[y, x] |= MaskPlane.SAT
    return f"{sum(map(len, work.saturated.values()))} saturated pixels"


def _subtract_overscan(work: BegunCcd) -> str:
    """Subtract the bias level that the overscan shows, or the pedestal where there is none."""
    settings = work.settings
    for i, amplifier in enumerate(work.detector.amplifiers):
        if amplifier.overscan is None or settings.overscan == "none":
            work.amplifiers[i] -= np.float32(settings.pedestal)
            continue
        level, noise, error = overscan_level(work.arrays[i], amplifier, settings)
        work.amplifiers[i] -= level[:, None]
        work.overscan_level[amplifier.name] = float(level.mean())
        work.overscan_noise[amplifier.name] = noise
        work.overscan_error[amplifier.name] = error
    if work.overscan_level:
        return settings.overscan
    return f"pedestal of {settings.pedestal:g} adu" if settings.pedestal else ""


def _correct_crosstalk(work: BegunCcd) -> str:
    """Subtract what other amplifiers, of this CCD and of others, shine into each amplifier."""
    amplifiers = work.detector.amplifiers
    sources: dict[str, list[tuple[float, int | AmplifierSignal]]] = {
        amplifier.name: [] for amplifier in amplifiers
    }
    matrix = work.detector.crosstalk if work.settings.crosstalk else None
    for victim, row in enumerate(matrix or ()):
        links = [(one, i) for i, one in enumerate(row) if i != victim and one != 0.0]
        sources[amplifiers[victim].name].extend(links)
    for one in work.aggressors:
        if one.signal is not None:
            sources[one.victim].append((one.coefficient, one.signal))
    _note_aggressors(work)
    if not any(sources.values()):
        return ""
    strong = subtract_ghosts(
        [_in_read_order(*pair) for pair in zip(amplifiers, work.amplifiers, strict=True)],
        [sources[amplifier.name] for amplifier in amplifiers],
        [VictimNoise(amplifier.gain, amplifier.read_noise) for amplifier in amplifiers],
        [work.saturated[amplifier.name] for amplifier in amplifiers],
        work.settings.saturated_ghosts,
    )
    for amplifier, flagged in zip(amplifiers, strong, strict=True):
        in_file = _in_read_order(amplifier, flagged)
        _cut(work.mask, amplifier.target)[_turn(amplifier, in_file)] |= MaskPlane.CROSSTALK
    return f"{len(amplifiers)} amplifiers"


def _note_aggressors(work: BegunCcd) -> None:
    """Tell in the header which amplifiers of other CCDs were known, and which were not."""
    if not work.aggressors:
        return
    there = {one.source for one in work.aggressors if one.signal is not None}
    missing = {one.source for one in work.aggressors if one.signal is None}
    work.header["CFXTKCCD"] = (len(there), "amplifiers of other CCDs as aggressors")
    if missing:
        names = ", ".join(f"{ccd} {name}" for ccd, name in sorted(missing))
        work.header["CFXTKMIS"] = (names[:60], "CCD, amplifier: aggressors not known")
        _LOG.warning(
            "crosstalk into CCD %d is not corrected for amplifiers that could not be read "
            "(CCD, amplifier): %s",
            work.detector.id,
            names,
        )


def _assemble(work: BegunCcd) -> str:
    """Put the light-sensitive pixels of all amplifiers where they stand on the CCD."""
    shape = work.detector.shape
    work.image, work.variance = np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)
    for amplifier, counts in zip(work.detector.amplifiers, work.amplifiers, strict=True):
        _cut(work.image, amplifier.target)[:] = _turn(amplifier, counts)
        error = work.overscan_error.get(amplifier.name, 0.0)
        _cut(work.variance, amplifier.target)[:] = error**2
    work.amplifiers = []
    missing = ~np.isfinite(work.image)
    work.image[missing] = np.nan
    work.mask[missing] |= MaskPlane.NO_DATA
    work.variance[missing] = np.inf
    return f"{len(work.detector.amplifiers)} amplifiers"


def _subtract_bias(work: BegunCcd) -> str:
    """Subtract the master bias (counts)."""
    bias = work.calibs.bias
    if not work.settings.bias or bias is None:
        return ""
    _take_over_defects(work, bias, "bias")
    work.image -= _finite(bias.image, 0.0)
    work.variance += _finite(bias.variance, 0.0)
    return "subtracted"


def _linearise(work: BegunCcd) -> str:
    """Apply the polynomial of each amplifier: true = z + c2 z^2 + c3 z^3 + ..."""
    if not work.settings.linearity:
        return ""
    orders = []
    for amplifier in work.detector.amplifiers:
        if not any(amplifier.linearity):
            continue
        counts = _cut(work.image, amplifier.target)
        correction = np.zeros_like(counts)
        for coefficient in reversed(amplifier.linearity):
            correction = (correction + np.float32(coefficient)) * counts
        counts += correction * counts
        orders.append(len(amplifier.linearity) + 1)
    return f"polynomials of order {max(orders)}" if orders else ""


def _apply_gain(work: BegunCcd) -> str:
    """Turn counts into electrons, and begin the variance: photons and read noise [3]_."""
    for amplifier in work.detector.amplifiers:
        pixels = _cut(work.image, amplifier.target)
        pixels *= np.float32(amplifier.gain)
        variance = _cut(work.variance, amplifier.target)
        variance *= np.float32(amplifier.gain**2)  # of overscan and bias, in counts until now
        variance += np.float32(amplifier.read_noise**2)
        variance += np.where(pixels > 0, pixels, np.float32(0))
    return "electrons"


def _subtract_dark(work: BegunCcd) -> str:
    """Subtract the dark current, scaled by the exposure time."""
    dark = work.calibs.dark
    if not work.settings.dark or dark is None:
        return ""
    _take_over_defects(work, dark, "dark")
    current = _finite(dark.image, 0.0)
    factor = 1.0
    if work.settings.dark_scale == "fitted":
        factor = fit_dark_scale(work.image, current * np.float32(work.exposure_time), work.mask)
    scale = np.float32(work.exposure_time * factor)
    work.image -= scale * current
    work.variance += scale**2 * _finite(dark.variance, 0.0)
    fitted = f", factor {factor:.4f} fitted" if work.settings.dark_scale == "fitted" else ""
    return f"scaled by {work.exposure_time:g} s{fitted}"


def _divide_flat(work: BegunCcd) -> str:
    """Divide by the flat; its own variance is added to that of the pixels."""
    flat = work.calibs.flat
    if not work.settings.flat or flat is None:
        return ""
    _take_over_defects(work, flat, "flat")
    low, high = work.settings.flat_limits
    usable = (flat.image > low) & (flat.image < high)
    work.mask[~usable] |= MaskPlane.BAD
    response = np.where(usable, flat.image, np.float32(1))
    work.image /= response
    work.variance /= response**2
    relative = np.where(usable, _finite(flat.variance, 0.0), np.float32(0)) / response**2
    work.variance += _finite(work.image, 0.0) ** 2 * relative
    return "divided"


def _mask_defects(work: BegunCcd) -> str:
    """Flag the defects that camera file and defects frame name."""
    if not work.settings.defects:
        return ""
    for box in work.detector.defects:
        _cut(work.mask, box)[:] |= MaskPlane.BAD
    if work.calibs.defects is not None:
        _take_over_defects(work, work.calibs.defects, "defects frame")
    return f"{np.count_nonzero(work.mask & MaskPlane.BAD)} bad pixels"


def _mask_edge(work: BegunCcd) -> str:
    """Flag the border of the CCD."""
    width = work.settings.edge
    if width == 0:
        return ""
    for strip in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        work.mask[strip] |= MaskPlane.EDGE
    return f"{width} pixels"


STEPS: tuple[tuple[str, Callable[[BegunCcd], str]], ...] = (
    ("saturation", _mask_saturation),
    ("overscan", _subtract_overscan),
    ("crosstalk", _correct_crosstalk),
    ("assembly", _assemble),
    ("bias", _subtract_bias),
    ("linearity", _linearise),
    ("gain", _apply_gain),
    ("dark", _subtract_dark),
    ("flat", _divide_flat),
    ("defects", _mask_defects),
    ("edge", _mask_edge),
)
"""The steps in their order: each changes the state, and returns what it did in a few words."""

_FIRST_PART = ("saturation", "overscan")
"""What a CCD can do before it knows what other CCDs shine into it."""

_KEYWORDS = {
    "saturation": "CFSAT",
    "overscan": "CFOVERSC",
    "crosstalk": "CFXTALK",
    "assembly": "CFASSEMB",
    "bias": "CFBIAS",
    "linearity": "CFLINEAR",
    "gain": "CFGAIN",
    "dark": "CFDARK",
    "flat": "CFFLAT",
    "defects": "CFDEFECT",
    "edge": "CFEDGE",
}


def grow_bleeding(
    saturated: NDArray[np.bool_], length: int, growth: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return saturated pixels and, around long runs in a column, those they bleed into.

    Parameters
    ----------
    saturated : ndarray of bool, shape (ny, nx)
        Pixels at or above saturation.
    length : int
        Runs along y of at least so many pixels are bleeding.
    growth : int
        Pixels added at both ends of such runs.

    Returns
    -------
    y, x : ndarray of int
        Positions (some may occur twice).
    """
    y, x = np.nonzero(saturated)
    columns = np.flatnonzero(np.bincount(x, minlength=saturated.shape[1]) >= length)
    ys, xs = [y], [x]
    for column in columns:
        edges = np.flatnonzero(np.diff(saturated[:, column].astype(np.int8), prepend=0, append=0))
        for begin, end in edges.reshape(-1, 2):
            if end - begin >= length:
                rows = np.arange(max(begin - growth, 0), min(end + growth, len(saturated)))
                ys.append(rows)
                xs.append(np.full(len(rows), column))
    return np.concatenate(ys), np.concatenate(xs)


def grow(
    y: NDArray[np.intp], x: NDArray[np.intp], radius: int, shape: tuple[int, int]
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the positions within ``radius`` pixels (along x and y) of the given ones."""
    offsets = np.arange(-radius, radius + 1)
    dy, dx = np.meshgrid(offsets, offsets, indexing="ij")
    y, x = (y[:, None] + dy.ravel()).ravel(), (x[:, None] + dx.ravel()).ravel()
    inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    return y[inside], x[inside]


def fit_dark_scale(
    image: NDArray[np.float32],
    dark: NDArray[np.float32],
    mask: NDArray[np.int32],
    min_pixels: int = 30,
) -> float:
    """Return the factor by which a dark fits the hot pixels of an image best.

    The contrast of the hottest pixels to their neighbours is compared in both; the factor is
    the least-squares slope through zero, with clipping.

    Parameters
    ----------
    image, dark : ndarray of float32, shape (ny, nx)
        Electrons; the dark scaled to the exposure time.
    mask : ndarray of int32, shape (ny, nx)
        Saturated and missing pixels are left out.
    min_pixels : int
        With fewer hot pixels the factor is 1.
    """
    unusable = (mask & np.int32(MaskPlane.SAT | MaskPlane.NO_DATA | MaskPlane.SUSPECT)) != 0
    inner = dark[1:-1, 1:-1]
    noise = iqr_sigma(inner - np.median(inner))
    y, x = np.nonzero((inner > np.median(inner) + 10 * noise) & ~unusable[1:-1, 1:-1])
    if len(y) < min_pixels:
        return 1.0
    y, x = y + 1, x + 1
    dy, dx = np.array([(j, i) for j in (-1, 0, 1) for i in (-1, 0, 1) if (j, i) != (0, 0)]).T
    around = (y[:, None] + dy, x[:, None] + dx)
    contrast_dark = dark[y, x] - np.median(dark[around], axis=1)
    contrast_image = image[y, x] - np.nanmedian(image[around], axis=1)
    keep = np.isfinite(contrast_image) & (contrast_dark > 0)
    factor = 1.0
    for _ in range(5):
        a, b = contrast_dark[keep].astype(float), contrast_image[keep].astype(float)
        if len(a) < min_pixels:
            return 1.0
        factor = float(np.median(b / a)) if _ == 0 else float((a * b).sum() / (a * a).sum())
        residual = contrast_image - factor * contrast_dark
        keep = np.abs(residual) < 4 * iqr_sigma(residual[keep]) + 1e-6
        keep &= np.isfinite(residual) & (contrast_dark > 0)
    return factor


def _take_over_defects(work: BegunCcd, calib: MaskedImage, kind: str) -> None:
    """Flag as BAD what a calibration frame knows to be bad or does not know at all."""
    if calib.shape != work.image.shape:
        raise InputError(
            f"the {kind} of CCD {work.detector.id} has shape {calib.shape}, "
            f"the CCD has {work.image.shape}",
            remedy="use a frame that was made for this camera file",
        )
    work.mask[calib.has_any(MaskPlane.BAD | MaskPlane.NO_DATA)] |= MaskPlane.BAD


def _cut(array: NDArray, box: tuple[int, int, int, int]) -> NDArray:
    x0, y0, x1, y1 = box
    return array[y0:y1, x0:x1]


def _turn(amplifier: Amplifier, pixels: NDArray) -> NDArray:
    """Turn pixels from the order of the file into that of the CCD."""
    if amplifier.flip_x:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if amplifier.flip_y else pixels


def _in_read_order(amplifier: Amplifier, pixels: NDArray) -> NDArray:
    """Turn pixels from the order of the file into that of readout, or back."""
    reversed_x, reversed_y = amplifier.read_reversed
    if amplifier.flip_x != reversed_x:
        pixels = pixels[:, ::-1]
    return pixels[::-1] if amplifier.flip_y != reversed_y else pixels


def _finite(pixels: NDArray[np.float32], replacement: float) -> NDArray[np.float32]:
    return np.where(np.isfinite(pixels), pixels, np.float32(replacement))
