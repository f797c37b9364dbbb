"""Photon transfer curves give back gain, read noise, linearity and full well of simulated flats."""

import json
import math

import numpy as np
import pytest
import yaml
from astropy.io import fits
from numpy.testing import assert_allclose
from scipy import ndimage

from coaddflow.calib.flat_pairs import FlatPair, PairOfFrames, find_pairs, measure_pair
from coaddflow.calib.photon_transfer import (
    camera_with,
    curve,
    fit_linearity,
    fit_photon_transfer,
)
from coaddflow.cli import main
from coaddflow.instrument.camera import load_camera, shipped_cameras, write_camera
from coaddflow.tables.exposures import ExposureRow

SHAPE = (400, 400)
TIMES = np.geomspace(0.5, 60.0, 14)


class Amplifier:
    """An amplifier that is known exactly, and its flats."""

    def __init__(self, seed, gain=1.7, read_noise=5.0, c2=0.0, repulsion=0.0, full=90_000.0):
        self.rng = np.random.default_rng(seed)
        self.gain, self.read_noise, self.c2 = gain, read_noise, c2
        self.repulsion, self.full = repulsion, full
        x = np.arange(SHAPE[1])
        self.response = 1.0 - 0.1 * (x / len(x)) ** 2 + 0.01 * self.rng.normal(size=SHAPE)
        self.response[:, 37] = 0.05

    def electrons(self, light):
        """Return the charges of a flat, whose pixels repel what would fill them further."""
        charge = self.rng.poisson(light * self.response).astype(float)
        charge += self.repulsion * light * ndimage.laplace(charge, mode="wrap")
        return np.minimum(charge, self.full)

    def flat(self, light):
        """Return a flat in counts above the bias."""
        true = self.electrons(light) / self.gain
        counts = true - self.c2 * true**2 + 2 * self.c2**2 * true**3
        return np.round(counts + self.rng.normal(0, self.read_noise / self.gain, SHAPE))

    def pair(self, time, rate=2000.0, lamp=0.0):
        """Return what is measured on a pair."""
        first, second = self.flat(rate * time), self.flat(rate * time * (1.0 + lamp))
        first[self.rng.integers(400, size=20), self.rng.integers(400, size=20)] += 3000.0
        noise = self.read_noise / self.gain
        overscan = tuple(np.round(self.rng.normal(1000.0, noise, (400, 40))) for _ in range(2))
        frames = PairOfFrames(
            first.astype(np.float32), second.astype(np.float32), overscan, 0.0, 1000.0, (time, time)
        )
        return measure_pair(frames)


@pytest.mark.parametrize(("gain", "read_noise"), [(1.7, 5.0), (4.0, 8.0), (0.7, 3.0)])
def test_gain_read_noise_and_brighter_fatter_are_found(gain, read_noise):
    repulsion = 1.5e-7
    amplifier = Amplifier(1, gain, read_noise, repulsion=repulsion)
    found = fit_photon_transfer([amplifier.pair(time) for time in TIMES if time < 40])
    assert found.gain == pytest.approx(gain, rel=0.004)
    assert abs(found.gain - gain) < 4 * found.gain_error
    assert found.read_noise == pytest.approx(np.hypot(read_noise, gain / np.sqrt(12)), rel=0.02)
    # var = mu ((1 - 4 k mu)^2 + 4 (k mu)^2), to first order mu + a mu^2
    assert found.brighter_fatter == pytest.approx(-8 * repulsion, rel=0.2)
    assert not found.is_full
    assert found.linearity == ()
    assert found.bias_level == 1000.0


def test_a_straight_line_would_be_wrong():
    """What the curve is for: the repulsion takes a tenth of the variance."""
    amplifier = Amplifier(1, 1.7, repulsion=1.5e-7)
    pairs = [amplifier.pair(time) for time in TIMES if time < 40]
    level, variance = np.array([(pair.level, pair.variance) for pair in pairs]).T
    slope, _ = np.polyfit(level, variance, 1)
    assert 1 / slope > 1.03 * 1.7


def test_the_full_well_is_where_the_variance_leaves_its_curve():
    amplifier = Amplifier(2, 1.7, full=60_000.0)
    pairs = [amplifier.pair(time) for time in np.geomspace(1.0, 60.0, 25)]
    found = fit_photon_transfer(pairs)
    assert found.is_full
    # the brightest pixels are full first; levels are 19 % apart
    assert 0.75 * 60_000 / 1.7 < found.full_well <= 60_000 / 1.7
    assert found.gain == pytest.approx(1.7, rel=0.005)


@pytest.mark.parametrize("c2", [8e-7, -6e-7])
def test_linearity_is_found_and_does_not_spoil_the_gain(c2):
    amplifier = Amplifier(3, 1.5, c2=c2)
    found = fit_photon_transfer([amplifier.pair(time) for time in TIMES if time < 40])
    counts = np.linspace(500.0, 40_000.0, 50)
    true = counts + sum(term * counts**k for k, term in enumerate(found.linearity, start=2))
    # exact inverse of what the amplifier does, up to a factor that is part of the gain
    light = np.linspace(400.0, 60_000.0, 400)
    exact = np.interp(counts, light - c2 * light**2 + 2 * c2**2 * light**3, light)
    ratio = true / exact
    assert_allclose(ratio / ratio[0], 1.0, atol=1.5e-3)
    assert found.gain == pytest.approx(1.5, rel=0.006)
    assert found.nonlinearity == pytest.approx(abs(c2) * 34_000, rel=0.5)


def test_an_offset_of_the_shutter_is_no_nonlinearity():
    times = np.geomspace(1.0, 50.0, 12)
    pairs = [FlatPair(t, 800.0 * (t + 0.05), 800.0 * (t + 0.05), 4.0, 10**6, 0.0) for t in times]
    linearity, deviation = fit_linearity(pairs)
    assert linearity == ()
    assert deviation < 1e-6


def test_a_lamp_that_scatters_is_no_nonlinearity():
    rng = np.random.default_rng(5)
    levels = 800.0 * TIMES * rng.normal(1.0, 0.01, len(TIMES))
    pairs = [FlatPair(t, z, z, 4.0, 10**6, 0.0) for t, z in zip(TIMES, levels, strict=True)]
    linearity, deviation = fit_linearity(pairs)
    assert linearity == ()
    assert 0.005 < deviation < 0.05


def test_levels_of_a_dimmed_lamp_say_nothing_of_linearity():
    amplifier = Amplifier(6)
    pairs = [amplifier.pair(10.0, rate=rate) for rate in np.geomspace(100, 6000, 8)]
    found = fit_photon_transfer(pairs)
    assert math.isnan(found.nonlinearity)
    assert found.gain == pytest.approx(1.7, rel=0.006)
    changed = camera_with(load_camera("mini"), {(0, "A"): found})
    assert changed.detector(0).amplifiers[0].linearity == (4.0e-7,), "what was known stays"


def test_a_lamp_that_drifts_within_a_pair_does_not_matter_and_a_larger_step_is_no_pair():
    amplifier = Amplifier(7)
    drifting, steady = amplifier.pair(10.0, lamp=0.05), amplifier.pair(10.0)
    assert drifting.lamp == pytest.approx(0.05, abs=0.001)
    per_count = [pair.variance / pair.level for pair in (drifting, steady)]
    assert per_count[0] == pytest.approx(per_count[1], rel=0.015)
    assert amplifier.pair(10.0, lamp=0.3) is None
    assert amplifier.pair(0.0) is None, "no light"


def test_pixels_without_a_value_do_not_count():
    amplifier = Amplifier(8)
    first, second = (amplifier.flat(20_000.0).astype(np.float32) for _ in range(2))
    whole = PairOfFrames(first.copy(), second, None, 0.0, 0.0, (1.0, 1.0))
    first[:200] = np.nan
    half = PairOfFrames(first, second, None, 0.0, 0.0, (1.0, 1.0))
    all_of_it, of_half = measure_pair(whole), measure_pair(half)
    assert of_half.n_pixels < 0.51 * all_of_it.n_pixels
    assert of_half.variance == pytest.approx(all_of_it.variance, rel=0.02)
    assert math.isnan(of_half.read_variance)
    first[:] = np.nan
    assert measure_pair(half) is None


def test_the_curve_is_a_line_without_repulsion():
    level = np.array([0.0, 100.0, 5e4])
    assert_allclose(curve(level, 2.0, 0.0, 3.0), level / 2.0 + 3.0)
    a, g = -2e-6, 2.0
    assert_allclose(curve(level, g, a, 3.0), (np.exp(2 * a * g * level) - 1) / (2 * a * g**2) + 3)


def test_too_few_levels_are_no_curve():
    amplifier = Amplifier(9)
    assert fit_photon_transfer([amplifier.pair(5.0) for _ in range(5)]) is None
    assert fit_photon_transfer([]) is None


def row(number, band="r", time=10.0, kind="flat", mjd=60000.0):
    return ExposureRow(
        **{"exposure": str(number), "kind": kind, "band": band, "ra": None, "dec": None},
        **{"rotation": None, "mjd": mjd, "exposure_time": time, "path": f"{number}.fits"},
    )


def test_flats_of_one_band_and_time_are_pairs():
    rows = [
        *(row(1, mjd=1.0), row(2, mjd=3.0), row(3, mjd=2.0)),  # three: one is left over
        *(row(4, time=20.0), row(5, time=20.001), row(6, "g"), row(7, "g", 11.0)),
        *(row(8, "", 0.0, "bias"), row(9, "i")),
    ]
    found = find_pairs(rows, "table.ecsv")
    assert [(a.exposure, b.exposure) for a, b in found.pairs] == [("1", "3"), ("4", "5")]
    assert [one.exposure for one in found.biases] == ["8"]


@pytest.mark.parametrize("name", shipped_cameras())
def test_a_camera_that_is_written_is_the_same_camera(name, tmp_path):
    camera = load_camera(name)
    write_camera(tmp_path / "copy.yaml", camera, "a copy")
    assert load_camera(tmp_path / "copy.yaml") == camera


# The command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flats(tmp_path_factory):
    """A folder with the raw flats and biases of the mini camera, and a table of them."""
    folder = tmp_path_factory.mktemp("flats")
    (folder / "raw").mkdir()
    camera = load_camera("mini")
    times = np.repeat(np.geomspace(1.0, 50.0, 10), 2)
    for number, time in enumerate([*times, 0.0, 0.0], start=1):
        hdus = [fits.PrimaryHDU()]
        cards = {"EXPID": number, "FILTER": "r", "EXPTIME": round(time, 3)}
        cards |= {"OBSTYPE": "FLAT" if time else "ZERO", "MJD-OBS": 60000 + number / 1000}
        hdus[0].header.update(cards)
        for detector in camera.detectors[:2]:
            counts = np.full((320, 368), 1000.0)
            rng = np.random.default_rng([number, detector.id])
            for amplifier in detector.amplifiers:
                x0, _, x1, _ = amplifier.data
                light = rng.poisson(1400.0 * time, (320, x1 - x0)) / amplifier.gain
                counts[:, x0:x1] += np.minimum(light, 28_000) + 3.0
                section = slice(x0, amplifier.overscan[2])
                counts[:, section] += rng.normal(
                    0, amplifier.read_noise / amplifier.gain, counts[:, section].shape
                )
            pixels = np.round(counts).astype(np.uint16)
            hdus.append(fits.ImageHDU(pixels, name=detector.extension))
        fits.HDUList(hdus).writeto(folder / "raw" / f"{number}.fits")
    settings = {"camera": "mini", "exposures": "exposures.ecsv", "exclude_ccds": [2, 3]}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_the_command_measures_and_writes_a_camera_file(flats, monkeypatch, capsys):
    monkeypatch.chdir(flats)
    assert main(["ingest", "raw"]) == 0
    capsys.readouterr()
    assert main(["ptc", "--workers", "2", "--write", "measured.yaml"]) == 0
    said = capsys.readouterr()
    assert "4 of 4 amplifiers have a curve, of 10 pairs" in said.out
    assert "CCD 1: " in said.err
    measured, stated = load_camera("measured.yaml"), load_camera("mini")
    for ccd in (0, 1):
        new, old = (camera.detector(ccd).amplifiers for camera in (measured, stated))
        for one, before in zip(new, old, strict=True):
            assert one.gain == pytest.approx(before.gain, rel=0.02)
            assert one.read_noise == pytest.approx(before.read_noise, rel=0.05)
            assert one.saturation == pytest.approx(1003 + 28_000 * 0.86, rel=0.2)
            assert one.linearity == ()
            assert one.data == before.data
    assert measured.detector(2) == stated.detector(2), "what was not measured stays"

    with pytest.raises(SystemExit):
        main(["ptc", "--write", "measured.yaml", "--ccds", "1"])
    assert "measured.yaml is there already" in capsys.readouterr().err


def test_the_command_tells_json_and_what_is_missing(flats, monkeypatch, capsys):
    monkeypatch.chdir(flats)
    assert main(["ingest", "raw"]) == 0
    capsys.readouterr()
    assert main(["ptc", "--json", "--ccds", "0"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(one["ccd"], one["amplifier"]) for one in rows] == [(0, "A"), (0, "B")]
    assert abs(rows[0]["gain"] - 1.7) < 4 * rows[0]["gain_error"] < 0.1
    assert main(["ptc", "--band", "g"]) == 2
    assert "no two flats of the same band and exposure time" in capsys.readouterr().err
