"""A survey from detrended images to a coadd: coaddflow against the AstrOmatic programs.

    python benchmarks/survey_vs_astromatic.py [--exposures 12] [--pairs 5] [--folder FOLDER]

Simulates exposures of 6 CCDs of the size and places of DECam's (needs the extra `simulate`), as a
camera without bias, dark current, flat field and cosmic rays takes them, so that both sides begin
with the same detrended pixels and search no cosmic rays. Then both are run in turn on two cores:

- coaddflow as users run it: `snakemake --cores 2`, one job an exposure and a tract; images,
  variances and masks of calexps and coadds, PSF models, fluxes, outliers clipped;
- source-extractor (all exposures, two at a time), PSFEx, source-extractor again with the PSF models
  for PSF fluxes if --psf-fluxes is given, SCAMP on all exposures with the same reference catalogue,
  and SWarp, each with two threads. None of them makes masks or clips here.

CPU and wall seconds are medians over the pairs. Then the stars of both coadds are compared with
the truth. With --raw the survey has bias, darks, flats and cosmic rays, and only coaddflow runs,
from raw frames to coadds.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import sep
import yaml
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from child_time import cost_of
from scipy.spatial import cKDTree

from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.geometry.wcs_header import wcs_to_header
from coaddflow.instrument.camera import load_camera
from coaddflow.tables.exposures import read_exposures

REPOSITORY = Path(__file__).resolve().parents[1]
CCDS = (21, 22, 28, 35, 41, 42)
BAND, SCALE, MESH = "r", 0.263, 128
PROGRAMS = ("source-extractor", "psfex", "scamp", "SWarp")

PARAMETERS = """NUMBER X_IMAGE Y_IMAGE XWIN_IMAGE YWIN_IMAGE ERRAWIN_IMAGE ERRBWIN_IMAGE
ERRTHETAWIN_IMAGE FLUX_AUTO FLUXERR_AUTO MAG_AUTO MAGERR_AUTO FLUX_APER(3) FLUXERR_APER(3)
FLUX_RADIUS ELONGATION SNR_WIN FLAGS VIGNET(35,35)"""

KERNEL = """CONV NORM
1 2 1
2 4 2
1 2 1
"""


def main() -> None:
    """Simulate, run both in turn, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exposures", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to work, and keep what was simulated")
    parser.add_argument("--psf-fluxes", action="store_true", help="source-extractor: PSF fluxes")
    parser.add_argument("--raw", action="store_true", help="coaddflow alone, from raw frames")
    options = parser.parse_args()
    missing = [] if options.raw else [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (Debian has source-extractor, psfex, ...)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "exposures.ecsv").exists():
            simulate(folder, options)
        compete(folder, options)


# The survey -------------------------------------------------------------------------------------


def simulate(folder: Path, options: argparse.Namespace) -> None:
    """Make the raw frames, the settings of coaddflow, and images with a WCS for the others."""
    survey = {
        "camera": "decam" if options.raw else "camera.yaml",
        "ccds": list(CCDS),
        "bands": {BAND: {"exposures": options.exposures, "zero_point": 25.5, "sky": 21.0}},
        "survey": {"dither": 60.0, "rotation": 90.133, "rotation_error": 0.0},
        "stars": {"density": 8.0, "brightest": 13.0, "faintest": 24.0},
        "galaxies": {"density": 10.0},
    }
    settings = {
        "camera": survey["camera"],
        "exposures": "exposures.ecsv",
        "exclude_ccds": [d.id for d in load_camera("decam").detectors if d.id not in CCDS],
        "refcat": {"path": "data/refcat.fits", "bands": {BAND: {"magnitude": f"mag_{BAND}"}}},
        "skymap": {"kind": "tangent", "pixel_scale": SCALE},
        "parallel": {"calexp": "exposure", "coadd": "tract"},
        "exposure": {name: {"enabled": True} for name in ("astrometry", "photometry", "sky")},
    }
    if not options.raw:
        survey |= without_detector_effects()
        settings |= {"cosmics": {"enabled": False}, "exclude_ccds": []}
        settings["calibs"] = {
            kind: {"source": "none"} for kind in ("bias", "dark", "flat", "defects")
        }
        (folder / "camera.yaml").write_text(yaml.safe_dump(detrended_camera()))
    (folder / "simulation.yaml").write_text(yaml.safe_dump(survey))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    coaddflow = [sys.executable, "-m", "coaddflow"]
    run([*coaddflow, "simulate", "simulation.yaml", "data"], folder)
    run([*coaddflow, "ingest", "data/raw"], folder)
    if not options.raw:
        write_images(folder)
        write_reference(folder)


def without_detector_effects() -> dict:
    """Return what switches off, in the simulation, all that detrending would correct."""
    nothing = (
        "extra_bad_columns pixel_response large_response gain_error dark hot_pixels bias_level "
        "bias_structure bias_drift row_drift"
    )
    return {
        "detector": dict.fromkeys(nothing.split(), 0)
        | dict.fromkeys(("linearity", "crosstalk", "defects"), False),
        "optics": {"vignetting": 0.0, "pixel_area": False},
        "cosmic_rays": {"rate": 0.0},
        "satellites": {"every": 0},
        "calibration": {"bias": 0, "dark": 0, "flat": 0},
    }


def detrended_camera() -> dict:
    """Return a camera file: some CCDs of DECam whose raw pixels are electrons."""
    path = REPOSITORY / "src" / "coaddflow" / "instrument" / "cameras" / "decam.yaml"
    camera = yaml.safe_load(path.read_text())
    area = [0, 0, 2048, 4096]
    amplifier = {"name": "A", "data": area, "target": area, "gain": 1.0}
    amplifier |= {"read_noise": 7.0, "saturation": 60000.0}
    camera["name"], camera["crosstalk"] = "detrended", []
    camera["layout"]["name_form"] = "{exposure}.fits"
    camera["detector_defaults"] = {"size": area[2:], "amplifiers": [amplifier]}
    camera["detectors"] = [
        {key: ccd[key] for key in ("id", "name", "extension", "center", "rotation") if key in ccd}
        for ccd in camera["detectors"]
        if ccd["id"] in CCDS
    ]
    return camera


def write_images(folder: Path) -> None:
    """Write the raw pixels with the WCS that the pointing predicts, which SCAMP begins with."""
    camera = load_camera(str(folder / "camera.yaml"))
    (folder / "images").mkdir(exist_ok=True)
    for row in read_exposures(folder / "exposures.ecsv"):
        with fits.open(folder / row.path) as raw:
            hdus = fits.HDUList([fits.PrimaryHDU()])
            for detector in camera.detectors:
                wcs = predicted_wcs(camera, detector, row.ra, row.dec, row.rotation)
                header = wcs_to_header(wcs)
                header["GAIN"], header["SATURATE"], header["FILTER"] = 1.0, 60000.0, row.band
                header["EXPTIME"], header["MJD-OBS"] = row.exposure_time, row.mjd
                hdus.append(fits.ImageHDU(raw[detector.extension].data, header))
            hdus.writeto(folder / "images" / f"{row.exposure}.fits", overwrite=True)


def write_reference(folder: Path) -> None:
    """Write the reference catalogue as SCAMP reads it (FITS_LDAC)."""
    stars = Table.read(folder / "data" / "refcat.fits")
    error = np.full(len(stars), 5.0 / 3.6e6)
    table = Table(
        {
            "X_WORLD": np.asarray(stars["ra"], float),
            "Y_WORLD": np.asarray(stars["dec"], float),
            "ERRA_WORLD": error,
            "ERRB_WORLD": error,
            "MAG": np.asarray(stars[f"mag_{BAND}"], np.float32),
            "MAGERR": np.full(len(stars), 0.01, np.float32),
            "OBSDATE": np.full(len(stars), 2016.0),
        }
    )
    text = fits.Header([("SIMPLE", True), ("BITPIX", 8), ("NAXIS", 0)]).tostring().encode()
    cards = np.frombuffer(text, f"S{len(text)}")
    head = fits.BinTableHDU.from_columns(
        [fits.Column("Field Header Card", f"{len(text)}A", array=cards)], name="LDAC_IMHEAD"
    )
    objects = fits.table_to_hdu(table)
    objects.name = "LDAC_OBJECTS"
    hdus = fits.HDUList([fits.PrimaryHDU(), head, objects])
    hdus.writeto(folder / "reference.cat", overwrite=True)


# The competitors --------------------------------------------------------------------------------


def run_coaddflow(folder: Path, options: argparse.Namespace) -> None:
    """Run the workflow from the beginning, with two cores."""
    del options
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile")]
    run([*snakemake, "--cores", "2", "--quiet", "all"], folder)


def run_astromatic(folder: Path, options: argparse.Namespace) -> None:
    """Run source-extractor, PSFEx, SCAMP and SWarp."""
    work = folder / "astromatic"
    work.mkdir()
    (work / "parameters").write_text(PARAMETERS.replace(" ", "\n"))
    (work / "with_psf").write_text(
        PARAMETERS.replace("VIGNET(35,35)", "FLUX_PSF FLUXERR_PSF").replace(" ", "\n")
    )
    (work / "kernel").write_text(KERNEL)
    images = sorted((folder / "images").glob("*.fits"))

    def extract(image: Path, parameters: str, psf: Sequence[str] = ()) -> None:
        # as coaddflow: mesh of the sky, threshold of the sources that are measured
        run_program(
            ["source-extractor", str(image)],
            {
                "CATALOG_NAME": f"{image.stem}{'-psf' * bool(psf)}.cat",
                "CATALOG_TYPE": "FITS_LDAC",
                "PARAMETERS_NAME": parameters,
                "FILTER_NAME": "kernel",
                "DETECT_THRESH": 1.5,
                "ANALYSIS_THRESH": 1.5,
                "DETECT_MINAREA": 5,
                "BACK_SIZE": MESH,
                "PHOT_APERTURES": "6,9,15",
                "SATUR_KEY": "SATURATE",
                "GAIN_KEY": "GAIN",
                "NTHREADS": 1,
                **({"PSF_NAME": psf[0]} if psf else {}),
            },
            work,
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda image: extract(image, "parameters"), images))
    catalogues = [f"{image.stem}.cat" for image in images]
    psfex = {"PSF_SIZE": "31,31", "PSFVAR_DEGREES": 2, "NTHREADS": 2}
    psfex |= {"CHECKIMAGE_TYPE": "NONE", "CHECKPLOT_TYPE": "NONE", "CHECKPLOT_DEV": "NULL"}
    run_program(["psfex", *catalogues], psfex, work)
    if options.psf_fluxes:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda image: extract(image, "with_psf", [f"{image.stem}.psf"]), images))
    scamp = {
        "ASTREF_CATALOG": "FILE",
        "ASTREFCAT_NAME": str(folder / "reference.cat"),
        "ASTREFCENT_KEYS": "X_WORLD,Y_WORLD",
        "ASTREFERR_KEYS": "ERRA_WORLD,ERRB_WORLD,ERRTHETA_WORLD",
        "ASTREFMAG_KEY": "MAG",
        "ASTREFMAGERR_KEY": "MAGERR",
        "DISTORT_DEGREES": 3,
        "STABILITY_TYPE": "EXPOSURE",
        "CHECKPLOT_TYPE": "NONE",
        "CHECKPLOT_DEV": "NULL",
        "NTHREADS": 2,
    }
    run_program(["scamp", *catalogues], scamp, work)
    for image in images:
        # SWarp looks for the headers beside the images
        (folder / "images" / f"{image.stem}.head").write_bytes(
            (work / f"{image.stem}.head").read_bytes()
        )
    swarp = {
        "IMAGEOUT_NAME": "coadd.fits",
        "WEIGHTOUT_NAME": "coadd.weight.fits",
        "WEIGHT_TYPE": "BACKGROUND",
        "COMBINE_TYPE": "WEIGHTED",
        "RESAMPLING_TYPE": "LANCZOS3",
        "PIXELSCALE_TYPE": "MANUAL",
        "PIXEL_SCALE": SCALE,
        "BACK_SIZE": MESH,
        "NTHREADS": 2,
    }
    run_program(["SWarp", *map(str, images)], swarp, work)


def run_program(command: list[str], options: dict, folder: Path) -> None:
    """Run one of the AstrOmatic programs without a file of settings."""
    for name, value in options.items():
        command += [f"-{name}", str(value)]
    run([*command, "-c", os.devnull, "-VERBOSE_TYPE", "QUIET", "-WRITE_XML", "N"], folder)


def run(command: list[str], folder: Path) -> None:
    """Run a command; show what it said if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=folder, check=False, capture_output=True, text=True, env=environment
    )
    if ended.returncode != 0:
        sys.exit(f"{command[0]} failed:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")


def compete(folder: Path, options: argparse.Namespace) -> None:
    """Run both in turn and print medians; the first run, which compiles, does not count."""
    competitors = {"coaddflow": run_coaddflow, "AstrOmatic": run_astromatic}
    if options.raw:
        del competitors["AstrOmatic"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in competitors}
    for pair in range(options.pairs + 1):
        for name, competitor in competitors.items():
            for made in ("results", "astromatic", ".snakemake"):
                if (made == "astromatic") == (name == "AstrOmatic"):
                    shutil.rmtree(folder / made, ignore_errors=True)
            cost = cost_of(partial(competitor, folder, options))
            note = " (warm-up)" * (pair == 0)
            print(f"{name:12s} {cost.cpu:7.1f} CPU s {cost.wall:7.1f} s{note}", flush=True)
            if pair > 0 or options.pairs == 0:
                times[name].append((cost.cpu, cost.wall))
    print(f"\nmedians, {options.exposures} exposures of {len(CCDS)} CCDs: CPU s, wall s")
    medians = {n: [statistics.median(t) for t in zip(*v, strict=True)] for n, v in times.items()}
    for name, (cpu, wall) in medians.items():
        print(f"{name:12s} {cpu:7.1f} {wall:7.1f}")
    if not options.raw:
        ours, theirs = medians.values()
        print(
            "AstrOmatic / coaddflow: "
            + ", ".join(
                f"{what} {b / a:.2f}"
                for what, a, b in zip(("CPU", "wall"), ours, theirs, strict=True)
            )
        )
        compare(folder)


# What came out ----------------------------------------------------------------------------------


def compare(folder: Path) -> None:
    """Print how far the stars of both coadds are from the truth."""
    truth = Table.read(folder / "data" / "truth" / "sources.fits")
    truth = truth[truth["type"] == "star"]
    truth = truth[(truth[f"mag_{BAND}"] > 17.0) & (truth[f"mag_{BAND}"] < 20.0)]
    coadds = {
        "coaddflow": sorted((folder / "results" / "coadd" / BAND).glob("*/*.fits")),
        "AstrOmatic": [folder / "astromatic" / "coadd.fits"],
    }
    print("\nstars of 17 to 20 mag on the coadds: found, median offset in mas, scatter of fluxes")
    for name, paths in coadds.items():
        found = [measure(path, truth) for path in paths]
        offsets, ratios = (np.concatenate(column) for column in zip(*found, strict=True))
        scatter = 1.4826 * np.median(np.abs(ratios - np.median(ratios)))
        print(
            f"{name:12s} {len(offsets):6d} {np.median(offsets):7.1f} mas {1000 * scatter:6.1f} mmag"
        )


def measure(path: Path, truth: Table) -> tuple[np.ndarray, np.ndarray]:
    """Return offsets (mas) and magnitudes minus the truth of the stars on a coadd."""
    with fits.open(path) as hdus:
        hdu = hdus["IMAGE"] if "IMAGE" in hdus else hdus[0]
        image, wcs = np.nan_to_num(hdu.data.astype(np.float32)), WCS(hdu.header)
    x, y = wcs.all_world2pix(truth["ra"], truth["dec"], 0)
    margin = 20
    inside = (np.minimum(x, y) > margin) & (x < image.shape[1] - margin)
    inside &= y < image.shape[0] - margin
    true, magnitude = np.column_stack([x, y])[inside], np.asarray(truth[f"mag_{BAND}"])[inside]
    sources = sep.extract(image, 20.0, err=sep.Background(image).globalrms)
    tree = cKDTree(np.column_stack([sources["x"], sources["y"]]))
    distance, index = tree.query(true, distance_upper_bound=2.0)
    near = np.isfinite(distance)
    places = sources["x"][index[near]], sources["y"][index[near]]
    x, y, _ = sep.winpos(image, *places, np.full(near.sum(), 1.5))
    flux, _, _ = sep.sum_circle(image, x, y, 8.0)
    good = flux > 0
    offset = np.hypot(x - true[near, 0], y - true[near, 1])[good]
    difference = -2.5 * np.log10(flux[good]) - magnitude[near][good]
    return 1000 * SCALE * offset, difference - np.median(difference)


if __name__ == "__main__":
    main()
