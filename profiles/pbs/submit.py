#!/usr/bin/env python3
"""Submit a job script of Snakemake to PBS and print the job's id: submit.py JOBSCRIPT.

A job of the same exposure or tract that still lives, because the Snakemake that submitted it was
killed, is taken up: its id is printed and nothing is submitted. So no exposure is ever worked on
by two jobs. While the server is away, submission waits.
"""

import hashlib
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import pbs

PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")
"""Variables of the environment that a job gets. They stand in the script: the list that qsub -v
takes breaks at commas and line ends."""

JOB_SCRIPT = """\
#!/bin/sh
# {name}: a job of coaddflow
exec >>{log} 2>&1 </dev/null
umask {umask}
cd {folder} || exit 1
{exports}
echo "coaddflow: job ${{PBS_JOBID:-}} on $(hostname) begins $(date '+%Y-%m-%dT%H:%M:%S')"
(
{body}
)
code=$?
echo "coaddflow: job ${{PBS_JOBID:-}} ends $(date '+%Y-%m-%dT%H:%M:%S'), exit code $code"
echo "$code" >{exit_file}.new && mv {exit_file}.new {exit_file}
exit "$code"
"""


def main(jobscript):
    """Submit a job script, or take up the job that is already there; return the exit code."""
    text = Path(jobscript).read_text(encoding="utf-8")
    properties = read_properties(text)
    key = group_key(properties)
    deadline = time.monotonic() + pbs.setting("PATIENCE", 1800)
    try:
        with pbs.ledger() as book:
            job_id = live_job(book, key, deadline)
            if job_id:
                print(f"PBS job {job_id} of this group still lives: taken up", file=sys.stderr)
            else:
                job_id = submit(book, key, properties, text, deadline)
    except pbs.ServerAwayError as error:
        print(f"PBS server away: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"cannot submit {jobscript}: {error}", file=sys.stderr)
        return 1
    if job_id is None:
        return 1
    print(job_id)
    return 0


def read_properties(text):
    """Return what Snakemake says about a job in its job script; raise ValueError if nothing."""
    match = re.search(r"^# properties = (\{.*\})$", text, re.MULTILINE)
    if not match:
        raise ValueError("there is no line '# properties = ' in it")
    return json.loads(match[1])


def group_key(properties):
    """Return what is the same for a group (or single job) in every run of a survey.

    The id of a group is made from its last job's rule and wildcards, and stays the same when
    some of the group's jobs are done already.
    """
    if properties["type"] == "group":
        what = ["group", properties["jobid"]]
    else:
        what = [properties["rule"], sorted(properties["wildcards"].items())]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def job_name(properties):
    """Return a name for people that PBS accepts: exposure_1001, tract_0, master_bias_3."""
    if properties["type"] == "group":
        name = properties["groupid"]
    else:
        name = "_".join([properties["rule"], *properties["wildcards"].values()])
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:60]
    return name if name[:1].isalpha() else f"j{name}"


def qsub_arguments(properties):
    """Return the arguments of qsub that follow from a job's resources.

    Raises
    ------
    ValueError
        If a resource cannot be what PBS takes.
    """
    resources = properties["resources"]
    wanted = f"select=1:ncpus={whole(properties.get('threads', 1), 'threads')}"
    if resources.get("mem_mb") is not None:
        wanted += f":mem={whole(resources['mem_mb'], 'mem_mb')}mb"
    if resources.get("runtime") is not None:
        hours, minutes = divmod(whole(resources["runtime"], "runtime"), 60)
        wanted += f",walltime={hours}:{minutes:02d}:00"
    # in one list: the qsub of slurm-wlm-torque knows the last one only
    arguments = ["-l", wanted]
    for option, name in (("-q", "pbs_queue"), ("-A", "pbs_account")):
        value = str(resources.get(name) or "")
        if value and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*", value):
            raise ValueError(f"{name} {value!r} is no name of PBS")
        arguments += [option, value] if value else []
    return arguments + shlex.split(str(resources.get("pbs_extra") or ""))


def whole(value, name):
    """Return a resource as an integer above 0, or raise ValueError with its name."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1:
        raise ValueError(f"{name} is {value!r}, must be a number above 0")
    return int(value + 0.999)


def limit_cores(body, threads):
    """Let the Snakemake inside a job use the cores that were asked for, not the profile's."""
    return re.sub(r"(?<=\s)--cores\s+(?:'[^']*'|\S+)", f"--cores {threads}", body, count=1)


def live_job(book, key, deadline):
    """Return the id of a job of this group that has not ended, or None.

    Raises
    ------
    pbs.ServerAwayError
        If the server cannot be asked: a job could be there.
    """
    for job_id in [name for name, job in book["jobs"].items() if job.get("key") == key]:
        code = pbs.exit_code(book["jobs"][job_id])
        if code is not None:
            pbs.end(book, job_id, "failed" if code else "success", f"exit code {code}")
            continue
        answer, book["with_history"] = patiently(
            lambda job_id=job_id: pbs.ask([job_id], book["with_history"]), deadline
        )
        seen = pbs.answered(answer, job_id)
        if seen and seen.state not in pbs.FINISHED_STATES and not pbs.never_runs(seen):
            return job_id
        if seen and pbs.never_runs(seen):
            pbs.run("qdel", job_id)
        pbs.end(book, job_id, "failed", (seen.comment if seen else None) or pbs.GONE)
    return None


def patiently(question, deadline):
    """Return the answer to a question; while the server is away, ask again until the deadline."""
    while True:
        try:
            return question()
        except pbs.ServerAwayError:
            pause = pbs.setting("PAUSE", 5)
            if time.monotonic() + pause > deadline:
                raise
            time.sleep(pause)


def submit(book, key, properties, text, deadline):
    """Submit a job; return its id, or None if PBS does not take it."""
    token = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(4).hex()}"
    name = job_name(properties)
    log = Path("logs") / "pbs" / f"{name}.{token}.out"
    script = write_script(token, name, log, properties, text)
    umask = current_umask()
    arguments = [
        *("-N", name, "-j", "oe", "-o", str(pbs.FOLDER / "spool" / token)),
        *("-r", "n", "-W", f"umask={umask:04o}"),
        *qsub_arguments(properties),
        str(script),
    ]
    job_id = submit_once(arguments, token, deadline)
    if job_id:
        book["jobs"][job_id] = {
            "key": key,
            "name": name,
            "token": token,
            "log": str(log),
            "submitted": time.time(),
        }
    return job_id


def write_script(token, name, log, properties, text):
    """Write what PBS runs: the job script of Snakemake, and around it what PBS does not do.

    Jobs begin in the home folder, with their own umask and output that is copied when they end;
    and PBS may forget how they ended.
    """
    here = Path.cwd()
    for folder in (log.parent, pbs.FOLDER / "exit", pbs.FOLDER / "spool"):
        folder.mkdir(parents=True, exist_ok=True)
    passed_on = [(key, os.environ[key]) for key in PASSED_ON if key in os.environ]
    script = pbs.FOLDER / "scripts" / f"{token}.sh"
    pbs.replace(
        script,
        JOB_SCRIPT.format(
            name=name,
            log=shlex.quote(str(here / log)),
            umask=f"{current_umask():04o}",
            folder=shlex.quote(str(here)),
            exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in passed_on),
            body=limit_cores(text, whole(properties.get("threads", 1), "threads")),
            exit_file=shlex.quote(str(here / pbs.FOLDER / "exit" / token)),
        ),
    )
    return script


def current_umask():
    """Return the umask of this process; there is no other way than to set it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def submit_once(arguments, token, deadline):
    """Submit; return the job's id, or None if PBS refuses.

    A qsub that ends with an error may have submitted the job all the same, so before the next
    one the server is asked whether it is there.

    Raises
    ------
    pbs.ServerAwayError
        If the server is away until the deadline.
    """
    tried = []

    def attempt():
        job_id = job_of_token(token) if tried else None
        tried.append(True)
        return job_id or qsub(arguments)

    return patiently(attempt, deadline)


def qsub(arguments):
    """Return the id of the submitted job, or None if PBS refuses; ServerAwayError: try again."""
    code, out, err = pbs.run("qsub", *arguments)
    ids = re.findall(r"^\d+(?:\.[\w.-]+)?$", out, re.MULTILINE)
    if code == 0 and ids:
        return ids[-1]
    message = f"{err}\n{out}".strip()
    if pbs.is_away(message):
        raise pbs.ServerAwayError(message)
    print(f"qsub refuses (exit code {code}): {message}", file=sys.stderr)
    return None


def job_of_token(token):
    """Return the id of the job whose output goes to a file of this name, or None."""
    code, out, err = pbs.run("qstat", "-f")
    if code not in pbs.DEFINITE:
        raise pbs.ServerAwayError(err.strip())
    jobs = pbs.parse_qstat(out)
    return next((name for name, job in jobs.items() if token in (job.output_path or "")), None)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
