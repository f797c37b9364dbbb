"""The programs of profiles/pbs, in front of a server that answers as a real one was seen to."""

import ast
import contextlib
import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_pbs
import pytest

import coaddflow
from coaddflow.cluster import attempts
from coaddflow.cluster.attempts import Attempt
from coaddflow.cluster.history import end_of_pbs_job, latest_jobs, will_be_refused
from coaddflow.cluster.limits import Limits, pbs_limits
from coaddflow.cluster.pbs import limits, records
from coaddflow.cluster.pbs.job_script import job_name
from coaddflow.cluster.pbs.limits import Asked
from coaddflow.cluster.pbs.server import parse_qstat
from coaddflow.workflow.report import failure_text
from coaddflow.workflow.stages import job_names

NAMES = job_names()

PROGRAMS = Path(__file__).parents[2] / "profiles" / "pbs"

GROUP = {
    "type": "group",
    "groupid": "exposure_1001",
    "jobid": "5a1b2c3d-0000-5000-8000-000000000001",
    "threads": 4,
    "resources": {"mem_mb": 1800, "runtime": 75},
}
TARGETS = ["calexp:exposure=1001,ccd=0", "calexp:exposure=1001,ccd=1", "manifest:exposure=1001"]
SCRIPT = """\
#!/bin/sh
# properties = {properties}
cd /data && python -m snakemake --snakefile '/x y/Snakefile' --target-jobs {targets} \
--allowed-rules calexp manifest --cores 'all' --attempt 1 --mode 'remote' && exit 0 || exit 1
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A survey's folder to work in, and a server whose commands are found first."""
    server = fake_pbs.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{server.folder}{os.pathsep}{os.environ['PATH']}")
    # the programs find the package by themselves
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name, value in {"POLL": 0, "GRACE": 60, "PAUSE": 0.05, "PATIENCE": 5}.items():
        monkeypatch.setenv(f"COADDFLOW_PBS_{name}", str(value))
    survey = tmp_path / "my survey; touch x; 'y & z'"
    survey.mkdir()
    monkeypatch.chdir(survey)
    Path("config.yaml").write_text("camera: six\n")
    return server


@pytest.fixture
def short_grace(monkeypatch):
    """A time of grace that a submission can wait for."""
    monkeypatch.setenv("COADDFLOW_PBS_GRACE", "0.2")


def program(name, *arguments, **options):
    """Run a program as Snakemake does."""
    return subprocess.run(
        [sys.executable, "-S", str(PROGRAMS / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def job_script(run="first", targets=TARGETS, **changes):
    """Write the job script of a run of Snakemake, in the folder that the run has for them."""
    path = Path(f".snakemake/tmp.{run}/snakejob.{time.monotonic_ns()}.sh")
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = " ".join(f"'{target}'" for target in targets)
    properties = json.dumps({**GROUP, **changes})
    path.write_text(SCRIPT.format(properties=properties, targets=targets))
    return str(path)


def submit(**changes):
    """Submit a job script with these properties; return what submit.py did."""
    return program("submit", job_script(**changes))


def submitted(**changes):
    done = submit(**changes)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def others(number):
    """Return what is different in a job of another exposure."""
    return {"groupid": f"exposure_{number}", "targets": [f"manifest:exposure={number}"]}


def status(job_id):
    """Return word and explanation; status.py must never fail."""
    done = program("status", job_id)
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    return done.stdout.strip(), done.stderr


def let_pass(seconds):
    """Make the last answer of the server older."""
    path = records.FOLDER / "answer.json"
    answer = json.loads(path.read_text())
    answer["asked"] -= seconds
    answer["ended"] = {job_id: since - seconds for job_id, since in answer["ended"].items()}
    path.write_text(json.dumps(answer))


def leave_exit_code(job_id, code):
    """Write the exit code of a job, as its script does when it ends."""
    (records.FOLDER / "exit" / records.label_of(job_id)).write_text(f"{code}\n")


def begin(job_id):
    """Let a job begin, as its script does."""
    label = records.label_of(job_id)
    (records.FOLDER / "tickets" / label).rename(records.FOLDER / "begun" / label)
    (records.FOLDER / "begun" / label).write_text(f"{job_id}\n")


def execute(script, body, job_id="1275.node1"):
    """Run what was submitted as a node does, with something else in place of Snakemake."""
    text = script.read_text()
    start = text.index("cd /data &&")
    altered = script.with_suffix(".altered")
    altered.write_text(text[:start] + body + text[text.index("\n)\n", start) :])
    return subprocess.run(
        ["sh", altered],
        cwd="/",
        env={**os.environ, "PBS_JOBID": job_id},
        capture_output=True,
        check=False,
    ).returncode


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
    assert job_name({**GROUP, **properties}) == name


def test_script_runs_in_the_survey_and_leaves_its_exit_code(server):
    job_id = submitted()
    script = server.script(1)
    assert "--cores 4 --attempt" in script.read_text(), "limited to the allocation"
    assert execute(script, "pwd; exit 3") == 3
    (log,) = Path("logs/pbs").glob("exposure_1001.*.out")
    assert str(Path.cwd()) in log.read_text().splitlines()
    word, why = status(job_id)
    assert word == "failed"
    assert "exit code 3" in why
    assert str(log) in why
    assert not Path("x").exists(), "nothing of the folder's name is run by a shell"


def test_why_a_job_was_terminated_is_left_to_the_server(server):
    job_id = submitted()
    assert execute(server.script(1), "kill -TERM $(exec sh -c 'echo $PPID')") == 143
    comment = "Job run at Sun Nov 22 at 17:53 on (node1) and terminated by astro@node1"
    server.set_job(job_id, state="F", exit_status=271, comment=comment)
    word, why = status(job_id)
    assert word == "failed"
    assert "terminated by astro" in why


def test_job_that_pbs_starts_again_does_nothing(server):
    submitted()
    script = server.script(1)
    assert execute(script, "echo once >>done.txt; exit 0") == 0
    assert execute(script, "echo twice >>done.txt; exit 0") == records.BEGUN_BEFORE
    assert Path("done.txt").read_text() == "once\n"


@pytest.mark.parametrize("first_start", ["works on", "is dead"])
def test_second_start_does_not_end_a_job_whose_first_start_may_work(server, first_start):
    job_id = submitted()
    begin(job_id)
    code = execute(server.script(1), "exit 0")
    server.set_job(job_id, state="F", exit_status=code, comment="Job run and failed")
    assert status(job_id)[0] == "running"
    if first_start == "works on":
        leave_exit_code(job_id, 0)
        assert status(job_id)[0] == "success"
    else:
        let_pass(60)
        word, why = status(job_id)
        assert word == "failed"
        assert "started it a second time" in why


def test_odd_values_of_the_environment_reach_the_job_unchanged(server, monkeypatch):
    odd = "/a b:'c\":$(touch x),d\n/e"
    monkeypatch.setenv("LD_LIBRARY_PATH", odd)
    submitted()
    script = server.script(1)
    assert execute(script, 'printf %s "$LD_LIBRARY_PATH" >shown') == 0
    assert Path("shown").read_text() == odd


@pytest.mark.parametrize(
    "words",
    [
        "qsub: would exceed queue workq's per-user limit of jobs in 'Q' state",
        "qsub: Maximum number of jobs for user astro already in queue workq",
        "qsub: Queue is not enabled",
    ],
)
def test_full_queue_is_waited_for_as_long_as_own_jobs_live(server, monkeypatch, words):
    submitted()
    # the three pauses are longer than the patience
    monkeypatch.setenv("COADDFLOW_PBS_PATIENCE", "0.5")
    monkeypatch.setenv("COADDFLOW_PBS_PAUSE", "0.05")
    server.set(failures=[{"code": 38, "err": words}] * 3)
    assert submitted(**others(1002)) == "1276.node1"
    assert len(server.calls("qsub")) == 5
    assert len(records.names("jobs")) == 2, "nothing is left of those that PBS did not take"


def test_full_queue_without_own_jobs_is_a_failed_submission(server, monkeypatch):
    monkeypatch.setenv("COADDFLOW_PBS_PATIENCE", "0.1")
    server.set(
        failures=[
            {
                "code": 38,
                "err": "qsub: Maximum number of jobs for user astro already in queue workq",
            }
        ]
        * 9
    )
    done = submit()
    assert done.returncode == 1
    assert "takes no job: qsub: Maximum number" in done.stderr
    assert records.names("jobs") == records.names("tickets") == []


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
    # the second run has other numbers, and fewer jobs left; the last of them may be another one
    again = submit(threads=1, resources={"mem_mb": 450, "runtime": 5}, targets=TARGETS[:1])
    assert again.stdout.strip() == job_id
    assert "still exists: it is used" in again.stderr
    assert len(server.calls("qsub")) == 1


def test_job_that_was_taken_up_and_fails_has_failed(server):
    job_id = submitted()
    assert submitted(run="second") == job_id
    leave_exit_code(job_id, 1)
    assert status(job_id)[0] == "failed"
    assert submitted(run="second") == "1276.node1", "and is tried again"


def test_job_of_a_run_that_grouped_its_work_differently_is_found(server):
    targets = [*TARGETS, "manifest:exposure=1002"]
    job_id = submitted(groupid="some_exposures", targets=targets)
    assert submitted(run="second") == job_id


def test_other_group_is_submitted(server):
    assert submitted() != submitted(**others(1002))


def test_other_part_of_the_group_is_submitted(server):
    first = submitted(groupid="calibs_3", targets=["flat:band=r,ccd=3"])
    assert submitted(groupid="calibs_3", targets=["flat:band=g,ccd=3"]) != first
    assert server.calls("qdel") == []


@pytest.mark.parametrize("how", ["exit code", "finished", "unknown", "never runs"])
def test_dead_job_of_the_group_is_submitted_again(server, short_grace, how):
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


@pytest.mark.parametrize("change", ["settings", "more targets", "damaged"])
def test_live_job_that_works_on_something_else_is_deleted_first(server, change):
    job_id = submitted()
    server.set_job(job_id, state="R")
    begin(job_id)
    targets = TARGETS
    if change == "settings":
        Path("config.yaml").write_text("camera: seven\n")
    elif change == "more targets":
        targets = [*TARGETS, "calexp:exposure=1001,ccd=2"]
    else:
        (records.FOLDER / "jobs" / f"{records.label_of(job_id)}.json").write_text("{")
    done = submit(run="second", targets=targets)
    assert done.stdout.strip() == "1276.node1"
    assert "something else" in done.stderr
    order = [call[0] for call in server.calls() if call[0] != "qstat"]
    assert order == ["qsub", "qdel", "qsub"]


def test_cancelled_job_that_still_lives_is_not_taken_up(server):
    job_id = submitted()
    server.set_job(job_id, state="R", immortal=True)
    begin(job_id)
    program("cancel", job_id)
    server.set_job(job_id, immortal=False)
    assert submitted(run="second") == "1276.node1"


def test_nothing_is_submitted_while_a_deleted_job_still_lives(server, monkeypatch):
    job_id = submitted()
    begin(job_id)
    server.set_job(job_id, state="R", immortal=True)
    Path("config.yaml").write_text("camera: seven\n")
    monkeypatch.setenv("COADDFLOW_PBS_PATIENCE", "0.5")
    assert submit().returncode == 1
    assert len(server.calls("qsub")) == 1


def test_job_that_waits_for_files_of_a_run_that_removed_them_is_replaced(server):
    waits, works = submitted(), submitted(**others(1002))
    begin(works)
    server.set_job(works, state="R")
    shutil.rmtree(".snakemake/tmp.first")
    assert submitted(run="second", **others(1002)) == works
    assert submitted(run="second") == "1277.node1"
    assert server.calls("qdel") == [["qdel", waits]]
    assert execute(server.script(1), "touch done.txt") == 1
    assert not Path("done.txt").exists()


def test_two_snakemakes_in_one_folder_submit_once(server):
    scripts = [job_script(run) for run in ("first", "second")]
    command = [sys.executable, "-S", str(PROGRAMS / "submit.py")]
    started = [
        subprocess.Popen([*command, script], stdout=subprocess.PIPE, text=True)
        for script in scripts
    ]
    assert {process.communicate()[0].strip() for process in started} == {"1275.node1"}
    assert len(server.calls("qsub")) == 1


# --- killed, lost, damaged, full --------------------------------------------------------------


def test_kill_between_submission_and_note(server):
    server.set(failures=[{"gets_in": True, "kills": True}])
    assert submit().returncode == -signal.SIGKILL
    again = submit(run="second")
    assert again.stdout.strip() == "999.node1"
    assert "still exists: it is used" in again.stderr
    assert len(server.calls("qsub")) == 1


def test_kill_between_submission_and_note_where_the_server_cannot_find_the_job(server):
    server.set(dialect="torque", failures=[{"gets_in": True, "kills": True}])
    assert submit().returncode == -signal.SIGKILL
    assert submitted(run="second") == "1275.node1"
    assert execute(server.script(1), "echo lost >>done.txt", "999.node1") == 1
    assert execute(server.script(2), "echo mine >>done.txt", "1275.node1") == 0
    assert Path("done.txt").read_text() == "mine\n", "one of two jobs works"


def test_kill_between_submission_and_note_of_a_job_that_has_begun(server):
    server.set(dialect="torque", failures=[{"gets_in": True, "kills": True}])
    assert submit().returncode == -signal.SIGKILL
    server.set_job("999.node1", state="R")
    inside = f"{sys.executable} -S '{PROGRAMS}/submit.py' {job_script('second')} >id.txt 2>err.txt"
    assert execute(server.script(1), inside, "999.node1") == 0
    assert Path("id.txt").read_text() == "999.node1\n"
    assert len(server.calls("qsub")) == 1


def test_kill_between_the_files_of_a_job_that_is_to_be_submitted(server, monkeypatch):
    steps, write = iter([1]), records.write

    def killed_the_second_time(path, text):
        next(steps)
        write(path, text)

    task = {"targets": TARGETS, "settings": "", "files": ""}
    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(records, "write", killed_the_second_time)
        records.announce(records.new_label("exposure_1001", "00000000"), task)
    assert submitted() == "1275.node1", "there was no job, and nobody waits for it"


def test_begun_job_is_not_withdrawn_where_the_folder_is_shown_as_it_was(server, monkeypatch):
    works, waits = submitted(), submitted(**others(1002))
    begin(works)
    labels = [records.label_of(job_id) for job_id in (works, waits)]
    monkeypatch.setattr(records, "names", lambda folder: [])
    assert [records.withdraw(label) for label in labels] == [False, True]
    assert [records.withdraw(label) for label in labels] == [False, True], "asked again"
    assert execute(server.script(2), "touch done.txt") == 1
    assert not Path("done.txt").exists()


@pytest.mark.parametrize("step", range(9))
def test_kill_while_the_end_of_a_job_is_noted(server, monkeypatch, step):
    job_id = submitted()
    begin(job_id)
    leave_exit_code(job_id, 0)
    server.set(jobs={}, history=False)
    steps = iter([records.remove] * step)

    def remove(path):
        return next(steps)(path)  # StopIteration: killed here

    with monkeypatch.context() as patch, contextlib.suppress(StopIteration):
        patch.setattr(records, "remove", remove)
        records.note_end(records.label_of(job_id), job_id, "success", "")
    assert status(job_id)[0] == "success"
    assert submitted(run="second") == "1276.node1"
    assert len(records.names("ids")) == 1


def test_lost_records_and_a_job_that_waits(server):
    submitted()
    shutil.rmtree(records.FOLDER)
    assert submitted() == "1276.node1"
    assert execute(server.script(1), "touch done.txt") == 1
    assert not Path("done.txt").exists()


def test_lost_records_and_a_job_that_works(server):
    job_id = submitted()
    server.set_job(job_id, state="R")
    inside = (
        f"rm -r {records.FOLDER}; "
        f"{sys.executable} -S '{PROGRAMS}/submit.py' {job_script('second')} >id.txt 2>err.txt"
    )
    execute(server.script(1), inside)
    assert Path("id.txt").read_text() == "1276.node1\n"
    order = [call[0] for call in server.calls() if call[0] != "qstat"]
    assert order == ["qsub", "qdel", "qsub"], "the first job was found by its log, and deleted"


def full_disk():
    """Let nothing be written to files any more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_full_disk_submits_nothing(server):
    script = job_script()
    done = program("submit", script, preexec_fn=full_disk)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "File too large" in done.stderr
    assert server.calls("qsub") == []
    assert records.names("jobs") == records.names("tickets") == []


def test_full_disk_does_not_hide_how_a_job_ended(server):
    ids = [submitted(), submitted(**others(1002))]
    leave_exit_code(ids[0], 0)
    leave_exit_code(ids[1], 1)
    words = [program("status", job_id, preexec_fn=full_disk).stdout for job_id in ids]
    assert words == ["success\n", "failed\n"]


def test_submission_that_waits_for_the_server_holds_up_nobody(server, monkeypatch):
    ended, lives = submitted(), submitted(**others(1002))
    leave_exit_code(ended, 0)
    server.set(away=10_000)
    monkeypatch.setenv("COADDFLOW_PBS_PATIENCE", "600")
    waits = subprocess.Popen(
        [sys.executable, "-S", str(PROGRAMS / "submit.py"), job_script(**others(1003))]
    )
    try:
        while len(server.calls("qsub")) < 3:
            time.sleep(0.02)
        assert status(ended)[0] == "success"
        assert status(lives)[0] == "running"
        assert program("cancel", lives).returncode == 0
        assert waits.poll() is None
    finally:
        waits.send_signal(signal.SIGINT)
        assert waits.wait() == 130, "Ctrl-C ends it"


PACKAGE = Path(coaddflow.__file__).parent
READ_BY_PROGRAMS = [
    *sorted(PROGRAMS.glob("*.py")),
    *(PACKAGE / name for name in ("__init__.py", "cluster/__init__.py")),
    *sorted(PACKAGE.glob("cluster/pbs/*.py")),
]


@pytest.mark.parametrize("path", READ_BY_PROGRAMS, ids=lambda path: path.name)
def test_programs_are_of_python_3_6(path):
    ast.parse(path.read_text(), feature_version=(3, 6))


# --- status -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["Q", "R", "H", "E", "S", "T", "W", "U", "M"])
def test_job_that_has_not_ended_is_running(server, state):
    job_id = submitted()
    server.set_job(job_id, state=state, comment="Not Running: Job is held")
    assert status(job_id)[0] == "running"


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
        (-27, "Job run at Sun Nov 22 at 17:53 on (node1) and exceeded resource mem", "failed"),
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


@pytest.mark.parametrize("dialect", ["openpbs", "old"])
def test_history_switched_off(server, dialect):
    server.set(history=False, dialect=dialect)
    job_id = submitted()
    server.set_job(job_id, state="R")
    assert status(job_id)[0] == "running"
    server.set_job(job_id, state="F")
    assert status(job_id)[0] == "running", "the exit code may come late"
    leave_exit_code(job_id, 0)
    assert status(job_id)[0] == "success"


def test_trouble_with_history_is_not_the_end_of_it(server):
    job_id = submitted()
    qstat = (server.folder / "qstat").read_text()
    (server.folder / "qstat").write_text("#!/bin/sh\necho 'qstat: trouble' >&2; exit 1\n")
    assert status(job_id)[0] == "running"
    (server.folder / "qstat").write_text(qstat)
    server.set_job(job_id, state="F", exit_status=0)
    assert status(job_id)[0] == "success"


@pytest.mark.parametrize("dialect", ["openpbs", "torque"])
def test_job_that_vanished_without_exit_code_fails_after_a_while(server, dialect):
    server.set(history=False, dialect=dialect)
    job_id = submitted()
    server.set(jobs={})
    assert status(job_id)[0] == "running"
    let_pass(60)
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
    let_pass(60)
    assert status(job_id)[0] == "running", "the time is counted anew"


@pytest.mark.parametrize("pause", ["the server was away", "nobody asked for an hour"])
def test_time_of_grace_is_counted_anew_after(server, pause):
    job_id = submitted()
    server.set(jobs={})
    status(job_id)
    if pause == "the server was away":
        server.set(away=1)
        let_pass(60)
        status(job_id)
    else:
        let_pass(3600)
    assert status(job_id)[0] == "running"
    let_pass(60)
    assert status(job_id)[0] == "failed"


def test_look_that_finds_a_job_counts_for_all(server):
    ids = [submitted(), submitted(**others(1002))]
    server.set(jobs={})
    status(ids[0])
    server.set_job(ids[0], state="R")
    status(ids[1])
    server.set(jobs={})
    let_pass(60)
    assert [status(job_id)[0] for job_id in ids] == ["running", "failed"]


@pytest.mark.parametrize(("age", "word"), [(1, "failed"), (3600, "running")])
def test_old_answer_says_nothing_while_somebody_else_asks(server, age, word):
    job_id = submitted()
    asked = time.time() - age
    answer = {"asked": asked, "jobs": {job_id: None}, "ended": {job_id: asked - 60}}
    (records.FOLDER / "answer.json").write_text(json.dumps(answer))
    with records.locked("asking"):
        assert status(job_id)[0] == word
    assert server.calls("qstat") == []


def test_torque_dialect(server):
    server.set(dialect="torque")
    job_id = submitted()
    begin(job_id)
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
    let_pass(60)
    word, why = status(job_id)
    assert word == "failed"
    assert comment in why
    assert server.calls("qdel") == [["qdel", job_id]]


def test_job_of_lost_records_that_can_never_run_takes_no_ticket_of_others(server):
    submitted()
    tickets = records.names("tickets")
    server.set_job("77.node1", state="Q", comment="Can Never Run: Insufficient amount: ncpus")
    status("77.node1")
    let_pass(60)
    assert status("77.node1")[0] == "failed"
    assert records.names("tickets") == tickets


def test_job_that_could_not_be_started_fails_and_is_removed(server):
    job_id = submitted()
    comment = "job held, too many failed attempts to run"
    server.set_job(job_id, state="H", comment=comment)
    status(job_id)
    let_pass(60)
    word, why = status(job_id)
    assert word == "failed"
    assert comment in why
    assert server.calls("qdel") == [["qdel", job_id]]


def test_server_away_is_running(server):
    job_id = submitted()
    server.set(away=1000)
    assert status(job_id)[0] == "running"
    let_pass(60)
    assert status(job_id)[0] == "running", "also after the time of grace"


@pytest.mark.parametrize("dialect", ["openpbs", "old"])
def test_mixed_answer_with_an_unknown_job(server, dialect):
    server.set(dialect=dialect)
    ids = [submitted(**others(i)) for i in range(3)]
    server.set_job(ids[0], state="F", exit_status=0)
    jobs = server.read()["jobs"]
    del jobs[ids[1]]
    server.set(jobs=jobs)
    assert [status(job_id)[0] for job_id in ids] == ["success", "running", "running"]


def test_one_question_serves_all_jobs(server, monkeypatch):
    monkeypatch.setenv("COADDFLOW_PBS_POLL", "60")
    ids = [submitted(**others(i)) for i in range(12)]
    for job_id in ids:
        server.set_job(job_id, state="R")
    assert {status(job_id)[0] for job_id in ids} == {"running"}
    (call,) = server.calls("qstat")
    assert set(ids) < set(call)
    assert "-E" in call, "in one connection"


def test_unknown_job_and_damaged_answer_are_running(server):
    server.set_job("77.node1", state="R")
    assert status("77.node1")[0] == "running"
    (records.FOLDER / "answer.json").write_text("[{")
    assert status("77.node1")[0] == "running"


def test_programs_find_the_package_where_python_does_not_look_beside_them(server, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    job_id = submitted()
    leave_exit_code(job_id, 0)
    assert status(job_id) == ("success", "")
    assert program("cancel", "1.node1").returncode == 0
    assert server.calls("qdel") == [["qdel", "1.node1"]]


def test_programs_that_cannot_be_read_are_no_end_of_the_run(server, tmp_path):
    shutil.copy(PROGRAMS / "status.py", tmp_path)
    command = [sys.executable, "-S", str(tmp_path / "status.py"), "1.node1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "running\n"
    assert "ModuleNotFoundError" in done.stderr


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
    jobs = parse_qstat(text)
    assert jobs["12.node1"].state == "R"
    assert jobs["12.node1"].exit_status == 271
    assert jobs["12.node1"].comment == comment
    assert jobs["13.node1"].state == "Q"


RECORDED = {
    "finished": ("F", 0, "success", ""),
    "failed": ("F", 3, "failed", "and failed (exit status 3)"),
    "deleted": ("F", 271, "failed", "terminated by astro@node1"),
    "walltime": ("F", -29, "failed", "exceeded resource walltime"),
    "memory": ("F", -27, "failed", "exceeded resource mem"),
    "node_lost": ("F", -20, "failed", "its node was lost"),
    "never_runs": ("Q", None, "failed", "Can Never Run: Insufficient amount of resource: ncpus"),
    "held": ("H", -3, "failed", "too many failed attempts to run"),
    "running": ("R", None, "running", ""),
    "odd_environment": ("R", None, "running", ""),
    # it is not asked what they want: their tasks are not in the records
    "waits_for_ever": ("Q", None, "running", ""),
    "waits_for_cores": ("Q", None, "running", ""),
    "queued": ("Q", None, "running", ""),
    "held_by_user": ("H", None, "running", "is held (qrls releases it)"),
    "deleted_queued": ("F", None, "failed", "Not enough free nodes available and terminated"),
    "deleted_held": ("F", None, "failed", "ended without an exit code"),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_answers_of_a_real_server(server, monkeypatch, name):
    text = (Path(__file__).parent / "openpbs" / f"{name}.txt").read_text()
    state, exit_status, word, reason = RECORDED[name]
    ((job_id, job),) = parse_qstat(text).items()
    assert (job.state, job.exit_status) == (state, exit_status)
    (server.folder / "answer.txt").write_text(text)
    answers = f"#!/bin/sh\ncat '{server.folder}/answer.txt'\n"
    (server.folder / "qstat").write_text(answers)
    monkeypatch.setenv("COADDFLOW_PBS_GRACE", "0")
    found, why = status(job_id)
    assert found == word
    assert reason in why


# --- more than any node has -------------------------------------------------------------------

TOO_MUCH = {"mem_mb": 10_780, "runtime": 75}
"""The second attempt of a tract on nodes of 6 GB: together the nodes have it, none alone."""


def rows_of_ended():
    return [line.split("\t") for line in (records.FOLDER / "ended.tsv").read_text().splitlines()]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"resources": TOO_MUCH}, "10780 MB, and the largest node of queue workq has 6144 MB"),
        ({"threads": 12}, "12 cores, and the largest node of queue workq has 8"),
    ],
)
def test_what_no_node_has_is_refused_and_the_refusal_is_kept(server, asked, why):
    done = submit(groupid="tract_0", targets=["tract:band=r,tract=0"], **asked)
    assert done.returncode == 1
    assert why in done.stderr
    assert server.calls("qsub") == []
    (row,) = rows_of_ended()
    assert row[1:4] == ["", "tract_0", "refused"]
    job = latest_jobs(".", NAMES)["tract_0"]
    assert job.outcome == "refused"
    assert why in job.explanation
    assert will_be_refused(row[4])


def test_all_of_the_largest_node_is_submitted(server):
    assert submitted(threads=8, resources={"mem_mb": 6144, "runtime": 75}) == "1275.node1"


def test_nodes_of_several_sizes_have_memory_and_cores_together(server):
    def grow(answer):
        node = answer["nodes"]["node2"]["resources_available"]
        node.update(mem="24gb", ncpus=2)

    server.change_answer("nodes", grow)
    assert submit(threads=2, resources=TOO_MUCH).returncode == 0
    done = submit(**others(1002), threads=4, resources=TOO_MUCH)
    assert "the largest node of queue workq with 4 cores has 6144 MB" in done.stderr


def test_vnodes_of_a_host_serve_one_job_together(server):
    def split(answer):
        for name in ("node3", "node4"):
            answer["nodes"][name]["resources_available"]["host"] = "large"

    server.change_answer("nodes", split)
    assert submit(threads=16, resources=TOO_MUCH).returncode == 0


def test_nodes_of_another_queue_and_nodes_that_are_gone_do_not_count(server):
    def change(answer):
        for name, changes in (("node1", {"queue": "big"}), ("node2", {"state": "stale"})):
            answer["nodes"][name]["resources_available"]["mem"] = "24gb"
            answer["nodes"][name].update(changes)

    server.change_answer("nodes", change)
    assert submit(resources=TOO_MUCH).returncode == 1
    assert submit(resources={**TOO_MUCH, "pbs_queue": "big"}).returncode == 0


def test_a_node_that_is_offline_for_maintenance_counts(server):
    def change(answer):
        answer["nodes"]["node2"]["resources_available"]["mem"] = "24gb"
        answer["nodes"]["node2"]["state"] = "offline"

    server.change_answer("nodes", change)
    assert submit(resources=TOO_MUCH).returncode == 0


@pytest.mark.parametrize("about", ["queues", "server"])
@pytest.mark.parametrize(
    ("limit", "why"),
    [
        ({"walltime": "01:00:00"}, "75 minutes, and queue workq allows 60"),
        ({"mem": "1gb"}, "1800 MB, and the largest node of queue workq has 1024 MB"),
        ({"ncpus": 2}, "4 cores, and the largest node of queue workq has 2"),
    ],
)
def test_limits_of_queue_and_server_count(server, about, limit, why):
    def change(answer):
        for found in answer[{"queues": "Queue", "server": "Server"}[about]].values():
            found["resources_max"] = limit

    server.change_answer(about, change)
    assert why in submit().stderr


def test_routing_queue_has_the_limits_of_where_it_leads(server):
    def change(answer):
        queues = answer["Queue"]
        queues["short"] = {"resources_max": {"walltime": "00:10:00"}}
        queues["long"] = {"resources_max": {"walltime": "02:00:00"}}
        queues["entry"] = {"queue_type": "Route", "route_destinations": "short,long@server1"}

    server.change_answer("queues", change)
    resources = {**GROUP["resources"], "pbs_queue": "entry"}
    assert submit(resources=resources).returncode == 0
    done = submit(**others(1002), resources={**resources, "runtime": 150})
    assert "150 minutes, and queue entry allows 120" in done.stderr


@pytest.mark.parametrize("change", [{"dialect": "torque"}, {"away": 1}])
def test_where_the_nodes_are_not_told_nothing_is_refused_for_them(server, change):
    server.set(**change)
    assert submit(resources=TOO_MUCH).returncode == 0


def test_limits_for_retries_are_those_of_the_queue(server):
    def change(answer):
        answer["Queue"]["workq"]["resources_max"] = {"walltime": "48:00:00"}

    server.change_answer("queues", change)
    found = pbs_limits()
    assert found == Limits(((6144, 8),), 2880, "queue workq")
    assert found.memory(8) == 6144


def test_nodes_without_known_memory_limit_nothing(server):
    def change(answer):
        del answer["nodes"]["node3"]["resources_available"]["mem"]

    server.change_answer("nodes", change)
    assert pbs_limits("any").memory() is None
    assert submit(resources=TOO_MUCH).returncode == 0


def test_nodes_are_asked_about_once_for_many_jobs(server):
    submitted()
    server.change_answer("nodes", lambda answer: answer.update(nodes={}))
    assert submitted(**others(1002)) == "1276.node1"
    assert "6144 MB" in submit(**others(1003), resources=TOO_MUCH).stderr


def let_it_ask_for(job_id, **changes):
    """Make a job in the records, and in the queue, one that was submitted with other resources."""
    path = records.FOLDER / "jobs" / f"{records.label_of(job_id)}.json"
    task = json.loads(path.read_text())
    task["asked"] = Asked(*task["asked"])._replace(**changes)
    path.write_text(json.dumps(task))


@pytest.mark.parametrize(
    ("state", "why"), [("Q", "can never run: it asks for 10780 MB"), ("H", "replaced by coaddflow")]
)
def test_impossible_job_of_an_earlier_run_is_not_taken_up(server, state, why):
    job_id = submitted()
    server.set_job(job_id, state=state, comment="Not Running: Insufficient amount of resource: mem")
    let_it_ask_for(job_id, mem_mb=10_780)
    assert submitted(run="second") == "1276.node1"
    assert server.calls("qdel") == [["qdel", job_id]]
    (row,) = [row for row in rows_of_ended() if row[1] == job_id]
    assert why in row[4]


def test_waiting_job_that_asks_for_too_little_is_replaced_and_a_running_one_is_not(server):
    waits, works = submitted(), submitted(**others(1002))
    begin(works)
    server.set_job(works, state="R")
    more = {"resources": {"mem_mb": 3600, "runtime": 75}}
    assert submitted(run="second", **others(1002), **more) == works
    assert submitted(run="second", **more) == "1277.node1"
    assert server.calls("qdel") == [["qdel", waits]]


def test_job_that_waits_for_ever_fails_and_is_removed(server):
    job_id = submitted()
    let_it_ask_for(job_id, cores=12)
    server.set_job(job_id, comment="Not Running: Not enough free nodes available")
    job = latest_jobs(".", NAMES)["exposure_1001"]
    assert job.outcome == "never runs", "also while no Snakemake runs"
    word, why = status(job_id)
    assert word == "failed"
    assert "can never run: it asks for 12 cores, and the largest node of queue workq has 8" in why
    assert server.calls("qdel") == [["qdel", job_id]]


def test_job_that_was_too_large_and_has_begun_goes_on(server):
    job_id = submitted()
    let_it_ask_for(job_id, mem_mb=10_780)
    server.set_job(job_id, state="R")
    assert status(job_id) == ("running", "")


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ("6gb", 6144),
        ("6291456kb", 6144),
        ("512mb", 512),
        ("1tb", 2**20),
        ("2097152", 2),
        ("x", None),
    ],
)
def test_sizes_of_pbs(size, found):
    assert limits.megabytes(size) == found


@pytest.mark.parametrize(
    ("text", "found"), [("01:30:00", 90), ("90", 1), ("100:00:00", 6000), ("10:00", 10), ("", None)]
)
def test_durations_of_pbs(text, found):
    assert limits.minutes(text) == found


def test_refusal_of_qsub_is_kept(server):
    server.set(failures=[{"code": 170, "err": "qsub: Unknown queue"}])
    submit()
    (row,) = rows_of_ended()
    assert row[1:4] == ["", "exposure_1001", "refused"]
    assert "Unknown queue" in row[4]
    assert "Unknown queue" in latest_jobs(".", NAMES)["exposure_1001"].explanation
    assert submitted() == "1275.node1"
    assert latest_jobs(".", NAMES)["exposure_1001"].outcome == "live"


# --- jobs that wait or were deleted -----------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "comment", "said"),
    [
        ("H", None, "is held (qrls releases it)"),
        ("H", "job held by astro", "is held (qrls releases it): job held by astro"),
        ("W", None, "waits for the time at which it may start"),
    ],
)
def test_job_that_does_not_start_by_itself_is_told_once(server, state, comment, said):
    job_id = submitted()
    server.set_job(job_id, state=state, comment=comment)
    word, told = status(job_id)
    assert word == "running"
    assert f"PBS job {job_id}: exposure_1001 {said}\n" == told
    assert status(job_id) == ("running", "")
    server.set_job(job_id, state="R", comment=None)
    assert status(job_id) == ("running", "")


def test_job_that_is_long_in_the_queue_is_told_once(server, monkeypatch):
    job_id = submitted()
    server.set_job(job_id, comment="Not Running: Not enough free nodes available")
    assert status(job_id) == ("running", "")
    monkeypatch.setenv("COADDFLOW_PBS_WAIT", "0")
    assert "waits in the queue: Not Running: Not enough free nodes" in status(job_id)[1]
    server.set_job(job_id, comment="Not Running: Insufficient amount of resource: ncpus")
    assert status(job_id) == ("running", "")


@pytest.mark.parametrize(
    ("state", "comment", "outcome", "said"),
    [
        ("H", None, "held", "is held"),
        ("Q", "Not Running: Not enough free nodes", "live", "Not enough free nodes"),
        ("R", "Job run at Sun Nov 22", "live", "it is running"),
    ],
)
def test_status_shows_how_each_job_waits(server, state, comment, outcome, said):
    job_id = submitted()
    server.set_job(job_id, state=state, comment=comment)
    job = latest_jobs(".", NAMES)["exposure_1001"]
    assert job.outcome == outcome
    assert said in job.explanation


@pytest.mark.parametrize("comment", [None, "Not Running: Not enough free nodes and terminated"])
def test_job_that_was_deleted_before_it_began_has_ended_at_once(server, comment):
    job_id = submitted()
    server.set_job(job_id, state="F", comment=comment)
    word, why = status(job_id)
    assert word == "failed"
    assert "deleted before it began" in why
    assert (comment or "") in why
    assert latest_jobs(".", NAMES)["exposure_1001"].outcome == "cancelled"
    assert execute(server.script(1), "touch done.txt") == 1, "it does nothing"


def test_job_that_has_begun_and_whose_exit_code_is_late_has_its_time(server):
    job_id = submitted()
    begin(job_id)
    server.set_job(job_id, state="F", comment="Job run at Sun Nov 22 and finished")
    assert status(job_id)[0] == "running"
    leave_exit_code(job_id, 0)
    assert status(job_id)[0] == "success"


def test_what_coaddflow_replaced_was_not_cancelled_by_hand(server):
    job_id = submitted()
    begin(job_id)
    server.set_job(job_id, state="R")
    Path("config.yaml").write_text("camera: seven\n")
    assert submitted(run="second") == "1276.node1"
    assert end_of_pbs_job(job_id, "exposure_1001")[0] == "replaced"
    program("cancel", "1276.node1")
    assert latest_jobs(".", NAMES)["exposure_1001"].outcome == "cancelled"


# --- cancel, cost -----------------------------------------------------------------------------


def test_cancel_takes_many_jobs_at_once(server):
    done = program("cancel", "1.node1", "2.node1")
    assert done.returncode == 0
    assert server.calls("qdel") == [["qdel", "1.node1", "2.node1"]]


def test_jobs_that_wait_are_cancelled_even_if_the_server_is_away(server):
    cancelled, kept = submitted(), submitted(**others(1002))
    server.set(away=1000)
    program("cancel", cancelled)
    assert execute(server.script(1), "touch first.txt") == 1
    assert execute(server.script(2), "touch second.txt", kept) == 0
    assert not Path("first.txt").exists()
    server.set(away=0)
    assert submitted(run="second") == "1277.node1", "it is not taken up any more"


def test_cancelled_job_that_vanished_has_been_cancelled(server, monkeypatch):
    monkeypatch.setenv("COADDFLOW_PBS_GRACE", "60")
    server.set(history=False)
    job_id = submitted()
    begin(job_id)
    program("cancel", job_id)
    word, why = status(job_id)
    assert word == "failed"
    assert "interrupted" in why
    assert records.names("cancelled") == []


def test_cancel_without_ids_cancels_all_jobs_of_the_survey(server):
    ids = [submitted(), submitted(**others(1002))]
    done = program("cancel")
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        [ids[0], "exposure_1001:"],
        [ids[1], "exposure_1002:"],
    ]
    assert server.calls("qdel") == [["qdel", *ids]]
    assert records.names("tickets") == []


def test_interrupt_does_not_end_a_look(server):
    job_id = submitted()
    (server.folder / "qstat").write_text("#!/bin/sh\nkill -INT $PPID\nexit 1\n")
    assert status(job_id)[0] == "running"


def test_cancel_comes_back_while_qdel_waits(server):
    os.mkfifo("answer")
    (server.folder / "qdel").write_text("#!/bin/sh\nread answer <answer\ntouch ended\n")
    assert program("cancel", "1.node1").returncode == 0
    assert not Path("ended").exists()
    Path("answer").write_text("\n")
    while not Path("ended").exists():
        time.sleep(0.01)


def test_copy_of_a_survey_leaves_the_jobs_of_the_survey_alone(server, tmp_path, monkeypatch):
    job_id = submitted()
    server.set_job(job_id, state="R")
    begin(job_id)
    shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert submitted(run="second") != job_id
    assert server.calls("qdel") == []


def test_cancel_in_a_copy_leaves_the_jobs_of_the_survey_alone(server, tmp_path, monkeypatch):
    waits, works = submitted(), submitted(**others(1002))
    begin(works)
    shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    mine = submitted(**others(1003))
    done = program("cancel")
    assert server.calls("qdel") == [["qdel", mine]]
    assert waits not in done.stdout
    assert "2 jobs of the survey of which this is a copy: left alone" in done.stdout
    assert execute(server.script(1), "exit 0", waits) == 0


def test_copy_without_records_leaves_the_jobs_of_the_survey_alone(server, tmp_path):
    submitted()
    copy = tmp_path / "copy"
    script = shlex.quote(str(Path(job_script("second")).resolve()))
    inside = (
        f"mkdir {copy}; cp -r logs config.yaml {copy}; cd {copy}; "
        f"{sys.executable} -S '{PROGRAMS}/submit.py' {script}"
    )
    assert execute(server.script(1), inside) == 0
    assert [call[0] for call in server.calls() if call[0] != "qstat"] == ["qsub", "qsub"]


def test_survey_that_was_moved_finds_its_live_job(server, tmp_path, monkeypatch):
    job_id = submitted()
    server.set_job(job_id, state="R")
    begin(job_id)
    Path.cwd().rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert submitted(run="second") == job_id
    assert len(server.calls("qsub")) == 1


def test_job_of_a_survey_that_is_moved_leaves_its_exit_code_there(server, tmp_path, monkeypatch):
    job_id = submitted()
    assert execute(server.script(1), f'mv "$PWD" {tmp_path}/moved') == 0
    monkeypatch.chdir(tmp_path / "moved")
    assert status(job_id)[0] == "success"


def test_surveys_side_by_side_do_not_meet(server, tmp_path, monkeypatch):
    first = submitted()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    assert submitted() != first


# --- what `coaddflow status` tells of these jobs -----------------------------------------------


def test_job_that_died_while_no_snakemake_ran_is_not_in_the_queue(server):
    ids = [submitted(**others(number)) for number in (1001, 1002, 1003)]
    server.set_job(ids[0], state="R")
    server.set_job(ids[1], state="C")
    jobs = server.read()["jobs"]
    del jobs[ids[2]]
    server.set(jobs=jobs)
    outcomes = [
        latest_jobs(".", NAMES)[f"exposure_{number}"].outcome for number in (1001, 1002, 1003)
    ]
    assert outcomes == ["live", "unknown", "unknown"]


def test_status_says_when_pbs_does_not_answer(server):
    job_id = submitted()
    status(job_id)
    server.set(away=1000)
    asked = json.loads((records.FOLDER / "answer.json").read_text())["asked"]
    job = latest_jobs(".", NAMES)["exposure_1001"]
    assert job.outcome == "live"
    assert time.strftime("%Y-%m-%d %H:%M", time.localtime(asked)) in job.explanation
    assert f"qstat {job_id}" in job.explanation


@pytest.mark.parametrize(
    ("name", "rules", "heaviest"),
    [
        ("exposure_1001", ["calexp", "manifest"], "calexp"),
        ("exposure_1001", ["calibrated", "manifest"], "calibrated"),
        ("exposure_1001", ["exposure"], "exposure"),
        ("exposure_1001", ["calibrated_exposure"], "calibrated_exposure"),
        ("tract_0", ["coadd", "picture", "tract_corners"], "coadd"),
        ("tract_0", ["picture", "tract", "tract_corners"], "tract"),
    ],
)
@pytest.mark.parametrize("seen", [True, False])
def test_advice_names_a_rule_that_the_run_has(server, name, rules, heaviest, seen):
    job_id = submitted(groupid=name, targets=[f"{rule}:number=1" for rule in rules])
    killed = "Job run at Sun Nov 22 at 17:53 on (node1) and exceeded resource mem"
    server.set_job(job_id, state="F", exit_status=-27, comment=killed)
    if seen:
        assert status(job_id)[0] == "failed"
        assert f"--set-resources {heaviest}:mem_mb=" in latest_jobs(".", NAMES)[name].explanation
    else:
        assert latest_jobs(".", NAMES)[name].name == "_".join([name, *rules])


def test_run_that_ends_with_a_refusal_does_not_speak_of_0_steps(server):
    submit(groupid="tract_0", targets=["tract:band=r,tract=0"], resources=TOO_MUCH)
    outcome, words = end_of_pbs_job("", "tract_0")
    asked = {"mem_mb": 10_780, "runtime": 75}
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    steps = ("tract",)
    attempts.record("tract_0", Attempt(now, "", "", "PBS", "", steps, asked, outcome, words))
    text = failure_text("logs", time.time() - 60)
    assert "coaddflow: 1 job not accepted by the cluster" in text
    assert text.count("largest node of queue workq has 6144 MB") == 1
