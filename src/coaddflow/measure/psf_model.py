"""The PSF of one CCD: a pixel basis whose coefficients are polynomials over the CCD [1]_.

The PSF at a position is an image sampled in steps of a fraction of its FWHM, whatever the pixels
are; values at any offset from its centre are interpolated with a Lanczos-4 kernel. Each sample is
a polynomial in the position on the CCD.

References
----------
.. [1] Bertin 2011, ASP Conf. Ser. 442, 435 (PSFEx: pixel basis, super-resolution, variation).
.. [2] Duchon 1979, J. Appl. Meteorol. 18, 1016 (Lanczos kernel).
.. [3] Bernstein & Jarvis 2002, AJ 123, 583, section 3 (adaptive moments).
"""

from dataclasses import dataclass

import numpy as np
from astropy.io import fits
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from coaddflow.errors import InputError
from coaddflow.geometry.polynomial import design_matrix
from coaddflow.image.statistics import RAYLEIGH_MEDIAN

_KERNEL_ORDER = 4
_MOMENT_ITERATIONS = 15


@dataclass(frozen=True)
class PsfModel:
    """The PSF anywhere on a CCD.

    Attributes
    ----------
    basis : ndarray of float64, shape (n terms, k, k)
        Samples of the coefficient of each term of the polynomial, k odd.
    order : int
        Order of the polynomial; its terms are 1, u, v, u^2, uv, v^2, ... (see `terms`).
    step : float
        Distance of samples in pixels of the CCD.
    half : int
        Images have 2 half + 1 pixels on a side.
    center, scale : tuple of float
        u = (x - center[0]) / scale[0], v = (y - center[1]) / scale[1].
    """

    basis: NDArray[np.float64]
    order: int
    step: float
    half: int
    center: tuple[float, float]
    scale: tuple[float, float]

    def terms(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Return the terms of the polynomial at positions, shape (n, n terms)."""
        u = (np.atleast_1d(np.asarray(x, dtype=float)) - self.center[0]) / self.scale[0]
        v = (np.atleast_1d(np.asarray(y, dtype=float)) - self.center[1]) / self.scale[1]
        return design_matrix(u, v, self.order)

    def samples_at(self, x: ArrayLike, y: ArrayLike) -> NDArray[np.float64]:
        """Return the centred samples at positions, shape (n, k, k), not normalised."""
        return np.tensordot(self.terms(x, y), self.basis, axes=1)

    def images_at(self, x: ArrayLike, y: ArrayLike, sub_pixel: bool = True) -> NDArray[np.float32]:
        """Return images of the PSF, shape (n, 2 half + 1, 2 half + 1), each of sum 1.

        Parameters
        ----------
        x, y : array_like, shape (n,)
            Positions in pixels, 0-based.
        sub_pixel : bool
            If true the central pixel of an image is the pixel (round(x), round(y)) of the CCD
            and the PSF is off its centre as the position is. Otherwise it is exactly centred.
        """
        x, y = np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float))
        dx, dy = (x - np.rint(x), y - np.rint(y)) if sub_pixel else (0.0 * x, 0.0 * y)
        images = render(self, self.samples_at(x, y), dx, dy)
        return (images / images.sum(axis=(1, 2), keepdims=True)).astype(np.float32)

    def image_at(self, x: float, y: float, sub_pixel: bool = False) -> NDArray[np.float32]:
        """Return one image of the PSF, shape (2 half + 1, 2 half + 1); see `images_at`."""
        return self.images_at(x, y, sub_pixel)[0]

    def fwhm_at(self, x: float, y: float) -> float:
        """Return the FWHM in pixels of the azimuthally averaged PSF, pixel included."""
        samples = self.samples_at(x, y)[0]
        middle = samples.shape[0] // 2
        radius = np.arange(0.0, middle, 0.05)
        angle = np.linspace(0.0, 2.0 * np.pi, 48, endpoint=False)[:, None]
        place = [middle + radius * np.sin(angle), middle + radius * np.cos(angle)]
        profile = ndimage.map_coordinates(samples, place, order=5).mean(axis=0)
        outside = int(np.argmax(profile < 0.5 * profile[0]))
        if outside == 0:
            return 2.0 * self.step * float(radius[-1])
        inside = outside - 1
        part = (profile[inside] - 0.5 * profile[0]) / (profile[inside] - profile[outside])
        return 2.0 * self.step * float(radius[inside] + part * (radius[1] - radius[0]))

    def shape_at(self, x: float, y: float) -> tuple[float, float]:
        """Return the ellipticity (e1, e2) along the axes and the diagonals of the CCD.

        Distortions, (a^2 - b^2) / (a^2 + b^2), from adaptive moments [3]_.
        """
        mxx, myy, mxy = adaptive_moments(self.samples_at(x, y))[0]
        return float((mxx - myy) / (mxx + myy)), float(2.0 * mxy / (mxx + myy))


def psf_hdu(model: PsfModel) -> fits.ImageHDU:
    """Return the PSF extension: a cube with one plane for each term of the polynomial.

    Keywords: ``PSFORDER`` (order), ``PSFSTEP`` (distance of samples, pixels), ``PSFHALF`` (half
    width of images), ``PSFX0``, ``PSFXS``, ``PSFY0``, ``PSFYS``: u = (x - PSFX0) / PSFXS and v
    likewise, with x and y 0-based. The samples at (x, y) are sum_t plane_t u^i v^j, the terms in
    the order 1, u, v, u^2, uv, v^2, u^3, ...; the middle sample is the centre of the PSF, and
    values between samples are interpolated with a Lanczos-4 kernel.
    """
    hdu = fits.ImageHDU(np.asarray(model.basis, dtype=np.float64), name="PSF")
    hdu.header["PSFORDER"] = (model.order, "order of the polynomial over the CCD")
    hdu.header["PSFSTEP"] = (model.step, "[pixel] distance of samples")
    hdu.header["PSFHALF"] = (model.half, "[pixel] half width of images of the PSF")
    for axis, center, scale in zip("XY", model.center, model.scale, strict=True):
        hdu.header[f"PSF{axis}0"] = (center, "[pixel] origin of the polynomial, 0-based")
        hdu.header[f"PSF{axis}S"] = (scale, "[pixel] unit of the polynomial")
    return hdu


def psf_from_hdu(hdu: fits.ImageHDU) -> PsfModel:
    """Return the PsfModel of an extension made by `psf_hdu`; raise InputError if it is none."""
    header = hdu.header
    try:
        return PsfModel(
            basis=np.asarray(hdu.data, dtype=np.float64),
            order=header["PSFORDER"],
            step=header["PSFSTEP"],
            half=header["PSFHALF"],
            center=(header["PSFX0"], header["PSFY0"]),
            scale=(header["PSFXS"], header["PSFYS"]),
        )
    except (KeyError, TypeError) as error:
        raise InputError(f"PSF is not a model of coaddflow ({error})") from error


def adaptive_moments(images: NDArray) -> NDArray[np.float64]:
    """Return second moments under the elliptical Gaussian that matches each image [3]_.

    The images, shape (n, k, k), have one source near their middle. The moments, shape (n, 3), are
    Mxx, Myy, Mxy in pixels squared: for a Gaussian, those of the Gaussian itself. They are NaN
    where the iteration leaves the image.
    """
    images = np.asarray(images, dtype=float)
    n, size = images.shape[:2]
    grid = np.arange(size) - size // 2
    x, y = np.zeros(n), np.zeros(n)
    half_light = np.sqrt(
        np.count_nonzero(images > 0.5 * images.max(axis=(1, 2))[:, None, None], axis=(1, 2)) / np.pi
    )
    mxx = myy = np.maximum(half_light / RAYLEIGH_MEDIAN, 0.5) ** 2
    mxy = np.zeros(n)
    for _ in range(_MOMENT_ITERATIONS):
        dx = grid[None, None, :] - x[:, None, None]
        dy = grid[None, :, None] - y[:, None, None]
        determinant = mxx * myy - mxy**2
        a, b, c = ((m / determinant)[:, None, None] for m in (myy, mxx, mxy))
        weight = images * np.exp(-0.5 * (a * dx**2 + b * dy**2 - 2.0 * c * dx * dy))
        total = weight.sum(axis=(1, 2))
        total = np.where(total > 0, total, np.nan)
        shift_x, shift_y = ((weight * d).sum(axis=(1, 2)) / total for d in (dx, dy))
        x, y = x + 2.0 * shift_x, y + 2.0 * shift_y
        mxx, myy, mxy = (
            2.0 * ((weight * p).sum(axis=(1, 2)) / total - q)
            for p, q in ((dx * dx, shift_x**2), (dy * dy, shift_y**2), (dx * dy, shift_x * shift_y))
        )
        sane = (mxx > 0.01) & (myy > 0.01) & (mxx * myy - mxy**2 > 1e-4) & (mxx + myy < size**2)
        mxx, myy, mxy = (np.where(sane, m, np.nan) for m in (mxx, myy, mxy))
    return np.stack([mxx, myy, mxy], axis=-1)


def kernels(model: PsfModel, offset: NDArray) -> NDArray[np.float64]:
    """Return matrices, shape (n, 2 half + 1, k), from samples to pixels along one axis [2]_.

    ``offset``, shape (n,), is the position of the PSF's centre relative to the central pixel.
    """
    n_samples = model.basis.shape[-1]
    pixel = np.arange(-model.half, model.half + 1) - offset[:, None]
    place = pixel / model.step + n_samples // 2
    taps = np.floor(place).astype(int)[..., None] + np.arange(1 - _KERNEL_ORDER, _KERNEL_ORDER + 1)
    distance = place[..., None] - taps
    weight = np.sinc(distance) * np.sinc(distance / _KERNEL_ORDER)
    weight[(taps < 0) | (taps >= n_samples)] = 0.0
    kernel = np.zeros((*place.shape, n_samples))
    image, row = np.ogrid[: place.shape[0], : place.shape[1]]
    # taps outside the samples have no weight, so it does not matter where they are added
    np.add.at(kernel, (image[..., None], row[..., None], np.clip(taps, 0, n_samples - 1)), weight)
    return kernel / kernel.sum(axis=2, keepdims=True)


def render(model: PsfModel, samples: NDArray, dx: NDArray, dy: NDArray) -> NDArray[np.float64]:
    """Return images, shape (n, s, s), of samples, shape (n, k, k), centred at (dx, dy)."""
    return kernels(model, dy) @ samples @ kernels(model, dx).transpose(0, 2, 1)
