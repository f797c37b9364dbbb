"""Warps: the pixels of an exposure on the pixels of a tract.

One warp per exposure and patch contains all CCDs of the exposure there, in nJy, with variance and
mask, trimmed to the box with data. The order of the patches is such that each calexp is read once
and few are in memory at a time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.box import Box, common_box, enclosing_box
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.psf_model import PsfModel
from coaddflow.settings.warp import WarpSettings
from coaddflow.skymap.tract import Tract, patch_position
from coaddflow.warp.ccd_psf import CcdPsf, describe_psf
from coaddflow.warp.files import Warp
from coaddflow.warp.kernels import Kernel, make_kernel, stretch_of
from coaddflow.warp.mapping import PixelGrid, footprint_box, map_ccd
from coaddflow.warp.resample import Rules, Source, prepare_source, resample
from coaddflow.warp.turning import turn

if TYPE_CHECKING:
    from astropy.wcs import WCS

_ROWS_PER_TASK = 32


@dataclass(frozen=True)
class CcdImage:
    """A calibrated CCD, the input of `warp_patches`."""

    masked_image: MaskedImage
    """Pixels, sky subtracted."""
    wcs: "WCS"
    """Any projection and distortion that astropy supports."""
    scale: float
    """nJy per unit of the pixels (`flux_scale`)."""
    psf: PsfModel | None = None
    """Its PSF, if that is known."""


def warp_patches(
    tract: Tract,
    patch_ccds: Mapping[str, Sequence[int]],
    load_calexp: Callable[[int], CcdImage],
    settings: WarpSettings,
    threads: int = 1,
) -> Iterator[tuple[str, Warp | None]]:
    """Warp an exposure patch by patch.

    Each CCD is loaded when the first patch needs it and dropped after the last. Where CCDs of an
    exposure overlap, the pixel is that of the lower CCD number. See `coaddflow.warp.resample` for
    fluxes, variances and flags.

    Parameters
    ----------
    tract, settings : Tract, WarpSettings
        What to warp to, and how.
    patch_ccds : mapping of str to sequence of int
        For each patch, the CCDs that overlap it.
    load_calexp : callable
        Returns the `CcdImage` of a CCD; called once for each.
    threads : int
        Number of threads that share the rows; the result does not depend on it.

    Yields
    ------
    patch : str
        Patch id, in the order of `order_patches`.
    warp : Warp or None
        Its pixels, trimmed to the box with data; None if the exposure has none there.

    Raises
    ------
    InputError
        If the WCS of a CCD cannot be inverted on it.
    """
    order = order_patches(patch_ccds)
    last_use = {ccd: patch for patch in order for ccd in patch_ccds[patch]}
    prepared: dict[int, _PreparedCcd] = {}
    for patch in order:
        numbers = sorted(set(patch_ccds[patch]))
        for ccd in numbers:
            if ccd not in prepared:
                prepared[ccd] = _prepare(ccd, load_calexp(ccd), tract, settings)
        outer = tract.patch(patch).outer_box
        warp = _resample_ccds({ccd: prepared[ccd] for ccd in numbers}, outer, settings, threads)
        prepared = {ccd: one for ccd, one in prepared.items() if last_use[ccd] != patch}
        yield patch, warp


def order_patches(patch_ccds: Mapping[str, Sequence[int]]) -> list[str]:
    """Order patches so that few CCDs need to be in memory at a time.

    The next patch is the one that needs the fewest CCDs that are not in memory, and among these
    the one that uses the most that are; remaining ties are broken by name.
    """
    remaining = {patch: set(ccds) for patch, ccds in patch_ccds.items()}
    order: list[str] = []
    alive: set[int] = set()

    def cost(patch: str) -> tuple:
        ccds = remaining[patch]
        return len(ccds - alive), -len(ccds & alive), patch_position(patch)

    while remaining:
        patch = min(remaining, key=cost)
        alive |= remaining.pop(patch)
        alive &= set().union(*remaining.values())
        order.append(patch)
    return order


def warp_whole_ccd(
    number: int, ccd: CcdImage, tract: Tract, outer: Box, settings: WarpSettings
) -> Warp:
    """Warp one CCD to all pixels of a tract that it covers.

    Parameters
    ----------
    number : int
        Its number.
    ccd : CcdImage
        Its pixels.
    tract : Tract
        The tract.
    outer : tuple of int
        Box of the tract beyond which pixels are not needed.
    settings : WarpSettings
        Kernel and treatment of flags.

    Returns
    -------
    Warp
        The same pixels as `warp_patches` gives where no other CCD comes first; maybe none.
    """
    one = _prepare(number, ccd, tract, settings)
    warp = _resample_ccds({number: one}, outer, settings, 1)
    if warp is not None:
        return warp
    psfs = () if one.psf is None else (one.psf,)
    return Warp((0, 0, 0, 0), MaskedImage.empty((0, 0)), ccd_psfs=psfs)


@dataclass(frozen=True)
class _PreparedCcd:
    """A CCD in memory, for the patches that need it."""

    source: Source
    kernel: Kernel
    grid: PixelGrid
    box: Box
    scale: float
    psf: CcdPsf | None


def _prepare(number: int, ccd: CcdImage, tract: Tract, settings: WarpSettings) -> _PreparedCcd:
    shape = ccd.masked_image.shape
    try:
        grid = map_ccd(ccd.wcs, shape, tract, settings.grid_step, settings.grid_tolerance)
        # of the CCD and not of a patch, so that patches agree
        stretch = stretch_of(float(np.nanmedian(grid.area)))
        box = footprint_box(ccd.wcs, shape, tract)
        kernel = make_kernel(settings.kernel, stretch)
        psf = None
        if ccd.psf is not None:
            by = settings.kernel, stretch
            psf = describe_psf(number, ccd.psf, ccd.wcs, shape, box, grid, by)
        pixels, grid = turn(ccd.masked_image, grid)
        source = prepare_source(pixels, kernel)
        return _PreparedCcd(source, kernel, grid, box, ccd.scale, psf)
    except InputError as error:
        raise InputError(f"CCD {number}: {error.cause}", remedy=error.remedy) from error


def _resample_ccds(
    ccds: Mapping[int, _PreparedCcd],
    outer: Box,
    settings: WarpSettings,
    threads: int,
) -> Warp | None:
    """Return the warp of CCDs in a box, where the first ones win; None if it has no data."""
    parts = [part for ccd in ccds.values() if (part := common_box(ccd.box, outer)) is not None]
    if not parts:
        return None
    box = enclosing_box(parts)
    shape = (box[3] - box[1], box[2] - box[0])
    target = MaskedImage(*(np.empty(shape, kind) for kind in (np.float32, np.float32, np.int32)))

    def work(first: int) -> list[int]:
        # all CCDs on some rows, which stay in the cache
        rows = (first, min(first + _ROWS_PER_TASK, shape[0]))
        target.forget(slice(*rows))
        return [_resample_into(target, box, rows, ccd, settings) for ccd in ccds.values()]

    tasks = range(0, shape[0], _ROWS_PER_TASK)
    if threads == 1:
        counts = list(map(work, tasks))
    else:
        with ThreadPoolExecutor(threads) as pool:
            counts = list(pool.map(work, tasks))
    sums = dict(zip(ccds, map(sum, zip(*counts, strict=True)), strict=True))
    return trim(target, box, sums, [one.psf for one in ccds.values() if one.psf is not None])


def _resample_into(
    target: MaskedImage,
    box: Box,
    rows: tuple[int, int],
    ccd: _PreparedCcd,
    settings: WarpSettings,
) -> int:
    """Fill the pixels of ``target`` that have no data from a CCD; return how many were filled."""
    rules = Rules(ccd.scale, settings.mask_threshold, settings.max_missing)
    rows = max(ccd.box[1] - box[1], rows[0]), min(ccd.box[3] - box[1], rows[1])
    return resample(ccd.source, ccd.grid, ccd.kernel, target, box[:2], rows, rules)


def trim(
    target: MaskedImage, box: Box, counts: Mapping[int, int], psfs: Sequence[CcdPsf] = ()
) -> Warp | None:
    """Return the warp in a box, trimmed to the pixels with data; None if there are none.

    ``counts``: pixels from each CCD; ``psfs``: the PSFs of these CCDs, of which some may have none.
    """
    if not any(counts.values()):
        return None
    (y0, y1), (x0, x1) = (_data_span(target.mask, axis) for axis in (0, 1))
    part = slice(y0, y1), slice(x0, x1)
    return Warp(
        (box[0] + x0, box[1] + y0, box[0] + x1, box[1] + y1),
        MaskedImage(target.image[part], target.variance[part], target.mask[part]),
        tuple(ccd for ccd, n in counts.items() if n > 0),
        sum(counts.values()),
        tuple(psfs),
    )


def _data_span(mask: NDArray[np.int32], axis: int) -> tuple[int, int]:
    """Return the first and last-plus-one row (or column) with data, searched from both ends."""
    lines = np.moveaxis(mask, axis, 0)

    def has_data(index: int) -> bool:
        return bool(np.any((lines[index] & MaskPlane.NO_DATA) == 0))

    first = next(index for index in range(len(lines)) if has_data(index))
    last = next(index for index in reversed(range(len(lines))) if has_data(index))
    return first, last + 1
