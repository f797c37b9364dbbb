"""The pipeline on a real Slurm, left in peace and disturbed. `make test-slurm`; takes minutes.

What must hold after every fault: the run, or the same command again, finishes; the products are
those of an undisturbed run to the bit; and no exposure was ever worked on by two jobs at once,
which Slurm's own accounting shows.
"""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

GROUP = re.compile(r"rule_((?:exposure|tract|calibs)_[A-Za-z0-9-]+|survey_corners)")


def submissions(cluster, run):
    """Return the jobs that ended since a run began, by exposure, tract or rule.

    The accounting knows the comment of a job, which names it, when the job has ended.
    """
    time.sleep(2)
    rows = [row for row in cluster.accounting(run.began) if GROUP.match(row["Comment"])]
    return [(GROUP.match(row["Comment"])[1], row) for row in rows]


def check_one_at_a_time(cluster, run):
    """Check that no exposure and no tract was worked on by two jobs at once."""
    spans = {}
    for name, row in submissions(cluster, run):
        if row["Start"] not in ("None", "Unknown"):
            spans.setdefault(name, []).append((row["Start"], row["End"]))
    assert spans, "the accounting names no job"
    for name, times in spans.items():
        for (_, end), (start, _) in zip(sorted(times), sorted(times)[1:], strict=False):
            assert end <= start, f"{name} was worked on by two jobs at once: {sorted(times)}"


def check_as_undisturbed(survey, undisturbed):
    """Check that the products are those of a run that was left in peace."""
    assert survey.products() == undisturbed.products()


@pytest.fixture(scope="module")
def first_run(undisturbed, cluster):
    return submissions(cluster, undisturbed.first)


def test_submissions_are_exposures_tracts_and_few_single_jobs(first_run):
    names = Counter(name for name, _ in first_run)
    exposures = {f"exposure_{exposure}" for exposure in (1001, 1002, 1003, 1004)}
    calibs = {f"calibs_{ccd}" for ccd in range(6)}
    assert set(names) == {*exposures, *calibs, "tract_0", "survey_corners"}
    assert set(names.values()) == {1}


def test_ccd_that_fails_for_its_own_reasons_is_left_out(undisturbed):
    code, text = undisturbed.status()
    assert code == 1, text
    assert "no_astrometric_match" in text


def test_second_run_finds_nothing_to_do(undisturbed, cluster):
    run = undisturbed.run()
    assert "Nothing to be done" in run.text()
    assert submissions(cluster, run) == []


def test_cancelled_by_hand(survey, undisturbed, cluster):
    run = survey.run_exposures()
    job_id, _ = survey.wait_for_job()
    cluster.slurm("scancel", job_id)
    run.check()
    check_as_undisturbed(survey, undisturbed)
    check_one_at_a_time(cluster, run)


def test_out_of_memory_is_retried_with_more(survey, undisturbed, cluster):
    run = survey.run_exposures("--set-resources", "calexp:mem_mb=60*attempt**4")
    run.check()
    states = Counter(row["State"].split()[0] for _, row in submissions(cluster, run))
    assert states["COMPLETED"] == 2
    assert states["FAILED"] + states["OUT_OF_MEMORY"] >= 2
    check_as_undisturbed(survey, undisturbed)


def test_time_limit_is_retried(survey, undisturbed, cluster):
    run = survey.run_exposures()
    job_id, node = survey.wait_for_job()
    survey.wait_for_file("logs/calexp/1*/*.log")
    for pid in cluster.processes_of(node):
        if f"SLURM_JOB_ID={job_id}".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            os.kill(pid, signal.SIGSTOP)
    cluster.slurm("scontrol", "update", f"jobid={job_id}", "timelimit=1")
    run.check()
    states = Counter(row["State"].split()[0] for _, row in submissions(cluster, run))
    assert states["TIMEOUT"] == 1
    check_as_undisturbed(survey, undisturbed)
    check_one_at_a_time(cluster, run)


def test_node_dies_in_the_middle_of_an_exposure(survey, undisturbed, cluster):
    run = survey.run_exposures()
    _, node = survey.wait_for_job()
    survey.wait_for_file("results/calexp/100[12]/*.json")
    cluster.kill_node(node)
    try:
        run.check()
    finally:
        cluster.start_node(node)
    check_as_undisturbed(survey, undisturbed)
    check_one_at_a_time(cluster, run)


def test_master_killed_and_resumed_while_its_jobs_run(survey, undisturbed, cluster):
    run = survey.start()
    survey.wait_for_job()
    survey.wait_for_file("logs/calexp/1*/*.log")
    run.kill()
    assert survey.live_jobs()
    survey.run("--unlock").check()
    again = survey.run()
    assert again.process.returncode == 0, again.text()
    assert "jobs of an earlier run are still in the queue" in again.text()
    check_as_undisturbed(survey, undisturbed)
    check_one_at_a_time(cluster, run)
    names = Counter(name for name, _ in submissions(cluster, run))
    assert {names["exposure_1001"], names["exposure_1002"]} == {1}, "their jobs were taken up"


def test_other_targets_are_refused_while_jobs_of_a_killed_master_run(survey):
    run = survey.run_exposures()
    survey.wait_for_job()
    run.kill()
    survey.run("--unlock").check()
    again = survey.run_exposures()
    assert again.wait() != 0
    assert "earlier run" in again.text()
    assert len(survey.live_jobs()) == 2, "nothing was submitted"


def test_master_killed_and_resumed_after_its_jobs_have_ended(survey, undisturbed, cluster):
    run = survey.run_exposures()
    survey.wait_for_job()
    run.kill()
    deadline = time.monotonic() + 600
    while survey.live_jobs() and time.monotonic() < deadline:
        time.sleep(2)
    survey.run("--unlock").check()
    survey.run_exposures().check()
    assert len(submissions(cluster, run)) == 2
    check_as_undisturbed(survey, undisturbed)


def test_controller_away_for_30_seconds(survey, undisturbed, cluster):
    run = survey.run_exposures()
    survey.wait_for_job()
    cluster.stop_controller()
    time.sleep(30)
    cluster.start_controller()
    run.check()
    check_as_undisturbed(survey, undisturbed)
    check_one_at_a_time(cluster, run)


def test_submission_that_fails_once(survey, undisturbed, cluster, tmp_path):
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f"#!/bin/sh\nmkdir {tmp_path}/failed 2>/dev/null && {{ echo 'try later' >&2; exit 1; }}\n"
        'exec /usr/bin/sbatch "$@"\n'
    )
    sbatch.chmod(0o755)
    survey.env["PATH"] = f"{sbatch.parent}{os.pathsep}{cluster.env['PATH']}"
    run = survey.run_exposures()
    run.check()
    assert "try later" in run.text()
    check_as_undisturbed(survey, undisturbed)


def test_temporary_folder_of_the_nodes_is_full(survey, undisturbed, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)],
        capture_output=True,
        check=False,
    )
    if mount.returncode:
        pytest.skip("a full folder takes the right to mount one")
    try:
        with pytest.raises(OSError, match="No space left"):
            (full / "filler").write_bytes(bytes(100_000))
        survey.env["TMPDIR"] = str(full)
        survey.run_exposures().check()
    finally:
        subprocess.run(["umount", str(full)], check=True)
    check_as_undisturbed(survey, undisturbed)
