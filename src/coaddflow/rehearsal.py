"""A survey of one small CCD, from raw frames to coadds, run to have all functions compiled.

A job that is the first to call a compiled function waits until it is compiled: 50 seconds in all.
Here the jobs of a survey run once, one after the other, on raw frames that are made up, with one
worker: what they call is then compiled, for the types of arrays that they call it with, and kept
(`compiled.cache_folder`).
"""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from astropy.io import fits
from astropy.table import Table
from numpy.typing import NDArray

from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.calexp.job import CcdFiles, make_calexp
from coaddflow.calib.masters import make_defects, make_master
from coaddflow.coadd.patch import make_coadd
from coaddflow.coadd.readers import LayeredWarp
from coaddflow.coadd.spool import Spool, write_warp
from coaddflow.coadd.tract_job import make_tract_coadds
from coaddflow.corners.build import build_tract_database
from coaddflow.exposure.gather import make_manifest
from coaddflow.image.masked_image import MaskedImage
from coaddflow.instrument.camera import Camera, load_camera
from coaddflow.settings import Settings, load_settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables import paths
from coaddflow.tables.exposures import ExposureRow
from coaddflow.warp.job import make_warps

CCD, BAND, SIZE, OVERSCAN = 0, "r", 480, 16
SCALE, RA, DEC = 0.4, 150.0, 2.0
GAIN, BIAS, SATURATION, FULL_WELL = 2.0, 1000, 60000, 110000.0
SEEING, SKY, TIME = 3.2, 900.0, 100.0
N_CALIBS, N_EXPOSURES, N_STARS = 3, 4, 90
PATCHES = ("0_0", "1_0")

_CAMERA: dict[str, Any] = {
    "name": "rehearsal",
    "description": "One CCD with one amplifier",
    "pixel_scale": SCALE,
    "pixel_size": 0.015,
    "layout": {"files": "exposure", "names": ["*.fits"]},
    "header": {
        "exposure": {"keyword": "NUMBER"},
        "kind": {"keyword": "KIND"},
        "band": {"keyword": "FILTER"},
        "ra": {"keyword": "RA"},
        "dec": {"keyword": "DEC"},
        "rotation": {"default": 0.0},
        "mjd": {"keyword": "MJD"},
        "exposure_time": {"keyword": "EXPTIME"},
    },
    "detectors": [
        {
            "id": CCD,
            "name": "only",
            "extension": 0,
            "center": [0.0, 0.0],
            "size": [SIZE, SIZE],
            "amplifiers": [
                {
                    "name": "A",
                    "data": [0, 0, SIZE, SIZE],
                    "overscan": [SIZE, 0, SIZE + OVERSCAN, SIZE],
                    "target": [0, 0, SIZE, SIZE],
                    "gain": GAIN,
                    "read_noise": 6.0,
                    "saturation": SATURATION,
                }
            ],
            "defects": [[99, 0, 100, SIZE], [200, 200, 210, 212]],  # filled, and too large for it
        }
    ],
}

_SETTINGS: dict[str, Any] = {
    "camera": "camera.yaml",
    "exposures": "exposures.ecsv",
    "refcat": {"path": "stars.fits", "bands": {BAND: {"magnitude": "mag"}}},
    "skymap": {
        "kind": "tangent",
        "pixel_scale": SCALE,
        "patch_inner_size": SIZE // 2,
        "patch_border": 20,
        "tangent": {"ra": RA, "dec": DEC, "width": 0.05, "height": 0.05},
    },
    "cosmics": {"iterations": 2},
    "coadd": {"background_matching": {"enabled": True}},
    "parallel": {"coadd": "tract", "backend": "serial"},
}


@dataclass(frozen=True)
class _Sky:
    """Stars: positions in degrees, fluxes in electrons."""

    ra: NDArray[np.float64]
    dec: NDArray[np.float64]
    flux: NDArray[np.float64]


def rehearse() -> None:
    """Make and process the survey in a temporary folder, which is removed afterwards.

    The working folder of the process is changed meanwhile.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("camera.yaml").write_text(yaml.safe_dump(_CAMERA), encoding="utf-8")
        camera, settings = load_camera("camera.yaml"), load_settings(_SETTINGS)
        random = np.random.default_rng(1)
        sky = _make_sky(random)
        calibs = _make_masters(camera, settings, random)
        manifests = [
            _make_exposure(number, sky, camera, calibs, settings, random)
            for number in range(N_EXPOSURES)
        ]
        _make_coadds(manifests, settings)
        _lay_two_ccds()


def _make_sky(random: np.random.Generator) -> _Sky:
    """Return stars on the area of the CCD, and write them as reference catalogue."""
    half = SIZE * SCALE / 3600 / 2
    ra = RA + random.uniform(-half, half, N_STARS) / np.cos(np.radians(DEC))
    dec = DEC + random.uniform(-half, half, N_STARS)
    flux = 10.0 ** random.uniform(4.0, 5.3, N_STARS)
    flux[0] = 3e7  # saturated
    Table({"ra": ra, "dec": dec, "mag": 30.0 - 2.5 * np.log10(flux / TIME)}).write("stars.fits")
    return _Sky(ra, dec, flux)


def _make_masters(
    camera: Camera, settings: Settings, random: np.random.Generator
) -> dict[str, str]:
    """Make bias, dark, flat and defects, each from few frames; return their files by kind."""
    response = 1.0 + 0.01 * random.standard_normal((SIZE, SIZE))
    level = {
        "bias": np.zeros((SIZE, SIZE)),
        "dark": np.full((SIZE, SIZE), 10.0),
        "flat": 2e4 * response,
    }
    made: dict[str, str] = {}
    for kind, electrons in level.items():
        frames = {
            _write_raw(f"{kind}{number}", electrons, random): TIME for number in range(N_CALIBS)
        }
        path = f"{kind}.fits"
        make_master(path, kind, frames, dict(made), camera, CCD, settings)
        made[kind] = path
    make_defects("defects.fits", {kind: made[kind] for kind in ("dark", "flat")}, settings)
    return made | {"defects": "defects.fits"}


def _make_exposure(
    number: int,
    sky: _Sky,
    camera: Camera,
    calibs: dict[str, str],
    settings: Settings,
    random: np.random.Generator,
) -> str:
    """Make a raw exposure, its calexp and its manifest; return the manifest."""
    exposure, ra = f"e{number}", RA + 0.0007 * number
    detector = camera.detector(CCD)
    wcs = predicted_wcs(camera, detector, ra, DEC, 0.0)
    electrons = np.full((SIZE, SIZE), SKY)
    places = wcs.all_world2pix(sky.ra, sky.dec, 0)
    for x, y, flux in zip(*places, sky.flux, strict=True):
        _add_star(electrons, x, y, flux)
    for x, y in random.integers(40, SIZE - 40, (20, 2)):  # cosmic rays
        electrons[y, x : x + 4] += 3000.0
    row = ExposureRow(
        exposure=exposure,
        kind="science",
        band=BAND,
        ra=ra,
        dec=DEC,
        rotation=0.0,
        mjd=60000.0 + number,
        exposure_time=TIME,
        path=_write_raw(exposure, electrons, random),
    )
    manifest = paths.MANIFEST.format(exposure=exposure)
    row_path = paths.ROW.format(exposure=exposure, ccd=CCD)
    files = CcdFiles(row.path, calibs, row_path, manifest)
    # with one thread and with two, which call other functions
    made = make_calexp(row, CCD, files, camera, settings, threads=1 + number % 2)
    make_manifest(manifest, [made], settings.calexp)
    return manifest


def _add_star(electrons: NDArray[np.float64], x: float, y: float, flux: float) -> None:
    """Add a Gaussian star."""
    sigma = SEEING / 2.3548
    across = np.exp(-0.5 * ((np.arange(SIZE) - x) / sigma) ** 2)
    along = np.exp(-0.5 * ((np.arange(SIZE) - y) / sigma) ** 2)
    electrons += flux / (2 * np.pi * sigma**2) * np.outer(along, across)


def _write_raw(name: str, electrons: NDArray[np.float64], random: np.random.Generator) -> str:
    """Write a raw frame of these electrons with noise and overscan; return its path."""
    counted = np.minimum(random.poisson(np.clip(electrons, 0.0, 1e9)), FULL_WELL) / GAIN
    counts = np.zeros((SIZE, SIZE + OVERSCAN))
    counts[:, :SIZE] = counted
    counts += BIAS + random.normal(0.0, 3.0, counts.shape)
    path = f"{name}.fits"
    fits.PrimaryHDU(np.clip(counts, 0, 65535).astype(np.uint16)).writeto(path)
    return path


def _make_coadds(manifests: list[str], settings: Settings) -> None:
    """Make the coadds as jobs of their own, and as a job of the tract."""
    tract = make_skymap(settings.skymap).tract(0)
    database = paths.TRACT_CORNERS.format(band=BAND, tract=0)
    build_tract_database(database, manifests, tract)
    warps = []
    for manifest in manifests:
        warps.append(paths.WARP_TABLE.format(tract=0, exposure=Path(manifest).stem))
        make_warps(warps[-1], manifest, tract, settings)
    for patch in PATCHES:
        image = paths.COADD.format(band=BAND, tract=0, patch=patch)
        make_coadd(image, database, warps, tract, BAND, patch, settings)
    make_tract_coadds(
        paths.COADD_TABLE.format(band=BAND, tract=0),
        database,
        SkymapSettings.model_dump(settings.skymap),
        0,
        BAND,
        PATCHES,
        settings,
        workers=1,
    )


def _lay_two_ccds() -> None:
    """Lay one CCD under another, as where two of an exposure are on the same rows of a patch."""
    shape, box = (30, 40), (0, 0, 40, 30)
    with Spool(1_000_000, ".", one_machine=True) as spool:
        warp = write_warp(spool.reserve(shape[0] * shape[1], "ccd"), box, MaskedImage.empty(shape))
        LayeredWarp([warp, warp], box).read_into(box, MaskedImage.empty(shape), (0, 0))
