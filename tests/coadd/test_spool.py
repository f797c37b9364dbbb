"""The spool gives back what was put into it, keeps to its memory, and leaves nothing behind."""

import dataclasses
import errno
import fcntl
import os
import platform
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from coaddflow.coadd import readers
from coaddflow.coadd.mean import CoaddInput, coadd_patch
from coaddflow.coadd.readers import LayeredWarp
from coaddflow.coadd.spool import BYTES_PER_PIXEL, Spool, SpoolSlot, write_warp
from coaddflow.errors import InputError
from coaddflow.image.masked_image import MaskedImage, MaskPlane
from coaddflow.measure.psf_model import PsfModel
from coaddflow.settings.coadd import CoaddSettings
from coaddflow.warp.ccd_psf import CcdPsf
from coaddflow.warp.files import Warp

linux = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")


def pixels(rng, shape=(30, 40)):
    mask = np.where(rng.random(shape) < 0.2, int(MaskPlane.NO_DATA), 0)
    return MaskedImage(rng.normal(size=shape), rng.random(shape), mask)


def assert_same(one, other):
    for name in ("image", "variance", "mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def open_files(folder):
    """Return what this process has open in a folder, also what has no name any more."""
    names = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            names.append(str(link.readlink()))
        except OSError:
            continue
    return [name for name in names if name.startswith((str(folder), "/memfd:coaddflow-spool"))]


@pytest.mark.parametrize("one_machine", [True, False])
@pytest.mark.parametrize("memory", [0, 20_000, 10**6])
def test_what_was_put_in_comes_back(one_machine, memory, tmp_path):
    rng = np.random.default_rng(1)
    scratch = tmp_path / "new" / "scratch"
    with Spool(memory, scratch, one_machine) as spool:
        slots = [spool.reserve(30 * 40 + 7, f"ccd{k}") for k in range(4)]
        written = [pixels(rng) for _ in slots]
        warps = [
            write_warp(slot, (100, 50, 140, 80), one)
            for slot, one in zip(slots, written, strict=True)
        ]
        for warp, one in zip(warps, written, strict=True):
            assert_same(warp.read_box(warp.box), one)
            whole, box = Warp(warp.box, one), (110, 60, 115, 62)
            assert_same(warp.read_box(box), whole.read_box(box))
        assert spool.in_memory <= memory
        assert spool.in_memory + spool.on_disk == 4 * BYTES_PER_PIXEL * 1207
        if not one_machine:
            assert spool.in_memory == 0
            assert len(list(scratch.glob("*/ccd*"))) == 4
    assert not scratch.exists() or not list(scratch.iterdir())
    assert not open_files(tmp_path)


@pytest.mark.parametrize("memory", [0, 5000, 10**6])
def test_many_warps_share_few_files_and_keep_apart(memory, tmp_path):
    rng = np.random.default_rng(6)
    shapes = [(3 + k % 5, 4 + k % 7) for k in range(50)]
    with Spool(memory, tmp_path, one_machine=True) as spool:
        slots = [spool.reserve(ny * nx, f"ccd{k}") for k, (ny, nx) in enumerate(shapes)]
        written = [pixels(rng, shape) for shape in shapes]
        warps = [
            write_warp(slot, (0, 0, shape[1], shape[0]), one)
            for slot, shape, one in zip(slots, shapes, written, strict=True)
        ]
        for warp, one in zip(warps, written, strict=True):
            assert_same(warp.read_box(warp.box), one)
        assert len(open_files(tmp_path)) <= 32


def test_parts_of_an_image_with_many_rows_are_written_also_in_pieces(tmp_path, monkeypatch):
    whole, box = pixels(np.random.default_rng(7), (1300, 9)), (0, 0, 3, 1100)
    part = whole.part((slice(100, 1200), slice(4, 7)))
    write = os.pwritev
    with Spool(10**6, tmp_path, one_machine=True) as spool:
        first, second = (spool.reserve(3300, name) for name in ("a", "b"))
        assert_same(write_warp(first, box, part).read_box(box), part)
        # as a disk does that is nearly full: it takes a part of what it is given
        monkeypatch.setattr(os, "pwritev", lambda f, rows, offset: write(f, rows[:7], offset))
        assert_same(write_warp(second, box, part).read_box(box), part)


@linux
def test_on_one_machine_the_spool_has_no_name(tmp_path):
    with Spool(0, tmp_path, one_machine=True) as spool:
        write_warp(spool.reserve(1200, "a"), (0, 0, 40, 30), pixels(np.random.default_rng(2)))
        assert len(open_files(tmp_path)) == 1
        assert not list(tmp_path.iterdir())


def test_folders_of_dead_jobs_of_this_machine_are_removed_and_no_others(tmp_path):
    prefix = f"coaddflow-{platform.node()}-"
    for name in (f"{prefix}dead", f"{prefix}alive", "coaddflow-other.machine-dead", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    lock = os.open(tmp_path / f"{prefix}alive" / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with Spool(0, tmp_path, one_machine=False):
        assert len(list(tmp_path.iterdir())) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{prefix}alive", "coaddflow-other.machine-dead", "other"]
    )
    os.close(lock)


def test_links_and_folders_of_others_in_a_shared_scratch_folder_are_left_alone(tmp_path):
    """Anybody may write there: a name that looks like a spool may lead anywhere."""
    prefix = f"coaddflow-{platform.node()}-"
    scratch, precious = tmp_path / "scratch", tmp_path / "precious"
    for folder in (scratch, precious, scratch / f"{prefix}writable"):
        folder.mkdir()
    for folder in (precious, scratch / f"{prefix}writable"):
        (folder / "lock").touch()
        (folder / "thesis.tex").touch()
    (scratch / f"{prefix}writable").chmod(0o777)  # anybody may have put the files there
    (scratch / f"{prefix}link").symlink_to(precious)
    (scratch / f"{prefix}own").mkdir()
    (scratch / f"{prefix}own" / "lock").symlink_to(precious / "lock")
    (scratch / f"{prefix}file").touch()
    before = sorted(path.name for path in scratch.rglob("*"))
    with Spool(0, scratch, one_machine=False) as spool:
        write_warp(spool.reserve(1200, "a"), (0, 0, 40, 30), pixels(np.random.default_rng(2)))
    assert sorted(path.name for path in scratch.rglob("*")) == before
    assert sorted(path.name for path in precious.iterdir()) == ["lock", "thesis.tex"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_folders_of_other_users_are_left_alone(tmp_path):
    other = tmp_path / f"coaddflow-{platform.node()}-other"
    other.mkdir()
    (other / "lock").touch()
    os.chown(other, 12345, 12345)
    with Spool(0, tmp_path, one_machine=False):
        pass
    assert (other / "lock").exists()


def test_without_locks_the_spool_works_and_no_other_folder_is_removed(tmp_path, monkeypatch):
    def no_locks(_descriptor, _operation):
        raise OSError(errno.ENOLCK, "No locks available")

    dead = tmp_path / f"coaddflow-{platform.node()}-dead"
    dead.mkdir()
    (dead / "lock").touch()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with Spool(0, tmp_path, one_machine=False) as spool:
        write_warp(spool.reserve(1200, "a"), (0, 0, 40, 30), pixels(np.random.default_rng(2)))
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [dead]


def test_no_file_of_the_spool_is_removed_while_it_is_open(tmp_path, monkeypatch):
    # NFS would keep it under another name, and the folder with it
    at_closing = []
    close = os.close

    def watch(descriptor):
        at_closing.append([path.name for path in tmp_path.glob("*/*")])
        close(descriptor)

    with Spool(0, tmp_path, one_machine=False) as spool:
        write_warp(spool.reserve(1200, "a"), (0, 0, 40, 30), pixels(np.random.default_rng(2)))
        monkeypatch.setattr(os, "close", watch)
    assert at_closing[0] == ["lock"]
    assert not list(tmp_path.iterdir())


def test_a_scratch_folder_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").touch()
    for one_machine in (True, False):
        with (
            pytest.raises(InputError, match=r"file.*coadd\.scratch"),
            Spool(0, tmp_path / "file" / "scratch", one_machine) as spool,
        ):
            spool.reserve(10, "a")
    with pytest.raises(InputError, match=r"/dev/full.*No space left.*coadd\.scratch"):
        write_warp(SpoolSlot("/dev/full", 0), (0, 0, 40, 30), pixels(np.random.default_rng(3)))


def test_compiled_functions_get_one_kind_of_pixels(tmp_path):
    """Of CCDs that fit into a patch, and of others."""
    box = (0, 0, 40, 30)
    with Spool(10**6, tmp_path, one_machine=True) as spool:
        warp = write_warp(spool.reserve(1200, "a"), box, pixels(np.random.default_rng(5)))
        for part in (box, (3, 4, 20, 30)):
            LayeredWarp([warp, warp], part).read_into(part, MaskedImage.empty((30, 40)), (0, 0))
    assert len(readers._lay_first.signatures) == len(readers._lay_under.signatures) == 1


def test_ccds_are_laid_one_under_the_other():
    rng = np.random.default_rng(4)
    one, two = Warp((0, 0, 40, 30), pixels(rng)), Warp((20, 10, 60, 40), pixels(rng))
    layers = LayeredWarp([one, two], (5, 5, 55, 100))
    assert layers.box == (5, 5, 55, 40)
    whole = MaskedImage.empty((37, 52))
    counts = layers.lay(layers.box, whole, (1, 2))
    assert (whole.mask[:, :2] == MaskPlane.NO_DATA).all()
    whole = whole.part((slice(1, 36), slice(2, 52)))
    first, second = (MaskedImage.empty((40, 60)) for _ in range(2))
    for target, warp in ((first, one), (second, two)):
        x0, y0, x1, y1 = warp.box
        for name in ("image", "variance", "mask"):
            getattr(target, name)[y0:y1, x0:x1] = getattr(warp.masked_image, name)
    no_data = int(MaskPlane.NO_DATA)
    upper = (first.mask & no_data) == 0
    lower = ~upper & ((second.mask & no_data) == 0)
    expected = np.where(upper, first.image, np.where(lower, second.image, np.nan))[5:40, 5:55]
    np.testing.assert_array_equal(whole.image, expected)
    assert counts == [np.count_nonzero(upper[5:40, 5:55]), np.count_nonzero(lower[5:40, 5:55])]
    part = MaskedImage(*np.ones((3, 25, 13)))
    layers.read_into((18, 8, 31, 33), part, (0, 0))
    np.testing.assert_array_equal(part.image, whole.image[3:28, 13:26])
    assert LayeredWarp([one], (100, 0, 120, 20)).box == (0, 0, 0, 0)


def test_what_was_in_the_target_is_forgotten_where_no_ccd_is(tmp_path):
    """Boxes begin and end inside of what is read, on more rows than are worked on at a time."""
    rng = np.random.default_rng(8)
    ccds = [
        Warp((x0, y0, x0 + 40, y0 + 90), pixels(rng, (90, 40))) for x0, y0 in ((10, 12), (30, 60))
    ]
    clean, dirty = MaskedImage.empty((200, 100)), MaskedImage(*np.full((3, 200, 100), 7.0))
    layers = LayeredWarp(ccds, (0, 0, 100, 200))
    for target in (clean, dirty):
        layers.read_into((0, 0, 100, 200), target, (0, 0))
    assert_same(dirty, clean)
    has_data = (clean.mask & int(MaskPlane.NO_DATA)) == 0
    expected = np.zeros((200, 100), bool)
    for ccd in ccds:
        x0, y0, x1, y1 = ccd.box
        expected[y0:y1, x0:x1] |= (ccd.masked_image.mask & int(MaskPlane.NO_DATA)) == 0
    np.testing.assert_array_equal(has_data, expected)
    assert np.isnan(clean.image[~expected]).all()


def test_memory_of_a_coadd_does_not_grow_with_the_number_of_inputs(tmp_path):
    size, n_inputs, budget = 400, 60, 16
    rng = np.random.default_rng(5)
    box = (0, 0, size, size)
    one = MaskedImage(
        rng.normal(size=(size, size)), np.ones((size, size)), np.zeros((size, size), np.int32)
    )
    with Spool(10**6, tmp_path, one_machine=True) as spool:
        inputs = [
            CoaddInput(
                f"e{k:02}",
                LayeredWarp([write_warp(spool.reserve(size**2, f"e{k}"), box, one)], box),
                1.0,
                seeing=0.8,
            )
            for k in range(n_inputs)
        ]
        assert n_inputs * size**2 * BYTES_PER_PIXEL > 100e6
        coadd_patch(inputs[:3], (0, 0, 64, 64), CoaddSettings(), pixel_scale=0.2)  # compiled now
        tracemalloc.start()
        coadd = coadd_patch(inputs, box, CoaddSettings(memory_mb=budget), pixel_scale=0.2)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    np.testing.assert_allclose(coadd.masked_image.image, one.image, rtol=1e-6)
    product = size**2 * (BYTES_PER_PIXEL + 2)
    # the stack, and what clipping has beside it
    assert peak < 1.3 * budget * 1e6 + product


@pytest.mark.parametrize("one_machine", [True, False])
def test_psfs_wait_behind_the_pixels(tmp_path, one_machine):
    rng = np.random.default_rng(8)
    model = PsfModel(rng.random((3, 21, 21)).astype(np.float32), 1, 0.8, 7, (5.0, 6.0), (5.0, 6.0))
    psfs = [
        CcdPsf(ccd, (12, 10), (0, 0, 10, 12), "CTYPE1  = 'RA---TAN'", "lanczos3", 1.0, 8, 11, model)
        for ccd in (3, 4)
    ]
    image = pixels(rng, (12, 10))
    with Spool(10**6, tmp_path, one_machine) as spool:
        warps = [
            write_warp(spool.reserve(150, f"e-{one.ccd}"), (20, 30, 30, 42), image, [one])
            for one in psfs
        ]
        for warp, psf in zip(warps, psfs, strict=True):
            (back,) = warp.read_psfs()
            np.testing.assert_array_equal(back.model.basis, model.basis)
            same = dataclasses.replace(back, model=psf.model)
            assert same == psf
            assert_same(warp.read_box((20, 30, 30, 42)), image)
        huge = dataclasses.replace(model, basis=np.zeros((3, 701, 701), np.float32))
        too_many = [dataclasses.replace(psfs[0], model=huge)]
        with pytest.raises(InputError, match=r"Reduce psf\.radius"):
            write_warp(spool.reserve(150, "e-5"), (20, 30, 30, 42), image, too_many)
        plain = write_warp(spool.reserve(150, "e-6"), (20, 30, 30, 42), image)
        assert plain.read_psfs() == []
