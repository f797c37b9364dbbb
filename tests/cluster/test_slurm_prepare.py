"""What a run on a cluster does before it submits anything."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from coaddflow.cluster import slurm as cluster
from coaddflow.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Return a function that sets what squeue prints: a list of answers, the last one stays."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(cluster, "PAUSE", 0.01)

    def answers(*texts):
        for i, text in enumerate(texts):
            (folder / f"answer.{i}").write_text(text)
        last = len(texts) - 1
        program = (
            f"#!/bin/sh\ncd {folder}\nn=$(cat count 2>/dev/null || echo 0)\n"
            f"[ $n -gt {last} ] && n={last}\necho $((n+1)) >count\n"
            "grep -q '^error' answer.$n && { cat answer.$n >&2; exit 1; }\ncat answer.$n\n"
        )
        (folder / "squeue").write_text(program)
        (folder / "squeue").chmod(0o755)

    return answers


def line(folder, state="RUNNING", comment="rule_exposure_1001_calexp_manifest"):
    return f"12|0b7c|{state}|{comment}|{folder}\n"


def test_allocation_is_read_from_the_environment():
    environ = {"SLURM_CPUS_PER_TASK": "4", "SLURM_MEM_PER_NODE": "3712"}
    assert cluster.allocation(environ) == {"_cores": 4, "mem_mb": 3712}


def test_without_slurm_nothing_is_limited():
    assert cluster.allocation({"SLURM_CPUS_PER_TASK": "all"}) == {}


def test_a_job_of_mpi_gets_its_allocation_back():
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "4,1"}
    told = dict(environ)
    assert not cluster.hand_down_allocation(environ), "this is the first Snakemake of the job"
    for name in ("SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"):
        del environ[name]  # as the executor does
    assert cluster.hand_down_allocation(environ)
    assert environ.items() >= told.items()


def test_a_step_of_a_job_keeps_what_slurm_says_of_the_step():
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    cluster.hand_down_allocation(environ)
    environ["SLURM_JOB_NODELIST"] = "n1"
    assert cluster.hand_down_allocation(environ)
    assert environ["SLURM_JOB_NODELIST"] == "n1"


def test_the_allocation_of_another_job_is_not_taken_over():
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    cluster.hand_down_allocation(environ)
    other = {**environ, "SLURM_JOB_ID": "8"}
    del other["SLURM_JOB_NODELIST"]
    assert not cluster.hand_down_allocation(other)
    assert "SLURM_JOB_NODELIST" not in other


def test_only_jobs_of_snakemake_in_this_folder_count(squeue, tmp_path):
    other = tmp_path / "other | survey"
    squeue(line(tmp_path) + line(other) + line(tmp_path, comment="(null)"))
    (job,) = cluster.earlier_jobs(tmp_path)
    assert job == ("12", "0b7c", "exposure_1001_calexp_manifest", "RUNNING")


def test_earlier_jobs_are_waited_for(squeue, tmp_path):
    squeue(line(tmp_path), line(tmp_path), "")
    said = []
    cluster.wait_for_earlier_jobs(tmp_path, said.append)
    assert len(said) == 1, "once, not at each question"
    assert "exposure_1001" in said[0]
    assert "scancel --name 0b7c" in said[0]


def test_controller_away_is_no_proof_that_no_job_lives(squeue, tmp_path):
    squeue(line(tmp_path), "error: Unable to contact slurm controller\n", line(tmp_path), "")
    said = []
    cluster.wait_for_earlier_jobs(tmp_path, said.append)
    assert "does not answer" in said[1]
    assert (tmp_path / "bin" / "count").read_text().strip() == "4"


def test_controller_that_stays_away_stops_the_run(squeue, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 0.1)
    squeue("error: down\n")
    with pytest.raises(InputError, match="does not say"):
        cluster.wait_for_earlier_jobs(tmp_path, lambda text: None)


def run_on_slurm(folder, **changes):
    """Return what Snakemake says about a run that submits to Slurm."""
    run = {
        "executor_plugin": SimpleNamespace(name="slurm"),
        "executor_settings": SimpleNamespace(status_command="squeue"),
        "execution_settings": SimpleNamespace(lock=True),
        "is_main_process": True,
        "local_exec": False,
        "basedir": str(ROOT),
        "main_snakefile": str(ROOT / "Snakefile"),
        "configfiles": [folder / "config.yaml"],
    }
    return SimpleNamespace(**(run | changes))


@pytest.fixture
def scontrol(tmp_path):
    """Return a function that sets for how long Slurm remembers jobs."""

    def remembers(text):
        program = tmp_path / "bin" / "scontrol"
        program.write_text(
            f"#!/bin/sh\n[ \"$1 $2\" = 'show config' ] && echo 'MinJobAge  = {text}'\n"
        )
        program.chmod(0o755)

    return remembers


def test_single_products_are_refused_while_jobs_live(squeue, scontrol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scontrol("300 sec")
    squeue("error: down\n", line(tmp_path), "")
    with pytest.raises(InputError, match="earlier run"):
        cluster.begin(run_on_slurm(tmp_path))
    cluster.begin(run_on_slurm(tmp_path))


def test_every_run_finds_the_patient_sbatch_first(squeue, scontrol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scontrol("300 sec")
    squeue("")
    path = os.environ["PATH"]
    for ready in (cluster.prepare, cluster.begin, cluster.prepare):
        ready(run_on_slurm(tmp_path))
        assert shutil.which("sbatch") == str(ROOT / "profiles" / "slurm" / "bin" / "sbatch")
    assert os.environ["PATH"].endswith(path)
    assert len(os.environ["PATH"].split(os.pathsep)) == len(path.split(os.pathsep)) + 1


def test_other_runs_keep_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = os.environ["PATH"]
    cluster.prepare(run_on_slurm(tmp_path, local_exec=True))
    cluster.begin(run_on_slurm(tmp_path, local_exec=True))
    cluster.prepare(run_on_slurm(tmp_path, is_main_process=False))
    pbs = {"executor_plugin": SimpleNamespace(name="cluster-generic")}
    cluster.prepare(run_on_slurm(tmp_path, **pbs, executor_settings=None))
    assert os.environ["PATH"] == path


@pytest.mark.parametrize("text", ["30 sec", "0 sec"])
def test_slurm_that_forgets_jobs_too_soon_is_refused(squeue, scontrol, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    scontrol(text)
    squeue("")
    with pytest.raises(InputError, match="MinJobAge"):
        cluster.prepare(run_on_slurm(tmp_path))
    accounting = SimpleNamespace(status_command="sacct")
    cluster.prepare(run_on_slurm(tmp_path, executor_settings=accounting))
    scontrol("unknown")
    cluster.prepare(run_on_slurm(tmp_path))


@pytest.mark.parametrize("name", ["a $HOME", "a `b`", 'a "b"', "a\\b", "a\nb"])
def test_folders_that_a_shell_would_change_are_refused(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(InputError, match="shell"):
        cluster.prepare(run_on_slurm(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="Snakefile"):
        cluster.prepare(run_on_slurm(tmp_path, main_snakefile=f"/x/{name}/Snakefile"))


def test_jobs_are_found_whatever_a_user_has_set_for_squeue(squeue, tmp_path, monkeypatch):
    squeue(line(tmp_path))
    program = tmp_path / "bin" / "squeue"
    program.write_text(program.read_text().replace("\ncd", "\nenv | grep SQUEUE_ && exit 1\ncd"))
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert len(cluster.earlier_jobs(tmp_path)) == 1


def test_a_folder_counts_by_what_it_is_not_by_its_name(squeue, tmp_path):
    (tmp_path / "a" / "survey").mkdir(parents=True)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    squeue(line(tmp_path / "b" / "survey") + line(tmp_path / "gone" / "survey"))
    assert len(cluster.earlier_jobs(tmp_path / "a" / "survey")) == 1


def test_comments_of_others_may_have_line_breaks(squeue, tmp_path):
    squeue(f"11|x|RUNNING|a\nb|/home\n{line(tmp_path)}")
    assert [job.job_id for job in cluster.earlier_jobs(tmp_path)] == ["12"]


def test_locked_folder_is_left_to_snakemake(squeue, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workflow = SimpleNamespace(execution_settings=SimpleNamespace(lock=True))
    assert not cluster.is_locked(workflow)
    Path(".snakemake/locks").mkdir(parents=True)
    assert not cluster.is_locked(workflow)
    Path(".snakemake/locks/0.input.lock").touch()
    assert cluster.is_locked(workflow)


def test_programs_of_a_profile_are_found_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "code" / "profiles").mkdir(parents=True)
    (tmp_path / "code" / "profiles" / "submit.py").touch()
    (tmp_path / "survey").mkdir()
    monkeypatch.chdir(tmp_path / "survey")
    settings = SimpleNamespace(submit_cmd="profiles/submit.py", status_cmd="qstatus", other=1)
    cluster.make_programs_absolute(settings, tmp_path / "code")
    assert settings.submit_cmd == str(tmp_path / "code" / "profiles" / "submit.py")
    assert settings.status_cmd == "qstatus"


def test_programs_of_a_profile_are_relative_to_where_snakemake_was_called(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "submit.py").touch()
    (tmp_path / "survey").mkdir()
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.chdir(tmp_path / "survey")
    settings = SimpleNamespace(submit_cmd="mine/submit.py")
    cluster.make_programs_absolute(settings, tmp_path / "code")
    assert settings.submit_cmd == str(tmp_path / "mine" / "submit.py")
