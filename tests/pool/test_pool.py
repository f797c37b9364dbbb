"""The pool keeps its promises, and the same ones whatever does the work."""

import contextlib
import copyreg
import errno
import functools
import gc
import json
import logging
import math
import operator
import os
import platform
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pool_work as work
import pytest
from backends import find_mpirun, linux, needs_dask, needs_mpi

from coaddflow.errors import CcdFailure, InputError
from coaddflow.pool import CannotPickle, Failure, Pool, PoolError, StateLost, WorkerDied
from coaddflow.pool.forks import Fork
from coaddflow.pool.memory import Shared, attach
from coaddflow.pool.packing import pack, unpack
from coaddflow.pool.queue import Task, TaskQueue
from coaddflow.runtime.log import job_log
from coaddflow.runtime.threads import single_threaded

WITHIN = os.environ.get("COADDFLOW_TEST_POOL")
WITHIN_FORKS = WITHIN == "forks"
MEMORY_LIMIT = 1000
SECONDS = 60

outside = pytest.mark.skipif(bool(WITHIN), reason="tested by the pytest that runs all")
BACKENDS = {
    "mpi": ["mpi"],
    "forks": ["processes"],
    None: ["serial", "processes", pytest.param("dask", marks=needs_dask)],
}[WITHIN]


@pytest.fixture(autouse=True)
def bounded_time():
    """No test waits for ever."""

    def too_long(_number, _frame):
        raise TimeoutError(f"the test takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def fresh_processes():
    """Whether this pytest has threads or not, only the one of forks has forks."""
    with pytest.MonkeyPatch.context() as patch:
        if not WITHIN_FORKS:
            patch.setattr("coaddflow.pool.processes.can_fork", lambda: False)
        yield


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request):
    return request.param


# a fork that has died is replaced by a fresh process
@pytest.fixture(scope="function" if WITHIN_FORKS else "module")
def pool(backend):
    with Pool(backend, 2, memory_limit=MEMORY_LIMIT) as opened:
        if WITHIN_FORKS:
            workers = opened._backend._children.values()
            assert all(isinstance(worker.process, Fork) for worker in workers)
        yield opened


# map ---------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_the_items(pool):
    assert pool.map(work.square, range(20)) == [i * i for i in range(20)]
    assert pool.map(work.square, []) == []
    delays = [(0.1, "a"), (0.0, "b"), (0.05, "c")]
    assert pool.map(work.after, delays) == ["a", "b", "c"]


def test_the_time_that_items_take_is_counted(pool):
    before = pool.busy
    pool.map(work.after, [(0.2, "a"), (0.1, "b")])
    assert 0.3 <= pool.busy - before < SECONDS


def test_results_have_the_same_bits_as_without_a_pool(pool):
    rng = np.random.default_rng(1)
    images = [rng.normal(size=(200, 300)).astype(np.float32) for _ in range(4)]
    results = pool.map(work.smooth, images)
    for image, (smoothed, total) in zip(images, results, strict=True):
        expected, expected_total = work.smooth(image, None)
        assert smoothed.dtype == np.float32
        assert smoothed.tobytes() == expected.tobytes()
        assert total.tobytes() == expected_total.tobytes()


def test_master_and_workers_cannot_change_what_belongs_to_the_other(pool):
    image = np.ones((300, 300))
    first = pool.map(work.double_in_place, [image])
    second = pool.map_again(first, work.double_again)
    assert (image == 1).all()
    assert (first[0] == 2).all()
    assert (second[0] == 4).all()
    first[0][:] = 0  # results can be worked with
    assert (pool.map_again(first, work.double_again)[0] == 8).all()


def test_workers_of_a_pool_are_processes_of_their_own(pool, backend):
    processes = set(pool.map(work.process, range(10)))
    assert processes <= set(pool.processes.values())
    assert (os.getpid() in processes) == (backend == "serial")


def test_two_workers_work_at_the_same_time(pool, backend, tmp_path):
    if backend == "serial":
        pytest.skip("the serial backend has one worker")
    assert pool.map(work.meet, [(tmp_path, "a", "b"), (tmp_path, "b", "a")]) == [True, True]


def test_every_worker_gets_its_longest_items_first(pool):
    costs = [3, 9, 1, 7, 5, 8, 2]
    begun = pool.map(work.begun, costs, cost=lambda item: item)
    for worker in {number for number, _, _ in begun}:
        mine = sorted((when, cost) for number, when, cost in begun if number == worker)
        assert [cost for _, cost in mine] == sorted((c for _, c in mine), reverse=True)
    assert [cost for _, _, cost in begun] == costs


def test_progress_counts_every_item_once(pool):
    seen = []
    pool.map(
        work.fail_at_three,
        range(5),
        label=lambda item: f"CCD {item}",
        progress=lambda *facts: seen.append(facts),
    )
    assert [(done, total) for done, total, _ in seen] == [(i, 5) for i in range(1, 6)]
    assert {last for _, _, last in seen} == {f"CCD {i}" for i in range(5)}


# failures ----------------------------------------------------------------------------------


def test_a_failure_is_a_value_and_costs_its_item_only(pool):
    results = pool.map(work.fail_at_three, range(6), label=lambda item: f"CCD {item}")
    assert [r for r in results if not isinstance(r, Failure)] == [0, 1, 2, 4, 5]
    (failure,) = results.failures
    assert results[3] is failure
    assert (failure.index, failure.label, failure.type) == (3, "CCD 3", "CcdFailure")
    assert failure.message == "no_stars: there are no stars"
    assert "in fail_at_three" in failure.traceback
    assert failure.worker in pool.processes
    assert failure.error.reason == "no_stars"
    with pytest.raises(CcdFailure) as raised:
        failure.raise_again()
    assert "CCD 3" in raised.value.__notes__[0]


def test_exceptions_that_cannot_be_pickled_are_returned_as_text(pool, monkeypatch):
    # dask, once it has been imported, lets all classes of exceptions travel that there are
    monkeypatch.delitem(copyreg.dispatch_table, work.BadError, raising=False)
    bad, ended, good = pool.map(work.fail_badly, range(3))
    assert (bad.type, bad.message, bad.error) == ("BadError", "CCD 7: cloud", None)
    with pytest.raises(PoolError, match="cloud"):
        bad.raise_again()
    assert (ended.type, ended.message, good) == ("SystemExit", "this is the end", 2)


def test_what_has_failed_is_not_done_again(pool):
    first = pool.map(work.fail_at_three, range(5))
    second = pool.map(work.square, first)
    assert second[3] is first[3]
    assert second[4] == 16
    assert pool.map_again(first, work.square, range(5))[3] is first[3]


def test_what_cannot_be_pickled_is_named(pool):
    results = pool.map(work.square, [1, {"chip": [work.HasLock()]}, 3])
    assert (results[0], results[2]) == (1, 9)
    assert results[1].type == "CannotPickle"
    assert "item 1['chip'][0].facts['guard'] is a _thread.lock" in results[1].message
    (result,) = pool.map(work.return_lock, [5], label=lambda _item: "CCD 5")
    assert "the result of CCD 5['owner'].facts['guard'] is a _thread.lock" in result.message
    with pytest.raises(CannotPickle, match=r"camera\[0\] is the function .*lambda"):
        pool.broadcast(camera=[lambda: 1])
    with pytest.raises(CannotPickle, match="lambda"):
        pool.map(lambda item, _worker: item, [1])
    assert pool.map(work.square, [2]) == [4]


def test_functions_of_the_script_itself_are_refused_with_a_message(pool, backend, monkeypatch):
    if backend == "serial":
        pytest.skip("the serial backend runs in the script itself")
    monkeypatch.setattr(work.square, "__module__", "__main__")
    with pytest.raises(CannotPickle, match="'square' is defined in the script"):
        pool.map(work.square, [1])


def test_a_map_that_is_abandoned_does_not_disturb_the_next(pool):
    def stop(done, _total, _last):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.map(work.after, [(0.0, "old"), (0.3, "old"), (0.3, "old")], progress=stop)
    # answers to the old map arrive while this one goes on
    assert pool.map(work.after, [(0.3, i) for i in range(4)]) == [0, 1, 2, 3]


def test_what_workers_log_and_warn_reaches_the_log(pool, backend, caplog):
    if backend == "serial":
        pytest.skip("the serial backend logs and warns by itself")
    with caplog.at_level(logging.INFO):
        pool.map(work.warn_and_log, [4], label=lambda item: f"CCD {item}")
    messages = [(record.name, record.getMessage()) for record in caplog.records]
    assert ("coaddflow.somewhere", "CCD 4: item is 4") in messages
    assert any(name == "py.warnings" and "a pixel is odd" in text for name, text in messages)
    caplog.clear()
    with caplog.at_level(logging.ERROR):
        pool.map(work.warn_and_log, [4])
    assert not caplog.records


# state -------------------------------------------------------------------------------------


def test_an_item_comes_back_to_the_worker_that_holds_its_state(pool):
    first = pool.map(work.hold, range(8))
    assert pool.map(work.state_is_empty, range(8)) == [True] * 8
    again = pool.map_again(first, work.held, "abcdefgh", cost=ord)
    assert again == [(first[i], 10 * i, "abcdefgh"[i]) for i in range(8)]
    third = pool.map_again(again, work.held)
    assert third == [(first[i], 10 * i, None) for i in range(8)]
    with pytest.raises(ValueError, match="shorter"):
        pool.map_again(first, work.held, range(7))


def test_items_come_back_whichever_worker_is_free_first(pool, backend, tmp_path):
    if backend == "serial":
        pytest.skip("the serial backend has one worker")
    meeting = [(tmp_path, "a", "b"), (tmp_path, "b", "a")]
    first = pool.map(work.meet_and_hold, meeting)
    assert first[0] != first[1]
    for order in (1, -1):
        again = pool.map_again(first, work.held, [1, 2], cost=lambda item, sign=order: sign * item)
        assert again == [(first[0], "a", 1), (first[1], "b", 2)]


def test_state_goes_with_the_results_of_its_map(pool):
    kept, dropped = pool.map(work.hold, range(6)), pool.map(work.hold, range(6))
    assert pool.map_again(kept, work.n_alive) == [(kept + dropped).count(one) for one in kept]
    pool.forget(dropped)
    assert pool.map_again(kept, work.n_alive) == [kept.count(one) for one in kept]
    assert pool.map_again(kept, work.held) == [(kept[i], 10 * i, None) for i in range(6)]
    del kept
    gc.collect()
    assert set(pool.map(work.n_alive, range(30))) == {0}


def test_a_worker_that_is_busy_is_told_later_what_to_forget(pool):
    held = pool.map(work.hold, range(6))

    def stop(_done, _total, _last):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.map(work.after, [(0.0, 1), (0.3, 2), (0.3, 3)], progress=stop)
    pool.forget(held)
    anchors = pool.map(work.hold_slowly, range(6))
    assert pool.map_again(anchors, work.n_alive) == [anchors.count(one) for one in anchors]


def test_the_cache_lives_as_long_as_its_worker(pool):
    counts = pool.map(work.in_cache, range(6)) + pool.map(work.in_cache, range(6))
    for worker in {number for number, _ in counts}:
        mine = sorted(n for number, n in counts if number == worker)
        assert mine == list(range(1, len(mine) + 1))


def test_a_dead_worker_costs_its_item_and_the_states_it_held(pool, backend):
    if backend == "serial":
        pytest.skip("the serial backend has no worker that can die alone")
    if backend == "mpi":
        pytest.skip("a lost rank ends the job: see test_a_lost_rank_ends_the_program")
    first = pool.map(work.hold, range(8))
    items = ["die", *range(1, 8)]
    again = pool.map_again(first, work.die_or_tell, items, cost=lambda item: item == "die")
    died = again[0]
    assert (died.type, died.worker) == ("WorkerDied", first[0])
    assert isinstance(died.error, WorkerDied)
    for i in range(1, 8):
        if first[i] == first[0]:
            assert (again[i].type, type(again[i].error)) == ("StateLost", StateLost)
            assert f"worker {first[0]}" in again[i].message
        else:
            assert again[i] == (first[i], 10 * i, i)
    results = pool.map(work.die_if, [1, "die", 3, 4])
    assert (results[0], *results[2:]) == (1, 3, 4)
    assert results[1].type == "WorkerDied"


def test_dead_workers_are_replaced(pool, backend, tmp_path):
    if backend in ("serial", "mpi"):
        pytest.skip(f"with {backend} no worker can die without the master")
    before = dict(pool.processes)
    pool.map(work.die_if, ["die", "die"])
    # only two workers can meet
    assert pool.map(work.meet, [(tmp_path, "a", "b"), (tmp_path, "b", "a")]) == [True, True]
    assert not set(before) & set(pool.processes)


# constants ---------------------------------------------------------------------------------


def test_a_constant_is_sent_once_to_every_worker(pool, backend):
    pixels = np.ones(100_000)
    before, sent_before = len(work.unpickled), _bytes(pool)
    pool.broadcast(counted=work.Counted(pixels))
    results = [pool.map(work.scaled, range(6)) for _ in range(3)]
    arrived = {n for result in results for _, n in result}
    assert arrived == {before + 1} if backend == "serial" else arrived == {1}
    assert [value for value, _ in results[2]] == [1e5 * i for i in range(6)]
    if backend != "serial":
        assert _bytes(pool) - sent_before < 2.1 * pixels.nbytes


def _bytes(pool):
    return pool.traffic.piped + pool.traffic.shared


def test_a_constant_can_be_replaced_but_not_written_to(pool):
    flat = np.ones(50_000)
    pool.broadcast(flat=flat)
    (failure,) = pool.map(work.write_to_constant, [0])
    assert failure.type == "ValueError"
    assert "read-only" in failure.message
    pool.broadcast(flat=np.zeros(3), zero_point=27.0)
    (names,) = pool.map(work.names_of_constants, [0])
    assert {"flat", "zero_point"} <= set(names)


# reduce ------------------------------------------------------------------------------------


def test_a_sum_has_the_same_bits_whoever_is_first(pool):
    values = [1e16, 1.0, -1e16, 1.0, 0.1]
    items = [(0.02 * (i % 2), value) for i, value in enumerate(values)]
    total, failures = pool.reduce(operator.add, work.after, items, cost=lambda item: -item[1])
    assert total == functools.reduce(operator.add, values)
    assert total != math.fsum(values)
    assert failures == []


def test_a_sum_leaves_out_what_failed_and_says_so(pool):
    total, failures = pool.reduce(operator.add, work.fail_at_three, range(5))
    assert total == 0 + 1 + 2 + 4
    assert [failure.index for failure in failures] == [3]
    total, failures = pool.reduce(operator.add, work.fail_at_three, failures)
    assert (total, len(failures)) == (None, 1)


# memory and processes ----------------------------------------------------------------------


def test_items_in_work_stay_within_the_memory_limit(pool):
    sizes = [600, 700, 300, 500, 200, 600, 5000]
    intervals = pool.map(work.interval, sizes, memory=lambda item: item)
    for begin, _, _ in intervals:
        in_work = [size for first, last, size in intervals if first <= begin < last]
        assert sum(in_work) <= MEMORY_LIMIT or in_work == [5000]


def test_numerical_libraries_have_one_thread_in_workers(pool, backend):
    if backend == "serial":
        pytest.skip("the serial backend is the process of the master")
    assert set(pool.map(work.threads, range(4))) == {("1", "1")}


@outside
@linux
def test_large_arrays_cross_in_memory_and_not_through_a_pipe():
    image = np.ones((2048, 2048), np.float32)
    with Pool("processes", 1) as pool:
        assert pool.map(work.stands_in_shared_memory, [image]) == [True]
        before = pool.traffic.piped
        (result,) = pool.map(work.square, [image])
        assert pool.traffic.piped - before < 2000
        assert pool.traffic.shared == 3 * image.nbytes
        assert work.stands_in_shared_memory(result, None)
        assert result.flags.writeable
        pool.broadcast(flat=image)


@outside
@linux
def test_nothing_is_left_behind_by_a_pool():
    command = [sys.executable, work.__file__, "traces"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    before, during, after = run.stdout.splitlines()
    assert "3 arrays" in during
    assert before == after


@outside
@linux
def test_shared_memory_needs_no_open_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
    try:
        held = []
        for i in range(100):
            shared = Shared(bytes([i]) * 5000)
            held.append(attach(os.dup(shared.descriptor), shared.nbytes))
            shared.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [view[4999] for view in held] == list(range(100))


@outside
def test_arrays_are_packed_without_a_copy():
    image = np.ones((500, 500), np.float32)
    packed = pack({"image": image, "name": "x"}, "item 0")
    assert len(packed.data) < 1000
    assert np.shares_memory(unpack(packed)["image"], image)


@outside
def test_tasks_wait_in_the_order_of_their_cost_and_for_memory_and_owner():
    costs, sizes, owners = [1, 5, 5, 9, 7], [1, 1, 1, 8, 1], [None, None, 2, None, 1]
    tasks = [
        Task(i, None, f"item {i}", cost, size, owner)
        for i, (cost, size, owner) in enumerate(zip(costs, sizes, owners, strict=True))
    ]
    queue = TaskQueue(tasks)
    assert queue.take(1, room=5).index == 4  # 3 is too large
    assert queue.take(1, room=9).index == 3
    assert queue.take(3, room=9).index == 1  # 2 belongs to worker 2
    assert [task.index for task in queue.take_all_of(2)] == [2]
    assert queue.take(2, room=0) is None
    assert queue.take(2, room=1).index == 0
    assert len(queue) == 0


@outside
def test_an_error_in_the_master_ends_workers_that_are_busy(tmp_path):
    def stop(_done, _total, _last):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Pool("processes", 2) as pool:
        _await_both(pool)  # one may do all of a map
        processes = list(pool.processes.values())
        pool.map(work.after, [(0, 1), (60, 2)], progress=stop)
    assert len(processes) == 2
    assert not any(map(_is_running, processes))


@outside
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not the C library of GNU")
def test_workers_give_back_what_they_freed_when_a_round_has_ended():
    with Pool("processes", 1) as pool:
        (at_first,) = pool.map(work.resident_then_use, [400])
        (later,) = pool.map(work.resident_then_use, [0])
    assert later < at_first + 100  # MB


def _is_running(process):
    """Return whether a process runs; one that has ended and not been buried does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


PYTHON_WITH_JOB_LOG = """
import sys
from coaddflow.runtime.log import job_log
import pool_work
with job_log(sys.argv[2] + "/job.log"):
    pool_work.program(sys.argv[1], sys.argv[2])
"""


@outside
@linux
@pytest.mark.parametrize(
    ("backend", "how", "with_log"),
    [
        ("processes", signal.SIGTERM, False),
        ("processes", signal.SIGTERM, True),
        ("processes", signal.SIGINT, False),
        ("processes", signal.SIGKILL, False),
        ("forks", signal.SIGTERM, False),
        ("forks", signal.SIGTERM, True),
        ("forks", signal.SIGINT, False),
        ("forks", signal.SIGKILL, False),
        pytest.param("dask", signal.SIGTERM, False, marks=needs_dask),
    ],
)
def test_no_worker_outlives_the_master(backend, how, with_log, tmp_path):
    program = ["-c", PYTHON_WITH_JOB_LOG] if with_log else [work.__file__]
    master = subprocess.Popen(
        [sys.executable, *program, backend, str(tmp_path)],
        stderr=subprocess.PIPE,
        env=single_threaded(
            {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        ),
        text=True,
    )
    workers = _await(lambda: _two_workers(tmp_path))
    are_forks = {_command(worker) == _command(master.pid) for worker in workers}
    assert are_forks == {backend == "forks"}
    master.send_signal(how)
    _, said = master.communicate(timeout=30)
    assert master.returncode != 0
    assert not any(line.startswith("coaddflow.pool.lifeline") for line in said.splitlines())
    assert _await(lambda: not any(map(_is_running, workers)))
    if backend != "dask":  # its threads cannot be interrupted
        assert not list(tmp_path.glob("unfinished*"))
    if with_log:
        assert "stopped by SIGTERM" in (tmp_path / "job.log").read_text().splitlines()[-1]


def _command(process):
    return Path(f"/proc/{process}/cmdline").read_bytes()


def _two_workers(folder):
    workers = [int(path.name[3:]) for path in folder.glob("pid*")]
    return workers if len(workers) == 2 else None


def _await(condition):
    until = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


@outside
def test_a_worker_that_cannot_start_ends_the_job(monkeypatch, capfd):
    monkeypatch.setattr("coaddflow.pool.processes._START", "raise SystemExit('no Python today')")
    with pytest.raises(PoolError, match="exit code 1 before it was ready"), Pool(workers=1) as pool:
        pool.map(work.square, [1])
    assert "no Python today" in capfd.readouterr().err


@outside
def test_the_example_of_the_manual_runs(tmp_path):
    manual = (Path(__file__).parents[2] / "docs" / "pool.md").read_text()
    module, script = (part.split("```")[0] for part in manual.split("```python")[1:3])
    (tmp_path / "starcounts.py").write_text(module)
    (tmp_path / "run.py").write_text(script)
    np.save(tmp_path / "flat.npy", np.full((20, 20), 2.0))
    names = [f"ccd{i}.npy" for i in range(8)]
    for i, name in enumerate(names):
        image = np.full((20, 20), 100.0 + i)
        image[0, : i + 1] = 1000.0
        np.save(tmp_path / name, image)
    os.truncate(tmp_path / "ccd7.npy", 2000)
    command = [sys.executable, "run.py", *names]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=50, check=True
    )
    assert run.stdout.startswith("[1, 2, 3, 4, 5, 6, 7, ")
    assert run.stdout.splitlines()[-1].startswith("ccd7.npy: ValueError: ")


# forks -------------------------------------------------------------------------------------

within_forks = pytest.mark.skipif(not WITHIN_FORKS, reason="tested in a process with one thread")


@outside
@linux
def test_all_of_this_holds_with_forks():
    """The pytest that runs all may have threads, and would not fork."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        # one thread in this process, and not because the environment says it for all libraries
        env={**os.environ, "COADDFLOW_TEST_POOL": "forks", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS - 5,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@within_forks
def test_workers_of_a_master_without_threads_are_forks():
    with Pool("processes", 2) as pool:
        processes = pool.map(work.process, range(4))
        assert os.getpid() not in processes
        assert {_command(process) for process in processes} == {_command(os.getpid())}


@within_forks
def test_a_master_with_threads_has_fresh_processes():
    """A lock that a thread holds when it is forked is never released in the fork."""
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        with Pool("processes", 1) as pool:
            (process,) = pool.map(work.process, [1])
            assert _command(process) != _command(os.getpid())
    finally:
        ended.set()
        thread.join()


@within_forks
def test_the_thread_that_watches_the_parent_hinders_no_fork(tmp_path):
    before = threading.active_count()
    with job_log(tmp_path / "job.log"):
        assert threading.active_count() == before + 1
        with Pool("processes", 1) as pool:
            (process,) = pool.map(work.process, [1])
            assert _command(process) == _command(os.getpid())
            assert threading.active_count() == before + 1
    assert threading.active_count() == before


@within_forks
def test_forks_keep_no_file_of_the_master_open():
    """A pipe, a lock or a removed file would otherwise live as long as the workers."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with Pool("processes", 2) as pool:
        _await_both(pool)
        os.close(writing)
        assert os.read(reading, 1) == b""
    os.close(reading)


@within_forks
@pytest.mark.parametrize("name", [None, "coaddflow"])
def test_forks_do_not_write_to_the_log_of_the_master(name, capfd):
    logger = logging.getLogger(name)
    with open(2, "w", closefd=False) as stream:
        handler = logging.StreamHandler(stream)
        logger.addHandler(handler)
        try:
            with Pool("processes", 1) as pool:
                pool.map(work.warn_about, [4])
        finally:
            logger.removeHandler(handler)
    assert capfd.readouterr().err.count("a pixel is odd in 4") == 1


@outside
@linux
def test_forks_do_not_end_as_the_master_does():
    """Neither are its blocks left in them, nor is done or said what it does or says at its end."""
    buffered = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    run = subprocess.run(
        [sys.executable, work.__file__, "ends"],
        env=single_threaded(buffered),
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )
    assert run.stdout.splitlines() == [
        *("the master begins", "a worker ends", "a worker ends"),
        *("a block of the master ends", "the master ends"),
    ]


@within_forks
def test_forks_begin_as_fresh_processes_do(monkeypatch):
    """What the master has set does not reach them, since their replacements would not have it."""
    monkeypatch.setattr(sys, "stdout", None)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    tracing, profiling = sys.gettrace(), sys.getprofile()
    sys.setprofile(lambda *_: None)
    try:
        with np.errstate(divide="raise"), Pool("processes", 2) as pool:
            states = pool.map(work.process_state, range(2))
    finally:
        sys.setprofile(profiling)
        sys.settrace(tracing)
        signal.signal(signal.SIGUSR1, before)
    for state in states:
        assert state["errors"] == np.geterr()
        assert state["SIGUSR1"] == signal.SIG_DFL
        assert state["held back"] == []
        assert state["profile"] is False
        assert state["stdout"] == 1
        assert state["main"] == []
        assert state["threads"] == ("1", "1")


@within_forks
def test_forks_draw_different_random_numbers():
    with Pool("processes", 2) as pool:
        _await_both(pool)
        drawn = pool.map(work.draw_slowly, range(4))
    assert len(set(drawn)) == 4


@within_forks
def test_a_process_of_multiprocessing_can_open_a_pool():
    """Its daemons may not start processes of multiprocessing, nor may workers have to be such."""
    with get_context("fork").Pool(1) as other:
        assert other.apply(work.open_pool) == [1, 4, 9]


@within_forks
def test_a_master_that_ignores_the_end_of_its_children_ends_well():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with Pool("processes", 2) as pool:
            assert pool.map(work.square, [2, 3]) == [4, 9]
    finally:
        signal.signal(signal.SIGCHLD, before)


@within_forks
def test_without_room_for_forks_workers_are_fresh_processes(monkeypatch):
    def no_room():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", no_room)
    with Pool("processes", 1) as pool:
        (process,) = pool.map(work.process, [1])
        assert _command(process) != _command(os.getpid())


def _await_both(pool):
    """Wait until both workers are ready."""
    for _ in range(100):
        pool.map(work.after, [(0.02, 1), (0.02, 2)])
        if len(pool.processes) == 2:
            return
    raise AssertionError("one worker is not ready")


# backends ----------------------------------------------------------------------------------


@outside
def test_the_pool_itself_loads_no_heavy_package():
    heavy = ("numpy", "mpi4py", "dask", "distributed")
    check = f"import sys, coaddflow.pool; assert not set({heavy}) & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=30)


@outside
@pytest.mark.parametrize(("name", "package"), [("mpi", "mpi4py"), ("dask", "distributed")])
def test_a_backend_that_is_not_installed_says_how_to_install_it(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"coaddflow.pool.{name}", raising=False)
    with pytest.raises(InputError, match=rf"pip install 'coaddflow\[{name}\]'"), Pool(name):
        pass


@outside
def test_wrong_arguments_are_refused_with_a_message():
    for arguments, cause in (
        ({"backend": "spark"}, "Choose one of serial, processes, mpi, dask"),
        ({"workers": 0}, "0 workers"),
        ({"address": "tcp://x:1"}, "takes no address"),
    ):
        with pytest.raises(InputError, match=cause), Pool(**arguments):
            pass
    with pytest.raises(PoolError, match="with"):
        Pool("serial").map(work.square, [1])


@outside
@needs_dask
def test_dask_workers_of_a_scheduler_elsewhere():
    with Pool("dask", 1) as owner:
        assert owner.map(work.square, [3]) == [9]
        own = owner._backend._own
        with _dask_certificate_of(own), Pool("dask", address=own.cluster.scheduler_address) as pool:
            first = pool.map(work.hold, range(3))
            assert pool.map_again(first, work.held) == [(0, 10 * i, None) for i in range(3)]
            assert owner.map(work.square, [4]) == [16]
        assert owner.map(work.square, [5]) == [25]


def _dask_certificate_of(own):
    """Set what a user of a scheduler with TLS has in the configuration of dask."""
    import dask

    certificate, key = json.loads(own._certificate)
    tls = {"ca-file": certificate, "client.cert": certificate, "client.key": key}
    return dask.config.set({f"distributed.comm.tls.{name}": value for name, value in tls.items()})


@outside
@linux
def test_no_stranger_is_listened_to(backend, pool):
    """Another user of the machine may reach all ports of 127.0.0.1."""
    pool.map(work.square, range(4))
    assert pool.processes
    processes = (os.getpid(), *pool.processes.values())
    ports = {port for process in processes for port in _listening(process)}
    if backend != "dask":
        assert not ports
        return
    assert len(ports) == 3  # the scheduler and two workers
    for port in ports:
        with socket.create_connection(("127.0.0.1", port), 5) as plain, plain.makefile("rb") as got:
            plain.sendall(b"GET /info/main/workers.html HTTP/1.0\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in got.read()
        anonymous = ssl.create_default_context()
        anonymous.check_hostname, anonymous.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", port), 5) as connection,
            pytest.raises((ssl.SSLError, ConnectionResetError)),
            anonymous.wrap_socket(connection) as encrypted,
        ):
            encrypted.read()  # TLS 1.3 tells of a missing certificate after the handshake


def _listening(process):
    """Return the TCP ports on which a process listens."""
    sockets = set()
    for one in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            sockets.add(str(one.readlink()))
    lines = [
        line.split()
        for family in ("tcp", "tcp6")
        for line in Path(f"/proc/{process}/net/{family}").read_text().splitlines()[1:]
    ]
    return {
        int(fields[1].split(":")[1], 16)
        for fields in lines
        if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets
    }


def _run_with_mpi(*arguments):
    environment = {
        **os.environ,
        "COADDFLOW_TEST_POOL": "mpi",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    command = [find_mpirun(), "-n", "3", sys.executable, "-m", "coaddflow.pool", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=50, check=False
    )


@outside
@needs_mpi
def test_all_of_this_holds_with_mpi():
    run = _run_with_mpi("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@outside
@needs_mpi
def test_a_lost_rank_ends_the_program():
    run = _run_with_mpi(work.__file__, "lose")
    assert run.returncode != 0
    assert "is gone: it was killed (out of memory, time limit) or its node was lost" in run.stderr


@outside
@needs_mpi
def test_mpi_without_its_program_is_refused_with_a_message():
    with pytest.raises(InputError, match="mpirun -n RANKS python -m"), Pool("mpi"):
        pass
