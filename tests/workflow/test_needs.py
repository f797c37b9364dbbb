"""What the rules ask the scheduler for is what `coaddflow plan` says."""

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from survey_run import REPOSITORY

from coaddflow.runtime import resources
from coaddflow.settings import Settings
from coaddflow.settings.exposure import ExposureSettings
from coaddflow.tables.exposures import ExposureRow, ImageRow, write_exposures, write_images
from coaddflow.workflow import needs
from coaddflow.workflow.cost import forecast, steps
from coaddflow.workflow.plan import make_plan
from coaddflow.workflow.stages import STAGES

CORES = 6

COARSE = {"parallel": {"calexp": "exposure", "coadd": "tract", "workers": 3}}

ENABLED = {"enabled": True}

PARTS = tuple(ExposureSettings.model_fields)

EXPOSURE = {
    "no parts": {},
    **{part: {part: ENABLED} for part in PARTS},
    "all parts": dict.fromkeys(PARTS, ENABLED),
}
"""The section `exposure`: each part of it alone, all, and none."""

WITHOUT_CALIBS = {kind: {"source": "none"} for kind in ("bias", "dark", "flat", "defects")}

CAMERAS = {
    # the many calibration frames of large cameras are planned as those of the small one
    "hsc": {"camera": "hsc", "calibs": WITHOUT_CALIBS},
    "decam": {"camera": "decam", "calibs": WITHOUT_CALIBS},
    "demo": {"camera": "demo"},
}

ALL_ON_MPI = {
    "exposure": EXPOSURE["all parts"],
    "parallel": COARSE["parallel"] | {"backend": "mpi"},
}

IMPORTED = {
    "calibrated": {"table": "images.ecsv", "unit": "nanojansky"},
    "exposures": None,
}

SURVEYS = {
    # one job a CCD and a patch, where no part of `exposure` can be enabled
    **CAMERAS,
    **{
        f"{name} {parts}": camera | COARSE | {"exposure": exposure}
        for name, camera in CAMERAS.items()
        for parts, exposure in EXPOSURE.items()
    },
    **{f"{name} mpi": camera | ALL_ON_MPI for name, camera in CAMERAS.items()},
    "demo night sky": {"camera": "demo", "calibs": {"dark": {"source": "night_sky"}}},
    "demo flats": {
        "camera": "demo",
        "calibs": {k: v for k, v in WITHOUT_CALIBS.items() if k != "flat"},
    },
    "demo matched": CAMERAS["demo"]
    | COARSE
    | {"coadd": {"background_matching": ENABLED, "keep_warps": True}},
    "demo threads": {"camera": "demo", "parallel": {"ccd_threads": 4}},
    "demo coarse threads": {"camera": "demo", "parallel": COARSE["parallel"] | {"ccd_threads": 2}},
    "demo serial": {"camera": "demo", "parallel": COARSE["parallel"] | {"backend": "serial"}},
    "imported": IMPORTED,
    "imported coarse": IMPORTED | COARSE | {"exposure": EXPOSURE["all parts"]},
    "imported mpi": IMPORTED | ALL_ON_MPI,
    "raw and imported": CAMERAS["demo"] | COARSE | {"calibrated": IMPORTED["calibrated"]},
}
"""The settings in which surveys differ, by name."""


def row(name, kind, band="", ra=None):
    dec, rotation = (None, None) if ra is None else (2.2, 0.0)
    return ExposureRow(
        exposure=name,
        kind=kind,
        band=band,
        ra=ra,
        dec=dec,
        rotation=rotation,
        mjd=60000.0,
        exposure_time=60.0,
        path=f"raw/{name}.fits",
    )


ROWS = [
    *(row(f"r{i}", "science", "r", 150.1 + 0.02 * i) for i in range(4)),
    *(row(f"g{i}", "science", "g", 150.1) for i in range(3)),
    *(row(f"bias{i}", "bias") for i in range(5)),
    *(row(f"dark{i}", "dark") for i in range(4)),
    *(row(f"flat{band}{i}", "flat", band) for band in "gr" for i in range(3)),
]


def image(exposure, ccd, nx):
    """Return the row of an image that was calibrated elsewhere; those of a CCD differ in size."""
    east, north = 150.1 + 0.1 * ccd, 2.2
    return ImageRow(
        exposure=exposure,
        ccd=ccd,
        band="r",
        mjd=60000.0,
        exposure_time=60.0,
        path=f"raw/{exposure}_{ccd}.fits",
        hdu=1,
        nx=nx,
        ny=4000,
        footprint_ra=(east, east - 0.1, east - 0.1, east),
        footprint_dec=(north, north, north + 0.1, north + 0.1),
        electrons_per_unit=1.0,
        zero_point=31.4,
    )


IMAGES = [image(f"old{i}", ccd, 2000 + 500 * ccd) for i in range(3) for ccd in range(i + 2)]


def make_survey(folder, changes):
    """Write the settings, the tables, and empty files of a survey."""
    (folder / "raw").mkdir(parents=True)
    write_exposures(folder / "exposures.ecsv", ROWS)
    write_images(folder / "images.ecsv", IMAGES)
    for one in (*ROWS, *IMAGES):
        (folder / one.path).touch()
    (folder / "stars.csv").write_text("ra,dec,mag\n")
    settings = {
        "exposures": "exposures.ecsv",
        "refcat": {"path": "stars.csv", "fallback": {"magnitude": "mag"}},
        "skymap": {"kind": "tangent", "pixel_scale": 0.4, "patch_inner_size": 4000},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | changes))


@pytest.fixture(scope="module")
def surveys(tmp_path_factory):
    """The folders of the surveys, each with what its jobs ask for on a cluster."""
    folders = {name: tmp_path_factory.mktemp("needs") / name for name in SURVEYS}
    for name, folder in folders.items():
        make_survey(folder, SURVEYS[name])
    program = [sys.executable, Path(__file__).with_name("planned_resources.py")]
    subprocess.run(
        [*program, REPOSITORY / "Snakefile", str(CORES), *folders.values()],
        check=True,
        capture_output=True,
    )
    return folders


@pytest.fixture(params=SURVEYS)
def survey(surveys, request, monkeypatch):
    """A plan, and what the rules ask for."""
    folder = surveys[request.param]
    monkeypatch.chdir(folder)
    settings = Settings(**yaml.safe_load(Path("config.yaml").read_text()))
    return make_plan(settings), json.loads(Path("asked.json").read_text())


def test_rules_ask_for_what_the_plan_says(survey):
    plan, asked = survey
    # workers are tasks of Slurm
    mpi = plan.settings.parallel.backend == "mpi"
    said = Counter(
        (
            rule,
            step.asked(CORES, mpi),
            step.runtime,
            step.threads,
            *((step.workers + 1, step.task_memory) if mpi and step.workers else (None, None)),
        )
        for rule, step in steps(plan, CORES)
    )
    jobs = (tuple(job) for job in asked["jobs"] if not STAGES[job[0]].is_local)
    assert Counter(jobs) == said


def test_largest_jobs_of_the_cluster_are_those_of_the_plan(survey):
    plan, asked = survey
    costs = {cost.name: cost for cost in forecast(plan, CORES)}
    for kind, prefix in (("calibration", "calibs_"), ("exposure", "exposure_"), ("tract", "tract")):
        groups = [group for group in asked["groups"] if group[0].startswith(prefix)]
        assert len(groups) == costs[kind].n_jobs
        if groups:
            assert max(group[2] for group in groups) == costs[kind].runtime
            # of steps with the same time limit the plan puts the largest side by side
            largest = max(group[1] for group in groups)
            assert 0.97 * costs[kind].memory <= largest <= costs[kind].memory


def test_ccds_wait_in_memory_with_signals_of_aggressors_if_there_are_any(surveys, monkeypatch):
    def memory(name):
        monkeypatch.chdir(surveys[name])
        plan = make_plan(Settings(**yaml.safe_load(Path("config.yaml").read_text())))
        return needs.of_exposure(plan, {"exposure": "r0"}, CORES).memory

    # the camera file of HSC knows of no crosstalk between CCDs
    held = resources.held_memory([2048 * 4176] * 104, crosstalk=False)
    assert memory("hsc all parts") - memory("hsc no parts") == held
    with_signals = memory("demo crosstalk") - memory("demo no parts")
    assert with_signals > memory("demo sky") - memory("demo no parts") > 0


def test_tasks_of_slurm_have_their_share_and_the_gathering_one_its_own(surveys, monkeypatch):
    monkeypatch.chdir(surveys["demo matched"])
    settings = yaml.safe_load(Path("config.yaml").read_text())
    settings["parallel"]["workers"] = 20
    plan = make_plan(Settings(**settings))
    (tract,) = plan.tracts
    names = {"band": "r", "tract": str(tract)}
    one, many = (needs.of_tract(plan, names, 1, on_tasks) for on_tasks in (False, True))
    assert (one.workers, one.threads) == (1, 1)
    assert (many.workers, many.threads) == (20, 1)
    assert many.task_memory * 20 >= many.memory - many.gathering
    huge = dataclasses.replace(many, gathering=10**6, memory=many.memory + 10**6)
    assert huge.task_memory > 10**6


def test_ccds_share_the_cores_that_all_of_them_leave_idle(surveys, monkeypatch):
    monkeypatch.chdir(surveys["demo no parts"])
    settings = yaml.safe_load(Path("config.yaml").read_text())
    plan = make_plan(Settings(**settings))
    n_ccds = len(plan.science) * len(plan.ccds)
    n_warps = sum(len(tracts) for tracts in plan.overlaps.values())
    for name, n_items in (("calexp", n_ccds), ("exposure", n_ccds), ("warp", n_warps)):
        spare = [
            needs.spare_cores(STAGES[name], plan, cores)
            for cores in (None, 1, n_items, 2 * n_items - 1, 2 * n_items, 3 * n_items)
        ]
        assert spare == [1, 1, 1, 1, 2, 3]
    settings["parallel"]["ccd_threads"] = 2
    plan = make_plan(Settings(**settings))
    assert needs.spare_cores(STAGES["calexp"], plan, 3 * n_ccds) == 1
    whole = [needs.of_exposure(plan, {"exposure": "r0"}, cores) for cores in (None, 6, 4, 3, 2)]
    assert [(one.workers, one.threads) for one in whole] == [(3, 6), (3, 6), (3, 4), (3, 3), (2, 2)]
    assert [one.memory for one in whole[1:4]] == [whole[0].memory] * 3


@pytest.mark.parametrize(
    "engine", [{"backend": "mpi"}, {"backend": "dask", "dask_address": "tcp://node:1"}]
)
def test_workers_elsewhere_have_one_core_each(surveys, monkeypatch, engine):
    monkeypatch.chdir(surveys["demo no parts"])
    settings = yaml.safe_load(Path("config.yaml").read_text())
    settings["parallel"] |= engine
    idle, shared = (
        make_plan(Settings(**settings | {"parallel": settings["parallel"] | more}))
        for more in ({}, {"ccd_threads": 2})
    )
    assert needs.spare_cores(STAGES["exposure"], idle, 1000) == 1
    names = {"exposure": "r0"}
    assert needs.of_exposure(shared, names) == needs.of_exposure(idle, names)


def test_it_is_said_of_every_stage_what_it_needs():
    assert needs.OF_STAGE.keys() == STAGES.keys()


def test_a_depth_map_needs_no_more_than_a_picture_of_its_patch(surveys, monkeypatch):
    monkeypatch.chdir(surveys["hsc"])
    plan = make_plan(Settings(**yaml.safe_load(Path("config.yaml").read_text())))
    depth, picture = (
        needs.of(STAGES[name], plan, {"tract": str(plan.tracts[0])})
        for name in ("depth", "picture")
    )
    # a patch of 3900 x 3900 pixels takes 0.8 GB, with its image, variance, mask and map
    assert 1000 < depth.memory < 1500
    assert depth.memory < picture.memory
