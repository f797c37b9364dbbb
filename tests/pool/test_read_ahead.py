"""Files of the items that come next are in the memory of the system before a worker reads them."""

import os
import threading
import time

import pytest
from pool_work import square

from coaddflow.pool import FilePart, Pool
from coaddflow.pool.read_ahead import ReadAhead

MB = 1 << 20

needs_nowait = pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells")


@pytest.fixture
def ahead():
    reader = ReadAhead(clock=lambda: 0.0)
    yield reader
    reader.stop()
    reader.wait()


def finish(ahead, seconds=20.0):
    """Wait until all that was asked for has been read."""
    end = time.monotonic() + seconds
    while ahead._asked.unfinished_tasks:
        assert time.monotonic() < end, "it waits for something"
        time.sleep(0.001)


def read_all(ahead, *parts):
    """Let parts be read, and wait for it."""
    ahead.ask(lambda: iter(parts))
    finish(ahead)


def is_in_memory(path, start=0, stop=None):
    """Return whether bytes of a file could be read without asking the disk."""
    stop = path.stat().st_size if stop is None else stop
    with path.open("rb") as stream:
        while start < stop:
            room = bytearray(min(1 << 16, stop - start))
            try:
                number = os.preadv(stream.fileno(), [room], start, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
            if number < len(room):
                return False
            start += number
    return True


def forgotten_file(path, size):
    """Write a file that the system has to read from the disk."""
    with path.open("wb") as stream:
        stream.write(bytes(size))
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_in_memory(path):
        pytest.skip("this file system keeps files in memory")
    return path


@needs_nowait
@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_what_is_asked_for_is_in_memory_afterwards(tmp_path, ahead, by):
    path = forgotten_file(tmp_path / "large", 45 * MB)
    with path.open("rb") as stream:
        read_all(ahead, FilePart(path if by == "path" else stream.fileno()))
    assert is_in_memory(path)


@needs_nowait
def test_only_the_part_is_read(tmp_path, ahead):
    path = forgotten_file(tmp_path / "large", 64 * MB)
    read_all(ahead, FilePart(path, 32 * MB, 34 * MB), FilePart(path, 64 * MB, 65 * MB))
    assert is_in_memory(path, 32 * MB, 34 * MB)
    assert not is_in_memory(path)


def test_what_cannot_be_read_is_left_to_who_needs_it(tmp_path, ahead):
    os.mkfifo(tmp_path / "pipe")
    done = []

    def parts():
        yield FilePart(tmp_path / "missing")
        yield FilePart(tmp_path)
        yield FilePart(tmp_path / "pipe")  # whoever opened it would wait for its other end
        done.append("all")
        raise ValueError("a damaged file")

    ahead.ask(parts)
    finish(ahead)
    for _ in range(2):  # one is passed over: nothing was slow
        ahead.ask(lambda: done.append("more") or ())
    finish(ahead)
    assert done == ["all", "more"]


def test_what_a_worker_has_begun_is_not_read(ahead):
    called = []
    ahead.ask(lambda: called.append("begun") or (), is_wanted=lambda: False)
    finish(ahead)
    ahead.ask(lambda: called.append("waiting") or ())
    finish(ahead)
    assert called == ["waiting"], "and nothing is learned from what was not read"


def test_files_that_are_there_at_once_are_hardly_looked_at():
    """Each opening is work for a server of files, on a fast one in vain."""
    now, read = [0.0], []
    ahead = ReadAhead(clock=lambda: now[0])

    def ask(number, seconds):
        def parts():
            now[0] += seconds
            read.append(number)
            return ()

        ahead.ask(parts)
        finish(ahead)

    for number in range(40):
        ask(number, seconds=0.0005)
    assert read == [0, 2, 6, 14, 30]
    for number in range(40, 80):
        ask(number, seconds=0.005)
    assert read[5:] == list(range(62, 80)), "of a slow disk every one, once that is known"
    ahead.stop()
    ahead.wait()


@pytest.fixture
def asked(monkeypatch):
    """What pools ask for: items, and whether they are wanted."""
    found = []
    monkeypatch.setattr(
        ReadAhead, "ask", lambda _self, parts, is_wanted: found.append((parts(), is_wanted))
    )
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_items_that_come_next_are_asked_for_once_each(workers, asked):
    with Pool("processes", workers) as pool:
        results = pool.map(square, range(8), files=lambda item: item, cost=lambda item: 8 - item)
        again = pool.map_again(results, square, range(8), files=lambda item: 100 + item)
    assert list(again) == [item**2 for item in range(8)]
    items = [item for item, _ in asked]
    assert items == [*range(1, 8), *sorted(items[7:])]
    assert len(set(items)) == len(items)
    assert set(items[7:]) <= set(range(100, 108))
    assert not any(is_wanted() for _, is_wanted in asked), "all have been begun"


def test_an_item_is_wanted_until_a_worker_begins_it(asked):
    wanted = []
    with Pool("processes", 1) as pool:
        pool.map(
            square,
            range(4),
            files=lambda item: item,
            progress=lambda *_: wanted.append([is_wanted() for _, is_wanted in asked]),
        )
    # each time that an item has ended and the next is not begun
    assert wanted == [[True], [False, True], [False, False, True], [False, False, False]]


@pytest.mark.parametrize("backend", ["serial", "mpi", "dask"])
def test_the_master_reads_only_for_processes_beside_it(backend, asked):
    if backend == "serial":
        with Pool("serial") as pool:
            pool.map(square, range(4), files=lambda item: item)
        assert asked == []
        return
    module = pytest.importorskip(f"coaddflow.pool.{backend}", exc_type=ImportError)
    if backend == "mpi":
        assert not module.MpiBackend.reads_ahead, "ranks may be elsewhere"
    else:
        assert module.DaskBackend(2, None).reads_ahead
        assert not module.DaskBackend(2, "tcp://node:1").reads_ahead


@pytest.mark.parametrize("fails", [False, True])
def test_a_disk_that_does_not_answer_does_not_hold_up_the_end(fails):
    never = threading.Event()
    began = time.monotonic()
    try:
        with pytest.raises(KeyError if fails else SystemExit), Pool("processes", 1) as pool:
            pids = list(pool.map(square, range(4), files=lambda _item: never.wait() or ()))
            assert pids == [0, 1, 4, 9]
            workers = list(pool.processes.values())
            raise KeyError if fails else SystemExit
        assert time.monotonic() - began < 10.0
        assert not any(is_alive(pid) for pid in workers)
    finally:
        never.set()


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
