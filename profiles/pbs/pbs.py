"""What submit.py, status.py and cancel.py share: the ledger of jobs, and questions to the server.

Snakemake starts one of the three programs for every submission and every look at a job, so they
use the standard library only. All state is in files below `FOLDER` in the folder of the survey,
hence several surveys of one user do not meet:

    jobs.json   the jobs that are submitted and not seen to end, and the server's last answer
    ended.tsv   how each other job ended: time, id, name, outcome, reason
    exit/       one file a job with its exit code, written by the job itself
    scripts/    what was submitted;  spool/  what PBS itself says about a job

The same programs serve OpenPBS, PBS Pro, and servers that speak Torque's dialect (no history, no
exit status), such as the commands of Debian's slurm-wlm-torque in front of Slurm.
"""

import contextlib
import fcntl
import json
import os
import re
import subprocess
import time
from collections import namedtuple
from pathlib import Path

FOLDER = Path(".snakemake") / "coaddflow" / "pbs"

FINISHED_STATES = ("F", "C", "X")
NEVER_RUNS = "Can Never Run"
GONE = "PBS does not know the job any more, and it left no exit code: killed, or its node was lost"

_AWAY = re.compile(
    r"connection refused|cannot connect|can not connect|unable to contact|connect failure"
    r"|communication failure|timed out|timeout|end of file|shutting down|temporarily unable"
    r"|no route to host|network is unreachable|problem loading|would exceed|maximum number of jobs",
    re.IGNORECASE,
)
_NO_HISTORY = re.compile(r"history|usage:|unknown option|invalid option", re.IGNORECASE)
DEFINITE = (0, 35, 153)  # qstat: all known; finished (asked without -x); some unknown

ServerJob = namedtuple("ServerJob", "state exit_status comment output_path")
"""What the server says about a job; fields that it does not tell are None."""


class ServerAwayError(Exception):
    """The server gave no answer that says anything about jobs."""


def setting(name, default):
    """Return a number of seconds from the environment (COADDFLOW_PBS_<name>), or the default."""
    try:
        return float(os.environ[f"COADDFLOW_PBS_{name}"])
    except (KeyError, ValueError):
        return float(default)


# ---------------------------------------------------------------------------------------------
# The server
# ---------------------------------------------------------------------------------------------


def run(command, *arguments, timeout=60):
    """Run a command of PBS; return exit code, standard output and standard error.

    Raises
    ------
    ServerAwayError
        If it does not come back in time.
    """
    try:
        done = subprocess.run(  # noqa: S603 - a list, no shell
            [command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ServerAwayError(f"{command} gave no answer in {timeout} s") from None
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return done.returncode, out, err


def is_away(text):
    """Return whether a message of a failed command means: try again later."""
    return bool(_AWAY.search(text))


def ask(job_ids, with_history=True):
    """Ask the server about jobs, all at once.

    Parameters
    ----------
    job_ids : iterable of str
        The jobs. Those that the server does not know are missing in the answer.
    with_history : bool
        Whether to ask for finished jobs too; found out by itself where the server has none.

    Returns
    -------
    jobs : dict of str to ServerJob
        What the server knows.
    with_history : bool
        Whether it keeps a history.

    Raises
    ------
    ServerAwayError
        If the answer says nothing about jobs: nothing may be concluded from it.
    """
    job_ids = list(job_ids)
    if not job_ids:
        return {}, with_history
    if with_history:
        code, out, err = run("qstat", "-x", "-f", *job_ids)
        if code in DEFINITE and (out.strip() or not _NO_HISTORY.search(err)):
            return parse_qstat(out), True
        if is_away(err):
            raise ServerAwayError(err.strip())
    code, out, err = run("qstat", "-f", *job_ids)
    if code in DEFINITE and not is_away(err):
        return parse_qstat(out), False
    raise ServerAwayError(err.strip() or f"qstat ended with exit code {code}")


def parse_qstat(text):
    """Read the output of ``qstat -f``, long lines joined.

    A value of the environment may hold anything, also a line that looks like an attribute. What
    PBS prints before the environment is therefore taken where it stands first, and what it
    prints after it where it stands last.
    """
    jobs = {}
    for block in re.split(r"^Job Id:", text, flags=re.MULTILINE)[1:]:
        job_id, _, body = block.partition("\n")
        # OpenPBS: attributes after 4 blanks, continuations after a tab; Torque's dialect here:
        # attributes after a tab
        indent = "    " if re.search(r"^    \w", body, re.MULTILINE) else "\t"
        body = body.replace("\n\t", "") if indent == "    " else body
        found = [
            (name, value)
            for name, _, value in (
                line.removeprefix(indent).partition(" = ")
                for line in body.splitlines()
                if line.startswith(indent)
            )
        ]
        first, last = dict(reversed(found)), dict(found)
        exit_status = last.get("Exit_status", "")
        jobs[job_id.strip()] = ServerJob(
            first.get("job_state", ""),
            int(exit_status) if re.fullmatch(r"-?\d+", exit_status) else None,
            last.get("comment"),
            first.get("Output_Path"),
        )
    return jobs


def never_runs(job):
    """Return whether the server says that a job asks for more than there is."""
    return job.state == "Q" and (job.comment or "").startswith(NEVER_RUNS)


def same_job(one, other):
    """Return whether two ids are of one job; qsub and qstat may name the server differently."""
    return one.partition(".")[0] == other.partition(".")[0]


# ---------------------------------------------------------------------------------------------
# The ledger
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ledger():
    """Yield the ledger to read and change; it is locked meanwhile and then written.

    Yields
    ------
    dict
        "jobs": what was submitted, by job id; "answer": the server's last answer, "asked": when
        (seconds since the epoch), "with_history".
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("a", encoding="ascii") as lock:
        # some network file systems know no locks; Snakemake then still is the only one who asks
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        before = _read_ledger()
        book = json.loads(json.dumps(before))
        try:
            yield book
        finally:
            if book != before:
                replace(FOLDER / "jobs.json", json.dumps(book, indent=1))


def _read_ledger():
    empty = {"jobs": {}, "answer": None, "asked": 0.0, "with_history": True}
    try:
        return {**empty, **json.loads((FOLDER / "jobs.json").read_text(encoding="utf-8"))}
    except (FileNotFoundError, json.JSONDecodeError):
        return empty


def replace(path, text):
    """Write a small file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def exit_code(job):
    """Return the exit code that a job left in its file; None if there is none (yet)."""
    try:
        text = (FOLDER / "exit" / job["token"]).read_text(encoding="ascii")
        return int(text)
    except (OSError, KeyError, ValueError):
        return None


def end(book, job_id, outcome, reason):
    """Take a job from the ledger and note how it ended.

    Parameters
    ----------
    book : dict
        The ledger.
    job_id : str
        The job.
    outcome : {"success", "failed"}
        How it ended.
    reason : str
        Why it failed; empty otherwise.
    """
    job = book["jobs"].pop(job_id)
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    words = [when, job_id, job.get("name", ""), outcome, " ".join(reason.split())]
    with (FOLDER / "ended.tsv").open("a", encoding="utf-8") as stream:
        stream.write("\t".join(words) + "\n")
    if "token" in job:
        for path in (f"exit/{job['token']}", f"scripts/{job['token']}.sh", f"spool/{job['token']}"):
            (FOLDER / path).unlink(missing_ok=True)


def outcome_of_ended(job_id):
    """Return how a job that is not in the ledger ended; None if it was never there."""
    outcome = None
    with contextlib.suppress(FileNotFoundError), (FOLDER / "ended.tsv").open() as stream:
        for line in stream:
            words = line.rstrip("\n").split("\t")
            if len(words) > 3 and words[1] == job_id:
                outcome = words[3]
    return outcome


def look(book, max_age):
    """Bring the server's answer about all jobs of the ledger up to date.

    Parameters
    ----------
    book : dict
        The ledger.
    max_age : float
        An answer younger than this is good enough, seconds; so is the news that the server is
        away.
    """
    if 0 <= time.time() - book["asked"] < max_age:
        return
    waiting = [job_id for job_id, job in book["jobs"].items() if exit_code(job) is None]
    try:
        answer, book["with_history"] = ask(waiting, book["with_history"])
        known = {job_id: answered(answer, job_id) for job_id in waiting}
        book["answer"] = {job_id: list(job) for job_id, job in known.items() if job}
    except ServerAwayError:
        book["answer"] = None
    book["asked"] = time.time()


def answered(answer, job_id):
    """Return what an answer of the server says about a job, or None."""
    return next((job for name, job in answer.items() if same_job(name, job_id)), None)
