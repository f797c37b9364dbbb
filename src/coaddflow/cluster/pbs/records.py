"""What is known about the jobs of a survey, in files below `FOLDER` in the survey's folder.

A job has a label, NAME.TOKEN, from before it is submitted; the label is the name of its files:

    jobs/LABEL.json   what it works on; from before its submission until it has been seen to end
    tickets/LABEL     the permission to begin. The job moves it to begun/LABEL and writes its id
                      there. Who moves it to withdrawn/LABEL first can be sure that the job,
                      wherever it may be, does nothing
    ids/ID            the label, written after the submission
    exit/LABEL        its exit code, written by the job itself
    cancelled/ID      submit.py or cancel.py has deleted it
    scripts/, spool/  what was submitted; what PBS itself says about a job
    answer.json       the server's last answer about all jobs
    ended.tsv         how each other job ended: time, id, name, outcome, reason, rules

Every file is written whole or not at all and belongs to one job, so nobody waits for anybody: only
submissions wait for each other (two Snakemakes in one folder), and one question at a time is asked.
A Snakemake that is killed between submission and the note of the id leaves a job without an id,
which the next one finds (`begun/`) or stops (`tickets/`).
"""

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path

from coaddflow.cluster.pbs import server

FOLDER = Path(".snakemake") / "coaddflow" / "pbs"
LOGS = Path("logs") / "pbs"
BEGUN_BEFORE = 75
"""Exit code of a job that PBS started a second time: it did nothing, but its first start may still
work."""
BEST_WAY_AGAIN = 600.0
"""Seconds after which a server is asked again in the best way: it may keep a history now."""
LONG_AGO = 600.0
"""Seconds after which nothing follows from an answer and the next one together: between them much
may have happened to the server."""
STALE = 30.0
"""Seconds after which an answer says nothing any more while somebody else asks for a new one."""

_OF_A_JOB = (
    *("jobs/{}.json", "scripts/{}.sh"),
    *("tickets/{}", "withdrawn/{}", "begun/{}", "exit/{}", "spool/{}"),
)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def replace(path, text):
    """Write a small file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        remove(temporary)
        raise


def read(path):
    """Return the text of a small file; empty if there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def remove(path):
    """Remove a file; return whether it was there."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def survey():
    """Return what tells the folder of this survey from a copy, by whatever path it is reached."""
    return Path().stat().st_ino


def names(folder):
    """Return the names of the files in a folder. Listing it makes NFS look for new ones."""
    with contextlib.suppress(FileNotFoundError):
        found = [path.name for path in (FOLDER / folder).iterdir()]
        return sorted(name for name in found if not name.startswith("."))
    return []


@contextlib.contextmanager
def locked(name, patience=0.0):
    """Yield whether this process has a lock; wait for it as long as patience lasts, seconds."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    with (FOLDER / f"{name}.lock").open("a", encoding="ascii") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                yield False
                return
            except OSError:
                pass  # a file system without locks: Snakemake's own lock must do
            yield True
            return


# ---------------------------------------------------------------------------------------------
# One job
# ---------------------------------------------------------------------------------------------


def announce(label, facts):
    """Note a job that is about to be submitted, and permit it to begin.

    Raises
    ------
    OSError
        If that cannot be written (a full disk): then the job must not be submitted.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    for folder in ("exit", "spool", "begun", "withdrawn"):
        (FOLDER / folder).mkdir(parents=True, exist_ok=True)
    # a job that is in jobs/ and has no ticket counts as one that has begun
    replace(FOLDER / "tickets" / label, "")
    replace(FOLDER / "jobs" / f"{label}.json", json.dumps(dict(facts, survey=survey())))


def enter(label, job_id):
    """Note the id of a submitted job."""
    replace(FOLDER / "ids" / job_id, label)


def new_label(name, run):
    """Return a label for a job of a run of Snakemake."""
    return f"{name}.{time.strftime('%Y%m%d-%H%M%S')}-{run}-{os.urandom(3).hex()}"


def labels(name, run):
    """Return the labels of jobs that may make what another job of a run is to make.

    Those of the same name, and all of other runs, which may have grouped their work differently.
    The jobs of one run share nothing.
    """
    found = [file[: -len(".json")] for file in names("jobs") if file.endswith(".json")]
    return [label for label in found if name_of(label) == name or f"-{run}-" not in label]


def name_of(label):
    """Return the name of a job that people read in the queue."""
    return label.rpartition(".")[0]


def facts_of(label):
    """Return what a job works on; empty if its file is lost or damaged."""
    try:
        facts = json.loads(read(FOLDER / "jobs" / f"{label}.json"))
        return {name: facts[name] for name in ("targets", "settings", "files", "survey")}
    except (ValueError, TypeError, KeyError):
        return {}


def is_ours(label):
    """Return whether a job is of this survey, not of one of which this folder is a copy."""
    return facts_of(label).get("survey", survey()) == survey()


def label_of(job_id):
    """Return the label of a job; empty if it is not known."""
    return read(FOLDER / "ids" / job_id)


def id_of(label):
    """Return the id of a job, as submission or the job itself noted it; None if neither did."""
    for job_id in names("ids"):
        if label_of(job_id) == label:
            return job_id
    return read(FOLDER / "begun" / label).strip() or None


def has_begun(label):
    """Return whether a job has begun to work."""
    return label in names("begun")


def may_begin(label):
    """Return whether a job that has not begun still has the permission to."""
    return label in names("tickets")


def withdraw(label):
    """Take back the permission to begin; return whether the job will never do anything.

    That a file is not seen proves nothing: on a network a folder may be shown as it was.
    """
    if not label:
        return False
    withdrawn = FOLDER / "withdrawn" / label
    withdrawn.parent.mkdir(parents=True, exist_ok=True)
    try:
        (FOLDER / "tickets" / label).rename(withdrawn)
    except FileNotFoundError:
        return withdrawn.exists()
    return True


def exit_code(label):
    """Return the exit code that a job left; None if there is none (yet)."""
    if label not in names("exit"):
        return None
    try:
        return int(read(FOLDER / "exit" / label))
    except ValueError:
        return None


def log_of(label):
    """Return the path of the file with all that a job prints."""
    return LOGS / f"{label}.out"


def cancel(job_id):
    """Note that a job has been deleted: when the server does not know it any more it has ended."""
    replace(FOLDER / "cancelled" / job_id, "")


def is_cancelled(job_id):
    """Return whether a job has been deleted."""
    return job_id in names("cancelled")


def end(label, job_id, outcome, reason):
    """Note how a job ended, and remove its files.

    Parameters
    ----------
    label, job_id : str
        The job.
    outcome : {"success", "failed"}
        How it ended.
    reason : str
        Why it failed; empty otherwise.
    """
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    rules = {target.partition(":")[0] for target in facts_of(label).get("targets", [])}
    words = [when, job_id, name_of(label), outcome, " ".join(reason.split()), *sorted(rules)]
    with (FOLDER / "ended.tsv").open("a", encoding="utf-8") as stream:
        stream.write("\t".join(words) + "\n")
    # whoever is killed here leaves a job that has ended, not one that has lost its exit code
    remove(FOLDER / "ids" / job_id)
    remove(FOLDER / "cancelled" / job_id)
    if label:
        forget(label)


def forget(label):
    """Remove the files of a job that is not there any more."""
    for pattern in _OF_A_JOB:
        remove(FOLDER / pattern.format(label))


def outcome_of_ended(job_id):
    """Return how a job that has been seen to end ended; None if it is not known."""
    outcome = None
    for line in read(FOLDER / "ended.tsv").splitlines():
        words = line.split("\t")
        if len(words) > 3 and words[1] == job_id:
            outcome = words[3]
    return outcome


def recover():
    """Find the jobs that work although the ledger was lost, from the logs that they write.

    Those that wait in the queue have lost their permission to begin.
    """
    if (FOLDER / "jobs").is_dir() or not LOGS.is_dir():
        return
    for log in sorted(LOGS.glob("*.out")):
        lines = [line for line in read(log).splitlines() if line.startswith("coaddflow: job ")]
        if lines and f" of survey {survey()} begins " in lines[-1]:
            label, job_id = log.name[: -len(".out")], lines[-1].split()[2]
            replace(FOLDER / "jobs" / f"{label}.json", "{}")
            replace(FOLDER / "begun" / label, job_id)
            enter(label, job_id)


# ---------------------------------------------------------------------------------------------
# All jobs
# ---------------------------------------------------------------------------------------------


def last_answer():
    """Return the server's last answer.

    Returns
    -------
    dict
        "asked": when, seconds since the epoch; "way": how, the number of `server.WAYS`, and
        "since": since when; "jobs": what it said about each job that it was asked about (None: it
        does not know it), or None if it was away; "ended": since when all answers agree that a job
        looks as if it had ended.
    """
    nothing = {"asked": 0.0, "way": 0, "since": 0.0, "jobs": None, "ended": {}}
    try:
        return dict(nothing, **json.loads(read(FOLDER / "answer.json")))
    except (ValueError, TypeError):
        return nothing


def answer(max_age):
    """Return the server's answer about all jobs; ask anew if the last one is too old.

    Parameters
    ----------
    max_age : float
        An answer younger than this is good enough, seconds; so is the news that the server is
        away. While somebody else asks, the last answer is good enough, too, unless it is `STALE`:
        then it is as if the server were away.
    """
    last = last_answer()
    if 0 <= time.time() - last["asked"] < max_age:
        return last
    with locked("asking") as alone:
        if not alone:
            return last if time.time() - last["asked"] < STALE else dict(last, jobs=None)
        asked, job_ids = time.time(), names("ids")
        way, since = last["way"], last["since"]
        if asked - since > BEST_WAY_AGAIN:
            way, since = 0, asked
        try:
            jobs, way = server.ask(job_ids, way)
            # qsub and qstat may name the server differently
            by_number = {number(name): list(job) for name, job in jobs.items()}
            known = {job_id: by_number.get(number(job_id)) for job_id in job_ids}
        except server.ServerAwayError:
            known = None
        before = last["ended"] if asked - last["asked"] < LONG_AGO else {}
        ended = [job_id for job_id, job in (known or {}).items() if looks_ended(job)]
        ended = {job_id: before.get(job_id, asked) for job_id in ended}
        last = {"asked": asked, "way": way, "since": since, "jobs": known, "ended": ended}
        with contextlib.suppress(OSError):  # a full disk: then the next one asks again
            replace(FOLDER / "answer.json", json.dumps(last))
    return last


def looks_ended(job):
    """Return whether a job of an answer looks as if it had ended."""
    return server.looks_ended(job and server.ServerJob(*job))


def number(job_id):
    """Return an id without the name of the server."""
    return job_id.partition(".")[0]
