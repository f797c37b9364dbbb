"""What a shared disk that answers slowly costs: a survey on one, per CCD and per exposure.

    pip install mfusepy; apt install fuse3
    python benchmarks/slow_disk.py [--exposures 2] [--ccds 8] [--delays 0,5,20] [--runs 3]

Mounts a file system (FUSE; needs /dev/fuse and root) that answers as the disk below it does, but
each opening and each reading waits for some milliseconds first, several at the same time as a
server would; written bytes do not wait. As with NFS the system keeps what it has read until the
file changes, and reads 128 kB ahead by itself. A simulated survey (extra `simulate`), with all its
files on it, is run from nothing but its calibration frames with both granularities, alternating,
each time mounted anew. Prints the wall time, which says little on a machine with other work, and
what the server was asked for each CCD.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from child_time import cost_of
from exposure_job import call
from file_opens import MODES, simulate, snakemake

try:
    import mfusepy
except (ImportError, OSError) as error:
    sys.exit(f"{error}: pip install mfusepy, and Debian's fuse3")


_NOW, _KEPT = (1 << 30) - 1, (1 << 30) - 2
"""Times of utimensat(2) that are none."""


class SlowFolder(mfusepy.Operations):
    """The files of a folder, each opened and read after a delay (s)."""

    use_ns = True

    def __init__(self, folder: str, delay: float):
        self._folder, self._delay = folder, delay
        self._lock = threading.Lock()
        self.asked = {"opened": 0, "reads": 0, "bytes": 0}

    def _count(self, **what: int) -> None:
        with self._lock:
            for name, number in what.items():
                self.asked[name] += number
        time.sleep(self._delay)

    def _at(self, path: str) -> Path:
        return Path(self._folder + path)

    # what these do says the documentation of FUSE
    # ruff: disable[D102]

    def open(self, path: str, flags: int) -> int:
        self._count(opened=1)
        # the kernel has the offsets of files that are appended to
        return os.open(self._at(path), flags & ~os.O_APPEND)

    def create(self, path: str, mode: int, fi: object = None) -> int:
        self._count(opened=1)
        return os.open(self._at(path), os.O_RDWR | os.O_CREAT, mode)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        self._count(reads=1, bytes=size)
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        found = self._at(path).lstat()
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_ino", "st_blocks")
        times = {f"st_{one}time": getattr(found, f"st_{one}time_ns") for one in "amc"}
        return {**{name: getattr(found, name) for name in names}, **times}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *(one.name for one in self._at(path).iterdir())]

    def truncate(self, path: str, length: int, fh: int | None = None) -> None:
        os.truncate(self._at(path), length)

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> None:
        found, now = self._at(path).lstat(), time.time_ns()
        special = {_NOW: (now, now), _KEPT: (found.st_atime_ns, found.st_mtime_ns)}
        given = times or (_NOW, _NOW)
        new = tuple(special[one][i] if one in special else one for i, one in enumerate(given))
        os.utime(self._at(path), ns=new, follow_symlinks=False)

    def statfs(self, path: str) -> dict[str, int]:
        found = os.statvfs(self._at(path))
        return {name: getattr(found, name) for name in dir(found) if name.startswith("f_")}

    def release(self, path: str, fh: int) -> None:
        os.close(fh)

    def fsync(self, path: str, datasync: int, fh: int) -> None:
        os.fsync(fh)

    def rename(self, old: str, new: str, flags: int = 0) -> None:
        self._at(old).rename(self._at(new))

    def link(self, target: str, source: str) -> None:
        self._at(target).hardlink_to(self._at(source))

    def symlink(self, target: str, source: str) -> None:
        self._at(target).symlink_to(source)

    def readlink(self, path: str) -> str:
        return str(self._at(path).readlink())

    def mkdir(self, path: str, mode: int) -> None:
        self._at(path).mkdir(mode)

    def rmdir(self, path: str) -> None:
        self._at(path).rmdir()

    def unlink(self, path: str) -> None:
        self._at(path).unlink()

    def chmod(self, path: str, mode: int) -> None:
        self._at(path).chmod(mode)

    # ruff: enable[D102]


def serve(folder: str, point: str, delay: str) -> None:
    """Serve a mounted folder until it is unmounted; print what was asked."""
    slow = SlowFolder(folder, 1e-3 * float(delay))
    mfusepy.FUSE(slow, point, foreground=True, auto_cache=True, default_permissions=True)
    print(json.dumps(slow.asked))


@contextlib.contextmanager
def mounted(folder: Path, point: Path, delay: float) -> Iterator[dict[str, int]]:
    """Mount a folder for a block; what was asked is there when it ends."""
    point.mkdir(exist_ok=True)
    asked: dict[str, int] = {}
    command = [sys.executable, __file__, "--serve", str(folder), str(point), str(delay)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 10.0
        while not os.path.ismount(point):
            if server.poll() is not None or time.monotonic() > until:
                sys.exit(f"{point} cannot be mounted: is there /dev/fuse, and are you root?")
            time.sleep(0.05)
        yield asked
        os.chdir("/")
        call(["fusermount3", "-u", str(point)])
        asked.update(json.loads(server.communicate(timeout=60.0)[0]))
    finally:
        if os.path.ismount(point):
            subprocess.run(["fusermount3", "-uz", str(point)], check=False)
        server.terminate()
        server.wait()


def run(survey: Path, point: Path, command: list[str], delay: float) -> dict[str, float]:
    """Run the survey after its calibration frames; return s, and what was asked of the server."""
    names = ("calexp", "summary", "corners", "warp", "coadd", "depth", "corners.sqlite")
    call(["rm", "-rf", *(str(survey / "results" / name) for name in names)])
    call(["sync"])
    with mounted(survey, point, delay) as asked:
        os.chdir(point)
        cost = cost_of(lambda: call(command))
    return {"wall": cost.wall, "CPU": cost.cpu, **asked}


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--exposures", type=int, default=2)
    parser.add_argument("--ccds", type=int, default=8, help="of each exposure")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--camera", default="demo")
    parser.add_argument("--delays", default="0,5,20", help="ms")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--until", help="only up to this rule, such as exposure")
    arguments = parser.parse_args()
    modes = arguments.modes.split(",")
    until = ["--until", arguments.until] if arguments.until else []
    n_ccds = arguments.exposures * arguments.ccds
    with tempfile.TemporaryDirectory() as folder:
        survey, point = Path(folder) / "disk", Path(folder) / "survey"
        survey.mkdir()
        os.chdir(survey)
        simulate(arguments)
        call(snakemake("fine", arguments.workers, "--until", "defects"))
        print("| delay, ms | mode | wall, s | CPU, s | opened, reads, MB for each CCD |")
        print("|---|---|---|---|---|")
        for delay in map(float, arguments.delays.split(",")):
            found: dict[str, list[dict[str, float]]] = {mode: [] for mode in modes}
            for _ in range(arguments.runs):
                for mode in modes:
                    one = run(survey, point, snakemake(mode, arguments.workers, *until), delay)
                    print(delay, mode, one, file=sys.stderr)
                    found[mode].append(one)
            for mode, runs in found.items():
                of = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
                each = (
                    f"{of['opened'] / n_ccds:.1f}, {of['reads'] / n_ccds:.0f}, "
                    f"{1e-6 * of['bytes'] / n_ccds:.1f}"
                )
                print(f"| {delay:g} | `{mode}` | {of['wall']:.1f} | {of['CPU']:.1f} | {each} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:])
    else:
        main()
