"""The figures of merit: each is a function of `Material` in the list `FIGURES`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from astropy.table import Table
from band import OURS, CoaddFigures, measure_band
from ccd import CcdFigures, measure_ccd
from numpy.typing import NDArray
from survey import Survey

from coaddflow.errors import InputError
from coaddflow.image.statistics import mad_sigma
from coaddflow.pool import Pool
from coaddflow.qa.artifacts import Left
from coaddflow.qa.metrics import Metric
from coaddflow.qa.noise import Ratio
from coaddflow.qa.psf_check import Shapes
from coaddflow.qa.repeatability import distance_repeatability, magnitude_repeatability
from coaddflow.qa.star_fluxes import Bias, by_bin, typical

BRIGHT = 100.0
"""Signal-to-noise of a star on one exposure from which it counts for AM1, PA1 and zero-points."""

FLUX_BINS = [16.0, 18.0, 20.0, 21.0, 22.0, 23.0, 24.0]
SATURATION_BINS = [0.0, 1.0, 2.0, 3.0, 4.0]
SATURATION_GOALS = {"0-1": 5.0, "1-2": 10.0, "2-3": 20.0}
"""Percent."""


@dataclass
class Material:
    """All that was measured."""

    survey: Survey
    ccds: list[CcdFigures]
    coadds: dict[str, dict[str, CoaddFigures]]
    """By band and program."""

    def of(self, band: str) -> list[CcdFigures]:
        """Return the CCDs of a band."""
        return [one for one in self.ccds if one.row.band == band]


Figure = Callable[[Material], list[Metric]]


def of_coadds(function: Callable[[str, CoaddFigures], list[Metric]]) -> Figure:
    """Make a figure of all coadds from one of a band and a coadd; goals are for the workflow."""

    def figure(material: Material) -> list[Metric]:
        metrics = []
        for band, programs in material.coadds.items():
            for program, coadd in programs.items():
                goal = {} if program == OURS else {"least": None, "most": None}
                metrics += [
                    dataclasses.replace(one, program=program, **goal)
                    for one in function(band, coadd)
                ]
        return metrics

    return figure


def measure_survey(survey: Survey, jobs: int) -> tuple[list[Metric], Material]:
    """Measure everything; return the figures, and what the plots need."""
    rows = [row for row in survey.rows if row.state == "done"]
    if not rows:
        raise InputError("has no calexp that is done", survey.results, "read science.log")
    with survey.timed("measure calexps"), Pool("processes" if jobs > 1 else "serial", jobs) as pool:
        exposing, truth = survey.exposing, survey.truth
        pool.broadcast(folder=survey.folder, exposing=exposing, truth=truth)
        found = pool.map(measure_ccd, rows, label=lambda row: f"{row.exposure}, CCD {row.ccd}")
        for failure in found.failures:
            failure.raise_again()
        ccds = list(found)
    with survey.timed("measure coadds"):
        bands = [band for band in survey.settings.bands if survey.done(band)]
        coadds = {band: measure_band(survey, band, ccds) for band in bands}
    material = Material(survey, ccds, coadds)
    metrics = [metric for function in FIGURES for metric in function(material)]
    return metrics, material


def _ratio(name: str, ratio: Ratio, definition: str, **goal: float) -> Metric:
    value = None if np.isnan(ratio.value) else ratio.value
    return Metric(name, value, "", definition, error=ratio.error, n=ratio.n, **goal)


def _bias(name: str, bias: Bias, definition: str, **goal: float) -> Metric:
    value = None if np.isnan(bias.value) else 100.0 * bias.value
    return Metric(name, value, "%", definition, error=100.0 * bias.error, n=bias.n, **goal)


def _left(name: str, left: Left, definition: str, most: float | None = None) -> Metric:
    value = 100.0 * left.n_left / left.n if left.n else None
    error = 100.0 * np.sqrt(max(left.n_left, 1)) / left.n if left.n else None
    return Metric(name, value, "%", definition, most=most, error=error, n=left.n)


def _together(ratios: list[Ratio]) -> Ratio:
    """Return the median over CCDs, with its error from their scatter."""
    values = np.array([one.value for one in ratios if np.isfinite(one.value)])
    if not values.size:
        return Ratio(np.nan, np.nan, 0)
    error = 1.2533 * mad_sigma(values) / np.sqrt(values.size)
    return Ratio(float(np.median(values)), error, sum(one.n for one in ratios))


def _sum(parts: list[Left]) -> Left:
    return Left(sum(one.n_left for one in parts), sum(one.n for one in parts))


def ccds_done(material: Material) -> list[Metric]:
    """CCDs that were solved."""
    rows = material.survey.rows
    done = sum(row.state == "done" for row in rows)
    text = "CCDs with a calexp over all CCDs of science exposures."
    return [Metric("ccds.done", 100.0 * done / len(rows), "%", text, least=100.0, n=len(rows))]


def _matrix(ccds: list[CcdFigures], column: str) -> NDArray[np.float64]:
    """Return a column of the clean bright stars, (n exposures, n stars); NaN where not measured."""
    chosen = [(one.row.exposure, _bright(one)) for one in ccds]
    chosen = [(exposure, stars) for exposure, stars in chosen if len(stars)]
    exposures = sorted({exposure for exposure, _ in chosen})
    ids = [np.asarray(stars["id"]) for _, stars in chosen]
    ids = np.unique(np.concatenate(ids)) if ids else np.zeros(0, int)
    values = np.full((len(exposures), len(ids)), np.nan)
    for exposure, stars in chosen:
        place = np.searchsorted(ids, np.asarray(stars["id"]))
        values[exposures.index(exposure), place] = np.asarray(stars[column])
    return values


def _bright(ccd: CcdFigures) -> Table:
    """Return the clean bright stars of a CCD."""
    stars = ccd.stars
    good = np.asarray(stars["clean"]) & (np.asarray(stars["signal_to_noise"]) > BRIGHT)
    return stars[good & np.isfinite(np.asarray(stars["magnitude"]))]


def astrometric_repeatability(material: Material) -> list[Metric]:
    """AM1 of LPM-17; half the field instead of 5 arcmin where that is larger than the field."""
    metrics = []
    tract = material.survey.tract
    field = np.hypot(tract.width, tract.height) * tract.pixel_scale / 60.0
    distance = min(5.0, field / 2.0)
    width = distance / 5.0
    text = (
        f"Scatter between exposures of the distance of two stars {distance:.2g} ± {width:.2g} "
        f"arcmin apart: standard deviation over exposures, median over pairs (AM1 of LPM-17). "
        f"Stars of signal-to-noise > {BRIGHT:.0f} without neighbours."
    )
    for band in material.coadds:
        ccds = material.of(band)
        ra, dec = _matrix(ccds, "ra"), _matrix(ccds, "dec")
        am1 = distance_repeatability(ra, dec, distance / 60.0, width / 60.0)
        metrics.append(Metric(f"astrometry.AM1.{band}", am1.value, "mas", text, most=10.0, n=am1.n))
    return metrics


def absolute_positions(material: Material) -> list[Metric]:
    """Positions on exposures and coadds against the truth."""
    metrics = []
    for band in material.coadds:
        ccds = material.of(band)
        true_ra, true_dec = _matrix(ccds, "true_ra"), _matrix(ccds, "true_dec")
        east = (_matrix(ccds, "ra") - true_ra) * np.cos(np.radians(true_dec)) * 3.6e6
        north = (_matrix(ccds, "dec") - true_dec) * 3.6e6
        offsets = np.concatenate([one[np.isfinite(one)] for one in (east, north)])
        text = (
            "Measured minus true position of stars on exposures, scatter of one axis (1.4826 times "
            f"the median absolute value); signal-to-noise > {BRIGHT:.0f}."
        )
        value = mad_sigma(offsets, 0.0) if offsets.size else None
        metrics.append(
            Metric(f"astrometry.exposures.{band}", value, "mas", text, n=offsets.size // 2)
        )
        means = [
            np.hypot(np.nanmedian(e), np.nanmedian(n)) for e, n in zip(east, north, strict=True)
        ]
        text = (
            "Median offset of all stars of an exposure from their true positions, rms of exposures."
        )
        value = float(np.sqrt(np.mean(np.square(means)))) if means else None
        metrics.append(Metric(f"astrometry.offset.{band}", value, "mas", text, n=len(means)))
    return metrics


@of_coadds
def coadd_positions(band: str, coadd: CoaddFigures) -> list[Metric]:
    """Measure positions on coadds against the truth."""
    text = (
        "Windowed positions of isolated stars of signal-to-noise > 100 on the coadd minus true "
        "ones, scatter of one axis."
    )
    good = coadd.stars["strong"]
    offsets = np.concatenate([coadd.stars["dx"][good], coadd.stars["dy"][good]])
    offsets = offsets[np.isfinite(offsets)]
    value = mad_sigma(offsets, 0.0) if offsets.size > 5 else None
    return [Metric(f"coadd.positions.{band}", value, "mas", text, n=offsets.size // 2)]


def photometric_repeatability(material: Material) -> list[Metric]:
    """PA1 of LPM-17 with the photon limit and the excess over it."""
    metrics = []
    for band in material.coadds:
        ccds = material.of(band)
        pa1, limit, excess = magnitude_repeatability(
            _matrix(ccds, "magnitude"), _matrix(ccds, "photon_noise")
        )
        chosen = f"stars of signal-to-noise > {BRIGHT:.0f} on one exposure without neighbours"
        text = f"Scatter of a star's PSF magnitude between exposures (PA1 of LPM-17); {chosen}."
        name = f"photometry.PA1.{band}"
        value = None if pa1.value is None else 1000.0 * pa1.value
        metrics.append(Metric(name, value, "mmag", text, most=5.0, n=pa1.n))
        text = "The same for photons, dark current and readout alone, from the truth."
        value = None if limit is None else 1000.0 * limit
        metrics.append(Metric(f"{name}.photons", value, "mmag", text, n=pa1.n))
        text = "Root of the difference of the squares of these two; negative if PA1 is the smaller."
        value = None if excess is None else 1000.0 * excess
        metrics.append(Metric(f"{name}.excess", value, "mmag", text, n=pa1.n))
    return metrics


def zero_points(material: Material) -> list[Metric]:
    """Errors of zero-points, by stars with their true magnitudes."""
    metrics = []
    for band in material.coadds:
        ccds = material.of(band)
        off = _matrix(ccds, "magnitude") - _matrix(ccds, "true_magnitude")
        noise = _matrix(ccds, "photon_noise")
        exposures = np.array([np.nanmedian(one) for one in off])
        errors = np.array(
            [1.2533 * np.sqrt(np.nanmean(n**2) / np.isfinite(n).sum()) for n in noise]
        )
        mean = float(np.mean(exposures))
        n = int(np.isfinite(off).any(axis=0).sum())
        text = (
            "Measured minus true magnitude of bright stars, mean over exposures: the error that "
            "all have in common, as from the reference catalogue (10 mmag a star)."
        )
        name = f"photometry.zero_point.{band}"
        metrics.append(Metric(f"{name}.common", 1000.0 * mean, "mmag", text, n=n))
        text = "The same, scatter between exposures, the noise of the medians taken off."
        scatter = np.var(exposures, ddof=1) - np.mean(errors**2) if len(exposures) > 1 else np.nan
        value = None if np.isnan(scatter) else 1000.0 * float(np.sqrt(max(scatter, 0.0)))
        metrics.append(Metric(f"{name}.exposures", value, "mmag", text, most=1.0, n=len(exposures)))
        deviations, squares = _by_ccd(ccds)
        text = "The same, scatter between the CCDs of an exposure."
        scatter = np.mean(deviations**2) - np.mean(squares) if len(deviations) > 1 else np.nan
        value = None if np.isnan(scatter) else 1000.0 * float(np.sqrt(max(scatter, 0.0)))
        metrics.append(Metric(f"{name}.ccds", value, "mmag", text, most=2.0, n=len(deviations)))
    return metrics


def _by_ccd(ccds: list[CcdFigures]) -> tuple[NDArray, NDArray]:
    """Return median deviations of CCDs from the mean of their exposure, and squared errors."""
    found: dict[str, list[tuple[float, float]]] = {}
    for one in ccds:
        stars = _bright(one)
        off = np.asarray(stars["magnitude"] - stars["true_magnitude"])
        if len(off) >= 5:
            square = 1.5708 * np.mean(np.square(stars["photon_noise"])) / len(off)
            found.setdefault(one.row.exposure, []).append((float(np.median(off)), float(square)))
    several = [np.array(values) for values in found.values() if len(values) > 1]
    if not several:
        return np.zeros(0), np.zeros(0)
    growth = [np.sqrt(len(one) / (len(one) - 1.0)) for one in several]
    deviations = [
        (one[:, 0] - one[:, 0].mean()) * g for one, g in zip(several, growth, strict=True)
    ]
    return np.concatenate(deviations), np.concatenate([one[:, 1] for one in several])


@of_coadds
def coadd_fluxes(band: str, coadd: CoaddFigures) -> list[Metric]:
    """Bias of fluxes on coadds by magnitude."""
    text = (
        "Flux of unsaturated stars in a circle of 1.5 FWHM over the true one, minus 1; median. "
        "The light of neighbours is that of the noise-free coadd."
    )
    flux, magnitude = coadd.stars["flux"], coadd.stars["magnitude"]
    name = f"coadd.flux_bias.{band}"
    strong = typical(flux[coadd.stars["strong"]])
    metrics = [_bias(f"{name}.bright", strong, text, least=-0.2, most=0.2)]
    total = (
        "Flux of isolated stars in a circle of 5 FWHM on the noise-free coadd, made with the "
        "workflow's warps, over the true one, minus 1: whether resampling conserves flux."
    )
    metrics.append(_bias(f"coadd.flux_conserved.{band}", coadd.conserved, total))
    bins = by_bin(flux, magnitude, FLUX_BINS)
    return metrics + [_bias(f"{name}.{one}", bias, text) for one, bias in bins.items()]


def saturated_fluxes(material: Material) -> list[Metric]:
    """Fluxes and cores of saturated stars on calexps."""
    metrics = []
    for band in material.coadds:
        stars = np.concatenate([one.saturated for one in material.of(band)])
        metrics += _saturated(f"calexp.saturated.{band}", stars)
    return metrics


@of_coadds
def saturated_on_coadds(band: str, coadd: CoaddFigures) -> list[Metric]:
    """Fluxes and cores of saturated stars on coadds."""
    return _saturated(f"coadd.saturated.{band}", coadd.saturated)


def _saturated(name: str, stars: NDArray[np.float64]) -> list[Metric]:
    text = (
        "Flux of saturated stars in a circle of 2.5 FWHM over the true one, minus 1, median; by "
        "magnitudes above saturation."
    )
    above, deviation, rim = stars.T
    metrics = []
    for bin_, bias in by_bin(deviation, above, SATURATION_BINS).items():
        most = SATURATION_GOALS.get(bin_)
        goal = {} if most is None else {"least": -most, "most": most}
        metrics.append(_bias(f"{name}.{bin_}", bias, text, **goal))
    text = (
        "Saturated stars whose 3 x 3 central pixels have a lower mean than the 99th percentile of "
        "the ring from 2 pixels to 2 FWHM: holes."
    )
    known = np.isfinite(rim)
    holes = Left(int((rim[known] < 1.0).sum()), int(known.sum()))
    return [*metrics, _left(f"{name}.holes", holes, text, most=0.0)]


@of_coadds
def depths(band: str, coadd: CoaddFigures) -> list[Metric]:
    """Signal-to-noise of faint stars over the largest possible."""
    text = (
        "Signal-to-noise of a faint star on the coadd with the best Moffat filter, over the root "
        "of the sum over exposures of sum(P^2) / variance, from the true PSF, sky, clouds and "
        "readout of the simulation: 1 loses nothing."
    )
    return [_ratio(f"coadd.depth_ratio.{band}", coadd.depth, text, least=0.97)]


def noise(material: Material) -> list[Metric]:
    """Compare VARIANCE with the noise of empty sky."""
    metrics = []
    for band in material.coadds:
        ccds = material.of(band)
        text = "Variance of pixels of empty sky over VARIANCE, median over CCDs."
        ratio = _together([one.noise_stated for one in ccds])
        metrics.append(_ratio(f"calexp.variance.{band}.stated", ratio, text, least=0.99, most=1.01))
        text = (
            "Variance of pixels of empty sky over that of photons, dark current and readout in the "
            "simulation: what the calibration adds."
        )
        ratio = _together([one.noise_photons for one in ccds])
        metrics.append(_ratio(f"calexp.variance.{band}.photons", ratio, text, most=1.005))
        text = "Variance of fluxes of empty circles of 1.5 FWHM over the sum of VARIANCE in them."
        ratio = _together([one.aperture_stated for one in ccds])
        metrics.append(
            _ratio(f"calexp.variance.{band}.apertures", ratio, text, least=0.97, most=1.03)
        )
    return metrics


@of_coadds
def coadd_noise(band: str, coadd: CoaddFigures) -> list[Metric]:
    """Compare the variance plane (SWarp: the weights) with the noise of empty sky."""
    name = f"coadd.variance.{band}"
    text = "Variance of pixels of empty sky over what the variance plane (SWarp: weights) says."
    stated = _ratio(f"{name}.stated", coadd.noise_stated, text)
    text = (
        "The same over photons and readout of the exposures with the same weights: more is what "
        "calibration, masks and rejected values add."
    )
    photons = _ratio(f"{name}.photons", coadd.noise_photons, text)
    text = (
        "Variance of fluxes of empty circles of 1.5 FWHM over the sum of VARIANCE in them; large "
        "apertures should have 1 / 0.798 = 1.25 (lanczos3; SWarp's weights leave this out: 1)."
    )
    return [stated, photons, _ratio(f"{name}.apertures", coadd.aperture_stated, text)]


def psf_residuals(material: Material) -> list[Metric]:
    """PSF models against stars that they were not made of, and against the true PSF."""
    metrics = []
    for band in material.coadds:
        for kind, goal, what in (
            ("reserved", 0.5, "stars that the model was not made of (signal-to-noise > 20)"),
            ("true", 0.3, "the true PSF of the simulation at places of stars"),
        ):
            parts = [getattr(one, f"psf_{kind}") for one in material.of(band)]
            shapes = Shapes(*(np.concatenate(column) for column in zip(*parts, strict=True)))
            name = f"psf.{kind}.{band}"
            metrics += _shape_metrics(name, shapes, what, (goal, 0.002))
            if kind == "true":
                size, e1, e2 = (one[np.isfinite(one)] for one in shapes)
                known = np.concatenate([e1, e2])
                text = "Scatter of the same residual sizes: errors of the model over the field."
                value = 100.0 * mad_sigma(size) if size.size else None
                metrics.append(Metric(f"{name}.size_scatter", value, "%", text, n=size.size))
                text = "Scatter of one component of the residual ellipticity."
                value = mad_sigma(known) if known.size else None
                metrics.append(Metric(f"{name}.ellipticity_scatter", value, "", text, n=e1.size))
    return metrics


def _shape_metrics(
    name: str, shapes: Shapes, what: str, goals: tuple[float, float]
) -> list[Metric]:
    """Return the residual size and ellipticity of stars; goals in percent, and of ellipticity."""
    size, most = goals
    text = f"Size (root of second moment) of {what} over that of the model - 1; median."
    metrics = [_bias(f"{name}.size", typical(shapes.size), text, least=-size, most=size)]
    e1, e2 = (one[np.isfinite(one)] for one in (shapes.e1, shapes.e2))
    known = np.concatenate([e1, e2])
    text = f"Ellipticity of {what} minus that of the model: larger median of e1 and e2."
    value = max(abs(np.median(e1)), abs(np.median(e2))) if known.size > 5 else None
    error = 1.2533 * mad_sigma(known) / np.sqrt(e1.size) if known.size > 5 else None
    ellipticity = Metric(f"{name}.ellipticity", value, "", text, most=most, error=error, n=e1.size)
    return [*metrics, ellipticity]


def coadd_psf_residuals(material: Material) -> list[Metric]:
    """Compare the PSF of the coadds with their stars."""
    kinds = {
        "stars": "bright isolated stars on the coadd",
        "noise_free": "isolated stars on the noise-free coadd",
    }
    return [
        metric
        for band, programs in material.coadds.items()
        for kind, shapes in programs[OURS].psf.items()
        for metric in _shape_metrics(f"coadd.psf.{kind}.{band}", shapes, kinds[kind], (0.1, 5e-4))
    ]


def artifacts(material: Material) -> list[Metric]:
    """Cosmic rays, hot pixels and lost cores."""
    metrics = []
    for band in material.coadds:
        ccds = material.of(band)
        text = "Pixels with more than 5 sigma of cosmic rays that are not masked on calexps."
        name = f"calexp.cosmic_rays_left.{band}"
        metrics.append(_left(name, _sum([one.cosmic_rays for one in ccds]), text, most=1.0))
        text = "Hot pixels of more than 5 sigma that are not masked on calexps."
        name = f"calexp.hot_pixels_left.{band}"
        metrics.append(_left(name, _sum([one.hot_pixels for one in ccds]), text, most=1.0))
        text = (
            "Unsaturated stars of more than 5 sigma in a pixel with a masked one among the 3 x 3 "
            "central pixels, although nothing hit them within 4 pixels."
        )
        name = f"calexp.cores_lost.{band}"
        metrics.append(_left(name, _sum([one.cores for one in ccds]), text, most=0.1))
    return metrics


@of_coadds
def coadd_artifacts(band: str, coadd: CoaddFigures) -> list[Metric]:
    """Cosmic rays, hot pixels and lost cores on coadds."""
    text = (
        "Hits of cosmic rays and hot pixels of more than 5 sigma on an exposure that leave more "
        "than 5 sigma on the coadd, where the sky is faint."
    )
    left = _left(f"coadd.hits_left.{band}", coadd.hits, text, 0.01)
    text = (
        "Unsaturated stars (more than 30 sigma in 3 x 3 pixels) that miss more than 5 % and 5 "
        "sigma of the light of these pixels."
    )
    return [left, _left(f"coadd.cores_lost.{band}", coadd.cores, text, 0.1)]


def sky_left(material: Material) -> list[Metric]:
    """Sky that is left on calexps and coadds."""
    metrics = []
    for band in material.coadds:
        ccds = material.of(band)
        values = np.array([one.sky_left for one in ccds])
        values = values[np.isfinite(values)]
        text = "Median of empty sky on a CCD over the brightness of the sky: mean over CCDs."
        name = f"calexp.sky_left.{band}"
        error = 100.0 * float(np.std(values) / np.sqrt(max(values.size, 1)))
        metrics.append(
            Metric(name, 100.0 * float(values.mean()), "%", text, -0.02, 0.02, error, values.size)
        )
        text = "The same, standard deviation of CCDs."
        value = 100.0 * float(values.std())
        metrics.append(Metric(f"{name}.scatter", value, "%", text, most=0.05, n=values.size))
    return metrics


@of_coadds
def coadd_sky_left(band: str, coadd: CoaddFigures) -> list[Metric]:
    """Sky that is left on coadds."""
    name = f"coadd.sky_left.{band}"
    text = "Median of empty sky over the brightness of the sky; true light is taken off."
    median = Metric(name, 100.0 * coadd.sky_left, "%", text, -0.02, 0.02)
    text = "Its rms over blocks of 64 pixels, without noise."
    value = None if np.isnan(coadd.sky_structure) else 100.0 * coadd.sky_structure
    return [median, Metric(f"{name}.structure", value, "%", text)]


def times(material: Material) -> list[Metric]:
    """Wall and CPU time of the steps."""
    metrics = []
    for step, (wall, cpu) in material.survey.seconds.items():
        name = step.replace(", ", ".").replace(" ", "_")
        text = f"Of the step {step!r}, with all its processes, on a machine that may be busy."
        metrics.append(Metric(f"time.{name}.wall", wall, "s", text))
        metrics.append(Metric(f"time.{name}.cpu", cpu, "s", text))
    return metrics


FIGURES: list[Figure] = [
    ccds_done,
    astrometric_repeatability,
    absolute_positions,
    coadd_positions,
    photometric_repeatability,
    zero_points,
    coadd_fluxes,
    depths,
    noise,
    coadd_noise,
    psf_residuals,
    coadd_psf_residuals,
    artifacts,
    coadd_artifacts,
    saturated_fluxes,
    saturated_on_coadds,
    sky_left,
    coadd_sky_left,
    times,
]
