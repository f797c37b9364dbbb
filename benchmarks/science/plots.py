"""Plots of the figures; the same name for the same plot, so that runs are compared side by side."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from band import OURS
from figures import BRIGHT, FLUX_BINS, SATURATION_BINS, Material

from coaddflow.image.stamps import cut_stamps
from coaddflow.qa.metrics import Metric
from coaddflow.qa.star_fluxes import by_bin

mpl.use("Agg")
import itertools

from matplotlib import pyplot as plt

_STAMPS = 8


def draw_all(material: Material, metrics: list[Metric], folder: Path) -> list[Path]:
    """Draw all plots of all bands, and return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for band in material.coadds:
        for draw in (draw_exposures, draw_coadds, draw_saturated, draw_images):
            figure = draw(material, band)
            paths.append(folder / f"{draw.__name__[5:]}-{band}.png")
            figure.savefig(paths[-1], dpi=90)
            plt.close(figure)
    return paths


def draw_exposures(material: Material, band: str):
    """Positions, magnitudes and PSF on single exposures against the truth."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    ccds = material.of(band)
    column = {
        name: np.concatenate(
            [np.asarray(one.stars[name])[np.asarray(one.stars["clean"])] for one in ccds]
        )
        for name in (
            "ra",
            "true_ra",
            "true_dec",
            "dec",
            "magnitude",
            "true_magnitude",
            "photon_noise",
            "signal_to_noise",
        )
    }
    bright = column["signal_to_noise"] > BRIGHT
    east = (column["ra"] - column["true_ra"]) * np.cos(np.radians(column["true_dec"])) * 3.6e6
    north = (column["dec"] - column["true_dec"]) * 3.6e6
    axes[0, 0].plot(east[bright], north[bright], ".", ms=2)
    axes[0, 0].set(
        xlabel="east, mas",
        ylabel="north, mas",
        xlim=(-60, 60),
        ylim=(-60, 60),
        title=f"{band}: measured - true positions on exposures",
    )
    off = 1000.0 * (column["magnitude"] - column["true_magnitude"])
    axes[0, 1].plot(column["true_magnitude"], off, ".", ms=2)
    order = np.argsort(column["true_magnitude"])
    for sign in (-1, 1):
        axes[0, 1].plot(
            column["true_magnitude"][order],
            sign * 1000 * column["photon_noise"][order],
            "k-",
            lw=0.7,
        )
    axes[0, 1].set(
        xlabel="true magnitude",
        ylabel="measured - true, mmag",
        ylim=(-60, 60),
        title="PSF magnitudes; lines: photon noise",
    )
    sizes = [one.psf_true.size for one in ccds], [one.psf_reserved.size for one in ccds]
    for label, size in zip(("true PSF", "reserved stars"), sizes, strict=True):
        axes[1, 0].hist(
            100 * np.concatenate(size),
            np.linspace(-6, 6, 60),
            histtype="step",
            density=True,
            label=label,
        )
    axes[1, 0].set(xlabel="size / model - 1, %", title="PSF model")
    axes[1, 0].legend()
    e1 = np.concatenate([one.psf_true.e1 for one in ccds])
    e2 = np.concatenate([one.psf_true.e2 for one in ccds])
    axes[1, 1].plot(e1, e2, ".", ms=2)
    axes[1, 1].set(
        xlabel="e1 true - model",
        ylabel="e2",
        xlim=(-0.03, 0.03),
        ylim=(-0.03, 0.03),
        title="PSF model, ellipticity",
    )
    return figure


def draw_coadds(material: Material, band: str):
    """Fluxes on coadds by magnitude, ours beside SWarp's."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for shift, (program, coadd) in enumerate(material.coadds[band].items()):
        magnitude, flux = coadd.stars["magnitude"], coadd.stars["flux"]
        bins = by_bin(flux, magnitude, FLUX_BINS)
        middle = [(a + b) / 2 + 0.1 * shift for a, b in itertools.pairwise(FLUX_BINS)]
        value, error = ([100 * one[i] for one in bins.values()] for i in (0, 1))
        axes[0].errorbar(middle, value, error, fmt="o", ms=4, label=program)
        if program == OURS:
            axes[1].plot(magnitude, 100 * flux, ".", ms=2)
    axes[0].axhline(0, color="k", lw=0.5)
    axes[0].set(xlabel="magnitude", ylabel="flux / true flux - 1, %", title=f"{band}: coadds")
    axes[0].legend()
    axes[1].set(xlabel="magnitude", ylim=(-10, 10), title="coaddflow, each star, %")
    return figure


def draw_saturated(material: Material, band: str):
    """Fluxes and cores of saturated stars."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    above, deviation, rim = np.concatenate([one.saturated for one in material.of(band)]).T
    axes[0].plot(above, 1 + deviation, ".", ms=4, label="calexps")
    axes[1].plot(above, rim, ".", ms=4, label="calexps")
    for program, coadd in material.coadds[band].items():
        above, deviation, rim = coadd.saturated.T
        axes[0].plot(above, 1 + deviation, "o", ms=4, mfc="none", label=program)
        axes[1].plot(above, rim, "o", ms=4, mfc="none")
    axes[0].axhline(1, color="k", lw=0.5)
    axes[1].axhline(1, color="k", lw=0.5)
    axes[0].set(
        xlabel="magnitudes above saturation",
        ylabel="flux / true flux",
        ylim=(0, 1.5),
        xlim=(0, SATURATION_BINS[-1] + 0.5),
        title=f"{band}: saturated stars",
    )
    axes[1].set(
        xlabel="magnitudes above saturation",
        ylabel="core / rim",
        ylim=(0, 4),
        xlim=(0, SATURATION_BINS[-1] + 0.5),
        title="below 1: a hole",
    )
    axes[0].legend()
    return figure


def draw_images(material: Material, band: str):
    """Show the coadd, its residual from the truth, and the cores of saturated stars."""
    programs = material.coadds[band]
    ours = programs[OURS]
    figure = plt.figure(figsize=(13, 6.5 + 1.4 * len(programs)), layout="constrained")
    rows = figure.add_gridspec(1 + len(programs), _STAMPS, height_ratios=[5] + [1] * len(programs))
    half = _STAMPS // 2
    spread = 1.4826 * np.nanmedian(np.abs(ours.residual))
    for place, image, title in (
        (rows[0, :half], ours.image, f"{band}: coadd, asinh"),
        (rows[0, half:], ours.residual, "coadd - truth, -5 to 5 sigma"),
    ):
        axis = figure.add_subplot(place)
        shown = np.arcsinh(image / spread / 3) if image is ours.image else image / spread
        limits = (-0.5, 5) if image is ours.image else (-5, 5)
        axis.imshow(shown, origin="lower", vmin=limits[0], vmax=limits[1], cmap="gray")
        axis.set(title=title, xticks=[], yticks=[])
    order = np.argsort(ours.saturated_places[:, 2])
    chosen = ours.saturated_places[order[:: max(1, len(order) // _STAMPS)][:_STAMPS]]
    for line, (program, coadd) in enumerate(programs.items(), start=1):
        for index, (x, y, above) in enumerate(chosen):
            axis = figure.add_subplot(rows[line, index])
            stamp = cut_stamps(coadd.image, x, y, 14)[0][0]
            axis.imshow(
                np.arcsinh(stamp / np.nanpercentile(stamp, 97)), origin="lower", cmap="gray"
            )
            axis.set(xticks=[], yticks=[])
            if index == 0:
                axis.set_ylabel(program, fontsize=7)
            if line == 1:
                axis.set_title(f"+{above:.1f} mag", fontsize=8)
    return figure
