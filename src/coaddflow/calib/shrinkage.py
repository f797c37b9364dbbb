"""Master frames without the noise of the few exposures that they are made from.

A mean of five bias frames has a fifth of the variance of one of them, and adds it to every
exposure. Most of it is no structure of the detector. A master is therefore taken to be the sum of
structure along columns, along rows, on patches of some pixels, and of single pixels; how far the
last two stand out of the noise is learnt from the frame itself. Their amplitudes, in units of
their errors, are described by a mixture of normal distributions of many widths, and each value is
replaced by its expectation under this prior [1]_: what is noise becomes zero, what is
significant (hot pixels, bad columns, patterns of the readout) stays as it is.

References
----------
.. [1] Stephens 2017, Biostatistics 18, 275 (adaptive shrinkage with empirical Bayes).
.. [2] Smyth 2004, Stat. Appl. Genet. Mol. Biol. 3, 3 (variances from few values, moderated).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from coaddflow.image.masked_image import MaskedImage

_LINE = 129
"""Pixels along a column or a row over which their structure is averaged."""

_PIECE = 64
"""Rows over which the first guess of a column, a median, is taken."""

_PATCH = 9
"""Side of the patches, pixels."""

_VARIANCE_PIXELS, _VARIANCE_WEIGHT = 65, 30.0
"""The variance of a pixel is that of the area around it, with the weight of so many frames."""

_OUTLIER = 4.0
"""Values enter means with no more than so many errors of the pixels around."""

_NARROWEST, _WIDTH_RATIO, _LARGEST, _BINS, _ROUNDS = 0.25, 2.0**0.5, 12.0, 240, 200
"""Widths of the prior in units of the error; values beyond the largest are kept as they are."""


def without_noise(master: MaskedImage, n_frames: int) -> MaskedImage:
    """Return a master frame whose noise is shrunk, and whose structure is kept.

    Parameters
    ----------
    master : MaskedImage
        A mean of frames, with the variance of each pixel from their scatter. Pixels that are not
        finite, or flagged, stay as they are.
    n_frames : int
        How many frames it is made from.

    Returns
    -------
    MaskedImage
        Image and variance of the expectation of each pixel; the mask is that of the master.
    """
    image = master.image
    good = np.isfinite(image) & np.isfinite(master.variance) & (master.mask == 0)
    if np.count_nonzero(good) < _LINE or not (master.variance[good] > 0).any():
        return master
    variance, common = _moderated(master.variance, good, n_frames)
    error = np.sqrt(variance)
    # a cosmic ray that three frames cannot clip has a large error of its own
    largest = _OUTLIER * np.sqrt(common)
    model = _column_medians(image, good)
    rest = np.where(good, image - model, np.float32(0))
    for axis in (0, 1):
        line = _mean(np.clip(rest, -largest, largest), good, _LINE, axis)
        model += line
        rest -= np.where(good, line, 0)
    patch = _mean(np.clip(rest, -largest, largest), good, _PATCH)
    kept, _ = _expectation(patch, error / np.float32(_PATCH), good)
    model += kept
    rest -= np.where(good, kept, 0)
    kept, spread = _expectation(rest, error, good)
    # what the means along columns and rows add
    spread += 2 * variance / _LINE
    return MaskedImage(
        np.where(good, model + kept, image),
        np.where(good, spread, master.variance),
        master.mask,
    )


def _moderated(
    variance: NDArray[np.float32], good: NDArray[np.bool_], n_frames: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return variances of pixels, most of which is that of the pixels around [2]_; and that."""
    typical = float(np.median(variance[good]))
    common = _mean(np.minimum(np.where(good, variance, 0), 10 * typical), good, _VARIANCE_PIXELS)
    common = np.maximum(common, 1e-3 * typical + 1e-30)
    own = np.where(good, variance, common)
    freedom = n_frames - 1
    moderated = (_VARIANCE_WEIGHT * common + freedom * own) / np.float32(_VARIANCE_WEIGHT + freedom)
    return moderated, common


def _column_medians(image: NDArray[np.float32], good: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return medians of pieces of columns, shape (ny, nx)."""
    middle = np.float32(np.median(image[good]))
    filled = np.where(good, image, middle)
    starts = range(0, len(image), _PIECE)
    pieces = [np.median(filled[y : y + _PIECE], axis=0) for y in starts]
    return np.repeat(pieces, _PIECE, axis=0)[: len(image)].astype(np.float32)


def _mean(
    values: NDArray[np.float32], good: NDArray[np.bool_], size: int, axis: int | None = None
) -> NDArray[np.float32]:
    """Return means of the good pixels over lines along an axis, or over squares."""
    axes = (0, 1) if axis is None else (axis,)
    total, weight = np.where(good, values, np.float32(0)), good.astype(np.float32)
    whole = good.all()
    for one in axes:
        # in double precision: running sums in single precision drift
        total = ndimage.uniform_filter1d(total, size, axis=one, output=np.float64, mode="reflect")
        if not whole:
            weight = ndimage.uniform_filter1d(
                weight, size, axis=one, output=np.float64, mode="reflect"
            )
    return (total / np.maximum(weight, 1e-6)).astype(np.float32)


def _expectation(
    values: NDArray[np.float32], error: NDArray[np.float32], good: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return what values are expected to be without their errors, and the variance of that.

    The prior is a mixture of normal distributions of mean zero, with weights fitted to the values
    by expectation maximisation [1]_.
    """
    z = np.abs(values / error)
    edges = np.linspace(0.0, _LARGEST, _BINS + 1)
    number, _ = np.histogram(z[good], edges)
    middle = (edges[1:] + edges[:-1]) / 2
    n_widths = int(np.ceil(np.log(2 * _LARGEST / _NARROWEST) / np.log(_WIDTH_RATIO))) + 1
    widths = np.concatenate([[0.0], _NARROWEST * _WIDTH_RATIO ** np.arange(n_widths)])
    total = 1.0 + widths**2
    density = np.exp(-0.5 * middle[:, None] ** 2 / total) / np.sqrt(total)
    share = np.full(len(widths), 1.0 / len(widths))
    for _ in range(_ROUNDS):
        belongs = share * density
        belongs /= belongs.sum(axis=1, keepdims=True)
        share = number @ belongs / max(number.sum(), 1)
    belongs = share * density + 1e-300
    belongs /= belongs.sum(axis=1, keepdims=True)
    kept = widths**2 / total
    factor = belongs @ kept
    spread = factor + middle**2 * (belongs @ kept**2 - factor**2)
    # a value larger than those of the table is no noise
    factor = np.interp(z, middle, factor, right=1.0).astype(np.float32)
    spread = np.interp(z, middle, spread, right=1.0).astype(np.float32)
    return values * factor, spread * error**2
