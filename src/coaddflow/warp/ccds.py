"""Warps: the pixels of an exposure on the pixels of a tract.

One warp per exposure and patch holds all CCDs of the exposure there, in nJy, with variance and
mask, trimmed to the box that has data. A job goes through the patches of a tract in an order in
which each calexp is read once and only few are in memory at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.box import Box, common_box, enclosing_box
from coaddflow.image.masked_image import (
    MaskedImage,
    MaskPlane,
)
from coaddflow.settings.warp import WarpSettings
from coaddflow.skymap.tract import patch_position
from coaddflow.warp.files import Warp
from coaddflow.warp.mapping import PixelGrid, SkyGrid, footprint_box, map_ccd
from coaddflow.warp.resample import Kernel, Rules, Source, make_kernel, prepare_source, resample

if TYPE_CHECKING:
    from astropy.wcs import WCS

    from coaddflow.skymap.tract import Tract


_ROWS_PER_TASK = 128


@dataclass(frozen=True)
class CcdImage:
    """A calibrated CCD, as `warp_exposure` wants it.

    Attributes
    ----------
    masked_image : MaskedImage
        Pixels, sky subtracted.
    wcs : astropy.wcs.WCS
        Any projection and distortion that astropy knows.
    scale : float
        nJy per unit of the pixels (`flux_scale`).
    """

    masked_image: MaskedImage
    wcs: "WCS"
    scale: float


@dataclass(frozen=True)
class _ReadyCcd:
    """A CCD that waits for the patches that need it."""

    source: Source
    grid: PixelGrid
    box: Box
    scale: float


def _make_ready(ccd: CcdImage, tract: SkyGrid, kernel: Kernel, settings: WarpSettings) -> _ReadyCcd:
    shape = ccd.masked_image.shape
    return _ReadyCcd(
        prepare_source(ccd.masked_image, kernel),
        map_ccd(ccd.wcs, shape, tract, settings.grid_step, settings.grid_tolerance),
        footprint_box(ccd.wcs, shape, tract),
        ccd.scale,
    )


def warp_ccd(
    masked_image: MaskedImage,
    ccd_wcs: "WCS",
    tract: SkyGrid,
    box: Box,
    settings: WarpSettings,
    scale: float = 1.0,
    threads: int = 1,
) -> MaskedImage:
    """Resample one CCD onto a box of tract pixels.

    Parameters
    ----------
    masked_image : MaskedImage
        Pixels of the CCD, shape (ny, nx).
    ccd_wcs : astropy.wcs.WCS
        Its WCS, any projection and distortion.
    tract : Tract
        Anything with ``sky_to_pixel(ra, dec)``.
    box : tuple of int
        Output box (x0, y0, x1, y1) in tract pixels.
    settings : WarpSettings
        Kernel and treatment of flags.
    scale : float
        nJy per unit of the input.
    threads : int
        Rows are shared among so many threads; the result does not depend on it.

    Returns
    -------
    MaskedImage
        Shape (y1 - y0, x1 - x0); see `coaddflow.warp.resample.resample` for fluxes, variances and
        flags. NaN, infinite variance and NO_DATA outside of the CCD.

    Raises
    ------
    InputError
        If the WCS cannot be inverted on the CCD.
    """
    kernel = make_kernel(settings.kernel)
    ready = _make_ready(CcdImage(masked_image, ccd_wcs, scale), tract, kernel, settings)
    target = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
    _resample_into(target, box, ready, kernel, settings, threads)
    return target


def _resample_into(
    target: MaskedImage,
    box: Box,
    ccd: _ReadyCcd,
    kernel: Kernel,
    settings: WarpSettings,
    threads: int,
) -> int:
    """Fill the pixels of ``target`` that have no data from a CCD; return how many were filled."""
    rules = Rules(ccd.scale, settings.mask_threshold, settings.max_missing)
    first, last = max(ccd.box[1], box[1]) - box[1], min(ccd.box[3], box[3]) - box[1]

    def work(row: int) -> int:
        rows = (row, min(row + _ROWS_PER_TASK, last))
        return resample(ccd.source, ccd.grid, kernel, target, box[:2], rows, rules)

    tasks = range(first, last, _ROWS_PER_TASK)
    if threads == 1:
        return sum(map(work, tasks))
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, tasks))


def order_patches(patch_ccds: Mapping[str, Sequence[int]]) -> list[str]:
    """Order patches so that few CCDs need to be in memory at a time.

    The next patch is the one that needs the fewest CCDs that are not there yet, and among these
    the one that uses the most that are; remaining ties are broken by name.
    """
    remaining = {patch: set(ccds) for patch, ccds in patch_ccds.items()}
    order: list[str] = []
    alive: set[int] = set()
    while remaining:
        patch = min(
            remaining,
            key=lambda p: (
                len(remaining[p] - alive),
                -len(remaining[p] & alive),
                patch_position(p),
            ),
        )
        alive |= remaining.pop(patch)
        alive &= set().union(*remaining.values())
        order.append(patch)
    return order


def warp_patches(
    tract: "Tract",
    patch_ccds: Mapping[str, Sequence[int]],
    load_calexp: Callable[[int], CcdImage],
    settings: WarpSettings,
    threads: int = 1,
) -> Iterator[tuple[str, Warp | None]]:
    """Warp an exposure patch by patch.

    Each CCD is loaded when the first patch needs it and dropped after the last. Where CCDs of an
    exposure overlap, the pixel is that of the lower CCD number.

    Parameters
    ----------
    tract : Tract
        The tract.
    patch_ccds : mapping of str to sequence of int
        For each patch, the CCDs that overlap it.
    load_calexp : callable
        Gives the `CcdImage` of a CCD; called once for each.
    settings : WarpSettings
        Kernel and treatment of flags.
    threads : int
        Threads for the resampling.

    Yields
    ------
    patch : str
        Patch id, in the order of `order_patches`.
    warp : Warp or None
        Its pixels, trimmed to the box with data; None if the exposure has none there.
    """
    kernel = make_kernel(settings.kernel)
    order = order_patches(patch_ccds)
    last_use = {ccd: patch for patch in order for ccd in patch_ccds[patch]}
    ready: dict[int, _ReadyCcd] = {}
    for patch in order:
        ccds = sorted(set(patch_ccds[patch]))
        for ccd in ccds:
            if ccd not in ready:
                try:
                    ready[ccd] = _make_ready(load_calexp(ccd), tract, kernel, settings)
                except InputError as error:
                    raise _of_ccd(ccd, error) from error
        boxes = {ccd: ready[ccd].box for ccd in ccds}
        box = _reached_box(tract.patch(patch).outer_box, boxes.values())
        warp = None
        if box is not None:
            target = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
            counts = {
                ccd: _resample_into(target, box, ready[ccd], kernel, settings, threads)
                for ccd in ccds
            }
            warp = trim(target, box, counts)
        for ccd in ccds:
            if last_use[ccd] == patch:
                del ready[ccd]
        yield patch, warp


def warp_whole_ccd(
    number: int, ccd: CcdImage, tract: SkyGrid, outer: Box, settings: WarpSettings
) -> Warp | None:
    """Warp one CCD to all pixels of a tract that it reaches.

    Parameters
    ----------
    number : int
        Its number.
    ccd : CcdImage
        Its pixels.
    tract : Tract
        The tract.
    outer : tuple of int
        Pixels beyond this box of the tract are of no interest.
    settings : WarpSettings
        Kernel and treatment of flags.

    Returns
    -------
    Warp or None
        The same pixels as `warp_patches` gives where no other CCD was before; None if there are
        none.
    """
    kernel = make_kernel(settings.kernel)
    try:
        ready = _make_ready(ccd, tract, kernel, settings)
    except InputError as error:
        raise _of_ccd(number, error) from error
    box = common_box(ready.box, outer)
    if box is None:
        return None
    target = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
    return trim(target, box, {number: _resample_into(target, box, ready, kernel, settings, 1)})


def _of_ccd(ccd: int, error: InputError) -> InputError:
    """Name the CCD in an error that names no file."""
    if error.path is not None:
        return error
    return InputError(f"CCD {ccd}: {error.cause}", remedy=error.remedy)


def _reached_box(outer: Box, boxes: Iterable[Box]) -> Box | None:
    """Return the part of a patch that boxes of CCDs reach, or None."""
    parts = [part for box in boxes if (part := common_box(box, outer)) is not None]
    return enclosing_box(parts) if parts else None


def trim(target: MaskedImage, box: Box, counts: Mapping[int, int]) -> Warp | None:
    """Return the warp in a box, cut to the pixels with data; None if no CCD gave any.

    ``counts``: pixels that each CCD has given.
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
    )


def _data_span(mask: NDArray[np.int32], axis: int) -> tuple[int, int]:
    """Return the first and last-plus-one row (or column) with data, looking from both ends."""
    lines = np.moveaxis(mask, axis, 0)

    def has_data(index: int) -> bool:
        return bool(np.any((lines[index] & MaskPlane.NO_DATA) == 0))

    first = next(index for index in range(len(lines)) if has_data(index))
    last = next(index for index in reversed(range(len(lines))) if has_data(index))
    return first, last + 1


# Files
