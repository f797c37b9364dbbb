"""What is measured on the coadds of a band: those of the workflow, and those of SWarp."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import sep
from ccd import EMPTY, CcdFigures, cut_middle, true_file
from numpy.typing import NDArray
from scipy import ndimage, signal
from scipy.spatial import cKDTree
from survey import Survey, sky_weights, swarp_coadds
from truth import fwhm_pixels, psf_sums, saturation_magnitude

from coaddflow.coadd.psf import read_coadd_psf
from coaddflow.geometry.wcs_header import read_wcs
from coaddflow.image.masked_image import (
    AB_ZERO_POINT,
    MaskedImage,
    MaskPlane,
    read_masked_image,
)
from coaddflow.image.stamps import cut_stamps
from coaddflow.image.statistics import mad_sigma
from coaddflow.qa.artifacts import Left, seen_at
from coaddflow.qa.mosaic import read_mosaic
from coaddflow.qa.noise import (
    Ratio,
    aperture_noise_ratio,
    best_filter,
    depth_ratio,
    pixel_noise_ratio,
)
from coaddflow.qa.psf_check import Shapes, shape_residuals
from coaddflow.qa.star_fluxes import Bias, core_over_rim, flux_deviation, typical
from coaddflow.settings.warp import WarpSettings
from coaddflow.warp.ccds import CcdImage, warp_patches

_EDGE = 5
"""Rows at the border of CCDs that are not used, as in the workflow (`detrend.edge`)."""

_GRID = 8
"""Step of the grid on which the depth that is possible is computed, pixels."""

_APERTURE = 1.5
"""Radius of apertures, in FWHM."""

_BETA = 3.5
"""Shape of the Moffat filters."""

OURS = "coaddflow"
"""The name of the workflow among the programs."""


@dataclass
class Ideal:
    """A coadd of the true light with the weights of a real one, and what is possible."""

    light: NDArray[np.float64]
    """nJy per pixel, with the PSF that the coadd has."""
    noise: NDArray[np.float64]
    """Noise of its pixels from photons and readout."""
    n_inputs: NDArray[np.int16]
    """Exposures."""


@dataclass
class CoaddFigures:
    """What is measured on one coadd."""

    program: str
    stars: dict[str, NDArray]
    """Of unsaturated stars: magnitude, deviation of the flux, offsets in x and y, core."""
    saturated: NDArray
    """Magnitudes above saturation, deviation of the flux, core over rim; (n, 3)."""
    noise_stated: Ratio
    noise_photons: Ratio
    aperture_stated: Ratio
    depth: Ratio
    sky_left: float
    sky_structure: float
    """Median of empty sky over the brightness of the sky; rms over blocks of 64 pixels."""
    hits: Left
    cores: Left
    conserved: Bias
    """Total flux of stars on the noise-free coadd over the true one, minus 1."""
    psf: dict[str, Shapes]
    """Shapes of stars, and of noise-free stars, against the PSF of the coadd, if it has one."""
    residual: NDArray = field(repr=False)
    image: NDArray = field(repr=False)
    saturated_places: NDArray = field(repr=False)
    """x, y, magnitudes above saturation."""


def measure_band(survey: Survey, band: str, ccds: list[CcdFigures]) -> dict[str, CoaddFigures]:
    """Measure the coadds of all programs."""
    tract = survey.tract
    mosaic = read_mosaic(survey.results / "coadd" / band / str(tract.id), tract)
    theirs = swarp_coadds(survey, band)
    by_sky = sky_weights(survey, band)
    ours_ideal = ideal_coadd(survey, band, mosaic.weights)
    same = _proportional(mosaic.weights, by_sky)
    their_ideal = ours_ideal if same or not theirs else ideal_coadd(survey, band, by_sky)
    information = possible_depth(survey, band)
    scene = _Scene(survey, band, ccds, ours_ideal, information)
    psf = scene.psf(
        survey.results / "coadd" / band / str(tract.id), mosaic.masked_image, ours_ideal
    )
    found = {OURS: scene.measure(OURS, mosaic.masked_image, ours_ideal, psf)}
    for kind, image in theirs.items():
        found[f"SWarp {kind}"] = scene.measure(f"SWarp {kind}", image, their_ideal)
    return found


def _proportional(first: dict[str, float], second: dict[str, float]) -> bool:
    if set(first) != set(second):
        return False
    ratio = np.array([first[name] / second[name] for name in first])
    return bool(np.ptp(ratio) < 1e-3 * ratio.mean())


def ideal_coadd(survey: Survey, band: str, weights: dict[str, float]) -> Ideal:
    """Coadd the true light of the exposures with these weights, without masks and clipping."""
    tract = survey.tract
    shape = (tract.height, tract.width)
    light, variance, total = (np.zeros(shape) for _ in range(3))
    n_inputs = np.zeros(shape, np.int16)
    rows = survey.done(band)
    for exposure, weight in weights.items():
        ccds = {row.ccd: row for row in rows if row.exposure == exposure}

        def load(ccd: int, ccds: dict = ccds) -> CcdImage:
            row = ccds[ccd]
            true_light, noise = np.load(true_file(survey.folder, row))
            mask = np.full(true_light.shape, MaskPlane.EDGE, np.int32)
            mask[_EDGE:-_EDGE, _EDGE:-_EDGE] = 0
            header = read_masked_image(survey.folder / row.path)[1]
            return CcdImage(MaskedImage(true_light, noise**2, mask), read_wcs(header), 1.0)

        everywhere = {patch: tuple(ccds) for patch in tract.patch_ids()}
        for patch, warp in warp_patches(tract, everywhere, load, WarpSettings()):
            if warp is None:
                continue
            inner = tract.patch(patch).inner_box
            x0, y0 = (max(a, b) for a, b in zip(inner[:2], warp.box[:2], strict=True))
            x1, y1 = (min(a, b) for a, b in zip(inner[2:], warp.box[2:], strict=True))
            if x0 >= x1 or y0 >= y1:
                continue
            pixels = warp.read_box((x0, y0, x1, y1))
            here = slice(y0, y1), slice(x0, x1)
            good = ~pixels.has_any(MaskPlane.EDGE | MaskPlane.NO_DATA)
            light[here] += np.where(good, weight * pixels.image, 0.0)
            variance[here] += np.where(good, weight**2 * pixels.variance, 0.0)
            total[here] += np.where(good, weight, 0.0)
            n_inputs[here] += good
    with np.errstate(invalid="ignore", divide="ignore"):
        return Ideal(light / total, np.sqrt(variance) / total, n_inputs)


def possible_depth(survey: Survey, band: str) -> NDArray[np.float64]:
    """Return the squared signal-to-noise of a faint star of 1 nJy in all exposures together.

    The sum over exposures of sum(P^2) / noise^2, from the true PSF and noise of the simulation
    alone; repeated on squares of the grid.
    """
    tract = survey.tract
    x, y = np.meshgrid(
        np.arange(0, tract.width, _GRID) + (_GRID - 1) / 2.0,
        np.arange(0, tract.height, _GRID) + (_GRID - 1) / 2.0,
    )
    ra, dec = tract.pixel_to_sky(x.ravel(), y.ravel())
    total = np.zeros(x.size)
    for row in survey.done(band):
        exposing = survey.exposing[row.exposure]
        detector = exposing.optics.camera.detector(row.ccd)
        nx, ny = detector.size
        column, line = exposing.optics.sky_to_pixel(detector, ra, dec)
        here = np.flatnonzero((column > 0) & (column < nx - 1) & (line > 0) & (line < ny - 1))
        if not here.size:
            continue
        noise = ndimage.median_filter(np.load(true_file(survey.folder, row))[1][::4, ::4], 9)
        at = np.rint(line[here] / 4).astype(int), np.rint(column[here] / 4).astype(int)
        at = tuple(np.minimum(a, n - 1) for a, n in zip(at, noise.shape, strict=True))
        fwhm = fwhm_pixels(exposing, detector, column[here], line[here])
        total[here] += psf_sums(exposing.settings.psf, fwhm)[1] / noise[at] ** 2
    whole = np.kron(total.reshape(x.shape), np.ones((_GRID, _GRID)))
    return whole[: tract.height, : tract.width]


class _Scene:
    """The true sky of a band on the pixels of the tract."""

    def __init__(
        self,
        survey: Survey,
        band: str,
        ccds: list[CcdFigures],
        ideal: Ideal,
        information: NDArray[np.float64],
    ):
        self.survey, self.band, self.information = survey, band, information
        self.scale = survey.tract.pixel_scale
        mine = [one for one in ccds if one.row.band == band]
        self.seeing = float(np.median([one.row.seeing for one in mine])) / self.scale
        self.sky = self._sky_brightness()
        self.deep = ideal.n_inputs >= max(1, int(np.median(ideal.n_inputs[ideal.n_inputs > 0])))
        self.level = self._far_from_edges(ideal.n_inputs)
        self._place_stars()
        self.hits = self._place_hits(mine)
        self.above = self._above_saturation()

    def _sky_brightness(self) -> float:
        band = self.survey.settings.bands[self.band]
        return 10.0 ** (-0.4 * (band.sky - AB_ZERO_POINT)) * self.scale**2

    @staticmethod
    def _far_from_edges(n_inputs: NDArray[np.int16]) -> NDArray[np.bool_]:
        """Return the pixels around which all have as many inputs, no CCD's border being near."""
        size = 2 * (_EDGE + 4) + 1
        high = ndimage.maximum_filter(n_inputs, size)
        return (n_inputs > 0) & (high == ndimage.minimum_filter(n_inputs, size))

    def _place_stars(self) -> None:
        truth, tract = self.survey.truth, self.survey.tract
        x, y = tract.sky_to_pixel(np.asarray(truth["ra"]), np.asarray(truth["dec"]))
        margin = 8.0 * self.seeing
        inside = (x > margin) & (x < tract.width - 1 - margin)
        inside &= (y > margin) & (y < tract.height - 1 - margin)
        self.truth, self.x, self.y = truth[inside], x[inside], y[inside]
        self.magnitude = np.asarray(self.truth[f"mag_{self.band}"])
        self.flux = 10.0 ** (-0.4 * (self.magnitude - AB_ZERO_POINT))
        self.is_star = np.asarray(self.truth["type"]).astype(str) == "star"
        self.neighbours, self.far = (self._light_within(radius) for radius in (3.0, 8.0))
        self.isolated = (self.neighbours < 0.003) & (self.far < 0.05)
        row, column = np.rint(self.y).astype(int), np.rint(self.x).astype(int)
        self.is_deep = ndimage.minimum_filter(self.deep, int(4 * self.seeing) | 1)[row, column]

    def _light_within(self, radius: float) -> NDArray[np.float64]:
        """Return the light of others within so many FWHM of each source, over its own."""
        places = np.column_stack([self.x, self.y])
        pairs = cKDTree(places).query_pairs(radius * self.seeing, output_type="ndarray")
        others = np.zeros(len(places))
        for i, j in (pairs.T, pairs.T[::-1]) if len(pairs) else ():
            np.add.at(others, i, self.flux[j])
        return others / self.flux

    def _place_hits(self, ccds: list[CcdFigures]) -> tuple[NDArray, NDArray]:
        places = [one.hits for one in ccds if len(one.hits)]
        places = np.concatenate(places) if places else np.zeros((0, 2))
        return self.survey.tract.sky_to_pixel(*places.T)

    def _above_saturation(self) -> NDArray[np.float64]:
        """Return magnitudes above saturation in median conditions."""
        limit = saturation_magnitude(self.survey.settings, self.survey.camera, self.band)
        return limit - self.magnitude

    def psf(self, folder: Path, coadd: MaskedImage, ideal: Ideal) -> dict[str, Shapes]:
        """Compare isolated stars, and noise-free ones, with the PSF of the coadds in a folder.

        Stars near which the exposures change (INEXACT_PSF) are not left out: hardly any would be.
        """
        tract, half = self.survey.tract, int(np.ceil(2.0 * self.seeing))
        row, column = np.rint(self.y).astype(int), np.rint(self.x).astype(int)
        flawed = coadd.has_any(MaskPlane.NO_DATA | MaskPlane.CLIPPED | MaskPlane.SAT)
        wanted = self.is_star & self.is_deep & (self.above < -0.7)
        wanted &= self.isolated & ~flawed[row, column]
        stars, light, models, is_bright = [], [], [], []
        for patch in tract.patch_ids():
            x0, y0, x1, y1 = tract.patch(patch).inner_box
            here = wanted & (column >= x0) & (column < x1) & (row >= y0) & (row < y1)
            path = folder / f"{patch}.fits"
            if not here.any() or not path.is_file():
                continue
            images = read_coadd_psf(path).images_at(*tract.pixel_to_sky(self.x[here], self.y[here]))
            models.append(cut_middle(images, half))
            stars.append(cut_stamps(coadd.image, self.x[here], self.y[here], half)[0])
            light.append(cut_stamps(ideal.light, self.x[here], self.y[here], half)[0])
            is_bright.append(self._bright()[here])
        if not models:
            return {}
        known = np.isfinite(np.concatenate(models)).all(axis=(1, 2))
        bright = np.concatenate(is_bright)[known]
        stars, light, models = (np.concatenate(part)[known] for part in (stars, light, models))
        return {
            "stars": shape_residuals(stars[bright], models[bright]),
            "noise_free": shape_residuals(light, models),
        }

    def measure(
        self, program: str, coadd: MaskedImage, ideal: Ideal, psf: dict[str, Shapes] | None = None
    ) -> CoaddFigures:
        """Measure one coadd."""
        residual = (coadd.image - ideal.light).astype(np.float32)
        known = np.isfinite(residual) & np.isfinite(coadd.variance) & (ideal.noise > 0)
        variance = np.where(known, coadd.variance, 1.0)
        clear = known & (ideal.light < EMPTY * ideal.noise)
        empty = clear & self.level
        sky = float(np.median(residual[empty]))
        flat = residual - sky
        significance = np.where(known, residual, 0.0) / np.sqrt(variance)
        faint = known & (ideal.light < 5.0 * ideal.noise)
        stars, saturated, cores = self._stars(coadd, residual, variance, ideal)
        return CoaddFigures(
            program=program,
            stars=stars,
            saturated=saturated,
            noise_stated=pixel_noise_ratio(flat, variance, empty),
            noise_photons=pixel_noise_ratio(flat, ideal.noise**2, empty),
            aperture_stated=aperture_noise_ratio(flat, variance, empty, _APERTURE * self.seeing),
            depth=self._depth(flat, empty, ideal),
            sky_left=sky / self.sky,
            sky_structure=_structure(flat, empty) / self.sky,
            hits=seen_at(*self.hits, significance, faint),
            cores=cores,
            conserved=self._conserved(ideal),
            psf=psf or {},
            residual=residual,
            image=coadd.image,
            saturated_places=np.column_stack([self.x, self.y, self.above])[self._full()],
        )

    def _conserved(self, ideal: Ideal) -> Bias:
        """Compare fluxes in large circles with those of the catalogue."""
        alone = self._bright() & (self.far < 0.003)
        x, y, flux = self.x[alone], self.y[alone], self.flux[alone]
        light = np.where(np.isfinite(ideal.light), ideal.light, 0.0)
        return typical(sep.sum_circle(light, x, y, 5.0 * self.seeing, subpix=5)[0] / flux - 1.0)

    def _depth(self, flat: NDArray, empty: NDArray, ideal: Ideal) -> Ratio:
        bright = self._bright() & self.isolated
        if np.count_nonzero(bright) < 3:
            return Ratio(np.nan, np.nan, 0)
        x, y = self.x[bright], self.y[bright]
        light = np.nan_to_num(ideal.light)
        profile = best_filter(light, x, y, self.seeing, _BETA)
        filtered = signal.fftconvolve(light, profile, mode="same")
        response = ndimage.map_coordinates(filtered, [y, x], order=5) / self.flux[bright]
        return depth_ratio(flat, empty, profile, float(np.median(response)), self.information)

    def _bright(self) -> NDArray[np.bool_]:
        """Return stars far above the noise, not saturated in any exposure."""
        return self.is_star & self.is_deep & (self.above < -0.7) & (self.above > -4.5)

    def _full(self) -> NDArray[np.bool_]:
        """Return the saturated stars."""
        return self.is_star & self.is_deep & (self.above > 0.0)

    def _stars(
        self, coadd: MaskedImage, residual: NDArray, variance: NDArray, ideal: Ideal
    ) -> tuple[dict[str, NDArray], NDArray, Left]:
        radius = _APERTURE * self.seeing
        clean = self._bright() & self.isolated
        light = np.where(np.isfinite(ideal.light), ideal.light, 0.0)
        inside = sep.sum_circle(light, self.x[clean], self.y[clean], radius, subpix=5)[0]
        share = float(np.median(inside / self.flux[clean])) if clean.any() else np.nan
        ordinary = self.is_star & self.is_deep & (self.above < -0.7)
        ordinary &= self.neighbours < 0.3
        expected = share * self.flux
        x, y = self.x[ordinary], self.y[ordinary]
        stars = {
            "magnitude": self.magnitude[ordinary],
            "flux": flux_deviation(residual, x, y, radius, expected[ordinary]),
        }
        image = np.nan_to_num(coadd.image)
        window = np.full(len(x), self.seeing / 2.3548)
        found_x, found_y, flags = sep.winpos(image, x, y, window)
        lonely = self.neighbours[ordinary] < 0.01
        for name, found, true in (("dx", found_x, x), ("dy", found_y, y)):
            stars[name] = np.where(lonely & (flags == 0), (found - true) * self.scale * 1e3, np.nan)
        core = [_box_sum(plane, x, y) for plane in (residual, light, variance)]
        deviation, strength = core[0] / core[1], core[1] / np.sqrt(core[2])
        judged = strength > 30.0
        lost = judged & (deviation < -0.05) & (core[0] < -5.0 * np.sqrt(core[2]))
        lost |= judged & ~np.isfinite(core[0])
        stars["strong"] = strength > 100.0
        full = self._full()
        x, y = self.x[full], self.y[full]
        deviation = flux_deviation(residual, x, y, 2.5 * self.seeing, self.flux[full])
        rim = core_over_rim(coadd.image, x, y, 2.0 * self.seeing)
        saturated = np.column_stack([self.above[full], deviation, rim])
        return stars, saturated, Left(int(lost.sum()), int(judged.sum()))


def _box_sum(plane: NDArray, x: NDArray, y: NDArray) -> NDArray[np.float64]:
    return cut_stamps(plane, x, y, 1)[0].astype(float).sum(axis=(1, 2))


def _structure(flat: NDArray, empty: NDArray, block: int = 64) -> float:
    """Return the rms of what is left of the sky on blocks, without the noise of their medians."""
    medians, errors = [], []
    for y in range(0, flat.shape[0] - block, block):
        for x in range(0, flat.shape[1] - block, block):
            part = slice(y, y + block), slice(x, x + block)
            pixels = flat[part][empty[part]]
            if pixels.size > block**2 // 8:
                medians.append(float(np.median(pixels)))
                # the pixels are correlated: a quarter more variance in their means
                errors.append(1.2533**2 * mad_sigma(pixels) ** 2 * 1.25 / pixels.size)
    if len(medians) < 4:
        return float("nan")
    return float(np.sqrt(max(np.var(medians) - np.mean(errors), 0.0)))
