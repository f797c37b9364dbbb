"""What a run on a cluster needs beyond its profile.

A killed Snakemake leaves its jobs in the queue. The next run must not work on an exposure that
one of them still works on: on PBS, profiles/pbs/submit.py takes such a job up; on Slurm, whose
executor submits by itself, the run waits here until they have ended, before it looks at what
there is to do. Standard library only.
"""

import getpass
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from coaddflow.errors import InputError

SLURM_PAUSE = 15.0
"""Seconds between two questions whether the earlier jobs have ended."""

SLURM_PATIENCE = 1800.0
"""Seconds after which a controller that does not answer stops the run."""


_KEPT = "COADDFLOW_SLURM_ALLOCATION"


class EarlierJob(NamedTuple):
    """A job that an earlier run left in the queue."""

    job_id: str
    run: str
    comment: str
    state: str


def allocation(environ: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Return cores and memory (MB) of the Slurm job that this process runs in, as resources.

    The Snakemake inside a job of Slurm uses all cores that it sees, and on clusters without
    confinement those are the cores of the node.
    """
    found = {}
    for resource, variable in (("_cores", "SLURM_CPUS_PER_TASK"), ("mem_mb", "SLURM_MEM_PER_NODE")):
        value = environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            found[resource] = int(value)
    return found


def hand_down_allocation(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Let the Snakemakes inside a job know what Slurm said of its allocation.

    There are two in a job of Slurm, one below the other. The executor starts the second by `srun`,
    except for jobs of MPI, from which it takes Slurm's variables away. Without them `mpirun`
    knows nothing of the other nodes. The first keeps them under another name, the second gets them
    back.

    Parameters
    ----------
    environ : mapping
        Environment of this process; changed.

    Returns
    -------
    bool
        Whether this is the second Snakemake.
    """
    kept = json.loads(environ.get(_KEPT, "{}"))
    second = bool(kept) and kept.get("SLURM_JOB_ID") == environ.get("SLURM_JOB_ID")
    if second and "SLURM_JOB_NODELIST" not in environ:
        environ.update(kept)
    elif "SLURM_JOB_NODELIST" in environ:
        found = {name: value for name, value in environ.items() if name.startswith("SLURM_")}
        environ[_KEPT] = json.dumps(found)
    return second


def prepare(workflow: Any) -> None:
    """Make a run ready for its executor; called when Snakemake begins to plan.

    Parameters
    ----------
    workflow : snakemake.workflow.Workflow
        The run. Nothing happens unless it is about to submit jobs.

    Raises
    ------
    InputError
        If Slurm cannot be asked for jobs of an earlier run.
    """
    if not workflow.is_main_process or workflow.local_exec:
        return
    if workflow.executor_plugin.name == "slurm" and not someone_else_works(workflow):
        wait_for_earlier_jobs(Path.cwd(), lambda text: print(text, file=sys.stderr))


def refuse_while_earlier_jobs_live(workflow: Any) -> None:
    """Stop a run that would work on what jobs of an earlier run work on.

    `prepare` waits for them, but is not called when a user asks for single products.

    Parameters
    ----------
    workflow : snakemake.workflow.Workflow
        The run, about to begin.

    Raises
    ------
    InputError
        If such jobs are in Slurm's queue.
    """
    if workflow.executor_plugin.name != "slurm":
        return
    jobs = earlier_jobs(Path.cwd())
    if jobs:
        raise InputError(
            f"{len(jobs)} jobs of an earlier run are still in the queue ({_example(jobs)})",
            remedy=f"wait for them, or: scancel --name {' '.join({job.run for job in jobs})}",
        )


def programs_from_any_folder(settings: Any, basedir: str | Path) -> None:
    """Make the programs of a cluster-generic profile absolute; called when a run begins.

    A profile's path is relative to the folder in which Snakemake was called, and with
    ``--directory`` that is not the working folder.

    Parameters
    ----------
    settings : object
        Settings of the executor; those of other executors have none of the attributes.
    basedir : str or Path
        Folder of the Snakefile, tried after the folder in which Snakemake was called.
    """
    folders = [Path(), Path(os.environ.get("PWD", "")), Path(basedir)]
    for name in ("submit_cmd", "status_cmd", "cancel_cmd"):
        program = getattr(settings, name, None)
        for folder in folders if program else []:
            if (folder / program).is_file():
                setattr(settings, name, str((folder / program).resolve()))
                break


def someone_else_works(workflow: Any) -> bool:
    """Return whether the folder is locked: Snakemake then refuses by itself."""
    locks = Path(".snakemake") / "locks"
    return workflow.execution_settings.lock and locks.is_dir() and any(locks.iterdir())


def earlier_jobs(folder: Path) -> list[EarlierJob]:
    """Return the jobs of Snakemake in Slurm's queue that work in a folder.

    Raises
    ------
    OSError, subprocess.SubprocessError
        If squeue fails.
    """
    squeue = subprocess.run(  # noqa: S603 - a list, no shell
        # of the user's PATH
        ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%i|%j|%T|%k|%Z"],  # noqa: S607
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    jobs = []
    for line in squeue.stdout.splitlines():
        job_id, run, state, comment, work_folder = line.split("|", 4)
        if comment.startswith("rule_") and Path(work_folder).resolve() == folder.resolve():
            jobs.append(EarlierJob(job_id, run, comment.removeprefix("rule_"), state))
    return jobs


def wait_for_earlier_jobs(folder: Path, say: Callable[[str], None]) -> None:
    """Wait until no job of an earlier run works in a folder any more.

    Parameters
    ----------
    folder : Path
        The working folder of the run.
    say : callable
        Takes a line for the user.

    Raises
    ------
    InputError
        If Slurm gives no answer for `SLURM_PATIENCE`.
    """
    last_answer, told = time.monotonic(), 0
    while True:
        try:
            jobs = earlier_jobs(folder)
        except (OSError, subprocess.SubprocessError) as error:
            if time.monotonic() - last_answer > SLURM_PATIENCE:
                raise InputError(
                    f"Slurm does not say whether jobs of an earlier run still work here ({error})",
                    remedy="start again when squeue answers",
                ) from error
            if told >= 0:
                say(f"coaddflow: Slurm does not answer, asking again: {error}")
                told = -1
            time.sleep(SLURM_PAUSE)
            continue
        last_answer = time.monotonic()
        if not jobs:
            return
        if len(jobs) != told:
            names = " ".join(sorted({job.run for job in jobs}))
            say(
                f"coaddflow: {len(jobs)} jobs of an earlier run are still in the queue "
                f"({_example(jobs)}). They are "
                f"waited for, and what they make is used. To do it anew: scancel --name {names}"
            )
            told = len(jobs)
        time.sleep(SLURM_PAUSE)


def _example(jobs: list[EarlierJob]) -> str:
    return f"{jobs[0].job_id} {jobs[0].comment} {jobs[0].state.lower()}, ..."
