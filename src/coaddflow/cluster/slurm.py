"""What a run on a cluster needs beyond its profile.

A killed Snakemake leaves its jobs in the queue. The next run must not work on an exposure that
one of them still works on: on PBS, profiles/pbs/submit.py takes such a job up; on Slurm, whose
executor submits by itself, the run waits here until they have ended, before it looks at what
there is to do. Standard library only.
"""

import json
import os
import re
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

SLURM_LEAST_AGE = 240
"""Seconds for which Slurm must remember a job that has ended: the executor asks every 180 s."""

_LIVE = "PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING"

_OF_SHELLS = re.compile(r"[$`\"\\\n]")
"""What a shell makes something else of between double quotes."""


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
        If a path of the run would not survive the shells that it goes through, or Slurm cannot be
        asked for jobs of an earlier run, or forgets jobs too soon.
    """
    if not workflow.is_main_process or workflow.local_exec:
        return
    make_ready(workflow)
    if workflow.executor_plugin.name == "slurm" and not someone_else_works(workflow):
        wait_for_earlier_jobs(Path.cwd(), _to_user)


def begin(workflow: Any) -> None:
    """Make a run ready that has not been prepared; called when it begins.

    `prepare` is not called when a user asks for single products. It waits for jobs of an earlier
    run before anything is planned; here it is too late for that.

    Parameters
    ----------
    workflow : snakemake.workflow.Workflow
        The run.

    Raises
    ------
    InputError
        As `prepare`, and if jobs of an earlier run are in Slurm's queue.
    """
    if not workflow.is_main_process or workflow.local_exec:
        return
    make_ready(workflow)
    jobs = answer_of_slurm(Path.cwd(), _to_user) if workflow.executor_plugin.name == "slurm" else []
    if jobs:
        raise InputError(
            f"{len(jobs)} jobs of an earlier run are still in the queue ({_example(jobs)})",
            remedy=f"wait for them, or: scancel --name {' '.join({job.run for job in jobs})}",
        )


def make_ready(workflow: Any) -> None:
    """Do what needs no answer of a cluster, or is asked once; harmless when done twice.

    Raises
    ------
    InputError
        As `prepare`.
    """
    programs_from_any_folder(workflow.executor_settings, workflow.basedir)
    refuse_words_of_shells(
        {
            "working folder": Path.cwd(),
            "Snakefile": workflow.main_snakefile,
            **{f"settings file {i}": path for i, path in enumerate(workflow.configfiles)},
            "program for submissions": getattr(workflow.executor_settings, "submit_cmd", None),
        }
    )
    if workflow.executor_plugin.name == "slurm":
        submit_patiently(workflow.basedir)
        if getattr(workflow.executor_settings, "status_command", "") == "squeue":
            refuse_forgetful_slurm()


def refuse_words_of_shells(paths: Mapping[str, Any]) -> None:
    """Refuse paths that a shell would change: the executors put them between double quotes.

    Parameters
    ----------
    paths : mapping of str to path or None
        What each is, and where.

    Raises
    ------
    InputError
        If one has a dollar, backtick, quote, backslash, or newline in it.
    """
    for what, path in paths.items():
        found = _OF_SHELLS.search(str(path or ""))
        if found:
            raise InputError(
                f"the {what} has a {found[0]!r} in its name, which the shell that starts the jobs "
                "of a cluster would change",
                path=path,
                remedy="rename it",
            )


def submit_patiently(basedir: str | Path) -> None:
    """Put the sbatch of profiles/slurm before the real one in the PATH of this process.

    Parameters
    ----------
    basedir : str or Path
        Folder of the Snakefile.
    """
    folder = Path(basedir).resolve() / "profiles" / "slurm" / "bin"
    if not os.access(folder / "sbatch", os.X_OK):
        _to_user(f"coaddflow: {folder / 'sbatch'} is missing: no patience with the controller")
        return
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if str(folder) not in path:
        os.environ["PATH"] = os.pathsep.join([str(folder), *path])
    os.environ["COADDFLOW_PYTHON"] = sys.executable


def refuse_forgetful_slurm() -> None:
    """Refuse a Slurm whose squeue forgets jobs before the executor asks for them.

    The executor asks every 3 minutes at last, and waits for ever for a job that it has missed.

    Raises
    ------
    InputError
        If ``MinJobAge`` is below `SLURM_LEAST_AGE`.
    """
    age = min_job_age()
    if age is not None and age < SLURM_LEAST_AGE:
        raise InputError(
            f"this Slurm forgets jobs {age} s after their end (MinJobAge); squeue must know them "
            f"for {SLURM_LEAST_AGE} s",
            remedy="ask for a longer MinJobAge, or take the accounting: "
            "--slurm-status-command sacct (docs/slurm.md tells what it costs)",
        )


def min_job_age() -> int | None:
    """Return for how long Slurm remembers jobs that have ended, in seconds; None if unknown."""
    try:
        text = _answer(["scontrol", "show", "config"])
    except (OSError, subprocess.SubprocessError):
        # the controller is away, and is waited for where jobs are asked for
        return None
    match = re.search(r"^MinJobAge\s*=\s*(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else None


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
    """Return the jobs of Snakemake in Slurm's queue that work in a folder, whoever's they are.

    Raises
    ------
    OSError, subprocess.SubprocessError
        If squeue fails.
    """
    squeue = ["squeue", "--noheader", "--states", _LIVE, "--format", "%i|%j|%T|%k|%Z"]
    jobs = []
    for line in _answer(squeue).splitlines():
        # a comment of others may have line breaks in it
        job_id, run, state, comment, work_folder = [*line.split("|", 4), "", "", "", ""][:5]
        if comment.startswith("rule_") and _is_same_folder(work_folder, folder):
            jobs.append(EarlierJob(job_id, run, comment.removeprefix("rule_"), state))
    return jobs


def _answer(command: list[str]) -> str:
    """Return what a command of Slurm prints.

    What a user has set for squeue hides jobs, or changes what it prints.
    """
    environ = {name: text for name, text in os.environ.items() if not name.startswith("SQUEUE_")}
    return subprocess.run(  # noqa: S603 - a list, no shell
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=60,
        env=environ,
    ).stdout


def _is_same_folder(name: str, folder: Path) -> bool:
    """Return whether a job's folder is this one, perhaps as another host mounts it.

    Folders of others are not looked at: theirs may be on a file system that hangs.
    """
    if Path(name).name != folder.resolve().name:
        return False
    try:
        return Path(name).samefile(folder)
    except OSError:
        return False


def answer_of_slurm(folder: Path, say: Callable[[str], None]) -> list[EarlierJob]:
    """Return the jobs of earlier runs in a folder, and ask again while Slurm does not answer.

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
    end, told = time.monotonic() + SLURM_PATIENCE, False
    while True:
        try:
            return earlier_jobs(folder)
        except (OSError, subprocess.SubprocessError) as error:
            words = (getattr(error, "stderr", None) or str(error)).strip()
            if time.monotonic() > end:
                raise InputError(
                    f"Slurm does not say whether jobs of an earlier run still work here ({words})",
                    remedy="start again when squeue answers",
                ) from error
            if not told:
                say(f"coaddflow: Slurm does not answer, asking again: {words}")
                told = True
            time.sleep(SLURM_PAUSE)


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
    told = 0
    while jobs := answer_of_slurm(folder, say):
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


def _to_user(line: str) -> None:
    print(line, file=sys.stderr)
