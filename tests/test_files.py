"""A file under its final name is whole; an id is safe in a path."""

import contextlib
import errno
import os
import stat

import pytest

from coaddflow.errors import InputError
from coaddflow.files import (
    atomic_path,
    atomic_stream,
    atomic_streams,
    check_id,
    remove_partial,
    sha256_of,
)


def test_file_appears_whole_under_its_final_name(tmp_path):
    target = tmp_path / "new" / "table.ecsv"
    with atomic_path(target) as temporary:
        temporary.write_text("content")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "content"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("is_made_anew", [False, True])
def test_what_is_flushed_to_disk_is_what_takes_the_name(tmp_path, monkeypatch, is_made_anew):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    with atomic_path(tmp_path / "x.txt") as temporary:
        if is_made_anew:
            temporary.unlink()
        temporary.write_text("all of it")
    assert flushed == [(tmp_path / "x.txt").stat().st_ino]


def test_a_stream_is_written_whole_or_not_at_all(tmp_path):
    with atomic_stream(tmp_path / "x.bin") as stream:
        stream.write(b"whole")
        assert not (tmp_path / "x.bin").exists()
    with contextlib.suppress(ZeroDivisionError), atomic_stream(tmp_path / "x.bin") as stream:
        stream.write(b"a half")
        raise ZeroDivisionError
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


def test_files_that_are_written_together_take_their_names_in_order_when_all_are_written(
    tmp_path, monkeypatch
):
    renamed, real = [], os.replace
    names = [tmp_path / "new" / "1_sources.fits", tmp_path / "new" / "1.fits"]

    def replace(path, target):
        assert {p.stat().st_size for p in names[0].parent.iterdir()} == {5}
        renamed.append(target)
        real(path, target)

    monkeypatch.setattr(os, "replace", replace)
    with atomic_streams(*names) as streams:
        for stream in streams:
            stream.write(b"whole")
    assert renamed == names
    assert sorted(names[0].parent.iterdir()) == sorted(names)
    with contextlib.suppress(ZeroDivisionError), atomic_streams(*names) as streams:
        streams[0].write(b"other")
        raise ZeroDivisionError
    assert {path: path.read_bytes() for path in names[0].parent.iterdir()} == dict.fromkeys(
        names, b"whole"
    )


def test_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "image.fits"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError("killed")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    target = tmp_path / "1_[1].fits"
    partial = []
    for path in (target, target, tmp_path / "1_1.fits"):
        with contextlib.suppress(FileNotFoundError), atomic_path(path) as temporary:
            partial.append(temporary.rename(tmp_path / "kept"))
        partial[-1].rename(temporary)
        partial[-1] = temporary
    target.touch()
    remove_partial(target)
    assert sorted(tmp_path.iterdir()) == sorted([target, partial[-1]])
    remove_partial(tmp_path / "new" / "1_1.fits")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("Not enough space on disk: requested 10, available 1."),
        OSError("32095 requested and 6352 written"),
    ],
)
def test_full_disk_names_the_file_and_the_remedy(tmp_path, error):
    message = r"image\.fits: .*space.*[Ff]ree some space"
    with pytest.raises(InputError, match=message), atomic_path(tmp_path / "image.fits"):
        raise error
    assert not list(tmp_path.iterdir())


def test_error_about_another_file_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "image.fits"):
        (tmp_path / "missing").read_text()


def test_file_is_readable_by_the_group_as_the_umask_says(tmp_path):
    with atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("x")
    plain = tmp_path / "b"
    plain.write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("text", ["1031745", "v-12_b", "A"])
def test_good_exposure_ids(text):
    assert check_id(text, "exposure") == text


@pytest.mark.parametrize(
    "text", ["", "a/b", "../x", "a b", "$(rm)", "-rf", "a.b", "x" * 65, "é", "a\n"]
)
def test_hostile_exposure_ids_are_refused(text):
    with pytest.raises(InputError, match="not a valid exposure id"):
        check_id(text, "exposure")


def test_checksum_is_that_of_the_content(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "x") == expected
