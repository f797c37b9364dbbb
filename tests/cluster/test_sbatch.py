"""The sbatch that stands before the real one: no job is lost, and none is submitted twice."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

WRAPPER = Path(__file__).parents[2] / "profiles" / "slurm" / "bin" / "sbatch"

CALL = ("--parsable", "--job-name", "0b7c", "--comment", "rule_exposure_1_calexp", "-t", "5")
AWAY = "Unable to contact slurm controller (connect failure)"
TIMED_OUT = "Batch job submission failed: Socket timed out on send/recv operation"
REFUSED = "Batch job submission failed: Requested node configuration is not available"

FAKE_SBATCH = """\
#!/bin/sh
echo x >>calls
n=$(wc -l <calls)
[ -e sbatch.$n ] || n=last
. ./sbatch.$n
"""

FAKE_SQUEUE = """\
#!/bin/sh
echo x >>questions
case " $* " in *" --name 0b7c "*) ;; *) exit 3 ;; esac
[ ! -e squeue.away ] || exit 1
cat queue 2>/dev/null
exit 0
"""


class Slurm:
    """Commands of Slurm that do what a test says, in a survey's folder."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in (("sbatch", FAKE_SBATCH), ("squeue", FAKE_SQUEUE)):
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.answers("echo 7")

    def answers(self, *scripts):
        """Say what each call of sbatch does; the last one stays."""
        for n, script in enumerate(scripts[:-1], 1):
            (self.folder / f"sbatch.{n}").write_text(script)
        (self.folder / "sbatch.last").write_text(scripts[-1])

    def scancel(self, *pending):
        """Make a scancel that takes jobs out of the queue if they are among those."""
        program = self.folder / "bin" / "scancel"
        cases = "".join(
            f'[ "$3" = {number} ] && sed -i "/^{number}|/d" queue\n' for number in pending
        )
        program.write_text(f'#!/bin/sh\n[ "$1 $2" = "--state PENDING" ] || exit 1\n{cases}exit 0\n')
        program.chmod(0o755)

    def environ(self, patience=60, path=()):
        folders = [*path, str(WRAPPER.parent), str(self.folder / "bin"), os.environ["PATH"]]
        return {
            **os.environ,
            "PATH": os.pathsep.join(folders),
            "COADDFLOW_PYTHON": sys.executable,
            "COADDFLOW_SLURM_PAUSE": "0.02",
            "COADDFLOW_SLURM_PATIENCE": str(patience),
            "SQUEUE_FORMAT": "nonsense",
        }

    def submit(self, *arguments, patience=60, path=(), **options):
        return subprocess.run(
            ["sbatch", *(arguments or CALL)],
            cwd=self.folder,
            env=self.environ(patience, path),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            **({"stdin": subprocess.DEVNULL} if "input" not in options else {}),
            **options,
        )

    def count(self, name):
        path = self.folder / name
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture
def slurm(tmp_path):
    return Slurm(tmp_path)


def failing(words):
    return f"echo 'sbatch: error: {words}' >&2; exit 1"


def in_queue(comment="rule_exposure_1_calexp", number=12):
    return f"echo '{number}|{comment}' >>queue; "


def test_a_submission_that_succeeds_is_handed_on(slurm):
    slurm.answers("echo 'a warning' >&2; echo '7;cluster'")
    done = slurm.submit()
    assert (done.returncode, done.stdout, done.stderr) == (0, "7;cluster\n", "a warning\n")
    assert slurm.count("questions") == 0


def test_the_job_inherits_the_environment_of_the_user(slurm):
    slurm.answers("env >environ; echo 7")
    assert slurm.submit("--wrap=x").returncode == 0, "the real sbatch is found, not the first one"
    assert slurm.submit().returncode == 0
    environ = dict(
        line.partition("=")[::2] for line in (slurm.folder / "environ").read_text().splitlines()
    )
    assert environ["PATH"].split(os.pathsep)[0] == str(slurm.folder / "bin")
    assert "COADDFLOW_PYTHON" not in environ
    assert environ["SQUEUE_FORMAT"] == "nonsense"


def test_the_folder_of_the_wrapper_by_another_name_is_no_way_back(slurm, tmp_path):
    (tmp_path / "link").symlink_to(WRAPPER.parent)
    assert slurm.submit(path=[str(tmp_path / "link")]).stdout == "7\n"
    assert slurm.count("calls") == 1


def test_a_script_on_standard_input_is_given_to_every_try(slurm):
    slurm.answers(f"cat >/dev/null; {failing(AWAY)}", "cat >script; echo 8")
    assert slurm.submit(*CALL, "/dev/stdin", input="#!/bin/sh\ntrue\n").stdout == "8\n"
    assert (slurm.folder / "script").read_text() == "#!/bin/sh\ntrue\n"


def test_a_controller_that_is_away_is_waited_for(slurm):
    slurm.answers(failing(AWAY), failing(AWAY), failing("QOSMaxSubmitJobPerUserLimit"), "echo 9")
    done = slurm.submit()
    # the executor takes these words on standard error for a failure
    assert (done.returncode, done.stdout, done.stderr) == (0, "9\n", "")
    assert slurm.count("calls") == 4


@pytest.mark.parametrize("words", [TIMED_OUT, "something new"])
def test_a_job_that_got_in_although_sbatch_failed_is_not_submitted_again(slurm, words):
    slurm.answers(in_queue() + failing(words))
    assert slurm.submit().stdout == "12\n"
    assert slurm.count("calls") == 1


def test_jobs_of_other_exposures_are_not_taken_for_it(slurm):
    slurm.answers(in_queue("rule_exposure_12_calexp") + failing(TIMED_OUT), "echo 13")
    assert slurm.submit().stdout == "13\n"


@pytest.mark.parametrize("words", [TIMED_OUT, "something new"])
def test_while_squeue_gives_no_answer_nothing_is_submitted_again(slurm, words):
    (slurm.folder / "squeue.away").touch()
    slurm.answers(in_queue() + failing(words), "echo 99")
    done = slurm.submit(patience=0.3)
    assert done.returncode == 1 and words in done.stderr
    # there is a pause of 0.02 s between them
    assert slurm.count("calls") == 1 and 1 <= slurm.count("questions") <= 17
    # the next attempt of the executor
    (slurm.folder / "squeue.away").unlink()
    assert slurm.submit().stdout == "12\n"
    assert slurm.count("calls") == 1


@pytest.mark.parametrize(("pending", "kept"), [("13", "12"), ("12", "13"), ("12 13", "12")])
def test_of_two_jobs_that_both_got_in_one_that_has_not_begun_is_cancelled(slurm, pending, kept):
    """The first is late: it is not in the queue when squeue is asked."""
    slurm.answers(failing(TIMED_OUT), in_queue(number=12) + in_queue(number=13) + "echo 13")
    slurm.scancel(*pending.split())
    assert slurm.submit().stdout == f"{kept}\n"
    assert (slurm.folder / "queue").read_text() == f"{kept}|rule_exposure_1_calexp\n"


def test_of_two_jobs_that_have_begun_none_is_cancelled(slurm):
    slurm.answers(failing(TIMED_OUT), in_queue(number=12) + in_queue(number=13) + "echo 13")
    slurm.scancel()
    assert slurm.submit().stdout == "13\n"
    assert slurm.count("queue") == 2


def test_when_the_run_is_killed_nothing_is_submitted_any_more(slurm):
    """The next run submits the same exposure."""
    slurm.answers(failing(AWAY))
    waiting = subprocess.Popen(
        ["sbatch", *CALL],
        cwd=slurm.folder,
        env=slurm.environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while slurm.count("calls") < 2:
        assert waiting.poll() is None
        time.sleep(0.02)
    # as the kernel does with what a killed process held
    waiting.stdout.close()
    waiting.stderr.close()
    assert waiting.wait(60) != 0


def test_what_slurm_refuses_fails_at_once_with_its_words(slurm):
    slurm.answers(failing(REFUSED))
    done = slurm.submit()
    assert done.returncode == 1 and REFUSED in done.stderr
    assert slurm.count("calls") == 1 and slurm.count("questions") == 1


def test_other_calls_of_sbatch_are_left_alone(slurm):
    slurm.answers(failing(AWAY))
    assert slurm.submit("my_script.sh").returncode == 1
    assert slurm.count("calls") == 1 and slurm.count("questions") == 0


def test_without_slurm_it_says_so(slurm, monkeypatch):
    (slurm.folder / "bin" / "sbatch").unlink()
    monkeypatch.setenv("PATH", "")
    done = slurm.submit()
    assert done.returncode == 127 and "not found" in done.stderr
