"""What is measured on one calexp: stars, noise, sky, artefacts, PSF, saturated stars."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.table import Table
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from truth import TrueCcd, above_saturation, fwhm_pixels, psf_images, psf_sums, true_ccd

from coaddflow.calexp.product import read_calexp, read_sources
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.image.masked_image import AB_ZERO_POINT, MaskPlane, flux_scale
from coaddflow.image.stamps import cut_stamps
from coaddflow.measure.detection import SourceFlag
from coaddflow.pool import Worker
from coaddflow.qa.artifacts import Left, group_hits, touched, unmasked
from coaddflow.qa.noise import Ratio, aperture_noise_ratio, pixel_noise_ratio
from coaddflow.qa.psf_check import Shapes, shape_residuals
from coaddflow.qa.star_fluxes import core_over_rim, flux_deviation
from coaddflow.simulate.frames import Exposing
from coaddflow.tables.manifest import CcdRow

BAD = (
    MaskPlane.BAD
    | MaskPlane.SAT
    | MaskPlane.CR
    | MaskPlane.EDGE
    | MaskPlane.NO_DATA
    | MaskPlane.INTRP
    | MaskPlane.STREAK
    | MaskPlane.SUSPECT
)
EMPTY = 0.2
"""Light of a pixel of empty sky, in units of its noise, at most."""

_MATCH = 1.5
"""Largest distance of a source from its star, pixels."""

_NEIGHBOURS = 0.02
"""Light of other sources within 3 FWHM of an isolated star, over its own."""

_TINY = -0.2
"""Magnitudes above saturation from which a star is not measured as an ordinary one."""

_RESERVED = (20.0, np.inf)
"""Signal-to-noise of stars that the PSF is compared with; those that it was made of are not."""

_LARGE = 2.5
"""Radius of the apertures of saturated stars, FWHM."""

_SHAPES_PER_CCD = 60


@dataclass
class CcdFigures:
    """What is measured on a calexp."""

    row: CcdRow
    stars: Table
    """Matched stars: id, ra, dec, magnitude, errors, ..."""
    noise_stated: Ratio
    noise_photons: Ratio
    aperture_stated: Ratio
    """Variance of pixels over VARIANCE and over that of photons and readout; of apertures."""
    sky_left: float
    sky_left_noise: float
    """Median of empty sky over its true brightness, and over the noise of a pixel."""
    cosmic_rays: Left
    hot_pixels: Left
    """Pixels with more than 5 sigma, and those of them not masked."""
    hits: NDArray[np.float64]
    """RA and dec of the hits of cosmic rays with more than 5 sigma, and of hot pixels; (n, 2)."""
    cores: Left
    """Unsaturated stars whose core is masked although nothing hit it."""
    saturated: NDArray[np.float64]
    """Magnitudes above saturation, flux / true flux - 1, core over rim; (n, 3)."""
    psf_reserved: Shapes
    psf_true: Shapes
    """Residuals of reserved stars minus model, and of the true PSF minus the model."""


def measure_ccd(row: CcdRow, worker: Worker) -> CcdFigures:
    """Measure a calexp, and write its true light and noise for the coadds."""
    constants = worker.constants
    folder: Path = constants["folder"]
    exposing: Exposing = constants["exposing"][row.exposure]
    truth: Table = constants["truth"]
    true = true_ccd(exposing, row.ccd)
    path = true_file(folder, row)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.stack([true.light, true.noise]))
    return _Ccd(folder, exposing, true, truth, row).figures()


def true_file(folder: Path, row: CcdRow) -> Path:
    """Return where the true light and noise of a CCD are."""
    return folder / "true" / row.exposure / f"{row.ccd}.npy"


class _Ccd:
    """A calexp beside its truth; images in nJy."""

    def __init__(self, folder: Path, exposing: Exposing, true: TrueCcd, truth: Table, row: CcdRow):
        self.row, self.exposing, self.true = row, exposing, true
        self.detector = exposing.optics.camera.detector(row.ccd)
        self.calexp = read_calexp(folder / row.path)
        self.sources = read_sources(folder / row.path.replace(".fits", "_sources.fits"))
        masked = self.calexp.masked_image
        unit = flux_scale(row.zero_point)
        self.image, self.variance = masked.image * unit, masked.variance * unit**2
        self.mask = masked.mask
        self.bad = masked.has_any(BAD)
        self.residual = self.image - true.light
        self.empty = ~self.bad & ~true.defect & (true.light < EMPTY * true.noise)
        self.hits = _hits_of(folder, row)
        self._place_sources(truth)

    def _place_sources(self, truth: Table) -> None:
        """Find out which true sources are on the CCD, where, and how bright."""
        optics = self.exposing.optics
        x, y = optics.sky_to_pixel(self.detector, truth["ra"], truth["dec"], truth["color"])
        nx, ny = self.detector.size
        here = (x > -20) & (x < nx + 20) & (y > -20) & (y < ny + 20)
        self.truth = truth[here]
        self.x, self.y = x[here], y[here]
        magnitude = np.asarray(self.truth[f"mag_{self.row.band}"])
        self.flux = 10.0 ** (-0.4 * (magnitude - AB_ZERO_POINT))
        self.fwhm = fwhm_pixels(self.exposing, self.detector, self.x, self.y)
        self.above = above_saturation(
            self.exposing, self.detector, self.x, self.y, self.flux, self.true
        )
        self.is_star = np.asarray(self.truth["type"]).astype(str) == "star"
        self.typical_fwhm = float(np.median(self.fwhm))
        self.isolated = self._are_isolated()

    def _are_isolated(self) -> NDArray[np.bool_]:
        places = np.column_stack([self.x, self.y])
        pairs = cKDTree(places).query_pairs(3.0 * self.typical_fwhm, output_type="ndarray")
        others = np.zeros(len(places))
        for i, j in (pairs.T, pairs.T[::-1]) if len(pairs) else ():
            np.add.at(others, i, self.flux[j])
        return others < _NEIGHBOURS * self.flux

    def figures(self) -> CcdFigures:
        """Return what is measured."""
        stars = self._stars()
        sky = float(np.median(self.residual[self.empty])) if self.empty.any() else np.nan
        noise = float(np.median(self.true.noise))
        reserved, known = self._psf(stars)
        x, y, electrons = self.hits
        return CcdFigures(
            row=self.row,
            stars=stars,
            noise_stated=pixel_noise_ratio(self.residual - sky, self.variance, self.empty),
            noise_photons=pixel_noise_ratio(self.residual - sky, self.true.noise**2, self.empty),
            aperture_stated=aperture_noise_ratio(
                self.residual - sky, self.variance, self.empty, 1.5 * self.typical_fwhm
            ),
            sky_left=sky / self.true.sky,
            sky_left_noise=sky / noise,
            cosmic_rays=self._unmasked(x, y, electrons),
            hot_pixels=self._unmasked(*self.true.hot),
            hits=self._places_of_hits(),
            cores=self._cores_lost(),
            saturated=self._saturated(),
            psf_reserved=reserved,
            psf_true=known,
        )

    def _unmasked(self, x, y, electrons) -> Left:
        return unmasked(x, y, electrons * self.true.scale[y, x], self.true.noise, self.bad)

    def _places_of_hits(self) -> NDArray[np.float64]:
        hits = group_hits(*self.hits, self.detector.shape)
        hot_x, hot_y, hot = self.true.hot
        x, y = np.concatenate([hits.x, hot_x]), np.concatenate([hits.y, hot_y])
        peak = np.concatenate([hits.peak, hot]) * self.true.scale[y, x]
        strong = peak > 5.0 * self.true.noise[y, x]
        return np.column_stack(pixel_to_sky(self.calexp.wcs, x[strong], y[strong]))

    def _cores_lost(self) -> Left:
        """Count unsaturated stars whose 3 x 3 central pixels are masked without a cause."""
        nx, ny = self.detector.size
        peak = psf_sums(self.exposing.settings.psf, self.fwhm)[0] * self.flux
        bright = self.is_star & (self.above < _TINY) & (peak > 5.0 * np.median(self.true.noise))
        bright &= (self.x > 10) & (self.x < nx - 11) & (self.y > 10) & (self.y < ny - 11)
        cause = self.true.defect.copy()
        for x, y, _ in (self.hits, self.true.hot):
            cause[y, x] = True
        full = self.mask & np.int32(MaskPlane.SAT | MaskPlane.SUSPECT | MaskPlane.STREAK)
        cause |= full != 0
        spoilt = self.mask & np.int32(MaskPlane.CR | MaskPlane.BAD | MaskPlane.INTRP)
        x, y = self.x[bright], self.y[bright]
        innocent = ~touched(x, y, cause, 4)
        lost = touched(x, y, spoilt != 0, 1) & innocent
        return Left(int(lost.sum()), int(innocent.sum()))

    def _saturated(self) -> NDArray[np.float64]:
        nx, ny = self.detector.size
        radius = _LARGE * self.typical_fwhm
        far = radius + 5.0
        full = self.is_star & (self.above > 0.0)
        full &= (self.x > far) & (self.x < nx - far) & (self.y > far) & (self.y < ny - far)
        x, y = self.x[full], self.y[full]
        inside = flux_deviation(self.true.light, x, y, radius, np.ones(len(x)))
        deviation = flux_deviation(self.residual, x, y, radius, inside)
        rim = core_over_rim(self.image, x, y, 2.0 * self.typical_fwhm)
        return np.column_stack([self.above[full], deviation, rim])

    def _stars(self) -> Table:
        """Return the matched stars that are not saturated."""
        found = np.column_stack([self.sources["x"], self.sources["y"]])
        usable = np.flatnonzero(self.is_star & (self.above < _TINY))
        distance, nearest = cKDTree(found).query(np.column_stack([self.x, self.y])[usable])
        usable, nearest = usable[distance < _MATCH], nearest[distance < _MATCH]
        source, star = self.sources[nearest], self.truth[usable]
        spoilt = np.asarray(source["flags"]) & int(~SourceFlag.BLENDED & 0x7F)
        table = Table()
        table["id"] = np.asarray(star["id"])
        table["x"], table["y"] = self.x[usable], self.y[usable]
        table["found_x"], table["found_y"] = np.asarray(source["x"]), np.asarray(source["y"])
        table["ra"], table["dec"] = np.asarray(source["ra"]), np.asarray(source["dec"])
        table["true_ra"], table["true_dec"] = np.asarray(star["ra"]), np.asarray(star["dec"])
        table["magnitude"] = np.asarray(source["magnitude"])
        table["true_magnitude"] = np.asarray(star[f"mag_{self.row.band}"])
        table["photon_noise"] = self._photon_noise(usable)
        table["signal_to_noise"] = 1.0857 / table["photon_noise"]
        table["clean"] = (spoilt == 0) & self.isolated[usable]
        table["is_psf_star"] = np.asarray(source["is_psf_star"])
        return table

    def _photon_noise(self, index: NDArray) -> NDArray[np.float64]:
        """Return the noise of PSF fluxes with uniform weights, mag, from photons and readout."""
        _, second, third = psf_sums(self.exposing.settings.psf, self.fwhm[index])
        noise, scale = np.median(self.true.noise), np.median(self.true.scale)
        flux = self.flux[index]
        variance = noise**2 / second + flux * scale * third / second**2
        return 1.0857 * np.sqrt(variance) / flux

    def _psf(self, stars: Table) -> tuple[Shapes, Shapes]:
        """Compare the model with stars that it was not made of, and with the true PSF."""
        half = int(np.ceil(2.0 * self.typical_fwhm))
        nx, ny = self.detector.size
        inside = (stars["x"] > half) & (stars["x"] < nx - half - 1)
        inside &= (stars["y"] > half) & (stars["y"] < ny - half - 1)
        clean = stars[np.asarray(stars["clean"] & inside)]
        strong = (clean["signal_to_noise"] > _RESERVED[0]) & ~clean["is_psf_star"]
        reserved = clean[np.asarray(strong)]
        nothing = Shapes(*(np.zeros(0),) * 3)
        measured = nothing
        if len(reserved):
            x, y = np.asarray(reserved["found_x"]), np.asarray(reserved["found_y"])
            models = self.calexp.psf.images_at(x, y)
            measured = shape_residuals(
                cut_stamps(self.image, x, y, half)[0], cut_middle(models, half)
            )
        some = clean[:: max(1, len(clean) // _SHAPES_PER_CCD)]
        if not len(some):
            return measured, nothing
        x, y = np.asarray(some["x"]), np.asarray(some["y"])
        true = psf_images(self.exposing, self.detector, x, y, half)
        models = cut_middle(self.calexp.psf.images_at(x, y, sub_pixel=False), half)
        return measured, shape_residuals(true, models)


def cut_middle(images: NDArray, half: int) -> NDArray:
    """Return the middle of images, (n, 2 half + 1, 2 half + 1), with zeros where they end."""
    have = images.shape[1] // 2
    if have < half:
        width = half - have
        return np.pad(images, ((0, 0), (width, width), (width, width)))
    return images[:, have - half : have + half + 1, have - half : have + half + 1]


def _hits_of(folder: Path, row: CcdRow):
    """Return the pixels of the cosmic rays of a CCD: x, y, electrons."""
    truth = folder / "data/truth/cosmic_rays"
    path = truth / f"{row.exposure}.fits"
    if not path.is_file():
        path = truth / f"{row.exposure}-{row.ccd:03d}.fits"
    if not path.is_file():
        return np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0)
    table = Table.read(path)
    here = table[np.asarray(table["ccd"]) == row.ccd]
    x, y = (np.asarray(here[name]).astype(np.intp) for name in ("x", "y"))
    return x, y, np.asarray(here["electrons"]).astype(float)
