"""The cost of a run: counts that can be done by hand."""

from types import SimpleNamespace

import pytest

from coaddflow.runtime import resources
from coaddflow.settings.parallel import ParallelSettings
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.workflow.calib_sets import ALWAYS
from coaddflow.workflow.cost import (
    START_CPU_SECONDS,
    _parts_of_calibs,
    asked_memory,
    forecast,
    steps,
    widths,
)
from coaddflow.workflow.measured import core_hours_of, disk_used, measured, suggestion
from coaddflow.workflow.needs import SNAKEMAKE_MB

MPIX = 1_000_000

PARALLEL = ParallelSettings(calexp="ccd", coadd="patch", workers=4)


MADE_WITH = {
    "bias": (),
    "dark": ("bias",),
    "flat": ("bias", "dark"),
    "defects": ("dark", "flat"),
}
"""Kinds of calibration frames that each kind is made with."""


class MockedPlan(SimpleNamespace):
    """A plan whose parts the tests set."""

    @property
    def raw_sizes(self):
        return tuple(ccd.size for ccd in self.ccds.values())


@pytest.fixture
def plan():
    """Three exposures of 4 CCDs of 1 Mpixel, one band, one tract of 2 patches."""
    source = SimpleNamespace(source="frames")
    frames = {"bias": 5, "dark": 5, "flat": 5, "defects": 0}
    return MockedPlan(
        exposures=["a", "b", "c"],
        science=dict.fromkeys("abc", SimpleNamespace(rotation=0.0)),
        images={},
        ccds={ccd: SimpleNamespace(size=(1000, 1000)) for ccd in range(4)},
        bands=["r"],
        raw_bands=["r"],
        calib_units={
            kind: [("r" if kind in ("flat", "defects") else None, ALWAYS)] for kind in CALIB_KINDS
        },
        made_with=MADE_WITH.get,
        sets_made_with=lambda kind, band, name: {one: [ALWAYS] for one in MADE_WITH[kind]},
        units_made_with=lambda kind, band, name: [
            (source, (band if source == "flat" else None, ALWAYS)) for source in MADE_WITH[kind]
        ],
        all_sets_taken={"r": [ALWAYS]},
        frame_table=lambda kind, band, name: f"frames/{kind}",
        calib_table=lambda band, taken: f"calibs/{band}",
        tracts=[7],
        settings=SimpleNamespace(
            calibs=SimpleNamespace(bias=source, dark=source, flat=source, defects=source, memory=1),
            coadd=SimpleNamespace(
                memory_mb=100,
                spool_mb=50,
                keep_warps=False,
                background_matching=SimpleNamespace(enabled=False, bin_size=10),
            ),
            parallel=PARALLEL,
            exposure=SimpleNamespace(enabled=()),
        ),
        ccds_of=lambda exposure: range(4),
        overlaps={exposure: {7: ["0_0", "1_0"]} for exposure in ("a", "b", "c")},
        calib_frames=lambda kind, band, name: ["x"] * frames[kind],
        exposures_of_tract=lambda tract, band=None: ["a", "b", "c"],
        exposures_of_patch=lambda band, tract, patch: ["a", "b"],
        patches_of=lambda band, tract: ["0_0", "1_0"],
        sky_tract=lambda tract: SimpleNamespace(
            patch_inner_size=(900, 900), patch_border=50, n_patches=(3, 3), width=2700, height=2700
        ),
    )


def test_one_job_an_exposure_and_a_tract(plan):
    costs = {cost.name: cost for cost in forecast(plan, cores=8)}
    assert {name: cost.n_jobs for name, cost in costs.items()} == {
        "calibration": 4,
        "exposure": 3,
        "tract": 1,
        "survey": 1,
    }
    assert costs["exposure"].n_steps == 3 * (4 + 1)
    # warps, coadds, corner database, picture, depth
    assert costs["tract"].n_steps == 3 + 2 + 1 + 1 + 1
    assert costs["calibration"].n_steps == 4 * 4


@pytest.mark.parametrize(("cores", "wide"), [(1, 1), (3, 3), (4, 4), (100, 4)])
def test_memory_grows_with_what_runs_side_by_side(plan, cores, wide):
    exposure = forecast(plan, cores)[1]
    assert exposure.memory == wide * resources.ccd_memory(MPIX) + SNAKEMAKE_MB


class CountedName(str):
    """The name of a set, which counts how often it is looked up."""

    looks = 0

    def __hash__(self):
        CountedName.looks += 1
        return super().__hash__()


def test_one_dark_for_all_nights_joins_them_at_a_cost_in_proportion_to_nights(plan, monkeypatch):
    looks = {}
    for n in (100, 700):
        nights = [CountedName(night) for night in range(n)]
        dark, bias = (None, ALWAYS), [(None, night) for night in nights]
        flats = [("r", night) for night in nights]
        plan.calib_units = {"bias": bias, "dark": [dark], "flat": flats, "defects": []}
        plan.units_made_with = lambda kind, band, name, dark=dark: (
            [("bias", (None, name)), ("dark", dark)] if kind == "flat" else []
        )
        monkeypatch.setattr(CountedName, "looks", 0)
        parts = _parts_of_calibs(plan)
        looks[n] = CountedName.looks
        assert len(parts) == 2 * n + 1 and len({*parts.values()}) == 1
    # 49 times as many if each night went through all others
    assert looks[700] < 10 * looks[100]


def test_whole_exposures_and_tracts_are_single_steps_of_the_same_pixels(plan):
    _, exposures, tracts, _ = forecast(plan, 2)
    plan.settings.parallel = ParallelSettings(
        calexp="exposure", coadd="tract", workers=2, backend="processes"
    )
    _, whole_exposures, whole_tracts, _ = forecast(plan, 8)
    assert (whole_exposures.n_jobs, whole_exposures.n_steps) == (3, 3)
    assert (whole_tracts.n_jobs, whole_tracts.n_steps) == (1, 1 + 1 + 1 + 1)
    assert whole_exposures.core_hours < exposures.core_hours, "fewer starts of Python"
    # beside its two workers the job holds what is done
    assert whole_exposures.memory > exposures.memory
    assert whole_exposures.disk == exposures.disk
    assert whole_tracts.disk < tracts.disk, "no warps on disk"


def test_what_was_asked_for_is_beside_what_was_measured(plan, tmp_path):
    asked = asked_memory(plan, cores=8)
    assert asked["calexp"] == resources.ccd_memory(MPIX)
    assert asked["coadd"] == resources.coadd_memory(MPIX, 2, 100)
    assert asked["master_bias"] == resources.calib_memory(MPIX, 5, 1)
    write(tmp_path, "calexp/1/0", 10, 500, 36)
    (step,) = measured(tmp_path / "benchmarks", asked)
    assert step.asked == asked["calexp"]


def test_only_workers_that_are_no_forks_start_python(plan):
    def core_seconds(backend):
        update = {"calexp": "exposure", "backend": backend, "workers": 4}
        plan.settings.parallel = PARALLEL.model_copy(update=update)
        return 3600 * forecast(plan, cores=4)[1].core_hours

    starts = 3 * 4  # of workers, in the jobs of three exposures
    more = core_seconds("dask") - core_seconds("processes")
    assert more == pytest.approx(starts * START_CPU_SECONDS)


@pytest.mark.parametrize(("cores", "rounds"), [(1, 4), (3, 2), (8, 1)])
def test_time_limit_adds_what_runs_in_turn(plan, cores, rounds):
    exposure = forecast(plan, cores)[1]
    assert exposure.runtime == rounds * resources.time_limit(resources.ccd_seconds(MPIX)) + 5


def test_time_limit_of_a_tract_grows_with_its_exposures(plan):
    few = forecast(plan, 2)[2]
    names = [f"e{number}" for number in range(200)]
    plan.exposures_of_tract = lambda tract, band=None: names
    plan.exposures, plan.overlaps = names, {name: {7: ["0_0", "1_0"]} for name in names}
    many = forecast(plan, 2)[2]
    one_warp = resources.time_limit(resources.warp_seconds(4 * MPIX))
    # two at a time, beside the corner database; all others are as they were
    assert many.runtime - few.runtime == (100 - 1) * one_warp


def test_bands_that_fit_side_by_side_into_the_cores_add_their_memory(plan):
    plan.settings.parallel = PARALLEL.model_copy(update={"coadd": "tract"})
    plan.bands = ["g", "r"]
    in_turn, beside = forecast(plan, 7)[2], forecast(plan, 8)[2]
    share = SNAKEMAKE_MB
    assert beside.memory - share == 2 * (in_turn.memory - share)
    assert beside.runtime < in_turn.runtime


def test_background_matching_needs_memory(plan):
    plan.settings.parallel = PARALLEL.model_copy(update={"coadd": "tract"})
    without = forecast(plan, 4)[2].memory
    plan.settings.coadd.background_matching.enabled = True
    assert forecast(plan, 4)[2].memory - without == resources.matching_memory(3, MPIX, 2, 10)
    assert asked_memory(plan, 4)["tract"] == forecast(plan, 4)[2].memory - SNAKEMAKE_MB


def test_a_small_tract_of_many_exposures_asks_for_little(plan):
    """A tract of 935 x 579 pixels with 141 exposures: 13 GB and 2 hours were asked for once."""
    plan.settings.parallel = PARALLEL.model_copy(update={"coadd": "tract"})
    plan.settings.coadd.memory_mb, plan.settings.coadd.spool_mb = 512, 4096
    names = [f"e{number}" for number in range(141)]
    plan.exposures = names
    plan.science = dict.fromkeys(names, SimpleNamespace(rotation=0.0))
    plan.overlaps = {name: {7: ["0_0"]} for name in names}
    plan.ccds, plan.ccds_of = {0: SimpleNamespace(size=(650, 500))}, lambda exposure: [0]
    plan.exposures_of_tract = lambda tract, band=None: names
    plan.exposures_of_patch = lambda band, tract, patch: names
    plan.patches_of = lambda band, tract: ["0_0"]
    plan.sky_tract = lambda tract: SimpleNamespace(
        patch_inner_size=(935, 579), patch_border=100, n_patches=(1, 1), width=935, height=579
    )
    (step,) = [step for rule, step in steps(plan, 4) if rule == "tract"]
    held = resources.spool_memory([650 * 500] * 141, 935 * 579, 4096)
    coadd = resources.coadd_memory(935 * 579, 141, 512)
    idle = resources.MASTER_MB + 3 * resources.KERNELS_MB
    assert step.memory == idle + coadd + held < 2700
    assert (step.runtime, step.seconds) == (5, pytest.approx(6.3, abs=0.1))


def test_memory_of_tasks_on_several_nodes_is_that_of_all(plan):
    plan.settings.parallel = PARALLEL.model_copy(update={"coadd": "tract", "backend": "mpi"})
    (step,) = [step for rule, step in steps(plan, 4) if rule == "tract"]
    assert asked_memory(plan, 4)["tract"] == (step.workers + 1) * step.task_memory
    assert forecast(plan, 4)[2].memory >= (step.workers + 1) * step.task_memory > step.memory


def test_no_more_steps_share_a_job_than_it_has(plan):
    assert widths(plan) == {"calexp": 4, "warp": 3, "coadd": 2}


def test_twice_the_exposures_cost_twice_as_much(plan):
    once = forecast(plan, 8)[1]
    plan.exposures = [*plan.exposures, "d", "e", "f"]
    plan.overlaps |= dict.fromkeys("def", plan.overlaps["a"])
    plan.science |= dict.fromkeys("def", 1)
    twice = forecast(plan, 8)[1]
    assert twice.core_hours == pytest.approx(2 * once.core_hours)
    assert twice.disk == pytest.approx(2 * once.disk)
    assert twice.memory == once.memory


def test_disk_is_that_of_images_with_variance_and_mask(plan):
    # three planes of 4 bytes
    assert forecast(plan, 8)[1].disk == pytest.approx(12 * MPIX * 3 * 4 / 1e9, rel=0.2)


def test_a_tract_in_one_job_keeps_its_warps_in_memory(plan):
    _, _, by_patches, _ = forecast(plan, 8)
    plan.settings.parallel = PARALLEL.model_copy(update={"coadd": "tract"})
    _, _, as_one, _ = forecast(plan, 8)
    assert as_one.n_steps == 4
    assert by_patches.disk - as_one.disk == pytest.approx(12 * MPIX * 3 * 4 * 1.25 / 1e9, rel=0.2)
    plan.settings.coadd.spool_mb = 100
    assert forecast(plan, 8)[2].memory == as_one.memory + 50
    plan.settings.coadd.keep_warps = True
    assert forecast(plan, 8)[2].disk == by_patches.disk


def write(folder, name, seconds, rss, cpu):
    path = folder / "benchmarks" / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:01\t{rss}\t{cpu}\n")


def test_benchmarks_are_summed_by_rule(tmp_path):
    write(tmp_path, "calexp/1/0", 10, 500, 36)
    write(tmp_path, "calexp/1/1", 120, 400, 36)
    write(tmp_path, "calibs/flat/r/0", 5, 100, 18)
    write(tmp_path, "warp/0/1", 1, "NA", "-")
    steps = {step.rule: step for step in measured(tmp_path / "benchmarks")}
    assert steps["calexp"].n_steps == 2
    assert steps["calexp"].core_hours == pytest.approx(0.02)
    assert steps["calexp"].memory == pytest.approx(500 * 1.048576)
    assert steps["calexp"].seconds == 120
    assert core_hours_of("calibration", steps.values()) == pytest.approx(0.005)
    assert core_hours_of("exposure", steps.values()) == pytest.approx(0.02)
    assert core_hours_of("survey", steps.values()) is None
    words = suggestion(steps.values(), cores=8, side_by_side={"calexp": 3})
    # 500 MiB and 30 % of room, and the Snakemakes of the job, which its 3 CCDs share
    assert "calexp:mem_mb=782" in words
    # twice the longest
    assert "calexp:runtime=4" in words
    assert disk_used(tmp_path) > 0


def test_nothing_measured_before_a_run(tmp_path):
    assert measured(tmp_path / "nothing") == []
