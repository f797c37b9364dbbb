"""The workflow redoes exactly what changed, survives what fails, and resumes what was killed.

What ran is taken from Snakemake's own lists of jobs.
"""

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from astropy.io import fits
from survey_run import REPOSITORY, Survey, environment

from coaddflow.settings import load_settings
from coaddflow.settings.commented import rewrite
from coaddflow.tables.manifest import read_manifest
from coaddflow.tables.verdict import PASSES, Verdict, write_verdict
from coaddflow.workflow.plan import make_plan
from coaddflow.workflow.stages import STAGES
from coaddflow.workflow.status import TOO_MANY_LEFT_OUT

AFTER_COADDS = {name for name, stage in STAGES.items() if "coadd" in stage.after}
"""Rules that work on the coadds of a tract, such as `picture`."""


def plan_of(survey):
    """Return the plan of a survey by its settings of now."""
    with contextlib.chdir(survey.folder):
        return make_plan(load_settings(yaml.safe_load(Path("config.yaml").read_text())), None)


@pytest.fixture(scope="session")
def plan(raw_survey):
    """The plan of the whole survey."""
    return plan_of(raw_survey)


def jobs_of_ccds(plan, exposure):
    """Return the jobs that make the manifest of an exposure."""
    jobs = Counter({("manifest", f"exposure {exposure}"): 1})
    for ccd in plan.ccds:
        jobs["calexp", f"exposure {exposure}, CCD {ccd}"] = 1
    return jobs


def jobs_of_warps(plan, exposure):
    """Return the jobs that warp an exposure."""
    return Counter(
        {("warp", f"exposure {exposure}, tract {t}"): 1 for t in plan.overlaps[exposure]}
    )


def jobs_of_coadds(plan, tracts, bands):
    """Return the jobs that coadd the tracts in the bands, and what is made of the coadds."""
    jobs = Counter({(rule, f"tract {tract}"): 1 for tract in tracts for rule in AFTER_COADDS})
    for tract in tracts:
        for band in bands:
            for patch in plan.patches_of(band, tract):
                jobs["coadd", f"band {band}, tract {tract}, patch {patch}"] = 1
    return jobs


def jobs_of_databases(tracts, bands):
    """Return the jobs that make the databases of tracts and bands, and that of the survey."""
    jobs = Counter({("survey_corners", "all exposures"): 1})
    for tract in tracts:
        for band in bands:
            jobs["tract_corners", f"band {band}, tract {tract}"] = 1
    return jobs


def downstream(plan, exposure):
    """Return all jobs that depend on the manifest of an exposure."""
    tracts, bands = list(plan.overlaps[exposure]), [plan.band_of(exposure)]
    return (
        jobs_of_warps(plan, exposure)
        + jobs_of_databases(tracts, bands)
        + jobs_of_coadds(plan, tracts, bands)
    )


def in_two_tracts(plan):
    """Return an exposure that touches two tracts."""
    return next(e for e in plan.exposures if len(plan.overlaps[e]) == 2)


def in_one_tract(plan):
    """Return an exposure that touches one tract only."""
    return next(e for e in plan.exposures if len(plan.overlaps[e]) == 1)


def settings_without(exposure):
    """Return the settings of a survey in which an exposure is left out."""
    return {"exclude": [exposure]}


# The plan


def test_the_whole_plan_is_known_before_anything_has_run(raw_survey, plan):
    planned = raw_survey.plan()
    assert planned.returncode == 0, planned.text
    expected = Counter(
        frame_table=2 + len(plan.bands),
        master_bias=2,
        master_dark=2,
        master_flat=4,
        defects=4,
        calexp=2 * len(plan.exposures),
        manifest=len(plan.exposures),
        survey_corners=1,
        tract_corners=sum(
            bool(plan.patches_of(band, tract)) for band in plan.bands for tract in plan.tracts
        ),
        warp=sum(len(plan.overlaps[exposure]) for exposure in plan.exposures),
        coadd=sum(len(plan.patches_of(b, t)) for b in plan.bands for t in plan.tracts),
        **dict.fromkeys(AFTER_COADDS, len(plan.tracts)),
    )
    assert planned.rules == expected
    assert len(plan.tracts) == 2
    assert in_one_tract(plan)
    assert in_two_tracts(plan)


def test_a_finished_survey_has_all_products_and_nothing_to_do(finished_survey, plan):
    for exposure in plan.exposures:
        rows = read_manifest(finished_survey / f"results/summary/{exposure}.ecsv")
        assert [row.state for row in rows] == ["done", "done"], rows
    used = {}
    for path in finished_survey.folder.glob(f"results/coadd/{plan.bands[0]}/*/*.fits"):
        with fits.open(path) as hdus:
            names = [hdu.name for hdu in hdus]
            used[path] = hdus["INPUTS"].data["n_used"].tolist()
        assert names[:6] == ["PRIMARY", "IMAGE", "MASK", "VARIANCE", "NINPUTS", "INPUTS"]
        assert names[6:9] == ["INPUTMAP", "INPUTSETS", "CCD_PSFS"]
    # at the rim an exposure may graze a patch
    fullest = max(used.values(), key=sum)
    assert len(fullest) == sum(plan.band_of(e) == plan.bands[0] for e in plan.exposures)
    assert min(fullest) > 0
    assert finished_survey.plan().planned_nothing


def test_a_lost_product_is_made_again_as_status_says(survey, coarse_survey, tmp_path):
    """Snakemake sees only what a job promises: `status` says what to remove for the others."""
    depth = next((survey / "results/depth").glob("*/*/*.fits"))
    depth.unlink()
    band, tract, _ = depth.relative_to(survey / "results/depth").parts
    assert survey.plan().planned_nothing
    told = survey.coaddflow("status")
    assert told.returncode == 1 and f"    results/depth/{tract}.ecsv\n" in told.text
    (survey / f"results/depth/{tract}.ecsv").unlink()
    assert survey.plan().jobs == {("depth", f"tract {tract}"): 1}
    coarse = coarse_survey.copy_to(tmp_path / "coarse")
    (coarse / f"results/coadd/{band}/{tract}" / depth.name).unlink()
    told = coarse.coaddflow("status").text
    assert f"    results/coadd/{band}/{tract}.ecsv\n" in told
    (coarse / f"results/coadd/{band}/{tract}.ecsv").unlink()
    assert coarse.plan().rules["tract"] == 1


@pytest.mark.parametrize("whole_exposure", [False, True])
def test_a_calexp_that_is_cut_off_is_made_again_as_status_and_verify_say(
    survey, coarse_survey, tmp_path, whole_exposure
):
    one = coarse_survey.copy_to(tmp_path / "coarse") if whole_exposure else survey
    calexp = next((one / "results/calexp").glob("*/0.fits"))
    calexp.write_bytes(calexp.read_bytes()[:-100])
    exposure = calexp.parent.name
    removed = [f"results/summary/{exposure}.ecsv"]
    if not whole_exposure:
        removed.insert(0, f"results/calexp/{exposure}/0.json")
    told, verified = one.coaddflow("status"), one.coaddflow("verify")
    assert told.returncode == 1 and f"remove {' and '.join(removed)} and run" in told.text
    assert verified.returncode == 1 and f"rm {' '.join(removed)}; then run" in verified.text
    assert one.plan().planned_nothing
    for name in removed:
        (one / name).unlink()
    wanted = ("exposure", 1) if whole_exposure else ("calexp", 1)
    assert one.plan().rules[wanted[0]] == wanted[1]


def test_files_touched_without_other_content_redo_nothing(survey, plan):
    exposure = plan.exposures[0]
    for name in (
        f"data/raw/{exposure}.fits",
        "data/refcat.fits",
        "data/exposures.ecsv",
        "config.yaml",
        f"results/summary/{exposure}.ecsv",
        f"results/calexp/{exposure}/0.json",
        "results/calibs/bias/0.fits",
    ):
        (survey / name).touch()
    assert survey.plan().planned_nothing


@pytest.mark.parametrize("choose", [in_two_tracts, in_one_tract])
def test_an_exposure_dropped_and_added_redoes_its_dependents(survey, plan, finished_survey, choose):
    exposure = choose(plan)
    tracts, bands = list(plan.overlaps[exposure]), [plan.band_of(exposure)]
    survey.write_settings(exclude=[exposure])
    dropped = survey.run()
    assert dropped.returncode == 0, dropped.text
    smaller = plan_of(survey)
    assert dropped.jobs == jobs_of_databases(tracts, bands) + jobs_of_coadds(smaller, tracts, bands)
    assert survey.plan().planned_nothing
    # patches that it was alone on are not planned any more: their coadds are left, and named
    only_its = set(jobs_of_coadds(plan, tracts, bands)) - set(
        jobs_of_coadds(smaller, tracts, bands)
    )
    assert ("no longer in the survey" in dropped.text) == bool(only_its)

    # as if it had never been there
    for path in (survey / "results").rglob(f"{exposure}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    survey.write_settings()
    added = survey.run()
    assert added.returncode == 0, added.text
    assert added.jobs == jobs_of_ccds(plan, exposure) + downstream(plan, exposure)
    assert survey.plan().planned_nothing
    assert survey.pixels("results/coadd/**/*.fits") == finished_survey.pixels(
        "results/coadd/**/*.fits"
    )


def test_an_exposure_with_other_pixels_redoes_its_dependents(survey, plan, finished_survey):
    exposure = in_two_tracts(plan)
    raw = survey / f"data/raw/{exposure}.fits"
    with fits.open(raw, mode="update") as hdus:
        hdus["CCD0"].data[100:110, 100:110] += 50
        for hdu in hdus:
            hdu.add_checksum()
    run = survey.run()
    assert run.returncode == 0, run.text
    assert run.jobs == jobs_of_ccds(plan, exposure) + downstream(plan, exposure)
    assert survey.plan().planned_nothing
    old, new = (s.pixels("results/calexp/*/*.fits") for s in (finished_survey, survey))
    changed = {name for name in old if old[name] != new[name]}
    assert f"results/calexp/{exposure}/0.fits" in changed
    assert all(exposure in name for name in changed)
    coadds = "results/coadd/**/*.fits"
    assert finished_survey.pixels(coadds) != survey.pixels(coadds)


def test_a_changed_setting_redoes_what_uses_it(survey, plan):
    coadds = jobs_of_coadds(plan, plan.tracts, plan.bands)
    warps = sum((jobs_of_warps(plan, exposure) for exposure in plan.exposures), Counter())
    # settings without effect on products
    survey.write_settings(
        coadd={"memory_mb": 100}, calibs={"memory": 0.5}, calexp={"max_failed_fraction": 0.7}
    )
    assert survey.plan().planned_nothing
    survey.write_settings(warp={"kernel": "bilinear"})
    assert survey.plan().jobs == warps + coadds
    survey.write_settings(psf={"order": 1})
    rules = survey.plan().rules
    assert rules["calexp"] == 2 * len(plan.exposures)
    assert rules["master_flat"] == rules["master_bias"] == rules["defects"] == 0
    # another magnitude for one band does not concern the others
    refcat = yaml.safe_load((survey / "config.yaml").read_text())["refcat"]
    refcat["bands"]["r"]["magnitude"] = "mag_g"
    survey.write_settings(refcat=refcat)
    redone = {job for job in survey.plan().jobs if job[0] == "calexp"}
    reds = [e for e in plan.exposures if plan.band_of(e) == "r"]
    assert redone == {("calexp", f"exposure {e}, CCD {ccd}") for e in reds for ccd in plan.ccds}

    survey.write_settings(selection={"max_seeing": 20.0})
    run = survey.run()
    assert run.returncode == 0, run.text
    assert run.jobs == coadds
    assert survey.plan().planned_nothing


def test_bands_are_added_and_dropped_without_a_touch_to_the_others(survey, plan):
    of_all_bands = {*AFTER_COADDS, "survey_corners"}
    kept, other = plan.bands
    survey.write_settings(bands=[kept])
    assert survey.plan().rules.keys() <= of_all_bands, "dropping a band"
    assert survey.run().returncode == 0
    # as if the other band had never been there
    exposures = [e for e in plan.exposures if plan.band_of(e) == other]
    for kind in ("calibs/flat", "calibs/defects", "corners", "coadd", "depth"):
        shutil.rmtree(survey / f"results/{kind}/{other}")
    for exposure in exposures:
        shutil.rmtree(survey / f"results/calexp/{exposure}")
        (survey / f"results/summary/{exposure}.ecsv").unlink()
        for tract in plan.overlaps[exposure]:
            (survey / f"results/warp/{tract}/{exposure}.ecsv").unlink()
    survey.write_settings()
    planned = survey.plan()
    jobs = [job for job in planned.jobs if job[0] not in of_all_bands]
    assert planned.rules["calexp"] == len(exposures) * len(plan.ccds)
    assert planned.rules["master_flat"] == planned.rules["defects"] == len(plan.ccds)
    assert all(f"band {other}," in what or what[9:13] in exposures for _, what in jobs), jobs


# Failures


def test_exposures_that_fail_are_left_out_and_come_in_when_they_are_mended(
    survey, plan, finished_survey
):
    """A broken CCD, a clouded exposure and a missing raw file at once; then all are mended."""
    one, two, three = plan.exposures[:3]
    raw = {name: survey / f"data/raw/{name}.fits" for name in (one, two, three)}
    kept = {name: path.read_bytes() for name, path in raw.items()}
    _overwrite_with_zeros(raw[one], ["CCD0"])
    _cover_with_clouds(raw[two], ["CCD0", "CCD2"])
    raw[three].unlink()
    (survey / f"results/summary/{three}.ecsv").unlink()
    shutil.rmtree(survey / f"results/calexp/{three}")

    run = survey.run()
    assert run.returncode == 0, run.text
    rows = read_manifest(survey / f"results/summary/{one}.ecsv")
    assert [(row.state, row.reason) for row in rows] == [("failed", "all_zero"), ("done", "")]
    assert not (survey / f"results/calexp/{one}/0.fits").exists()
    left_out = {two: {"no_stars", "no_psf_stars"}, three: {"missing_file"}}
    for exposure, reasons in left_out.items():
        rows = read_manifest(survey / f"results/summary/{exposure}.ecsv")
        assert [row.state for row in rows] == ["failed"] * 2
        assert {row.reason for row in rows} <= reasons
        # the table at the end
        assert f"exposure {exposure} fails: 2 of 2 CCDs failed" in run.text
    assert "2 exposures left out of all coadds" in run.text
    assert str(raw[three].relative_to(survey.folder)) in rows[0].message
    status = survey.coaddflow("status")
    assert status.returncode == TOO_MANY_LEFT_OUT, status.text
    assert "2 of 6 exposures left out" in status.text

    # a second run has nothing to do, and one that does not accept it redoes what it refuses
    assert survey.plan().planned_nothing
    survey.write_settings(calexp={"on_failed_exposure": "stop"})
    stops = {job for job in survey.plan().jobs if job[0] in ("manifest", "calexp")}
    assert stops == {("manifest", f"exposure {e}") for e in (two, three)}

    # the others have the bits that they have without them
    pixels = survey.pixels("results/coadd/*/*/*.fits")
    tables = {name: _inputs_of(survey / name) for name in pixels}
    survey.write_settings(exclude=[two, three])
    assert survey.run().returncode == 0
    without = survey.pixels("results/coadd/*/*/*.fits")
    assert {name: pixels[name] for name in _planned(survey)} == {
        name: without[name] for name in _planned(survey)
    }
    told = {
        name
        for name, rows in tables.items()
        if any(exposure == two and n == 0 and "failed: no_" in why for exposure, n, why in rows)
    }
    assert told, "the coadds say what they lack"
    assert told <= {
        f"results/coadd/{plan.band_of(two)}/{tract}/{patch}.fits"
        for tract, patches in plan.overlaps[two].items()
        for patch in patches
    }

    survey.write_settings()
    for name, path in raw.items():
        path.write_bytes(kept[name])
    mended = survey.run()
    assert mended.returncode == 0, mended.text
    assert survey.plan().planned_nothing
    assert survey.pixels("results/coadd/*/*/*.fits") == finished_survey.pixels(
        "results/coadd/*/*/*.fits"
    )


def _planned(survey):
    """Return the coadds of the settings of now."""
    plan = plan_of(survey)
    return [
        f"results/coadd/{band}/{tract}/{patch}.fits"
        for tract in plan.tracts
        for band in plan.bands
        for patch in plan.patches_of(band, tract)
    ]


def _inputs_of(path):
    """Return exposure, exposures used and reason of the inputs of a coadd."""
    with fits.open(path) as hdus:
        table = hdus["INPUTS"].data
        return set(zip(table["exposure"], table["n_used"].tolist(), table["reason"], strict=True))


def _cover_with_clouds(path, extensions):
    """Leave the sky of an exposure, and put sky in the place of the stars."""
    rng = np.random.default_rng(1)
    with fits.open(path, mode="update") as hdus:
        for name in extensions:
            data = hdus[name].data
            middle = np.median(data)
            noise = np.median(np.abs(data - middle))
            stars = data > middle + 2 * noise
            sky = data[~stars & (data > middle - 2 * noise)]
            data[stars] = rng.choice(sky, np.count_nonzero(stars))
            hdus[name].add_checksum()


def _overwrite_with_zeros(path, extensions):
    with fits.open(path, mode="update") as hdus:
        for name in extensions:
            hdus[name].data[:] = 0
            hdus[name].add_checksum()


@pytest.mark.parametrize(("granularity", "harm"), [("fine", "truncated"), ("coarse", "removed")])
def test_the_remedy_for_a_harmed_calexp_works(
    finished_survey, coarse_survey, plan, tmp_path, granularity, harm
):
    """One error, and one remedy that works at the first try, whatever the jobs are."""
    finished = {"fine": finished_survey, "coarse": coarse_survey}[granularity]
    survey = finished.copy_to(tmp_path / "survey")
    exposure = next(e for e in plan.exposures if len(plan.overlaps[e]) == 1)
    band, (tract,) = plan.band_of(exposure), plan.overlaps[exposure]
    calexp = survey / f"results/calexp/{exposure}/{next(iter(plan.ccds))}.fits"
    whole = calexp.read_bytes()
    if harm == "truncated":
        calexp.write_bytes(whole[: len(whole) // 2])
    else:
        calexp.unlink()
    lost = {
        "fine": f"results/warp/{tract}/{exposure}.ecsv",
        "coarse": f"results/coadd/{band}/{tract}.ecsv",
    }[granularity]
    (survey / lost).unlink()
    run = survey.run(lost)
    assert run.returncode != 0
    assert len(set(re.findall(r"failed: .*", run.text))) == 1, run.text
    remedy = re.search(r"[Rr]emove (results/\S+(?: and results/\S+)*) and run the wor", run.text)
    for name in remedy.group(1).split(" and "):
        (survey / name).unlink()
    # without targets: asked for one file, Snakemake does not miss what that file was made from
    mended = survey.run()
    assert mended.returncode == 0, mended.text
    assert calexp.read_bytes() == whole
    assert (survey / lost).exists()
    assert survey.plan().planned_nothing


def test_raw_files_that_were_archived_are_not_missed(survey, plan):
    for exposure in plan.exposures:
        (survey / f"data/raw/{exposure}.fits").unlink()
    assert survey.plan().planned_nothing


def test_a_stricter_threshold_fails_the_exposures_that_pass_no_longer(survey, plan):
    exposure = plan.exposures[0]
    # as its job leaves it if half of the CCDs fail
    passed = Verdict(PASSES, failed_fraction=0.5)
    write_verdict(survey / f"results/summary/{exposure}.ecsv", passed)
    assert survey.plan().planned_nothing
    survey.write_settings(calexp={"max_failed_fraction": 0.2})
    planned = {job for job in survey.plan().jobs if job[0] == "manifest"}
    assert planned == {("manifest", f"exposure {exposure}")}


def test_a_full_disk_fails_with_one_clear_message_and_leaves_nothing_half_written(
    survey, plan, finished_survey
):
    coadds = sorted(survey.folder.glob("results/coadd/*/*/*.fits"))
    exposure = in_one_tract(plan)
    warp = survey / f"results/warp/{plan.tracts[0]}/{exposure}.ecsv"
    warp.unlink()

    # a limit on the size of files fails as a full disk does, in the middle of a write
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    full = survey.run(preexec_fn=limit)
    assert full.returncode != 0
    assert not warp.exists()
    assert "cannot be written" in full.text
    assert "free some space" in full.text.lower()
    assert f"log: logs/warp/{plan.tracts[0]}/{exposure}.log" in full.text
    assert not list(survey.folder.glob("results/**/.*.fits*"))
    assert full.rules["warp"] == 1

    run = survey.run()
    assert run.returncode == 0, run.text
    assert sorted(survey.folder.glob("results/coadd/*/*/*.fits")) == coadds
    assert survey.pixels("results/coadd/**/*.fits") == finished_survey.pixels(
        "results/coadd/**/*.fits"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warp": {"kernl": "lanczos3"}}, "unknown setting 'warp.kernl'"),
        ({"camera": "hubble"}, "there is no camera 'hubble'"),
        ({"exposures": "data/none.ecsv"}, "data/none.ecsv: the table cannot be read"),
        ({"refcat": {"path": "data/none.fits"}}, "data/none.fits"),
    ],
)
def test_a_mistake_in_the_settings_ends_the_plan_with_one_line(raw_survey, change, message):
    raw_survey.write_settings(**change)
    try:
        planned = raw_survey.plan()
    finally:
        raw_survey.write_settings()
    assert planned.returncode != 0
    assert message in planned.text
    assert "Traceback" not in planned.text


def test_without_data_the_plan_says_what_to_do(tmp_path):
    planned = Survey(tmp_path).plan()
    assert planned.returncode != 0
    assert "data/demo/exposures.ecsv" in planned.text
    assert "make demo" in planned.text
    assert "Traceback" not in planned.text


# Kill and resume


def test_killed_at_five_random_moments_and_resumed_gives_the_same_pixels(
    raw_survey, finished_survey, tmp_path
):
    survey = raw_survey.copy_to(tmp_path / "survey")
    moments = random.Random(20260101)  # noqa: S311
    n_products = []
    for _ in range(5):
        process = subprocess.Popen(
            survey.command("--cores", "all", "--rerun-incomplete", "--quiet", "all"),
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        _wait_for_products(survey, process, moments.randint(2, 12))
        time.sleep(moments.uniform(0.0, 2.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        n_products.append(len(list(survey.folder.glob("results/**/*.*"))))
        unlocked = survey._call(survey.command("--unlock"))
        assert unlocked.returncode == 0, unlocked.text
    assert n_products[0] > 0
    assert n_products[-1] > n_products[0]

    resumed = survey.run("--rerun-incomplete")
    assert resumed.returncode == 0, resumed.text
    assert survey.plan().planned_nothing
    for pattern in ("results/calexp/*/*.fits", "results/coadd/**/*.fits"):
        expected = finished_survey.pixels(pattern)
        assert len(expected) > 0
        assert survey.pixels(pattern) == expected
    leftovers = [p for p in survey.folder.glob("results/**/.*") if p.is_file()]
    assert len(leftovers) <= 5 * (os.cpu_count() or 1)


def _wait_for_products(survey, process, n_more):
    """Wait until a run has made some more files, so that a kill comes in the middle of work."""
    deadline = time.monotonic() + 300
    before = len(list(survey.folder.glob("results/**/*.*")))
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(survey.folder.glob("results/**/*.*"))) >= before + n_more:
            return
        time.sleep(0.05)


# Files of the project


def test_config_yaml_explains_every_key_of_the_model():
    """`make config` brings it up to date."""
    path = REPOSITORY / "config.yaml"
    assert path.read_text(encoding="utf-8") == rewrite(path)
