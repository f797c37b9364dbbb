"""How good a coadd is: positions, fluxes and noise, measured on its pixels.

References
----------
.. [1] Howell 1989, PASP 101, 616 (growth curves).
.. [2] Fruchter & Hook 2002, PASP 114, 144, section 7 (correlated noise of resampled images).
"""

from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.image.statistics import mad_sigma
from coaddflow.measure.background import estimate_background
from coaddflow.measure.detection import SourceFlag, common_size, detect_sources, measure_seeing
from coaddflow.measure.photometry import aperture_correction, aperture_fluxes
from coaddflow.settings.background import BackgroundSettings
from coaddflow.settings.detection import DetectionSettings
from coaddflow.settings.photometry import PhotometrySettings

_SPOILT = (
    SourceFlag.BLENDED
    | SourceFlag.EDGE
    | SourceFlag.SATURATED
    | SourceFlag.BAD_PIXELS
    | SourceFlag.NO_CENTROID
)
_NEIGHBOUR_RADIUS = 5.0
"""Distance to the next detected source of an isolated star, in FWHM."""

_MIN_SIGNAL_TO_NOISE = 50.0
"""Fainter sources are not compared with stars."""

_MATCH_RADIUS = 1.0
"""Largest distance of a source from its star, pixels."""

_BLOCK = 12
"""Side of the blocks whose means tell how correlated the noise is, pixels."""


@dataclass(frozen=True)
class StarResiduals:
    """Measured minus true, for the isolated stars of a coadd; arrays have the shape (n,)."""

    index: NDArray[np.int64]
    """Rows of the catalogue."""
    dx: NDArray[np.float64]
    dy: NDArray[np.float64]
    """Offsets in pixels."""
    flux: NDArray[np.float64]
    flux_error: NDArray[np.float64]
    """Total fluxes and their errors, in the unit of the image."""
    true_flux: NDArray[np.float64]
    """Fluxes of the catalogue."""
    fwhm: float
    """FWHM of the stars, pixels."""

    def position_rms(self) -> float:
        """Return the root mean square offset of one axis, pixels."""
        return float(np.sqrt(np.mean(np.concatenate([self.dx, self.dy]) ** 2)))

    def flux_bias(self) -> tuple[float, float]:
        """Return the median of flux / true flux - 1, and its standard error."""
        ratio = self.flux / self.true_flux - 1.0
        middle = float(np.median(ratio))
        return middle, 1.2533 * mad_sigma(ratio, middle) / np.sqrt(ratio.size)


def detect_on(masked_image: MaskedImage) -> tuple[Table, float]:
    """Return the sources of an image whose sky is zero, and the FWHM of its stars in pixels."""
    settings = DetectionSettings()
    fwhm = measure_seeing(masked_image, settings)
    return detect_sources(masked_image, fwhm, settings).sources, fwhm


def check_stars(
    masked_image: MaskedImage, x: ArrayLike, y: ArrayLike, true_flux: ArrayLike
) -> StarResiduals:
    """Measure isolated stars of a coadd whose true places and fluxes are known [1]_.

    Parameters
    ----------
    masked_image : MaskedImage
        The coadd; its sky is zero.
    x, y, true_flux : array_like, shape (n,)
        True positions of stars (pixels, 0-based) and total fluxes in the unit of the image.
    """
    photometry = PhotometrySettings()
    sources, fwhm = detect_on(masked_image)
    xy = np.column_stack([sources["x"], sources["y"]])
    alone = cKDTree(xy).query(xy, k=2)[0][:, 1] > _NEIGHBOUR_RADIUS * fwhm
    good = alone & ((np.asarray(sources["flags"]) & int(_SPOILT)) == 0)
    good &= np.asarray(sources["signal_to_noise"]) > _MIN_SIGNAL_TO_NOISE
    fwhm = common_size(sources["fwhm"][good])
    distance, index = cKDTree(np.column_stack([x, y])).query(xy[good])
    matched = distance < _MATCH_RADIUS
    found, index = xy[good][matched], index[matched]
    radius = photometry.radii[photometry.standard] * fwhm
    measured = aperture_fluxes(masked_image, *found.T, [radius])
    correction = aperture_correction(masked_image, *found.T, radius, photometry.total_radius * fwhm)
    return StarResiduals(
        index=index,
        dx=found[:, 0] - np.asarray(x)[index],
        dy=found[:, 1] - np.asarray(y)[index],
        flux=measured.flux[:, 0] * correction,
        flux_error=measured.error[:, 0] * correction,
        true_flux=np.asarray(true_flux, float)[index],
        fwhm=fwhm,
    )


def empty_sky(masked_image: MaskedImage, grow: int = 8) -> NDArray[np.bool_]:
    """Return the pixels that were measured and are far from all sources, shape (ny, nx).

    Sources are enlarged by ``grow`` pixels.
    """
    measured = np.isfinite(masked_image.image) & ~masked_image.has_any(MaskPlane.NO_DATA)
    significance = np.where(measured, masked_image.image, 0.0) / np.sqrt(
        np.where(measured, masked_image.variance, np.inf)
    )
    smooth = ndimage.gaussian_filter(significance, 2.0)
    sources = smooth > np.median(smooth[measured]) + 3.0 * mad_sigma(smooth[measured])
    sources |= masked_image.has_any(MaskPlane.DETECTED | MaskPlane.SAT)
    return measured & ~ndimage.binary_dilation(sources, iterations=grow)


def sky_noise(masked_image: MaskedImage, mesh_size: int, grow: int) -> float:
    """Return the standard deviation of empty sky, with what is left of the sky taken away.

    The remaining sky is fitted in superpixels of ``mesh_size``; for ``grow`` see `empty_sky`.
    """
    deviation = masked_image.image - _sky(masked_image, mesh_size)
    return mad_sigma(deviation[empty_sky(masked_image, grow)])


def sky_chi(masked_image: MaskedImage) -> float:
    """Return the standard deviation of empty sky in units of what the variance plane says.

    It is 1 for a correct variance plane: correlations between pixels do not change the noise
    of single pixels, which the variance plane is about, but that of sums [2]_.
    """
    with np.errstate(invalid="ignore"):
        chi = (masked_image.image - _sky(masked_image)) / np.sqrt(masked_image.variance)
    return mad_sigma(chi[empty_sky(masked_image)])


def sky_covariance(masked_image: MaskedImage) -> float:
    """Return the variance of means of blocks over that of uncorrelated pixels [2]_.

    This is the measured covariance factor, in variance; blocks with a source are left out.
    """
    empty = empty_sky(masked_image)
    ny, nx = (size // _BLOCK for size in empty.shape)
    cut = (slice(ny * _BLOCK), slice(nx * _BLOCK))
    shape = (ny, _BLOCK, nx, _BLOCK)
    whole = empty[cut].reshape(shape).all(axis=(1, 3))
    deviation = (masked_image.image - _sky(masked_image))[cut].reshape(shape)
    means = deviation.mean(axis=(1, 3))[whole]
    expected = masked_image.variance[cut].reshape(shape).mean(axis=(1, 3))[whole] / _BLOCK**2
    return mad_sigma(means / np.sqrt(expected)) ** 2


def _sky(masked_image: MaskedImage, mesh_size: int = 128) -> NDArray[np.float32]:
    return estimate_background(masked_image, BackgroundSettings(mesh_size=mesh_size)).model()
