"""Damaged files end with a reason: no other exception, no hang, no memory, no other pixels.

300 files with the seed 1. Others: ``COADDFLOW_FUZZ_SEED=7 COADDFLOW_FUZZ_TIMES=10 pytest
tests/fuzz``; a failure names seed and number of the file.
"""

import contextlib
import os
import resource
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from mutations import OF_DATABASES, OF_FITS, OF_TABLES, hidden_from_sums, mutated

from coaddflow.calexp.imported import import_image
from coaddflow.calexp.product import done_row, read_calexp, read_sources, write_calexp
from coaddflow.calib.frames import read_master, write_master
from coaddflow.corners.build import build_tract_database
from coaddflow.corners.database import CornerDatabase
from coaddflow.errors import CcdFailure, CoaddflowError, InputError
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.image.checksum import wrong_sums
from coaddflow.image.masked_image import MaskedImage, write_fits
from coaddflow.ingest.calibrated_images import ingest_calibrated
from coaddflow.ingest.raw_exposures import ingest
from coaddflow.instrument.camera import load_camera
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.settings import Settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables.exposures import read_exposures, read_images
from coaddflow.tables.manifest import ccd_states, read_manifest, read_row, write_manifest, write_row

SEED = int(os.environ.get("COADDFLOW_FUZZ_SEED", "1"))
TIMES = int(os.environ.get("COADDFLOW_FUZZ_TIMES", "1"))

MOST_SECONDS = 10
"""Of CPU; twelve times as much by the clock, since other programs may keep the machine busy."""
MOST_BYTES = 1 << 30

SIZE = (64, 80)
WCS = {
    "CTYPE1": "RA---TAN-SIP",
    "CTYPE2": "DEC--TAN-SIP",
    "CRVAL1": 150.0,
    "CRVAL2": 2.2,
    "CRPIX1": 40.0,
    "CRPIX2": 32.0,
    "CD1_1": -1e-4,
    "CD2_2": 1e-4,
    "EQUINOX": 2000.0,
    "A_ORDER": 2,
    "B_ORDER": 2,
    "A_2_0": 1e-6,
}
CALIBRATED = Settings(
    calibrated={
        "table": "images.ecsv",
        "names": ["*.fits*"],
        "zero_point": {"keyword": "MAGZP"},
        "weight": {"kind": "inverse_variance", "hdu": 2},
        "mask": {"kind": "bits", "hdu": 3},
        "subtract_sky": "none",
        "seeing": {"value": 1.0},
    }
)


def raw_file(path, compressed=False):
    """Write a raw exposure of the camera `mini`, with checksums."""
    rng = np.random.default_rng(3)
    kind = fits.CompImageHDU if compressed else fits.ImageHDU
    primary = fits.PrimaryHDU()
    primary.header.update({"EXPID": "e1", "OBSTYPE": "OBJECT", "FILTER": "r", "RA": 150.0})
    primary.header.update({"DEC": 2.2, "ROTPA": 0.0, "MJD-OBS": 60000.0, "EXPTIME": 30.0})
    pixels = [rng.integers(30000, 34000, (320, 368), dtype=np.uint16) for _ in range(2)]
    hdus = [kind(array, name=f"CCD{n}") for n, array in enumerate(pixels)]
    fits.HDUList([primary, *hdus]).writeto(path, checksum=True)


def calibrated_file(path, compressed=False):
    """Write an image with its weight and mask, with checksums."""
    rng = np.random.default_rng(4)
    kind = fits.CompImageHDU if compressed else fits.ImageHDU
    image = rng.normal(100.0, 10.0, SIZE).astype(np.float32)
    options = {"compression_type": "GZIP_2", "quantize_level": 0} if compressed else {}
    header = fits.Header({"FILTER": "r", "EXPTIME": 30.0, "MJD-OBS": 60000.0, "MAGZP": 30.0} | WCS)
    hdus = [
        fits.PrimaryHDU(),
        kind(image, header, name="SCI", **options),
        kind(np.full(SIZE, 0.01, np.float32), name="WHT", **options),
        fits.ImageHDU(rng.integers(0, 2, SIZE).astype(np.int32), name="MSK"),
    ]
    fits.HDUList(hdus).writeto(path, checksum=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder of whole files of every kind that is read."""
    folder = tmp_path_factory.mktemp("whole")
    raw_file(folder / "raw.fits")
    raw_file(folder / "packed.fits.fz", compressed=True)
    calibrated_file(folder / "image.fits")
    calibrated_file(folder / "image.fits.fz", compressed=True)
    for name in ("image.fits", "image.fits.fz"):
        table = folder / f"{name}.ecsv"
        ingest_calibrated([folder / name], CALIBRATED.calibrated, table)
        (row,) = read_images(table)
        calexp = import_image(row_of(row, folder / name), CALIBRATED)
        product = folder / f"calexp{'' if name.endswith('s') else '_packed'}.fits"
        compression = "none" if name.endswith("s") else "lossless"
        sha256 = write_calexp(product, None, calexp, compression=compression)
        done = done_row(calexp, str(product), sha256)
    write_row(folder / "row.json", done)
    write_manifest(folder / "manifest.ecsv", [done.model_copy(update={"ccd": n}) for n in (0, 1)])
    ingest([folder / "raw.fits"], load_camera("mini"), folder / "exposures.ecsv")
    skymap = make_skymap(
        SkymapSettings(
            kind="tangent",
            pixel_scale=0.36,
            patch_inner_size=100,
            patch_border=10,
            tangent={"ra": 150.0, "dec": 2.2, "width": 0.02, "height": 0.02},
        )
    )
    build_tract_database(folder / "tract.sqlite", [folder / "manifest.ecsv"], skymap.tract(0))
    write_master(folder / "bias.fits", calexp.masked_image, "bias", 5)
    sources = fits.table_to_hdu(Table({"x": np.arange(50.0), "name": ["star"] * 50}))
    sources.name = "SOURCES"
    write_fits(folder / "sources.fits", [sources])
    return folder


def row_of(row, path):
    """Return the row of an image whose file is elsewhere."""
    names = ("path", "weight_path", "mask_path")
    return row.model_copy(update={name: str(path) for name in names if getattr(row, name)})


def raw_pixels(path):
    camera = load_camera("mini")
    with contextlib.suppress(CoaddflowError):
        ingest([path], camera, path.with_suffix(".ecsv"))
    raw = read_raw_ccd(path, camera, camera.detector(1))
    return [raw.arrays[0], raw.detector.amplifiers[0].gain]


def image_pixels(path, whole):
    with contextlib.suppress(CoaddflowError):
        ingest_calibrated([path], CALIBRATED.calibrated, path.with_suffix(".ecsv"))
    (row,) = read_images(whole.with_name(f"{whole.name}.ecsv"))
    calexp = import_image(row_of(row, path), CALIBRATED)
    return planes(calexp.masked_image, *pixel_to_sky(calexp.wcs, [0.0, 70.0], [0.0, 60.0]))


def planes(masked_image: MaskedImage, *more):
    return [masked_image.image, masked_image.variance, masked_image.mask, *more]


def checked(path):
    for problem in wrong_sums(path):
        raise InputError(problem, path)
    return path


def calexp_pixels(path):
    with contextlib.suppress(InputError):
        read_calexp(path)  # without the checksums nothing worse than other pixels may come
    return planes(read_calexp(checked(path)).masked_image)


def master_pixels(path):
    with contextlib.suppress(InputError, CcdFailure):
        read_master(path, "bias")
    return planes(read_master(checked(path), "bias"))


def source_columns(path):
    with contextlib.suppress(InputError):
        read_sources(path)
    return [np.asarray(read_sources(checked(path))["x"])]


def database_rows(path):
    with CornerDatabase(path) as database:
        database.meta()
        database.manifests()
        database.ccds()
        database.query_point(150.0, 2.2)
        for tract, patch in [(0, "0_0"), (0, "1_0")]:
            with contextlib.suppress(InputError):
                database.query_patch(tract, patch)
    # no checksum covers it


def manifest_rows(path):
    ccd_states(path)
    read_manifest(path)


CASES = {
    "raw.fits": (OF_FITS, 75, lambda path, _: raw_pixels(path)),
    "packed.fits.fz": (OF_FITS, 40, lambda path, _: raw_pixels(path)),
    "image.fits": (OF_FITS, 45, image_pixels),
    "image.fits.fz": (OF_FITS, 35, image_pixels),
    "calexp.fits": (OF_FITS, 15, lambda path, _: calexp_pixels(path)),
    "calexp_packed.fits": (OF_FITS, 10, lambda path, _: calexp_pixels(path)),
    "bias.fits": (OF_FITS, 10, lambda path, _: master_pixels(path)),
    "sources.fits": (OF_FITS, 10, lambda path, _: source_columns(path)),
    "manifest.ecsv": (OF_TABLES, 20, lambda path, _: manifest_rows(path)),
    "row.json": (OF_TABLES, 5, lambda path, _: read_row(path)),
    "exposures.ecsv": (OF_TABLES, 10, lambda path, _: read_exposures(path)),
    "image.fits.ecsv": (OF_TABLES, 5, lambda path, _: read_images(path)),
    "tract.sqlite": (OF_DATABASES, 20, lambda path, _: database_rows(path)),
}
"""Kinds of damage, number of files, and what reads a file of each kind."""


class TooLongError(BaseException):
    """Raised by the alarm; no reader catches it."""


@contextlib.contextmanager
def limited():
    """Limit time and memory beyond what the process has now."""

    def too_long(*_):
        raise TooLongError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    signals = (signal.SIGALRM, signal.SIGPROF)
    handlers = [signal.signal(number, too_long) for number in signals]
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, old[1]))
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    signal.alarm(12 * MOST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_AS, old)


def same(found, expected):
    """Return whether arrays are equal, NaN to NaN."""
    pairs = zip(found, expected, strict=True)
    return all(np.array_equal(a, b, equal_nan=np.asarray(b).dtype.kind == "f") for a, b in pairs)


def outcome(path, whole, read, expected):
    """Return what is wrong with how a damaged file ends; empty if nothing is."""
    try:
        with limited(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read(path, whole)
    except CoaddflowError:
        return ""
    except TooLongError:
        return f"took more than {MOST_SECONDS} s"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if expected is None or same(found, expected):
        return ""
    if hidden_from_sums(path.read_bytes(), whole.read_bytes()):
        return ""
    return "other pixels, and nothing said"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited on Linux only")
@pytest.mark.parametrize("name", CASES)
def test_damaged_files_end_with_a_reason(tmp_path, files, name):
    kinds, number, read = CASES[name]
    whole = files / name
    content = whole.read_bytes()
    has_sums = name.endswith((".fits", ".fz"))
    expected = read(whole, whole) if has_sums else None
    problems = []
    for n in range(number * TIMES):
        damaged, what = mutated(SEED, n, name, content, kinds)
        path = tmp_path / f"{n}_{name}"
        path.write_bytes(damaged)
        problem = outcome(path, whole, read, expected)
        if problem:
            problems.append(f"seed {SEED}, file {n} ({what}): {problem}")
        for made in tmp_path.glob(f"{n}_*"):
            made.unlink()
    assert not problems, "\n".join(problems)
