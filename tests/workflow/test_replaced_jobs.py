"""A job of Snakemake that a newer one has replaced changes nothing, and says so."""

import itertools
import subprocess
import sys
from types import SimpleNamespace

import pytest
from survey_run import environment

from coaddflow import fence
from coaddflow.fence import FOLDER, Fence, begin
from coaddflow.files import atomic_path
from coaddflow.workflow.stage import stage
from coaddflow.workflow.stages import STAGES

SNAKEFILE = """
import os
from coaddflow import fence
from coaddflow.workflow import snakemake_patches

if config.get("patched"):
    snakemake_patches.stop_replaced_jobs()

rule all:
    input: "first/0.txt", "second/0.txt"

rule picture:
    output: "first/{tract}.txt"
    shell: "echo first >{output}"

rule depth:
    input: "first/{tract}.txt"
    output: "second/{tract}.txt"
    shell: "echo older >>{output}; %s; exit 1"
"""

NEW_JOB = "printf 'now\\tnewer job\\n' >>.snakemake/coaddflow/tokens/depth_{wildcards.tract}.ecsv"


NAMES = {
    "exposure": "1001",
    "ccd": "3",
    "band": "r",
    "tract": "7",
    "patch": "2_4",
    "frames": "bias",
}
"""A value of each wildcard of the rules."""


def test_jobs_that_make_the_same_have_the_same_token():
    """A zombie may be of a run with the other granularity."""
    makers = {}
    for one in STAGES.values():
        makers.setdefault(one.products[0].path, set()).add(one.token(NAMES))
    assert all(len(tokens) == 1 for tokens in makers.values()), makers
    assert STAGES["manifest"].token(NAMES) == STAGES["exposure"].token(NAMES) == "summary_1001.ecsv"


def test_jobs_that_may_run_side_by_side_do_not_share_a_token():
    """Steps of a group that do not depend on each other can be jobs of their own."""
    promises = {one.products[0].path for one in STAGES.values()}
    assert len({one.token(NAMES) for one in STAGES.values()}) == len(promises)
    for name, wildcard in (("master_flat", "band"), ("warp", "exposure"), ("calexp", "ccd")):
        token = STAGES[name].token
        assert token(NAMES) != token(NAMES | {wildcard: "x"}), name


def test_units_do_not_share_a_token():
    jobs = itertools.product(("1001", "1002"), ("r", "g"), ("7", "8"))
    found = {
        STAGES[name].token({"exposure": exposure, "band": band, "tract": tract})
        for exposure, band, tract in jobs
        for name in ("exposure", "tract")
    }
    assert len(found) == 2 + 4


def script(tract="7"):
    """Return what Snakemake gives to the script of a stage."""
    return SimpleNamespace(
        rule="depth",
        input=None,
        output=None,
        params=None,
        wildcards={"tract": tract},
        config={},
        threads=1,
        log=["depth.log"],
    )


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The token of a job, in a survey's folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(fence.VARIABLE, "older job")
    return Fence(str(FOLDER / "depth_7.ecsv"), "older job")


def test_script_that_is_replaced_while_it_works_writes_nothing_more(job, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop, stage(script()):
        for number in range(2):
            with atomic_path(tmp_path / f"{number}.fits") as temporary:
                temporary.write_text("x")
            begin(job._replace(job="newer job"))
    assert stop.value.code == 1
    assert sorted(path.name for path in tmp_path.glob("*.fits")) == ["0.fits"]
    assert "older job stops: newer job works on depth_7.ecsv now" in capsys.readouterr().err
    assert fence.active_fence() is None


def test_script_of_a_replaced_job_does_not_begin(job, tmp_path):
    begin(job)
    begin(job._replace(job="newer job"))
    (tmp_path / "depth.log").write_text("of the newer job")
    with pytest.raises(SystemExit, match=r"newer job works on depth_7\.ecsv now"), stage(script()):
        raise AssertionError("it has begun")
    assert (tmp_path / "depth.log").read_text() == "of the newer job"
    with stage(script("8")):
        (tmp_path / "other").touch()
    assert (tmp_path / "other").exists(), "another tract is not concerned"


def test_resumed_job_takes_the_token_over(job, tmp_path, monkeypatch):
    begin(job)
    monkeypatch.setenv(fence.VARIABLE, "resumed job")
    with stage(script()), atomic_path(tmp_path / "0.fits") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "0.fits").exists()
    assert fence.is_replaced(job)


def run_snakemake(folder, snakefile, *, patched):
    (folder / "Snakefile").write_text(snakefile)
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--quiet", "rules"]
    command += ["--config", "patched=1"] if patched else []
    return subprocess.run(
        command,
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        env={**environment(), fence.VARIABLE: "older job"},
    )


@pytest.mark.parametrize("patched", [False, True])
def test_snakemake_of_a_replaced_job_removes_what_is_there_unless_it_looks(tmp_path, patched):
    done = run_snakemake(tmp_path, SNAKEFILE % NEW_JOB.replace("\\", "\\\\"), patched=patched)
    assert done.returncode == 1
    # the newer job has meanwhile made it
    assert (tmp_path / "second" / "0.txt").exists() == patched, done.stderr


@pytest.mark.parametrize("patched", [False, True])
def test_snakemake_of_a_replaced_job_begins_nothing_unless_it_does_not_look(tmp_path, patched):
    token = Fence(str(tmp_path / FOLDER / "coadd_0.png"), "older job")
    begin(token)
    begin(token._replace(job="newer job"))
    done = run_snakemake(tmp_path, SNAKEFILE % "touch begun", patched=patched)
    assert done.returncode == 1
    assert (tmp_path / "begun").exists() != patched
    assert ("newer job works on coadd_0.png now" in done.stderr) == patched
