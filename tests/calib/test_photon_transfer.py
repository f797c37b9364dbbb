"""Photon transfer curves give back gain, read noise, linearity and full well of simulated flats."""

import json
import math

import numpy as np
import pytest
import yaml
from astropy.io import fits
from numpy.testing import assert_allclose
from scipy import ndimage

from coaddflow.calib.flat_pairs import (
    FlatExposures,
    FlatPair,
    PairOfFrames,
    find_flats,
    measure_pair,
    measure_pairs,
    read_variance,
)
from coaddflow.calib.photon_transfer import (
    camera_with,
    curve,
    fit_linearity,
    fit_photon_transfer,
)
from coaddflow.cli import main
from coaddflow.instrument.camera import load_camera, shipped_cameras, write_camera
from coaddflow.settings.detrend import DetrendSettings
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

    def pair(self, time, rate=2000.0, lamp=0.0, tilt=0.0, level_noise=0.0, band="r"):
        """Return what is measured on a pair."""
        first, second = self.flat(rate * time), self.flat(rate * time * (1.0 + lamp))
        first[self.rng.integers(400, size=20), self.rng.integers(400, size=20)] += 3000.0
        second *= 1.0 + tilt * (np.arange(SHAPE[0]) / SHAPE[0] - 0.5)[:, None]
        first, second = (
            frame + self.rng.normal(0, level_noise, (SHAPE[0], 1)) for frame in (first, second)
        )
        noise = self.read_noise / self.gain
        overscan = (np.round(self.rng.normal(1000.0, noise, (400, 40))) for _ in range(2))
        return measure_pair(
            PairOfFrames(
                *(first.astype(np.float32), second.astype(np.float32)),
                *(read_variance(*overscan), (level_noise, level_noise)),
                *(1000.0, (time, time), band),
            )
        )


def ideal(time, level, gain=1.7, coefficient=-2e-6, noise=9.0, n_pixels=10**6, band="r"):
    """Return a pair without noise."""
    variance = float(curve(np.array(level), gain, coefficient, noise))
    return FlatPair(band, time, level, variance, noise, 1.02 * level, n_pixels, 0.0, 1000.0)


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
    assert not found.is_full_well_known
    assert math.isinf(found.next_level)
    assert found.linearity.terms == ()
    assert found.bias_level == 1000.0


def test_a_straight_line_would_be_wrong():
    """What the curve is for: the repulsion takes 7 % of the variance at the highest level."""
    amplifier = Amplifier(1, 1.7, repulsion=1.5e-7)
    pairs = [amplifier.pair(time) for time in TIMES if time < 40]
    slope, _ = np.polyfit([pair.level for pair in pairs], [pair.variance for pair in pairs], 1)
    assert 1 / slope > 1.03 * 1.7


def test_the_full_well_is_where_the_variance_leaves_its_curve():
    amplifier = Amplifier(2, 1.7, full=60_000.0)
    pairs = [amplifier.pair(time) for time in np.geomspace(1.0, 60.0, 35)]
    found = fit_photon_transfer(pairs)
    assert found.is_full_well_known
    # the brightest pixels are full first; levels are 13 % apart
    assert 0.85 * 60_000 / 1.7 < found.full_well <= 60_000 / 1.7
    assert found.gain == pytest.approx(1.7, rel=0.005)


def test_a_full_well_between_levels_far_apart_is_not_known():
    amplifier = Amplifier(2, 1.7, full=60_000.0)
    found = fit_photon_transfer([amplifier.pair(time) for time in np.geomspace(1.0, 60.0, 7)])
    assert found.full_well < 60_000 / 1.7 < 1.01 * found.next_level
    assert not found.is_full_well_known


@pytest.mark.parametrize("factor", [0.96, 1.04, 0.5, 0.01, 1e-7, -1.0])
def test_one_bad_pair_spoils_nothing(factor):
    for number in (0, 3, 8, 12):
        pairs = [ideal(time, 800.0 * time) for time in TIMES]
        pairs[number] = pairs[number]._replace(variance=factor * pairs[number].variance)
        found = fit_photon_transfer(pairs)
        assert found.gain == pytest.approx(1.7, rel=3e-3)
        assert found.full_well == pytest.approx(1.02 * 800 * TIMES[-1])
        assert not found.is_full_well_known


@pytest.mark.parametrize("c2", [8e-7, -6e-7])
def test_linearity_is_found_and_does_not_spoil_the_gain(c2):
    amplifier = Amplifier(3, 1.5, c2=c2)
    pairs = [amplifier.pair(time) for time in np.geomspace(0.5, 40.0, 16)]
    found = fit_photon_transfer(pairs)
    counts = np.linspace(500.0, 40_000.0, 50)
    terms = enumerate(found.linearity.terms, start=2)
    true = counts + sum(term * counts**k for k, term in terms)
    # exact inverse of what the amplifier does, up to a factor that is part of the gain
    light = np.linspace(400.0, 60_000.0, 400)
    exact = np.interp(counts, light - c2 * light**2 + 2 * c2**2 * light**3, light)
    ratio = true / exact
    assert_allclose(ratio / ratio[0], 1.0, atol=1.5e-3)
    assert found.linearity.is_good
    assert found.gain == pytest.approx(1.5, rel=0.006)
    assert found.linearity.deviation == pytest.approx(abs(c2) * 53_000, rel=0.1)


def test_an_offset_of_the_shutter_is_no_nonlinearity():
    found = fit_linearity([ideal(t, 800.0 * (t + 0.05)) for t in np.geomspace(1.0, 50.0, 12)])
    assert found.terms == ()
    assert found.deviation < 1e-6
    assert found.is_good


def test_each_band_has_a_rate_of_its_own():
    times = np.geomspace(1.0, 40.0, 9)
    pairs = [ideal(t, 500.0 * t, band="r") for t in times]
    pairs += [ideal(t, 1100.0 * t, band="g") for t in times if t < 30]
    assert fit_linearity(pairs)[:2] == ((), pytest.approx(0.0, abs=1e-9))
    bent = [one._replace(level=one.level - 3e-7 * one.level**2) for one in pairs]
    assert fit_linearity(bent).terms[0] == pytest.approx(3e-7, rel=0.02)


@pytest.mark.parametrize("n_times", [4, 6, 8, 14])
def test_a_lamp_that_scatters_is_no_nonlinearity(n_times):
    rng = np.random.default_rng(5)
    times = np.geomspace(0.5, 60.0, n_times)
    for _ in range(50):
        levels = 800.0 * times * rng.normal(1.0, 0.003, n_times)
        found = fit_linearity([ideal(t, z) for t, z in zip(times, levels, strict=True)])
        assert found.terms == ()


def test_light_that_does_not_follow_the_exposure_times_says_nothing():
    rng = np.random.default_rng(6)
    for _ in range(20):  # as in twilight
        pairs = [ideal(t, z) for t, z in zip(TIMES, 2e4 * rng.lognormal(0, 0.35, 14), strict=True)]
        assert not fit_linearity(pairs).is_good
    assert not fit_linearity([ideal(10.0, level) for level in (1e3, 3e3, 1e4, 3e4)]).is_good
    assert not fit_linearity([]).is_good


def test_what_was_known_of_linearity_counts_and_stays_where_flats_do_not_show_it():
    c2 = 4e-7
    pairs = []
    for level in np.geomspace(300.0, 35_000.0, 12):
        counts = level - c2 * level**2 + 2 * c2**2 * level**3
        slope = 1 / (1 - 2 * c2 * level + 6 * c2**2 * level**2)
        one = ideal(10.0, level)
        pairs.append(one._replace(level=counts, variance=one.variance / slope**2))
    with_it, without = (fit_photon_transfer(pairs, known) for known in ((c2,), ()))
    assert with_it.gain == pytest.approx(1.7, rel=1e-3)
    assert with_it.brighter_fatter == pytest.approx(-2e-6, rel=0.05)
    assert abs(without.brighter_fatter + 2e-6) > 3e-7
    changed = camera_with(load_camera("mini"), {(0, "A"): with_it})
    assert changed.detector(0).amplifiers[0].linearity == (4.0e-7,)


def test_a_lamp_that_drifts_within_a_pair_does_not_matter_and_a_larger_step_is_no_pair():
    amplifier = Amplifier(7)
    drifting, steady = amplifier.pair(10.0, lamp=0.05), amplifier.pair(10.0)
    assert drifting.level_difference == pytest.approx(0.05, abs=0.001)
    assert drifting.level == pytest.approx(1.025 * steady.level, rel=1e-3)
    per_count = [pair.variance / pair.level for pair in (drifting, steady)]
    assert per_count[0] == pytest.approx(per_count[1], rel=0.015)
    assert amplifier.pair(10.0, lamp=0.3) == "their levels differ by 30 %"
    assert isinstance(amplifier.pair(0.0), str)


def test_light_that_changes_its_shape_adds_no_noise():
    amplifier = Amplifier(8)
    tilted, steady = amplifier.pair(15.0, tilt=0.01), amplifier.pair(15.0)
    assert tilted.variance == pytest.approx(steady.variance, rel=0.012)


def test_the_noise_of_overscan_levels_is_not_that_of_light():
    amplifier = Amplifier(9, read_noise=3.0)
    noisy, quiet = amplifier.pair(0.5, level_noise=6.0), amplifier.pair(0.5)
    # 36 square counts on 590 + 3; blocks of 32 rows take 1/32 of it with their means
    assert noisy.variance == pytest.approx(quiet.variance, rel=0.02)


def test_pixels_without_a_value_do_not_count():
    amplifier = Amplifier(8)
    first, second = (amplifier.flat(20_000.0).astype(np.float32) for _ in range(2))
    others = (np.nan, (0.0, 0.0), 0.0, (1.0, 1.0))
    all_of_it = measure_pair(PairOfFrames(first.copy(), second, *others))
    first[:200] = np.nan
    of_half = measure_pair(PairOfFrames(first, second, *others))
    assert of_half.n_pixels < 0.51 * all_of_it.n_pixels
    assert of_half.variance == pytest.approx(all_of_it.variance, rel=0.02)
    first[:] = np.nan
    assert measure_pair(PairOfFrames(first, second, *others)) == "too few pixels have a value"


def test_the_curve_is_a_line_without_repulsion():
    level = np.array([0.0, 100.0, 5e4])
    assert_allclose(curve(level, 2.0, 0.0, 3.0), level / 2.0 + 3.0)
    a, g = -2e-6, 2.0
    assert_allclose(curve(level, g, a, 3.0), (np.exp(2 * a * g * level) - 1) / (2 * a * g**2) + 3)


def test_levels_close_to_each_other_are_a_curve_too():
    pairs = [ideal(10.0, level) for level in np.geomspace(100.0, 40_000.0, 200)]
    assert fit_photon_transfer(pairs).gain == pytest.approx(1.7, rel=1e-3)


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([], "there are 0 levels"),
        ([ideal(5.0, 4000.0 + i) for i in range(5)], "there are 1 levels"),
        ([ideal(t, 10_000 * (1 + t / 9)) for t in range(5)], "less than a factor of 3"),
        ([ideal(t, 0.1 * t, gain=1e3, noise=9.0) for t in range(1, 9)], "does not stand out"),
        (
            [ideal(t, 100.0 * t)._replace(variance=9.0 * (-1) ** t) for t in range(1, 9)],
            "levels of light follow a curve",
        ),
    ],
)
def test_flats_that_say_nothing_are_no_curve(pairs, reason):
    assert reason in fit_photon_transfer(pairs)


def test_dead_amplifiers_have_no_curve():
    rng = np.random.default_rng(11)
    for _ in range(20):
        pairs = [
            ideal(t, abs(rng.normal(0.0, 0.2)) + 1e-3)._replace(variance=9 * rng.normal(1, 0.003))
            for t in TIMES
        ]
        assert isinstance(fit_photon_transfer(pairs), str)


def row(number, band="r", time=10.0, kind="flat", mjd=60000.0):
    return ExposureRow(
        **{"exposure": str(number), "kind": kind, "band": band, "ra": None, "dec": None},
        **{"rotation": None, "mjd": mjd, "exposure_time": time, "path": f"{number}.fits"},
    )


def test_flats_of_one_band_time_and_night_belong_together():
    rows = [
        *(row(1, mjd=1.0), row(2, mjd=1.3), row(3, mjd=1.2), row(31, mjd=5.0)),
        *(row(4, time=20.0), row(5, time=20.1), row(6, "g"), row(7, "g", 11.0)),
        *(row(8, "", 0.0, "bias"), row(9, "i")),
    ]
    found = find_flats(rows, "table.ecsv")
    assert [[one.exposure for one in group] for group in found.groups] == [
        ["1", "3", "2"],
        ["4", "5"],
    ]
    assert [one.exposure for one in found.biases] == ["8"]


def test_header_keywords_do_not_override_what_was_measured():
    camera = load_camera("decam")
    amplifier = camera.detector(1).amplifiers[0]
    assert amplifier.gain_keyword and amplifier.saturation_keyword
    found = fit_photon_transfer([ideal(t, 800.0 * t) for t in TIMES])
    changed = camera_with(camera, {(1, amplifier.name): found})
    new, other = changed.detector(1).amplifiers
    assert new.gain == pytest.approx(1.7, rel=1e-3)
    assert new.gain_keyword is None and new.read_noise_keyword is None
    assert (new.saturation_keyword, new.saturation) == (
        amplifier.saturation_keyword,
        amplifier.saturation,
    ), "no flat was beyond the full well"
    assert other == camera.detector(1).amplifiers[1]


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
    times = np.repeat(np.geomspace(1.0, 55.0, 30), 2)
    for number, time in enumerate([*times, 0.0, 0.0], start=1):
        hdus = [fits.PrimaryHDU()]
        cards = {"EXPID": number, "FILTER": "r", "EXPTIME": round(time, 3)}
        cards |= {"OBSTYPE": "FLAT" if time else "ZERO", "MJD-OBS": 60000 + number / 1000}
        hdus[0].header.update(cards)
        # CCD 1 is clipped by its converter, far below what the camera file says
        for detector in camera.detectors[:2]:
            counts = np.full((320, 368), 10_000.0)
            rng = np.random.default_rng([number, detector.id])
            for amplifier in detector.amplifiers:
                x0, _, x1, _ = amplifier.data
                light = rng.poisson(1400.0 * time, (320, x1 - x0)) / amplifier.gain
                counts[:, x0:x1] += np.minimum(light, 28_000) + 30.0
                section = slice(x0, amplifier.overscan[2])
                counts[:, section] += rng.normal(
                    0, amplifier.read_noise / amplifier.gain, counts[:, section].shape
                )
            counts[3, 200] = 0.0  # a pixel that is dead in the converter
            counts = np.minimum(counts, 30_000.0 if detector.id else 60_000.0)
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
    assert "4 of 4 amplifiers have a curve, of 30 pairs" in said.out
    assert "CCD 1: " in said.err
    measured, stated = load_camera("measured.yaml"), load_camera("mini")
    for ccd in (0, 1):
        new, old = (camera.detector(ccd).amplifiers for camera in (measured, stated))
        for one, before in zip(new, old, strict=True):
            assert one.gain == pytest.approx(before.gain, rel=0.02)
            assert one.read_noise == pytest.approx(before.read_noise, rel=0.05)
            full = 30_000 if ccd else 10_030 + 28_000
            assert 0.87 * full < one.saturation <= full
            assert one.linearity == ()
            assert one.data == before.data
    assert measured.detector(2) == stated.detector(2), "what was not measured stays"

    with pytest.raises(SystemExit):
        main(["ptc", "--write", "measured.yaml", "--ccds", "1"])
    assert "measured.yaml is there already" in capsys.readouterr().err


def test_a_flat_that_cannot_be_read_costs_itself_only(flats):
    rows = [row(number, time=1.0) for number in (1, 99, 2)]
    paths = [str(flats / "raw" / one.path) for one in rows]
    group = [one.model_copy(update={"path": p}) for one, p in zip(rows, paths, strict=True)]
    found = measure_pairs(
        FlatExposures((tuple(group),), ()), load_camera("mini"), [0], DetrendSettings()
    )
    assert [len(pairs) for pairs in found.values()] == [1, 1]


def test_the_command_tells_json_and_what_is_missing(flats, monkeypatch, capsys):
    monkeypatch.chdir(flats)
    assert main(["ingest", "raw"]) == 0
    capsys.readouterr()
    assert main(["ptc", "--json", "--ccds", "0"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(one["ccd"], one["amplifier"]) for one in rows] == [(0, "A"), (0, "B")]
    assert abs(rows[0]["gain"] - 1.7) < 4 * rows[0]["gain_error"] < 0.1
    assert main(["ptc", "--band", "g"]) == 2
    assert "no two flats of band g with the same exposure time" in capsys.readouterr().err
