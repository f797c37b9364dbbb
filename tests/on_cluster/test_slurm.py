"""The pipeline on a real Slurm, left in peace and disturbed. `make test-slurm`; takes minutes.

What must hold after every fault: the run, or the same command again, finishes; `coaddflow status`
says what happened and what to do; the products are those of an undisturbed run to the bit; and no
exposure was ever worked on by two jobs at once, which Slurm's own accounting shows.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import skip_or_fail
from survey import coarse_granularity, program

GROUP = re.compile(r"rule_((?:exposure|tract|calibs)_[A-Za-z0-9-]+|survey_corners)")
EXPOSURES = ("1001", "1002", "1003", "1004")


def submissions(cluster, run):
    """Return the jobs that ended since a run began, by exposure, tract or rule.

    The accounting knows the comment of a job, which names it, when the job has ended.
    """
    rows = [row for row in cluster.accounting(run.began) if GROUP.match(row["Comment"])]
    return [(GROUP.match(row["Comment"])[1], row) for row in rows]


def states(cluster, run):
    """Return how often jobs ended in which state since a run began."""
    return Counter(row["State"].split()[0] for _, row in submissions(cluster, run))


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
    """Check that the products are those of a run that was left in peace, and status says so."""
    assert survey.products() == undisturbed.made
    assert survey.status() == undisturbed.told


# ---------------------------------------------------------------------------------------------
# Left in peace
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_run(undisturbed, cluster):
    return submissions(cluster, undisturbed.first)


@pytest.fixture(scope="module")
def core_hours(first_run, cluster):
    """What the first run took by Slurm's accounting; nothing else has run yet."""
    return sum(cpu for _, cpu in cluster.cpu_seconds()) / 3600


def test_submissions_are_exposures_tracts_and_few_single_jobs(first_run, core_hours):
    names = Counter(name for name, _ in first_run)
    exposures = {f"exposure_{exposure}" for exposure in EXPOSURES}
    calibs = {f"calibs_{ccd}" for ccd in range(6)}
    assert set(names) == {*exposures, *calibs, "tract_0", "survey_corners"}
    assert set(names.values()) == {1}


@pytest.mark.skipif(coarse_granularity() is None, reason="there is one granularity")
def test_one_job_an_exposure_and_a_tract_has_as_many_submissions_and_the_same_pixels(
    copy_of_survey, undisturbed, cluster
):
    coarse = copy_of_survey(to_do=EXPOSURES)
    for folder in ("coadd", "warp", "corners"):
        shutil.rmtree(coarse.folder / "results" / folder)
    coarse.configure(**coarse_granularity())
    run = coarse.run()
    run.check()
    names = Counter(name for name, _ in submissions(cluster, run))
    assert {name: names.pop(f"exposure_{name}", 0) for name in EXPOSURES} == dict.fromkeys(
        EXPOSURES, 1
    )
    assert set(names) <= {"tract_0", "survey_corners"}
    assert names.total() <= 3, names
    for pattern in ("results/calexp/**/*.fits", "results/coadd/**/*.fits"):
        assert coarse.products(pattern) == undisturbed.products(pattern)


def test_mpi_over_two_nodes_makes_the_same_pixels(copy_of_survey, undisturbed, cluster):
    """5 tasks of 1 CPU do not fit a node of 4."""
    survey = copy_of_survey(to_do=("1001",))
    for folder in ("coadd", "warp", "corners"):
        shutil.rmtree(survey.folder / "results" / folder)
    # the CPUs of the nodes need not exist, so nothing can be bound to them
    mpi = {"backend": "mpi", "workers": 4, "mpi_command": [program("mpirun"), "--bind-to", "none"]}
    survey.configure(parallel={"calexp": "exposure", "coadd": "tract", **mpi})
    survey.env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    # jobs of exposures depend on a table of calibration frames, which those of CCDs have not made
    run = survey.run("--rerun-triggers", "mtime")
    run.check()
    nodes = {
        name: row["NodeList"] for name, row in submissions(cluster, run) if "[" in row["NodeList"]
    }
    assert set(nodes) == {*(f"exposure_{exposure}" for exposure in EXPOSURES), "tract_0"}
    for pattern in ("results/calexp/**/*.fits", "results/coadd/**/*.fits"):
        assert survey.products(pattern) == undisturbed.products(pattern)


def test_ccd_that_fails_for_its_own_reasons_is_left_out(undisturbed):
    code, text = undisturbed.told
    assert code == 1, text
    assert "no_astrometric_match" in text


def test_second_run_finds_nothing_to_do(undisturbed, cluster):
    run = undisturbed.run()
    assert "Nothing to be done" in run.text()
    assert submissions(cluster, run) == []


def test_plan_asks_for_enough_and_not_for_much_more(undisturbed, core_hours):
    command = [program("coaddflow"), "plan", "--cores", "3", "--json"]
    done = subprocess.run(command, cwd=undisturbed.folder, capture_output=True, check=True)
    told = json.loads(done.stdout)
    jobs = {cost["name"]: cost["n_jobs"] for cost in told["plan"]}
    assert jobs == {"calibration": 6, "exposure": 4, "tract": 1, "survey": 1}
    planned = sum(cost["core_hours"] for cost in told["plan"])
    assert 0.5 < planned / core_hours < 2
    for step in told["measured"]:
        assert 0.5 * step["asked"] < step["memory"] < step["asked"], step


def test_two_surveys_of_one_user_side_by_side_and_from_another_folder(
    copy_of_survey, undisturbed, cluster, tmp_path
):
    surveys = [copy_of_survey("a", to_do=("1001",)), copy_of_survey("b", to_do=("1001",))]
    runs = [survey.run_exposures("--directory", str(survey.folder)) for survey in surveys]
    for survey, run in zip(surveys, runs, strict=True):
        run.check()
        check_as_undisturbed(survey, undisturbed)
    assert Counter(name for name, _ in submissions(cluster, runs[0])) == {"exposure_1001": 2}


# ---------------------------------------------------------------------------------------------
# Jobs that end badly
# ---------------------------------------------------------------------------------------------


def test_cancelled_by_hand(one, undisturbed, cluster):
    run = one.run_exposures("--retries", "0")
    job_id, _ = one.wait_for_job()
    cluster.slurm("scancel", job_id)
    words = f"Slurm job {job_id} was cancelled by hand"
    one.check_failed(run, words, "run the same command again")
    one.run_exposures().check()
    assert states(cluster, run) == {"CANCELLED": 1, "COMPLETED": 1}
    check_as_undisturbed(one, undisturbed)


def test_cancelled_before_it_began(one, cluster):
    cluster.slurm("scontrol", "update", "partition=main", "state=down")
    try:
        run = one.run_exposures("--retries", "0")
        job_id, _ = one.wait_for_job("PENDING")
        cluster.slurm("scancel", job_id)
        one.check_failed(run, f"Slurm job {job_id} was cancelled by hand")
        assert "killed" not in one.status()[1]
    finally:
        cluster.slurm("scontrol", "update", "partition=main", "state=up")


def test_out_of_memory_is_reported_and_retried_with_more(one, undisturbed, cluster):
    memory = ("--set-resources", "calexp:mem_mb=60*attempt**4")
    run = one.run_exposures("--retries", "0", *memory)
    one.check_failed(run, "probably ran out of memory", "calexp:mem_mb=")
    one.run_exposures(*memory).check()
    ended = states(cluster, run)
    assert ended["COMPLETED"] == 1
    assert ended["FAILED"] + ended["OUT_OF_MEMORY"] == 1, "the second run has learnt from the first"
    check_as_undisturbed(one, undisturbed)


def requests(cluster, run, name):
    """Return memory (MB) and time limit (minutes) of the submissions of a job, in order."""
    ids = [row["JobIDRaw"] for found, row in submissions(cluster, run) if found == name]
    text = cluster.slurm(
        *("sacct", "-X", "-n", "-P", "-j", ",".join(ids), "--format", "ReqMem,TimelimitRaw")
    )
    rows = [line.split("|") for line in text.splitlines()]
    return [(int(float(memory.rstrip("Mn"))), int(minutes)) for memory, minutes in rows]


def test_a_tract_that_is_killed_for_its_memory_asks_for_no_more_than_a_node_has(
    copy_of_survey, cluster
):
    survey = copy_of_survey(to_do=())
    for folder in ("coadd", "warp", "corners"):
        shutil.rmtree(survey.folder / "results" / folder)
    survey.configure(**coarse_granularity())
    arguments = ("--set-resources", "tract:mem_mb=4000", "--rerun-triggers", "mtime")
    run = survey.start("results/coadd/r/0.ecsv", *arguments)
    survey.wait_for_file("logs/tract/r/0.log")
    job_id, node = survey.wait_for_job()
    # as the kernel does, which takes the largest process
    for pid in cluster.processes_of(node):
        if ".snakemake/scripts/" in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, signal.SIGKILL)
    run.check()
    memory = [asked for asked, _ in requests(cluster, run, "tract_0")]
    assert memory == [4000, cluster.memory], run.text()
    words = f"Slurm job {job_id} (4000 MB"
    assert re.search(rf"tract_0: {re.escape(words)}.*out of memory.*asks for 6000 MB", run.text())
    assert words in survey.status("--all")[1]


def test_cancelled_by_hand_asks_for_the_same(one, undisturbed, cluster):
    run = one.run_exposures()
    job_id, _ = one.wait_for_job()
    cluster.slurm("scancel", job_id)
    run.check()
    first, second = requests(cluster, run, "exposure_1001")
    assert first == second
    assert f"Slurm job {job_id}" in run.text() and "asks for the same" in run.text()
    check_as_undisturbed(one, undisturbed)


def test_what_no_node_has_is_refused_at_planning(one, cluster):
    run = one.run_exposures("--set-resources", "calexp:mem_mb=7000")
    assert run.wait() == 1
    (line,) = [line for line in run.text().splitlines() if "error" in line]
    assert "exposure_1001 (calexp) asks for 7000 MB" in line, line
    assert "the largest node of partition main has 6000 MB" in line
    assert submissions(cluster, run) == []


def test_a_partition_of_half_an_hour_gets_jobs_of_half_an_hour(one, undisturbed, cluster):
    partition = ("--default-resources", "slurm_partition='short'", "mem_mb=1000", "runtime=30")
    run = one.run_exposures(*partition, "--set-resources", "calexp:runtime=40")
    run.check()
    assert [minutes for _, minutes in requests(cluster, run, "exposure_1001")] == [30]
    check_as_undisturbed(one, undisturbed)


def test_a_submission_that_is_refused_ends_that_job_only(survey, cluster, tmp_path):
    words = (
        "sbatch: error: Batch job submission failed: Requested node configuration is not available"
    )
    survey.fail_once("sbatch", words, tmp_path)
    run = survey.run_exposures()
    survey.check_failed(run, "refused", words)
    assert run.text().count("no further attempt") == 2, "when it happens, and at the end"
    assert states(cluster, run) == {"COMPLETED": 1}


def test_time_limit_is_reported_and_retried(one, undisturbed, cluster):
    run = one.run_exposures("--retries", "0")
    job_id, node = one.wait_for_job()
    one.wait_for_step()
    assert cluster.pause(job_id, node)
    cluster.slurm("scontrol", "update", f"jobid={job_id}", "timelimit=1")
    one.check_failed(run, f"{job_id} was killed at its time limit", "calexp:runtime=")
    one.run_exposures().check()
    assert states(cluster, run) == {"TIMEOUT": 1, "COMPLETED": 1}
    check_as_undisturbed(one, undisturbed)
    check_one_at_a_time(cluster, run)


def test_node_dies_in_the_middle_of_an_exposure(one, undisturbed, cluster):
    run = one.run_exposures("--retries", "0")
    _, node = one.wait_for_job()
    one.wait_for_step()
    cluster.kill_node(node)
    try:
        one.check_failed(run, "was lost when its node failed")
        one.run_exposures().check()
    finally:
        cluster.start_node(node)
    check_as_undisturbed(one, undisturbed)
    check_one_at_a_time(cluster, run)


def test_exposure_with_too_many_failed_ccds_is_refused_once_and_told(
    copy_of_survey, undisturbed, cluster
):
    manifests = (undisturbed.folder / "results/summary").glob("*.ecsv")
    exposure = next(path.stem for path in manifests if "no_astrometric_match" in path.read_text())
    survey = copy_of_survey(to_do=(exposure,))
    survey.configure(calexp={"max_failed_fraction": 0.0, "on_failed_exposure": "stop"})
    run = survey.run_exposures()
    survey.check_failed(run, " of 6 CCDs failed", "no_astrometric_match", "exclude")
    assert len(submissions(cluster, run)) == 1, "another attempt would fail in the same way"
    survey.configure(calexp={"max_failed_fraction": 0.5})
    survey.run_exposures().check()
    check_as_undisturbed(survey, undisturbed)


# ---------------------------------------------------------------------------------------------
# Snakemake, Slurm or a disk ends
# ---------------------------------------------------------------------------------------------


def test_master_killed_and_resumed_while_its_jobs_run(survey, undisturbed, cluster):
    run = survey.start()
    paused = survey.pause_jobs()
    run.kill()
    assert "is still in the queue" in survey.status()[1]
    survey.run("--unlock").check()
    refused = survey.run_exposures()
    assert refused.wait() != 0, "single products are refused while jobs live"
    assert "earlier run" in refused.text()
    again = survey.start()
    again.wait_for_text("jobs of an earlier run are still in the queue")
    cluster.go_on(paused)
    again.check()
    check_as_undisturbed(survey, undisturbed)
    check_one_at_a_time(cluster, run)
    names = Counter(name for name, _ in submissions(cluster, run))
    assert {names["exposure_1001"], names["exposure_1002"]} == {1}, "their jobs were taken up"


def test_master_killed_and_resumed_after_its_jobs_have_ended(one, undisturbed, cluster):
    run = one.run_exposures()
    one.wait_for_job()
    run.kill()
    one.wait_for_end_of_jobs()
    one.run("--unlock").check()
    one.run_exposures().check()
    assert len(submissions(cluster, run)) == 1
    check_as_undisturbed(one, undisturbed)


def test_controller_away_for_30_seconds(one, undisturbed, cluster):
    run = one.run_exposures()
    # srun, when it finds no controller, waits for minutes before it tries again
    one.wait_for_step()
    cluster.stop_controller()
    time.sleep(30)
    cluster.start_controller()
    run.check()
    check_as_undisturbed(one, undisturbed)
    check_one_at_a_time(cluster, run)


def test_submission_that_fails_once(one, undisturbed, cluster, tmp_path):
    one.fail_once("sbatch", "try later", tmp_path)
    run = one.run_exposures()
    run.check()
    assert "try later" in run.text()
    check_as_undisturbed(one, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A folder that holds no more than 64 KB: .ci/run gives one, root and sudo can make one."""
    given = os.environ.get("COADDFLOW_SMALL_DISK")
    folder = Path(given) if given else tmp_path / "full"
    folder.mkdir(exist_ok=True)
    if os.path.ismount(folder):
        yield folder
        return
    as_root = ["sudo", "--non-interactive"] if os.getuid() and shutil.which("sudo") else []
    command = [*as_root, "mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        skip_or_fail("no folder to fill up: mount one of 64 KB, and name it COADDFLOW_SMALL_DISK")
    yield folder
    subprocess.run([*as_root, "umount", str(folder)], check=True)


def test_temporary_folder_of_the_nodes_is_full(one, undisturbed, small_disk):
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "filler").write_bytes(bytes(100_000))
    one.env["TMPDIR"] = str(small_disk)
    one.run_exposures().check()
    check_as_undisturbed(one, undisturbed)
