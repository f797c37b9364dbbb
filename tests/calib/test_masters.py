"""Calibration frames and calexps of one CCD: one bad file costs as little as can be."""

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from coaddflow.calexp import job as calexp_job
from coaddflow.calexp.job import CcdFiles, make_calexp
from coaddflow.calib.frames import read_master, write_failed_master
from coaddflow.calib.masters import make_defects, make_master
from coaddflow.errors import CcdFailure, InputError, Reason, UnexpectedError
from coaddflow.instrument.camera import load_camera
from coaddflow.settings import Settings
from coaddflow.tables.exposures import ExposureRow
from coaddflow.tables.manifest import read_row

CAMERA = load_camera("mini")
SETTINGS = Settings()
SCIENCE = ExposureRow(
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


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_raw(path, level, seed, overscan=1000, stripes=0.0):
    """Write a raw file of the mini camera: a constant level above the overscan, with noise.

    Every other column of the light-sensitive pixels has ``stripes`` counts more.
    """
    rng = np.random.default_rng(seed)
    hdus = [fits.PrimaryHDU()]
    for detector in CAMERA.detectors:
        pixels = overscan + rng.normal(0.0, 3.0, (320, 368))
        for amplifier in detector.amplifiers:
            x0, y0, x1, y1 = amplifier.data
            pixels[y0:y1, x0:x1] += level
            pixels[y0:y1, x0:x1:2] += stripes
        hdu = fits.ImageHDU(pixels.round().astype(np.uint16), name=detector.extension)
        hdus.append(hdu)
    fits.HDUList(hdus).writeto(path)
    return str(path)


def truncate(path):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 8])


def test_a_broken_frame_is_left_out_while_enough_are_there():
    files = {write_raw(f"{i}.fits", 5.0, i): 0.0 for i in range(4)}
    truncate("1.fits")
    make_master("bias.fits", "bias", files, {}, CAMERA, 0, SETTINGS)
    bias = read_master("bias.fits", "bias")
    assert np.median(bias.image) == pytest.approx(5.0, abs=0.3)
    assert fits.getval("bias.fits", "CFNFRAME") == 3


def test_a_flat_without_light_or_overscan_is_left_out_while_enough_are_there():
    files = {write_raw(f"{i}.fits", 9000.0, i): 5.0 for i in range(5)}
    Path("1.fits").unlink()
    write_raw("1.fits", 0.0, 1)  # the lamp was off
    with fits.open("3.fits", mode="update") as hdus:
        for amplifier in CAMERA.detector(0).amplifiers:
            x0, y0, x1, y1 = amplifier.overscan
            hdus[CAMERA.detector(0).extension].data[y0:y1, x0:x1] = 0
    make_master("flat.fits", "flat", files, {}, CAMERA, 0, SETTINGS)
    flat = read_master("flat.fits", "flat")
    assert np.median(flat.image) == pytest.approx(1.0, abs=1e-3)
    assert fits.getval("flat.fits", "CFNFRAME") == 3


def test_a_master_that_cannot_be_made_fails_its_ccd_and_no_other():
    files = {write_raw(f"{i}.fits", 5.0, i): 0.0 for i in range(3)}
    truncate("1.fits")
    make_master("bias.fits", "bias", files, {}, CAMERA, 0, SETTINGS)
    with pytest.raises(CcdFailure, match=r"1\.fits"):
        read_master("bias.fits", "bias")
    # what is made with it fails as well, and says why
    flats = {write_raw(f"flat{i}.fits", 9000.0, 10 + i): 5.0 for i in range(3)}
    make_master("flat.fits", "flat", flats, {"bias": "bias.fits"}, CAMERA, 0, SETTINGS)
    make_defects("defects.fits", {"flat": "flat.fits"}, SETTINGS)
    row = calibrate({"bias": "bias.fits", "defects": "defects.fits"})
    assert (row.state, row.reason) == ("failed", "no_calibration")
    assert "bias.fits" in row.message


def test_missing_frames_fail_the_ccd_and_no_other():
    """The plan counts the frames of the table; fewer come here where files are missing."""
    files = {write_raw(f"{i}.fits", 5.0, i): 0.0 for i in range(2)}
    make_master("bias.fits", "bias", files, {}, CAMERA, 0, SETTINGS)
    assert fits.getval("bias.fits", "CFFAILED") == "missing_frames"
    with pytest.raises(CcdFailure, match="at least 3"):
        read_master("bias.fits", "bias")


def test_too_few_exposures_for_night_sky_is_a_mistake_of_the_settings():
    files = {write_raw(f"{i}.fits", 500.0, i): 30.0 for i in range(4)}
    settings = Settings(calibs={"flat": {"source": "night_sky"}})
    with pytest.raises(InputError, match="at least 5"):
        make_master("flat.fits", "flat", files, {}, CAMERA, 0, settings)
    assert not Path("flat.fits").exists()


def test_frames_of_several_nights_are_detrended_with_the_bias_of_theirs():
    """Stripes of 60 counts that only the bias of the second night has leave no trace."""
    flats, calibs_of_frames = {}, {}
    for night, stripes in enumerate((0.0, 60.0)):
        bias = f"bias{night}.fits"
        files = {write_raw(f"{night}z{i}.fits", 0.0, i, stripes=stripes): 0.0 for i in range(3)}
        make_master(bias, "bias", files, {}, CAMERA, 0, SETTINGS)
        for i in range(3):
            path = write_raw(f"{night}f{i}.fits", 3000.0, 10 + i, stripes=stripes)
            flats[path], calibs_of_frames[path] = 5.0, {"bias": bias}

    def stripes_of_flat(name, calibs, *of_frames):
        make_master(name, "flat", flats, calibs, CAMERA, 0, SETTINGS, *of_frames)
        image = read_master(name, "flat").image[:, :160]
        return float(np.median(image[:, 0::2]) - np.median(image[:, 1::2]))

    assert abs(stripes_of_flat("right.fits", {}, calibs_of_frames)) < 2e-4
    assert abs(stripes_of_flat("wrong.fits", {"bias": "bias0.fits"})) > 5e-3
    header = fits.getheader("right.fits")
    inputs = {header[f"INP{n:05d}"] for n in range(1, header["NINPUT"] + 1)}
    assert inputs == {*flats, "bias0.fits", "bias1.fits"}


def test_a_night_whose_bias_failed_costs_its_frames_only(caplog):
    write_failed_master("bias1.fits", "bias", CcdFailure(Reason.MISSING_FRAMES, "none is there"))
    biases = {write_raw(f"z{i}.fits", 0.0, i): 0.0 for i in range(3)}
    make_master("bias0.fits", "bias", biases, {}, CAMERA, 0, SETTINGS)
    flats = {write_raw(f"f{i}.fits", 3000.0, 10 + i): 5.0 for i in range(9)}
    calibs_of_frames = {path: {"bias": "bias0.fits"} for path in flats}
    failed = [f"f{i}.fits" for i in range(3, 9)]
    calibs_of_frames |= {path: {"bias": "bias1.fits"} for path in failed}
    make_master("flat.fits", "flat", flats, {}, CAMERA, 0, SETTINGS, calibs_of_frames)
    assert fits.getval("flat.fits", "CFNFRAME") == 3
    # together, and not one by one with the work begun anew for each
    (told,) = [one.getMessage() for one in caplog.records if "left out" in one.getMessage()]
    assert ", ".join(failed) in told


def test_a_frame_that_is_broken_costs_no_other_of_its_night():
    bias = "bias0.fits"
    biases = {write_raw(f"z{i}.fits", 0.0, i): 0.0 for i in range(3)}
    make_master(bias, "bias", biases, {}, CAMERA, 0, SETTINGS)
    flats = {write_raw(f"f{i}.fits", 3000.0, 10 + i): 5.0 for i in range(5)}
    Path("f2.fits").write_bytes(Path("f2.fits").read_bytes()[:4000])
    calibs_of_frames = {path: {"bias": bias} for path in flats}
    make_master("flat.fits", "flat", flats, {}, CAMERA, 0, SETTINGS, calibs_of_frames)
    assert fits.getval("flat.fits", "CFNFRAME") == 4


def calibrate(calibs=None, raw=True):
    """Do the job of CCD 0 of an exposure without stars; products of an earlier run are there."""
    if raw:
        write_raw("7.fits", 500.0, 99)
    files = CcdFiles("7.fits", calibs or {}, "calexp/7/0.json", "summary/7.ecsv")
    Path("stars.csv").write_text("ra,dec,mag\n150.0,2.0,15.0\n150.01,2.0,16.0\n")
    for path in (files.calexp, files.sources, files.row, files.manifest):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("old")
    settings = Settings(refcat={"path": "stars.csv"})
    make_calexp(SCIENCE, 0, files, CAMERA, settings)
    assert not Path(files.manifest).exists()
    return read_row(files.row)


@pytest.mark.parametrize(("raw", "reason"), [(False, "missing_file"), (True, "no_stars")])
def test_a_ccd_that_fails_has_a_row_with_the_reason_and_nothing_else(raw, reason):
    row = calibrate(raw=raw)
    assert (row.state, row.reason, row.exposure, row.ccd) == ("failed", reason, "7", 0)
    assert [path.name for path in Path("calexp/7").iterdir()] == ["0.json"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (InputError("wrong setting"), InputError),
        (MemoryError(), MemoryError),
        (OSError(5, "input/output error"), OSError),
        (AttributeError("no attribute 'x'"), UnexpectedError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_the_fault_of_a_ccd_fails_the_job(monkeypatch, error, raised):
    def measure_ccd(*_):
        raise error

    monkeypatch.setattr(calexp_job, "measure_ccd", measure_ccd)
    with pytest.raises(raised):
        calibrate()
    assert not Path("calexp/7/0.json").exists()
