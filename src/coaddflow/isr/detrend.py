"""The steps of detrending: from the raw counts of one CCD to electrons with variance and mask.

Each step changes a `PartlyDetrendedCcd` in place and notes in its header what it did. They are
in the order in which they are made. Those up to electrons are put together here
(`counts_above_overscan`, `join_amplifiers`, `counts_to_electrons`), since frames for calibration
(`calib.masters`) and the measurement of crosstalk (`calib.crosstalk_fit`) make them as well;
`calexp.ccd` makes all steps on a science frame. What happened last on the way of the signal from
the sky to the file is undone first, as in [1]_ and [2]_. Saturation is judged on the raw counts,
crosstalk is removed before amplifiers are turned and joined (it happens between pixels that are
read at the same moment), linearity needs counts above the bias, and the photon noise is computed
from electrons before the dark current is subtracted, since its electrons fluctuate as well [3]_.

References
----------
.. [1] Bernstein et al. 2017, PASP 129, 114502 (detrending of DECam), section 2.
.. [2] Plazas Malagon et al. 2025, JATIS 11, 011209 (ISR of the Rubin Observatory).
.. [3] Howell 2006, "Handbook of CCD Astronomy", 2nd edition, chapters 3 and 4.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray

from coaddflow.compiled import njit
from coaddflow.errors import InputError, Reason, UnusableData
from coaddflow.geometry.box import Box
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.row_blocks import on_rows
from coaddflow.image.statistics import iqr_sigma
from coaddflow.instrument.camera import Amplifier, Detector
from coaddflow.instrument.raw import RawCcd
from coaddflow.isr.crosstalk import Aggressor, AmplifierSignal, VictimNoise, subtract_ghosts
from coaddflow.isr.overscan import OverscanLevel, overscan_level
from coaddflow.settings.detrend import DetrendSettings

_LOG = logging.getLogger(__name__)


_BAD = np.int32(MaskPlane.BAD)
_LARGEST = np.finfo(np.float32).max

_SAMPLED = 8
"""Rows and columns from one to the next that the level of an amplifier is judged by."""


@dataclass(frozen=True)
class CcdCalibs:
    """Calibration frames of one CCD; what is None is not applied.

    The bias is in counts, the dark in electrons per second, the flat is the relative response,
    about 1; of the defects only the mask is used.
    """

    bias: MaskedImage | None = None
    dark: MaskedImage | None = None
    flat: MaskedImage | None = None
    defects: MaskedImage | None = None


@dataclass(repr=False, eq=False)
class PartlyDetrendedCcd:
    """A CCD between two steps of detrending.

    A job may hold many that wait for the signals of others, so nothing is kept that is no longer
    needed, and nothing is made before it is needed: until assembly 8 bytes a pixel.

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
        Likewise; not there before assembly. Counts up to `apply_gain`, electrons afterwards. Pixels
        that were not measured are NaN with infinite variance, and NO_DATA.
    header : astropy.io.fits.Header
        One card for each step that was made.
    overscan : dict of str to (float, float, float)
        By amplifier: mean level, scatter of the pixels, error of the level of a row; counts.
    saturated : dict of str to ndarray of int
        By amplifier: positions of saturated pixels in the flattened amplifier, in the order of
        readout.
    threads : int
        Number of threads that share the rows.
    """

    detector: Detector
    settings: DetrendSettings
    arrays: tuple[NDArray, ...]
    amplifiers: list[NDArray[np.float32]]
    mask: NDArray[np.int32]
    image: NDArray[np.float32] = field(init=False)
    variance: NDArray[np.float32] = field(init=False)
    header: fits.Header = field(default_factory=fits.Header)
    overscan: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    saturated: dict[str, NDArray[np.intp]] = field(default_factory=dict)
    threads: int = 1

    @classmethod
    def of(cls, raw: RawCcd, settings: DetrendSettings, threads: int = 1) -> Self:
        """Return a CCD before the first step."""
        amplifiers = [
            _cut(array, amplifier.data).astype(np.float32)
            for array, amplifier in zip(raw.arrays, raw.detector.amplifiers, strict=True)
        ]
        mask = np.zeros(raw.detector.shape, np.int32)
        for amplifier, counts in zip(raw.detector.amplifiers, amplifiers, strict=True):
            lost = ~np.isfinite(counts)
            if lost.any():
                counts[lost] = np.nan  # infinities too
            if lost.all():
                _cut(mask, amplifier.target)[:] = MaskPlane.BAD
        return cls(raw.detector, settings, raw.arrays, amplifiers, mask, threads=threads)

    @property
    def masked_image(self) -> MaskedImage:
        """The pixels, after assembly."""
        return MaskedImage(self.image, self.variance, self.mask)

    def note(self, keyword: str, step: str, done: str) -> None:
        """Write to the header what a step did."""
        self.header[keyword] = (done[:60], f"coaddflow step: {step}")

    def signals(self, names: Collection[str] | None = None) -> dict[str, AmplifierSignal]:
        """Return the signals of amplifiers (default: all) that are aggressors of crosstalk.

        They are copies, which later steps do not change; see `Camera.crosstalk_aggressors`. An
        amplifier that is above saturation all over is not among them, as if it had not been read,
        and single pixels count as no more than twice saturation: no absurd frame of one CCD goes
        into the others.
        """
        found = {}
        for amplifier, counts in zip(self.detector.amplifiers, self.amplifiers, strict=True):
            if names is None or amplifier.name in names:
                limit = np.float32(amplifier.saturation)
                signal = np.nan_to_num(
                    np.ascontiguousarray(_in_read_order(amplifier, counts)), nan=0.0
                )
                np.clip(signal, -2 * limit, 2 * limit, out=signal)
                if abs(np.median(signal[::_SAMPLED, ::_SAMPLED])) > limit:
                    continue
                found[amplifier.name] = AmplifierSignal(signal, self.saturated[amplifier.name])
        return found


def counts_above_overscan(
    raw: RawCcd, settings: DetrendSettings, threads: int = 1
) -> PartlyDetrendedCcd:
    """Return a CCD in counts above its overscan, by amplifier, with saturation flagged."""
    ccd = PartlyDetrendedCcd.of(raw, settings, threads)
    mask_saturation(ccd)
    subtract_overscan(ccd)
    return ccd


def join_amplifiers(ccd: PartlyDetrendedCcd, aggressors: Sequence[Aggressor] = ()) -> None:
    """Turn counts of amplifiers into an image in counts, without crosstalk."""
    correct_crosstalk(ccd, aggressors)
    assemble(ccd)


def counts_to_electrons(ccd: PartlyDetrendedCcd, bias: MaskedImage | None) -> None:
    """Turn an image in counts above the overscan into electrons, above the bias and linear."""
    subtract_bias(ccd, bias)
    linearise(ccd)
    apply_gain(ccd)


def mask_saturation(ccd: PartlyDetrendedCcd) -> None:
    """Flag saturated pixels, what they bleed into, and what is close to saturation."""
    settings = ccd.settings
    if not settings.saturation:
        ccd.saturated = {one.name: np.empty(0, np.intp) for one in ccd.detector.amplifiers}
        return
    saturated = np.zeros(ccd.mask.shape, bool)
    for amplifier, counts in zip(ccd.detector.amplifiers, ccd.amplifiers, strict=True):
        above = counts >= amplifier.saturation
        ccd.saturated[amplifier.name] = np.flatnonzero(_in_read_order(amplifier, above))
        _cut(saturated, amplifier.target)[:] = _turn(amplifier, above)
        suspect = counts >= settings.suspect_fraction * amplifier.saturation
        _cut(ccd.mask, amplifier.target)[_turn(amplifier, suspect)] |= MaskPlane.SUSPECT
    y, x = grow_bleeding(saturated, settings.bleed_length, settings.bleed_growth)
    y, x = grow(y, x, settings.saturation_growth, saturated.shape)
    ccd.mask[y, x] |= MaskPlane.SAT
    n_saturated = sum(map(len, ccd.saturated.values()))
    ccd.note("CFSAT", "saturation", f"{n_saturated} saturated pixels")


def subtract_overscan(ccd: PartlyDetrendedCcd) -> None:
    """Subtract the bias level that the overscan shows, or the pedestal where there is none."""
    settings = ccd.settings
    for i, amplifier in enumerate(ccd.detector.amplifiers):
        if amplifier.overscan is None or settings.overscan == "none":
            ccd.amplifiers[i] -= np.float32(settings.pedestal)
            continue
        found = overscan_level(ccd.arrays[i], amplifier, settings)
        ccd.amplifiers[i] -= found.level[:, None]
        if not found.known.all() and np.isfinite(ccd.amplifiers[i]).any():
            _flag_unknown_level(ccd, i, found.known)
        if not found.known.any():
            continue
        ccd.overscan[amplifier.name] = float(found.level.mean()), found.noise, found.error
        _note_overscan(ccd, i, found)
    ccd.arrays = ()
    if all(np.isnan(counts).all() for counts in ccd.amplifiers):
        if ccd.overscan:
            raise UnusableData(Reason.NO_DATA, "no pixel holds a measured value: drop the CCD")
        raise UnusableData(
            Reason.BAD_OVERSCAN,
            "no overscan tells a bias level: compare the sections of the camera file with the raw "
            "file, or set detrend.overscan to `none`",
        )
    if ccd.overscan:
        ccd.note("CFOVERSC", "overscan", settings.overscan)
    elif settings.pedestal:
        ccd.note("CFOVERSC", "overscan", f"pedestal of {settings.pedestal:g} adu")


def _flag_unknown_level(ccd: PartlyDetrendedCcd, i: int, known: NDArray[np.bool_]) -> None:
    """Make rows of an amplifier whose bias level is not known BAD, without a value."""
    amplifier = ccd.detector.amplifiers[i]
    ccd.amplifiers[i][~known] = np.nan
    unknown = np.broadcast_to(~known[:, None], ccd.amplifiers[i].shape)
    _cut(ccd.mask, amplifier.target)[_turn(amplifier, unknown)] |= MaskPlane.BAD
    _LOG.warning(
        "CCD %d: the overscan of amplifier %s tells no bias level for %d of its %d rows: BAD",
        ccd.detector.id,
        amplifier.name,
        np.count_nonzero(~known),
        len(known),
    )


def _note_overscan(ccd: PartlyDetrendedCcd, i: int, found: OverscanLevel) -> None:
    """Write down what an overscan shows besides a smooth level."""
    if not found.remark:
        return
    name = ccd.detector.amplifiers[i].name
    ccd.header[f"CFOVR{i + 1}"] = (found.remark[:60], "what the overscan of the amplifier shows")
    log = _LOG.info if found.is_followed else _LOG.warning
    follows = "" if found.is_followed else f", which `{ccd.settings.overscan}` does not follow"
    log("CCD %d, overscan of amplifier %s: %s%s", ccd.detector.id, name, found.remark, follows)


def correct_crosstalk(ccd: PartlyDetrendedCcd, aggressors: Sequence[Aggressor] = ()) -> None:
    """Subtract the ghosts that other amplifiers, of this CCD and of others, leave in each one.

    Parameters
    ----------
    ccd : PartlyDetrendedCcd
        The CCD.
    aggressors : sequence of Aggressor
        Amplifiers of other CCDs (see `crosstalk.collect_aggressors`). Those without a signal
        are left out; a warning and the card CFXTKMIS name them.
    """
    amplifiers = ccd.detector.amplifiers
    sources: dict[str, list[tuple[float, int | AmplifierSignal]]] = {a.name: [] for a in amplifiers}
    matrix = ccd.detector.crosstalk if ccd.settings.crosstalk else None
    for victim, row in enumerate(matrix or ()):
        links = [(one, i) for i, one in enumerate(row) if i != victim and one != 0.0]
        sources[amplifiers[victim].name].extend(links)
    for one in aggressors:
        if one.signal is not None:
            sources[one.victim].append((one.coefficient, one.signal))
    _note_aggressors(ccd, aggressors)
    if not any(sources.values()):
        return
    strong = subtract_ghosts(
        [_in_read_order(*pair) for pair in zip(amplifiers, ccd.amplifiers, strict=True)],
        [sources[amplifier.name] for amplifier in amplifiers],
        [VictimNoise(amplifier.gain, amplifier.read_noise) for amplifier in amplifiers],
        [ccd.saturated[amplifier.name] for amplifier in amplifiers],
        ccd.settings.saturated_ghosts,
        ccd.threads,
    )
    for amplifier, flagged in zip(amplifiers, strong, strict=True):
        in_file = _in_read_order(amplifier, flagged)
        _cut(ccd.mask, amplifier.target)[_turn(amplifier, in_file)] |= MaskPlane.CROSSTALK
    ccd.note("CFXTALK", "crosstalk", f"{len(amplifiers)} amplifiers")


def _note_aggressors(ccd: PartlyDetrendedCcd, aggressors: Sequence[Aggressor]) -> None:
    """Write to the header which amplifiers of other CCDs were known, and which were not."""
    if not aggressors:
        return
    there = {one.source for one in aggressors if one.signal is not None}
    missing = {one.source for one in aggressors if one.signal is None}
    ccd.header["CFXTKCCD"] = (len(there), "amplifiers of other CCDs as aggressors")
    if missing:
        names = ", ".join(f"{number} {name}" for number, name in sorted(missing))
        ccd.header["CFXTKMIS"] = (names[:60], "CCD, amplifier: aggressors not known")
        _LOG.warning(
            "crosstalk into CCD %d is not corrected for amplifiers that could not be read "
            "(CCD, amplifier): %s",
            ccd.detector.id,
            names,
        )


def assemble(ccd: PartlyDetrendedCcd) -> None:
    """Put the light-sensitive pixels of all amplifiers in their place on the CCD."""
    shape = ccd.detector.shape
    ccd.image, ccd.variance = np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32)
    for amplifier, counts in zip(ccd.detector.amplifiers, ccd.amplifiers, strict=True):
        planes = _cut(ccd.image, amplifier.target), _cut(ccd.variance, amplifier.target)
        *_, error = ccd.overscan.get(amplifier.name, (0.0,))
        on_rows(_put, (*planes, _turn(amplifier, counts)), error**2, threads=ccd.threads)
    ccd.amplifiers = []
    on_rows(_flag_missing, (ccd.image, ccd.variance, ccd.mask), threads=ccd.threads)
    ccd.note("CFASSEMB", "assembly", f"{len(ccd.detector.amplifiers)} amplifiers")


def _put(image: NDArray, variance: NDArray, counts: NDArray, of_level: float) -> None:
    """Put counts into an image, and the variance of their level into another."""
    image[:], variance[:] = counts, of_level


def _flag_missing(image: NDArray, variance: NDArray, mask: NDArray[np.int32]) -> None:
    """Make pixels that are not finite those of which nothing is known."""
    missing = ~np.isfinite(image)
    if missing.any():
        image[missing], variance[missing] = np.nan, np.inf
        mask[missing] |= MaskPlane.NO_DATA


def subtract_bias(ccd: PartlyDetrendedCcd, bias: MaskedImage | None) -> None:
    """Subtract the master bias (counts)."""
    if not ccd.settings.bias or bias is None:
        return
    _take_over_defects(ccd, bias, "bias")
    _add(ccd, ccd.image, bias.image, np.float32(-1))
    _add(ccd, ccd.variance, bias.variance, np.float32(1))
    ccd.note("CFBIAS", "bias", "subtracted")


def linearise(ccd: PartlyDetrendedCcd) -> None:
    """Apply the polynomial of each amplifier: true = z + c2 z^2 + c3 z^3 + ..."""
    if not ccd.settings.linearity:
        return
    orders = []
    for amplifier in ccd.detector.amplifiers:
        if not any(amplifier.linearity):
            continue
        counts = _cut(ccd.image, amplifier.target)
        correction = np.zeros_like(counts)
        for coefficient in reversed(amplifier.linearity):
            correction = (correction + np.float32(coefficient)) * counts
        counts += correction * counts
        orders.append(len(amplifier.linearity) + 1)
    if orders:
        ccd.note("CFLINEAR", "linearity", f"polynomials of order {max(orders)}")


def apply_gain(ccd: PartlyDetrendedCcd) -> None:
    """Turn counts into electrons, and begin the variance: photons and read noise [3]_."""
    for amplifier in ccd.detector.amplifiers:
        planes = _cut(ccd.image, amplifier.target), _cut(ccd.variance, amplifier.target)
        on_rows(_to_electrons, planes, amplifier, threads=ccd.threads)
    ccd.note("CFGAIN", "gain", "electrons")


def _to_electrons(
    pixels: NDArray[np.float32], variance: NDArray[np.float32], amplifier: Amplifier
) -> None:
    """Turn counts of an amplifier into electrons, in place; see `apply_gain`."""
    pixels *= np.float32(amplifier.gain)
    variance *= np.float32(amplifier.gain**2)  # of overscan and bias, in counts until now
    variance += np.float32(amplifier.read_noise**2)
    variance += np.where(pixels > 0, pixels, np.float32(0))


def subtract_dark(ccd: PartlyDetrendedCcd, dark: MaskedImage | None, exposure_time: float) -> None:
    """Subtract the dark current (electrons per second), scaled by the exposure time (s)."""
    if not ccd.settings.dark or dark is None:
        return
    _take_over_defects(ccd, dark, "dark")
    factor = 1.0
    if ccd.settings.dark_scale == "fitted":
        electrons = np.zeros_like(ccd.image)
        _add(ccd, electrons, dark.image, np.float32(exposure_time))
        factor = fit_dark_scale(ccd.image, electrons, ccd.mask)
    scale = np.float32(exposure_time * factor)
    _add(ccd, ccd.image, dark.image, -scale)
    _add(ccd, ccd.variance, dark.variance, scale**2)
    fitted = f", factor {factor:.4f} fitted" if ccd.settings.dark_scale == "fitted" else ""
    ccd.note("CFDARK", "dark", f"scaled by {exposure_time:g} s{fitted}")


def divide_flat(ccd: PartlyDetrendedCcd, flat: MaskedImage | None) -> None:
    """Divide by the flat; its own variance is added to that of the pixels."""
    if not ccd.settings.flat or flat is None:
        return
    _take_over_defects(ccd, flat, "flat")
    low, high = ccd.settings.flat_limits
    limits = np.float32(low), np.float32(high)
    planes = ccd.image, ccd.variance, ccd.mask, flat.image, flat.variance
    on_rows(_divide, planes, limits, threads=ccd.threads)
    ccd.note("CFFLAT", "flat", "divided")


def mask_defects(ccd: PartlyDetrendedCcd, defects: MaskedImage | None) -> None:
    """Flag the defects that the camera file and the defects frame name."""
    if not ccd.settings.defects:
        return
    for box in ccd.detector.defects:
        _cut(ccd.mask, box)[:] |= MaskPlane.BAD
    if defects is not None:
        _take_over_defects(ccd, defects, "defects frame")
    n_bad = np.count_nonzero(ccd.masked_image.has_any(MaskPlane.BAD))
    ccd.note("CFDEFECT", "defects", f"{n_bad} bad pixels")


def mask_edge(ccd: PartlyDetrendedCcd) -> None:
    """Flag the border of the CCD."""
    width = ccd.settings.edge
    if width == 0:
        return
    for strip in (np.s_[:width], np.s_[-width:], np.s_[:, :width], np.s_[:, -width:]):
        ccd.mask[strip] |= MaskPlane.EDGE
    ccd.note("CFEDGE", "edge", f"{width} pixels")


def note_amplifiers(ccd: PartlyDetrendedCcd) -> None:
    """Write to the header gain, read noise and overscan of each amplifier."""
    for number, amplifier in enumerate(ccd.detector.amplifiers, start=1):
        ccd.header[f"CFAMP{number}"] = (amplifier.name, "amplifier")
        ccd.header[f"CFGAIN{number}"] = (amplifier.gain, "[electron/adu] gain")
        ccd.header[f"CFRDN{number}"] = (amplifier.read_noise, "[electron] read noise")
        level, noise, _ = ccd.overscan.get(amplifier.name, (np.nan,) * 3)
        noise *= amplifier.gain
        if np.isfinite([level, noise]).all():
            ccd.header[f"CFOVL{number}"] = (round(level, 3), "[adu] overscan level")
            ccd.header[f"CFOVN{number}"] = (round(noise, 3), "[electron] noise of the overscan")


def check_area(ccd: PartlyDetrendedCcd) -> None:
    """Note which fraction of the CCD measured nothing, and fail a CCD that lost too much.

    Raises
    ------
    CcdFailure
        ``too_little_area``; a CCD without a single good pixel fails later, for that reason.
    """
    lost, limit = ccd.masked_image.lost_fraction, ccd.settings.max_lost_fraction
    ccd.header["CFLOST"] = (round(lost, 4), "fraction of pixels BAD, SAT or NO_DATA")
    if limit < lost < 1.0:
        raise UnusableData(
            Reason.TOO_LITTLE_AREA,
            f"{100 * lost:.0f} % of the pixels are BAD, SAT or NO_DATA, more than "
            f"detrend.max_lost_fraction = {limit:g} allows",
        )


def grow_bleeding(
    saturated: NDArray[np.bool_], length: int, growth: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the positions (y, x) of saturated pixels and of those they bleed into.

    Runs of at least ``length`` saturated pixels in a column are bleeding: ``growth`` pixels are
    added at both ends. Some positions may occur twice.
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

    The contrast of the hottest pixels with their neighbours is compared in both; the factor is the
    least-squares slope through zero, with clipping. Image and dark, which is scaled to the exposure
    time, are in electrons; saturated and missing pixels of the mask are left out. With fewer than
    ``min_pixels`` hot pixels the factor is 1.
    """
    unusable = (mask & np.int32(MaskPlane.SAT | MaskPlane.NO_DATA | MaskPlane.SUSPECT)) != 0
    inner = dark[1:-1, 1:-1]
    lost = (mask[1:-1, 1:-1] & np.int32(MaskPlane.NO_DATA)) != 0
    if lost.all():
        return 1.0
    middle, noise = np.median(inner[~lost]), iqr_sigma(inner[~lost])
    y, x = np.nonzero((inner > middle + 10 * noise) & ~unusable[1:-1, 1:-1])
    if len(y) < min_pixels:
        return 1.0
    y, x = y + 1, x + 1
    dy, dx = np.array([(j, i) for j in (-1, 0, 1) for i in (-1, 0, 1) if (j, i) != (0, 0)]).T
    around = (y[:, None] + dy, x[:, None] + dx)
    contrast_dark = dark[y, x] - np.median(dark[around], axis=1)
    contrast_image = image[y, x] - np.nanmedian(image[around], axis=1)
    keep = np.isfinite(contrast_image) & (contrast_dark > 0)
    factor = 1.0
    for iteration in range(5):
        a, b = contrast_dark[keep].astype(float), contrast_image[keep].astype(float)
        if len(a) < min_pixels:
            return 1.0
        slope = np.median(b / a) if iteration == 0 else (a * b).sum() / (a * a).sum()
        factor = float(slope)
        residual = contrast_image - factor * contrast_dark
        keep = np.abs(residual) < 4 * iqr_sigma(residual[keep]) + 1e-6
        keep &= np.isfinite(residual) & (contrast_dark > 0)
    return factor


def _take_over_defects(ccd: PartlyDetrendedCcd, calib: MaskedImage, kind: str) -> None:
    """Flag as BAD the pixels that are bad in a calibration frame, or have no data in it."""
    if calib.shape != ccd.image.shape:
        raise InputError(
            f"the {kind} of CCD {ccd.detector.id} has shape {calib.shape}, "
            f"the CCD has {ccd.image.shape}",
            remedy="use a frame that was made for this camera file",
        )
    planes = np.int32(MaskPlane.BAD | MaskPlane.NO_DATA)
    on_rows(_flag_where, (ccd.mask, calib.mask), planes, _BAD, threads=ccd.threads)


def _add(
    ccd: PartlyDetrendedCcd, plane: NDArray[np.float32], other: NDArray, factor: np.float32
) -> None:
    """Add another plane times a factor to a plane of a CCD."""
    on_rows(_add_times, (plane, other), factor, threads=ccd.threads)


def _cut(array: NDArray, box: Box) -> NDArray:
    x0, y0, x1, y1 = box
    return array[y0:y1, x0:x1]


def _turn(amplifier: Amplifier, pixels: NDArray) -> NDArray:
    """Turn pixels from the order of the file into that of the CCD."""
    return pixels[:: -1 if amplifier.flip_y else 1, :: -1 if amplifier.flip_x else 1]


def _in_read_order(amplifier: Amplifier, pixels: NDArray) -> NDArray:
    """Turn pixels from the order of the file into that of readout, or back."""
    reversed_x, reversed_y = amplifier.read_reversed
    turn_y, turn_x = amplifier.flip_y != reversed_y, amplifier.flip_x != reversed_x
    return pixels[:: -1 if turn_y else 1, :: -1 if turn_x else 1]


@njit(nogil=True)
def _add_times(plane, other, factor):
    """Add another plane times a factor, in place; what is not finite in it counts as zero."""
    for y in range(len(plane)):
        row, addend = plane[y], other[y]
        for x in range(len(row)):
            value = addend[x] if abs(addend[x]) <= _LARGEST else np.float32(0)
            row[x] += factor * value


@njit(nogil=True, error_model="numpy")
def _divide(image, variance, mask, flat, flat_variance, limits):
    """Divide by a flat, in place; pixels at which it is beyond the limits are BAD."""
    low, high = limits
    for y in range(len(image)):
        pixels, scatter, bits = image[y], variance[y], mask[y]
        response, error = flat[y], flat_variance[y]
        for x in range(len(pixels)):
            usable = (response[x] > low) & (response[x] < high)
            bits[x] |= np.int32(0) if usable else _BAD
            divisor = response[x] if usable else np.float32(1)
            value = pixels[x] / divisor
            known = value if abs(value) <= _LARGEST else np.float32(0)
            relative = error[x] if usable & (abs(error[x]) <= _LARGEST) else np.float32(0)
            square = divisor * divisor
            pixels[x] = value
            scatter[x] = scatter[x] / square + known * known * (relative / square)


@njit(nogil=True)
def _flag_where(mask, other, planes, flag):
    """Set bits where another mask has one of these planes, in place."""
    for y in range(len(mask)):
        bits, row = mask[y], other[y]
        for x in range(len(bits)):
            bits[x] |= flag if row[x] & planes else np.int32(0)
