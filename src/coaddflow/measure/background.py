"""The sky of one CCD: a mesh of superpixels from which sources are masked.

The CCD is tiled by superpixels of about equal size. The sky in each is the mean of its pixels
after clipping and without sources. Sources are found as blocks of pixels that are above the
sky estimated so far, in small blocks (stars) and in large ones (halos), and the sky is then
estimated again. The mesh keeps mean, variance and number of pixels of every superpixel, so that
the meshes of all CCDs of an exposure can be put together to one sky over the focal plane.

References
----------
.. [1] Bertin & Arnouts 1996, A&AS 117, 393, section 3 (mesh, clipping, median filter).
.. [2] Bosch et al. 2018, PASJ 70, S5, section 4.3 (superpixels of 128 pixels, sources masked).
"""

from dataclasses import dataclass

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy import interpolate, ndimage

from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.statistics import clipped_statistics
from coaddflow.settings.background import BackgroundSettings

NOT_MEASURED = (
    MaskPlane.BAD
    | MaskPlane.SAT
    | MaskPlane.CR
    | MaskPlane.NO_DATA
    | MaskPlane.INTRP
    | MaskPlane.STREAK
)
"""Planes whose pixels do not measure the light that fell on them."""

_BLOCK_FRACTION = 0.25
"""Blocks with a smaller fraction of usable pixels are ignored."""

_MESH_PLANES = ("mean", "variance", "count")


@dataclass(frozen=True)
class Background:
    """The sky of a CCD on a mesh of (my, mx) superpixels.

    Attributes
    ----------
    shape : tuple of int
        Shape (ny, nx) of the CCD.
    mean : ndarray of float64, shape (my, mx)
        Clipped mean of the sky pixels of each superpixel; NaN where there are none.
    variance : ndarray of float64, shape (my, mx)
        Variance of these pixels, corrected for the clipping; NaN where there are none.
    count : ndarray of int64, shape (my, mx)
        Number of these pixels; the variance of `mean` is ``variance / count`` for white noise.
    min_fraction : float
        Superpixels whose fraction of sky pixels is smaller than this part of the median fraction
        are filled from their neighbours.
    filter_size : int
        Width of the median filter over superpixels.
    """

    shape: tuple[int, int]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    count: NDArray[np.int64]
    min_fraction: float = 0.4
    filter_size: int = 3

    @property
    def y_edges(self) -> NDArray[np.int64]:
        """Rows where superpixels begin, and the number of rows, shape (my + 1,)."""
        return _superpixel_edges(self.shape[0], self.mean.shape[0])

    @property
    def x_edges(self) -> NDArray[np.int64]:
        """Columns where superpixels begin, and the number of columns, shape (mx + 1,)."""
        return _superpixel_edges(self.shape[1], self.mean.shape[1])

    @property
    def level(self) -> float:
        """Median of the sky over the CCD, in the unit of the image."""
        return float(np.median(self._filled(self.mean)))

    @property
    def noise(self) -> float:
        """Median standard deviation of a sky pixel, in the unit of the image."""
        return float(np.sqrt(np.median(self._filled(self.variance))))

    def model(self) -> NDArray[np.float32]:
        """Return the sky at every pixel, shape (ny, nx): bicubic between superpixels."""
        mesh = self._filled(self.mean)
        if self.filter_size > 1:
            half = self.filter_size // 2
            padded = _extrapolated(mesh, half)
            mesh = ndimage.median_filter(padded, size=self.filter_size)[half:-half, half:-half]
        return self._interpolated(mesh, degree=3)

    def rms(self) -> NDArray[np.float32]:
        """Return the standard deviation of the sky at every pixel, shape (ny, nx): bilinear."""
        variance = self._filled(self.variance)
        # neither the extrapolation to the edge nor an image without noise may reach zero
        floor = max(0.25 * float(variance.min()), 1e-12)
        return np.sqrt(np.maximum(self._interpolated(variance, degree=1), floor))

    def with_sky(self, mean: NDArray[np.float64]) -> "Background":
        """Return another sky on the same superpixels, with the noise of this one.

        ``mean``, shape (my, mx), is the sky at the centres of all superpixels, finite; `model`
        interpolates it as it is, without filling or median filter.
        """
        mean = np.asarray(mean, dtype=np.float64)
        if mean.shape != self.mean.shape or not np.isfinite(mean).all():
            raise ValueError(f"a sky for {self.mean.shape} superpixels must be finite everywhere")
        # the count says which superpixels `model` believes: all
        count = np.maximum(self.count, 1)
        return Background(self.shape, mean, self._filled(self.variance), count, 0.0, 1)

    def _filled(self, mesh: NDArray[np.float64]) -> NDArray[np.float64]:
        """Fill superpixels with too little sky by their neighbours, nearer ones weighing more."""
        area = np.outer(np.diff(self.y_edges), np.diff(self.x_edges))
        fraction = self.count / area
        # relative to the other superpixels, or a crowded field would have none that is good
        known = (fraction > 0) & (fraction >= self.min_fraction * np.median(fraction))
        if known.all():
            return mesh
        weight = known.astype(float)
        values = np.where(known, mesh, 0.0)
        filled = mesh.copy()
        missing = ~known
        sigma = 1.0
        while missing.any():
            total = ndimage.gaussian_filter(weight, sigma, mode="constant", truncate=3.0)
            smooth = ndimage.gaussian_filter(values, sigma, mode="constant", truncate=3.0)
            reached = missing & (total > 1e-6)
            filled[reached] = smooth[reached] / total[reached]
            missing &= ~reached
            sigma *= 2.0
        return filled

    def _interpolated(self, mesh: NDArray[np.float64], degree: int) -> NDArray[np.float32]:
        # a ring of linearly extrapolated superpixels carries gradients to the very edge
        padded = _extrapolated(mesh, 1)
        rows = _interpolation_matrix(self.y_edges, degree)
        columns = _interpolation_matrix(self.x_edges, degree)
        return (rows @ padded).astype(np.float32) @ columns.T.astype(np.float32)


def _extrapolated(mesh: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return a mesh with rings of superpixels around it that carry its gradients on.

    Along an axis with one superpixel there is no gradient: its value is repeated.
    """
    for axis in (0, 1):
        added = [(width, width) if a == axis else (0, 0) for a in (0, 1)]
        if mesh.shape[axis] > 1:
            mesh = np.pad(mesh, added, mode="reflect", reflect_type="odd")
        else:
            mesh = np.pad(mesh, added, mode="edge")
    return mesh


def estimate_background(masked_image: MaskedImage, settings: BackgroundSettings) -> Background:
    """Estimate the sky of a CCD [1]_ [2]_.

    Parameters
    ----------
    masked_image : MaskedImage
        The detrended image, shape (ny, nx). Pixels of the planes `NOT_MEASURED` and those that are
        not finite are left out.
    settings : BackgroundSettings
        Mesh, clipping and masking.

    Raises
    ------
    CcdFailure
        ``no_data`` if no pixel of the CCD can be used.
    """
    usable = ~masked_image.has_any(NOT_MEASURED) & np.isfinite(masked_image.image)
    if not usable.any():
        raise CcdFailure(Reason.NO_DATA, "no pixel of the CCD can be used")
    sky = usable
    background = _measure_mesh(masked_image.image, sky, settings)
    if not (background.count > 0).any():
        raise CcdFailure(Reason.NO_DATA, "no superpixel of the CCD has two pixels that can be used")
    for _ in range(settings.mask_passes):
        residual = masked_image.image - background.model()
        sky = usable & ~_source_mask(residual, usable, background.rms(), settings)
        masked = _measure_mesh(masked_image.image, sky, settings)
        if not (masked.count > 0).any():
            break
        background = masked
    return background


def background_hdu(background: Background) -> fits.ImageHDU:
    """Return the BACKGROUND extension: a cube of the mesh.

    Planes 1 to 3 are mean, variance and count. Keywords: ``IMNAXIS1``, ``IMNAXIS2`` (size of the
    CCD), ``MINFRAC`` and ``MEDFILT`` (`Background.min_fraction` and `Background.filter_size`).
    Superpixel i of m along an axis of n pixels begins at pixel round(i n / m).
    """
    planes = [np.asarray(getattr(background, name), dtype=np.float64) for name in _MESH_PLANES]
    hdu = fits.ImageHDU(np.stack(planes), name="BACKGROUND")
    hdu.header["IMNAXIS1"] = (background.shape[1], "columns of the CCD")
    hdu.header["IMNAXIS2"] = (background.shape[0], "rows of the CCD")
    hdu.header["MINFRAC"] = (background.min_fraction, "least fraction of sky in a superpixel")
    hdu.header["MEDFILT"] = (background.filter_size, "median filter over superpixels")
    for number, name in enumerate(_MESH_PLANES, start=1):
        hdu.header[f"PLANE{number}"] = (name, "of the sky pixels of a superpixel")
    return hdu


def background_from_hdu(hdu: fits.ImageHDU) -> Background:
    """Return the Background of an extension made by `background_hdu`.

    Raises
    ------
    InputError
        If the extension is not one.
    """
    header = hdu.header
    try:
        mean, variance, count = np.asarray(hdu.data, dtype=np.float64)
        return Background(
            (header["IMNAXIS2"], header["IMNAXIS1"]),
            mean,
            variance,
            count.astype(np.int64),
            header["MINFRAC"],
            header["MEDFILT"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"BACKGROUND is not a mesh of coaddflow ({error})") from error


def _superpixel_edges(size: int, n: int) -> NDArray[np.int64]:
    """Return where ``n`` superpixels that tile ``size`` pixels begin, and ``size``."""
    return np.round(np.linspace(0, size, n + 1)).astype(np.int64)


def _measure_mesh(image: NDArray, sky: NDArray[np.bool_], settings: BackgroundSettings):
    """Return a Background with the clipped statistics of all superpixels."""
    ny, nx = image.shape
    my, mx = (max(1, round(n / settings.mesh_size)) for n in (ny, nx))
    y_edges, x_edges = _superpixel_edges(ny, my), _superpixel_edges(nx, mx)
    mean, variance = np.full((my, mx), np.nan), np.full((my, mx), np.nan)
    count = np.zeros((my, mx), dtype=np.int64)
    for j, i in np.ndindex(my, mx):
        box = np.s_[y_edges[j] : y_edges[j + 1], x_edges[i] : x_edges[i + 1]]
        pixels = image[box][sky[box]]
        if pixels.size > 1:
            mean[j, i], variance[j, i], count[j, i] = clipped_statistics(
                pixels, settings.clip_sigma
            )
    return Background((ny, nx), mean, variance, count, settings.min_fraction, settings.filter_size)


def _source_mask(
    residual: NDArray[np.float32],
    usable: NDArray[np.bool_],
    rms: NDArray[np.float32],
    settings: BackgroundSettings,
) -> NDArray[np.bool_]:
    """Return the pixels of blocks that are above the sky, and of the blocks beside them."""
    significance = np.where(usable, residual / rms, np.float32(0.0))
    mask = np.zeros(residual.shape, dtype=bool)
    for size in (settings.small_block, settings.large_block):
        # large blocks look only at what the small ones have left, or every star would fill one
        left = usable & ~mask
        total = _block_sum(np.where(left, significance, np.float32(0.0)), size)
        count = _block_sum(left.astype(np.float32), size)
        enough = count >= _BLOCK_FRACTION * size**2
        if not enough.any():
            continue
        block = total / np.sqrt(np.maximum(count, 1.0))
        # noise that is correlated, or the confusion of faint sources, widens the distribution
        _, variance, _ = clipped_statistics(block[enough], 3.0)
        found = enough & (block > settings.mask_sigma * max(1.0, np.sqrt(variance)))
        found = ndimage.binary_dilation(found, np.ones((3, 3), dtype=bool))
        blocks = np.repeat(np.repeat(found, size, axis=0), size, axis=1)
        mask |= blocks[: mask.shape[0], : mask.shape[1]]
    return mask


def _block_sum(image: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Sum over blocks of size x size pixels; those at the far edges may be incomplete."""
    starts = [np.arange(0, n, size) for n in image.shape]
    return np.add.reduceat(np.add.reduceat(image, starts[1], axis=1), starts[0], axis=0)


def _interpolation_matrix(edges: NDArray[np.int64], degree: int) -> NDArray[np.float64]:
    """Return the matrix, shape (n pixels, m + 2), from padded superpixels to pixels (spline)."""
    centres = 0.5 * (edges[:-1] + edges[1:] - 1.0)
    first, last = edges[1] - edges[0], edges[-1] - edges[-2]
    nodes = np.concatenate([[centres[0] - first], centres, [centres[-1] + last]])
    degree = min(degree, nodes.size - 1)
    spline = interpolate.make_interp_spline(nodes, np.eye(nodes.size), k=degree)
    return spline(np.arange(edges[-1]))
