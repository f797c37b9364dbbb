"""What the tests of the pool have done by workers, and programs that open pools."""

import atexit
import contextlib
import gc
import logging
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np

from coaddflow.errors import CcdFailure
from coaddflow.pool import Pool

unpickled = []
alive = weakref.WeakSet()


class Counted:
    """Counts how often it arrives in a process."""

    def __init__(self, pixels):
        self.pixels = pixels

    def __setstate__(self, state):
        self.__dict__.update(state)
        unpickled.append(1)


class Kept:
    """Something that is seen to be kept or not."""

    def __init__(self):
        alive.add(self)


class HasLock:
    """Cannot be pickled because of one attribute."""

    def __init__(self):
        self.facts = {"gain": 1.5, "guard": threading.Lock()}


class BadError(Exception):
    """Can be pickled but not unpickled."""

    def __init__(self, ccd, cause):
        super().__init__(f"CCD {ccd}: {cause}")


def resident_then_use(megabytes, worker):
    """Return the memory of this process in MB; then take some more, and free it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    np.ones(megabytes * 250_000, np.float32)
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def square(item, _worker):
    return item * item


def who(_item, worker):
    return worker.id


def process(_item, _worker):
    return os.getpid()


def fail_at_three(item, _worker):
    if item == 3:
        raise CcdFailure("no_stars", "there are no stars")
    return item


def fail_badly(item, _worker):
    if item == 0:
        raise BadError(7, "cloud")
    if item == 1:
        sys.exit("this is the end")
    return item


def smooth(image, _worker):
    """Something whose last bits depend on how it is done."""
    spectrum = np.fft.rfft2(image)
    return np.fft.irfft2(spectrum * 0.1, image.shape).astype(np.float32), image.sum()


def double_in_place(image, worker):
    image *= 2
    worker.state["image"] = image
    return image


def double_again(_item, worker):
    worker.state["image"] *= 2
    return worker.state["image"]


def hold(item, worker):
    worker.state["pixels"] = item * 10
    worker.state["kept"] = Kept()
    return worker.id


def hold_slowly(item, worker):
    time.sleep(0.1)
    return hold(item, worker)


def meet_and_hold(item, worker):
    """Hold the name of an item, when both of two workers have one."""
    meet(item, worker)
    worker.state["pixels"] = item[1]
    return worker.id


def held(item, worker):
    return worker.id, worker.state["pixels"], item


def n_alive(_item, _worker):
    return len(alive)


def state_is_empty(_item, worker):
    return not worker.state


def in_cache(_item, worker):
    worker.cache["n"] = worker.cache.get("n", 0) + 1
    return worker.id, worker.cache["n"]


def die_if(item, _worker):
    if item == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def die_or_tell(item, worker):
    die_if(item, worker)
    return held(item, worker)


def return_lock(item, _worker):
    return {"image": item, "owner": HasLock()}


def scaled(item, worker):
    return float(worker.constants["counted"].pixels.sum()) * item, len(unpickled)


def write_to_constant(_item, worker):
    worker.constants["flat"][0] = 7


def names_of_constants(_item, worker):
    return sorted(worker.constants)


def interval(item, _worker):
    begin = time.monotonic()
    time.sleep(0.05)
    return begin, time.monotonic(), item


def begun(item, worker):
    return worker.id, time.monotonic(), item


def meet(item, _worker):
    """Wait until the other item is here too."""
    folder, mine, other = item
    (folder / mine).touch()
    until = time.monotonic() + 20
    while not (folder / other).exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


def after(item, _worker):
    seconds, value = item
    time.sleep(seconds)
    return value


def warn_and_log(item, _worker):
    logging.getLogger("coaddflow.somewhere").info("item is %d", item)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # a fork has the filters of pytest, which raise it
        warnings.warn("a pixel is odd", RuntimeWarning, stacklevel=1)
    return item


def warn_about(item, _worker):
    logging.getLogger("coaddflow.somewhere").warning("a pixel is odd in %d", item)


def process_state(_item, _worker):
    """Tell what a process has that it may have of its master."""
    return {
        "errors": np.geterr(),
        "SIGUSR1": signal.getsignal(signal.SIGUSR1),
        "held back": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "profile": sys.getprofile() is not None,
        "stdout": sys.stdout.fileno(),
        "main": [name for name in vars(sys.modules["__main__"]) if not name.startswith("__")],
        "threads": threads(_item, _worker),
    }


def draw_slowly(_item, _worker):
    time.sleep(0.05)
    return np.random.uniform()  # noqa: NPY002 - the global state is what is tested


def open_pool():
    """Open a pool in a process that is no worker of one."""
    with Pool("processes", 2) as pool:
        return list(pool.map(square, [1, 2, 3]))


def tell_of_its_end(_item, _worker):
    atexit.register(os.write, 1, b"a worker ends\n")
    time.sleep(0.2)


def program_that_ends():
    """Open a pool, and tell what is done at the end of which process."""
    print("the master begins")  # and keeps it in a buffer, since this is no terminal
    atexit.register(os.write, 1, b"the master ends\n")
    with contextlib.ExitStack() as stack:
        stack.callback(os.write, 1, b"a block of the master ends\n")
        with Pool("processes", 2) as pool:
            pool.map(tell_of_its_end, range(2))


def threads(_item, _worker):
    return os.environ.get("OMP_NUM_THREADS"), os.environ.get("NUMBA_NUM_THREADS")


def stands_in_shared_memory(image, _worker):
    """Return whether an array stands in memory that another process has written."""
    address = image.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return "memfd:coaddflow" in line and last - first >= image.nbytes
    return False


def never_ends(item, _worker):
    """Write a temporary file, and remove it if there is time to."""
    folder, number = item
    temporary = Path(folder) / f"unfinished{number}"
    temporary.touch()
    (Path(folder) / f"pid{os.getpid()}").touch()
    try:
        time.sleep(100)
    finally:
        temporary.unlink()


def program(backend, folder):
    """Open a pool of two workers that never end; a master with a thread does not fork them."""
    if backend == "forks":
        backend = "processes"
    else:
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
    with Pool(backend, 2) as pool:
        pool.map(never_ends, [(folder, 0), (folder, 1)])


def traces():
    """Tell what a process has of shared memory, open files and children."""
    maps = Path("/proc/self/maps").read_text().count("memfd:coaddflow")
    named = sorted(path.name for path in Path("/dev/shm").glob("*coaddflow*"))  # noqa: S108
    files = len(list(Path("/proc/self/fd").iterdir()))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return f"{maps} arrays, {named}, {files} files, {len(children)} children"


def program_that_leaves_nothing():
    """Open and close a pool in which a worker dies, and tell what there is before and after."""
    print(traces())
    with Pool("processes", 1) as pool:
        pool.broadcast(flat=np.ones(100_000))
        results = pool.map(square, [np.ones(100_000)] * 3)
        pool.map(die_if, [np.ones(100_000), "die"])
        pool.map(square, [1])
        print(traces())
    del results
    gc.collect()
    print(traces())


def program_that_loses_a_rank():
    """Open a pool in which a worker is killed."""
    with Pool("mpi") as pool:
        pool.map(die_if, [1, 2, "die", 4, 5])


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import pool_work  # functions for workers must not be those of __main__

    if sys.argv[1] == "lose":
        pool_work.program_that_loses_a_rank()
    elif sys.argv[1] == "ends":
        pool_work.program_that_ends()
    elif sys.argv[1] == "traces":
        pool_work.program_that_leaves_nothing()
    else:
        pool_work.program(*sys.argv[1:])


def add_to_state(number, worker):
    """Add up the numbers of all rounds; (number, folder) ends the worker, once for each folder."""
    if isinstance(number, tuple):
        number, folder = number
        try:
            folder.mkdir()
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    worker.state["sum"] = worker.state.get("sum", 0) + number
    return worker.state["sum"]


def end_worker(_number, _worker):
    os.kill(os.getpid(), signal.SIGKILL)


def is_two(result):
    return result == 2
