"""Questions to a PBS server, and what its answers mean.

Snakemake starts a program of profiles/pbs for every submission and every look at a job. This
package therefore uses the standard library only, and nothing in it that is newer than Python 3.6:
the `python3` that is found on a cluster may be the system's own.

The same programs serve OpenPBS, PBS Professional, and servers that speak Torque's dialect (no
history, no exit status), such as the commands of Debian's slurm-wlm-torque in front of Slurm.
"""

import os
import re
import subprocess
from collections import namedtuple

FINISHED_STATES = ("F", "C", "X")
WAITING_STATES = {
    "Q": "waits in the queue",
    "H": "is held (qrls releases it)",
    "W": "waits for the time at which it may start",
    "S": "is suspended",
    "U": "is suspended, since its node is in use",
    "T": "is being moved to another queue or server",
}
NEVER_RUNS = "Can Never Run"
FAILED_TO_START = re.compile(r"too many failed attempts", re.IGNORECASE)

_AWAY = re.compile(
    r"connection refused|cannot connect|can not connect|could not connect|unable to contact"
    r"|connect failure|communication failure|timed out|timeout|end of file|shutting down"
    r"|temporarily unable|no route to host|network is unreachable|problem loading",
    re.IGNORECASE,
)
_FULL = re.compile(r"would exceed|maximum number of jobs|not enabled", re.IGNORECASE)
_REFUSED = re.compile(r"job history|usage:|unknown option|invalid option", re.IGNORECASE)
WAYS = (("-E", "-x", "-f"), ("-E", "-f"), ("-x", "-f"), ("-f",))
"""Ways to ask about many jobs, best first. -E: all in one connection; without it OpenPBS opens one
connection per job, each from a privileged port, and 200 jobs every 10 s use up all ports of the
machine. -x: finished jobs, too, if the server keeps a history."""

DEFINITE = (0, 35, 153)  # qstat: all known; finished (asked without -x); some unknown

ServerJob = namedtuple("ServerJob", "state exit_status comment output_path")
"""What the server says about a job; None where it says nothing."""


class ServerAwayError(Exception):
    """The server gave no answer, or none that says anything about jobs."""


class RefusedError(Exception):
    """The server does not accept a job, nor will it later."""


class QueueFullError(Exception):
    """The queue is full or closed at this moment."""


def setting(name, default):
    """Return a number of seconds from the environment (COADDFLOW_PBS_<name>), or the default."""
    try:
        return float(os.environ[f"COADDFLOW_PBS_{name}"])
    except (KeyError, ValueError):
        return float(default)


def run(command, *arguments, timeout=30):
    """Run a command of PBS; return exit code, standard output and standard error.

    Raise ServerAwayError if it does not end in time.
    """
    try:
        done = subprocess.run(  # noqa: S603, UP022 - a list, no shell; capture_output is of 3.7
            [command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ServerAwayError(f"{command} gave no answer in {timeout} s") from None
    out, err = (text.decode("utf-8", "replace") for text in (done.stdout, done.stderr))
    return done.returncode, out, err


def is_away(text):
    """Return whether a failed command says that the server is away: try again later."""
    return bool(_AWAY.search(text))


def is_full(text):
    """Return whether qsub says that other jobs must end first."""
    return bool(_FULL.search(text))


def ask(job_ids, way=0):
    """Ask the server about a list of jobs, all at once, in the first of `WAYS` from ``way`` on.

    Returns
    -------
    jobs : dict of str to ServerJob
        The jobs that the server knows.
    way : int
        The first way that it supports.

    Raises
    ------
    ServerAwayError
        If the answer says nothing about jobs, so that nothing may be concluded from it.
    """
    if not job_ids:
        return {}, way
    for number in range(way, len(WAYS)):
        code, out, err = run("qstat", *WAYS[number], *job_ids)
        refused = _REFUSED.search(err) and not out.strip()
        if is_away(err) or (code not in DEFINITE and not refused):
            raise ServerAwayError(err.strip() or f"qstat ended with exit code {code}")
        if not refused:
            return parse_qstat(out), number
    raise ServerAwayError(f"qstat refuses every way to ask: {err.strip()}")


def with_output(word):
    """Return the id of the job whose output goes to a file of this name, or None.

    Torque's dialect does not say where output goes. Raise ServerAwayError as `ask`.
    """
    code, out, err = run("qstat", "-f")
    if code not in DEFINITE or is_away(err):
        raise ServerAwayError(err.strip() or f"qstat ended with exit code {code}")
    jobs = parse_qstat(out)
    return next((name for name, job in jobs.items() if word in (job.output_path or "")), None)


def parse_qstat(text):
    """Return a `ServerJob` by id from the output of ``qstat -f``.

    A variable of the environment may contain anything, even a line that looks like an attribute.
    Attributes that PBS prints before the environment are therefore read where they occur first,
    and those after it where they occur last, before the arguments of qsub, which may contain the
    same text.
    """
    jobs = {}
    for block in re.split(r"^Job Id:", text, flags=re.MULTILINE)[1:]:
        job_id, _, body = block.partition("\n")
        # OpenPBS: attributes after 4 blanks, continuations after a tab; Torque's dialect here:
        # attributes after a tab
        indent = "    " if re.search(r"^    \w", body, re.MULTILINE) else "\t"
        body = body.replace("\n\t", "") if indent == "    " else body
        body = body.rpartition(f"\n{indent}Submit_arguments = ")[0] or body
        found = [
            (name, value)
            for name, _, value in (
                line[len(indent) :].partition(" = ")
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


def looks_ended(job):
    """Return whether a job looks as if it had ended or will never run; None: it is not known."""
    return job is None or job.state in FINISHED_STATES or never_runs(job)


def never_runs(job):
    """Return whether the server says that waiting for a job is in vain."""
    comment = job.comment or ""
    return (job.state == "Q" and comment.startswith(NEVER_RUNS)) or (
        job.state == "H" and bool(FAILED_TO_START.search(comment))
    )
