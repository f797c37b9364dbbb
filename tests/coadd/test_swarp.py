"""SWarp opens what coaddflow writes and makes the same coadd of it."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from astropy.io import fits
from skyscene import draw_star, make_ccd, make_tract, make_wcs, measure_star

from coaddflow.coadd.mean import CoaddInput, coadd_patch
from coaddflow.geometry.wcs_header import wcs_to_header
from coaddflow.image.masked_image import masked_image_hdus, write_fits
from coaddflow.settings.coadd import CoaddSettings
from coaddflow.settings.warp import WarpSettings
from coaddflow.warp.ccds import CcdImage, warp_patches

SWARP = shutil.which("SWarp") or shutil.which("swarp")
pytestmark = pytest.mark.skipif(SWARP is None, reason="SWarp is not installed (Debian: swarp)")

SHAPE, SIDE, SIGMA = (300, 300), 360, 5.0
SIP = {"A_2_0": 4e-5, "A_1_1": -3e-5, "B_0_2": 5e-5, "B_3_0": 1e-7}


def make_exposures(tract):
    """Four dithered, rotated, distorted exposures of 16 stars; and the places on the tract."""
    rng = np.random.default_rng(1)
    grid = np.linspace(75.0, SIDE - 75.0, 4)
    u, v = (p.ravel() + rng.uniform(-6.0, 6.0, 16) for p in np.meshgrid(grid, grid))
    ra, dec = tract.pixel_to_sky(u, v)
    exposures = {}
    for k in range(4):
        shift = tuple(rng.uniform(-8.0, 8.0, 2))
        wcs = make_wcs(SHAPE, 0.2, rotation=11.0 * k, shift=shift, sip=SIP)
        x, y = wcs.all_world2pix(ra, dec, 0)
        image = rng.normal(0.0, SIGMA, SHAPE)
        image += sum(draw_star(SHAPE, *place, 2e5, 4.0) for place in zip(x, y, strict=True))
        exposures[f"e{k}"] = CcdImage(make_ccd(image, SIGMA**2), wcs, 1.0)
    return exposures, u, v


def run_swarp(folder, tract, files):
    """Coadd with SWarp onto the pixels of the tract; return the image."""
    header = tract.wcs().to_header()
    header["NAXIS"], header["NAXIS1"], header["NAXIS2"] = 2, SIDE, SIDE
    (folder / "coadd.head").write_text(header.tostring(sep="\n", endcard=True) + "\n")
    options = {
        "IMAGEOUT_NAME": folder / "coadd.fits",
        "WEIGHTOUT_NAME": folder / "coadd.weight.fits",
        # extensions count from 0, the empty primary one: 1 is IMAGE, 3 is VARIANCE
        "WEIGHT_IMAGE": ",".join(f"{file}[3]" for file in files),
        "WEIGHT_TYPE": "MAP_VARIANCE",
        "RESCALE_WEIGHTS": "N",
        "COMBINE_TYPE": "WEIGHTED",
        "RESAMPLING_TYPE": "LANCZOS3",
        "RESAMPLE_DIR": folder,
        "FSCALASTRO_TYPE": "VARIABLE",
        "SUBTRACT_BACK": "N",
        "NTHREADS": 1,
        "VERBOSE_TYPE": "QUIET",
        "WRITE_XML": "N",
    }
    command = [SWARP, *(f"{file}[1]" for file in files), "-c", os.devnull]
    for name, value in options.items():
        command += [f"-{name}", str(value)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return fits.getdata(folder / "coadd.fits")


@pytest.mark.parametrize("compression", ["none", "lossless"])
def test_swarp_makes_the_same_coadd(tmp_path, compression):
    tract = make_tract(SIDE)
    exposures, u, v = make_exposures(tract)
    files, inputs = [], []
    for name, ccd in exposures.items():
        files.append(tmp_path / f"{name}.fits")
        write_fits(
            files[-1],
            masked_image_hdus(ccd.masked_image, wcs_to_header(ccd.wcs), compression=compression),
        )
        warp = dict(warp_patches(tract, {"0_0": (0,)}, {0: ccd}.__getitem__, WarpSettings()))
        inputs.append(CoaddInput(name, warp["0_0"], SIGMA**-2.0, seeing=0.8))
    ours = coadd_patch(inputs, (0, 0, SIDE, SIDE), CoaddSettings(), pixel_scale=0.2)
    theirs = run_swarp(tmp_path, tract, files)
    assert theirs.shape == (SIDE, SIDE)
    n_compared = 0
    for place in zip(u, v, strict=True):
        column, row = (round(p) for p in place)
        near = slice(row - 15, row + 16), slice(column - 15, column + 16)
        if ours.n_inputs[near].min() < 4:
            continue
        flux, x, y = measure_star(ours.masked_image.image, *place, radius=14)
        swarp_flux, swarp_x, swarp_y = measure_star(theirs, *place, radius=14)
        assert flux == pytest.approx(swarp_flux, rel=3e-3)
        assert np.hypot(x - swarp_x, y - swarp_y) < 0.02
        assert flux == pytest.approx(2e5, rel=3e-3)
        assert np.hypot(x - place[0], y - place[1]) < 0.01
        n_compared += 1
    assert n_compared >= 8
