"""The programs of profiles/pbs in front of a real scheduler, end to end. `make test-pbs`.

The commands qsub, qstat and qdel are those of slurm-wlm-torque in front of the Slurm of these
tests: Torque's dialect, without history and exit status, which is the harder case.
"""

import os
import shutil
import time
from collections import Counter

import pytest


@pytest.fixture
def survey(survey):
    """The survey with two exposures to do, on PBS."""
    missing = [name for name in ("qsub", "qstat", "qdel") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no PBS here: {', '.join(missing)} not installed")
    survey.profile = "pbs"
    survey.env |= {"COADDFLOW_PBS_POLL": "2", "COADDFLOW_PBS_GRACE": "15"}
    return survey


def names_of(cluster, run):
    """Return how often each job was submitted since a run began, by its name."""
    time.sleep(2)
    begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(run.began))
    text = cluster.slurm("sacct", "-X", "-n", "-P", "-S", begin, "--format", "JobName")
    return Counter(text.split())


def spans(survey):
    """Return begin and end of each exposure's jobs, from the logs that they wrote."""
    found = {}
    for log in survey.folder.glob("logs/pbs/exposure_*.out"):
        words = [line.split() for line in log.read_text().splitlines() if "coaddflow: job" in line]
        begin = [line[-1] for line in words if "begins" in line]
        end = [line[line.index("ends") + 1].strip(",") for line in words if "ends" in line]
        name = log.name.partition(".")[0]
        found.setdefault(name, []).append((begin[0], end[0] if end else ""))
    return found


def check(survey, undisturbed):
    """Check that the products are those of an undisturbed run, made by one job at a time."""
    assert survey.products() == undisturbed.products()
    for name, times in spans(survey).items():
        for (_, end), (start, _) in zip(sorted(times), sorted(times)[1:], strict=False):
            assert end <= start, f"{name} was worked on by two jobs at once: {sorted(times)}"


def test_one_submission_an_exposure_and_a_tract(survey, undisturbed, cluster):
    run = survey.run()
    assert run.process.returncode == 0, run.text()
    expected = {"exposure_1001": 1, "exposure_1002": 1, "tract_0": 1, "survey_corners": 1}
    assert names_of(cluster, run) == expected
    check(survey, undisturbed)
    coadds = "results/coadd/**/*.fits"
    assert survey.products(coadds) == undisturbed.products(coadds)


def test_from_any_folder(survey, undisturbed):
    survey.run_exposures("--directory", str(survey.folder)).check()
    check(survey, undisturbed)


def test_cancelled_by_hand(survey, undisturbed, cluster):
    run = survey.run_exposures()
    job_id, _ = survey.wait_for_job()
    cluster.slurm("qdel", job_id)
    run.check()
    assert sum(names_of(cluster, run).values()) == 3
    check(survey, undisturbed)


def test_node_dies(survey, undisturbed, cluster):
    run = survey.run_exposures()
    _, node = survey.wait_for_job()
    survey.wait_for_file("results/calexp/100[12]/*.json")
    cluster.kill_node(node)
    try:
        run.check()
    finally:
        cluster.start_node(node)
    check(survey, undisturbed)


def test_master_killed_and_resumed_while_its_jobs_run(survey, undisturbed, cluster):
    run = survey.run_exposures()
    survey.wait_for_job()
    survey.wait_for_file("logs/calexp/1*/*.log")
    run.kill()
    survey.run("--unlock").check()
    again = survey.run_exposures()
    again.check()
    assert "taken up" in again.text()
    assert names_of(cluster, run) == {"exposure_1001": 1, "exposure_1002": 1}
    check(survey, undisturbed)


def test_server_away_for_30_seconds(survey, undisturbed, cluster):
    run = survey.run_exposures()
    survey.wait_for_job()
    cluster.stop_controller()
    time.sleep(30)
    cluster.start_controller()
    run.check()
    assert sum(names_of(cluster, run).values()) == 2
    check(survey, undisturbed)


def test_submission_that_fails_once(survey, undisturbed, cluster, tmp_path):
    qsub = tmp_path / "bin" / "qsub"
    qsub.parent.mkdir()
    qsub.write_text(
        f"#!/bin/sh\nmkdir {tmp_path}/failed 2>/dev/null && "
        "{ echo 'qsub: cannot connect to server' >&2; exit 255; }\n"
        'exec /usr/bin/qsub "$@"\n'
    )
    qsub.chmod(0o755)
    survey.env["PATH"] = f"{qsub.parent}{os.pathsep}{cluster.env['PATH']}"
    run = survey.run_exposures()
    run.check()
    assert sum(names_of(cluster, run).values()) == 2
    check(survey, undisturbed)
