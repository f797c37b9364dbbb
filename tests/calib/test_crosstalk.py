"""Ghosts of crosstalk: corrected they are gone, and their coefficients can be measured."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.io import fits

from coaddflow.calexp.ccd import begin_detrending, detrend_ccd, finish_detrending
from coaddflow.calib.crosstalk_fit import (
    CrosstalkSums,
    MeasurementSettings,
    find_bright_pixels,
    fit_slope,
    group_sums,
    measure_crosstalk,
    subtract_sky,
)
from coaddflow.cli import main
from coaddflow.errors import CcdFailure, InputError, UnusableData
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.ingest.raw_exposures import ingest
from coaddflow.instrument.camera import Camera, Detector, camera_file, load_camera
from coaddflow.instrument.raw import RawCcd, read_raw_ccd
from coaddflow.isr.crosstalk import (
    Aggressor,
    AmplifierSignal,
    VictimNoise,
    collect_aggressors,
    subtract_ghosts,
)
from coaddflow.isr.detrend import CcdCalibs, correct_crosstalk
from coaddflow.settings import Settings
from coaddflow.simulate.frames import Exposing, expose_ccd, read_out
from coaddflow.simulate.observations import plan_observations
from coaddflow.simulate.optics import field_radius
from coaddflow.simulate.settings import SimulationSettings
from coaddflow.simulate.survey import run_simulation

pytest.importorskip("galsim", reason="the simulator's extra is not installed")

LINKS = {
    ((0, "A"), (1, "B")): 1e-3,
    ((2, "B"), (1, "A")): 1e-3,
    ((3, "A"), (0, "A")): -1e-3,
    ((1, "B"), (3, "B")): 1e-3,
}
"""Between CCDs: amplifiers that run the same way and the other way, CCDs that are turned."""

SIMULATION = {
    "seed": 5,
    "bands": {"r": {"exposures": 10, "exposure_time": 15.0, "zero_point": 26.0, "sky": 22.0}},
    "stars": {"density": 40.0, "brightest": 13.0, "faintest": 18.5, "slope": 0.2},
    "calibration": {"bias": 0, "dark": 0, "flat": 0},
}
SETTINGS = Settings()


def camera_content():
    content = yaml.safe_load(camera_file("mini").read_text())
    content["crosstalk"] = [
        {"aggressor": list(aggressor), "victim": list(victim), "coefficient": coefficient}
        for (aggressor, victim), coefficient in LINKS.items()
    ]
    return content


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Simulate a survey with crosstalk of 1e-3 between CCDs, and ingest it."""
    folder = tmp_path_factory.mktemp("ghosts")
    (folder / "camera.yaml").write_text(yaml.safe_dump(camera_content()))
    settings = SimulationSettings.model_validate(
        {**SIMULATION, "camera": str(folder / "camera.yaml")}
    )
    run_simulation(settings, folder / "data")
    ingest([folder / "data/raw"], load_camera(settings.camera), folder / "exposures.ecsv")
    return folder


@pytest.fixture(scope="module")
def exposure(survey):
    """Read an exposure out twice: with and without crosstalk, the same noise."""
    settings = SimulationSettings.model_validate(
        {**SIMULATION, "camera": str(survey / "camera.yaml")}
    )
    quiet = settings.model_copy(
        update={"detector": settings.detector.model_copy(update={"crosstalk": False})}
    )
    camera = load_camera(settings.camera)
    seen = plan_observations(settings, camera, field_radius(camera))[0]
    with_ghosts, without = (Exposing.prepare(one, camera, seen) for one in (settings, quiet))
    exposed = {one.id: expose_ccd(with_ghosts, one.id) for one in camera.detectors}
    names = [one.name for one in camera.detectors[0].amplifiers]
    raw = {}
    for ccd, one in exposed.items():
        others = [
            (names.index(link.victim[1]), link.coefficient, exposed[link.aggressor[0]].counts[i])
            for link in camera.crosstalk_into(ccd)
            for i in [names.index(link.aggressor[1])]
        ]
        detector = camera.detector(ccd)
        arrays = read_out(with_ghosts, one, others)[None], read_out(without, one)[None]
        raw[ccd] = tuple(raw_ccd(detector, array) for array in arrays)
    return camera, raw


def raw_ccd(detector, array):
    arrays = tuple(array for _ in detector.amplifiers)
    return RawCcd(detector, arrays, fits.Header(), fits.Header(), Path("a.fits"))


def detrended(camera, raw, missing=()):
    """Detrend all CCDs of an exposure in two parts, with the signals of those that are there."""
    begun = {ccd: begin_detrending(one, SETTINGS) for ccd, one in raw.items()}
    signals = {
        (ccd, name): signal
        for ccd, one in begun.items()
        if ccd not in missing
        for name, signal in one.signals(camera.crosstalk_aggressors(ccd)).items()
    }
    return {
        ccd: finish_detrending(
            one,
            CcdCalibs(),
            15.0,
            SETTINGS,
            collect_aggressors(camera.crosstalk_into(ccd), signals),
        )
        for ccd, one in begun.items()
    }


# the correction


def test_ghosts_are_below_the_noise_after_correction(exposure):
    camera, raw = exposure
    corrected = detrended(camera, {ccd: both[0] for ccd, both in raw.items()})
    worst_before = 0.0
    for ccd, (ghosted, clean) in raw.items():
        # the truth: no crosstalk at all
        without = Settings(detrend={"crosstalk": False})
        truth = detrend_ccd(clean, CcdCalibs(), 15.0, without).masked_image
        before = detrend_ccd(ghosted, CcdCalibs(), 15.0, without).masked_image
        after = corrected[ccd].masked_image
        noise = np.sqrt(truth.variance)
        good = ~truth.has_any(MaskPlane.SAT | MaskPlane.SUSPECT)
        worst_before = max(worst_before, (np.abs(before.image - truth.image) / noise)[good].max())
        left = ((after.image - truth.image) / noise)[good]
        # both are rounded to counts, a quarter of the noise
        assert np.abs(left).max() < 0.5
        assert left.std() < 0.1
        flagged = after.has_any(MaskPlane.CROSSTALK)
        strong = np.abs(before.image - truth.image) > 1.4 * noise
        assert flagged[strong & good].all()
        assert not flagged[np.abs(before.image - truth.image) < 0.2 * noise].any()
    assert worst_before > 5.0


def test_stacked_ghosts_of_all_bright_stars_are_consistent_with_nothing(survey):
    camera = load_camera(survey / "camera.yaml")
    sums = CrosstalkSums(camera.detectors, MeasurementSettings())
    for path in sorted((survey / "data/raw").iterdir())[:5]:
        begun = {
            one.id: begin_detrending(read_raw_ccd(path, camera, one), SETTINGS)
            for one in camera.detectors
        }
        signals = {
            (ccd, name): signal
            for ccd, one in begun.items()
            for name, signal in one.signals().items()
        }
        for ccd, one in begun.items():
            correct_crosstalk(one, collect_aggressors(camera.crosstalk_into(ccd), signals))
        sums.add_exposure(begun.__getitem__)
    left = {(one.aggressor, one.victim): one for one in sums.results()}
    ghosts = [pair for pair, value in true_coefficients(camera).items() if value]
    assert len(ghosts) == 12
    pulls = np.array([left[pair].coefficient / left[pair].error for pair in ghosts])
    assert np.abs(pulls).max() < 3.5
    assert (pulls**2).mean() < 2
    for pair in LINKS:
        assert left[pair].error < 6e-5


def test_two_parts_are_one_bit_for_bit(survey):
    camera = load_camera(survey / "camera.yaml")
    detector = camera.detector(1)
    raw = read_raw_ccd(sorted((survey / "data/raw").iterdir())[0], camera, detector)
    rng = np.random.default_rng(2)

    def frame(mean, scatter):
        pixels = rng.normal(mean, scatter, detector.shape)
        return MaskedImage(pixels, np.full(detector.shape, 0.01), np.zeros(detector.shape))

    calibs = CcdCalibs(bias=frame(3, 1), dark=frame(0.02, 0.01), flat=frame(1, 0.02))
    whole = detrend_ccd(raw, calibs, 15.0, SETTINGS)
    begun = begin_detrending(raw, SETTINGS)
    signals = begun.signals()
    parts = finish_detrending(begun, calibs, 15.0, SETTINGS)
    for plane in ("image", "variance", "mask"):
        assert getattr(parts.masked_image, plane).tobytes() == (
            getattr(whole.masked_image, plane).tobytes()
        )
    assert parts.header == whole.header
    # what was handed out stays as it was measured
    again = begin_detrending(raw, SETTINGS).signals()
    assert all((signals[name].counts == again[name].counts).all() for name in again)


def test_a_ccd_without_the_signal_of_an_aggressor_is_done_and_says_so(exposure, caplog):
    camera, raw = exposure
    ghosted = {ccd: both[0] for ccd, both in raw.items()}
    everything = detrended(camera, ghosted)
    with caplog.at_level(logging.WARNING):
        without = detrended(camera, ghosted, missing=[2])
    assert [record.args[0] for record in caplog.records] == [1]
    assert "2 B" in caplog.text
    header = without[1].header
    assert (header["CFXTKCCD"], header["CFXTKMIS"]) == (1, "2 B")
    assert "CFXTKMIS" not in everything[1].header
    # amplifier A keeps the ghosts of CCD 2, B is without those of CCD 0
    images = [one[1].masked_image.image for one in (everything, without)]
    assert (images[0][:, 160:] == images[1][:, 160:]).all()
    assert np.abs(images[0][:, :160] - images[1][:, :160]).max() > 10
    for ccd in (0, 2, 3):
        assert (everything[ccd].masked_image.image == without[ccd].masked_image.image).all()


def test_amplifiers_of_other_sizes_meet_where_both_are_read():
    rng = np.random.default_rng(3)
    victim, neighbour = rng.normal(100, 1, (150, 40)), rng.normal(100, 1, (90, 70))
    other = rng.normal(100, 1, (200, 30)).astype(np.float32)
    counts = [victim.astype(np.float32), neighbour.astype(np.float32)]
    before = [one.copy() for one in counts]
    signal = AmplifierSignal(other, np.array([0, 160 * 30, 10 * 30 + 29]))
    sources = [[(1e-2, 1), (2e-2, signal)], [(3e-2, 0)]]
    none = np.empty(0, int)
    flags = subtract_ghosts(counts, sources, [VictimNoise(1.0, 50.0)] * 2, [none, none], 0.02)
    expected = [np.zeros((150, 40)), np.zeros((90, 70))]
    expected[0][:90, :40] += 1e-2 * before[1][:90, :40]
    expected[0][:150, :30] += 2e-2 * other[:150]
    expected[1][:90, :40] += 3e-2 * before[0][:90]
    for i in range(2):
        np.testing.assert_allclose(before[i] - counts[i], expected[i], atol=2e-5)
    # the second saturated pixel has no partner
    assert np.argwhere(flags[0]).tolist() == [[0, 0], [10, 29]]
    assert not flags[1].any()


def make_detector(ccd, amplifier, **keys):
    nx, ny = 60, 40
    common = {
        "name": "X",
        "data": [0, 0, nx, ny],
        "overscan": [nx, 0, nx + 20, ny],
        "target": [0, 0, nx, ny],
        "gain": 1.5,
        "read_noise": 4.0,
        "saturation": 60000,
    }
    return Detector.model_validate(
        {
            "id": ccd,
            "name": f"C{ccd}",
            "extension": f"CCD{ccd}",
            "center": [0, 0],
            "size": [nx, ny],
            "amplifiers": [{**common, **amplifier}],
            **keys,
        }
    )


@pytest.mark.parametrize(
    ("victim", "place"),
    [
        ({}, (7, 11)),
        ({"flip_x": True}, (7, 59 - 11)),
        ({"flip_x": True, "flip_y": True}, (39 - 7, 59 - 11)),
        ({"read_from": "ul"}, (39 - 7, 11)),
        ({"flip_x": True, "read_from": "ll"}, (7, 11)),
    ],
    ids=str,
)
def test_ghosts_between_ccds_follow_the_order_of_readout(victim, place):
    aggressor, detector = make_detector(0, {"read_from": "lr"}), make_detector(1, victim)
    light = np.full((40, 80), 1000.0)
    light[7, 59 - 11] += 40000  # read from the right: the twelfth pixel of its row
    shining = begin_detrending(raw_ccd(aggressor, light), SETTINGS).signals()
    found = [Aggressor("X", (0, "X"), 1e-2, shining["X"])]
    begun = begin_detrending(raw_ccd(detector, np.full((40, 80), 1000.0)), SETTINGS)
    image = finish_detrending(begun, CcdCalibs(), 1.0, SETTINGS, found).masked_image
    assert np.argwhere(image.image < -100).tolist() == [list(place)]
    assert image.image[place] == pytest.approx(-400 * 1.5, rel=1e-5)
    assert np.argwhere(image.has_any(MaskPlane.CROSSTALK)).tolist() == [list(place)]


@pytest.mark.parametrize(("counts", "flagged"), [(60000.0, True), (59000.0, False)])
def test_faint_ghosts_of_saturated_pixels_are_flagged(counts, flagged):
    # the ghost of 2 counts is less than the noise of 2.7, but may be more than it seems
    settings = Settings(detrend={"edge": 0})
    begun = begin_detrending(raw_ccd(make_detector(1, {}), np.full((40, 80), 1000.0)), settings)
    light = np.full((40, 80), 1000.0)
    light[7, 11] = counts
    signal = begin_detrending(raw_ccd(make_detector(0, {}), light), SETTINGS).signals()["X"]
    found = [Aggressor("X", (0, "X"), 2 / 59000, signal)]
    image = finish_detrending(begun, CcdCalibs(), 1.0, SETTINGS, found).masked_image
    assert bool(image.has_any(MaskPlane.CROSSTALK)[7, 11]) is flagged
    assert image.has_any(MaskPlane.CROSSTALK).sum() == flagged


@pytest.mark.parametrize("absurd", [1e30, np.inf, -1e30])
def test_an_absurd_ccd_leaves_no_ghosts_on_others(absurd):
    detector, light = make_detector(0, {}), np.full((40, 80), 1000.0)
    light[7, 11] = absurd
    signal = begin_detrending(raw_ccd(detector, light), SETTINGS).signals()["X"]
    limit = detector.amplifiers[0].saturation
    assert np.abs(signal.counts).max() <= 2 * limit, "one pixel"
    light[:, :60] = absurd
    if np.isinf(absurd):
        with pytest.raises(UnusableData, match="no pixel holds a measured value"):
            begin_detrending(raw_ccd(detector, light), SETTINGS)
        return
    assert not begin_detrending(raw_ccd(detector, light), SETTINGS).signals(), "all of it"


# the camera


def test_the_camera_knows_aggressors_and_victims_of_crosstalk():
    camera = Camera.model_validate({**_resolved(camera_content())})
    assert [camera.crosstalk_aggressors(ccd) for ccd in range(4)] == [
        ("A",),
        ("B",),
        ("B",),
        ("A",),
    ]
    assert [link.aggressor for link in camera.crosstalk_into(1)] == [(0, "A"), (2, "B")]
    assert camera.crosstalk_into(2) == ()


def _resolved(content):
    defaults = content.pop("detector_defaults")
    content["detectors"] = [{**defaults, **detector} for detector in content["detectors"]]
    return content


@pytest.mark.parametrize(
    ("links", "said"),
    [
        ([([0, "A"], [9, "A"])], "CCD 9 has no amplifier 'A'"),
        ([([0, "C"], [1, "A"])], "CCD 0 has no amplifier 'C'"),
        ([([0, "A"], [0, "B"])], "within CCD 0"),
        ([([0, "A"], [1, "A"])] * 2, "two coefficients"),
    ],
)
def test_a_camera_file_with_impossible_crosstalk_is_refused(tmp_path, links, said):
    content = camera_content()
    content["crosstalk"] = [
        {"aggressor": aggressor, "victim": victim, "coefficient": 1e-4}
        for aggressor, victim in links
    ]
    (tmp_path / "camera.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=said):
        load_camera(tmp_path / "camera.yaml")


# the measurement


@pytest.fixture(scope="module")
def measured(survey):
    camera = load_camera(survey / "camera.yaml")
    files = sorted((survey / "data/raw").iterdir())
    pairs = measure_crosstalk(files, camera, [0, 1, 2, 3], SETTINGS.detrend, MeasurementSettings())
    return {(one.aggressor, one.victim): one for one in pairs}


def true_coefficients(camera):
    """Return what the camera file says, for all ordered pairs of amplifiers."""
    ends = [(one.id, amplifier.name) for one in camera.detectors for amplifier in one.amplifiers]
    true = {(a, v): 0.0 for a in ends for v in ends if a != v}
    for one in camera.detectors:
        (_, into_a), (into_b, _) = one.crosstalk
        true[(one.id, "B"), (one.id, "A")] = into_a
        true[(one.id, "A"), (one.id, "B")] = into_b
    return true | LINKS


def test_coefficients_of_one_per_mille_are_measured_within_five_per_cent(measured):
    for pair, coefficient in LINKS.items():
        assert measured[pair].coefficient == pytest.approx(coefficient, rel=0.05)
        assert measured[pair].error < 0.03 * abs(coefficient)


def test_all_pairs_agree_with_the_truth_within_their_errors(survey, measured):
    true = true_coefficients(load_camera(survey / "camera.yaml"))
    assert measured.keys() == true.keys()
    pulls = np.array([(measured[p].coefficient - true[p]) / measured[p].error for p in true])
    assert 0.6 < pulls.std() < 1.4
    assert np.abs(pulls).max() < 4
    assert np.abs(pulls.mean()) < 4 / np.sqrt(len(pulls))
    assert {p for p in true if measured[p].is_significant(5)} == {p for p in true if true[p]}


def test_only_pairs_within_a_ccd_are_the_same_coefficients(survey, measured):
    camera = load_camera(survey / "camera.yaml")
    files = sorted((survey / "data/raw").iterdir())
    settings = MeasurementSettings(within=True)
    pairs = measure_crosstalk(files, camera, [1, 3], SETTINGS.detrend, settings)
    assert [(one.aggressor[0], one.victim[0]) for one in pairs] == [(1, 1)] * 2 + [(3, 3)] * 2
    for one in pairs:
        assert one.coefficient == measured[one.aggressor, one.victim].coefficient


def star(y, x, peak, shape=(200, 160)):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return peak * np.exp(-0.5 * ((rows - y) ** 2 + (columns - x) ** 2) / 1.8**2)


def test_a_real_star_at_the_place_of_a_ghost_does_not_count():
    """Nine ghosts, of which three stand on real stars that are a hundred times as bright."""
    rng = np.random.default_rng(4)
    places = [(30 + 60 * (i // 3), 30 + 45 * (i % 3)) for i in range(9)]
    aggressor = sum(star(y, x, 40000.0) for y, x in places)
    real = sum(star(y, x + 1, peak) for (y, x), peak in zip(places, (80, 400, 4000), strict=False))
    victim = 100 + 1e-3 * aggressor + real
    pixels = rng.normal(victim, 5.0).astype(np.float32)
    none = np.empty(0, int)
    bright = find_bright_pixels(
        subtract_sky(AmplifierSignal((100 + aggressor).astype(np.float32), none)), 2000.0
    )
    found = fit_slope(group_sums(bright, subtract_sky(AmplifierSignal(pixels, none)), 5e-3))
    assert found.value == pytest.approx(1e-3, abs=3.5 * found.error)
    assert found.error < 3e-5


def test_saturated_pixels_are_no_aggressors():
    light = np.full((200, 160), 100.0, np.float32)
    light[50, 50] = light[100, 100] = 50000.0
    light[50, 52] = 30000.0
    signal = AmplifierSignal(light, np.array([50 * 160 + 50]))
    bright = find_bright_pixels(subtract_sky(signal), 2000.0)
    assert list(zip(bright.y, bright.x, strict=True)) == [(100, 100)]


def test_the_brightest_groups_of_all_exposures_are_kept(exposure):
    camera, raw = exposure
    detectors = camera.detectors[:2]
    few, many = (CrosstalkSums(detectors, MeasurementSettings(max_groups=n)) for n in (6, 10_000))
    for sums in (few, many):
        for _ in range(2):
            sums.add_exposure(lambda ccd: begin_detrending(raw[ccd][0], SETTINGS))
    errors = [{(p.aggressor, p.victim): p for p in sums.results()} for sums in (few, many)]
    pair = (0, "A"), (1, "B")
    assert errors[0][pair].n_groups <= 6 < errors[1][pair].n_groups
    # six of many groups, and more than their share of the light
    part = errors[0][pair].n_pixels / errors[1][pair].n_pixels
    assert part > 1.5 * errors[0][pair].n_groups / errors[1][pair].n_groups


def test_a_ccd_that_cannot_be_read_is_left_out(exposure, caplog):
    camera, raw = exposure
    sums = CrosstalkSums(camera.detectors[:2], MeasurementSettings())

    def read(ccd):
        if ccd == 0:
            raise CcdFailure("missing_file", "gone")
        return begin_detrending(raw[ccd][0], SETTINGS)

    sums.add_exposure(read)
    pairs = {(one.aggressor, one.victim): one for one in sums.results()}
    assert np.isfinite(pairs[(1, "A"), (1, "B")].coefficient)
    assert np.isnan(pairs[(0, "A"), (1, "B")].coefficient)
    assert not pairs[(0, "A"), (1, "B")].is_significant(0.1)
    assert "CCD 0 is left out" in caplog.text


# the command


@pytest.fixture
def project(survey, monkeypatch):
    monkeypatch.chdir(survey)
    content = {"camera": "camera.yaml", "exposures": "exposures.ecsv"}
    (survey / "config.yaml").write_text(yaml.safe_dump(content))
    return survey


def test_the_command_lists_what_is_significant(project, capsys):
    assert (
        main(["crosstalk", "--exposures", "1001", "1002", "1003", "1004", "--ccds", "1", "2"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("2 B        1 A"))
    assert float(row.split()[4]) == pytest.approx(1e-3, rel=0.2)
    assert float(row.split()[-1]) == 1e-3
    assert "of 12 pairs are significant" in lines[-1]


def test_the_command_writes_the_keys_of_the_camera_file(project, capsys):
    exposures = [str(1001 + i) for i in range(5)]
    assert main(["crosstalk", "--yaml", "--exposures", *exposures]) == 0
    keys = yaml.safe_load(capsys.readouterr().out)
    content = _resolved(camera_content())
    true = true_coefficients(Camera.model_validate(content))
    for detector in content["detectors"]:
        detector["crosstalk"] = None
    for found in keys["detectors"]:
        content["detectors"][found["id"]] |= found
    camera = Camera.model_validate(content | {"crosstalk": keys["crosstalk"]})
    assert {(one.aggressor, one.victim) for one in camera.crosstalk} == set(LINKS)
    for one in camera.crosstalk:
        assert one.coefficient == pytest.approx(LINKS[one.aggressor, one.victim], rel=0.1)
    within = [
        (one.crosstalk[i][j], true[(one.id, "AB"[j]), (one.id, "AB"[i])])
        for one in camera.detectors
        if one.crosstalk is not None
        for i, j in ((0, 1), (1, 0))
    ]
    assert len([value for value, _ in within if value]) > 4
    assert all(value == pytest.approx(stated, rel=0.25) for value, stated in within if value)


def test_the_command_has_json_for_all_pairs_and_says_when_it_finds_nothing(project, capsys):
    code = main(
        ["crosstalk", "--json", "--exposures", "1001", "--ccds", "0", "--min-counts", "1e9"]
    )
    pairs = json.loads(capsys.readouterr().out)
    assert code == 1
    assert [(one["coefficient"], one["n_groups"]) for one in pairs] == [(None, 0)] * 2


def test_the_command_names_an_exposure_that_is_not_there(project, capsys):
    assert main(["crosstalk", "--exposures", "77"]) == 2
    assert "no science exposure '77'" in capsys.readouterr().err
