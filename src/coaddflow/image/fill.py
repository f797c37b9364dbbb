"""Small masked regions filled from the pixels around them.

Filled pixels keep later convolutions and resampling kernels from spreading a defect or a cosmic
ray; they hold no measurement, and say so by the plane INTRP and by their variance. Saturated
pixels are bridged too, across the direction of bleeding [1]_: the edge of a plateau of full wells
would ring in every resampling kernel, and bleeding, which runs down the columns, would shift a
star from its place.

References
----------
.. [1] Juric et al. 2017, ASP Conf. Ser. 512, 279 (interpolation over saturated pixels in the
   pipeline of the LSST).
"""

import numpy as np

from coaddflow.compiled import njit
from coaddflow.image.masked_image import MaskedImage, MaskPlane

_NEVER_USED = MaskPlane.NO_DATA | MaskPlane.SAT | MaskPlane.BAD | MaskPlane.CR


def fill_masked(masked_image: MaskedImage, planes: MaskPlane, max_gap: int = 5) -> int:
    """Fill masked pixels by straight lines along rows and columns, in place.

    Along the row and along the column of a pixel the nearest good pixels on both sides are
    joined by a line, if they are not more than ``max_gap`` masked pixels apart. Where both
    directions have such a line, the mean weighted with the inverse cubes of the gaps is taken
    (the error of a line over a curved profile grows with the square of the gap, and the nearer
    pixels of the shorter line are better known). Pixels with neither stay as they are: larger
    holes are not filled.

    Parameters
    ----------
    masked_image : MaskedImage
        Changed in place: image, variance, and the plane INTRP. The other planes stay, so that
        coadds can still leave the pixels out.
    planes : MaskPlane
        Pixels with one of these are filled. Pixels that are BAD, CR, SAT or NO_DATA are never
        used to fill others.
    max_gap : int
        Longest run of masked pixels that is bridged.

    Returns
    -------
    int
        Number of pixels filled.

    Notes
    -----
    The variance is that of the interpolated value, plus that of a single pixel (what the true
    pixel would have scattered by), plus the square of the error of the line where the image is
    curved: the lines through the two pixels on either side, drawn on into the gap, miss the
    bridging line by about as much as the true profile does. It counts where it is larger than
    three times its noise. The missing peak of a star is not restored, but its variance is large.
    """
    return _fill(masked_image, planes, max_gap, along_columns=True)


def fill_saturated(masked_image: MaskedImage, max_gap: int = 100) -> int:
    """Fill saturated pixels by straight lines along their rows, in place; see `fill_masked`."""
    return _fill(masked_image, MaskPlane.SAT, max_gap, along_columns=False)


def _fill(masked_image: MaskedImage, planes: MaskPlane, max_gap: int, along_columns: bool) -> int:
    image, variance = masked_image.image, masked_image.variance
    usable = ~masked_image.has_any(planes | _NEVER_USED)
    usable &= np.isfinite(image) & np.isfinite(variance)
    y, x = np.nonzero(masked_image.has_any(planes))
    values, variances = np.empty(len(y), np.float32), np.empty(len(y), np.float32)
    _bridge(image, variance, usable, y, x, max_gap, along_columns, values, variances)
    done = np.isfinite(values)
    y, x = y[done], x[done]
    image[y, x], variance[y, x] = values[done], variances[done]
    masked_image.mask[y, x] |= np.int32(MaskPlane.INTRP)
    return len(y)


@njit()
def _bridge(image, variance, usable, y, x, max_gap, along_columns, values, variances):
    """Find values and variances at (y, x); NaN where no line reaches."""
    for i in range(len(y)):
        row = _line(image[y[i]], variance[y[i]], usable[y[i]], x[i], max_gap)
        column = (np.nan, np.nan, np.nan, np.nan, 0.0)
        if along_columns:
            column = _line(image[:, x[i]], variance[:, x[i]], usable[:, x[i]], y[i], max_gap)
        values[i], variances[i] = _join(row, column)


@njit()
def _line(pixels, variance, usable, position, max_gap):
    """Return value, its variance, that of a single pixel, squared error by curvature, and gap."""
    left = position - 1
    while left >= 0 and position - left <= max_gap and not usable[left]:
        left -= 1
    right = position + 1
    while right < len(pixels) and right - position <= max_gap and not usable[right]:
        right += 1
    gap = right - left - 1
    if left < 0 or right >= len(pixels) or gap > max_gap or not (usable[left] and usable[right]):
        return np.nan, np.nan, np.nan, np.nan, 0.0
    t = (position - left) / (right - left)
    value = (1 - t) * pixels[left] + t * pixels[right]
    error = (1 - t) ** 2 * variance[left] + t**2 * variance[right]
    single = (variance[left] + variance[right]) / 2
    curvature = 0.0
    noise = 0.0
    if left > 0 and usable[left - 1]:
        reach = (1 - t) * (position - left)
        curvature += reach * (pixels[left] - pixels[left - 1])
        noise += reach**2 * (variance[left] + variance[left - 1])
    if right < len(pixels) - 1 and usable[right + 1]:
        reach = t * (right - position)
        curvature += reach * (pixels[right] - pixels[right + 1])
        noise += reach**2 * (variance[right] + variance[right + 1])
    curved = curvature**2 if curvature**2 > 9 * noise else 0.0
    return value, error, single, curved, float(gap)


@njit()
def _join(row, column):
    """Return value and variance from the lines along row and column."""
    if row[4] == 0 and column[4] == 0:
        return np.nan, np.nan
    a = row[4] ** -3 if row[4] > 0 else 0.0
    b = column[4] ** -3 if column[4] > 0 else 0.0
    value, variance = 0.0, 0.0
    for line, weight in ((row, a / (a + b)), (column, b / (a + b))):
        if weight > 0:
            value += weight * line[0]
            variance += weight**2 * line[1] + weight * (line[2] + line[3])
    return value, variance
