"""A survey and a real cluster for the tests of this folder, which run only when they are asked for.

`make test-slurm` and `make test-pbs` name this folder; a plain `pytest` leaves it out.
"""

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from slurm_cluster import SlurmCluster, missing_programs
from survey import Survey, make_survey

import coaddflow


def pytest_ignore_collect(collection_path, config):
    """Leave this folder out unless it is named on the command line."""
    return None if any("cluster" in str(word) for word in config.args) else True


@pytest.fixture(scope="session")
def cluster():
    """A Slurm of four nodes, for all tests of a session."""
    missing = missing_programs()
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not installed")
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
    camera = yaml.safe_load(
        (Path(coaddflow.__file__).parent / "cameras" / "mini.yaml").read_text(encoding="utf-8")
    )
    camera["detectors"] += [
        {"id": 4, "name": "SSE", "extension": "CCD4", "center": [-2.475, -7.425]},
        {"id": 5, "name": "SSW", "extension": "CCD5", "center": [2.475, -7.425]},
    ]
    make_survey(folder, {**camera, "name": "six"})
    return folder


@pytest.fixture(scope="session")
def undisturbed(cluster, raw, tmp_path_factory):
    """The survey, run on Slurm from raw frames to coadds, and when it began."""
    survey = Survey(tmp_path_factory.mktemp("undisturbed") / "survey", cluster)
    survey.copy_raw(raw)
    survey.first = survey.run()
    survey.first.check()
    return survey


@pytest.fixture
def survey(cluster, undisturbed, tmp_path):
    """A copy of the finished survey in which two exposures are still to be done."""
    copy = Survey(tmp_path / "survey", cluster)
    shutil.copytree(undisturbed.folder, copy.folder, symlinks=True)
    for exposure in copy.to_do:
        copy.forget(exposure)
    yield copy
    copy.end()
