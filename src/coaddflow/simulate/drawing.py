"""Drawing of stars and galaxies, with GalSim.

A source is a Sersic profile or a point, convolved with the PSF at its place and integrated over
the pixels in Fourier space; its position is that of the camera's mapping, and the PSF is centred.

References
----------
.. [1] Rowe et al. 2015, Astronomy and Computing 10, 121 (GalSim).
"""

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coaddflow.errors import InputError
from coaddflow.instrument.camera import Detector
from coaddflow.simulate.optics import Optics
from coaddflow.simulate.settings import PsfSimulation
from coaddflow.simulate.sky import SkyCatalogue

FloatArray = NDArray[np.float64]

_MIN_RADIUS_FWHM = {"moffat": 5.0, "kolmogorov": 12.0}
"""Of the stamps of faint stars; beyond lies less than 0.4 percent of the light."""

_MAX_RADIUS = 1500.0
_KOLMOGOROV_FALL = 11.0 / 6.0
"""Half the power with which the wings of the Kolmogorov PSF fall."""


def load_galsim() -> ModuleType:
    """Import GalSim; raise InputError that says how to install it if it is missing."""
    try:
        import galsim
    except ImportError as error:
        raise InputError(
            "the simulator needs GalSim, which is not installed",
            remedy="run `pip install 'coaddflow[simulate]'`",
        ) from error
    return galsim


def draw_sources(
    image: NDArray[np.float32],
    optics: Optics,
    detector: Detector,
    sky: SkyCatalogue,
    electrons: FloatArray,
    faint_level: float,
) -> None:
    """Add sources to the image of a CCD.

    Parameters
    ----------
    image : ndarray of float32, shape (ny, nx)
        Electrons; changed in place.
    optics, detector
        Mapping and PSF of the exposure; the CCD, of ``optics.camera``.
    sky, electrons : SkyCatalogue, ndarray of float64, shape (n,)
        The sources and their total electrons.
    faint_level : float
        Electrons per pixel below which the wings of a source are left out.
    """
    galsim = load_galsim()
    nx, ny = detector.size
    canvas = galsim.Image(image, xmin=0, ymin=0)
    x, y = optics.sky_to_pixel(
        detector,
        *sky.position_at(optics.observation.mjd, optics.settings.refcat.epoch),
        sky.color,
    )
    inside = _near(x, y, nx, ny, _MAX_RADIUS) & (electrons > 0)
    sky, electrons, x, y = sky.select(inside), electrons[inside], x[inside], y[inside]
    fwhm, g1, g2 = optics.psf_at(detector, x, y)
    jacobian = optics.jacobian(detector, x, y)
    scale = np.sqrt(np.abs(np.linalg.det(jacobian)))
    radius = stamp_radius(optics.settings.psf, sky, electrons, fwhm / scale, scale, faint_level)
    for i in np.flatnonzero(_near(x, y, nx, ny, radius)):
        source = psf_profile(galsim, optics.settings.psf, fwhm[i] / scale[i], g1[i], g2[i])
        if sky.radius[i] > 0:
            source = galsim.Convolve(_galaxy(galsim, sky, i, jacobian[i]), source)
        half = int(np.ceil(radius[i]))
        x0, y0 = round(float(x[i])), round(float(y[i]))
        bounds = galsim.BoundsI(x0 - half, x0 + half, y0 - half, y0 + half) & canvas.bounds
        if not bounds.isDefined():
            continue
        source.withFlux(electrons[i]).drawImage(
            image=canvas[bounds], center=galsim.PositionD(x[i], y[i]), scale=1.0, add_to_image=True
        )


def stamp_radius(
    psf: PsfSimulation,
    sky: SkyCatalogue,
    electrons: FloatArray,
    fwhm: FloatArray,
    scale: FloatArray,
    faint_level: float,
) -> FloatArray:
    """Return the radii, in pixels, beyond which sources are fainter than a level.

    Parameters
    ----------
    electrons, fwhm, scale : ndarray of float64, shape (n,)
        Total electrons, FWHM of the PSF in pixels, arcsec per pixel.
    faint_level : float
        Electrons per pixel.
    """
    beta = psf.beta if psf.profile == "moffat" else _KOLMOGOROV_FALL
    core = fwhm / 2.0 / np.sqrt(2.0 ** (1.0 / beta) - 1.0)
    peak = electrons * max(beta - 1.0, 0.5) / (np.pi * core**2)
    star = core * np.maximum(peak / faint_level, 1.0) ** (0.5 / beta)
    star = np.maximum(star, _MIN_RADIUS_FWHM[psf.profile] * fwhm)
    # Sersic: I(r) = I_e exp(-b ((r / r_e)^(1/n) - 1)), b about 2 n - 1/3
    half_light = np.maximum(sky.radius / scale, 1e-3)
    b = 2.0 * sky.sersic - 1.0 / 3.0
    at_half_light = electrons / (7.0 * half_light**2 * sky.axis_ratio)
    depth = np.log(np.maximum(at_half_light / faint_level, np.exp(-b))) / b + 1.0
    galaxy = np.where(sky.is_star, 0.0, half_light * depth**sky.sersic)
    return np.minimum(np.hypot(star, galaxy), _MAX_RADIUS)


def _near(
    x: FloatArray, y: FloatArray, nx: int, ny: int, margin: float | FloatArray
) -> NDArray[np.bool_]:
    """Return which positions (NaN: none) are on the CCD or within a margin around it."""
    return (x > -margin) & (x < nx + margin) & (y > -margin) & (y < ny + margin)


def psf_profile(galsim: ModuleType, psf: PsfSimulation, fwhm: float, g1: float, g2: float) -> Any:
    """Return the PSF as an object of GalSim, of flux 1; ``fwhm`` in pixels."""
    if psf.profile == "moffat":
        profile = galsim.Moffat(beta=psf.beta, fwhm=fwhm)
    else:
        profile = galsim.Kolmogorov(fwhm=fwhm)
    return profile.shear(g1=g1, g2=g2)


def _galaxy(galsim: ModuleType, sky: SkyCatalogue, i: int, jacobian: FloatArray) -> Any:
    """Return a galaxy's profile in pixels; position angles run from north through east."""
    # the radius is that of the major axis, GalSim's shear keeps the area
    radius = float(sky.radius[i] * np.sqrt(sky.axis_ratio[i]))
    profile = galsim.Sersic(n=float(sky.sersic[i]), half_light_radius=radius)
    # in (east, north), the major axis at position angle p has the angle 90 - p
    profile = profile.shear(q=float(sky.axis_ratio[i]), beta=(90.0 - sky.angle[i]) * galsim.degrees)
    to_pixels = np.linalg.inv(jacobian)
    return profile.transform(*to_pixels.ravel())
