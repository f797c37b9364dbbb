"""Compiled functions are kept where only this user can write, and compiled by one process."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from coaddflow import compiled
from coaddflow.warp import resample

FUNCTION = """
from coaddflow.compiled import njit

@njit()
def half(x):
    return x / 2

@njit()
def twice(x):
    return 4 * half(x)
"""
PROGRAM = "import doubled; print(doubled.twice(21), len(doubled.twice.stats.cache_hits))"
COMPILED, FOUND = "42.0 0\n", "42.0 1\n"


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a process which calls a compiled function.

    The folder of its module, like HOME, cannot be written to.
    """
    package = tmp_path / "package"
    package.mkdir()
    (package / "doubled.py").write_text(FUNCTION)
    (package / "__pycache__").touch()  # so that nobody can make the folder, not even root
    survey = tmp_path / "survey"
    survey.mkdir()
    source = Path(sys.modules["coaddflow"].__file__).parents[1]

    def start(program=PROGRAM, **environment):
        nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null", "NUMBA_CACHE_DIR": ""}
        paths = {"PYTHONPATH": f"{package}{os.pathsep}{source}"}
        return subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=survey,
            env=os.environ | nowhere | paths | environment,
            stdout=subprocess.PIPE,
            text=True,
        )

    return start


def answer(process):
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    return output


@pytest.mark.parametrize("variable", ["NUMBA_CACHE_DIR", "XDG_CACHE_HOME"])
def test_what_is_compiled_is_found_again_where_the_user_says(start, tmp_path, variable):
    folder = tmp_path / "caches" / "mine"
    assert answer(start(**{variable: str(folder)})) == COMPILED
    assert answer(start(**{variable: str(folder)})) == FOUND
    assert len(list(folder.rglob("*.nbi"))) == 2


def test_it_is_kept_in_the_survey_where_nothing_else_can_be_written(start, tmp_path):
    (tmp_path / "survey" / ".snakemake").mkdir()
    assert answer(start()) == COMPILED
    assert answer(start()) == FOUND
    kept = tmp_path / "survey" / ".snakemake" / "coaddflow" / "compiled"
    assert kept.stat().st_mode & 0o777 == 0o700
    assert list(kept.rglob("*.nbi"))


@pytest.mark.parametrize("who", ["anybody", "a link"])
def test_a_folder_that_others_could_write_is_not_used(who, start, tmp_path):
    folder = tmp_path / "survey" / ".snakemake" / "coaddflow"
    folder.mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    if who == "a link":
        (folder / "compiled").symlink_to(other)
    else:
        (folder / "compiled").mkdir()
        (folder / "compiled").chmod(0o777)
    assert answer(start()) == COMPILED
    assert not list(tmp_path.rglob("*.nbi"))


def test_elsewhere_nothing_is_left_behind(start, tmp_path):
    assert answer(start()) == COMPILED
    assert not list((tmp_path / "survey").iterdir())


def test_of_processes_that_start_together_one_compiles(start, tmp_path):
    processes = [start(XDG_CACHE_HOME=str(tmp_path / "cache")) for _ in range(4)]
    assert sorted(answer(process) for process in processes) == [COMPILED, FOUND, FOUND, FOUND]


def test_a_process_that_was_killed_while_it_compiled_stops_nobody(start, tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert answer(start(**cache)) == COMPILED
    (lock,) = (tmp_path / "cache").rglob("lock")
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_EX);"
            "print('held', flush=True); time.sleep(100)",
            lock,
        ],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    waiting = start(**cache)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(5)
    holder.kill()
    holder.communicate()
    assert answer(waiting) == FOUND


def test_nobody_waits_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_patience", 0.01)
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with compiled._locked(tmp_path / "lock"):
            assert compiled._patience == 0.0  # nor again and again


def test_where_all_is_compiled_nobody_waits(start, tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert answer(start(**cache)) == COMPILED
    (lock,) = (tmp_path / "cache").rglob("lock")
    lock.with_name("complete").touch()
    with lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert answer(start(**cache)) == FOUND


@pytest.mark.skipif(
    numba.version_info[:2] not in compiled._TRIED, reason="not tried with this version of numba"
)
def test_the_compiler_gets_ready_only_when_it_is_needed(start, tmp_path):
    """It reads parts of scipy, which takes half a second; afterwards it works as ever."""
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert answer(start(**cache)) == COMPILED
    program = "\n".join(
        [
            "import sys, numpy, doubled",
            "print(doubled.twice(21), 'scipy.linalg' in sys.modules)",
            "print(doubled.twice(numpy.array([1.0, 2.0])).sum(), 'scipy.linalg' in sys.modules)",
            "print(len(doubled.twice.stats.cache_hits), len(doubled.twice.stats.cache_misses))",
        ]
    )
    assert answer(start(program, **cache)) == "42.0 False\n6.0 True\n1 1\n"
    assert answer(start(program, **cache)) == "42.0 False\n6.0 False\n2 0\n"


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_what_is_damaged_is_compiled_again(start, tmp_path, suffix):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert answer(start(**cache)) == COMPILED
    for path in (tmp_path / "cache").rglob(f"*.{suffix}"):
        path.write_bytes(path.read_bytes()[:100])
    assert answer(start(**cache)) == COMPILED
    assert answer(start(**cache)) == FOUND


def test_a_full_disk_only_keeps_nothing(start, tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert answer(start(**cache)) == COMPILED
    (folder,) = {path.parent for path in (tmp_path / "cache").rglob("*.nbi")}
    shutil.rmtree(folder)
    folder.touch()  # nothing can be written there, not even by root
    assert answer(start(**cache)) == COMPILED


def test_a_changed_function_of_another_file_is_seen(start, tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    package = tmp_path / "package"
    text, _, rest = FUNCTION.partition("@njit()\ndef twice")
    (package / "halves.py").write_text(text)
    (package / "doubled.py").write_text(
        f"from coaddflow.compiled import njit\nfrom halves import half\n\n@njit()\ndef twice{rest}"
    )
    assert answer(start(**cache)) == COMPILED
    assert answer(start(**cache)) == FOUND
    (package / "halves.py").write_text(text.replace("x / 2", "x / 4"))
    assert answer(start(**cache)) == "21.0 0\n"


def test_what_has_been_compiled_depends_on_all_files_of_its_package():
    """Constants of other files are compiled into a function, which does not call anything there."""
    files = compiled._sources[resample._sort_pixels.py_func]
    assert {Path(path).name for path in files} >= {"resample.py", "windows.py", "kernels.py"}
