"""How the jobs of a cluster ended, from what Snakemake, Slurm and PBS leave behind."""

import os
from pathlib import Path

import pytest

from coaddflow.cluster.history import (
    end_of_pbs_job,
    end_of_slurm_job,
    latest_jobs,
    will_be_refused,
)
from coaddflow.cluster.pbs.outcome import CANCELLED, GONE, LIKELY, NO_CODE
from coaddflow.workflow.report import failure_text
from coaddflow.workflow.stages import job_names

NAMES = job_names()


@pytest.fixture
def survey(tmp_path, monkeypatch):
    """A working folder with its jobs of Slurm, and a `sacct` that says what a test wants."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "a survey"
    lines = []

    def submit(job_id, name, said=None):
        log = folder / ".snakemake/slurm_logs" / name / f"{job_id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if said is not None:
            log.write_text(said)
        lines.append(f"Job 0a1 has been submitted with SLURM jobid {job_id} (log: {log}).\n")
        (folder / ".snakemake/log").mkdir(exist_ok=True)
        (folder / ".snakemake/log/2026-11-27T022903.068344.snakemake.log").write_text(
            "".join(lines)
        )

    def sacct(text, code=0):
        (programs / "answer").write_text(text)
        (programs / "sacct").write_text(f"#!/bin/sh\ncat {programs}/answer\nexit {code}\n")
        (programs / "sacct").chmod(0o755)
        (programs / "squeue").write_text("#!/bin/sh\nexit 1\n")
        (programs / "squeue").chmod(0o755)

    submit.folder, submit.sacct = folder, sacct
    return submit


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("exposure_1001_calexp_manifest", "exposure_1001"),
        ("exposure_night_2-a_calibrated_manifest", "exposure_night_2-a"),
        ("exposure_1001", "exposure_1001"),
        ("exposure_1001_exposure", "exposure_1001"),
        ("tract_0_coadd_picture_tract_corners_warp", "tract_0"),
        ("calibs_12_defects_master_bias", "calibs_12"),
        ("survey_corners", "survey_corners"),
    ],
)
def test_the_name_of_a_job_tells_what_it_is_for(name, unit):
    assert NAMES.unit(name) == unit


def test_without_a_cluster_there_are_no_jobs(tmp_path):
    assert latest_jobs(tmp_path, NAMES) == {}


@pytest.mark.parametrize(
    ("state", "log", "outcome"),
    [
        ("COMPLETED", "", "done"),
        ("RUNNING", "", "live"),
        ("CANCELLED by 1000", "", "cancelled"),
        ("TIMEOUT", "", "time limit"),
        ("NODE_FAIL", "", "node failed"),
        ("PREEMPTED", "", "preempted"),
        ("OUT_OF_MEMORY", "", "out of memory"),
        ("FAILED", "slurmstepd: error: Exceeded job memory limit\n", "out of memory"),
        ("CANCELLED by 0", "slurmstepd: error: Step 12.0 exceeded memory limit\n", "out of memory"),
        ("FAILED", "srun: error: n1: task 0: Killed\n", "out of memory"),
        ("FAILED", "a step failed\n", "failed"),
        ("SOMETHING_NEW", "", "unknown"),
    ],
)
def test_slurm_says_how_a_job_ended(survey, state, log, outcome):
    survey(12, "group_exposure_1001_calexp_manifest", log)
    survey.sacct(f"12|{state}\n")
    job = latest_jobs(survey.folder, NAMES)["exposure_1001"]
    assert (job.job_id, job.outcome) == ("12", outcome)
    assert state in job.words


@pytest.mark.parametrize(
    ("log", "outcome"),
    [
        ("*** JOB 5 ON n1 CANCELLED AT 2026-11-27 DUE TO TIME LIMIT ***", "time limit"),
        ("*** JOB 5 ON n1 CANCELLED AT 2026-11-27 DUE TO NODE FAILURE", "node failed"),
        ("*** JOB 5 ON n1 CANCELLED AT 2026-11-27 ***", "cancelled"),
        ("task 0: Killed\nslurmstepd: error: Detected 1 oom_kill event", "out of memory"),
        (None, "unknown"),
    ],
)
def test_without_accounting_the_log_of_the_job_tells(survey, log, outcome):
    survey(5, "group_tract_0_coadd_warp", log and f"slurmstepd-n1: error: {log}\n")
    survey.sacct("", code=1)
    assert latest_jobs(survey.folder, NAMES)["tract_0"].outcome == outcome


def test_the_controller_knows_sooner_than_the_accounting(survey, tmp_path):
    survey(5, "group_exposure_1001_calexp_manifest")
    survey.sacct("5|RUNNING\n")
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho '5|CANCELLED'\n")
    assert latest_jobs(survey.folder, NAMES)["exposure_1001"].outcome == "cancelled"


def test_the_last_job_of_an_exposure_counts(survey):
    survey(5, "group_exposure_1001_calexp_manifest")
    survey(6, "group_exposure_1002_calexp_manifest")
    survey(7, "group_exposure_1001_calexp_manifest")
    survey(8, "rule_survey_corners")
    survey.sacct("5|CANCELLED by 0\n6|COMPLETED\n7|COMPLETED\n8|RUNNING\n")
    jobs = latest_jobs(survey.folder, NAMES)
    assert {unit: job.outcome for unit, job in jobs.items()} == {
        "exposure_1001": "done",
        "exposure_1002": "done",
        "survey_corners": "live",
    }


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("exposure_1001_calexp_manifest", "calexp"),
        ("exposure_1001_calibrated_manifest", "calibrated"),
        ("exposure_1001_exposure", "exposure"),
        ("exposure_1001_calibrated_exposure", "calibrated_exposure"),
        ("tract_0_coadd_picture_tract_corners_warp", "coadd"),
        ("tract_0_picture_tract_tract_corners", "tract"),
        ("survey_corners", "survey_corners"),
    ],
)
def test_what_to_do_is_reported_with_the_rule_that_needs_it(survey, name, rule):
    survey(5, f"group_{name}")
    survey.sacct("5|OUT_OF_MEMORY\n")
    told = latest_jobs(survey.folder, NAMES)[NAMES.unit(name)].explanation
    assert told.startswith("Slurm job 5 probably ran out of memory")
    assert f"--set-resources {rule}:mem_mb=" in told


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("job killed: walltime 65 exceeded limit 60 (exit status 271)", "time limit"),
        ("Can Never Run: Insufficient amount of resource: mem", "never runs"),
        (f"{GONE}: {LIKELY}", "unknown"),
        (f"{NO_CODE}: {LIKELY}", "unknown"),
        (f"{GONE}; =>> PBS: job killed by root", "cancelled"),
        (f"{GONE}; step exit code 137", "out of memory"),
        ("failed; its node was lost (exit status -20)", "node failed"),
        (CANCELLED, "cancelled"),
        ("terminated by user", "cancelled"),
        ("exceeded resource mem (exit status -27)", "out of memory"),
        ("=>> PBS: job killed: mem 406140kb exceeded limit 102400kb", "out of memory"),
        ("exit code 1", "failed"),
    ],
)
def test_the_records_of_pbs_say_how_a_job_ended(tmp_path, reason, outcome, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no server that answers
    folder = tmp_path / ".snakemake/coaddflow/pbs"
    folder.mkdir(parents=True)
    (folder / "ended.tsv").write_text(
        "2026-11-27T02:00:00\t3.pbs\texposure_1001\tsuccess\t\n"
        f"2026-11-27T02:10:00\t4.pbs\texposure_1001\tfailed\texposure_1001: {reason} (log: a.out)\n"
    )
    (folder / "ids").mkdir()
    (folder / "ids" / "9.pbs").write_text("tract_0.1a2b")
    jobs = latest_jobs(tmp_path, NAMES)
    job = jobs["exposure_1001"]
    assert (job.job_id, job.outcome, job.words, job.log) == ("4.pbs", outcome, reason, "a.out")
    assert jobs["tract_0"].outcome == "live"
    (folder / "cancelled").mkdir()
    (folder / "cancelled" / "9.pbs").touch()
    assert latest_jobs(tmp_path, NAMES)["tract_0"].outcome == "cancelled"
    (folder / "exit").mkdir()
    (folder / "exit" / "tract_0.1a2b").write_text("0\n")
    assert latest_jobs(tmp_path, NAMES)["tract_0"].outcome == "done", "although nobody has looked"


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("PartitionTimeLimit", "never runs"),
        ("QOSMaxWallDurationPerJobLimit", "never runs"),
        ("AssocMaxCpuPerJobLimit", "never runs"),
        ("QOSMaxJobsPerUserLimit", "live"),
        ("Priority", "live"),
    ],
)
def test_a_job_that_waits_for_what_never_comes_is_reported(survey, tmp_path, reason, outcome):
    survey(5, "group_tract_0_coadd_warp")
    survey.sacct("5|PENDING\n")
    (tmp_path / "bin" / "squeue").write_text(f"#!/bin/sh\necho '5|PENDING|{reason}'\n")
    job = latest_jobs(survey.folder, NAMES)["tract_0"]
    assert job.outcome == outcome
    if outcome == "never runs":
        assert "coadd:runtime=" in job.explanation and reason in job.explanation


def test_sacct_is_asked_for_many_jobs_in_parts(survey, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("coaddflow.cluster.history._IDS_AT_ONCE", 5)
    for number in range(11):
        survey(number, f"group_exposure_{number}_calexp_manifest")
    survey.sacct("")
    program = tmp_path / "bin" / "sacct"
    # answers of what it is asked: -X -n -P -j IDS
    program.write_text("#!/bin/sh\necho x >>calls\necho $5 | tr , '\\n' | sed 's/$/|COMPLETED/'\n")
    jobs = latest_jobs(survey.folder, NAMES)
    assert len(jobs) == 11 and {job.outcome for job in jobs.values()} == {"done"}
    assert Path("calls").read_text().count("x") == 3


def test_slurm_is_not_asked_for_what_nobody_wants(survey):
    survey(5, "group_tract_0_coadd_warp")
    assert latest_jobs(survey.folder, NAMES, wanted=lambda unit: unit != "tract_0") == {}


def test_without_accounting_a_job_whose_log_was_removed_has_not_failed(survey, monkeypatch):
    survey(5, "group_tract_0_coadd_warp")
    survey(6, "group_exposure_1001_calexp_manifest", "Killed?\n")
    survey.sacct("", code=1)
    monkeypatch.chdir(survey.folder)
    text = failure_text("logs", 0.0)
    assert "exposure_1001" in text and "tract_0" not in text


FAILED_STEP = "Command '...' returned non-zero exit status 137.\n"
CANCELLED = "slurmstepd: error: *** STEP 5.0 ON n1 CANCELLED AT 2026-11-27T01:39:16 ***\n"


@pytest.mark.parametrize(
    ("state", "log", "outcome"),
    [
        ("OUT_OF_MEMORY", "", "out of memory"),
        ("TIMEOUT", CANCELLED, "time limit"),
        ("NODE_FAIL", "", "node failed"),
        ("FAILED", "some traceback\n", "failed"),
        # the kernel has killed a step; Slurm has seen that the job failed
        ("FAILED", FAILED_STEP, "out of memory"),
        ("FAILED", "RuleException: died with <Signals.SIGKILL: 9>.\n", "out of memory"),
        ("FAILED", "slurmstepd: error: Job 5 exceeded memory limit\n", "out of memory"),
        ("FAILED", "srun: error: n1: task 0: Killed\n", "out of memory"),
        # scancel kills, too
        ("CANCELLED", "srun: error: n1: task 0: Killed\n" + CANCELLED, "cancelled"),
        ("CANCELLED", FAILED_STEP, "cancelled"),
        ("CANCELLED", "slurmstepd: error: Detected 1 oom-kill event(s)\n", "out of memory"),
        (
            "FAILED",
            "srun: error: Unable to confirm allocation for job 5: Unable to contact slurm "
            "controller (connect failure)\n",
            "controller away",
        ),
    ],
)
def test_the_end_of_a_job_of_slurm_says_what_was_short(tmp_path, state, log, outcome):
    (tmp_path / "5.log").write_text(log)
    message = f"SLURM-job '5' failed, SLURM status is: '{state}'. Detailed failure reason ..."
    found, words = end_of_slurm_job("5", message, tmp_path / "5.log")
    assert (found, words.startswith(state)) == (outcome, True)


@pytest.mark.parametrize(
    ("said", "again"),
    [
        ("sbatch: error: Memory specification can not be satisfied", True),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid", True),
        ("sbatch: error: invalid partition specified: fast", True),
        ("sbatch: error: Batch job submission failed: Unspecified error", False),
    ],
)
def test_a_refused_submission_keeps_the_words_of_sbatch(said, again):
    message = f"SLURM sbatch failed. The error message was '{said}'.\n    sbatch call:\n  sbatch"
    assert end_of_slurm_job("", message, "") == ("refused", said)
    assert will_be_refused(said) is again


@pytest.mark.parametrize(
    ("row", "end"),
    [
        ("7.pbs\ttract_0\tfailed\ttract_0: mem 9 exceeded limit 5 (log: x)", "out of memory"),
        ("7.pbs\ttract_0\tfailed\ttract_0: exit code 137 (log: x)", "out of memory"),
        ("7.pbs\ttract_0\tfailed\ttract_0: exceeded resource walltime", "time limit"),
        ("7.pbs\ttract_0\tfailed\ttract_0: exit code 1 (log: x)", "failed"),
    ],
)
def test_the_records_of_pbs_say_what_was_short(tmp_path, row, end):
    folder = tmp_path / ".snakemake/coaddflow/pbs"
    folder.mkdir(parents=True)
    (folder / "ended.tsv").write_text(
        f"2026-11-27T02:00:00\t{row}\n2026-11-27T02:10:00\t\ttract_1\trefused\tmem: too much\n"
    )
    assert end_of_pbs_job("7.pbs", "tract_0", tmp_path)[0] == end
    assert end_of_pbs_job("8.pbs", "tract_0", tmp_path) == ("unknown", "")
    assert end_of_pbs_job("", "tract_1", tmp_path) == ("refused", "mem: too much")
    assert end_of_pbs_job("", "tract_2", tmp_path) == ("refused", "")
