"""Images of Moffat stars with exactly known fluxes, positions and shapes, for the tests."""

import numpy as np

from coaddflow.image.masked_image import MaskedImage


def moffat_stamp(dx, dy, fwhm, beta=3.5, e1=0.0, e2=0.0):
    """Return the Moffat profile of unit total flux at offsets (dx, dy) from its centre.

    The profile is the effective PSF (pixel included). e1, e2 are distortions: (a^2 - b^2) /
    (a^2 + b^2) along the axes and the diagonals; the area inside half maximum is that of fwhm.
    """
    alpha = fwhm / 2.0 / np.sqrt(2.0 ** (1.0 / beta) - 1.0)
    norm = np.sqrt(1.0 - e1**2 - e2**2)
    radius2 = ((1.0 - e1) * dx**2 + (1.0 + e1) * dy**2 - 2.0 * e2 * dx * dy) / norm
    return (beta - 1.0) / (np.pi * alpha**2) * (1.0 + radius2 / alpha**2) ** (-beta)


def add_stars(image, x, y, flux, fwhm, beta=3.5, e1=0.0, e2=0.0, radius=40):
    """Add stars to ``image`` in place; all parameters but radius may be arrays."""
    ny, nx = image.shape
    columns = np.broadcast_arrays(x, y, flux, fwhm, e1, e2)
    for xs, ys, fs, ws, e1s, e2s in zip(*(np.ravel(c) for c in columns), strict=True):
        x0, x1 = max(0, round(xs) - radius), min(nx, round(xs) + radius + 1)
        y0, y1 = max(0, round(ys) - radius), min(ny, round(ys) + radius + 1)
        if x0 < x1 and y0 < y1:
            yy, xx = np.mgrid[y0:y1, x0:x1]
            image[y0:y1, x0:x1] += fs * moffat_stamp(xx - xs, yy - ys, ws, beta, e1s, e2s)


def observed(sources, sky, rng, read_noise=5.0):
    """Return the MaskedImage of noiseless sources (electrons) on a sky, with photon noise."""
    expected = sources + sky + read_noise**2
    image = rng.normal(sources + sky, np.sqrt(expected))
    return MaskedImage(image, expected, np.zeros(image.shape, dtype=np.int32))


def random_field(
    shape, n_stars, rng, fwhm=4.0, sky=500.0, flux=(500.0, 3e5), margin=30, **shape_of
):
    """Return (MaskedImage, x, y, flux) of a field with fluxes log-uniform in a range."""
    ny, nx = shape
    x = rng.uniform(margin, nx - 1 - margin, n_stars)
    y = rng.uniform(margin, ny - 1 - margin, n_stars)
    fluxes = np.exp(rng.uniform(*np.log(flux), n_stars))
    sources = np.zeros(shape)
    add_stars(sources, x, y, fluxes, fwhm, **shape_of)
    return observed(sources, sky, rng), x, y, fluxes
