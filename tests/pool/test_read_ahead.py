"""Files of the items that come next are in the memory of the system before a worker reads them."""

import os
import time

import pytest
from pool_work import square

from coaddflow.pool import Pool
from coaddflow.pool.read_ahead import FilePart, ReadAhead


def wait_until(holds, seconds=20.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


@pytest.fixture
def ahead():
    reader = ReadAhead()
    yield reader
    reader.close()


def is_in_memory(path):
    """Return whether all of a file could be read without asking the disk."""
    with path.open("rb") as stream:
        room, size = bytearray(1 << 16), path.stat().st_size
        for start in range(0, size, len(room)):
            try:
                os.preadv(stream.fileno(), [room], start, os.RWF_NOWAIT)
            except BlockingIOError:
                return False
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


@pytest.mark.parametrize("by", ["path", "descriptor"])
def test_what_is_asked_for_is_in_memory_afterwards(tmp_path, ahead, by):
    path = forgotten_file(tmp_path / "large", 11_000_000)
    with path.open("rb") as stream:
        done = []

        def parts():
            yield FilePart(path if by == "path" else stream.fileno())
            done.append(True)

        ahead.ask(parts)
        wait_until(lambda: done)
    assert is_in_memory(path)


def test_only_the_part_is_read(tmp_path, ahead):
    size = 64 << 20
    path, done = forgotten_file(tmp_path / "large", size), []

    def parts():
        yield FilePart(path, size // 2, size // 2 + 10)
        yield FilePart(path, size, size + 10)  # beyond the end
        done.append(True)

    ahead.ask(parts)
    wait_until(lambda: done)
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
    ahead._asked.join()
    for _ in range(2):  # one of them is passed over
        ahead.ask(lambda: done.append("more") or ())
    wait_until(lambda: done == ["all", "more"])


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
        ahead._asked.join()

    for number in range(40):
        ask(number, seconds=0.0005)
    assert read == [0, 2, 6, 14, 30]
    for number in range(40, 80):
        ask(number, seconds=0.005)
    assert read[5:] == list(range(62, 80)), "of a slow disk every one, once that is known"
    ahead.close()


def slow_files(asked):
    def files(item):
        asked.append(item)
        time.sleep(0.002)
        return ()

    return files


@pytest.mark.parametrize("workers", [1, 2])
def test_the_items_that_come_next_are_asked_for_once_each(workers):
    asked = []
    with Pool("processes", workers) as pool:
        results = pool.map(square, range(8), files=slow_files(asked), cost=lambda item: 8 - item)
    assert list(results) == [item**2 for item in range(8)]
    assert asked == sorted(set(asked)), "in the order of the work, none twice"
    assert set(asked) <= set(range(1, 8)), "not of the item that is in work"
    assert asked[:1] == [1]


def test_nothing_is_read_here_for_workers_elsewhere(monkeypatch):
    asked = []
    with Pool("serial") as pool:
        monkeypatch.setattr(pool._backend, "on_this_machine", False, raising=False)
        pool.map(square, range(4), files=slow_files(asked))
    assert asked == []
