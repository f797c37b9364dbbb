"""Warps with a common PSF: kernels from the PSF of a CCD to a target, and their use.

Exposures are compared in images that have the same PSF [1]_. The target is a round Moffat function,
a little wider along every direction than the widest PSF that takes part. A kernel cannot sharpen:
an exposure that is much worse than the others would blur all of them, so it is not matched to the
target. It is compared in a wider target of its own, with the model of the sky convolved from the
one target to the other (`kernel_between`), and adds nothing to that model.

The models of the PSFs are known, so that the kernel is not fitted to the pixels of the sky as in
[2]_. It is the least-squares solution of P * k = T on a square of pixels, with a penalty on the
noise of the kernel (Tikhonov regularisation), and with a sum of exactly 1, so that fluxes stay.
Its pixels vary as polynomials over a CCD [2]_; a polynomial that is fitted to kernels of sum 1 has
the sum 1 everywhere.

Values are convolved with the kernel of their own pixel: with each term of the polynomial, in
Fourier space. Variances, flags and missing pixels, which need less, are convolved with the kernel
of the middle of their cell. Cells begin at multiples of their side on the tract, so that patches
that overlap have the same pixels in common.

References
----------
.. [1] AlSayyad 2019, DMTN-080 (artifacts by comparison of PSF-matched warps); Bosch et al. 2018,
   PASJ 70, S5, section 3.3.
.. [2] Alard & Lupton 1998, ApJ 503, 325; Alard 2000, A&AS 144, 363 (kernels that vary).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import fft, linalg

from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.psf_model import adaptive_moments
from coaddflow.settings.artifacts import PsfMatchingSettings

_FEW_INPUTS = 3
"""So few widths do not say which of them is unusual."""

_POSITIONS_PER_TERM = 2
"""Positions with a PSF that a term of the polynomial must have."""

_ROUNDING = 1e-9
"""Of sums of kernels."""


class PsfStamps(NamedTuple):
    """The PSF of a CCD at some positions of a tract."""

    x: NDArray[np.float64]
    """Columns of the tract, shape (n,)."""
    y: NDArray[np.float64]
    """Rows."""
    images: NDArray[np.float64]
    """Images of stars in the middle of a pixel, shape (n, s, s), s odd; NaN where the PSF is not
    known."""

    def known(self) -> "PsfStamps":
        """Return the positions with a PSF, whose images then have the sum 1."""
        found = np.isfinite(self.images).all(axis=(1, 2))
        images = np.asarray(self.images[found], float)
        return PsfStamps(
            np.asarray(self.x, float)[found],
            np.asarray(self.y, float)[found],
            images / images.sum(axis=(1, 2), keepdims=True),
        )


@dataclass(frozen=True)
class TargetPsf:
    """A round Moffat function, in pixels of the tract, which are included in it."""

    fwhm: float
    """FWHM, pixels."""
    beta: float
    """Exponent."""

    def image(self, half: int) -> NDArray[np.float64]:
        """Return the image of a centred star of sum 1, shape (2 half + 1, 2 half + 1)."""
        offset = np.arange(-half, half + 1)
        alpha = self.fwhm / 2.0 / np.sqrt(2.0 ** (1.0 / self.beta) - 1.0)
        image = (1.0 + (offset**2 + offset[:, None] ** 2) / alpha**2) ** -self.beta
        return image / image.sum()


@dataclass(frozen=True)
class KernelField:
    """A kernel that varies over a CCD.

    Attributes
    ----------
    basis : ndarray of float64, shape (n_terms, k, k)
        Coefficients of the terms 1, u, v, u^2, ... (`coaddflow.geometry.polynomial`), k odd.
    order : int
        Order of the polynomial.
    center, scale : tuple of float
        u = (x - center[0]) / scale[0], v = (y - center[1]) / scale[1], in tract pixels.
    """

    basis: NDArray[np.float64]
    order: int
    center: tuple[float, float]
    scale: tuple[float, float]

    @property
    def half(self) -> int:
        """Half width, pixels: the halo that the convolution needs."""
        return self.basis.shape[1] // 2

    def terms(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Return the terms of the polynomial at positions of the tract, shape (..., n_terms).

        Beyond the positions to which it was fitted they are those of the border.
        """
        u, v = (
            np.clip((np.asarray(p, float) - c) / s, -1.0, 1.0)
            for p, c, s in zip((x, y), self.center, self.scale, strict=True)
        )
        return design_matrix(u, v, self.order)

    def at(self, x: float, y: float) -> NDArray[np.float64]:
        """Return the kernel at a position of the tract, shape (k, k)."""
        return np.tensordot(self.terms(x, y), self.basis, axes=1)


# The target -------------------------------------------------------------------------------------


def largest_width(images: NDArray) -> float:
    """Return the largest width of some PSFs along any direction, pixels.

    Parameters
    ----------
    images : ndarray, shape (n, s, s)
        Images of stars; those that are not finite are left out.

    Returns
    -------
    float
        Standard deviation along the major axis, from adaptive moments; NaN if there is none.
    """
    found = np.asarray(images)[np.isfinite(images).all(axis=(1, 2))]
    if len(found) == 0:
        return float("nan")
    xx, yy, xy = adaptive_moments(found).T
    largest = 0.5 * (xx + yy) + np.hypot(0.5 * (xx - yy), xy)
    return float(np.sqrt(np.fmax.reduce(largest)))


def choose_target(
    widths: Sequence[float], settings: PsfMatchingSettings
) -> tuple[TargetPsf, NDArray[np.bool_]]:
    """Choose the PSF to which exposures are matched.

    Parameters
    ----------
    widths : sequence of float
        `largest_width` of each exposure; NaN where no PSF is known. For patches that agree where
        they overlap, those of all exposures of the tract.
    settings : PsfMatchingSettings
        Which widths are unusual, and the margin.

    Returns
    -------
    TargetPsf
        A little wider than the widest of the exposures that are matched.
    ndarray of bool, shape (n,)
        Which exposures are matched to it. The others have no PSF, or one that is more than
        ``max_ratio`` wider than the median; none of three or fewer, of which too few would be left.

    Raises
    ------
    InputError
        If no PSF is known.
    """
    widths = np.asarray(widths, float)
    known = np.isfinite(widths)
    if not known.any():
        raise InputError(
            "no PSF of the exposures is known, so that they cannot be matched",
            remedy="switch the comparison off for images that were calibrated elsewhere",
        )
    matched = known.copy()
    if known.sum() > _FEW_INPUTS:
        matched &= np.nan_to_num(widths, nan=np.inf) <= settings.max_ratio * np.median(
            widths[known]
        )
    return wider_target(float(widths[matched].max()), settings), matched


def wider_target(width: float, settings: PsfMatchingSettings) -> TargetPsf:
    """Return the target for PSFs up to a width (`largest_width`, pixels)."""
    wanted = settings.margin * width
    fwhm = np.sqrt(8.0 * np.log(2.0)) * wanted
    for _ in range(4):  # the moments of sampled Moffat functions are not quite proportional to it
        found = largest_width(TargetPsf(fwhm, settings.beta).image(int(4 * fwhm))[None])
        fwhm *= wanted / found
    return TargetPsf(float(fwhm), settings.beta)


# Kernels ----------------------------------------------------------------------------------------


def fit_kernels(psf: PsfStamps, target: TargetPsf, settings: PsfMatchingSettings) -> KernelField:
    """Return the kernels that change the PSF of a CCD to a target.

    Parameters
    ----------
    psf : PsfStamps
        The PSF at positions that cover the CCD.
    target : TargetPsf
        As wide as the PSF along its major axis, or wider.
    settings : PsfMatchingSettings
        Size, regularisation, and order of the variation.

    Raises
    ------
    InputError
        If the PSF is known nowhere.
    """
    psf = psf.known()
    if len(psf.images) == 0:
        raise InputError(
            "has no PSF, so that it cannot be matched",
            remedy="leave it out of the comparison",
        )
    wanted = target.image(psf.images.shape[-1] // 2)
    half = int(np.ceil(settings.reach * target.fwhm))
    kernels = np.stack([_solve(image, wanted, half, settings.damping) for image in psf.images])
    center, scale = zip(*(_range_of(p) for p in (psf.x, psf.y)), strict=True)
    u, v = ((p - c) / s for p, c, s in zip((psf.x, psf.y), center, scale, strict=True))
    order = _allowed_order(len(kernels), settings.order)
    basis = np.tensordot(np.linalg.pinv(design_matrix(u, v, order)), kernels, axes=1)
    return KernelField(basis, order, center, scale)


def kernel_between(
    narrow: TargetPsf, wide: TargetPsf, settings: PsfMatchingSettings
) -> KernelField:
    """Return the kernel, the same everywhere, from a target to a wider one."""
    half = int(np.ceil(4.0 * wide.fwhm))
    stamps = PsfStamps(np.zeros(1), np.zeros(1), narrow.image(half)[None])
    return fit_kernels(stamps, wide, settings)


def _range_of(positions: NDArray) -> tuple[float, float]:
    """Return the middle of positions, and half of their range (at least 1)."""
    low, high = positions.min(), positions.max()
    return 0.5 * (low + high), max(0.5 * (high - low), 1.0)


def _allowed_order(n: int, order: int) -> int:
    """Return the largest order up to ``order`` for whose terms n positions are enough."""
    while order > 0 and _POSITIONS_PER_TERM * (order + 1) * (order + 2) // 2 > n:
        order -= 1
    return order


def _solve(psf: NDArray, target: NDArray, half: int, damping: float) -> NDArray[np.float64]:
    """Return the kernel k of sum 1, shape (2 half + 1, 2 half + 1).

    It has the least sum of (psf * k - target)^2, plus ``damping`` sum(psf^2) sum(k^2).
    """
    size = fft.next_fast_len(psf.shape[0] + 4 * half, real=True)
    of_psf, of_target = (fft.rfft2(image, (size, size)) for image in (psf, target))
    own = fft.irfft2(np.abs(of_psf) ** 2, (size, size))
    cross = fft.irfft2(np.conj(of_psf) * of_target, (size, size))
    lag = np.arange(-half, half + 1)
    y, x = (p.ravel() for p in np.meshgrid(lag, lag, indexing="ij"))
    matrix = own[y[:, None] - y, x[:, None] - x]
    matrix[np.diag_indices_from(matrix)] += damping * own[0, 0]
    right = np.stack([cross[y, x], np.ones(x.size)], axis=1)
    best, shift = linalg.solve(matrix, right, assume_a="pos").T
    kernel = best + (1.0 - best.sum()) / shift.sum() * shift
    return kernel.reshape(lag.size, lag.size)


# Convolution ------------------------------------------------------------------------------------


def match_psf(
    pixels: MaskedImage,
    corner: tuple[int, int],
    kernels: KernelField,
    settings: PsfMatchingSettings,
) -> MaskedImage:
    """Convolve the warp of a CCD with the kernels of its cells.

    Parameters
    ----------
    pixels : MaskedImage
        Warp of one CCD, with a margin of ``kernels.half`` pixels around what is wanted. Values
        that are not finite, have no positive variance or the bit NO_DATA are missing, and so is
        everything beyond the borders.
    corner : tuple of int
        Column and row of its first pixel on the tract.
    kernels : KernelField
        From `fit_kernels`.
    settings : PsfMatchingSettings
        Cells, and what happens beside missing and flagged pixels.

    Returns
    -------
    MaskedImage
        Of the same shape. A value is sum(k v) / sum(k) over the pixels that are there, and its
        variance sum(k^2 variance) / sum(k)^2, for single pixels: neighbours are correlated. A bit
        is set where the pixels that have it hold more than ``mask_threshold`` of sum(abs(k)).
    """
    result = MaskedImage.empty(pixels.shape)
    present = (
        np.isfinite(pixels.image)
        & np.isfinite(pixels.variance)
        & (pixels.variance > 0)
        & (pixels.mask & MaskPlane.NO_DATA == 0)
    )
    # what is missing adds nothing to a sum
    clean = MaskedImage(*(np.where(present, p, 0) for p in _planes(pixels)))
    size = fft.next_fast_len(settings.cell + 2 * kernels.half, real=True)
    basis = fft.rfft2(kernels.basis, (size, size))
    for rows, columns, middle in _cells(pixels.shape, corner, settings.cell):
        window = _Window(rows, columns, kernels.half, size)
        if present[window.around].any():
            y, x = np.mgrid[rows, columns]
            terms = kernels.terms(x + corner[0], y + corner[1])
            image = window.combine(window.transform(clean.image[window.around]), basis, terms)
            near, there = clean.part(window.around), present[window.around]
            matched = _add_noise_and_flags(
                image, near, there, window, kernels.at(*middle), settings
            )
            result.put(matched, (rows.start, columns.start))
    return result


def _planes(pixels: MaskedImage) -> tuple[NDArray, NDArray, NDArray]:
    """Return image, variance and mask."""
    return pixels.image, pixels.variance, pixels.mask


def _cells(
    shape: tuple[int, int], corner: tuple[int, int], side: int
) -> Iterator[tuple[slice, slice, tuple[float, float]]]:
    """Yield rows and columns of the cells in an image, and their middles on the tract."""
    spans = [
        [
            (slice(max(begin - first, 0), min(begin + side - first, length)), begin + 0.5 * side)
            for begin in range(first // side * side, first + length, side)
        ]
        for first, length in zip(corner, reversed(shape), strict=True)
    ]
    for rows, y in spans[1]:
        for columns, x in spans[0]:
            yield rows, columns, (x - 0.5, y - 0.5)


class _Window(NamedTuple):
    """The pixels of a cell, and those around that the kernel reaches."""

    rows: slice
    columns: slice
    reach: int
    """Half width of the kernel."""
    size: int
    """Side of the Fourier transforms: that of the largest window, or more."""

    @property
    def around(self) -> tuple[slice, slice]:
        """Rows and columns of the window that the image has."""
        rows, columns = (
            slice(max(p.start - self.reach, 0), p.stop + self.reach)
            for p in (self.rows, self.columns)
        )
        return rows, columns

    def transform(self, around: NDArray) -> NDArray[np.complex128]:
        """Return the Fourier transform of the window; there is nothing beyond the image."""
        y, x = (max(self.reach - p.start, 0) for p in (self.rows, self.columns))
        padded = np.zeros((self.size, self.size))
        padded[y : y + around.shape[0], x : x + around.shape[1]] = around
        return fft.rfft2(padded)

    def of_kernel(self, kernel: NDArray) -> NDArray[np.complex128]:
        """Return the Fourier transform of a kernel."""
        return fft.rfft2(kernel, (self.size, self.size))

    def convolve(self, values: NDArray, kernel: NDArray) -> NDArray[np.float64]:
        """Return the pixels of the cell, from the transforms of window and kernel."""
        whole = fft.irfft2(values * kernel, (self.size, self.size))
        first = 2 * self.reach
        rows, columns = (slice(first, first + p.stop - p.start) for p in (self.rows, self.columns))
        return whole[rows, columns]

    def combine(self, values: NDArray, basis: NDArray, terms: NDArray) -> NDArray[np.float64]:
        """Return the convolution with a kernel that is another one at each pixel.

        ``basis`` are the transforms of what the terms, shape (ny, nx, n_terms), multiply.
        """
        image = np.zeros(terms.shape[:2])
        for number, kernel in enumerate(basis):
            image += terms[..., number] * self.convolve(values, kernel)
        return image


def _add_noise_and_flags(
    image: NDArray[np.float64],
    near: MaskedImage,
    present: NDArray[np.bool_],
    window: _Window,
    kernel: NDArray[np.float64],
    settings: PsfMatchingSettings,
) -> MaskedImage:
    """Return the pixels of a cell, from its convolved values and the pixels in and around it."""
    of_kernel, absolute = window.of_kernel(kernel), window.of_kernel(np.abs(kernel))
    largest = np.abs(kernel).sum()
    there = window.transform(present)
    missing = 1.0 - window.convolve(there, absolute) / largest
    usable = missing <= settings.max_missing
    total = np.where(usable, window.convolve(there, of_kernel), 1.0)
    squares = window.of_kernel(kernel**2)
    variance = window.convolve(window.transform(near.variance), squares) / total**2
    mask = np.where(usable, 0, int(MaskPlane.NO_DATA)).astype(np.int32)
    mask[usable & (missing > _ROUNDING)] |= MaskPlane.EDGE
    for plane in MaskPlane:
        flagged = near.mask & plane != 0
        if flagged.any():
            part = window.convolve(window.transform(flagged), absolute) / largest
            mask[usable & (part > settings.mask_threshold)] |= plane
    return MaskedImage(
        np.where(usable, image / total, np.nan), np.where(usable, variance, np.inf), mask
    )
