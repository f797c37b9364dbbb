"""A picture of a tract: grey from one band, in colours from two or three.

North is up and east is left. The brightness is an inverse hyperbolic sine of the mean over the
bands, which shows the noise of the sky and the cores of stars at once, and the ratio of the bands
is kept at every brightness, so that bright stars do not turn white [1]_. Where a band is saturated
the bands do not tell a colour: the cores of such stars have that of the light around them.

References
----------
.. [1] Lupton et al. 2004, PASP 116, 133, equations 2-4.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from coaddflow.files import atomic_path
from coaddflow.geometry.box import Box, enclosing_box, part_of
from coaddflow.image.fits_pixels import read_pixels
from coaddflow.image.masked_image import MaskPlane, opened_fits
from coaddflow.image.statistics import mad_sigma
from coaddflow.runtime.resources import PICTURE_SIDE
from coaddflow.skymap.tract import Tract
from coaddflow.tables.coadds import coadd_files, coadd_remedy
from coaddflow.warp.files import part_box

_SOFTENING = 8.0
"""Q of [1]_: linear up to about 1 / Q of white, logarithmic beyond."""

_NOISE_PER_WHITE = 20.0
"""Standard deviations of the sky to white, were the scale linear all the way."""

_NO_DATA_COLOUR = (72, 72, 84)

_SURROUNDINGS = 3
"""Width of the rim around saturated pixels that their colour is taken from."""

_WAVELENGTH_ORDER = "KHJYyzIiRrVgGBUu"
"""Filters from red to blue."""


def make_picture(path: str | Path, tract: Tract, coadds: Sequence[str | Path]) -> None:
    """Make the picture of a tract from its coadds in all bands: the whole job.

    Parameters
    ----------
    path : str or Path
        Final name of the picture.
    tract : Tract
        For the place of the patches.
    coadds : sequence of str or Path
        ``.../{band}/{tract}/{patch}.fits``, or the list of a band's coadds
        (``.../{band}/{tract}.ecsv``).
    """
    by_band: dict[str, dict[str, Path]] = {}
    for coadd in coadd_files(coadds):
        by_band.setdefault(coadd.parts[-3], {})[coadd.stem] = coadd
    write_picture(path, tract, {band: by_band[band] for band in reddest_first(by_band)})


def reddest_first(bands: Iterable[str]) -> list[str]:
    """Return bands in the order of the wavelengths that their first letters stand for.

    Bands with other names come last, in the order of their names.
    """
    return sorted(bands, key=lambda band: (_WAVELENGTH_ORDER.find(band[0]) % 100, band))


def bin_patch(
    image: NDArray[np.floating], corner: tuple[int, int], factor: int
) -> tuple[NDArray[np.float64], NDArray[np.int64], tuple[int, int]]:
    """Add up the pixels of a patch over bins that begin at multiples of a factor on the tract.

    Parameters
    ----------
    image : ndarray, shape (ny, nx)
        Pixels; what is not finite is left out.
    corner : tuple of int
        Tract pixel (x0, y0) of the first pixel.
    factor : int
        Side of the bins.

    Returns
    -------
    sums : ndarray of float64, shape (my, mx)
        Sum over the finite pixels of each bin.
    counts : ndarray of int64, shape (my, mx)
        Their number.
    first : tuple of int
        Column and row of the first bin on the tract's grid of bins.
    """
    finite = np.isfinite(image)
    sums, counts = np.where(finite, image, 0.0).astype(float), finite.astype(np.int64)
    for axis, start in ((0, corner[1]), (1, corner[0])):
        size = image.shape[axis]
        bins = (start + np.arange(size)) // factor
        begins = np.flatnonzero(np.diff(bins, prepend=bins[0] - 1))
        sums = np.add.reduceat(sums, begins, axis=axis)
        counts = np.add.reduceat(counts, begins, axis=axis)
    return sums, counts, (corner[0] // factor, corner[1] // factor)


def lupton_rgb(
    channels: Sequence[NDArray], saturated: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Turn one to three images into colours.

    Parameters
    ----------
    channels : sequence of ndarray, each of shape (ny, nx)
        Images on a common flux scale, from the reddest band to the bluest; NaN where there is
        nothing. Of two, the mean serves as green. Where only some bands have data, the mean of
        these stands for the others.
    saturated : ndarray of bool, shape (ny, nx), optional
        Where at least one band is saturated: the colour there is that of the surroundings, and
        there are no holes in them.

    Returns
    -------
    ndarray of uint8, shape (ny, nx, 3)
        Red, green, blue; a neutral dark blue-grey where no band has data.
    """
    stack = np.stack([np.asarray(channel, float) for channel in channels])
    known = np.isfinite(stack)
    covered = known.any(axis=0)
    if not covered.any():
        return np.full((*covered.shape, 3), _NO_DATA_COLOUR, np.uint8)
    stack = np.stack([_without_sky(channel) for channel in stack])
    mean = np.where(known, stack, 0.0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    stack = np.where(known, stack, mean)
    if saturated is not None and saturated.any():
        mean = _with_colour_of_surroundings(stack, saturated & covered, covered)
    if len(stack) == 1:
        stack = np.repeat(stack, 3, axis=0)
    elif len(stack) == 2:
        stack = np.stack([stack[0], mean, stack[1]])
    noise = _noise(mean[covered])
    white = _NOISE_PER_WHITE * noise
    # one sigma below the sky is black
    brightness = np.arcsinh(_SOFTENING * np.clip(mean + noise, 0.0, None) / white) / _SOFTENING
    colours = np.clip(stack + noise, 0.0, None)
    total = colours.mean(axis=0)
    colours *= np.where(total > 0, brightness / np.where(total > 0, total, 1.0), 0.0)
    # too bright a channel takes the others down with it: the colour stays
    colours /= np.maximum(colours.max(axis=0), 1.0)
    picture = np.rint(255.0 * np.moveaxis(colours, 0, -1)).astype(np.uint8)
    picture[~covered] = _NO_DATA_COLOUR
    return picture


def _with_colour_of_surroundings(
    stack: NDArray[np.float64], saturated: NDArray[np.bool_], covered: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Give saturated pixels the colour of the light around them, in place; return the mean."""
    labels, _ = ndimage.label(saturated, np.ones((3, 3)))
    for number, region in enumerate(ndimage.find_objects(labels), start=1):
        box = tuple(
            slice(max(part.start - _SURROUNDINGS, 0), part.stop + _SURROUNDINGS) for part in region
        )
        core = labels[box] == number
        rim = ndimage.binary_dilation(core, np.ones((3, 3)), iterations=_SURROUNDINGS)
        rim &= ~saturated[box] & covered[box]
        light = stack[:, *box]
        around = np.maximum(light[:, rim].sum(axis=1), 0.0)
        if not around.sum() > 0:
            continue
        brightness = _without_holes(light.mean(axis=0))[core]
        light[:, core] = brightness * (around / around.mean())[:, None]
    return stack.mean(axis=0)


def _without_holes(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return an image in which what is darker than all around it is as bright as the way out."""
    filled = np.full(image.shape, image.max())
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        filled[edge] = image[edge]
    while True:
        lower = np.maximum(ndimage.grey_erosion(filled, size=3), image)
        if np.array_equal(lower, filled):
            return filled
        filled = lower


def _without_sky(channel: NDArray) -> NDArray:
    """Subtract the median, which is sky in all but the most crowded of fields."""
    finite = channel[np.isfinite(channel)]
    return channel - np.median(finite) if finite.size else channel


def _noise(values: NDArray) -> float:
    """Return the standard deviation of the sky from the scatter below the median."""
    middle = np.median(values)
    below = values[values < middle]
    return mad_sigma(below, middle) if below.size else 1.0


def write_picture(
    path: str | Path,
    tract: Tract,
    coadds: Mapping[str, Mapping[str, str | Path]],
    max_size: int = PICTURE_SIDE,
) -> None:
    """Write a PNG of the coadds of a tract.

    Parameters
    ----------
    path : str or Path
        Final name.
    tract : Tract
        For the place of the patches.
    coadds : mapping
        For each band, from the reddest to the bluest, the file of each patch. Of more than three
        bands the first, the middle and the last are taken.
    max_size : int
        Largest number of columns and of rows.

    Raises
    ------
    InputError
        If a coadd cannot be read.
    """
    bands = list(coadds)
    if len(bands) > 3:
        bands = [bands[0], bands[len(bands) // 2], bands[-1]]
    filled = [patch for band in bands for patch, file in coadds[band].items() if _has_data(file)]
    if not filled:
        filled = [patch for band in bands for patch in coadds[band]]
    box = enclosing_box(tract.patch(patch).inner_box for patch in filled)
    factor = max(-(-(box[2] - box[0]) // max_size), -(-(box[3] - box[1]) // max_size), 1)
    binned = [_bin_band(tract, coadds[band], set(filled), box, factor) for band in bands]
    saturated = np.any([full for _, full in binned], axis=0)
    *channels, saturated = _crop([image for image, _ in binned], saturated)
    picture = lupton_rgb(channels, saturated)
    with atomic_path(path) as temporary:
        # the first row of a PNG is at the top, that of an image at the bottom
        Image.fromarray(picture[::-1]).save(temporary, format="PNG", optimize=True)


def _crop(channels: list[NDArray], saturated: NDArray[np.bool_]) -> list[NDArray]:
    """Cut off margins in which no band has data; saturation is the last that is returned."""
    covered = np.any([np.isfinite(channel) for channel in channels], axis=0)
    if not covered.any():
        return [*channels, saturated]
    rows, columns = (np.flatnonzero(covered.any(axis=axis)) for axis in (1, 0))
    part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    return [channel[part] for channel in (*channels, saturated)]


def _has_data(path: str | Path) -> bool:
    """Return whether any exposure went into a coadd."""
    with opened_fits(path, "coadd", coadd_remedy(path)) as (_, hdus):
        return hdus[0].header.get("NEXP", 1) > 0


def _bin_band(
    tract: Tract, files: Mapping[str, str | Path], patches: set[str], box: Box, factor: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the mean of a band over bins of the box, NaN where nothing is; and saturated bins."""
    first = (box[0] // factor, box[1] // factor)
    shape = ((box[3] - 1) // factor - first[1] + 1, (box[2] - 1) // factor - first[0] + 1)
    sums, counts = np.zeros(shape), np.zeros(shape, np.int64)
    saturated = np.zeros(shape, bool)
    for patch, path in sorted(files.items()):
        if patch not in patches:
            continue
        inner = tract.patch(patch).inner_box
        image, full = _read_inner(path, inner)
        part, part_counts, corner = bin_patch(image, inner[:2], factor)
        column, row = corner[0] - first[0], corner[1] - first[1]
        at = slice(row, row + part.shape[0]), slice(column, column + part.shape[1])
        sums[at] += part
        counts[at] += part_counts
        saturated[at] |= bin_patch(full, inner[:2], factor)[0] > 0
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), saturated


def _read_inner(path: str | Path, inner: Box) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Read the inner box of a patch's coadd, and where it is saturated."""
    with opened_fits(path, "coadd", coadd_remedy(path)) as (stream, hdus):
        hdu = hdus["IMAGE"]
        part = part_of(part_box(hdu.header, hdu.shape), inner)
        # whole planes: `section` would read row by row
        image = np.asarray(read_pixels(stream, hdu)[part], np.float32)
        if image.shape != (inner[3] - inner[1], inner[2] - inner[0]):
            raise ValueError("it does not cover the patch")
        saturated = (read_pixels(stream, hdus["MASK"])[part] & np.int32(MaskPlane.SAT)) != 0
    return image, saturated
