"""What is known about the jobs of a survey: files below `FOLDER` in the folder of the survey.

A job has a label, NAME.TOKEN, from before its submission. Its files are named after it:

    jobs/LABEL.json   its task; from before its submission until its end has been seen
    tickets/LABEL     the permission to begin. The job moves it to begun/LABEL and writes its id
                      there. Whoever moves it to withdrawn/LABEL first can be sure that the job
                      does nothing, wherever it is
    ids/ID            the label, written after the submission
    exit/LABEL        the exit code, written by the job itself
    cancelled/ID      submit.py or cancel.py has deleted the job, and why
    told/ID           what the user has been told about a job that waits
    scripts/, spool/  what was submitted; what PBS itself says about a job
    answer.json       the server's last answer about all jobs
    limits.json       its last answers about nodes and queues
    ended.tsv         how each other job ended: time, id, name, outcome, reason, rules; without id:
                      a submission that was refused

Every file is written whole or not at all and belongs to one job, so that nothing is locked, except
that submissions wait for each other (two Snakemakes in one folder) and that one process at a time
asks the server. A Snakemake that is killed between submission and the note of the id leaves a job
without an id, which the next one finds (`begun/`) or stops (`tickets/`).
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
be running."""
BEST_WAY_AGAIN = 600.0
"""Seconds after which the server is asked again in the best way: it may keep a history by then."""
LONG_AGO = 600.0
"""Seconds after which an answer and the next one are not compared: the server may have been
restarted in between."""
STALE = 30.0
"""Seconds after which an answer is no longer used while another process asks for a new one."""

_OF_A_JOB = (
    *("jobs/{}.json", "scripts/{}.sh"),
    *("tickets/{}", "withdrawn/{}", "begun/{}", "exit/{}", "spool/{}"),
)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def write(path, text):
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
    """Remove a file if it exists."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def names(folder):
    """Return the names of the files in a folder. Listing it makes NFS look for new ones."""
    with contextlib.suppress(FileNotFoundError):
        found = [path.name for path in (FOLDER / folder).iterdir()]
        return sorted(name for name in found if not name.startswith("."))
    return []


@contextlib.contextmanager
def locked(name, patience=0.0):
    """Try for so many seconds to get a lock; yield whether this process has it."""
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


def survey():
    """Return the inode of the survey's folder, which tells it from a copy, whatever its path."""
    return Path().stat().st_ino


def new_label(name, run):
    """Return a label for a job of a run of Snakemake."""
    return f"{name}.{time.strftime('%Y%m%d-%H%M%S')}-{run}-{os.urandom(3).hex()}"


def announce(label, task):
    """Note a job that is about to be submitted, and permit it to begin.

    If this raises OSError (a full disk), the job must not be submitted.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    for folder in ("exit", "spool", "begun", "withdrawn"):
        (FOLDER / folder).mkdir(parents=True, exist_ok=True)
    # first the ticket: a job in jobs/ without one counts as begun
    write(FOLDER / "tickets" / label, "")
    write(FOLDER / "jobs" / f"{label}.json", json.dumps(dict(task, survey=survey())))


def note_id(label, job_id):
    """Note the id of a submitted job."""
    write(FOLDER / "ids" / job_id, label)


def labels(name, run):
    """Return the labels of jobs that may make what another job of a run is to make.

    Those of the same name, and all of other runs, which may have grouped their work differently.
    The jobs of one run have no work in common.
    """
    found = [file[: -len(".json")] for file in names("jobs") if file.endswith(".json")]
    return [label for label in found if name_of(label) == name or f"-{run}-" not in label]


def name_of(label):
    """Return the name of a job in the queue."""
    return label.rpartition(".")[0]


def log_of(label):
    """Return the path of the log to which a job prints."""
    return LOGS / f"{label}.out"


def task_of(label, folder=None):
    """Return what a job works on and asks for; empty if its file is lost or damaged."""
    try:
        task = json.loads(read((folder or FOLDER) / "jobs" / f"{label}.json"))
        needed = {name: task[name] for name in ("targets", "settings", "files", "survey")}
        return dict(needed, asked=task.get("asked"))  # of an older version: not known
    except (ValueError, TypeError, KeyError):
        return {}


def is_ours(label):
    """Return whether a job belongs to this survey, not to one of which this folder is a copy."""
    return task_of(label).get("survey", survey()) == survey()


def label_of(job_id):
    """Return the label of a job; empty if it is not known."""
    return read(FOLDER / "ids" / job_id)


def id_of(label):
    """Return the id of a job, as submission or the job itself noted it; None if neither did."""
    for job_id in names("ids"):
        if label_of(job_id) == label:
            return job_id
    return read(FOLDER / "begun" / label).strip() or None


def withdraw(label):
    """Take back the permission to begin; return whether the job will certainly do nothing.

    A file that is not seen proves nothing: on a network a folder may be shown as it was.
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


def note_deletion(job_id, why):
    """Note that a job was deleted: once the server does not know it any more, it has ended."""
    write(FOLDER / "cancelled" / job_id, why)


def why_deleted(job_id):
    """Return why submit.py or cancel.py has deleted a job; empty if they have not."""
    if job_id not in names("cancelled"):
        return ""
    return read(FOLDER / "cancelled" / job_id) or "deleted"


def tell(job_id, text):
    """Return whether the user is to be told this about a job: not twice."""
    path = FOLDER / "told" / job_id
    if read(path) == text:
        return False
    write(path, text)
    return True


def note_end(label, job_id, outcome, reason):
    """Note how a job ended ("success" or "failed") and why it failed, and remove its files."""
    _add_row(job_id, name_of(label), outcome, reason, task_of(label).get("targets", []))
    # the id first: if this process is killed here, the job has ended, not lost its exit code
    remove(FOLDER / "ids" / job_id)
    remove(FOLDER / "cancelled" / job_id)
    remove(FOLDER / "told" / job_id)
    if label:
        forget(label)


def note_refusal(name, targets, why):
    """Note that a job was not submitted, and why."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    _add_row("", name, "refused", why, targets)


def _add_row(job_id, name, outcome, reason, targets):
    """Add a row to ended.tsv."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    rules = sorted({target.partition(":")[0] for target in targets})
    words = [when, job_id, name, outcome, " ".join(reason.split()), *rules]
    with (FOLDER / "ended.tsv").open("a", encoding="utf-8") as stream:
        stream.write("\t".join(words) + "\n")


def forget(label):
    """Remove the files of a job that does not exist any more."""
    for pattern in _OF_A_JOB:
        remove(FOLDER / pattern.format(label))


def noted_outcome(job_id):
    """Return the outcome of a job whose end has been noted; None if it has not."""
    rows = [line.split("\t") for line in read(FOLDER / "ended.tsv").splitlines()]
    outcomes = [row[3] for row in rows if len(row) > 3 and row[1] == job_id]
    return outcomes[-1] if outcomes else None


def recover():
    """Find running jobs by their logs when these records were lost.

    Jobs that wait in the queue have lost their permission to begin.
    """
    if (FOLDER / "jobs").is_dir() or not LOGS.is_dir():
        return
    for log in sorted(LOGS.glob("*.out")):
        lines = [line for line in read(log).splitlines() if line.startswith("coaddflow: job ")]
        if lines and f" of survey {survey()} begins " in lines[-1]:
            label, job_id = log.name[: -len(".out")], lines[-1].split()[2]
            write(FOLDER / "jobs" / f"{label}.json", "{}")
            write(FOLDER / "begun" / label, job_id)
            note_id(label, job_id)


# ---------------------------------------------------------------------------------------------
# The server's answer about all jobs
# ---------------------------------------------------------------------------------------------


def last_answer():
    """Return the server's last answer.

    Returns
    -------
    dict
        "asked": when, seconds since the epoch; "way": how, an index of `server.WAYS`, and
        "since": since when; "jobs": a `server.ServerJob` for each job that it was asked about,
        None for those that it does not know, or None in all if it was away; "ended": since when
        all answers agree that a job looks as if it had ended.
    """
    nothing = {"asked": 0.0, "way": 0, "since": 0.0, "jobs": None, "ended": {}}
    try:
        last = dict(nothing, **json.loads(read(FOLDER / "answer.json")))
    except (ValueError, TypeError):
        return nothing
    if last["jobs"]:
        jobs = last["jobs"].items()
        last["jobs"] = {job_id: job and server.ServerJob(*job) for job_id, job in jobs}
    return last


def answer(max_age):
    """Return the server's answer about all jobs, at most ``max_age`` seconds old.

    That the server is away is an answer, too. While another process asks, the last answer is used
    until it is `STALE`; then the server counts as away.
    """
    last = last_answer()
    if 0 <= time.time() - last["asked"] < max_age:
        return last
    with locked("asking") as alone:
        if not alone:
            return last if time.time() - last["asked"] < STALE else dict(last, jobs=None)
        last = _ask_after(last)
        with contextlib.suppress(OSError):  # a full disk: then the next process asks again
            write(FOLDER / "answer.json", json.dumps(last))
    return last


def _ask_after(last):
    """Ask the server about all jobs; return its answer, continuing from the last one."""
    asked, job_ids = time.time(), names("ids")
    way, since = last["way"], last["since"]
    if asked - since > BEST_WAY_AGAIN:
        way, since = 0, asked
    try:
        jobs, way = server.ask(job_ids, way)
        # qsub and qstat may name the server differently
        by_number = {_number(name): job for name, job in jobs.items()}
        jobs = {job_id: by_number.get(_number(job_id)) for job_id in job_ids}
    except server.ServerAwayError:
        jobs = None
    before = last["ended"] if asked - last["asked"] < LONG_AGO else {}
    ended = [job_id for job_id, job in (jobs or {}).items() if server.looks_ended(job)]
    ended = {job_id: before.get(job_id, asked) for job_id in ended}
    return {"asked": asked, "way": way, "since": since, "jobs": jobs, "ended": ended}


def _number(job_id):
    """Return an id without the name of the server."""
    return job_id.partition(".")[0]
