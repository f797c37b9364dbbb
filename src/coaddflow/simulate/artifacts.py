"""What is on the images but not on the sky: cosmic rays and trails of satellites.

References
----------
.. [1] Groom 2002, Experimental Astronomy 14, 45 (cosmic rays in CCDs: about 80 electrons per
   micrometre, cos^2 of the zenith angle).
"""

import numpy as np
from numpy.typing import NDArray

from coaddflow.instrument.camera import Detector
from coaddflow.simulate.optics import Optics
from coaddflow.simulate.settings import CosmicRaysSimulation

_ELECTRONS_PER_MM = 80_000.0
_STEP = 0.1
"""Length of the steps in which tracks deposit their charge, pixels."""


def cosmic_rays(
    settings: CosmicRaysSimulation,
    detector: Detector,
    pixel_size: float,
    exposure_time: float,
    rng: np.random.Generator,
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Return the pixels of a CCD that cosmic rays hit, each once, and the electrons in them.

    Parameters
    ----------
    pixel_size : float
        Millimetres.
    exposure_time : float
        Seconds.

    Returns
    -------
    x, y : ndarray of int, shape (n,)
        Pixels.
    electrons : ndarray of float64, shape (n,)
        Charge in them.
    """
    nx, ny = detector.size
    area = nx * ny * (pixel_size / 10.0) ** 2
    tracks = [
        _track(settings, detector, pixel_size, rng)
        for _ in range(rng.poisson(settings.rate * area * exposure_time))
    ]
    if not tracks:
        return np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0)
    points = np.concatenate(tracks)
    x, y = np.rint(points[:, :2]).astype(np.intp).T
    inside = (x >= 0) & (x < nx) & (y >= 0) & (y < ny)
    pixels, where = np.unique(y[inside] * nx + x[inside], return_inverse=True)
    electrons = np.bincount(where, weights=points[inside, 2], minlength=len(pixels))
    return pixels % nx, pixels // nx, electrons


def _track(
    settings: CosmicRaysSimulation, detector: Detector, pixel_size: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return points along one track, shape (n, 3): x, y, electrons."""
    nx, ny = detector.size
    start = rng.uniform([-0.5, -0.5], [nx - 0.5, ny - 0.5])
    # N(> theta) for cos^2 flux on a plane: cos^4 theta is uniform
    cosine = max(rng.uniform() ** 0.25, 0.05)
    length = settings.thickness * np.sqrt(1.0 / cosine**2 - 1.0) / pixel_size
    angle = rng.uniform(0.0, 2.0 * np.pi)
    charge = _ELECTRONS_PER_MM * settings.thickness / cosine * rng.gamma(8.0, 1.0 / 8.0)
    n = max(10, int(length / _STEP))
    along = np.linspace(0.0, length, n)[:, None] * [np.cos(angle), np.sin(angle)]
    points = start + along + settings.diffusion * rng.normal(size=(n, 2))
    return np.column_stack([points, np.full(n, charge / n)])


def add_trail(image: NDArray[np.float32], optics: Optics, detector: Detector) -> None:
    """Add the satellite's trail of an exposure, if it has one, to the image of a CCD (electrons).

    The trail is straight in the focal plane, with a Gaussian profile across.
    """
    trail, settings = optics.observation.trail, optics.settings.satellites
    if trail is None:
        return
    camera = optics.camera
    (x0, x1), (y0, y1) = camera.focal_to_pixel(detector, trail[::2], trail[1::2])
    length = np.hypot(x1 - x0, y1 - y0)
    nx, ny = detector.size
    distance = (
        (np.arange(nx) - x0)[None, :] * (y1 - y0) - (np.arange(ny) - y0)[:, None] * (x1 - x0)
    ) / length
    sigma = settings.width / camera.pixel_scale / 2.3548
    near = np.abs(distance) < 8.0 * sigma
    profile = np.exp(-0.5 * (distance[near] / sigma) ** 2) / (np.sqrt(2.0 * np.pi) * sigma)
    image[near] += (settings.brightness * profile).astype(np.float32)
