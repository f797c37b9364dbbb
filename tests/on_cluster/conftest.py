"""A survey and a real cluster for the tests of this folder, which run only when they are asked for.

`make test-slurm` and `make test-pbs` name this folder; a plain `pytest` leaves it out.
"""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, missing_programs
from survey import Survey, make_survey


def pytest_ignore_collect(collection_path, config):
    """Leave this folder out unless it is named on the command line."""
    here = Path(__file__).parent.resolve()
    named = (Path(str(word).partition("::")[0]).resolve() for word in config.args)
    return None if any(here in (path, *path.parents) for path in named) else True


def skip_or_fail(why):
    """Skip a test that cannot run here; where it must, fail."""
    if os.environ.get("COADDFLOW_CLUSTER_TESTS") == "required":
        pytest.fail(why)
    pytest.skip(why)


def skip_without(missing, what):
    """Skip a test whose programs are not installed; where they must be, fail."""
    if missing:
        skip_or_fail(f"no {what} here: {', '.join(missing)} not installed")


@pytest.fixture(scope="session")
def cluster():
    """A Slurm of four nodes, for all tests of a session."""
    skip_without(missing_programs(), "Slurm")
    # a runner that is asked to end must not leave a cluster behind
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # a short name: sockets are in it
    folder = Path(tempfile.mkdtemp(prefix="cf-slurm-", dir="/tmp"))
    cluster = SlurmCluster(folder, nodes=4, cpus=4)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """A simulated survey of 4 exposures of a camera of 6 CCDs, ready to run."""
    folder = tmp_path_factory.mktemp("raw")
    make_survey(folder)
    return folder


@pytest.fixture(scope="session")
def undisturbed(cluster, raw, tmp_path_factory):
    """The survey, run on Slurm from raw frames to coadds, and when it began."""
    survey = Survey(tmp_path_factory.mktemp("undisturbed") / "survey", cluster)
    survey.copy_raw(raw)
    survey.first = survey.run()
    survey.first.check()
    survey.made, survey.told = survey.products(), survey.status()
    return survey


@pytest.fixture
def copy_of_survey(cluster, undisturbed, tmp_path):
    """Return a function that copies the finished survey, with exposures still to be done."""
    copies = []

    def copy(name="survey", to_do=("1001", "1002")):
        made = Survey(tmp_path / name, cluster, to_do=to_do)
        shutil.copytree(undisturbed.folder, made.folder, symlinks=True)
        shutil.rmtree(made.folder / ".snakemake" / "log")
        for exposure in to_do:
            made.forget(exposure)
        copies.append(made)
        return made

    yield copy
    for made in copies:
        made.end()


@pytest.fixture
def survey(copy_of_survey):
    """A copy of the finished survey in which two exposures are still to be done."""
    return copy_of_survey()


@pytest.fixture
def one(copy_of_survey):
    """A copy of the finished survey in which one exposure is still to be done."""
    return copy_of_survey(to_do=("1001",))
