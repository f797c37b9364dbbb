"""An sbatch that waits for a controller which is away or slow, and never submits a job twice.

Snakemake's executor takes a failure of sbatch for a failure of the job. A controller that is away
for a minute would use up all attempts of an exposure, and one that is slow ("Socket timed out on
send/recv operation") may have taken the job all the same, so that two jobs work on one exposure. A
run therefore finds this sbatch before the real one (`cluster.slurm`). After a failure it asks
whether a job of this run with this name is in the queue, and if so prints its number. Otherwise it
submits again, if the failure is temporary.

A submission that the controller has not handled yet when squeue answers is not seen. The
controller handles it before the next submission, so the queue is checked again after that, and of
two jobs one that has not begun is cancelled. When the run has been killed, nothing more is
submitted. Other calls of sbatch than the executor's are passed on. Standard library only.
"""

import os
import re
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

PAUSE = float(os.environ.get("COADDFLOW_SLURM_PAUSE", "15"))
"""Seconds from a failure to the next question or try."""

PATIENCE = float(os.environ.get("COADDFLOW_SLURM_PATIENCE", "10800"))
"""Seconds after which a failure is reported: as long as the profile waits for squeue."""

TIMEOUT = 300.0
"""Seconds that a command of Slurm may take."""

IN_DOUBT = Path(".snakemake/coaddflow/slurm")
"""Names of runs that may have a job in the queue which the executor does not know."""

TEMPORARY = re.compile(
    r"unable to contact|timed out|temporar|standby|zero bytes were transmitted"
    r"|connection (refused|reset)|communication|configuration source"
    # the site's limit of jobs in the queue
    r"|MaxSubmitJob",
    re.IGNORECASE,
)
"""What sbatch says about failures that pass."""

LIVE_STATES = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"

Completed = subprocess.CompletedProcess[bytes]


class Submission(NamedTuple):
    """A call of sbatch by the executor."""

    command: list[str]
    environ: dict[str, str]
    """The real sbatch and its arguments; its environment, which becomes that of the job."""
    run: str
    comment: str
    """Name of the run and of the job; no other live job has both."""
    clusters: str
    """Clusters that are asked for, if any."""
    script: bytes
    """The script, if it comes on standard input."""


def main(arguments: list[str], wrapper: Path) -> int:
    """Submit a job; print what sbatch prints, and return its exit code.

    ``wrapper`` is the folder in ``PATH`` with the sbatch that calls this.
    """
    environ = environment_of_user(wrapper)
    real = shutil.which("sbatch", path=environ.get("PATH", ""))
    if real is None:
        print("sbatch: command not found", file=sys.stderr)
        return 127
    run, comment = option(arguments, "--job-name"), option(arguments, "--comment")
    if not run or not comment.startswith("rule_") or option(arguments, "--array"):
        os.execve(real, ["sbatch", *arguments], environ)  # noqa: S606 - no shell
    # read once, given to every try
    script = sys.stdin.buffer.read() if "/dev/stdin" in arguments else b""
    clusters = option(arguments, "--clusters") or option(arguments, "-M")
    try:
        return submit(Submission([real, *arguments], environ, run, comment, clusters, script))
    except KeyboardInterrupt:
        return 130


def environment_of_user(wrapper: Path) -> dict[str, str]:
    """Return the environment without what leads to this program: jobs inherit it."""
    environ = {name: value for name, value in os.environ.items() if name != "COADDFLOW_PYTHON"}
    folders = environ.get("PATH", "").split(os.pathsep)
    environ["PATH"] = os.pathsep.join(f for f in folders if Path(f or ".").resolve() != wrapper)
    return environ


def without_squeue_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without defaults for squeue, which hide jobs or change its output."""
    return {name: value for name, value in environ.items() if not name.startswith("SQUEUE_")}


def option(arguments: list[str], name: str) -> str:
    """Return the value of an option; empty if it is not given."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return ""


def submit(job: Submission) -> int:
    """Submit a job, again and again while failures are temporary."""
    failure: Completed | None = None
    in_doubt = (IN_DOUBT / job.run).exists()
    end = time.monotonic() + PATIENCE
    while True:
        if in_doubt:
            numbers = jobs_in_queue(job)
            if numbers:
                print(numbers[0])
                return 0
            in_doubt = numbers is None
        if failure and not in_doubt and not is_temporary(failure):
            return hand_on(failure)
        if (failure or in_doubt) and time.monotonic() > end:
            return give_up(job, failure, in_doubt)
        if not has_reader():
            # the run has been killed, and the next one must not meet a job of this one
            return 1
        if not in_doubt:
            done = call(job.command, job.environ, job.script)
            if done.returncode == 0:
                return hand_on(done if failure is None else without_twin(job, done))
            failure, in_doubt = done, True
            if not is_temporary(failure):
                # nothing to wait for before squeue is asked
                continue
        time.sleep(PAUSE)


def has_reader() -> bool:
    """Return whether the executor still waits for the number of the job."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return not any(event & select.POLLERR for _, event in stdout.poll(0))


def give_up(job: Submission, failure: Completed | None, in_doubt: bool) -> int:
    """Report that a job cannot be submitted; if in doubt, let the next try ask squeue first."""
    if in_doubt:
        IN_DOUBT.mkdir(parents=True, exist_ok=True)
        (IN_DOUBT / job.run).touch()
        print("squeue does not say whether the job is in the queue", file=sys.stderr)
    return hand_on(failure) if failure else 1


def is_temporary(failure: Completed) -> bool:
    """Return whether a failure of sbatch passes by itself."""
    return TEMPORARY.search(failure.stderr.decode(errors="replace")) is not None


def jobs_in_queue(job: Submission) -> list[str] | None:
    """Return the numbers of the live jobs of this name, in order; None without an answer.

    Earlier attempts have the same name, but have ended before this one is submitted.
    """
    squeue = ["squeue", "--noheader", "--name", job.run, "--states", LIVE_STATES]
    command = [*squeue, "--format", "%i|%k", *on_clusters(job)]
    done = call(command, without_squeue_settings(job.environ))
    if done.returncode:
        return None
    rows = [line.partition("|") for line in done.stdout.decode(errors="replace").splitlines()]
    numbers = [number for number, _, comment in rows if comment.strip() == job.comment]
    return sorted(numbers, key=lambda number: (len(number), number))


def on_clusters(job: Submission) -> list[str]:
    """Return the option of Slurm's commands that names the clusters of a job."""
    return ["--clusters", job.clusters] if job.clusters else []


def without_twin(job: Submission, done: Completed) -> Completed:
    """If there are two jobs, cancel one; return what sbatch prints for the one that stays.

    The later one is cancelled, or else the earlier one; neither if both have begun.
    """
    number = done.stdout.decode(errors="replace").strip().partition(";")[0]
    twins = [other for other in jobs_in_queue(job) or [] if other != number]
    if not twins:
        return done
    for one, other in ((number, twins[0]), (twins[0], number)):
        call(["scancel", "--state", "PENDING", *on_clusters(job), one], job.environ)
        if one not in (jobs_in_queue(job) or [one]):
            return subprocess.CompletedProcess(done.args, 0, f"{other}\n".encode(), b"")
    return done


def call(command: list[str], environ: dict[str, str], script: bytes = b"") -> Completed:
    """Run a command of Slurm; one that does not return in time has failed."""
    try:
        return subprocess.run(  # noqa: S603 - a list, no shell
            command, env=environ, input=script, capture_output=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, b"", f"{error}\n".encode())


def hand_on(done: Completed) -> int:
    """Print what a command has printed; return its exit code."""
    sys.stdout.buffer.write(done.stdout)
    sys.stderr.buffer.write(done.stderr)
    return done.returncode
