"""What has become of a job: from its exit code, the server's last answer, and time."""

import contextlib

from coaddflow.cluster.pbs import records, server

GONE = "PBS does not know the job any more, and it left no exit code"
NO_CODE = "ended without an exit code"
CANCELLED = "deleted when Snakemake was interrupted or had other work for it, or by cancel.py"
LIKELY = "killed, or its node was lost"
EXIT_STATUS = {
    **dict.fromkeys((-1, -2, -3, -10, -30), "it could not be started"),
    **dict.fromkeys((-4, -5, -6), "its node was lost: it was started again"),
    -20: "its node was lost",
    265: "killed",
    records.BEGUN_BEFORE: "PBS started it a second time, and its first start left no exit code",
}
"""Exit statuses of OpenPBS that it does not put into words."""

RUNNING = "running"
DOUBTFUL = "doubtful"
"""The server has not said that the job is there, nor is it sure that it has ended."""


def settle(job_id, max_age):
    """Find out what has become of a job, and note it if it has ended.

    Parameters
    ----------
    job_id : str
        The job.
    max_age : float
        An answer of the server younger than this is good enough, seconds.

    Returns
    -------
    word : {"running", "doubtful", "success", "failed"}
        What it does.
    reason : str
        Why it failed.
    """
    label = records.label_of(job_id)
    if not label:
        outcome = records.outcome_of_ended(job_id)
        if outcome:
            return outcome, ""
        if job_id not in records.names("ids"):
            records.enter("", job_id)  # of a ledger that was lost: the server is asked from now on
    code = records.exit_code(label)
    answer = {"jobs": None} if code is not None else records.answer(max_age)
    word, reason = judge(job_id, label, answer)
    if word in ("success", "failed"):
        with contextlib.suppress(OSError):  # a full disk: the next look finds the same
            records.end(label, job_id, word, reason)
    return word, reason


def judge(job_id, label, answer):
    """Return what a job does, and the reason of a failure, from all that is known.

    Parameters
    ----------
    job_id, label : str
        The job.
    answer : dict
        The server's last answer, as `records.answer` returns it.
    """
    code = records.exit_code(label)
    if code == 0:
        return "success", ""
    if code is not None:
        return "failed", with_log(label, f"exit code {code}")
    known = answer["jobs"]
    if known is None or job_id not in known:
        return DOUBTFUL, ""
    final = seems_final(server.ServerJob(*known[job_id]) if known[job_id] else None)
    if final is None:
        return RUNNING, ""
    word, reason, at_once = final
    if reason in (GONE, NO_CODE) and records.is_cancelled(job_id):
        reason, at_once = CANCELLED, True
    # the file with the exit code may arrive late, and a server that restarts may not know a job
    for_how_long = answer["asked"] - answer["ended"].get(job_id, answer["asked"])
    if not at_once and for_how_long < server.setting("GRACE", 120):
        return DOUBTFUL, ""
    if known[job_id] and server.never_runs(server.ServerJob(*known[job_id])):
        records.withdraw(label)
        with contextlib.suppress(server.ServerAwayError):
            server.run("qdel", job_id)
    return word, with_log(label, reason) if word == "failed" else ""


def seems_final(seen):
    """Return outcome, reason and whether it is certain, if the server's word on a job is final.

    Parameters
    ----------
    seen : server.ServerJob or None
        What the server says; None: it does not know it.
    """
    if seen is None:
        return "failed", GONE, False
    if server.never_runs(seen):
        return "failed", seen.comment, False
    if seen.state not in server.FINISHED_STATES:
        return None
    if seen.exit_status == 0:
        return "success", "", True
    if seen.exit_status is None:
        return "failed", seen.comment or NO_CODE, False
    words = [seen.comment or "failed", EXIT_STATUS.get(seen.exit_status, "")]
    reason = "; ".join(filter(None, words))
    at_once = seen.exit_status != records.BEGUN_BEFORE
    return "failed", f"{reason} (exit status {seen.exit_status})", at_once


def with_log(label, reason):
    """Add to a reason what PBS wrote about the job, and where its log is."""
    said = records.read(records.FOLDER / "spool" / label).splitlines()[-2:] if label else []
    said = "".join(f"; {line.strip()}" for line in said if line.strip())
    if not said and reason in (GONE, NO_CODE):
        said = f": {LIKELY}"
    name = records.name_of(label) or "job of an earlier run"
    return f"{name}: {reason}{said} (log: {records.log_of(label) if label else 'unknown'})"


def tidy():
    """Note the end of jobs that no Snakemake asks about any more, and remove what came late."""
    known = records.names("jobs")
    for label in records.names("spool"):
        if f"{label}.json" not in known:
            records.remove(records.FOLDER / "spool" / label)
    left = records.names("exit")
    for job_id in records.names("ids") if left else []:
        if records.label_of(job_id) in left:
            settle(job_id, 0)
