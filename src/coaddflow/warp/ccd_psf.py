"""The PSF of a CCD on the pixels of a tract: what the resampling makes of a star.

A star is drawn with the PSF model of its CCD and resampled with the kernel, the mapping and the
code of the warps, so that its image is that of a star in the warp, to rounding. The PSF of a coadd
is made of such images (`coaddflow.coadd.psf`); what draws them travels with the warps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray

from coaddflow.errors import InputError
from coaddflow.geometry.box import Box
from coaddflow.geometry.polynomial import term_powers
from coaddflow.geometry.wcs import sky_to_pixel
from coaddflow.geometry.wcs_header import read_wcs, wcs_to_header
from coaddflow.image.masked_image import MaskedImage
from coaddflow.measure.psf_model import PsfModel
from coaddflow.skymap.tract import Tract
from coaddflow.warp.kernels import Kernel, KernelName, make_kernel
from coaddflow.warp.mapping import PixelGrid, map_ccd
from coaddflow.warp.resample import Rules, prepare_source, resample

if TYPE_CHECKING:
    from astropy.wcs import WCS

TABLE = "CCD_PSFS"
"""Name of the extension that holds the PSFs of CCDs."""

_RULES = Rules(scale=1.0, mask_threshold=0.5, max_missing=0.0)
"""Stars are whole and have no flags."""

_BEYOND = 1.0
"""Pixels beyond the edge of a CCD, times the stretch of the kernel, where a star may be whose tract
pixel is still on the CCD."""

_CARD = 80
"""Characters of a card of a header."""


@dataclass(frozen=True)
class CcdPsf:
    """The PSF of a CCD, and how its pixels come to those of a tract."""

    ccd: int
    """Number of the CCD."""
    shape: tuple[int, int]
    """Its rows and columns."""
    box: Box
    """Box of tract pixels around it."""
    wcs: str
    """Its WCS: cards of a FITS header, of 80 characters each."""
    kernel: KernelName
    """Kernel of the warp."""
    stretch: float
    """CCD pixels per unit of the kernel (`warp.kernels.stretch_of`)."""
    grid_step: int
    """Distance of the nodes of the mapping, tract pixels (`warp.mapping.PixelGrid`)."""
    half: int
    """Half width of images of stars on the tract, pixels."""
    model: PsfModel
    """The PSF on the pixels of the CCD."""


def describe_psf(
    ccd: int,
    model: PsfModel,
    wcs: "WCS",
    shape: tuple[int, int],
    box: Box,
    grid: PixelGrid,
    kernel: tuple[KernelName, float],
) -> CcdPsf:
    """Return what draws stars of a CCD on a tract.

    Parameters
    ----------
    ccd : int
        Number of the CCD.
    model : PsfModel
        Its PSF.
    wcs, shape : astropy.wcs.WCS, tuple of int
        Its WCS, and its shape (ny, nx).
    box : tuple of int
        Box of tract pixels around it (`warp.mapping.footprint_box`).
    grid : PixelGrid
        Its pixels on the tract (`warp.mapping.map_ccd`).
    kernel : tuple of str and float
        Name and stretch of the kernel of the warp.

    Raises
    ------
    InputError
        If the WCS cannot be written to a header.
    """
    try:
        # tables do not keep the blanks at the end
        cards = wcs_to_header(wcs).tostring(endcard=False, padding=False).rstrip()
    except ValueError as error:
        raise InputError(
            f"the WCS cannot be written ({error})",
            remedy="look at the astrometric solution of this CCD, or leave the CCD out",
        ) from error
    half = _half_width(model, grid, make_kernel(*kernel))
    return CcdPsf(ccd, shape, box, cards, *kernel, grid.step, half, model)


def _half_width(model: PsfModel, grid: PixelGrid, kernel: Kernel) -> int:
    """Return the half width of an image on the tract that has all of the PSF and of the kernel."""
    reach = model.half + len(kernel.taps) // 2
    slopes = [
        [np.nanmedian(np.diff(plane, axis=axis)) / grid.step for axis in (1, 0)]
        for plane in (grid.x, grid.y)
    ]
    # the corners of an image that lies askew reach farthest
    return int(np.ceil(reach * np.abs(np.linalg.inv(slopes)).sum(axis=1).max()))


class StarsOnTract:
    """Draws stars of a CCD as they are in its warp to a tract.

    Parameters
    ----------
    psf : CcdPsf
        The PSF of the CCD.
    tract : Tract
        The tract.
    """

    def __init__(self, psf: CcdPsf, tract: Tract):
        self.psf, self._tract = psf, tract

    @cached_property
    def _wcs(self) -> "WCS":
        cards = self.psf.wcs.ljust(_CARD * -(-len(self.psf.wcs) // _CARD))
        wcs = read_wcs(fits.Header.fromstring(cards))
        wcs.array_shape = self.psf.shape
        return wcs

    @cached_property
    def _grid(self) -> PixelGrid:
        # of the step that was fine enough for the warp
        return map_ccd(self._wcs, self.psf.shape, self._tract, self.psf.grid_step, np.inf)

    def contains(self, ra: ArrayLike, dec: ArrayLike, at_edge: bool = False) -> NDArray[np.bool_]:
        """Return which positions, ICRS degrees, are on the CCD; or at its edge, just beyond it."""
        return self._is_near(*sky_to_pixel(self._wcs, ra, dec), at_edge)

    def _is_near(self, x: NDArray, y: NDArray, at_edge: bool) -> NDArray[np.bool_]:
        """Return which pixels are on the CCD, or at its edge; NaN is not."""
        ny, nx = self.psf.shape
        beyond = _BEYOND * self.psf.stretch if at_edge else 0.0
        low, high = -0.5 - beyond, -0.5 + beyond
        return (x >= low) & (x <= nx + high) & (y >= low) & (y <= ny + high)

    def images_at(
        self, ra: ArrayLike, dec: ArrayLike, half: int | None = None
    ) -> NDArray[np.float32]:
        """Return images of stars of flux 1.

        Parameters
        ----------
        ra, dec : array_like, shape (n,)
            ICRS degrees.
        half : int, optional
            Half width of the images; by default ``psf.half``.

        Returns
        -------
        ndarray of float32, shape (n, 2 half + 1, 2 half + 1)
            The central pixel is the one in which the star is, and the star is off its centre as it
            is on the tract. NaN for stars that are neither on the CCD nor at its edge.
        """
        half = self.psf.half if half is None else half
        x, y = sky_to_pixel(self._wcs, np.atleast_1d(ra), np.atleast_1d(dec))
        columns, rows = (np.rint(p) for p in self._tract.sky_to_pixel(ra, dec))
        images = np.full((x.size, 2 * half + 1, 2 * half + 1), np.nan, np.float32)
        found = np.flatnonzero(self._is_near(x, y, at_edge=True))
        kernel = make_kernel(self.psf.kernel, self.psf.stretch)
        pad = len(kernel.taps)  # a window that has a pixel of the star is whole
        reach = self.psf.model.half + pad
        stars = self.psf.model.images_at(x[found], y[found])
        stars = np.pad(stars, ((0, 0), (pad, pad), (pad, pad)))
        middles = np.stack(np.broadcast_arrays(columns, rows), axis=-1).reshape(-1, 2).astype(int)
        for number, star in zip(found, stars, strict=True):
            corner = np.rint(x[number]) - reach, np.rint(y[number]) - reach
            images[number] = _warp_star(star, corner, self._grid, kernel, middles[number], half)
        return images


def _warp_star(
    star: NDArray[np.float32],
    corner: tuple[float, float],
    grid: PixelGrid,
    kernel: Kernel,
    middle: Sequence[int],
    half: int,
) -> NDArray[np.float32]:
    """Return the tract pixels around ``middle`` of the image of a star on a CCD.

    ``corner``: CCD pixel (x, y) of the first pixel of the image.
    """
    near = _nodes_around(grid, middle, half)
    near = near._replace(x=near.x - corner[0], y=near.y - corner[1])
    side = 2 * half + 1
    target = MaskedImage.empty((side, side))
    pixels = MaskedImage(star, np.ones(star.shape, np.float32), np.zeros(star.shape, np.int32))
    origin = (middle[0] - half, middle[1] - half)
    resample(prepare_source(pixels, kernel), near, kernel, target, origin, (0, side), _RULES)
    return np.nan_to_num(target.image, nan=0.0)


def _nodes_around(grid: PixelGrid, middle: Sequence[int], half: int) -> PixelGrid:
    """Return the nodes of a mapping that count for the tract pixels around one."""
    parts = []
    for pixel, first, n_nodes in zip(
        middle, (grid.x0, grid.y0), reversed(grid.x.shape), strict=True
    ):
        begin = (pixel - half - first) // grid.step - 1
        end = (pixel + half - first) // grid.step + 3
        parts.append(slice(max(begin, 0), min(max(end, 0), n_nodes)))
    columns, rows = parts
    planes = (plane[rows, columns] for plane in (grid.x, grid.y, grid.area))
    corner = grid.x0 + columns.start * grid.step, grid.y0 + rows.start * grid.step
    return PixelGrid(*corner, grid.step, *planes)


# In files ---------------------------------------------------------------------------------------


def psfs_hdu(psfs: Sequence[CcdPsf], exposures: Sequence[str] | None = None) -> fits.BinTableHDU:
    """Return the PSFs of CCDs as a table, extension ``CCD_PSFS``; docs/products.md explains it.

    Parameters
    ----------
    psfs : sequence of CcdPsf
        The PSFs.
    exposures : sequence of str, optional
        The exposure of each, for the column EXPOSURE.
    """
    models = [one.model for one in psfs]
    # columns of variable length are not read by all programs, and stop source-extractor
    samples = np.zeros((len(psfs), max((m.basis.size for m in models), default=1)), np.float32)
    for row, model in zip(samples, models, strict=True):
        row[: model.basis.size] = model.basis.ravel()
    longest = max((len(one.wcs) for one in psfs), default=1)
    columns = []
    if exposures is not None:
        length = max(map(len, exposures), default=1)
        columns.append(fits.Column("EXPOSURE", f"{length}A", array=list(exposures)))
    columns += [
        *_columns("J", CCD=[one.ccd for one in psfs]),
        *_columns("J", NX=[one.shape[1] for one in psfs], NY=[one.shape[0] for one in psfs]),
        *_columns("J", X0=[one.box[0] for one in psfs], Y0=[one.box[1] for one in psfs]),
        *_columns("J", X1=[one.box[2] for one in psfs], Y1=[one.box[3] for one in psfs]),
        fits.Column("WCS", f"{longest}A", array=[one.wcs for one in psfs]),
        fits.Column("KERNEL", "8A", array=[one.kernel for one in psfs]),
        *_columns("D", STRETCH=[one.stretch for one in psfs]),
        *_columns("J", GRIDSTEP=[one.grid_step for one in psfs], HALF=[one.half for one in psfs]),
        *_columns("J", PSFORDER=[m.order for m in models], PSFHALF=[m.half for m in models]),
        *_columns("J", PSFSIDE=[model.basis.shape[-1] for model in models]),
        *_columns("D", PSFSTEP=[model.step for model in models]),
        *_columns("D", PSFX0=[m.center[0] for m in models], PSFY0=[m.center[1] for m in models]),
        *_columns("D", PSFXS=[m.scale[0] for m in models], PSFYS=[m.scale[1] for m in models]),
        fits.Column("SAMPLES", f"{samples.shape[1]}E", array=samples),
    ]
    return fits.BinTableHDU.from_columns(columns, name=TABLE)


def _columns(kind: str, **values: list) -> list[fits.Column]:
    return [fits.Column(name, kind, array=array) for name, array in values.items()]


def psfs_from_hdu(hdu: fits.BinTableHDU) -> list[CcdPsf]:
    """Return the PSFs of an extension made by `psfs_hdu`; raise InputError if it is none."""
    try:
        return [_psf_of(row) for row in hdu.data]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the extension {TABLE} is not one of coaddflow ({error})") from error


def _psf_of(row: fits.FITS_record) -> CcdPsf:
    """Return the PSF in a row of the table."""
    order, side = int(row["PSFORDER"]), int(row["PSFSIDE"])
    shape = (len(term_powers(order)), side, side)
    model = PsfModel(
        basis=np.asarray(row["SAMPLES"][: math.prod(shape)], np.float64).reshape(shape),
        order=order,
        step=float(row["PSFSTEP"]),
        half=int(row["PSFHALF"]),
        center=(float(row["PSFX0"]), float(row["PSFY0"])),
        scale=(float(row["PSFXS"]), float(row["PSFYS"])),
    )
    return CcdPsf(
        ccd=int(row["CCD"]),
        shape=(int(row["NY"]), int(row["NX"])),
        box=tuple(int(row[name]) for name in ("X0", "Y0", "X1", "Y1")),
        wcs=str(row["WCS"]),
        kernel=str(row["KERNEL"]),
        stretch=float(row["STRETCH"]),
        grid_step=int(row["GRIDSTEP"]),
        half=int(row["HALF"]),
        model=model,
    )
