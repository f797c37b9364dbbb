"""Submit a job script of Snakemake, or take up a job that already does its work.

A live job, left by a Snakemake that was killed, is taken up when it does all that is asked for:
nothing is submitted. If it does something else (other settings, only a part), it is deleted, and
submission waits for its end. So no exposure is ever worked on by two jobs. While the server is
away, submission waits, too.
"""

import contextlib
import signal
import sys
import time
from pathlib import Path

from coaddflow.cluster.pbs import limits, outcome, records, server
from coaddflow.cluster.pbs.job_script import (
    JobScript,
    asked_by,
    current_umask,
    qsub_arguments,
    write_script,
)


def main(path):
    """Submit a job script, or take up the job that is already there; return the exit code."""
    patience = server.setting("PATIENCE", 1800)
    deadline = time.monotonic() + patience
    try:
        script = JobScript(Path(path))
        arguments = qsub_arguments(script)
        with records.locked("submission", patience) as alone:
            if not alone:
                raise server.ServerAwayError("another submission waits for it")
            records.recover()
            outcome.tidy()
            job_id = live_job(script, deadline)
            if job_id:
                print(f"PBS job {job_id} ({script.name}) still exists: it is used", file=sys.stderr)
            else:
                too_much = limits.exceeded(asked_by(script))
                if too_much:
                    raise server.RefusedError(f"it {too_much}")
                job_id = submit(script, arguments, deadline)
    except server.ServerAwayError as error:
        return refuse(script, f"PBS server away: {error}")
    except server.QueueFullError as error:
        return refuse(script, f"PBS takes no job: {error}")
    except server.RefusedError as error:
        return refuse(script, str(error))
    except (ValueError, OSError) as error:
        print(f"cannot submit {path}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(job_id)
    return 0


def refuse(script, why):
    """Say and note that a job is not submitted, and why; return the exit code."""
    print(f"{script.name} is not submitted: {why}", file=sys.stderr)
    with contextlib.suppress(OSError):
        records.note_refusal(script.name, script.targets, why)
    return 1


# ---------------------------------------------------------------------------------------------
# Jobs of an earlier run
# ---------------------------------------------------------------------------------------------


def live_job(script, deadline):
    """Return the id of a live job that does all of a script's work, or None.

    Live jobs that do a part of it, or with other settings, are deleted, and their end is awaited.
    """
    for label in records.labels(script.name, script.run):
        task = records.task_of(label)
        same_name = records.name_of(label) == script.name
        if not (set(task["targets"]) & set(script.targets) if task else same_name):
            continue
        if not records.is_ours(label):
            continue
        job_id = known_id(label, deadline)
        if job_id is None or not is_alive(job_id, deadline):
            continue
        if does_all(label, task, script) and not records.why_deleted(job_id):
            return job_id
        why = "was cancelled, works on something else, or asks for too much or too little"
        print(f"PBS job {job_id} ({script.name}) {why}: deleted", file=sys.stderr)
        delete(label, job_id, deadline)
    return None


def does_all(label, task, script):
    """Return whether a live job, left alone, does all of a script's work."""
    if not task or task["settings"] != script.settings:
        return False
    if not set(script.targets) <= set(task["targets"]):
        return False
    if label in records.names("begun"):
        return True
    # a waiting job needs the files that the Snakemake which submitted it has left for it
    ready = label in records.names("tickets") and Path(task["files"]).is_dir()
    return ready and asks_enough(label, task, script)


def asks_enough(label, task, script):
    """Return whether a waiting job asks for what a script needs, and for no more than there is."""
    if not task["asked"]:
        return True  # submitted by an older version, which did not note it
    has, wants = limits.Asked(*task["asked"]), asked_by(script)
    too_little = has.mem_mb < wants.mem_mb or has.runtime < wants.runtime
    return not too_little and has.queue == wants.queue and not outcome.is_too_large(label)


def known_id(label, deadline):
    """Return the id of a job whose submission may have been interrupted.

    None if there is no such job and it will never begin.
    """
    job_id = records.id_of(label) or ask_patiently(lambda: server.with_output(label), deadline)
    if job_id is None:
        if records.withdraw(label):
            records.forget(label)
            return None
        # it begins at this moment
        job_id = ask_patiently(lambda: _id_from_itself(label), deadline)
    records.note_id(label, job_id)
    return job_id


def _id_from_itself(label):
    """Return the id that a job itself has noted."""
    job_id = records.id_of(label)
    if job_id is None:
        raise server.ServerAwayError(f"{label} has begun and has not noted its id")
    return job_id


def is_alive(job_id, deadline):
    """Return whether a job has not ended; ask until that is certain."""

    def question():
        word, _ = outcome.settle(job_id, 0)
        if word == outcome.DOUBTFUL:
            raise server.ServerAwayError(f"it does not say what has become of job {job_id}")
        return word == outcome.RUNNING

    return ask_patiently(question, deadline)


def delete(label, job_id, deadline):
    """Delete a job and wait for its end."""
    if records.withdraw(label):
        server.run("qdel", job_id)
        records.note_end(label, job_id, "failed", f"{outcome.REPLACED} before it began")
        return

    def ended():
        code, _, _ = server.run("qdel", job_id)
        if code == 0:
            records.note_deletion(job_id, outcome.REPLACED)
        if is_alive(job_id, deadline):
            raise server.ServerAwayError(f"job {job_id} was deleted and still exists")

    ask_patiently(ended, deadline)


def ask_patiently(question, deadline):
    """Return the answer to a question; while the server is away, ask again until the deadline."""
    while True:
        try:
            return question()
        except server.ServerAwayError as error:
            pause(error, deadline)


def pause(error, deadline, times=1):
    """Wait before the server is asked again; raise the error when it is too late for that."""
    seconds = server.setting("PAUSE", 5) * times
    if time.monotonic() + seconds > deadline:
        raise error
    time.sleep(seconds)


# ---------------------------------------------------------------------------------------------
# A new job
# ---------------------------------------------------------------------------------------------


def submit(script, arguments, deadline):
    """Submit a job; return its id.

    A qsub that fails may have submitted the job all the same. Before another try the server must
    answer, and the first job is taken up or can do nothing any more.

    Raises
    ------
    server.ServerAwayError
        If the server is away until the deadline.
    server.QueueFullError
        If the queue takes no job until the deadline, which is extended as long as jobs of this
        survey are in the queue: they make room when they end.
    RefusedError
        If PBS does not accept the request.
    OSError
        If a file cannot be written (a full disk). Then there is no job.
    """
    patience = deadline - time.monotonic()
    while True:
        label = announce(script)
        path = records.FOLDER / "scripts" / f"{label}.sh"
        try:
            job_id = qsub([*output_arguments(label), *arguments, str(path)])
        except server.RefusedError:
            records.forget(label)
            raise
        except server.QueueFullError as error:
            records.forget(label)
            if any_job_lives():
                deadline = time.monotonic() + patience
            pause(error, deadline, times=6)
            continue
        except server.ServerAwayError as error:
            pause(error, deadline)
            job_id = known_id(label, deadline)
            if job_id is None:
                continue
        try:
            records.note_id(label, job_id)
        except OSError:
            records.withdraw(label)
            server.run("qdel", job_id)
            raise
        return job_id


def any_job_lives():
    """Return whether the server knows a job of this survey that has not ended."""
    answer = records.answer(server.setting("POLL", 10))
    return any(not server.looks_ended(job) for job in (answer["jobs"] or {}).values())


def announce(script):
    """Write the files of a job that is about to be submitted; return its label."""
    label = records.new_label(script.name, script.run)
    task = {
        "targets": script.targets,
        "settings": script.settings,
        "files": script.files,
        "asked": asked_by(script),
    }
    try:
        records.announce(label, task)
        write_script(label, script)
    except OSError:
        records.forget(label)
        raise
    return label


def output_arguments(label):
    """Return the arguments of qsub that say where output goes, and how PBS treats the job."""
    return [
        *("-N", records.name_of(label), "-j", "oe", "-o", str(records.FOLDER / "spool" / label)),
        *("-r", "n", "-W", f"umask={current_umask()}"),
    ]


def qsub(arguments):
    """Return the id of the submitted job.

    Raises
    ------
    server.RefusedError
        If PBS does not accept the request.
    server.ServerAwayError
        If it is not known whether there is a job now.
    server.QueueFullError
        If there is none, and there may be room later.
    """
    # Ctrl-C must not come between the job and its id
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, out, err = server.run("qsub", *arguments)
    finally:
        signal.signal(signal.SIGINT, before)
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    if code == 0 and lines and lines[-1].split(".")[0].isdigit():
        return lines[-1]
    message = f"{err}\n{out}".strip()
    if server.is_away(message):
        raise server.ServerAwayError(message)
    if server.is_full(message):
        raise server.QueueFullError(message)
    raise server.RefusedError(f"qsub refuses (exit code {code}): {message}")
