"""Submit a job as sbatch does, and outlast a controller that is away or slow.

The executor takes every failure of sbatch for a failure of the job: a controller that is away for
a minute uses up all attempts of an exposure, and one that is slow ("Socket timed out on send/recv
operation") may have taken the job all the same, so that two work on one exposure. A run therefore
finds bin/sbatch before the real one (cluster.slurm). After a failure it first asks whether a
job of this run with this name lives, and hands out its number if there is one; only if there is
none, and the failure is one that passes, it submits again.

A submission that still waits in the controller when squeue has answered is not seen. It comes
before the next one, so after that the queue is looked at again, and of two jobs one that has not
begun is cancelled. When the run is killed meanwhile, nothing is submitted any more. Other calls of
sbatch than the executor's are passed on as they are. Standard library only.
"""

import os
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

PAUSE = float(os.environ.get("COADDFLOW_SLURM_PAUSE", "15"))
"""Seconds from a failure to the question what became of it."""

PATIENCE = float(os.environ.get("COADDFLOW_SLURM_PATIENCE", "10800"))
"""Seconds after which a failure is told: as long as the profile waits for an answer of squeue."""

TIMEOUT = 300.0
"""Seconds that a command of Slurm may take."""

IN_DOUBT = Path(".snakemake/coaddflow/slurm")
"""Runs of which a job may be in the queue that the executor does not know; in the survey."""

PASSES = re.compile(
    r"unable to contact|timed out|temporar|standby|zero bytes were transmitted"
    r"|connection (refused|reset)|communication|configuration source"
    # the site's limit of jobs in the queue
    r"|MaxSubmitJob",
    re.IGNORECASE,
)
"""What sbatch says about a failure that passes by itself."""

LIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"


class Submission(NamedTuple):
    """A call of sbatch by the executor.

    Attributes
    ----------
    command : list of str
        The real sbatch and its arguments.
    environ : dict
        Its environment, which becomes that of the job.
    run, comment : str
        Number of the run and name of the job; together they are this job's alone while it lives.
    clusters : str
        Clusters that are asked for, if any.
    script : bytes
        The script, if it comes on standard input.
    """

    command: list[str]
    environ: dict[str, str]
    run: str
    comment: str
    clusters: str
    script: bytes


def main(arguments: list[str], wrapper: Path) -> int:
    """Submit a job; print what sbatch prints, and return its exit code."""
    environ = environment(wrapper)
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


def environment(wrapper: Path) -> dict[str, str]:
    """Return the environment without what leads here: jobs inherit it."""
    environ = {name: value for name, value in os.environ.items() if name != "COADDFLOW_PYTHON"}
    folders = environ.get("PATH", "").split(os.pathsep)
    environ["PATH"] = os.pathsep.join(f for f in folders if Path(f or ".").resolve() != wrapper)
    return environ


def option(arguments: list[str], name: str) -> str:
    """Return the value of an option; empty if it is not given."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return ""


def submit(job: Submission) -> int:
    """Submit a job, again and again while the failure is one that passes."""
    failure: subprocess.CompletedProcess[bytes] | None = None
    in_doubt = (IN_DOUBT / job.run).exists()
    end = time.monotonic() + PATIENCE
    while True:
        if in_doubt:
            answer = jobs_in_queue(job)
            if answer:
                print(answer[0])
                return 0
            in_doubt = answer is None
        if failure and not in_doubt and not passes(failure):
            return hand_on(failure)
        if (failure or in_doubt) and time.monotonic() > end:
            return give_up(job, failure, in_doubt)
        if not is_listened_to():
            # the run has been killed, and the next one must not meet a job of this
            return 1
        if not in_doubt:
            done = call(job.command, job.environ, job.script)
            if done.returncode == 0:
                return hand_on(done if failure is None else without_twin(job, done))
            failure, in_doubt = done, True
            if not passes(failure):
                # nothing to wait for, only to ask
                continue
        time.sleep(PAUSE)


def is_listened_to() -> bool:
    """Return whether somebody still waits for the number of the job at the end of the pipe."""
    stdout = select.poll()
    stdout.register(sys.stdout, 0)
    return not any(event & select.POLLERR for _, event in stdout.poll(0))


def give_up(
    job: Submission, failure: "subprocess.CompletedProcess[bytes] | None", in_doubt: bool
) -> int:
    """Tell that a job cannot be submitted; the next try must ask first if nobody knows."""
    if in_doubt:
        IN_DOUBT.mkdir(parents=True, exist_ok=True)
        (IN_DOUBT / job.run).touch()
        print("squeue does not tell whether the job is in the queue", file=sys.stderr)
    return hand_on(failure) if failure else 1


def passes(failure: subprocess.CompletedProcess[bytes]) -> bool:
    """Return whether a failure of sbatch passes by itself."""
    return PASSES.search(failure.stderr.decode(errors="replace")) is not None


def jobs_in_queue(job: Submission) -> list[str] | None:
    """Return the numbers of the jobs of this name that live, in order; None without an answer.

    Earlier attempts have the same name, but they have ended, or there would be no other.
    """
    # what a user has set for squeue hides jobs, or changes what it prints
    environ = {name: text for name, text in job.environ.items() if not name.startswith("SQUEUE_")}
    squeue = ["squeue", "--noheader", "--name", job.run, "--states", LIVE, "--format", "%i|%k"]
    done = call([*squeue, *on_clusters(job)], environ)
    if done.returncode:
        return None
    rows = [line.partition("|") for line in done.stdout.decode(errors="replace").splitlines()]
    numbers = [number for number, _, comment in rows if comment.strip() == job.comment]
    return sorted(numbers, key=lambda number: (len(number), number))


def on_clusters(job: Submission) -> list[str]:
    """Return the argument of Slurm's commands that names the clusters of a job."""
    return ["--clusters", job.clusters] if job.clusters else []


def without_twin(
    job: Submission, done: "subprocess.CompletedProcess[bytes]"
) -> "subprocess.CompletedProcess[bytes]":
    """Return what sbatch has said about the one job that stays, if there are two.

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


def call(
    command: list[str], environ: dict[str, str], script: bytes = b""
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command of Slurm; one that does not come back has failed."""
    try:
        return subprocess.run(  # noqa: S603 - a list, no shell
            command, env=environ, input=script, capture_output=True, timeout=TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, b"", f"{error}\n".encode())


def hand_on(done: "subprocess.CompletedProcess[bytes]") -> int:
    """Print what a command has printed; return its exit code."""
    sys.stdout.buffer.write(done.stdout)
    sys.stderr.buffer.write(done.stderr)
    return done.returncode
