#!/usr/bin/env python3
"""Submit a job script of Snakemake to PBS and print the job's id: submit.py JOBSCRIPT.

A job that still lives, because the Snakemake that submitted it was killed, is taken up when it
does all that is asked for: its id is printed and nothing is submitted. If it does something else
(other settings, only a part), it is deleted, and submission waits until it has ended. So no
exposure is ever worked on by two jobs. While the server is away, submission waits, too.
"""

import re
import signal
import sys
import time
from pathlib import Path

# also where Python is told not to look there (PYTHONSAFEPATH)
sys.path.insert(0, str(Path(__file__).resolve().parent))

import ledger
import pbs
import verdict
from jobscript import JobScript, current_umask, qsub_arguments, write_script

ALTERED_BY_A_SHELL = re.compile(r'[$`"\\\n]')
"""Snakemake gives the path of a job script to a shell, in double quotes."""


def main(path):
    """Submit a job script, or take up the job that is already there; return the exit code."""
    patience = pbs.setting("PATIENCE", 1800)
    deadline = time.monotonic() + patience
    try:
        refuse_odd_folder(Path.cwd())
        script = JobScript(Path(path))
        arguments = qsub_arguments(script)
        with ledger.locked("submission", patience) as alone:
            if not alone:
                raise pbs.ServerAwayError("another submission waits for it")
            ledger.recover()
            verdict.tidy()
            job_id = live_job(script, deadline)
            if job_id:
                print(f"PBS job {job_id} ({script.name}) still lives: taken up", file=sys.stderr)
            else:
                job_id = submit(script, arguments, deadline)
    except (pbs.ServerAwayError, pbs.QueueFullError) as error:
        what = "server away" if isinstance(error, pbs.ServerAwayError) else "takes no job"
        print(f"PBS {what}: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"cannot submit {path}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if job_id is None:
        return 1
    print(job_id)
    return 0


def refuse_odd_folder(folder):
    """Raise ValueError if the folder has a name that does not reach this program as it is."""
    if ALTERED_BY_A_SHELL.search(str(folder)):
        raise ValueError(
            f'the folder is called {str(folder)!r}; rename it: $, `, ", \\ and line ends mean '
            "something else to the shell through which Snakemake submits"
        )


# ---------------------------------------------------------------------------------------------
# Jobs of an earlier run
# ---------------------------------------------------------------------------------------------


def live_job(script, deadline):
    """Return the id of a live job that does all of a script's work, or None.

    Live jobs that do a part of it, or with other settings, are deleted and have ended then.

    Raises
    ------
    pbs.ServerAwayError
        If the server cannot be asked: a job could be there.
    """
    for label in ledger.labels(script.name, script.run):
        facts = ledger.facts_of(label)
        same_name = ledger.name_of(label) == script.name
        if not (set(facts["targets"]) & set(script.targets) if facts else same_name):
            continue
        if not ledger.is_ours(label):
            continue
        job_id = known_id(label, deadline)
        if job_id is None or not is_alive(job_id, deadline):
            continue
        if does_all(label, facts, script) and not ledger.is_cancelled(job_id):
            return job_id
        why = "was cancelled, or works on something else"
        print(f"PBS job {job_id} ({script.name}) {why}: deleted", file=sys.stderr)
        delete(label, job_id, deadline)
    return None


def does_all(label, facts, script):
    """Return whether a live job, left alone, makes all that a script makes."""
    if not facts or facts["settings"] != script.settings:
        return False
    if not set(script.targets) <= set(facts["targets"]):
        return False
    # a job that waits needs the files that the Snakemake which submitted it has left for it
    ready = ledger.may_begin(label) and Path(facts["files"]).is_dir()
    return ready or ledger.has_begun(label)


def known_id(label, deadline):
    """Return the id of a job whose submission may have been cut short.

    None: it is nowhere, and will never begin.
    """
    job_id = ledger.id_of(label) or patiently(lambda: pbs.with_output(label), deadline)
    if job_id is None:
        if ledger.withdraw(label):
            ledger.forget(label)
            return None
        # it begins at this moment
        job_id = patiently(lambda: _id_from_itself(label), deadline)
    ledger.enter(label, job_id)
    return job_id


def _id_from_itself(label):
    """Return the id that a job has noted."""
    job_id = ledger.id_of(label)
    if job_id is None:
        raise pbs.ServerAwayError(f"{label} has begun and has not told its id")
    return job_id


def is_alive(job_id, deadline):
    """Return whether a job has not ended; ask until it is sure."""

    def question():
        word, _ = verdict.settle(job_id, 0)
        if word == verdict.DOUBTFUL:
            raise pbs.ServerAwayError(f"it does not say what has become of job {job_id}")
        return word == verdict.RUNNING

    return patiently(question, deadline)


def delete(label, job_id, deadline):
    """Delete a job and wait until it has ended."""
    if ledger.withdraw(label):
        pbs.run("qdel", job_id)
        ledger.end(label, job_id, "failed", "deleted before it began: it worked on something else")
        return

    def ended():
        code, _, _ = pbs.run("qdel", job_id)
        if code == 0:
            ledger.cancel(job_id)
        if is_alive(job_id, deadline):
            raise pbs.ServerAwayError(f"job {job_id} is deleted and still lives")

    patiently(ended, deadline)


def patiently(question, deadline):
    """Return the answer to a question; while the server is away, ask again until the deadline."""
    while True:
        try:
            return question()
        except pbs.ServerAwayError as error:
            pause(error, deadline)


def pause(error, deadline, times=1):
    """Wait a little before the server is asked again; raise the error when it is too late."""
    seconds = pbs.setting("PAUSE", 5) * times
    if time.monotonic() + seconds > deadline:
        raise error
    time.sleep(seconds)


# ---------------------------------------------------------------------------------------------
# A new job
# ---------------------------------------------------------------------------------------------


def submit(script, arguments, deadline):
    """Submit a job; return its id, or None if PBS does not take it.

    A qsub that ends with an error may have submitted the job all the same. Before it is tried
    again the server must answer, and the first job is taken up, or can do nothing any more.

    Raises
    ------
    pbs.ServerAwayError
        If the server is away until the deadline.
    pbs.QueueFullError
        If the queue takes no job until the deadline, which begins anew as long as jobs of this
        survey are in the queue: they make room when they end.
    OSError
        If a file cannot be written (a full disk). Then there is no job.
    """
    patience = deadline - time.monotonic()
    while True:
        label = announce(script)
        path = ledger.FOLDER / "scripts" / f"{label}.sh"
        try:
            job_id = qsub([*output_arguments(label), *arguments, str(path)])
        except pbs.QueueFullError as error:
            ledger.forget(label)
            if some_live():
                deadline = time.monotonic() + patience
            pause(error, deadline, times=6)
            continue
        except pbs.ServerAwayError as error:
            pause(error, deadline)
            job_id = known_id(label, deadline)
            if job_id is None:
                continue
        if job_id is None:
            ledger.forget(label)
            return None
        try:
            ledger.enter(label, job_id)
        except OSError:
            ledger.withdraw(label)
            pbs.run("qdel", job_id)
            raise
        return job_id


def some_live():
    """Return whether the server knows a job of this survey that has not ended."""
    answer = ledger.answer(pbs.setting("POLL", 10))
    return any(not ledger.looks_ended(job) for job in (answer["jobs"] or {}).values())


def announce(script):
    """Write what belongs to a job that is to be submitted; return its label."""
    label = ledger.new_label(script.name, script.run)
    facts = {"targets": script.targets, "settings": script.settings, "files": script.files}
    try:
        ledger.announce(label, facts)
        write_script(label, script)
    except OSError:
        ledger.forget(label)
        raise
    return label


def output_arguments(label):
    """Return the arguments of qsub that say where output goes, and how PBS treats the job."""
    return [
        *("-N", ledger.name_of(label), "-j", "oe", "-o", str(ledger.FOLDER / "spool" / label)),
        *("-r", "n", "-W", f"umask={current_umask()}"),
    ]


def qsub(arguments):
    """Return the id of the submitted job, or None if PBS refuses.

    Raises
    ------
    pbs.ServerAwayError
        If it is not known whether there is a job now.
    pbs.QueueFullError
        If there is none, and there may be room later.
    """
    # Ctrl-C must not come between the job and its id
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, out, err = pbs.run("qsub", *arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    if code == 0 and lines and lines[-1].split(".")[0].isdigit():
        return lines[-1]
    message = f"{err}\n{out}".strip()
    if pbs.is_away(message):
        raise pbs.ServerAwayError(message)
    if pbs.is_full(message):
        raise pbs.QueueFullError(message)
    print(f"qsub refuses (exit code {code}): {message}", file=sys.stderr)
    return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
