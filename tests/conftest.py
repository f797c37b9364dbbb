"""Fixtures that several test files share."""

import shutil
import signal
import subprocess
import sys

import pytest
from survey_run import COARSE, REPOSITORY, Survey, environment

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # as in the background of a shell; what the tests start would inherit it and be deaf to Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def raw_survey(tmp_path_factory):
    """The simulated survey of configs/test-survey.yaml, ingested; nothing has run."""
    pytest.importorskip("galsim", reason="the simulator needs the extra `simulate`")
    survey = Survey(tmp_path_factory.mktemp("survey") / "raw")
    survey.folder.mkdir()
    program = [sys.executable, "-m", "coaddflow"]
    settings = str(REPOSITORY / "configs" / "test-survey.yaml")
    survey.write_settings()
    for arguments in (["simulate", settings, "data"], ["ingest", "data/raw"]):
        subprocess.run([*program, *arguments], cwd=survey.folder, check=True, capture_output=True)
    shutil.rmtree(survey / "data" / "truth")
    return survey


@pytest.fixture(scope="session")
def compiled_ahead(tmp_path_factory):
    """What `coaddflow compile` says, the folder of what it compiled, and the files in it."""
    folder = tmp_path_factory.mktemp("compiled")
    command = [sys.executable, "-m", "coaddflow", "compile"]
    ended = subprocess.run(
        command, check=True, env=with_compiled(folder), capture_output=True, text=True
    )
    return ended.stdout, folder, sorted(folder.rglob("*.nb?"))


def with_compiled(folder):
    """Return the environment of a run that finds its functions compiled in a folder."""
    return environment() | {"NUMBA_CACHE_DIR": str(folder)}


@pytest.fixture(scope="session")
def finished_survey(raw_survey, compiled_ahead, tmp_path_factory):
    """The survey, run from raw frames to coadds without disturbance. Not to be changed."""
    survey = raw_survey.copy_to(tmp_path_factory.mktemp("finished") / "survey")
    run = survey.run(env=with_compiled(compiled_ahead[1]))
    assert run.returncode == 0, run.text
    return survey


@pytest.fixture(scope="session")
def coarse_survey(raw_survey, compiled_ahead, tmp_path_factory):
    """The survey, run with one job an exposure and a tract. Not to be changed."""
    survey = raw_survey.copy_to(tmp_path_factory.mktemp("coarse") / "survey")
    survey.write_settings(**COARSE)
    run = survey.run(env=with_compiled(compiled_ahead[1]))
    assert run.returncode == 0, run.text
    survey.first_run = run
    return survey


@pytest.fixture
def survey(finished_survey, tmp_path):
    """A copy of the finished survey, which a test may change."""
    return finished_survey.copy_to(tmp_path / "survey")
