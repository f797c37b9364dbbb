"""What is true of the pixels of a simulated exposure: light, noise, hits, saturation."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from coaddflow.image.masked_image import flux_scale
from coaddflow.instrument.camera import Camera, Detector
from coaddflow.simulate.drawing import load_galsim, psf_profile
from coaddflow.simulate.frames import Exposing, incoming_light
from coaddflow.simulate.readout import full_well
from coaddflow.simulate.settings import PsfSimulation, SimulationSettings
from coaddflow.simulate.silicon import make_silicon

FloatArray = NDArray[np.float64]

_HOT = 0.5
"""Electrons per second from which a pixel is hot."""

_DEFECT = 0.5
"""Response below which a pixel is a defect."""


@dataclass(frozen=True)
class TrueCcd:
    """One CCD of one exposure, all planes of shape (ny, nx)."""

    light: NDArray[np.float32]
    """Light of stars and galaxies without noise, nJy per pixel."""
    noise: NDArray[np.float32]
    """Noise of the pixels without sources: photons, dark current, readout; nJy."""
    scale: NDArray[np.float32]
    """nJy of one electron of a perfect pixel."""
    defect: NDArray[np.bool_]
    """Pixels that see nothing."""
    hot: tuple[NDArray[np.intp], NDArray[np.intp], FloatArray]
    """Hot pixels x, y and their electrons."""
    sky: float
    """Median brightness of the sky, nJy per pixel."""


def true_ccd(exposing: Exposing, ccd: int) -> TrueCcd:
    """Return what is true of a CCD."""
    settings, optics = exposing.settings, exposing.optics
    seen = dataclasses.replace(exposing.observation, trail=None)
    band, detector = settings.bands[seen.band], optics.camera.detector(ccd)
    quiet = dataclasses.replace(
        exposing, observation=seen, optics=dataclasses.replace(optics, observation=seen)
    )
    transmission = optics.transmission(detector)
    per_second = 10.0 ** (0.4 * (band.zero_point - band.sky)) * settings.sky.enabled
    sky = optics.pixel_area(detector) * optics.sky_factor(detector) * transmission
    sky *= np.float32(per_second * seen.exposure_time)
    light = incoming_light(quiet, detector) - sky
    silicon = make_silicon(settings, detector)
    read_noise = np.zeros(detector.shape, np.float32)
    for amplifier in detector.amplifiers:
        x0, y0, x1, y1 = amplifier.target
        read_noise[y0:y1, x0:x1] = amplifier.read_noise * settings.detector.read_noise
    variance = sky * silicon.response + silicon.dark * np.float32(seen.exposure_time)
    noise = np.sqrt(variance + read_noise**2) / np.maximum(silicon.response, 1e-3)
    ny, nx = detector.shape
    clouds = optics.clouds_at(detector, *np.meshgrid(np.arange(nx), np.arange(ny)))
    scale = flux_scale(band.zero_point) / (seen.exposure_time * clouds * transmission)
    scale = scale.astype(np.float32)
    y, x = np.nonzero(silicon.dark > _HOT)
    return TrueCcd(
        light=light * scale,
        noise=noise * scale,
        scale=scale,
        defect=silicon.response < _DEFECT,
        hot=(x, y, silicon.dark[y, x].astype(float) * seen.exposure_time),
        sky=float(np.median(sky * scale)),
    )


def psf_images(
    exposing: Exposing, detector: Detector, x: FloatArray, y: FloatArray, half: int
) -> FloatArray:
    """Return centred images of the true PSF with pixels, shape (n, 2 half + 1, 2 half + 1)."""
    galsim, optics = load_galsim(), exposing.optics
    fwhm, g1, g2 = optics.psf_at(detector, x, y)
    scale = np.sqrt(np.abs(np.linalg.det(optics.jacobian(detector, x, y))))
    size = 2 * half + 1
    images = np.zeros((len(x), size, size))
    for i in range(len(x)):
        profile = psf_profile(galsim, exposing.settings.psf, fwhm[i] / scale[i], g1[i], g2[i])
        images[i] = profile.drawImage(nx=size, ny=size, scale=1.0).array
    return images


def fwhm_pixels(exposing: Exposing, detector: Detector, x: FloatArray, y: FloatArray) -> FloatArray:
    """Return the true FWHM of the PSF in pixels, without the pixel itself."""
    scale = np.sqrt(np.abs(np.linalg.det(exposing.optics.jacobian(detector, x, y))))
    return exposing.optics.psf_at(detector, x, y)[0] / scale


@lru_cache(maxsize=8)
def _sums(profile: str, beta: float) -> tuple[FloatArray, FloatArray]:
    """Return FWHM in pixels, (m,), and peak, sum(P^2), sum(P^3) of PSFs on pixels, (m, 3)."""
    galsim, psf = load_galsim(), PsfSimulation(profile=profile, beta=beta)
    sizes = np.geomspace(1.2, 40.0, 40)
    sums = np.zeros((len(sizes), 3))
    offsets = ((0.0, 0.0), (0.25, 0.25), (0.5, 0.0), (0.5, 0.5))
    for i, fwhm in enumerate(sizes):
        n = 2 * int(4 * fwhm) + 9
        image = np.array(
            [
                psf_profile(galsim, psf, fwhm, 0.0, 0.0)
                .drawImage(nx=n, ny=n, scale=1.0, offset=offset)
                .array.astype(float)
                for offset in offsets
            ]
        )
        sums[i] = (
            image[0].max(),
            (image**2).sum(axis=(1, 2)).mean(),
            (image**3).sum(axis=(1, 2)).mean(),
        )
    return sizes, sums


def psf_sums(psf: PsfSimulation, fwhm: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the peak, sum(P^2) and sum(P^3) of PSFs of sum 1 on pixels; FWHM in pixels."""
    sizes, sums = _sums(psf.profile, psf.beta)
    return tuple(np.exp(np.interp(np.log(fwhm), np.log(sizes), np.log(one))) for one in sums.T)


def saturation_magnitude(settings: SimulationSettings, camera: Camera, band: str) -> float:
    """Return the magnitude of a star whose central pixel is just full, in median conditions."""
    fwhm = np.array([settings.psf.seeing / camera.pixel_scale])
    peak = psf_sums(settings.psf, fwhm)[0][0]
    exposing = settings.bands[band]
    rate = 10.0 ** (0.4 * (exposing.zero_point - exposing.sky)) * camera.pixel_scale**2
    sky = rate * exposing.exposure_time
    wells = [well for one in camera.detectors for well, _ in _wells(settings, one)]
    electrons = (float(np.median(wells)) - sky) / peak / exposing.exposure_time
    return exposing.zero_point - 2.5 * np.log10(max(electrons, 1e-3))


def _wells(settings: SimulationSettings, detector: Detector):
    """Yield the full well in electrons of each amplifier, and its box on the CCD."""
    for one in detector.amplifiers:
        level = settings.detector.bias_level
        yield full_well(one, one.gain, level, settings.detector), one.target


def above_saturation(
    exposing: Exposing,
    detector: Detector,
    x: FloatArray,
    y: FloatArray,
    flux: FloatArray,
    true: TrueCcd,
) -> FloatArray:
    """Return by how many magnitudes the peaks of stars are above the full well (negative: below).

    Parameters
    ----------
    x, y, flux : ndarray of float64, shape (n,)
        True positions on the CCD and fluxes, nJy.
    true : TrueCcd
        For the sky and the scale.
    """
    column = np.clip(np.rint(x).astype(int), 0, detector.size[0] - 1)
    row = np.clip(np.rint(y).astype(int), 0, detector.size[1] - 1)
    scale = true.scale[row, column]
    well = np.full(len(x), np.inf)
    for electrons, (x0, y0, x1, y1) in _wells(exposing.settings, detector):
        here = (column >= x0) & (column < x1) & (row >= y0) & (row < y1)
        well[here] = electrons
    peak = psf_sums(exposing.settings.psf, fwhm_pixels(exposing, detector, x, y))[0]
    return 2.5 * np.log10(np.maximum(peak * flux + true.sky, 1e-9) / scale / well)
