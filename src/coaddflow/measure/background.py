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

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from astropy.io import fits
from numpy.typing import NDArray
from scipy import interpolate, ndimage

from coaddflow.compiled import njit
from coaddflow.errors import CcdFailure, InputError, Reason
from coaddflow.image.clipped import clipped_mesh, clipped_statistics
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.row_blocks import on_rows, over_rows
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

    def model(self, threads: int = 1) -> NDArray[np.float32]:
        """Return the sky at every pixel, shape (ny, nx): bicubic between superpixels.

        ``threads`` share the rows.
        """
        return _rendered(self._model(), threads)

    def rms(self) -> NDArray[np.float32]:
        """Return the standard deviation of the sky at every pixel, shape (ny, nx): bilinear."""
        surface, floor = self._variance()
        return np.sqrt(np.maximum(_rendered(surface), np.float32(floor)))

    def _model(self) -> "_Surface":
        mesh = self._filled(self.mean)
        if self.filter_size > 1:
            half = self.filter_size // 2
            padded = _extrapolated(mesh, half)
            mesh = ndimage.median_filter(padded, size=self.filter_size)[half:-half, half:-half]
        return self._surface(mesh, degree=3)

    def _variance(self) -> tuple["_Surface", float]:
        """Return the variance of the sky, and the least value that it has."""
        variance = self._filled(self.variance)
        # neither the extrapolation to the edge nor an image without noise may reach zero
        return self._surface(variance, degree=1), max(0.25 * float(variance.min()), 1e-12)

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

    def _surface(self, mesh: NDArray[np.float64], degree: int) -> "_Surface":
        # a ring of linearly extrapolated superpixels carries gradients to the very edge
        rows, to_rows = _splines(self.y_edges, degree)
        columns, to_columns = _splines(self.x_edges, degree)
        return _Surface(to_rows @ _extrapolated(mesh, 1) @ to_columns.T, rows, columns)


class _Splines(NamedTuple):
    """The B-splines along one axis: at a pixel four in a row count, of which some may be zero.

    ``weight`` has the shape (4, n pixels), ``edges`` is where the first of the four changes, shape
    (n spans + 1,), and ``first`` which it is in each span.
    """

    weight: NDArray[np.float64]
    edges: NDArray[np.int64]
    first: NDArray[np.int64]


class _Surface(NamedTuple):
    """A sum of products of B-splines along rows and columns, with these coefficients."""

    coefficients: NDArray[np.float64]
    rows: _Splines
    columns: _Splines


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


def estimate_background(
    masked_image: MaskedImage, settings: BackgroundSettings, threads: int = 1
) -> Background:
    """Estimate the sky of a CCD [1]_ [2]_.

    Parameters
    ----------
    masked_image : MaskedImage
        The detrended image, shape (ny, nx). Pixels of the planes `NOT_MEASURED` and those that are
        not finite are left out.
    settings : BackgroundSettings
        Mesh, clipping and masking.
    threads : int
        Number of threads that share the rows.

    Raises
    ------
    CcdFailure
        ``no_data`` if no pixel of the CCD can be used.
    """
    image = np.ascontiguousarray(masked_image.image)
    usable = _usable_pixels(image, masked_image.mask, threads)
    if not usable.any():
        raise CcdFailure(Reason.NO_DATA, "no pixel of the CCD can be used")
    background = _measure_mesh(image, usable, settings, threads)
    if not (background.count > 0).any():
        raise CcdFailure(Reason.NO_DATA, "no superpixel of the CCD has two pixels that can be used")
    for _ in range(settings.mask_passes):
        sky = _sky_pixels(image, usable, background, settings, threads)
        masked = _measure_mesh(image, sky, settings, threads)
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


def _usable_pixels(
    image: NDArray[np.float32], mask: NDArray[np.int32], threads: int
) -> NDArray[np.bool_]:
    """Return the pixels that measure light."""
    usable, mask = np.empty(image.shape, bool), np.ascontiguousarray(mask)
    on_rows(_find_usable, (image, mask, usable), np.int32(NOT_MEASURED), threads=threads)
    return usable


def _measure_mesh(
    image: NDArray[np.float32],
    sky: NDArray[np.bool_],
    settings: BackgroundSettings,
    threads: int,
) -> Background:
    """Return a Background with the clipped statistics of all superpixels."""
    edges = [_superpixel_edges(n, max(1, round(n / settings.mesh_size))) for n in image.shape]
    statistics = clipped_mesh(image, sky, *edges, settings.clip_sigma, threads)
    return Background(image.shape, *statistics, settings.min_fraction, settings.filter_size)


def _sky_pixels(
    image: NDArray[np.float32],
    usable: NDArray[np.bool_],
    background: Background,
    settings: BackgroundSettings,
    threads: int = 1,
) -> NDArray[np.bool_]:
    """Return the usable pixels outside of blocks that are above the sky, and of those beside."""
    surfaces = background._model(), *background._variance()
    sky = usable.copy()
    for size in (settings.small_block, settings.large_block):
        # large blocks look only at what the small ones have left, or every star would fill one
        total, count = _block_sums(image, sky, *surfaces, size, threads)
        # sums of extreme values may be infinite, or none
        enough = (count >= _BLOCK_FRACTION * size**2) & np.isfinite(total)
        if not enough.any():
            continue
        block = (total / np.sqrt(np.maximum(count, 1))).astype(np.float32)
        # noise that is correlated, or the confusion of faint sources, widens the distribution
        _, variance, _ = clipped_statistics(block[enough], 3.0)
        found = enough & (block > settings.mask_sigma * max(1.0, np.sqrt(variance)))
        _clear_blocks(sky, ndimage.binary_dilation(found, np.ones((3, 3), dtype=bool)), size)
    return sky


def _splines(edges: NDArray[np.int64], degree: int) -> tuple[_Splines, NDArray[np.float64]]:
    """Return the splines over an axis, and the matrix from padded superpixels to coefficients."""
    centres = 0.5 * (edges[:-1] + edges[1:] - 1.0)
    first, last = edges[1] - edges[0], edges[-1] - edges[-2]
    nodes = np.concatenate([[centres[0] - first], centres, [centres[-1] + last]])
    degree = min(degree, nodes.size - 1)
    spline = interpolate.make_interp_spline(nodes, np.eye(nodes.size), k=degree)
    place = np.arange(edges[-1], dtype=float)
    matrix = interpolate.BSpline.design_matrix(place, spline.t, degree)
    start = matrix.indices.reshape(-1, degree + 1)[:, 0].astype(np.int64)
    weight = np.zeros((4, place.size))
    weight[: degree + 1] = matrix.data.reshape(-1, degree + 1).T
    changes = np.flatnonzero(np.diff(start, prepend=-1))
    padded = np.zeros((nodes.size + 3 - degree, nodes.size))
    padded[: nodes.size] = spline.c
    return _Splines(weight, np.append(changes, edges[-1]), start[changes]), padded


def _rendered(surface: _Surface, threads: int = 1) -> NDArray[np.float32]:
    """Return the values of a surface at all pixels."""
    pixels = np.empty((surface.rows.weight.shape[1], surface.columns.weight.shape[1]), np.float32)

    def work(first: int, last: int) -> None:
        _render(surface, pixels, first, last)

    over_rows(work, len(pixels), threads)
    return pixels


def _block_sums(
    image: NDArray[np.float32],
    use: NDArray[np.bool_],
    model: _Surface,
    variance: _Surface,
    floor: float,
    size: int,
    threads: int = 1,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return sums over blocks of (image - model) / sigma of pixels to use, and their numbers.

    Blocks at the far edges may be incomplete.
    """
    shape = tuple(-(-n // size) for n in image.shape)
    total, count = np.zeros(shape), np.zeros(shape, np.int64)

    def work(first: int, last: int) -> None:
        _sum_blocks(image, use, model, variance, floor, size, total, count, first, last)

    over_rows(work, len(total), threads, least=1)
    return total, count


@njit(nogil=True)
def _find_usable(image, mask, usable, planes):
    """Write which pixels are finite and have none of these planes."""
    ny, nx = image.shape
    for y in range(ny):
        for x in range(nx):
            # infinity minus itself is NaN, as NaN minus itself
            usable[y, x] = ((mask[y, x] & planes) == 0) & (image[y, x] - image[y, x] == 0)


@njit(nogil=True)
def _clear_blocks(sky, found, size):
    """Set pixels of blocks that were found to False."""
    for y in range(sky.shape[0]):
        for i in np.nonzero(found[y // size])[0]:
            sky[y, i * size : (i + 1) * size] = False


@njit(nogil=True)
def _render_row(surface, coefficients, y_span, y, row):
    """Write the values of a surface along a row of pixels; there is room for coefficients."""
    first = surface.rows.first[y_span]
    for i in range(len(coefficients)):
        coefficients[i] = 0.0
        for t in range(4):
            coefficients[i] += surface.rows.weight[t, y] * surface.coefficients[first + t, i]
    columns = surface.columns
    for span in range(len(columns.first)):
        i = columns.first[span]
        a, b = coefficients[i], coefficients[i + 1]
        c, d = coefficients[i + 2], coefficients[i + 3]
        start, end = columns.edges[span], columns.edges[span + 1]
        part, weight = row[start:end], columns.weight
        of_a, of_b = weight[0, start:end], weight[1, start:end]
        of_c, of_d = weight[2, start:end], weight[3, start:end]
        for x in range(len(part)):
            part[x] = (of_a[x] * a + of_b[x] * b) + (of_c[x] * c + of_d[x] * d)


@njit(nogil=True)
def _render(surface, pixels, first, last):
    """Write the values of a surface on some rows."""
    coefficients, edges = np.empty(surface.coefficients.shape[1]), surface.rows.edges
    for span in range(len(surface.rows.first)):
        for y in range(max(edges[span], first), min(edges[span + 1], last)):
            _render_row(surface, coefficients, span, y, pixels[y])


@njit(nogil=True)
def _span_of(splines, y):
    """Return the span of the splines that a row is in."""
    span = 0
    while y >= splines.edges[span + 1]:
        span += 1
    return span


@njit(nogil=True, error_model="numpy")
def _sum_blocks(image, use, model, variance, floor, size, total, count, first, last):
    """Sum the blocks of some rows of blocks."""
    ny, nx = image.shape
    coefficients = np.empty(model.coefficients.shape[1])
    variances = np.empty(variance.coefficients.shape[1])
    sky, noise2 = np.empty(nx), np.empty(nx, np.float32)
    column, number = np.empty(nx), np.empty(nx, np.int32)  # sums over the rows of a block
    lowest = np.float32(floor)
    for block in range(first, last):
        column[:], number[:] = 0.0, 0
        for y in range(block * size, min((block + 1) * size, ny)):
            _render_row(model, coefficients, _span_of(model.rows, y), y, sky)
            _render_row(variance, variances, _span_of(variance.rows, y), y, noise2)
            pixels, used = image[y], use[y]
            for x in range(nx):
                excess = np.float32(pixels[x] - sky[x]) / math.sqrt(max(noise2[x], lowest))
                column[x] += excess if used[x] else np.float32(0.0)
                number[x] += used[x]
        for x in range(nx):
            total[block, x // size] += column[x]
            count[block, x // size] += number[x]
