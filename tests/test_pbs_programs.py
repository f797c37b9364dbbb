"""The programs of profiles/pbs, in front of a server that answers as a real one was seen to."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fake_pbs
import pytest

PROGRAMS = Path(__file__).parent.parent / "profiles" / "pbs"
sys.path.insert(0, str(PROGRAMS))

import pbs  # noqa: E402 - from the folder of the profile

GROUP = {
    "type": "group",
    "groupid": "exposure_1001",
    "jobid": "5a1b2c3d-0000-5000-8000-000000000001",
    "threads": 4,
    "resources": {"mem_mb": 1800, "runtime": 75},
}
SCRIPT = """\
#!/bin/sh
# properties = {properties}
cd /data && python -m snakemake --cores 'all' --attempt 1 --mode remote && exit 0 || exit 1
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A survey's folder to work in, and a server whose commands are found first."""
    server = fake_pbs.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{server.folder}{os.pathsep}{os.environ['PATH']}")
    for name, value in {"POLL": 0, "GRACE": 0.4, "PAUSE": 0.05, "PATIENCE": 5}.items():
        monkeypatch.setenv(f"COADDFLOW_PBS_{name}", str(value))
    survey = tmp_path / "my survey; $(touch x)"
    survey.mkdir()
    monkeypatch.chdir(survey)
    return server


def program(name, *arguments):
    """Run a program as Snakemake does."""
    return subprocess.run(
        [sys.executable, "-S", str(PROGRAMS / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def submit(**changes):
    """Submit a job script with these properties; return what submit.py did."""
    properties = {**GROUP, **changes}
    Path("job.sh").write_text(SCRIPT.format(properties=json.dumps(properties)))
    return program("submit", "job.sh")


def submitted(**changes):
    done = submit(**changes)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def status(job_id):
    """Return word and explanation; status.py must never fail."""
    done = program("status", job_id)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    return done.stdout.strip(), done.stderr


def leave_exit_code(job_id, code):
    """Write the exit code of a job, as its script does when it ends."""
    token = json.loads((pbs.FOLDER / "jobs.json").read_text())["jobs"][job_id]["token"]
    (pbs.FOLDER / "exit" / token).write_text(f"{code}\n")


def module(name):
    spec = importlib.util.spec_from_file_location(f"pbs_{name}", PROGRAMS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# --- submission -------------------------------------------------------------------------------


def test_resources_become_arguments_of_qsub(server):
    assert submitted() == "1275.node1"
    (call,) = server.calls("qsub")
    pairs = list(itertools.pairwise(call))
    assert ("-l", "select=1:ncpus=4:mem=1800mb,walltime=1:15:00") in pairs
    assert ("-N", "exposure_1001") in pairs
    assert ("-r", "n") in pairs
    assert any(name == "-W" and value.startswith("umask=0") for name, value in pairs)


def test_queue_account_and_extra_arguments_are_passed_one_by_one(server):
    extra = {"pbs_queue": "long", "pbs_account": "astro", "pbs_extra": "-l place=excl -m n"}
    submitted(resources={**GROUP["resources"], **extra})
    (call,) = server.calls("qsub")
    assert call[call.index("-q") + 1] == "long"
    assert call[call.index("-A") + 1] == "astro"
    assert call[call.index("place=excl") - 1] == "-l"


@pytest.mark.parametrize(
    ("resources", "word"),
    [
        ({"pbs_queue": "long; rm -rf ."}, "pbs_queue"),
        ({"pbs_account": "-W block=true"}, "pbs_account"),
        ({"mem_mb": "1gb:host=x"}, "mem_mb"),
        ({"runtime": -5}, "runtime"),
    ],
)
def test_resource_that_pbs_cannot_take_is_named(server, resources, word):
    done = submit(resources={**GROUP["resources"], **resources})
    assert done.returncode == 1
    assert word in done.stderr
    assert server.calls("qsub") == []


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"groupid": "exposure_1001"}, "exposure_1001"),
        ({"groupid": "a b/c:(d"}, "a_b_c__d"),
        ({"groupid": "9" * 300}, "j" + "9" * 60),
        ({"type": "single", "rule": "flat", "wildcards": {"band": "r", "ccd": "3"}}, "flat_r_3"),
    ],
)
def test_names_are_readable_and_what_pbs_accepts(properties, name):
    assert module("submit").job_name({**GROUP, **properties}) == name


def test_script_runs_in_the_survey_and_leaves_its_exit_code(server):
    job_id = submitted()
    script = server.calls("qsub")[0][-1]
    body = Path(script).read_text()
    assert "--cores 4 --attempt" in body, "the inner run is limited to the allocation"
    # what Snakemake's command does is not under test here
    start = body.index("cd /data &&")
    Path(script).write_text(body[:start] + "pwd; exit 3" + body[body.index("\n)\n", start) :])
    done = subprocess.run(["sh", Path(script).resolve()], cwd="/", capture_output=True, check=False)
    assert done.returncode == 3
    (log,) = Path("logs/pbs").glob("exposure_1001.*.out")
    assert str(Path.cwd()) in log.read_text().splitlines()
    word, why = status(job_id)
    assert word == "failed"
    assert "exit code 3" in why
    assert str(log) in why
    assert not Path("x").exists(), "nothing of the folder's name is run by a shell"


def test_odd_values_of_the_environment_reach_the_job_unchanged(server, monkeypatch):
    odd = "/a b:'c\":$(touch x),d\n/e"
    monkeypatch.setenv("LD_LIBRARY_PATH", odd)
    submitted()
    script = Path(server.calls("qsub")[0][-1])
    body = script.read_text()
    start = body.index("cd /data &&")
    show = 'printf %s "$LD_LIBRARY_PATH" >shown'
    script.write_text(body[:start] + show + body[body.index("\n)\n", start) :])
    subprocess.run(["sh", str(script)], check=True)
    assert Path("shown").read_text() == odd


def test_submission_waits_for_a_server_that_is_away(server):
    server.set(away=3)
    assert submitted() == "1275.node1"
    assert len(server.calls("qsub")) == 2, "before the second one the server had to answer"


def test_server_that_stays_away_is_a_failed_submission(server, monkeypatch):
    monkeypatch.setenv("COADDFLOW_PBS_PATIENCE", "0.1")
    server.set(away=1000)
    done = submit()
    assert done.returncode == 1
    assert done.stdout == ""
    assert "away" in done.stderr


def test_refusal_is_reported_and_not_repeated(server):
    server.set(failures=[{"code": 170, "err": "qsub: Unknown queue"}])
    done = submit()
    assert done.returncode == 1
    assert "Unknown queue" in done.stderr
    assert len(server.calls("qsub")) == 1


def test_job_that_got_in_although_qsub_failed_is_found(server):
    server.set(failures=[{"code": 255, "err": "qsub: End of File", "gets_in": True}])
    assert submitted() == "999.node1"
    assert len(server.calls("qsub")) == 1


# --- a live job of the same group -------------------------------------------------------------


@pytest.mark.parametrize("state", ["Q", "R", "H", "E", "S"])
def test_live_job_of_the_group_is_taken_up(server, state):
    job_id = submitted()
    server.set_job(job_id, state=state)
    # the second run of Snakemake has other numbers and fewer jobs left, the group is the same
    done = submit(threads=1, resources={"mem_mb": 450, "runtime": 5})
    assert done.stdout.strip() == job_id
    assert "taken up" in done.stderr
    assert len(server.calls("qsub")) == 1


def test_other_group_is_submitted(server):
    assert submitted() != submitted(jobid="5a1b2c3d-0000-5000-8000-000000000002")


@pytest.mark.parametrize("how", ["exit code", "finished", "unknown", "never runs"])
def test_dead_job_of_the_group_is_submitted_again(server, how):
    job_id = submitted()
    if how == "exit code":
        leave_exit_code(job_id, 1)
    elif how == "finished":
        server.set_job(job_id, state="F", exit_status=271)
    elif how == "unknown":
        server.set(jobs={})
    else:
        server.set_job(job_id, state="Q", comment="Can Never Run: Insufficient amount: ncpus")
    assert submitted() == "1276.node1"
    assert job_id not in server.read()["jobs"] or how in ("exit code", "finished")


def test_nothing_is_submitted_while_it_is_unknown_whether_the_group_lives(server, monkeypatch):
    submitted()
    monkeypatch.setenv("COADDFLOW_PBS_PATIENCE", "0.1")
    server.set(away=1000)
    assert submit().returncode == 1
    assert len(server.calls("qsub")) == 1


# --- status -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["Q", "R", "H", "E", "S", "T", "W", "U"])
def test_job_that_has_not_ended_is_running(server, state):
    job_id = submitted()
    server.set_job(job_id, state=state, comment="Not Running: Job is held")
    assert status(job_id) == ("running", "")


@pytest.mark.parametrize(
    ("exit_status", "comment", "word"),
    [
        (
            0,
            "Job run at Sun Nov 22 at 17:53 on (node1:ncpus=1:mem=100kb) and finished",
            "success",
        ),
        (3, "Job run at Sun Nov 22 at 17:53 on (node1:ncpus=1:mem=102400kb) and failed", "failed"),
        (271, "Job run at Sun Nov 22 at 17:53 on (node1) and terminated by astro@login1", "failed"),
        (-29, "Job run at Sun Nov 22 at 17:53 on (node1) and exceeded resource walltime", "failed"),
    ],
)
def test_finished_job_of_the_history(server, exit_status, comment, word):
    job_id = submitted()
    server.set_job(job_id, state="F", exit_status=exit_status, comment=comment)
    found, why = status(job_id)
    assert found == word
    assert (comment in why) == (word == "failed"), "long lines are joined without a gap"
    assert status(job_id)[0] == word, "asked again it says the same"


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_of_the_job_needs_no_server(server, code):
    job_id = submitted()
    leave_exit_code(job_id, code)
    server.set(away=1000)
    assert status(job_id)[0] == ("failed" if code else "success")
    assert server.calls("qstat") == []


def test_history_switched_off(server):
    server.set(history=False)
    job_id = submitted()
    server.set_job(job_id, state="R")
    assert status(job_id)[0] == "running"
    server.set_job(job_id, state="F")
    assert status(job_id)[0] == "running", "the exit code may come late"
    leave_exit_code(job_id, 0)
    assert status(job_id)[0] == "success"


@pytest.mark.parametrize("dialect", ["openpbs", "torque"])
def test_job_that_vanished_without_exit_code_fails_after_a_while(server, dialect):
    server.set(history=False, dialect=dialect)
    job_id = submitted()
    server.set(jobs={})
    assert status(job_id)[0] == "running"
    time.sleep(0.5)
    word, why = status(job_id)
    assert word == "failed"
    assert "left no exit code" in why


def test_job_that_comes_back_is_running(server):
    job_id = submitted()
    server.set(jobs={})
    status(job_id)
    server.set_job(job_id, state="R")
    assert status(job_id)[0] == "running"
    server.set(jobs={})
    time.sleep(0.5)
    assert status(job_id)[0] == "running", "the time is counted anew"


def test_torque_dialect(server):
    server.set(dialect="torque")
    job_id = submitted()
    server.set_job(job_id, state="R")
    assert status(job_id)[0] == "running"
    server.set_job(job_id, state="C")
    assert status(job_id)[0] == "running"
    leave_exit_code(job_id, 0)
    assert status(job_id)[0] == "success"


def test_job_that_can_never_run_fails_and_is_removed(server):
    job_id = submitted()
    comment = "Can Never Run: Insufficient amount of resource: ncpus (R: 500 A: 8 T: 8)"
    server.set_job(job_id, state="Q", comment=comment)
    assert status(job_id)[0] == "running", "a node may just be coming back"
    time.sleep(0.5)
    word, why = status(job_id)
    assert word == "failed"
    assert comment in why
    assert server.calls("qdel") == [["qdel", job_id]]


def test_server_away_is_running(server):
    job_id = submitted()
    server.set(away=1000)
    assert status(job_id)[0] == "running"
    time.sleep(0.5)
    assert status(job_id)[0] == "running", "also after the time of grace"


def test_mixed_answer_with_an_unknown_job(server):
    ids = [submitted(jobid=f"group-{i}") for i in range(3)]
    server.set_job(ids[0], state="F", exit_status=0)
    jobs = server.read()["jobs"]
    del jobs[ids[1]]
    server.set(jobs=jobs)
    assert [status(job_id)[0] for job_id in ids] == ["success", "running", "running"]


def test_one_question_serves_all_jobs(server, monkeypatch):
    monkeypatch.setenv("COADDFLOW_PBS_POLL", "60")
    ids = [submitted(jobid=f"group-{i}") for i in range(12)]
    for job_id in ids:
        server.set_job(job_id, state="R")
    with pbs.ledger() as book:
        book["asked"] = 0.0
    assert {status(job_id)[0] for job_id in ids} == {"running"}
    assert len(server.calls("qstat")) == 1
    assert set(ids) < set(server.calls("qstat")[0])


def test_unknown_job_and_damaged_ledger_are_running(server):
    server.set_job("77.node1", state="R")
    assert status("77.node1")[0] == "running"
    (pbs.FOLDER / "jobs.json").write_text("{")
    assert status("77.node1")[0] == "running"


def test_no_qstat_at_all_is_running(server, monkeypatch):
    job_id = submitted()
    monkeypatch.setenv("PATH", "/nowhere")
    word, why = status(job_id)
    assert word == "running"
    assert "FileNotFoundError" in why


@pytest.mark.parametrize(
    "value",
    [
        'say \\"hello\\", \\\\ and = more',
        "one\n    job_state = F\n    Exit_status = 0\nJob_Name = x",
        "x" * 3000,
        "käse\t\n\tJob = 1",
    ],
)
def test_odd_environment_does_not_change_what_is_read(value):
    comment = "Job run at Sun Nov 22 at 17:53 on (node1:ncpus=1:mem=102400kb) and terminated"
    job = {"state": "R", "exit_status": 271, "comment": comment, "environment": {"ODD": value}}
    text = fake_pbs.block("12.node1", job) + "\n" + fake_pbs.block("13.node1", {"state": "Q"})
    jobs = pbs.parse_qstat(text)
    assert jobs["12.node1"].state == "R"
    assert jobs["12.node1"].exit_status == 271
    assert jobs["12.node1"].comment == comment
    assert jobs["13.node1"].state == "Q"


def test_recorded_answers_of_a_real_server():
    folder = Path(__file__).parent.parent.parent / "shared" / "cluster" / "openpbs-recordings"
    if not folder.is_dir():
        pytest.skip("the recordings of a real OpenPBS are not here")
    read = {name: pbs.parse_qstat((folder / f"{name}.txt").read_text()) for name in NAMES}
    jobs = {name: next(iter(found.values())) for name, found in read.items()}
    assert {name: (job.state, job.exit_status) for name, job in jobs.items()} == NAMES
    assert pbs.never_runs(jobs["never"])
    assert "exceeded resource walltime" in jobs["wall"].comment
    assert jobs["ok"].output_path == "login1:/data/survey/calexp.1001.o1275"
    assert list(pbs.parse_qstat((folder / "mixed.txt").read_text())) == ["1275.node1", "1276.node1"]


NAMES = {
    "ok": ("F", 0),
    "bad": ("F", 3),
    "kill": ("F", 271),
    "wall": ("F", -29),
    "never": ("Q", None),
    "running": ("R", None),
}


# --- cancel, cost -----------------------------------------------------------------------------


def test_cancel_takes_many_jobs_at_once(server):
    done = program("cancel", "1.node1", "2.node1")
    assert done.returncode == 0
    assert server.calls("qdel") == [["qdel", "1.node1", "2.node1"]]


def test_cancel_comes_back_within_two_seconds(server):
    (server.folder / "qdel").write_text("#!/bin/sh\nexec sleep 4\n")
    started = time.monotonic()
    assert program("cancel", "1.node1").returncode == 0
    assert time.monotonic() - started < 3


def test_surveys_side_by_side_do_not_meet(server, tmp_path, monkeypatch):
    first = submitted()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert submitted() != first
