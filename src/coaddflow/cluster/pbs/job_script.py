"""From a job script of Snakemake to what PBS gets."""

import hashlib
import json
import math
import os
import re
import shlex
from pathlib import Path

from coaddflow.cluster.pbs import limits, records

PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")
"""Variables of the environment that a job gets. They are set in the script, because the list of
qsub -v breaks at commas and line ends."""

TEMPLATE = """\
#!/bin/sh
# {name}: a job of coaddflow
exec 3>&2 >>{log} 2>&1 </dev/null
umask {umask}
cd {folder} || exit 1
job=${{PBS_JOBID:-${{SLURM_JOB_ID:-unknown}}}}
does_nothing() {{
    echo "coaddflow: $job $1: nothing is done"
    echo "coaddflow: $1: nothing is done" >&3
    exit "$2"
}}
# Whoever submitted this job may have taken back the permission to begin; on a network a file may
# appear late.
for pause in 0 1 2; do
    sleep $pause
    [ -e {begun} ] || mv {ticket} {begun} 2>/dev/null && break
done
[ -e {begun} ] || does_nothing "cancelled before it began" 1
[ ! -s {begun} ] || does_nothing "begun before" {begun_before}
exec 3>&-
echo "$job" >{begun}
{exports}
echo "coaddflow: job $job on $(uname -n) of survey {survey} begins $(date '+%Y-%m-%dT%H:%M:%S')"
(
{body}
)
code=$?
echo "coaddflow: job $job ends $(date '+%Y-%m-%dT%H:%M:%S'), exit code $code"
# 143: terminated; PBS knows better why
[ "$code" = 143 ] || {{ echo "$code" >{exit_new} && mv {exit_new} {exit_file}; }}
exit "$code"
"""


class JobScript:
    """A job script of Snakemake; reading one that is none raises ValueError.

    Attributes
    ----------
    text, name : str
        The script, and a name of the job that PBS accepts.
    threads, resources : int, dict
        Its cores and other resources.
    targets : list of str
        The jobs of Snakemake in it: rule and wildcards.
    settings : str
        A checksum of the settings.
    files, run : str
        The folder in which the run of Snakemake keeps files for its jobs, and a short name for it.
    """

    def __init__(self, path):
        self.text = path.read_text(encoding="utf-8")
        match = re.search(r"^# properties = (\{.*\})$", self.text, re.MULTILINE)
        if not match:
            raise ValueError("there is no line '# properties = ' in it")
        properties = json.loads(match.group(1))
        self.name = job_name(properties)
        self.threads = positive_integer(properties.get("threads", 1), "threads")
        self.resources = properties["resources"]
        lines = [line for line in self.text.splitlines() if not line.startswith("#")]
        words = shlex.split("\n".join(lines))
        self.targets = sorted(values_of(words, "--target-jobs"))
        if not self.targets:
            raise ValueError("it does not say what its jobs are (--target-jobs)")
        self.settings = settings_digest(words)
        self.files = str(path.parent.resolve())
        self.run = hashlib.sha256(self.files.encode()).hexdigest()[:8]


def values_of(words, option):
    """Return the values of an option of a command line."""
    if option not in words:
        return []
    rest = words[words.index(option) + 1 :]
    ends = [i for i, word in enumerate(rest) if word.startswith("--") or word == "&&"]
    return rest[: ends[0]] if ends else rest


def settings_digest(words):
    """Return a checksum of the settings in a command of Snakemake: files and --config."""
    digest = hashlib.sha256(json.dumps(values_of(words, "--config")).encode())
    for name in values_of(words, "--configfiles") or ["config.yaml"]:
        path = Path(name)
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def job_name(properties):
    """Return a readable name that PBS accepts: exposure_1001, tract_0, master_bias_3."""
    if properties["type"] == "group":
        name = properties["groupid"]
    else:
        name = "_".join([properties["rule"], *properties["wildcards"].values()])
    name = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60]
    return name if name[:1].isalpha() else f"j{name}"


def asked_by(script):
    """Return what a job asks for; raise ValueError if PBS cannot take a resource."""
    resources = script.resources

    def number(name):
        value = resources.get(name)
        return 0 if value is None else positive_integer(value, name)

    queue = str(resources.get("pbs_queue") or "")
    return limits.Asked(number("mem_mb"), script.threads, number("runtime"), queue)


def qsub_arguments(script):
    """Return the arguments of qsub for a job; raise ValueError if PBS cannot take a resource."""
    resources, asked = script.resources, asked_by(script)
    wanted = f"select=1:ncpus={asked.cores}"
    if asked.mem_mb:
        wanted += f":mem={asked.mem_mb}mb"
    if asked.runtime:
        hours, minutes = divmod(asked.runtime, 60)
        wanted += f",walltime={hours}:{minutes:02d}:00"
    # in one list: the qsub of slurm-wlm-torque uses the last -l only
    arguments = ["-l", wanted]
    for option, name in (("-q", "pbs_queue"), ("-A", "pbs_account")):
        value = str(resources.get(name) or "")
        if value and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.@:-]*", value):
            raise ValueError(f"{name} {value!r} is not a name that PBS accepts")
        arguments += [option, value] if value else []
    return arguments + shlex.split(str(resources.get("pbs_extra") or ""))


def positive_integer(value, name):
    """Return a number, rounded up; raise ValueError with its name if it is not above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
        raise ValueError(f"{name} is {value!r}, must be a number above 0")
    return math.ceil(value)


def limit_cores(body, threads):
    """Let the Snakemake inside a job use the cores of the job, not those of the profile."""
    return re.sub(r"(?<=\s)--cores\s+(?:'[^']*'|\S+)", f"--cores {threads}", body, count=1)


def current_umask():
    """Return the umask of this process as PBS wants it; reading it needs setting it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return f"{umask:04o}"


def write_script(label, script):
    """Write the script that PBS runs: the one of Snakemake, and what PBS does not do around it.

    PBS starts jobs in the home folder, with a umask of its own, copies their output when they end,
    and may forget how they ended.
    """
    here = Path.cwd()
    # relative to the folder in which the job works: that folder may be moved meanwhile
    files = {
        "ticket": records.FOLDER / "tickets" / label,
        "begun": records.FOLDER / "begun" / label,
        "exit_file": records.FOLDER / "exit" / label,
        "exit_new": records.FOLDER / "exit" / f".{label}",
    }
    passed_on = [(key, os.environ[key]) for key in PASSED_ON if key in os.environ]
    text = TEMPLATE.format(
        name=script.name,
        umask=current_umask(),
        log=shlex.quote(str(here / records.log_of(label))),
        folder=shlex.quote(str(here)),
        survey=records.survey(),
        begun_before=records.BEGUN_BEFORE,
        exports="\n".join(f"export {key}={shlex.quote(value)}" for key, value in passed_on),
        body=limit_cores(script.text, script.threads),
        **{name: shlex.quote(str(path)) for name, path in files.items()},
    )
    records.write(records.FOLDER / "scripts" / f"{label}.sh", text)
