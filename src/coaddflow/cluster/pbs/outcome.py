"""What has become of a job: from its exit code, the server's last answer, and time."""

import contextlib

from coaddflow.cluster.pbs import limits, records, server

RUNNING = "running"
DOUBTFUL = "doubtful"
"""The server does not confirm that the job exists, nor is it certain that it has ended."""

GONE = "PBS no longer knows the job, and it left no exit code"
NO_CODE = "ended without an exit code"
CANCELLED = "deleted by cancel.py, or because Snakemake was interrupted"
REPLACED = "replaced by coaddflow"
NEVER_BEGAN = "deleted before it began"
LIKELY = "it was killed, or its node failed"
EXIT_STATUS = {
    **dict.fromkeys((-1, -2, -3, -10, -30), "it could not be started"),
    **dict.fromkeys((-4, -5, -6), "its node was lost: it was started again"),
    -20: "its node was lost",
    265: "killed",
    records.BEGUN_BEFORE: "PBS started it a second time, and its first start left no exit code",
}
"""Exit statuses of OpenPBS that its comments do not explain."""


def settle(job_id, max_age):
    """Find out what has become of a job, and note it if the job has ended.

    Returns
    -------
    word : {"running", "doubtful", "success", "failed"}
        State of the job, from an answer of the server that is at most ``max_age`` seconds old.
    reason : str
        Why it failed.
    """
    label = records.label_of(job_id)
    if not label:
        outcome = records.noted_outcome(job_id)
        if outcome:
            return outcome, ""
        if job_id not in records.names("ids"):
            records.note_id("", job_id)  # the records were lost: the server is asked from now on
    code = records.exit_code(label)
    if code is None:
        answer = records.answer(max_age)
        code = records.exit_code(label)  # the job may have ended meanwhile
    if code is None:
        word, reason = judge(job_id, label, answer)
    else:
        word, reason = "failed" if code else "success", f"exit code {code}" if code else ""
    reason = with_log(label, reason) if reason else ""
    if word in ("success", "failed"):
        with contextlib.suppress(OSError):  # a full disk: the next call finds the same
            records.note_end(label, job_id, word, reason)
    return word, reason


def judge(job_id, label, answer):
    """Return state and reason of a job without exit code, from the server's answer."""
    if answer["jobs"] is None or job_id not in answer["jobs"]:
        return DOUBTFUL, ""
    job = answer["jobs"][job_id]
    too_much = is_too_large(label) if job and job.state == "Q" else ""
    if too_much:
        _delete(label, job_id)
        return "failed", f"can never run: it {too_much}"
    if not server.looks_ended(job):
        return RUNNING, ""
    word, reason, certain = end_of(job)
    silent = job is not None and job.state in server.FINISHED_STATES and job.exit_status is None
    # one that has not begun by now never will
    if silent and records.withdraw(label):
        reason, certain = NEVER_BEGAN + f" ({job.comment})" * bool(job.comment), True
    deleted = records.why_deleted(job_id)
    if deleted and word == "failed":
        reason, certain = deleted, certain or reason in (GONE, NO_CODE)
    # the file with the exit code may arrive late, and a server that restarts may not know a job
    seconds = answer["asked"] - answer["ended"].get(job_id, answer["asked"])
    if not certain and seconds < server.setting("GRACE", 120):
        return DOUBTFUL, ""
    if job and server.never_runs(job):
        _delete(label, job_id)
    return word, reason


def _delete(label, job_id):
    """Delete a job that cannot begin."""
    records.withdraw(label)
    with contextlib.suppress(server.ServerAwayError):
        server.run("qdel", job_id)


def is_too_large(label, folder=None):
    """Return in words what a waiting job asks for that no node has; empty if it can run.

    OpenPBS lets it wait for ever.
    """
    asked = records.task_of(label, folder).get("asked")
    if not asked:
        return ""
    return limits.exceeded(limits.Asked(*asked), folder, limits.MAX_AGE_FOR_WAITING)


def waits(job):
    """Return in words how a job waits that will not start by itself, or not yet; empty: it runs."""
    if job is None or job.state not in server.WAITING_STATES:
        return ""
    return server.WAITING_STATES[job.state] + f": {job.comment}" * bool(job.comment)


def end_of(job):
    """Return outcome and reason of a job that looks ended, and whether they are certain.

    ``job`` is what the server says, None if it does not know the job.
    """
    if job is None:
        return "failed", GONE, False
    if server.never_runs(job):
        return "failed", job.comment, False
    if job.exit_status == 0:
        return "success", "", True
    if job.exit_status is None:
        return "failed", job.comment or NO_CODE, False
    words = [job.comment or "failed", EXIT_STATUS.get(job.exit_status, "")]
    reason = f"{'; '.join(filter(None, words))} (exit status {job.exit_status})"
    return "failed", reason, job.exit_status != records.BEGUN_BEFORE


def with_log(label, reason):
    """Add to a reason what PBS wrote about the job, and where its log is."""
    lines = records.read(records.FOLDER / "spool" / label).splitlines()[-2:] if label else []
    said = "".join(f"; {line.strip()}" for line in lines if line.strip())
    if not said and reason in (GONE, NO_CODE):
        said = f": {LIKELY}"
    name = records.name_of(label) or "job of an earlier run"
    return f"{name}: {reason}{said} (log: {records.log_of(label) if label else 'unknown'})"


def tidy():
    """Note the end of jobs that no Snakemake asks about, and remove files that came late."""
    known = records.names("jobs")
    for label in records.names("spool"):
        if f"{label}.json" not in known:
            records.remove(records.FOLDER / "spool" / label)
    left = records.names("exit")
    for job_id in records.names("ids") if left else []:
        if records.label_of(job_id) in left:
            settle(job_id, 0)
