"""What is replaced in Snakemake is still needed: each test shows the trouble without it.

When one fails after an update of Snakemake, look whether the replacement can go.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import snakemake.api  # noqa: F401 - first: its modules import each other
from snakemake.dag import DAG
from snakemake.jobs import GroupJob, Job
from snakemake_interface_executor_plugins.executors.base import AbstractExecutor
from survey_run import environment

from coaddflow.runtime.log import FAILED, FOR_GOOD
from coaddflow.workflow import snakemake_patches

SNAKEFILE = """
import sys, time
from coaddflow.workflow import snakemake_patches
from coaddflow.workflow.retries import Retries

if config.get("patched"):
    snakemake_patches.retry_only_what_may_succeed(Retries(time.time() - 1))

rule made:
    output: "made.txt"
    log: "made.log"
    retries: 2
    shell: "echo begun >>attempts.txt; printf '%s' >{log}; false"
"""

COUNTED = """
import json
from collections import Counter
from coaddflow.workflow import snakemake_patches
from snakemake.dag import DAG
from snakemake.scheduling.job_scheduler import JobScheduler

COUNTS = Counter()

def counted(owner, name):
    original = getattr(owner, name)

    def method(self):
        COUNTS[name] += 1
        return original(self)

    setattr(owner, name, method)

counted(DAG, "_check_groups")
counted(JobScheduler, "_finish_jobs")
if config.get("patched"):
    snakemake_patches.check_groups_once()

onstart:
    if config.get("patched"):
        snakemake_patches.lift_default_rate_limit(workflow)

onsuccess:
    with open("counts.json", "w") as stream:
        json.dump(COUNTS, stream)

rule all:
    input: "0.txt", "1.txt", "2.txt"

rule made:
    output: "{n}.txt"
    group: "g"
    shell: "sleep 0.7; touch {output}"
"""
"""Four jobs, one after the other on one core. The scheduler begins each look at the waiting jobs
with `_finish_jobs`."""


@pytest.fixture(scope="module", params=[False, True], ids=["unpatched", "patched"])
def patched(request):
    return request.param


@pytest.fixture(scope="module")
def counts(patched, tmp_path_factory):
    """How often a run of four jobs did what the replacements save it."""
    folder = tmp_path_factory.mktemp("counts")
    run_snakemake(folder, COUNTED, patched)
    return json.loads((folder / "counts.json").read_text())


def command_of(folder, snakefile, patched, *options):
    """Write a workflow; return the command that runs it, with replacements or without."""
    (folder / "Snakefile").write_text(snakefile)
    command = [sys.executable, "-m", "snakemake", *options]
    return [*command, "--config", "patched=1"] if patched else command


def run_snakemake(folder, snakefile, patched):
    """Run a workflow on one core, with replacements or without."""
    command = command_of(folder, snakefile, patched, "--cores", "1", "--quiet", "all")
    subprocess.run(command, cwd=folder, check=False, capture_output=True, env=environment())


class Counting(dict):
    """A dictionary that counts how often it is asked."""

    asked = 0

    def __getitem__(self, key):
        self.asked += 1
        return super().__getitem__(key)


def looks_for_groups(n_before, size):
    """Return how often the second look asks for dependencies: a group after a chain of jobs."""
    before = [f"before {i}" for i in range(n_before)]
    group = [f"in group {i}" for i in range(size)]
    dependencies = Counting({job: before[i - 1 : i] for i, job in enumerate(before) if i})
    dependencies[before[0]] = []
    dependencies |= {job: before[-1:] for job in group}
    DAG._check_groups(SimpleNamespace(_group={"g": set(group)}, _dependencies=dependencies))
    return dependencies.asked


def test_the_second_look_for_groups_takes_the_product_of_group_and_jobs():
    assert looks_for_groups(100, 20) > 20 * 100


def test_a_run_looks_for_groups_twice_unless_the_second_look_is_left_out(patched, counts):
    assert counts.get("_check_groups", 0) == (0 if patched else 1)


PLANNED = """
import atexit, inspect, json
from collections import Counter
from coaddflow.workflow import snakemake_patches
from snakemake import script

COUNTS = Counter()

def counted(owner, name):
    original = getattr(owner, name)

    def function(*arguments, **options):
        COUNTS[name] += 1
        return original(*arguments, **options)

    setattr(owner, name, function)

def write_counts():
    with open("counts.json", "w") as stream:
        json.dump(COUNTS, stream)

counted(inspect, "signature")
counted(script, "get_source")
if config.get("patched"):
    snakemake_patches.look_at_functions_once()
    snakemake_patches.look_for_scripts_once()
atexit.register(write_counts)

rule all:
    input: [f"{n}.txt" for n in range(int(config["jobs"]))]

rule made:
    input: lambda wildcards: []
    output: "{n}.txt"
    params: number=lambda wildcards: wildcards.n
    resources: mem_mb=lambda wildcards: 10
    script: "made.py"
"""


def looks_of_plan(folder, patched, n_jobs):
    """Return how often planning of some jobs looked at functions, and for the script."""
    (folder / "made.py").touch()
    command = command_of(folder, PLANNED, patched, "-n", "--config", f"jobs={n_jobs}")
    command = [*command[:-2], "patched=1"] if patched else command
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "counts.json").read_text())


def test_functions_and_scripts_are_looked_at_for_each_job_unless_once_is_enough(patched, tmp_path):
    few, many = (looks_of_plan(tmp_path, patched, n) for n in (2, 12))
    for name, least in (("signature", 3), ("get_source", 1)):
        if patched:
            assert many[name] == few[name]
        else:
            assert many[name] - few[name] >= 10 * least


def test_failures_for_good_are_repeated_unless_the_log_is_asked(tmp_path, patched):
    result = f"{FOR_GOOD}\\n{FAILED}too many failed CCDs\\n"
    run_snakemake(tmp_path, SNAKEFILE % result, patched)
    assert (tmp_path / "attempts.txt").read_text().split() == ["begun"] * (1 if patched else 3)
    assert isinstance(Job.restart_times, property)
    assert isinstance(GroupJob.restart_times, property)


TAKEN_AWAY = """
from coaddflow.workflow import snakemake_patches

if config.get("patched"):
    snakemake_patches.end_when_asked_to()

rule taken_away:
    output: "product.txt"
    shell: "true"
"""
"""A job that ends well, and whose product somebody has removed."""


def test_sigterm_is_lost_while_a_product_is_waited_for_unless_another_thread_takes_it(
    tmp_path, patched
):
    command = command_of(tmp_path, TAKEN_AWAY, patched, "--cores", "1", "--latency-wait", "2")
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        said = next(line for line in process.stderr if "missing files" in line)
        process.terminate()
        try:
            code = process.wait(4)
        except subprocess.TimeoutExpired:
            code = None
            process.terminate()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.kill()
    assert said.startswith("Waiting at most 2 seconds")
    assert code == (1 if patched else None), "without the replacement it hangs for ever"


def test_why_a_group_fails_is_dropped_unless_it_is_recorded(caplog, monkeypatch, tmp_path):
    group = SimpleNamespace(groupid="g", name="exposure_1001", jobs=[])
    caplog.set_level(logging.ERROR, "snakemake.logging")
    GroupJob.log_error(group, msg="sbatch: error: no such partition")
    (record,) = caplog.records
    assert "partition" not in str(vars(record))

    told = []
    retries = SimpleNamespace(failed=lambda *arguments: told.append(arguments))
    monkeypatch.setattr(AbstractExecutor, "report_job_error", lambda *_, **__: None)
    snakemake_patches.record_attempts(retries)
    executor = SimpleNamespace(
        workflow=SimpleNamespace(executor_plugin=SimpleNamespace(name="slurm"))
    )
    info = SimpleNamespace(job=group, external_jobid="12", aux={"slurm_logfile": "12.log"})
    AbstractExecutor.report_job_error(executor, info, msg="SLURM status is: 'FAILED'")
    assert told == [(group, "slurm", "12", "SLURM status is: 'FAILED'", "12.log")]


UNHEARD = """
from coaddflow.workflow import snakemake_patches

snakemake_patches.end_when_asked_to()
if config.get("patched"):
    snakemake_patches.end_when_nobody_listens()

onstart:
    # else Snakemake looks at all jobs once a second, and would find that the run is to end
    snakemake_patches.lift_default_rate_limit(workflow)

rule all:
    input: "quick.txt", "slow.txt"

rule quick:
    output: "quick.txt"
    shell: "touch {output}"

rule slow:
    output: "slow.txt"
    shell: "until [ -e closed ]; do sleep 0.1; done; false"
"""


def test_a_run_that_nobody_listens_to_waits_for_ever_unless_it_ends(patched, tmp_path):
    command = command_of(tmp_path, UNHEARD, patched, "--cores", "2")
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipe) as run:
        for line in run.stdout:
            if b"1 of 3 steps" in line:
                run.terminate()
            if b"Will exit" in line:
                break
        run.stdout.close()  # as `| head` does, or a terminal that is closed
        (tmp_path / "closed").touch()
        if patched:
            assert run.wait(30) != 0
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                run.wait(5)
            run.kill()


BEGINS_SLOWLY = """
from coaddflow.workflow import snakemake_patches

if config.get("patched"):
    snakemake_patches.hold_back_interrupts()

rule slow:
    output: "begun.txt"
    shell: "echo slow >{output}; sleep 0.5; echo begun >{output}"
"""


def test_ctrl_c_ends_a_job_that_has_not_begun_unless_it_is_held_back(patched, tmp_path):
    command = command_of(tmp_path, BEGINS_SLOWLY, patched, "--cores", "1", "--keep-incomplete")
    output = tmp_path / "begun.txt"
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(
            command, cwd=tmp_path, env=environment(), stderr=said, start_new_session=True
        )
        while run.poll() is None and not (output.exists() and output.read_text()):
            time.sleep(0.02)
        os.killpg(run.pid, signal.SIGINT)
        run.wait(30)
    assert output.read_text() == ("begun\n" if patched else "slow\n")


UPDATED = """
from coaddflow.workflow import snakemake_patches

if config.get("patched"):
    snakemake_patches.leave_the_survey_database_in_place()

rule survey_corners:
    input: "manifest.ecsv"
    output: update("results/corners.sqlite")
    shell: "find .snakemake -name corners.sqlite >copies.txt; echo changed >>{output}; false"
"""


def test_the_survey_database_is_copied_before_it_is_changed_unless_it_stays_in_place(
    patched, tmp_path
):
    database = tmp_path / "results" / "corners.sqlite"
    database.parent.mkdir()
    database.write_text("as it was\n")
    os.utime(database, (1e9, 1e9))
    (tmp_path / "manifest.ecsv").touch()
    run_snakemake(tmp_path, UPDATED, patched)
    copies = (tmp_path / "copies.txt").read_text().split()
    assert copies == ([] if patched else [".snakemake/backups/results/corners.sqlite"])
    # what a failed job has left is not removed, and nothing is copied over it
    assert database.read_text() == "as it was\n" + "changed\n" * patched


def test_the_default_limit_on_jobs_a_second_adds_looks_unless_it_is_lifted(patched, counts):
    # one in the beginning, and one after each job
    needed = 1 + 4
    if patched:
        assert counts["_finish_jobs"] == needed
    else:  # and one a second after each of those
        assert counts["_finish_jobs"] >= needed + 2


def test_a_limit_on_jobs_a_second_of_the_user_stays():
    limit = SimpleNamespace(max_jobs=100, timespan=1)
    workflow = SimpleNamespace(
        scheduler=SimpleNamespace(job_rate_limiter="default"),
        scheduling_settings=SimpleNamespace(max_jobs_per_timespan=limit),
    )
    snakemake_patches.lift_default_rate_limit(workflow)
    assert workflow.scheduler.job_rate_limiter is None
    limit.max_jobs, workflow.scheduler.job_rate_limiter = 10, "of the user"
    snakemake_patches.lift_default_rate_limit(workflow)
    assert workflow.scheduler.job_rate_limiter == "of the user"


def test_what_snakemake_lacks_is_said_and_the_run_goes_on(capsys):
    class Newer:
        """A class of a later Snakemake."""

    assert snakemake_patches._replace(Newer, "_check_groups", None) is None
    assert "has no Newer._check_groups" in capsys.readouterr().err
