"""What a run on a cluster needs beyond its profile.

A killed Snakemake leaves its jobs in the queue, and the next run must not work on the same
exposures. On PBS, `cluster.pbs.submit` takes such jobs up. On Slurm, whose executor submits by
itself, the run waits here for their end before it finds out what is to be done.
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

from coaddflow.cluster.sbatch import LIVE_STATES, without_squeue_settings
from coaddflow.errors import InputError

PAUSE = 15.0
"""Seconds between two questions whether the earlier jobs have ended."""

PATIENCE = 1800.0
"""Seconds after which a controller that does not answer stops the run."""

LEAST_JOB_AGE = 240
"""Seconds for which Slurm must remember a job that has ended: the executor asks every 180 s."""

_CHANGED_BY_SHELLS = re.compile(r"[$`\"\\\n]")
"""Characters that a shell changes between double quotes."""

_KEPT = "COADDFLOW_SLURM_ALLOCATION"


class EarlierJob(NamedTuple):
    """A job of an earlier run that is still in the queue."""

    job_id: str
    run: str
    comment: str
    state: str


def allocation(environ: Mapping[str, str] = os.environ) -> dict[str, int]:
    """Return cores and memory (MB) of the Slurm job of this process, as resources of Snakemake.

    The Snakemake inside a job would use all cores that it sees: on clusters without confinement,
    all cores of the node.
    """
    found = {}
    for resource, variable in (("_cores", "SLURM_CPUS_PER_TASK"), ("mem_mb", "SLURM_MEM_PER_NODE")):
        value = environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            found[resource] = int(value)
    return found


def hand_down_allocation(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Pass Slurm's variables on to the second Snakemake of a job.

    Two Snakemakes run in a job of Slurm, one started by the other: by `srun`, except in jobs of
    MPI, where the executor removes Slurm's variables. Without these `mpirun` does not know the
    other nodes. The first Snakemake keeps them under another name, the second restores them.

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
    """Prepare a run that will submit jobs (a `snakemake.workflow.Workflow`) before it is planned.

    Raises
    ------
    InputError
        If a path of the run would be changed by the shells that it passes through, or Slurm does
        not answer, or forgets ended jobs too soon.
    """
    if not workflow.is_main_process or workflow.local_exec:
        return
    prepare_cluster(workflow)
    if workflow.executor_plugin.name == "slurm" and not is_locked(workflow):
        wait_for_earlier_jobs(Path.cwd(), _to_user)


def begin(workflow: Any) -> None:
    """Prepare a run that begins without `prepare`: one for single products.

    By then it is planned, and it is too late to wait for jobs of an earlier run.

    Raises
    ------
    InputError
        As `prepare`, and if jobs of an earlier run are in Slurm's queue.
    """
    if not workflow.is_main_process or workflow.local_exec:
        return
    prepare_cluster(workflow)
    if workflow.executor_plugin.name != "slurm":
        return
    jobs = wait_for_earlier_jobs(Path.cwd(), _to_user, answer_only=True)
    if jobs:
        raise InputError(
            f"{len(jobs)} jobs of an earlier run are still in the queue ({_example(jobs)})",
            remedy=f"wait for them, or: scancel --name {' '.join({job.run for job in jobs})}",
        )


def prepare_cluster(workflow: Any) -> None:
    """Do what does not depend on jobs of an earlier run; doing it twice is harmless."""
    make_programs_absolute(workflow.executor_settings, workflow.basedir)
    refuse_shell_characters(
        {
            "working folder": Path.cwd(),
            "Snakefile": workflow.main_snakefile,
            **{f"settings file {i}": path for i, path in enumerate(workflow.configfiles)},
            "program for submissions": getattr(workflow.executor_settings, "submit_cmd", None),
        }
    )
    if workflow.executor_plugin.name == "slurm":
        use_patient_sbatch(workflow.basedir)
        # the steps of a job stand in its command, which is one argument otherwise: 128 KB at most
        workflow.executor_settings.pass_command_as_script = True
        if getattr(workflow.executor_settings, "status_command", "") == "squeue":
            check_job_age()


def refuse_shell_characters(paths: Mapping[str, Any]) -> None:
    """Raise InputError for paths that a shell would change: executors put them in double quotes.

    Parameters
    ----------
    paths : mapping of str to path or None
        What each path is, and the path.
    """
    for what, path in paths.items():
        found = _CHANGED_BY_SHELLS.search(str(path or ""))
        if found:
            raise InputError(
                f"the path of the {what} contains {found[0]!r}, which the shell that starts the "
                "jobs of a cluster would change",
                path=path,
                remedy="rename it",
            )


def use_patient_sbatch(basedir: str | Path) -> None:
    """Put profiles/slurm/bin/sbatch (beside the Snakefile) before the real one in the PATH."""
    folder = Path(basedir).resolve() / "profiles" / "slurm" / "bin"
    if not os.access(folder / "sbatch", os.X_OK):
        _to_user(
            f"coaddflow: {folder / 'sbatch'} is missing: submissions fail when the controller of "
            "Slurm is away"
        )
        return
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if str(folder) not in path:
        os.environ["PATH"] = os.pathsep.join([str(folder), *path])
    os.environ["COADDFLOW_PYTHON"] = sys.executable


def check_job_age() -> None:
    """Raise InputError if squeue forgets ended jobs sooner than `LEAST_JOB_AGE` (MinJobAge).

    The executor would wait forever for a job that it missed.
    """
    try:
        text = output_of(["scontrol", "show", "config"])
    except (OSError, subprocess.SubprocessError):
        # the controller is away: `wait_for_earlier_jobs` waits for it
        return
    age = re.search(r"^MinJobAge\s*=\s*(\d+)", text, re.MULTILINE)
    if age and int(age[1]) < LEAST_JOB_AGE:
        raise InputError(
            f"this Slurm forgets jobs {age[1]} s after their end (MinJobAge), but squeue must know "
            f"them for {LEAST_JOB_AGE} s",
            remedy="ask for a longer MinJobAge, or use the accounting: "
            "--slurm-status-command sacct (see docs/slurm.md)",
        )


def make_programs_absolute(settings: Any, basedir: str | Path) -> None:
    """Make the programs of a cluster-generic profile absolute.

    They are relative to the folder in which Snakemake was called, which is not the working folder
    with ``--directory``, or else to that of the Snakefile, ``basedir``. Settings of other
    executors have no programs.
    """
    folders = [Path(), Path(os.environ.get("PWD", "")), Path(basedir)]
    for name in ("submit_cmd", "status_cmd", "cancel_cmd"):
        program = getattr(settings, name, None)
        for folder in folders if program else []:
            if (folder / program).is_file():
                setattr(settings, name, str((folder / program).resolve()))
                break


def is_locked(workflow: Any) -> bool:
    """Return whether another Snakemake works in the folder: this one then stops by itself."""
    locks = Path(".snakemake") / "locks"
    return workflow.execution_settings.lock and locks.is_dir() and any(locks.iterdir())


def earlier_jobs(folder: Path) -> list[EarlierJob]:
    """Return the jobs of Snakemake in Slurm's queue that work in a folder, whoever owns them."""
    squeue = ["squeue", "--noheader", "--states", LIVE_STATES, "--format", "%i|%j|%T|%k|%Z"]
    jobs = []
    for line in output_of(squeue).splitlines():
        # comments of other jobs may contain line breaks
        job_id, run, state, comment, work_folder = [*line.split("|", 4), "", "", "", ""][:5]
        if comment.startswith("rule_") and _is_same_folder(work_folder, folder):
            jobs.append(EarlierJob(job_id, run, comment.removeprefix("rule_"), state))
    return jobs


def output_of(command: list[str], timeout: float = 60.0) -> str:
    """Return what a command of a queue system prints, whatever the user's defaults for squeue are.

    Raises
    ------
    OSError, subprocess.SubprocessError
        If it fails, or takes longer than ``timeout`` seconds.
    """
    return subprocess.run(  # noqa: S603 - a list, no shell
        command,
        capture_output=True,
        text=True,
        errors="replace",
        check=True,
        timeout=timeout,
        env=without_squeue_settings(os.environ),
    ).stdout


def _is_same_folder(name: str, folder: Path) -> bool:
    """Return whether a job's folder is this one, perhaps as another host mounts it.

    Folders of other names are not accessed: they may be on a file system that hangs.
    """
    if Path(name).name != folder.resolve().name:
        return False
    try:
        return Path(name).samefile(folder)
    except OSError:
        return False


def wait_for_earlier_jobs(
    folder: Path, say: Callable[[str], None], answer_only: bool = False
) -> list[EarlierJob]:
    """Wait until no job of an earlier run works in a folder any more.

    Parameters
    ----------
    folder : Path
        The working folder of the run.
    say : callable
        Prints a line for the user.
    answer_only : bool
        Wait only until Slurm answers.

    Returns
    -------
    list of EarlierJob
        The jobs in Slurm's last answer.

    Raises
    ------
    InputError
        If Slurm does not answer for `PATIENCE`.
    """
    answered, told = time.monotonic(), None
    while True:
        try:
            jobs = earlier_jobs(folder)
        except (OSError, subprocess.SubprocessError) as error:
            words = (getattr(error, "stderr", None) or str(error)).strip()
            if time.monotonic() > answered + PATIENCE:
                raise InputError(
                    f"Slurm does not say whether jobs of an earlier run still work here ({words})",
                    remedy="start again when squeue answers",
                ) from error
            news, line = "silent", f"Slurm does not answer, asking again: {words}"
        else:
            if answer_only or not jobs:
                return jobs
            answered, news = time.monotonic(), len(jobs)
            names = " ".join(sorted({job.run for job in jobs}))
            line = (
                f"{len(jobs)} jobs of an earlier run are still in the queue ({_example(jobs)}). "
                "This run waits for them and uses what they make. To start them over instead: "
                f"scancel --name {names}"
            )
        if news != told:
            say(f"coaddflow: {line}")
        told = news
        time.sleep(PAUSE)


def _example(jobs: list[EarlierJob]) -> str:
    return f"{jobs[0].job_id} {jobs[0].comment} {jobs[0].state.lower()}, ..."


def _to_user(line: str) -> None:
    print(line, file=sys.stderr)
