"""Warps made of other warps, as a coadd reads them (`coaddflow.warp.files.WarpReader`)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coaddflow.coadd.background_matching import SkyCorrection
from coaddflow.compiled import njit
from coaddflow.geometry import polygon
from coaddflow.geometry.box import Box, common_box, enclosing_box
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.skymap.tract import Tract
from coaddflow.tables.manifest import CcdRow
from coaddflow.warp.files import WarpReader

_FOOTPRINT_GROWTH = 1.5
"""Pixels by which the outline of a CCD is enlarged when the CCD is taken out of a warp."""

_NO_DATA = np.int32(MaskPlane.NO_DATA)


class LayeredWarp:
    """The warp of an exposure on a patch: its CCDs, one laid under the other.

    Where CCDs, given by CCD number, overlap, the pixel is that of the first that has one, as in
    `coaddflow.warp.ccds.warp_patches`. There are none if the exposure has no pixel in ``outer``,
    the patch's outer box.
    """

    def __init__(self, ccds: Sequence[WarpReader], outer: Box):
        self._ccds = list(ccds)
        reached = [part for one in ccds if (part := common_box(one.box, outer)) is not None]
        self.box: Box = enclosing_box(reached) if reached else (0, 0, 0, 0)

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, inside of ``self.box``."""
        return self.lay(box)[0]

    def lay(self, box: Box) -> tuple[MaskedImage, list[int]]:
        """Return the pixels of a box of the tract, and how many of them each CCD has given."""
        target = MaskedImage.empty((box[3] - box[1], box[2] - box[0]))
        counts = [0] * len(self._ccds)
        for number, ccd in enumerate(self._ccds):
            part = common_box(ccd.box, box)
            if part is not None:
                corner = (part[1] - box[1], part[0] - box[0])
                counts[number] = _lay_under(_planes(target), _planes(ccd.read_box(part)), corner)
        return target, counts


def _planes(pixels: MaskedImage) -> tuple[NDArray, NDArray, NDArray]:
    return pixels.image, pixels.variance, pixels.mask


@njit(nogil=True)
def _lay_under(target, pixels, corner):
    """Fill the pixels of ``target`` that have no data; return how many were filled."""
    image, variance, mask = target
    n_filled = 0
    for y in range(pixels[2].shape[0]):
        y_out = y + corner[0]
        for x in range(pixels[2].shape[1]):
            x_out = x + corner[1]
            if (pixels[2][y, x] & _NO_DATA) == 0 and (mask[y_out, x_out] & _NO_DATA) != 0:
                image[y_out, x_out] = pixels[0][y, x]
                variance[y_out, x_out] = pixels[1][y, x]
                mask[y_out, x_out] = pixels[2][y, x]
                n_filled += 1
    return n_filled


class WithoutCcds:
    """The warp of an exposure, in which the pixels of some CCDs count as not measured."""

    def __init__(self, reader: WarpReader, ccds: Sequence[CcdRow], tract: Tract):
        self.box: Box = reader.box
        self._reader = reader
        self._outlines = [
            _grown(tract.footprint_pixels(ccd.footprint_ra, ccd.footprint_dec)) for ccd in ccds
        ]

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, inside of ``self.box``."""
        pixels = self._reader.read_box(box)
        # a reader may hand out its own memory
        pixels = MaskedImage(pixels.image.copy(), pixels.variance.copy(), pixels.mask.copy())
        columns = np.arange(box[0], box[2])
        for row, y in enumerate(range(box[1], box[3])):
            for outline in self._outlines:
                inside = polygon.contains(outline, columns, y)
                pixels.image[row, inside] = np.nan
                pixels.variance[row, inside] = np.inf
                pixels.mask[row, inside] |= _NO_DATA
        return pixels


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

    def read_box(self, box: Box) -> MaskedImage:
        """Return the pixels of a box of the tract, inside of ``self.box``."""
        pixels = self._reader.read_box(box)
        image = pixels.image - self._correction.on_box(box)
        return MaskedImage(image, pixels.variance, pixels.mask)
