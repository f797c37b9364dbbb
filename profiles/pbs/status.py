#!/usr/bin/env python3
"""Print what a job does: running, success or failed. Called by Snakemake: status.py JOBID.

Any other word, or an exit code, would abort the whole run, so in every doubt a job is running:
the server is away, the answer makes no sense, a job has just vanished. It has ended when it left
its exit code, when PBS says how it ended, or when PBS has not known it for a while.
"""

import sys
import time

import pbs


def main(job_id):
    """Print the state of a job, and on standard error why it failed."""
    word, reason = "running", ""
    try:
        with pbs.ledger() as book:
            word, reason = state_of(book, job_id)
    except Exception as error:  # in every doubt: running
        print(f"status of PBS job {job_id}: {type(error).__name__}: {error}", file=sys.stderr)
    if word == "failed" and reason:
        print(f"PBS job {job_id}: {reason}", file=sys.stderr)
    print(word)


def state_of(book, job_id):
    """Return the state of a job, and why it failed; note in the ledger if it has ended.

    Parameters
    ----------
    book : dict
        The ledger.
    job_id : str
        The job.
    """
    if job_id not in book["jobs"]:
        outcome = pbs.outcome_of_ended(job_id)
        if outcome:
            return outcome, ""
        book["jobs"][job_id] = {"name": "", "submitted": 0.0}  # of a ledger that was lost
    job = book["jobs"][job_id]
    code = pbs.exit_code(job)
    if code is None:
        pbs.look(book, pbs.setting("POLL", 10))
        code = pbs.exit_code(job)
    word, reason = judge(job, code, book, job_id, time.time())
    if word != "running":
        pbs.end(book, job_id, word, reason)
    return word, reason


def judge(job, code, book, job_id, now):
    """Return a job's state and the reason of a failure from all that is known.

    Parameters
    ----------
    job : dict
        The job in the ledger; the time since when something looks final is kept there.
    code : int or None
        The exit code that it left.
    book : dict
        The ledger with the server's last answer.
    job_id : str
        The job.
    now : float
        Seconds since the epoch.
    """
    if code is not None:
        return ("success", "") if code == 0 else ("failed", with_log(job, f"exit code {code}"))
    if book["answer"] is None or book["asked"] < job["submitted"]:
        return "running", ""
    seen = book["answer"].get(job_id)
    final = seems_final(pbs.ServerJob(*seen) if seen else None)
    if final is None:
        job.pop("final_since", None)
        return "running", ""
    word, reason, at_once = final
    since = job.setdefault("final_since", now)
    # the file with the exit code may arrive late, and a server that restarts may not know a job
    if not at_once and now - since < pbs.setting("GRACE", 60):
        return "running", ""
    if reason.startswith(pbs.NEVER_RUNS):
        pbs.run("qdel", job_id)
    return word, with_log(job, reason) if word == "failed" else ""


def seems_final(seen):
    """Return outcome, reason and whether it is certain, if the server's word on a job is final.

    Parameters
    ----------
    seen : pbs.ServerJob or None
        What the server says; None: it does not know the job.
    """
    if seen is None:
        return "failed", pbs.GONE, False
    if pbs.never_runs(seen):
        return "failed", seen.comment, False
    if seen.state not in pbs.FINISHED_STATES:
        return None
    if seen.exit_status == 0:
        return "success", "", True
    if seen.exit_status is None:
        return "failed", seen.comment or "ended without an exit code: killed, or cancelled", False
    return "failed", f"{seen.comment or 'failed'} (exit status {seen.exit_status})", True


def with_log(job, reason):
    """Add to a reason what PBS wrote about the job, and where its log is."""
    said = ""
    try:
        text = (pbs.FOLDER / "spool" / job["token"]).read_text(encoding="utf-8", errors="replace")
        said = "".join(f"; {line.strip()}" for line in text.splitlines()[-2:] if line.strip())
    except (OSError, KeyError):
        pass
    return f"{job.get('name', '')}: {reason}{said} (log: {job.get('log', 'unknown')})"


if __name__ == "__main__":
    main(sys.argv[1])
