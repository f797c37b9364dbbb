"""The job of an exposure: the same products however it is done, and nothing lost when it fails."""

import contextlib
import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from backends import MPI, needs_dask, needs_mpi
from exposure_faults import BuggyFiles, DeadlyFiles
from openings import counted_openings, openings_of
from survey_run import SETTINGS

from coaddflow.calexp.job import make_calexp
from coaddflow.calexp.product import read_calexp
from coaddflow.errors import InputError, TooLittleMemory, is_lasting
from coaddflow.exposure import job as exposure_job
from coaddflow.exposure import solution
from coaddflow.exposure.job import make_exposure
from coaddflow.instrument.raw import read_raw_ccd
from coaddflow.measure import psf_fit
from coaddflow.pool import FilePart, Pool, PoolError
from coaddflow.runtime import resources
from coaddflow.runtime.log import failed_for_good, job_log
from coaddflow.settings import load_settings
from coaddflow.settings.parallel import ParallelSettings
from coaddflow.tables.exposures import read_exposures
from coaddflow.tables.manifest import read_manifest
from coaddflow.tables.verdict import read_verdict, verdict_path
from coaddflow.workflow.stages import STAGES

CCDS = [0, 1, 2, 3]
PARTS = ("crosstalk", "astrometry", "sky", "photometry")
WHOLE = {name: {"enabled": True} for name in PARTS}
NO_CALIBS = {kind: {"source": "none"} for kind in ("bias", "dark", "flat", "defects")}


def spec_of(survey, parts=(), **changes):
    """Return the plain values of a job that does an exposure with some parts switched on."""
    rows = read_exposures(survey / "data/exposures.ecsv")
    row = next(row for row in rows if row.kind == "science")
    raw = f"data/raw/{row.exposure}.fits"
    exposure = {name: WHOLE[name] for name in parts}
    parallel = {"calexp": "exposure", **changes.pop("parallel", {})}
    config = {**SETTINGS, "calibs": NO_CALIBS, "exposure": exposure, "parallel": parallel}
    return {
        "manifest": f"results/summary/{row.exposure}.ecsv",
        "exposure": {**row.model_dump(exclude={"n_files"}), "path": raw},
        "ccds": [{"ccd": ccd, "raw": raw} for ccd in CCDS],
        "config": {**config, **changes},
        "sections": list(STAGES["exposure"].sections),
    }


@pytest.fixture
def working_folder(raw_survey, tmp_path):
    """Return a context manager: a new working folder with the raw frames of the survey."""

    @contextlib.contextmanager
    def enter(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data").symlink_to(raw_survey / "data")
        with contextlib.chdir(folder):
            yield folder

    return enter


def products(folder):
    """Return the content of all products below a folder, by their names."""
    paths = sorted(path for path in (folder / "results").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows_of(folder):
    """Return the rows of the only manifest in a folder."""
    (manifest,) = (folder / "results/summary").glob("*.ecsv")
    return read_manifest(manifest)


def do(spec, backend="serial"):
    """Do a job on a pool of two workers."""
    with Pool(backend, 2) as pool:
        exposure_job.run(pool, spec)


# The same products -------------------------------------------------------------------------------


def test_the_job_of_an_exposure_makes_what_the_jobs_of_its_ccds_make(raw_survey, working_folder):
    spec = spec_of(raw_survey)
    with working_folder("ccd") as folder:
        task = exposure_job.task_of(spec, load_settings(spec["config"]).only(*spec["sections"]))
        for ccd, files in task.files.items():
            make_calexp(task.exposure, ccd, files, task.camera, task.settings)
        by_ccd = {name: content for name, content in products(folder).items()}
    with working_folder("exposure") as folder:
        do(spec, "processes")
        together = products(folder)
        assert [row.state for row in rows_of(folder)] == ["done"] * len(CCDS)
    rows = {name for name in by_ccd if name.endswith(".json")}
    assert len(rows) == len(CCDS)
    assert {name: by_ccd[name] for name in by_ccd.keys() - rows} == {
        name: together[name] for name in together if not name.startswith("results/summary")
    }


@pytest.fixture(scope="module")
def undisturbed(raw_survey, tmp_path_factory):
    """The products of an exposure that is solved as a whole, in this process."""
    folder = tmp_path_factory.mktemp("undisturbed") / "survey"
    folder.mkdir()
    (folder / "data").symlink_to(raw_survey / "data")
    with contextlib.chdir(folder):
        do(whole_spec(raw_survey))
    return folder


def whole_spec(survey, **changes):
    """Return the job of an exposure of which everything is solved as a whole."""
    return spec_of(survey, PARTS, background={"mesh_size": 40}, **changes)


@pytest.mark.parametrize(
    "backend",
    [
        "processes",
        pytest.param("dask", marks=needs_dask),
        pytest.param("mpi", marks=needs_mpi),
    ],
)
def test_all_backends_give_the_same_bits(raw_survey, undisturbed, working_folder, backend):
    spec = whole_spec(raw_survey, parallel={"backend": backend, "mpi_command": MPI})
    with working_folder("survey") as folder:
        make_exposure(spec, workers=2, memory_mb=4000)
        assert products(folder) == products(undisturbed)


@pytest.mark.parametrize(("backend", "cores"), [("serial", 3), ("processes", 8)])
def test_with_more_cores_than_ccds_the_same_bits(
    raw_survey, undisturbed, working_folder, backend, cores
):
    spec = whole_spec(raw_survey, parallel={"backend": backend})
    with working_folder("survey") as folder:
        make_exposure(spec, workers=cores, memory_mb=8000)
        assert products(folder) == products(undisturbed)


@pytest.mark.parametrize(
    ("cores", "n_ccds", "settings", "divided"),
    [
        (8, 1, {}, (1, 8)),
        (8, 3, {}, (3, 2)),
        (8, 62, {}, (8, 1)),
        (8, 62, {"workers": 2}, (2, 4)),
        (3, 2, {}, (2, 1)),
        (16, 62, {"ccd_threads": 4, "workers": 8}, (4, 4)),
        (16, 2, {"ccd_threads": 1}, (2, 1)),
        (2, 62, {"ccd_threads": 4}, (1, 2)),
        (4, 62, {"backend": "serial"}, (1, 4)),
        (4, 2, {"backend": "dask"}, (2, 2)),
        (8, 3, {"backend": "mpi"}, (8, 1)),
        (8, 3, {"backend": "dask", "dask_address": "tcp://node:1"}, (8, 1)),
    ],
)
def test_cores_are_divided_among_ccds(cores, n_ccds, settings, divided):
    parallel = ParallelSettings(**settings)
    assert exposure_job.divided_cores(cores, n_ccds, parallel) == divided


def test_an_exposure_solved_as_a_whole_says_so_in_its_products(undisturbed):
    rows = rows_of(undisturbed)
    assert [row.state for row in rows] == ["done"] * len(CCDS)
    for row in rows:
        with fits.open(undisturbed / row.path) as hdus:
            detrended = hdus["IMAGE"].data + background_of(undisturbed / row.path)
            assert np.nanmedian(detrended) == pytest.approx(row.sky_level, rel=0.02)
            assert hdus["IMAGE"].header["PHOTZP"] == row.zero_point
            assert hdus["IMAGE"].header["ZPMAP"]


def background_of(path):
    """Return the sky that was subtracted from a calexp."""
    return read_calexp(path).background.model()


def test_pixels_are_read_once_and_written_once(raw_survey, working_folder):
    spec = whole_spec(raw_survey)
    with working_folder("survey"), counted_openings() as opened:
        do(spec)
    assert opened["r", spec["ccds"][0]["raw"]] == 1, "by the only worker"
    calexps = [name for mode, name in opened if mode == "w" and name.startswith("results/calexp/")]
    assert len(calexps) == 2 * len(CCDS), "a calexp and its sources, and nothing in between"


def test_what_is_read_ahead_is_what_a_ccd_reads(raw_survey, working_folder):
    spec = spec_of(raw_survey)
    for item in spec["ccds"]:
        item["calibs"] = {kind: f"{kind}/{item['ccd']}.fits" for kind in ("bias", "flat")}
    with working_folder("survey"):
        task = exposure_job.task_of(spec, load_settings(spec["config"]).only(*spec["sections"]))
        files = exposure_job._FilesRead(task)
        for item in spec["ccds"]:
            *of_raw, bias, flat = files(item["ccd"])
            assert [bias, flat] == [FilePart(path) for path in item["calibs"].values()]
            raw = read_raw_ccd(item["raw"], task.camera, task.camera.detector(item["ccd"]))
            with fits.open(item["raw"]) as hdus:
                of_ccd = {hdu.fileinfo()["datLoc"]: hdu.size for hdu in hdus}
            assert {start: stop - start for _, start, stop in of_raw}.items() <= of_ccd.items()
            arrays = {id(array): array for array in raw.arrays}.values()
            assert sum(stop - start for _, start, stop in of_raw) == sum(a.nbytes for a in arrays)
            read = np.frombuffer(os.pread(of_raw[0].file, 2000, of_raw[0].start), ">i2")
            assert np.array_equal(read.astype(int) + 32768, raw.arrays[0].ravel()[:1000])
        alone = exposure_job._FilesRead(replace(task, files={0: task.files[0]}))
        assert next(alone(0)) == FilePart(task.files[0].raw), "the whole file of a single CCD"


def test_a_ccd_opens_its_two_products_and_looks_at_the_fence_once(raw_survey, working_folder):
    """A slow shared disk takes 5 to 20 ms to open a file: this must not grow unnoticed."""
    counts = []
    for number in (2, 4):
        spec = spec_of(raw_survey)
        spec["ccds"] = spec["ccds"][:number]
        with working_folder(f"survey{number}"), counted_openings() as opened:
            do(spec)
        counts.append(opened)
    few, many = counts
    of_ccds = many - few
    assert openings_of(of_ccds, "results/calexp/") == 2 * 2, of_ccds
    assert openings_of(of_ccds, "tokens/") == 2
    assert of_ccds.total() == 2 * 3, of_ccds
    assert few.total() - 2 * 3 <= 12, "of the job and its worker"


# What goes wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deadly", ["raw", "calibs", "calexp"])
def test_a_worker_that_dies_costs_nothing_but_time(
    raw_survey, undisturbed, working_folder, tmp_path, deadly, monkeypatch
):
    endanger(monkeypatch, tmp_path / "deaths", 2, deadly, deaths=1)
    with working_folder("survey") as folder:
        do(whole_spec(raw_survey), "processes")
        assert (tmp_path / "deaths" / "0").is_dir()
        assert products(folder) == products(undisturbed)


def test_a_ccd_that_ends_two_workers_ends_the_job(
    raw_survey, working_folder, tmp_path, monkeypatch
):
    endanger(monkeypatch, tmp_path / "deaths", 1, "calexp", deaths=2)
    with working_folder("survey") as folder:
        with pytest.raises(PoolError, match=r"CCD 1 has killed two workers .*more memory"):
            do(whole_spec(raw_survey), "processes")
        assert not list((folder / "results/summary").glob("*.ecsv"))


def endanger(monkeypatch, traces, ccd, deadly, deaths):
    """Let the files of a CCD end the worker that asks for them."""
    danger = {"master": os.getpid(), "deadly": deadly, "traces": str(traces), "deaths": deaths}
    replace_files(monkeypatch, ccd, DeadlyFiles, **danger)


def replace_files(monkeypatch, ccd, kind, **keys):
    """Let the files of a CCD be of another kind."""
    task_of = exposure_job.task_of

    def with_others(spec, settings):
        task = task_of(spec, settings)
        return replace(task, files={**task.files, ccd: kind(**vars(task.files[ccd]), **keys)})

    monkeypatch.setattr(exposure_job, "task_of", with_others)


def test_a_ccd_with_data_that_a_library_rejects_is_a_row_and_the_others_are_done(
    raw_survey, working_folder, monkeypatch
):
    fit = psf_fit.optimize.least_squares
    calls = []

    def fit_all_but_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("`x0` is infeasible.")
        return fit(*arguments, **options)

    monkeypatch.setattr(psf_fit.optimize, "least_squares", fit_all_but_the_second)
    spec = whole_spec(raw_survey)
    with working_folder("survey") as folder:
        do(spec)
        rows = rows_of(folder)
        assert not (folder / "results/calexp/1001/1.fits").exists()
    assert [row.state for row in rows] == ["done", "failed", "done", "done"]
    assert rows[1].reason == "psf_fit_failed"
    assert rows[1].message == (
        f"{spec['ccds'][1]['raw']}: the PSF model cannot be fitted to the stars "
        "(ValueError: `x0` is infeasible.)"
    )


@pytest.mark.parametrize("backend", ["serial", "processes", pytest.param("dask", marks=needs_dask)])
def test_a_mistake_in_the_program_ends_the_job_for_good(
    raw_survey, working_folder, monkeypatch, backend
):
    replace_files(monkeypatch, 2, BuggyFiles)
    log = "logs/exposure.log"
    with working_folder("survey") as folder:
        with pytest.raises(SystemExit), job_log(log):
            spec = whole_spec(raw_survey, parallel={"backend": backend})
            make_exposure(spec, workers=2, memory_mb=4000)
        text = Path(log).read_text()
        assert not list((folder / "results/summary").glob("*.ecsv"))
        assert failed_for_good([log])
    assert text.splitlines()[-1] == (
        "coaddflow: failed: UnexpectedError: exposure 1001, CCD 2: "
        "AttributeError: 'NoneType' object has no attribute 'mask'"
    )
    assert "exposure_faults.py" in text, "the traceback leads to the line"


def job_with_a_broken_solution(raw_survey, monkeypatch, error):
    """Run the job of an exposure whose sky raises an error; return its log."""

    def break_down(*_arguments):
        raise error

    monkeypatch.setattr(solution, "fit_focal_plane_sky", break_down)
    with pytest.raises(SystemExit), job_log("job.log"):
        spec = spec_of(raw_survey, ["sky"], parallel={"backend": "serial"})
        make_exposure(spec, workers=1, memory_mb=4000)
    return Path("job.log").read_text()


def test_a_mistake_in_the_solution_of_an_exposure_ends_the_job_for_good(
    raw_survey, working_folder, monkeypatch
):
    error = AttributeError("'NoneType' object has no attribute 'mean'")
    with working_folder("survey") as folder:
        text = job_with_a_broken_solution(raw_survey, monkeypatch, error)
        assert not list((folder / "results/summary").glob("*.ecsv"))
        assert failed_for_good(["job.log"])
    assert text.splitlines()[-1] == (
        "coaddflow: failed: UnexpectedError: exposure 1001: "
        "AttributeError: 'NoneType' object has no attribute 'mean'"
    )
    assert "in break_down" in text, "the traceback leads to the line"


@pytest.mark.parametrize(
    "error", [MemoryError("160 GB"), OSError(5, "Input/output error")], ids=repr
)
def test_trouble_of_the_machine_in_the_solution_is_tried_again(
    raw_survey, working_folder, monkeypatch, error
):
    with working_folder("survey"):
        text = job_with_a_broken_solution(raw_survey, monkeypatch, error)
        assert not failed_for_good(["job.log"])
    assert "UnexpectedError" not in text


def test_a_ccd_that_cannot_be_read_is_a_missing_aggressor_for_the_others(
    raw_survey, working_folder
):
    spec = spec_of(raw_survey, ["crosstalk"])
    spec["ccds"][0]["raw"] = "data/raw/nothing.fits"
    with working_folder("survey") as folder:
        do(spec)
        rows = rows_of(folder)
        header = fits.getheader(folder / rows[1].path, "IMAGE")
        victim_of_nobody = fits.getheader(folder / rows[2].path, "IMAGE")
    assert [(row.state, row.reason) for row in rows[:2]] == [
        ("failed", "missing_file"),
        ("done", ""),
    ]
    assert "CFXTKMIS" in header
    assert "CFXTKMIS" not in victim_of_nobody


def test_what_is_not_the_fault_of_a_ccd_ends_the_job(raw_survey, working_folder):
    spec = whole_spec(raw_survey)
    spec["ccds"][3]["calibs"] = {"flat": "flats/3.fits"}
    with working_folder("survey") as folder:
        with pytest.raises(InputError, match=re.escape("flats/3.fits")):
            do(spec)
        assert not list((folder / "results/summary").glob("*.ecsv"))


def test_an_exposure_without_any_file_has_a_reason_for_each_ccd(raw_survey, working_folder):
    spec = whole_spec(raw_survey)
    spec["ccds"] = [{"ccd": ccd, "raw": "data/raw/nothing.fits"} for ccd in CCDS]
    with working_folder("survey"):
        do(spec)
        rows = read_manifest(spec["manifest"])
        assert {(row.state, row.reason) for row in rows} == {("failed", "missing_file")}
        assert read_verdict(spec["manifest"]).cause == "too_many_failed"
        spec["config"] = spec["config"] | {"calexp": {"on_failed_exposure": "stop"}}
        why = r"4 of 4 CCDs failed \(4 missing_file\)"
        with pytest.raises(InputError, match=why):
            do(spec)
        assert not Path(spec["manifest"]).exists()


def test_with_too_little_memory_for_what_waits_the_job_says_so(raw_survey):
    with pytest.raises(TooLittleMemory) as raised:
        make_exposure(whole_spec(raw_survey), workers=2, memory_mb=resources.MASTER_MB)
    # 9 MB wait, and one CCD is in work
    least = resources.MASTER_MB + 9 + resources.ccd_memory(320 * 320)
    assert f"need {least} MB, and the job has 150 MB" in str(raised.value)
    assert not is_lasting(raised.value), "the next attempt asks for more"


def test_trouble_of_the_machine_is_worth_another_attempt(raw_survey, working_folder, monkeypatch):
    def full(*_arguments):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise InputError("cannot be written", path="0.fits") from error

    monkeypatch.setattr(exposure_job, "write_products", full)
    with working_folder("survey"), pytest.raises(InputError, match="cannot be written") as raised:
        do(whole_spec(raw_survey))
    assert not is_lasting(raised.value)


def test_what_a_killed_process_left_is_removed(raw_survey, working_folder):
    spec = spec_of(raw_survey)
    with working_folder("survey") as folder:
        partial = folder / "results/calexp/1001/.2.fits.abcdefgh.fits"
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"SIMPLE")
        do(spec)
        assert not partial.exists()


def test_products_of_an_earlier_run_go_before_anything_else(raw_survey, working_folder):
    spec = spec_of(raw_survey)
    with working_folder("survey") as folder:
        do(spec)
        spec["ccds"] = [{"ccd": ccd, "raw": "data/raw/nothing.fits"} for ccd in CCDS]
        do(spec)
        left = list(products(folder))
    assert left == [spec["manifest"], str(verdict_path(spec["manifest"]))]


def test_a_ccd_with_two_reference_stars_is_calibrated_with_its_exposure(raw_survey, working_folder):
    """Where the others tell too little of its place, its two stars tell the rest."""
    with working_folder("all") as folder:
        do(whole_spec(raw_survey))
        row = rows_of(folder)[2]
        truth = read_calexp(row.path).wcs
    refcat = Table.read(raw_survey / "data/refcat.fits")
    x, y = truth.all_world2pix(refcat["ra"], refcat["dec"], 0)
    nx, ny = truth.pixel_shape
    on_it = np.flatnonzero((x > -20) & (x < nx + 20) & (y > -20) & (y < ny + 20))
    faint = on_it[np.argsort(refcat["mag_r"][on_it])][2:]
    assert len(faint) > 10
    refcat.remove_rows(faint)
    with working_folder("few") as folder:
        refcat.write("few.fits")
        do(whole_spec(raw_survey, refcat={**SETTINGS["refcat"], "path": "few.fits"}))
        rows = rows_of(folder)
        assert [row.state for row in rows] == ["done"] * len(CCDS)
        found = read_calexp(rows[2].path).wcs
    corners = np.array([[0, 0], [nx, 0], [nx, ny], [0, ny]])
    moved = truth.all_world2pix(found.all_pix2world(corners, 0), 0) - corners
    assert np.hypot(*moved.T).max() < 0.5
