"""The PSF of a coadd: that of its inputs, with its weights and the kernel of its warps.

A coadd is a weighted mean of warps, so that the image of a star in it is the same mean of the
images that the star has in the warps [1]_: those of the exposures that are really used at its
place (`coaddflow.coadd.input_sets`). Each is drawn with the PSF of its CCD and resampled as the
CCD was (`coaddflow.warp.ccd_psf`). The sum of these images is exact for any position, and is what
`coadd_psf` returns; a file also has the PSF on a grid, and a smooth model of it in the format of
PSFEx for programs that know nothing of coaddflow.

References
----------
.. [1] Bosch et al. 2018, PASJ 70, S5, section 3.3 (HSC pipeline: coadd PSFs from those of the
   inputs); Mandelbaum et al. 2023, OJAp 6, 5 (when a coadd has a well-defined PSF).
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray

from coaddflow.coadd.input_sets import InputSets
from coaddflow.errors import InputError
from coaddflow.geometry.box import Box
from coaddflow.geometry.polynomial import design_matrix
from coaddflow.image.masked_image import Compression, image_hdu, opened_fits
from coaddflow.measure.psf_model import PsfModel, psf_hdu
from coaddflow.skymap.tract import Tract
from coaddflow.tables.coadds import coadd_remedy
from coaddflow.warp.ccd_psf import TABLE as CCD_PSFS
from coaddflow.warp.ccd_psf import CcdPsf, StarsOnTract, psfs_from_hdu, psfs_hdu
from coaddflow.warp.files import part_box, part_tract

_INDEX, _SETS, _GRID = "INPUTMAP", "INPUTSETS", "PSF_GRID"
"""Names of extensions."""

_KEPT = 64
"""CCDs whose mappings are kept."""

_GRID_SPACING = 400
_GRID_POINTS = (5, 16)
"""Distance of the points of the grid of PSFs, pixels, and the least and largest number of them
along a side."""

_LARGEST_ORDER = 3
"""Of the polynomial of the smooth model."""

_FWHM_POINTS = 25
"""Points of the grid at which the FWHM is measured at most."""

_POINTS_PER_TERM = 4
"""Points of the grid that a term of the polynomial must have."""


@dataclass(frozen=True)
class PsfInput:
    """What the PSF of a coadd needs of one of its exposures."""

    exposure: str
    """Exposure id."""
    weight: float
    """Its weight in the coadd."""
    ccd_psfs: tuple[CcdPsf, ...]
    """PSFs of its CCDs, by CCD number; none where they are not known."""


class CoaddPsf:
    """The PSF anywhere on a coadd.

    Parameters
    ----------
    tract, box : Tract, tuple of int
        The tract, and the pixels of the coadd on it.
    sets : InputSets
        The inputs that each pixel is made of.
    inputs : sequence of PsfInput
        These inputs.
    """

    def __init__(self, tract: Tract, box: Box, sets: InputSets, inputs: Sequence[PsfInput]):
        self.tract, self.box, self.sets, self.inputs = tract, box, sets, tuple(inputs)
        # their mappings take memory: those of few are kept, for positions one by one
        self._stars = lru_cache(_KEPT)(self._make_stars)
        self.half = max((psf.half for one in inputs for psf in one.ccd_psfs), default=0)
        """Half width of the images, pixels; 0 if no PSF is known."""

    def _make_stars(self, number: int, ccd: int) -> StarsOnTract:
        """Return what draws the stars of a CCD of an input."""
        return StarsOnTract(self.inputs[number].ccd_psfs[ccd], self.tract)

    @cached_property
    def grid(self) -> "PsfGrid | None":
        """The PSF on a grid that covers the coadd; None if there is none anywhere."""
        return _make_grid(self)

    @cached_property
    def model(self) -> PsfModel | None:
        """A smooth model of the PSF, in pixels of the coadd (`smooth_model`)."""
        if self.grid is None:
            return None
        x0, y0, x1, y1 = self.box
        return smooth_model(self.grid, (y1 - y0, x1 - x0))

    def images_at(self, ra: ArrayLike, dec: ArrayLike) -> NDArray[np.float64]:
        """Return images of stars of flux 1, as they are in the coadd.

        Parameters
        ----------
        ra, dec : array_like, shape (n,)
            ICRS degrees.

        Returns
        -------
        ndarray of float64, shape (n, 2 half + 1, 2 half + 1)
            The central pixel is the one in which the star is, and the star is off its centre as it
            is in the coadd. NaN where the coadd has no data, or no exposure there has a PSF.
        """
        ra, dec = np.atleast_1d(np.asarray(ra, float)), np.atleast_1d(np.asarray(dec, float))
        x, y = (np.rint(p) for p in self.tract.sky_to_pixel(ra, dec))
        x0, y0, x1, y1 = self.box
        inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
        column, row = (np.where(inside, p, p0).astype(int) - p0 for p, p0 in ((x, x0), (y, y0)))
        used = self.sets.used(self.sets.index[row, column]) & inside[:, None]
        return self.images_of(ra, dec, used)

    def images_of(
        self, ra: NDArray[np.float64], dec: NDArray[np.float64], used: NDArray[np.bool_]
    ) -> NDArray[np.float64]:
        """Return images as `images_at` does, of given inputs.

        Parameters
        ----------
        ra, dec : ndarray of float64, shape (n,)
            ICRS degrees.
        used : ndarray of bool, shape (n, n_inputs)
            The inputs that are used at each position. Those of which no CCD is there are left out.
        """
        images = np.zeros((ra.size, *[2 * self.half + 1] * 2))
        total = np.zeros(ra.size)
        pixels = tuple(np.rint(p) for p in self.tract.sky_to_pixel(ra, dec))
        middles = self.tract.pixel_to_sky(*pixels)
        for number, one in enumerate(self.inputs):
            wanted = np.flatnonzero(used[:, number])
            for at, drawn in self._drawn(number, (ra, dec), pixels, middles, wanted):
                images[at] += one.weight * drawn
                total[at] += one.weight
        with np.errstate(invalid="ignore"):
            return images / np.where(total > 0, total, np.nan)[:, None, None]

    def _drawn(
        self,
        number: int,
        sky: tuple[NDArray, NDArray],
        pixels: tuple[NDArray, NDArray],
        middles: tuple[NDArray, NDArray],
        wanted: NDArray[np.intp],
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float32]]]:
        """Draw stars of an input at some of the positions, each once; yield which, and images.

        ``pixels`` and ``middles`` are the pixels in which they are, and their middles on the sky. A
        pixel is that of the first CCD that has it. At its very edge, where the star is on the CCD
        and the middle of the pixel is not, it is that of one that is near.
        """
        (ra, dec), (x, y) = sky, pixels
        for at_edge in (False, True):
            for ccd, psf in enumerate(self.inputs[number].ccd_psfs):
                x0, y0, x1, y1 = psf.box
                near = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
                at = wanted[near[wanted]]
                if at.size == 0:
                    continue
                stars = self._stars(number, ccd)
                at = at[stars.contains(middles[0][at], middles[1][at], at_edge)]
                drawn = stars.images_at(ra[at], dec[at], self.half)
                done = np.isfinite(drawn[:, 0, 0])
                yield at[done], drawn[done]
                wanted = np.setdiff1d(wanted, at[done])


def coadd_psf(path: str | Path, ra: float, dec: float) -> NDArray[np.float64]:
    """Return the PSF of a coadd at a position.

    For many positions of a coadd, `read_coadd_psf` reads it once.

    Parameters
    ----------
    path : str or Path
        The coadd.
    ra, dec : float
        ICRS degrees.

    Returns
    -------
    ndarray of float64, shape (n, n), n odd
        The image of a star of flux 1. The central pixel is the one in which the position is, and
        the star is off its centre as a star at the position is.

    Raises
    ------
    InputError
        If the file is no coadd, or has no PSF at the position.
    """
    (image,) = read_coadd_psf(path).images_at(ra, dec)
    if not np.isfinite(image).all():
        raise InputError(
            f"has no PSF at RA {ra}, Dec {dec}",
            path,
            "choose a position on the coadd where NINPUTS is not 0; images that were calibrated "
            "elsewhere and have too few stars have no PSF",
        )
    return image


def read_coadd_psf(path: str | Path) -> CoaddPsf:
    """Return the PSF of a coadd from its file; raise InputError if it is missing or damaged."""
    with opened_fits(path, "coadd", coadd_remedy(path)) as (_, hdus):
        header, inputs, table = hdus["IMAGE"].header, hdus["INPUTS"].data, hdus[CCD_PSFS]
        sets = _sets_from_hdus(hdus[_INDEX], hdus[_SETS], len(inputs))
        psfs: dict[str, list[CcdPsf]] = {}
        for exposure, psf in zip(table.data["EXPOSURE"], psfs_from_hdu(table), strict=True):
            psfs.setdefault(str(exposure), []).append(psf)
        weights = {str(row["exposure"]): float(row["weight"]) for row in inputs[: sets.n_inputs]}
        box = part_box(header, sets.index.shape)
        tract = part_tract(header, box)
    used = [PsfInput(e, weight, tuple(psfs.get(e, ()))) for e, weight in weights.items()]
    return CoaddPsf(tract, box, sets, used)


# A grid, and a smooth model ---------------------------------------------------------------------


@dataclass(frozen=True)
class PsfGrid:
    """The PSF of a coadd at the middles of pixels."""

    x: NDArray[np.int64]
    """Columns of the coadd, 0-based, shape (nx,)."""
    y: NDArray[np.int64]
    """Rows, shape (ny,)."""
    images: NDArray[np.float32]
    """Images of centred stars of flux 1, shape (ny, nx, n, n); NaN where there is no PSF."""

    def areas(self) -> NDArray[np.float64]:
        """Return the noise-equivalent areas, pixels, shape (ny, nx); NaN where there is no PSF."""
        images = self.images.astype(float)
        images /= images.sum(axis=(2, 3), keepdims=True)
        return 1.0 / np.square(images).sum(axis=(2, 3))

    def fwhm(self) -> float:
        """Return the median FWHM, pixels; pixels are included in the PSF."""
        known = self.images[np.isfinite(self.images[..., 0, 0])]
        known = known[:: -(-len(known) // _FWHM_POINTS)]
        middle = (self.images.shape[-1] // 2, (0.0, 0.0), (1.0, 1.0))
        models = (PsfModel(one[None].astype(float), 0, 1.0, *middle) for one in known)
        return float(np.median([model.fwhm_at(0.0, 0.0) for model in models]))


def _make_grid(psf: CoaddPsf) -> PsfGrid | None:
    """Draw the PSF of a coadd on a grid that covers it; return None if it has none anywhere."""
    if psf.half == 0:
        return None
    x0, y0, x1, y1 = psf.box
    x, y = (_grid_points(end - begin) for begin, end in ((x0, x1), (y0, y1)))
    columns, rows = (p.ravel() for p in np.meshgrid(x + x0, y + y0))
    used = psf.sets.used(_common_sets(psf.sets.index, x.size, y.size))
    images = psf.images_of(*psf.tract.pixel_to_sky(columns, rows), used).astype(np.float32)
    if not np.isfinite(images).any():
        return None
    return PsfGrid(x, y, images.reshape(y.size, x.size, *images.shape[1:]))


def _grid_points(length: int) -> NDArray[np.int64]:
    """Return the pixels of the grid along a side: the middles of equal parts."""
    n = int(np.clip(round(length / _GRID_SPACING), *_GRID_POINTS))
    return np.floor((np.arange(n) + 0.5) * length / n).astype(np.int64)


def _common_sets(index: NDArray[np.int32], nx: int, ny: int) -> NDArray[np.intp]:
    """Return the set that most pixels around each point of a grid have, row by row.

    That of the point itself may be of a pixel that a cosmic ray has hit.
    """
    edges = [
        np.floor(np.arange(n + 1) * length / n).astype(int)
        for n, length in ((ny, index.shape[0]), (nx, index.shape[1]))
    ]
    return np.array(
        [
            np.bincount(index[y0:y1, x0:x1].ravel()).argmax()
            for y0, y1 in itertools.pairwise(edges[0])
            for x0, x1 in itertools.pairwise(edges[1])
        ]
    )


def smooth_model(grid: PsfGrid, shape: tuple[int, int]) -> PsfModel:
    """Fit a polynomial over a coadd to its PSF on a grid.

    The PSF of a coadd changes abruptly where exposures end, which no polynomial follows: this is
    for programs that cannot do better.

    Parameters
    ----------
    grid : PsfGrid
        With a PSF somewhere.
    shape : tuple of int
        Shape (ny, nx) of the coadd.
    """
    columns, rows = (p.ravel() for p in np.meshgrid(grid.x, grid.y))
    images = grid.images.reshape(columns.size, *grid.images.shape[2:]).astype(float)
    known = np.isfinite(images[:, 0, 0])
    images = images[known] / images[known].sum(axis=(1, 2), keepdims=True)
    center = tuple((length - 1) / 2.0 for length in reversed(shape))
    scale = tuple(length / 2.0 for length in reversed(shape))
    u, v = ((p[known] - c) / s for p, c, s in zip((columns, rows), center, scale, strict=True))
    order = _LARGEST_ORDER
    while order > 0 and (order + 1) * (order + 2) / 2 * _POINTS_PER_TERM > len(images):
        order -= 1
    design = design_matrix(u, v, order)
    basis = np.tensordot(np.linalg.pinv(design), images, axes=1)
    return PsfModel(basis, order, 1.0, basis.shape[-1] // 2, center, scale)


# In files ---------------------------------------------------------------------------------------


def psf_hdus(
    psf: CoaddPsf, header: fits.Header, compression: Compression = "none"
) -> list[fits.hdu.base.ExtensionHDU]:
    """Return the extensions that say the PSF of a coadd.

    INPUTMAP, INPUTSETS and CCD_PSFS are those from which `read_coadd_psf` makes it; PSF_GRID and
    PSF_DATA, which has the format of PSFEx, are there if it has a PSF anywhere.

    Parameters
    ----------
    psf : CoaddPsf
        The PSF.
    header : astropy.io.fits.Header
        Cards of INPUTMAP: the WCS of the coadd.
    compression : {"none", "lossless", "quantized"}
        That of the other images of the coadd.
    """
    pairs = [(one.exposure, ccd_psf) for one in psf.inputs for ccd_psf in one.ccd_psfs]
    names, ccd_psfs = zip(*pairs, strict=True) if pairs else ((), ())
    numbers = psf.sets.index
    if len(psf.sets.members) <= np.iinfo(np.int16).max:
        numbers = numbers.astype(np.int16)
    index = image_hdu(_INDEX, numbers, header, compression)
    exact = [index, _sets_hdu(psf.sets), psfs_hdu(ccd_psfs, names)]
    return exact if psf.grid is None else [*exact, _grid_hdu(psf.grid), psf_hdu(psf.model)]


def _sets_hdu(sets: InputSets) -> fits.BinTableHDU:
    """Return the sets: columns USED, a bit for each row of the table of inputs, and FILLED."""
    # FITS has columns without bytes, but not all programs have
    members = sets.members if sets.n_inputs else np.zeros((len(sets.members), 1), np.uint8)
    columns = [
        fits.Column("USED", f"{members.shape[1]}B", array=members),
        fits.Column("FILLED", "L", array=sets.filled),
    ]
    table = fits.BinTableHDU.from_columns(columns, name=_SETS)
    table.header["NINPUTS"] = (sets.n_inputs, "rows of the table of inputs that have a bit")
    return table


def _sets_from_hdus(
    numbers: fits.ImageHDU | fits.CompImageHDU, table: fits.BinTableHDU, n_inputs: int
) -> InputSets:
    """Return the sets of the pixels; InputError if they are not those of so many inputs."""
    index, n_used = np.asarray(numbers.data, np.int32), int(table.header["NINPUTS"])
    members = np.asarray(table.data["USED"], np.uint8).reshape(len(table.data), -1)
    is_known = index.min(initial=0) >= 0 and index.max(initial=0) < len(members)
    if not is_known or not 0 <= n_used <= min(n_inputs, 8 * members.shape[1]):
        raise InputError(f"{_INDEX}, {_SETS} and INPUTS contradict each other")
    return InputSets(index, members, np.array(table.data["FILLED"], bool), n_used)


def _grid_hdu(grid: PsfGrid) -> fits.ImageHDU:
    """Return the grid as the extension PSF_GRID, a cube of cubes.

    GRIDX1, GRIDX2, ... and GRIDY1, ... are the pixels of the coadd, 1-based.
    """
    hdu = fits.ImageHDU(grid.images, name=_GRID)
    for axis, pixels in (("X", grid.x), ("Y", grid.y)):
        for number, pixel in enumerate(pixels, start=1):
            hdu.header[f"GRID{axis}{number}"] = (int(pixel) + 1, "[pixel] first is 1")
    return hdu


def read_psf_grid(path: str | Path) -> PsfGrid | None:
    """Return the PSF of a coadd on a grid; None if it has none.

    Raises
    ------
    InputError
        If the file is missing or damaged.
    """
    with opened_fits(path, "coadd", coadd_remedy(path)) as (_, hdus):
        return stored_psf_grid(hdus)


def stored_psf_grid(hdus: fits.HDUList) -> PsfGrid | None:
    """Return the PSF on a grid in the file of a coadd; None if it has none."""
    if _GRID not in hdus:
        return None
    hdu = hdus[_GRID]
    ny, nx = hdu.data.shape[:2]
    x, y = (
        np.array([hdu.header[f"GRID{axis}{number}"] - 1 for number in range(1, n + 1)])
        for axis, n in (("X", nx), ("Y", ny))
    )
    return PsfGrid(x, y, np.asarray(hdu.data, np.float32))
