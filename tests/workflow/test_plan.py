"""The plan follows from settings, tables and camera, and from nothing else."""

import ast
import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from coaddflow.errors import InputError
from coaddflow.instrument.camera import camera_file, load_camera
from coaddflow.settings import Settings
from coaddflow.skymap.coverage import predicted_overlaps
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables.exposures import ExposureRow, ImageRow, write_exposures, write_images
from coaddflow.tables.paths import CALIB_KINDS
from coaddflow.tables.pointings import Angles, Correction, adopt, write_new
from coaddflow.workflow import plan_cache
from coaddflow.workflow.inputs import Inputs
from coaddflow.workflow.params import Params
from coaddflow.workflow.plan import make_plan
from coaddflow.workflow.plan_cache import KeptRows
from coaddflow.workflow.report import notes

SKYMAP = {
    "kind": "rings",
    "pixel_scale": 0.2,
    "patch_inner_size": 600,
    "patch_border": 20,
    "rings": {"num_rings": 1000, "tract_overlap": 0.002},
}


def science(name, band="r", ra=150.1, dec=2.2, **changes):
    row = {"exposure": name, "kind": "science", "band": band, "ra": ra, "dec": dec}
    row |= {"rotation": 0.0, "mjd": 60000.0, "exposure_time": 60.0, "path": f"raw/{name}.fits"}
    return ExposureRow(**(row | changes))


def calibration(name, kind, band=""):
    return science(name, band, None, None, rotation=None, kind=kind, mjd=59000.0)


def image(name, ccd, ra=150.1, band="r", path="images/a.fits", **changes):
    row = {"exposure": name, "ccd": ccd, "band": band, "mjd": 60001.0, "exposure_time": 60.0}
    corners = {
        "footprint_ra": (ra, ra - 0.01, ra - 0.01, ra),
        "footprint_dec": (2.2, 2.2, 2.21, 2.21),
    }
    row |= {"path": path, "hdu": 1, "nx": 100, "ny": 90, "electrons_per_unit": 1.0}
    return ImageRow(**(row | corners | {"zero_point": 31.4} | changes))


@pytest.fixture(autouse=True)
def _in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stars.csv").write_text("ra,dec,mag\n")


def plan_of(rows, cache=None, is_job=False, **changes):
    write_exposures("tables/exposures.ecsv", rows)
    settings = {
        "camera": "mini",
        "exposures": "tables/exposures.ecsv",
        "refcat": {"path": "stars.csv"},
        "skymap": SKYMAP,
        "prediction": {"margin": 0.005},
    }
    return make_plan(Settings(**(settings | changes)), cache, is_job)


def test_every_patch_names_the_exposures_that_can_touch_it_and_no_others():
    plan = plan_of([science("a"), science("b", "g"), science("far", ra=150.3), science("c")])
    for exposure in plan.exposures:
        for tract, patches in plan.overlaps[exposure].items():
            band = plan.band_of(exposure)
            assert exposure in plan.exposures_of_tract(tract, band)
            for patch in plan.patches_of(band, tract):
                touched = exposure in plan.exposures_of_patch(band, tract, patch)
                assert touched == (patch in patches)
    assert set(plan.exposures_of_tract(next(iter(plan.overlaps["far"])))).isdisjoint("abc")
    assert plan.bands == ["g", "r"]
    assert plan.patches_of("z", plan.tracts[0]) == []


def test_bands_and_exposures_can_be_left_out():
    rows = [science("a"), science("b", "g"), calibration("z1", "bias")]
    assert plan_of(rows, bands=["g"]).exposures == ["b"]
    assert plan_of(rows, exclude=["b"]).exposures == ["a"]
    assert list(plan_of(rows, exclude_ccds=[1, 2]).ccds) == [0, 3]
    with pytest.raises(InputError, match="no exposure 'bb'"):
        plan_of(rows, exclude=["bb"])
    with pytest.raises(InputError, match="no CCD 99"):
        plan_of(rows, exclude_ccds=[99])
    with pytest.raises(InputError, match="exclude_ccds leaves no CCD of the camera"):
        plan_of(rows, exclude_ccds=[0, 1, 2, 3])
    with pytest.raises(InputError, match=r"there is no band 'z'; there are g, r"):
        plan_of(rows, bands=["z"])


def test_calibration_frames_need_enough_exposures():
    rows = [science("a"), science("b", "g"), *(calibration(f"z{i}", "bias") for i in range(3))]
    rows += [calibration(f"f{i}", "flat", "r") for i in range(3)]
    rows += [calibration(f"d{i}", "dark") for i in range(2)]
    plan = plan_of(rows)
    assert plan.calib_frames("bias") == ["z0", "z1", "z2"]
    products = {kind: plan.calib_product(kind, 2, "r") for kind in CALIB_KINDS}
    assert products == {
        "bias": "results/calibs/bias/2.fits",
        "dark": None,
        "flat": "results/calibs/flat/r/2.fits",
        "defects": "results/calibs/defects/r/2.fits",
    }
    assert plan.calib_product("flat", 2, "g") is None
    few = plan_of(rows, calibs={"dark": {"min_frames": 2}, "bias": {"exposures": ["z0", "z1"]}})
    assert few.calib_product("dark", 2, "r") == "results/calibs/dark/2.fits"
    assert few.calib_product("bias", 2, "r") is None
    given = plan_of(rows, calibs={"flat": {"source": "given", "path": "f/{band}_{ccd}.fits"}})
    assert given.calib_product("flat", 2, "g") == "f/g_2.fits"
    sky = plan_of(rows, calibs={"flat": {"source": "night_sky", "min_frames": 2}})
    assert sky.calib_frames("flat", "r") == []
    assert sky.calib_frames("bias") == ["z0", "z1", "z2"]


def test_calibration_frames_of_a_ccd_do_not_change_with_other_bands():
    rows = [science(f"{band}{i}", band, mjd=60000.0 + i) for band in "gr" for i in range(5)]
    rows += [calibration(f"d{i}", "dark") for i in range(3)]
    rows += [calibration(f"{band}f{i}", "flat", band) for band in "gr" for i in range(3)]
    named = {"source": "night_sky", "exposures": [f"g{i}" for i in range(5)]}
    for calibs in ({}, {"dark": named, "defects": named}):
        both, one = plan_of(rows, calibs=calibs), plan_of(rows, calibs=calibs, bands=["r"])
        assert one.exposures == [f"r{i}" for i in range(5)]
        wildcards = SimpleNamespace(ccd="2", band="r")
        for name in ("dark", "flat", *(["night_sky_defects"] if calibs else ["defects"])):
            found = [getattr(Inputs(plan), name)(wildcards) for plan in (both, one)]
            assert found[0] == found[1]
        for kind in CALIB_KINDS:
            assert both.calib_product(kind, 2, "r") == one.calib_product(kind, 2, "r")
        assert one.calib_frames("dark") == (named["exposures"] if calibs else ["d0", "d1", "d2"])


def test_an_exposure_is_planned_where_an_earlier_run_found_it():
    row = science("a")
    before = plan_of([row])
    moved = Angles(150.1, 2.3, 0.0)
    write_new("results/pointings", "a", Correction(Angles.of(row), moved))
    assert plan_of([row], is_job=True).overlaps == before.overlaps
    after = plan_of([row])
    assert after.overlaps["a"] == plan_of([science("a", dec=2.3)]).overlaps["a"]
    assert after.overlaps != before.overlaps
    assert after.table_row("a")["dec"] == 2.3
    assert any("an earlier run fitted" in note for note in notes(after))
    adopt(after.pointings)
    assert plan_of([row], is_job=True).overlaps == after.overlaps


def test_files_are_relative_to_the_working_folder_unless_given_as_absolute():
    rows = [science("a"), science("b", path="/archive/b.fits")]
    plan = plan_of(rows)
    assert plan.raw_file("a", 0) == "tables/raw/a.fits"
    assert plan.raw_file("b", 0) == "/archive/b.fits"
    assert plan.table_row("a", 0)["path"] == "tables/raw/a.fits"
    per_ccd = plan_of([science("a", path="raw/a_{ccd}.fits")])
    assert per_ccd.raw_file("a", 2) == "tables/raw/a_CCD2.fits"


def test_images_calibrated_elsewhere_are_planned_from_their_corners():
    write_images("images.csv", [image("old", 3), image("old", 5, 150.09, weight_path="w.fits")])
    plan = plan_of([science("a")], calibrated={"table": "images.csv", "unit": "nanojansky"})
    assert plan.exposures == ["a", "old"]
    assert plan.ccds_of("old") == [3, 5]
    assert plan.image_files("old", 5) == ["images/a.fits", "w.fits"]
    assert plan.overlaps["old"]
    with pytest.raises(InputError, match="in both tables"):
        plan_of([science("old")], calibrated={"table": "images.csv", "unit": "nanojansky"})


def test_settings_of_a_calexp_are_those_of_its_band_and_hold_no_path():
    stars = {"magnitude": "g"}
    bands = {"g": stars, "r": {"magnitude": "r"}}
    one = plan_of([science("a")], refcat={"path": "stars.csv", "bands": bands})
    other = plan_of(
        [science("a")], refcat={"path": "./stars.csv", "bands": bands | {"g": {"magnitude": "u"}}}
    )
    made_by = {band: [Params(p)._of_band("calexp", band) for p in (one, other)] for band in "gr"}
    assert made_by["r"][0] == made_by["r"][1]
    assert made_by["g"][0] != made_by["g"][1]
    assert "stars.csv" not in json.dumps(made_by)


def test_the_fingerprint_of_a_ccd_changes_with_what_the_camera_file_says_of_it():
    camera = yaml.safe_load(camera_file("mini").read_text(encoding="utf-8"))
    Path("camera.yaml").write_text(yaml.safe_dump(camera))
    before = plan_of([science("a")], camera="camera.yaml").ccds
    camera["detectors"][1]["defects"] = [[0, 0, 2, 2]]
    Path("camera.yaml").write_text(yaml.safe_dump(camera))
    after = plan_of([science("a")], camera="camera.yaml").ccds
    changed = {ccd for ccd in before if before[ccd] != after[ccd]}
    assert changed == {camera["detectors"][1]["id"]}


def kept_files(kind="plan"):
    return sorted(Path("cache").glob(f"{kind}-*.sqlite"))


def test_the_plan_is_kept_and_made_anew_when_what_it_rests_on_changes():
    first = plan_of([science("a"), science("b")], "cache")
    (kept,) = kept_files()
    inode = kept.stat().st_ino
    again = plan_of([science("a"), science("b", mjd=60009.0)], "cache")
    assert kept_files() == [kept]
    assert kept.stat().st_ino == inode
    assert again.overlaps == first.overlaps
    assert again.table_row("b", 0)["mjd"] == 60009.0
    moved = plan_of([science("a"), science("b", ra=150.2)], "cache")
    assert moved.overlaps["b"] != first.overlaps["b"]
    assert len(kept_files()) == 2
    assert kept.stat().st_ino == inode, "another run may have it open"


def test_a_run_that_cannot_keep_its_plan_does_not_use_an_older_one(monkeypatch):
    first = plan_of([science("a")], "cache")
    before = kept_files()

    def no_space(path):
        raise InputError("cannot be written: no space left on device", path=path)

    monkeypatch.setattr(plan_cache, "atomic_path", no_space)
    moved = [science("a", ra=150.2)]
    plan = plan_of(moved, "cache")
    assert plan.overlaps == plan_of(moved).overlaps != first.overlaps
    assert kept_files() == before
    # nor one under the name of its own
    path = plan_cache._path_of_plan("cache", "0" * 64)
    before[0].rename(path)
    assert plan_cache._kept(path, "0" * 64) is None


def test_jobs_keep_nothing():
    plan = plan_of([science("a")], "cache", is_job=True)
    assert plan.overlaps == plan_of([science("a")]).overlaps
    assert not Path("cache").exists()


def test_of_kept_plans_those_are_removed_that_are_neither_new_nor_in_use():
    rows = [[science("a", ra=150.0 + 0.1 * n)] for n in range(6)]
    for of_run in rows[:5]:
        plan_of(of_run, "cache")
    old = kept_files() + kept_files("rows")
    assert len(old) == 10, "of this week"
    for path in old:
        os.utime(path, (1e9, 1e9))
    plan_of(rows[0], "cache")  # uses two of them
    plan_of(rows[5], "cache")
    assert len(kept_files()) == len(kept_files("rows")) == 4
    inodes = {path.stat().st_ino for path in kept_files()}
    plan_of(rows[0], "cache")
    assert {path.stat().st_ino for path in kept_files()} == inodes


def damage(path, how):
    """Spoil a kept plan: its beginning, a page of it, all, or its lines."""
    content = path.read_bytes()
    if how == "no database":
        path.write_text("{")
    elif how == "a page":
        path.write_bytes(content[:-4096] + b"\x55" * 4096)
    elif how == "cut off":
        path.write_bytes(content[:4096])
    else:
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.execute("DELETE FROM kept")


@pytest.mark.parametrize("how", ["no database", "a page", "cut off", "no lines"])
def test_a_damaged_plan_is_worked_out_again(how):
    rows = [science("a"), science("b")]
    first = plan_of(rows, "cache")
    for kind in ("plan", "rows"):
        (path,) = kept_files(kind)
        damage(path, how)
        assert plan_of(rows, "cache").overlaps == first.overlaps
        assert plan_cache.Kept(path).is_sound()
    assert isinstance(plan_of(rows, "cache", is_job=True).science, KeptRows)


@pytest.mark.parametrize(("kind", "part"), [("plan", "overlaps"), ("rows", "science")])
def test_damage_that_a_job_finds_is_said_with_file_and_remedy(kind, part):
    plan_of([science("a"), science("b")], "cache")
    job = plan_of([science("a"), science("b")], "cache", is_job=True)
    (path,) = kept_files(kind)
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(f"DROP TABLE {'overlaps' if kind == 'plan' else 'rows'}")
    looked_up = type(getattr(job, part))
    damaged = looked_up(plan_cache.Kept(path), *([True] if kind == "rows" else []))
    with pytest.raises(InputError, match=rf"{path}: .* Remove it and run again"):
        _ = damaged["a"]


def test_a_kept_plan_is_looked_up_in_any_thread():
    plan = plan_of([science("a"), science("b")], "cache")
    job = plan_of([science("a"), science("b")], "cache", is_job=True)
    expected = dict(plan.overlaps)
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: dict(plan.overlaps), range(20)):
            assert found == expected
        assert threads.submit(lambda: job.science["b"].band).result() == "r"


def test_lists_of_exposures_are_those_of_the_caller():
    plan = plan_of([science("a"), science("b")])
    tract = plan.tracts[0]
    patch = plan.patches_of("r", tract)[0]
    for ask in (
        lambda: plan.exposures_of_tract(tract),
        lambda: plan.exposures_of_tract(tract, "r"),
        lambda: plan.exposures_of_patch("r", tract, patch),
    ):
        before = list(ask())
        ask().clear()
        assert ask() == before


def test_settings_of_a_job_hold_nothing_but_its_sections():
    full = Settings()
    settings = full.only("warp", "products")
    assert settings.warp == full.warp
    with pytest.raises(AttributeError):
        _ = settings.psf
    assert full.psf.order == Settings().psf.order


def test_what_is_switched_off_has_no_part_in_settings_and_their_hash():
    off = {"background_matching": {"bin_size": 64}, "clip": {"enabled": False, "sigma": 6.0}}
    plain = Settings(coadd={"clip": {"enabled": False}}).changed_in("coadd", "cosmics")
    assert plain == {"coadd": {"clip": {"enabled": False}}}
    assert Settings(coadd=off).changed_in("coadd", "cosmics") == plain
    changed = Settings(coadd={"clip": {"sigma": 6.0}}).changed_in("coadd")
    assert changed == {"coadd": {"clip": {"sigma": 6.0}}}
    no_cosmics = [Settings(cosmics={"enabled": False, "sigma": n}) for n in (5.0, 6.0)]
    assert no_cosmics[0].changed_in("cosmics") == no_cosmics[1].changed_in("cosmics")
    assert no_cosmics[0].changed_in("cosmics") != Settings().changed_in("cosmics")


def test_the_kept_plan_is_invalid_when_any_module_that_makes_it_has_changed(monkeypatch, tmp_path):
    plan_of([science("a")], "cache")
    package = tmp_path / "coaddflow"
    shutil.copytree(plan_cache.PACKAGE, package)
    monkeypatch.setattr(plan_cache, "PACKAGE", package)
    plan_of([science("a")], "cache")
    assert len(kept_files()) == 1, "a copy of the same sources"
    sources = ("skymap/coverage.py", "geometry/polygon.py", "instrument/camera.py")
    for n_more, name in enumerate(sources, 1):
        with (package / name).open("a") as stream:
            stream.write("# changed\n")
        plan_of([science("a")], "cache")
        assert len(kept_files()) == 1 + n_more, name


def test_the_modules_that_make_a_plan_are_those_it_is_kept_by():
    """What Python loads to make one, in a process of its own."""
    write_exposures("tables/exposures.ecsv", [science("a")])
    write_images("images.csv", [image("old", 3)])
    program = (
        "import json, sys; from coaddflow.settings import load_settings; "
        "from coaddflow.workflow.plan import make_plan; "
        "make_plan(load_settings(json.loads(sys.argv[1])), None); "
        "print([m.__file__ for n, m in sys.modules.items() if n.startswith('coaddflow.')])"
    )
    config = {
        "camera": "mini",
        "exposures": "tables/exposures.ecsv",
        "refcat": {"path": "stars.csv"},
        "skymap": SKYMAP,
        "calibrated": {"table": "images.csv", "unit": "nanojansky"},
    }
    command = [sys.executable, "-c", program, json.dumps(config)]
    loaded = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    files = {Path(name) for name in ast.literal_eval(loaded) if not name.endswith("__init__.py")}
    assert len(files) > 20
    assert files <= set(plan_cache.plan_sources())


def test_given_calibration_frames_that_are_not_there_are_named():
    given = {"calibs": {"bias": {"source": "given", "path": "masters/bias_{ccd}.fits"}}}
    plan = plan_of([science("e1")], **given)
    with pytest.raises(InputError, match=r"masters/bias_0\.fits: 4 of the 4 files of calibs\.bias"):
        plan.check()
    Path("masters").mkdir()
    for ccd in range(4):
        Path(f"masters/bias_{ccd}.fits").touch()
    plan_of([science("e1")], **given).check()


def test_what_a_tract_in_one_job_needs_is_checked_before_anything_runs(monkeypatch):
    rows = [science("a")]
    Path("scratch").touch()
    whole = {"coadd": "tract"}
    with pytest.raises(InputError, match=r"scratch: coadd\.scratch is no folder"):
        plan_of(rows, parallel=whole, coadd={"scratch": "scratch"}).check()
    plan_of(rows, coadd={"scratch": "scratch"}).check()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs the package distributed. Install it: pip install"):
        plan_of(rows, parallel={**whole, "backend": "dask"}).check()
    plan_of(rows, parallel={"backend": "dask"}).check()


@pytest.mark.parametrize("camera", ["mini", "demo"])
def test_the_default_sky_map_fits_the_camera(camera):
    rows = [science("a"), science("b", ra=150.101, rotation=30.0)]
    small = {"kind": "tangent", "patch_inner_size": 500, "patch_border": 10}
    plan = plan_of(rows, camera=camera, skymap=small, prediction={"margin": 0.05})
    known = load_camera(camera)
    assert plan.skymap.pixel_scale == known.pixel_scale
    # no patch of the fitted tract is off the exposures, although the prediction has a wide margin
    skymap = make_skymap(plan.skymap)
    touched = predicted_overlaps(plan.science.values(), known, skymap, 1e-4)
    patches = {patch for tracts in touched.values() for patch in tracts[0]}
    assert len(patches) > 0.8 * np.prod(skymap.tract(0).n_patches)
    assert plan_of(rows, camera=camera, skymap={"kind": "rings"}).skymap.pixel_scale == (
        known.pixel_scale
    )
