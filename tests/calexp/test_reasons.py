"""Every reason for which a CCD fails, from real bad input; and a mistake in the program.

The whole job of a CCD runs on a good frame of which one thing is spoilt.
"""

import weakref
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.io import fits
from astropy.table import Table
from starfield import add_stars, random_field

from coaddflow.astrometry import ccd as astrometry_ccd
from coaddflow.astrometry.ccd import CcdStars, solve_ccd
from coaddflow.astrometry.prediction import predicted_wcs
from coaddflow.calexp import ccd as calexp_ccd
from coaddflow.calexp import job as calexp_job
from coaddflow.calexp.job import CcdFiles, make_calexp
from coaddflow.calexp.product import read_calexp
from coaddflow.calib.frames import defects_frame, write_master
from coaddflow.calib.masters import make_defects, make_master
from coaddflow.errors import OF_EXPOSURE, CcdFailure, Reason, failing_ccd
from coaddflow.geometry.wcs import pixel_to_sky
from coaddflow.geometry.wcs_header import wcs_to_header
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.instrument.camera import camera_file, load_camera
from coaddflow.isr.detrend import CcdCalibs
from coaddflow.measure import stars as measure_stars
from coaddflow.measure.detection import detect_sources
from coaddflow.measure.psf_fit import fit_psf
from coaddflow.measure.stars import select_stars
from coaddflow.runtime.log import failed_for_good, job_log
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow, ImageRow
from coaddflow.tables.manifest import read_row

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CAMERA = load_camera("mini")
DETECTOR = CAMERA.detector(0)
SHAPE = DETECTOR.shape
EXPOSURE = ExposureRow(
    exposure="7",
    kind="science",
    band="r",
    ra=150.0,
    dec=2.0,
    rotation=0.0,
    mjd=60000.0,
    exposure_time=30.0,
    path="7.fits",
)
WCS = predicted_wcs(CAMERA, DETECTOR, EXPOSURE.ra, EXPOSURE.dec, EXPOSURE.rotation)


def electrons(x, y, flux, fwhm=4.0, sky=500.0, noise=True):
    """Return an image of stars as the sky sends it."""
    stars = np.zeros(SHAPE)
    add_stars(stars, x, y, flux, fwhm)
    return np.random.default_rng(3).poisson(stars + sky) if noise else stars + sky


class Frame:
    """A raw frame of CCD 0 with 42 stars, their catalogue, and what its job is given."""

    def __init__(self):
        rng = np.random.default_rng(5)
        grid = [axis.ravel() for axis in np.mgrid[24:296:7j, 24:296:6j]]
        self.x, self.y = grid + rng.uniform(-12, 12, (2, 42))
        self.flux = rng.permutation(np.geomspace(8e3, 2e5, 42))
        self.pixels = electrons(self.x, self.y, self.flux)
        self.magnitude = 27.0 - 2.5 * np.log10(self.flux)
        self.place = self.x.copy(), self.y.copy()
        self.overscan_noise = 3.0
        self.dtype = np.uint16
        self.settings = {"refcat": {"path": "stars.csv"}}
        self.calibs = {}
        self.camera = CAMERA
        self.path = Path("7.fits")

    def write(self):
        """Write raw file and catalogue."""
        rng = np.random.default_rng(4)
        raw = 1000.0 + rng.normal(0.0, self.overscan_noise, (320, 368))
        for amplifier in DETECTOR.amplifiers:
            (x0, y0, x1, y1), (i0, j0, i1, j1) = amplifier.data, amplifier.target
            own = self.pixels[j0:j1, i0:i1] / amplifier.gain
            raw[y0:y1, x0:x1] += own[:, ::-1] if amplifier.flip_x else own
        hdu = fits.ImageHDU(np.round(raw).astype(self.dtype), name=DETECTOR.extension)
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(self.path, checksum=True)
        ra, dec = pixel_to_sky(WCS, *self.place)
        lines = [
            f"{a!r},{d!r},{m!r}"
            for a, d, m in zip(ra.tolist(), dec.tolist(), self.magnitude.tolist(), strict=True)
        ]
        Path("stars.csv").write_text("\n".join(["ra,dec,mag", *lines]) + "\n")
        return self

    def change(self, function):
        """Write the files, then open the raw file and change it."""
        self.write()
        with fits.open(self.path, mode="update") as hdus:
            function(hdus)
        return self

    def run(self):
        """Do the job of the CCD and return its row."""
        if not self.path.exists() and not Path("stars.csv").exists():
            self.write()
        files = CcdFiles("7.fits", self.calibs, "calexp/7/0.json", "summary/7.ecsv")
        make_calexp(EXPOSURE, 0, files, self.camera, Settings(**self.settings))
        return read_row(files.row)


@pytest.fixture(autouse=True)
def frame(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Frame()


def test_the_good_frame_is_good(frame):
    row = frame.run()
    assert (row.state, row.reason) == ("done", "")
    assert row.zero_point == pytest.approx(27.0, abs=0.02)
    assert row.n_matched > 30


def dead(value):
    """Return what makes amplifier B of a raw frame dead."""

    def spoil(hdus):
        hdus[1].data[:, 184:] = value

    return spoil


@pytest.mark.parametrize("value", [0, 1000, 65535, np.nan], ids=str)
def test_a_dead_amplifier_is_bad_and_the_other_is_calibrated(frame, value):
    frame.settings["detrend"] = {"check_raw": False}
    if np.isnan(value):
        frame.dtype = np.float32
    row = frame.change(dead(value)).run()
    assert (row.state, row.reason) == ("done", "")
    assert row.zero_point == pytest.approx(27.0, abs=0.02)
    assert 0.5 <= row.lost_fraction < 0.52
    image = read_calexp(row.path).masked_image
    assert image.has_any(MaskPlane.BAD)[:, 160:].all()
    assert not np.isfinite(image.image[:, 170:]).any()
    good = image.image[5:-5, 5:155]
    assert np.isfinite(good).all()
    assert abs(np.median(good)) < 3.0
    sources = Table.read(Path(row.path).with_name("0_sources.fits"))
    assert np.max(sources["x"]) < 162


def test_a_readout_that_stopped_keeps_what_was_read(frame):
    def spoil(hdus):
        hdus[1].data[200:] = 65535
        hdus[1].data[199, 300:] = 65535

    frame.settings["detrend"] = {"check_raw": False}
    row = frame.change(spoil).run()
    assert row.state == "done"
    assert 0.37 < row.lost_fraction < 0.4
    image = read_calexp(row.path).masked_image
    assert image.has_any(MaskPlane.NO_DATA)[200:].all()
    assert not image.has_any(MaskPlane.NO_DATA)[:199].any()
    assert not image.has_any(MaskPlane.SAT)[206:].any()


def test_masters_of_a_ccd_with_a_dead_amplifier_serve_the_other(frame):
    """The amplifier is dead from now on, or from the second flat on."""
    rng = np.random.default_rng(9)
    settings = Settings(detrend={"check_raw": False}, calibs={"defects": {"min_frames": 2}})

    def exposures(kind, level):
        for number in range(4):
            raw = 1000.0 + rng.normal(0.0, 3.0, (320, 368))
            for amplifier in DETECTOR.amplifiers:
                x0, y0, x1, y1 = amplifier.data
                raw[y0:y1, x0:x1] += rng.poisson(level, (y1 - y0, x1 - x0))
            raw = np.round(raw).astype(np.uint16)
            if kind != "flat" or number > 0:
                raw[:, 184:] = 0
            hdu = fits.ImageHDU(raw, name=DETECTOR.extension)
            fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(f"{kind}{number}.fits")
            yield f"{kind}{number}.fits", 30.0

    for kind, level in (("bias", 0), ("dark", 1), ("flat", 20000)):
        made_with = {k: v for k, v in frame.calibs.items() if kind == "flat" or k == "bias"}
        files = dict(exposures(kind, level))
        make_master(f"{kind}.fits", kind, files, made_with, CAMERA, 0, settings)
        frame.calibs[kind] = f"{kind}.fits"
    make_defects("defects.fits", {"dark": "dark.fits", "flat": "flat.fits"}, settings)
    frame.calibs["defects"] = "defects.fits"
    frame.settings["detrend"] = {"check_raw": False}
    row = frame.change(dead(0)).run()
    assert (row.state, row.reason) == ("done", "")
    assert row.zero_point == pytest.approx(27.0, abs=0.02)
    image = read_calexp(row.path).masked_image
    assert image.has_any(MaskPlane.BAD)[:, 160:].all()
    assert np.mean(image.has_any(MaskPlane.BAD)[:, :160]) < 0.01


# The raw file


def missing_file(frame):
    frame.write().path.unlink()


def missing_extension(frame):
    frame.change(lambda hdus: hdus[1].header.set("EXTNAME", "CCD5"))


def missing_keyword(frame):
    content = yaml.safe_load(camera_file("mini").read_text())
    for amplifier in content["detector_defaults"]["amplifiers"]:
        amplifier["gain_keyword"] = "GAIN"
    Path("camera.yaml").write_text(yaml.safe_dump(content))
    frame.camera = load_camera("camera.yaml")


def not_fits(frame):
    frame.write().path.write_text("a web page that says: not found")


def truncated_file(frame):
    content = frame.write().path.read_bytes()
    frame.path.write_bytes(content[: len(content) // 2])


def damaged_file(frame):
    content = bytearray(frame.write().path.read_bytes())
    content[-50000] ^= 0xFF
    frame.path.write_bytes(bytes(content))


def wrong_shape(frame):
    def cut(hdus):
        hdus[1] = fits.ImageHDU(hdus[1].data[:100], name=DETECTOR.extension)

    frame.change(cut)


def constant(value):
    def spoil(frame):
        frame.dtype = np.float32

        def fill(hdus):
            hdus[1].data[:] = value

        frame.settings["detrend"] = {"check_raw": False}
        frame.change(fill)

    return spoil


def bad_overscan(frame):
    def spoil(hdus):
        for amplifier in DETECTOR.amplifiers:
            x0, y0, x1, y1 = amplifier.overscan
            hdus[1].data[y0:y1, x0:x1] = 0

    frame.settings["detrend"] = {"check_raw": False}
    frame.change(spoil)


# Its calibration frames


def no_calibration(frame):
    write_bad_pixels(np.zeros(SHAPE, bool))
    with fits.open("defects.fits", mode="update") as hdus:
        hdus[0].header["CFFAILED"] = "missing_frames"
    frame.calibs["defects"] = "defects.fits"


def write_bad_pixels(bad):
    write_master("defects.fits", defects_frame(bad), "defects", 1, fits.Header(), "none")


def failed_master(kind):
    """Return a function that has a calibration frame fail, and the CCD with it."""

    def spoil(frame):
        files = {}
        levels = {"missing_frames": [5.0] * 2, "broken_frames": [5.0] * 3, "dark_flat": [-20.0] * 3}
        for number, level in enumerate(levels.get(kind, [-20.0] * 5)):
            raw = Frame()
            raw.path, raw.pixels = Path(f"{number}.fits"), np.full(SHAPE, level)
            raw.write()
            files[str(raw.path)] = 30.0
        if kind == "broken_frames":
            Path("1.fits").write_bytes(Path("1.fits").read_bytes()[:100000])
        Path("stars.csv").unlink()
        source = {"source": "night_sky"} if kind == "no_sky" else {}
        settings = Settings(calibs={"flat": source})
        master = "bias" if kind in ("missing_frames", "broken_frames") else "flat"
        make_master(f"{master}.fits", master, files, {}, CAMERA, 0, settings)
        frame.calibs[master] = f"{master}.fits"

    return spoil


# Its pixels and sources


def no_data(frame):
    write_bad_pixels(np.ones(SHAPE, bool))
    frame.calibs["defects"] = "defects.fits"


def too_little_area(frame):
    bad = np.ones(SHAPE, bool)
    bad[:, :60] = False
    write_bad_pixels(bad)
    frame.calibs["defects"] = "defects.fits"


def too_many_cosmic_rays(frame):
    frame.pixels = frame.pixels + np.random.default_rng(6).normal(0.0, 300.0, SHAPE)


def detection_failed(frame):
    frame.pixels, frame.dtype = 1e12 * frame.pixels, np.float32
    frame.settings["detrend"] = {"saturation": False, "linearity": False}
    frame.settings["cosmics"] = {"enabled": False}


def no_stars(frame):
    frame.pixels = electrons([], [], [])


def no_psf_stars(frame):
    frame.pixels = electrons(frame.x[-2:], frame.y[-2:], frame.flux[-2:])


def no_aperture_correction(frame):
    x, y = (grid.ravel() for grid in np.mgrid[12:312:24, 12:312:24])
    frame.pixels = electrons(x, y, np.full(x.size, 1e5))
    bad = np.zeros(SHAPE, bool)
    bad[::24], bad[:, ::24] = True, True
    write_bad_pixels(bad)
    frame.calibs["defects"] = "defects.fits"
    frame.settings["interpolation"] = {"planes": []}


# Its place on the sky and its zero-point


def refcat_misses_field(frame):
    frame.place = frame.x + 1e5, frame.y


def too_few_stars(frame):
    frame.place = frame.x[:2], frame.y[:2]
    frame.magnitude = frame.magnitude[:2]


def no_astrometric_match(frame):
    frame.place = tuple(np.random.default_rng(7).uniform(8, 312, (2, 42)))


def astrometry_rms(frame):
    rng = np.random.default_rng(8)
    frame.place = frame.x + rng.normal(0, 0.5, 42), frame.y + rng.normal(0, 0.5, 42)
    frame.settings["astrometry"] = {"max_rms_pixels": 0.1}


def no_photometric_match(frame):
    frame.magnitude[1:] = np.nan


def not_finite(frame):
    frame.pixels = np.round(electrons(frame.x, frame.y, frame.flux, noise=False) / 1.7) * 1.7
    frame.overscan_noise = 0.0


# Images calibrated elsewhere


class Image(Frame):
    """An image that was calibrated elsewhere."""

    def __init__(self):
        super().__init__()
        self.header = wcs_to_header(WCS)
        self.shape = SHAPE

    def run(self):
        image = fits.ImageHDU(self.pixels.astype(np.float32), self.header)
        fits.HDUList([fits.PrimaryHDU(), image]).writeto(self.path)
        ny, nx = self.shape
        corners = pixel_to_sky(
            WCS, [-0.5, nx - 0.5, nx - 0.5, -0.5], [-0.5, -0.5, ny - 0.5, ny - 0.5]
        )
        row = ImageRow(
            exposure="7",
            ccd=0,
            band="r",
            mjd=60000.0,
            exposure_time=30.0,
            path="7.fits",
            hdu=1,
            nx=nx,
            ny=ny,
            footprint_ra=tuple(corners[0].tolist()),
            footprint_dec=tuple(corners[1].tolist()),
            electrons_per_unit=1.0,
            zero_point=27.0,
        )
        files = CcdFiles("7.fits", {}, "calexp/7/0.json", "summary/7.ecsv")
        own = {"names": ["*"], "zero_point": {"value": 27.0}}
        make_calexp(row, 0, files, None, Settings(calibrated=own))
        return read_row(files.row)


def changed_file(image):
    image.shape = (100, 100)


def no_wcs(image):
    del image.header["CTYPE1"]


SPOILT = {
    Reason.MISSING_FILE: missing_file,
    Reason.MISSING_EXTENSION: missing_extension,
    Reason.MISSING_KEYWORD: missing_keyword,
    Reason.NOT_FITS: not_fits,
    Reason.TRUNCATED_FILE: truncated_file,
    Reason.DAMAGED_FILE: damaged_file,
    Reason.CHANGED_FILE: changed_file,
    Reason.WRONG_SHAPE: wrong_shape,
    Reason.CONSTANT_IMAGE: constant(1000.0),
    Reason.ALL_ZERO: constant(0.0),
    Reason.ALL_NAN: constant(np.nan),
    Reason.NO_WCS: no_wcs,
    Reason.NO_CALIBRATION: no_calibration,
    Reason.MISSING_FRAMES: failed_master("missing_frames"),
    Reason.BROKEN_FRAMES: failed_master("broken_frames"),
    Reason.DARK_FLAT: failed_master("dark_flat"),
    Reason.NO_SKY: failed_master("no_sky"),
    Reason.BAD_OVERSCAN: bad_overscan,
    Reason.NO_DATA: no_data,
    Reason.TOO_LITTLE_AREA: too_little_area,
    Reason.TOO_MANY_COSMIC_RAYS: too_many_cosmic_rays,
    Reason.DETECTION_FAILED: detection_failed,
    Reason.NO_STARS: no_stars,
    Reason.NO_PSF_STARS: no_psf_stars,
    Reason.NO_APERTURE_CORRECTION: no_aperture_correction,
    Reason.REFCAT_MISSES_FIELD: refcat_misses_field,
    Reason.TOO_FEW_STARS: too_few_stars,
    Reason.NO_ASTROMETRIC_MATCH: no_astrometric_match,
    Reason.ASTROMETRY_RMS: astrometry_rms,
    Reason.NO_PHOTOMETRIC_MATCH: no_photometric_match,
    Reason.NOT_FINITE: not_finite,
}


@pytest.mark.parametrize("reason", SPOILT, ids=str)
def test_bad_input_fails_the_ccd_with_its_reason_and_leaves_nothing_else(frame, reason):
    spoilt = Image() if reason in (Reason.CHANGED_FILE, Reason.NO_WCS) else frame
    SPOILT[reason](spoilt)
    row = spoilt.run()
    assert row.state == "failed"
    if reason != Reason.NO_CALIBRATION and row.reason == Reason.NO_CALIBRATION:
        assert f"({reason}: " in row.message, "why the calibration frame could not be made"
    else:
        assert row.reason == reason
    assert row.message
    assert [path.name for path in Path("calexp/7").iterdir()] == ["0.json"]


def test_figures_that_are_not_finite_name_the_raw_file_and_what_to_check(frame):
    not_finite(frame)
    row = frame.run()
    assert row.message.startswith("7.fits: the measured ")
    assert "check the pixels of the image" in row.message


def a_star_without_pixels():
    image, *_ = random_field((200, 200), 12, np.random.default_rng(1), flux=(1e4, 1e5), sky=0.0)
    settings = Settings()
    detection = detect_sources(image, 4.0, settings.detection)
    stars = select_stars(detection.sources, settings.psf)
    x, y = (round(detection.sources[name][np.argmax(stars)]) for name in ("x", "y"))
    image.variance[max(y - 25, 0) : y + 25, max(x - 25, 0) : x + 25] = np.inf
    fit_psf(image, detection, stars, settings.psf)


def sources_without_errors():
    frame, settings = Frame(), Settings()
    ra, dec = pixel_to_sky(WCS, *frame.place)
    refcat = Table({"ra": ra, "dec": dec, "mag": frame.magnitude})
    errors = np.full(frame.x.size, np.inf)
    stars = CcdStars(frame.x, frame.y, frame.flux, errors, SHAPE)
    solve_ccd(stars, refcat, WCS, settings.astrometry)


SPOILT_WITHIN = {
    Reason.PSF_FIT_FAILED: a_star_without_pixels,
    Reason.ASTROMETRIC_FIT_FAILED: sources_without_errors,
}
"""What no raw frame that we know of leads to, but the input of a step."""


@pytest.mark.parametrize("reason", SPOILT_WITHIN, ids=str)
def test_bad_input_of_a_step_fails_the_ccd_with_its_reason(reason):
    with pytest.raises(CcdFailure) as failure:
        SPOILT_WITHIN[reason]()
    assert failure.value.reason == reason


def test_no_reason_is_without_a_test():
    of_gathering = {*OF_EXPOSURE, Reason.STRAY_WCS}  # tests/exposure/test_gather.py
    assert {*SPOILT, *SPOILT_WITHIN} == set(Reason) - of_gathering


# A mistake in the program


@pytest.mark.parametrize("step", ["find_cosmic_rays", "fit_psf", "solve_ccd", "calexp_header"])
@pytest.mark.parametrize(
    "error", [AttributeError("'NoneType' object has no attribute 'mask'"), TypeError("2 arguments")]
)
def test_a_mistake_in_the_program_fails_the_job_for_good(frame, monkeypatch, step, error):
    def break_down(*_arguments, **_options):
        raise error

    monkeypatch.setattr(calexp_ccd, step, break_down)
    with pytest.raises(SystemExit), job_log("job.log"):
        frame.run()
    text = Path("job.log").read_text()
    assert text.splitlines()[-1] == (
        f"coaddflow: failed: UnexpectedError: exposure 7, CCD 0: {type(error).__name__}: {error}"
    )
    assert "in break_down" in text, "the traceback leads to the line"
    assert failed_for_good(["job.log"])
    assert not [*Path().rglob("*.json"), *Path().rglob("*.ecsv"), *Path("calexp").rglob("*.fits")]


@pytest.mark.parametrize("call", [1, 2], ids=["of the prediction", "of the match"])
def test_a_mapping_that_no_wcs_can_express_fails_the_ccd(frame, monkeypatch, call):
    fit, calls = astrometry_ccd.fit_tan_sip, []

    def not_solvable_once(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise np.linalg.LinAlgError("Singular matrix")
        return fit(*arguments)

    monkeypatch.setattr(astrometry_ccd, "fit_tan_sip", not_solvable_once)
    row = frame.run()
    assert row.reason == "astrometric_fit_failed"
    assert row.message == (
        "7.fits: the mapping to the sky cannot be expressed as a TAN-SIP WCS "
        "(LinAlgError: Singular matrix)"
    )


def test_sizes_of_stars_that_cannot_be_fitted_fail_the_ccd(frame, monkeypatch):
    monkeypatch.setattr(measure_stars, "design_matrix", lambda u, *_: np.full((len(u), 6), np.nan))
    row = frame.run()
    assert row.reason == "no_psf_stars"
    assert row.message.startswith(
        "7.fits: the size of stars cannot be fitted over the CCD (LinAlgError: "
    )


def test_calibration_frames_are_released_before_the_search_for_cosmic_rays(frame, monkeypatch):
    """No other step takes as much memory: with the frames held, a job would be killed."""
    frames, search = [], calexp_ccd.find_cosmic_rays

    def read(_paths, _threads):
        bias = MaskedImage.empty(SHAPE)
        bias.image[:] = bias.variance[:] = 0.0
        bias.mask[:] = 0
        frames.append(weakref.ref(bias))
        return CcdCalibs(bias=bias)

    def search_without_frames(*arguments):
        assert [one() for one in frames] == [None]
        return search(*arguments)

    monkeypatch.setattr(calexp_job, "read_calibs", read)
    monkeypatch.setattr(calexp_ccd, "find_cosmic_rays", search_without_frames)
    assert frame.run().state == "done"


def test_only_what_a_library_raises_on_odd_data_fails_the_ccd():
    failing = Reason.NO_STARS, "stars cannot be counted", ZeroDivisionError
    with pytest.raises(CcdFailure) as failure, failing_ccd(*failing):
        raise ZeroDivisionError("division by zero")
    assert str(failure.value) == (
        "no_stars: stars cannot be counted (ZeroDivisionError: division by zero)"
    )
    with pytest.raises(NameError), failing_ccd(*failing):
        raise NameError("no such name")
