"""Of two jobs that would make the same products only the newer one writes."""

import os
from pathlib import Path

import pytest

from coaddflow import fence, files
from coaddflow.errors import InputError, ReplacedError, is_lasting
from coaddflow.fence import Fence, begin, fenced_by, is_replaced
from coaddflow.files import atomic_path, atomic_streams, remove, remove_partial


@pytest.fixture
def older(tmp_path):
    return Fence(str(tmp_path / "tokens" / "tract_0"), "Slurm job 1")


@pytest.fixture
def newer(older):
    return older._replace(job="Slurm job 2")


def test_job_with_its_token_writes(older, tmp_path):
    begin(older)
    with fenced_by(older), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_job_that_was_replaced_writes_and_removes_nothing_and_the_newer_one_goes_on(
    older, newer, tmp_path
):
    begin(older)
    product, fresh = tmp_path / "a.txt", tmp_path / "b.txt"
    with (
        pytest.raises(ReplacedError, match="Slurm job 1 stops: Slurm job 2 works on tract_0 now"),
        fenced_by(older),
        atomic_path(fresh) as temporary,
    ):
        temporary.write_text("late")
        begin(newer)
    assert not fresh.exists()
    with fenced_by(newer), atomic_path(product) as temporary:
        temporary.write_text("of the newer job")
    for change in (remove, remove_partial):
        with fenced_by(older), pytest.raises(ReplacedError):
            change(product)
    assert product.read_text() == "of the newer job"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "tokens"]


def test_of_files_that_are_written_together_none_takes_its_name_in_a_replaced_job(
    older, newer, tmp_path
):
    begin(older)
    names = [tmp_path / "1_sources.fits", tmp_path / "1.fits"]
    with pytest.raises(ReplacedError), fenced_by(older), atomic_streams(*names) as streams:
        for stream in streams:
            stream.write(b"late")
        begin(newer)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_there_is_a_look_for_all_files_that_take_their_names_together(older, tmp_path, monkeypatch):
    begin(older)
    looks, names = [], [tmp_path / f"{number}.fits" for number in range(100)]
    real = fence.check
    monkeypatch.setattr(
        fence, "check", lambda: looks.append(len(list(tmp_path.iterdir()))) or real()
    )
    with fenced_by(older), atomic_streams(*names[:2]):
        pass
    assert looks == [1 + 2], "when both have been written"
    for name in names:
        name.touch()
    looks.clear()
    with fenced_by(older):
        remove(*names)
    assert looks == [1 + 100, 1 + 100 - 64], "a look holds for some tens of removals"
    assert [path.name for path in tmp_path.iterdir()] == ["tokens"]


def test_a_job_that_is_replaced_while_it_removes_files_goes_no_further(
    older, newer, tmp_path, monkeypatch
):
    begin(older)
    names = [tmp_path / f"{number}.fits" for number in range(100)]
    for name in names:
        name.touch()
    real = Path.unlink

    def unlink(path, **options):
        real(path, **options)
        begin(newer)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(ReplacedError), fenced_by(older):
        remove(*names)
    assert [name.exists() for name in names] == [False] * 64 + [True] * 36


@pytest.mark.parametrize("change", ["unlink", "replace"])
def test_a_job_that_is_replaced_while_the_disk_stands_still_goes_no_further(
    older, newer, tmp_path, monkeypatch, change
):
    """Its node was cut off: a newer job has made everything meanwhile."""
    begin(older)
    names = [tmp_path / f"{number}.fits" for number in range(3)]
    now, real = [100.0], getattr(Path, change)

    def stand_still(path, *arguments, **options):
        result = real(path, *arguments, **options)
        if path.suffix == ".fits":
            now[0] += 3600.0
            begin(newer)
        return result

    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Path, change, stand_still)
    with pytest.raises(ReplacedError), fenced_by(older):
        if change == "replace":
            with atomic_streams(*names):
                pass
        else:
            for name in names:
                name.touch()
            remove(*names)
    assert [name.exists() for name in names] == (
        [True, False, False] if change == "replace" else [False, True, True]
    )


def test_steps_of_a_job_share_the_token_and_a_replaced_job_does_not_get_it_back(older, newer):
    begin(older)
    begin(older)
    assert not is_replaced(older)
    begin(newer)
    with pytest.raises(ReplacedError):
        begin(older)
    begin(newer)
    assert is_replaced(older)
    assert not is_replaced(newer)
    assert not is_replaced(older._replace(job="Slurm job 3")), "it has not begun yet"


@pytest.mark.parametrize(
    "numbers", [("Slurm job 9", "Slurm job 10"), ("PBS job 9.a", "PBS job 10.a")]
)
def test_an_older_job_does_not_take_the_token_of_a_newer_one(older, numbers):
    """It may come late to a step that the newer job has done already."""
    late, early = (older._replace(job=job) for job in numbers)
    begin(early)
    with pytest.raises(ReplacedError, match="has its token"):
        begin(late)
    with fenced_by(early):
        fence.check()


def test_a_third_job_replaces_the_second(older, newer):
    for job in (older, newer, older._replace(job="Slurm job 3")):
        begin(job)
    assert is_replaced(older)
    assert is_replaced(newer)


def test_job_whose_token_is_gone_stops(older, tmp_path):
    begin(older)
    os.remove(older.token)  # noqa: PTH107 - the path is a plain value
    with fenced_by(older), pytest.raises(ReplacedError, match=r"its token .* is gone"):
        remove(tmp_path / "a.txt")


def test_temporary_file_that_the_newer_job_has_removed_is_no_trouble_of_the_disk(
    older, newer, tmp_path
):
    begin(older)
    with (
        pytest.raises(ReplacedError),
        fenced_by(older),
        atomic_path(tmp_path / "a.txt") as temporary,
    ):
        begin(newer)
        temporary.unlink()


def test_what_fails_in_a_replaced_job_fails_because_it_was_replaced(older, newer):
    begin(older)
    with pytest.raises(InputError, match="is gone"), fenced_by(older):
        raise InputError("is gone", path="bias.fits")
    begin(newer)
    with pytest.raises(ReplacedError) as caught, fenced_by(older):
        raise InputError("is gone", path="bias.fits")
    assert not is_lasting(caught.value), "the newer job may be tried again"


def test_nobody_is_asked_where_there_is_no_fence(older, tmp_path):
    with fenced_by(older), fenced_by(None), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert fence.active_fence() is None


def test_being_replaced_is_nothing_that_lasts():
    # the log of the older job may be read as that of the newer one, which is to be tried again
    assert not is_lasting(ReplacedError("stops"))


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"SLURM_JOB_ID": "12"}, "Slurm job 12"),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "0"}, "Slurm job 12"),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "1"}, "Slurm job 12, start 1"),
        ({"PBS_JOBID": "12.head", fence.VARIABLE: "process 1 on login"}, "PBS job 12.head"),
        ({fence.VARIABLE: "process 1 on login"}, "process 1 on login"),
    ],
)
def test_all_steps_of_a_job_of_a_cluster_have_its_name(environ, name):
    assert fence.name_job(False, 0.0, environ) == name


def test_a_run_in_an_allocation_is_not_the_allocation():
    names = {fence.name_job(True, started, {"SLURM_JOB_ID": "12"}) for started in (0.0, 100.0)}
    assert len(names) == 2
    assert all(f"process {os.getpid()} on " in name for name in names)
