"""What planning costs, by counts, and what a changed calibration frame redoes."""

import contextlib
import functools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from astropy.io import fits
from test_plan import SKYMAP, calibration, science
from test_workflow import plan_of

from coaddflow.settings import Settings
from coaddflow.tables.calibs import read_calib_table, read_frame_table, write_frame_table
from coaddflow.tables.exposures import write_exposures
from coaddflow.tables.pointings import Angles, Correction, adopt, write_new
from coaddflow.workflow import inputs
from coaddflow.workflow.inputs import Inputs
from coaddflow.workflow.params import Params
from coaddflow.workflow.plan import Plan, make_plan
from coaddflow.workflow.plan_cache import KeptOverlaps, KeptRows
from coaddflow.workflow.stages import STAGES, targets

BANDS = "gr"
CACHE = ".snakemake/coaddflow"


def survey_of(n, cache=None, is_job=False, **changes):
    """Return the plan of so many exposures in two bands, with calibration frames of all kinds."""
    rows = [
        science(f"e{i:03d}", BANDS[i % 2], ra=150.0 + 0.01 * i, mjd=60000.0 + i) for i in range(n)
    ]
    rows += [calibration(f"z{i}", "bias") for i in range(3)]
    rows += [calibration(f"d{i}", "dark") for i in range(3)]
    rows += [calibration(f"f{band}{i}", "flat", band) for band in BANDS for i in range(3)]
    write_exposures("exposures.ecsv", rows)
    Path("stars.csv").write_text("ra,dec,mag\n")
    Path("raw").mkdir(exist_ok=True)
    for row in rows:
        Path(row.path).touch()
    settings = {
        "camera": "mini",
        "exposures": "exposures.ecsv",
        "refcat": {"path": "stars.csv"},
        "skymap": SKYMAP,
        "prediction": {"margin": 0.005},
        "parallel": {"calexp": "exposure", "coadd": "tract"},
    }
    return make_plan(Settings(**(settings | changes)), cache, is_job)


MASTER = "results/calibs/bias/{ccd}.fits"


@pytest.mark.parametrize("table", [None, "damaged"], ids=["no table", "a damaged table"])
def test_masters_of_archived_frames_are_not_made_again_from_none(tmp_path, monkeypatch, table):
    monkeypatch.chdir(tmp_path)
    for cached in (inputs._is_there, inputs._lacked_frames):
        monkeypatch.setattr(inputs, cached.__name__, cached.__wrapped__)
    plan = survey_of(4)
    files = [plan.raw_template(name) for name in plan.calib_frames("bias")]
    for file in files[1:]:
        Path(file).unlink()
    if table:
        Path("results/calibs/frames").mkdir(parents=True)
        Path("results/calibs/frames/bias.ecsv").write_text(table)
    asked = functools.partial(Inputs(plan).frame_table, SimpleNamespace(frames="bias"))
    assert asked() == files[:1], "nothing is made"
    Path(MASTER).parent.mkdir(parents=True)
    failed = fits.PrimaryHDU()
    failed.header["CFFAILED"] = "missing_frames"
    for ccd in plan.ccds:
        failed.writeto(MASTER.format(ccd=ccd))
    assert asked() == files[:1], "nor has been made"
    fits.PrimaryHDU().writeto(MASTER.format(ccd=1), overwrite=True)
    assert asked() == files
    write_frame_table("results/calibs/frames/bias.ecsv", {files[0]: 1.0}, "bias")
    assert asked() == files[:1]


def n_inputs(plan, stage):
    """Return the number of input files of each job of a stage."""
    of_stage = getattr(Inputs(plan), stage.removeprefix("master_"))
    numbers = []
    for names in STAGES[stage].units(plan):
        found = of_stage(SimpleNamespace(**names))
        lists = found.values() if isinstance(found, dict) else [found]
        numbers.append(sum(len([one] if isinstance(one, str) else one) for one in lists))
    return numbers


@pytest.mark.parametrize("split", [False, True], ids=["a file with all CCDs", "a file a CCD"])
def test_snakemake_makes_no_lists_of_single_files(tmp_path, monkeypatch, split):
    monkeypatch.chdir(tmp_path)
    plan = survey_of(4)
    if split:
        row = plan.science["e000"]
        plan.science["e000"] = row.model_copy(update={"path": "raw/e000_{ccd}.fits"})
        for ccd in plan.ccds:
            Path(plan.raw_file("e000", ccd)).touch()
    of_ccd = Inputs(plan).calexp(SimpleNamespace(exposure="e000", ccd="1"))
    assert all(isinstance(files, str) for files in of_ccd.values())
    of_exposure = Inputs(plan).exposure(SimpleNamespace(exposure="e000"))
    assert isinstance(of_exposure["raw"], list if split else str)


def test_the_ccds_of_a_raw_file_share_their_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = survey_of(4)
    row = plan.table_row("e001", 0)
    assert plan.table_row("e001", 1) is row
    assert row == plan.table_row("e001") | {"path": "raw/e001.fits"}
    assert row != plan.table_row("e002", 0)


NIGHT_SKY = {"flat": {"source": "night_sky", "min_frames": 2}}


@pytest.mark.parametrize("calibs", [{}, NIGHT_SKY], ids=["frames", "night sky"])
def test_inputs_grow_with_the_number_of_exposures_and_not_faster(tmp_path, monkeypatch, calibs):
    monkeypatch.chdir(tmp_path)
    for n in (8, 32):
        plan = survey_of(n, calibs=calibs)
        # raw file, table of calibration frames, reference catalogue
        assert set(n_inputs(plan, "exposure")) == {3}
        # the table of the flats, a bias and a dark
        assert set(n_inputs(plan, "master_flat")) == {3}
        frames = n // 2 if calibs else 3
        assert n_inputs(plan, "frame_table") == [3, 3, frames, frames]
        # of each of the CCDs four kinds
        assert n_inputs(plan, "calib_table") == [4 * len(plan.ccds)] * 2


@pytest.mark.parametrize("calibs", [{}, NIGHT_SKY], ids=["frames", "night sky"])
def test_frames_are_not_looked_for_more_often_in_a_larger_survey(tmp_path, monkeypatch, calibs):
    looks = []
    for n in (12, 24):
        (folder := tmp_path / str(n)).mkdir()
        monkeypatch.chdir(folder)
        Plan.calib_frames_by_set.cache_clear()
        plan = survey_of(n, calibs=calibs)
        targets(plan)
        for stage in ("exposure", "master_flat", "frame_table", "calib_table"):
            n_inputs(plan, stage)
        looks.append(Plan.calib_frames_by_set.cache_info().misses)
    assert looks[0] == looks[1] > 0


def test_with_a_raw_file_for_each_ccd_masters_depend_on_those_of_their_ccd(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [science("e0", path="raw/e0_{ccd}.fits")]
    rows += [
        calibration(f"z{i}", "bias").model_copy(update={"path": f"raw/z{i}_{{ccd}}.fits"})
        for i in range(3)
    ]
    write_exposures("exposures.ecsv", rows)
    Path("stars.csv").write_text("ra,dec,mag\n")
    Path("raw").mkdir()
    plan = make_plan(
        Settings(
            camera="mini", exposures="exposures.ecsv", refcat={"path": "stars.csv"}, skymap=SKYMAP
        ),
        None,
    )
    assert plan.frame_table("bias") is None
    for ccd in (0, 1):
        for i in range(3):
            Path(plan.raw_file(f"z{i}", ccd)).touch()
    wildcards = SimpleNamespace(ccd="1")
    raw = Inputs(plan).bias(wildcards)["raw"]
    assert raw == ["raw/z0_CCD1.fits", "raw/z1_CCD1.fits", "raw/z2_CCD1.fits"]
    times = Params(plan).exposure_times("master_bias")(wildcards, {"raw": raw})
    assert times == dict.fromkeys(raw, 60.0)


# What a job of a cluster plans


def test_a_job_has_the_plan_of_its_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, job = survey_of(12, cache=CACHE), survey_of(12, cache=CACHE, is_job=True)
    assert isinstance(job.science, KeptRows)
    assert isinstance(job.overlaps, KeptOverlaps)
    for name in ("exposures", "bands", "raw_bands", "tracts", "ccds", "skymap", "pointings"):
        assert getattr(run, name) == getattr(job, name), name
    assert dict(run.science) == dict(job.science)
    assert dict(run.calibration) == dict(job.calibration)
    assert dict(run.overlaps) == dict(job.overlaps)
    for exposure in run.exposures:
        assert run.table_row(exposure) == job.table_row(exposure)
        assert run.raw_files(exposure) == job.raw_files(exposure)
    for tract in run.tracts:
        assert run.exposures_of_tract(tract) == job.exposures_of_tract(tract)
        for band in run.bands:
            assert run.exposures_of_tract(tract, band) == job.exposures_of_tract(tract, band)
            assert run.patches_of(band, tract) == job.patches_of(band, tract)
    for stage in STAGES.values():
        assert list(stage.units(run)) == list(stage.units(job)), stage.name
        assert stage.files(run) == stage.files(job)
    fresh = survey_of(12)
    assert {e: dict(run.overlaps[e]) for e in run.exposures} == fresh.overlaps
    for band in fresh.bands:
        for tract in fresh.tracts:
            assert fresh.patches_of(band, tract) == job.patches_of(band, tract)


def test_a_job_looks_up_no_more_in_a_survey_of_more_exposures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    looks = []
    for n in (8, 40):
        survey_of(n, cache=CACHE)
        plan, asked = survey_of(n, cache=CACHE, is_job=True), []
        plan.science.kept._database.set_trace_callback(asked.append)
        plan.overlaps.kept._database.set_trace_callback(asked.append)
        wildcards = SimpleNamespace(exposure="e003")
        files, params = Inputs(plan).exposure(wildcards), Params(plan)
        assert files["calibs"] == "results/calibs/r.ecsv"
        for of_job in (params.exposure_row, params.raw, params.exposure, params.verdict):
            of_job(wildcards)
        looks.append(len(asked))
    assert looks[0] == looks[1]


def test_a_job_plans_anew_when_tables_or_settings_are_others_by_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    survey_of(4, cache=CACHE)
    assert isinstance(survey_of(4, cache=CACHE, is_job=True).science, KeptRows)
    for other in (
        survey_of(5, cache=CACHE, is_job=True),
        survey_of(4, cache=CACHE, is_job=True, exclude=["e000"]),
    ):
        assert isinstance(other.science, dict)
    # what others have planned meanwhile is beside it
    survey_of(4, cache=CACHE, exclude=["e001"])
    assert isinstance(survey_of(4, cache=CACHE, is_job=True).science, KeptRows)
    for path in Path(CACHE).glob("rows-*.sqlite"):
        path.write_text("damaged")
    assert survey_of(4, cache=CACHE, is_job=True).science == survey_of(4).science


def test_a_job_has_the_pointings_that_its_run_has_adopted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = survey_of(4, cache=CACHE).science["e001"]
    write_new("results/pointings", "e001", Correction(Angles.of(row), Angles(150.3, 2.2, 0.0)))
    before = survey_of(4, cache=CACHE, is_job=True)
    assert before.science["e001"].ra == row.ra, "that of the run that found it"
    run = survey_of(4, cache=CACHE)
    still = survey_of(4, cache=CACHE, is_job=True)
    assert isinstance(still.science, KeptRows), "another has planned, no run has begun"
    assert still.science["e001"].ra == row.ra
    adopt(run.pointings)
    job = survey_of(4, cache=CACHE, is_job=True)
    assert isinstance(job.science, KeptRows)
    assert job.science["e001"].ra == 150.3
    assert job.pointings == run.pointings
    assert dict(job.overlaps) == dict(run.overlaps)


# What a changed calibration frame redoes


def change(path):
    """Replace a calibration frame by one that is not the same."""
    with fits.open(path) as hdus:
        hdus[0].header["CFNFRAME"] = 99
        hdus.writeto(path, overwrite=True, checksum=True)


@pytest.fixture
def coarse(coarse_survey, tmp_path):
    """A finished survey of jobs of exposures and tracts, to be changed."""
    return coarse_survey.copy_to(tmp_path / "survey")


def of_bands(plan, bands):
    """Return how many exposures and databases of tracts are of these bands."""
    return Counter(
        exposure=sum(plan.band_of(exposure) in bands for exposure in plan.exposures),
        tract_corners=sum(
            bool(plan.patches_of(band, tract)) for band in bands for tract in plan.tracts
        ),
        calib_table=len(bands),
    )


def counted(planned):
    assert planned.returncode == 0, planned.text
    return Counter({rule: n for rule, n in planned.rules.items()})


def plan_of_coarse(survey):
    with contextlib.chdir(survey.folder):
        settings = yaml.safe_load(Path("config.yaml").read_text())
        return make_plan(Settings(**settings), None)


def test_a_changed_master_redoes_the_exposures_that_hang_on_it_and_no_others(coarse):
    plan = plan_of_coarse(coarse)
    band, other = plan.bands[0], plan.bands[1]
    ccd = next(iter(plan.ccds))
    # a map of bad pixels is of one band, and no other calibration frame is made from it
    change(coarse / f"results/calibs/defects/{band}/{ccd}.fits")
    planned = coarse.plan()
    found = counted(planned)
    expected = of_bands(plan, [band])
    assert {rule: found[rule] for rule in expected} == expected
    assert not {rule for rule in found if rule.startswith("master") or rule == "frame_table"}
    assert ("calib_table", f"band {other}") not in planned.jobs
    assert {what for rule, what in planned.jobs if rule == "exposure"} == {
        f"exposure {exposure}" for exposure in plan.exposures if plan.band_of(exposure) == band
    }
    # also when the table is made and the exposures are not: the run was interrupted
    made = coarse.run(f"results/calibs/{band}.ecsv")
    assert made.rules == Counter(calib_table=1), made.text
    found = counted(coarse.plan())
    assert found["exposure"] == expected["exposure"]
    assert "calib_table" not in found


def test_a_changed_flat_redoes_its_defects_and_its_band(coarse):
    plan = plan_of_coarse(coarse)
    band, ccd = plan.bands[1], next(iter(plan.ccds))
    change(coarse / f"results/calibs/flat/{band}/{ccd}.fits")
    found = counted(coarse.plan())
    expected = of_bands(plan, [band]) | Counter(defects=1)
    assert {rule: found[rule] for rule in expected} == expected


def test_a_changed_bias_redoes_everything_and_a_touched_one_nothing(coarse):
    plan = plan_of_coarse(coarse)
    ccd = next(iter(plan.ccds))
    for touched in (f"bias/{ccd}.fits", f"{plan.bands[0]}.ecsv", "frames/bias.ecsv"):
        (coarse / f"results/calibs/{touched}").touch()
    assert coarse.plan().planned_nothing
    change(coarse / f"results/calibs/bias/{ccd}.fits")
    found = counted(coarse.plan())
    expected = of_bands(plan, plan.bands)
    expected |= Counter(master_dark=1, master_flat=len(plan.bands), defects=len(plan.bands))
    assert {rule: found[rule] for rule in expected} == expected


def test_a_replaced_raw_frame_redoes_its_masters_also_after_an_interrupted_run(coarse):
    plan = plan_of_coarse(coarse)
    band = plan.bands[0]
    exposure = plan.calib_frames("flat", band)[0]
    raw = coarse / plan.raw_file(exposure, next(iter(plan.ccds)))
    raw.touch()
    assert coarse.plan().planned_nothing
    change(raw)
    expected = of_bands(plan, [band])
    expected |= Counter(master_flat=len(plan.ccds), defects=len(plan.ccds), frame_table=1)
    found = counted(coarse.plan())
    assert {rule: found[rule] for rule in expected} == expected
    made = coarse.run(f"results/calibs/frames/flat_{band}.ecsv")
    assert made.rules == Counter(frame_table=1), made.text
    found = counted(coarse.plan())
    expected.pop("frame_table")
    assert {rule: found[rule] for rule in expected} == expected
    assert "frame_table" not in found


def test_archived_raw_frames_leave_their_masters_done(coarse):
    plan = plan_of_coarse(coarse)
    for exposure in plan.calibration:
        (coarse / plan.raw_file(exposure, 0)).unlink()
    assert coarse.plan().planned_nothing
    # without the table the run stops before it makes them from nothing
    (coarse / "results/calibs/frames/bias.ecsv").unlink()
    planned = coarse.plan()
    assert planned.returncode != 0
    assert Path(plan.raw_file(plan.calib_frames("bias")[0], 0)).name in planned.text


def test_the_tables_name_what_jobs_use(coarse_survey):
    plan = plan_of_coarse(coarse_survey)
    for band in plan.bands:
        calibs = read_calib_table(coarse_survey / f"results/calibs/{band}.ecsv")
        assert calibs == plan.calibs_of_band(band)
    frames = read_frame_table(coarse_survey / "results/calibs/frames/dark.ecsv")
    ccd = next(iter(plan.ccds))
    names = plan.calib_frames("dark")
    assert [row.path for row in frames] == [plan.raw_file(name, ccd) for name in names]
    times = {plan.calibration[name].exposure_time for name in names}
    assert {row.exposure_time for row in frames} == times


def test_a_changed_master_redoes_one_ccd_where_ccds_are_jobs(survey, plan):
    band, ccd = plan.bands[0], next(iter(plan.ccds))
    change(survey / f"results/calibs/defects/{band}/{ccd}.fits")
    planned = survey.plan()
    calexps = {what for rule, what in planned.jobs if rule == "calexp"}
    assert calexps == {
        f"exposure {exposure}, CCD {ccd}"
        for exposure in plan.exposures
        if plan.band_of(exposure) == band
    }


@pytest.fixture(scope="session")
def plan(raw_survey):
    """The plan of the survey by CCDs."""
    return plan_of(raw_survey)
