"""Warps made of other warps, as a coadd reads them (`coaddflow.warp.files.WarpReader`)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from coaddflow.coadd.background_matching import SkyCorrection
from coaddflow.compiled import njit
from coaddflow.geometry import polygon
from coaddflow.geometry.box import Box, common_box, enclosing_box, part_of
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.skymap.tract import Tract
from coaddflow.tables.manifest import CcdRow
from coaddflow.warp.ccd_psf import CcdPsf
from coaddflow.warp.files import WarpReader

_FOOTPRINT_GROWTH = 1.5
"""Pixels by which the outline of a CCD is enlarged when the CCD is taken out of a warp."""

_ROWS_AT_A_TIME = 64
"""Rows that stay in the cache while CCDs are laid into them."""

_NO_DATA = np.int32(MaskPlane.NO_DATA)


class CcdPixels(Protocol):
    """The warp of a CCD: `coaddflow.coadd.spool.SpooledWarp`, or a `Warp` in memory."""

    box: Box

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, which must be inside ``self.box``."""

    def read_psfs(self) -> Sequence[CcdPsf]:
        """Return its PSF, if it has one."""


class LayeredWarp:
    """The warp of an exposure on a patch: its CCDs, one laid under the other.

    Where CCDs, given by CCD number, overlap, the pixel is that of the first that has one, as in
    `coaddflow.warp.ccds.warp_patches`. There are none if the exposure has no pixel in ``outer``,
    the patch's outer box.
    """

    def __init__(self, ccds: Sequence[CcdPixels], outer: Box):
        self._ccds = list(ccds)
        self._psfs: list[CcdPsf] | None = None
        reached = [part for one in ccds if (part := common_box(one.box, outer)) is not None]
        self.box: Box = enclosing_box(reached) if reached else (0, 0, 0, 0)

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """See `coaddflow.warp.files.WarpReader`."""
        self.lay(box, target, corner)

    def read_psfs(self) -> list[CcdPsf]:
        """See `coaddflow.warp.files.WarpReader`."""
        if self._psfs is None:
            self._psfs = [psf for one in self._ccds for psf in one.read_psfs()]
        return self._psfs

    def lay(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> list[int]:
        """Do as `read_into`; return how many pixels each CCD has given."""
        counts = [0] * len(self._ccds)
        layers = []
        for number, ccd in enumerate(self._ccds):
            if (part := common_box(ccd.box, box)) is not None:
                # whole rows, which are contiguous; those of the spool are not yet read
                rows = (ccd.box[0], part[1], ccd.box[2], part[3])
                layers.append((number, part, rows, _planes(ccd.read_box(rows))))
        for y0 in range(box[1], box[3], _ROWS_AT_A_TIME):
            strip = (box[0], y0, box[2], min(y0 + _ROWS_AT_A_TIME, box[3]))
            first = (corner[0] + y0 - box[1], corner[1])
            pixels = target.part(_place(strip, first))
            is_first = True
            for number, part, rows, planes in layers:
                common = common_box(part, strip)
                if common is None:
                    continue
                inside, there = part_of(strip, common), part_of(rows, common)
                place = (first[0] + inside[0].start, first[1] + inside[1].start)
                if is_first:
                    _forget_around(pixels, inside)
                counts[number] += _lay(planes, there, target, place, is_first)
                is_first = False
            if is_first:
                pixels.forget(slice(None))
        return counts


_Planes = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int32]]


def _planes(pixels: MaskedImage) -> _Planes:
    """Return image, variance and mask, for compiled functions."""
    planes = (pixels.image, pixels.variance, pixels.mask)
    return tuple(np.ascontiguousarray(plane) for plane in planes)


def _forget_around(pixels: MaskedImage, inside: tuple[slice, slice]) -> None:
    """Make what is outside of some rows and columns as if nothing was measured."""
    rows, columns = inside
    for outside in (slice(0, rows.start), slice(rows.stop, None)):
        pixels.forget(outside)
    for outside in (slice(0, columns.start), slice(columns.stop, None)):
        pixels.part((rows, outside)).forget(slice(None))


def _lay(
    planes: _Planes,
    there: tuple[slice, slice],
    target: MaskedImage,
    place: tuple[int, int],
    is_first: bool,
) -> int:
    """Lay some rows and columns of a CCD under those of a target; return how many pixels were laid.

    The first CCD replaces what is there.
    """
    function = _lay_first if is_first else _lay_under
    return function(
        (target.image, target.variance, target.mask),
        planes,
        place,
        (there[0].start, there[1].start),
        (there[0].stop - there[0].start, there[1].stop - there[1].start),
    )


def _place(box: Box, corner: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns of a box of which the first pixel is at a corner."""
    (y, x), (x0, y0, x1, y1) = corner, box
    return slice(y, y + y1 - y0), slice(x, x + x1 - x0)


@njit(nogil=True)
def _lay_first(target, pixels, corner, first, shape):
    """Fill a part of ``target``; return how many pixels have data."""
    columns, own = slice(corner[1], corner[1] + shape[1]), slice(first[1], first[1] + shape[1])
    n_filled = 0
    for j in range(shape[0]):
        y, row = corner[0] + j, first[0] + j
        mask = pixels[2][row, own]
        _copy(pixels[0][row, own], mask, np.float32(np.nan), target[0][y, columns])
        _copy(pixels[1][row, own], mask, np.float32(np.inf), target[1][y, columns])
        _copy(mask, mask, _NO_DATA, target[2][y, columns])
        n_filled += _count_data(mask)
    return n_filled


@njit(nogil=True)
def _copy(row, mask, otherwise, target):
    """Copy the pixels that have data; set the others to ``otherwise``."""
    for x in range(row.size):
        target[x] = row[x] if (mask[x] & _NO_DATA) == 0 else otherwise


@njit(nogil=True)
def _count_data(mask):
    n_pixels = np.int32(0)
    for x in range(mask.size):
        n_pixels += np.int32((mask[x] & _NO_DATA) == 0)
    return n_pixels


@njit(nogil=True)
def _lay_under(target, pixels, corner, first, shape):
    """Fill the pixels of ``target`` that have no data; return how many were filled."""
    is_gap = np.empty(shape[1], np.bool_)
    columns, own = slice(corner[1], corner[1] + shape[1]), slice(first[1], first[1] + shape[1])
    n_filled = 0
    for j in range(shape[0]):
        y, row = corner[0] + j, first[0] + j
        n_gaps = _find_gaps(pixels[2][row, own], target[2][y, columns], is_gap)
        if n_gaps > 0:
            _fill_gaps(pixels[0][row, own], is_gap, target[0][y, columns])
            _fill_gaps(pixels[1][row, own], is_gap, target[1][y, columns])
            _fill_gaps(pixels[2][row, own], is_gap, target[2][y, columns])
        n_filled += n_gaps
    return n_filled


@njit(nogil=True)
def _find_gaps(mask, target, is_gap):
    """Find where a row has data and the target has none; return at how many pixels."""
    n_gaps = 0
    for x in range(mask.size):
        gap = ((mask[x] & _NO_DATA) == 0) & ((target[x] & _NO_DATA) != 0)
        is_gap[x] = gap
        n_gaps += 1 if gap else 0
    return n_gaps


@njit(nogil=True)
def _fill_gaps(row, is_gap, target):
    for x in range(row.size):
        target[x] = row[x] if is_gap[x] else target[x]


class WithoutCcds:
    """The warp of an exposure, in which the pixels of some CCDs count as not measured."""

    def __init__(self, reader: WarpReader, ccds: Sequence[CcdRow], tract: Tract):
        self.box: Box = reader.box
        self._reader = reader
        self._outlines = [
            _grown(tract.footprint_pixels(ccd.footprint_ra, ccd.footprint_dec)) for ccd in ccds
        ]

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """See `coaddflow.warp.files.WarpReader`."""
        self._reader.read_into(box, target, corner)
        pixels = target.part(_place(box, corner))
        columns = np.arange(box[0], box[2])
        for row, y in enumerate(range(box[1], box[3])):
            for outline in self._outlines:
                inside = polygon.contains(outline, columns, y)
                pixels.image[row, inside] = np.nan
                pixels.variance[row, inside] = np.inf
                pixels.mask[row, inside] |= _NO_DATA

    def read_psfs(self) -> Sequence[CcdPsf]:
        """Return the PSFs of all CCDs, also of those that do not count."""
        return self._reader.read_psfs()


def _grown(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Move the vertices of an outline away from its middle."""
    offset = points - points.mean(axis=0)
    distance = np.hypot(*offset.T)[:, None]
    return points + offset / distance * _FOOTPRINT_GROWTH * np.sqrt(2.0)


class CorrectedWarp:
    """A warp with its background matched: less the correction of its sky."""

    def __init__(self, reader: WarpReader, correction: SkyCorrection):
        self.box: Box = reader.box
        self._reader = reader
        self._correction = correction

    def read_into(self, box: Box, target: MaskedImage, corner: tuple[int, int]) -> None:
        """See `coaddflow.warp.files.WarpReader`."""
        self._reader.read_into(box, target, corner)
        target.image[_place(box, corner)] -= self._correction.on_box(box)

    def read_psfs(self) -> Sequence[CcdPsf]:
        """See `coaddflow.warp.files.WarpReader`."""
        return self._reader.read_psfs()
