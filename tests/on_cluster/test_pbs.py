"""The programs of profiles/pbs in front of a real scheduler, end to end. `make test-pbs`.

The commands qsub, qstat and qdel are those of slurm-wlm-torque in front of the Slurm of these
tests: Torque's dialect, without history and exit status, which is the harder case. What must hold
after every fault is the same as in test_slurm.py; that no exposure is worked on by two jobs at
once is shown by the logs of the jobs.
"""

import shutil
import time
from collections import Counter

import pytest
from conftest import skip_without


def on_pbs(survey):
    """Return a survey that is run on PBS; what is short is looked at soon."""
    skip_without([name for name in ("qsub", "qstat", "qdel") if shutil.which(name) is None], "PBS")
    survey.profile = "pbs"
    survey.env |= {"COADDFLOW_PBS_POLL": "1", "COADDFLOW_PBS_GRACE": "10"}
    return survey


@pytest.fixture
def survey(survey):
    """The survey with two exposures to do, on PBS."""
    return on_pbs(survey)


@pytest.fixture
def one(one):
    """The survey with one exposure to do, on PBS."""
    return on_pbs(one)


def start(survey, *arguments):
    """Start the work on the exposures that are to do."""
    return survey.run_exposures("--seconds-between-status-checks", "2", *arguments)


def names_of(cluster, run):
    """Return how often each job was submitted since a run began, by its name."""
    return Counter(row["JobName"] for row in cluster.accounting(run.began))


def ends(survey):
    """Return outcome and reason of all jobs that have been seen to end, in order."""
    lines = (survey.folder / ".snakemake/coaddflow/pbs/ended.tsv").read_text().splitlines()
    return [tuple(line.split("\t")[3:5]) for line in lines]


def spans(survey):
    """Return begin and end of each exposure's jobs, from the logs that they wrote."""
    found = {}
    for log in survey.folder.glob("logs/pbs/exposure_*.out"):
        words = [line.split() for line in log.read_text().splitlines() if "coaddflow: job" in line]
        begin = [line[-1] for line in words if "begins" in line]
        end = [line[line.index("ends") + 1].strip(",") for line in words if "ends" in line]
        # a job that was killed wrote last when it was
        last = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(log.stat().st_mtime))
        if begin:
            name = log.name.partition(".")[0]
            found.setdefault(name, []).append((begin[0], end[0] if end else last))
    return found


def check(survey, undisturbed):
    """Check that the products are those of an undisturbed run, made by one job at a time."""
    assert survey.products() == undisturbed.made
    assert survey.status() == undisturbed.told
    assert spans(survey), "no log tells of a job"
    for name, times in spans(survey).items():
        for (_, end), (begin, _) in zip(sorted(times), sorted(times)[1:], strict=False):
            assert end <= begin, f"{name} was worked on by two jobs at once: {sorted(times)}"


def test_one_submission_an_exposure_and_a_tract(one, undisturbed, cluster):
    run = one.run("--seconds-between-status-checks", "2")
    assert run.process.returncode == 0, run.text()
    assert names_of(cluster, run) == {"exposure_1001": 1, "tract_0": 1, "survey_corners": 1}
    check(one, undisturbed)
    coadds = "results/coadd/**/*.fits"
    assert one.products(coadds) == undisturbed.products(coadds)


# ---------------------------------------------------------------------------------------------
# Jobs that end badly
# ---------------------------------------------------------------------------------------------


def test_cancelled_by_hand(one, undisturbed, cluster):
    run = start(one, "--retries", "0")
    job_id, _ = one.wait_for_job()
    cluster.slurm("qdel", job_id)
    one.check_failed(run, f"PBS job {job_id} was cancelled by hand")
    start(one).check()
    assert names_of(cluster, run) == {"exposure_1001": 2}
    check(one, undisturbed)


def test_out_of_memory_is_retried_with_more(one, undisturbed):
    start(one, "--set-resources", "calexp:mem_mb=60*attempt**4").check()
    (first, why), *_, (last, _) = ends(one)[-2:]
    assert (first, last) == ("failed", "success"), why
    check(one, undisturbed)


def test_time_limit_is_reported_and_retried(one, undisturbed, cluster):
    run = start(one, "--retries", "1")
    job_id, node = one.wait_for_job()
    one.wait_for_step()
    assert cluster.pause(job_id, node)
    cluster.slurm("scontrol", "update", f"jobid={job_id}", "timelimit=1")
    run.check()
    (outcome, why), last = ends(one)[-2:]
    assert outcome == "failed"
    assert "TIME LIMIT" in why
    assert last == ("success", "")
    check(one, undisturbed)


def test_node_dies_in_the_middle_of_an_exposure(one, undisturbed, cluster):
    run = start(one, "--retries", "0")
    _, node = one.wait_for_job()
    one.wait_for_step()
    cluster.kill_node(node)
    try:
        one.check_failed(run, "it was killed, or its node failed")
        start(one).check()
    finally:
        cluster.start_node(node)
    check(one, undisturbed)


# ---------------------------------------------------------------------------------------------
# Snakemake or the server ends
# ---------------------------------------------------------------------------------------------


def test_master_killed_and_resumed_while_its_jobs_run(survey, undisturbed, cluster):
    run = start(survey)
    paused = survey.pause_jobs()
    run.kill()
    assert "is still in the queue" in survey.status()[1]
    survey.run("--unlock").check()
    again = start(survey)
    again.wait_for_text("still exists: it is used", times=2)
    cluster.go_on(paused)
    again.check()
    assert names_of(cluster, run) == {"exposure_1001": 1, "exposure_1002": 1}
    check(survey, undisturbed)


def test_master_killed_and_resumed_after_its_jobs_have_ended(one, undisturbed, cluster):
    run = start(one)
    one.wait_for_job()
    run.kill()
    one.wait_for_end_of_jobs()
    one.run("--unlock").check()
    start(one).check()
    assert names_of(cluster, run) == {"exposure_1001": 1}
    check(one, undisturbed)


def test_server_away_for_30_seconds(one, undisturbed, cluster):
    run = start(one)
    one.wait_for_job()
    cluster.stop_controller()
    time.sleep(30)
    cluster.start_controller()
    run.check()
    assert names_of(cluster, run) == {"exposure_1001": 1}
    check(one, undisturbed)


def test_submission_that_fails_once(one, undisturbed, cluster, tmp_path):
    one.fail_once("qsub", "qsub: cannot connect to server", tmp_path)
    run = start(one)
    run.check()
    assert names_of(cluster, run) == {"exposure_1001": 1}
    check(one, undisturbed)
