"""Coadds: all exposures of a band on one patch, as a weighted mean.

The weight is one number per exposure: the inverse of the variance of its sky in nJy, times, unless
`coadd.weight` is ``sky``, the effective area of its PSF. The latter is the inverse variance of the
flux of a faint star that is fitted with the PSF [1]_: with it, the coadd of exposures of different
seeing has nearly the signal-to-noise of a simultaneous fit to all of them. Weights from the
variance of each pixel would contain the photon noise of the sources: bright pixels would get less
weight, and the PSF of the coadd and the calibration would depend on flux. It is also the same
number in all patches and tracts, so that overlapping coadds agree.

Warps are read in blocks of rows and never whole; sums are made in the order of the exposure ids,
so the result depends neither on the size of the blocks nor on the number of threads.

References
----------
.. [1] King 1983, PASP 95, 163 (noise-equivalent area); Annis et al. 2014, ApJ 794, 120 (weights
   with the inverse square of the seeing, for the coadds of stripe 82).
"""

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray

from coaddflow.coadd.clipping import (
    BIN,
    FILLABLE,
    MISSING,
    OUTLIER,
    USABLE,
    USUAL_FWHM,
    Epochs,
    describe_epochs,
    find_outliers,
)
from coaddflow.coadd.input_sets import (
    BlockSets,
    InputSets,
    add_key,
    join_sets,
    near_change,
    no_sets,
    number_sets,
    set_keys,
)
from coaddflow.compiled import njit
from coaddflow.errors import InputError
from coaddflow.geometry.box import Box, common_box, part_of
from coaddflow.image.masked_image import MaskedImage, MaskPlane, flux_scale, planes_from_names
from coaddflow.runtime.resources import STACK_BYTES_PER_PIXEL, STACK_ROWS
from coaddflow.settings.coadd import CoaddSettings
from coaddflow.warp.files import WarpReader
from coaddflow.warp.kernels import covariance_factor

_MIN_ROWS, _MAX_ROWS = STACK_ROWS
"""Larger blocks save little and cost time: the system allocates their memory each time."""

_SIGMA_PER_FWHM = 1.0 / np.sqrt(8.0 * np.log(2.0))

_NO_DATA, _CLIPPED = np.int32(MaskPlane.NO_DATA), np.int32(MaskPlane.CLIPPED)
_INEXACT_PSF = np.int32(MaskPlane.INEXACT_PSF)


@dataclass(frozen=True)
class CoaddInput:
    """One exposure that goes into a coadd."""

    exposure: str
    """Exposure id; the order of summation."""
    reader: WarpReader
    """Reads the pixels of its warp."""
    weight: float
    """Inverse variance, nJy^-2 (`exposure_weight`)."""
    ccds: str = ""
    """CCDs that contribute, joined by commas."""
    seeing: float = np.nan
    """FWHM in arcsec; NaN if not known."""
    zero_point: float = np.nan
    """Median of its CCDs, mag; NaN if not known. Like the next two for the table of inputs."""
    mjd: float = np.nan
    """Date, MJD; NaN if not known."""
    exposure_time: float = np.nan
    """Exposure time, s; NaN if not known."""
    sky_offset: float | None = None
    """What background matching subtracts at the middle of the patch, nJy per pixel."""


@dataclass(frozen=True)
class Coadd:
    """The coadd of a patch."""

    box: Box
    """Its pixels on the tract."""
    masked_image: MaskedImage
    """nJy. Bits are the union of those of the values used; CLIPPED where an outlier was left
    out; NaN, infinite variance and NO_DATA where there is nothing."""
    n_inputs: NDArray[np.int16]
    """Number of values used, shape (ny, nx)."""
    inputs: Table
    """One row an exposure: exposure, ccds, mjd, exposure_time, seeing, zero_point, weight, n_used
    and n_clipped (pixels); with background matching sky_offset."""
    sets: InputSets | None = None
    """The exposures that each pixel is made of, in the order of the table of inputs."""


def effective_area(seeing: ArrayLike, pixel_scale: float) -> NDArray[np.float64]:
    """Return the noise-equivalent area of Gaussian PSFs, pixels [1]_.

    Parameters
    ----------
    seeing : array_like
        FWHM, arcsec.
    pixel_scale : float
        Arcsec per pixel.
    """
    return 4.0 * np.pi * (np.asarray(seeing, float) * _SIGMA_PER_FWHM / pixel_scale) ** 2


def exposure_weight(
    sky_noise: ArrayLike, zero_point: ArrayLike, scale: ArrayLike = 1.0, area: float = 1.0
) -> float:
    """Return the weight of an exposure: an inverse variance in nJy^-2.

    Parameters
    ----------
    sky_noise : array_like, shape (n_ccds,)
        Standard deviation of empty sky per pixel.
    zero_point : array_like, shape (n_ccds,)
        AB magnitude of one unit of it.
    scale : array_like, shape (n_ccds,)
        Side of a pixel of the coadd in pixels of the CCD; NaN where it is not known, taken as 1.
    area : float
        Effective area of the PSF in pixels of the coadd; 1 for the variance of a pixel.

    Returns
    -------
    float
        From the median over the CCDs of the noise in nJy.

    Raises
    ------
    InputError
        If no CCD has a positive noise and a zero-point.
    """
    noise = np.asarray(sky_noise, float) * np.vectorize(flux_scale, otypes=[float])(zero_point)
    noise *= np.nan_to_num(np.asarray(scale, float), nan=1.0)
    noise = noise[np.isfinite(noise) & (noise > 0)]
    if noise.size == 0:
        raise InputError(
            "no CCD of the exposure has a sky noise and a zero-point",
            remedy="leave the exposure out, or look at its row in results/summary",
        )
    return float(np.median(noise) ** -2.0 / area)


def coadd_patch(
    inputs: Sequence[CoaddInput],
    box: Box,
    settings: CoaddSettings,
    *,
    pixel_scale: float | None = None,
    covariance: float | None = None,
    threads: int = 1,
) -> Coadd:
    """Coadd warps on a box of tract pixels.

    Parameters
    ----------
    inputs : sequence of CoaddInput
        Any number, in any order; parts of warps outside of the box are ignored.
    box : tuple of int
        The patch's outer box (x0, y0, x1, y1).
    settings : CoaddSettings
        Mask planes, clipping and memory.
    pixel_scale : float, optional
        Arcsec per pixel, to relate the seeing to pixels.
    covariance : float, optional
        `covariance_factor` of the warps; default that of lanczos3.
    threads : int
        Blocks of pixels are shared among so many threads.

    Returns
    -------
    Coadd
        The mean is sum(w v) / sum(w) with one weight w per exposure; its variance
        sum(w^2 variance) / sum(w)^2 holds for single pixels. Pixels for which all exposures are
        flagged and some have one of ``settings.fill_planes`` are means of these, with
        (``fill_error`` * value)^2 added to the variance. Pixels within the FWHM of the PSF of which
        other exposures are used have the bit INEXACT_PSF, and so have pixels with a value of which
        no PSF is known.

    Raises
    ------
    InputError
        If a warp cannot be read, a weight is not positive, or an exposure occurs twice.
    """
    inputs = sorted(inputs, key=lambda one: one.exposure)
    _check_inputs(inputs)
    shape = (box[3] - box[1], box[2] - box[0])
    index = np.zeros(shape, np.int32)
    coadd = Coadd(
        box,
        MaskedImage.empty(shape),
        np.zeros(shape, np.int16),
        inputs_table(inputs),
        join_sets(index, [], [], len(inputs)),
    )
    if not inputs:
        return coadd
    epochs = describe_epochs([one.seeing for one in inputs], settings.clip, pixel_scale)
    if covariance is None:
        covariance = covariance_factor("lanczos3")

    def work(block: Box) -> tuple[NDArray[np.int64], BlockSets]:
        return _coadd_block(inputs, coadd, block, epochs, settings, covariance)

    blocks = _make_blocks(len(inputs), box, epochs.halo, settings.memory_mb, threads)
    if threads == 1:
        results = [work(block) for block in blocks]
    else:
        with ThreadPoolExecutor(threads) as pool:
            results = list(pool.map(work, blocks))
    counts, sets = zip(*results, strict=True)
    coadd.inputs["n_used"], coadd.inputs["n_clipped"] = np.sum(counts, axis=0).T
    places = [part_of(box, block) for block in blocks]
    coadd = dataclasses.replace(coadd, sets=join_sets(index, places, sets, len(inputs)))
    _mark_inexact(coadd, inputs, pixel_scale)
    return coadd


def _mark_inexact(coadd: Coadd, inputs: Sequence[CoaddInput], pixel_scale: float | None) -> None:
    """Set INEXACT_PSF where the PSF is not that of the exposures of the pixel."""
    seeing = coadd_seeing(coadd.inputs)
    fwhm = USUAL_FWHM
    if pixel_scale is not None and np.isfinite(seeing):
        fwhm = seeing / pixel_scale
    sets = coadd.sets
    without = np.packbits([not one.reader.read_psfs() for one in inputs])
    inexact = (sets.filled | (sets.members & without).any(axis=1))[sets.index]
    inexact |= near_change(sets.index, math.ceil(fwhm))
    inexact &= sets.index > 0
    coadd.masked_image.mask[inexact] |= _INEXACT_PSF


def coadd_seeing(inputs: Table) -> float:
    """Return the FWHM of the PSF of a coadd as its inputs say, arcsec; NaN if none is known.

    Parameters
    ----------
    inputs : astropy.table.Table
        The inputs of the coadd: columns ``seeing`` (arcsec), ``weight``, ``n_used``.
    """
    seeing, weight = (np.asarray(inputs[name], float) for name in ("seeing", "weight"))
    known = np.isfinite(seeing) & (seeing > 0) & (np.asarray(inputs["n_used"]) > 0)
    if not known.any():
        return float("nan")
    return float(np.sqrt(np.average(seeing[known] ** 2, weights=weight[known])))


def _check_inputs(inputs: Sequence[CoaddInput]) -> None:
    """Raise InputError if a weight or an id is not usable."""
    for before, one in zip([None, *inputs], inputs, strict=False):
        if not (np.isfinite(one.weight) and one.weight > 0):
            raise InputError(
                f"exposure {one.exposure} has no usable weight ({one.weight})",
                remedy="its sky noise and zero-point must be known; or leave it out",
            )
        if before is not None and before.exposure == one.exposure:
            raise InputError(
                f"exposure {one.exposure} is given twice for one coadd",
                remedy="give each exposure once",
            )


def inputs_table(inputs: Sequence[CoaddInput]) -> Table:
    """Return the table of inputs (`Coadd.inputs`), with the counts still 0."""
    table = Table()
    for name in ("exposure", "ccds", "mjd", "exposure_time", "seeing", "zero_point", "weight"):
        values = [getattr(one, name) for one in inputs]
        kind, empty = (str, "U1") if name in ("exposure", "ccds") else (float, float)
        # FITS has no strings of length 0
        table[name] = np.array(values, kind) if values else np.zeros(0, empty)
    table["n_used"] = np.zeros(len(inputs), np.int64)
    table["n_clipped"] = np.zeros(len(inputs), np.int64)
    if any(one.sky_offset is not None for one in inputs):
        table["sky_offset"] = [one.sky_offset for one in inputs]
    return table


def _make_blocks(n_inputs: int, box: Box, halo: int, memory_mb: int, threads: int) -> list[Box]:
    """Cut a patch into blocks that fit into memory, beginning at whole bins.

    Whole rows, as long as some of them fit; else squares, around which the halo is smallest.
    """
    pixels = memory_mb * 1e6 / (n_inputs * STACK_BYTES_PER_PIXEL * threads)
    columns = box[2] - box[0]
    rows = min(int(pixels / columns) - 2 * halo, _MAX_ROWS)
    if rows < _MIN_ROWS:
        rows = max(int(pixels**0.5) - 2 * halo, _MIN_ROWS)
        columns = min(columns, rows)
    return [
        (x0, y0, x1, y1)
        for y0, y1 in _cut(box[1], box[3], rows)
        for x0, x1 in _cut(box[0], box[2], columns)
    ]


def _cut(begin: int, end: int, length: int) -> list[tuple[int, int]]:
    """Cut a span into pieces that begin at whole bins; all of it is one if it is that short."""
    if length >= end - begin:
        return [(begin, end)]
    length -= length % BIN
    first = begin - begin % BIN
    return [(max(i, begin), min(i + length, end)) for i in range(first, end, length)]


def _coadd_block(
    inputs: Sequence[CoaddInput],
    coadd: Coadd,
    block: Box,
    epochs: Epochs,
    settings: CoaddSettings,
    covariance: float,
) -> tuple[NDArray[np.int64], BlockSets]:
    """Coadd a block of the tract's pixels; return counts, shape (n, 2), and its sets of inputs."""
    box, halo = coadd.box, epochs.halo
    region = (
        max(block[0] - block[0] % BIN - halo, box[0]),
        block[1] - block[1] % BIN - halo,
        min(-(-block[2] // BIN) * BIN + halo, box[2]),
        -(-block[3] // BIN) * BIN + halo,
    )
    chosen = [k for k, one in enumerate(inputs) if common_box(one.reader.box, region, box)]
    counts = np.zeros((len(inputs), 2), np.int64)
    place = part_of(box, block)
    if not chosen:
        return counts, no_sets(len(inputs))
    image, variance, mask, state = _read_stack(
        [inputs[k].reader for k in chosen], region, box, settings
    )
    if settings.clip.enabled:
        some = epochs._replace(sharpness=epochs.sharpness[chosen], leeway=epochs.leeway[chosen])
        x_offset = region[0] % BIN
        find_outliers(image, variance, state, some, settings.clip, covariance, x_offset)
    target = coadd.masked_image
    part_counts = np.zeros((len(chosen), 2), np.int64)
    keys = set_keys(len(inputs))
    signature = np.zeros((block[3] - block[1], block[2] - block[0]), np.uint64)
    _combine(
        (image, variance, mask, state),
        np.array([inputs[k].weight for k in chosen]),
        np.float32(settings.fill_error),
        (region[0] - box[0], region[1] - box[1]),
        (block[0] - box[0], block[1] - box[1], block[2] - box[0], block[3] - box[1]),
        (target.image, target.variance, target.mask, coadd.n_inputs),
        part_counts,
        (keys[[*chosen, -1]], signature),
    )
    counts[chosen] = part_counts
    inside = state[:, *part_of(region, block)]
    return counts, number_sets(signature, inside, chosen, len(inputs), coadd.sets.index[place])


def _read_stack(
    readers: Sequence[WarpReader], region: Box, box: Box, settings: CoaddSettings
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Read a region of all warps and class their values; what is outside of ``box`` is missing."""
    shape = (len(readers), region[3] - region[1], region[2] - region[0])
    image, variance = np.empty(shape, np.float32), np.empty(shape, np.float32)
    mask, state = np.empty(shape, np.int32), np.full(shape, MISSING, np.uint8)
    bad = np.int32(planes_from_names(settings.bad_planes) | MaskPlane.NO_DATA)
    fill = np.int32(planes_from_names(settings.fill_planes))
    for k, reader in enumerate(readers):
        part = common_box(reader.box, region, box)
        rows, columns = part_of(region, part)
        pixels = MaskedImage(image[k], variance[k], mask[k])
        reader.read_into(part, pixels, (rows.start, columns.start))
        place = (rows.start, rows.stop, columns.start, columns.stop)
        _class_values(image[k], variance[k], mask[k], bad, fill, place, state[k])
    return image, variance, mask, state


@njit(nogil=True)
def _class_values(image, variance, mask, bad, fill, place, state):
    """Tell which values of a part can be used, and which only where there is nothing else."""
    first, last, start, stop = place
    for y in range(first, last):
        _class_row(
            *(image[y, start:stop], variance[y, start:stop], mask[y, start:stop]),
            *(bad, fill, state[y, start:stop]),
        )


@njit(nogil=True)
def _class_row(image, variance, mask, bad, fill, state):
    for x in range(state.size):
        value, noise, bits = image[x], variance[x], mask[x]
        # differences are NaN, and comparisons false, if a value is not finite
        good = (value - value == 0) & (noise > 0) & (noise - noise == 0)
        good &= (bits & _NO_DATA) == 0
        other = np.uint8(FILLABLE) if (bits & fill) != 0 else np.uint8(MISSING)
        found = np.uint8(USABLE) if (bits & bad) == 0 else other
        state[x] = found if good else np.uint8(MISSING)


@njit(nogil=True)
def _sum_epochs(image, variance, mask, state, weights, y, x, wanted):
    """Sum the values of a pixel that are in a state; return their number, sums and bits."""
    n, bits = 0, np.int32(0)
    total, value, noise = 0.0, 0.0, 0.0
    for k in range(weights.size):
        if state[k, y, x] == wanted:
            n += 1
            total += weights[k]
            value += weights[k] * image[k, y, x]
            noise += weights[k] * weights[k] * variance[k, y, x]
            bits |= mask[k, y, x]
    return n, total, value, noise, bits


@njit(nogil=True)
def _add_values(image, variance, mask, state, weight, sums, numbers, bits):
    """Add the usable values of an exposure on a row of pixels, as `_sum_epochs` does for one.

    ``sums``: of weights, values and noises; ``numbers``: of usable values and of those that can
    fill. Returns the number of usable values. The compiler makes vectors of loops that write one
    array each.
    """
    _add_weights(weight, state, sums[0])
    _add_weighted(weight, image, state, sums[1])
    _add_weighted(weight * weight, variance, state, sums[2])
    _count(state, USABLE, numbers[0])
    _count(state, FILLABLE, numbers[1])
    return _add_bits(mask, state, bits)


@njit(nogil=True)
def _add_weights(weight, state, sums):
    for i in range(state.size):
        sums[i] += weight if state[i] == USABLE else 0.0


@njit(nogil=True)
def _add_weighted(weight, values, state, sums):
    for i in range(state.size):
        sums[i] += weight * values[i] if state[i] == USABLE else 0.0


@njit(nogil=True)
def _count(state, wanted, numbers):
    for i in range(state.size):
        numbers[i] += np.int32(1) if state[i] == wanted else np.int32(0)


@njit(nogil=True)
def _add_bits(mask, state, bits):
    """Add the flags of the usable values of a row; return how many values are usable."""
    n_used = 0
    for i in range(state.size):
        usable = state[i] == USABLE
        bits[i] |= mask[i] if usable else np.int32(0)
        n_used += 1 if usable else 0
    return n_used


@njit(nogil=True)
def _mark_clipped(state, n_values, bits):
    """Set CLIPPED where a value of an exposure was left out of some; return how many were."""
    n_clipped = 0
    for i in range(state.size):
        clipped = (state[i] >= OUTLIER) & (n_values[i] > 0)
        bits[i] |= _CLIPPED if clipped else np.int32(0)
        n_clipped += 1 if clipped else 0
    return n_clipped


@njit(nogil=True)
def _write_means(sums, n_values, bits, extra, image, variance, mask, n_inputs):
    """Write weighted means, and what says that there are none."""
    for i in range(n_values.size):
        some = n_values[i] > 0
        total = sums[0, i] if some else 1.0
        noise = sums[2, i] / (total * total) + extra[i]
        image[i] = np.float32(sums[1, i] / total) if some else np.float32(np.nan)
        variance[i] = np.float32(noise) if some else np.float32(np.inf)
        mask[i] = bits[i] if some else _NO_DATA
        n_inputs[i] = n_values[i]


@njit(nogil=True)
def _combine(stack, weights, fill_error, origin, block, target, counts, sets):
    """Write the weighted means of a stack into a block; count values used and clipped.

    ``origin``: first column and row of the stack; all places are those on the target. ``sets``: the
    keys of the exposures and of filled pixels, and the signatures of the pixels of the block.
    """
    keys, signature = sets
    values, variances, masks, state = stack
    first, width = block[0] - origin[0], block[2] - block[0]
    sums, numbers = np.empty((3, width)), np.empty((2, width), np.int32)
    bits, extra = np.empty(width, np.int32), np.empty(width)
    part, part_out = slice(first, first + width), slice(block[0], block[2])
    for y_out in range(block[1], block[3]):
        y = y_out - origin[1]
        sums[:], numbers[:], bits[:], extra[:] = 0.0, 0, 0, 0.0
        signs = signature[y_out - block[1]]
        for k in range(weights.size):
            counts[k, 0] += _add_values(
                *(values[k, y, part], variances[k, y, part], masks[k, y, part]),
                *(state[k, y, part], weights[k], sums, numbers, bits),
            )
            add_key(state[k, y, part], USABLE, keys[k], signs)
        for i in range(width):
            if numbers[0, i] > 0 or numbers[1, i] == 0:
                continue
            numbers[0, i], sums[0, i], sums[1, i], sums[2, i], bits[i] = _sum_epochs(
                values, variances, masks, state, weights, y, first + i, FILLABLE
            )
            extra[i] = (fill_error * (sums[1, i] / sums[0, i])) ** 2
            signs[i] = keys[-1]
            for k in range(weights.size):
                counts[k, 0] += state[k, y, first + i] == FILLABLE
            for k in range(weights.size):
                signs[i] ^= keys[k] if state[k, y, first + i] == FILLABLE else np.uint64(0)
        for k in range(weights.size):
            counts[k, 1] += _mark_clipped(state[k, y, part], numbers[0], bits)
        _write_means(
            *(sums, numbers[0], bits, extra),
            *(target[0][y_out, part_out], target[1][y_out, part_out]),
            *(target[2][y_out, part_out], target[3][y_out, part_out]),
        )
