"""A simulated survey against its truth, and a coadd against a catalogue of reference stars."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sep
from astropy.io import fits
from astropy.table import Table
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from coaddflow.coadd.mean import Coadd
from coaddflow.coadd.product import read_coadd
from coaddflow.geometry import sphere
from coaddflow.geometry.wcs import sky_to_pixel
from coaddflow.geometry.wcs_header import read_wcs
from coaddflow.image.masked_image import AB_ZERO_POINT, MaskedImage, MaskPlane, read_masked_image
from coaddflow.instrument.camera import load_camera
from coaddflow.qa.coadd_check import (
    StarResiduals,
    check_stars,
    detect_on,
    empty_sky,
    sky_chi,
    sky_covariance,
    sky_noise,
)

_BRIGHT = (16.0, 21.0)
"""Magnitudes of the stars whose positions and fluxes are judged."""

_FAINTEST_KNOWN = 24.5
"""Fainter sources are not detected at 10 sigma, and would only hide what is spurious."""


@dataclass(frozen=True)
class BandFigures:
    """How good the coadds of a band are."""

    band: str
    """Band."""
    n_stars: int
    """Isolated bright stars that were measured."""
    position_rms: float
    """Of one axis, measured minus true, milliarcsec."""
    flux_bias: float
    flux_bias_error: float
    """Median of measured over true flux - 1, and its error."""
    chi: tuple[float, ...]
    """Standard deviation of empty sky over what the variance plane says, one a patch."""
    covariance: float
    """Variance of means of blocks over that of uncorrelated pixels, median of the patches."""
    n_sources: int
    n_spurious: int
    """Detections of 10 sigma, and those far from anything that is on the true sky."""


def check_band(results: str | Path, truth: str | Path, band: str) -> BandFigures:
    """Compare the coadds in the results of a run with the true sky of its simulated survey."""
    sky = Table.read(Path(truth) / "sources.fits")
    stars, chi, covariance, n_sources, n_spurious = [], [], [], 0, 0
    for coadd, header in coadds_of_band(results, band):
        image = coadd.masked_image
        wcs = read_wcs(header)
        # the shallow rim, which one exposure covers, has no clipping and few pixels
        image.mask[coadd.n_inputs < 3] |= np.int32(MaskPlane.NO_DATA)
        if np.mean(image.has_any(MaskPlane.NO_DATA)) > 0.5:
            continue
        x, y = sky_to_pixel(wcs, sky["ra"], sky["dec"])
        chi.append(sky_chi(image))
        covariance.append(sky_covariance(image))
        bright = (sky["type"] == "star") & (np.hypot(sky["pm_ra"], sky["pm_dec"]) < 1.0)
        bright &= (sky[f"mag_{band}"] > _BRIGHT[0]) & (sky[f"mag_{band}"] < _BRIGHT[1])
        bright &= np.isfinite(x)
        flux = 10.0 ** (-0.4 * (sky[f"mag_{band}"] - AB_ZERO_POINT))
        stars.append(check_stars(image, x[bright], y[bright], flux[bright]))
        known = np.isfinite(x) & (sky[f"mag_{band}"] < _FAINTEST_KNOWN)
        sources, fwhm = detect_on(image)
        sources = sources[np.asarray(sources["signal_to_noise"]) > 10.0]
        lonely = _distance(sources["x"], sources["y"], x[known], y[known]) > 2.0 * fwhm
        n_sources, n_spurious = n_sources + len(sources), n_spurious + int(lonely.sum())
    together = _together(stars)
    bias, error = together.flux_bias()
    scale = float(np.abs(header["CD1_1"]) * 3.6e6)
    return BandFigures(
        band=band,
        n_stars=len(together.index),
        position_rms=together.position_rms() * scale,
        flux_bias=bias,
        flux_bias_error=error,
        chi=tuple(chi),
        covariance=float(np.median(covariance)),
        n_sources=n_sources,
        n_spurious=n_spurious,
    )


def coadds_of_band(results: str | Path, band: str) -> Iterator[tuple[Coadd, object]]:
    """Yield the coadds of a band that have data, with the headers of their images."""
    for path in sorted((Path(results) / "coadd" / band).glob("*/*.fits")):
        coadd, header = read_coadd(path)
        if coadd.n_inputs.any():
            yield coadd, header


def trail_left(results: str | Path, truth: str | Path, exposure: str) -> tuple[float, float]:
    """Return the height of a satellite's trail on the warps of its exposure, and on the coadds.

    Means over empty sky along the true line, nJy per pixel.
    """
    table = Table.read(Path(truth) / "exposures.ecsv")
    row = table[table["exposure"].astype(str) == exposure][0]
    camera = load_camera(Path(truth) / "camera.yaml")
    t = np.linspace(0.0, 1.0, 20000)
    x_mm = row["trail"][0] + t * (row["trail"][2] - row["trail"][0])
    y_mm = row["trail"][1] + t * (row["trail"][3] - row["trail"][1])
    plane = camera.focal_to_tangent(x_mm, y_mm, row["rotation"])
    ra, dec = sphere.tan_deproject(*plane, row["ra"], row["dec"])
    on_warps, on_coadds = [], []
    for path in sorted((Path(results) / "warp").glob(f"*/{exposure}/*.fits")):
        tract, patch = path.parts[-3], path.name
        coadd, header = read_coadd(Path(results) / "coadd" / row["band"] / tract / patch)
        sky = empty_sky(coadd.masked_image) & (coadd.n_inputs >= 3)
        on_coadds.append(_values_at(coadd.masked_image, header, sky, ra, dec))
        warp, warp_header = read_masked_image(path)
        part = _on_warp(warp, warp_header, coadd, sky)
        part &= ~warp.has_any(MaskPlane.NO_DATA | MaskPlane.BAD)
        on_warps.append(_values_at(warp, warp_header, part, ra, dec))
    return float(np.mean(np.concatenate(on_warps))), float(np.mean(np.concatenate(on_coadds)))


def noise_gain(coadd: Coadd, warps: Sequence[str | Path]) -> float:
    """Return how many times lower the sky noise of a coadd is than that of its exposures.

    Where all exposures overlap; the median over the exposures, whose warps are given. For crowded
    fields: sources are enlarged by little, and what is left of the sky is followed closely, on both
    alike.
    """
    everywhere = coadd.n_inputs == coadd.n_inputs.max()

    def noise(image: MaskedImage, region: NDArray[np.bool_]) -> float:
        hidden = np.where(region, image.mask, np.int32(MaskPlane.NO_DATA))
        return sky_noise(MaskedImage(image.image, image.variance, hidden), mesh_size=32, grow=2)

    single = []
    for path in warps:
        warp, header = read_masked_image(path)
        single.append(noise(warp, _on_warp(warp, header, coadd, everywhere)))
    return float(np.median(single)) / noise(coadd.masked_image, everywhere)


def reference_stars_found(
    coadd: Coadd, header: object, stars: Table, min_inputs: int, window: float
) -> NDArray[np.float64]:
    """Return how far reference stars are from their places on a coadd.

    The windowed centroid (`sep.winpos`) that starts at the catalogue's place.

    Parameters
    ----------
    stars : astropy.table.Table
        Columns ra and dec, degrees.
    min_inputs : int
        Stars on pixels with fewer inputs are not inside of the field.
    window : float
        Standard deviation of the window, pixels.

    Returns
    -------
    ndarray of float64, shape (n stars inside,)
        Distances, pixels; NaN where there is nothing to be centred on.
    """
    x, y = sky_to_pixel(read_wcs(header), stars["ra"], stars["dec"])
    ny, nx = coadd.masked_image.shape
    inside = np.isfinite(x) & (x > 3) & (x < nx - 4) & (y > 3) & (y < ny - 4)
    x, y = x[inside], y[inside]
    deep = coadd.n_inputs[np.rint(y).astype(int), np.rint(x).astype(int)] >= min_inputs
    x, y = x[deep], y[deep]
    pixels = np.nan_to_num(coadd.masked_image.image)
    missing = ~np.isfinite(coadd.masked_image.image)
    found_x, found_y, _ = sep.winpos(pixels, x, y, np.full(x.size, window), mask=missing)
    return np.hypot(found_x - x, found_y - y)


def _together(parts: list[StarResiduals]) -> StarResiduals:
    names = ("index", "dx", "dy", "flux", "flux_error", "true_flux")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return StarResiduals(**columns, fwhm=float(np.median([part.fwhm for part in parts])))


def _distance(x: ArrayLike, y: ArrayLike, x_known: ArrayLike, y_known: ArrayLike) -> NDArray:
    return cKDTree(np.column_stack([x_known, y_known])).query(np.column_stack([x, y]))[0]


def _values_at(
    image: MaskedImage, header: object, usable: NDArray[np.bool_], ra: NDArray, dec: NDArray
) -> NDArray[np.float32]:
    """Return the values of usable pixels along a line on the sky, each pixel once."""
    x, y = sky_to_pixel(read_wcs(header), ra, dec)
    ny, nx = image.shape
    inside = np.isfinite(x) & (x > 0) & (x < nx - 1) & (y > 0) & (y < ny - 1)
    pixels = np.unique(np.rint(np.stack([y[inside], x[inside]])).astype(int), axis=1)
    rows, columns = pixels
    return image.image[rows, columns][usable[rows, columns]]


def _on_warp(
    warp: MaskedImage, header: fits.Header, coadd: Coadd, pixels: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Return which pixels of a warp are among some pixels of its coadd."""
    x, y = round(coadd.box[0] + header["LTV1"]), round(coadd.box[1] + header["LTV2"])
    found = np.zeros(warp.shape, bool)
    rows = slice(max(y, 0), min(y + pixels.shape[0], warp.shape[0]))
    columns = slice(max(x, 0), min(x + pixels.shape[1], warp.shape[1]))
    if rows.start < rows.stop and columns.start < columns.stop:
        found[rows, columns] = pixels[
            rows.start - y : rows.stop - y, columns.start - x : columns.stop - x
        ]
    return found
