"""Compiled functions are cached where only this user can write, and work where nobody can."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FUNCTION = """
from coaddflow.compiled import njit

@njit()
def twice(x):
    return 2 * x
"""


def call(tmp_path):
    """Compile and call a function whose folder, like HOME, cannot be written to."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "doubled.py").write_text(FUNCTION)
    (package / "__pycache__").touch()  # so that nobody can make the folder, not even root
    survey = tmp_path / "survey"
    survey.mkdir(exist_ok=True)
    source = Path(sys.modules["coaddflow"].__file__).parents[1]
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null"}
    environment = os.environ | nowhere | {"PYTHONPATH": f"{package}{os.pathsep}{source}"}
    program = [sys.executable, "-c", "import doubled; print(doubled.twice(21))"]
    return subprocess.run(
        program, cwd=survey, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_the_cache_is_in_the_survey_where_nothing_else_can_be_written(tmp_path):
    (tmp_path / "survey" / ".snakemake").mkdir(parents=True)
    assert call(tmp_path) == "42\n"
    cache = tmp_path / "survey" / ".snakemake" / "coaddflow" / "numba"
    assert cache.stat().st_mode & 0o777 == 0o700
    assert list(cache.rglob("*.nbi"))


@pytest.mark.parametrize("who", ["anybody", "a link"])
def test_a_cache_that_others_could_write_is_not_used(who, tmp_path):
    folder = tmp_path / "survey" / ".snakemake" / "coaddflow"
    folder.mkdir(parents=True)
    other = tmp_path / "other"
    other.mkdir()
    if who == "a link":
        (folder / "numba").symlink_to(other)
    else:
        (folder / "numba").mkdir()
        (folder / "numba").chmod(0o777)
    assert call(tmp_path) == "42\n"
    assert not list(tmp_path.rglob("*.nbi"))


def test_elsewhere_nothing_is_left_behind(tmp_path):
    assert call(tmp_path) == "42\n"
    assert not list((tmp_path / "survey").iterdir())
