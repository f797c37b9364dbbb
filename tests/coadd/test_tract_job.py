"""The job of a tract makes the coadds that the jobs of its patches make."""

import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table
from backends import MPI, linux, needs_dask, needs_mpi
from openings import counted_openings, openings_of
from skyscene import DEC, RA, draw_star, make_wcs, write_done_ccd

from coaddflow.coadd import tract_job
from coaddflow.coadd.patch import make_coadd
from coaddflow.coadd.product import read_coadd
from coaddflow.coadd.tract_job import make_tract_coadds
from coaddflow.corners.build import build_tract_database
from coaddflow.errors import CoaddflowError, InputError
from coaddflow.files import sha256_of
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.pool import PoolError
from coaddflow.pool.launch import run_job
from coaddflow.runtime import resources
from coaddflow.settings import Settings
from coaddflow.settings.skymap import SkymapSettings
from coaddflow.skymap.maps import make_skymap
from coaddflow.tables.coadds import read_coadd_table
from coaddflow.tables.manifest import read_manifest, write_manifest
from coaddflow.warp.files import kept_table
from coaddflow.warp.job import make_warps

SCALE = 0.2
SKYMAP = SkymapSettings(
    kind="tangent",
    pixel_scale=SCALE,
    patch_inner_size=100,
    patch_border=12,
    tangent={"ra": RA, "dec": DEC, "width": 240 * SCALE / 3600, "height": 200 * SCALE / 3600},
)
TRACT = make_skymap(SKYMAP).tract(0)
PATCHES = list(TRACT.patch_ids())
SHAPE = (160, 90)
STARS = [(-50.0, 20.0), (10.0, -30.0), (60.0, 40.0), (0.0, 0.0)]
"""Places of stars relative to the middle of the tract, pixels."""


def write_ccd(exposure, ccd, rng, sky=0.0, rotation=0.0):
    """Write a calexp with stars and a cosmic ray or two; return its row."""
    wcs = make_wcs(SHAPE, SCALE, rotation, shift=((0.5 - ccd) * 80.0 + 3.0 * rotation, rotation))
    noise = 5.0
    image = rng.normal(sky, noise, SHAPE)
    ra, dec = TRACT.pixel_to_sky(
        *(np.array(STARS).T + (np.array([[TRACT.width], [TRACT.height]]) - 1) / 2)
    )
    for x, y in zip(*wcs.all_world2pix(ra, dec, 0), strict=True):
        image += draw_star(SHAPE, x, y, 2e4, 4.0)
    image[rng.random(SHAPE) < 0.002] += 400.0
    mask = np.where(rng.random(SHAPE) < 0.01, int(MaskPlane.CR), 0).astype(np.int32)
    mask[image - sky > 4 * noise] |= int(MaskPlane.DETECTED)
    pixels = MaskedImage(image, np.full(SHAPE, noise**2), mask)
    seeing = 2.0 if (exposure, ccd) == ("b", 0) else 0.8
    figures = {"zero_point": 31.0, "sky_noise": noise, "seeing": seeing}
    return write_done_ccd(f"calexp/{exposure}/{ccd}.fits", exposure, ccd, pixels, wcs, **figures)


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Four exposures of two CCDs that overlap a little; one CCD has bad seeing."""
    folder = tmp_path_factory.mktemp("survey")
    before = Path.cwd()
    os.chdir(folder)
    rng = np.random.default_rng(3)
    for number, exposure in enumerate("abcd"):
        rows = [write_ccd(exposure, ccd, rng, rotation=6.0 * number) for ccd in (0, 1)]
        write_manifest(f"summary/{exposure}.ecsv", rows)
    build_tract_database("corners.sqlite", [f"summary/{e}.ecsv" for e in "abcd"], TRACT)
    yield folder
    os.chdir(before)


def settings(**changes):
    return Settings(selection={"max_seeing": 1.5}, **changes)


def run(folder="results", workers=2, database="corners.sqlite", memory_mb=None, **changes):
    """Run the job and return the list of its coadds."""
    table = f"{folder}/coadd/r/0.ecsv"
    changes["parallel"] = {"coadd": "tract", "backend": "serial"} | changes.get("parallel", {})
    make_tract_coadds(
        table,
        database,
        SKYMAP.model_dump(mode="json"),
        0,
        "r",
        PATCHES,
        settings(**changes),
        workers=workers,
        memory_mb=memory_mb,
    )
    return read_coadd_table(table)


def checksums(folder):
    """Return the checksums of all files of a folder."""
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in folder.rglob("*.fits")}


def run_patches(folder, **changes):
    """Make the same coadds and their warps by one job each."""
    warps = [f"{folder}/warp/0/{exposure}.ecsv" for exposure in "abcd"]
    for path in warps:
        make_warps(path, f"summary/{Path(path).stem}.ecsv", TRACT, settings(**changes))
    for patch in PATCHES:
        path = f"{folder}/coadd/r/0/{patch}.fits"
        make_coadd(path, "corners.sqlite", warps, TRACT, "r", patch, settings(**changes))


@pytest.fixture(scope="module")
def by_patches(survey):
    """The same coadds and warps, made by one job each. Not to be changed."""
    run_patches("patch")
    return survey / "patch"


BACKENDS = [
    {"backend": "serial"},
    {"backend": "processes"},
    pytest.param({"backend": "mpi", "mpi_command": MPI}, marks=needs_mpi),
    pytest.param({"backend": "dask"}, marks=needs_dask),
]


@pytest.mark.parametrize("parallel", BACKENDS, ids=lambda p: p["backend"])
def test_tract_and_patch_have_the_same_bits(by_patches, survey, parallel, tmp_path):
    rows = run(tmp_path, parallel=parallel, coadd={"scratch": str(tmp_path / "scratch")})
    assert checksums(tmp_path / "coadd") == checksums(by_patches / "coadd")
    assert [row.patch for row in rows] == PATCHES
    assert {row.sha256 for row in rows} == set(checksums(by_patches / "coadd").values())
    assert max(row.most_inputs for row in rows) == 4
    assert any(row.n_left_out for row in rows)
    assert not list((tmp_path / "scratch").glob("*"))
    assert not (tmp_path / "warp").exists()


def test_lossless_compression_keeps_the_bits(by_patches, tmp_path):
    run(tmp_path, products={"compression": "lossless"})
    assert_same_pixels(tmp_path, by_patches)


def assert_same_pixels(*folders):
    """Compare pixels; tiles that are compressed with gzip hold the time."""
    for patch in PATCHES:
        one, other = (read_coadd(folder / f"coadd/r/0/{patch}.fits")[0] for folder in folders)
        for name in ("image", "variance", "mask"):
            pixels = [getattr(coadd.masked_image, name) for coadd in (one, other)]
            np.testing.assert_array_equal(*pixels)
        np.testing.assert_array_equal(one.n_inputs, other.n_inputs)


def test_quantised_coadds_are_rounded_once_and_have_the_same_bits(survey, tmp_path):
    for folder, way in ((tmp_path / "patch", run_patches), (tmp_path / "tract", run)):
        way(folder, products={"compression": "quantized"})
    assert_same_pixels(tmp_path / "patch", tmp_path / "tract")


def test_warps_that_are_kept_are_those_of_the_patches(by_patches, tmp_path):
    run(tmp_path, coadd={"keep_warps": True, "spool_mb": 0})
    assert checksums(tmp_path / "warp") == checksums(by_patches / "warp")
    for exposure in "abcd":
        kept, made = (folder / "warp/0" / exposure for folder in (tmp_path, by_patches))
        assert kept_table(kept).read_bytes() == made.with_suffix(".ecsv").read_bytes()
        assert not kept.with_suffix(".ecsv").exists(), "it would pass for that of the rule `warp`"
    shutil.copytree(by_patches / "warp", tmp_path / "warp", dirs_exist_ok=True)
    run(tmp_path)
    assert not list((tmp_path / "warp").rglob("*.*"))


def test_a_job_that_fails_leaves_nothing_of_an_earlier_run(by_patches, survey, tmp_path):
    shutil.copytree(by_patches, tmp_path, dirs_exist_ok=True)
    (tmp_path / "coadd/r/0/.1_1.fits.abcdefgh.fits").touch()
    with pytest.raises(InputError, match=r"coadd\.scratch"):
        run(tmp_path, coadd={"scratch": str(survey / "corners.sqlite"), "spool_mb": 0})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_with_little_memory_warps_wait_on_disk_and_few_items_are_processed_at_a_time(
    by_patches, tmp_path, caplog, monkeypatch
):
    limits = []

    def open_pool(*arguments, **options):
        limits.append(options["memory_mb"])
        return run_job(*arguments, **options)

    monkeypatch.setattr(tract_job, "run_job", open_pool)
    for memory_mb in (400, 650, 20_000):
        with caplog.at_level("INFO", logger=tract_job.__name__):
            run(tmp_path, memory_mb=memory_mb, coadd={"memory_mb": 16, "spool_mb": 10_000})
        assert checksums(tmp_path / "coadd") == checksums(by_patches / "coadd")
    room = [record.args[2] for record in caplog.records if "room for" in record.getMessage()]
    assert room[0] == room[1] == 0.0 < room[2], "MB of memory"
    one = resources.warped_ccd_memory(SHAPE[0] * SHAPE[1])
    assert limits[0] < one < limits[1] < 2 * one
    assert 2 * one < limits[2] == 20_000 - resources.MASTER_MB - 10_000


def test_every_calexp_is_opened_once(survey, tmp_path):
    with counted_openings() as opened:
        run(tmp_path)
    calexps = [name for _, name in opened if "calexp/" in name]
    assert openings_of(opened, "calexp/") == len(calexps) == 7, opened  # b0 is not wanted


def test_a_patch_opens_its_coadd_and_looks_at_the_fence_once(survey):
    """A slow shared disk takes 5 to 20 ms to open a file: this must not grow unnoticed."""
    Path("counted/coadd/r/0").mkdir(parents=True)
    with counted_openings() as opened:
        run("counted")
    written = {name for mode, name in opened if mode == "w"}
    assert openings_of(opened, "coadd/r/0/") == len(PATCHES)
    assert len(written) == len(PATCHES) + 1, "and the list"
    assert openings_of(opened, "tokens/") <= len(PATCHES) + 5
    assert opened.total() <= 7 + 2 * len(PATCHES) + 10, opened


# Background matching -----------------------------------------------------------------------------

MATCHED = {"background_matching": {"enabled": True, "bin_size": 32}}


@pytest.fixture(scope="module")
def two_skies(survey):
    """Databases of the same exposures with and without errors of their backgrounds."""
    scale = 10 ** (0.4 * (31.4 - 31.0))
    for name, errors in (("even", (0, 0, 0, 0)), ("uneven", (25, -25, 10, 0))):
        rng = np.random.default_rng(8)
        for number, (exposure, error) in enumerate(zip("abcd", errors, strict=True)):
            rows = [
                write_ccd(f"{exposure}-{name}", ccd, rng, float(error), 6.0 * number)
                for ccd in (0, 1)
            ]
            write_manifest(f"summary/{exposure}-{name}.ecsv", rows)
        manifests = [f"summary/{exposure}-{name}.ecsv" for exposure in "abcd"]
        build_tract_database(f"{name}.sqlite", manifests, TRACT)
    return scale


def whole_tract(folder):
    """Put the patches of a coadd together."""
    image = np.full((TRACT.height, TRACT.width), np.nan, np.float32)
    n_inputs = np.zeros(image.shape, int)
    for patch in PATCHES:
        coadd, _ = read_coadd(folder / f"coadd/r/0/{patch}.fits")
        x0, y0, x1, y1 = coadd.box
        image[y0:y1, x0:x1] = coadd.masked_image.image
        n_inputs[y0:y1, x0:x1] = coadd.n_inputs
    return image, n_inputs


def test_skies_that_differ_by_five_sigma_are_matched_and_stars_stay(two_skies, tmp_path):
    images, n_inputs = {}, None
    for name, coadd in (("even", {}), ("uneven", {}), ("uneven", MATCHED)):
        key = "matched" if coadd else name
        run(tmp_path / key, database=f"{name}.sqlite", coadd=coadd)
        images[key], counts = whole_tract(tmp_path / key)
        n_inputs = counts if key == "even" else n_inputs
    sky = np.all(np.isfinite(list(images.values())), axis=0)
    yy, xx = np.mgrid[: TRACT.height, : TRACT.width]
    middle = ((TRACT.width - 1) / 2, (TRACT.height - 1) / 2)
    for x, y in STARS:
        sky &= np.hypot(xx - x - middle[0], yy - y - middle[1]) > 20
    # steps where the number of exposures changes, as differences to the coadd of even skies
    step = {
        key: np.ptp(
            [
                np.median((image - images["even"])[sky & (n_inputs == n)])
                for n in range(1, 5)
                if np.count_nonzero(sky & (n_inputs == n)) > 500
            ]
        )
        for key, image in images.items()
    }
    noise = 5.0 * two_skies
    assert step["uneven"] > 0.5 * noise
    assert step["matched"] < 0.1 * noise
    for x, y in STARS:
        flux = {}
        for key in ("even", "matched"):
            distance = np.hypot(xx - x - middle[0], yy - y - middle[1])
            star, ring = distance < 8, sky & (distance > 20) & (distance < 32)
            level = np.median(images[key][ring])
            flux[key] = np.sum(images[key][star] - level)
        assert flux["matched"] == pytest.approx(flux["even"], rel=0.005)


def test_matched_coadds_have_the_same_bits_in_one_process_and_in_several(two_skies, tmp_path):
    seen = []
    for number, parallel in enumerate(({"backend": "serial"}, {"backend": "processes"})):
        folder = tmp_path / str(number)
        run(
            folder,
            database="uneven.sqlite",
            parallel=parallel,
            coadd={**MATCHED, "keep_warps": bool(number), "spool_mb": number},
        )
        seen.append(checksums(folder / "coadd"))
    assert seen[0] == seen[1]
    with fits.open(next((tmp_path / "0" / "coadd").rglob("1_1.fits"))) as hdus:
        table = Table(hdus["INPUTS"].data)
    used = table[table["weight"] > 0]
    # 25, -25, 10 and 0 electrons, less their weighted mean
    differences = used["sky_offset"][0] - used["sky_offset"]
    np.testing.assert_allclose(
        differences, np.array([0.0, 50.0, 15.0, 25.0]) * two_skies, atol=0.2 * 5 * two_skies
    )


# Faults ------------------------------------------------------------------------------------------


def assert_only_whole(folder, reference):
    """What stands under a final name is whole and right; there is no list."""
    made, right = checksums(folder / "coadd"), checksums(reference / "coadd")
    assert made.items() <= right.items()
    assert not (folder / "coadd/r/0.ecsv").exists()
    assert not [p for p in folder.rglob("*") if p.is_file() and p.name.startswith(".")]
    return len(made)


def test_a_ccd_that_cannot_be_read_costs_its_patches_only(survey, by_patches, tmp_path):
    run(tmp_path)
    path = survey / "calexp/d/0.fits"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    try:
        with pytest.raises(
            CoaddflowError,
            match=r"patches failed, the others are done: patch "
            r"\d_\d: exposure d CCD 0: .*d/0.fits: is not a readable",
        ) as failed:
            run(tmp_path)
        assert failed.value.lasting
        with pytest.raises(CoaddflowError, match=r"1 of 7 CCDs, which background matching needs"):
            run(tmp_path / "matched", coadd=MATCHED)
    finally:
        path.write_bytes(whole)
    assert 0 < assert_only_whole(tmp_path, by_patches) < len(PATCHES)
    run(tmp_path)
    assert checksums(tmp_path / "coadd") == checksums(by_patches / "coadd")


@linux
def test_a_worker_that_is_killed_while_it_warps(survey, by_patches, tmp_path):
    rows = [row for row in read_manifest("summary/a.ecsv")]
    fifo = tmp_path / "calexp.fits"
    os.mkfifo(fifo)
    write_manifest("summary/a-fifo.ecsv", [rows[0].model_copy(update={"path": str(fifo)}), rows[1]])
    manifests = ["summary/a-fifo.ecsv", *(f"summary/{e}.ecsv" for e in "bcd")]
    build_tract_database("fifo.sqlite", manifests, TRACT)

    def kill():
        # as soon as the worker opens it: it goes on, and finds that it is no file
        for _ in range(20000):
            workers = children()
            try:
                writer = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                time.sleep(0.003)
                continue
            for worker in workers:
                os.kill(worker, signal.SIGKILL)
            os.close(writer)
            return

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(
        PoolError, match=r"exposure a CCD 0: worker 0 .* was killed by SIGKILL"
    ) as failed:
        run(tmp_path, workers=1, database="fifo.sqlite", parallel={"backend": "processes"})
    thread.join()
    assert not failed.value.lasting
    run(tmp_path)
    assert checksums(tmp_path / "coadd") == checksums(by_patches / "coadd")


@linux
def test_a_worker_that_is_killed_while_it_coadds(survey, by_patches, tmp_path, monkeypatch):
    def kill(worker):
        time.sleep(0.5)  # its patch is on the way to it
        os.kill(worker, signal.SIGKILL)

    threads = []
    scatter = tract_job._timed_map

    def timed(pool, what, function, works, **options):
        if what == "patches coadded":
            (worker,) = pool.processes.values()
            os.kill(worker, signal.SIGSTOP)
            threads.append(threading.Thread(target=kill, args=(worker,)))
            threads[0].start()
        return scatter(pool, what, function, works, **options)

    monkeypatch.setattr(tract_job, "_timed_map", timed)
    with pytest.raises(PoolError, match=r"1 of 6 patches failed.*patch \d_\d: worker 0 .*SIGKILL"):
        run(tmp_path, workers=1, parallel={"backend": "processes"})
    threads[0].join()
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.name.startswith(".")]
    for path in left:  # hidden, of the worker that could not clean up
        path.unlink()
    assert assert_only_whole(tmp_path, by_patches) == len(PATCHES) - 1
    monkeypatch.undo()
    run(tmp_path)
    assert checksums(tmp_path / "coadd") == checksums(by_patches / "coadd")


def children():
    """Return the processes that this one has started and that live."""
    path = Path(f"/proc/self/task/{threading.main_thread().native_id}/children")
    return [int(pid) for pid in path.read_text().split()]
