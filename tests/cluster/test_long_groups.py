"""A group of thousands of steps reaches Slurm: no argument of a command is too long."""

import json
import logging
import os
import re
import sys
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace

import pytest
from snakemake_interface_executor_plugins.utils import encode_target_jobs_cli_args, format_cli_arg

from coaddflow.cluster import slurm

pytest.importorskip("snakemake_executor_plugin_slurm")
from snakemake_executor_plugin_slurm import Executor, ExecutorSettings

MAX_ARG_STRLEN = 131072
"""Bytes of one argument of a program on Linux, with the zero at its end."""

EXPOSURES = 4000

SBATCH = f"""#!{sys.executable}
import json, sys
script = sys.stdin.read() if "/dev/stdin" in sys.argv else ""
with open("submitted.json", "w") as stream:
    json.dump([sys.argv, script], stream)
print(12)
"""


class Resources(UserDict):
    """Resources of a job, by name and as attributes."""

    __getattr__ = UserDict.__getitem__


def tract_of(n_exposures):
    """Return a group of the warps of many exposures on a tract, as Snakemake submits it."""
    steps = [
        SimpleNamespace(
            rulename="warp", wildcards_dict={"tract": "0", "exposure": f"c4d_210101_{number}_ooi"}
        )
        for number in range(n_exposures)
    ]
    return SimpleNamespace(
        name="tract_0_warp",
        jobid="0-1",
        threads=1,
        is_group=lambda: True,
        get_target_spec=lambda: steps,
        resources=Resources(
            slurm_account="", slurm_partition="main", mem_mb=100, runtime=10, slurm_extra=""
        ),
    )


class Submitting(Executor):
    """The executor for Slurm without the rest of Snakemake."""

    def __init__(self, workflow):
        self.workflow, self.logger = workflow, logging.getLogger("test")
        self.run_uuid, self.slurm_logdir = "run", Path("logs").resolve()
        self._failed_nodes, self._partitions, self._fallback_account_arg = set(), None, ""
        self._submitted_job_clusters, self._main_event_loop = set(), None
        self.submitted, self.errors = [], []

    def format_job_exec(self, job):
        targets = format_cli_arg(
            "--target-jobs", encode_target_jobs_cli_args(job.get_target_spec())
        )
        return f"python -m snakemake {targets} {self.additional_general_args()}"

    def report_job_submission(self, job_info):
        self.submitted.append(job_info.external_jobid)

    def report_job_error(self, job_info, msg=None):
        self.errors.append(msg)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """What a run that has begun knows, in a folder with an sbatch that keeps what it is given."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return SimpleNamespace(
        executor_settings=ExecutorSettings(status_command="sacct"),
        executor_plugin=SimpleNamespace(name="slurm"),
        main_snakefile="Snakefile",
        basedir=str(tmp_path),
        configfiles=[],
        workdir_init=str(tmp_path),
    )


def test_a_tract_of_thousands_of_exposures_is_lost_if_its_command_is_one_argument(run):
    executor = Submitting(run)
    # of a group the executor cannot even say that it has failed
    with pytest.raises(AttributeError):
        executor.run_job(tract_of(EXPOSURES))
    assert executor.submitted == []


def test_a_tract_of_thousands_of_exposures_is_submitted(run):
    slurm.prepare_cluster(run)
    executor = Submitting(run)
    executor.run_job(tract_of(EXPOSURES))
    assert executor.submitted == ["12"]
    arguments, script = json.loads(Path("submitted.json").read_text())
    assert max(len(argument.encode()) for argument in arguments) < MAX_ARG_STRLEN < len(script)
    assert len(set(re.findall(r"exposure=c4d_210101_(\d+)_ooi", script))) == EXPOSURES
    words = script.split()
    assert max(map(len, words)) < MAX_ARG_STRLEN
    assert "--slurm-jobstep-pass-command-as-script" in words, "the job starts its step likewise"
